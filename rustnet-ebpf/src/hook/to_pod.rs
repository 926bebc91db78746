//! `to_pod`: TC egress of a pod's host-side veth. What this node's own stack sends to a pod: probes, host processes, the
//! answers of host-network backends, and whatever the kernel forwarded by itself.

use rustnet_common::addr::Address;
use rustnet_common::conntrack::flags;
use rustnet_common::drop::hook;
use rustnet_common::tuple::proto;

use super::Steps;
use crate::ctx::Skb;
use crate::maps;
use crate::outcome::Dropped;
use crate::packet::{Class, Kind};
use crate::parse;
use crate::rewrite;
use crate::step::exec::TO_STACK;
use crate::step::icmp::Reporter;
use crate::step::{admit, conntrack, icmp, source};

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
    let flow = if p.kind == Kind::IcmpError {
        // The stack's own errors may be about packets that were never tracked, for example those without a route.
        icmp::relate::<F, _>(skb, p, flow, Reporter::AnyHop)?
    } else {
        let flow = conntrack::lookup::<F, _>(skb, p, flow, source::HOST, config, || Ok(()))?;
        if flow.class == Class::New {
            // Answers to the overlay's port are not for the stack: nobody gets tunnel packets through a pod.
            let is_from_overlay_port = p.tuple.proto == proto::UDP && p.tuple.sport == config.overlay_port;
            if source::is_host::<F>(p.tuple.src) {
                flow.flags |= flags::FROM_HOST;
            } else if !is_from_overlay_port {
                flow.flags |= flags::VIA_STACK;
            }
            // A collision may cost the flow its source port.
            admit::admit::<F>(skb, p, flow, config, source::HOST, hook::TO_POD)?;
        }
        flow
    };
    rewrite::translate::<F>(skb, p, &flow.to.tuple, p.ttl)?;
    Ok(TO_STACK)
}
