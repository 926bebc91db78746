//! `uplink_xdp`: packets of known flows from outside to Services that this node sends back by the device that they came in by, before
//! the kernel makes an skb of them.
//!
//! All else passes unchanged and uncounted to `uplink_in`, which decides as if this program were not there: new flows, fragments, what
//! is for this node or a pod of it, what takes the overlay, what is to be refused. So each packet is counted once, and nothing is
//! dropped here.

use rustnet_common::config::{self, NodeConfig};
use rustnet_common::conntrack::{CtEntry, NOT_LOCAL, flags};
use rustnet_common::drop::DropReason;
use rustnet_common::tuple::proto;

use crate::ctx::{Ctx, at};
use crate::maps;
use crate::packet::{Class, Flow, Kind, Packet, Translation};
use crate::parse::{self, Parse};
use crate::rewrite::{self, Rewrite};
use crate::step::conntrack::{self, Track};
use crate::step::fib;
use crate::step::plan::{self, Origin, Target};
use crate::step::source::{self, Verify};
use crate::wire::ETH_LEN;
use crate::xdp::Xdp;

/// Everything that the program asks of a family.
pub trait Forward: Parse<Xdp> + Track + Verify + Rewrite<Xdp> {}
impl<F: Parse<Xdp> + Track + Verify + Rewrite<Xdp>> Forward for F {}

/// How a packet leaves.
struct Way {
    /// MACs of the frame: the sender's, then the receiver's.
    macs: &'static [u16; 6],
    ttl: u8,
}

/// The program, for one family: true if the frame goes back by its device, false if it passes.
///
/// # Errors
/// A header that was read before cannot be written.
#[inline(always)]
pub fn run<F: Forward>(xdp: &Xdp) -> Result<bool, DropReason> {
    let Some(config) = maps::config() else { return Ok(false) };
    if config.flags & config::flags::EXTERNAL == 0 {
        return Ok(false);
    }
    let Ok((p, flow)) = parse::packet::<F, _>(xdp, ETH_LEN) else { return Ok(false) };
    let has_ports = matches!(p.tuple.proto, proto::TCP | proto::UDP);
    if !has_ports || p.kind != Kind::Flow || p.is_first_fragment() {
        return Ok(false);
    }
    let mut way = None;
    let takes = |entry: &CtEntry<F::A>, receiver: u32| {
        way = find_way::<F>(xdp, p, entry, receiver, config);
        way.is_some()
    };
    let verify = || F::verify_outside(p);
    let found = conntrack::lookup_if::<F, _>(xdp, p, flow, source::OUTSIDE, config, xdp.len(), verify, takes);
    let (Ok(flow), Some(way)) = (found, way) else { return Ok(false) };
    if flow.class == Class::New {
        // The connection was over.
        return Ok(false);
    }
    rewrite::translate::<F, _>(xdp, p, flow, way.ttl)?;
    rewrite::set_macs(xdp, way.macs)?;
    Ok(true)
}

/// The way of a packet of a known flow, if it is one that this program sends.
#[inline(always)]
fn find_way<F: Forward>(
    xdp: &Xdp,
    p: &Packet<F::A>,
    entry: &CtEntry<F::A>,
    receiver: u32,
    config: &NodeConfig,
) -> Option<Way> {
    const KIND: u16 = flags::EXTERNAL | flags::NAT;
    if entry.flags & KIND != KIND || receiver != NOT_LOCAL {
        return None;
    }
    let to = Translation { tuple: entry.to, egress: receiver };
    let flow = Flow { class: Class::Original, is_vacant: false, flags: entry.flags, backend: entry.backend, to };
    let action = plan::plan::<F>(p, &flow, Origin::External, config).ok()?;
    if action.target != Target::Routed {
        return None;
    }
    let macs = fib::turn_back::<F, _>(xdp, &flow, p.tuple.sport, p.ip_len)?;
    // What others hear on the wire is not for this node.
    let [a, b, c, ..] = *macs;
    let to = at::<[u16; 3], _>(xdp, 0)?;
    // SAFETY: `at` proved the bytes.
    (unsafe { to.read() } == [a, b, c]).then_some(Way { macs, ttl: action.ttl })
}
