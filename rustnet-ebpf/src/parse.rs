//! From bytes to a [`Packet`]: Ethernet, IPv4 with options, IPv6 with extension headers, the ports of TCP, UDP and SCTP, the
//! identifier of ICMP echo, and fragments. Reads only, and checks each length field against the frame.

use aya_ebpf::bindings::{__sk_buff, xdp_md};
use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::generated as helper;
use rustnet_common::addr::{Address, Ip4, Ip6};
use rustnet_common::drop::DropReason;
use rustnet_common::frag::{FragKey, FragPorts};
use rustnet_common::tuple::{Tuple, proto};

use crate::ctx::{Ctx, Skb, at_pulled, bounded, masked};
use crate::family::{Family, V4, V6};
use crate::outcome::{Dropped, PackedResult};
use crate::packet::{Flow, Kind, Packet};
use crate::wire::{Ethernet, Header4, Header6, ICMP_LEN, Tcp, tcp};
use crate::xdp::Xdp;

/// What `gso_size` says of frames whose segments have lengths of their own (SCTP): linux/skbuff.h.
const GSO_BY_FRAGS: u32 = 0xffff;
/// Octets of the option that the kernel puts in front of BIG TCP over IPv6, and takes off each segment (`struct hop_jumbo_hdr`).
const JUMBO_LEN: u32 = 8;
/// Stands in [`Packet::mtu_len`] for such a frame until its segments are measured.
const IS_JUMBO: u32 = 1;
/// Largest offset of a transport header that is followed.
const L4_MAX: usize = 0x1ff;
/// IPv6 extension headers that are followed.
const EXTENSIONS: usize = 6;
/// The IPv6 extension header of fragments.
const FRAGMENT: u8 = 44;
/// The IPv6 routing header; its type 0 is a source route (RFC 5095).
const ROUTING: u8 = 43;
/// IPv4 options that are source routes: loose and strict (RFC 791, 3.1).
const LSRR: u8 = 131;
/// See [`LSRR`].
const SSRR: u8 = 137;
/// Where data begins behind the shortest TCP header, in units of fragment offsets.
pub const TCP_HEADER: u16 = 3;
/// Bytes of the longest IPv4 options.
const OPTIONS_MAX: usize = 40;

/// A family's IP header.
pub trait ReadHeader<A>: Copy {
    /// Reads the header at `l3`; sets all that is not the transport header's, and gives the offset of that one.
    fn network<C: Options>(ctx: &C, l3: usize, p: &mut Packet<A>) -> Result<usize, DropReason>;

    /// Reads the header of a packet that an ICMP error quotes: cut short, so that its lengths mean
    /// nothing. Sets addresses and protocol, gives the offset of the transport header; `None` where
    /// the offset is unknown (later fragments, IPv6 extension headers other than that of a first
    /// fragment).
    fn inner<C: Ctx>(ctx: &C, l3: usize, out: &mut Tuple<A>) -> Option<usize>;
}

impl ReadHeader<Ip4> for Header4 {
    #[inline(always)]
    fn network<C: Options>(ctx: &C, l3: usize, p: &mut Packet<Ip4>) -> Result<usize, DropReason> {
        let h = at_pulled::<Self, C>(ctx, l3).ok_or(DropReason::Malformed)?;
        // SAFETY: `at_pulled` proved that a whole header lies there; IP headers are 4-byte aligned (NET_IP_ALIGN), and
        // BPF loads need no more.
        let h = unsafe { &*h };
        let header = ((h.ver_ihl & 0xf) as usize) * 4;
        let present = ctx.len().wrapping_sub(l3 as u32);
        let total = match u16::from_be(h.total) {
            // BIG TCP: more than the field can hold (ip_len of the frame, linux/ip.h iph_totlen()).
            0 if ctx.gso_size() != 0 => present,
            total => u32::from(total),
        };
        if h.ver_ihl >> 4 != 4 || header < size_of::<Self>() || (total as usize) < header || total > present {
            return Err(DropReason::Malformed);
        }
        let frag = u16::from_be(h.frag);
        p.tuple.src = Ip4::from_word(h.src.word());
        p.tuple.dst = Ip4::from_word(h.dst.word());
        p.tuple.proto = h.proto;
        p.ttl = h.ttl;
        p.ip_len = total;
        p.seg_len = total;
        p.id = u32::from(h.id);
        p.offset = frag & 0x1fff;
        p.more = frag & 0x2000 != 0;
        p.mtu_len = if frag & 0x4000 == 0 { 0 } else { total };
        if header > size_of::<Self>()
            && ctx.has_source_route((l3 + size_of::<Self>()) as u32, (header - size_of::<Self>()) as u32)
        {
            return Err(DropReason::SourceRoute);
        }
        Ok(l3 + header)
    }

    #[inline(always)]
    fn inner<C: Ctx>(ctx: &C, l3: usize, out: &mut Tuple<Ip4>) -> Option<usize> {
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

impl ReadHeader<Ip6> for Header6 {
    #[inline(always)]
    fn network<C: Options>(ctx: &C, l3: usize, p: &mut Packet<Ip6>) -> Result<usize, DropReason> {
        let h = at_pulled::<Self, C>(ctx, l3).ok_or(DropReason::Malformed)?;
        // SAFETY: see the IPv4 header.
        let h = unsafe { &*h };
        let present = ctx.len().wrapping_sub(l3 as u32);
        p.ip_len = match u16::from_be(h.payload) {
            // BIG TCP, see the IPv4 header.
            0 if ctx.gso_size() != 0 => present,
            payload => u32::from(payload) + size_of::<Self>() as u32,
        };
        p.seg_len = p.ip_len;
        if h.ver_flow.to_ne_bytes()[0] >> 4 != 6 || p.ip_len > present {
            return Err(DropReason::Malformed);
        }
        // A frame with segments, whose own length does not count.
        p.mtu_len = if h.payload == 0 && h.next == 0 { IS_JUMBO } else { p.ip_len };
        p.tuple.src = h.src.by_word();
        p.tuple.dst = h.dst.by_word();
        p.ttl = h.hop_limit;
        if p.tuple.src.is_v4() || p.tuple.dst.is_v4() {
            // An IPv4-mapped address is none of the wire (RFC 4942, 2.2), and would pass for the pod that has the IPv4 one.
            return Err(DropReason::Martian);
        }
        let mut proto = h.next;
        let mut l4 = l3 + size_of::<Self>();
        let mut offset = 0;
        for _ in 0..EXTENSIONS {
            if !matches!(proto, 0 | ROUTING | FRAGMENT | 51 | 60) {
                break;
            }
            // None of these headers is shorter than eight bytes.
            let e = at_pulled::<[u32; 2], C>(ctx, l4).ok_or(DropReason::Malformed)?;
            // SAFETY: `at_pulled` proved eight bytes.
            let [first, id] = unsafe { e.read() };
            let first = u32::from_be(first);
            let (next, words) = ((first >> 24) as u8, (first >> 16) as usize & 0xff);
            if proto == ROUTING && (first >> 8) as u8 == 0 {
                return Err(DropReason::SourceRoute);
            }
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
            0 | ROUTING | FRAGMENT | 51 | 60 if offset == 0 => Err(DropReason::InvalidExthdr),
            _ => Ok(l4),
        }
    }

    #[inline(always)]
    fn inner<C: Ctx>(ctx: &C, l3: usize, out: &mut Tuple<Ip6>) -> Option<usize> {
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
        if matches!(proto, 0 | ROUTING | FRAGMENT | 51 | 60) {
            return None;
        }
        out.src = h.src.by_word();
        out.dst = h.dst.by_word();
        out.proto = proto;
        Some(l3 + size_of::<Self>() + fragment)
    }
}

/// True if `len` bytes of IPv4 options at `offset` hold a source route, or cannot be read.
#[inline(always)]
fn has_source_route<C: Ctx>(ctx: &C, offset: u32, len: u32) -> bool {
    let mut walk = OptionWalk { bytes: [0; 64], left: len, len, has_source_route: 0 };
    if !ctx.load(offset, &mut walk.bytes, len) {
        return true;
    }
    // SAFETY: the callback has the signature that the helper wants, and `walk` outlives the call.
    unsafe { helper::bpf_loop(OPTIONS_MAX as u32, next_option as *mut c_void, (&raw mut walk).cast(), 0) };
    walk.has_source_route != 0
}

/// A walk over IPv4 options.
#[repr(C)]
struct OptionWalk {
    bytes: [u8; 64],
    /// Bytes to come. Counted down from what the verifier does not know: from 0 up, it would look at each place apart.
    left: u32,
    len: u32,
    has_source_route: u32,
}

/// One option: `bpf_loop` calls it until it returns 1. The verifier checks it once, not once per chain of options.
#[inline(never)]
extern "C" fn next_option(_round: u32, walk: *mut c_void) -> u64 {
    // SAFETY: `has_source_route` passes a pointer to its own variable.
    let walk = unsafe { &mut *walk.cast::<OptionWalk>() };
    // SAFETY: the mask keeps the offset inside the array.
    let byte = |at: u32| unsafe { walk.bytes.as_ptr().add(masked::<63>(at as usize)).read() };
    if walk.left == 0 {
        return 1;
    }
    let at = walk.len.wrapping_sub(walk.left);
    match byte(at) {
        // The end of the list.
        0 => 1,
        1 => {
            walk.left -= 1;
            0
        }
        LSRR | SSRR => {
            walk.has_source_route = 1;
            1
        }
        _ => {
            let len = u32::from(byte(at.wrapping_add(1)));
            walk.left = walk.left.saturating_sub(if len < 2 { 2 } else { len });
            0
        }
    }
}

/// The EtherType of the frame, network order.
#[inline(always)]
pub fn ethertype<C: Ctx>(ctx: &C) -> Option<u16> {
    let eth = at_pulled::<Ethernet, C>(ctx, 0)?;
    // SAFETY: `at_pulled` proved a whole Ethernet header.
    Some(unsafe { (*eth).ethertype })
}

/// The look at IPv4 options, a function of each context.
pub trait Options: Ctx {
    /// True if `len` bytes of options at `offset` hold a source route.
    fn has_source_route(&self, offset: u32, len: u32) -> bool;
}

/// Declares that function with global linkage, for the reason that the parser is one.
macro_rules! options {
    ($name:ident, $ctx:ident, $raw:ty) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $name(ctx: *mut $raw, offset: u32, len: u32) -> u32 {
            u32::from(has_source_route(&$ctx(ctx), offset, len))
        }

        impl Options for $ctx {
            #[inline(always)]
            fn has_source_route(&self, offset: u32, len: u32) -> bool {
                $name(self.raw(), offset, len) != 0
            }
        }
    };
}

options!(rn_options, Skb, __sk_buff);
options!(rn_xdp_options, Xdp, xdp_md);

/// A family's parser for packets of a context.
pub trait Parse<C: Ctx>: Remember {
    /// Fills in `p`, of which the offset of the IP header is known.
    fn parse(ctx: &C, p: &mut Packet<Self::A>) -> PackedResult;
}

/// A packet, and room for what the next steps find out about its flow.
pub type Parsed<A> = (&'static Packet<A>, &'static mut Flow<A>);

/// Reads the packet whose IP header is at `l3`.
#[inline(always)]
pub fn packet<F: Parse<C>, C: Ctx>(ctx: &C, l3: usize) -> Result<Parsed<F::A>, DropReason> {
    let scratch = F::scratch().ok_or(DropReason::Malformed)?;
    // SAFETY: the element belongs to this CPU, TC programs do not interrupt each other, and each parses one packet.
    let (p, flow) = unsafe { (&mut (*scratch).packet, &mut (*scratch).flow) };
    p.reset(l3);
    F::parse(ctx, p).into_unit()?;
    Ok((p, flow))
}

/// The packet that [`packet`] has read in the program that jumped here, and its flow.
#[inline(always)]
pub fn in_hand<F: Family>() -> Option<Parsed<F::A>> {
    let scratch = F::scratch()?;
    // SAFETY: as in `packet`, whose borrows ended with the program before.
    Some(unsafe { (&(*scratch).packet, &mut (*scratch).flow) })
}

/// Makes the packet in hand, which has another one inside, the outer one, and returns its tuple.
#[inline(always)]
pub fn enter<F: Family>() -> Option<&'static Tuple<F::A>> {
    let scratch = F::scratch()?;
    // SAFETY: as in `packet`; these are the only borrows of the fields.
    let (tuple, outer) = unsafe { (&(*scratch).packet.tuple, &mut (*scratch).outer) };
    (outer.src, outer.dst) = (tuple.src, tuple.dst);
    Some(outer)
}

/// Counts `bytes` more in the lengths of the packet in hand, for a header that it gets. With that it may not be fragmented.
#[inline(always)]
pub fn grow<F: Family>(bytes: u32) {
    if let Some(scratch) = F::scratch() {
        // SAFETY: as in `packet`, whose borrows ended with the program before.
        let p = unsafe { &mut (*scratch).packet };
        p.seg_len += bytes;
        p.mtu_len = p.seg_len;
    }
}

/// The packet that [`packet`] has read or refused, with what was read of it; the addresses are unspecified where not even they were.
#[inline(always)]
pub fn last<F: Family>() -> Option<&'static Packet<F::A>> {
    // SAFETY: as in `packet`, which has returned.
    F::scratch().map(|scratch| unsafe { &(*scratch).packet })
}

/// Declares a parser as a function with global linkage: the verifier proves it once, and what follows starts from one state
/// instead of one for each chain of headers there can be. BTF has the type of the context, so that each context needs its own.
macro_rules! global {
    ($name:ident, $family:ty, $addr:ty, $ctx:ident, $raw:ty) => {
        /// The parser of one family and context.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $name(ctx: *mut $raw, p: *mut Packet<$addr>) -> u64 {
            if p.is_null() {
                return PackedResult::new(Err(DropReason::Malformed.into())).bits();
            }
            // SAFETY: the only caller is below and passes a packet of its own; the verifier checks its size.
            let p = unsafe { &mut *p };
            let l3 = p.l3();
            PackedResult::new(read::<$family, _>(&$ctx(ctx), l3, p).map(|()| 0).map_err(Dropped::from)).bits()
        }

        impl Parse<$ctx> for $family {
            #[inline(always)]
            fn parse(ctx: &$ctx, p: &mut Packet<$addr>) -> PackedResult {
                PackedResult::from_bits($name(ctx.raw(), p))
            }
        }
    };
}

global!(rn_parse4, V4, Ip4, Skb, __sk_buff);
global!(rn_parse6, V6, Ip6, Skb, __sk_buff);
global!(rn_xdp_parse4, V4, Ip4, Xdp, xdp_md);
global!(rn_xdp_parse6, V6, Ip6, Xdp, xdp_md);

/// Reads the packet whose IP header is at `l3`. Offsets are passed by value: what stands behind `p` the verifier does not
/// keep track of.
#[inline(always)]
fn read<F: Family<Header: ReadHeader<F::A>>, C: Options>(
    ctx: &C,
    l3: usize,
    p: &mut Packet<F::A>,
) -> Result<(), DropReason> {
    transport::<F, C>(ctx, l3, p)?;
    p.is_swapped = p.tuple.is_swapped();
    p.key = if p.is_swapped { p.tuple.reversed() } else { p.tuple };
    Ok(())
}

#[inline(always)]
fn transport<F: Family<Header: ReadHeader<F::A>>, C: Options>(
    ctx: &C,
    l3: usize,
    p: &mut Packet<F::A>,
) -> Result<(), DropReason> {
    let l4 = bounded(F::Header::network(ctx, l3, p)?);
    // Bytes of the transport header that are inside the packet by the IP header's own count.
    let inside = (p.ip_len as usize).wrapping_sub(l4 - l3);
    if (inside as isize) < 0 {
        return Err(DropReason::Malformed);
    }
    p.l4 = l4 as u16;
    if p.offset != 0 {
        return later_fragment::<F>(p, ctx.ifindex());
    }
    let mut l4_len = 0;
    match p.tuple.proto {
        proto::TCP | proto::UDP | proto::SCTP => {
            let needed = match p.tuple.proto {
                proto::TCP => 20,
                proto::UDP => 8,
                _ => 12,
            };
            if (inside as isize) < needed as isize {
                return Err(DropReason::Malformed);
            }
            let ports = at_pulled::<u32, C>(ctx, l4).ok_or(DropReason::Malformed)?;
            // SAFETY: `at_pulled` proved four bytes.
            let ports = u32::from_be(unsafe { ports.read() });
            p.tuple.sport = (ports >> 16) as u16;
            p.tuple.dport = ports as u16;
            if p.tuple.proto == proto::TCP {
                l4_len = tcp_header(ctx, l4, inside, p)?;
            } else {
                l4_len = needed as u8;
            }
        }
        // Long enough for the checksum, which covers the addresses.
        proto::UDPLITE | proto::DCCP if (inside as isize) < 8 => return Err(DropReason::Malformed),
        proto::ICMP if !F::A::IS_V6 => icmp(ctx, l4, p, inside, 8, 0, |t| matches!(t, 3 | 4 | 5 | 11 | 12))?,
        proto::ICMPV6 if F::A::IS_V6 => icmp(ctx, l4, p, inside, 128, 129, |t| matches!(t, 1..=4))?,
        _ => {}
    }
    match ctx.gso_size() {
        0 => {}
        GSO_BY_FRAGS => (p.mtu_len, p.seg_len) = (0, 0),
        payload => {
            let jumbo = if F::A::IS_V6 && p.mtu_len == IS_JUMBO { JUMBO_LEN } else { 0 };
            p.seg_len = payload + (l4 - l3) as u32 + u32::from(l4_len) - jumbo;
            if p.mtu_len != 0 {
                p.mtu_len = p.seg_len;
            }
        }
    }
    Ok(())
}

/// Reads the TCP header at `l4`; returns its length.
#[inline(always)]
fn tcp_header<A, C: Ctx>(ctx: &C, l4: usize, inside: usize, p: &mut Packet<A>) -> Result<u8, DropReason> {
    let h = at_pulled::<Tcp, C>(ctx, l4).ok_or(DropReason::Malformed)?;
    // SAFETY: `at_pulled` proved a whole TCP header; two bytes at once, since the verifier draws no bound from a
    // comparison for a single one.
    let (seq, ack, offset_flags) = unsafe { ((*h).seq, (*h).ack, (*h).offset_flags) };
    let [offset, flags] = offset_flags.to_ne_bytes();
    let header = offset >> 4 << 2;
    p.tcp_flags = flags;
    p.seq = u32::from_be(seq);
    // Without ACK the field means nothing (RFC 9293, 3.1). Without a branch: it would double what the verifier looks at.
    p.ack = u32::from_be(ack) & u32::from(flags >> 4 & 1).wrapping_neg();
    let control = u32::from(flags & tcp::SYN != 0) + u32::from(flags & tcp::FIN != 0);
    p.seq_end = p.seq.wrapping_add((inside as u32).wrapping_sub(u32::from(header))).wrapping_add(control);
    Ok(header)
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
    if (inside as isize) < ICMP_LEN as isize {
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
    } else if request == 128 && matches!(kind, 130..=137 | 143) {
        p.kind = Kind::LinkLocal;
    } else if is_error(kind) {
        p.kind = Kind::IcmpError;
    }
    Ok(())
}

/// The key under which a datagram's ports are remembered.
#[inline(always)]
fn fragment_key<A: Address>(p: &Packet<A>, ifindex: u32) -> FragKey<A> {
    let proto = if A::IS_V6 { 0 } else { u32::from(p.tuple.proto) };
    FragKey { src: p.tuple.src, dst: p.tuple.dst, id: p.id, proto, ifindex }
}

/// Remembers the ports of a first fragment for the later ones. Called once the packet's source is verified: one that is
/// dropped must not name the ports of another sender's fragments. `p` is the packet that [`packet`] has read.
#[inline(always)]
pub fn remember_ports<F: Remember>(p: &Packet<F::A>, ifindex: u32) {
    if p.is_first_fragment() {
        F::remember(ifindex);
    }
}

/// First fragments of one family.
pub trait Remember: Family {
    /// Remembers the ports of the packet in hand.
    fn remember(ifindex: u32);
}

/// Declares a family's function with global linkage: the verifier looks at it once. It takes the packet from scratch memory.
macro_rules! remember {
    ($family:ident, $name:ident) => {
        impl Remember for $family {
            #[inline(always)]
            fn remember(ifindex: u32) {
                $name(ifindex);
            }
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $name(ifindex: u32) -> u32 {
            let Some(p) = last::<$family>() else { return 0 };
            let ports = FragPorts { sport: p.tuple.sport, dport: p.tuple.dport, proto: p.tuple.proto, pad: [0; 3] };
            // A full table only costs later fragments; the LRU makes room for the next.
            let _ = <$family>::fragments().insert(fragment_key(p, ifindex), ports, 0);
            1
        }
    };
}

remember!(V4, rn_fragment4);
remember!(V6, rn_fragment6);

/// A later fragment has the ports of the first, which came before it.
#[inline(always)]
fn later_fragment<F: Family>(p: &mut Packet<F::A>, ifindex: u32) -> Result<(), DropReason> {
    p.kind = Kind::LaterFragment;
    // RFC 3128: a second fragment that overlaps the TCP header could rewrite what policy saw.
    let overlaps = |proto| proto == proto::TCP && p.offset < TCP_HEADER;
    if overlaps(p.tuple.proto) {
        return Err(DropReason::Malformed);
    }
    let ports = F::fragments().get_ptr(fragment_key(p, ifindex)).ok_or(DropReason::FragNotFound)?;
    // SAFETY: map values stay valid for this run; all fields are read at once below.
    let ports = unsafe { ports.read() };
    if overlaps(ports.proto) {
        return Err(DropReason::Malformed);
    }
    // Of IPv6, the fragment header names the first extension header, if any, of what was cut.
    p.tuple.proto = ports.proto;
    p.tuple.sport = ports.sport;
    p.tuple.dport = ports.dport;
    Ok(())
}
