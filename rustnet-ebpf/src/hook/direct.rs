//! `direct_out` and `direct_in`: flows from outside to Services whose backend on another node answers the client directly.
//!
//! Out: `external_in` jumps here on the node that the client asked. Each packet leaves whole, inside of a header from this node to the
//! backend's pod, by the way of any packet to that pod. In: `uplink_in` and `overlay_in` jump here on the pod's node. The header goes, and
//! the flow is that of a client which asked this node.

use rustnet_common::addr::Address;
use rustnet_common::config::NodeConfig;
use rustnet_common::conntrack::{NOT_LOCAL, VIA_QDISC, flags};
use rustnet_common::drop::DropReason;

use super::Steps;
use crate::ctx::{Ctx, Skb};
use crate::maps;
use crate::outcome::Dropped;
use crate::packet::{Class, Flow, Kind, Packet};
use crate::parse;
use crate::rewrite::{self, Encapsulated, Wrap};
use crate::step::direct;
use crate::step::exec::{self, Egress, TO_STACK};
use crate::step::fib::{self, Fib};
use crate::step::icmp::Reporter;
use crate::step::plan::{self, Action, Origin, Target};
use crate::step::{admit, conntrack, icmp, mark, route, source, tunnel};
use crate::wire::ETH_LEN;

/// The verdict on a packet that `direct_out` goes on with: none of the kernel's.
pub const SEND: i32 = i32::MAX - 3;

/// The verdict on a packet that `direct_in` goes on with: none of the kernel's.
pub const RECEIVE: i32 = i32::MAX - 4;

/// `direct_out`, for one family. The packet and its flow are those in hand; `hook`: where it came in.
#[inline(always)]
pub fn send<F: Steps + Wrap>(skb: &Skb, hook: u8) -> Result<i32, Dropped> {
    let Some(config) = maps::config() else { return Err(DropReason::NoFib.into()) };
    // What has to fit is the packet with its header. Nobody joins fragments of that one.
    parse::grow::<F>(F::WRAP_LEN);
    let Some((p, flow)) = parse::in_hand::<F>() else { return Err(DropReason::NoFib.into()) };
    let pod = flow.to.tuple.dst;
    let (action, verdict) = find_way::<F>(skb, p, flow, config).map_err(|dropped| Dropped {
        mtu: if dropped.reason == DropReason::FragNeeded { F::inner_mtu(dropped.mtu) } else { 0 },
        ..dropped
    })?;
    if flow.class == Class::New {
        admit::admit::<F>(skb, p, flow, config, source::OUTSIDE, skb.len(), hook)?;
    } else if flow.class == Class::Original {
        direct::follow::<F>(p);
    }
    let is_written = F::set_ttl(skb, p, action.ttl).is_ok()
        && rewrite::wrap::<F>(skb, p.ip_len, F::node(config), pod) == Encapsulated::Done;
    if !is_written {
        if flow.class == Class::New {
            F::forget();
        }
        return Err(DropReason::WriteError.into());
    }
    mark::set_processed(skb, config);
    match (action.target, action.peer) {
        // The device: a header of ours in front of another one is beyond `rewrite::encapsulate`.
        (Target::Tunnel, Some(peer)) => Ok(tunnel::send(skb, peer, 0, config)?),
        (Target::Tunnel, None) => Err(DropReason::WriteError.into()),
        _ => Ok(verdict),
    }
}

/// Finds the way of a packet from this node to the pod that the flow leads to, and the verdict of an armed redirect.
#[inline(always)]
fn find_way<F: Steps>(
    skb: &Skb,
    p: &Packet<F::A>,
    flow: &mut Flow<F::A>,
    config: &NodeConfig,
) -> Result<(Action, i32), Dropped> {
    let action = plan::plan::<F>(p, flow, Origin::External, config)?;
    if !matches!(action.target, Target::Tunnel | Target::Routed) {
        // The pod's address has come to this node: the next packet opens the flow again.
        F::forget();
        return Err(DropReason::NoFib.into());
    }
    // The kernel's rules may ask who sends.
    let client = flow.to.tuple.src;
    flow.to.tuple.src = F::node(config);
    let found = exec::resolve::<F>(skb, p, flow, action, Origin::External);
    flow.to.tuple.src = client;
    match found? {
        (Egress::Planned, verdict) => Ok((action, verdict)),
        _ => Err(DropReason::NoFib.into()),
    }
}

/// `direct_in`, for one family. The outer packet is the one in hand; `hook`: where it came in.
#[inline(always)]
pub fn receive<F: Steps + Wrap>(skb: &Skb, hook: u8) -> Result<i32, Dropped> {
    let (Some(config), Some(outer)) = (maps::config(), parse::enter::<F>()) else {
        return Err(DropReason::NoFib.into());
    };
    let (p, flow) = parse::packet::<F, _>(skb, ETH_LEN + F::WRAP_LEN as usize)?;
    let len = skb.len().wrapping_sub(F::WRAP_LEN);
    let flow = match p.kind {
        Kind::LinkLocal => return Err(DropReason::NdNotForwarded.into()),
        Kind::IcmpError => {
            F::verify_outside(p)?;
            let flow = icmp::relate::<F, _>(skb, p, flow, Reporter::Outside)?;
            if flow.class == Class::New {
                return Err(DropReason::IcmpUnrelated.into());
            }
            flow
        }
        Kind::Flow | Kind::LaterFragment => {
            let verify = || F::verify_client(p);
            let flow =
                conntrack::lookup_if::<F, _>(skb, p, flow, source::OUTSIDE, config, hook, len, verify, |_, _| true)?;
            let is_direct = flow.flags & flags::DIRECT != 0;
            if flow.class == Class::Original && (is_direct || flow.to.tuple.dst != outer.dst) {
                // This node has led the flow elsewhere, or the pod has come here since. The node that the client asks now has led it here.
                F::forget();
                flow.reset(&p.tuple);
            }
            if flow.class == Class::New {
                verify()?;
                F::translate_direct(p, flow, outer.dst.to_addr(), p.tuple.dst == outer.src).into_unit()?;
            }
            flow
        }
    };
    if !matches!(flow.class, Class::New | Class::Original | Class::Related) || flow.to.tuple.dst != outer.dst {
        return Err(DropReason::NoDirectBackend.into());
    }
    if p.ttl <= 1 {
        return Err(DropReason::TtlExceeded.into());
    }
    let egress = if flow.to.egress == 0 { route::local_pod(outer.dst) } else { flow.to.egress };
    if egress == NOT_LOCAL {
        return Err(DropReason::NoFib.into());
    }
    let ifindex = egress & !VIA_QDISC;
    let is_queued = egress & VIA_QDISC != 0;
    let verdict = if is_queued {
        match fib::redirect_inner_via_qdisc::<F>(skb, ifindex, &outer.dst, p.mtu_len)? {
            Fib::Redirect(verdict) => verdict,
            _ => return Err(DropReason::NoFib.into()),
        }
    } else {
        TO_STACK
    };
    let is_new = flow.class == Class::New;
    if is_new {
        admit::admit::<F>(skb, p, flow, config, source::OUTSIDE, len, hook)?;
    }
    if rewrite::translate::<F, _>(skb, p, flow, p.ttl - 1).is_err() || !rewrite::unwrap::<F>(skb) {
        if is_new {
            F::forget();
        }
        return Err(DropReason::WriteError.into());
    }
    if is_queued {
        mark::set_processed(skb, config);
        return Ok(verdict);
    }
    Ok(exec::redirect_peer(ifindex))
}
