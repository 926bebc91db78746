//! Source verification. Contract: decides whether a packet's source address is valid at the hook where it arrived. The
//! connection remembers what identifies the source; a packet that brings the same again needs no look-up.

use rustnet_common::addr::{Address, Ip4, Ip6};
use rustnet_common::config::NodeConfig;
use rustnet_common::conntrack::{NOT_LOCAL, SOURCE_HOST, SOURCE_OUTSIDE};
use rustnet_common::drop::DropReason;
use rustnet_common::peer::flags;
use rustnet_common::tuple::Tuple;

use super::tunnel::Tunnel;
use super::{lb, route};
use crate::ctx::{Ctx, at_pulled};
use crate::family::{Family, V4, V6};
use crate::maps;
use crate::outcome::PackedResult;
use crate::packet::{Packet, Source};
use crate::wire::Ethernet;

/// This node's own stack, whose addresses need no proof.
pub const HOST: Source = Source { is_pod: false, ifindex: NOT_LOCAL, bytes: SOURCE_HOST };
/// Whatever comes in by an uplink.
pub const OUTSIDE: Source = Source { is_pod: false, ifindex: NOT_LOCAL, bytes: SOURCE_OUTSIDE };

/// The pod behind the interface of this hook, with the MAC that it sends from.
#[inline(always)]
pub fn of_pod<C: Ctx>(ctx: &C) -> Result<Source, DropReason> {
    let eth = at_pulled::<Ethernet, C>(ctx, 0).ok_or(DropReason::Malformed)?;
    // SAFETY: `at_pulled` proved an Ethernet header; the source MAC is at an even address.
    let mac = unsafe { core::ptr::addr_of!((*eth).src).cast::<[u16; 3]>().read() };
    Ok(Source { is_pod: true, ifindex: ctx.ifindex(), bytes: [pack(mac), 0] })
}

/// The far end of a tunnel, all of it.
#[inline(always)]
pub fn of_tunnel(tunnel: &Tunnel) -> Source {
    let (high, low) = tunnel.remote.halves();
    Source { is_pod: false, ifindex: NOT_LOCAL, bytes: [high, low] }
}

#[inline(always)]
fn pack(mac: [u16; 3]) -> u64 {
    u64::from(mac[0]) << 32 | u64::from(mac[1]) << 16 | u64::from(mac[2])
}

/// The proofs that take several look-ups.
pub trait Verify: Family {
    /// A pod sends from its own interface, with its own address and MAC.
    fn verify_pod(p: &Packet<Self::A>, source: Source) -> Result<(), DropReason>;
    /// By an uplink comes no address of this node, of its pods, of a Service, or of a pod that is reached through the tunnel.
    /// Nodes whose packets to pods take the tunnel talk to this host without it, but not to pods. The kernel refuses martians in
    /// its own path (`ip_route_input_slow`), which redirected packets do not take.
    fn verify_outside(p: &Packet<Self::A>) -> Result<(), DropReason>;
    /// A datagram of a pod to the overlay's port stays away from whoever could take it for one of this node's tunnel. Without an
    /// overlay of its own this node still knows nodes, which may have one.
    fn verify_encap(to: &Tuple<Self::A>) -> Result<(), DropReason>;
}

/// Declares a family's proofs as functions with global linkage, for the reason that the parser is one.
macro_rules! global {
    ($family:ident, $addr:ident, $pod:ident, $outside:ident, $encap:ident) => {
        impl Verify for $family {
            #[inline(always)]
            fn verify_pod(p: &Packet<$addr>, source: Source) -> Result<(), DropReason> {
                PackedResult::from_bits($pod(p, source.ifindex, source.bytes[0])).into_unit()
            }
            #[inline(always)]
            fn verify_outside(p: &Packet<$addr>) -> Result<(), DropReason> {
                PackedResult::from_bits($outside(p)).into_unit()
            }
            #[inline(always)]
            fn verify_encap(to: &Tuple<$addr>) -> Result<(), DropReason> {
                PackedResult::from_bits($encap(to)).into_unit()
            }
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $pod(p: *const Packet<$addr>, ifindex: u32, mac: u64) -> u64 {
            // SAFETY: the only caller is above and passes a reference; the verifier checks its size.
            let verified = match unsafe { p.as_ref() } {
                Some(p) if is_from_pod(p.tuple.src, ifindex, mac) => Ok(0),
                _ => Err(DropReason::Spoofed.into()),
            };
            PackedResult::new(verified).bits()
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $outside(p: *const Packet<$addr>) -> u64 {
            // SAFETY: see above.
            let verified = match unsafe { p.as_ref() } {
                // A link-local source cannot come from beyond the link, nor be answered there.
                Some(p) if p.tuple.src.is_martian_source() || p.tuple.src.is_link_scope() => {
                    Err(DropReason::Martian.into())
                }
                Some(p) if !is_forged_outside::<$family>(p.tuple.src, p.tuple.dst) => Ok(0),
                _ => Err(DropReason::Spoofed.into()),
            };
            PackedResult::new(verified).bits()
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $encap(to: *const Tuple<$addr>) -> u64 {
            // SAFETY: see above.
            let verified = match (unsafe { to.as_ref() }, maps::config()) {
                (Some(to), Some(config)) if !is_tunnel_end::<$family>(to.dst, config) => Ok(0),
                _ => Err(DropReason::EncapProhibited.into()),
            };
            PackedResult::new(verified).bits()
        }
    };
}

global!(V4, Ip4, rn_from_pod4, rn_from_outside4, rn_encap4);
global!(V6, Ip6, rn_from_pod6, rn_from_outside6, rn_encap6);

#[inline(always)]
fn is_from_pod<A: Address>(src: A, ifindex: u32, packed_mac: u64) -> bool {
    let Some(ep) = maps::endpoint(src) else { return false };
    let m = ep.mac;
    let mac = [u16::from_ne_bytes([m[0], m[1]]), u16::from_ne_bytes([m[2], m[3]]), u16::from_ne_bytes([m[4], m[5]])];
    ep.ifindex == ifindex && pack(mac) == packed_mac
}

/// True if the address may be the far end of a tunnel, which no pod of this node is.
#[inline(always)]
fn is_tunnel_end<F: Family>(dst: F::A, config: &NodeConfig) -> bool {
    if route::is_local_pod(dst) {
        return false;
    }
    config.overlay != 0 || F::peer(dst).is_some_and(|peer| peer.flags & (flags::HOST | flags::NODE) != 0)
}

#[inline(always)]
fn is_forged_outside<F: Family>(src: F::A, dst: F::A) -> bool {
    match F::peer(src) {
        Some(peer) if peer.flags & (flags::HOST | flags::LOCAL_PODS) != 0 => true,
        Some(peer) if peer.flags & flags::TUNNEL != 0 => peer.flags & flags::NODE == 0 || route::is_local_pod(dst),
        Some(peer) if peer.flags & flags::SERVICES == 0 => false,
        _ => lb::is_cluster_ip::<F>(src),
    }
}

/// Out of the tunnel comes only what the node at its far end owns.
#[inline(always)]
pub fn verify_tunnel<F: Family>(src: F::A, tunnel: &Tunnel) -> Result<(), DropReason> {
    match F::peer(src) {
        Some(p) if p.flags & flags::TUNNEL != 0 && p.node == tunnel.remote => Ok(()),
        _ => Err(DropReason::UnknownSender),
    }
}

/// True if an address of the underlay is that of another node: only nodes send tunnel packets.
#[inline(always)]
pub fn is_node<F: Family>(src: F::A) -> bool {
    F::peer(src).is_some_and(|peer| peer.flags & flags::NODE != 0)
}

/// True if the address is that of a pod which is reached through the tunnel.
#[inline(always)]
pub fn is_tunneled_pod<F: Family>(src: F::A) -> bool {
    F::peer(src).is_some_and(|peer| peer.flags & (flags::TUNNEL | flags::NODE) == flags::TUNNEL)
}

/// True if the address is of this node's pod range.
#[inline(always)]
pub fn is_own_range<F: Family>(addr: F::A) -> bool {
    F::peer(addr).is_some_and(|peer| peer.flags & flags::LOCAL_PODS != 0)
}
