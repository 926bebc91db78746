//! Rejections. Contract: from the reason why a packet goes no further to the answer that its sender gets, if it gets one. An ICMP
//! error, a later fragment and a reset never get one (RFC 1122, 3.2.2; RFC 4443, 2.4). ICMP errors are limited.

use aya_ebpf::bindings::TC_ACT_SHOT;
use rustnet_common::addr::Address;
use rustnet_common::drop::DropReason;
use rustnet_common::tuple::proto;

use super::exec::{self, ReplyPath};
use crate::ctx::Skb;
use crate::limit::{self, Bucket};
use crate::maps;
use crate::outcome::Dropped;
use crate::packet::Kind;
use crate::parse::{self, Parse};
use crate::rewrite::{self, BuildHeader, Rejection};
use crate::wire::tcp;

/// What this step asks of a family.
pub trait Rejecting: Parse<Skb, Header: BuildHeader<Self::A>> {}
impl<F: Parse<Skb, Header: BuildHeader<F::A>>> Rejecting for F {}

/// Rejects the packet in hand if the reason asks for it and the packet may be answered; else the verdict is to drop it.
#[inline(always)]
pub fn reject<F: Rejecting>(skb: &Skb, l3: usize, dropped: Dropped, path: ReplyPath) -> i32 {
    try_reject::<F>(skb, l3, dropped, path).unwrap_or(TC_ACT_SHOT)
}

#[inline(always)]
fn try_reject<F: Rejecting>(skb: &Skb, l3: usize, dropped: Dropped, path: ReplyPath) -> Option<i32> {
    let config = maps::config()?;
    let refusal = match dropped.reason {
        DropReason::NoBackend | DropReason::NoServicePort => Rejection::PortUnreachable,
        DropReason::TtlExceeded => Rejection::TimeExceeded,
        DropReason::FragNeeded if dropped.mtu != 0 => Rejection::TooBig(dropped.mtu),
        _ => return None,
    };
    let (p, _) = parse::packet::<F, _>(skb, l3).ok()?;
    let is_tcp = p.tuple.proto == proto::TCP;
    let what = if is_tcp && refusal == Rejection::PortUnreachable { Rejection::Reset } else { refusal };
    if p.kind != Kind::Flow || p.tcp_flags & tcp::RST != 0 {
        return None;
    }
    // Nobody must use up the errors that another one's connection waits for: a pod, or a client outside who asks for refusals. A
    // forged source makes nothing louder of it, for the error is smaller than its packet. Linux does not limit it either
    // (`icmpv4_mask_allow`).
    let is_unlimited = matches!(what, Rejection::Reset | Rejection::TooBig(_));
    if !is_unlimited && !limit::take(Bucket::IcmpErrors) {
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
