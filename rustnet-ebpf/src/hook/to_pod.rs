//! `to_pod`: TC egress of a pod's host-side veth. What this node's own stack sends to a pod: probes, host processes, the
//! answers of host-network backends, and whatever the kernel forwarded by itself.

use rustnet_common::addr::Address;
use rustnet_common::config::NodeConfig;
use rustnet_common::conntrack::{NOT_LOCAL, VIA_QDISC, flags};
use rustnet_common::drop::{DropReason, hook};
use rustnet_common::tuple::proto;

use super::Steps;
use crate::ctx::{Ctx, Skb};
use crate::family::Family;
use crate::maps;
use crate::outcome::Dropped;
use crate::packet::{Class, Kind};
use crate::parse;
use crate::rewrite;
use crate::step::exec::TO_STACK;
use crate::step::icmp::Reporter;
use crate::step::{admit, conntrack, icmp, policy, route, source};

/// True for a source that the device which a forwarded packet came in by cannot bring: devices
/// without programs of ours bring any. What netfilter redirects comes from its pod, or out of the
/// tunnel.
#[inline(always)]
fn is_forged<F: Family>(src: F::A, came_by: u32, config: &NodeConfig) -> bool {
    match route::local_pod(src) {
        NOT_LOCAL => source::is_tunneled_pod::<F>(src) && came_by != config.overlay,
        ifindex => ifindex & !VIA_QDISC != came_by,
    }
}

/// The hook, for one family.
#[inline(always)]
pub fn run<F: Steps>(skb: &Skb, l3: usize) -> Result<i32, Dropped> {
    let Some(config) = maps::config() else { return Ok(TO_STACK) };
    let (p, flow) = parse::packet::<F, _>(skb, l3)?;
    // No flow is opened that the pod could not open in its turn: answers to known flows are not judged by their destination.
    let is_unanswerable = p.tuple.src.is_martian_source() || p.tuple.src.is_link_scope();
    if p.kind == Kind::LinkLocal || p.tuple.dst.is_link_scope() || is_unanswerable {
        return Ok(TO_STACK);
    }
    let is_forwarded = skb.ingress_ifindex() != 0;
    if is_forwarded && is_forged::<F>(p.tuple.src, skb.ingress_ifindex(), config) {
        return Err(DropReason::Spoofed.into());
    }
    let flow = if p.kind == Kind::IcmpError {
        let flow = icmp::relate::<F, _>(skb, p, flow, Reporter::AnyHop)?;
        // The stack's own errors may be about packets that were never tracked, for example those without a route.
        if is_forwarded && flow.class == Class::New {
            return Err(DropReason::IcmpUnrelated.into());
        }
        flow
    } else {
        let flow = conntrack::lookup::<F, _>(skb, p, flow, source::HOST, config, hook::TO_POD, || Ok(()))?;
        if flow.class == Class::New {
            // Answers to the overlay's port are not for the stack: nobody gets tunnel packets through a pod.
            let is_from_overlay_port = p.tuple.proto == proto::UDP && p.tuple.sport == config.overlay_port;
            // What has this node's address by netfilter is not the node's, and its answers go back through netfilter.
            if !is_forwarded && route::is_host::<F>(p.tuple.src) {
                flow.flags |= flags::FROM_HOST;
            } else if !is_from_overlay_port {
                flow.flags |= flags::VIA_STACK;
            }
            // A collision may cost the flow its source port.
            admit::admit::<F>(skb, p, flow, config, source::HOST, skb.len(), hook::TO_POD)?;
        } else if is_forwarded && flow.class == Class::Original && flow.flags & flags::FROM_HOST != 0 {
            // Netfilter forgets the node's flows before their entries end, and then gives their ports to others.
            if policy::verify(p.tuple.src, p.tuple.dst, p.tuple.dport, p.tuple.proto, 0)? {
                F::report(skb, p.l3(), DropReason::PolicyAudited as u8, hook::TO_POD);
            }
        }
        flow
    };
    rewrite::translate::<F, _>(skb, p, flow, p.ttl)?;
    Ok(TO_STACK)
}
