//! The host's IPsec policies, as far as the kernel counts them. Packets that the programs send or receive do not pass them.
//!
//! Two requests of a few numbers each. The crate for this family of netlink (netlink-packet-xfrm) takes slices of answers without
//! looking at their length, and brings some 6,000 lines.

use std::fmt;
use std::io;

use netlink_packet_core::{NetlinkSerializable, parse_u32};
use netlink_sys::protocols::NETLINK_XFRM;

use super::netlink::{Error, Socket, attributes};

/// `XFRM_MSG_GETSPDINFO`.
const GET_COUNTS: u16 = 0x25;
/// `XFRM_MSG_GETDEFAULT`, since kernel 5.15.
const GET_DEFAULT: u16 = 0x28;
/// `XFRMA_SPD_INFO`.
const COUNTS: u16 = 1;
/// `XFRM_USERPOLICY_BLOCK`.
const BLOCK: u8 = 1;

/// What the kernel demands of packets to and from this host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Ipsec {
    /// Nothing. Policies for forwarded packets alone, and those of single sockets, count as nothing.
    #[default]
    None,
    /// There are policies. Which packets they are for is not looked at.
    Policies(Policies),
    /// The kernel did not say it, for this reason.
    Unknown(String),
}

/// How many policies there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policies {
    /// For packets to this host.
    pub incoming: u32,
    /// For packets from this host.
    pub outgoing: u32,
    /// Packets without a policy are refused, in one of the two directions.
    pub refuses_others: bool,
}

impl Ipsec {
    /// Asks the kernel, in the network namespace of the calling thread.
    pub fn read() -> Self {
        let socket = match Socket::of(NETLINK_XFRM) {
            Err(Error::Io(e)) if is_absent(&e) => return Self::None,
            socket => socket,
        };
        match socket.and_then(|mut socket| ask(&mut socket)) {
            Ok(policies) if policies == Policies::default() => Self::None,
            Ok(policies) => Self::Policies(policies),
            Err(error) => Self::Unknown(error.to_string()),
        }
    }
}

impl fmt::Display for Ipsec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("no IPsec policies on this host"),
            Self::Policies(Policies { incoming, outgoing, refuses_others }) => {
                write!(f, "IPsec policies on this host: {incoming} in, {outgoing} out")?;
                f.write_str(if *refuses_others { ", others refused" } else { "" })
            }
            Self::Unknown(error) => write!(f, "the kernel does not tell its IPsec policies: {error}"),
        }
    }
}

/// True for a kernel without IPsec.
pub fn is_absent(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EPROTONOSUPPORT | libc::ESRCH))
}

fn ask(socket: &mut Socket) -> Result<Policies, Error> {
    let counts = socket.get(&Request { kind: GET_COUNTS, body: &[0; 4] }, parse_counts)?;
    let mut policies = counts.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "an answer without counts"))?;
    policies.refuses_others = match socket.get(&Request { kind: GET_DEFAULT, body: &[0; 4] }, parse_default) {
        Ok(refuses) => refuses.unwrap_or(false),
        // A kernel that refuses nothing by default.
        Err(Error::Refused(refusal)) if refusal.errno == libc::EINVAL => false,
        Err(error) => return Err(error),
    };
    Ok(policies)
}

/// `struct xfrmu_spdinfo` behind four octets of flags.
fn parse_counts(body: &[u8]) -> Option<Policies> {
    let counts = attributes(body.get(4..)?).find(|attribute| attribute.kind() == COUNTS)?;
    let value = counts.value();
    let count = |at: usize| parse_u32(value.get(at..at + 4)?).ok();
    Some(Policies { incoming: count(0)?, outgoing: count(4)?, refuses_others: false })
}

/// `struct xfrm_userpolicy_default`: in, forwarded, out.
fn parse_default(body: &[u8]) -> Option<bool> {
    let [incoming, _, outgoing] = *body.first_chunk()?;
    Some(incoming == BLOCK || outgoing == BLOCK)
}

/// A request without attributes.
struct Request {
    kind: u16,
    body: &'static [u8; 4],
}

impl NetlinkSerializable for Request {
    fn message_type(&self) -> u16 {
        self.kind
    }

    fn buffer_len(&self) -> usize {
        self.body.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(self.body);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    #[test]
    fn counts_of_forwarded_packets_and_sockets_are_left_out() {
        // Thresholds of hashes (attribute 3), then the counts.
        let thresholds = [&[6, 0, 3, 0, 32, 32, 0, 0][..]].concat();
        let counts = [&[28, 0, 1, 0][..], &words(&[3, 2, 9, 9, 9, 9])].concat();
        let answer = [vec![0; 4], thresholds, counts].concat();
        assert_eq!(parse_counts(&answer), Some(Policies { incoming: 3, outgoing: 2, refuses_others: false }));
        for short in [0, 3, 4, 12, 17, answer.len() - 21] {
            assert_eq!(parse_counts(&answer[..short]), None, "{short} octets");
        }
    }

    #[test]
    fn a_default_that_refuses_counts_in_the_two_directions_of_the_host() {
        assert_eq!(parse_default(&[2, 2, 2]), Some(false));
        assert_eq!(parse_default(&[0, 1, 0, 0]), Some(false));
        assert_eq!(parse_default(&[1, 2, 2]), Some(true));
        assert_eq!(parse_default(&[2, 2, 1]), Some(true));
        assert_eq!(parse_default(&[2, 2]), None);
    }
}
