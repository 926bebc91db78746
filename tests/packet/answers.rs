//! What this node answers itself: errors that their receiver accepts, none where none is due, and
//! never too many.

mod hops;
mod sizes;

use crate::errors::{error, reset};
use crate::flows::{Proto, from_a, from_b, from_host, from_outside};
use crate::frame::{FIN, Frame, RST, SYN};
use crate::harness::{
    BOTH, Flow, HZ, Lab, MAC_A, MAC_HOST, MAC_OUT, Net, OVERLAY_MTU, POD_A, POD_B, REDIRECT, SHOT, UPLINK, lab_apart,
    labs,
};
use crate::icmp::kinds;
use anyhow::{Context, Result, bail, ensure};
use rustnet_common::drop::{DropReason, hook};
use testkit::datapath::Input;

/// Nothing answers an error, a later fragment, or a reset (RFC 1122, 3.2.2).
#[test]
fn no_error_about_errors() -> Result<()> {
    labs(|lab, net| {
        let about = from_b(net, Proto::Udp, (net.a(), 2));
        lab.pod_sends(&about)?.to_the_pod(&about.hop())?;
        let e = error(&about, net.a(), kinds(net)[0], 1000).map(|f| {
            (f.smac, f.dmac, f.ttl) = (MAC_A, MAC_HOST, 1);
        });
        lab.pod_sends(&e)?.dropped(DropReason::TtlExceeded)?;
        let rst = from_a(net, Proto::Tcp, (net.b(), 80)).with_flags(RST).map(|f| f.ttl = 1);
        lab.pod_sends(&rst)?.dropped(DropReason::TtlExceeded)
    })
}

/// Decorations between the IP header and TCP: IPv4 options of each length, IPv6 extension headers.
fn decorated(net: Net, f: &Frame) -> Vec<Frame> {
    match net {
        Net::V4 => (1..=10).map(|words| f.map(|f| f.options = vec![1; words * 4])).collect(),
        Net::V6 => {
            let pad = |kind, words: usize| {
                let mut bytes = vec![0; 8 + words * 8];
                (bytes[1], bytes[2], bytes[3]) = (words as u8, 1, (4 + words * 8) as u8);
                (kind, bytes)
            };
            [vec![pad(0, 0)], vec![pad(60, 0)], vec![pad(60, 5)], vec![pad(0, 1), pad(60, 2)], vec![pad(60, 10)]]
                .map(|chain| f.map(|f| f.extensions = chain))
                .to_vec()
        }
    }
}

/// A refusal of TCP has no options, whatever the segment had.
#[test]
fn resets_of_segments_with_options() -> Result<()> {
    labs(|lab, net| {
        lab.serve(net.vip(1), 80, 6, 0, &[])?;
        for flags in [SYN, SYN | FIN] {
            for data in [&b""[..], b"x", b"early data of a SYN"] {
                let ask =
                    from_a(net, Proto::Tcp, (net.vip(1), 80)).with_flags(flags).map(|f| f.payload = data.to_vec());
                for f in decorated(net, &ask) {
                    let place = || format!("{} + {:?}, {} bytes", f.options.len(), f.extensions, data.len());
                    lab.pod_sends(&f)?.answered(DropReason::NoBackend, &reset(&f)).with_context(place)?;
                    let host = f.map(|f| {
                        (f.smac, f.dmac) = (MAC_HOST, MAC_OUT);
                        f.src = net.node();
                    });
                    lab.uplink_out(&host)?.answered(DropReason::NoBackend, &reset(&host)).with_context(place)?;
                }
            }
        }
        Ok(())
    })
}

/// Sends a frame again and again; gives how often it was answered.
pub fn burst(lab: &Lab, code: u8, ifindex: u32, f: &Frame, reason: DropReason) -> Result<u64> {
    let bytes = f.bytes();
    let before = lab.datapath().counts()?;
    let mut answers = 0;
    for _ in 0..BURST {
        let input = Input { frame: &bytes, ifindex, ..Input::default() };
        let out = lab.datapath().run(hook::NAMES[code as usize], &input)?.context("no sum was asked for")?;
        match out.verdict {
            REDIRECT => answers += 1,
            SHOT => {}
            verdict => bail!("verdict {verdict}"),
        }
    }
    let count =
        |counts: &std::collections::BTreeMap<(u8, u8), u64>| counts.get(&(reason as u8, code)).copied().unwrap_or(0);
    let counted = count(&lab.datapath().counts()?) - count(&before);
    ensure!(counted == BURST, "{counted} of {BURST} are counted as {}", reason.name());
    Ok(answers)
}

pub const BURST: u64 = 8000;

/// A node limits the errors that it sends (RFC 4443, 2.4(f); RFC 1812, 4.3.2.8): a sender with a
/// forged source would make it a reflector, twice as loud.
#[test]
fn errors_are_limited() -> Result<()> {
    for net in BOTH {
        for kind in 0..4 {
            lab_apart(|lab| {
                lab.serve(net.vip(1), 80, 17, 0, &[])?;
                let (code, ifindex, f, reason) = match kind {
                    0 => {
                        let f = from_outside(Proto::Udp, (net.routed(), 1), (net.b(), 80)).map(|f| f.ttl = 1);
                        (hook::UPLINK_IN, UPLINK, f, DropReason::TtlExceeded)
                    }
                    1 => {
                        let f = from_a(net, Proto::Udp, (net.world(), 33_434)).map(|f| f.ttl = 1);
                        (hook::FROM_POD, POD_A, f, DropReason::TtlExceeded)
                    }
                    2 => (hook::FROM_POD, POD_A, from_a(net, Proto::Udp, (net.vip(1), 80)), DropReason::NoBackend),
                    _ => {
                        let f = from_a(net, Proto::Udp, (net.far(), 80)).with_length(OVERLAY_MTU + 1);
                        let all = burst(lab, hook::FROM_POD, POD_A, &f, DropReason::FragNeeded)?;
                        ensure!(all == BURST, "{net:?}: {all} of {BURST}: a pod's own packets are too big");
                        return Ok(());
                    }
                };
                let answers = burst(lab, code, ifindex, &f, reason)?;
                ensure!(answers > 0, "{net:?}: no error is sent at all for {}", reason.name());
                ensure!(answers < BURST / 2, "{net:?}: {answers} errors for {BURST} packets, {}", reason.name());
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// The clock starts five minutes before its 32 bits wrap (`INITIAL_JIFFIES`), and the buckets of a
/// new load start at 0: a time that lies ahead. A bucket belongs to one CPU, where no time lies
/// ahead of now: it is one of long ago.
#[test]
fn a_bucket_of_before_the_wrap_is_filled_again() -> Result<()> {
    lab_apart(|lab| {
        let net = Net::V4;
        lab.serve(net.vip(1), 80, 17, 0, &[])?;
        let ask = from_a(net, Proto::Udp, (net.b(), 80));
        lab.pod_sends(&ask)?;
        let now = lab.half(Flow::of(&ask))?.seen;
        let before_the_wrap = now.wrapping_add(200 * HZ);
        for bucket in 0..3 {
            lab.datapath().fill_percpu("rn_limits", bucket, &[before_the_wrap, 1000])?;
        }
        let refused = from_a(net, Proto::Udp, (net.vip(1), 80));
        let answers = burst(lab, hook::FROM_POD, POD_A, &refused, DropReason::NoBackend)?;
        ensure!(answers > 0, "no error is sent until the clock wraps");
        ensure!(!lab.datapath().events().is_empty(), "no drop is recorded until the clock wraps");
        Ok(())
    })
}

/// A pod that asks for errors all the time does not take those of others: without "too big", a
/// connection of theirs stands still.
#[test]
fn errors_of_one_pod_do_not_take_anothers() -> Result<()> {
    for net in BOTH {
        lab_apart(|lab| {
            let f = from_b(net, Proto::Udp, (net.world(), 33_434)).map(|f| f.ttl = 1);
            burst(lab, hook::FROM_POD, POD_B, &f, DropReason::TtlExceeded)?;
            let bytes = from_a(net, Proto::Udp, (net.far(), 80)).with_length(OVERLAY_MTU + 1).bytes();
            let input = Input { frame: &bytes, ifindex: POD_A, ..Input::default() };
            let out = lab.datapath().run(hook::NAMES[hook::FROM_POD as usize], &input)?;
            let verdict = out.context("no sum was asked for")?.verdict;
            ensure!(verdict == REDIRECT, "{net:?}: verdict {verdict}: no error for pod A");
            lab.serve(net.vip(1), 80, 17, 0, &[(net.far(), 8080)])?;
            let bytes = from_host(net, Proto::Udp, (net.vip(1), 80)).with_length(OVERLAY_MTU + 1).bytes();
            let input = Input { frame: &bytes, ifindex: UPLINK, ..Input::default() };
            let out = lab.datapath().run(hook::NAMES[hook::UPLINK_OUT as usize], &input)?;
            let verdict = out.context("no sum was asked for")?.verdict;
            ensure!(verdict == REDIRECT, "{net:?}: verdict {verdict}: no error for the host");
            Ok(())
        })?;
    }
    Ok(())
}

/// Clients outside neither: whoever asks for refusals all the time does not take the size of the path from those who upload.
#[test]
fn errors_of_one_client_outside_do_not_take_anothers() -> Result<()> {
    for net in BOTH {
        lab_apart(|lab| {
            lab.publish(net.node(), 30_080, 17, 0, &[])?;
            let f = from_outside(Proto::Udp, (net.router(), 1), (net.node(), 30_080));
            burst(lab, hook::UPLINK_IN, UPLINK, &f, DropReason::NoBackend)?;
            lab.publish(net.node(), 30_081, 17, 0, &[(net.far(), 80)])?;
            let bytes =
                from_outside(Proto::Udp, (net.world(), 1), (net.node(), 30_081)).with_length(OVERLAY_MTU + 1).bytes();
            let input = Input { frame: &bytes, ifindex: UPLINK, ..Input::default() };
            let out = lab.datapath().run(hook::NAMES[hook::UPLINK_IN as usize], &input)?;
            let verdict = out.context("no sum was asked for")?.verdict;
            ensure!(verdict == REDIRECT, "{net:?}: verdict {verdict}: no error for the other client");
            Ok(())
        })?;
    }
    Ok(())
}
