//! `external_in`: flows from outside to Services, at node ports, load balancers' addresses and external IPs.
//!
//! `uplink_in`, `side_in` and `overlay_in` classify their packets, and jump here with those of such a flow, of either direction. The
//! packet and its flow stand in this CPU's scratch memory.

use aya_ebpf::bindings::__sk_buff;
use rustnet_common::config::{self, NodeConfig};
use rustnet_common::conntrack::{NOT_LOCAL, flags};
use rustnet_common::drop::hook::UPLINK_OUT;

use super::{Steps, direct, forward};
use crate::ctx::{Ctx, Skb};
use crate::family::{Family, V4, V6};
use crate::maps;
use crate::outcome::{Dropped, PackedResult};
use crate::packet::{Class, Flow, Kind, Packet, Source};
use crate::parse;
use crate::rewrite;
use crate::step::exec::TO_STACK;
use crate::step::host_port::HostPorts;
use crate::step::icmp::{self, Reporter};
use crate::step::lb;
use crate::step::plan::Origin;
use crate::step::table::{self, Placed};
use crate::step::{conntrack, nat, route, source};
use crate::wire::tcp as bits;

/// The verdict on a packet that `external_in` goes on with: none of the kernel's.
pub const JUMP: i32 = i32::MAX - 1;

/// The verdict on a packet of this node's own stack that [`Answer::answer`] goes on with: none of the kernel's.
pub const ANSWER: i32 = i32::MAX - 2;

/// The program, for one family. `hook`: where the packet came in.
#[inline(always)]
pub fn run<F: Steps>(skb: &Skb, source: Source, hook: u8) -> Result<i32, Dropped> {
    let (Some(config), Some((p, flow))) = (maps::config(), parse::in_hand::<F>()) else { return Ok(TO_STACK) };
    if flow.class == Class::New {
        // The host's own ports may be node ports, too. What opens a TCP connection is no answer.
        if p.tcp_flags & (bits::SYN | bits::ACK) != bits::SYN && nat::is_answer_to_host::<F>(skb, &p.tuple) {
            parse::remember_ports::<F>(p, skb.ifindex());
            return Ok(TO_STACK);
        }
        F::translate_external(p, flow).into_unit()?;
        if flow.flags & flags::DIRECT != 0 {
            return Ok(direct::SEND);
        }
        let is_for_host = flow.flags & flags::MASQ == 0 && flow.to.egress == NOT_LOCAL;
        if is_for_host && nat::is_answer_to_host::<F>(skb, &flow.to.tuple) {
            // The backend is a process of this node that the client has asked itself, from the same port.
            flow.flags |= flags::MASQ;
            flow.to.tuple.sport = 0;
        }
    } else if flow.flags & flags::DIRECT != 0 {
        return Ok(direct::SEND);
    }
    forward::<F>(skb, p, flow, source, Origin::External, config, hook)
}

/// True if a packet that no flow has asks for a Service at an address for clients outside, or for a pod's port of this node. The CNI
/// binary gives pods their ports while no agent may live: no setting says whether there are any.
#[inline(always)]
pub fn is_asked<F: HostPorts>(p: &Packet<F::A>, config: &NodeConfig) -> bool {
    is_service_asked::<F>(p, config) || F::is_host_port(p)
}

/// True if a packet that no flow has asks this node itself, and the answers would be taken for those of a flow to a Service: it needs a
/// flow of its own, with another source port. Only where a program sees the answers.
#[inline(always)]
pub fn is_rival<F: Placed>(p: &Packet<F::A>, flow: &Flow<F::A>) -> bool {
    // A flow that was forgotten a moment ago leaves its place free, and the look-up before does not say so.
    let may_have = !flow.is_vacant || table::is_ever_contested();
    let has_other = || may_have && F::place(&p.key, p.is_swapped).is_contested;
    p.is_flow() && has_other() && route::is_host::<F>(p.tuple.dst)
}

/// True if a packet asks for a Service at an address for clients outside.
#[inline(always)]
pub fn is_service_asked<F: Family>(p: &Packet<F::A>, config: &NodeConfig) -> bool {
    is_served(config) && lb::is_external::<F>(&p.tuple)
}

/// True if there are such Services.
#[inline(always)]
fn is_served(config: &NodeConfig) -> bool {
    config.flags & config::flags::EXTERNAL != 0
}

/// What this node's own stack sends, in one family.
pub trait Answer: Steps {
    /// Gives an answer of a backend that uses the host's network the Service's address back. All else stays as it is. The packet is
    /// the one in hand.
    fn answer(skb: &Skb) -> PackedResult;
}

/// Declares a family's function with global linkage: the verifier looks at it once, not once for each path that leads there.
macro_rules! global {
    ($family:ident, $name:ident) => {
        impl Answer for $family {
            #[inline(always)]
            fn answer(skb: &Skb) -> PackedResult {
                PackedResult::from_bits($name(skb.raw()))
            }
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $name(skb: *mut __sk_buff) -> u64 {
            PackedResult::new(answer::<$family>(&Skb(skb)).map(|()| TO_STACK)).bits()
        }
    };
}

global!(V4, rn_answer4);
global!(V6, rn_answer6);

#[inline(always)]
fn answer<F: Steps>(skb: &Skb) -> Result<(), Dropped> {
    let (Some(config), Some((p, flow))) = (maps::config(), parse::in_hand::<F>()) else { return Ok(()) };
    let flow = if p.kind == Kind::IcmpError {
        icmp::relate::<F, _>(skb, p, flow, Reporter::AnyHop)?
    } else {
        conntrack::lookup::<F, _>(skb, p, flow, source::HOST, config, UPLINK_OUT, || Ok(()))?
    };
    if flow.class != Class::New && flow.flags & flags::EXTERNAL != 0 {
        rewrite::translate::<F, _>(skb, p, flow, p.ttl)?;
    }
    Ok(())
}

/// The verdict on a packet that may be such an answer: [`ANSWER`], else that of the kernel's stack.
#[inline(always)]
pub fn may_answer<A>(skb: &Skb, p: &Packet<A>, config: &NodeConfig) -> i32 {
    // What the stack forwards is not this host's: it says nothing of the flows that it looks like.
    let is_forwarded = skb.ingress_ifindex() != 0;
    if !is_served(config) || is_forwarded || p.kind == Kind::LinkLocal { TO_STACK } else { ANSWER }
}
