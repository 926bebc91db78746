//! `overlay_in` and `overlay_out`: the VXLAN device.
//!
//! In: packets of other nodes and of their pods; the far end of the tunnel must be the node that owns the inner source.
//! Out: what the host's stack routes to other nodes' pods gets its tunnel; pods' traffic arrives here finished and marked.

use rustnet_common::addr::{Addr, Address};
use rustnet_common::conntrack::ELSEWHERE;
use rustnet_common::drop::{DropReason, hook};
use rustnet_common::peer::flags;

use crate::ctx::{Ctx, Skb, config};
use crate::family::Family;
use crate::parse::{self, Kind};
use crate::step::conntrack;
use crate::step::forward::{From, STACK, forward, set_tunnel};
use crate::step::route::{self, Route, Way};
use crate::step::{Stop, icmp, source};

/// The ingress hook, for one family. `remote` is the tunnel's far end.
#[inline(always)]
pub fn run_in<F: Family>(skb: &Skb, l3: usize, remote: &Addr) -> Result<i32, Stop> {
    let Some(config) = config() else { return Ok(STACK) };
    let p = parse::packet::<F>(skb, l3)?;
    if p.kind == Kind::Link || p.tuple.dst.is_link_scope() {
        return Err(DropReason::UnknownSender.into());
    }
    let guard = source::tunnel_guard(skb.ifindex(), remote);
    let verify = || source::verify_tunnel::<F>(p.tuple.src, remote);
    let mut way = Way::unchanged(p.tuple);
    if p.kind == Kind::IcmpError {
        verify()?;
        icmp::translate::<F, _>(skb, p, &mut way.to)?;
    } else if !conntrack::lookup::<F, _>(skb, p, config, guard, &mut way, verify)? {
        verify()?;
        // What is for the host's own stack needs no connection of ours.
        if source::endpoint(p.tuple.dst).is_some() {
            let o = conntrack::begin::<F, _>(skb, p, guard)?;
            conntrack::open::<F>(skb, l3, hook::OVERLAY_IN, o, config)?;
            way.to = o.half.to;
        }
    }
    forward::<F>(skb, p, &way.to, config, From::Ingress, inwards::<F>(&way))
}

/// What comes out of the tunnel is for a pod of this node or for its stack: never back into the tunnel.
#[inline(always)]
fn inwards<F: Family>(way: &Way<F::A>) -> Route {
    match way.pod() {
        ELSEWHERE => Route::Stack,
        ifindex => Route::Pod(ifindex),
    }
}

/// The egress hook, for one family.
#[inline(always)]
pub fn run_out<F: Family>(skb: &Skb, l3: usize) -> Result<i32, Stop> {
    let Some(config) = config() else { return Ok(STACK) };
    let p = parse::packet::<F>(skb, l3)?;
    if p.tuple.dst.is_link_scope() {
        // The device's own multicast listener reports: without a tunnel they go nowhere.
        return Ok(STACK);
    }
    match route::peer::<F>(p.tuple.dst) {
        Some(peer) if peer.flags & flags::TUNNEL != 0 => {
            if set_tunnel(skb, &peer.node, config) {
                Ok(STACK)
            } else {
                Err(DropReason::WriteError.into())
            }
        }
        _ => Err(DropReason::NoFib.into()),
    }
}
