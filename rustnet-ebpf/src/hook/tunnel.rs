//! `tunnel_in`: tunnel packets as they come in by an uplink. They lose their outer headers here, and go straight into the pod.
//!
//! `uplink_in` jumps here with what looks like one. Whatever is not for a pod, or needs an answer, or cannot lose its headers, goes
//! back unchanged: the overlay's device takes it, and `overlay_in` decides.

use rustnet_common::addr::{Address, Ip4, Ip6};
use rustnet_common::config::{NodeConfig, flags};
use rustnet_common::conntrack::VIA_QDISC;
use rustnet_common::drop::{DropReason, hook};
use rustnet_common::tuple::proto;

use super::Steps;
use crate::ctx::{Ctx, Skb, at, at_pulled};
use crate::family::{Family, V4, V6};
use crate::maps;
use crate::outcome::Dropped;
use crate::packet::{Class, Kind};
use crate::parse;
use crate::rewrite::{self, Encap};
use crate::step::plan::{self, Origin, Target};
use crate::step::tunnel::Tunnel;
use crate::step::{admit, conntrack, exec, nexthop, route, source};
use crate::wire::{self, ECN, ECN_CE, ETH_LEN, ETH_P_IP, ETH_P_IPV6, Header4, Header6, Udp, VXLAN_FLAGS};

/// The verdict on a packet that goes back to `uplink_in`: none of the kernel's.
pub const BACK: i32 = i32::MAX;

/// An outer header of a family.
pub trait ReadOuter<A>: Copy {
    /// True for what may be a UDP packet to this node.
    fn is_udp(&self, node: A) -> bool;
    /// Its source, if it can be a node's and the packet is not fragmented.
    fn source(&self) -> Option<A>;
    /// Its type of service.
    fn tos(&self) -> u8;
    /// Bytes of the UDP packet, by this header.
    fn payload(&self) -> u16;
}

impl ReadOuter<Ip4> for Header4 {
    #[inline(always)]
    fn is_udp(&self, node: Ip4) -> bool {
        self.ver_ihl == 0x45 && self.proto == proto::UDP && self.dst == node
    }

    #[inline(always)]
    fn source(&self) -> Option<Ip4> {
        const FRAGMENT: u16 = 0x3fff_u16.to_be();
        (self.frag & FRAGMENT == 0).then_some(self.src)
    }

    #[inline(always)]
    fn tos(&self) -> u8 {
        self.tos
    }

    #[inline(always)]
    fn payload(&self) -> u16 {
        u16::from_be(self.total).wrapping_sub(size_of::<Self>() as u16)
    }
}

impl ReadOuter<Ip6> for Header6 {
    #[inline(always)]
    fn is_udp(&self, node: Ip6) -> bool {
        self.next == proto::UDP && self.dst == node
    }

    #[inline(always)]
    fn source(&self) -> Option<Ip6> {
        // A mapped address is none of the wire (`ip6_rcv_core` drops it), and would pass for the node that has the IPv4 one.
        (!self.src.is_v4()).then_some(self.src)
    }

    #[inline(always)]
    fn tos(&self) -> u8 {
        (u32::from_be(self.ver_flow) >> 20) as u8
    }

    #[inline(always)]
    fn payload(&self) -> u16 {
        u16::from_be(self.payload)
    }
}

/// True for a packet for the overlay's port of this node: what [`BACK`] is the answer to where it turns out otherwise.
#[inline(always)]
pub fn is_candidate(skb: &Skb, config: &NodeConfig) -> bool {
    if config.flags & flags::ENCAPSULATE == 0 || config.overlay == 0 || skb.vlan_present() != 0 || skb.pkt_type() != 0 {
        return false;
    }
    match parse::ethertype(skb) {
        Some(ETH_P_IP) => is_for_port::<V4, _>(skb, config),
        Some(ETH_P_IPV6) => is_for_port::<V6, _>(skb, config),
        _ => false,
    }
}

/// The part of a packet that [`is_candidate`] reads.
#[repr(C, packed(2))]
struct Datagram<H> {
    ip: H,
    udp: Udp,
}

/// A family of outer packets.
pub trait Outer: Encap<Header: ReadOuter<Self::A>> {}
impl<F: Encap<Header: ReadOuter<Self::A>>> Outer for F {}

/// True for a datagram for the overlay's port of this node.
#[inline(always)]
pub fn is_for_port<F: Outer, C: Ctx>(ctx: &C, config: &NodeConfig) -> bool {
    let Some(at) = at_pulled::<Datagram<F::Header>, _>(ctx, ETH_LEN) else { return false };
    // SAFETY: as in `read`.
    let (is_udp, dport) = unsafe { ((*at.cast::<F::Header>()).is_udp(F::node(config)), (*at).udp.dport) };
    is_udp && dport == config.overlay_port.to_be()
}

/// What the outer headers say.
#[derive(Clone, Copy)]
pub struct Outside {
    /// Where the packet came from.
    pub tunnel: Tunnel,
    /// EtherType of what is in the tunnel.
    pub ethertype: u16,
    /// 1 where routers on the way have marked "congestion experienced", else 0.
    pub congested: u32,
}

impl Outside {
    /// Nothing read yet.
    pub const NONE: Self = Self { tunnel: Tunnel::NONE, ethertype: 0, congested: 0 };
}

/// Reads the outer headers. False: [`BACK`].
#[inline(always)]
pub fn read<F: Outer, C: Ctx>(ctx: &C, config: &NodeConfig, outside: &mut Outside) -> bool {
    let Some(outer) = at_pulled::<wire::Outer<F::Header>, _>(ctx, ETH_LEN) else { return false };
    // SAFETY: `at_pulled` proved all of it; IP headers are 4-byte aligned (NET_IP_ALIGN).
    let (ip, udp, vxlan, inner) =
        unsafe { (&*outer.cast::<F::Header>(), (*outer).udp, (*outer).vxlan, (*outer).inner.ethertype) };
    // A checksum is the kernel's to verify.
    if udp.csum != 0 || vxlan.flags != VXLAN_FLAGS || vxlan.vni != (config.vni << 8).to_be() {
        return false;
    }
    // What lies behind the packet's end is none of it. A frame that stands for several has the length of all.
    let present = ctx.len().wrapping_sub((ETH_LEN + size_of::<F::Header>()) as u32);
    if ctx.gso_size() == 0 && (u32::from(ip.payload()) != present || ip.payload() != u16::from_be(udp.len)) {
        return false;
    }
    let Some(source) = ip.source() else { return false };
    outside.tunnel = Tunnel { remote: source.to_addr(), id: config.vni };
    outside.ethertype = inner;
    let tos = u32::from(ip.tos());
    outside.congested = tos & tos >> 1 & 1;
    (inner == ETH_P_IPV6) == F::A::IS_V6 || rewrite::can_change_family()
}

/// 1 if a packet of the inner family can bear a mark of congestion (RFC 3168), else 0. By arithmetic, for the verifier's sake.
#[inline(always)]
fn ecn_capable<F: Family>(skb: &Skb, l3: usize) -> u32 {
    let Some(first) = at::<[u8; 2], _>(skb, l3) else { return 0 };
    // SAFETY: `at` proved both.
    let [_, second] = unsafe { first.read() };
    let tos = u32::from(if F::A::IS_V6 { second >> 4 } else { second });
    (tos | tos >> 1) & 1
}

const _: () = assert!(ECN == 3 && ECN_CE == 3);

/// The hook, for one family of inner packets. `overhead`: the bytes in front of the packet that are not the Ethernet header's.
#[inline(always)]
pub fn run<F: Steps>(skb: &Skb, overhead: u32, outside: &Outside) -> Result<i32, Dropped> {
    let Some(config) = maps::config() else { return Ok(BACK) };
    let tunnel = &outside.tunnel;
    let Ok((p, flow)) = parse::packet::<F, _>(skb, ETH_LEN + overhead as usize) else { return Ok(BACK) };
    // Segments that are not TCP's would keep the marks of a tunnel, and their receiver's stack would look for its headers.
    let is_segmented = skb.gso_size() != 0 && p.tuple.proto != proto::TCP;
    // What is inside of such a packet may be for `direct_in`.
    let is_wrapped = p.tuple.proto == F::IN_IP;
    if p.kind != Kind::Flow || p.is_first_fragment() || p.ttl <= 1 || is_segmented || is_wrapped {
        return Ok(BACK);
    }
    // Where the sender knows nothing of congestion marks, the device drops (RFC 6040, 4.2).
    if outside.congested & !ecn_capable::<F>(skb, p.l3()) != 0 {
        return Ok(BACK);
    }
    let source = source::of_tunnel(tunnel);
    let verify = || source::verify_tunnel::<F>(p.tuple.src, tunnel);
    // The queue of a pod with a limited bandwidth splits segments, too. And what comes by another device than the one that leads to its
    // sender is for the kernel to judge, by its reverse-path filter and the firewall's rules.
    let is_taken = |egress: u32| egress & VIA_QDISC == 0 && nexthop::interface_to(skb, &tunnel.remote) == skb.ifindex();
    let len = skb.len().wrapping_sub(overhead);
    let Ok(flow) =
        conntrack::lookup_if::<F, _>(skb, p, flow, source, config, hook::TUNNEL_IN, len, verify, |_, egress| {
            is_taken(egress)
        })
    else {
        return Ok(BACK);
    };
    if flow.class == Class::New && (verify().is_err() || !is_taken(route::local_pod(p.tuple.dst))) {
        return Ok(BACK);
    }
    let Ok(action) = plan::plan::<F>(p, flow, Origin::Tunnel, config) else { return Ok(BACK) };
    if action.target != Target::Pod {
        return Ok(BACK);
    }
    if flow.class == Class::New && admit::admit::<F>(skb, p, flow, config, source, len, hook::TUNNEL_IN).is_err() {
        return Ok(BACK);
    }
    rewrite::translate::<F, _>(skb, p, flow, action.ttl)?;
    if !rewrite::decapsulate(skb, overhead, outside.ethertype, outside.congested != 0) {
        if flow.class == Class::New {
            F::forget();
        }
        return Err(DropReason::WriteError.into());
    }
    Ok(exec::redirect_peer(action.ifindex))
}
