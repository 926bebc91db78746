//! The end of the path. Contract: takes a packet, what it becomes and where it came in; checks hop limit and size, lets
//! `rewrite` change it, and hands it to where its destination lies.

use aya_ebpf::bindings::{BPF_F_INGRESS, TC_ACT_UNSPEC};
use aya_ebpf::helpers::generated as helper;
use rustnet_common::addr::{Addr, Address};
use rustnet_common::config::NodeConfig;
use rustnet_common::conntrack::QUEUED;
use rustnet_common::drop::DropReason;
use rustnet_common::names::MARK_DONE;
use rustnet_common::tuple::Tuple;

use super::Stop;
use super::route::{self, NO_WAY, Route};
use super::source::{self, TUNINFO_IPV6, TunnelKey};
use crate::ctx::{Ctx, Skb};
use crate::family::Family;
use crate::parse::Packet;
use crate::rewrite;

/// Leave the packet to whoever comes next: other programs, then the stack.
pub const STACK: i32 = TC_ACT_UNSPEC;

const BPF_F_ZERO_CSUM_TX: u64 = 2;

/// Where a packet came in.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum From {
    /// An ingress hook: the packet is being forwarded.
    Ingress,
    /// An egress hook: this node's stack sends the packet and has done all that a router does.
    Egress,
}

/// Sends the packet on its way.
#[inline(always)]
pub fn forward<F: Family>(
    skb: &Skb,
    p: &Packet<F::A>,
    to: &Tuple<F::A>,
    config: &NodeConfig,
    from: From,
    route: Route,
) -> Result<i32, Stop> {
    let ttl = || match p.ttl {
        ttl if from == From::Egress => Ok(ttl),
        0 | 1 => Err(DropReason::TtlExceeded),
        ttl => Ok(ttl - 1),
    };
    let change = |ttl| rewrite::translate::<F>(skb, p, to, ttl);
    // What can still refuse the packet comes before `change`: an answer quotes the packet as it was sent.
    match route {
        Route::Stack if from == From::Egress => Err(DropReason::HostHairpin.into()),
        Route::Stack => {
            change(p.ttl)?;
            Ok(STACK)
        }
        Route::Pod(ifindex) if from == From::Ingress && ifindex & QUEUED == 0 => {
            change(ttl()?)?;
            Ok(redirect_peer(ifindex))
        }
        Route::Pod(out) => {
            // Through the veth and its queue: the pod's bandwidth is limited, or this is an egress hook, which cannot reach
            // the other side at once.
            let ttl = ttl()?;
            let redirected = route::redirect_queued::<F>(skb, out & !QUEUED, to, p.unit, from == From::Ingress)?;
            if redirected != NO_WAY {
                change(ttl)?;
                done(skb);
                return Ok(redirected);
            }
            // The stack cuts it, counts its own hop, and sends the pieces out of the same veth, each with the mark.
            change(p.ttl)?;
            done(skb);
            Ok(STACK)
        }
        Route::Tunnel(peer) => {
            let ttl = ttl()?;
            if p.unit > config.overlay_mtu {
                return Err(Stop { reason: DropReason::FragNeeded, mtu: config.overlay_mtu });
            }
            change(ttl)?;
            done(skb);
            if !set_tunnel(skb, &peer.node, config) {
                return Err(DropReason::WriteError.into());
            }
            Ok(redirect(config.overlay, 0))
        }
        Route::Direct | Route::World => {
            let ttl = ttl()?;
            let routed = route::redirect::<F>(skb, to, p.unit, from == From::Egress)?;
            if routed == NO_WAY {
                // The stack finds no way either, and will tell the sender so.
                return if from == From::Egress { Err(DropReason::NoFib.into()) } else { Ok(STACK) };
            }
            change(ttl)?;
            done(skb);
            Ok(routed)
        }
    }
}

/// Tells the next hook that the packet has passed its steps on this node.
#[inline(always)]
fn done(skb: &Skb) {
    skb.set_mark(skb.mark() | MARK_DONE);
}

/// Sets the tunnel's far end.
#[inline(never)]
pub fn set_tunnel(skb: &Skb, node: &Addr, config: &NodeConfig) -> bool {
    let words = node.words();
    let v4 = node.is_v4();
    let mut key = TunnelKey {
        id: config.vni,
        remote: if v4 { [u32::from_be(words[3]), 0, 0, 0] } else { words },
        tos: 0,
        ttl: 64,
        ext: 0,
        label: 0,
    };
    let flags = if v4 { BPF_F_ZERO_CSUM_TX } else { TUNINFO_IPV6 | BPF_F_ZERO_CSUM_TX };
    // SAFETY: `key` has the size that is passed; the near end is left to the kernel by leaving it out.
    unsafe {
        helper::bpf_skb_set_tunnel_key(skb.raw(), (&raw mut key).cast(), size_of::<TunnelKey>() as u32, flags) == 0
    }
}

/// Where an answer of ours goes: back to where the question came from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Back {
    /// Into the pod that asked.
    Pod,
    /// Out of the uplink.
    Uplink,
    /// Through the overlay.
    Tunnel,
    /// Up into this node's own stack.
    Host,
}

impl Back {
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

/// Sends a finished answer back; MACs are already swapped.
#[inline(always)]
pub fn answer(skb: &Skb, back: Back, config: &NodeConfig) -> Result<i32, Stop> {
    let ifindex = skb.ifindex();
    // It passes another hook of ours.
    done(skb);
    match back {
        // Into the pod, too, by the veth: its bandwidth may be limited.
        Back::Pod | Back::Uplink => Ok(redirect(ifindex, 0)),
        Back::Host => Ok(redirect(ifindex, BPF_F_INGRESS.into())),
        Back::Tunnel => {
            let mut remote = Addr::UNSPECIFIED;
            source::tunnel_remote(skb, &mut remote);
            if !set_tunnel(skb, &remote, config) {
                return Err(DropReason::WriteError.into());
            }
            Ok(redirect(ifindex, 0))
        }
    }
}

/// Into the pod behind a host-side veth, without passing its queue.
#[inline(always)]
fn redirect_peer(ifindex: u32) -> i32 {
    // SAFETY: no pointers are involved.
    unsafe { helper::bpf_redirect_peer(ifindex, 0) as i32 }
}

/// Out of an interface, or into it with `BPF_F_INGRESS`.
#[inline(always)]
fn redirect(ifindex: u32, flags: u64) -> i32 {
    // SAFETY: no pointers are involved.
    unsafe { helper::bpf_redirect(ifindex, flags) as i32 }
}
