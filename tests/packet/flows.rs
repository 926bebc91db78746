//! The packets that the tables begin with.

use crate::frame::{ACK, Frame, L4, SYN};
use crate::harness::{MAC_A, MAC_B, MAC_HOST, MAC_OUT, Net};
use std::net::IpAddr;

/// Protocols with flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proto {
    Tcp,
    Udp,
    Sctp,
    Echo,
}

/// All of them.
pub const ALL: [Proto; 4] = [Proto::Tcp, Proto::Udp, Proto::Sctp, Proto::Echo];
/// Those that services are made of.
pub const SERVED: [Proto; 3] = [Proto::Tcp, Proto::Udp, Proto::Sctp];

impl Proto {
    pub fn number(self, net: Net) -> u8 {
        match (self, net) {
            (Self::Tcp, _) => 6,
            (Self::Udp, _) => 17,
            (Self::Sctp, _) => 132,
            (Self::Echo, Net::V4) => 1,
            (Self::Echo, Net::V6) => 58,
        }
    }

    /// A port of the protocol: echo has none.
    pub fn port(self, port: u16) -> u16 {
        if self == Self::Echo { 0 } else { port }
    }

    fn l4(self, sport: u16, dport: u16) -> L4 {
        match self {
            Self::Tcp => L4::Tcp { sport, dport, seq: 1000, ack: 0, flags: SYN, window: 64_240 },
            Self::Udp => L4::Udp { sport, dport, checksum: true },
            Self::Sctp => L4::Sctp { sport, dport, crc: true },
            Self::Echo => L4::Echo { reply: false, id: sport },
        }
    }
}

/// A packet between any two.
pub fn frame(proto: Proto, macs: ([u8; 6], [u8; 6]), src: (IpAddr, u16), dst: (IpAddr, u16)) -> Frame {
    Frame {
        smac: macs.0,
        dmac: macs.1,
        vlan: None,
        src: src.0,
        dst: dst.0,
        ttl: 64,
        id: 0x1234,
        flow: 0xabcde,
        options: Vec::new(),
        extensions: Vec::new(),
        l4: proto.l4(src.1, dst.1),
        // An odd length, on purpose.
        payload: if proto == Proto::Tcp { Vec::new() } else { b"a payload of an odd length...".to_vec() },
        piece: None,
        may_be_cut: false,
        padding: 0,
    }
}

/// Client port of most tests.
pub const PORT: u16 = 40_001;
/// Port of most services.
pub const VIP_PORT: u16 = 80;
/// Port of their backends.
pub const TARGET: u16 = 8080;

/// Pod A sends.
pub fn from_a(net: Net, proto: Proto, dst: (IpAddr, u16)) -> Frame {
    frame(proto, (MAC_A, MAC_HOST), (net.a(), PORT), dst)
}

/// Pod B sends.
pub fn from_b(net: Net, proto: Proto, dst: (IpAddr, u16)) -> Frame {
    frame(proto, (MAC_B, MAC_HOST), (net.b(), PORT), dst)
}

/// Somebody out there sends.
pub fn from_outside(proto: Proto, src: (IpAddr, u16), dst: (IpAddr, u16)) -> Frame {
    frame(proto, (MAC_OUT, MAC_HOST), src, dst)
}

/// This node's stack sends.
pub fn from_host(net: Net, proto: Proto, dst: (IpAddr, u16)) -> Frame {
    frame(proto, (MAC_HOST, MAC_OUT), (net.node(), PORT), dst)
}

/// The same packet, as pod A's interface sends it.
pub fn as_from_a(f: &Frame) -> Frame {
    f.map(|f| (f.smac, f.dmac) = (MAC_A, MAC_HOST))
}

/// The same packet, as pod B's interface sends it.
pub fn as_from_b(f: &Frame) -> Frame {
    f.map(|f| (f.smac, f.dmac) = (MAC_B, MAC_HOST))
}

/// Pod B answers what has arrived there.
pub fn answer_of_b(arrived: &Frame) -> Frame {
    as_from_b(&arrived.reply()).map(|f| f.ttl = 64)
}

/// What pod A's packet to a service arrives as at a backend.
pub fn at_backend(net: Net, f: &Frame, backend: IpAddr) -> Frame {
    f.hop().between((net.a(), PORT), (backend, TARGET))
}

/// What a backend's answer arrives as in pod A, which asked the `n`th virtual address.
pub fn at_client(net: Net, f: &Frame, n: u8) -> Frame {
    f.hop().between((net.vip(n), VIP_PORT), (net.a(), PORT))
}

/// As it goes on after the handshake: for TCP, an acknowledging segment with data.
pub fn later(f: &Frame) -> Frame {
    f.with_flags(ACK).map(|f| {
        if matches!(f.l4, L4::Tcp { .. }) {
            f.payload = b"data of an odd length".to_vec();
        }
    })
}
