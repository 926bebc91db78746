//! `uplink_xdp`: packets of known flows from outside to Services that this node sends back by the device that they came in by, before
//! the kernel makes an skb of them. Backends behind the overlay are among them: its headers come and go here, too.
//!
//! All else passes unchanged and uncounted to `uplink_in`, which decides as if this program were not there: new flows, fragments, what
//! is for this node or a pod of it, what has to take the overlay's device, what is to be refused. So each packet is counted once, and nothing
//! is refused here.

use rustnet_common::addr::{Addr, Address, Ip4, Ip6};
use rustnet_common::config::{self, NodeConfig};
use rustnet_common::conntrack::{CtEntry, NOT_LOCAL, flags};
use rustnet_common::drop::{DropReason, hook};
use rustnet_common::hash;
use rustnet_common::peer;
use rustnet_common::tuple::proto;

use super::tunnel::{self, Outer, Outside};
use crate::ctx::{Ctx, at};
use crate::event::Report;
use crate::family::{V4, V6};
use crate::maps::{self, Leaving};
use crate::packet::{Class, Flow, Kind, Packet, Translation};
use crate::parse::{self, Parse};
use crate::rewrite::{self, Encap, Encapsulated, Rewrite};
use crate::step::conntrack::{self, Track};
use crate::step::plan::{self, Origin, Target};
use crate::step::source::{self, Verify};
use crate::step::tunnel::Tunnel;
use crate::step::{nexthop, turn};
use crate::wire::{ETH_LEN, ETH_P_IP, ETH_P_IPV6};
use crate::xdp::Xdp;

/// Everything that the program asks of a family.
pub trait Forward: Parse<Xdp> + Track + Report + Verify + Rewrite<Xdp> + Outer {}
impl<F: Parse<Xdp> + Track + Report + Verify + Rewrite<Xdp> + Outer> Forward for F {}

/// True if a frame may come out of a tunnel: then `outside` has what its headers say. False for others, and for those that pass.
#[inline(always)]
pub fn read_tunnel<F: Forward>(xdp: &Xdp, config: &NodeConfig, outside: &mut Outside) -> bool {
    let has_tunnel = config.overlay != 0 && config.flags & config::flags::ENCAPSULATE != 0;
    // A mark of congestion is the device's to hand on.
    has_tunnel && tunnel::read::<F, _>(xdp, config, outside) && outside.congested == 0
}

/// The program, for one family: true if the frame goes back by its device, false if it passes. `overhead`: the bytes in front of the packet
/// that are not the Ethernet header's, 0 for a packet out of no tunnel; `remote`: the tunnel's far end.
///
/// # Errors
/// A header that was read before cannot be written.
#[inline(always)]
pub fn run<F: Forward>(xdp: &Xdp, overhead: u32, remote: Addr) -> Result<bool, DropReason> {
    let Some(config) = maps::config() else { return Ok(false) };
    let Ok((p, flow)) = parse::packet::<F, _>(xdp, ETH_LEN + overhead as usize) else { return Ok(false) };
    let has_ports = matches!(p.tuple.proto, proto::TCP | proto::UDP);
    if !has_ports || p.kind != Kind::Flow || p.is_first_fragment() {
        return Ok(false);
    }
    let tunnel = Tunnel { remote, id: config.vni };
    let is_tunneled = overhead != 0;
    let source = if is_tunneled { source::of_tunnel(&tunnel) } else { source::OUTSIDE };
    let verify = || if is_tunneled { source::verify_tunnel::<F>(p.tuple.src, &tunnel) } else { F::verify_outside(p) };
    let takes = |entry: &CtEntry<F::A>, receiver: u32| {
        let has_way = find_way::<F>(xdp, p, entry, receiver);
        // What comes by another device than the one that leads to its sender is for the kernel to judge, as in `tunnel_in`.
        has_way && (!is_tunneled || nexthop::interface_to(xdp, &tunnel.remote) == xdp.ifindex())
    };
    let len = xdp.len().wrapping_sub(overhead);
    let found = conntrack::lookup_if::<F, _>(xdp, p, flow, source, config, hook::UPLINK_XDP, len, verify, takes);
    let (Ok(flow), Some(leaving)) = (found, leaving::<F>()) else { return Ok(false) };
    if flow.class == Class::New {
        // There is none, or it was over.
        return Ok(false);
    }
    let has_tunnel = leaving.node != Addr::UNSPECIFIED;
    rewrite::translate::<F, _>(xdp, p, flow, leaving.ttl)?;
    if is_tunneled && !rewrite::decapsulate(xdp, overhead, 0, false) {
        return Err(DropReason::WriteError);
    }
    if has_tunnel {
        encapsulate(xdp, &leaving.node, leaving.hash, config)?;
    }
    rewrite::set_macs(xdp, &leaving.macs)?;
    Ok(true)
}

/// How the packet in hand leaves.
#[inline(always)]
fn leaving<F: Forward>() -> Option<&'static mut Leaving<F::A>> {
    // SAFETY: the element belongs to this CPU, programs of one CPU do not interrupt each other, and there is one borrow of the field at a
    // time: `find_way` has returned when `run` takes its own.
    F::scratch().map(|scratch| unsafe { &mut (*scratch).leaving })
}

/// Writes the headers of the tunnel to a node.
#[inline(always)]
fn encapsulate(xdp: &Xdp, node: &Addr, hash: u16, config: &NodeConfig) -> Result<(), DropReason> {
    let words = node.words();
    let (done, ethertype) = if node.is_v4() {
        let (id, to) = (nexthop::identification(xdp, node), Ip4::from_word(words[3]));
        (rewrite::encapsulate::<V4, _>(xdp, config.node4, to, hash, id, config), ETH_P_IP)
    } else {
        (rewrite::encapsulate::<V6, _>(xdp, config.node6, Ip6::from_words(words), hash, 0, config), ETH_P_IPV6)
    };
    if done == Encapsulated::Done { rewrite::set_ethertype(xdp, ethertype) } else { Err(DropReason::WriteError) }
}

/// Finds the way of a packet of a known flow, if it is one that this program sends. A function of its own for the sake of its stack frame.
#[inline(never)]
fn find_way<F: Forward>(xdp: &Xdp, p: &Packet<F::A>, entry: &CtEntry<F::A>, receiver: u32) -> bool {
    const KIND: u16 = flags::EXTERNAL | flags::NAT;
    let (Some(config), Some(leaving)) = (maps::config(), leaving::<F>()) else { return false };
    if entry.flags & (KIND | flags::DIRECT) != KIND || receiver != NOT_LOCAL {
        return false;
    }
    if p.ttl <= 1 {
        return false;
    }
    let hash = hash::flow(&p.tuple, config.seed);
    let to = Translation { tuple: entry.to, egress: receiver };
    leaving.flow = Flow {
        class: Class::Original,
        is_vacant: false,
        is_audited: false,
        flags: entry.flags,
        backend: entry.backend,
        to,
    };
    let Some((turn, is_known)) = turn::find(xdp, &leaving.flow.to.tuple, hash, config) else { return false };
    if !is_known {
        let Ok(action) = plan::plan::<F>(p, &leaving.flow, Origin::External, config) else { return false };
        leaving.node = Addr::UNSPECIFIED;
        let mtu = match (action.target, action.peer) {
            (Target::Routed, _) => turn::ask::<F>(xdp, leaving, p.tuple.sport.into()),
            // What the stack of a node gets has few source ports, which TC counts.
            (Target::Tunnel, Some(peer)) if peer.flags & peer::flags::NODE == 0 => {
                let Some(hop) = nexthop::to(xdp, &peer.node, hash) else { return false };
                let overhead = if peer.node.is_v4() { V4::OVERHEAD } else { V6::OVERHEAD };
                if hop.ifindex != xdp.ifindex() || hop.mtu < overhead {
                    return false;
                }
                (leaving.macs, leaving.node) = (hop.fib.macs, peer.node);
                let room = hop.mtu - overhead;
                if room < config.overlay_mtu { room } else { config.overlay_mtu }
            }
            _ => return false,
        };
        if turn::is_probe(&leaving.macs, config) {
            return false;
        }
        turn.set(xdp, &leaving.flow.to.tuple, &leaving.macs, mtu, &leaving.node);
    }
    (leaving.macs, leaving.node, leaving.hash, leaving.ttl) = (turn.macs, turn.node, hash as u16, p.ttl - 1);
    // One tunnel leads into another by way of the device alone. What the settings say counts at once: there may be IPsec policies.
    let may_encapsulate = p.l3() == ETH_LEN && config.flags & config::flags::ENCAPSULATE != 0;
    let has_tunnel = leaving.node != Addr::UNSPECIFIED;
    // What lies behind the packet goes into the tunnel with it.
    let len = if has_tunnel { xdp.len().wrapping_sub(ETH_LEN as u32) } else { p.ip_len };
    if len > turn.mtu || (has_tunnel && !may_encapsulate) {
        return false;
    }
    // What others hear on the wire is not for this node.
    let [a, b, c, ..] = leaving.macs;
    // SAFETY: `at` proved the bytes.
    at::<[u16; 3], _>(xdp, 0).is_some_and(|to| unsafe { to.read() } == [a, b, c])
}
