//! ICMP errors of others: translated like the flows that they quote, in every direction of every
//! translation.

use crate::errors::{error, translated};
use crate::flows::{
    ALL, PORT, Proto, SERVED, as_from_a, as_from_b, at_backend, at_client, from_a, from_host, from_outside,
};
use crate::forged::ports_of;
use crate::frame::Frame;
use crate::harness::{Flow, Lab, MAC_HOST, MAC_OUT, Net, POD_A, UPLINK, each, labs};
use crate::services::exchange;
use anyhow::{Context, Result, ensure};
use rustnet_common::drop::{DropReason, hook};
use testkit::datapath::Input;

/// Errors that hosts and routers send, by family: type, code, and what stands in the second word.
pub fn kinds(net: Net) -> Vec<(u8, u8, u32)> {
    match net {
        Net::V4 => vec![(3, 0, 0), (3, 1, 0), (3, 3, 0), (3, 4, 1400), (3, 13, 0), (11, 0, 0), (12, 0, 0x1400_0000)],
        Net::V6 => vec![(1, 0, 0), (1, 1, 0), (1, 4, 0), (2, 0, 1400), (3, 0, 0), (4, 1, 6)],
    }
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

/// Pod A sends to the world; gives the packet as it was sent, and as it left in the node's name.
fn send_to_world(lab: &Lab, net: Net, proto: Proto) -> Result<(Frame, Frame)> {
    let to = (net.world(), proto.port(443));
    let sent = from_a(net, proto, to);
    let left = sent.hop().between((net.node(), PORT), to);
    lab.pod_sends(&sent)?.onto_wire(&left)?;
    Ok((sent, left))
}

/// A router and the far end complain about a packet that left in the node's name: to pod A, which
/// sent it.
fn complain_to_a(lab: &Lab, net: Net, sent: &Frame, left: &Frame) -> Result<()> {
    all_errors(net, |kind, quote| {
        for from in [net.router(), net.world()] {
            let e = error(left, from, kind, quote);
            let want = translated(&e, left, &sent.hop(), from).hop();
            lab.uplink_in(&e)?.to_the_pod(&want).with_context(|| format!("from {from}"))?;
        }
        Ok(())
    })
}

/// Router and far end complain about a masqueraded packet.
#[test]
fn about_masqueraded_packets() -> Result<()> {
    labs(|lab, net| {
        each(&ALL, |proto| {
            let (sent, left) = send_to_world(lab, net, proto)?;
            complain_to_a(lab, net, &sent, &left)
        })
    })
}

/// Complaints about a masqueraded packet whose port had to change.
#[test]
fn about_masqueraded_packets_with_another_port() -> Result<()> {
    labs(|lab, net| {
        each(&ALL, |proto| {
            let to = (net.world(), proto.port(443));
            let sent = from_a(net, proto, to).map(|f| f.set_ports(1234, to.1));
            let _ = lab.pod_sends(&sent)?;
            let port = lab.half(Flow::of(&sent))?.to.sport;
            let left = sent.hop().between((net.node(), port), to);
            complain_to_a(lab, net, &sent, &left)
        })
    })
}

/// What is said of a datagram's first fragment concerns the flow; the others bear no ports, and the
/// error about them goes nowhere that it could belong to.
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
        each(&ALL, |proto| {
            let (_, left) = send_to_world(lab, net, proto)?;
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

/// The backend, or a router on the way to it, complains about what a client sent to a service.
#[test]
fn about_packets_to_a_service() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            for (n, backend) in [(1, net.b()), (2, net.far()), (3, net.routed())] {
                lab.serve(net.vip(n), 80, proto.number(net), 0, &[(backend, 8080)])?;
                let sent = from_a(net, proto, (net.vip(n), 80));
                let arrived = at_backend(net, &sent, backend);
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
                                lab.pod_sends(&as_from_b(&e))?.to_the_pod(&as_from_b(&want)).context("by pod B")?;
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

/// The client, or a router on the way to it, complains about what a backend answered: the error
/// goes to the backend.
#[test]
fn about_answers_of_a_backend() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            lab.serve(net.vip(1), 80, proto.number(net), 0, &[(net.b(), 8080)])?;
            let sent = from_a(net, proto, (net.vip(1), 80));
            let answer = exchange(lab, net, &sent)?;
            let seen = at_client(net, &answer, 1);
            all_errors(net, |kind, quote| {
                let e = as_from_a(&error(&seen, net.a(), kind, quote));
                let want = translated(&e, &seen, &answer.hop(), net.a()).hop();
                lab.pod_sends(&e)?.to_the_pod(&want)
            })
        })
    })
}

/// A pod complains about an answer to what it had asked of the world: its own address must not
/// leave.
#[test]
fn about_answers_from_the_world() -> Result<()> {
    labs(|lab, net| {
        each(&ALL, |proto| {
            let (_, left) = send_to_world(lab, net, proto)?;
            let answer = left.reply();
            let arrived = answer.hop().map(|f| f.dst = net.a());
            lab.uplink_in(&answer)?.to_the_pod(&arrived)?;
            all_errors(net, |kind, quote| {
                let e = as_from_a(&error(&arrived, net.a(), kind, quote));
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
        each(&SERVED, |proto| {
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
        each(&ALL, |proto| {
            let sent = from_a(net, proto, (net.far(), proto.port(80)));
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
        each(&SERVED, |proto| {
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

/// The host complains about an answer of a service: to the backend that sent it, quoting what that
/// has sent.
#[test]
fn errors_of_the_host_to_a_service() -> Result<()> {
    labs(|lab, net| {
        for proto in SERVED {
            for (n, backend) in [(1, net.routed()), (2, net.world())] {
                lab.serve(net.vip(n), 80, proto.number(net), 0, &[(backend, 8080)])?;
                let ask = from_host(net, proto, (net.vip(n), 80));
                let shot = lab.uplink_out(&ask)?;
                let (port, _) = ports_of(net, &shot.frame)?;
                let left = ask.between((net.node(), port), (backend, 8080));
                shot.onto_wire(&left)?;
                let answer = left.reply();
                let seen = answer.between((net.vip(n), 80), (net.node(), PORT));
                lab.uplink_in(&answer)?.to_stack(&seen)?;
                for kind in if net == Net::V4 {
                    [(3, 3, 0), (3, 4, 1400), (11, 1, 0)]
                } else {
                    [(1, 4, 0), (2, 0, 1400), (3, 1, 0)]
                } {
                    let e = error(&seen, net.node(), kind, 1000).map(|f| (f.smac, f.dmac) = (MAC_HOST, MAC_OUT));
                    let want = translated(&e, &seen, &answer, net.node());
                    lab.uplink_out(&e)?.onto_wire(&want).with_context(|| format!("{proto:?} {kind:?} to {backend}"))?;
                }
            }
        }
        Ok(())
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
        let e = as_from_a(&error(&unknown, net.a(), kinds(net)[0], 1000));
        lab.pod_sends(&e)?.dropped(DropReason::IcmpUnrelated)?;
        // To another pod neither, which could not tell it from a forged one.
        let unknown = from_outside(Proto::Udp, (net.b(), 1), (net.a(), 2));
        let e = as_from_a(&error(&unknown, net.a(), kinds(net)[0], 1000));
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
        let (_, left) = send_to_world(lab, net, Proto::Udp)?;
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
