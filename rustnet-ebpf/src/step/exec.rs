//! The execution. Contract: [`resolve`] asks the kernel for the way of a planned packet, while the packet may still be refused;
//! [`send`] lets `rewrite` change it and hands it over.

use aya_ebpf::bindings::{BPF_F_INGRESS, TC_ACT_UNSPEC};
use aya_ebpf::helpers::generated as helper;
use rustnet_common::config::NodeConfig;
use rustnet_common::drop::DropReason;

use super::fib::{self, Fib, Routed};
use super::mark;
use super::plan::{Action, Origin, Target};
use super::tunnel::{self, Tunnel};
use crate::ctx::{Ctx, Skb};
use crate::outcome::Dropped;
use crate::packet::{Flow, Packet};
use crate::rewrite::{self, Rewrite};

/// Passes the packet to other programs, then to the stack.
pub const TO_STACK: i32 = TC_ACT_UNSPEC;

/// The way of a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Egress {
    /// Where the plan says, with the redirect armed where the kernel's tables were asked.
    Planned,
    /// To this node's own stack, which fragments it, decrements its hop limit, and sends each fragment marked.
    Fragmenting,
    /// To this node's own stack as it arrived: the kernel's routes lead nowhere, or here. The stack sends the ICMP error.
    Unrouted,
}

/// Finds the way of a packet, and the verdict of an armed redirect. After this, only a full connection table refuses the packet.
#[inline(always)]
pub fn resolve<F: Routed>(
    skb: &Skb,
    p: &Packet<F::A>,
    flow: &mut Flow<F::A>,
    action: Action,
    origin: Origin,
) -> Result<(Egress, i32), Dropped> {
    let is_host = origin == Origin::Host;
    let fib = match action.target {
        Target::Stack | Target::Pod => return Ok((Egress::Planned, TO_STACK)),
        Target::Tunnel => {
            if let Some(peer) = action.peer {
                tunnel::verify_path(skb, p, &peer.node)?;
            }
            return Ok((Egress::Planned, TO_STACK));
        }
        Target::PodQdisc => fib::redirect_via_qdisc::<F>(skb, action.ifindex, &flow.to.tuple.dst, p.mtu_len, !is_host)?,
        Target::Routed => fib::redirect::<F>(skb, flow, p.tuple.sport, p.mtu_len, is_host)?,
    };
    match fib {
        Fib::Redirect(verdict) => Ok((Egress::Planned, verdict)),
        Fib::NeedsFragmentation(_) if action.target == Target::PodQdisc => Ok((Egress::Fragmenting, TO_STACK)),
        // The stack forwards and fragments what it can take as it is. It refuses a packet with an address of its own.
        Fib::NeedsFragmentation(_) if flow.to.tuple == p.tuple && !is_host => Ok((Egress::Fragmenting, TO_STACK)),
        Fib::NeedsFragmentation(mtu) => Err(Dropped { reason: DropReason::FragNeeded, mtu }),
        Fib::NoRoute if is_host => Err(DropReason::NoFib.into()),
        Fib::NoRoute => Ok((Egress::Unrouted, TO_STACK)),
    }
}

/// Translates the packet and sends it. `can_encapsulate`: the overlay's headers need not be its device's.
#[inline(always)]
pub fn send<F: Rewrite>(
    skb: &Skb,
    p: &Packet<F::A>,
    flow: &Flow<F::A>,
    action: Action,
    (egress, verdict): (Egress, i32),
    can_encapsulate: bool,
    config: &NodeConfig,
) -> Result<i32, Dropped> {
    let ttl = match egress {
        Egress::Planned => action.ttl,
        Egress::Fragmenting => p.ttl,
        Egress::Unrouted => return Ok(TO_STACK),
    };
    rewrite::translate::<F, _>(skb, p, flow, ttl)?;
    match action.target {
        Target::Stack => return Ok(TO_STACK),
        // Straight into the pod: no hook of ours follows.
        Target::Pod => return Ok(redirect_peer(action.ifindex)),
        Target::PodQdisc | Target::Routed | Target::Tunnel => mark::set_processed(skb, config),
    }
    if action.target != Target::Tunnel {
        return Ok(verdict);
    }
    let Some(peer) = action.peer else { return Err(DropReason::WriteError.into()) };
    // What may be fragmented, and has to be, is the device's.
    let fits = can_encapsulate && p.seg_len <= config.overlay_mtu;
    Ok(tunnel::send(skb, peer, if fits { p.seg_len } else { 0 }, config)?)
}

/// Where a rejection goes: back to where the packet came from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum ReplyPath {
    /// Into the pod that asked.
    Pod,
    /// Out of the uplink.
    Uplink,
    /// Through the overlay.
    Tunnel,
    /// Up into this node's own stack.
    Host,
}

impl ReplyPath {
    /// The inverse of `as u32`.
    #[inline(always)]
    pub fn from_code(code: u32) -> Self {
        match code {
            0 => Self::Pod,
            1 => Self::Uplink,
            2 => Self::Tunnel,
            _ => Self::Host,
        }
    }
}

/// Sends a finished rejection back; MACs are already swapped.
#[inline(always)]
pub fn send_back(skb: &Skb, path: ReplyPath, config: &NodeConfig) -> Result<i32, Dropped> {
    let ifindex = skb.ifindex();
    // It passes another hook of ours.
    mark::set_processed(skb, config);
    match path {
        // Into the pod, too, by the veth: its bandwidth may be limited.
        ReplyPath::Pod | ReplyPath::Uplink => Ok(redirect(ifindex, 0)),
        ReplyPath::Host => Ok(redirect(ifindex, BPF_F_INGRESS.into())),
        ReplyPath::Tunnel => {
            let mut from = Tunnel::NONE;
            tunnel::read(skb, &mut from);
            if !tunnel::set(skb, &from.remote, config) {
                return Err(DropReason::WriteError.into());
            }
            Ok(redirect(ifindex, 0))
        }
    }
}

/// Into the pod behind a host-side veth, past its qdisc.
#[inline(always)]
pub fn redirect_peer(ifindex: u32) -> i32 {
    // SAFETY: no pointers are involved.
    unsafe { helper::bpf_redirect_peer(ifindex, 0) as i32 }
}

/// Out of an interface, or into it with `BPF_F_INGRESS`.
#[inline(always)]
fn redirect(ifindex: u32, flags: u64) -> i32 {
    // SAFETY: no pointers are involved.
    unsafe { helper::bpf_redirect(ifindex, flags) as i32 }
}
