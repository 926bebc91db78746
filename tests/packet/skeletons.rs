//! Skeletons of the next stage's programs: XDP decides on frames from outside as `uplink_in` does, and passes them all.

use crate::flows::{ALL, PORT, from_a, from_outside, later};
use crate::frame::Frame;
use crate::harness::{BOTH, Lab, Net, REDIRECT, SHOT, STACK, lab_of_skeletons};
use anyhow::{Context, Result, ensure};
use rustnet_common::addr::{Addr, Address};
use rustnet_common::drop::{DropReason, hook};
use rustnet_common::skeleton::{Decision, verdict};
use std::net::IpAddr;

/// `XDP_PASS`: linux/bpf.h.
const XDP_PASS: u32 = 2;

/// The skeleton's decision on a frame, and what became of the frame at the hook, are the same, and of this kind.
fn alike(lab: &Lab, frame: &Frame, wanted: u32) -> Result<Decision> {
    let bytes = frame.bytes();
    let table = lab.datapath().table::<u32, Decision>("rn_decision")?;
    // So that a decision of the run before is none of this one.
    let none = Addr::UNSPECIFIED;
    table.put(&0, &Decision { verdict: 0, detail: 0, src: none, dst: none, sport: 0, dport: 0, ttl: 0 })?;
    let returned = lab.datapath().run_skeleton("skeleton_xdp", &bytes)?;
    ensure!(returned == XDP_PASS, "the skeleton returned {returned}");
    let decided = table.get(&0)?.context("no decision")?;
    ensure!(decided.verdict == wanted, "{decided:?} instead of {wanted}");
    let shot = lab.uplink_in(frame)?;
    let reason = |code: u32| (code as u8, hook::UPLINK_IN);
    match wanted {
        verdict::STACK => {
            ensure!(shot.verdict == STACK && shot.frame == bytes, "{shot:?}");
        }
        verdict::DROP => {
            // Some are refused with an answer.
            ensure!([SHOT, REDIRECT].contains(&shot.verdict), "{shot:?}");
            ensure!(shot.counted.keys().eq([&reason(decided.detail)]), "{decided:?} and {shot:?}");
        }
        _ => {
            ensure!(shot.verdict == REDIRECT && shot.counted.keys().eq([&reason(0)]), "{shot:?}");
            let ip = |addr: Addr| IpAddr::from(addr);
            let (src, dst) = ((ip(decided.src), decided.sport), (ip(decided.dst), decided.dport));
            let leaves = frame.hop().between(src, dst).map(|f| f.ttl = decided.ttl as u8);
            ensure!(shot.frame == leaves.bytes(), "{decided:?} and {shot:?}");
        }
    }
    Ok(decided)
}

fn dropped(lab: &Lab, frame: &Frame, reason: DropReason) -> Result<()> {
    let decided = alike(lab, frame, verdict::DROP)?;
    ensure!(decided.detail == reason as u32, "{:?} instead of {reason:?}", DropReason::from_code(decided.detail as u8));
    Ok(())
}

fn each(test: impl Fn(&Lab, Net) -> Result<()> + Send + Sync) -> Result<()> {
    lab_of_skeletons(|lab| BOTH.into_iter().try_for_each(|net| test(lab, net).with_context(|| format!("{net:?}"))))
}

#[test]
fn xdp_decides_as_the_hook_does() -> Result<()> {
    each(|lab, net| {
        for proto in ALL {
            // A new flow to a pod, known from the second packet on.
            let ask = from_outside(proto, (net.routed(), PORT), (net.a(), 80));
            for frame in [ask.clone(), later(&ask)] {
                let decided = alike(lab, &frame, verdict::FORWARD).with_context(|| format!("{proto:?} to a pod"))?;
                ensure!(decided.detail == crate::harness::POD_A, "{decided:?}");
            }
            // The answer to a masqueraded flow.
            let ask = from_a(net, proto, (net.world(), 443));
            lab.pod_sends(&ask)?;
            let answer = ask.hop().between((net.node(), PORT), (net.world(), 443)).reply();
            let decided = alike(lab, &answer, verdict::FORWARD).with_context(|| format!("{proto:?} answers"))?;
            ensure!(IpAddr::from(decided.dst) == net.a(), "{decided:?}");
            // What is the host's own.
            alike(lab, &from_outside(proto, (net.world(), PORT), (net.node(), 22)), verdict::STACK)?;
        }
        Ok(())
    })
}

#[test]
fn xdp_drops_for_the_hooks_reasons() -> Result<()> {
    each(|lab, net| {
        for proto in ALL {
            lab.serve(net.vip(1), 80, proto.number(net), 0, &[(net.b(), 8080)])?;
            let from_world = |dst| from_outside(proto, (net.world(), PORT), dst);
            dropped(lab, &from_world((net.vip(1), 80)), DropReason::IsClusterIp)?;
            dropped(lab, &from_outside(proto, (net.b(), PORT), (net.a(), 80)), DropReason::Spoofed)?;
            dropped(lab, &from_world((net.a(), 80)).map(|f| f.ttl = 1), DropReason::TtlExceeded)?;
        }
        Ok(())
    })
}

/// The look at IPv4 options is a function of each context.
#[test]
fn xdp_reads_ipv4_options() -> Result<()> {
    each(|lab, net| {
        if net == Net::V6 {
            return Ok(());
        }
        for proto in ALL {
            let ask = from_outside(proto, (net.routed(), PORT), (net.a(), 80));
            alike(lab, &ask.map(|f| f.options = vec![1; 8]), verdict::FORWARD)?;
            // A loose source route without addresses, and the end of the list.
            dropped(lab, &ask.map(|f| f.options = vec![131, 3, 4, 0]), DropReason::SourceRoute)?;
        }
        Ok(())
    })
}
