//! Plain packets at the uplink, from unknown machines: sources that only a forger uses, and the overlay's port.

use super::{dropped_as, each, no_trace, passed, ports_of};
use crate::flows::{ALL, PORT, Proto, SERVED, from_a, from_outside, later};
use crate::frame::{Frame, L4};
use crate::harness::{Flow, MAC_B, MAC_HOST, Net, SHOT, STACK, labs, parse_addresses};
use anyhow::{Context, Result, ensure};
use rustnet_common::drop::DropReason;
use rustnet_common::peer::flags;
use std::net::IpAddr;

/// Sources that the kernel refuses in `ip_route_input_slow` and `ip6_rcv_core`, which a redirect goes round.
fn martians(net: Net) -> Vec<IpAddr> {
    parse_addresses(match net {
        Net::V4 => &["127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "224.0.0.1", "239.1.2.3", "255.255.255.255"],
        Net::V6 => &["::", "::1", "ff02::1", "ff0e::1", "::ffff:192.0.2.10", "::ffff:10.244.1.10", "::ffff:127.0.0.1"],
    })
}

#[test]
fn martian_sources() -> Result<()> {
    labs(|lab, net| {
        each(&martians(net), |src| {
            each(&ALL, |proto| {
                let f = from_outside(proto, (src, 53), (net.a(), PORT));
                let shot = lab.uplink_in(&f)?;
                match src {
                    // The stack drops it before it asks for a way.
                    IpAddr::V6(a) if a.to_ipv4_mapped().is_some() && shot.verdict == STACK => shot.to_stack(&f)?,
                    _ => shot.dropped(DropReason::Martian)?,
                }
                // What a pod or another node sends has to be its own anyway: either reason is true.
                let f = from_a(net, proto, (net.b(), 80)).map(|f| f.src = src);
                dropped_as(&lab.pod_sends(&f)?, &[DropReason::Spoofed, DropReason::Martian]).context("by a pod")?;
                let f = from_outside(proto, (src, 53), (net.a(), PORT));
                let shot = lab.overlay_in(net.node2(), &f)?;
                dropped_as(&shot, &[DropReason::UnknownSender, DropReason::Martian]).context("out of the tunnel")
            })?;
            // An error, too.
            let about = from_a(net, Proto::Udp, (net.world(), 53));
            let f = from_outside(Proto::Udp, (src, 0), (net.a(), 0)).map(|f| {
                f.l4 = L4::Icmp { kind: if net == Net::V4 { 3 } else { 1 }, code: 1, rest: 0 };
                f.payload = about.ip_bytes();
            });
            let shot = lab.uplink_in(&f)?;
            match src {
                IpAddr::V6(a) if a.to_ipv4_mapped().is_some() && shot.verdict == STACK => shot.to_stack(&f),
                _ => dropped_as(&shot, &[DropReason::Martian, DropReason::IcmpUnrelated]).context("an error"),
            }
        })?;
        no_trace(lab)
    })
}

/// An answer in the name of a service: DNS answers could be forged from outside.
#[test]
fn a_virtual_address_as_a_source() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            lab.serve(net.vip(1), 53, proto.number(net), 0, &[(net.b(), 8053)])?;
            // Whatever its port: the address is ours.
            for port in [53, 54, 0] {
                let f = from_outside(proto, (net.vip(1), port), (net.a(), PORT));
                each(&[&f, &later(&f)], |f| lab.uplink_in(f)?.dropped(DropReason::Spoofed))?;
            }
            let f = from_outside(Proto::Echo, (net.vip(1), 9), (net.a(), 0));
            lab.uplink_in(&f)?.dropped(DropReason::Spoofed).context("echo")?;
            no_trace(lab)?;
            // While the pod waits for the answer.
            let ask = from_a(net, proto, (net.vip(1), 53));
            lab.pod_sends(&ask)?.to_the_pod(&ask.hop().between((net.a(), PORT), (net.b(), 8053)))?;
            let forged = ask.reply().map(|f| (f.smac, f.dmac) = (crate::harness::MAC_OUT, MAC_HOST));
            lab.uplink_in(&forged)?.dropped(DropReason::Spoofed).context("while the pod waits")?;
            lab.forget()
        })
    })
}

/// One packet in the name of a service must not lead a pod's own way to that service into the void.
#[test]
fn a_forged_answer_does_not_lead_a_pod_astray() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            lab.serve(net.vip(1), 53, proto.number(net), 0, &[(net.b(), 8053)])?;
            let forged = from_outside(proto, (net.vip(1), 53), (net.a(), PORT));
            for f in [forged.clone(), later(&forged)] {
                lab.forget()?;
                // What becomes of it is for another test.
                let _ = lab.uplink_in(&f)?;
                let ask = from_a(net, proto, (net.vip(1), 53));
                lab.pod_sends(&ask)?.to_the_pod(&ask.hop().between((net.a(), PORT), (net.b(), 8053)))?;
            }
            lab.forget()
        })
    })
}

/// The same where the address was nothing special when the packet came: the service is younger than the flow, and the pod has
/// never answered it.
#[test]
fn a_flow_from_outside_is_no_way_to_a_younger_service() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            let vip = net.router();
            let early = from_outside(proto, (vip, 53), (net.a(), PORT));
            lab.uplink_in(&early)?.to_the_pod(&early.hop())?;
            lab.serve(vip, 53, proto.number(net), 0, &[(net.b(), 8053)])?;
            let ask = from_a(net, proto, (vip, 53));
            lab.pod_sends(&ask)?.to_the_pod(&ask.hop().between((net.a(), PORT), (net.b(), 8053)))?;
            lab.forget()?;
            // For the protocol that comes next, the address is nothing special again.
            lab.drop_service(vip, 53, proto.number(net))
        })
    })
}

/// What belongs into the tunnel does not come without it: plain IP with the source of a remote pod, or of a node behind the
/// tunnel, is the easiest way to be any of them.
#[test]
fn sources_that_the_tunnel_brings() -> Result<()> {
    labs(|lab, net| {
        each(&[net.far(), net.node2()], |src| {
            each(&ALL, |proto| {
                let f = from_outside(proto, (src, PORT), (net.b(), 80));
                lab.uplink_in(&f)?.dropped(DropReason::Spoofed).context("a new flow")?;
                lab.uplink_in(&later(&f))?.dropped(DropReason::Spoofed).context("in the middle of one")?;
                no_trace(lab)?;
                // A flow that the tunnel opened.
                lab.overlay_in(net.node2(), &f)?.to_the_pod(&f.hop())?;
                lab.uplink_in(&later(&f))?.dropped(DropReason::Spoofed).context("a known flow")?;
                lab.overlay_in(net.node2(), &later(&f))?.to_the_pod(&later(&f).hop()).context("and by the tunnel")?;
                lab.forget()?;
                // A flow that the pod opened.
                let ask = from_a(net, proto, (src, 80));
                lab.pod_sends(&ask)?.onto_wire(&ask.hop())?;
                let answer = ask.reply();
                lab.uplink_in(&answer)?.dropped(DropReason::Spoofed).context("the answer, by the uplink")?;
                lab.overlay_in(net.node2(), &answer)?.to_the_pod(&answer.hop()).context("the answer, by the tunnel")?;
                lab.forget()
            })
        })?;
        // To this host itself: other nodes speak to it without the tunnel, their pods do not.
        each(&ALL, |proto| {
            let f = from_outside(proto, (net.node2(), PORT), (net.node(), 22));
            lab.uplink_in(&f)?.to_stack(&f)?;
            let f = from_outside(proto, (net.far(), PORT), (net.node(), 22));
            lab.uplink_in(&f)?.dropped(DropReason::Spoofed).context("a remote pod to this host")
        })?;
        no_trace(lab)
    })
}

/// A known flow came by the uplink, and its sender's address has become one that the tunnel brings, or one of this node: within a
/// second, no more of it comes by the uplink.
#[test]
fn a_sender_that_belongs_elsewhere_now() -> Result<()> {
    labs(|lab, net| {
        each(&[(flags::POD | flags::TUNNEL, Some(net.node2())), (flags::LOCAL_PODS, None)], |(now, node)| {
            each(&ALL, |proto| {
                let f = from_outside(proto, (net.routed(), PORT), (net.b(), 80));
                lab.uplink_in(&f)?.to_the_pod(&f.hop())?;
                lab.put_peer(net.routed(), Some((24, 64)), now, node)?;
                lab.age(Flow::of(&f), 1)?;
                lab.uplink_in(&f)?.dropped(DropReason::Spoofed)?;
                lab.put_peer(net.routed(), Some((24, 64)), flags::POD, None)?;
                lab.forget()
            })
        })
    })
}

/// The answer of a service's backend behind the tunnel.
#[test]
fn answers_of_a_backend_that_the_tunnel_brings() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            lab.serve(net.vip(1), 80, proto.number(net), 0, &[(net.far(), 8080)])?;
            let ask = from_a(net, proto, (net.vip(1), 80));
            let there = ask.hop().between((net.a(), PORT), (net.far(), 8080));
            lab.pod_sends(&ask)?.onto_wire(&there)?;
            let answer = there.reply();
            lab.uplink_in(&answer)?.dropped(DropReason::Spoofed)?;
            lab.overlay_in(net.node2(), &answer)?
                .to_the_pod(&answer.hop().between((net.vip(1), 80), (net.a(), PORT)))?;
            lab.uplink_in(&later(&answer))?.dropped(DropReason::Spoofed).context("once the far end is known")
        })
    })
}

/// Only nodes of the cluster speak to this host's end of the tunnel.
#[test]
fn the_overlays_port() -> Result<()> {
    labs(|lab, net| {
        let f = from_outside(Proto::Udp, (net.node2(), 50_000), (net.node(), 8472));
        lab.uplink_in(&f)?.to_stack(&f)?;
        each(&[net.world(), net.router(), net.routed()], |src| {
            lab.uplink_in(&f.map(|f| f.src = src))?.dropped(DropReason::UnknownSender)
        })?;
        // The device's socket takes what is sent to all as well.
        let all: &[IpAddr] = match net {
            Net::V4 => &[[255, 255, 255, 255], [172, 18, 0, 255], [224, 0, 0, 1]].map(IpAddr::from),
            Net::V6 => &[net.ip([0; 4], "ff02::1")],
        };
        each(all, |dst| {
            lab.uplink_in(&f.map(|f| (f.src, f.dst) = (net.world(), dst)))?.dropped(DropReason::UnknownSender)
        })?;
        // Our own addresses come from nowhere but here.
        each(&[net.node(), net.a(), net.nobody()], |src| {
            let shot = lab.uplink_in(&f.map(|f| f.src = src))?;
            dropped_as(&shot, &[DropReason::Spoofed, DropReason::UnknownSender])
        })?;
        no_trace(lab)
    })
}

/// To a pod or a service the overlay's port is a port like any other, with all checks.
#[test]
fn the_overlays_port_of_pods_and_services() -> Result<()> {
    labs(|lab, net| {
        lab.serve(net.vip(1), 80, 17, 0, &[(net.b(), 8080)])?;
        let to = |src: IpAddr, dst: IpAddr| from_outside(Proto::Udp, (src, PORT), (dst, 8472));
        lab.uplink_in(&to(net.world(), net.vip(1)))?.dropped(DropReason::IsClusterIp)?;
        let shot = lab.uplink_in(&to(net.node2(), net.vip(1)))?;
        dropped_as(&shot, &[DropReason::IsClusterIp, DropReason::Spoofed]).context("of another node")?;
        each(&[net.a(), net.nobody(), net.node(), net.far(), net.node2(), net.vip(1)], |src| {
            lab.uplink_in(&to(src, net.b()))?.dropped(DropReason::Spoofed)
        })?;
        no_trace(lab)?;
        let f = to(net.routed(), net.b());
        lab.uplink_in(&f)?.to_the_pod(&f.hop())?;
        // A client's port.
        let ask = from_a(net, Proto::Udp, (net.routed(), 53)).map(|f| f.set_ports(8472, 53));
        lab.pod_sends(&ask)?.onto_wire(&ask.hop())?;
        let answer = ask.reply();
        lab.uplink_in(&answer)?.to_the_pod(&answer.hop())
    })
}

/// A service at this node's own address takes nothing from the tunnel.
#[test]
fn the_tunnel_to_an_address_that_is_a_services_too() -> Result<()> {
    labs(|lab, net| {
        lab.serve(net.node(), 80, 6, 0, &[(net.b(), 8080)])?;
        let f = from_outside(Proto::Udp, (net.node2(), 50_000), (net.node(), 8472));
        lab.uplink_in(&f)?.to_stack(&f)?;
        lab.uplink_in(&f.map(|f| f.src = net.world()))?.dropped(DropReason::IsClusterIp)?;
        no_trace(lab)
    })
}

/// Without an overlay there is no such port.
#[test]
fn no_overlay_no_port() -> Result<()> {
    labs(|lab, net| {
        lab.configure(|c| c.overlay = 0)?;
        let f = from_outside(Proto::Udp, (net.world(), 50_000), (net.node(), 8472));
        lab.uplink_in(&f)?.to_stack(&f)?;
        let f = from_a(net, Proto::Udp, (net.world(), 8472));
        lab.pod_sends(&f)?.onto_wire(&f.hop().map(|f| f.src = net.node()))?;
        let answer = f.hop().map(|f| f.src = net.node()).reply();
        lab.uplink_in(&answer)?.to_the_pod(&answer.hop().map(|f| f.dst = net.a()))
    })
}

/// Answers to a masqueraded flow from that port would end in the tunnel's socket: no flow gets it, by hash, by chance, or
/// because its client has it.
#[test]
fn masquerade_never_takes_the_overlays_port() -> Result<()> {
    labs(|lab, net| {
        // At either end of the range as well: the port that takes its place must be one of the range.
        for range in [8470..=8472, 8472..=8474, 8471..=8474_u16] {
            lab.configure(|c| (c.snat_min, c.snat_max) = (*range.start(), *range.end()))?;
            let mut seen = std::collections::BTreeSet::new();
            for client in (1000..1200).chain([8471, 8472, 8473, 8474]) {
                let ask = from_a(net, Proto::Udp, (net.world(), 53)).map(|f| f.set_ports(client, 53));
                let shot = lab.pod_sends(&ask)?;
                ensure!(shot.verdict != STACK, "{shot:?}");
                let (port, _) = ports_of(net, &shot.frame)?;
                shot.onto_wire(&ask.hop().between((net.node(), port), (net.world(), 53)))?;
                ensure!(port != 8472, "port {client} became the overlay's");
                let answer = answer_to(&ask, net, port);
                lab.uplink_in(&answer)?.to_the_pod(&answer.hop().between((net.world(), 53), (net.a(), client)))?;
                seen.insert(port);
                lab.forget()?;
            }
            ensure!(seen.iter().copied().eq(range.filter(|port| *port != 8472)), "{seen:?} are used");
        }
        // With all others taken there is none left.
        for client in [8471, 8473, 8474] {
            let ask = from_a(net, Proto::Udp, (net.world(), 53)).map(|f| f.set_ports(client, 53));
            ensure!(ports_of(net, &lab.pod_sends(&ask)?.frame)?.0 == client);
        }
        let ask = from_a(net, Proto::Udp, (net.world(), 53)).map(|f| f.set_ports(8472, 53));
        lab.pod_sends(&ask)?.dropped(DropReason::NatNoMapping)
    })
}

fn answer_to(ask: &Frame, net: Net, port: u16) -> Frame {
    ask.hop().between((net.node(), port), (net.world(), 53)).reply()
}

/// An error to a service, about an answer of it: no wire and no tunnel ever had such a packet. It would reach the backend, as one
/// about a flow of another pod.
#[test]
fn errors_to_a_service() -> Result<()> {
    labs(|lab, net| {
        lab.serve(net.vip(1), 80, 17, 0, &[(net.b(), 8080)])?;
        let ask = from_a(net, Proto::Udp, (net.vip(1), 80));
        lab.pod_sends(&ask)?.to_the_pod(&ask.hop().between((net.a(), PORT), (net.b(), 8080)))?;
        let answer = ask.reply();
        let kind = if net == Net::V4 { (3, 1, 0) } else { (1, 3, 0) };
        for src in [net.router(), net.world(), net.nobody(), net.node2()] {
            let f = crate::errors::error(&answer, src, kind, 64);
            lab.uplink_in(&f)?.dropped(DropReason::IsClusterIp).with_context(|| format!("from {src}"))?;
        }
        for src in [net.node2(), net.far()] {
            let f = crate::errors::error(&answer, src, kind, 64);
            lab.overlay_in(net.node2(), &f)?.dropped(DropReason::IsClusterIp).with_context(|| format!("from {src}"))?;
        }
        // Who has got the answer may complain.
        let f = crate::errors::error(&answer, net.a(), kind, 64).map(|f| (f.smac, f.dmac) = (ask.smac, ask.dmac));
        ensure!(lab.pod_sends(&f)?.verdict == crate::harness::REDIRECT, "the asking pod's own error");
        Ok(())
    })
}

/// An error from outside about a flow that does not pass there: between two pods of this node, or through the tunnel. No machine
/// outside has seen a packet of it.
#[test]
fn errors_about_flows_that_no_wire_has_seen() -> Result<()> {
    labs(|lab, net| {
        lab.serve(net.vip(1), 80, 17, 0, &[(net.b(), 8080)])?;
        lab.serve(net.vip(2), 80, 17, 0, &[(net.far(), 8080)])?;
        lab.put_peer(net.side(), None, flags::HOST, None)?;
        let kind = if net == Net::V4 { (3, 4, 600) } else { (2, 0, 1280) };
        let reach = |dst: IpAddr| from_a(net, Proto::Udp, (dst, 8080));
        // What the pod sends, and what comes of it.
        let local = |ask: &Frame| ask.hop().between((net.a(), PORT), (net.b(), 8080));
        let remote = |ask: &Frame| ask.hop().between((net.a(), PORT), (net.far(), 8080));
        for (what, ask, there) in [
            ("a pod", reach(net.b()), local(&reach(net.b()))),
            ("a service with a pod here", from_a(net, Proto::Udp, (net.vip(1), 80)), local(&reach(net.b()))),
            ("a remote pod", reach(net.far()), remote(&reach(net.far()))),
            ("a service with a remote pod", from_a(net, Proto::Udp, (net.vip(2), 80)), remote(&reach(net.far()))),
        ] {
            lab.forget()?;
            passed(&lab.pod_sends(&ask)?)?;
            let answer = there.reply();
            if there.dst == net.b() {
                passed(&lab.pod_sends(&answer.map(|f| (f.smac, f.dmac) = (MAC_B, MAC_HOST)))?)?;
            } else {
                passed(&lab.overlay_in(net.node2(), &answer)?)?;
            }
            for src in [net.world(), net.router(), net.routed()] {
                // What it quotes may be translated already.
                let shot = lab.uplink_in(&crate::errors::error(&there, src, kind, 64))?;
                let counted = [((DropReason::IcmpUnrelated as u8, shot.hook), 1)];
                ensure!(shot.verdict == SHOT && shot.counted == counted.into(), "{what}, from {src}: {shot:?}");
            }
        }
        // One that does pass there.
        lab.forget()?;
        let ask = reach(net.routed());
        lab.pod_sends(&ask)?.onto_wire(&ask.hop())?;
        for known in [false, true] {
            if known {
                passed(&lab.uplink_in(&ask.hop().reply())?)?;
            }
            let shot = lab.uplink_in(&crate::errors::error(&ask.hop(), net.router(), kind, 64))?;
            ensure!(shot.verdict == crate::harness::REDIRECT, "{shot:?}");
        }
        Ok(())
    })
}
