//! ICMP by raw sockets: echo with a chosen hop limit, and the errors that come back.

use crate::client::TIMEOUT;
use crate::netns::Netns;
use anyhow::{Context, Result, bail};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, setsockopt, socket, sockopt,
};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

/// What came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The echo.
    Echo {
        /// Who answered.
        from: IpAddr,
        /// Time there and back.
        time: Duration,
    },
    /// An error about the request.
    Error {
        /// Who reported it.
        from: IpAddr,
        /// ICMP (or ICMPv6) type.
        kind: u8,
        /// ICMP (or ICMPv6) code.
        code: u8,
        /// The rest of the header: the MTU of "too big" (RFC 4443, 3.2), and of "fragmentation needed" (RFC 1191, 4).
        rest: u32,
    },
}

/// ICMP "time exceeded", IPv4 and IPv6 (RFC 792, RFC 4443 3.3).
pub const TIME_EXCEEDED: [u8; 2] = [11, 3];

/// How to send an echo request.
#[derive(Clone, Copy, Debug)]
pub struct Ping {
    /// Bytes behind the ICMP header.
    pub size: usize,
    /// Hop limit.
    pub ttl: u32,
    /// Forbid fragments (IPv4).
    pub dont_fragment: bool,
}

impl Default for Ping {
    fn default() -> Self {
        Self { size: 56, ttl: 64, dont_fragment: false }
    }
}

static IDENTIFIER: AtomicU16 = AtomicU16::new(1);

impl Ping {
    /// Sends one request from inside a namespace and waits for what comes back; silence is an error.
    pub fn send(self, from: &Netns, to: IpAddr) -> Result<Reply> {
        from.run(|| self.exchange(to))?.with_context(|| format!("{} pings {to}", from.name()))
    }

    fn exchange(self, to: IpAddr) -> Result<Reply> {
        let socket = self.socket(to)?;
        // Raw sockets see the replies of everybody in the namespace: the identifier tells ours.
        let id = (std::process::id() as u16).wrapping_add(IDENTIFIER.fetch_add(1, Ordering::Relaxed).wrapping_mul(31));
        let mut request = vec![if to.is_ipv4() { 8 } else { 128 }, 0, 0, 0, 0, 0, 0, 1];
        request[4..6].copy_from_slice(&id.to_be_bytes());
        request.extend((0..self.size).map(|i| i as u8));
        if to.is_ipv4() {
            let sum = etherparse::checksum::Sum16BitWords::new().add_slice(&request).ones_complement();
            // The type computes in memory order, so it needs no conversion.
            request[2..4].copy_from_slice(&sum.to_ne_bytes());
        }
        let start = Instant::now();
        socket.send_to(&request, SocketAddr::new(to, 0)).context("cannot send")?;
        let mut buffer = vec![0; 65_535];
        loop {
            let left = TIMEOUT.saturating_sub(start.elapsed());
            if left.is_zero() {
                bail!("no answer within {} s", TIMEOUT.as_secs());
            }
            socket.set_read_timeout(Some(left))?;
            let Ok((len, from)) = socket.recv_from(&mut buffer) else { continue };
            if let Some(reply) = judge(&buffer[..len], from.ip(), id, &request, start.elapsed()) {
                return Ok(reply);
            }
        }
    }

    /// A raw socket; `UdpSocket` lends its safe send and receive to any datagram socket.
    fn socket(self, to: IpAddr) -> Result<UdpSocket> {
        let fd: OwnedFd = match to {
            IpAddr::V4(_) => {
                let fd = socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Icmp)?;
                setsockopt(&fd, sockopt::Ipv4Ttl, &self.ttl.cast_signed())?;
                let discover = if self.dont_fragment { libc::IP_PMTUDISC_PROBE } else { libc::IP_PMTUDISC_DONT };
                crate::raw::set_mtu_discover(std::os::fd::AsFd::as_fd(&fd), discover)?;
                nix::sys::socket::bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &SockaddrIn::new(0, 0, 0, 0, 0))?;
                fd
            }
            IpAddr::V6(_) => {
                let fd = socket(AddressFamily::Inet6, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::IcmpV6)?;
                setsockopt(&fd, sockopt::Ipv6Ttl, &self.ttl.cast_signed())?;
                let any = SockaddrIn6::from(std::net::SocketAddrV6::new(std::net::Ipv6Addr::UNSPECIFIED, 0, 0, 0));
                nix::sys::socket::bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &any)?;
                fd
            }
        };
        Ok(UdpSocket::from(fd))
    }
}

/// Tells whether a received message is about our request.
fn judge(message: &[u8], from: IpAddr, id: u16, request: &[u8], time: Duration) -> Option<Reply> {
    // IPv4 raw sockets deliver the IP header, IPv6 ones do not.
    let (icmp, echo_reply, quoted_at) = if from.is_ipv4() {
        let header = usize::from(message.first()? & 15) * 4;
        (message.get(header..)?, 0, 20)
    } else {
        (message, 129, 40)
    };
    let (&kind, &code) = (icmp.first()?, icmp.get(1)?);
    if kind == echo_reply {
        let ours = icmp.get(4..6)? == id.to_be_bytes() && icmp.get(8..)? == request.get(8..)?;
        return ours.then_some(Reply::Echo { from, time });
    }
    let is_error = if from.is_ipv4() { matches!(kind, 3 | 11 | 12) } else { kind < 128 };
    let quoted = icmp.get(8 + quoted_at..)?;
    (is_error && quoted.first() == request.first() && quoted.get(4..6)? == id.to_be_bytes()).then(|| Reply::Error {
        from,
        kind,
        code,
        rest: icmp.get(4..8).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes),
    })
}

/// Pings until the echo comes; for waiting, where [`Ping::send`] is for asserting.
pub fn reachable(from: &Netns, to: IpAddr) -> Result<Duration> {
    match Ping::default().send(from, to)? {
        Reply::Echo { from: by, time } if by == to => Ok(time),
        other => bail!("{} pings {to}: {other:?}", from.name()),
    }
}
