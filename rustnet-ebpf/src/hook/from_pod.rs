//! `from_pod`: TC ingress of a pod's host-side veth. Everything that a pod sends.
//!
//! A pod speaks as itself: with its own interface, MAC and address, in untagged IP frames, to unicast destinations. Its
//! neighbours are permanent, so that it needs neither ARP nor neighbour discovery.

use rustnet_common::addr::Address;
use rustnet_common::conntrack::flags;
use rustnet_common::drop::{DropReason, hook};

use super::{Steps, forward, verify_checksum};
use crate::ctx::Skb;
use crate::maps;
use crate::outcome::Dropped;
use crate::packet::{Class, Kind};
use crate::parse;
use crate::step::exec::TO_STACK;
use crate::step::icmp::Reporter;
use crate::step::plan::Origin;
use crate::step::{conntrack, icmp, source};

/// The hook, for one family.
#[inline(always)]
pub fn run<F: Steps>(skb: &Skb, l3: usize) -> Result<i32, Dropped> {
    let Some(config) = maps::config() else { return Ok(TO_STACK) };
    let (p, flow) = parse::packet::<F, _>(skb, l3)?;
    if p.kind == Kind::LinkLocal {
        return Err(DropReason::NdNotForwarded.into());
    }
    let source = source::of_pod(skb)?;
    let verify = || F::verify_pod(p, source);
    let flow = if p.kind == Kind::IcmpError {
        verify_destination(p.tuple.dst)?;
        verify()?;
        let flow = icmp::relate::<F, _>(skb, p, flow, Reporter::Receiver)?;
        if flow.class == Class::New {
            return Err(DropReason::IcmpUnrelated.into());
        }
        flow
    } else {
        let flow = conntrack::lookup::<F, _>(skb, p, flow, source, config, hook::FROM_POD, verify)?;
        if flow.class == Class::New {
            // Known flows have none of these destinations.
            verify_destination(p.tuple.dst)?;
            verify()?;
            F::translate_new(p, flow).into_unit()?;
        }
        flow
    };
    // It may answer what netfilter translated, or be an error about it: a published port, a proxy's rule. Where we translated, too,
    // it is ours.
    if flow.class != Class::Original && flow.flags & (flags::VIA_STACK | flags::NAT) == flags::VIA_STACK {
        verify_checksum::<F>(skb, p, false)?;
        return Ok(TO_STACK);
    }
    forward::<F>(skb, p, flow, source, Origin::Pod, config, hook::FROM_POD)
}

#[inline(always)]
fn verify_destination<A: Address>(dst: A) -> Result<(), DropReason> {
    if dst.is_link_scope() {
        return Err(DropReason::NdNotForwarded);
    }
    if dst.is_martian_destination() { Err(DropReason::Martian) } else { Ok(()) }
}
