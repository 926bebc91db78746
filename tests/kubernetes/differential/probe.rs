//! One question, asked from one place: who answers, which source they see, and how other connections fail.

use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{BufRead as _, BufReader, ErrorKind, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;
use testkit::Proto;

/// After so many refusals without an answer nobody is asked again.
const REFUSALS: usize = 2;

/// The share of the time that an answer over UDP may take.
const UDP_SHARE: u32 = 4;

/// How to ask.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// New connections.
    pub tries: usize,
    /// How long to wait for each answer. Over TCP it has to be longer than a second: an ICMP error that arrives while the socket is
    /// still being connected counts only for the second SYN.
    pub timeout: Duration,
    /// After so many time-outs nobody is asked again.
    pub timeouts: usize,
}

/// How one connection failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Failure {
    /// A reset, or port unreachable.
    Refused,
    /// Nobody answered in time.
    Dropped,
    /// Another ICMP error.
    Unreachable,
    /// The answer came from another address than the one that was asked.
    Foreign,
    /// The connection was opened and then ended without an answer.
    Broken,
}

/// What a series of connections brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// Each server that answered, and the addresses that it saw.
    pub answers: BTreeMap<String, BTreeSet<IpAddr>>,
    /// How others failed.
    pub failures: BTreeSet<Failure>,
}

impl fmt::Display for Heard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {:?}", self.answers, self.failures)
    }
}

/// Asks from the calling thread's namespace.
pub fn ask(proto: Proto, target: SocketAddr, patience: Patience) -> Heard {
    let mut heard = Heard::default();
    let mut failed = BTreeMap::<Failure, usize>::new();
    for _ in 0..patience.tries {
        let answer = match proto {
            Proto::Tcp => ask_tcp(target, patience.timeout),
            Proto::Udp => ask_udp(target, patience.timeout / UDP_SHARE),
        };
        match answer {
            Ok((server, client)) => {
                heard.answers.entry(server).or_default().insert(client);
            }
            Err(failure) => {
                heard.failures.insert(failure);
                *failed.entry(failure).or_default() += 1;
                let count = failed[&failure];
                let is_lost = failure == Failure::Dropped && count >= patience.timeouts;
                if is_lost || (failure != Failure::Dropped && count >= REFUSALS && heard.answers.is_empty()) {
                    break;
                }
            }
        }
    }
    heard
}

fn ask_tcp(target: SocketAddr, timeout: Duration) -> Result<(String, IpAddr), Failure> {
    let mut stream = TcpStream::connect_timeout(&target, timeout).map_err(|e| failure(&e))?;
    let ended = |e: std::io::Error| if failure(&e) == Failure::Refused { Failure::Broken } else { failure(&e) };
    stream.set_read_timeout(Some(timeout)).map_err(ended)?;
    stream.write_all(b"?\n").map_err(ended)?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).map_err(ended)?;
    parse(&line).ok_or(Failure::Broken)
}

/// By a socket that is not connected, so that an answer of another address is seen, too.
fn ask_udp(target: SocketAddr, timeout: Duration) -> Result<(String, IpAddr), Failure> {
    let any: IpAddr = if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).map_err(|e| failure(&e))?;
    // ICMP errors become errors of the socket.
    let reported = if target.is_ipv4() {
        setsockopt(&socket, sockopt::Ipv4RecvErr, &true)
    } else {
        setsockopt(&socket, sockopt::Ipv6RecvErr, &true)
    };
    reported.map_err(|e| failure(&e.into()))?;
    socket.set_read_timeout(Some(timeout)).map_err(|e| failure(&e))?;
    match socket.send_to(b"?", target) {
        // It was dropped or refused on its way out, by netfilter or by a program: which of the two, the socket learns next.
        Err(e) if [Some(libc::EPERM), Some(libc::ENOBUFS)].contains(&e.raw_os_error()) => {}
        other => drop(other.map_err(|e| failure(&e))?),
    }
    let mut buffer = [0; 512];
    let (len, from) = socket.recv_from(&mut buffer).map_err(|e| failure(&e))?;
    if from != target {
        return Err(Failure::Foreign);
    }
    parse(&String::from_utf8_lossy(&buffer[..len])).ok_or(Failure::Broken)
}

fn failure(error: &std::io::Error) -> Failure {
    match error.kind() {
        ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset => Failure::Refused,
        ErrorKind::TimedOut | ErrorKind::WouldBlock => Failure::Dropped,
        ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe => Failure::Broken,
        _ => Failure::Unreachable,
    }
}

/// `NAME ADDRESS PORT TEXT`.
fn parse(answer: &str) -> Option<(String, IpAddr)> {
    let mut parts = answer.split(' ');
    let name = parts.next().filter(|name| !name.is_empty())?.to_owned();
    Some((name, parts.next()?.parse().ok()?))
}
