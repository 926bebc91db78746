//! Real refusals. Contract: from the reason why a packet goes no further to the answer its sender gets, if it gets one.
//! No answer is ever given to an ICMP error, to a later fragment, or to a reset (RFC 1122, 3.2.2; RFC 4443, 2.4).

use aya_ebpf::bindings::TC_ACT_SHOT;
use rustnet_common::config::NodeConfig;
use rustnet_common::drop::DropReason;
use rustnet_common::tuple::proto;

use super::Stop;
use super::forward::{self, Back};
use crate::ctx::Skb;
use crate::family::Family;
use crate::parse::{self, Kind, tcp};
use crate::rewrite::{self, Answer};

/// Answers the sender of the packet in hand if the reason wants it and the packet is of a kind that gets answers; the
/// verdict is to drop it otherwise.
#[inline(always)]
pub fn answer<F: Family>(skb: &Skb, l3: usize, stop: Stop, back: Back) -> i32 {
    try_answer::<F>(skb, l3, stop, back).unwrap_or(TC_ACT_SHOT)
}

#[inline(always)]
fn try_answer<F: Family>(skb: &Skb, l3: usize, stop: Stop, back: Back) -> Option<i32> {
    let config: &NodeConfig = crate::ctx::config()?;
    let p = parse::packet::<F>(skb, l3).ok()?;
    let is_tcp = p.tuple.proto == proto::TCP;
    let what = match stop.reason {
        DropReason::NoBackend | DropReason::NoServicePort if is_tcp => Answer::Reset,
        DropReason::NoBackend | DropReason::NoServicePort => Answer::PortUnreachable,
        DropReason::TtlExceeded => Answer::TimeExceeded,
        DropReason::FragNeeded => Answer::TooBig(stop.mtu),
        _ => return None,
    };
    if p.kind != Kind::Flow || p.tcp_flags & tcp::RST != 0 {
        return None;
    }
    rewrite::answer::<F>(skb, p, what, F::node(config)).ok()?;
    forward::answer(skb, back, config).ok()
}
