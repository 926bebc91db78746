//! The decision. Contract: from a classified packet to what becomes of it, without a helper that writes, without a look at the
//! packet's bytes: the same for every context.

use rustnet_common::config::NodeConfig;
use rustnet_common::conntrack::VIA_QDISC;
use rustnet_common::drop::DropReason;
use rustnet_common::peer::Peer;
use rustnet_common::tuple::proto;

use super::route::{self, Destination, Route};
use super::source::Verify;
use crate::outcome::Dropped;
use crate::packet::{Flow, Packet};

/// Where a packet comes from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// A pod of this node.
    Pod,
    /// An uplink.
    Uplink,
    /// The overlay.
    Tunnel,
    /// An uplink or the overlay, of a flow that came from outside to a Service: this node forwards it.
    External,
    /// This node's own stack, which has done all that a router does.
    Host,
}

/// Where a packet goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Into a pod of this node, past its qdisc.
    Pod,
    /// To a pod of this node, through its qdisc.
    PodQdisc,
    /// Through the overlay.
    Tunnel,
    /// Where the kernel's routes lead.
    Routed,
    /// To this node's own stack.
    Stack,
}

/// What becomes of a packet.
#[derive(Clone, Copy)]
pub struct Action {
    /// Where it goes.
    pub target: Target,
    /// The interface of the pod that it goes to.
    pub ifindex: u32,
    /// The peer behind the tunnel that it goes through.
    pub peer: Option<&'static Peer>,
    /// The hop limit that it leaves with.
    pub ttl: u8,
}

/// Decides what becomes of a packet of a flow.
#[inline(always)]
pub fn plan<F: Verify>(
    p: &Packet<F::A>,
    flow: &Flow<F::A>,
    origin: Origin,
    config: &NodeConfig,
) -> Result<Action, Dropped> {
    let to = &flow.to;
    let Destination { route, egress, peer } = route::of::<F>(to, flow.flags);
    let is_host = origin == Origin::Host;
    // Of clients outside neither: this node would lend them its address.
    let is_of_others = matches!(origin, Origin::Pod | Origin::External);
    if is_of_others && to.tuple.proto == proto::UDP && to.tuple.dport == config.overlay_port {
        F::verify_encap(&to.tuple)?;
    }
    let target = match route {
        Route::Stack if is_host => return Err(DropReason::HostHairpin.into()),
        Route::Stack => Target::Stack,
        // Through the veth where the pod's bandwidth is limited, and from egress hooks, which cannot reach its other side.
        Route::Pod if is_host || egress & VIA_QDISC != 0 => Target::PodQdisc,
        Route::Pod => Target::Pod,
        // What comes from other nodes or from outside is for this node: it is no router between them.
        Route::Tunnel | Route::Direct | Route::World if matches!(origin, Origin::Tunnel | Origin::Uplink) => {
            return Err(DropReason::NoFib.into());
        }
        Route::Tunnel => Target::Tunnel,
        Route::Direct | Route::World => Target::Routed,
    };
    let ttl = if is_host || target == Target::Stack {
        p.ttl
    } else if p.ttl <= 1 {
        return Err(DropReason::TtlExceeded.into());
    } else {
        p.ttl - 1
    };
    if target == Target::Tunnel && p.mtu_len > config.overlay_mtu {
        return Err(Dropped { reason: DropReason::FragNeeded, mtu: config.overlay_mtu });
    }
    Ok(Action { target, ifindex: egress & !VIA_QDISC, peer, ttl })
}
