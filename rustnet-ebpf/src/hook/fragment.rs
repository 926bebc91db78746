//! `fragment_in`: later fragments whose first has not come before them. `from_pod`, `uplink_in` and `overlay_in` jump here.
//!
//! They have no ports, so that no flow is theirs. Between pods, and from outside to a pod, nothing is translated as a rule, and their
//! addresses lead them on: the receiver puts the datagram together, whichever piece comes first. All others are dropped. The answer of a
//! Service's backend is dropped by its receiver, since the piece with the ports comes from the Service's address.

use rustnet_common::conntrack::NOT_LOCAL;
use rustnet_common::drop::{DropReason, hook};
use rustnet_common::peer::{Peer, flags};

use super::{Steps, forward};
use crate::ctx::Skb;
use crate::family::Family;
use crate::maps;
use crate::outcome::Dropped;
use crate::packet::Class;
use crate::parse;
use crate::step::plan::Origin;
use crate::step::tunnel::{self, Tunnel};
use crate::step::{policy, route, source};

/// Sets the hook that the packet in hand came in by.
#[inline(always)]
pub fn set_hook<F: Family>(hook: u8) {
    if let Some(scratch) = F::scratch() {
        // SAFETY: the element belongs to this CPU, and TC programs do not interrupt each other.
        unsafe { (*scratch).hook = hook };
    }
}

/// The hook that [`set_hook`] has set.
#[inline(always)]
pub fn hook_of<F: Family>() -> u8 {
    // SAFETY: see `set_hook`.
    F::scratch().map_or(hook::UPLINK_IN, |scratch| unsafe { (*scratch).hook })
}

/// The program, for one family. The packet is the one in hand; `hook`: where it came in.
///
/// # Errors
/// [`DropReason::FragNotFound`]: it is not for a pod, or could write over a transport header. Else as for any packet of its hook.
#[inline(always)]
pub fn run<F: Steps>(skb: &Skb, hook: u8) -> Result<i32, Dropped> {
    let (Some(config), Some((p, flow))) = (maps::config(), parse::in_hand::<F>()) else {
        return Err(DropReason::FragNotFound.into());
    };
    flow.reset(&p.tuple);
    flow.to.egress = route::local_pod(p.tuple.dst);
    let is_pod = |it: &Peer| it.flags & (flags::POD | flags::NODE) == flags::POD;
    let is_for_pod = || flow.to.egress != NOT_LOCAL || F::peer(p.tuple.dst).is_some_and(is_pod);
    // Of IPv6, the protocol may stand in the piece that is missing.
    if p.offset < parse::TCP_HEADER || !is_for_pod() {
        return Err(DropReason::FragNotFound.into());
    }
    let (source, origin) = match hook {
        hook::FROM_POD => {
            let source = source::of_pod(skb)?;
            F::verify_pod(p, source)?;
            (source, Origin::Pod)
        }
        hook::OVERLAY_IN => {
            let mut from = Tunnel::NONE;
            tunnel::read(skb, &mut from);
            if from.id != config.vni {
                return Err(DropReason::UnknownSender.into());
            }
            source::verify_tunnel::<F>(p.tuple.src, &from)?;
            (source::of_tunnel(&from), Origin::Tunnel)
        }
        _ => {
            F::verify_outside(p)?;
            (source::OUTSIDE, Origin::Uplink)
        }
    };
    // It has neither a flow that was judged nor ports: only rules for all protocols can allow it.
    if policy::verify(p.tuple.src, p.tuple.dst, 0, 0, 0)? {
        F::report(skb, p.l3(), DropReason::PolicyAudited as u8, hook);
    }
    // It opens no connection, and nothing may look one up: a packet that the parser has refused has no key.
    flow.class = Class::Original;
    forward::<F>(skb, p, flow, source, origin, config, hook)
}
