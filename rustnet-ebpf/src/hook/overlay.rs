//! `overlay_in` and `overlay_out`: the VXLAN device.
//!
//! In: packets of other nodes and of their pods. The far end of the tunnel must be the node that owns the inner source. They
//! go to pods of this node or to its stack, and nowhere else.
//! Out: what the host's stack routes to other nodes' pods gets its tunnel; pod traffic reaches this hook already translated and
//! carries the processed mark.

use rustnet_common::addr::Address;
use rustnet_common::conntrack::flags;
use rustnet_common::drop::{DropReason, hook};
use rustnet_common::peer;

use super::{Steps, direct, external, forward};
use crate::ctx::{Ctx, Skb};
use crate::maps;
use crate::outcome::Dropped;
use crate::packet::{Class, Kind};
use crate::parse;
use crate::step::exec::TO_STACK;
use crate::step::icmp::Reporter;
use crate::step::plan::{self, Origin};
use crate::step::tunnel::{self, Tunnel};
use crate::step::{conntrack, icmp, lb, mark, route, source};

/// The ingress hook, for one family.
#[inline(always)]
pub fn run_in<F: Steps>(skb: &Skb, l3: usize, tunnel: &Tunnel) -> Result<i32, Dropped> {
    let Some(config) = maps::config() else { return Ok(TO_STACK) };
    let (p, flow) = parse::packet::<F, _>(skb, l3)?;
    if p.kind == Kind::LinkLocal || p.tuple.dst.is_link_scope() {
        return Err(DropReason::UnknownSender.into());
    }
    let source = source::of_tunnel(tunnel);
    if tunnel.id != config.vni {
        // The connection remembers the far end, not the network.
        return Err(DropReason::UnknownSender.into());
    }
    let verify = || source::verify_tunnel::<F>(p.tuple.src, tunnel);
    if F::is_wrapped(skb, p) {
        verify()?;
        return Ok(direct::RECEIVE);
    }
    let is_for_pod = || route::is_local_pod(p.tuple.dst);
    let flow = if p.kind == Kind::IcmpError {
        verify()?;
        if lb::is_cluster_ip::<F>(p.tuple.dst) {
            // No packet in a tunnel has such a source.
            return Err(DropReason::IsClusterIp.into());
        }
        let flow = icmp::relate::<F, _>(skb, p, flow, Reporter::AnyHop)?;
        if flow.class == Class::New && is_for_pod() {
            return Err(DropReason::IcmpUnrelated.into());
        }
        flow
    } else {
        let flow = conntrack::lookup::<F, _>(skb, p, flow, source, config, hook::OVERLAY_IN, verify)?;
        if flow.class == Class::New {
            verify()?;
            if !is_for_pod() {
                if external::is_asked::<F>(p, config) || external::is_rival::<F>(p, flow) {
                    return Ok(external::JUMP);
                }
                // Packets for the host's own stack need no connection of ours.
                plan::plan::<F>(p, flow, Origin::Tunnel, config)?;
                parse::remember_ports::<F>(p, skb.ifindex());
                return Ok(TO_STACK);
            }
        }
        flow
    };
    if flow.flags & flags::EXTERNAL != 0 {
        return Ok(external::JUMP);
    }
    forward::<F>(skb, p, flow, source, Origin::Tunnel, config, hook::OVERLAY_IN)
}

/// The egress hook, for one family.
#[inline(always)]
pub fn run_out<F: Steps>(skb: &Skb, l3: usize) -> Result<i32, Dropped> {
    let Some(config) = maps::config() else { return Ok(TO_STACK) };
    let (p, _) = parse::packet::<F, _>(skb, l3)?;
    if p.tuple.dst.is_link_scope() {
        // The device's own multicast listener reports: without a tunnel they go nowhere.
        return Ok(TO_STACK);
    }
    match F::peer(p.tuple.dst) {
        Some(peer) if peer.flags & peer::flags::TUNNEL != 0 => {
            // With the tunnel's far end on it, a packet has no route any more whose MTU the device could lower.
            tunnel::verify_path(skb, p, &peer.node)?;
            if !tunnel::set(skb, &peer.node, config) {
                return Err(DropReason::WriteError.into());
            }
            // The outer packet is this node's own and asks no service: the uplink's hook has nothing to do with it.
            mark::set_processed(skb, config);
            Ok(external::may_answer(skb, p, config))
        }
        _ => Err(DropReason::NoFib.into()),
    }
}
