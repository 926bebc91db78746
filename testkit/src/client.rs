//! Clients: a number of requests, each over a new connection, and who answered how fast.

use crate::netns::Netns;
use anyhow::{Context, Result, bail};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt,
};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// How long a request may take before it counts as lost.
pub const TIMEOUT: Duration = Duration::from_secs(3);

/// Transport protocol of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Proto {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Proto {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Tcp, Self::Udp];
}

impl fmt::Display for Proto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
        })
    }
}

/// What a series of requests brought.
#[derive(Clone, Debug, Default)]
pub struct Answers {
    /// Requests sent.
    pub sent: usize,
    /// Answers by the name of the server.
    pub by_server: BTreeMap<String, usize>,
    /// The addresses that the servers saw.
    pub seen_as: BTreeSet<IpAddr>,
    /// What went wrong, one entry a request.
    pub errors: Vec<Failure>,
    /// Time of each answered request, connection set-up included.
    pub latencies: Vec<Duration>,
}

/// How one request failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The kind, for assertions.
    pub kind: ErrorKind,
    /// How long it took to fail.
    pub after: Duration,
    /// The error in words.
    pub text: String,
}

impl Answers {
    /// Requests answered.
    pub fn answered(&self) -> usize {
        self.by_server.values().sum()
    }

    /// True when every request was answered.
    pub fn complete(&self) -> bool {
        self.sent > 0 && self.answered() == self.sent
    }

    /// The median latency of the answered requests.
    pub fn median(&self) -> Option<Duration> {
        let mut sorted = self.latencies.clone();
        sorted.sort_unstable();
        sorted.get(sorted.len() / 2).copied()
    }

    /// An error unless every request was answered.
    pub fn all_answered(&self) -> Result<()> {
        if self.complete() { Ok(()) } else { bail!("{self}") }
    }

    /// An error unless every request was answered and exactly these servers took part.
    pub fn only_by(&self, servers: &[&str]) -> Result<()> {
        self.all_answered()?;
        let expected: BTreeSet<&str> = servers.iter().copied().collect();
        let actual: BTreeSet<&str> = self.by_server.keys().map(String::as_str).collect();
        if expected == actual { Ok(()) } else { bail!("expected answers by {expected:?}: {self}") }
    }

    /// An error unless every server saw the client as this address.
    pub fn only_as(&self, address: IpAddr) -> Result<()> {
        if self.seen_as.iter().eq([&address]) { Ok(()) } else { bail!("expected to be seen as {address}: {self}") }
    }

    /// An error unless every request failed in this way.
    pub fn all_failed(&self, kind: ErrorKind) -> Result<()> {
        if self.sent > 0 && self.errors.len() == self.sent && self.errors.iter().all(|e| e.kind == kind) {
            Ok(())
        } else {
            bail!("expected only {kind:?}: {self}")
        }
    }
}

impl fmt::Display for Answers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} answered", self.answered(), self.sent)?;
        write!(f, ", by {:?}, seen as {:?}", self.by_server, self.seen_as)?;
        if let Some(first) = self.errors.first() {
            write!(f, "; {} errors, the first after {:?}: {}", self.errors.len(), first.after, first.text)?;
        }
        Ok(())
    }
}

/// A series that has seen this many time-outs has failed, and is not worth more waiting.
const TIMEOUTS: usize = 3;

/// Sends `count` requests from inside a namespace, one after the other; gives up after a few time-outs.
pub fn ask(from: &Netns, proto: Proto, target: SocketAddr, count: usize) -> Result<Answers> {
    ask_sized(from, proto, target, count, 8)
}

/// The same, with requests of `size` bytes (the answer is at least as large).
pub fn ask_sized(from: &Netns, proto: Proto, target: SocketAddr, count: usize, size: usize) -> Result<Answers> {
    from.run(|| {
        let mut answers = Answers::default();
        for i in 0..count {
            if answers.errors.iter().filter(|e| e.kind == ErrorKind::TimedOut).count() >= TIMEOUTS {
                break;
            }
            let text = format!("{i:0size$}");
            let start = Instant::now();
            answers.sent += 1;
            match one(proto, target, &text) {
                Ok((server, client)) => {
                    answers.latencies.push(start.elapsed());
                    *answers.by_server.entry(server).or_default() += 1;
                    answers.seen_as.insert(client);
                }
                Err(e) => answers.errors.push(Failure { kind: e.kind(), after: start.elapsed(), text: e.to_string() }),
            }
        }
        answers
    })
}

/// One request over a new connection: the name of the server, and the source address that it saw.
fn one(proto: Proto, target: SocketAddr, text: &str) -> std::io::Result<(String, IpAddr)> {
    match proto {
        Proto::Tcp => {
            let mut connection = Connection::open(target)?;
            connection.ask(text)
        }
        Proto::Udp => ask_udp(&connected_udp(target)?, text),
    }
}

/// A UDP socket that is connected, so that ICMP errors reach it.
pub fn connected_udp(target: SocketAddr) -> std::io::Result<UdpSocket> {
    let any: IpAddr = if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    socket.connect(target)?;
    Ok(socket)
}

/// A connected UDP socket with a chosen local port, which others may use as well.
pub fn udp_from_port(port: u16, target: SocketAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::from(bound(SockType::Datagram, port, target)?);
    socket.set_read_timeout(Some(TIMEOUT))?;
    socket.connect(target).with_context(|| format!("cannot connect to {target} from port {port}"))?;
    Ok(socket)
}

/// A socket that is bound to a port of the target's family.
fn bound(kind: SockType, port: u16, target: SocketAddr) -> Result<OwnedFd> {
    let family = if target.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, kind, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    let any = match target {
        SocketAddr::V4(_) => SockaddrStorage::from(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port)),
        SocketAddr::V6(_) => SockaddrStorage::from(SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0)),
    };
    bind(fd.as_raw_fd(), &any).with_context(|| format!("cannot bind to port {port}"))?;
    Ok(fd)
}

/// One datagram there and one back.
pub fn ask_udp(socket: &UdpSocket, text: &str) -> std::io::Result<(String, IpAddr)> {
    let mut buffer = vec![0; 65_535];
    socket.send(text.as_bytes())?;
    loop {
        let len = socket.recv(&mut buffer).map_err(timed_out)?;
        let answer = String::from_utf8_lossy(&buffer[..len]).into_owned();
        // A late answer to an earlier datagram is not the answer to this one.
        if answer.ends_with(text) {
            return parse(&answer, text);
        }
    }
}

/// An established TCP connection to a [`crate::server::Server`].
#[derive(Debug)]
pub struct Connection {
    reader: BufReader<TcpStream>,
}

impl Connection {
    /// Connects from the calling thread's namespace.
    pub fn open(target: SocketAddr) -> std::io::Result<Self> {
        Self::of(TcpStream::connect_timeout(&target, TIMEOUT)?)
    }

    /// Connects from the calling thread's namespace and a chosen port, which others may use as well.
    pub fn open_from_port(port: u16, target: SocketAddr) -> Result<Self> {
        let fd = bound(SockType::Stream, port, target)?;
        connect(fd.as_raw_fd(), &SockaddrStorage::from(target))
            .with_context(|| format!("cannot connect to {target} from port {port}"))?;
        Ok(Self::of(TcpStream::from(fd))?)
    }

    fn of(stream: TcpStream) -> std::io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        Ok(Self { reader: BufReader::new(stream) })
    }

    /// Connects from inside a namespace.
    pub fn open_in(from: &Netns, target: SocketAddr) -> Result<Self> {
        from.run(|| Self::open(target))?.with_context(|| format!("{} cannot connect to {target}", from.name()))
    }

    /// One request and its answer: the name of the server, and the source address that it saw.
    pub fn ask(&mut self, text: &str) -> std::io::Result<(String, IpAddr)> {
        self.reader.get_mut().write_all(format!("{text}\n").as_bytes()).map_err(timed_out)?;
        let mut line = String::new();
        if self.reader.read_line(&mut line).map_err(timed_out)? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        parse(line.trim_end(), text)
    }

    /// Fetches `n` bytes.
    pub fn download(&mut self, n: u64) -> std::io::Result<()> {
        self.reader.get_mut().write_all(format!("give {n}\n").as_bytes()).map_err(timed_out)?;
        let got = std::io::copy(&mut (&mut self.reader).take(n), &mut std::io::sink()).map_err(timed_out)?;
        if got == n { Ok(()) } else { Err(ErrorKind::UnexpectedEof.into()) }
    }

    /// Sends `n` bytes and waits for the receipt.
    pub fn upload(&mut self, n: u64) -> std::io::Result<()> {
        let stream = self.reader.get_mut();
        stream.write_all(format!("take {n}\n").as_bytes()).map_err(timed_out)?;
        std::io::copy(&mut std::io::repeat(b'y').take(n), stream).map_err(timed_out)?;
        let mut line = String::new();
        self.reader.read_line(&mut line).map_err(timed_out)?;
        let took = line.trim_end().rsplit(' ').next().and_then(|n| n.parse().ok());
        if took == Some(n) { Ok(()) } else { Err(std::io::Error::other(format!("sent {n} bytes, receipt: {line}"))) }
    }

    /// The local end, as the client sees it.
    pub fn local(&self) -> std::io::Result<SocketAddr> {
        self.reader.get_ref().local_addr()
    }
}

/// A socket's receive time-out shows as `WouldBlock`; call it what it is.
fn timed_out(e: std::io::Error) -> std::io::Error {
    if e.kind() == ErrorKind::WouldBlock { std::io::Error::new(ErrorKind::TimedOut, "no answer") } else { e }
}

/// Takes an answer apart: `NAME ADDRESS PORT TEXT`.
fn parse(answer: &str, text: &str) -> std::io::Result<(String, IpAddr)> {
    let mut parts = answer.splitn(4, ' ');
    let server = parts.next().unwrap_or_default().to_owned();
    let client = parts.next().and_then(|a| a.parse().ok());
    match (client, parts.nth(1)) {
        (Some(client), Some(echo)) if echo == text => Ok((server, client)),
        _ => Err(std::io::Error::new(ErrorKind::InvalidData, format!("not an answer to {text:.40}: {answer:.80}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_answers_apart() -> Result<()> {
        assert_eq!(parse("web-1 10.0.0.1 80 7", "7")?, ("web-1".into(), "10.0.0.1".parse()?));
        for bad in ["", "web-1", "web-1 x 80 7", "web-1 10.0.0.1 80 8", "web-1 10.0.0.1 80"] {
            assert!(parse(bad, "7").is_err(), "{bad}");
        }
        Ok(())
    }

    #[test]
    fn judges_series() {
        let mut answers = Answers { sent: 2, ..Answers::default() };
        assert!(answers.all_answered().is_err());
        answers.by_server.insert("a".into(), 2);
        assert!(answers.only_by(&["a"]).is_ok());
        assert!(answers.only_by(&["a", "b"]).is_err());
        assert!(answers.only_by(&[]).is_err());
        assert!(Answers::default().all_answered().is_err(), "nothing asked proves nothing");
        assert!(Answers::default().all_failed(ErrorKind::TimedOut).is_err());
    }
}
