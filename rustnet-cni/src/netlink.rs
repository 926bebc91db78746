//! A small blocking rtnetlink socket: builds messages, sends several in one system call, and says which one failed.
//!
//! The kernel handles the messages of one send in order, so that only the last one asks for an acknowledgement: errors
//! come unasked. A message that fails does not stop those behind it; the caller undoes the whole on any error.

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
/// Create the object.
pub const NLM_F_CREATE: u16 = 0x400;
/// Fail if it exists.
pub const NLM_F_EXCL: u16 = 0x200;
/// Replace it if it exists.
pub const NLM_F_REPLACE: u16 = 0x100;
/// List all objects.
pub const NLM_F_DUMP: u16 = 0x300;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSG_HDR: usize = 16;
const NLA_F_NESTED: u16 = 0x8000;
const NLA_TYPE_MASK: u16 = 0x3fff;
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLMSGERR_ATTR_MSG: u16 = 1;

/// One request under construction.
pub struct Message {
    what: Cow<'static, str>,
    tolerated: &'static [i32],
    buf: Vec<u8>,
}

impl Message {
    /// A request of `kind` with the family's fixed header; `what` names it in errors.
    pub fn new(what: impl Into<Cow<'static, str>>, kind: u16, flags: u16, header: &[u8]) -> Self {
        let mut buf = Vec::with_capacity(256);
        buf.extend_from_slice(&[0; 4]);
        buf.extend_from_slice(&kind.to_ne_bytes());
        buf.extend_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        buf.extend_from_slice(&[0; 8]);
        buf.extend_from_slice(header);
        Self { what: what.into(), tolerated: &[], buf }
    }

    /// Errors that count as success.
    #[must_use]
    pub fn tolerate(mut self, errnos: &'static [i32]) -> Self {
        self.tolerated = errnos;
        self
    }

    /// Adds an attribute.
    #[must_use]
    pub fn attr(mut self, kind: u16, value: &[u8]) -> Self {
        self.buf.extend_from_slice(&((4 + value.len()) as u16).to_ne_bytes());
        self.buf.extend_from_slice(&kind.to_ne_bytes());
        self.buf.extend_from_slice(value);
        self.buf.resize(self.buf.len().next_multiple_of(4), 0);
        self
    }

    /// Adds a number of 32 bits, host order.
    #[must_use]
    pub fn u32(self, kind: u16, value: u32) -> Self {
        self.attr(kind, &value.to_ne_bytes())
    }

    /// Adds a zero-terminated string.
    #[must_use]
    pub fn text(self, kind: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attr(kind, &bytes)
    }

    /// Adds an attribute that holds what `inner` adds.
    #[must_use]
    pub fn nested(mut self, kind: u16, inner: impl FnOnce(Self) -> Self) -> Self {
        let start = self.buf.len();
        self.buf.extend_from_slice(&[0; 2]);
        self.buf.extend_from_slice(&(kind | NLA_F_NESTED).to_ne_bytes());
        let mut done = inner(self);
        let len = (done.buf.len() - start) as u16;
        done.buf[start..start + 2].copy_from_slice(&len.to_ne_bytes());
        done
    }

    /// Adds bytes as they are: a fixed header within an attribute.
    #[must_use]
    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.buf.extend_from_slice(bytes);
        self
    }
}

/// A request that the kernel refused.
#[derive(Debug)]
pub struct Refused {
    what: String,
    /// The error number, positive.
    pub errno: i32,
    hint: String,
}

impl Refused {
    /// A refusal without the kernel's own words.
    pub fn new(what: impl Into<String>, errno: i32) -> Self {
        Self { what: what.into(), errno, hint: String::new() }
    }

    /// The kernel accepted a request and did not answer as it should.
    pub fn unexpected(what: String) -> Self {
        Self::new(what, libc::EPROTO)
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, io::Error::from_raw_os_error(self.errno))?;
        if self.hint.is_empty() { Ok(()) } else { write!(f, ": {}", self.hint) }
    }
}

impl From<Refused> for crate::types::error::Error {
    fn from(r: Refused) -> Self {
        let e = Self::new(crate::types::error::code::IO, r.to_string());
        if r.errno == libc::EPERM { e.details("the CNI binary must run as root with CAP_NET_ADMIN") } else { e }
    }
}

/// One reply: its type and what follows the netlink header.
pub struct Reply {
    /// Message type, such as RTM_NEWLINK.
    pub kind: u16,
    /// The family's fixed header and the attributes.
    pub body: Vec<u8>,
}

impl Reply {
    /// The attributes behind a fixed header of `header` bytes.
    pub fn attrs(&self, header: usize) -> Attrs<'_> {
        Attrs(self.body.get(header..).unwrap_or_default())
    }

    /// A number of 32 bits in the fixed header.
    pub fn header_u32(&self, offset: usize) -> u32 {
        u32_at(&self.body, offset).unwrap_or_default()
    }
}

/// Attributes, up to the first malformed one.
#[derive(Clone, Copy)]
pub struct Attrs<'a>(&'a [u8]);

impl<'a> Attrs<'a> {
    fn iter(self) -> impl Iterator<Item = (u16, &'a [u8])> {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            let len = usize::from(u16_at(rest, 0)?);
            let kind = u16_at(rest, 2)? & NLA_TYPE_MASK;
            let value = rest.get(4..len)?;
            rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
            Some((kind, value))
        })
    }

    /// The first attribute of a kind.
    pub fn get(self, kind: u16) -> Option<&'a [u8]> {
        self.iter().find(|(k, _)| *k == kind).map(|(_, v)| v)
    }

    /// The first attribute of a kind as a number of 32 bits.
    pub fn u32(self, kind: u16) -> Option<u32> {
        self.get(kind).and_then(|v| u32_at(v, 0))
    }

    /// The first attribute of a kind as text.
    pub fn text(self, kind: u16) -> Option<&'a str> {
        let bytes = self.get(kind)?;
        std::str::from_utf8(bytes.split(|b| *b == 0).next()?).ok()
    }

    /// The attributes within an attribute.
    pub fn nested(self, kind: u16) -> Self {
        Self(self.get(kind).unwrap_or_default())
    }
}

fn u16_at(b: &[u8], at: usize) -> Option<u16> {
    b.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

fn u32_at(b: &[u8], at: usize) -> Option<u32> {
    b.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

/// A route socket in the network namespace in which it was opened.
pub struct Socket {
    fd: OwnedFd,
    seq: u32,
    buf: Vec<u8>,
}

impl Socket {
    /// Opens a socket in the calling thread's network namespace.
    pub fn open() -> io::Result<Self> {
        // SAFETY: plain system call without pointers.
        let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_ROUTE) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just opened and nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        for option in [libc::NETLINK_EXT_ACK, libc::NETLINK_CAP_ACK] {
            let one: libc::c_int = 1;
            // SAFETY: the pointer and the length describe `one`. Failure only costs the kernel's explanations.
            unsafe {
                libc::setsockopt(
                    fd.as_raw_fd(),
                    libc::SOL_NETLINK,
                    option,
                    (&raw const one).cast(),
                    size_of_val(&one) as u32,
                );
            }
        }
        Ok(Self { fd, seq: 0, buf: vec![0; 64 * 1024] })
    }

    /// Sends all messages at once and waits for the last; returns the replies, or the first refusal.
    pub fn run(&mut self, messages: Vec<Message>) -> Result<Vec<Reply>, Refused> {
        let Some(last) = messages.len().checked_sub(1) else { return Ok(Vec::new()) };
        let first_seq = self.seq.wrapping_add(1);
        let mut out = Vec::with_capacity(1024);
        let mut steps = Vec::with_capacity(messages.len());
        let mut dump = false;
        for (i, Message { what, tolerated, mut buf }) in messages.into_iter().enumerate() {
            self.seq = self.seq.wrapping_add(1);
            let len = buf.len() as u32;
            buf[0..4].copy_from_slice(&len.to_ne_bytes());
            buf[8..12].copy_from_slice(&self.seq.to_ne_bytes());
            if i == last {
                let flags = u16_at(&buf, 6).unwrap_or_default();
                dump = flags & NLM_F_DUMP == NLM_F_DUMP && flags & NLM_F_CREATE == 0;
                if !dump {
                    buf[6..8].copy_from_slice(&(flags | NLM_F_ACK).to_ne_bytes());
                }
            }
            out.extend_from_slice(&buf);
            out.resize(out.len().next_multiple_of(4), 0);
            steps.push((what, tolerated));
        }
        let broken =
            |what: &str, e: &io::Error| Refused::new(format!("netlink {what}"), e.raw_os_error().unwrap_or(libc::EIO));
        self.send(&out).map_err(|e| broken("send", &e))?;

        let mut refused: Option<Refused> = None;
        let mut replies = Vec::new();
        loop {
            let n = self.receive().map_err(|e| broken("receive", &e))?;
            let mut rest = &self.buf[..n];
            while let (Some(len), Some(kind), Some(flags), Some(seq)) =
                (u32_at(rest, 0), u16_at(rest, 4), u16_at(rest, 6), u32_at(rest, 8))
            {
                let Some(body) = rest.get(NLMSG_HDR..len as usize) else { break };
                let index = seq.wrapping_sub(first_seq) as usize;
                rest = rest.get((len as usize).next_multiple_of(4)..).unwrap_or_default();
                let Some((what, tolerated)) = steps.get(index) else { continue };
                match kind {
                    NLMSG_ERROR => {
                        let errno = u32_at(body, 0).unwrap_or_default().wrapping_neg().cast_signed();
                        if errno != 0 && !tolerated.contains(&errno) && refused.is_none() {
                            refused = Some(Refused { what: what.to_string(), errno, hint: hint(body, flags) });
                        }
                        if index == last {
                            return refused.map_or(Ok(replies), Err);
                        }
                    }
                    NLMSG_DONE if index == last && dump => return refused.map_or(Ok(replies), Err),
                    NLMSG_DONE => {}
                    _ => replies.push(Reply { kind, body: body.to_vec() }),
                }
            }
        }
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        loop {
            // SAFETY: the pointer and the length describe `bytes`.
            let n = unsafe { libc::send(self.fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
            match n {
                n if n >= 0 => return Ok(()),
                _ if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
                _ => return Err(io::Error::last_os_error()),
            }
        }
    }

    fn receive(&mut self) -> io::Result<usize> {
        loop {
            // SAFETY: the pointer and the length describe the buffer.
            let n = unsafe { libc::recv(self.fd.as_raw_fd(), self.buf.as_mut_ptr().cast(), self.buf.len(), 0) };
            match usize::try_from(n) {
                Ok(n) => return Ok(n),
                Err(_) if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(io::Error::last_os_error()),
            }
        }
    }
}

/// The kernel's explanation within an error message, if it gave one.
fn hint(body: &[u8], flags: u16) -> String {
    if flags & NLM_F_ACK_TLVS == 0 {
        return String::new();
    }
    // NETLINK_CAP_ACK: only the header of our request is quoted, then the attributes follow.
    Attrs(body.get(4 + NLMSG_HDR..).unwrap_or_default()).text(NLMSGERR_ATTR_MSG).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::{Attrs, Message, NLMSG_HDR};

    #[test]
    fn nested_attributes_read_back() {
        let m = Message::new("test", 16, 0, &[7; 16]).text(3, "eth0").nested(18, |m| m.u32(1, 5).attr(2, &[9]));
        let attrs = Attrs(&m.buf[NLMSG_HDR + 16..]);
        assert_eq!(attrs.text(3), Some("eth0"));
        assert_eq!(attrs.nested(18).u32(1), Some(5));
        assert_eq!(attrs.nested(18).get(2), Some(&[9][..]));
        assert_eq!(attrs.get(99), None);
        assert_eq!(m.buf.len() % 4, 0);
    }

    #[test]
    fn malformed_attributes_end_the_walk() {
        for bytes in [&[][..], &[1], &[3, 0, 1, 0], &[0, 0, 1, 0], &[200, 0, 1, 0, 1, 2]] {
            assert_eq!(Attrs(bytes).iter().count(), 0, "{bytes:?}");
        }
    }
}
