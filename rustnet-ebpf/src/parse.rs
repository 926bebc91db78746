//! From bytes to a [`Packet`]: Ethernet, one optional VLAN tag, IPv4 with options, IPv6 with extension headers, the ports
//! of TCP, UDP and SCTP, the identifier of ICMP echo, and fragments. Reads only; believes no length field unchecked.

use aya_ebpf::bindings::__sk_buff;
use rustnet_common::addr::{Address, Ip4, Ip6};
use rustnet_common::drop::DropReason;
use rustnet_common::frag::{FragKey, FragPorts};
use rustnet_common::tuple::{Tuple, proto};

use crate::ctx::{Ctx, Skb, at_pulled, bounded};
use crate::family::{Family, V4, V6};
use crate::step::{Packed, Stop};

/// Length of an Ethernet header.
pub const ETH_LEN: usize = 14;
/// Length of an 802.1Q tag.
const VLAN_LEN: usize = 4;
/// EtherTypes, network order as `__sk_buff::protocol` has them.
pub const ETH_P_IP: u16 = 0x0800_u16.to_be();
/// See [`ETH_P_IP`].
pub const ETH_P_IPV6: u16 = 0x86dd_u16.to_be();
const ETH_P_8021Q: u16 = 0x8100_u16.to_be();
const ETH_P_8021AD: u16 = 0x88a8_u16.to_be();

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

/// What a packet is to the steps that follow.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A transport header is there (or a protocol without one).
    Flow,
    /// A later fragment: the tuple has the ports of the first, the packet has none.
    LaterFragment,
    /// An ICMP error that quotes another packet.
    IcmpError,
    /// Neighbour discovery and the like (ICMPv6 133-137): of the link, never forwarded.
    Link,
}

/// A parsed packet.
#[repr(C)]
pub struct Packet<A> {
    /// The flow, as this packet shows it.
    pub tuple: Tuple<A>,
    l3: u16,
    l4: u16,
    /// Length of the IP packet by its own header.
    pub ip_len: u32,
    /// What has to fit through a link: that length, or the length of one of the packets that a GSO frame stands for. 0 if
    /// nobody can tell, or nobody cares because routers may cut it (IPv4 without "don't fragment").
    pub unit: u32,
    /// TTL or hop limit.
    pub ttl: u8,
    /// TCP flags, 0 for others.
    pub tcp_flags: u8,
    /// See [`Kind`].
    pub kind: Kind,
    /// More fragments follow.
    more: bool,
    /// Fragment offset in units of 8 bytes.
    offset: u16,
    /// The fragment's identification, as it stands on the wire, if it is one.
    id: u32,
}

impl<A: Address> Packet<A> {
    /// A packet of which nothing is known but where its IP header is. Parsing fills it in place: results of this size
    /// would be copied, byte by byte, at each return.
    #[inline(always)]
    pub fn new(l3: usize) -> Self {
        Self {
            tuple: Tuple { src: A::UNSPECIFIED, dst: A::UNSPECIFIED, sport: 0, dport: 0, proto: 0, pad: 0, pad2: 0 },
            l3: l3 as u16,
            l4: 0,
            ip_len: 0,
            unit: 0,
            ttl: 0,
            tcp_flags: 0,
            kind: Kind::Flow,
            more: false,
            offset: 0,
            id: 0,
        }
    }

    /// True for a first fragment: checksums are over more than there is.
    #[inline(always)]
    pub fn first_of_many(&self) -> bool {
        self.more
    }

    /// Offset of the IP header.
    #[inline(always)]
    pub fn l3(&self) -> usize {
        bounded(self.l3 as usize)
    }

    /// Offset of the transport header.
    #[inline(always)]
    pub fn l4(&self) -> usize {
        bounded(self.l4 as usize)
    }
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

/// What `gso_size` says of frames whose segments have lengths of their own (SCTP): linux/skbuff.h.
const GSO_BY_FRAGS: u32 = 0xffff;
/// Largest offset of a transport header that is followed.
const L4_MAX: usize = 0x1ff;
/// IPv6 extension headers that are followed.
const EXTENSIONS: usize = 6;
/// The IPv6 extension header of fragments.
const FRAGMENT: u8 = 44;

/// A family's IP header.
pub trait Header<A>: Copy {
    /// Reads the header at `l3`; sets all that is not the transport header's, and gives the offset of that one.
    fn network<C: Ctx>(ctx: &C, l3: usize, p: &mut Packet<A>) -> Result<usize, DropReason>;

    /// Reads the header of a packet that an ICMP error quotes: cut short, so that its lengths mean nothing. Sets addresses
    /// and protocol, gives the offset of the transport header; `None` for what cannot be told (later fragments, IPv6
    /// extension headers other than that of a first fragment).
    fn quoted<C: Ctx>(ctx: &C, l3: usize, out: &mut Tuple<A>) -> Option<usize>;
}

impl Header<Ip4> for Header4 {
    #[inline(always)]
    fn network<C: Ctx>(ctx: &C, l3: usize, p: &mut Packet<Ip4>) -> Result<usize, DropReason> {
        let h = at_pulled::<Self, C>(ctx, l3).ok_or(DropReason::Malformed)?;
        // SAFETY: `at_pulled` proved that a whole header lies there; IP headers are 4-byte aligned (NET_IP_ALIGN), and
        // BPF loads need no more.
        let h = unsafe { &*h };
        let header = ((h.ver_ihl & 0xf) as usize) * 4;
        let total = u32::from(u16::from_be(h.total));
        if h.ver_ihl >> 4 != 4
            || header < size_of::<Self>()
            || (total as usize) < header
            || total > ctx.len().wrapping_sub(l3 as u32)
        {
            return Err(DropReason::Malformed);
        }
        let frag = u16::from_be(h.frag);
        p.tuple.src = Ip4::from_word(h.src.word());
        p.tuple.dst = Ip4::from_word(h.dst.word());
        p.tuple.proto = h.proto;
        p.ttl = h.ttl;
        p.ip_len = total;
        p.id = u32::from(h.id);
        p.offset = frag & 0x1fff;
        p.more = frag & 0x2000 != 0;
        p.unit = if frag & 0x4000 == 0 { 0 } else { total };
        Ok(l3 + header)
    }

    #[inline(always)]
    fn quoted<C: Ctx>(ctx: &C, l3: usize, out: &mut Tuple<Ip4>) -> Option<usize> {
        let h = at_pulled::<Self, C>(ctx, l3)?;
        // SAFETY: as in `network`.
        let h = unsafe { &*h };
        if h.ver_ihl >> 4 != 4 || h.ver_ihl & 0xf < 5 || u16::from_be(h.frag) & 0x1fff != 0 {
            return None;
        }
        out.src = h.src;
        out.dst = h.dst;
        out.proto = h.proto;
        Some(l3 + ((h.ver_ihl & 0xf) as usize) * 4)
    }
}

impl Header<Ip6> for Header6 {
    #[inline(always)]
    fn network<C: Ctx>(ctx: &C, l3: usize, p: &mut Packet<Ip6>) -> Result<usize, DropReason> {
        let h = at_pulled::<Self, C>(ctx, l3).ok_or(DropReason::Malformed)?;
        // SAFETY: see the IPv4 header.
        let h = unsafe { &*h };
        p.ip_len = u32::from(u16::from_be(h.payload)) + size_of::<Self>() as u32;
        if h.ver_flow.to_ne_bytes()[0] >> 4 != 6 || p.ip_len > ctx.len().wrapping_sub(l3 as u32) {
            return Err(DropReason::Malformed);
        }
        p.unit = p.ip_len;
        p.tuple.src = h.src.by_word();
        p.tuple.dst = h.dst.by_word();
        p.ttl = h.hop_limit;
        let mut proto = h.next;
        let mut l4 = l3 + size_of::<Self>();
        let mut offset = 0;
        for _ in 0..EXTENSIONS {
            if !matches!(proto, 0 | 43 | FRAGMENT | 51 | 60) {
                break;
            }
            // None of these headers is shorter than eight bytes.
            let e = at_pulled::<[u32; 2], C>(ctx, l4).ok_or(DropReason::Malformed)?;
            // SAFETY: `at_pulled` proved eight bytes.
            let [first, id] = unsafe { e.read() };
            let first = u32::from_be(first);
            let (next, words) = ((first >> 24) as u8, (first >> 16) as usize & 0xff);
            let len = match proto {
                FRAGMENT => {
                    p.id = id;
                    offset = (first as u16) >> 3;
                    p.more = first & 1 != 0;
                    8
                }
                // The authentication header counts in words of four (RFC 4302), the others in words of eight.
                51 => (words + 2) * 4,
                _ => (words + 1) * 8,
            };
            proto = next;
            l4 += len;
            if l4 > L4_MAX {
                return Err(DropReason::InvalidExthdr);
            }
            if offset != 0 {
                // What follows belongs to the middle of a datagram.
                break;
            }
        }
        p.tuple.proto = proto;
        p.offset = offset;
        match proto {
            0 | 43 | FRAGMENT | 51 | 60 if offset == 0 => Err(DropReason::InvalidExthdr),
            _ => Ok(l4),
        }
    }

    #[inline(always)]
    fn quoted<C: Ctx>(ctx: &C, l3: usize, out: &mut Tuple<Ip6>) -> Option<usize> {
        // Before the header: making bytes readable moves all others.
        let next = at_pulled::<u32, C>(ctx, l3 + size_of::<Self>())?;
        // SAFETY: `at_pulled` proved four bytes.
        let next = u32::from_be(unsafe { next.read() });
        let h = at_pulled::<Self, C>(ctx, l3)?;
        // SAFETY: as in `network`.
        let h = unsafe { &*h };
        if h.ver_flow.to_ne_bytes()[0] >> 4 != 6 {
            return None;
        }
        let (proto, fragment) = match h.next {
            FRAGMENT if (next as u16) >> 3 != 0 => return None,
            FRAGMENT => ((next >> 24) as u8, 8),
            proto => (proto, 0),
        };
        if matches!(proto, 0 | 43 | FRAGMENT | 51 | 60) {
            return None;
        }
        out.src = h.src.by_word();
        out.dst = h.dst.by_word();
        out.proto = proto;
        Some(l3 + size_of::<Self>() + fragment)
    }
}

/// Offset of the IP header, behind Ethernet and at most one VLAN tag, and the EtherType there (network order).
#[inline(always)]
pub fn ethernet<C: Ctx>(ctx: &C) -> Option<(usize, u16)> {
    let eth = at_pulled::<Ethernet, C>(ctx, 0)?;
    // SAFETY: `at_pulled` proved a whole Ethernet header.
    let ethertype = unsafe { (*eth).ethertype };
    if ethertype != ETH_P_8021Q && ethertype != ETH_P_8021AD {
        return Some((ETH_LEN, ethertype));
    }
    let tag = at_pulled::<[u16; 2], C>(ctx, ETH_LEN)?;
    // SAFETY: `at_pulled` proved four bytes.
    Some((ETH_LEN + VLAN_LEN, unsafe { (*tag)[1] }))
}

/// Reads the packet whose IP header is at `l3`.
#[inline(always)]
pub fn packet<F: Family>(skb: &Skb, l3: usize) -> Result<&'static Packet<F::A>, DropReason> {
    let scratch = F::scratch().ok_or(DropReason::Malformed)?;
    // SAFETY: the element belongs to this CPU, TC programs do not interrupt each other, and each parses one packet.
    let p = unsafe { &mut (*scratch).packet };
    *p = Packet::new(l3);
    F::parse(skb, p).done()?;
    Ok(p)
}

/// Declares a family's parser as a function with global linkage: the verifier proves it once, and what follows starts
/// from one state instead of one for each chain of headers there can be.
macro_rules! global {
    ($name:ident, $family:ty, $addr:ty) => {
        /// The parser of one family.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $name(skb: *mut __sk_buff, p: *mut Packet<$addr>) -> u64 {
            if p.is_null() {
                return Packed::new(Err(DropReason::Malformed.into())).bits();
            }
            // SAFETY: the callers in this file pass a packet of their own; the verifier checks its size.
            let p = unsafe { &mut *p };
            let l3 = p.l3();
            Packed::new(read::<$family, _>(&Skb(skb), l3, p).map(|()| 0).map_err(Stop::from)).bits()
        }
    };
}

global!(rn_parse4, V4, Ip4);
global!(rn_parse6, V6, Ip6);

/// Reads the packet whose IP header is at `l3`. Offsets are passed by value: what stands behind `p` the verifier does not
/// keep track of.
#[inline(always)]
fn read<F: Family, C: Ctx>(ctx: &C, l3: usize, p: &mut Packet<F::A>) -> Result<(), DropReason> {
    let l4 = bounded(F::Header::network(ctx, l3, p)?);
    // Bytes of the transport header that are inside the packet by the IP header's own count.
    let inside = (p.ip_len as usize).wrapping_sub(l4 - l3);
    p.l4 = l4 as u16;
    if p.offset != 0 {
        return later_fragment::<F>(p);
    }
    let mut l4_len = 0;
    match p.tuple.proto {
        proto::TCP | proto::UDP | proto::SCTP => {
            let needed = match p.tuple.proto {
                proto::TCP => 20,
                proto::UDP => 8,
                _ => 12,
            };
            if inside < needed || inside > 0xffff {
                return Err(DropReason::Malformed);
            }
            let ports = at_pulled::<u32, C>(ctx, l4).ok_or(DropReason::Malformed)?;
            // SAFETY: `at_pulled` proved four bytes.
            let ports = u32::from_be(unsafe { ports.read() });
            p.tuple.sport = (ports >> 16) as u16;
            p.tuple.dport = ports as u16;
            if p.tuple.proto == proto::TCP {
                // Two bytes at once: the verifier draws no bound from a comparison for a single one.
                let flags = at_pulled::<u16, C>(ctx, l4 + 12).ok_or(DropReason::Malformed)?;
                // SAFETY: `at_pulled` proved the two bytes.
                let [offset, flags] = unsafe { flags.read() }.to_ne_bytes();
                p.tcp_flags = flags;
                l4_len = offset >> 4 << 2;
            } else {
                l4_len = needed as u8;
            }
        }
        proto::ICMP if !F::A::IS_V6 => icmp(ctx, l4, p, inside, 8, 0, |t| matches!(t, 3 | 4 | 5 | 11 | 12))?,
        proto::ICMPV6 if F::A::IS_V6 => icmp(ctx, l4, p, inside, 128, 129, |t| matches!(t, 1..=4))?,
        _ => {}
    }
    if p.unit != 0 {
        match ctx.gso_size() {
            0 => {}
            GSO_BY_FRAGS => p.unit = 0,
            payload => p.unit = payload + (l4 - l3) as u32 + u32::from(l4_len),
        }
    }
    if p.more {
        let key = fragment_key(p);
        let ports = FragPorts { sport: p.tuple.sport, dport: p.tuple.dport };
        // A full table only costs later fragments; the LRU makes room for the next.
        let _ = F::fragments().insert(key, ports, 0);
    }
    Ok(())
}

/// ICMP and ICMPv6: echo is a flow by its identifier, errors quote another packet.
#[inline(always)]
fn icmp<A, C: Ctx>(
    ctx: &C,
    l4: usize,
    p: &mut Packet<A>,
    inside: usize,
    request: u8,
    reply: u8,
    is_error: impl Fn(u8) -> bool,
) -> Result<(), DropReason> {
    if !(8..=0xffff).contains(&inside) {
        return Err(DropReason::Malformed);
    }
    let h = at_pulled::<[u16; 3], C>(ctx, l4).ok_or(DropReason::Malformed)?;
    // SAFETY: `at_pulled` proved six bytes.
    let [kind, _, id] = unsafe { h.read() };
    let kind = kind.to_ne_bytes()[0];
    if kind == request {
        p.tuple.sport = u16::from_be(id);
    } else if kind == reply {
        p.tuple.dport = u16::from_be(id);
    } else if request == 128 && (133..=137).contains(&kind) {
        p.kind = Kind::Link;
    } else if is_error(kind) {
        p.kind = Kind::IcmpError;
    }
    Ok(())
}

/// The key under which a datagram's ports are remembered.
#[inline(always)]
fn fragment_key<A: Address>(p: &Packet<A>) -> FragKey<A> {
    FragKey { src: p.tuple.src, dst: p.tuple.dst, id: p.id, proto: u32::from(p.tuple.proto) }
}

/// A later fragment has the ports of the first, which came before it.
#[inline(always)]
fn later_fragment<F: Family>(p: &mut Packet<F::A>) -> Result<(), DropReason> {
    // RFC 3128: a second fragment that overlaps the TCP header could rewrite what policy saw.
    if p.tuple.proto == proto::TCP && p.offset < 3 {
        return Err(DropReason::Malformed);
    }
    let ports = F::fragments().get_ptr(fragment_key(p)).ok_or(DropReason::FragNotFound)?;
    // SAFETY: map values stay valid for this run; both ports are read at once below.
    let ports = unsafe { ports.read() };
    p.tuple.sport = ports.sport;
    p.tuple.dport = ports.dport;
    p.kind = Kind::LaterFragment;
    Ok(())
}
