//! A small blocking netlink socket: build a message, send it, wait for the answer or the kernel's refusal.
//!
//! Blocking, since a request takes microseconds, and usable in a thread that has entered another network namespace.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt, socket,
    sockopt,
};

/// `struct nlmsghdr`.
const HEADER: usize = 16;
/// `NLA_TYPE_MASK`: the rest are flags.
const TYPE_MASK: u16 = 0x3fff;
/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;

/// Flags for a request that makes something new and fails when it is there.
pub const CREATE: u16 = (libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;
/// Flags for a request that makes something or takes its place.
pub const REPLACE: u16 = (libc::NLM_F_CREATE | libc::NLM_F_REPLACE) as u16;

/// A request under construction.
pub struct Message {
    bytes: Vec<u8>,
}

impl Message {
    /// A request of a type (`RTM_*`) with extra flags and its fixed part.
    pub fn new(kind: u16, flags: u16, body: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(flags | libc::NLM_F_REQUEST as u16).to_ne_bytes());
        bytes.extend_from_slice(body);
        let mut message = Self { bytes };
        message.pad();
        message
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// Adds an attribute.
    #[must_use]
    pub fn attr(mut self, kind: u16, value: &[u8]) -> Self {
        self.bytes.extend_from_slice(&((4 + value.len()) as u16).to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.pad();
        self
    }

    /// Adds an attribute that is one number.
    #[must_use]
    pub fn u32(self, kind: u16, value: u32) -> Self {
        self.attr(kind, &value.to_ne_bytes())
    }

    /// Adds an attribute that is one octet.
    #[must_use]
    pub fn u8(self, kind: u16, value: u8) -> Self {
        self.attr(kind, &[value])
    }

    /// Adds a name, with its closing zero.
    #[must_use]
    pub fn string(self, kind: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attr(kind, &bytes)
    }

    /// Adds an attribute that holds attributes.
    #[must_use]
    pub fn nested(mut self, kind: u16, fill: impl FnOnce(Self) -> Self) -> Self {
        let start = self.bytes.len();
        self = fill(self.attr(kind | NESTED, &[]));
        let length = (self.bytes.len() - start) as u16;
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self
    }

    /// What follows the header.
    #[cfg(test)]
    pub fn into_body(self) -> Vec<u8> {
        self.bytes[HEADER..].to_vec()
    }

    fn finish(mut self, sequence: u32, extra_flags: u16) -> Vec<u8> {
        let length = self.bytes.len() as u32;
        self.bytes[0..4].copy_from_slice(&length.to_ne_bytes());
        let flags = u16::from_ne_bytes([self.bytes[6], self.bytes[7]]) | extra_flags;
        self.bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.bytes
    }
}

/// The attributes in `bytes`: type without flags, and value. Stops at the first that does not fit.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes([*bytes.first()?, *bytes.get(1)?]));
        let kind = u16::from_ne_bytes([*bytes.get(2)?, *bytes.get(3)?]) & TYPE_MASK;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// A number out of an attribute.
pub fn number(value: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(value.get(..4)?.try_into().ok()?))
}

/// A name out of an attribute.
pub fn text(value: &[u8]) -> String {
    let end = value.iter().position(|b| *b == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

/// A message from the kernel: its type and what follows the header.
#[derive(Debug)]
pub struct Reply {
    /// `RTM_*`.
    pub kind: u16,
    /// Fixed part and attributes.
    pub body: Vec<u8>,
}

/// The kernel said no.
#[derive(Debug, thiserror::Error)]
#[error("{}{}", io::Error::from_raw_os_error(*.errno), if .message.is_empty() { String::new() } else { format!(" ({})", .message) })]
pub struct Refusal {
    /// `errno`.
    pub errno: i32,
    /// The kernel's own words, if it had any.
    pub message: String,
}

/// What can go wrong with a request.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel said no.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The socket failed.
    #[error("netlink: {0}")]
    Io(#[from] io::Error),
}

impl From<nix::Error> for Error {
    fn from(e: nix::Error) -> Self {
        Self::Io(e.into())
    }
}

impl Error {
    /// `errno` of a refusal.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused(refusal) => Some(refusal.errno),
            Self::Io(_) => None,
        }
    }
}

/// True if the request was carried out, false if the kernel answered with one of `harmless`.
pub fn unless(result: Result<Vec<Reply>, Error>, harmless: &[i32]) -> Result<bool, Error> {
    match result {
        Ok(_) => Ok(true),
        Err(Error::Refused(refusal)) if harmless.contains(&refusal.errno) => Ok(false),
        Err(e) => Err(e),
    }
}

/// A netlink socket in the network namespace of the thread that opened it.
pub struct Socket {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// Opens a socket for requests to route-netlink.
    pub fn open() -> Result<Self, Error> {
        Self::of(SockProtocol::NetlinkRoute)
    }

    /// Opens a socket for requests to another family of netlink.
    pub fn of(protocol: SockProtocol) -> Result<Self, Error> {
        let fd = open(protocol, SockFlag::SOCK_CLOEXEC, 0)?;
        explain_refusals(&fd);
        Ok(Self { fd, sequence: 0, buffer: vec![0; 1 << 16] })
    }

    /// Sends a request and waits until it is done.
    pub fn request(&mut self, message: Message) -> Result<Vec<Reply>, Error> {
        self.exchange(message, libc::NLM_F_ACK as u16)
    }

    /// Asks for all objects of a kind.
    pub fn dump(&mut self, message: Message) -> Result<Vec<Reply>, Error> {
        self.exchange(message, libc::NLM_F_DUMP as u16)
    }

    /// Sends requests between two messages that frame them (nfnetlink's transactions): all are carried out, or none.
    pub fn transaction(&mut self, begin: Message, requests: Vec<Message>, end: Message) -> Result<(), Error> {
        let first = self.next_sequence();
        let mut bytes = begin.finish(first, 0);
        let mut waiting = requests.len();
        for request in requests {
            bytes.extend(request.finish(self.next_sequence(), libc::NLM_F_ACK as u16));
        }
        let last = self.next_sequence();
        bytes.extend(end.finish(last, 0));
        send(self.fd.as_raw_fd(), &bytes, MsgFlags::empty())?;
        let mut refused = None;
        while waiting > 0 {
            let n = recv(self.fd.as_raw_fd(), &mut self.buffer, MsgFlags::empty())?;
            for (sequence, kind, body) in messages(&self.buffer[..n]) {
                if i32::from(kind) != libc::NLMSG_ERROR || !(first..=last).contains(&sequence) {
                    continue;
                }
                // The kernel answers each request, also after another one failed. Of the frame it
                // reports only a failure.
                waiting = if sequence == first || sequence == last { 0 } else { waiting.saturating_sub(1) };
                refused = refused.or(refusal(body));
            }
        }
        refused.map_or(Ok(()), |refusal| Err(refusal.into()))
    }

    fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1).max(1);
        self.sequence
    }

    fn exchange(&mut self, message: Message, flags: u16) -> Result<Vec<Reply>, Error> {
        self.next_sequence();
        send(self.fd.as_raw_fd(), &message.finish(self.sequence, flags), MsgFlags::empty())?;
        let mut replies = Vec::new();
        loop {
            let n = recv(self.fd.as_raw_fd(), &mut self.buffer, MsgFlags::empty())?;
            for (sequence, kind, body) in messages(&self.buffer[..n]) {
                // The rest of an answer that an earlier error made us leave unread.
                if sequence != self.sequence {
                    continue;
                }
                match i32::from(kind) {
                    // The end of a dump carries its outcome in the same place as an error does.
                    libc::NLMSG_DONE | libc::NLMSG_ERROR => match refusal(body) {
                        None => return Ok(replies),
                        Some(refusal) => return Err(refusal.into()),
                    },
                    _ => replies.push(Reply { kind, body: body.to_vec() }),
                }
            }
        }
    }
}

/// Asks for texts in addition to the numbers in refusals (`NETLINK_EXT_ACK`). Kernels that cannot
/// go on without.
fn explain_refusals(fd: &OwnedFd) {
    let on: i32 = 1;
    let length = size_of::<i32>() as libc::socklen_t;
    // SAFETY: the option takes an int, whose address and size are given.
    unsafe {
        let value = std::ptr::from_ref(&on).cast();
        libc::setsockopt(fd.as_raw_fd(), libc::SOL_NETLINK, libc::NETLINK_EXT_ACK, value, length);
    }
}

fn open(protocol: SockProtocol, flags: SockFlag, groups: u32) -> Result<OwnedFd, Error> {
    let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
    // A dump of many thousand routes arrives faster than it is read.
    setsockopt(&fd, sockopt::RcvBuf, &(1 << 20))?;
    bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
    Ok(fd)
}

/// A socket that hears of changes to objects in `groups` (`RTMGRP_*`); not blocking.
pub struct Listener {
    fd: OwnedFd,
    buffer: Vec<u8>,
}

impl Listener {
    /// Subscribes.
    pub fn open(groups: u32) -> Result<Self, Error> {
        let fd = open(SockProtocol::NetlinkRoute, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, groups)?;
        Ok(Self { fd, buffer: vec![0; 1 << 16] })
    }

    /// Takes everything that has arrived. True if a message of a kind that `concerns` was among it, or if so much came
    /// that some was lost.
    pub fn drain(&mut self, concerns: impl Fn(u16) -> bool) -> Result<bool, Error> {
        let mut heard = false;
        loop {
            match recv(self.fd.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
                Ok(n) => heard |= messages(&self.buffer[..n]).any(|(_, kind, _)| concerns(kind)),
                Err(nix::Error::ENOBUFS) => heard = true,
                Err(nix::Error::EAGAIN) => return Ok(heard),
                Err(e) => return Err(e.into()),
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> i32 {
        self.fd.as_raw_fd()
    }
}

/// The messages in a datagram: sequence number, type, body.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u32, u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = number(bytes)? as usize;
        let kind = u16::from_ne_bytes([*bytes.get(4)?, *bytes.get(5)?]);
        let sequence = number(bytes.get(8..)?)?;
        let body = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((sequence, kind, body))
    })
}

/// The refusal in an `NLMSG_ERROR`; `None` when it is the acknowledgement.
fn refusal(body: &[u8]) -> Option<Refusal> {
    /// `NLMSGERR_ATTR_MSG`.
    const MESSAGE: u16 = 1;
    let code = number(body)?.cast_signed();
    if code == 0 {
        return None;
    }
    // Behind the code: our request, whole unless the kernel capped it; then attributes. Look for them behind the request.
    let request = body.get(4..).and_then(number).unwrap_or(0) as usize;
    let behind = body.get(4 + request.next_multiple_of(4)..).unwrap_or_default();
    let message = attributes(behind).find(|(kind, _)| *kind == MESSAGE).map_or_else(String::new, |(_, v)| text(v));
    Some(Refusal { errno: -code, message })
}

#[cfg(test)]
mod tests {
    use super::{Message, attributes, messages, number, text};

    #[test]
    fn attributes_come_back_as_built() {
        let message = Message::new(16, 0, &[0; 16])
            .string(3, "rn_vxlan")
            .nested(18, |m| m.string(1, "vxlan").nested(2, |m| m.u8(25, 1).u32(15, 7)));
        let bytes = message.finish(9, 4);
        let (sequence, kind, body) = messages(&bytes).next().unwrap();
        assert_eq!((sequence, kind, body.len() + 16), (9, 16, bytes.len()));
        let all: Vec<_> = attributes(&body[16..]).collect();
        assert_eq!((all.len(), all[0].0, text(all[0].1)), (2, 3, "rn_vxlan".to_owned()));
        let inner: Vec<_> = attributes(all[1].1).collect();
        assert_eq!((all[1].0, inner[0].0, inner[1].0), (18, 1, 2));
        let data: Vec<_> = attributes(inner[1].1).collect();
        assert_eq!((data[0].1, number(data[1].1)), (&[1_u8][..], Some(7)));
    }

    #[test]
    fn broken_lengths_end_the_list() {
        assert_eq!(attributes(&[200, 0, 1, 0, 1, 2]).count(), 0);
        assert_eq!(attributes(&[3, 0, 1, 0]).count(), 0);
        assert_eq!(attributes(&[4, 0, 1]).count(), 0);
        assert_eq!(messages(&[255; 15]).count(), 0);
    }
}
