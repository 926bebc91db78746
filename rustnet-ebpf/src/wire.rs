//! Headers as they lie on the wire, and the numbers in them. Declarations only.

use rustnet_common::addr::{Ip4, Ip6};

/// Length of an Ethernet header.
pub const ETH_LEN: usize = 14;
/// EtherTypes, network order.
pub const ETH_P_IP: u16 = 0x0800_u16.to_be();
/// See [`ETH_P_IP`].
pub const ETH_P_IPV6: u16 = 0x86dd_u16.to_be();
/// 802.1Q tag, network order.
pub const ETH_P_8021Q: u16 = 0x8100_u16.to_be();
/// 802.1ad tag, network order.
pub const ETH_P_8021AD: u16 = 0x88a8_u16.to_be();
/// Length of an ICMP or ICMPv6 header.
pub const ICMP_LEN: usize = 8;
/// Length of a TCP header without options.
pub const TCP_LEN: usize = 20;

/// An Ethernet header.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ethernet {
    /// Destination MAC.
    pub dst: [u8; 6],
    /// Source MAC.
    pub src: [u8; 6],
    /// EtherType, network order.
    pub ethertype: u16,
}

/// An IPv4 header without options (RFC 791).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Header4 {
    /// Version and header length in words.
    pub ver_ihl: u8,
    /// Type of service.
    pub tos: u8,
    /// Total length, network order.
    pub total: u16,
    /// Identification.
    pub id: u16,
    /// Flags and fragment offset, network order.
    pub frag: u16,
    /// Time to live.
    pub ttl: u8,
    /// Protocol.
    pub proto: u8,
    /// Header checksum, memory order.
    pub csum: u16,
    /// Source.
    pub src: Ip4,
    /// Destination.
    pub dst: Ip4,
}

/// An IPv6 header (RFC 8200).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Header6 {
    /// Version, traffic class, flow label.
    pub ver_flow: u32,
    /// Payload length, network order.
    pub payload: u16,
    /// Next header.
    pub next: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Source.
    pub src: Ip6,
    /// Destination.
    pub dst: Ip6,
}

/// A UDP header (RFC 768), all fields in network order.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Udp {
    /// Source port.
    pub sport: u16,
    /// Destination port.
    pub dport: u16,
    /// Bytes of this header and what follows.
    pub len: u16,
    /// Checksum, 0 for none.
    pub csum: u16,
}

/// The first word of a VXLAN header with a network identifier, network order.
pub const VXLAN_FLAGS: u32 = 0x0800_0000_u32.to_be();
/// The two bits of explicit congestion notification in a type of service (RFC 3168).
pub const ECN: u8 = 3;
/// "Congestion experienced".
pub const ECN_CE: u8 = 3;
/// "ECN-capable transport".
pub const ECN_ECT_0: u8 = 2;

/// A VXLAN header (RFC 7348, 5), both words in network order.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Vxlan {
    /// Flags and reserved bits.
    pub flags: u32,
    /// Network identifier in the upper 24 bits.
    pub vni: u32,
}

/// All that stands between the Ethernet header and the IP packet inside the tunnel. `H` is the outer IP header.
#[repr(C, packed(2))]
#[derive(Clone, Copy)]
pub struct Outer<H: Copy> {
    /// Outer IP header.
    pub ip: H,
    /// Outer UDP header.
    pub udp: Udp,
    /// VXLAN header.
    pub vxlan: Vxlan,
    /// Inner Ethernet header.
    pub inner: Ethernet,
}

/// A TCP header without options (RFC 9293, 3.1), all fields in network order.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Tcp {
    /// Source port.
    pub sport: u16,
    /// Destination port.
    pub dport: u16,
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number.
    pub ack: u32,
    /// Data offset, reserved bits and flags.
    pub offset_flags: u16,
    /// Window.
    pub window: u16,
    /// Checksum.
    pub csum: u16,
    /// Urgent pointer.
    pub urgent: u16,
}

/// Bits of the TCP flags byte.
pub mod tcp {
    /// FIN.
    pub const FIN: u8 = 1;
    /// SYN.
    pub const SYN: u8 = 2;
    /// RST.
    pub const RST: u8 = 4;
    /// ACK.
    pub const ACK: u8 = 16;
}
