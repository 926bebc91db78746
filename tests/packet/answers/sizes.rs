//! Packets that do not fit into the next link: reported as too big, cut, or measured by their
//! segments.

use crate::errors::icmp_error;
use crate::flows::{ALL, Proto, SERVED, at_backend, from_a, from_host, later};
use crate::frame::Frame;
use crate::harness::{Lab, MAC_B, NARROW_MTU, Net, OVERLAY_MTU, POD_A, POD_B, POD_B_MTU, REDIRECT, STACK, each, labs};
use anyhow::{Context, Result, ensure};
use rustnet_common::drop::{DropReason, hook};
use rustnet_common::endpoint;
use std::net::IpAddr;
use testkit::datapath::Input;

/// A packet of pod A that has this length.
fn sized(net: Net, proto: Proto, dst: (IpAddr, u16), total: usize) -> Frame {
    later(&from_a(net, proto, dst)).with_length(total)
}

/// "Too big", from this address.
fn too_big(net: Net, f: &Frame, src: IpAddr, mtu: usize) -> Frame {
    let (kind, code) = if net == Net::V4 { (3, 4) } else { (2, 0) };
    icmp_error(f, src, kind, code, mtu as u32)
}

#[test]
fn what_does_not_fit_is_reported() -> Result<()> {
    labs(|lab, net| {
        each(&ALL, |proto| {
            for (dst, mtu) in
                [(net.far(), OVERLAY_MTU), (net.routed(), 1500), (net.narrow(), NARROW_MTU), (net.world(), 1500)]
            {
                let dst = (dst, proto.port(80));
                let fits = sized(net, proto, dst, mtu);
                let shot = lab.pod_sends(&fits)?;
                ensure!(shot.verdict == REDIRECT && shot.counted.len() == 1, "{mtu} bytes to {dst:?}: {shot:?}");
                let f = sized(net, proto, dst, mtu + 1);
                lab.pod_sends(&f)?
                    .answered(DropReason::FragNeeded, &too_big(net, &f, net.node(), mtu))
                    .with_context(|| format!("to {}", dst.0))?;
            }
            Ok(())
        })
    })
}

/// Into the queue of a limited pod goes what its interface takes.
#[test]
fn what_does_not_fit_a_limited_pods_interface() -> Result<()> {
    labs(|lab, net| {
        lab.put_endpoint_with(net.b(), POD_B, MAC_B, endpoint::flags::VIA_QDISC)?;
        each(&ALL, |proto| {
            let dst = (net.b(), proto.port(80));
            let fits = sized(net, proto, dst, POD_B_MTU);
            lab.pod_sends(&fits)?.by_the_queue(&fits.hop())?;
            let f = sized(net, proto, dst, POD_B_MTU + 1);
            lab.pod_sends(&f)?.answered(DropReason::FragNeeded, &too_big(net, &f, net.node(), POD_B_MTU))?;
            // The stack cuts what may be cut, and is the hop.
            let f = f.map(|f| f.may_be_cut = true);
            match net {
                Net::V4 => lab.pod_sends(&f)?.done_to_stack(&f),
                Net::V6 => {
                    lab.pod_sends(&f)?.answered(DropReason::FragNeeded, &too_big(net, &f, net.node(), POD_B_MTU))
                }
            }
        })
    })
}

/// Of a service, the packet quoted is the client's.
#[test]
fn what_does_not_fit_on_the_way_to_a_service() -> Result<()> {
    labs(|lab, net| {
        lab.serve(net.vip(1), 80, 6, 0, &[(net.far(), 8080)])?;
        let f = sized(net, Proto::Tcp, (net.vip(1), 80), OVERLAY_MTU + 1);
        lab.pod_sends(&f)?.answered(DropReason::FragNeeded, &too_big(net, &f, net.node(), OVERLAY_MTU))?;
        // And of an established flow.
        let ask = from_a(net, Proto::Tcp, (net.vip(1), 80));
        lab.pod_sends(&ask)?.onto_wire(&at_backend(net, &ask, net.far()))?;
        lab.pod_sends(&f)?.answered(DropReason::FragNeeded, &too_big(net, &f, net.node(), OVERLAY_MTU))
    })
}

/// An error to the host in the host's own name is a martian to it: the service that it asked
/// speaks.
#[test]
fn too_big_for_the_host() -> Result<()> {
    labs(|lab, net| {
        for proto in SERVED {
            for (n, backend, mtu) in [(1, net.far(), OVERLAY_MTU), (2, net.narrow(), NARROW_MTU)] {
                lab.serve(net.vip(n), 80, proto.number(net), 0, &[(backend, 8080)])?;
                let ask = from_host(net, proto, (net.vip(n), 80));
                for known in [false, true] {
                    if known {
                        ensure!(lab.uplink_out(&ask)?.verdict == REDIRECT);
                    }
                    let f = later(&ask).with_length(mtu + 1);
                    lab.uplink_out(&f)?
                        .answered(DropReason::FragNeeded, &too_big(net, &f, net.vip(n), mtu))
                        .with_context(|| format!("{proto:?} to {backend}, known: {known}"))?;
                }
            }
        }
        Ok(())
    })
}

/// Asserts that a frame of pod A, which stands for segments with this much payload, is forwarded,
/// or that it is too big.
fn check_segments(lab: &Lab, frame: &[u8], payload: usize, is_forwarded: bool) -> Result<()> {
    let input = Input { frame, ifindex: POD_A, gso_size: payload as u32, ..Input::default() };
    let shot = lab.raw(hook::FROM_POD, &input)?;
    let reason = if is_forwarded { DropReason::Forwarded } else { DropReason::FragNeeded };
    ensure!(shot.counted.keys().eq([&(reason as u8, hook::FROM_POD)]), "{payload} of payload: {:?}", shot.counted);
    Ok(())
}

/// A frame that stands for several segments is as long as one of them, with all its headers.
#[test]
fn segments_are_measured_one_by_one() -> Result<()> {
    labs(|lab, net| {
        let ip = if net == Net::V4 { 20 } else { 40 };
        // TCP with and without time stamps, UDP (which has shorter headers), and extension headers
        // or options.
        for (proto, l4, options) in [(Proto::Tcp, 20, 0), (Proto::Tcp, 32, 0), (Proto::Udp, 8, 0), (Proto::Udp, 8, 8)] {
            let largest = OVERLAY_MTU - ip - l4 - options;
            for (gso, fits) in [(largest, true), (largest + 1, false)] {
                let f = sized(net, proto, (net.far(), 80), 3000).map(|f| match net {
                    Net::V4 => f.options = vec![1; options],
                    Net::V6 => f.extensions = vec![(60, vec![0, 0, 1, 4, 0, 0, 0, 0]); options / 8],
                });
                let mut bytes = f.bytes();
                if l4 == 32 {
                    // A data offset of eight words; what they hold, nobody reads.
                    bytes[14 + ip + 12] = 0x80;
                }
                check_segments(lab, &bytes, gso, fits)
                    .with_context(|| format!("{proto:?}, {l4} bytes of header, {options} of options"))?;
            }
        }
        // Where each segment has a length of its own, the device or the far end has to see.
        let f = sized(net, Proto::Sctp, (net.far(), 80), 3000);
        let bytes = f.bytes();
        let input = Input { frame: &bytes, ifindex: POD_A, gso_size: 0xffff, ..Input::default() };
        lab.raw(hook::FROM_POD, &input)?.onto_wire(&f.hop())
    })
}

/// The kernel puts a jumbo option (RFC 2675) in front of what is longer than the length field can
/// say, and takes it off each segment (`ipv6_hopopt_jumbo_remove`): no segment is longer for it.
#[test]
fn segments_of_big_tcp_have_no_jumbo_option() -> Result<()> {
    labs(|lab, net| {
        if net == Net::V4 {
            return Ok(());
        }
        let largest = OVERLAY_MTU - 40 - 20;
        for (gso, fits) in [(largest, true), (largest + 1, false)] {
            let f = sized(net, Proto::Tcp, (net.far(), 80), 3000)
                .map(|f| f.extensions = vec![(0, vec![0, 0, 0xc2, 4, 0, 1, 0, 0])]);
            let mut bytes = f.bytes();
            // The length field says nothing.
            bytes[14 + 4..14 + 6].fill(0);
            check_segments(lab, &bytes, gso, fits)?;
        }
        Ok(())
    })
}

/// Without "don't fragment" no error reports that an IPv4 packet is too big: a router behind this
/// node cuts it, and so does the overlay's device with what it wraps it in (RFC 791).
#[test]
fn what_may_be_cut_is_sent_on() -> Result<()> {
    labs(|lab, net| {
        each(&ALL, |proto| {
            for (dst, mtu) in [(net.far(), OVERLAY_MTU), (net.narrow(), NARROW_MTU)] {
                let f = sized(net, proto, (dst, proto.port(80)), mtu + 1).map(|f| f.may_be_cut = true);
                let shot = lab.pod_sends(&f)?;
                match net {
                    Net::V4 => shot.onto_wire(&f.hop())?,
                    // IPv6 routers never cut.
                    Net::V6 => shot.answered(DropReason::FragNeeded, &too_big(net, &f, net.node(), mtu))?,
                }
            }
            Ok(())
        })
    })
}

/// An IPv4 packet that may be cut is cut: by the stack or by a device, and never refused (RFC 1191,
/// 4). The kernel measures it only where the neighbour is known.
#[test]
fn what_may_be_cut_is_not_refused() -> Result<()> {
    labs(|lab, net| {
        if net == Net::V6 {
            return Ok(());
        }
        lab.ip("neigh replace 172.18.0.1 lladdr 02:00:00:00:ee:01 dev eth0 nud permanent\n\
                neigh replace 172.18.0.13 lladdr 02:00:00:00:ee:01 dev eth0 nud permanent")?;
        let mut result = Ok(());
        for (dst, src) in [(net.routed(), net.a()), (net.narrow(), net.a())] {
            for size in [1519, 1600, 3000] {
                let f = from_a(net, Proto::Udp, (dst, 80)).with_length(size).map(|f| f.may_be_cut = true);
                let shot = lab.pod_sends(&f)?;
                let passed = match shot.verdict {
                    REDIRECT => shot.onto_wire(&f.hop().map(|f| f.src = src)),
                    // The stack cuts it, with the source that it has to leave with, and counts the
                    // hop itself.
                    STACK if shot.mark != 0 => shot.done_to_stack(&f.map(|f| f.src = src)),
                    STACK => shot.to_stack(&f.map(|f| f.src = src)),
                    verdict => Err(anyhow::anyhow!("verdict {verdict}, counted {:?}", shot.counted)),
                };
                result = result.and(passed.with_context(|| format!("{size} bytes to {dst}")));
            }
        }
        // The stack refuses a packet with its own source, so that nothing on this node can cut a
        // masqueraded one.
        let f = from_a(net, Proto::Udp, (net.world(), 80)).with_length(1519).map(|f| f.may_be_cut = true);
        result = result.and(
            lab.pod_sends(&f)?
                .answered(DropReason::FragNeeded, &too_big(net, &f, net.node(), 1500).map(|f| f.may_be_cut = false)),
        );
        lab.ip("neigh del 172.18.0.1 dev eth0\nneigh del 172.18.0.13 dev eth0")?;
        result
    })
}
