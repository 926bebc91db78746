//! Skeletons of the next stage's programs: XDP at the uplink, and connect(2) in a cgroup.
//!
//! They prove, when they are built and when a kernel verifies them, that the steps carry these contexts as they are. They decide
//! as the TC hooks do, store the decision in `rn_decision`, where a test compares it, and act on nothing: packets pass and
//! connections go where they went. Feature `skeletons` alone builds them, into an object of its own; the agent has neither the
//! object nor a place to attach them.
//!
//! What the next stage has to add: rewriting and redirects for XDP (all of `rewrite` and `exec` is for an skb), ICMP errors there
//! (which are rewritten), counters; and for connect(2) the new address, and what getpeername(2) and recvmsg(2) return of it.

use aya_ebpf::bindings::{bpf_sock_addr, xdp_action};
use aya_ebpf::btf_maps::Array;
use aya_ebpf::macros::{btf_map, cgroup_sock_addr, xdp};
use aya_ebpf::programs::{SockAddrContext, XdpContext};
use rustnet_common::addr::{Addr, Address, Ip4, Ip6};
use rustnet_common::conntrack::flags;
use rustnet_common::service::scope;
use rustnet_common::skeleton::{Decision, verdict};
use rustnet_common::tuple::Tuple;

use crate::ctx::random;
use crate::family::{Family, V4, V6};
use crate::hook::uplink::{self, Classify};
use crate::maps;
use crate::outcome::Dropped;
use crate::parse;
use crate::step::lb;
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
    let action = plan::plan::<F>(p, &flow.to, Origin::Uplink, config)?;
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

/// What a connection to a service would become. A socket that connects has no source yet, so that chance takes the place of its
/// flow's hash.
#[inline(always)]
fn connect<F: Family>(dst: F::A, sock: *mut bpf_sock_addr) {
    // SAFETY: a valid context; the verifier rewrites these loads. The port is in network order in the lower half.
    let (port, proto) = unsafe { (u16::from_be((*sock).user_port as u16), (*sock).protocol as u8) };
    let t = Tuple { src: F::A::UNSPECIFIED, dst, sport: 0, dport: port, proto, pad: 0, pad2: 0 };
    store(match lb::select::<F>(&t, scope::CLUSTER, random()) {
        Ok(Some(backend)) => {
            Decision { verdict: verdict::FORWARD, detail: backend.id, dst: backend.addr, dport: backend.port, ..STACK }
        }
        Ok(None) => STACK,
        Err(reason) => dropped(reason),
    });
}

/// What connect programs return to allow the call.
const ALLOW: i32 = 1;

/// connect(2) of IPv4 sockets: decides and allows.
#[cgroup_sock_addr(connect4)]
pub fn skeleton_connect4(ctx: SockAddrContext) -> i32 {
    // SAFETY: a valid context; the verifier rewrites this load.
    let dst = Ip4::from_word(unsafe { (*ctx.sock_addr).user_ip4 });
    connect::<V4>(dst, ctx.sock_addr);
    ALLOW
}

/// connect(2) of IPv6 sockets: decides and allows.
#[cgroup_sock_addr(connect6)]
pub fn skeleton_connect6(ctx: SockAddrContext) -> i32 {
    // SAFETY: a valid context; the verifier rewrites this load.
    let dst = Ip6::from_words(unsafe { (*ctx.sock_addr).user_ip6 });
    connect::<V6>(dst, ctx.sock_addr);
    ALLOW
}
