//! VXLAN headers (RFC 7348): written in front of a frame as the kernel's device writes them, and taken off.

use aya_ebpf::Global;
use aya_ebpf::bindings::BPF_CSUM_LEVEL_DEC;
use aya_ebpf::helpers::generated as helper;
use rustnet_common::addr::{Ip4, Ip6};
use rustnet_common::config::{FIRST_TUNNEL_PORT, NodeConfig};
use rustnet_common::csum::Sum;
use rustnet_common::tuple::proto;

use crate::ctx::{Ctx, Skb, at};
use crate::family::{Family, V4, V6};
use crate::wire::{
    ECN, ECN_CE, ECN_ECT_0, ETH_LEN, ETH_P_IPV6, Ethernet, Header4, Header6, Outer, Udp, VXLAN_FLAGS, Vxlan,
};
use crate::xdp::Xdp;

/// `bpf_skb_adjust_room`: the room is behind the Ethernet header.
const BPF_ADJ_ROOM_MAC: u32 = 1;
/// Segments keep their size: pods know the MTU of the overlay.
const FIXED_GSO: u64 = 1;
const ENCAP_L3_IPV4: u64 = 1 << 1;
const ENCAP_L3_IPV6: u64 = 1 << 2;
const ENCAP_L4_UDP: u64 = 1 << 4;
/// What is inside is an Ethernet frame, whose header has the length in the upper eight bits.
const ENCAP_L2_ETH: u64 = 1 << 6 | (ETH_LEN as u64) << 56;
/// What is said of the checksum stays, and is this file's to change.
const NO_CSUM_RESET: u64 = 1 << 5;
/// The packet inside is of another family than the one outside (kernel 6.3).
const DECAP_L3_IPV4: u64 = 1 << 7;
/// See [`DECAP_L3_IPV4`].
const DECAP_L3_IPV6: u64 = 1 << 8;
/// 1 where the kernel knows [`DECAP_L3_IPV6`]; set by the loader.
#[unsafe(no_mangle)]
pub static DECAP_L3: Global<u32> = Global::new(0);
/// Hop limit of outer packets, that of the device.
const TTL: u8 = 64;
/// The outer IP header of a family.
pub trait OuterHeader<A>: Copy {
    /// How the kernel is asked for the room.
    const ROOM: u64;
    /// A header of a datagram of `len` bytes with the UDP header. `id`: identification (IPv4).
    fn new(src: A, dst: A, len: u16, id: u16, ecn: u8) -> Self;
}

impl OuterHeader<Ip4> for Header4 {
    const ROOM: u64 = ENCAP_L3_IPV4;

    #[inline(always)]
    fn new(src: Ip4, dst: Ip4, len: u16, id: u16, ecn: u8) -> Self {
        let total = len + size_of::<Self>() as u16;
        let sum = Sum::default().add16(0x4500 | u16::from(ecn)).add16(total).add16(id);
        let csum = sum.add16(u16::from(TTL) << 8 | u16::from(proto::UDP)).add_addr(src).add_addr(dst).finish();
        let (total, id) = (total.to_be(), id.to_be());
        // Routers may fragment it, as they may the device's: large packets get through a narrow path between nodes.
        Self { ver_ihl: 0x45, tos: ecn, total, id, frag: 0, ttl: TTL, proto: proto::UDP, csum, src, dst }
    }
}

impl OuterHeader<Ip6> for Header6 {
    const ROOM: u64 = ENCAP_L3_IPV6;

    #[inline(always)]
    fn new(src: Ip6, dst: Ip6, len: u16, _id: u16, ecn: u8) -> Self {
        let ver_flow = (6 << 28 | u32::from(ecn) << 20).to_be();
        Self { ver_flow, payload: len.to_be(), next: proto::UDP, hop_limit: TTL, src, dst }
    }
}

/// A family of outer packets.
pub trait Encap: Family<Header: OuterHeader<Self::A>> {
    /// Bytes that the headers take, the inner Ethernet header included.
    const OVERHEAD: u32 = size_of::<Outer<Self::Header>>() as u32;
}

impl Encap for V4 {}
impl Encap for V6 {}

const _: () = assert!(V4::OVERHEAD == 50 && V6::OVERHEAD == 70);

/// What became of a frame.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Encapsulated {
    /// It has its headers. The outer Ethernet header is not written: a redirect to a neighbour does it.
    Done,
    /// The kernel makes no room in front of such a frame (SCTP that stands for several packets). It is unchanged.
    Refused,
    /// It is changed, and not whole.
    Failed,
}

/// What each context does with a frame whose headers come or go.
pub trait Room: Ctx {
    /// Makes room behind the Ethernet header, in any case in front of the IP header, for outer headers with the outer IP header's
    /// [`OuterHeader::ROOM`]. All pointers into the packet are void afterwards. False if the frame is unchanged.
    fn make_room(&self, overhead: u32, room: u64) -> bool;
    /// See [`decapsulate`].
    fn decapsulate(&self, overhead: u32, inner: u16, is_congested: bool) -> bool;
}

impl Room for Skb {
    #[inline(always)]
    fn make_room(&self, overhead: u32, room: u64) -> bool {
        let flags = FIXED_GSO | room | ENCAP_L4_UDP | ENCAP_L2_ETH;
        // SAFETY: no pointers but the context.
        unsafe { helper::bpf_skb_adjust_room(self.raw(), overhead as i32, BPF_ADJ_ROOM_MAC, flags) == 0 }
    }

    #[inline(always)]
    fn decapsulate(&self, overhead: u32, inner: u16, is_congested: bool) -> bool {
        let Some(eth) = at::<Ethernet, _>(self, 0) else { return false };
        // SAFETY: `at` proved a whole header.
        let is_other = unsafe { (*eth).ethertype } != inner;
        let other = if inner == ETH_P_IPV6 { DECAP_L3_IPV6 } else { DECAP_L3_IPV4 };
        let flags = FIXED_GSO | NO_CSUM_RESET | if is_other { other } else { 0 };
        // SAFETY: no pointers but the context, here and below.
        if unsafe { helper::bpf_skb_adjust_room(self.raw(), -(overhead as i32), BPF_ADJ_ROOM_MAC, flags) } != 0 {
            return false;
        }
        // The outer checksum of 0 counts as one that was verified (`__skb_checksum_validate_needed`).
        // SAFETY: see above.
        unsafe { helper::bpf_csum_level(self.raw(), BPF_CSUM_LEVEL_DEC.into()) };
        if is_other {
            let Some(eth) = at::<Ethernet, _>(self, 0) else { return false };
            // SAFETY: `at` proved a whole header.
            unsafe { (*eth).ethertype = inner };
        }
        // SAFETY: no pointers but the context. The helper corrects the checksum of an IPv4 header.
        !is_congested || unsafe { helper::bpf_skb_ecn_set_ce(self.raw()) } == 1
    }
}

/// The room of a frame without an skb is in front of it.
impl Room for Xdp {
    #[inline(always)]
    fn make_room(&self, overhead: u32, _room: u64) -> bool {
        // SAFETY: no pointers but the context.
        unsafe { helper::bpf_xdp_adjust_head(self.raw(), -(overhead as i32)) == 0 }
    }

    /// The Ethernet header inside the tunnel becomes that of the frame. A mark of congestion is a helper's to write, which there is none of.
    #[inline(always)]
    fn decapsulate(&self, overhead: u32, _inner: u16, is_congested: bool) -> bool {
        // SAFETY: no pointers but the context.
        !is_congested && unsafe { helper::bpf_xdp_adjust_head(self.raw(), overhead as i32) } == 0
    }
}

/// Puts headers in front of a frame that is to go to another node. The flow's `hash` becomes the source port. All pointers into the
/// packet are void afterwards.
#[inline(always)]
pub fn encapsulate<F: Encap, C: Room>(
    ctx: &C,
    src: F::A,
    dst: F::A,
    hash: u16,
    id: u16,
    config: &NodeConfig,
) -> Encapsulated {
    let Some(eth) = at::<Ethernet, _>(ctx, 0) else { return Encapsulated::Refused };
    let Some(first) = at::<[u8; 2], _>(ctx, ETH_LEN) else { return Encapsulated::Refused };
    // SAFETY: `at` proved both.
    let (inner, [version, tos]) = unsafe { (eth.read(), first.read()) };
    if inner.dst[0] & 1 != 0 {
        // A redirect to a neighbour takes nothing for a group of MACs.
        return Encapsulated::Refused;
    }
    // Traffic class: the lower half of the first byte, the upper half of the second one.
    let tos = if inner.ethertype == ETH_P_IPV6 { version << 4 | tos >> 4 } else { tos };
    // RFC 6040, 4.1: what came through congestion is congestion of the inner packet alone.
    let ecn = if tos & ECN == ECN_CE { ECN_ECT_0 } else { tos & ECN };
    let len = ctx.len() as u16 + (size_of::<Udp>() + size_of::<Vxlan>()) as u16;
    if !ctx.make_room(F::OVERHEAD, F::Header::ROOM) {
        return Encapsulated::Refused;
    }
    let Some(outer) = at::<Outer<F::Header>, _>(ctx, ETH_LEN) else { return Encapsulated::Failed };
    let udp = Udp {
        sport: (FIRST_TUNNEL_PORT | hash).to_be(),
        dport: config.overlay_port.to_be(),
        len: len.to_be(),
        csum: 0,
    };
    let vxlan = Vxlan { flags: VXLAN_FLAGS, vni: (config.vni << 8).to_be() };
    // SAFETY: `at` proved all of it.
    unsafe { outer.write(Outer { ip: F::Header::new(src, dst, len, id, ecn), udp, vxlan, inner }) };
    Encapsulated::Done
}

/// True if the kernel can take the headers of one family off a packet of the other.
#[inline(always)]
pub fn can_change_family() -> bool {
    DECAP_L3.load() != 0
}

/// Takes the headers off a frame, of which `overhead` bytes stand behind the Ethernet header; `inner` is the EtherType of what is in
/// the tunnel. Congestion on the way becomes the inner packet's, which bears the mark if its sender is capable of it. All pointers into
/// the packet are void afterwards. False if the frame is not whole any more.
#[inline(always)]
pub fn decapsulate<C: Room>(ctx: &C, overhead: u32, inner: u16, is_congested: bool) -> bool {
    ctx.decapsulate(overhead, inner, is_congested)
}
