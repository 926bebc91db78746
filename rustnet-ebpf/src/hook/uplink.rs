//! `uplink_in` and `uplink_out`: the node's own interface.
//!
//! In: answers to masqueraded flows, traffic routed straight to pods (native mode, neighbours of the cluster). Out: what
//! the host asks of a service; pods' traffic arrives here finished and marked.

use rustnet_common::conntrack::flags;
use rustnet_common::drop::{DropReason, hook};
use rustnet_common::tuple::proto;

use crate::ctx::{Ctx, Skb, config};
use crate::family::Family;
use crate::parse::{self, Kind};
use crate::step::conntrack::{self, Guard};
use crate::step::forward::{From, STACK, forward};
use crate::step::route::Way;
use crate::step::{Stop, icmp, lb, source};

/// A frame with a VLAN tag belongs to another device than the one we are attached to.
#[inline(always)]
fn foreign(skb: &Skb, l3: usize) -> bool {
    l3 != parse::ETH_LEN || (skb.vlan_present() != 0 && skb.vlan_tci() & 0xfff != 0)
}

/// The ingress hook, for one family.
#[inline(always)]
pub fn run_in<F: Family>(skb: &Skb, l3: usize) -> Result<i32, Stop> {
    let Some(config) = config() else { return Ok(STACK) };
    if foreign(skb, l3) {
        return Ok(STACK);
    }
    // Not ours to judge: fragments for the host, headers that its stack may well understand.
    let Ok(p) = parse::packet::<F>(skb, l3) else { return Ok(STACK) };
    if p.kind == Kind::Link {
        return if source::endpoint(p.tuple.dst).is_none() { Ok(STACK) } else { Err(DropReason::NdNotForwarded.into()) };
    }
    if p.tuple.proto == proto::UDP && p.tuple.dport == config.overlay_port {
        return Ok(STACK);
    }
    let guard = Guard::none(skb.ifindex());
    let verify = || source::verify_outside::<F>(p.tuple.src);
    let mut way = Way::unchanged(p.tuple);
    if p.kind == Kind::IcmpError {
        verify()?;
        if !icmp::translate::<F, _>(skb, p, &mut way.to)? {
            return Ok(STACK);
        }
    } else if !conntrack::lookup::<F, _>(skb, p, config, guard, &mut way, verify)? {
        if source::endpoint(p.tuple.dst).is_none() {
            if lb::is_vip::<F>(p.tuple.dst) {
                // The stack would send it back to where it came from, and round it would go.
                return Err(DropReason::IsClusterIp.into());
            }
            return Ok(STACK);
        }
        verify()?;
        let o = conntrack::begin::<F, _>(skb, p, guard)?;
        conntrack::open::<F>(skb, l3, hook::UPLINK_IN, o, config)?;
        way.to = o.half.to;
    }
    forward::<F>(skb, p, &way.to, config, From::Ingress, way.route::<F>())
}

/// The egress hook, for one family: the host's way to a service where no socket program translates it.
#[inline(always)]
pub fn run_out<F: Family>(skb: &Skb, l3: usize) -> Result<i32, Stop> {
    let Some(config) = config() else { return Ok(STACK) };
    if foreign(skb, l3) {
        return Ok(STACK);
    }
    let Ok(p) = parse::packet::<F>(skb, l3) else { return Ok(STACK) };
    if !matches!(p.kind, Kind::Flow | Kind::LaterFragment) || !lb::is_vip::<F>(p.tuple.dst) {
        return Ok(STACK);
    }
    let guard = Guard::none(skb.ifindex());
    let mut way = Way::unchanged(p.tuple);
    if !conntrack::lookup::<F, _>(skb, p, config, guard, &mut way, || Ok(()))? {
        let o = conntrack::begin::<F, _>(skb, p, guard)?;
        if !lb::select::<F>(&p.tuple, config, &mut o.half)? {
            return Ok(STACK);
        }
        o.half.flags |= flags::FROM_HOST;
        conntrack::open::<F>(skb, l3, hook::UPLINK_OUT, o, config)?;
        way.to = o.half.to;
    }
    forward::<F>(skb, p, &way.to, config, From::Egress, way.route::<F>())
}
