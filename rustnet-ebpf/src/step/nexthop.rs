//! The way to other nodes. Contract: finds where the kernel's routes lead to a node, and asks them a few times a second at most.
//!
//! Each CPU remembers the ways to some nodes. A route that changes is noticed within [`lifetime`], with the agent dead or alive.

use aya_ebpf::bindings::__sk_buff;
use rustnet_common::addr::{Addr, Address};
use rustnet_common::config::NodeConfig;
use rustnet_common::tuple::proto;

use super::fib::{FibLookup, LOOPBACK, RET_NO_NEIGH, RET_SUCCESS};
use crate::ctx::{Skb, fetch_add, jiffies, masked};
use crate::family::{Family, V4, V6};
use crate::maps::{self, NextHop};
use crate::rewrite::FIRST_PORT;

/// Ticks for which a way is remembered: an eighth of a second.
#[inline(always)]
fn lifetime(config: &NodeConfig) -> u32 {
    config.hz >> 3
}

/// The way to a node for flows of this hash; `None` where packets have to take the device.
#[inline(always)]
pub fn to(skb: &Skb, node: &Addr, hash: u32, config: &NodeConfig) -> Option<&'static NextHop> {
    let way = hash & (maps::WAYS - 1);
    let hop = maps::rn_next_hops.get_ptr_mut(slot(node, way))?;
    // SAFETY: the element belongs to this CPU, and TC programs do not interrupt each other.
    let hop = unsafe { &mut *hop };
    let now = jiffies();
    if hop.node != *node || hop.way != way || now.wrapping_sub(hop.since) >= lifetime(config) {
        let is_waiting = find(skb, hop, node, way, config);
        (hop.node, hop.way) = (*node, way);
        // A neighbour's MAC comes in a moment.
        hop.since = if is_waiting { now.wrapping_sub(lifetime(config)) } else { now };
    }
    (hop.ifindex != 0).then_some(hop)
}

/// The interface that leads to a node; 0 where packets have to take the device.
#[inline(always)]
pub fn interface_to(skb: &Skb, node: &Addr) -> u32 {
    let (high, low) = node.halves();
    rn_hop(skb.raw(), high, low)
}

/// A function with global linkage, for the sake of its stack frame.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn rn_hop(skb: *mut __sk_buff, high: u64, low: u64) -> u32 {
    let node = Addr::from_halves(high, low);
    maps::config().and_then(|config| to(&Skb(skb), &node, 0, config)).map_or(0, |hop| hop.ifindex)
}

/// The next identification of an outer packet to a node, which is the first of as many as the frame stands for.
#[inline(always)]
pub fn identification(skb: &Skb, node: &Addr) -> u16 {
    let Some(next) = maps::rn_outer_ids.get_ptr_mut(slot(node, 0)) else { return 0 };
    let segments = skb.gso_segs();
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
fn find(skb: &Skb, hop: &mut NextHop, node: &Addr, way: u32, config: &NodeConfig) -> bool {
    let words = node.words();
    let (family, src, dst) = if node.is_v4() {
        (V4::AF, config.node4.words(), [words[3], 0, 0, 0])
    } else {
        (V6::AF, config.node6.words(), words)
    };
    let mut fib = FibLookup {
        family,
        l4_protocol: proto::UDP,
        sport: (FIRST_PORT + way as u16).to_be(),
        dport: config.overlay_port.to_be(),
        // Any length makes the kernel return the MTU.
        tot_len: 1,
        ifindex: LOOPBACK,
        tos: 0,
        src,
        dst,
        vlan: 0,
        macs: [0; 6],
    };
    let found = fib.ask(skb);
    let is_found = found == RET_SUCCESS;
    // Devices without Ethernet headers have no MAC of their own.
    let has_mac = fib.macs[0] | fib.macs[1] | fib.macs[2] != 0;
    // Without an address of this node's, the kernel chooses the near end.
    let is_usable = is_found && has_mac && fib.ifindex != config.overlay && src != [0; 4];
    hop.ifindex = if is_usable { fib.ifindex } else { 0 };
    hop.mtu = u32::from(fib.tot_len);
    hop.family = u32::from(fib.family);
    hop.addr = fib.dst;
    found == RET_NO_NEIGH
}
