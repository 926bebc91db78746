//! The way of flows that leave by the device that they came in by. Contract: what was found of a flow a moment ago, and what the kernel's
//! routes say of one.
//!
//! Each CPU remembers its own flows, for an eighth of a second. All that a rule or route can tell apart is compared, so that no flow takes the
//! way of another one.

use rustnet_common::addr::{Addr, Address};
use rustnet_common::config::NodeConfig;
use rustnet_common::tuple::Tuple;

use super::fib::RET_SUCCESS;
use super::nexthop::lifetime;
use crate::ctx::{Ctx, jiffies, masked};
use crate::family::Family;
use crate::maps::{self, FibLookup, Leaving, PROBED, TURNS, Turn};
use crate::xdp::Xdp;

/// Where the way of a flow is remembered that leaves as `to`, and whether it is.
#[inline(always)]
pub fn find<A: Address>(xdp: &Xdp, to: &Tuple<A>, hash: u32, config: &NodeConfig) -> Option<(&'static mut Turn, bool)> {
    let turn = maps::rn_turns.get_ptr_mut(masked::<{ TURNS - 1 }>(hash as usize) as u32)?;
    // SAFETY: the element belongs to this CPU, programs of one CPU do not interrupt each other, and each takes one.
    let turn = unsafe { &mut *turn };
    let is_same = turn.src == to.src.to_addr()
        && turn.dst == to.dst.to_addr()
        && turn.ports == ports(to)
        && turn.proto == u32::from(to.proto)
        && turn.ifindex == xdp.ifindex();
    let is_known = is_same && jiffies().wrapping_sub(turn.since) < lifetime(config);
    Some((turn, is_known))
}

#[inline(always)]
fn ports<A>(to: &Tuple<A>) -> u32 {
    u32::from(to.sport) << 16 | u32::from(to.dport)
}

impl Turn {
    /// Remembers a way. `node`: the far end of its tunnel.
    #[inline(always)]
    pub fn set<A: Address>(&mut self, xdp: &Xdp, to: &Tuple<A>, macs: &[u16; 6], mtu: u32, node: &Addr) {
        (self.src, self.dst, self.ports, self.proto) = (to.src.to_addr(), to.dst.to_addr(), ports(to), to.proto.into());
        (self.since, self.ifindex) = (jiffies(), xdp.ifindex());
        (self.mtu, self.macs, self.node) = (mtu, *macs, *node);
    }
}

/// True once a second for each next hop: such a packet is the stack's to send. A look-up of the route leaves a neighbour as it is, and the
/// kernel would never ask a stale one whether it still has its MAC.
#[inline(always)]
pub fn is_probe(macs: &[u16; 6], config: &NodeConfig) -> bool {
    let [.., upper, lower] = *macs;
    let slot = masked::<{ PROBED - 1 }>(usize::from(lower ^ upper ^ lower >> 8)) as u32;
    let (Some(probed), now) = (maps::rn_probed.get_ptr_mut(slot), jiffies()) else { return false };
    // SAFETY: the element belongs to this CPU.
    unsafe {
        let is_due = now.wrapping_sub(*probed) >= config.hz;
        if is_due {
            *probed = now;
        }
        is_due
    }
}

/// Asks the kernel for the way of a packet that is to leave as `leaving` says and came with this source port: the MTU, and the MACs in
/// `leaving`, if it leads out by the device at hand, and all that it takes is known; else 0. A function of its own for the sake of its stack
/// frame.
#[inline(never)]
pub fn ask<F: Family>(xdp: &Xdp, leaving: &mut Leaving<F::A>, sport: u32) -> u32 {
    // Any length makes the kernel return the MTU.
    leaving.fib = FibLookup::of::<F>(&leaving.flow, sport as u16, 1, xdp.ifindex());
    if leaving.fib.ask(xdp) != RET_SUCCESS || leaving.fib.ifindex != xdp.ifindex() {
        return 0;
    }
    leaving.macs = leaving.fib.macs;
    u32::from(leaving.fib.tot_len)
}
