//! What reports an error: resets and ICMP errors, built from the RFCs alone, and what a translation
//! makes of them.

use crate::frame::{ACK, FIN, Frame, L4, RST, SYN};
use crate::harness::{MAC_HOST, MAC_OUT};
use std::net::IpAddr;

/// A reset that refuses `asked`, built from RFC 9293, 3.5.2 alone.
pub fn reset(asked: &Frame) -> Frame {
    let L4::Tcp { sport, dport, seq, ack, flags, .. } = asked.l4 else { panic!("not TCP") };
    let len = asked.payload.len() as u32 + u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
    let (seq, ack, flags) = if flags & ACK != 0 { (ack, 0, RST) } else { (0, seq.wrapping_add(len), RST | ACK) };
    asked.reply().map(|f| {
        f.l4 = L4::Tcp { sport: dport, dport: sport, seq, ack, flags, window: 0 };
        (f.ttl, f.id, f.flow, f.payload) = (64, 0, 0, Vec::new());
        (f.options, f.extensions) = (Vec::new(), Vec::new());
    })
}

/// An ICMP error about `asked`, from `src`. It quotes the IP header and 28 bytes behind it, in
/// whole words, of which there are 40 at most.
pub fn icmp_error(asked: &Frame, src: IpAddr, kind: u8, code: u8, rest: u32) -> Frame {
    let packet = asked.ip_bytes();
    let header = if asked.is_v6() {
        let fragment = if asked.piece.is_some() { 8 } else { 0 };
        40 + fragment + asked.extensions.iter().map(|(_, b)| b.len()).sum::<usize>()
    } else {
        20 + asked.options.len()
    };
    let quoted = packet.len().min(header + 28).min(160) / 4 * 4;
    asked.reply().map(|f| {
        f.src = src;
        f.l4 = L4::Icmp { kind, code, rest };
        f.payload = packet[..quoted].to_vec();
        (f.piece, f.may_be_cut) = (None, false);
        (f.ttl, f.id, f.flow, f.options, f.extensions) = (64, 0, 0, Vec::new(), Vec::new());
    })
}

/// Port unreachable, from the address that the packet was for.
pub fn port_unreachable(asked: &Frame) -> Frame {
    let (kind, code) = if asked.is_v6() { (1, 4) } else { (3, 3) };
    icmp_error(asked, asked.dst, kind, code, 0)
}

/// Communication administratively prohibited, from the address that the packet was for.
pub fn prohibited(asked: &Frame) -> Frame {
    let (kind, code) = if asked.is_v6() { (1, 1) } else { (3, 13) };
    icmp_error(asked, asked.dst, kind, code, 0)
}

/// What refuses `asked`: a reset of TCP, port unreachable of all else.
pub fn refusal(asked: &Frame) -> Frame {
    if matches!(asked.l4, L4::Tcp { .. }) { reset(asked) } else { port_unreachable(asked) }
}

/// An error from `src` to whoever sent `packet`, which is quoted in full up to `quote` bytes.
pub fn error(packet: &Frame, src: IpAddr, kind: (u8, u8, u32), quote: usize) -> Frame {
    let mut bytes = packet.ip_bytes();
    bytes.truncate(quote);
    packet.map(|f| {
        (f.src, f.dst) = (src, packet.src);
        (f.smac, f.dmac) = (MAC_OUT, MAC_HOST);
        f.l4 = L4::Icmp { kind: kind.0, code: kind.1, rest: kind.2 };
        f.payload = bytes;
        f.piece = None;
        f.ttl = 60;
    })
}

/// The error `before`, once what it quotes and its own ends are translated back: quoted is
/// `packet`. The quoted checksum of the transport stays what it was; nobody can verify it.
pub fn translated(before: &Frame, from_quoted: &Frame, to_quoted: &Frame, src: IpAddr) -> Frame {
    let (old, mut new) = (from_quoted.ip_bytes(), to_quoted.ip_bytes());
    let len = before.payload.len();
    let checksum = match &to_quoted.l4 {
        L4::Tcp { .. } => 16..18,
        L4::Udp { .. } => 6..8,
        L4::Echo { .. } => 2..4,
        L4::Sctp { .. } => 8..12,
        _ => 0..0,
    };
    for i in checksum {
        let fragment = if to_quoted.piece.is_some() { 8 } else { 0 };
        let at = i + if to_quoted.is_v6() { 40 + fragment } else { 20 + to_quoted.options.len() };
        new[at] = old[at];
    }
    new.truncate(len);
    before.map(|f| {
        (f.src, f.dst) = (src, to_quoted.src);
        f.payload = new;
    })
}
