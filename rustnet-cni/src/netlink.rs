//! A small blocking rtnetlink socket: sends several messages in one system call, and says which one failed.
//!
//! The kernel handles the messages of one send in order, so that only the last one asks for an acknowledgement: errors
//! come unasked. A message that fails does not stop those behind it; the caller undoes the whole on any error.
//!
//! Socket, headers and attributes are those of netlink-sys and netlink-packet-*. The attributes' values are written and read
//! by their numbers: code for each attribute of each message would only make the binary larger.

use netlink_packet_core::{
    DefaultNla, Emitable, NLA_F_NESTED, NLA_HEADER_SIZE, NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_DUMP_INTR, NLM_F_REQUEST,
    NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer, NetlinkHeader, NlasIterator, parse_i32, parse_u32,
};
pub use netlink_packet_core::{NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_sys::{SocketAddr, protocols::NETLINK_ROUTE};
use std::borrow::Cow;
use std::fmt;
use std::io;

/// `struct nlmsghdr`.
const NLMSG_HDR: usize = 16;
const NLMSGERR_ATTR_MSG: u16 = 1;
/// How often a list is read again that changed meanwhile. Where that many pods come and go, a runtime does better to try again.
const DUMPS_MAX: usize = 100;

/// One request under construction.
pub struct Message {
    what: Cow<'static, str>,
    tolerated: &'static [i32],
    kind: u16,
    flags: u16,
    body: Vec<u8>,
}

impl Message {
    /// A request of `kind` with the family's fixed header; `what` names it in errors.
    pub fn new(what: impl Into<Cow<'static, str>>, kind: u16, flags: u16, header: &dyn Emitable) -> Self {
        Self { what: what.into(), tolerated: &[], kind, flags, body: Vec::with_capacity(256) }.with(header)
    }

    /// Errors that count as success.
    #[must_use]
    pub fn tolerate(mut self, errnos: &'static [i32]) -> Self {
        self.tolerated = errnos;
        self
    }

    /// Adds an attribute.
    #[must_use]
    pub fn attr(self, kind: u16, value: &[u8]) -> Self {
        self.with(&DefaultNla::new(kind, value.to_vec()))
    }

    /// Adds a number of 32 bits, host order.
    #[must_use]
    pub fn u32(self, kind: u16, value: u32) -> Self {
        self.attr(kind, &value.to_ne_bytes())
    }

    /// Adds a zero-terminated string.
    #[must_use]
    pub fn text(self, kind: u16, value: &str) -> Self {
        self.attr(kind, &[value.as_bytes(), &[0]].concat())
    }

    /// Adds an attribute that holds what `inner` adds.
    #[must_use]
    pub fn nested(mut self, kind: u16, inner: impl FnOnce(Self) -> Self) -> Self {
        let outer = std::mem::take(&mut self.body);
        let mut done = inner(self);
        let value = std::mem::replace(&mut done.body, outer);
        done.attr(kind | NLA_F_NESTED, &value)
    }

    /// Adds a fixed header within an attribute.
    #[must_use]
    pub fn with(mut self, part: &dyn Emitable) -> Self {
        let at = self.body.len();
        self.body.resize(at + part.buffer_len(), 0);
        part.emit(&mut self.body[at..]);
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
        let changes = r.errno == libc::EAGAIN;
        let code = if changes { crate::types::error::code::TRY_AGAIN } else { crate::types::error::code::IO };
        let e = Self::new(code, r.to_string());
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
}

/// Attributes, up to the first malformed one.
#[derive(Clone, Copy)]
pub struct Attrs<'a>(&'a [u8]);

impl<'a> Attrs<'a> {
    fn iter(self) -> impl Iterator<Item = (u16, &'a [u8])> {
        let all = NlasIterator::new(self.0).map_while(Result::ok);
        all.map(|nla| (nla.kind(), &nla.into_inner()[NLA_HEADER_SIZE..usize::from(nla.length())]))
    }

    /// The first attribute of a kind.
    pub fn get(self, kind: u16) -> Option<&'a [u8]> {
        self.iter().find(|(k, _)| *k == kind).map(|(_, v)| v)
    }

    /// The first attribute of a kind as a number of 32 bits.
    pub fn u32(self, kind: u16) -> Option<u32> {
        parse_u32(self.get(kind)?).ok()
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

/// A route socket in the network namespace in which it was opened.
pub struct Socket {
    inner: netlink_sys::Socket,
    seq: u32,
    buf: Vec<u8>,
    /// How many lists were read again, because they changed while they were read.
    #[cfg(test)]
    interrupted: usize,
}

impl Socket {
    /// Opens a socket in the calling thread's network namespace.
    pub fn open() -> io::Result<Self> {
        let mut inner = netlink_sys::Socket::new(NETLINK_ROUTE)?;
        inner.bind(&SocketAddr::new(0, 0))?;
        inner.set_ext_ack(true)?;
        inner.set_cap_ack(true)?;
        Ok(Self {
            inner,
            seq: 0,
            buf: Vec::with_capacity(64 * 1024),
            #[cfg(test)]
            interrupted: 0,
        })
    }

    /// Sends all messages at once and waits for the last; returns the replies, or the first refusal.
    pub fn run(&mut self, messages: Vec<Message>) -> Result<Vec<Reply>, Refused> {
        let Some(last) = messages.len().checked_sub(1) else { return Ok(Vec::new()) };
        let first_seq = self.seq.wrapping_add(1);
        let mut out = Vec::with_capacity(1024);
        let mut steps = Vec::with_capacity(messages.len());
        let mut dump = false;
        for (i, Message { what, tolerated, kind, mut flags, body }) in messages.into_iter().enumerate() {
            self.seq = self.seq.wrapping_add(1);
            if i == last {
                dump = flags & NLM_F_DUMP == NLM_F_DUMP && flags & NLM_F_CREATE == 0;
                flags |= if dump { 0 } else { NLM_F_ACK };
            }
            let mut header = NetlinkHeader::default();
            header.length = (NLMSG_HDR + body.len()) as u32;
            header.message_type = kind;
            header.flags = flags | NLM_F_REQUEST;
            header.sequence_number = self.seq;
            let at = out.len();
            out.resize(at + NLMSG_HDR, 0);
            header.emit(&mut out[at..]);
            // Headers and attributes are of whole words, and so is the message.
            out.extend_from_slice(&body);
            steps.push((what, tolerated));
        }
        for _ in 0..DUMPS_MAX {
            let (replies, is_whole) = self.exchange(&out, first_seq, &steps, dump)?;
            if is_whole {
                return Ok(replies);
            }
            #[cfg(test)]
            {
                self.interrupted += 1;
            }
        }
        Err(Refused {
            what: steps[last].0.to_string(),
            errno: libc::EAGAIN,
            hint: format!("the list changed {DUMPS_MAX} times while it was read"),
        })
    }

    /// Sends the bytes of messages and reads the answers; false if a list changed while it was read, so that entries may be missing.
    fn exchange(
        &mut self,
        out: &[u8],
        first_seq: u32,
        steps: &[(Cow<'static, str>, &'static [i32])],
        is_dump: bool,
    ) -> Result<(Vec<Reply>, bool), Refused> {
        let broken =
            |what: &str, e: &io::Error| Refused::new(format!("netlink {what}"), e.raw_os_error().unwrap_or(libc::EIO));
        let socket = &self.inner;
        uninterrupted(|| socket.send(out, 0)).map_err(|e| broken("send", &e))?;

        let mut answer = Answer { is_whole: true, ..Answer::default() };
        loop {
            self.buf.clear();
            uninterrupted(|| self.inner.recv(&mut self.buf, 0)).map_err(|e| broken("receive", &e))?;
            if answer.read(&self.buf, first_seq, steps, is_dump) {
                return answer.refused.map_or(Ok((answer.replies, answer.is_whole)), Err);
            }
        }
    }
}

/// What was read of the answers to the messages of one send.
#[derive(Default)]
struct Answer {
    replies: Vec<Reply>,
    /// The first refusal.
    refused: Option<Refused>,
    /// False if a list changed while it was read.
    is_whole: bool,
}

impl Answer {
    /// Reads the messages of one datagram; true at the end of the last answer.
    fn read(
        &mut self,
        mut rest: &[u8],
        first_seq: u32,
        steps: &[(Cow<'static, str>, &'static [i32])],
        is_dump: bool,
    ) -> bool {
        let last = steps.len() - 1;
        while let Ok(message) = NetlinkBuffer::new_checked(rest) {
            rest = rest.get((message.length() as usize).next_multiple_of(4)..).unwrap_or_default();
            let index = message.sequence_number().wrapping_sub(first_seq) as usize;
            let Some((what, tolerated)) = steps.get(index) else { continue };
            let body = message.payload();
            self.is_whole &= message.flags() & NLM_F_DUMP_INTR == 0 || message.message_type() == NLMSG_ERROR;
            let kind = message.message_type();
            if kind != NLMSG_ERROR && kind != NLMSG_DONE {
                self.replies.push(Reply { kind, body: body.to_vec() });
                continue;
            }
            // A dump that fails half-way says so at its end.
            let errno = body.get(..4).and_then(|code| parse_i32(code).ok()).unwrap_or_default().wrapping_neg();
            if errno > 0 && !tolerated.contains(&errno) && self.refused.is_none() {
                let hint = if kind == NLMSG_ERROR { hint(body, message.flags()) } else { String::new() };
                self.refused = Some(Refused { what: what.to_string(), errno, hint });
            }
            if index == last && (is_dump || kind == NLMSG_ERROR) {
                return true;
            }
        }
        false
    }
}

/// Makes a system call again that a signal ended.
fn uninterrupted(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
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
    use super::{Answer, Attrs, Cow, Message, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLMSG_DONE, Socket};
    use netlink_packet_route::link::LinkHeader;

    #[test]
    fn nested_attributes_read_back() {
        let m = Message::new("test", 16, 0, &LinkHeader::default())
            .text(3, "eth0")
            .nested(18, |m| m.u32(1, 5).attr(2, &[9]));
        let attrs = Attrs(&m.body[16..]);
        assert_eq!(attrs.text(3), Some("eth0"));
        assert_eq!(attrs.nested(18).u32(1), Some(5));
        assert_eq!(attrs.nested(18).get(2), Some(&[9][..]));
        assert_eq!(attrs.get(99), None);
        assert_eq!(m.body.len() % 4, 0);
    }

    #[test]
    fn malformed_attributes_end_the_walk() {
        for bytes in [&[][..], &[1], &[3, 0, 1, 0], &[0, 0, 1, 0], &[200, 0, 1, 0, 1, 2]] {
            assert_eq!(Attrs(bytes).iter().count(), 0, "{bytes:?}");
        }
    }

    /// A dump that fails half-way ends with NLMSG_DONE and the error, not with NLMSG_ERROR.
    #[test]
    fn a_list_that_fails_at_its_end_is_refused() {
        let message = |kind: u16, body: &[u8]| {
            let head = [(16 + body.len() as u32).to_ne_bytes(), (u32::from(kind) | 2 << 16).to_le_bytes()].concat();
            [&head[..], &7_u32.to_ne_bytes(), &[0; 4], body].concat()
        };
        let steps = [(Cow::from("list links"), &[][..])];
        for (code, errno) in [(0, None), (9, None), (-libc::EMSGSIZE, Some(libc::EMSGSIZE))] {
            let bytes = [message(libc::RTM_NEWLINK, &[1; 16]), message(NLMSG_DONE, &i32::to_ne_bytes(code))].concat();
            let mut answer = Answer { is_whole: true, ..Answer::default() };
            assert!(answer.read(&bytes, 7, &steps, true) && answer.is_whole && answer.replies.len() == 1);
            assert_eq!(answer.refused.map(|r| (r.what, r.errno)), errno.map(|e| ("list links".to_owned(), e)));
        }
    }

    /// While others come and go, each list has all that stays.
    #[test]
    fn a_list_that_changes_while_it_is_read_is_read_again() {
        const STAY: u8 = 200;
        let ip = |args: &str| {
            let done = std::process::Command::new("ip").args(args.split(' ')).status();
            assert!(done.is_ok_and(|status| status.success()), "ip {args}");
        };
        // SAFETY: plain system call; it gives this thread a network namespace of its own.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "these tests need root");
        let line = |n| format!("link add stay{n} type bridge");
        let batch = (0..STAY).map(line).collect::<Vec<_>>().join("\n");
        let file = std::env::temp_dir().join(format!("rn{}-links", std::process::id()));
        std::fs::write(&file, batch).expect("write");
        ip(&format!("-batch {}", file.display()));
        std::fs::remove_file(&file).expect("remove");
        let own = std::fs::File::open("/proc/thread-self/ns/net").expect("namespace");
        let done = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let is_done = done.clone();
        let churn = std::thread::spawn(move || {
            use std::os::fd::AsRawFd as _;
            // SAFETY: plain system call; it changes only the namespace of this thread.
            assert_eq!(unsafe { libc::setns(own.as_raw_fd(), libc::CLONE_NEWNET) }, 0);
            let mut socket = Socket::open().expect("socket");
            let link = |what, kind, flags, n: u32| {
                Message::new(what, kind, flags, &LinkHeader::default()).text(libc::IFLA_IFNAME, &format!("x{n}"))
            };
            while !is_done.load(std::sync::atomic::Ordering::Relaxed) {
                for n in 0..10 {
                    let made = link("make", libc::RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, n);
                    let kind = |m: Message| m.text(libc::IFLA_INFO_KIND, "bridge");
                    socket.run(vec![made.nested(libc::IFLA_LINKINFO, kind)]).expect("made");
                }
                for n in 0..10 {
                    socket.run(vec![link("delete", libc::RTM_DELLINK, 0, n)]).expect("deleted");
                }
            }
        });
        let mut socket = Socket::open().expect("socket");
        for round in 0.. {
            if socket.interrupted >= 20 {
                break;
            }
            assert!(round < 20_000, "only {} lists changed while they were read", socket.interrupted);
            assert!(!churn.is_finished(), "nothing changes any more");
            let dump = Message::new("list links", libc::RTM_GETLINK, NLM_F_DUMP, &LinkHeader::default());
            let replies = socket.run(vec![dump]).expect("list");
            let stay =
                replies.iter().filter_map(|r| r.attrs(16).text(libc::IFLA_IFNAME)).filter(|n| n.starts_with("stay"));
            assert_eq!(stay.collect::<std::collections::HashSet<_>>().len(), usize::from(STAY));
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        churn.join().expect("churn");
    }
}
