//! Direct server return: what the node that the client asks sends to the backend's node, what that one makes of it, and who else sends
//! such packets in vain.

use super::NODE_PORT;
use crate::errors::{error, icmp_error, translated};
use crate::flows::{PORT, Proto, SERVED, TARGET, VIP_PORT, answer_of_b, as_from_a, from_a, from_outside, later};
use crate::frame::{ACK, FIN, Frame, L4, RST, SYN};
use crate::harness::{Flow, Lab, MAC_A, MAC_B, MAC_HOST, Net, OVERLAY_MTU, POD_B, POD_B_MTU, each, labs};
use crate::icmp::kinds;
use anyhow::{Context, Result, ensure};
use rustnet_common::config;
use rustnet_common::conntrack::{flags, lifetime, state};
use rustnet_common::drop::DropReason;
use rustnet_common::endpoint;
use rustnet_common::peer::flags as peer;
use rustnet_common::service::flags::{DIRECT, SOURCE_RANGES};
use std::net::IpAddr;

/// Node 3, which has the pods that the kernel's routes lead to.
fn node3(net: Net) -> IpAddr {
    net.ip([172, 18, 0, 13], "fd00:18::13")
}

fn vip(net: Net) -> IpAddr {
    net.ip([203, 0, 114, 7], "2001:db8:7::7")
}

/// A node where node 3 is known, and a load balancer's address.
fn direct(test: impl Fn(&Lab, Net) -> Result<()> + Send + Sync) -> Result<()> {
    labs(|lab, net| {
        lab.put_peer(node3(net), None, peer::NODE, None)?;
        lab.share(vip(net))?;
        test(lab, net)
    })
}

/// Publishes a port with direct server return.
fn publish(lab: &Lab, net: Net, at: (IpAddr, u16), proto: Proto, to: IpAddr) -> Result<u32> {
    Ok(lab.publish(at.0, at.1, proto.number(net), DIRECT, &[(to, TARGET)])?[0])
}

/// A node port, and a load balancer's address.
fn frontends(net: Net) -> [(IpAddr, u16); 2] {
    [(net.node(), NODE_PORT), (vip(net), VIP_PORT)]
}

fn ask(net: Net, proto: Proto, at: (IpAddr, u16)) -> Frame {
    from_outside(proto, (net.world(), PORT), at)
}

/// A packet inside of a header between these.
fn wrapped(inside: &Frame, src: IpAddr, dst: IpAddr) -> Frame {
    inside.map(|f| {
        f.payload = inside.ip_bytes();
        f.l4 = L4::Other(if inside.is_v6() { 41 } else { 4 });
        (f.src, f.dst, f.ttl, f.id, f.flow) = (src, dst, 64, 0, 0);
        (f.options, f.extensions, f.piece, f.may_be_cut) = (Vec::new(), Vec::new(), None, false);
    })
}

/// What node 3 hands on to pod B of this node.
fn from_node3(net: Net, inside: &Frame) -> Frame {
    wrapped(inside, node3(net), net.b())
}

/// A node that does not know another one's pods yet would lend a pod its address, and the other one would take the packet for its own.
#[test]
fn no_pod_speaks_so_in_its_nodes_name() -> Result<()> {
    direct(|lab, net| {
        let inside = ask(net, Proto::Udp, (net.node(), NODE_PORT));
        let to = |dst| wrapped(&inside, net.a(), dst).map(|f| (f.smac, f.dmac) = (MAC_A, MAC_HOST));
        lab.pod_sends(&to(net.world()))?.dropped(DropReason::EncapProhibited)?;
        ensure!(lab.connections(net)?.is_empty(), "it opened a connection");
        // Where pods keep their addresses, nobody takes it for a node's.
        for dst in [net.b(), net.routed(), net.far()] {
            lab.forget()?;
            let shot = lab.pod_sends(&to(dst))?;
            if dst == net.b() {
                shot.to_the_pod(&to(dst).hop())?;
            } else {
                shot.onto_wire(&to(dst).hop())?;
            }
        }
        lab.configure(|c| c.flags &= !config::flags::MASQUERADE)?;
        lab.forget()?;
        lab.pod_sends(&to(net.world()))?.onto_wire(&to(net.world()).hop())
    })
}

/// Each packet of a flow goes whole to the backend's pod, by the kernel's routes and by the overlay; its answers are not waited for.
#[test]
fn the_node_that_is_asked_hands_each_packet_on() -> Result<()> {
    direct(|lab, net| {
        for at in frontends(net) {
            for to in [net.routed(), net.far()] {
                lab.forget()?;
                each(&SERVED, |proto| {
                    let id = publish(lab, net, at, proto, to)?;
                    let ask = ask(net, proto, at);
                    for f in [ask.clone(), later(&ask), later(&ask)] {
                        lab.uplink_in(&f)?.onto_wire(&wrapped(&f.hop(), net.node(), to))?;
                    }
                    let there = lab.half(Flow::of(&ask))?;
                    let kind = there.flags & !flags::SECOND_ADDRESS;
                    ensure!(kind == flags::NAT | flags::EXTERNAL | flags::DIRECT, "{there:?}");
                    ensure!((there.to.src, there.to.sport, there.backend) == (net.world(), PORT, id), "{there:?}");
                    ensure!((there.to.dst, there.to.dport, there.packets) == (to, TARGET, 3), "{there:?}");
                    // Once a second, the entry of the other direction is made again where there is one.
                    lab.age(Flow::of(&ask), 2)?;
                    lab.uplink_in(&later(&ask))?.onto_wire(&wrapped(&later(&ask).hop(), net.node(), to))
                })?;
                ensure!(lab.halves()? == SERVED.len(), "{:?}", lab.connections(net)?);
            }
        }
        Ok(())
    })
}

/// The backend's node: the pod sees the client, and the client the address that it asked, of whichever node.
#[test]
fn the_backends_node_answers_the_client() -> Result<()> {
    direct(|lab, net| {
        let balanced = (vip(net), VIP_PORT);
        for (at, entry) in [((node3(net), NODE_PORT), (net.node(), NODE_PORT)), (balanced, balanced)] {
            each(&SERVED, |proto| {
                lab.forget()?;
                // The mode is the business of the node that is asked.
                let id = lab.publish(entry.0, entry.1, proto.number(net), 0, &[(net.b(), TARGET)])?[0];
                let sent = ask(net, proto, at).hop();
                let arrives = sent.hop().between((net.world(), PORT), (net.b(), TARGET));
                lab.uplink_in(&from_node3(net, &sent))?.to_the_pod(&arrives)?;
                let answer = answer_of_b(&arrives);
                let leaves = answer.hop().between(at, (net.world(), PORT));
                lab.pod_sends(&answer)?.onto_wire(&leaves)?;
                let more = later(&sent);
                let arrives = more.hop().between((net.world(), PORT), (net.b(), TARGET));
                lab.uplink_in(&from_node3(net, &more))?.to_the_pod(&arrives)?;
                // A router in front of the cluster may ask this node at any time.
                lab.uplink_in(&more)?.to_the_pod(&arrives)?;
                // Once a second, programs ask whether the Service still has what a flow asked for.
                lab.age(Flow::of(&sent), 2)?;
                lab.uplink_in(&from_node3(net, &more))?.to_the_pod(&arrives)?;

                let (there, back) = (lab.half(Flow::of(&sent))?, lab.half(Flow::of(&answer))?);
                ensure!((there.backend, back.backend, there.packets) == (id, id, 4), "{there:?} {back:?}");
                ensure!(there.flags & (flags::EXTERNAL | flags::DIRECT) == flags::EXTERNAL, "{there:?}");
                ensure!(lab.halves()? == 2, "{:?}", lab.connections(net)?);
                Ok(())
            })?;
        }
        Ok(())
    })
}

/// A backend of datagrams ends: the node that is asked hands them on to another one, and no other node takes them for the pod.
#[test]
fn datagrams_to_a_backend_that_has_ended() -> Result<()> {
    direct(|lab, net| {
        let at = (net.node(), NODE_PORT);
        for proto in [Proto::Udp, Proto::Tcp] {
            let id = publish(lab, net, at, proto, net.routed())?;
            let ask = ask(net, proto, at);
            lab.uplink_in(&ask)?.onto_wire(&wrapped(&ask.hop(), net.node(), net.routed()))?;
            publish(lab, net, at, proto, net.far())?;
            lab.end(id)?;
            let to = if proto == Proto::Udp { net.far() } else { net.routed() };
            lab.uplink_in(&later(&ask))?.onto_wire(&wrapped(&later(&ask).hop(), net.node(), to))?;
        }
        lab.forget()?;
        for proto in [Proto::Udp, Proto::Tcp] {
            let id = lab.publish(at.0, at.1, proto.number(net), 0, &[(net.b(), TARGET)])?[0];
            let sent = ask(net, proto, (node3(net), NODE_PORT)).hop();
            let arrives = later(&sent).hop().between((net.world(), PORT), (net.b(), TARGET));
            lab.uplink_in(&from_node3(net, &later(&sent)))?.to_the_pod(&arrives)?;
            lab.publish(at.0, at.1, proto.number(net), 0, &[(net.far(), TARGET)])?;
            lab.end(id)?;
            let shot = lab.uplink_in(&from_node3(net, &later(&sent)))?;
            match proto {
                Proto::Udp => shot.dropped(DropReason::NoDirectBackend)?,
                _ => shot.to_the_pod(&arrives)?,
            }
        }
        Ok(())
    })
}

/// The same out of the overlay, from the node that is the far end.
#[test]
fn the_backends_node_behind_the_overlay() -> Result<()> {
    direct(|lab, net| {
        let at = (net.node2(), NODE_PORT);
        each(&SERVED, |proto| {
            lab.publish(net.node(), NODE_PORT, proto.number(net), 0, &[(net.b(), TARGET)])?;
            let sent = ask(net, proto, at).hop();
            let arrives = sent.hop().between((net.world(), PORT), (net.b(), TARGET));
            let packet = wrapped(&sent, net.node2(), net.b());
            lab.overlay_in(net.node2(), &packet)?.to_the_pod(&arrives)?;
            let answer = answer_of_b(&arrives);
            lab.pod_sends(&answer)?.onto_wire(&answer.hop().between(at, (net.world(), PORT)))
        })
    })
}

/// Only nodes hand packets on, each by the way that its packets take, and only clients outside have their packets handed on.
#[test]
fn forged_packets() -> Result<()> {
    direct(|lab, net| {
        each(&SERVED, |proto| {
            for at in [(node3(net), NODE_PORT), (vip(net), VIP_PORT)] {
                let entry = if at.0 == vip(net) { at } else { (net.node(), at.1) };
                lab.publish(entry.0, entry.1, proto.number(net), 0, &[(net.b(), TARGET)])?;
                let inside = ask(net, proto, at);
                // To the pod as it is: it has no use for it.
                for src in [net.world(), net.routed()] {
                    let plain = wrapped(&inside, src, net.b());
                    lab.uplink_in(&plain)?.to_the_pod(&plain.hop()).with_context(|| format!("from {src}"))?;
                }
                let plain = as_from_a(&wrapped(&inside, net.a(), net.b()));
                lab.pod_sends(&plain)?.to_the_pod(&plain.hop())?;
                let plain = wrapped(&inside, net.far(), net.b());
                lab.overlay_in(net.node2(), &plain)?.to_the_pod(&plain.hop())?;
                // In the name of a node.
                let at_node2 = if at.0 == vip(net) { inside.clone() } else { ask(net, proto, (net.node2(), at.1)) };
                let in_name_of_node2 = wrapped(&at_node2, net.node2(), net.b());
                lab.uplink_in(&in_name_of_node2)?.dropped(DropReason::Spoofed)?;
                lab.overlay_in(node3(net), &in_name_of_node2)?.dropped(DropReason::UnknownSender)?;
                lab.overlay_in(net.node2(), &from_node3(net, &inside))?.dropped(DropReason::UnknownSender)?;
                for src in [net.node(), net.nobody(), net.b()] {
                    lab.uplink_in(&wrapped(&inside, src, net.b()))?.dropped(DropReason::Spoofed)?;
                }
                lab.pod_sends(&as_from_a(&from_node3(net, &inside)))?.dropped(DropReason::Spoofed)?;
                // Clients that are none.
                for (client, reason) in [
                    (net.a(), DropReason::Spoofed),
                    (net.nobody(), DropReason::Spoofed),
                    (net.node(), DropReason::Spoofed),
                    (net.node2(), DropReason::Spoofed),
                    (node3(net), DropReason::Spoofed),
                    (net.far(), DropReason::Spoofed),
                    (net.routed(), DropReason::Spoofed),
                    (vip(net), DropReason::Spoofed),
                    (net.ip([127, 0, 0, 1], "::1"), DropReason::Martian),
                    (net.ip([224, 0, 0, 1], "ff02::1"), DropReason::Martian),
                ] {
                    let forged = from_node3(net, &from_outside(proto, (client, PORT), at));
                    lab.uplink_in(&forged)?.dropped(reason).with_context(|| format!("client {client}"))?;
                }
            }
            let opened = lab.connections(net)?;
            ensure!(opened.values().all(|half| half.flags & flags::EXTERNAL == 0), "{opened:?}");
            Ok(())
        })
    })
}

/// What is no Service's, or for no pod of this node, is treated as before.
#[test]
fn other_packets_of_these_protocols() -> Result<()> {
    direct(|lab, net| {
        publish(lab, net, (net.node(), NODE_PORT), Proto::Udp, net.b())?;
        let inside = ask(net, Proto::Udp, (node3(net), NODE_PORT));
        let tunnel = from_node3(net, &ask(net, Proto::Udp, (net.b(), TARGET)));
        lab.uplink_in(&tunnel)?.to_the_pod(&tunnel.hop())?;
        let to_node = wrapped(&inside, node3(net), net.node());
        lab.uplink_in(&to_node)?.to_stack(&to_node)?;
        let of_another = from_node3(net, &ask(net, Proto::Udp, (net.node2(), NODE_PORT)));
        lab.uplink_in(&of_another)?.to_the_pod(&of_another.hop())?;
        // The header inside is whole.
        let cut = from_node3(net, &inside).pieces(7, &[48]);
        lab.uplink_in(&cut[0])?.to_the_pod(&cut[0].hop())?;
        // A header of the other family.
        let number = if net == Net::V4 { 41 } else { 4 };
        let other = from_node3(net, &inside).map(|f| f.l4 = L4::Other(number));
        lab.uplink_in(&other)?.to_the_pod(&other.hop())?;
        // Without Services for clients outside, as far as the settings say. An address of one says so by itself.
        lab.configure(|c| c.flags &= !config::flags::EXTERNAL)?;
        let packet = from_node3(net, &inside);
        lab.uplink_in(&packet)?.to_the_pod(&packet.hop())?;
        publish(lab, net, (vip(net), VIP_PORT), Proto::Udp, net.b())?;
        let sent = ask(net, Proto::Udp, (vip(net), VIP_PORT));
        let arrives = sent.hop().between((net.world(), PORT), (net.b(), TARGET));
        lab.uplink_in(&from_node3(net, &sent))?.to_the_pod(&arrives)
    })
}

/// A node's address is an external IP, too: it has ports of its own there, and the node ports besides.
#[test]
fn an_external_ip_that_is_a_nodes() -> Result<()> {
    direct(|lab, net| {
        each(&SERVED, |proto| {
            lab.publish(node3(net), VIP_PORT, proto.number(net), 0, &[(net.b(), TARGET)])?;
            lab.publish(net.node(), VIP_PORT, proto.number(net), 0, &[(net.a(), TARGET)])?;
            lab.publish(net.node(), NODE_PORT, proto.number(net), 0, &[(net.b(), TARGET + 1)])?;
            for (port, target) in [(VIP_PORT, TARGET), (NODE_PORT, TARGET + 1)] {
                let sent = ask(net, proto, (node3(net), port));
                let arrives = sent.hop().between((net.world(), PORT), (net.b(), target));
                lab.uplink_in(&from_node3(net, &sent))?.to_the_pod(&arrives).with_context(|| format!("port {port}"))?;
            }
            Ok(())
        })
    })
}

/// The nodes know other endpoints for a moment, or the Service has other clients.
#[test]
fn a_pod_that_is_no_backend() -> Result<()> {
    direct(|lab, net| {
        each(&SERVED, |proto| {
            let sent = ask(net, proto, (node3(net), NODE_PORT));
            let packet = from_node3(net, &sent);
            lab.uplink_in(&packet)?.dropped(DropReason::NoDirectBackend).context("no entry")?;
            for to in [&[][..], &[(net.a(), TARGET)]] {
                lab.publish(net.node(), NODE_PORT, proto.number(net), 0, to)?;
                lab.uplink_in(&packet)?.dropped(DropReason::NoDirectBackend).with_context(|| format!("{to:?}"))?;
            }
            let at = (vip(net), VIP_PORT);
            lab.publish(at.0, at.1, proto.number(net), SOURCE_RANGES, &[(net.b(), TARGET)])?;
            let packet = from_node3(net, &ask(net, proto, at));
            lab.uplink_in(&packet)?.dropped(DropReason::NotInSourceRange)?;
            ensure!(lab.halves()? == 0, "a packet that was dropped opened a flow");
            Ok(())
        })
    })
}

/// The node that was asked has chosen, by session affinity for example; the hash of this one would lead elsewhere.
#[test]
fn the_backend_that_the_other_node_chose() -> Result<()> {
    direct(|lab, net| {
        let others: Vec<_> = (1..=40).map(|port| (net.a(), 9000 + port)).collect();
        for place in [0, 20, 40] {
            lab.forget()?;
            let mut to = others.clone();
            to.insert(place, (net.b(), TARGET));
            let ids = lab.publish(net.node(), NODE_PORT, Proto::Udp.number(net), 0, &to)?;
            for port in PORT..PORT + 20 {
                let sent = from_outside(Proto::Udp, (net.world(), port), (node3(net), NODE_PORT));
                let arrives = sent.hop().between((net.world(), port), (net.b(), TARGET));
                lab.uplink_in(&from_node3(net, &sent))?.to_the_pod(&arrives)?;
                ensure!(lab.half(Flow::of(&sent))?.backend == ids[place], "place {place}");
            }
        }
        Ok(())
    })
}

/// A flow that this node was asked for, and led elsewhere, comes by another node now.
#[test]
fn a_flow_that_was_led_elsewhere() -> Result<()> {
    direct(|lab, net| {
        let at = (vip(net), VIP_PORT);
        for mode in [0, DIRECT] {
            each(&SERVED, |proto| {
                lab.forget()?;
                lab.publish(at.0, at.1, proto.number(net), mode, &[(net.far(), TARGET)])?;
                let sent = ask(net, proto, at);
                lab.uplink_in(&sent)?;
                lab.publish(at.0, at.1, proto.number(net), mode, &[(net.b(), TARGET)])?;
                let arrives = later(&sent).hop().between((net.world(), PORT), (net.b(), TARGET));
                lab.uplink_in(&from_node3(net, &later(&sent)))?.to_the_pod(&arrives)?;
                ensure!(lab.halves()? == 2, "{:?}", lab.connections(net)?);
                Ok(())
            })?;
        }
        Ok(())
    })
}

/// Whoever is of the cluster, asks by a side device or at another address of this node, and backends that are no pods, take the usual way.
#[test]
fn flows_that_are_masqueraded_as_before() -> Result<()> {
    direct(|lab, net| {
        let second = net.ip([172, 18, 0, 99], "fd00:18::99");
        lab.put_peer(second, None, peer::HOST, None)?;
        let at = (net.node(), NODE_PORT);
        each(&SERVED, |proto| {
            for (src, at, to) in [
                (net.routed(), at, net.far()),
                (node3(net), at, net.far()),
                (vip(net), at, net.far()),
                (net.world(), (second, NODE_PORT), net.far()),
                (net.world(), at, node3(net)),
                (net.world(), at, net.ip([198, 51, 100, 77], "2001:db8:99::77")),
            ] {
                lab.forget()?;
                publish(lab, net, at, proto, to)?;
                let ask = from_outside(proto, (src, PORT), at);
                lab.uplink_in(&ask)?;
                let opened = lab.half(Flow::of(&ask)).with_context(|| format!("{src} asks {at:?} for {to}"))?;
                ensure!(opened.flags & (flags::MASQ | flags::DIRECT) == flags::MASQ, "{src} {at:?} {to}: {opened:?}");
            }
            lab.forget()?;
            publish(lab, net, at, proto, net.routed())?;
            for (shot, asked) in [
                {
                    let ask = from_outside(proto, (net.machine(), PORT), at);
                    (lab.side_in(&ask)?, ask)
                },
                {
                    let ask = from_outside(proto, (net.far(), PORT), at);
                    (lab.overlay_in(net.node2(), &ask)?, ask)
                },
            ] {
                let opened = lab.half(Flow::of(&asked)).with_context(|| format!("{shot:?}"))?;
                ensure!(opened.flags & (flags::MASQ | flags::DIRECT) == flags::MASQ, "{opened:?}");
            }
            // A backend here answers by here.
            publish(lab, net, at, proto, net.b())?;
            let ask = from_outside(proto, (net.world(), PORT + 1), at);
            lab.uplink_in(&ask)?.to_the_pod(&ask.hop().between((net.world(), PORT + 1), (net.b(), TARGET)))?;
            // Pods here ask by other entries.
            lab.serve_at_node(at.0, at.1, proto.number(net), &[(net.routed(), TARGET)])?;
            let inside = from_a(net, proto, at);
            lab.pod_sends(&inside)?.onto_wire(&inside.hop().between((net.a(), PORT), (net.routed(), TARGET)))
        })
    })
}

/// The client hears what fits into the packet with its header, with or without "don't fragment": nobody joins fragments of that.
#[test]
fn what_does_not_fit_with_its_header() -> Result<()> {
    direct(|lab, net| {
        let header = if net == Net::V4 { 20 } else { 40 };
        let (kind, code) = if net == Net::V4 { (3, 4) } else { (2, 0) };
        for (to, mtu) in [(net.routed(), 1500), (net.narrow(), 1400), (net.far(), OVERLAY_MTU)] {
            lab.forget()?;
            let at = (net.node(), NODE_PORT);
            publish(lab, net, at, Proto::Udp, to)?;
            for may_be_cut in [false, true] {
                let fits = ask(net, Proto::Udp, at).with_length(mtu - header).map(|f| f.may_be_cut = may_be_cut);
                let big = fits.with_length(mtu - header + 1).map(|f| f.set_ports(PORT + 1, NODE_PORT));
                let error = icmp_error(&big, net.node(), kind, code, (mtu - header) as u32);
                let too_big = error.map(|f| f.may_be_cut = false);
                lab.uplink_in(&big)?.answered(DropReason::FragNeeded, &too_big).with_context(|| format!("to {to}"))?;
                lab.uplink_in(&fits)?.onto_wire(&wrapped(&fits.hop(), net.node(), to))?;
            }
            ensure!(lab.halves()? == 1, "a refused packet opened a flow");
        }
        Ok(())
    })
}

/// A short frame, whose padding stays behind the packet with its header.
#[test]
fn padded_frames() -> Result<()> {
    direct(|lab, net| {
        let at = (net.node(), NODE_PORT);
        publish(lab, net, at, Proto::Tcp, net.routed())?;
        let short = ask(net, Proto::Tcp, at).map(|f| f.padding = 6);
        lab.uplink_in(&short)?.onto_wire(&wrapped(&short.hop(), net.node(), net.routed()))?;
        lab.forget()?;
        publish(lab, net, at, Proto::Tcp, net.b())?;
        let sent = short.map(|f| f.dst = node3(net));
        let arrives = sent.hop().between((net.world(), PORT), (net.b(), TARGET));
        lab.uplink_in(&from_node3(net, &sent))?.to_the_pod(&arrives)
    })
}

/// A pod whose bandwidth is limited gets its packets by the queue of its interface.
#[test]
fn a_pod_with_a_queue() -> Result<()> {
    direct(|lab, net| {
        lab.put_endpoint_with(net.b(), POD_B, MAC_B, endpoint::flags::VIA_QDISC)?;
        each(&SERVED, |proto| {
            lab.publish(net.node(), NODE_PORT, proto.number(net), 0, &[(net.b(), TARGET)])?;
            let sent = ask(net, proto, (node3(net), NODE_PORT));
            for f in [sent.clone(), later(&sent)] {
                let arrives = f.hop().between((net.world(), PORT), (net.b(), TARGET));
                lab.uplink_in(&from_node3(net, &f))?.by_the_queue(&arrives)?;
            }
            Ok(())
        })?;
        // What counts is the packet that the pod gets: with its header, this one would not fit.
        let header = if net == Net::V4 { 20 } else { 40 };
        for may_be_cut in [false, true] {
            let full = ask(net, Proto::Udp, (node3(net), NODE_PORT)).map(|f| {
                f.may_be_cut = may_be_cut;
                f.payload = vec![7; POD_B_MTU - header - 8];
            });
            let arrives = full.hop().between((net.world(), PORT), (net.b(), TARGET));
            lab.uplink_in(&from_node3(net, &full))?.by_the_queue(&arrives)?;
            let larger = full.map(|f| f.payload.push(7));
            lab.uplink_in(&from_node3(net, &larger))?.dropped(DropReason::FragNeeded)?;
        }
        lab.put_endpoint(net.b(), POD_B, MAC_B)
    })
}

/// The pod's address comes to this node: the flow ends here, and is a client's of this node from then on.
#[test]
fn the_pods_address_comes_to_the_node_that_was_asked() -> Result<()> {
    direct(|lab, net| {
        let (at, pod) = ((vip(net), VIP_PORT), net.routed());
        each(&SERVED, |proto| {
            publish(lab, net, at, proto, pod)?;
            let ask = ask(net, proto, at);
            let arrives = |f: &Frame| f.hop().between((net.world(), PORT), (pod, TARGET));
            for is_handed_on in [false, true] {
                lab.forget()?;
                lab.uplink_in(&ask)?.onto_wire(&wrapped(&ask.hop(), net.node(), pod))?;
                lab.put_endpoint(pod, POD_B, MAC_B)?;
                lab.age(Flow::of(&ask), 2)?;
                if is_handed_on {
                    let sent = wrapped(&later(&ask), node3(net), pod);
                    lab.uplink_in(&sent)?.to_the_pod(&arrives(&later(&ask)))?;
                } else {
                    lab.uplink_in(&later(&ask))?.dropped(DropReason::NoFib)?;
                    lab.uplink_in(&later(&ask))?.to_the_pod(&arrives(&later(&ask)))?;
                }
                let back = lab.half(Flow::of(&arrives(&ask)).reversed())?;
                ensure!(back.to == Flow::of(&ask).reversed(), "{back:?}");
                lab.drop_endpoint(pod)?;
            }
            Ok(())
        })
    })
}

/// This node is the last hop that answers; the backend's node drops.
#[test]
fn a_hop_limit_that_runs_out() -> Result<()> {
    direct(|lab, net| {
        let at = (net.node(), NODE_PORT);
        publish(lab, net, at, Proto::Udp, net.routed())?;
        let last = ask(net, Proto::Udp, at).map(|f| f.ttl = 1);
        let (kind, code) = if net == Net::V4 { (11, 0) } else { (3, 0) };
        lab.uplink_in(&last)?.answered(DropReason::TtlExceeded, &icmp_error(&last, net.node(), kind, code, 0))?;
        publish(lab, net, at, Proto::Udp, net.b())?;
        let last = ask(net, Proto::Udp, (node3(net), NODE_PORT)).map(|f| f.ttl = 1);
        lab.uplink_in(&from_node3(net, &last))?.dropped(DropReason::TtlExceeded)?;
        ensure!(lab.halves()? == 0, "a packet that was dropped opened a flow");
        Ok(())
    })
}

/// Routers between the backend's node and the client report to the address that was asked.
#[test]
fn errors_about_answers() -> Result<()> {
    direct(|lab, net| {
        for at in frontends(net) {
            for to in [net.routed(), net.far()] {
                lab.forget()?;
                publish(lab, net, at, Proto::Udp, to)?;
                let ask = ask(net, Proto::Udp, at);
                lab.uplink_in(&ask)?;
                for kind in kinds(net) {
                    for reporter in [net.router(), net.world()] {
                        let e = error(&ask.reply(), reporter, kind, 1000);
                        lab.uplink_in(&e)?.onto_wire(&wrapped(&e.hop(), net.node(), to))?;
                    }
                }
                // About another flow.
                let e = error(&ask.reply().map(|f| f.set_ports(at.1, 1)), net.router(), kinds(net)[0], 1000);
                let shot = lab.uplink_in(&e)?;
                if at.0 == vip(net) { shot.dropped(DropReason::IcmpUnrelated)? } else { shot.to_stack(&e)? }
            }
        }
        // The backend's node.
        let at = (vip(net), VIP_PORT);
        publish(lab, net, at, Proto::Udp, net.b())?;
        lab.forget()?;
        let sent = ask(net, Proto::Udp, at);
        lab.uplink_in(&from_node3(net, &sent))?;
        let arrived = sent.hop().between((net.world(), PORT), (net.b(), TARGET));
        let left = answer_of_b(&arrived).hop().between(at, (net.world(), PORT));
        for kind in kinds(net) {
            for reporter in [net.router(), net.world()] {
                let e = error(&left, reporter, kind, 1000);
                let want = translated(&e, &left, &answer_of_b(&arrived).hop(), reporter).hop();
                lab.uplink_in(&from_node3(net, &e))?.to_the_pod(&want)?;
            }
            let unrelated = error(&left.map(|f| f.set_ports(VIP_PORT, 1)), net.router(), kind, 1000);
            lab.uplink_in(&from_node3(net, &unrelated))?.dropped(DropReason::IcmpUnrelated)?;
            let forged = error(&left, net.a(), kind, 1000);
            lab.uplink_in(&from_node3(net, &forged))?.dropped(DropReason::Spoofed)?;
        }
        Ok(())
    })
}

/// Fragments follow the first one, through both nodes.
#[test]
fn fragments() -> Result<()> {
    direct(|lab, net| {
        let at = (net.node(), NODE_PORT);
        let datagram = ask(net, Proto::Udp, at).map(|f| f.payload = vec![0x5a; 1000]);
        publish(lab, net, at, Proto::Udp, net.routed())?;
        for piece in datagram.pieces(77, &[304, 608]) {
            lab.uplink_in(&piece)?.onto_wire(&wrapped(&piece.hop(), net.node(), net.routed()))?;
        }
        lab.forget()?;
        publish(lab, net, at, Proto::Udp, net.b())?;
        let datagram = datagram.map(|f| f.dst = node3(net));
        let whole = datagram.hop().between((net.world(), PORT), (net.b(), TARGET));
        for (piece, want) in datagram.pieces(78, &[304, 608]).iter().zip(whole.pieces(78, &[304, 608])) {
            lab.uplink_in(&from_node3(net, piece))?.to_the_pod(&want)?;
        }
        // The middle of a datagram of which nobody has the first fragment.
        let lost = datagram.pieces(79, &[304]);
        let packet = from_node3(net, &lost[1]);
        lab.uplink_in(&packet)?.dropped(DropReason::FragNotFound)
    })
}

/// The node that is asked sees one direction of a connection.
#[test]
fn connections_without_their_answers() -> Result<()> {
    direct(|lab, net| {
        let at = (net.node(), NODE_PORT);
        publish(lab, net, at, Proto::Tcp, net.routed())?;
        let ask = ask(net, Proto::Tcp, at);
        let flow = Flow::of(&ask);
        let segment = |flags, by| {
            ask.with_flags(flags).map(|f| {
                if let L4::Tcp { seq, ack, .. } = &mut f.l4 {
                    *seq = seq.wrapping_add(by);
                    *ack = 77;
                }
            })
        };
        let life = || anyhow::Ok(lifetime(6, lab.half(flow)?.state));
        let send = |f: &Frame| lab.uplink_in(f)?.onto_wire(&wrapped(&f.hop(), net.node(), net.routed()));
        send(&ask)?;
        ensure!(life()? == 120, "a SYN alone");
        send(&ask)?;
        ensure!(life()? == 120, "the SYN again");
        send(&segment(ACK, 1 << 30))?;
        ensure!(life()? == 120, "a number of another connection");
        send(&segment(ACK, 1))?;
        ensure!(life()? == 86_400, "established: {:?}", lab.half(flow)?);
        // A forged SYN changes nothing.
        send(&segment(SYN, 1 << 30))?;
        ensure!(life()? == 86_400, "a SYN with another number: {:?}", lab.half(flow)?);
        send(&segment(FIN | ACK, 1))?;
        ensure!(life()? == 120, "the client has finished: {:?}", lab.half(flow)?);
        send(&segment(ACK, 2))?;
        ensure!(life()? == 120, "and acknowledges the server's end: {:?}", lab.half(flow)?);
        // The port is used again, and may lead elsewhere.
        publish(lab, net, at, Proto::Tcp, net.far())?;
        let again = segment(SYN, 1 << 29);
        lab.uplink_in(&again)?.onto_wire(&wrapped(&again.hop(), net.node(), net.far()))?;
        ensure!(lab.half(flow)?.state == 0 && lab.half(flow)?.packets == 1, "{:?}", lab.half(flow)?);
        let more = segment(ACK, (1 << 29) + 1);
        lab.uplink_in(&more)?.onto_wire(&wrapped(&more.hop(), net.node(), net.far()))?;
        ensure!(life()? == 86_400, "{:?}", lab.half(flow)?);
        let reset = segment(RST, (1 << 29) + 1);
        lab.uplink_in(&reset)?.onto_wire(&wrapped(&reset.hop(), net.node(), net.far()))?;
        ensure!(lab.half(flow)?.state & state::RST_ORIG != 0, "{:?}", lab.half(flow)?);
        Ok(())
    })
}

/// A backend that has left the Service gets no new connection by an entry of before.
#[test]
fn a_backend_that_has_gone() -> Result<()> {
    direct(|lab, net| {
        let at = (net.node(), NODE_PORT);
        let gone = publish(lab, net, at, Proto::Tcp, net.routed())?;
        let ask = ask(net, Proto::Tcp, at);
        lab.uplink_in(&ask)?;
        lab.withdraw(gone)?;
        publish(lab, net, at, Proto::Tcp, net.far())?;
        lab.uplink_in(&ask)?.onto_wire(&wrapped(&ask.hop(), net.node(), net.far()))
    })
}
