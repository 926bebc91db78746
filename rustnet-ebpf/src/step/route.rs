//! Where a destination lies. Contract: maps an address to one [`Route`], by look-ups in our own maps alone.

use rustnet_common::addr::{Addr, Address};
use rustnet_common::conntrack::flags::SECOND_ADDRESS;
use rustnet_common::conntrack::{NOT_LOCAL, VIA_QDISC};
use rustnet_common::endpoint;
use rustnet_common::peer::{Peer, flags};

use super::lb;
use crate::family::Family;
use crate::maps;
use crate::packet::Translation;

/// Where a destination lies.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// A pod of this node.
    Pod,
    /// Behind the overlay.
    Tunnel,
    /// Inside the cluster (or not to be masqueraded), reached by the kernel's routes.
    Direct,
    /// The outside world, reached by the kernel's routes.
    World,
    /// This node's own stack: its addresses, link-scope destinations, addresses of its pod range that no pod has.
    Stack,
}

/// A route with what belongs to it. Not variants of an enum: the compiler leaves the room of absent ones undefined, and the verifier
/// refuses to read that.
#[derive(Clone, Copy)]
pub struct Destination {
    /// Where the destination lies.
    pub route: Route,
    /// Of [`Route::Pod`]: its interface, with [`VIA_QDISC`] if packets have to traverse its qdisc. Else [`NOT_LOCAL`].
    pub egress: u32,
    /// Of [`Route::Tunnel`]: the peer behind it.
    pub peer: Option<&'static Peer>,
}

/// Interface of the pod of this node that has the address, with [`VIA_QDISC`] if packets have to traverse its qdisc; or
/// [`NOT_LOCAL`].
#[inline(always)]
pub fn local_pod<A: Address>(dst: A) -> u32 {
    let (high, low) = dst.to_addr().halves();
    rn_local_pod(high, low)
}

/// True if a pod of this node has the address.
#[inline(always)]
pub fn is_local_pod<A: Address>(addr: A) -> bool {
    local_pod(addr) != NOT_LOCAL
}

/// True if the address is this node's own.
#[inline(always)]
pub fn is_host<F: Family>(addr: F::A) -> bool {
    F::peer(addr).is_some_and(|peer| peer.flags & flags::HOST != 0)
}

/// True for an address that a client outside may have, and nobody else: none of a node, of a pod, or of a Service.
#[inline(always)]
pub fn is_client_outside<F: Family>(src: F::A) -> bool {
    const INSIDE: u16 = flags::HOST | flags::NODE | flags::POD | flags::TUNNEL | flags::LOCAL_PODS | flags::SERVICES;
    let is_inside = F::peer(src).is_some_and(|peer| peer.flags & INSIDE != 0);
    !is_inside && !is_local_pod(src) && !lb::is_vip::<F>(src)
}

/// True if a side of a connection was a pod, and another one has its address now, or none.
#[inline(always)]
pub fn is_replaced<A: Address>(ifindex: u32, addr: A) -> bool {
    ifindex != 0 && ifindex != NOT_LOCAL && (ifindex ^ local_pod(addr)) & !VIA_QDISC != 0
}

/// A function with global linkage, for the reason that the parser is one. Both families share it.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn rn_local_pod(high: u64, low: u64) -> u32 {
    let addr = Addr::from_halves(high, low);
    match maps::endpoint(addr) {
        None => NOT_LOCAL,
        Some(ep) if ep.flags & endpoint::flags::VIA_QDISC != 0 => ep.ifindex | VIA_QDISC,
        Some(ep) => ep.ifindex,
    }
}

/// Finds where a translated packet of a flow with these flags leads, from what its connection remembers if it does.
#[inline(always)]
pub fn of<F: Family>(to: &Translation<F::A>, flow_flags: u16) -> Destination {
    let egress = if to.egress == 0 { local_pod(to.tuple.dst) } else { to.egress };
    if egress == NOT_LOCAL {
        remote::<F>(to.tuple.dst, flow_flags)
    } else {
        Destination { route: Route::Pod, egress, peer: None }
    }
}

/// [`flags::NODE`] for flows of [`SECOND_ADDRESS`], else 0: another node has asked them past the tunnel, and gets its answers so, too.
/// Without a branch, for the verifier would follow each to the end.
#[inline(always)]
fn past_tunnel(flow_flags: u16) -> u16 {
    ((flow_flags / SECOND_ADDRESS) & 1) * flags::NODE
}

/// Finds where an address lies that no pod of this node has.
#[inline(always)]
fn remote<F: Family>(dst: F::A, flow_flags: u16) -> Destination {
    let without_peer = |route| Destination { route, egress: NOT_LOCAL, peer: None };
    if dst.is_link_scope() {
        return without_peer(Route::Stack);
    }
    match F::peer(dst) {
        None => without_peer(Route::World),
        // Of a load balancer, or of a flow that is older than the range: new flows to others are refused before.
        Some(p) if p.flags & flags::SERVICES != 0 => without_peer(Route::World),
        Some(p) if p.flags & (flags::HOST | flags::LOCAL_PODS) != 0 => without_peer(Route::Stack),
        Some(p) if p.flags & (flags::TUNNEL | past_tunnel(flow_flags)) == flags::TUNNEL => {
            Destination { route: Route::Tunnel, egress: NOT_LOCAL, peer: Some(p) }
        }
        Some(_) => without_peer(Route::Direct),
    }
}
