//! `from_pod`: TC ingress of a pod's host-side veth. Everything that a pod sends.
//!
//! Known flow: one look-up of the connection table, then on its way. New flow: anti-spoof, service, masquerade, open.

use rustnet_common::addr::Address;
use rustnet_common::config::{self, NodeConfig};
use rustnet_common::conntrack::{CtEntry, flags};
use rustnet_common::drop::{DropReason, hook};
use rustnet_common::peer;
use rustnet_common::tuple::{Tuple, proto};

use crate::ctx::{Skb, config};
use crate::family::Family;
use crate::parse::{self, Kind, Packet};
use crate::step::conntrack::{self, Opening};
use crate::step::forward::{From, STACK, forward};
use crate::step::route::{self, Route, Way};
use crate::step::{Packed, Stop, icmp, lb, source};

/// The hook, for one family.
#[inline(always)]
pub fn run<F: Family>(skb: &Skb, l3: usize) -> Result<i32, Stop> {
    let Some(config) = config() else { return Ok(STACK) };
    let p = parse::packet::<F>(skb, l3)?;
    if p.tuple.dst.is_link_scope() {
        // The stack answers what concerns the link, and never forwards it.
        return Ok(STACK);
    }
    let guard = source::pod_guard(skb)?;
    let verify = || source::verify_pod::<F>(p.tuple.src, guard);
    let mut way = Way::unchanged(p.tuple);
    let flow = matches!(p.kind, Kind::Flow | Kind::LaterFragment);
    let mut known = flow && conntrack::lookup::<F, _>(skb, p, config, guard, &mut way, verify)?;
    if !known {
        verify()?;
        if flow {
            let o = conntrack::begin::<F, _>(skb, p, guard)?;
            lead::<F>(p, config, o).done()?;
            // Not from within `lead`: kernels that round frames up to 32 bytes (6.1) would count more than 512 of them.
            conntrack::open::<F>(skb, p.l3(), hook::FROM_POD, o, config)?;
            way = Way { to: o.half.to, out: o.half.out };
        } else if p.kind == Kind::IcmpError {
            known = icmp::translate::<F, _>(skb, p, &mut way.to)?;
        }
    }
    let route = way.route::<F>();
    match (p.kind, &route) {
        // The stack may have asked with an address of its own, but it would forward the rest.
        (Kind::Link, Route::Pod(_) | Route::Tunnel(_) | Route::Direct | Route::World) => {
            Err(DropReason::NdNotForwarded.into())
        }
        // Nobody out there could tell what an error about an untranslated packet is about.
        (Kind::IcmpError, Route::World) if !known => Err(DropReason::IcmpUnrelated.into()),
        _ => forward::<F>(skb, p, &way.to, config, From::Ingress, route),
    }
}

/// Where a new flow is to be led: to a backend, out in the node's name, or where it asks for.
#[inline(never)]
fn lead<F: Family>(p: &Packet<F::A>, config: &NodeConfig, o: &mut Opening<F::A>) -> Packed {
    Packed::new(try_lead::<F>(p, config, &mut o.half).map(|()| 0).map_err(Stop::from))
}

#[inline(always)]
fn try_lead<F: Family>(p: &Packet<F::A>, config: &NodeConfig, half: &mut CtEntry<F::A>) -> Result<(), DropReason> {
    if lb::select::<F>(&p.tuple, config, half)? && half.to.dst == half.to.src {
        // A pod would not accept a packet from its own address: the node's stands in for it.
        half.to.src = F::node(config);
        half.flags |= flags::HAIRPIN;
    }
    half.out = route::pod(half.to.dst);
    match (Way { to: half.to, out: half.out }).route::<F>() {
        Route::World if config.flags & config::flags::MASQUERADE != 0 => {
            half.to.src = F::node(config);
            half.flags |= flags::MASQ;
        }
        Route::Stack | Route::Direct | Route::Tunnel(_) if tunnels::<F>(&half.to, config) => {
            return Err(DropReason::EncapProhibited);
        }
        _ => {}
    }
    Ok(())
}

/// True for what a node would take for a tunnel packet.
#[inline(always)]
fn tunnels<F: Family>(to: &Tuple<F::A>, config: &NodeConfig) -> bool {
    to.proto == proto::UDP
        && to.dport == config.overlay_port
        && route::peer::<F>(to.dst).is_some_and(|p| p.flags & (peer::flags::HOST | peer::flags::NODE) != 0)
}
