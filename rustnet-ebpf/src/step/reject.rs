//! Rejections. Contract: from the reason why a packet goes no further to the answer that its sender gets, if it gets one. An ICMP
//! error, a later fragment and a reset never get one (RFC 1122, 3.2.2; RFC 4443, 2.4). ICMP errors are limited.
//!
//! What policies deny gets one if a setting says so. The source is proved here once more: policies judge packets of known flows
//! before the hooks look at their source.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT};
use rustnet_common::addr::Address;
use rustnet_common::config::flags;
use rustnet_common::drop::DropReason;
use rustnet_common::tuple::proto;

use super::exec::{self, ReplyPath};
use super::source::{self, Verify};
use super::tunnel::{self, Tunnel};
use crate::ctx::Skb;
use crate::family::{Family, V4, V6};
use crate::limit::{self, Bucket};
use crate::maps;
use crate::outcome::{Dropped, SILENT};
use crate::packet::Kind;
use crate::parse::{self, Parse, Parsed};
use crate::rewrite::{self, BuildHeader, Rejection};
use crate::wire::tcp;

/// What this step asks of a family.
pub trait Rejecting: Parse<Skb, Header: BuildHeader<Self::A>> + Verify + Tunneled {}
impl<F: Parse<Skb, Header: BuildHeader<F::A>> + Verify + Tunneled> Rejecting for F {}

/// Rejects the packet in hand if the reason asks for it and the packet may be answered; else the verdict is to drop it.
#[inline(always)]
pub fn reject<F: Rejecting>(skb: &Skb, l3: usize, dropped: Dropped, path: ReplyPath) -> i32 {
    try_reject::<F>(skb, l3, dropped, path).unwrap_or(TC_ACT_SHOT)
}

#[inline(always)]
fn try_reject<F: Rejecting>(skb: &Skb, l3: usize, dropped: Dropped, path: ReplyPath) -> Option<i32> {
    let config = maps::config()?;
    let (p, _) = parse::packet::<F, _>(skb, l3).ok()?;
    let is_tcp = p.tuple.proto == proto::TCP;
    let what = match dropped.reason {
        DropReason::NoBackend | DropReason::NoServicePort if is_tcp => Rejection::Reset,
        DropReason::NoBackend | DropReason::NoServicePort => Rejection::PortUnreachable,
        DropReason::PolicyDenied => Rejection::Prohibited,
        DropReason::TtlExceeded => Rejection::TimeExceeded,
        DropReason::FragNeeded if dropped.mtu != 0 => Rejection::TooBig(dropped.mtu),
        _ => return None,
    };
    if p.kind != Kind::Flow || p.tcp_flags & tcp::RST != 0 {
        return None;
    }
    // Nobody must use up the errors that another one's connection waits for: a pod, or a client outside who asks for refusals. A
    // forged source makes nothing louder of it, for the error is smaller than its packet. Linux does not limit it either
    // (`icmpv4_mask_allow`).
    let bucket = if what == Rejection::Prohibited { Bucket::Denials } else { Bucket::IcmpErrors };
    let is_unlimited = matches!(what, Rejection::Reset | Rejection::TooBig(_));
    if !is_unlimited && !limit::take(bucket) {
        return None;
    }
    // The host refuses a packet that comes in with an address of its own as a martian.
    let router = if path == ReplyPath::Host { p.tuple.dst } else { F::node(config) };
    if matches!(what, Rejection::TimeExceeded | Rejection::TooBig(_)) && router == F::A::UNSPECIFIED {
        return None;
    }
    rewrite::reject::<F>(skb, p, what, router).ok()?;
    exec::send_back(skb, path, config).ok()
}

/// True if the sender of a packet that policies deny gets an answer. The packet is the one in hand; `path` leads to where it came from.
/// Without a source that is proved there is no answer: policies judge packets of known flows before the hooks look at their source.
/// Nothing proves what the host's stack sends: netfilter may have translated what it forwards, and an answer would miss its sender.
#[inline(always)]
pub fn is_denial_answered<F: Rejecting>(skb: &Skb, denied: Dropped, path: ReplyPath) -> bool {
    let (Some(config), Some((p, _))) = (maps::config(), parse::in_hand::<F>()) else { return false };
    if config.flags & flags::ANSWER_DENIED == 0 || denied.mtu == SILENT {
        return false;
    }
    if matches!(skb.pkt_type(), PACKET_BROADCAST | PACKET_MULTICAST) {
        return false;
    }
    match path {
        ReplyPath::Pod => source::of_pod(skb).is_ok_and(|source| F::verify_pod(p, source).is_ok()),
        ReplyPath::Uplink => F::verify_outside(p).is_ok(),
        ReplyPath::Tunnel => F::is_from_tunnel(skb),
        ReplyPath::Host => false,
    }
}

/// What this step asks of a family, with its function for the source of a packet out of a tunnel.
pub trait Tunneled: Parse<Skb> {
    /// True if the far end of the tunnel that the packet in hand came through owns its source.
    fn is_from_tunnel(skb: &Skb) -> bool;
}

/// Declares a family's function with global linkage: its stack is not that of the hooks.
macro_rules! global {
    ($family:ident, $name:ident) => {
        impl Tunneled for $family {
            #[inline(always)]
            fn is_from_tunnel(skb: &Skb) -> bool {
                $name(skb.raw()) != 0
            }
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $name(skb: *mut __sk_buff) -> u32 {
            let mut from = Tunnel::NONE;
            tunnel::read(&Skb(skb), &mut from);
            let is_from =
                |(p, _): Parsed<<$family as Family>::A>| source::verify_tunnel::<$family>(p.tuple.src, &from).is_ok();
            u32::from(parse::in_hand::<$family>().is_some_and(is_from))
        }
    };
}

global!(V4, rn_from_tunnel4);
global!(V6, rn_from_tunnel6);

/// See [`Skb::pkt_type`].
const PACKET_BROADCAST: u32 = 1;
/// See [`Skb::pkt_type`].
const PACKET_MULTICAST: u32 = 2;
