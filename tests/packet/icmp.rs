//! ICMP errors: translated like the flows that they quote, in every direction of every translation; and those that this
//! node makes itself where redirects bypass the kernel.

use crate::flows::{PORT, Proto, from_a, from_host, from_outside, later};
use crate::frame::{Frame, L4};
use crate::harness::{
    Flow, MAC_A, MAC_B, MAC_HOST, MAC_OUT, NARROW_MTU, Net, OVERLAY_MTU, POD_A, POD_B, POD_B_MTU, REDIRECT, UPLINK,
    labs,
};
use crate::services::icmp_error;
use anyhow::{Context, Result, ensure};
use rustnet_common::drop::{DropReason, hook};
use std::net::IpAddr;
use testkit::datapath::Input;

const PROTOS: [Proto; 4] = [Proto::Tcp, Proto::Udp, Proto::Sctp, Proto::Echo];

fn each(mut test: impl FnMut(Proto) -> Result<()>) -> Result<()> {
    PROTOS.into_iter().try_for_each(|proto| test(proto).with_context(|| format!("{proto:?}")))
}

/// Destination of a flow: echo has no port.
fn at(proto: Proto, ip: IpAddr, port: u16) -> (IpAddr, u16) {
    (ip, if proto == Proto::Echo { 0 } else { port })
}

/// Errors that hosts and routers send, by family: type, code, and what stands in the second word.
fn kinds(net: Net) -> Vec<(u8, u8, u32)> {
    match net {
        Net::V4 => vec![(3, 0, 0), (3, 1, 0), (3, 3, 0), (3, 4, 1400), (11, 0, 0), (12, 0, 0x1400_0000)],
        Net::V6 => vec![(1, 0, 0), (1, 4, 0), (2, 0, 1400), (3, 0, 0), (4, 1, 6)],
    }
}

/// An error from `src` to whoever sent `packet`, which is quoted in full up to `quote` bytes.
pub fn error(packet: &Frame, src: IpAddr, kind: (u8, u8, u32), quote: usize) -> Frame {
    let mut bytes = packet.ip_bytes();
    bytes.truncate(quote);
    packet.map(|f| {
        (f.src, f.dst) = (src, packet.src);
        (f.smac, f.dmac) = (MAC_OUT, MAC_HOST);
        f.l4 = L4::Icmp { kind: kind.0, code: kind.1, rest: kind.2 };
        f.payload = bytes;
        f.piece = None;
        f.ttl = 60;
    })
}

/// The error `before`, once what it quotes and its own ends are translated back: quoted is `packet`.
/// The quoted checksum of the transport stays what it was; nobody can verify it.
pub fn translated(before: &Frame, from_quoted: &Frame, to_quoted: &Frame, src: IpAddr) -> Frame {
    let (old, mut new) = (from_quoted.ip_bytes(), to_quoted.ip_bytes());
    let len = before.payload.len();
    let checksum = match &to_quoted.l4 {
        L4::Tcp { .. } => 16..18,
        L4::Udp { .. } => 6..8,
        L4::Echo { .. } => 2..4,
        L4::Sctp { .. } => 8..12,
        _ => 0..0,
    };
    for i in checksum {
        let fragment = if to_quoted.piece.is_some() { 8 } else { 0 };
        let at = i + if to_quoted.is_v6() { 40 + fragment } else { 20 + to_quoted.options.len() };
        new[at] = old[at];
    }
    new.truncate(len);
    before.map(|f| {
        (f.src, f.dst) = (src, to_quoted.src);
        f.payload = new;
    })
}

/// Lengths of quotations: the least that RFC 792 asks for, odd ones, and more.
fn quotes(net: Net) -> [usize; 4] {
    let header = if net == Net::V4 { 20 } else { 40 };
    [header + 8, header + 13, header + 28, 1000]
}

fn all_errors(net: Net, mut test: impl FnMut((u8, u8, u32), usize) -> Result<()>) -> Result<()> {
    for kind in kinds(net) {
        for quote in quotes(net) {
            test(kind, quote).with_context(|| format!("error {kind:?} that quotes {quote} bytes"))?;
        }
    }
    Ok(())
}

/// Router and far end complain about a masqueraded packet.
#[test]
fn about_masqueraded_packets() -> Result<()> {
    labs(|lab, net| {
        each(|proto| {
            let to = at(proto, net.world(), 443);
            let sent = from_a(net, proto, to);
            let left = sent.hop().between((net.node(), PORT), to);
            lab.pod_sends(&sent)?.onto_wire(&left)?;
            all_errors(net, |kind, quote| {
                for from in [net.router(), net.world()] {
                    let e = error(&left, from, kind, quote);
                    let want = translated(&e, &left, &sent.hop(), from).hop();
                    lab.uplink_in(&e)?.to_the_pod(&want).with_context(|| format!("from {from}"))?;
                }
                Ok(())
            })
        })
    })
}

/// What is said of a datagram's first fragment concerns the flow; the others bear no ports, and the error about them goes
/// nowhere that it could belong to.
#[test]
fn about_fragments_of_masqueraded_datagrams() -> Result<()> {
    labs(|lab, net| {
        let to = (net.world(), 443);
        let sent = from_a(net, Proto::Udp, to).map(|f| f.payload = vec![7; 3000]);
        let left = sent.hop().between((net.node(), PORT), to);
        let (sent, left) = (sent.pieces(5, &[1200, 2400]), left.pieces(5, &[1200, 2400]));
        for (piece, want) in sent.iter().zip(&left) {
            lab.pod_sends(piece)?.onto_wire(want)?;
        }
        for kind in kinds(net) {
            let e = error(&left[0], net.router(), kind, 600);
            let want = translated(&e, &left[0], &sent[0].hop(), net.router()).hop();
            lab.uplink_in(&e)?.to_the_pod(&want).with_context(|| format!("{kind:?}"))?;
            let e = error(&left[1], net.router(), kind, 600);
            lab.uplink_in(&e)?.to_stack(&e).with_context(|| format!("{kind:?} about the second"))?;
        }
        Ok(())
    })
}

/// Nobody outside complains in the name of this node or of its pods.
#[test]
fn from_outside_in_our_own_name() -> Result<()> {
    labs(|lab, net| {
        each(|proto| {
            let to = at(proto, net.world(), 443);
            let sent = from_a(net, proto, to);
            let left = sent.hop().between((net.node(), PORT), to);
            lab.pod_sends(&sent)?.onto_wire(&left)?;
            all_errors(net, |kind, quote| {
                for from in [net.node(), net.b()] {
                    let e = error(&left, from, kind, quote);
                    lab.uplink_in(&e)?.dropped(DropReason::Spoofed).with_context(|| format!("from {from}"))?;
                }
                Ok(())
            })
        })
    })
}

/// Complaints about a masqueraded packet whose port had to change.
#[test]
fn about_masqueraded_packets_with_another_port() -> Result<()> {
    labs(|lab, net| {
        each(|proto| {
            let to = at(proto, net.world(), 443);
            let sent = from_a(net, proto, to).map(|f| f.set_ports(1234, to.1));
            let _ = lab.pod_sends(&sent)?;
            let port = lab.half(Flow::of(&sent))?.to.sport;
            let left = sent.hop().between((net.node(), port), to);
            all_errors(net, |kind, quote| {
                for from in [net.router(), net.world()] {
                    let e = error(&left, from, kind, quote);
                    let want = translated(&e, &left, &sent.hop(), from).hop();
                    lab.uplink_in(&e)?.to_the_pod(&want).with_context(|| format!("from {from}"))?;
                }
                Ok(())
            })
        })
    })
}

/// The backend, or a router on the way to it, complains about what a client sent to a service.
#[test]
fn about_packets_to_a_service() -> Result<()> {
    labs(|lab, net| {
        PROTOS[..3].iter().try_for_each(|&proto| {
            for (n, backend) in [(1, net.b()), (2, net.far()), (3, net.routed())] {
                lab.serve(net.vip(n), 80, proto.number(net), 0, &[(backend, 8080)])?;
                let sent = from_a(net, proto, (net.vip(n), 80));
                let arrived = sent.hop().between((net.a(), PORT), (backend, 8080));
                let shot = lab.pod_sends(&sent)?;
                if n == 1 {
                    shot.to_the_pod(&arrived)?;
                } else {
                    shot.onto_wire(&arrived)?;
                }
                all_errors(net, |kind, quote| {
                    // The far end speaks in the service's name, a router in its own.
                    let router = if n == 3 { net.router() } else { net.node2() };
                    for (from, seen) in [(backend, net.vip(n)), (router, router)] {
                        let e = error(&arrived, from, kind, quote);
                        let want = translated(&e, &arrived, &sent.hop(), seen).hop();
                        let shot = match n {
                            1 if from == backend => {
                                let by_b = |f: &Frame| f.map(|f| (f.smac, f.dmac) = (MAC_B, MAC_HOST));
                                lab.pod_sends(&by_b(&e))?.to_the_pod(&by_b(&want)).context("by pod B")?;
                                continue;
                            }
                            1 => continue,
                            2 => lab.overlay_in(net.node2(), &e),
                            _ => lab.uplink_in(&e),
                        };
                        shot?.to_the_pod(&want).with_context(|| format!("from {from}"))?;
                    }
                    Ok(())
                })?;
            }
            Ok(())
        })
    })
}

/// The client, or a router on the way to it, complains about what a backend answered: the error goes to the backend.
#[test]
fn about_answers_of_a_backend() -> Result<()> {
    labs(|lab, net| {
        PROTOS[..3].iter().try_for_each(|&proto| {
            lab.serve(net.vip(1), 80, proto.number(net), 0, &[(net.b(), 8080)])?;
            let sent = from_a(net, proto, (net.vip(1), 80));
            let arrived = sent.hop().between((net.a(), PORT), (net.b(), 8080));
            lab.pod_sends(&sent)?.to_the_pod(&arrived)?;
            let answer = arrived.reply().map(|f| (f.smac, f.dmac, f.ttl) = (MAC_B, MAC_HOST, 64));
            let seen = answer.hop().between((net.vip(1), 80), (net.a(), PORT));
            lab.pod_sends(&answer)?.to_the_pod(&seen)?;
            all_errors(net, |kind, quote| {
                let e = error(&seen, net.a(), kind, quote).map(|f| (f.smac, f.dmac) = (MAC_A, MAC_HOST));
                let want = translated(&e, &seen, &answer.hop(), net.a()).hop();
                lab.pod_sends(&e)?.to_the_pod(&want)
            })
        })
    })
}

/// A pod complains about an answer to what it had asked of the world: its own address must not leave.
#[test]
fn about_answers_from_the_world() -> Result<()> {
    labs(|lab, net| {
        each(|proto| {
            let to = at(proto, net.world(), 443);
            let sent = from_a(net, proto, to);
            let left = sent.hop().between((net.node(), PORT), to);
            lab.pod_sends(&sent)?.onto_wire(&left)?;
            let answer = left.reply();
            let arrived = answer.hop().map(|f| f.dst = net.a());
            lab.uplink_in(&answer)?.to_the_pod(&arrived)?;
            all_errors(net, |kind, quote| {
                let e = error(&arrived, net.a(), kind, quote).map(|f| (f.smac, f.dmac) = (MAC_A, MAC_HOST));
                let want = translated(&e, &arrived, &answer.hop(), net.node()).hop();
                lab.pod_sends(&e)?.onto_wire(&want)
            })
        })
    })
}

/// The host's own stack complains about a packet of a pod: to the pod's door, as the pod sent it.
#[test]
fn by_the_host_about_packets_to_it() -> Result<()> {
    labs(|lab, net| {
        PROTOS[..3].iter().try_for_each(|&proto| {
            lab.serve(net.vip(1), 80, proto.number(net), 0, &[(net.node(), 10250)])?;
            let sent = from_a(net, proto, (net.vip(1), 80));
            let arrived = sent.between((net.a(), PORT), (net.node(), 10250));
            lab.pod_sends(&sent)?.to_stack(&arrived)?;
            all_errors(net, |kind, quote| {
                let e = error(&arrived, net.node(), kind, quote);
                let want = translated(&e, &arrived, &sent, net.vip(1));
                lab.to_pod(POD_A, &e)?.to_stack(&want)
            })
        })
    })
}

/// About plain flows, nothing changes but the way.
#[test]
fn about_flows_without_translation() -> Result<()> {
    labs(|lab, net| {
        each(|proto| {
            let sent = from_a(net, proto, at(proto, net.far(), 80));
            lab.pod_sends(&sent)?.onto_wire(&sent.hop())?;
            all_errors(net, |kind, quote| {
                let e = error(&sent.hop(), net.far(), kind, quote);
                lab.overlay_in(net.node2(), &e)?.to_the_pod(&e.hop())
            })
        })
    })
}

/// About what the host asked of a service: for its own stack, restored.
#[test]
fn about_packets_of_the_host_to_a_service() -> Result<()> {
    labs(|lab, net| {
        PROTOS[..3].iter().try_for_each(|&proto| {
            lab.serve(net.vip(1), 80, proto.number(net), 0, &[(net.routed(), 8080)])?;
            let sent = from_host(net, proto, (net.vip(1), 80));
            let left = sent.between((net.node(), PORT), (net.routed(), 8080));
            lab.uplink_out(&sent)?.onto_wire(&left)?;
            all_errors(net, |kind, quote| {
                for (from, seen) in [(net.routed(), net.vip(1)), (net.router(), net.router())] {
                    let e = error(&left, from, kind, quote);
                    lab.uplink_in(&e)?.to_stack(&translated(&e, &left, &sent, seen))?;
                }
                Ok(())
            })
        })
    })
}

#[test]
fn about_nothing_that_we_know() -> Result<()> {
    labs(|lab, net| {
        let unknown = from_outside(Proto::Udp, (net.node(), 1), (net.world(), 2));
        let e = error(&unknown, net.router(), kinds(net)[0], 1000);
        lab.uplink_in(&e)?.to_stack(&e)?;
        // A pod sends one into the world, where masquerade cannot tell whose it is.
        let unknown = from_outside(Proto::Udp, (net.world(), 1), (net.a(), 2));
        let e = error(&unknown, net.a(), kinds(net)[0], 1000).map(|f| (f.smac, f.dmac) = (MAC_A, MAC_HOST));
        lab.pod_sends(&e)?.dropped(DropReason::IcmpUnrelated)?;
        // To another pod neither, which could not tell it from a forged one.
        let unknown = from_outside(Proto::Udp, (net.b(), 1), (net.a(), 2));
        let e = error(&unknown, net.a(), kinds(net)[0], 1000).map(|f| (f.smac, f.dmac) = (MAC_A, MAC_HOST));
        lab.pod_sends(&e)?.dropped(DropReason::IcmpUnrelated)?;
        // In somebody else's name it may not.
        lab.pod_sends(&e.map(|f| f.src = net.world()))?.dropped(DropReason::Spoofed)?;
        ensure!(lab.halves()? == 0, "an error opened a connection");
        Ok(())
    })
}

/// A quotation cut off before its ports, or that is no IP packet at all.
#[test]
fn that_quote_too_little() -> Result<()> {
    labs(|lab, net| {
        let to = (net.world(), 443);
        let sent = from_a(net, Proto::Udp, to);
        let left = sent.hop().between((net.node(), PORT), to);
        lab.pod_sends(&sent)?.onto_wire(&left)?;
        let header = if net == Net::V4 { 20 } else { 40 };
        let cut = [0, 1, header - 1, header, header + 3].map(|n| error(&left, net.router(), kinds(net)[0], n));
        let no_packet = error(&left, net.router(), kinds(net)[0], 1000).map(|f| f.payload[0] ^= 0x30);
        for e in cut.into_iter().chain([no_packet]) {
            let bytes = e.bytes();
            let input = Input { frame: &bytes, ifindex: UPLINK, ..Input::default() };
            lab.raw(hook::UPLINK_IN, &input)?.to_stack(&e).with_context(|| format!("{} bytes", e.payload.len()))?;
        }
        Ok(())
    })
}

/// One of each way there is.
fn destinations(net: Net) -> [IpAddr; 4] {
    [net.b(), net.far(), net.routed(), net.world()]
}

#[test]
fn the_last_hop_is_reported() -> Result<()> {
    labs(|lab, net| {
        let (kind, code) = if net == Net::V4 { (11, 0) } else { (3, 0) };
        each(|proto| {
            for dst in destinations(net) {
                for ttl in [0, 1] {
                    let f = from_a(net, proto, at(proto, dst, 80)).map(|f| f.ttl = ttl);
                    let error = icmp_error(&f, net.node(), kind, code, 0);
                    lab.pod_sends(&f)?
                        .answered(DropReason::TtlExceeded, &error)
                        .with_context(|| format!("to {dst}"))?;
                }
                let f = from_a(net, proto, at(proto, dst, 80)).map(|f| f.ttl = 2);
                let shot = lab.pod_sends(&f)?;
                ensure!(shot.verdict == REDIRECT, "two hops are enough");
            }
            // To this node itself no hop is needed.
            let f = from_a(net, proto, at(proto, net.node(), 80)).map(|f| f.ttl = 1);
            lab.pod_sends(&f)?.to_stack(&f)
        })
    })
}

/// The error quotes what the client sent, not what it became.
#[test]
fn the_last_hop_on_the_way_to_a_service() -> Result<()> {
    labs(|lab, net| {
        let (kind, code) = if net == Net::V4 { (11, 0) } else { (3, 0) };
        lab.serve(net.vip(1), 80, 17, 0, &[(net.b(), 8080)])?;
        let f = from_a(net, Proto::Udp, (net.vip(1), 80)).map(|f| f.ttl = 1);
        lab.pod_sends(&f)?.answered(DropReason::TtlExceeded, &icmp_error(&f, net.node(), kind, code, 0))
    })
}

/// Through the uplink and through the overlay, errors of ours find their way back.
#[test]
fn the_last_hop_of_what_comes_from_outside() -> Result<()> {
    labs(|lab, net| {
        let (kind, code) = if net == Net::V4 { (11, 0) } else { (3, 0) };
        let f = from_outside(Proto::Udp, (net.routed(), 1234), (net.b(), 80)).map(|f| f.ttl = 1);
        let error = icmp_error(&f, net.node(), kind, code, 0);
        lab.uplink_in(&f)?.answered(DropReason::TtlExceeded, &error)?;
        let f = from_outside(Proto::Udp, (net.far(), 1234), (net.b(), 80)).map(|f| f.ttl = 1);
        let error = icmp_error(&f, net.node(), kind, code, 0);
        lab.overlay_in(net.node2(), &f)?.answered(DropReason::TtlExceeded, &error)
    })
}

/// Nothing answers an error, a later fragment, or a reset (RFC 1122, 3.2.2).
#[test]
fn no_error_about_errors() -> Result<()> {
    labs(|lab, net| {
        let about = crate::flows::from_b(net, Proto::Udp, (net.a(), 2));
        lab.pod_sends(&about)?.to_the_pod(&about.hop())?;
        let e = error(&about, net.a(), kinds(net)[0], 1000).map(|f| {
            (f.smac, f.dmac, f.ttl) = (MAC_A, MAC_HOST, 1);
        });
        lab.pod_sends(&e)?.dropped(DropReason::TtlExceeded)?;
        let rst = from_a(net, Proto::Tcp, (net.b(), 80)).with_flags(crate::frame::RST).map(|f| f.ttl = 1);
        lab.pod_sends(&rst)?.dropped(DropReason::TtlExceeded)
    })
}

fn sized(net: Net, proto: Proto, dst: (IpAddr, u16), total: usize) -> Frame {
    let f = later(&from_a(net, proto, dst));
    let header = f.ip_bytes().len() - f.payload.len();
    f.map(|f| f.payload = vec![0x5a; total - header])
}

fn too_big(net: Net, f: &Frame, mtu: usize) -> Frame {
    let (kind, code) = if net == Net::V4 { (3, 4) } else { (2, 0) };
    icmp_error(f, net.node(), kind, code, mtu as u32)
}

#[test]
fn what_does_not_fit_is_reported() -> Result<()> {
    labs(|lab, net| {
        each(|proto| {
            for (dst, mtu) in
                [(net.far(), OVERLAY_MTU), (net.routed(), 1500), (net.narrow(), NARROW_MTU), (net.world(), 1500)]
            {
                let dst = at(proto, dst, 80);
                let fits = sized(net, proto, dst, mtu);
                let shot = lab.pod_sends(&fits)?;
                ensure!(shot.verdict == REDIRECT && shot.counted.len() == 1, "{mtu} bytes to {dst:?}: {shot:?}");
                let f = sized(net, proto, dst, mtu + 1);
                lab.pod_sends(&f)?
                    .answered(DropReason::FragNeeded, &too_big(net, &f, mtu))
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
        lab.put_endpoint_with(net.b(), POD_B, MAC_B, rustnet_common::endpoint::flags::VIA_QDISC)?;
        each(|proto| {
            let dst = at(proto, net.b(), 80);
            let fits = sized(net, proto, dst, POD_B_MTU);
            lab.pod_sends(&fits)?.by_the_queue(&fits.hop())?;
            let f = sized(net, proto, dst, POD_B_MTU + 1);
            lab.pod_sends(&f)?.answered(DropReason::FragNeeded, &too_big(net, &f, POD_B_MTU))?;
            // The stack cuts what may be cut, and is the hop.
            let f = f.map(|f| f.may_be_cut = true);
            match net {
                Net::V4 => lab.pod_sends(&f)?.done_to_stack(&f),
                Net::V6 => lab.pod_sends(&f)?.answered(DropReason::FragNeeded, &too_big(net, &f, POD_B_MTU)),
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
        lab.pod_sends(&f)?.answered(DropReason::FragNeeded, &too_big(net, &f, OVERLAY_MTU))?;
        // And of an established flow.
        let ask = from_a(net, Proto::Tcp, (net.vip(1), 80));
        lab.pod_sends(&ask)?.onto_wire(&ask.hop().between((net.a(), PORT), (net.far(), 8080)))?;
        lab.pod_sends(&f)?.answered(DropReason::FragNeeded, &too_big(net, &f, OVERLAY_MTU))
    })
}

/// A frame that stands for several segments is as long as one of them, with all its headers.
#[test]
fn segments_are_measured_one_by_one() -> Result<()> {
    labs(|lab, net| {
        let ip = if net == Net::V4 { 20 } else { 40 };
        // TCP with and without time stamps, UDP (which has shorter headers), and extension headers or options.
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
                let input = Input { frame: &bytes, ifindex: POD_A, gso_size: gso as u32, ..Input::default() };
                let shot = lab.raw(hook::FROM_POD, &input)?;
                let reason = if fits { DropReason::Forwarded } else { DropReason::FragNeeded };
                ensure!(
                    shot.counted.keys().eq([&(reason as u8, hook::FROM_POD)]),
                    "{proto:?}, {l4} bytes of header, {options} of options, {gso} of payload: {:?}",
                    shot.counted
                );
            }
        }
        // Where each segment has a length of its own, the device or the far end has to see.
        let f = sized(net, Proto::Sctp, (net.far(), 80), 3000);
        let bytes = f.bytes();
        let input = Input { frame: &bytes, ifindex: POD_A, gso_size: 0xffff, ..Input::default() };
        lab.raw(hook::FROM_POD, &input)?.onto_wire(&f.hop())
    })
}

/// The kernel puts a jumbo option (RFC 2675) in front of what is longer than the length field can say, and takes it off each
/// segment (`ipv6_hopopt_jumbo_remove`): no segment is longer for it.
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
            let input = Input { frame: &bytes, ifindex: POD_A, gso_size: gso as u32, ..Input::default() };
            let shot = lab.raw(hook::FROM_POD, &input)?;
            let reason = if fits { DropReason::Forwarded } else { DropReason::FragNeeded };
            ensure!(shot.counted.keys().eq([&(reason as u8, hook::FROM_POD)]), "{gso} of payload: {:?}", shot.counted);
        }
        Ok(())
    })
}

/// Neighbour discovery and the like is between neighbours: this node's stack has it, and nobody forwards it.
#[test]
fn what_concerns_the_link() -> Result<()> {
    labs(|lab, net| {
        if net == Net::V4 {
            return Ok(());
        }
        let link = |addr: &str| net.ip([0; 4], addr);
        for kind in 133..=137 {
            let message = |src: IpAddr, dst: IpAddr| {
                from_a(net, Proto::Udp, (dst, 0)).map(|f| {
                    f.l4 = L4::Icmp { kind, code: 0, rest: 0 };
                    f.payload = vec![0; 16];
                    (f.src, f.ttl) = (src, 255);
                })
            };
            // A pod's neighbours are permanent: whatever its source, it has nothing to discover.
            for dst in
                [link("fe80::1"), link("ff02::1"), link("ff02::1:ff00:11"), net.node(), net.b(), net.far(), net.world()]
            {
                for src in [net.a(), net.b(), net.world(), link("fe80::a"), link("::")] {
                    let shot = lab.pod_sends(&message(src, dst))?;
                    shot.dropped(DropReason::NdNotForwarded).with_context(|| format!("{src} to {dst}"))?;
                }
            }
            lab.uplink_in(&message(net.router(), net.node()))?.to_stack(&message(net.router(), net.node()))?;
            lab.to_pod(POD_A, &message(net.node(), net.a()))?.to_stack(&message(net.node(), net.a()))?;

            lab.uplink_in(&message(net.router(), net.a()))?
                .dropped(DropReason::NdNotForwarded)
                .context("from outside")?;
            lab.overlay_in(net.node2(), &message(net.far(), net.b()))?.dropped(DropReason::UnknownSender)?;
        }
        ensure!(lab.halves()? == 0);
        Ok(())
    })
}

/// Without "don't fragment" no error reports that an IPv4 packet is too big: a router behind this
/// node cuts it, and so does the overlay's device with what it wraps it in (RFC 791).
#[test]
fn what_may_be_cut_is_sent_on() -> Result<()> {
    labs(|lab, net| {
        each(|proto| {
            for (dst, mtu) in [(net.far(), OVERLAY_MTU), (net.narrow(), NARROW_MTU)] {
                let f = sized(net, proto, at(proto, dst, 80), mtu + 1).map(|f| f.may_be_cut = true);
                let shot = lab.pod_sends(&f)?;
                match net {
                    Net::V4 => shot.onto_wire(&f.hop())?,
                    // IPv6 routers never cut.
                    Net::V6 => shot.answered(DropReason::FragNeeded, &too_big(net, &f, mtu))?,
                }
            }
            Ok(())
        })
    })
}
