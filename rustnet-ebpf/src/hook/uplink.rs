//! `uplink_in` and `uplink_out`: devices towards other nodes and the world. `side_in`: this host's other devices with addresses.
//!
//! In: answers to masqueraded flows, traffic routed straight to pods (native mode, neighbours of the cluster). Out: what
//! the host asks of a service; pod traffic reaches this hook already translated and carries the processed mark.

use rustnet_common::addr::Address;
use rustnet_common::config::NodeConfig;
use rustnet_common::conntrack::flags;
use rustnet_common::drop::{DropReason, hook};
use rustnet_common::service::scope;
use rustnet_common::tuple::proto;

use super::{Steps, direct, external, forward};
use crate::ctx::{Ctx, Skb};
use crate::event::{Recording, Report};
use crate::family::Family;
use crate::maps;
use crate::outcome::Dropped;
use crate::packet::{Class, Flow, Kind, Packet};
use crate::parse::{self, Parse, Parsed};
use crate::step::conntrack::{self, Track};
use crate::step::exec::TO_STACK;
use crate::step::host_port::HostPorts;
use crate::step::icmp::Reporter;
use crate::step::lb::{self, Vip};
use crate::step::plan::Origin;
use crate::step::source::{self, Verify};
use crate::step::{icmp, route};
use crate::wire::tcp as bits;

/// The ingress hook, for one family.
#[inline(always)]
pub fn run_in<F: Steps>(skb: &Skb, l3: usize) -> Result<i32, Dropped> {
    let Some(config) = maps::config() else { return Ok(TO_STACK) };
    if is_vlan_tagged(skb) {
        return Ok(TO_STACK);
    }
    let Some((p, flow)) = parse_in::<F, _>(skb, l3)? else { return Ok(TO_STACK) };
    if F::is_wrapped(skb, p) {
        F::verify_outside(p)?;
        return Ok(direct::RECEIVE);
    }
    let relate = |flow| {
        let is_for_pod = || route::is_local_pod(p.tuple.dst);
        if lb::is_cluster_ip::<F>(p.tuple.dst) {
            // No packet on a wire has such a source, so that no error about one comes from there.
            return Err(DropReason::IsClusterIp.into());
        }
        match F::verify_outside(p) {
            Ok(()) => {}
            // Link-local routers speak so to the host.
            Err(DropReason::Martian) if !is_for_pod() => return Ok(None),
            Err(reason) => return Err(reason.into()),
        }
        let flow = icmp::relate::<F, _>(skb, p, flow, Reporter::Outside)?;
        if flow.class == Class::New {
            // One to a Service's address would circle, see `not_for_pods`.
            let is_ours = is_for_pod() || lb::is_vip::<F>(p.tuple.dst);
            return if is_ours { Err(DropReason::IcmpUnrelated.into()) } else { Ok(None) };
        }
        Ok(Some(flow))
    };
    let Some(flow) = classify_in::<F, _>(skb, p, flow, config, relate)? else { return Ok(TO_STACK) };
    if flow.flags & flags::EXTERNAL != 0 {
        return Ok(external::JUMP);
    }
    forward::<F>(skb, p, flow, source::OUTSIDE, Origin::Uplink, config, hook::UPLINK_IN)
}

/// The ingress hook of other devices, for one family: the answers to what left by them with this host's address. All else is the
/// stack's, as it is where no program of ours is: bridges of containers and machines are not ours to filter.
#[inline(always)]
pub fn run_side_in<F: Steps>(skb: &Skb, l3: usize) -> Result<i32, Dropped> {
    let Some(config) = maps::config() else { return Ok(TO_STACK) };
    if is_vlan_tagged(skb) {
        return Ok(TO_STACK);
    }
    let (p, flow) = match parse::packet::<F, _>(skb, l3) {
        Ok((p, flow)) => (p, Some(flow)),
        // As by an uplink, see `parse_in`.
        Err(DropReason::Martian) => return Err(DropReason::Martian.into()),
        Err(_) => {
            let Some(p) = parse::last::<F>() else { return Ok(TO_STACK) };
            (p, None)
        }
    };
    if p.kind == Kind::LinkLocal {
        return Ok(TO_STACK);
    }
    match F::verify_outside(p) {
        Ok(()) => {}
        // Addresses of our range that no pod of ours has may be another network's on this node.
        Err(DropReason::Spoofed) if route::is_local_pod(p.tuple.src) || !source::is_own_range::<F>(p.tuple.src) => {
            return Err(DropReason::Spoofed.into());
        }
        Err(_) => return Ok(TO_STACK),
    }
    let Some(flow) = flow else { return Ok(TO_STACK) };
    if !route::is_host::<F>(p.tuple.dst) && !external::is_service_asked::<F>(p, config) {
        return Ok(TO_STACK);
    }
    let flow = if p.kind == Kind::IcmpError {
        icmp::relate::<F, _>(skb, p, flow, Reporter::Outside)?
    } else {
        conntrack::lookup::<F, _>(skb, p, flow, source::OUTSIDE, config, hook::UPLINK_IN, || Ok(()))?
    };
    if flow.class == Class::New {
        return Ok(if p.is_flow() && external::is_asked::<F>(p, config) { external::JUMP } else { TO_STACK });
    }
    if flow.flags & flags::EXTERNAL != 0 {
        return Ok(external::JUMP);
    }
    forward::<F>(skb, p, flow, source::OUTSIDE, Origin::Uplink, config, hook::UPLINK_IN)
}

/// Everything that [`classify_in`] asks of a family.
pub trait Classify<C: Ctx>: Parse<C> + Track + Report + Verify + HostPorts {}
impl<C: Ctx, F: Parse<C> + Track + Report + Verify + HostPorts> Classify<C> for F {}

/// Parses a packet that comes in by the uplink, in any context; `None`: it is the stack's.
#[inline(always)]
pub fn parse_in<F: Parse<C> + Verify, C: Ctx>(ctx: &C, l3: usize) -> Result<Option<Parsed<F::A>>, Dropped> {
    let reason = match parse::packet::<F, _>(ctx, l3) {
        Ok(parsed) => return Ok(Some(parsed)),
        // The kernel lets IPv4-mapped addresses in IPv6 headers pass, and its dual-stack sockets take them for IPv4.
        Err(DropReason::Martian) => return Err(DropReason::Martian.into()),
        Err(reason) => reason,
    };
    let Some(p) = parse::last::<F>() else { return Ok(None) };
    if route::is_local_pod(p.tuple.dst) || lb::is_vip::<F>(p.tuple.dst) {
        // The stack could reassemble what came in pieces, and would forward it: to a pod, or back to where it came from.
        return Err(reason.into());
    }
    // Fragments for the host, headers that its stack may well understand: the stack judges them,
    // but not in whose name they come.
    match F::verify_outside(p) {
        // Machines of the link speak so to the host.
        Err(reason) if !p.tuple.src.is_link_scope() => Err(reason.into()),
        _ => Ok(None),
    }
}

/// Classifies a packet that comes in by the uplink, in any context; `None`: it is the stack's. `relate` classifies ICMP errors.
#[inline(always)]
pub fn classify_in<F: Classify<C>, C: Recording>(
    ctx: &C,
    p: &Packet<F::A>,
    flow: &'static mut Flow<F::A>,
    config: &NodeConfig,
    relate: impl FnOnce(&'static mut Flow<F::A>) -> Result<Option<&'static mut Flow<F::A>>, Dropped>,
) -> Result<Option<&'static mut Flow<F::A>>, Dropped> {
    let is_for_pod = || route::is_local_pod(p.tuple.dst);
    if p.kind == Kind::LinkLocal {
        if is_for_pod() {
            return Err(DropReason::NdNotForwarded.into());
        }
        // The host hears its own addresses, too: so it finds out that another has one.
        return if source::is_tunneled_pod::<F>(p.tuple.src) { Err(DropReason::Spoofed.into()) } else { Ok(None) };
    }
    if is_from_node::<F>(p, config) {
        // The kernel's tunnel socket takes it; the hook of the overlay device decides on what is inside.
        return Ok(None);
    }
    if p.kind == Kind::IcmpError {
        return relate(flow);
    }
    let verify = || F::verify_outside(p);
    let flow = conntrack::lookup::<F, _>(ctx, p, flow, source::OUTSIDE, config, hook::UPLINK_IN, verify)?;
    if flow.class == Class::New {
        if !is_for_pod() {
            if external::is_asked::<F>(p, config) || external::is_rival::<F>(p, flow) {
                verify()?;
                // `nat` reads it as "by an uplink", too.
                flow.flags |= flags::EXTERNAL;
                return Ok(Some(flow));
            }
            not_for_pods::<F>(p, config)?;
            return Ok(None);
        }
        verify()?;
    }
    Ok(Some(flow))
}

/// True for a tunnel packet of another node.
#[inline(always)]
fn is_from_node<F: Family>(p: &Packet<F::A>, config: &NodeConfig) -> bool {
    is_tunnel_packet(p, config)
        && (p.tuple.dst == F::node(config) || (!route::is_local_pod(p.tuple.dst) && !lb::is_vip::<F>(p.tuple.dst)))
        && source::is_node::<F>(p.tuple.src)
}

#[inline(always)]
fn is_tunnel_packet<A: Address>(p: &Packet<A>, config: &NodeConfig) -> bool {
    p.tuple.proto == proto::UDP && p.tuple.dport == config.overlay_port && config.overlay != 0
}

/// What is neither for a pod of this node nor of a known flow is the stack's, but for what only a forger sends.
#[inline(always)]
fn not_for_pods<F: Verify>(p: &Packet<F::A>, config: &NodeConfig) -> Result<(), Dropped> {
    if lb::is_cluster_ip::<F>(p.tuple.dst) {
        // The stack would send it back to where it came from, and it would circle.
        return Err(DropReason::IsClusterIp.into());
    }
    if is_tunnel_packet(p, config) {
        // The tunnel's socket would take it, whatever the address.
        return Err(DropReason::UnknownSender.into());
    }
    match F::verify_outside(p) {
        Err(DropReason::Spoofed) => Err(DropReason::Spoofed.into()),
        // The kernel takes `::` for a source like others. On the link, DHCP and neighbour discovery have such.
        Err(DropReason::Martian) if p.tuple.src.is_martian_source() && route::is_host::<F>(p.tuple.dst) => {
            Err(DropReason::Martian.into())
        }
        _ => Ok(()),
    }
}

/// The egress hook, for one family: the host's way to a service.
#[inline(always)]
pub fn run_out<F: Steps>(skb: &Skb, l3: usize) -> Result<i32, Dropped> {
    let Some(config) = maps::config() else { return Ok(TO_STACK) };
    if is_vlan_tagged(skb) {
        return Ok(TO_STACK);
    }
    let Ok((p, flow)) = parse::packet::<F, _>(skb, l3) else {
        return match parse::last::<F>() {
            // Later fragments of what is refused below.
            Some(p) if lb::find_vip(p.tuple.dst) == Vip::Unassigned => Err(DropReason::NoService.into()),
            _ => Ok(TO_STACK),
        };
    };
    if !lb::is_vip::<F>(p.tuple.dst) {
        // Connections of before a range was known go on. What the stack forwards counts, too: it may have come from outside, and would
        // go back there.
        let may_open = p.tuple.proto != proto::TCP || p.tcp_flags & (bits::SYN | bits::ACK) == bits::SYN;
        if may_open && lb::find_vip(p.tuple.dst) == Vip::Unassigned {
            return Err(DropReason::NoService.into());
        }
        return Ok(external::may_answer(skb, p, config));
    }
    if p.kind == Kind::LinkLocal {
        return Ok(TO_STACK);
    }
    let flow = if p.kind == Kind::IcmpError {
        let flow = icmp::relate::<F, _>(skb, p, flow, Reporter::AnyHop)?;
        if flow.class == Class::New {
            return Ok(TO_STACK);
        }
        flow
    } else {
        let flow = conntrack::lookup::<F, _>(skb, p, flow, source::HOST, config, hook::UPLINK_OUT, || Ok(()))?;
        if flow.class == Class::New {
            if skb.ingress_ifindex() != 0 {
                // It came from elsewhere, and this node forwards it: Services are for pods and for the node itself.
                return Err(DropReason::IsClusterIp.into());
            }
            let Some(backend) = lb::select::<F>(&p.tuple, scope::CLUSTER, config.seed)? else { return Ok(TO_STACK) };
            flow.to.tuple.dst = F::A::from_addr(backend.addr);
            flow.to.tuple.dport = backend.port;
            flow.backend = backend.id;
            flow.flags |= flags::FROM_HOST;
            let node = F::node(config);
            if node != F::A::UNSPECIFIED {
                // The host's own connections are not tracked. With a port that the host does not use, one of them to the same
                // backend cannot have the same tuple; with the node's address, other nodes know the sender.
                flow.to.tuple.src = node;
                flow.flags |= flags::MASQ;
            }
        }
        flow
    };
    forward::<F>(skb, p, flow, source::HOST, Origin::Host, config, hook::UPLINK_OUT)
}

/// True if the device took off a VLAN tag: the frame belongs to another device than the one we are attached to. A tag for
/// priority alone (VLAN 0) does not count.
#[inline(always)]
fn is_vlan_tagged(skb: &Skb) -> bool {
    skb.vlan_present() != 0 && skb.vlan_tci() & 0xfff != 0
}
