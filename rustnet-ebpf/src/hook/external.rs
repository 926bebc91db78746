//! `external_in`: flows from outside to Services, at node ports, load balancers' addresses and external IPs.
//!
//! `uplink_in`, `side_in` and `overlay_in` classify their packets, and jump here with those of such a flow, of either direction. The
//! packet and its flow stand in this CPU's scratch memory.

use rustnet_common::config::{self, NodeConfig};
use rustnet_common::conntrack::flags;

use super::{Steps, forward};
use crate::ctx::Skb;
use crate::family::Family;
use crate::maps;
use crate::outcome::Dropped;
use crate::packet::{Class, Flow, Kind, Packet, Source};
use crate::parse;
use crate::rewrite;
use crate::step::exec::TO_STACK;
use crate::step::icmp::{self, Reporter};
use crate::step::lb;
use crate::step::plan::Origin;
use crate::step::{conntrack, nat, source};
use crate::wire::tcp as bits;

/// The verdict on a packet that `external_in` goes on with: none of the kernel's.
pub const JUMP: i32 = i32::MAX - 1;

/// The program, for one family. `hook`: where the packet came in.
#[inline(always)]
pub fn run<F: Steps>(skb: &Skb, source: Source, hook: u8) -> Result<i32, Dropped> {
    let (Some(config), Some((p, flow))) = (maps::config(), parse::in_hand::<F>()) else { return Ok(TO_STACK) };
    if flow.class == Class::New {
        // The host's own ports may be node ports, too. What opens a TCP connection is no answer.
        if p.tcp_flags & (bits::SYN | bits::ACK) != bits::SYN && nat::is_answer_to_host::<F>(skb, &p.tuple) {
            return Ok(TO_STACK);
        }
        F::translate_external(p, flow).into_unit()?;
    }
    forward::<F>(skb, p, flow, source, Origin::External, config, hook)
}

/// True if a packet that no flow has asks for a Service at an address for clients outside.
#[inline(always)]
pub fn is_asked<F: Family>(p: &Packet<F::A>, config: &NodeConfig) -> bool {
    is_served(config) && lb::is_external::<F>(&p.tuple)
}

/// True if there are such Services.
#[inline(always)]
fn is_served(config: &NodeConfig) -> bool {
    config.flags & config::flags::EXTERNAL != 0
}

/// What this node's own stack sends to an address that is no VIP: answers of backends that use the host's network get the
/// Service's address back.
#[inline(always)]
pub fn answer<F: Steps>(
    skb: &Skb,
    p: &Packet<F::A>,
    flow: &'static mut Flow<F::A>,
    config: &NodeConfig,
) -> Result<i32, Dropped> {
    // What the stack forwards is not this host's: it says nothing of the flows that it looks like.
    let is_forwarded = skb.ingress_ifindex() != 0;
    if !is_served(config) || is_forwarded || p.kind == Kind::LinkLocal {
        return Ok(TO_STACK);
    }
    let flow = if p.kind == Kind::IcmpError {
        icmp::relate::<F, _>(skb, p, flow, Reporter::AnyHop)?
    } else {
        conntrack::lookup::<F, _>(skb, p, flow, source::HOST, config, || Ok(()))?
    };
    if flow.class != Class::New && flow.flags & flags::EXTERNAL != 0 {
        rewrite::translate::<F>(skb, p, flow, p.ttl)?;
    }
    Ok(TO_STACK)
}
