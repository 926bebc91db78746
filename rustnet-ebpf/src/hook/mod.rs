//! One file per hook or pair of hooks. Each classifies its packets and lists the steps that follow, in order. No hook writes a
//! packet byte.

pub mod direct;
pub mod external;
pub mod fragment;
pub mod from_pod;
pub mod overlay;
pub mod to_pod;
pub mod tunnel;
pub mod uplink;
pub mod xdp;

use rustnet_common::config::NodeConfig;
use rustnet_common::drop::DropReason;

use crate::ctx::{Ctx, Skb};
use crate::event::Report;
use crate::offload::{self, Offload};
use crate::outcome::Dropped;
use crate::packet::{Class, Flow, Packet, Source};
use crate::parse::{self, Parse};
use crate::rewrite::Rewrite;
use crate::step::admit::{self, Create};
use crate::step::conntrack::Track;
use crate::step::direct::Direct;
use crate::step::exec::{self, Egress};
use crate::step::fib::Routed;
use crate::step::icmp::Icmp;
use crate::step::nat::Nat;
use crate::step::plan::{self, Origin, Target};
use crate::step::policy;
use crate::step::reject::Rejecting;
use crate::step::source::Verify;

/// Everything that hooks ask of a family.
pub trait Steps:
    Parse<Skb> + Rewrite + Report + Routed + Icmp<Skb> + Track + Create + Nat + Verify + Rejecting + Direct
{
}
impl<F> Steps for F where
    F: Parse<Skb> + Rewrite + Report + Routed + Icmp<Skb> + Track + Create + Nat + Verify + Rejecting + Direct
{
}

/// Refuses a packet of a pod whose checksum the device would write over what was verified.
#[inline(always)]
pub fn verify_checksum<F: Steps>(skb: &Skb, p: &Packet<F::A>, is_tunneled: bool) -> Result<Offload, DropReason> {
    match offload::of(skb, p.l4(), p.tuple.proto, is_tunneled) {
        Offload::Misplaced => Err(DropReason::Malformed),
        offload => Ok(offload),
    }
}

/// Decides and executes: plans the packet, finds its way, opens the connection of a new flow, translates and sends.
#[inline(always)]
pub fn forward<F: Steps>(
    skb: &Skb,
    p: &Packet<F::A>,
    flow: &mut Flow<F::A>,
    source: Source,
    origin: Origin,
    config: &NodeConfig,
    hook: u8,
) -> Result<i32, Dropped> {
    let action = plan::plan::<F>(p, flow, origin, config)?;
    // Not on the way into a pod of this node: nothing writes the checksum there.
    let can_encapsulate = origin == Origin::Pod
        && action.target != Target::Pod
        && verify_checksum::<F>(skb, p, action.target == Target::Tunnel)? == Offload::Fine;
    let egress = exec::resolve::<F>(skb, p, flow, action, origin)?;
    if egress.0 == Egress::Unrouted {
        // Not translated, not tracked: the stack gets the packet as its sender sent it. A known flow that is translated must
        // not leave so by a way of the stack's own.
        if flow.class != Class::New && flow.to.tuple != p.tuple {
            return Err(DropReason::NoFib.into());
        }
        if flow.class == Class::New && p.is_flow() {
            policy::judge::<F>(p, flow)?;
            if flow.is_audited {
                F::report(skb, p.l3(), DropReason::PolicyAudited as u8, hook);
            }
            // The later fragments take the same way.
            parse::remember_ports::<F>(p, skb.ifindex());
        }
    } else if flow.class == Class::New && p.is_flow() {
        admit::admit::<F>(skb, p, flow, config, source, skb.len(), hook)?;
    }
    exec::send::<F>(skb, p, flow, action, egress, can_encapsulate, config)
}
