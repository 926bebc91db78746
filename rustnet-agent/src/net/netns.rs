//! Numbers of network namespaces, as the programs of socket calls see them.

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result};

/// `SO_NETNS_COOKIE` (asm-generic/socket.h), since kernel 5.14.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// The kernel's number of the calling thread's network namespace.
///
/// # Errors
/// The kernel has no such numbers, or no socket for us.
pub fn cookie() -> Result<u64> {
    // Any socket will do; this one needs no route and sends nothing.
    let socket = UdpSocket::bind("127.0.0.1:0").context("opening a socket")?;
    let mut cookie = 0_u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: value and length are ours, and the length is that of the value.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_NETNS_COOKIE, (&raw mut cookie).cast(), &raw mut len)
    };
    if result != 0 {
        return Err(io::Error::last_os_error()).context("asking for the number of this network namespace");
    }
    Ok(cookie)
}
