//! What the sender of a denied packet gets: nothing, or with the setting and if it is a pod of this node an ICMP error from the address
//! that it asked.

use super::{INTO_B, OUT_OF_A, a_asks_b, frame_from, policed, put_a, put_b};
use crate::answers::{BURST, burst};
use crate::errors::{error, prohibited};
use crate::external::NODE_PORT;
use crate::flows::{
    ALL, PORT, Proto, SERVED, TARGET, VIP_PORT, answer_of_b, as_from_a, at_backend, from_a, from_outside, later,
};
use crate::frame::{ACK, Frame, RST, SYN};
use crate::harness::{BOTH, Lab, MAC_B, Net, POD_A, POD_B, Shot, To, each, lab_apart, labs};
use crate::icmp::kinds;
use anyhow::{Context, Result, ensure};
use rustnet_common::config::flags::ANSWER_DENIED;
use rustnet_common::drop::DropReason::{IcmpUnrelated, NoBackend, PolicyDenied, PolicyUndecided, Spoofed};
use rustnet_common::drop::hook;
use rustnet_common::policy::{ALLOW, ANY_CLASS, OPEN, PolicyPod};
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
fn a_pod_is_answered_from_the_address_asked() -> Result<()> {
    labs(|lab, net| {
        answer(lab)?;
        policed(lab, net, OUT_OF_A, INTO_B)?;
        each(&ALL, |proto| {
            for (what, by, frame) in denied(lab, net, proto)? {
                let shot = by.send(lab, net, &frame)?;
                match by {
                    By::Pod => shot.answered(PolicyDenied, &prohibited(&frame)),
                    // The node of the client would have to translate the error back, and a host may have no way for it.
                    By::Uplink | By::Side | By::Tunnel => shot.dropped(PolicyDenied),
                }
                .context(what)?;
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
            policed(lab, net, OPEN, INTO_B)?;
            for frame in [later(&ask), answer_of_b(&arrives)] {
                lab.pod_sends(&frame)?.answered(PolicyDenied, &prohibited(&frame))?;
            }
            Ok(())
        })
    })
}

/// An answer would say that another pod has such a flow.
#[test]
fn forged_packets_of_known_flows_are_not_answered() -> Result<()> {
    labs(|lab, net| {
        answer(lab)?;
        each(&ALL, |proto| {
            lab.forget()?;
            lab.forget_policies()?;
            let ask = a_asks_b(net, proto);
            lab.pod_sends(&ask)?.to_the_pod(&ask.hop())?;
            policed(lab, net, OPEN, INTO_B)?;
            let stolen = later(&ask).map(|f| f.smac = MAC_B);
            lab.pod_sends(&stolen)?.dropped(Spoofed).context("with another MAC")?;
            let bytes = later(&ask).bytes();
            let input = Input { frame: &bytes, ifindex: POD_B, ..Input::default() };
            lab.raw(hook::FROM_POD, &input)?.dropped(Spoofed).context("by another interface")
        })
    })
}

/// RFC 1122, 3.2.2: nothing answers errors, resets and later fragments.
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
        let frame = a_asks_b(net, Proto::Udp);
        let pieces = frame.map(|f| f.payload = vec![0xa5; 3000]).pieces(60, &[1200, 2400]);
        lab.pod_sends(&pieces[0])?.answered(PolicyDenied, &prohibited(&pieces[0])).context("the first piece")?;
        for piece in &pieces[1..] {
            lab.pod_sends(piece)?.dropped(PolicyDenied).context("a later piece")?;
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

/// As other errors are, and without taking theirs.
#[test]
fn answers_are_limited_apart_from_other_errors() -> Result<()> {
    for net in BOTH {
        lab_apart(|lab| {
            answer(lab)?;
            policed(lab, net, OUT_OF_A, INTO_B)?;
            let answers = burst(lab, hook::FROM_POD, POD_A, &a_asks_b(net, Proto::Tcp), PolicyDenied)?;
            ensure!(answers > 0 && answers < BURST / 2, "{net:?}: {answers} answers to {BURST} packets");
            put_b(lab, net, OPEN)?;
            lab.serve(net.vip(1), 80, 17, 0, &[])?;
            let refused = from_a(net, Proto::Udp, (net.vip(1), 80));
            ensure!(burst(lab, hook::FROM_POD, POD_A, &refused, NoBackend)? > 0, "{net:?}: no other error is left");
            Ok(())
        })?;
    }
    Ok(())
}
