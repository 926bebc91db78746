//! Frames as plain values: build one, change its fields, build it again. What a test expects is made this way from scratch,
//! with checksums by etherparse's arithmetic, and never by the code under test.

use etherparse::checksum::Sum16BitWords;
use std::net::IpAddr;

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const SCTP: u8 = 132;
pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const ACK: u8 = 16;

/// What stands behind the IP header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum L4 {
    Tcp {
        sport: u16,
        dport: u16,
        seq: u32,
        ack: u32,
        flags: u8,
        window: u16,
    },
    Udp {
        sport: u16,
        dport: u16,
        checksum: bool,
    },
    /// `crc`: false leaves it to the device.
    Sctp {
        sport: u16,
        dport: u16,
        crc: bool,
    },
    Echo {
        reply: bool,
        id: u16,
    },
    /// An ICMP message of another kind; type and code of the family.
    Icmp {
        kind: u8,
        code: u8,
        rest: u32,
    },
    /// A protocol without ports.
    Other(u8),
}

/// A fragment of a datagram: bytes `from..to` of what stands behind the IP header.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    pub id: u32,
    pub from: usize,
    pub to: usize,
    pub more: bool,
}

/// A frame.
#[derive(Clone, Debug)]
pub struct Frame {
    pub smac: [u8; 6],
    pub dmac: [u8; 6],
    pub vlan: Option<u16>,
    pub src: IpAddr,
    pub dst: IpAddr,
    pub ttl: u8,
    /// IPv4 identification.
    pub id: u16,
    /// IPv6 flow label.
    pub flow: u32,
    /// IPv4 options, whole words.
    pub options: Vec<u8>,
    /// IPv6 extension headers: number and all bytes, of which the first (next header) is filled in here.
    pub extensions: Vec<(u8, Vec<u8>)>,
    pub l4: L4,
    pub payload: Vec<u8>,
    pub piece: Option<Piece>,
    /// IPv4 without "don't fragment".
    pub may_be_cut: bool,
    /// Bytes behind the IP packet, as short frames have them.
    pub padding: usize,
}

impl Frame {
    pub fn is_v6(&self) -> bool {
        self.src.is_ipv6()
    }

    pub fn ports(&self) -> (u16, u16) {
        match self.l4 {
            L4::Tcp { sport, dport, .. } | L4::Udp { sport, dport, .. } | L4::Sctp { sport, dport, .. } => {
                (sport, dport)
            }
            L4::Echo { reply: false, id } => (id, 0),
            L4::Echo { reply: true, id } => (0, id),
            _ => (0, 0),
        }
    }

    pub fn proto(&self) -> u8 {
        match self.l4 {
            L4::Tcp { .. } => TCP,
            L4::Udp { .. } => UDP,
            L4::Sctp { .. } => SCTP,
            L4::Echo { .. } | L4::Icmp { .. } => {
                if self.is_v6() {
                    58
                } else {
                    1
                }
            }
            L4::Other(p) => p,
        }
    }

    pub fn set_ports(&mut self, new_sport: u16, new_dport: u16) {
        match &mut self.l4 {
            L4::Tcp { sport, dport, .. } | L4::Udp { sport, dport, .. } | L4::Sctp { sport, dport, .. } => {
                (*sport, *dport) = (new_sport, new_dport);
            }
            L4::Echo { reply: false, id } => *id = new_sport,
            L4::Echo { reply: true, id } => *id = new_dport,
            _ => {}
        }
    }

    /// As [`Frame::map`] one hop further.
    pub fn hop(&self) -> Self {
        self.map(|f| f.ttl -= 1)
    }

    /// A copy whose IP packet has this length.
    pub fn with_length(&self, total: usize) -> Self {
        let header = self.ip_bytes().len() - self.payload.len();
        self.map(|f| f.payload = vec![0x5a; total - header])
    }

    /// A copy with something changed.
    pub fn map(&self, change: impl FnOnce(&mut Self)) -> Self {
        let mut new = self.clone();
        change(&mut new);
        new
    }

    pub fn between(&self, src: (IpAddr, u16), dst: (IpAddr, u16)) -> Self {
        self.map(|f| {
            (f.src, f.dst) = (src.0, dst.0);
            f.set_ports(src.1, dst.1);
        })
    }

    /// The same flow's other direction: addresses, ports, and for echo the kind, turned round.
    pub fn reply(&self) -> Self {
        let (sport, dport) = self.ports();
        self.map(|f| {
            (f.src, f.dst) = (self.dst, self.src);
            (f.smac, f.dmac) = (self.dmac, self.smac);
            match &mut f.l4 {
                L4::Echo { reply, .. } => *reply = !*reply,
                L4::Tcp { flags, .. } => *flags |= ACK,
                _ => {}
            }
            if !matches!(f.l4, L4::Echo { .. }) {
                f.set_ports(dport, sport);
            }
        })
    }

    pub fn with_flags(&self, new: u8) -> Self {
        self.map(|f| {
            if let L4::Tcp { flags, .. } = &mut f.l4 {
                *flags = new;
            }
        })
    }

    /// The fragments of this datagram, cut at these offsets (multiples of 8).
    pub fn pieces(&self, id: u32, cuts: &[usize]) -> Vec<Self> {
        let len = self.l4_bytes().len();
        let starts = [&[0], cuts].concat();
        let ends = [cuts, &[len]].concat();
        starts
            .into_iter()
            .zip(ends)
            .map(|(from, to)| self.map(|f| f.piece = Some(Piece { id, from, to, more: to != len })))
            .collect()
    }

    /// The IP packet without Ethernet header and padding.
    pub fn ip_bytes(&self) -> Vec<u8> {
        let mut l4 = self.l4_bytes();
        if let Some(piece) = self.piece {
            l4 = l4[piece.from..piece.to].to_vec();
        }
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => self.v4(src.octets(), dst.octets(), &l4),
            (IpAddr::V6(src), IpAddr::V6(dst)) => self.v6(src.octets(), dst.octets(), &l4),
            _ => panic!("{} and {} are of different families", self.src, self.dst),
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = [self.dmac, self.smac].concat();
        if let Some(tag) = self.vlan {
            out.extend([0x81, 0]);
            out.extend(tag.to_be_bytes());
        }
        out.extend(if self.is_v6() { [0x86, 0xdd] } else { [0x08, 0x00] });
        out.extend(self.ip_bytes());
        out.extend(vec![0; self.padding]);
        out
    }

    fn v4(&self, src: [u8; 4], dst: [u8; 4], l4: &[u8]) -> Vec<u8> {
        let header = 20 + self.options.len();
        let (id, frag) = match self.piece {
            Some(p) => (p.id as u16, (p.from / 8) as u16 | if p.more { 0x2000 } else { 0 }),
            None => (self.id, if self.may_be_cut { 0 } else { 0x4000 }),
        };
        let mut out = vec![0x40 | (header / 4) as u8, 0];
        out.extend(((header + l4.len()) as u16).to_be_bytes());
        out.extend(id.to_be_bytes());
        out.extend(frag.to_be_bytes());
        out.extend([self.ttl, self.proto(), 0, 0]);
        out.extend(src);
        out.extend(dst);
        out.extend(&self.options);
        let sum = Sum16BitWords::new().add_slice(&out).ones_complement();
        out[10..12].copy_from_slice(&sum.to_ne_bytes());
        out.extend(l4);
        out
    }

    fn v6(&self, src: [u8; 16], dst: [u8; 16], l4: &[u8]) -> Vec<u8> {
        let mut chain = self.extensions.clone();
        if let Some(p) = self.piece {
            let mut header = vec![0, 0];
            header.extend((p.from as u16 | u16::from(p.more)).to_be_bytes());
            header.extend(p.id.to_be_bytes());
            chain.push((44, header));
        }
        let numbers: Vec<u8> = chain.iter().map(|(n, _)| *n).chain([self.proto()]).collect();
        let mut body = Vec::new();
        for ((_, bytes), next) in chain.iter().zip(&numbers[1..]) {
            body.push(*next);
            body.extend(&bytes[1..]);
        }
        body.extend(l4);
        let mut out = (0x6000_0000 | self.flow).to_be_bytes().to_vec();
        out.extend((body.len() as u16).to_be_bytes());
        out.extend([numbers[0], self.ttl]);
        out.extend(src);
        out.extend(dst);
        out.extend(body);
        out
    }

    /// Transport header and payload, checksum right for the whole datagram.
    fn l4_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let (sport, dport) = self.ports();
        let ports = |out: &mut Vec<u8>| {
            out.extend(sport.to_be_bytes());
            out.extend(dport.to_be_bytes());
        };
        let checksum_at = match &self.l4 {
            L4::Tcp { seq, ack, flags, window, .. } => {
                ports(&mut out);
                out.extend(seq.to_be_bytes());
                out.extend(ack.to_be_bytes());
                out.extend([0x50, *flags]);
                out.extend(window.to_be_bytes());
                out.extend([0; 4]);
                Some(16)
            }
            L4::Udp { checksum, .. } => {
                ports(&mut out);
                out.extend(((8 + self.payload.len()) as u16).to_be_bytes());
                out.extend([0; 2]);
                checksum.then_some(6)
            }
            L4::Sctp { .. } => {
                ports(&mut out);
                out.extend([1, 2, 3, 4, 0, 0, 0, 0]);
                None
            }
            L4::Echo { reply, id } => {
                let kind = match (self.is_v6(), reply) {
                    (false, false) => 8,
                    (false, true) => 0,
                    (true, false) => 128,
                    (true, true) => 129,
                };
                out.extend([kind, 0, 0, 0]);
                out.extend(id.to_be_bytes());
                out.extend([0, 1]);
                Some(2)
            }
            L4::Icmp { kind, code, rest } => {
                out.extend([*kind, *code, 0, 0]);
                out.extend(rest.to_be_bytes());
                Some(2)
            }
            L4::Other(_) => None,
        };
        out.extend(&self.payload);
        if let Some(at) = checksum_at {
            let sum = transport_sum(self.src, self.dst, self.proto(), &out).ones_complement();
            // A computed zero of UDP is sent as all ones (RFC 768).
            let sum = if sum == 0 && self.proto() == UDP { 0xffff } else { sum };
            out[at..at + 2].copy_from_slice(&sum.to_ne_bytes());
        }
        if let L4::Sctp { crc: true, .. } = self.l4 {
            let crc = crc32c(&out);
            out[8..12].copy_from_slice(&crc.to_le_bytes());
        }
        out
    }
}

/// The CRC of SCTP (RFC 9260, appendix A), bit by bit.
pub fn crc32c(data: &[u8]) -> u32 {
    let bit = |crc: u32| if crc & 1 == 0 { crc >> 1 } else { crc >> 1 ^ 0x82f6_3b78 };
    !data.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| bit(crc)))
}

/// The sum over a transport packet and its pseudo header (ICMP over IPv4 has none).
pub fn transport_sum(src: IpAddr, dst: IpAddr, proto: u8, l4: &[u8]) -> Sum16BitWords {
    let mut sum = Sum16BitWords::new();
    let sum = match (src, dst) {
        (IpAddr::V4(_), IpAddr::V4(_)) if proto == 1 => return sum.add_slice(l4),
        (IpAddr::V4(s), IpAddr::V4(d)) => {
            let mut sum = sum.add_4bytes(s.octets());
            sum.add_4bytes(d.octets())
        }
        (IpAddr::V6(s), IpAddr::V6(d)) => {
            let mut sum = sum.add_16bytes(s.octets());
            sum.add_16bytes(d.octets())
        }
        _ => panic!("different families"),
    };
    sum.add_2bytes([0, proto]).add_2bytes((l4.len() as u16).to_be_bytes()).add_slice(l4)
}
