//! What the sender of a denied packet gets: nothing, or with the setting an ICMP error from the address that it asked.

use super::{INTO_B, OUT_OF_A, a_asks_b, frame_from, policed, put_a, put_b};
use crate::answers::{BURST, burst};
use crate::errors::{error, prohibited};
use crate::external::NODE_PORT;
use crate::flows::{
    ALL, PORT, Proto, SERVED, TARGET, VIP_PORT, answer_of_b, as_from_a, at_backend, from_a, from_host, from_outside,
    later,
};
use crate::frame::{ACK, Frame, L4, RST, SYN};
use crate::harness::{BOTH, Lab, MAC_B, Net, POD_A, POD_B, SIDE, Shot, To, UPLINK, each, lab_apart, labs};
use crate::icmp::kinds;
use anyhow::{Context, Result, ensure};
use rustnet_common::config::flags::ANSWER_DENIED;
use rustnet_common::drop::DropReason::{IcmpUnrelated, NoBackend, PolicyDenied, PolicyUndecided};
use rustnet_common::drop::hook;
use rustnet_common::peer::flags as peer;
use rustnet_common::policy::{ALLOW, ANY_CLASS, OPEN, PolicyPod};
use rustnet_common::service::flags::DIRECT;
use std::net::IpAddr;
use testkit::datapath::Input;

/// Switches the answers on.
fn answer(lab: &Lab) -> Result<()> {
    lab.configure(|c| c.flags |= ANSWER_DENIED)
}

/// Where a packet comes in.
#[derive(Clone, Copy, Debug)]
enum By {
    Pod,
    Uplink,
    Side,
    Tunnel,
}

impl By {
    fn send(self, lab: &Lab, net: Net, frame: &Frame) -> Result<Shot> {
        match self {
            Self::Pod => lab.pod_sends(frame),
            Self::Uplink => lab.uplink_in(frame),
            Self::Side => lab.side_in(frame),
            Self::Tunnel => lab.overlay_in(net.node2(), frame),
        }
    }
}

/// Packets that a node denies whose pod A may open nothing, and whose pod B gets nothing.
fn denied(lab: &Lab, net: Net, proto: Proto) -> Result<Vec<(&'static str, By, Frame)>> {
    let port = proto.port(TARGET);
    let mut all = vec![
        ("egress to a pod here", By::Pod, from_a(net, proto, (net.b(), port))),
        ("egress to a pod of another node, by the overlay", By::Pod, from_a(net, proto, (net.far(), port))),
        ("egress to a pod of another node, by routes", By::Pod, from_a(net, proto, (net.routed(), port))),
        ("egress to the world", By::Pod, from_a(net, proto, (net.world(), port))),
        ("egress to the node", By::Pod, from_a(net, proto, (net.node(), port))),
        ("ingress from a pod of another node, by routes", By::Uplink, frame_from(proto, net.routed(), net.b())),
        ("ingress from the world", By::Uplink, frame_from(proto, net.world(), net.b())),
        ("ingress from a pod of another node, by the overlay", By::Tunnel, frame_from(proto, net.far(), net.b())),
        ("ingress from another node, by the overlay", By::Tunnel, frame_from(proto, net.node2(), net.b())),
    ];
    if proto != Proto::Echo {
        let number = proto.number(net);
        lab.serve(net.vip(1), VIP_PORT, number, 0, &[(net.b(), TARGET)])?;
        lab.serve(net.vip(2), VIP_PORT, number, 0, &[(net.far(), TARGET)])?;
        lab.publish(net.node(), NODE_PORT, number, 0, &[(net.b(), TARGET)])?;
        let at_node = (net.node(), NODE_PORT);
        all.extend([
            ("egress to a Service with a backend here", By::Pod, from_a(net, proto, (net.vip(1), VIP_PORT))),
            ("egress to a Service with one elsewhere", By::Pod, from_a(net, proto, (net.vip(2), VIP_PORT))),
            ("a node port by the uplink", By::Uplink, from_outside(proto, (net.world(), PORT), at_node)),
            ("a node port by another device", By::Side, from_outside(proto, (net.machine(), PORT), at_node)),
            ("a node port by the overlay", By::Tunnel, from_outside(proto, (net.far(), PORT), at_node)),
        ]);
    }
    Ok(all)
}

/// Unless somebody asks for it, the packet is dropped as it came, and nothing is sent.
#[test]
fn nobody_is_answered_by_default() -> Result<()> {
    labs(|lab, net| {
        policed(lab, net, OUT_OF_A, INTO_B)?;
        each(&ALL, |proto| {
            for (what, by, frame) in denied(lab, net, proto)? {
                by.send(lab, net, &frame)?.dropped(PolicyDenied).context(what)?;
            }
            ensure!(lab.halves()? == 0, "a refused flow is tracked");
            Ok(())
        })
    })
}

#[test]
fn who_asks_is_answered_from_the_address_asked() -> Result<()> {
    labs(|lab, net| {
        answer(lab)?;
        policed(lab, net, OUT_OF_A, INTO_B)?;
        each(&ALL, |proto| {
            for (what, by, frame) in denied(lab, net, proto)? {
                by.send(lab, net, &frame)?.answered(PolicyDenied, &prohibited(&frame)).context(what)?;
            }
            ensure!(lab.halves()? == 0, "a refused flow is tracked");
            Ok(())
        })
    })
}

/// Pod A may ask, and B does not take it: A is on the same node, and answered there.
#[test]
fn ingress_is_denied_to_a_pod_of_the_same_node() -> Result<()> {
    labs(|lab, net| {
        answer(lab)?;
        policed(lab, net, OPEN, INTO_B)?;
        each(&ALL, |proto| {
            let ask = a_asks_b(net, proto);
            lab.pod_sends(&ask)?.answered(PolicyDenied, &prohibited(&ask))?;
            lab.put_rule(INTO_B, ANY_CLASS, To::Proto(proto.number(net)), ALLOW)?;
            lab.pod_sends(&ask)?.to_the_pod(&ask.hop()).context("allowed")
        })
    })
}

/// Past the overlay's device no answer is made: the packet goes back to the device, behind which it is answered.
#[test]
fn out_of_the_tunnel_the_device_answers() -> Result<()> {
    labs(|lab, net| {
        lab.configure(|c| c.flags |= ANSWER_DENIED | rustnet_common::config::flags::ENCAPSULATE)?;
        policed(lab, net, OPEN, INTO_B)?;
        each(&SERVED, |proto| {
            let ask = frame_from(proto, net.far(), net.b());
            let before = lab.tunnel_in(&super::outer(net, &ask).bytes())?;
            ensure!(before.verdict == super::STACK && before.counted.is_empty(), "{before:?}");
            lab.overlay_in(net.node2(), &ask)?.answered(PolicyDenied, &prohibited(&ask))
        })
    })
}

/// Options, extension headers and long payloads: the error quotes as much as others do.
#[test]
fn what_the_error_quotes() -> Result<()> {
    labs(|lab, net| {
        answer(lab)?;
        policed(lab, net, OUT_OF_A, OPEN)?;
        let plain = a_asks_b(net, Proto::Udp);
        let decorated = match net {
            Net::V4 => plain.map(|f| f.options = vec![1; 12]),
            Net::V6 => plain.map(|f| f.extensions = vec![(60, vec![0, 0, 1, 4, 0, 0, 0, 0])]),
        };
        for ask in [&plain, &decorated] {
            for len in [0, 1, 27, 28, 1000] {
                let ask = ask.map(|f| f.payload = vec![0x5a; len]);
                lab.pod_sends(&ask)?
                    .answered(PolicyDenied, &prohibited(&ask))
                    .with_context(|| format!("{len} bytes"))?;
            }
        }
        Ok(())
    })
}

/// A flow that policies no longer allow: whoever sends next gets the error, in either direction.
#[test]
fn flows_that_were_allowed_are_answered() -> Result<()> {
    labs(|lab, net| {
        answer(lab)?;
        each(&SERVED, |proto| {
            lab.forget()?;
            lab.forget_policies()?;
            lab.serve(net.vip(1), VIP_PORT, proto.number(net), 0, &[(net.b(), TARGET)])?;
            let ask = from_a(net, proto, (net.vip(1), VIP_PORT));
            let arrives = at_backend(net, &ask, net.b());
            lab.pod_sends(&ask)?.to_the_pod(&arrives)?;
            let far = frame_from(proto, net.far(), net.b());
            lab.overlay_in(net.node2(), &far)?.to_the_pod(&far.hop())?;
            let routed = frame_from(proto, net.routed(), net.b());
            lab.uplink_in(&routed)?.to_the_pod(&routed.hop())?;
            policed(lab, net, OPEN, INTO_B)?;
            for (by, frame) in [
                (By::Pod, later(&ask)),
                (By::Pod, answer_of_b(&arrives)),
                (By::Tunnel, later(&far)),
                (By::Uplink, later(&routed)),
            ] {
                by.send(lab, net, &frame)?
                    .answered(PolicyDenied, &prohibited(&frame))
                    .with_context(|| format!("{by:?}"))?;
            }
            Ok(())
        })
    })
}

/// Policies look at packets of a known flow before the hook looks at their source, which may be forged: then nobody is answered.
#[test]
fn forged_packets_of_known_flows_are_not_answered() -> Result<()> {
    labs(|lab, net| {
        answer(lab)?;
        let node3 = net.ip([172, 18, 0, 13], "fd00:18::13");
        each(&ALL, |proto| {
            lab.forget()?;
            lab.forget_policies()?;
            let ask = a_asks_b(net, proto);
            lab.pod_sends(&ask)?.to_the_pod(&ask.hop())?;
            let far = frame_from(proto, net.far(), net.b());
            lab.overlay_in(net.node2(), &far)?.to_the_pod(&far.hop())?;
            policed(lab, net, OPEN, INTO_B)?;
            // Another pod, another node, and a machine on the segment.
            let stolen = later(&ask).map(|f| f.smac = MAC_B);
            let bytes = stolen.bytes();
            lab.pod_sends(&stolen)?.dropped(PolicyDenied).context("by another pod")?;
            let input = Input { frame: &bytes, ifindex: POD_A, ..Input::default() };
            lab.raw(hook::FROM_POD, &input)?.dropped(PolicyDenied).context("with another MAC")?;
            let bytes = later(&ask).bytes();
            let input = Input { frame: &bytes, ifindex: POD_B, ..Input::default() };
            lab.raw(hook::FROM_POD, &input)?.dropped(PolicyDenied).context("by another interface")?;
            lab.overlay_in(node3, &later(&far))?.dropped(PolicyDenied).context("through another tunnel")?;
            let outside = frame_from(proto, net.far(), net.b());
            lab.uplink_in(&later(&outside))?.dropped(PolicyDenied).context("from the segment")?;
            lab.uplink_in(&later(&outside).map(|f| f.src = net.a()))?.dropped(PolicyDenied).context("in A's name")
        })
    })
}

/// RFC 1122, 3.2.2: nothing answers errors, resets, later fragments, and what many have received.
#[test]
fn what_nobody_answers() -> Result<()> {
    labs(|lab, net| {
        answer(lab)?;
        policed(lab, net, OUT_OF_A, INTO_B)?;
        let ask = a_asks_b(net, Proto::Tcp);
        for flags in [RST, RST | ACK, RST | SYN] {
            lab.pod_sends(&ask.with_flags(flags))?.dropped(PolicyDenied)?;
        }
        let about = answer_of_b(&ask).map(|f| f.ttl = 60);
        let e = as_from_a(&error(&about, net.a(), kinds(net)[0], 1000));
        lab.pod_sends(&e)?.dropped(IcmpUnrelated)?;
        for (by, frame) in
            [(By::Pod, a_asks_b(net, Proto::Udp)), (By::Uplink, frame_from(Proto::Udp, net.routed(), net.b()))]
        {
            for dmac in [[0xff; 6], [1, 0, 0x5e, 0, 0, 1], [0x33, 0x33, 0, 0, 0, 1]] {
                by.send(lab, net, &frame.map(|f| f.dmac = dmac))?
                    .dropped(PolicyDenied)
                    .with_context(|| format!("{dmac:x?}"))?;
            }
            let pieces = frame.map(|f| f.payload = vec![0xa5; 3000]).pieces(60, &[1200, 2400]);
            by.send(lab, net, &pieces[0])?
                .answered(PolicyDenied, &prohibited(&pieces[0]))
                .context("the first piece")?;
            for piece in &pieces[1..] {
                by.send(lab, net, piece)?.dropped(PolicyDenied).context("a later piece")?;
            }
        }
        Ok(())
    })
}

/// The kernel's tables lead nowhere with a broadcast of a link, as with an address that has no route.
#[test]
fn an_address_without_a_route_is_not_answered() -> Result<()> {
    labs(|lab, net| {
        answer(lab)?;
        policed(lab, net, OUT_OF_A, OPEN)?;
        if net == Net::V4 {
            lab.pod_sends(&from_a(net, Proto::Udp, (net.unreachable(), TARGET)))?.dropped(PolicyDenied)?;
            let broadcast: IpAddr = [172, 18, 0, 255].into();
            lab.pod_sends(&from_a(net, Proto::Udp, (broadcast, TARGET)))?.dropped(PolicyDenied)?;
        }
        Ok(())
    })
}

/// The agent has not decided about a pod, and may allow the flow in a moment.
#[test]
fn undecided_is_not_denied() -> Result<()> {
    labs(|lab, net| {
        answer(lab)?;
        put_a(lab, net, OPEN)?;
        lab.put_policy_pod(net.b(), PolicyPod { class: 1, ingress: INTO_B, egress: OPEN, ifindex: POD_B + 1 })?;
        lab.enforce(1)?;
        each(&ALL, |proto| {
            lab.pod_sends(&a_asks_b(net, proto))?.dropped(PolicyUndecided)?;
            lab.overlay_in(net.node2(), &frame_from(proto, net.far(), net.b()))?.dropped(PolicyUndecided)
        })
    })
}

/// What the node's stack forwards to a pod, netfilter may have translated.
#[test]
fn what_the_stack_forwards_is_not_answered() -> Result<()> {
    labs(|lab, net| {
        answer(lab)?;
        policed(lab, net, OPEN, INTO_B)?;
        each(&ALL, |proto| {
            lab.to_pod(POD_B, &frame_from(proto, net.world(), net.b()))?.dropped(PolicyDenied)?;
            let bytes = from_host(net, proto, (net.b(), proto.port(TARGET))).bytes();
            let input = Input { frame: &bytes, ifindex: POD_B, came_by: SIDE, ..Input::default() };
            lab.raw(hook::TO_POD, &input)?.dropped(PolicyDenied)
        })
    })
}

/// The answer would go to the node that handed the packet on, with that node's header around what it quotes.
#[test]
fn direct_server_return_is_not_answered() -> Result<()> {
    labs(|lab, net| {
        answer(lab)?;
        let node3 = net.ip([172, 18, 0, 13], "fd00:18::13");
        lab.put_peer(node3, None, peer::NODE, None)?;
        policed(lab, net, OPEN, INTO_B)?;
        each(&SERVED, |proto| {
            lab.publish(net.node(), NODE_PORT, proto.number(net), DIRECT, &[(net.b(), TARGET)])?;
            let inside = from_outside(proto, (net.world(), PORT), (node3, NODE_PORT));
            let packet = inside.map(|f| {
                f.payload = inside.ip_bytes();
                f.l4 = L4::Other(if inside.is_v6() { 41 } else { 4 });
                (f.src, f.dst, f.ttl, f.id, f.flow) = (node3, net.b(), 64, 0, 0);
            });
            lab.uplink_in(&packet)?.dropped(PolicyDenied)
        })
    })
}

/// As other errors are, and without taking theirs.
#[test]
fn answers_are_limited_apart_from_other_errors() -> Result<()> {
    for net in BOTH {
        lab_apart(|lab| {
            answer(lab)?;
            policed(lab, net, OUT_OF_A, INTO_B)?;
            for (code, ifindex, frame) in [
                (hook::FROM_POD, POD_A, a_asks_b(net, Proto::Tcp)),
                (hook::UPLINK_IN, UPLINK, frame_from(Proto::Tcp, net.routed(), net.b())),
            ] {
                lab.datapath().clear_percpu("rn_limits")?;
                let answers = burst(lab, code, ifindex, &frame, PolicyDenied)?;
                ensure!(answers > 0 && answers < BURST / 2, "{net:?}: {answers} answers to {BURST} packets");
            }
            put_b(lab, net, OPEN)?;
            lab.serve(net.vip(1), 80, 17, 0, &[])?;
            let refused = from_a(net, Proto::Udp, (net.vip(1), 80));
            ensure!(burst(lab, hook::FROM_POD, POD_A, &refused, NoBackend)? > 0, "{net:?}: no other error is left");
            Ok(())
        })?;
    }
    Ok(())
}
