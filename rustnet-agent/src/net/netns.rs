//! Network namespaces: their numbers, as the programs of socket calls see them, and doing one thing in a pod's.

use std::fs::File;
use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::thread;

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns};

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

/// Runs `f` in a thread of its own, which has entered the network namespace at `path`. What it opens there stays there.
///
/// # Errors
/// The namespace cannot be entered, or `f` fails.
pub fn inside<T: Send>(path: &Path, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let namespace = File::open(path).context("cannot open it")?;
    let enter = || setns(&namespace, CloneFlags::CLONE_NEWNET).context("cannot enter it").and_then(|()| f());
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("netns".to_owned()).spawn_scoped(scope, enter);
        let thread = thread.context("no thread to enter it; raise the limit of tasks")?;
        thread.join().unwrap_or_else(|_| Err(anyhow!("the thread that entered it has panicked")))
    })
}
