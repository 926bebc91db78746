//! Blocking requests to netlink: send a message, wait for the answer or the kernel's refusal.
//!
//! The messages are those of rtnetlink and netlink-packet-route; only the exchange is here. rtnetlink's own connection drops
//! a message that it cannot decode, and its caller gets a shorter list: after an upgrade of the kernel a pod's device could
//! be missing, and the pod would get neither routes nor programs. It also asks its callers to be asynchronous, and those
//! that attach programs or clean up are not. A request takes microseconds; the long lists have a thread of their own. The socket
//! works in a thread that has entered another network namespace, too.

use std::io;

use netlink_packet_core::{
    Emitable, NLA_HEADER_SIZE, NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL,
    NLM_F_REPLACE, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer, NetlinkHeader, NetlinkSerializable,
    NlaBuffer, NlasIterator, parse_i32, parse_string, parse_u32,
};
use netlink_sys::{SocketAddr, protocols};
use rtnetlink::MulticastGroup;

/// Flags for a request that makes something new and fails when it is there.
pub const CREATE: u16 = NLM_F_CREATE | NLM_F_EXCL;
/// Flags for a request that makes something or takes its place.
pub const REPLACE: u16 = NLM_F_CREATE | NLM_F_REPLACE;
/// Flags for a request that changes what is there.
pub const CHANGE: u16 = 0;

/// How often a list is asked for again that changed while the kernel wrote it.
const DUMPS: usize = 10;
/// Octets for one datagram: the kernel sends up to 32 KiB of a list at once.
const DATAGRAM: usize = 1 << 16;
/// `struct nlmsghdr`.
const HEADER: usize = 16;

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
    /// Something changed during each of several attempts to list it.
    #[error("the list changed during each of {DUMPS} attempts to read it")]
    Interrupted,
}

impl Error {
    /// `errno` of a refusal.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused(refusal) => Some(refusal.errno),
            Self::Io(_) | Self::Interrupted => None,
        }
    }
}

/// True if the request was carried out, false if the kernel answered with one of `harmless`.
pub fn unless(result: Result<(), Error>, harmless: &[i32]) -> Result<bool, Error> {
    match result {
        Ok(()) => Ok(true),
        Err(Error::Refused(refusal)) if harmless.contains(&refusal.errno) => Ok(false),
        Err(e) => Err(e),
    }
}

/// The attributes in `bytes`, up to the first that does not fit.
pub fn attributes(bytes: &[u8]) -> impl Iterator<Item = NlaBuffer<&[u8]>> {
    NlasIterator::new(bytes).map_while(Result::ok)
}

/// The value of an attribute.
pub fn value(attribute: NlaBuffer<&[u8]>) -> &[u8] {
    &attribute.into_inner()[NLA_HEADER_SIZE..usize::from(attribute.length())]
}

/// A netlink socket in the network namespace of the thread that opened it.
pub struct Socket {
    inner: netlink_sys::Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// Opens a socket for requests to route-netlink.
    pub fn open() -> Result<Self, Error> {
        let this = Self::of(protocols::NETLINK_ROUTE)?;
        // The kernel then sends what the header of a dump asks for, instead of everything.
        this.inner.set_netlink_get_strict_chk(true)?;
        Ok(this)
    }

    /// Opens a socket for requests to another family of netlink (`NETLINK_*`).
    pub fn of(protocol: isize) -> Result<Self, Error> {
        let mut socket = netlink_sys::Socket::new(protocol)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        // Texts in addition to the numbers in refusals.
        socket.set_ext_ack(true)?;
        socket.set_rx_buf_sz::<i32>(1 << 20)?;
        Ok(Self { inner: socket, sequence: 0, buffer: Vec::with_capacity(DATAGRAM) })
    }

    /// Has the kernel carry out a request.
    pub fn request(&mut self, message: &impl NetlinkSerializable, flags: u16) -> Result<(), Error> {
        self.exchange(message, flags | NLM_F_ACK, |_| {}).map(drop)
    }

    /// Asks for one object. `parse` gets what follows the header of each message.
    pub fn get<T>(
        &mut self,
        message: &impl NetlinkSerializable,
        parse: impl Fn(&[u8]) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let mut found = None;
        self.exchange(message, NLM_F_ACK, |body| found = parse(body))?;
        Ok(found)
    }

    /// Asks for all objects of a kind, once more if they changed meanwhile. `parse` gets what follows the header of each
    /// message.
    pub fn dump<T>(
        &mut self,
        message: &impl NetlinkSerializable,
        parse: impl Fn(&[u8]) -> Option<T>,
    ) -> Result<Vec<T>, Error> {
        for _ in 0..DUMPS {
            let mut found = Vec::new();
            if self.exchange(message, NLM_F_DUMP, |body| found.extend(parse(body)))? {
                return Ok(found);
            }
        }
        Err(Error::Interrupted)
    }

    /// Sends requests between two messages that frame them (nfnetlink's transactions): all are carried out, or none.
    pub fn transaction<M: NetlinkSerializable>(&mut self, begin: &M, requests: &[M], end: &M) -> Result<(), Error> {
        let mut waiting = requests.len();
        let first = self.next_sequence();
        let mut bytes = encode(begin, NLM_F_REQUEST, first);
        for request in requests {
            bytes.extend(encode(request, NLM_F_REQUEST | NLM_F_ACK, self.next_sequence()));
        }
        let last = self.next_sequence();
        bytes.extend(encode(end, NLM_F_REQUEST, last));
        self.inner.send(&bytes, 0)?;
        let mut refused = None;
        while waiting > 0 {
            self.receive()?;
            for message in messages(&self.buffer) {
                let sequence = message.sequence_number();
                if message.message_type() != NLMSG_ERROR || !(first..=last).contains(&sequence) {
                    continue;
                }
                // The kernel answers each request, also after another one failed. Of the frame it
                // reports only a failure.
                waiting = if sequence == first || sequence == last { 0 } else { waiting.saturating_sub(1) };
                refused = refused.or(refusal(&message));
            }
        }
        refused.map_or(Ok(()), |refusal| Err(refusal.into()))
    }

    fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1).max(1);
        self.sequence
    }

    /// One datagram into the buffer.
    fn receive(&mut self) -> io::Result<()> {
        self.buffer.clear();
        self.inner.recv(&mut self.buffer, 0).map(drop)
    }

    /// True if the answer is whole; false if it is a list that changed while the kernel wrote it.
    fn exchange(
        &mut self,
        message: &impl NetlinkSerializable,
        flags: u16,
        mut take: impl FnMut(&[u8]),
    ) -> Result<bool, Error> {
        let sequence = self.next_sequence();
        self.inner.send(&encode(message, flags | NLM_F_REQUEST, sequence), 0)?;
        let mut is_whole = true;
        loop {
            self.receive()?;
            // Others are the rest of an answer that an earlier error made us leave unread.
            for message in messages(&self.buffer).filter(|message| message.sequence_number() == sequence) {
                is_whole &= message.flags() & NLM_F_DUMP_INTR == 0;
                match message.message_type() {
                    // The end of a dump carries its outcome in the same place as an error does.
                    NLMSG_DONE | NLMSG_ERROR => {
                        return refusal(&message).map_or(Ok(is_whole), |refusal| Err(refusal.into()));
                    }
                    _ => take(message.payload()),
                }
            }
        }
    }
}

/// Hears whether objects of a kind change.
pub struct Changes(netlink_sys::Socket);

impl Changes {
    /// Listens from now on.
    pub fn watch(group: MulticastGroup) -> io::Result<Self> {
        let mut socket = netlink_sys::Socket::new(protocols::NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        socket.add_membership(group as u32)?;
        Ok(Self(socket))
    }

    /// True if one of them changed since.
    pub fn is_heard(&self) -> io::Result<bool> {
        match self.0.recv(&mut [0; HEADER].as_mut_slice(), libc::MSG_DONTWAIT) {
            Ok(_) => Ok(true),
            // More than the socket can hold.
            Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(e) => Err(e),
        }
    }
}

fn encode(message: &impl NetlinkSerializable, flags: u16, sequence: u32) -> Vec<u8> {
    let mut bytes = vec![0; HEADER + message.buffer_len()];
    let mut header = NetlinkHeader::default();
    header.length = bytes.len() as u32;
    header.message_type = message.message_type();
    header.flags = flags;
    header.sequence_number = sequence;
    header.emit(&mut bytes);
    message.serialize(&mut bytes[HEADER..]);
    bytes
}

/// The messages in a datagram.
pub fn messages(mut bytes: &[u8]) -> impl Iterator<Item = NetlinkBuffer<&[u8]>> {
    std::iter::from_fn(move || {
        let message = NetlinkBuffer::new_checked(bytes).ok()?;
        bytes = bytes.get((message.length() as usize).next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// The refusal in an `NLMSG_ERROR` or `NLMSG_DONE`; `None` when it is the acknowledgement.
fn refusal(message: &NetlinkBuffer<&[u8]>) -> Option<Refusal> {
    /// `NLMSGERR_ATTR_MSG`.
    const MESSAGE: u16 = 1;
    let (code, rest) = message.payload().split_at_checked(4)?;
    let code = parse_i32(code).ok().filter(|code| *code != 0)?;
    // Behind the code of an error: our request, whole; then attributes.
    let request = match message.message_type() {
        NLMSG_ERROR => rest.get(..HEADER).and_then(|header| parse_u32(&header[..4]).ok()).unwrap_or(0),
        _ => 0,
    };
    let behind = match message.flags() & NLM_F_ACK_TLVS {
        0 => &[],
        _ => rest.get((request as usize).next_multiple_of(4)..).unwrap_or_default(),
    };
    let text = attributes(behind).find(|attribute| attribute.kind() == MESSAGE);
    let text = text.and_then(|text| parse_string(text.value()).ok());
    Some(Refusal { errno: -code, message: text.unwrap_or_default() })
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::fd::{FromRawFd, IntoRawFd};
    use std::os::unix::net::UnixStream;

    use netlink_packet_route::RouteNetlinkMessage;
    use netlink_packet_route::route::RouteMessage;

    use super::*;

    fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
        let length = (16 + body.len() as u32).to_ne_bytes();
        [&length[..], &kind.to_ne_bytes(), &flags.to_ne_bytes(), &9_u32.to_ne_bytes(), &[0; 4], body].concat()
    }

    #[test]
    fn refusals_have_the_kernels_number_and_words() {
        let refused = |bytes: &[u8]| refusal(&messages(bytes).next().unwrap()).map(|it| (it.errno, it.message));
        let code = (-libc::EEXIST).to_ne_bytes();
        let words = [&[16, 0, 1, 0][..], b"is there yet", &[0; 4]].concat();
        let request = message(26, 0, &[1, 2, 3]);
        let padded = [&code[..], &request, &[0], &words].concat();
        let expected = |words: &str| Some((libc::EEXIST, words.to_owned()));
        assert_eq!(refused(&message(NLMSG_ERROR, NLM_F_ACK_TLVS, &padded)), expected("is there yet"));
        assert_eq!(refused(&message(NLMSG_ERROR, 0, &[&code[..], &request].concat())), expected(""));
        assert_eq!(
            refused(&message(NLMSG_DONE, NLM_F_ACK_TLVS, &[&code[..], &words].concat())),
            expected("is there yet")
        );
        for done in [&[0; 4][..], &[]] {
            assert_eq!(refused(&message(NLMSG_DONE, 0, done)), None);
            assert_eq!(refused(&message(NLMSG_ERROR, 0, done)), None);
        }
    }

    /// Answers each request with a list of one number, which is whole from a certain request on.
    fn kernel(whole_from: u8) -> Socket {
        let (mut kernel, agent) = UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            let mut request = [0; 64];
            for round in 0.. {
                // Ends when the test drops its socket.
                let Ok(16..) = kernel.read(&mut request) else { return };
                let interrupted = if round < whole_from { NLM_F_DUMP_INTR } else { 0 };
                let mut list = [message(24, interrupted, &[round; 4]), message(NLMSG_DONE, 0, &[0; 4])].concat();
                for at in [8, 28] {
                    list[at..at + 4].copy_from_slice(&request[8..12]);
                }
                kernel.write_all(&list).unwrap();
            }
        });
        // SAFETY: the descriptor passes from one owner to the other.
        let inner = unsafe { netlink_sys::Socket::from_raw_fd(agent.into_raw_fd()) };
        Socket { inner, sequence: 0, buffer: Vec::with_capacity(64) }
    }

    #[test]
    fn interrupted_lists_are_asked_for_again_but_not_for_ever() {
        let list = |mut socket: Socket| {
            socket.dump(&RouteNetlinkMessage::GetRoute(RouteMessage::default()), |body| body.first().copied())
        };
        assert_eq!(list(kernel(0)).unwrap(), [0]);
        assert_eq!(list(kernel(3)).unwrap(), [3]);
        assert!(matches!(list(kernel(u8::MAX)), Err(Error::Interrupted)));
    }

    #[test]
    fn broken_lengths_end_the_list() {
        assert_eq!(attributes(&[200, 0, 1, 0, 1, 2]).count(), 0);
        assert_eq!(attributes(&[3, 0, 1, 0]).count(), 0);
        assert_eq!(attributes(&[4, 0, 1]).count(), 0);
        assert_eq!(messages(&[255; 15]).count(), 0);
        assert_eq!(messages(&[&message(24, 0, &[]), &[8, 0, 0, 0][..]].concat()).count(), 1);
    }
}
