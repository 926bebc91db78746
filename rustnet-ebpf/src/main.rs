//! The kernel side of rustnet: one function per hook. Each finds the family, runs the hook's steps, and maps their result to a
//! verdict in one place, [`verdict`].
//!
//! A packet passes: hook -> parse -> classify (conntrack, icmp, source) -> decide (plan) -> execute (exec, rewrite).
#![no_std]
#![no_main]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]
#![allow(missing_docs, reason = "the macros for maps and programs expand to undocumented items")]
#![allow(
    clippy::trivially_copy_pass_by_ref,
    clippy::needless_pass_by_value,
    clippy::needless_borrows_for_generic_args,
    reason = "everything is inlined; a reference to a map key spares the stack a copy of it"
)]
#![allow(
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    clippy::cast_ptr_alignment,
    reason = "helpers speak i32 and i64 where verdicts and offsets are meant; BPF loads need no alignment in packets"
)]

mod ctx;
mod event;
mod family;
mod hook;
mod limit;
mod log;
mod maps;
mod offload;
mod outcome;
mod packet;
mod parse;
mod rewrite;
mod sock;
mod step;
mod tail;
mod wire;
mod xdp;

// The macros of aya-log name it so.
extern crate self as aya_log_ebpf;

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT, xdp_action, xdp_md};
use aya_ebpf::macros::{classifier, xdp};
use aya_ebpf::programs::{TcContext, XdpContext};
use rustnet_common::addr::Addr;
use rustnet_common::config::flags;
use rustnet_common::drop::{DropReason, hook as hooks};

use crate::ctx::{Ctx, Skb, at, jiffies};
use crate::event::Report;
use crate::family::{V4, V6};
use crate::hook::Steps;
use crate::hook::direct;
use crate::hook::external::{self, Answer};
use crate::hook::fragment;
use crate::hook::tunnel::{self, Outer, Outside};
use crate::log::{Log, macro_support};
use crate::outcome::{Dropped, PackedResult};
use crate::rewrite::Wrap;
use crate::step::exec::{ReplyPath, TO_STACK};
use crate::step::tunnel::{self as overlay, Tunnel};
use crate::step::{mark, source};
use crate::wire::{ETH_LEN, ETH_P_8021AD, ETH_P_8021Q, ETH_P_IP, ETH_P_IPV6};
use crate::xdp::Xdp;

/// Maps a hook's result to a verdict. This is the only place that drops or rejects.
#[inline(always)]
fn verdict<H: Place, F: Reject>(skb: &Skb, l3: usize, result: Result<i32, Dropped>) -> i32 {
    match result {
        Ok(TO_STACK) => TO_STACK,
        Ok(action) => {
            event::count(skb, DropReason::Forwarded as u8, H::CODE);
            action
        }
        Err(dropped) => {
            F::report(skb, l3, dropped.reason as u8, H::CODE);
            // What policies deny is answered to pods alone: nothing translates the error on its way, and nobody beyond this node can
            // ask for it.
            let is_answered = H::REPLY_PATH == ReplyPath::Pod || dropped.reason != DropReason::PolicyDenied;
            if H::ANSWERS && is_answered { F::reject(skb, l3, dropped, H::REPLY_PATH) } else { TC_ACT_SHOT }
        }
    }
}

/// Rejections of one family. A function with global linkage: the verifier checks it once, not once per path that reaches it.
trait Reject: Answer + Report + Log {
    /// See [`step::reject::reject`].
    fn reject(skb: &Skb, l3: usize, dropped: Dropped, path: ReplyPath) -> i32;
    /// See [`inner_steps`]. `high` and `low` are the halves of the tunnel's far end.
    fn inner(skb: &Skb, overhead: u32, high: u64, low: u64, congested: u32) -> PackedResult;
}

/// Declares the global function of a family.
macro_rules! global {
    ($family:ident, $name:ident, $inner:ident, $ethertype:expr) => {
        impl Reject for $family {
            #[inline(always)]
            fn reject(skb: &Skb, l3: usize, dropped: Dropped, path: ReplyPath) -> i32 {
                $name(skb.raw(), l3 as u32, u32::from(dropped.reason as u8), dropped.mtu, path as u32)
            }
            #[inline(always)]
            fn inner(skb: &Skb, overhead: u32, high: u64, low: u64, congested: u32) -> PackedResult {
                PackedResult::from_bits($inner(skb.raw(), overhead, high, low, congested))
            }
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $inner(skb: *mut __sk_buff, overhead: u32, high: u64, low: u64, congested: u32) -> u64 {
            inner_steps::<$family>(&Skb(skb), overhead & 0x7f, Addr::from_halves(high, low), $ethertype, congested)
                .bits()
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $name(skb: *mut __sk_buff, l3: u32, reason: u32, mtu: u32, path: u32) -> i32 {
            let Some(reason) = DropReason::from_code(reason as u8) else { return TC_ACT_SHOT };
            let path = ReplyPath::from_code(path);
            step::reject::reject::<$family>(&Skb(skb), (l3 & 0x7f) as usize, Dropped { reason, mtu }, path)
        }
    };
}

global!(V4, rn_reject4, rn_inner4, ETH_P_IP);
global!(V6, rn_reject6, rn_inner6, ETH_P_IPV6);

/// A place in the kernel where packets pass.
trait Place {
    /// Its code in counters and events.
    const CODE: u8;
    /// Where rejections go from here.
    const REPLY_PATH: ReplyPath;
    /// Whether there are any.
    const ANSWERS: bool = true;
}

/// A place that a program of its own begins at.
trait Hook: Place {
    /// The sender may send nothing but untagged IP: other frames are dropped. Elsewhere they are the stack's.
    const IS_IP_ONLY: bool;
    /// Its packets may be those of flows from outside to Services.
    const MAY_JUMP: bool;
    /// Its packets may be answers of backends that use the host's network.
    const MAY_ANSWER: bool;
    /// Its packets may be later fragments between pods, which need no first one.
    const MAY_HAVE_FRAGMENTS: bool;
    /// Runs its steps; `tunnel` is where the packet came from if it came through one.
    fn run<F: Steps>(skb: &Skb, l3: usize, tunnel: &Tunnel) -> Result<i32, Dropped>;
}

/// One family's part of a hook: a function of its own, so that it has a stack frame of its own.
#[inline(never)]
fn steps<H: Hook, F: Steps>(skb: &Skb, l3: usize, tunnel: &Tunnel) -> PackedResult {
    PackedResult::new(H::run::<F>(skb, l3, tunnel))
}

#[inline(always)]
fn one_family<H: Hook, F: Reject>(skb: &Skb, l3: usize, tunnel: &Tunnel) -> i32 {
    let mut result = steps::<H, F>(skb, l3, tunnel);
    if H::MAY_ANSWER && matches!(result.result(), Ok(external::ANSWER)) {
        // Not from the frame of those steps: together they would need more stack than there is.
        result = F::answer(skb);
    }
    if H::MAY_JUMP && matches!(result.result(), Ok(external::JUMP)) {
        tail::jump(&TcContext::new(skb.raw()), tail::EXTERNAL_IN);
        // These programs are being replaced. The sender tries again.
        return verdict::<H, F>(skb, l3, Err(DropReason::BackendLookupFailed.into()));
    }
    if H::MAY_JUMP && matches!(result.result(), Ok(direct::RECEIVE)) {
        tail::jump(&TcContext::new(skb.raw()), tail::DIRECT_IN);
        return verdict::<H, F>(skb, l3, Err(DropReason::BackendLookupFailed.into()));
    }
    if H::MAY_HAVE_FRAGMENTS && matches!(result.result(), Err(Dropped { reason: DropReason::FragNotFound, .. })) {
        fragment::set_hook::<F>(H::CODE);
        tail::jump(&TcContext::new(skb.raw()), tail::FRAGMENT_IN);
    }
    if log::is_on() {
        F::log(result, skb.ifindex(), H::CODE);
    }
    verdict::<H, F>(skb, l3, result.result())
}

/// Runs a hook for the packet's family.
#[inline(always)]
fn dispatch<H: Hook>(skb: &Skb, tunnel: &Tunnel) -> i32 {
    let ethertype = parse::ethertype(skb);
    if H::IS_IP_ONLY
        && let Some(reason) = refuse_frame(skb, ethertype)
    {
        return verdict::<H, V4>(skb, ETH_LEN, Err(reason.into()));
    }
    match ethertype {
        Some(ETH_P_IP) => one_family::<H, V4>(skb, ETH_LEN, tunnel),
        Some(ETH_P_IPV6) => one_family::<H, V6>(skb, ETH_LEN, tunnel),
        Some(ETH_P_8021Q | ETH_P_8021AD) if H::CODE == hooks::UPLINK_IN && is_hidden(skb) => {
            verdict::<H, V4>(skb, ETH_LEN, Err(DropReason::VlanFiltered.into()))
        }
        _ => TO_STACK,
    }
}

/// Why a frame is refused that may be nothing but untagged IP.
#[inline(always)]
fn refuse_frame(skb: &Skb, ethertype: Option<u16>) -> Option<DropReason> {
    if skb.vlan_present() != 0 {
        return Some(DropReason::VlanFiltered);
    }
    match ethertype {
        Some(ETH_P_IP | ETH_P_IPV6) => None,
        Some(ETH_P_8021Q | ETH_P_8021AD) => Some(DropReason::VlanFiltered),
        Some(_) => Some(DropReason::UnsupportedL2),
        None => Some(DropReason::Malformed),
    }
}

/// True if a frame has two tags that name no VLAN (VLAN 0). The kernel takes off all of them, the
/// second one behind this hook (`__netif_receive_skb_core`), and its stack would get a packet that
/// no step has seen.
#[inline(always)]
fn is_hidden(skb: &Skb) -> bool {
    if skb.vlan_present() == 0 || skb.vlan_tci() & 0xfff != 0 {
        return false;
    }
    // Not pulled: no device hands over so little that these bytes are not there.
    // SAFETY: `at` proved two bytes.
    let inner = at::<u16, _>(skb, ETH_LEN).map_or(0, |tci| u16::from_be(unsafe { tci.read() }) & 0xfff);
    inner == 0
}

/// Declares the type of a hook.
macro_rules! hook {
    ($type:ident, $code:expr, $path:expr, $ip_only:literal, $run:path $(, $tunnel:ident)?) => {
        enum $type {}
        impl Place for $type {
            const CODE: u8 = $code;
            const REPLY_PATH: ReplyPath = $path;
        }
        impl Hook for $type {
            const IS_IP_ONLY: bool = $ip_only;
            const MAY_JUMP: bool =
                $code == hooks::UPLINK_IN || $code == hooks::OVERLAY_IN;
            const MAY_ANSWER: bool = $code == hooks::UPLINK_OUT || $code == hooks::OVERLAY_OUT;
            const MAY_HAVE_FRAGMENTS: bool = $code == hooks::FROM_POD || Self::MAY_JUMP;
            #[inline(always)]
            fn run<F: Steps>(skb: &Skb, l3: usize, _tunnel: &Tunnel) -> Result<i32, Dropped> {
                $(let $tunnel = _tunnel;)?
                $run(skb, l3 $(, $tunnel)?)
            }
        }
    };
}

hook!(FromPod, hooks::FROM_POD, ReplyPath::Pod, true, hook::from_pod::run::<F>);
hook!(ToPod, hooks::TO_POD, ReplyPath::Host, false, hook::to_pod::run::<F>);
hook!(UplinkIn, hooks::UPLINK_IN, ReplyPath::Uplink, false, hook::uplink::run_in::<F>);
hook!(SideIn, hooks::UPLINK_IN, ReplyPath::Uplink, false, hook::uplink::run_side_in::<F>);
hook!(UplinkOut, hooks::UPLINK_OUT, ReplyPath::Host, false, hook::uplink::run_out::<F>);
hook!(OverlayIn, hooks::OVERLAY_IN, ReplyPath::Tunnel, true, hook::overlay::run_in::<F>, tunnel);
hook!(OverlayOut, hooks::OVERLAY_OUT, ReplyPath::Host, false, hook::overlay::run_out::<F>);

/// Where tunnel packets go past the overlay's device. Whatever needs an answer takes the device.
enum TunnelIn {}
impl Place for TunnelIn {
    const CODE: u8 = hooks::TUNNEL_IN;
    const REPLY_PATH: ReplyPath = ReplyPath::Tunnel;
}

/// TC ingress of a pod's host-side veth.
#[classifier]
pub fn from_pod(ctx: TcContext) -> i32 {
    dispatch::<FromPod>(&Skb(ctx.skb.skb), &Tunnel::NONE)
}

/// TC egress of a pod's host-side veth.
#[classifier]
pub fn to_pod(ctx: TcContext) -> i32 {
    let skb = Skb(ctx.skb.skb);
    if mark::take_processed(&skb) { TO_STACK } else { dispatch::<ToPod>(&skb, &Tunnel::NONE) }
}

/// TC ingress of the uplink.
#[classifier]
pub fn uplink_in(ctx: TcContext) -> i32 {
    let skb = Skb(ctx.skb.skb);
    if mark::take_processed(&skb) {
        return TO_STACK;
    }
    if !tail::is_left() && maps::config().is_some_and(|config| tunnel::is_candidate(&skb, config)) {
        tail::jump(&ctx, tail::TUNNEL_IN);
    }
    dispatch::<UplinkIn>(&skb, &Tunnel::NONE)
}

/// The part of `uplink_in` for tunnel packets, attached nowhere.
#[classifier]
pub fn tunnel_in(ctx: TcContext) -> i32 {
    let skb = Skb(ctx.skb.skb);
    let mut outside = Outside::NONE;
    let verdict = match parse::ethertype(&skb) {
        Some(ETH_P_IP) => inner::<V4>(&skb, &mut outside),
        Some(ETH_P_IPV6) => inner::<V6>(&skb, &mut outside),
        _ => tunnel::BACK,
    };
    if verdict == tunnel::BACK {
        tail::leave();
        tail::jump(&ctx, tail::UPLINK_IN);
        // These programs are being replaced. Nothing is known of the packet's source.
        event::count(&skb, DropReason::UnknownSender as u8, TunnelIn::CODE);
        return TC_ACT_SHOT;
    }
    verdict
}

/// The verdict on a tunnel packet of one outer family.
#[inline(always)]
fn inner<F: Outer>(skb: &Skb, outside: &mut Outside) -> i32 {
    let Some(config) = maps::config() else { return tunnel::BACK };
    if !tunnel::read::<F, _>(skb, config, outside) {
        return tunnel::BACK;
    }
    match outside.ethertype {
        ETH_P_IP => untunneled::<V4>(skb, F::OVERHEAD, outside),
        ETH_P_IPV6 => untunneled::<V6>(skb, F::OVERHEAD, outside),
        _ => tunnel::BACK,
    }
}

/// The same of one inner family.
#[inline(always)]
fn untunneled<F: Reject>(skb: &Skb, overhead: u32, outside: &Outside) -> i32 {
    let (high, low) = outside.tunnel.remote.halves();
    let result = F::inner(skb, overhead, high, low, outside.congested);
    match result.result() {
        Ok(tunnel::BACK) => tunnel::BACK,
        unpacked => {
            if log::is_on() {
                F::log(result, skb.ifindex(), TunnelIn::CODE);
            }
            verdict::<TunnelIn, F>(skb, ETH_LEN, unpacked)
        }
    }
}

/// The steps of a tunnel packet of one inner family.
#[inline(always)]
fn inner_steps<F: Steps>(skb: &Skb, overhead: u32, remote: Addr, ethertype: u16, congested: u32) -> PackedResult {
    let Some(config) = maps::config() else { return PackedResult::new(Ok(tunnel::BACK)) };
    // `tunnel::read` has compared the network.
    let outside = Outside { tunnel: Tunnel { remote, id: config.vni }, ethertype, congested };
    PackedResult::new(tunnel::run::<F>(skb, overhead, &outside))
}

/// The part of the ingress hooks for flows from outside to Services, attached nowhere.
#[classifier]
pub fn external_in(ctx: TcContext) -> i32 {
    let skb = Skb(ctx.skb.skb);
    let is_tunneled = maps::config().is_some_and(|config| config.overlay != 0 && config.overlay == skb.ifindex());
    match parse::ethertype(&skb) {
        Some(ETH_P_IP) if is_tunneled => outside::<OverlayIn, V4>(&skb),
        Some(ETH_P_IPV6) if is_tunneled => outside::<OverlayIn, V6>(&skb),
        Some(ETH_P_IP) => outside::<UplinkIn, V4>(&skb),
        Some(ETH_P_IPV6) => outside::<UplinkIn, V6>(&skb),
        _ => TO_STACK,
    }
}

/// The same of one family, and of the hook that the packet came in by.
#[inline(always)]
fn outside<H: Place, F: Reject>(skb: &Skb) -> i32 {
    let mut from = Tunnel::NONE;
    if H::CODE == hooks::OVERLAY_IN {
        overlay::read(skb, &mut from);
    }
    let result = external_steps::<F>(skb, &from, H::CODE);
    if matches!(result.result(), Ok(direct::SEND)) {
        tail::jump(&TcContext::new(skb.raw()), tail::DIRECT_OUT);
        return verdict::<H, F>(skb, ETH_LEN, Err(DropReason::BackendLookupFailed.into()));
    }
    if log::is_on() {
        F::log(result, skb.ifindex(), H::CODE);
    }
    verdict::<H, F>(skb, ETH_LEN, result.result())
}

/// As [`steps`].
#[inline(never)]
fn external_steps<F: Steps>(skb: &Skb, from: &Tunnel, hook: u8) -> PackedResult {
    let source = if hook == hooks::OVERLAY_IN { source::of_tunnel(from) } else { source::OUTSIDE };
    PackedResult::new(external::run::<F>(skb, source, hook))
}

/// The part of `external_in` for flows whose backend on another node answers directly, attached nowhere.
#[classifier]
pub fn direct_out(ctx: TcContext) -> i32 {
    let skb = Skb(ctx.skb.skb);
    match parse::ethertype(&skb) {
        Some(ETH_P_IP) => direct_to_node::<V4>(&skb),
        Some(ETH_P_IPV6) => direct_to_node::<V6>(&skb),
        _ => TO_STACK,
    }
}

/// The same of one family.
#[inline(always)]
fn direct_to_node<F: Reject + Wrap>(skb: &Skb) -> i32 {
    let result = direct_out_steps::<F>(skb);
    if log::is_on() {
        F::log(result, skb.ifindex(), UplinkIn::CODE);
    }
    verdict::<UplinkIn, F>(skb, ETH_LEN, result.result())
}

/// As [`steps`].
#[inline(never)]
fn direct_out_steps<F: Steps + Wrap>(skb: &Skb) -> PackedResult {
    PackedResult::new(direct::send::<F>(skb, UplinkIn::CODE))
}

/// Where another node's `direct_out` sends to. The answers would go to that node.
enum DirectIn<H> {
    #[allow(dead_code, reason = "no value of the type is ever made")]
    From(H),
}
impl<H: Place> Place for DirectIn<H> {
    const CODE: u8 = H::CODE;
    const REPLY_PATH: ReplyPath = H::REPLY_PATH;
    const ANSWERS: bool = false;
}

/// The part of `uplink_in` and `overlay_in` for packets of another node's `direct_out`, attached nowhere.
#[classifier]
pub fn direct_in(ctx: TcContext) -> i32 {
    let skb = Skb(ctx.skb.skb);
    let is_tunneled = maps::config().is_some_and(|config| config.overlay != 0 && config.overlay == skb.ifindex());
    match parse::ethertype(&skb) {
        Some(ETH_P_IP) if is_tunneled => direct_to_pod::<OverlayIn, V4>(&skb),
        Some(ETH_P_IPV6) if is_tunneled => direct_to_pod::<OverlayIn, V6>(&skb),
        Some(ETH_P_IP) => direct_to_pod::<UplinkIn, V4>(&skb),
        Some(ETH_P_IPV6) => direct_to_pod::<UplinkIn, V6>(&skb),
        _ => TO_STACK,
    }
}

/// The same of one family, and of the hook that the packet came in by.
#[inline(always)]
fn direct_to_pod<H: Place, F: Reject + Wrap>(skb: &Skb) -> i32 {
    let result = direct_in_steps::<F>(skb, H::CODE);
    if log::is_on() {
        F::log(result, skb.ifindex(), H::CODE);
    }
    verdict::<DirectIn<H>, F>(skb, ETH_LEN + F::WRAP_LEN as usize, result.result())
}

/// As [`steps`].
#[inline(never)]
fn direct_in_steps<F: Steps + Wrap>(skb: &Skb, hook: u8) -> PackedResult {
    PackedResult::new(direct::receive::<F>(skb, hook))
}

/// The part of `from_pod`, `uplink_in` and `overlay_in` for later fragments whose first has not come before them, attached nowhere.
#[classifier]
pub fn fragment_in(ctx: TcContext) -> i32 {
    let skb = Skb(ctx.skb.skb);
    match parse::ethertype(&skb) {
        Some(ETH_P_IP) => without_first::<V4>(&skb),
        Some(ETH_P_IPV6) => without_first::<V6>(&skb),
        _ => TC_ACT_SHOT,
    }
}

/// The same of one family.
#[inline(always)]
fn without_first<F: Reject>(skb: &Skb) -> i32 {
    let hook = fragment::hook_of::<F>();
    let result = fragment_steps::<F>(skb, hook);
    if log::is_on() {
        F::log(result, skb.ifindex(), hook);
    }
    match hook {
        hooks::FROM_POD => verdict::<FromPod, F>(skb, ETH_LEN, result.result()),
        hooks::OVERLAY_IN => verdict::<OverlayIn, F>(skb, ETH_LEN, result.result()),
        _ => verdict::<UplinkIn, F>(skb, ETH_LEN, result.result()),
    }
}

/// As [`steps`].
#[inline(never)]
fn fragment_steps<F: Steps>(skb: &Skb, hook: u8) -> PackedResult {
    PackedResult::new(fragment::run::<F>(skb, hook))
}

/// TC ingress of this host's other devices with addresses.
#[classifier]
pub fn side_in(ctx: TcContext) -> i32 {
    let skb = Skb(ctx.skb.skb);
    if mark::is_processed(&skb) { TO_STACK } else { dispatch::<SideIn>(&skb, &Tunnel::NONE) }
}

/// XDP of the uplink, before `uplink_in`.
#[xdp]
pub fn uplink_xdp(ctx: XdpContext) -> u32 {
    let xdp = Xdp(ctx.ctx);
    let mut outside = Outside::NONE;
    let result = match parse::ethertype(&xdp) {
        Some(ETH_P_IP) => express::<V4>(&xdp, &mut outside),
        Some(ETH_P_IPV6) => express::<V6>(&xdp, &mut outside),
        _ => return xdp_action::XDP_PASS,
    };
    let (reason, verdict) = match result.result() {
        Ok(0) => return xdp_action::XDP_PASS,
        Ok(_) => (DropReason::Forwarded, xdp_action::XDP_TX),
        Err(dropped) => (dropped.reason, xdp_action::XDP_DROP),
    };
    event::count(&xdp, reason as u8, hooks::UPLINK_XDP);
    verdict
}

/// One family of a frame: 1 if it goes back by its device, 0 if it passes.
#[inline(always)]
fn express<F: Express>(xdp: &Xdp, outside: &mut Outside) -> PackedResult {
    let pass = PackedResult::new(Ok(0));
    let Some(config) = maps::config() else { return pass };
    if config.flags & flags::EXTERNAL == 0 {
        return pass;
    }
    if !tunnel::is_for_port::<F, _>(xdp, config) {
        return F::express(xdp, 0, 0, 0);
    }
    if !hook::xdp::read_tunnel::<F>(xdp, config, outside) {
        return pass;
    }
    let (high, low) = outside.tunnel.remote.halves();
    match outside.ethertype {
        ETH_P_IP => V4::express(xdp, F::OVERHEAD, high, low),
        ETH_P_IPV6 => V6::express(xdp, F::OVERHEAD, high, low),
        _ => pass,
    }
}

/// XDP of one family. A function with global linkage: the verifier checks it once, not once for each family of outer packets.
trait Express: hook::xdp::Forward {
    /// See [`express`]. `overhead`: bytes in front of the packet that are not the Ethernet header's, 0 for a packet out of no tunnel; `high`
    /// and `low` are the halves of the tunnel's far end.
    fn express(xdp: &Xdp, overhead: u32, high: u64, low: u64) -> PackedResult;
}

/// Declares that function of a family.
macro_rules! express {
    ($family:ident, $name:ident) => {
        impl Express for $family {
            #[inline(always)]
            fn express(xdp: &Xdp, overhead: u32, high: u64, low: u64) -> PackedResult {
                PackedResult::from_bits($name(xdp.raw(), overhead, high, low))
            }
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $name(xdp: *mut xdp_md, overhead: u32, high: u64, low: u64) -> u64 {
            let sent = hook::xdp::run::<$family>(&Xdp(xdp), overhead & 0x7f, Addr::from_halves(high, low));
            PackedResult::new(sent.map(i32::from).map_err(Dropped::from)).bits()
        }
    };
}

express!(V4, rn_express4);
express!(V6, rn_express6);

/// TC egress of the uplink.
#[classifier]
pub fn uplink_out(ctx: TcContext) -> i32 {
    let skb = Skb(ctx.skb.skb);
    if mark::take_processed(&skb) { TO_STACK } else { dispatch::<UplinkOut>(&skb, &Tunnel::NONE) }
}

/// TC ingress of the overlay device.
#[classifier]
pub fn overlay_in(ctx: TcContext) -> i32 {
    let skb = Skb(ctx.skb.skb);
    if mark::take_processed(&skb) {
        // The answer of `overlay_out` to a packet of this host.
        return TO_STACK;
    }
    let mut from = Tunnel::NONE;
    overlay::read(&skb, &mut from);
    // The inner frame bears the sender's idea of our MAC; what comes out of the tunnel is for this host all the same.
    skb.set_packet_host();
    dispatch::<OverlayIn>(&skb, &from)
}

/// TC egress of the overlay device. The mark stays on: the outer packet needs no steps at the uplink either.
#[classifier]
pub fn overlay_out(ctx: TcContext) -> i32 {
    let skb = Skb(ctx.skb.skb);
    if mark::is_processed(&skb) { TO_STACK } else { dispatch::<OverlayOut>(&skb, &Tunnel::NONE) }
}

/// Attached nowhere: run by the agent through `BPF_PROG_TEST_RUN` to read the clock that connections are stamped with.
#[classifier]
pub fn clock(_ctx: TcContext) -> i32 {
    (jiffies() & 0x7fff_ffff) as i32
}

/// Never reached: the build refuses an object in which a panic survived.
#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The kernel refuses GPL-only helpers to programs without this license string.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
