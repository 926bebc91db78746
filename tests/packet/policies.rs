//! Network policies: which flows open, which go on, and what nobody judges.

mod audit;
mod denied;

use crate::decap::outer;
use crate::external::NODE_PORT;
use crate::flows::{
    ALL, PORT, Proto, SERVED, TARGET, VIP_PORT, answer_of_b, as_from_a, at_backend, from_a, from_b, from_host,
    from_outside, later,
};
use crate::frame::Frame;
use crate::harness::{Flow, Lab, MAC_A, MAC_B, MAC_HOST, Net, POD_A, POD_B, SIDE, STACK, To, each, labs};
use anyhow::{Context, Result, ensure};
use rustnet_common::config;
use rustnet_common::drop::DropReason::{PolicyDenied, PolicyUndecided, Spoofed};
use rustnet_common::drop::hook;
use rustnet_common::policy::{ALLOW, ANY_CLASS, OPEN, PolicyPod};
use std::net::IpAddr;
use testkit::datapath::Input;

/// Sets and classes of the tests.
const INTO_B: u32 = 71;
const OUT_OF_A: u32 = 72;
const CLASS_A: u32 = 5;
const CLASS_B: u32 = 6;
const CLASS_FAR: u32 = 7;
const OTHERS: u32 = 8;

/// Pod A, with this set of the flows that it opens.
fn put_a(lab: &Lab, net: Net, egress: u32) -> Result<()> {
    lab.put_policy_pod(net.a(), PolicyPod { class: CLASS_A, ingress: OPEN, egress, ifindex: POD_A })
}

/// Pod B, with this set of the flows to it.
fn put_b(lab: &Lab, net: Net, ingress: u32) -> Result<()> {
    lab.put_policy_pod(net.b(), PolicyPod { class: CLASS_B, ingress, egress: OPEN, ifindex: POD_B })
}

/// A node with policies: pod A has `egress`, pod B has `ingress`.
fn policed(lab: &Lab, net: Net, egress: u32, ingress: u32) -> Result<()> {
    lab.forget_policies()?;
    put_a(lab, net, egress)?;
    put_b(lab, net, ingress)?;
    lab.enforce(1)
}

/// Pod A asks pod B.
fn a_asks_b(net: Net, proto: Proto) -> Frame {
    from_a(net, proto, (net.b(), proto.port(TARGET)))
}

/// The same from another source port.
fn from_port(frame: &Frame, port: u16) -> Frame {
    frame.map(|f| f.set_ports(port, frame.ports().1))
}

#[test]
fn without_policies_nobody_is_judged() -> Result<()> {
    labs(|lab, net| {
        put_b(lab, net, INTO_B)?;
        for generation in [0, 9] {
            lab.forget()?;
            lab.enforce_nothing(generation)?;
            each(&ALL, |proto| {
                let ask = a_asks_b(net, proto);
                lab.pod_sends(&ask)?.to_the_pod(&ask.hop())?;
                lab.pod_sends(&answer_of_b(&ask))?.to_the_pod(&answer_of_b(&ask).hop())
            })?;
        }
        Ok(())
    })
}

/// A pod whose policies the agent has not applied yet, and one with the address of an earlier pod.
#[test]
fn a_pod_that_is_not_decided_is_closed() -> Result<()> {
    labs(|lab, net| {
        let of_another = PolicyPod { class: CLASS_B, ingress: OPEN, egress: OPEN, ifindex: POD_B + 1 };
        for is_known in [false, true] {
            lab.forget_policies()?;
            put_a(lab, net, OPEN)?;
            if is_known {
                lab.put_policy_pod(net.b(), of_another)?;
            }
            lab.enforce(1)?;
            each(&ALL, |proto| {
                lab.pod_sends(&a_asks_b(net, proto))?.dropped(PolicyUndecided)?;
                let asks = from_b(net, proto, (net.a(), proto.port(TARGET)));
                lab.pod_sends(&asks)?.dropped(PolicyUndecided)?;
                lab.pod_sends(&from_b(net, proto, (net.world(), proto.port(TARGET))))?.dropped(PolicyUndecided)?;
                let from_far = frame_from(proto, net.far(), net.b());
                lab.overlay_in(net.node2(), &from_far)?.dropped(PolicyUndecided)?;
                lab.uplink_in(&frame_from(proto, net.routed(), net.b()))?.dropped(PolicyUndecided)
            })?;
            ensure!(lab.halves()? == 0, "a refused flow is tracked");
        }
        put_b(lab, net, OPEN)?;
        each(&ALL, |proto| lab.pod_sends(&a_asks_b(net, proto))?.to_the_pod(&a_asks_b(net, proto).hop()))
    })
}

/// Somebody elsewhere asks a pod of this node.
fn frame_from(proto: Proto, src: IpAddr, dst: IpAddr) -> Frame {
    from_outside(proto, (src, PORT), (dst, proto.port(TARGET)))
}

#[test]
fn a_set_without_rules_lets_nothing_in() -> Result<()> {
    labs(|lab, net| {
        policed(lab, net, OPEN, INTO_B)?;
        each(&ALL, |proto| {
            lab.pod_sends(&a_asks_b(net, proto))?.dropped(PolicyDenied)?;
            lab.overlay_in(net.node2(), &frame_from(proto, net.far(), net.b()))?.dropped(PolicyDenied)?;
            lab.uplink_in(&frame_from(proto, net.routed(), net.b()))?.dropped(PolicyDenied)?;
            // What it opens itself goes, and is answered.
            let asks = from_b(net, proto, (net.a(), proto.port(TARGET)));
            lab.pod_sends(&asks)?.to_the_pod(&asks.hop())?;
            let answer = as_from_a(&asks.reply()).map(|f| f.ttl = 64);
            lab.pod_sends(&answer)?.to_the_pod(&answer.hop())
        })
    })
}

/// What the rule is for passes, from its class, and nothing else.
#[test]
fn a_rule_lets_in_what_it_is_for() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            for (to, allowed, denied) in [
                (To::port(proto.number(net), TARGET), vec![TARGET], vec![TARGET - 1, TARGET + 1, TARGET ^ 0x100]),
                (To::Ports(proto.number(net), 0x1f80, 12), vec![0x1f80, 0x1f8f], vec![0x1f7f, 0x1f90]),
                (To::Proto(proto.number(net)), vec![1, TARGET, 65535], vec![]),
                (To::Anything, vec![1, TARGET], vec![]),
            ] {
                lab.forget()?;
                policed(lab, net, OPEN, INTO_B)?;
                lab.put_rule(INTO_B, CLASS_A, to, ALLOW)?;
                for port in allowed {
                    let ask = from_a(net, proto, (net.b(), port));
                    lab.pod_sends(&ask)?.to_the_pod(&ask.hop()).with_context(|| format!("{to:?}, {port}"))?;
                    let other = from_outside(proto, (net.routed(), PORT), (net.b(), port));
                    lab.uplink_in(&other)?.dropped(PolicyDenied).with_context(|| format!("{to:?}, {port}"))?;
                }
                for port in denied {
                    let ask = from_a(net, proto, (net.b(), port));
                    lab.pod_sends(&ask)?.dropped(PolicyDenied).with_context(|| format!("{to:?}, {port}"))?;
                }
                for other in ALL.into_iter().filter(|other| *other != proto) {
                    let shot = lab.pod_sends(&from_port(&a_asks_b(net, other), PORT + 9))?;
                    match to {
                        To::Anything => shot.to_the_pod(&from_port(&a_asks_b(net, other), PORT + 9).hop())?,
                        _ => shot.dropped(PolicyDenied).with_context(|| format!("{to:?}, {other:?}"))?,
                    }
                }
            }
            Ok(())
        })
    })
}

/// Of the direction that a pod opens.
#[test]
fn a_set_of_what_a_pod_opens() -> Result<()> {
    labs(|lab, net| {
        policed(lab, net, OUT_OF_A, OPEN)?;
        lab.put_class(net.world(), 24 + 32 * u32::from(net == Net::V6), OTHERS)?;
        each(&SERVED, |proto| {
            let world = from_a(net, proto, (net.world(), TARGET));
            let node = from_a(net, proto, (net.node(), TARGET));
            let far = from_a(net, proto, (net.far(), TARGET));
            for ask in [&a_asks_b(net, proto), &world, &node, &far] {
                lab.pod_sends(ask)?.dropped(PolicyDenied)?;
            }
            lab.put_rule(OUT_OF_A, OTHERS, To::port(proto.number(net), TARGET), ALLOW)?;
            lab.pod_sends(&world)?.onto_wire(&world.hop().between((net.node(), PORT), (net.world(), TARGET)))?;
            let elsewhere = from_a(net, proto, (net.world(), TARGET + 1));
            lab.pod_sends(&elsewhere)?.dropped(PolicyDenied)?;
            lab.pod_sends(&a_asks_b(net, proto))?.dropped(PolicyDenied)?;
            lab.put_rule(OUT_OF_A, CLASS_B, To::Proto(proto.number(net)), ALLOW)?;
            lab.pod_sends(&a_asks_b(net, proto))?.to_the_pod(&a_asks_b(net, proto).hop())
        })
    })
}

/// Where the kernel has no route, the stack would get the packet, and might know another way.
#[test]
fn a_flow_without_a_route_is_judged() -> Result<()> {
    labs(|lab, net| {
        policed(lab, net, OUT_OF_A, OPEN)?;
        let ask = from_a(net, Proto::Udp, (net.unreachable(), TARGET));
        if net == Net::V4 {
            lab.pod_sends(&ask)?.dropped(PolicyDenied)?;
            lab.put_rule(OUT_OF_A, ANY_CLASS, To::Anything, ALLOW)?;
            lab.pod_sends(&ask)?.to_stack(&ask)?;
        }
        Ok(())
    })
}

/// Both sides have to allow it.
#[test]
fn both_directions_are_judged_on_one_node() -> Result<()> {
    labs(|lab, net| {
        for (out, into) in [(false, false), (true, false), (false, true), (true, true)] {
            lab.forget()?;
            policed(lab, net, OUT_OF_A, INTO_B)?;
            if out {
                lab.put_rule(OUT_OF_A, CLASS_B, To::Anything, ALLOW)?;
            }
            if into {
                lab.put_rule(INTO_B, CLASS_A, To::Anything, ALLOW)?;
            }
            let shot = lab.pod_sends(&a_asks_b(net, Proto::Tcp))?;
            let arrives = a_asks_b(net, Proto::Tcp).hop();
            let as_wanted = if out && into { shot.to_the_pod(&arrives) } else { shot.dropped(PolicyDenied) };
            as_wanted.with_context(|| format!("out {out}, into {into}"))?;
        }
        Ok(())
    })
}

/// The port of the backend counts, not that of the Service, and the client's own address.
#[test]
fn through_a_service_the_backend_is_judged() -> Result<()> {
    labs(|lab, net| {
        policed(lab, net, OPEN, INTO_B)?;
        each(&SERVED, |proto| {
            lab.serve(net.vip(1), VIP_PORT, proto.number(net), 0, &[(net.b(), TARGET)])?;
            let ask = from_a(net, proto, (net.vip(1), VIP_PORT));
            lab.put_rule(INTO_B, CLASS_A, To::port(proto.number(net), VIP_PORT), ALLOW)?;
            lab.pod_sends(&ask)?.dropped(PolicyDenied)?;
            lab.put_rule(INTO_B, CLASS_A, To::port(proto.number(net), TARGET), ALLOW)?;
            lab.pod_sends(&ask)?.to_the_pod(&at_backend(net, &ask, net.b()))
        })
    })
}

/// A client outside, at a node port whose backend is here: it is judged by its own address.
#[test]
fn a_client_outside_is_judged_by_its_address() -> Result<()> {
    labs(|lab, net| {
        policed(lab, net, OPEN, INTO_B)?;
        each(&SERVED, |proto| {
            lab.publish(net.node(), NODE_PORT, proto.number(net), 0, &[(net.b(), TARGET)])?;
            let ask = from_outside(proto, (net.world(), PORT), (net.node(), NODE_PORT));
            lab.uplink_in(&ask)?.dropped(PolicyDenied)?;
            lab.put_class(net.node(), 32 + 96 * u32::from(net == Net::V6), CLASS_A)?;
            lab.put_rule(INTO_B, CLASS_A, To::Anything, ALLOW)?;
            lab.uplink_in(&ask)?.dropped(PolicyDenied)?;
            lab.put_class(net.world(), 32 + 96 * u32::from(net == Net::V6), OTHERS)?;
            lab.put_rule(INTO_B, OTHERS, To::port(proto.number(net), TARGET), ALLOW)?;
            lab.uplink_in(&ask)?.to_the_pod(&ask.hop().between((net.world(), PORT), (net.b(), TARGET)))
        })
    })
}

/// The longest prefix has the address, and a pod's own entry comes before all of them.
#[test]
fn classes_of_addresses() -> Result<()> {
    labs(|lab, net| {
        let (wide, narrow, one) = if net == Net::V4 { (16, 24, 32) } else { (48, 64, 128) };
        policed(lab, net, OPEN, INTO_B)?;
        let ask = frame_from(Proto::Tcp, net.routed(), net.b());
        let opens = |is_open: bool, what: &str| {
            lab.forget()?;
            let shot = lab.uplink_in(&ask)?;
            let as_wanted = if is_open { shot.to_the_pod(&ask.hop()) } else { shot.dropped(PolicyDenied) };
            as_wanted.with_context(|| what.to_owned())
        };
        lab.put_rule(INTO_B, OTHERS, To::Anything, ALLOW)?;
        opens(false, "no class")?;
        lab.put_class(net.routed(), wide, OTHERS)?;
        opens(true, "a block")?;
        lab.put_class(net.routed(), narrow, CLASS_FAR)?;
        opens(false, "a longer one")?;
        lab.put_class(net.routed(), one, OTHERS)?;
        opens(true, "the longest")?;
        let elsewhere = PolicyPod { class: CLASS_FAR, ingress: OPEN, egress: OPEN, ifindex: 0 };
        lab.put_policy_pod(net.routed(), elsewhere)?;
        opens(false, "a pod of another node")?;
        lab.put_rule(INTO_B, CLASS_FAR, To::Anything, ALLOW)?;
        opens(true, "its class")?;
        // The entry of a pod of this node that has gone.
        lab.put_policy_pod(net.routed(), PolicyPod { class: CLASS_A, ifindex: 99, ..elsewhere })?;
        lab.drop_rule(INTO_B, CLASS_FAR, To::Anything)?;
        opens(true, "the block again")
    })
}

/// Class, ports and flags of a rule.
type Entry = (u32, To, u32);

/// A rule of the class counts before those of any, whether it allows or denies; of one class that with the longest prefix.
#[test]
fn the_order_of_rules() -> Result<()> {
    const DENY: u32 = 0;
    labs(|lab, net| {
        let (all, udp) = (To::Anything, To::Proto(Proto::Udp.number(net)));
        let (tcp, port) = (To::Proto(Proto::Tcp.number(net)), To::port(Proto::Udp.number(net), TARGET));
        let rules: [(&[Entry], bool); 12] = [
            (&[], false),
            (&[(ANY_CLASS, all, ALLOW)], true),
            (&[(CLASS_A, all, ALLOW)], true),
            (&[(ANY_CLASS, all, DENY), (CLASS_A, all, ALLOW)], true),
            (&[(ANY_CLASS, all, ALLOW), (CLASS_A, all, DENY)], false),
            (&[(ANY_CLASS, port, ALLOW), (CLASS_A, all, DENY)], false),
            (&[(ANY_CLASS, all, ALLOW), (CLASS_A, tcp, DENY)], true),
            (&[(ANY_CLASS, all, DENY), (CLASS_A, tcp, ALLOW)], false),
            (&[(CLASS_A, all, DENY), (CLASS_A, udp, ALLOW)], true),
            (&[(CLASS_A, all, ALLOW), (CLASS_A, udp, DENY)], false),
            (&[(CLASS_A, udp, ALLOW), (CLASS_A, port, DENY)], false),
            (&[(ANY_CLASS, udp, DENY), (ANY_CLASS, port, ALLOW | 1 << 31)], true),
        ];
        for (rules, is_open) in rules {
            lab.forget()?;
            policed(lab, net, OPEN, INTO_B)?;
            for (class, to, flags) in rules {
                lab.put_rule(INTO_B, *class, *to, *flags)?;
            }
            let shot = lab.pod_sends(&a_asks_b(net, Proto::Udp))?;
            let arrives = a_asks_b(net, Proto::Udp).hop();
            let as_wanted = if is_open { shot.to_the_pod(&arrives) } else { shot.dropped(PolicyDenied) };
            as_wanted.with_context(|| format!("{rules:?}"))?;
            for (class, to, _) in rules {
                lab.drop_rule(INTO_B, *class, *to)?;
            }
        }
        Ok(())
    })
}

/// A set says nothing of others, and a class only of its own.
#[test]
fn rules_of_other_sets() -> Result<()> {
    labs(|lab, net| {
        policed(lab, net, OPEN, INTO_B)?;
        lab.put_rule(INTO_B + 1, ANY_CLASS, To::Anything, ALLOW)?;
        lab.put_rule(INTO_B, CLASS_A + 1, To::Anything, ALLOW)?;
        lab.put_rule(OPEN, CLASS_A, To::Anything, ALLOW)?;
        lab.pod_sends(&a_asks_b(net, Proto::Tcp))?.dropped(PolicyDenied)
    })
}

/// From the next packet on, in either direction, and back.
#[test]
fn policies_that_change_count_for_known_flows() -> Result<()> {
    labs(|lab, net| {
        each(&ALL, |proto| {
            lab.forget()?;
            policed(lab, net, OPEN, INTO_B)?;
            lab.put_rule(INTO_B, CLASS_A, To::Anything, ALLOW)?;
            let ask = a_asks_b(net, proto);
            let (more, answer) = (later(&ask), answer_of_b(&ask));
            lab.pod_sends(&ask)?.to_the_pod(&ask.hop())?;
            // It is judged when it opens, and not again before the generation changes.
            lab.drop_rule(INTO_B, CLASS_A, To::Anything)?;
            lab.pod_sends(&answer)?.to_the_pod(&answer.hop())?;
            lab.pod_sends(&more)?.to_the_pod(&more.hop())?;
            let packets = lab.half(Flow::of(&ask))?.packets;
            lab.enforce(2)?;
            for frame in [&answer, &more, &answer, &more] {
                lab.pod_sends(frame)?.dropped(PolicyDenied)?;
            }
            ensure!(lab.half(Flow::of(&ask))?.packets == packets, "a denied packet counts as one of the flow");

            lab.put_rule(INTO_B, CLASS_A, To::Anything, ALLOW)?;
            for frame in [&more, &answer] {
                lab.pod_sends(frame)?.to_the_pod(&frame.hop()).context("allowed again")?;
            }
            // Judged once a change.
            lab.drop_rule(INTO_B, CLASS_A, To::Anything)?;
            for frame in [&more, &answer] {
                lab.pod_sends(frame)?.to_the_pod(&frame.hop()).context("judged already")?;
            }
            lab.enforce_nothing(3)?;
            lab.pod_sends(&more)?.to_the_pod(&more.hop())
        })
    })
}

/// Of a translated flow, each direction's entry says who asked for what.
#[test]
fn policies_that_change_count_for_translated_flows() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            lab.forget()?;
            lab.forget_policies()?;
            lab.serve(net.vip(1), VIP_PORT, proto.number(net), 0, &[(net.b(), TARGET)])?;
            let ask = from_a(net, proto, (net.vip(1), VIP_PORT));
            let arrives = at_backend(net, &ask, net.b());
            lab.pod_sends(&ask)?.to_the_pod(&arrives)?;
            let (more, answer) = (later(&ask), answer_of_b(&arrives));
            policed(lab, net, OPEN, INTO_B)?;
            for frame in [&more, &answer] {
                lab.pod_sends(frame)?.dropped(PolicyDenied).context("opened before there were policies")?;
            }
            for (generation, to, is_open) in [
                (2, To::port(proto.number(net), VIP_PORT), false),
                (3, To::port(proto.number(net), PORT), false),
                (4, To::port(proto.number(net), TARGET), true),
            ] {
                lab.put_rule(INTO_B, CLASS_A, to, ALLOW)?;
                for frame in [&answer, &more] {
                    lab.enforce(generation)?;
                    let shot = lab.pod_sends(frame)?;
                    let is_forwarded = shot.dropped(PolicyDenied).is_err();
                    ensure!(is_forwarded == is_open, "{generation}: {shot:?}");
                }
            }
            Ok(())
        })
    })
}

/// The answers of the world find the pod that asked.
#[test]
fn policies_that_change_count_for_masqueraded_flows() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            lab.forget()?;
            lab.forget_policies()?;
            let ask = from_a(net, proto, (net.world(), TARGET));
            let leaves = ask.hop().between((net.node(), PORT), (net.world(), TARGET));
            lab.pod_sends(&ask)?.onto_wire(&leaves)?;
            let answer = from_outside(proto, (net.world(), TARGET), (net.node(), PORT));
            policed(lab, net, OUT_OF_A, OPEN)?;
            lab.uplink_in(&answer)?.dropped(PolicyDenied)?;
            lab.pod_sends(&later(&ask))?.dropped(PolicyDenied)?;
            lab.put_rule(OUT_OF_A, ANY_CLASS, To::port(proto.number(net), TARGET), ALLOW)?;
            let back = answer.hop().between((net.world(), TARGET), (net.a(), PORT));
            lab.uplink_in(&answer)?.to_the_pod(&back)?;
            lab.pod_sends(&later(&ask))?.onto_wire(&later(&leaves))
        })
    })
}

/// The node reaches its pods, whatever policies say: probes, and its own way to a Service.
#[test]
fn the_node_reaches_its_pods() -> Result<()> {
    labs(|lab, net| {
        policed(lab, net, OPEN, INTO_B)?;
        each(&ALL, |proto| {
            let probe = from_host(net, proto, (net.b(), proto.port(TARGET)));
            lab.to_pod(POD_B, &probe)?.to_stack(&probe)?;
            lab.enforce(2)?;
            lab.to_pod(POD_B, &later(&probe))?.to_stack(&later(&probe))?;
            // What its stack forwards to a pod comes from elsewhere.
            let forwarded = frame_from(proto, net.world(), net.b());
            lab.to_pod(POD_B, &forwarded)?.dropped(PolicyDenied)?;
            lab.enforce(1)
        })?;
        lab.forget()?;
        each(&SERVED, |proto| {
            lab.serve(net.vip(2), VIP_PORT, proto.number(net), 0, &[(net.b(), TARGET)])?;
            let shot = lab.uplink_out(&from_host(net, proto, (net.vip(2), VIP_PORT)))?;
            ensure!(shot.counted.keys().all(|(reason, _)| *reason == 0), "the host is served: {shot:?}");
            Ok(())
        })
    })
}

/// What netfilter gives the node's address is not of the node: a container of another network, for example.
#[test]
fn what_the_nodes_stack_forwards_in_its_name() -> Result<()> {
    labs(|lab, net| {
        each(&ALL, |proto| {
            lab.forget()?;
            policed(lab, net, OPEN, INTO_B)?;
            let frame = from_host(net, proto, (net.b(), proto.port(TARGET)));
            let bytes = frame.bytes();
            let input = Input { frame: &bytes, ifindex: POD_B, came_by: SIDE, ..Input::default() };
            lab.raw(hook::TO_POD, &input)?.dropped(PolicyDenied)?;
            lab.put_class(net.node(), 32 + 96 * u32::from(net == Net::V6), OTHERS)?;
            lab.put_rule(INTO_B, OTHERS, To::Anything, ALLOW)?;
            lab.raw(hook::TO_POD, &input)?.to_stack(&frame)?;
            lab.enforce(2)?;
            lab.drop_rule(INTO_B, OTHERS, To::Anything)?;
            lab.raw(hook::TO_POD, &input)?.dropped(PolicyDenied)?;
            lab.pod_sends(&answer_of_b(&frame))?.dropped(PolicyDenied)
        })
    })
}

/// Nor do the entry of a flow of the node, and the overlay's port, let others in.
#[test]
fn what_the_nodes_stack_forwards_on_ports_of_the_node() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            lab.forget()?;
            policed(lab, net, OPEN, INTO_B)?;
            let of_node = from_host(net, proto, (net.b(), TARGET));
            let bytes = of_node.bytes();
            let forwarded = Input { frame: &bytes, ifindex: POD_B, came_by: SIDE, ..Input::default() };
            lab.to_pod(POD_B, &of_node)?.to_stack(&of_node)?;
            lab.raw(hook::TO_POD, &forwarded)?.dropped(PolicyDenied)?;
            lab.to_pod(POD_B, &later(&of_node))?.to_stack(&later(&of_node))?;
            let by_overlay = from_port(&of_node, 8472).bytes();
            lab.raw(hook::TO_POD, &Input { frame: &by_overlay, ..forwarded })?.dropped(PolicyDenied)
        })
    })
}

/// What was judged when nobody had the address is not what goes to the pod that gets it, though no policy changes meanwhile.
#[test]
fn a_flow_to_an_address_that_a_pod_gets() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            for is_service in [false, true] {
                for (is_decided, is_allowed) in [(false, false), (true, false), (true, true)] {
                    lab.forget()?;
                    lab.forget_policies()?;
                    let at = if is_service { (net.vip(6), VIP_PORT) } else { (net.b(), TARGET) };
                    if is_service {
                        lab.serve(at.0, at.1, proto.number(net), 0, &[(net.b(), TARGET)])?;
                    }
                    if is_decided {
                        put_b(lab, net, INTO_B)?;
                    }
                    put_a(lab, net, OPEN)?;
                    if is_allowed {
                        lab.put_rule(INTO_B, CLASS_A, To::Anything, ALLOW)?;
                    }
                    lab.enforce(1)?;
                    lab.drop_endpoint(net.b())?;
                    let ask = from_a(net, proto, at);
                    let more = later(&ask);
                    lab.pod_sends(&ask)?.to_stack(&at_backend(net, &ask, net.b()).map(|f| f.ttl += 1))?;
                    lab.put_endpoint(net.b(), POD_B, MAC_B)?;
                    lab.age(Flow::of(&ask), 1)?;
                    let shot = lab.pod_sends(&more)?;
                    match (is_decided, is_allowed) {
                        (_, true) => shot.to_the_pod(&at_backend(net, &more, net.b())),
                        (true, false) => shot.dropped(PolicyDenied),
                        (false, false) => shot.dropped(PolicyUndecided),
                    }
                    .with_context(|| format!("service {is_service}, decided {is_decided}, allowed {is_allowed}"))?;
                    if !is_allowed {
                        ensure!(lab.half(Flow::of(&ask)).is_err(), "the flow is over");
                    }
                }
            }
            Ok(())
        })
    })
}

/// The same of the pod that gets the address and speaks first.
#[test]
fn an_answer_from_an_address_that_a_pod_gets() -> Result<()> {
    labs(|lab, net| {
        each(&ALL, |proto| {
            for is_allowed in [false, true] {
                lab.forget()?;
                policed(lab, net, OPEN, OPEN)?;
                lab.drop_endpoint(net.b())?;
                let ask = a_asks_b(net, proto);
                lab.pod_sends(&ask)?.to_stack(&ask)?;
                lab.put_endpoint(net.b(), POD_B, MAC_B)?;
                lab.put_policy_pod(
                    net.b(),
                    PolicyPod { class: CLASS_B, ingress: INTO_B, egress: OUT_OF_A, ifindex: POD_B },
                )?;
                if is_allowed {
                    lab.put_rule(INTO_B, CLASS_A, To::Anything, ALLOW)?;
                }
                let answer = answer_of_b(&ask);
                let shot = lab.pod_sends(&answer)?;
                if is_allowed { shot.to_the_pod(&answer.hop())? } else { shot.dropped(PolicyDenied)? }
            }
            Ok(())
        })
    })
}

/// What another pod with the address sends is no answer to the flow of the one before: it is judged as what the new pod opens.
#[test]
fn a_pod_that_takes_over_an_address_opens_its_own_flows() -> Result<()> {
    const OTHER_MAC: [u8; 6] = [2, 0, 0, 0, 0x0c, 1];
    labs(|lab, net| {
        each(&SERVED, |proto| {
            lab.forget()?;
            policed(lab, net, OPEN, OPEN)?;
            let ask = a_asks_b(net, proto);
            lab.pod_sends(&ask)?.to_the_pod(&ask.hop())?;
            lab.put_endpoint(net.b(), SIDE, OTHER_MAC)?;
            lab.put_policy_pod(net.b(), PolicyPod { class: CLASS_B, ingress: INTO_B, egress: OPEN, ifindex: SIDE })?;
            let speaks = answer_of_b(&ask).map(|f| f.smac = OTHER_MAC);
            let bytes = speaks.bytes();
            let input = Input { frame: &bytes, ifindex: SIDE, ..Input::default() };
            let shot = lab.raw(hook::FROM_POD, &input);
            lab.put_endpoint(net.b(), POD_B, MAC_B)?;
            shot?.to_the_pod(&speaks.hop())
        })
    })
}

/// A datagram to a backend that has ended goes to another one, whatever policies say of the first.
#[test]
fn a_flow_that_moves_is_judged_by_where_it_goes() -> Result<()> {
    labs(|lab, net| {
        let proto = Proto::Udp;
        lab.forget_policies()?;
        let first = lab.serve(net.vip(4), VIP_PORT, proto.number(net), 0, &[(net.far(), TARGET)])?[0];
        let ask = from_a(net, proto, (net.vip(4), VIP_PORT));
        ensure!(lab.pod_sends(&ask)?.counted.keys().all(|(reason, _)| *reason == 0), "the first backend gets it");
        lab.serve(net.vip(4), VIP_PORT, proto.number(net), 0, &[(net.b(), TARGET)])?;
        lab.end(first)?;
        policed(lab, net, OUT_OF_A, OPEN)?;
        lab.put_rule(OUT_OF_A, CLASS_B, To::Anything, ALLOW)?;
        lab.pod_sends(&later(&ask))?.to_the_pod(&at_backend(net, &later(&ask), net.b()))
    })
}

/// What an ended backend still answers is no flow of its own: that one would be allowed, and would reach the client from another address.
#[test]
fn an_ended_backend_opens_nothing_by_answering() -> Result<()> {
    labs(|lab, net| {
        lab.forget_policies()?;
        let first = lab.serve(net.vip(5), VIP_PORT, Proto::Udp.number(net), 0, &[(net.b(), TARGET)])?[0];
        let ask = from_a(net, Proto::Udp, (net.vip(5), VIP_PORT));
        let arrives = at_backend(net, &ask, net.b());
        lab.pod_sends(&ask)?.to_the_pod(&arrives)?;
        lab.serve(net.vip(5), VIP_PORT, Proto::Udp.number(net), 0, &[(net.far(), TARGET)])?;
        lab.end(first)?;
        policed(lab, net, OPEN, INTO_B)?;
        for _ in 0..2 {
            lab.pod_sends(&answer_of_b(&arrives))?.dropped(PolicyDenied)?;
        }
        Ok(())
    })
}

/// Nor does any policy forbid a pod to reach itself through a Service.
#[test]
fn a_pod_reaches_itself() -> Result<()> {
    labs(|lab, net| {
        let closed = PolicyPod { class: CLASS_A, ingress: INTO_B, egress: OUT_OF_A, ifindex: POD_A };
        lab.put_policy_pod(net.a(), closed)?;
        lab.enforce(1)?;
        each(&SERVED, |proto| {
            lab.serve(net.vip(3), VIP_PORT, proto.number(net), 0, &[(net.a(), TARGET)])?;
            let ask = from_a(net, proto, (net.vip(3), VIP_PORT));
            let arrives = ask.hop().between((net.node(), PORT), (net.a(), TARGET));
            lab.pod_sends(&ask)?.to_the_pod(&arrives)?;
            lab.enforce(2)?;
            lab.pod_sends(&later(&ask))?.to_the_pod(&later(&arrives))
        })
    })
}

/// Out of the tunnel, past its device: what is denied goes back, so that the overlay's hook counts it.
#[test]
fn out_of_the_tunnel() -> Result<()> {
    labs(|lab, net| {
        lab.configure(|c| c.flags |= config::flags::ENCAPSULATE)?;
        policed(lab, net, OPEN, INTO_B)?;
        each(&SERVED, |proto| {
            let ask = frame_from(proto, net.far(), net.b());
            let before = lab.tunnel_in(&outer(net, &ask).bytes())?;
            ensure!(before.verdict == STACK && before.counted.is_empty(), "{before:?}");
            ensure!(lab.halves()? == 0, "a refused flow is tracked");
            lab.overlay_in(net.node2(), &ask)?.dropped(PolicyDenied)?;
            lab.put_policy_pod(net.far(), PolicyPod { class: CLASS_FAR, ingress: OPEN, egress: OPEN, ifindex: 0 })?;
            lab.put_rule(INTO_B, CLASS_FAR, To::Anything, ALLOW)?;
            lab.overlay_in(net.node2(), &ask)?.to_the_pod(&ask.hop())?;
            lab.drop_rule(INTO_B, CLASS_FAR, To::Anything)?;
            lab.forget()
        })
    })
}

/// Pieces of a datagram follow the first of them. Without it they have no port, and pass where no port decides.
#[test]
fn pieces_of_datagrams() -> Result<()> {
    labs(|lab, net| {
        policed(lab, net, OPEN, INTO_B)?;
        let whole = a_asks_b(net, Proto::Udp).map(|f| f.payload = vec![0xa5; 3000]);
        let pieces = whole.pieces(60, &[1200, 2400]);
        lab.pod_sends(&pieces[0])?.dropped(PolicyDenied)?;
        for piece in &pieces[1..] {
            lab.pod_sends(piece)?.dropped(PolicyDenied)?;
        }
        lab.put_rule(INTO_B, CLASS_A, To::port(Proto::Udp.number(net), TARGET), ALLOW)?;
        lab.pod_sends(&pieces[2])?.dropped(PolicyDenied).context("before the first")?;
        for piece in &pieces {
            lab.pod_sends(piece)?.to_the_pod(&piece.hop())?;
        }
        let others = whole.pieces(61, &[1200, 2400]);
        lab.put_rule(INTO_B, CLASS_A, To::Anything, ALLOW)?;
        lab.pod_sends(&others[2])?.to_the_pod(&others[2].hop()).context("no port decides")?;
        lab.drop_rule(INTO_B, CLASS_A, To::port(Proto::Udp.number(net), TARGET))?;
        lab.drop_rule(INTO_B, CLASS_A, To::Anything)?;
        lab.enforce(2)?;
        for piece in &pieces {
            lab.pod_sends(piece)?.dropped(PolicyDenied)?;
        }
        Ok(())
    })
}

/// The MAC and interface count as before: nobody gets a class by an address that is not its own.
#[test]
fn a_forged_source_has_no_class() -> Result<()> {
    labs(|lab, net| {
        policed(lab, net, OPEN, INTO_B)?;
        lab.put_rule(INTO_B, CLASS_FAR, To::Anything, ALLOW)?;
        lab.put_policy_pod(net.far(), PolicyPod { class: CLASS_FAR, ingress: OPEN, egress: OPEN, ifindex: 0 })?;
        each(&ALL, |proto| {
            let forged = frame_from(proto, net.far(), net.b()).map(|f| (f.smac, f.dmac) = (MAC_A, MAC_HOST));
            lab.pod_sends(&forged)?.dropped(Spoofed)?;
            lab.uplink_in(&frame_from(proto, net.far(), net.b()))?.dropped(Spoofed)
        })
    })
}
