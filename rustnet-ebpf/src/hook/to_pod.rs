//! `to_pod`: TC egress of a pod's host-side veth. What this node's own stack sends to a pod: probes, host processes, the
//! answers of host-network backends, and whatever the kernel forwarded by itself.

use rustnet_common::addr::Address;
use rustnet_common::conntrack::flags;
use rustnet_common::drop::hook;
use rustnet_common::peer;

use crate::ctx::{Ctx, Skb, config};
use crate::family::Family;
use crate::parse::{self, Kind};
use crate::rewrite;
use crate::step::conntrack::{self, Guard};
use crate::step::forward::STACK;
use crate::step::route::{self, Way};
use crate::step::{Stop, icmp};

/// The hook, for one family.
#[inline(always)]
pub fn run<F: Family>(skb: &Skb, l3: usize) -> Result<i32, Stop> {
    let Some(config) = config() else { return Ok(STACK) };
    let p = parse::packet::<F>(skb, l3)?;
    if p.tuple.dst.is_link_scope() {
        return Ok(STACK);
    }
    let mut way = Way::unchanged(p.tuple);
    match p.kind {
        Kind::Link => return Ok(STACK),
        Kind::IcmpError => {
            icmp::translate::<F, _>(skb, p, &mut way.to)?;
            rewrite::translate::<F>(skb, p, &way.to, p.ttl)?;
            return Ok(STACK);
        }
        Kind::Flow | Kind::LaterFragment => {}
    }
    let guard = Guard::none(skb.ifindex());
    if !conntrack::lookup::<F, _>(skb, p, config, guard, &mut way, || Ok(()))? {
        let o = conntrack::begin::<F, _>(skb, p, guard)?;
        if route::peer::<F>(p.tuple.src).is_some_and(|p| p.flags & peer::flags::HOST != 0) {
            o.half.flags |= flags::FROM_HOST;
        }
        conntrack::open::<F>(skb, l3, hook::TO_POD, o, config)?;
        // A collision may have cost the flow its source port.
        way.to = o.half.to;
    }
    rewrite::translate::<F>(skb, p, &way.to, p.ttl)?;
    Ok(STACK)
}
