//! The pod's network namespace: opening it, checking it, and doing one thing inside it.

use crate::types::error::{Error, code};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;

/// `NS_GET_NSTYPE` of linux/nsfs.h.
const NS_GET_NSTYPE: libc::c_ulong = 0xb703;
/// `SO_NETNS_COOKIE` (asm-generic/socket.h), since kernel 5.14.
const SO_NETNS_COOKIE: libc::c_int = 71;
const OWN: &str = "/proc/thread-self/ns/net";

/// An open network namespace that is not the caller's own.
pub struct Netns {
    pod: File,
    own: File,
}

impl Netns {
    /// Opens the namespace at `path`.
    pub fn open(path: &str) -> Result<Self, Error> {
        let gone = |why: String| {
            Error::new(code::UNKNOWN_CONTAINER, format!("network namespace {path}: {why}"))
                .details("the container has gone, or CNI_NETNS is wrong")
        };
        let pod = File::open(path).map_err(|e| match e.kind() {
            io::ErrorKind::PermissionDenied => Error::io(format!("network namespace {path}"), &e),
            _ => gone(e.to_string()),
        })?;
        // SAFETY: this ioctl takes no argument.
        if unsafe { libc::ioctl(pod.as_raw_fd(), NS_GET_NSTYPE) } != libc::CLONE_NEWNET {
            return Err(gone("not a network namespace".into()));
        }
        let own = File::open(OWN).map_err(|e| Error::io(OWN, &e))?;
        let identity = |f: &File| f.metadata().map(|m| (m.dev(), m.ino())).map_err(|e| Error::io(path, &e));
        if identity(&pod)? == identity(&own)? {
            let text = format!("CNI_NETNS {path} is the host's own network namespace");
            return Err(Error::new(code::NETNS, text).details(
                "a pod's default route would become the host's, which CNI_NETNS_OVERRIDE does not change; give the container a \
                 namespace of its own, or no network",
            ));
        }
        Ok(Self { pod, own })
    }

    /// The kernel's number of the namespace; `None` before kernel 5.14.
    pub fn cookie(&self) -> io::Result<Option<u64>> {
        // Any socket will do; this one needs neither an interface nor IPv4.
        let socket = self.inside(UnixDatagram::unbound)?;
        let mut cookie = 0_u64;
        let mut len = size_of::<u64>() as libc::socklen_t;
        let value = (&raw mut cookie).cast();
        // SAFETY: value and length are ours, and the length is that of the value.
        match unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_NETNS_COOKIE, value, &raw mut len) } {
            0 => Ok(Some(cookie)),
            _ => match io::Error::last_os_error() {
                e if e.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(None),
                e => Err(e),
            },
        }
    }

    /// Runs `f` with this thread inside the namespace.
    pub fn inside<T>(&self, f: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        enter(&self.pod)?;
        let out = f();
        enter(&self.own)?;
        out
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pod.as_fd()
    }
}

fn enter(ns: &File) -> io::Result<()> {
    // SAFETY: plain system call without pointers; it changes only this thread's namespace.
    if unsafe { libc::setns(ns.as_raw_fd(), libc::CLONE_NEWNET) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
