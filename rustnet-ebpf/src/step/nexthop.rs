//! The way to other nodes. Contract: finds where the kernel's routes lead to a node, and asks them a few times a second at most.
//!
//! Each CPU remembers the ways to some nodes. A route that changes is noticed within [`lifetime`], with the agent dead or alive.

use aya_ebpf::bindings::__sk_buff;
use rustnet_common::addr::{Addr, Address};
use rustnet_common::config::NodeConfig;
use rustnet_common::tuple::proto;

use super::fib::{FibLookup, LOOPBACK, RET_SUCCESS};
use crate::ctx::{Skb, jiffies, masked};
use crate::family::{Family, V4, V6};
use crate::maps::{self, NextHop};

/// Ticks for which a way is remembered: an eighth of a second.
#[inline(always)]
fn lifetime(config: &NodeConfig) -> u32 {
    config.hz >> 3
}

/// The way to a node; `None` where packets have to take the device.
#[inline(always)]
pub fn to(skb: &Skb, node: &Addr, config: &NodeConfig) -> Option<&'static NextHop> {
    let hop = maps::rn_next_hops.get_ptr_mut(slot(node))?;
    // SAFETY: the element belongs to this CPU, and TC programs do not interrupt each other.
    let hop = unsafe { &mut *hop };
    let now = jiffies();
    if hop.node != *node || now.wrapping_sub(hop.since) >= lifetime(config) {
        find(skb, hop, node, config);
        hop.node = *node;
        hop.since = now;
    }
    (hop.ifindex != 0).then_some(hop)
}

/// The interface that leads to a node; 0 where packets have to take the device.
#[inline(always)]
pub fn interface_to(skb: &Skb, node: &Addr) -> u32 {
    let w = node.words();
    rn_hop(skb.raw(), u64::from(w[0]) << 32 | u64::from(w[1]), u64::from(w[2]) << 32 | u64::from(w[3]))
}

/// A function with global linkage, for the sake of its stack frame.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn rn_hop(skb: *mut __sk_buff, high: u64, low: u64) -> u32 {
    let node = Addr::from_words([(high >> 32) as u32, high as u32, (low >> 32) as u32, low as u32]);
    maps::config().and_then(|config| to(&Skb(skb), &node, config)).map_or(0, |hop| hop.ifindex)
}

/// Where the way to a node is remembered. Nodes of one link differ in their last bytes.
#[inline(always)]
fn slot(node: &Addr) -> u32 {
    let [a, b, c, d] = node.words();
    let word = a ^ b ^ c ^ d;
    let half = word ^ word >> 16;
    masked::<{ maps::NEXT_HOPS - 1 }>((half ^ half >> 8) as usize) as u32
}

/// Asks the kernel's routes, as the overlay's device does.
#[inline(always)]
fn find(skb: &Skb, hop: &mut NextHop, node: &Addr, config: &NodeConfig) {
    let words = node.words();
    let (family, src, dst) = if node.is_v4() {
        (V4::AF, config.node4.words(), [words[3], 0, 0, 0])
    } else {
        (V6::AF, config.node6.words(), words)
    };
    let mut fib = FibLookup {
        family,
        l4_protocol: proto::UDP,
        sport: 0,
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
    // A neighbour without a MAC yet is the device's to ask for.
    let is_found = fib.ask(skb) == RET_SUCCESS;
    // Devices without Ethernet headers have no MAC of their own.
    let has_mac = fib.macs[0] | fib.macs[1] | fib.macs[2] != 0;
    // Without an address of this node's, the kernel chooses the near end.
    let is_usable = is_found && has_mac && fib.ifindex != config.overlay && src != [0; 4];
    hop.ifindex = if is_usable { fib.ifindex } else { 0 };
    hop.mtu = u32::from(fib.tot_len);
    hop.family = u32::from(fib.family);
    hop.addr = fib.dst;
}
