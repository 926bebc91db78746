//! Questions for probes and their answers, as they go through the API server: a query of a URL, and JSON.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::model::Family;

/// Longest payload that a probe sends or echoes.
pub const MAX_BYTES: usize = 4 << 20;
/// Longest payload of a datagram.
pub const MAX_DATAGRAM: usize = 60_000;
/// Shortest payload: answers are hardly longer than questions, so that a forged source gains nothing.
pub const MIN_BYTES: usize = 64;
/// Path of questions.
pub const PATH: &str = "/probe";
/// Path that answers while a probe serves.
pub const HEALTH_PATH: &str = "/healthz";
/// Header with the secret of a run: only who created the probes may send packets from there.
pub const TOKEN_HEADER: &str = "x-rustnet-probe-token";

/// What a probe does with its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// Sends bytes to another probe over TCP and compares what comes back.
    Tcp,
    /// The same in a datagram.
    Udp,
    /// Opens a TCP connection and closes it.
    Connect,
    /// Resolves a name.
    Dns,
}

impl Protocol {
    fn word(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Connect => "connect",
            Self::Dns => "dns",
        }
    }

    fn parse(word: &str) -> Option<Self> {
        [Self::Tcp, Self::Udp, Self::Connect, Self::Dns].into_iter().find(|it| it.word() == word)
    }
}

/// What a probe is asked to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// How.
    pub protocol: Protocol,
    /// An address, or a name.
    pub host: String,
    /// A port; 0 for [`Protocol::Dns`].
    pub port: u16,
    /// Length of the payload.
    pub bytes: usize,
    /// Which addresses of a name count.
    pub family: Option<Family>,
}

impl Question {
    /// Returns the query of the URL. An IPv6 address stands there without brackets, which a query may not have.
    pub fn to_query(&self) -> String {
        let Self { protocol, host, port, bytes, family } = self;
        let family = family.map(|family| format!("&family={family}")).unwrap_or_default();
        format!("protocol={}&host={host}&port={port}&bytes={bytes}{family}", protocol.word())
    }

    /// Reads a query.
    ///
    /// # Errors
    /// The part that is missing or wrong.
    pub fn from_query(query: &str) -> Result<Self, String> {
        let value = |name: &str| query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
        let need = |name: &str| value(name).ok_or_else(|| format!("{name} is missing"));
        let number = |name: &str| need(name)?.parse::<usize>().map_err(|_| format!("{name} is no number"));
        let family = match value("family") {
            None => None,
            Some("IPv4") => Some(Family::V4),
            Some("IPv6") => Some(Family::V6),
            Some(_) => return Err("family is neither IPv4 nor IPv6".to_owned()),
        };
        let protocol = Protocol::parse(need("protocol")?).ok_or("protocol is unknown")?;
        let host = need("host")?;
        if !is_host(host) {
            return Err("host is neither an address nor a name".to_owned());
        }
        let bytes = number("bytes")?;
        let most = if protocol == Protocol::Udp { MAX_DATAGRAM } else { MAX_BYTES };
        if !(MIN_BYTES..=most).contains(&bytes) {
            return Err(format!("bytes: {bytes} is not {MIN_BYTES} to {most}"));
        }
        let port = u16::try_from(number("port")?).map_err(|_| "port is above 65535")?;
        Ok(Self { protocol, host: host.to_owned(), port, bytes, family })
    }
}

/// True if a text may be an address or a name of a host. All its characters may stand in a query as they are.
pub fn is_host(text: &str) -> bool {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':' | '_');
    !text.is_empty() && text.len() <= 253 && text.chars().all(is_allowed)
}

/// A probe's answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "lowercase")]
pub enum Answer {
    /// Another probe, or some server, answered.
    #[serde(rename_all = "camelCase")]
    Reached {
        /// The server's name; none of one that is no probe.
        server: Option<String>,
        /// The client's address as the server saw it.
        source: Option<IpAddr>,
        /// The client's address as the client sees it.
        local: IpAddr,
        /// How many datagrams were sent.
        attempts: u32,
    },
    /// A name has these addresses.
    Resolved {
        /// In order.
        addresses: Vec<IpAddr>,
    },
    /// It did not work.
    Failed {
        /// How.
        cause: Cause,
        /// The operation, and the kernel's words.
        detail: String,
    },
}

/// Why a target was not reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Cause {
    /// A reset or a port unreachable came back.
    Refused,
    /// Nothing came back.
    TimedOut,
    /// The kernel, or a router, has no route.
    Unreachable,
    /// A connection ended half-way.
    Broken,
    /// Other bytes came back than were sent.
    Corrupt,
    /// The name has no address.
    NoName,
    /// The server saw another source than it should.
    WrongSource,
    /// Another server answered, or a name has other addresses.
    WrongServer,
    /// The probe itself could not be asked.
    NotAsked,
    /// The probe did not start.
    NotStarted,
    /// Something else.
    Other,
}

/// What a server writes before the payload that it echoes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Its name.
    pub server: String,
    /// The client's address.
    pub source: IpAddr,
}

impl Seen {
    /// Returns its length in two bytes, in network order, then JSON.
    pub fn encode(&self) -> Vec<u8> {
        let json = serde_json::to_vec(self).unwrap_or_default();
        let length = u16::try_from(json.len()).unwrap_or_default();
        [&length.to_be_bytes()[..], &json].concat()
    }

    /// Returns what stands at the beginning of a datagram, and the rest.
    pub fn decode(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (length, rest) = bytes.split_first_chunk::<2>()?;
        let (json, payload) = rest.split_at_checked(u16::from_be_bytes(*length).into())?;
        Some((serde_json::from_slice(json).ok()?, payload))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_survives_its_query() {
        for (host, family) in [("fd00::1", Some(Family::V6)), ("echo-0.x.svc", None)] {
            let question = Question { protocol: Protocol::Udp, host: host.into(), port: 80, bytes: 64, family };
            assert_eq!(Question::from_query(&question.to_query()), Ok(question));
        }
    }

    #[test]
    fn unusable_questions_are_refused_by_name() {
        for (query, word) in [
            ("", "protocol is missing"),
            ("protocol=icmp", "protocol is unknown"),
            ("protocol=tcp", "host is missing"),
            ("protocol=tcp&host=a/b", "host is neither"),
            ("protocol=tcp&host=a&bytes=x", "bytes is no number"),
            ("protocol=tcp&host=a&bytes=1", "bytes: 1 is not"),
            ("protocol=udp&host=a&bytes=100000", "bytes: 100000 is not"),
            ("protocol=tcp&host=a&bytes=64&port=70000", "port is above"),
            ("protocol=tcp&host=a&bytes=64&port=1&family=x", "family is neither"),
        ] {
            let refusal = Question::from_query(query).expect_err(query);
            assert!(refusal.contains(word), "{query}: {refusal}");
        }
    }

    #[test]
    fn what_a_server_saw_survives_the_wire() {
        let seen = Seen { server: "pod-0".into(), source: "10.0.0.1".parse().expect("an address") };
        let bytes = [&seen.encode()[..], b"payload"].concat();
        assert_eq!(Seen::decode(&bytes), Some((seen, &b"payload"[..])));
        assert_eq!(Seen::decode(&bytes[..8]), None);
        assert_eq!(Seen::decode(&[]), None);
    }
}
