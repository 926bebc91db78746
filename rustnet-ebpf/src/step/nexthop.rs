//! The way to other nodes. Contract: finds where the kernel's routes lead to a node, and asks them a few times a second at most.
//!
//! Each CPU remembers the ways to some nodes. A route that changes is noticed within [`lifetime`], with the agent dead or alive.

use aya_ebpf::bindings::{__sk_buff, xdp_md};
use rustnet_common::addr::{Addr, Address};
use rustnet_common::config::{FIRST_TUNNEL_PORT, NodeConfig};
use rustnet_common::tuple::proto;

use super::fib::{LOOPBACK, RET_NO_NEIGH, RET_SUCCESS};
use crate::ctx::{Ctx, Skb, fetch_add, jiffies, masked};
use crate::family::{Family, V4, V6};
use crate::maps::{self, FibLookup, NextHop};
use crate::xdp::Xdp;

/// Ticks for which a way is remembered: an eighth of a second.
#[inline(always)]
pub(super) fn lifetime(config: &NodeConfig) -> u32 {
    config.hz >> 3
}

/// The way to a node for flows of this hash; `None` where packets have to take the device.
#[inline(always)]
pub fn to<C: Ways>(ctx: &C, node: &Addr, hash: u32) -> Option<&'static NextHop> {
    known(ctx, node, hash).filter(|hop| hop.ifindex != 0)
}

/// The interface that leads to a node; 0 where packets have to take the device.
#[inline(always)]
pub fn interface_to<C: Ways>(ctx: &C, node: &Addr) -> u32 {
    known(ctx, node, 0).map_or(0, |hop| hop.ifindex)
}

/// The largest IP packet on the way to a node, with the outer headers; 0 if the kernel's routes have no answer at the moment.
///
/// What a router has said of the path is in it: the overlay's port has a socket, so that the kernel believes an error about it.
#[inline(always)]
pub fn path_mtu<C: Ways>(ctx: &C, node: &Addr, hash: u32) -> u32 {
    known(ctx, node, hash).map_or(0, |hop| hop.mtu)
}

/// What is remembered of the way to a node, and no older than [`lifetime`].
#[inline(always)]
fn known<C: Ways>(ctx: &C, node: &Addr, hash: u32) -> Option<&'static NextHop> {
    let hop = maps::rn_next_hops.get_ptr(ctx.refresh_hop(node, hash))?;
    // SAFETY: the element belongs to this CPU, and TC programs do not interrupt each other.
    Some(unsafe { &*hop })
}

/// What each context asks the kernel's routes with.
pub trait Ways: Ctx {
    /// Brings an element of `rn_next_hops` up to date and returns its index; one beyond the map without settings.
    fn refresh_hop(&self, node: &Addr, hash: u32) -> u32;
}

/// Declares that function with global linkage: the verifier looks at it once, and it has a stack frame of its own. BTF has the type of the
/// context, so that each context needs its own.
macro_rules! global {
    ($name:ident, $ctx:ident, $raw:ty) => {
        impl Ways for $ctx {
            #[inline(always)]
            fn refresh_hop(&self, node: &Addr, hash: u32) -> u32 {
                let (high, low) = node.halves();
                $name(self.raw(), high, low, hash)
            }
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $name(ctx: *mut $raw, high: u64, low: u64, hash: u32) -> u32 {
            refresh(&$ctx(ctx), &Addr::from_halves(high, low), hash)
        }
    };
}

global!(rn_hop, Skb, __sk_buff);
global!(rn_xdp_hop, Xdp, xdp_md);

#[inline(always)]
fn refresh<C: Ctx>(ctx: &C, node: &Addr, hash: u32) -> u32 {
    let way = hash & (maps::WAYS - 1);
    let slot = slot(node, way);
    let (Some(config), Some(hop)) = (maps::config(), maps::rn_next_hops.get_ptr_mut(slot)) else {
        return maps::NEXT_HOPS;
    };
    // SAFETY: see `known`.
    let hop = unsafe { &mut *hop };
    let now = jiffies();
    if hop.node != *node || hop.way != way || now.wrapping_sub(hop.since) >= lifetime(config) {
        let is_waiting = find(ctx, hop, node, way, config);
        (hop.node, hop.way) = (*node, way);
        // A neighbour's MAC comes in a moment.
        hop.since = if is_waiting { now.wrapping_sub(lifetime(config)) } else { now };
    }
    slot
}

/// The next identification of an outer packet to a node, which is the first of as many as the frame stands for.
#[inline(always)]
pub fn identification<C: Ctx>(ctx: &C, node: &Addr) -> u16 {
    let Some(next) = maps::rn_outer_ids.get_ptr_mut(slot(node, 0)) else { return 0 };
    let segments = ctx.gso_segs();
    // SAFETY: an element of an array.
    let id = unsafe { fetch_add(next, u64::from(segments + u32::from(segments == 0))) };
    id as u16
}

/// Where the way to a node is remembered. Nodes of one link differ in their last bytes.
#[inline(always)]
fn slot(node: &Addr, way: u32) -> u32 {
    let [a, b, c, d] = node.words();
    let word = a ^ b ^ c ^ d;
    let half = word ^ word >> 16;
    let apart = way * (maps::NEXT_HOPS / maps::WAYS);
    masked::<{ maps::NEXT_HOPS - 1 }>((half ^ half >> 8 ^ apart) as usize) as u32
}

/// Asks the kernel's routes. True for a neighbour without a MAC yet, which is the device's to ask for. One source port stands for all flows of a way: where ports decide between several next hops, each way has
/// one of them.
#[inline(always)]
fn find<C: Ctx>(ctx: &C, hop: &mut NextHop, node: &Addr, way: u32, config: &NodeConfig) -> bool {
    let words = node.words();
    let fib = &mut hop.fib;
    *fib = FibLookup {
        family: V6::AF,
        l4_protocol: proto::UDP,
        sport: (FIRST_TUNNEL_PORT + way as u16).to_be(),
        dport: config.overlay_port.to_be(),
        // Any length makes the kernel return the MTU.
        tot_len: 1,
        ifindex: LOOPBACK,
        tos: 0,
        src: config.node6.words(),
        dst: words,
        vlan: 0,
        macs: [0; 6],
    };
    if node.is_v4() {
        (fib.family, fib.src, fib.dst[0]) = (V4::AF, config.node4.words(), words[3]);
    }
    // Without an address of this node's, the kernel chooses the near end.
    let has_source = fib.src != [0; 4];
    let found = fib.ask(ctx);
    let is_found = found == RET_SUCCESS;
    // Devices without Ethernet headers have no MAC of their own.
    let has_mac = fib.macs[0] | fib.macs[1] | fib.macs[2] != 0;
    let is_usable = is_found && has_mac && fib.ifindex != config.overlay && has_source;
    hop.ifindex = if is_usable { fib.ifindex } else { 0 };
    // The helper returns an MTU with a neighbour's MAC alone, and otherwise leaves the length as it was asked.
    hop.mtu = if is_found { u32::from(fib.tot_len) } else { 0 };
    found == RET_NO_NEIGH
}
