//! Reads and writes packets for the model: on its own, from the RFCs, without a line of the code under test.

use crate::frame::{crc32c, transport_sum};
use etherparse::checksum::Sum16BitWords;
use std::net::IpAddr;

/// A flow in one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tuple {
    pub src: IpAddr,
    pub dst: IpAddr,
    pub sport: u16,
    pub dport: u16,
    pub proto: u8,
}

impl Tuple {
    pub fn reversed(self) -> Self {
        Self { src: self.dst, dst: self.src, sport: self.dport, dport: self.sport, proto: self.proto }
    }
}

/// A packet that an ICMP error quotes.
#[derive(Clone, Copy, Debug)]
pub struct Quoted {
    pub tuple: Tuple,
    /// Offset of its IP header in the frame.
    pub l3: usize,
    /// Offset of its transport header.
    pub l4: usize,
}

/// What a packet is.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    Flow,
    /// Without ports.
    Later,
    /// An ICMP error, and what it quotes if that can be read.
    Error(Option<Quoted>),
    /// Neighbour discovery.
    Link,
}

/// What is behind the Ethernet header.
#[derive(Debug)]
pub enum L2 {
    Tagged,
    Ip(Box<Option<Seen>>),
    Other,
}

/// A packet that follows the rules of its headers.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    pub tuple: Tuple,
    pub kind: Kind,
    pub ttl: u8,
    /// Offset of the transport header in the frame.
    pub l4: usize,
    /// End of the IP packet.
    pub end: usize,
    pub more: bool,
    pub id: u32,
    pub source_route: bool,
    /// Behind more extension headers, or longer ones, than anybody has to follow.
    pub deep: bool,
    /// A multicast listener's message.
    pub listener: bool,
    pub tcp_flags: u8,
}

const ETHERNET: usize = 14;

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

fn address(bytes: &[u8], at: usize, v6: bool) -> Option<IpAddr> {
    if v6 {
        Some(<[u8; 16]>::try_from(bytes.get(at..at + 16)?).ok()?.into())
    } else {
        Some(<[u8; 4]>::try_from(bytes.get(at..at + 4)?).ok()?.into())
    }
}

/// Reads a frame.
pub fn read(frame: &[u8]) -> L2 {
    match be16(frame, 12) {
        Some(0x8100 | 0x88a8) => L2::Tagged,
        Some(0x0800) => L2::Ip(Box::new(v4(frame))),
        Some(0x86dd) => L2::Ip(Box::new(v6(frame))),
        _ => L2::Other,
    }
}

fn v4(f: &[u8]) -> Option<Seen> {
    let first = *f.get(ETHERNET)?;
    let header = usize::from(first & 15) * 4;
    let total = usize::from(be16(f, 16)?);
    if first >> 4 != 4 || header < 20 || total < header || ETHERNET + total > f.len() {
        return None;
    }
    let frag = be16(f, 20)?;
    let mut options = f.get(34..ETHERNET + header)?;
    let mut source_route = false;
    while let [kind, rest @ ..] = options {
        match (kind, rest.first()) {
            (0, _) | (_, None) => break,
            (1, _) => options = rest,
            (kind, Some(len)) => {
                source_route |= matches!(kind, 131 | 137);
                match options.get(usize::from(*len)..) {
                    Some(next) if *len >= 2 => options = next,
                    _ => break,
                }
            }
        }
    }
    let (src, dst) = (address(f, 26, false)?, address(f, 30, false)?);
    let seen = Seen {
        tuple: Tuple { src, dst, sport: 0, dport: 0, proto: f[23] },
        kind: Kind::Flow,
        ttl: f[22],
        l4: ETHERNET + header,
        end: ETHERNET + total,
        more: frag & 0x2000 != 0,
        id: u32::from(be16(f, 18)?),
        source_route,
        deep: false,
        listener: false,
        tcp_flags: 0,
    };
    transport(f, seen, usize::from(frag & 0x1fff))
}

fn v6(f: &[u8]) -> Option<Seen> {
    let end = ETHERNET + 40 + usize::from(be16(f, 18)?);
    if f.get(ETHERNET)? >> 4 != 6 || end > f.len() {
        return None;
    }
    let (mut proto, mut l4, mut offset) = (*f.get(20)?, ETHERNET + 40, 0);
    let mut seen = Seen {
        tuple: Tuple { src: address(f, 22, true)?, dst: address(f, 38, true)?, sport: 0, dport: 0, proto: 0 },
        kind: Kind::Flow,
        ttl: f[21],
        l4: 0,
        end,
        more: false,
        id: 0,
        source_route: false,
        deep: false,
        listener: false,
        tcp_flags: 0,
    };
    let mut headers = 0;
    while matches!(proto, 0 | 43 | 44 | 51 | 60) && offset == 0 {
        headers += 1;
        let h = f.get(l4..l4 + 8)?;
        l4 += match proto {
            44 => {
                let field = be16(h, 2)?;
                offset = usize::from(field >> 3);
                seen.more = field & 1 != 0;
                seen.id = u32::from_be_bytes([h[4], h[5], h[6], h[7]]);
                8
            }
            51 => (usize::from(h[1]) + 2) * 4,
            _ => (usize::from(h[1]) + 1) * 8,
        };
        seen.source_route |= proto == 43 && h[2] == 0 && h[3] != 0;
        proto = h[0];
    }
    if l4 > end {
        return None;
    }
    seen.tuple.proto = proto;
    seen.l4 = l4;
    seen.deep = headers > 6 || l4 > 511;
    transport(f, seen, offset)
}

/// Reads ports, flags, or what an ICMP message says.
fn transport(f: &[u8], mut seen: Seen, offset: usize) -> Option<Seen> {
    let proto = seen.tuple.proto;
    if offset != 0 {
        seen.kind = Kind::Later;
        return (proto != 6 || offset >= 3).then_some(seen);
    }
    let l4 = f.get(seen.l4..seen.end)?;
    let icmp = if seen.tuple.src.is_ipv6() { 58 } else { 1 };
    match proto {
        // Their checksum covers the addresses: without it the packet cannot be translated.
        33 | 136 if l4.len() < 8 => return None,
        6 | 17 | 132 => {
            let least = [(6, 20), (17, 8), (132, 12)].iter().find(|p| p.0 == proto)?.1;
            if l4.len() < least {
                return None;
            }
            (seen.tuple.sport, seen.tuple.dport) = (be16(l4, 0)?, be16(l4, 2)?);
            if proto == 6 {
                seen.tcp_flags = l4[13];
            }
        }
        p if p == icmp => {
            if l4.len() < 8 {
                return None;
            }
            match (icmp, l4[0]) {
                (1, 8) | (58, 128) => seen.tuple.sport = be16(l4, 4)?,
                (1, 0) | (58, 129) => seen.tuple.dport = be16(l4, 4)?,
                (1, 3 | 4 | 5 | 11 | 12) | (58, 1..=4) => seen.kind = Kind::Error(quoted(f, &seen)),
                (58, 133..=137) => seen.kind = Kind::Link,
                (58, 130..=132 | 143) => seen.listener = true,
                _ => {}
            }
        }
        _ => {}
    }
    Some(seen)
}

/// Reads what an error quotes: cut short, so that its lengths mean nothing.
fn quoted(f: &[u8], error: &Seen) -> Option<Quoted> {
    let l3 = error.l4 + 8;
    let is_v6 = error.tuple.src.is_ipv6();
    let q = f.get(l3..)?;
    let (proto, l4, at) = if is_v6 {
        if q.first()? >> 4 != 6 {
            return None;
        }
        match *q.get(6)? {
            44 if be16(q, 42)? >> 3 == 0 => (*q.get(40)?, 48, 8),
            44 => return None,
            next => (next, 40, 8),
        }
    } else {
        let first = *q.first()?;
        if first >> 4 != 4 || first & 15 < 5 || be16(q, 6)? & 0x1fff != 0 {
            return None;
        }
        (*q.get(9)?, usize::from(first & 15) * 4, 12)
    };
    if is_v6 && matches!(proto, 0 | 43 | 44 | 51 | 60) {
        return None;
    }
    // The least that an error quotes (RFC 792): with less, nothing shows what flow is meant.
    if l3 + l4 + 8 > error.end {
        return None;
    }
    let len = if is_v6 { 16 } else { 4 };
    let (src, dst) = (address(q, at, is_v6)?, address(q, at + len, is_v6)?);
    let (sport, dport) = match proto {
        6 | 17 | 132 => (be16(q, l4)?, be16(q, l4 + 2)?),
        1 | 58 => {
            let id = be16(q, l4 + 4)?;
            match (is_v6, q[l4]) {
                (false, 8) | (true, 128) => (id, 0),
                (false, 0) | (true, 129) => (0, id),
                _ => return None,
            }
        }
        _ => (0, 0),
    };
    Some(Quoted { tuple: Tuple { src, dst, sport, dport, proto }, l3, l4: l3 + l4 })
}

/// Sets a field of whole 16-bit words, and takes the difference out of the checksums at the given places.
fn set(f: &mut [u8], at: usize, new: &[u8], checksums: &[usize]) {
    for (i, pair) in new.chunks(2).enumerate() {
        let at = at + 2 * i;
        let (old, new) = (u32::from(be16(f, at).unwrap_or(0)), u32::from(u16::from_be_bytes([pair[0], pair[1]])));
        f[at..at + 2].copy_from_slice(pair);
        for c in checksums {
            // RFC 1624, equation 3.
            let sum = u32::from(!be16(f, *c).unwrap_or(0)) + (!old & 0xffff) + new;
            let sum = (sum & 0xffff) + (sum >> 16);
            let sum = (sum & 0xffff) + (sum >> 16);
            f[*c..*c + 2].copy_from_slice(&(!(sum as u16)).to_be_bytes());
        }
    }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

/// Where a packet's transport has its checksum, and whether the pseudo header is in it.
fn checksum_at(seen: &Seen) -> Option<(usize, bool)> {
    let (at, pseudo) = match (seen.tuple.proto, seen.tuple.src.is_ipv6()) {
        (6, _) => (16, true),
        (17 | 136 | 33, _) => (6, true),
        (1, false) => (2, false),
        (58, true) => (2, true),
        _ => return None,
    };
    (seen.l4 + at + 2 <= seen.end).then_some((seen.l4 + at, pseudo))
}

/// The frame once its packet is `to`, with this hop limit, and quotes `becomes`.
pub fn write(frame: &[u8], seen: &Seen, to: &Tuple, ttl: u8, becomes: Option<&Tuple>) -> Vec<u8> {
    let mut f = frame.to_vec();
    let is_v6 = seen.tuple.src.is_ipv6();
    let (src_at, dst_at) = if is_v6 { (22, 38) } else { (26, 30) };
    let header: &[usize] = if is_v6 { &[] } else { &[24] };
    if is_v6 {
        f[21] = ttl;
    } else {
        let word = [ttl, f[23]];
        set(&mut f, 22, &word, header);
    }
    let whole = !matches!(seen.kind, Kind::Later);
    let place = checksum_at(seen).filter(|_| whole);
    // A datagram without checksum stays without.
    let place = place.filter(|(at, _)| seen.tuple.proto != 17 || be16(&f, *at) != Some(0));
    let mut sums = header.to_vec();
    sums.extend(place.filter(|p| p.1).map(|p| p.0));
    set(&mut f, src_at, &octets(to.src), &sums);
    set(&mut f, dst_at, &octets(to.dst), &sums);
    let own: Vec<_> = place.iter().map(|p| p.0).collect();
    if matches!(seen.kind, Kind::Flow) {
        write_ports(&mut f, seen.l4, &seen.tuple, to, &own);
    }
    if let (Kind::Error(Some(q)), Some(becomes)) = (seen.kind, becomes) {
        // The quoted header's own checksum takes the difference, and the error's takes both.
        let (src, dst) = if is_v6 { (q.l3 + 8, q.l3 + 24) } else { (q.l3 + 12, q.l3 + 16) };
        let inner = if is_v6 { vec![] } else { vec![q.l3 + 10] };
        let mut both = own.clone();
        both.extend(inner);
        let before = if is_v6 { None } else { be16(&f, q.l3 + 10) };
        set(&mut f, src, &octets(becomes.src), &both);
        set(&mut f, dst, &octets(becomes.dst), &both);
        if let (Some(old), Some(new)) = (before, be16(&f, q.l3 + 10)) {
            f[q.l3 + 10..q.l3 + 12].copy_from_slice(&old.to_be_bytes());
            set(&mut f, q.l3 + 10, &new.to_be_bytes(), &own);
        }
        write_ports(&mut f, q.l4, &q.tuple, becomes, &own);
    }
    if seen.tuple.proto == 132 && whole && (to.sport, to.dport) != (seen.tuple.sport, seen.tuple.dport) {
        let right = |f: &[u8]| {
            let mut l4 = f[seen.l4..seen.end].to_vec();
            l4[8..12].fill(0);
            crc32c(&l4).to_le_bytes()
        };
        if frame[seen.l4 + 8..seen.l4 + 12] == right(frame) {
            let crc = right(&f);
            f[seen.l4 + 8..seen.l4 + 12].copy_from_slice(&crc);
        }
    }
    if let Some((at, _)) = place
        && seen.tuple.proto == 17
        && f[at..at + 2] == [0, 0]
    {
        f[at..at + 2].fill(0xff);
    }
    f
}

fn write_ports(f: &mut [u8], l4: usize, from: &Tuple, to: &Tuple, sums: &[usize]) {
    if (from.sport, from.dport) == (to.sport, to.dport) {
        return;
    }
    match from.proto {
        6 | 17 | 132 => {
            set(f, l4, &to.sport.to_be_bytes(), sums);
            set(f, l4 + 2, &to.dport.to_be_bytes(), sums);
        }
        _ => set(f, l4 + 4, &(to.sport | to.dport).to_be_bytes(), sums),
    }
}

/// True if two frames are the same, but for the two forms of a zero in checksums (RFC 1624, 3), and for the checksum of an SCTP
/// packet whose sender had none that is right.
pub fn same(a: &[u8], b: &[u8], seen: &Seen) -> bool {
    let mut places = Vec::new();
    if seen.tuple.src.is_ipv4() {
        places.push(24);
    }
    places.extend(checksum_at(seen).map(|(at, _)| at));
    if let Kind::Error(Some(q)) = seen.kind {
        places.push(q.l3 + 10);
    }
    let plain = |f: &[u8]| {
        let mut f = f.to_vec();
        for at in &places {
            if f.get(*at..at + 2) == Some(&[0xff, 0xff]) {
                f[*at..at + 2].fill(0);
            }
        }
        if seen.tuple.proto == 132 && matches!(seen.kind, Kind::Flow) {
            f[seen.l4 + 8..seen.l4 + 12].fill(0);
        }
        f
    };
    a.len() == b.len() && plain(a) == plain(b)
}

fn sum(bytes: &[u8]) -> u16 {
    Sum16BitWords::new().add_slice(bytes).ones_complement()
}

/// True if the checksums that cover a whole packet are right, those of rare protocols and SCTP's among them.
pub fn sums_are_right(frame: &[u8]) -> bool {
    let is_right = testkit::check::checksums(frame, false).is_ok();
    let L2::Ip(seen) = read(frame) else { return is_right };
    let Some(seen) = *seen else { return is_right };
    let Some(l4) = frame.get(seen.l4..seen.end) else { return is_right };
    if matches!((seen.tuple.proto, seen.tuple.src.is_ipv6()), (58, false) | (1, true)) {
        // ICMP of the other family has no meaning here, and no checksum that a router would know.
        return seen.tuple.src.is_ipv6() || sum(&frame[14..seen.l4]) == 0;
    }
    if !is_right {
        // What goes to the overlay's port need not hold a frame, which the check asks for.
        return (seen.tuple.proto, seen.tuple.dport) == (17, 8472)
            && (seen.tuple.src.is_ipv6() || sum(&frame[14..seen.l4]) == 0)
            && (transport_sum(seen.tuple.src, seen.tuple.dst, 17, l4).ones_complement() == 0 || l4[6..8] == [0, 0]);
    }
    match seen.tuple.proto {
        _ if seen.more || matches!(seen.kind, Kind::Later) => true,
        132 => {
            let mut zeroed = l4.to_vec();
            zeroed[8..12].fill(0);
            l4[8..12] == crc32c(&zeroed).to_le_bytes()
        }
        136 | 33 if l4.len() >= 12 => {
            transport_sum(seen.tuple.src, seen.tuple.dst, seen.tuple.proto, l4).ones_complement() == 0
        }
        _ => true,
    }
}
