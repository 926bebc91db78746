//! Skeleton of the next stage's program: XDP at the uplink.
//!
//! It proves, when it is built and when a kernel verifies it, that the steps carry this context as they are. It decides as the TC
//! hooks do, stores the decision in `rn_decision`, where a test compares it, and acts on nothing: packets pass. Feature `skeletons` alone
//! builds it, into an object of its own; the agent has neither the object nor a place to attach it.
//!
//! What the next stage has to add: rewriting and redirects for XDP (all of `rewrite` and `exec` is for an skb), ICMP errors there
//! (which are rewritten), counters.

use aya_ebpf::bindings::xdp_action;
use aya_ebpf::btf_maps::Array;
use aya_ebpf::macros::{btf_map, xdp};
use aya_ebpf::programs::XdpContext;
use rustnet_common::addr::{Addr, Address};
use rustnet_common::conntrack::flags;
use rustnet_common::skeleton::{Decision, verdict};

use crate::family::{V4, V6};
use crate::hook::uplink::{self, Classify};
use crate::maps;
use crate::outcome::Dropped;
use crate::parse;
use crate::step::plan::{self, Origin, Target};
use crate::wire::{ETH_LEN, ETH_P_IP, ETH_P_IPV6};
use crate::xdp::Xdp;

/// The last decision.
#[btf_map]
#[allow(non_upper_case_globals, reason = "see `maps`")]
pub static rn_decision: Array<Decision, 1> = Array::new();

const STACK: Decision = Decision {
    verdict: verdict::STACK,
    detail: 0,
    src: Addr::UNSPECIFIED,
    dst: Addr::UNSPECIFIED,
    sport: 0,
    dport: 0,
    ttl: 0,
};

/// Stores a decision.
#[inline(always)]
fn store(decision: Decision) {
    if let Some(slot) = rn_decision.get_ptr_mut(0) {
        // SAFETY: an array's element; one test runs one program at a time.
        unsafe { *slot = decision };
    }
}

#[inline(always)]
fn dropped(reason: impl Into<Dropped>) -> Decision {
    Decision { verdict: verdict::DROP, detail: u32::from(reason.into().reason as u8), ..STACK }
}

/// What `uplink_in` would do with a frame.
#[inline(always)]
fn try_decide<F: Classify<Xdp>>(xdp: &Xdp) -> Result<Decision, Dropped> {
    let Some(config) = maps::config() else { return Ok(STACK) };
    let Some((p, flow)) = uplink::parse_in::<F, _>(xdp, ETH_LEN)? else { return Ok(STACK) };
    let Some(flow) = uplink::classify_in::<F, _>(xdp, p, flow, config, |_| Ok(None))? else { return Ok(STACK) };
    if flow.flags & flags::EXTERNAL != 0 {
        // Its backend is chosen in a program of its own.
        return Ok(STACK);
    }
    let action = plan::plan::<F>(p, flow, Origin::Uplink, config)?;
    if action.target == Target::Stack {
        return Ok(STACK);
    }
    let to = &flow.to.tuple;
    Ok(Decision {
        verdict: verdict::FORWARD,
        detail: action.ifindex,
        src: to.src.to_addr(),
        dst: to.dst.to_addr(),
        sport: to.sport,
        dport: to.dport,
        ttl: u32::from(action.ttl),
    })
}

/// One family's part: a function of its own, so that it has a stack frame of its own.
#[inline(never)]
fn decide<F: Classify<Xdp>>(xdp: &Xdp) {
    store(try_decide::<F>(xdp).unwrap_or_else(dropped));
}

/// XDP of the uplink: decides and passes.
#[xdp]
pub fn skeleton_xdp(ctx: XdpContext) -> u32 {
    let xdp = Xdp(ctx.ctx);
    match parse::ethertype(&xdp) {
        Some(ETH_P_IP) => decide::<V4>(&xdp),
        Some(ETH_P_IPV6) => decide::<V6>(&xdp),
        _ => store(STACK),
    }
    xdp_action::XDP_PASS
}
