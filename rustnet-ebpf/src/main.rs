//! The kernel side of rustnet: one function per hook. Each finds the family, runs the hook's steps, and turns their result
//! into a verdict in one place, [`verdict`].
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
mod maps;
mod parse;
mod rewrite;
mod step;

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use rustnet_common::addr::{Addr, Address};
use rustnet_common::drop::{DropReason, hook as hooks};

use crate::ctx::{Skb, jiffies};
use crate::family::{Family, V4, V6};
use crate::parse::{ETH_P_IP, ETH_P_IPV6};
use crate::step::forward::{Back, STACK};
use crate::step::{Packed, Stop};

/// Turns the result of a hook into what the kernel shall do; the one place where a drop or an answer is decided.
#[inline(always)]
fn verdict<H: Hook, F: Sink>(skb: &Skb, l3: usize, result: Result<i32, Stop>) -> i32 {
    match result {
        Ok(STACK) => STACK,
        Ok(action) => {
            event::count(skb, DropReason::Forwarded as u8, H::CODE);
            action
        }
        Err(stop) => match stop.reason {
            DropReason::NoBackend | DropReason::NoServicePort | DropReason::TtlExceeded | DropReason::FragNeeded => {
                F::report(skb, l3, stop.reason, H::CODE);
                F::answer(skb, l3, stop, H::BACK)
            }
            DropReason::Forwarded
            | DropReason::Malformed
            | DropReason::InvalidExthdr
            | DropReason::Spoofed
            | DropReason::UnknownSender
            | DropReason::EncapProhibited
            | DropReason::NoLocalBackend
            | DropReason::BackendLookupFailed
            | DropReason::NatNoMapping
            | DropReason::CtCreateFailed
            | DropReason::FragNotFound
            | DropReason::IsClusterIp
            | DropReason::NoFib
            | DropReason::WriteError
            | DropReason::HostHairpin
            | DropReason::IcmpUnrelated
            | DropReason::NdNotForwarded => {
                F::report(skb, l3, stop.reason, H::CODE);
                TC_ACT_SHOT
            }
        },
    }
}

/// What follows a refusal. A function with global linkage: the verifier proves it once, not once for every way that leads
/// to it, which made the programs a hundred times dearer to load.
trait Sink: Family {
    /// Answers, see [`step::reject::answer`].
    fn answer(skb: &Skb, l3: usize, stop: Stop, back: Back) -> i32;
}

/// Declares the global function of a family.
macro_rules! sink {
    ($family:ident, $answer:ident) => {
        impl Sink for $family {
            #[inline(always)]
            fn answer(skb: &Skb, l3: usize, stop: Stop, back: Back) -> i32 {
                $answer(skb.raw(), l3 as u32, u32::from(stop.reason as u8), stop.mtu, back as u32)
            }
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $answer(skb: *mut __sk_buff, l3: u32, reason: u32, mtu: u32, back: u32) -> i32 {
            let Some(reason) = DropReason::from_code(reason as u8) else { return TC_ACT_SHOT };
            let back = Back::from_code(back);
            step::reject::answer::<$family>(&Skb(skb), (l3 & 0x1f) as usize, Stop { reason, mtu }, back)
        }
    };
}

sink!(V4, rn_answer4);
sink!(V6, rn_answer6);

/// A place in the kernel where packets pass.
trait Hook {
    /// Its code in counters and events.
    const CODE: u8;
    /// Where answers of ours go from here.
    const BACK: Back;
    /// Runs its steps; `remote` is the tunnel's far end where there is one.
    fn run<F: Family>(skb: &Skb, l3: usize, remote: &Addr) -> Result<i32, Stop>;
}

/// One family's part of a hook: a function of its own, so that it has a stack frame of its own.
#[inline(never)]
fn steps<H: Hook, F: Sink>(skb: &Skb, l3: usize, remote: &Addr) -> Packed {
    Packed::new(H::run::<F>(skb, l3, remote))
}

#[inline(always)]
fn one_family<H: Hook, F: Sink>(skb: &Skb, l3: usize, remote: &Addr) -> i32 {
    verdict::<H, F>(skb, l3, steps::<H, F>(skb, l3, remote).result())
}

/// Runs a hook for the packet's family. What is not IP (ARP above all) is the stack's.
#[inline(always)]
fn dispatch<H: Hook>(skb: &Skb, remote: &Addr) -> i32 {
    match parse::ethernet(skb) {
        Some((l3, ETH_P_IP)) => one_family::<H, V4>(skb, l3, remote),
        Some((l3, ETH_P_IPV6)) => one_family::<H, V6>(skb, l3, remote),
        _ => STACK,
    }
}

/// Declares the type of a hook.
macro_rules! hook {
    ($type:ident, $code:expr, $back:expr, $run:path $(, $remote:ident)?) => {
        enum $type {}
        impl Hook for $type {
            const CODE: u8 = $code;
            const BACK: Back = $back;
            #[inline(always)]
            fn run<F: Family>(skb: &Skb, l3: usize, _remote: &Addr) -> Result<i32, Stop> {
                $(let $remote = _remote;)?
                $run(skb, l3 $(, $remote)?)
            }
        }
    };
}

hook!(FromPod, hooks::FROM_POD, Back::Pod, hook::from_pod::run::<F>);
hook!(ToPod, hooks::TO_POD, Back::Host, hook::to_pod::run::<F>);
hook!(UplinkIn, hooks::UPLINK_IN, Back::Uplink, hook::uplink::run_in::<F>);
hook!(UplinkOut, hooks::UPLINK_OUT, Back::Host, hook::uplink::run_out::<F>);
hook!(OverlayIn, hooks::OVERLAY_IN, Back::Tunnel, hook::overlay::run_in::<F>, remote);
hook!(OverlayOut, hooks::OVERLAY_OUT, Back::Host, hook::overlay::run_out::<F>);

/// TC ingress of a pod's host-side veth.
#[classifier]
pub fn from_pod(ctx: TcContext) -> i32 {
    dispatch::<FromPod>(&Skb(ctx.skb.skb), &Addr::UNSPECIFIED)
}

/// TC egress of a pod's host-side veth.
#[classifier]
pub fn to_pod(ctx: TcContext) -> i32 {
    let skb = Skb(ctx.skb.skb);
    if hook::done(&skb) { STACK } else { dispatch::<ToPod>(&skb, &Addr::UNSPECIFIED) }
}

/// TC ingress of the uplink.
#[classifier]
pub fn uplink_in(ctx: TcContext) -> i32 {
    let skb = Skb(ctx.skb.skb);
    if hook::done(&skb) { STACK } else { dispatch::<UplinkIn>(&skb, &Addr::UNSPECIFIED) }
}

/// TC egress of the uplink.
#[classifier]
pub fn uplink_out(ctx: TcContext) -> i32 {
    let skb = Skb(ctx.skb.skb);
    if hook::done(&skb) { STACK } else { dispatch::<UplinkOut>(&skb, &Addr::UNSPECIFIED) }
}

/// TC ingress of the overlay device.
#[classifier]
pub fn overlay_in(ctx: TcContext) -> i32 {
    let skb = Skb(ctx.skb.skb);
    let mut remote = Addr::UNSPECIFIED;
    step::source::tunnel_remote(&skb, &mut remote);
    // The inner frame bears the sender's idea of our MAC; what comes out of the tunnel is for this host all the same.
    skb.accept();
    dispatch::<OverlayIn>(&skb, &remote)
}

/// TC egress of the overlay device.
#[classifier]
pub fn overlay_out(ctx: TcContext) -> i32 {
    let skb = Skb(ctx.skb.skb);
    if hook::done(&skb) { STACK } else { dispatch::<OverlayOut>(&skb, &Addr::UNSPECIFIED) }
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

/// Without it the kernel lends no GPL-only helper.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
