//! Namespaces that are audited: what policies deny passes, and is reported where it is judged.

use super::{CLASS_A, INTO_B, OTHERS, OUT_OF_A, a_asks_b, frame_from, policed, put_b};
use crate::external::NODE_PORT;
use crate::flows::{
    ALL, PORT, Proto, SERVED, TARGET, VIP_PORT, answer_of_b, at_backend, from_a, from_host, from_outside, later,
};
use crate::harness::{Flow, Lab, MAC_B, Net, POD_B, SIDE, Shot, To, each, labs};
use anyhow::{Context, Result, ensure};
use rustnet_common::config;
use rustnet_common::drop::DropReason::{PolicyDenied, Spoofed};
use rustnet_common::drop::hook;
use rustnet_common::policy::{ALLOW, ANY_CLASS, AUDIT, OPEN};
use testkit::datapath::Input;

/// A node where nothing allows what pod A opens, nor what pod B gets, and both are audited.
fn audited(lab: &Lab, net: Net) -> Result<()> {
    lab.forget()?;
    policed(lab, net, OUT_OF_A, INTO_B)?;
    for set in [OUT_OF_A, INTO_B] {
        lab.put_rule(set, ANY_CLASS, To::Anything, ALLOW | AUDIT)?;
    }
    Ok(())
}

#[test]
fn the_first_packet_is_reported_and_all_pass() -> Result<()> {
    labs(|lab, net| {
        each(&ALL, |proto| {
            audited(lab, net)?;
            let ask = a_asks_b(net, proto);
            lab.pod_sends(&ask)?.audited()?.to_the_pod(&ask.hop())?;
            let answer = answer_of_b(&ask);
            lab.pod_sends(&answer)?.to_the_pod(&answer.hop()).context("reported once a flow")?;
            lab.pod_sends(&later(&ask))?.to_the_pod(&later(&ask).hop())
        })
    })
}

/// The flow is one that the report of new flows would have, too: one record says both.
#[test]
fn a_new_flow_has_one_record() -> Result<()> {
    labs(|lab, net| {
        lab.configure(|c| c.flags |= config::flags::FLOW_EVENTS)?;
        audited(lab, net)?;
        let ask = a_asks_b(net, Proto::Udp);
        lab.pod_sends(&ask)?.audited()?.to_the_pod(&ask.hop())
    })
}

#[test]
fn at_each_hook() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            audited(lab, net)?;
            lab.serve(net.vip(1), VIP_PORT, proto.number(net), 0, &[(net.b(), TARGET)])?;
            let ask = from_a(net, proto, (net.vip(1), VIP_PORT));
            lab.pod_sends(&ask)?.audited()?.to_the_pod(&at_backend(net, &ask, net.b()))?;
            let ask = frame_from(proto, net.routed(), net.b());
            lab.uplink_in(&ask)?.audited()?.to_the_pod(&ask.hop())?;
            let ask = frame_from(proto, net.far(), net.b());
            lab.overlay_in(net.node2(), &ask)?.audited()?.to_the_pod(&ask.hop())?;
            let ask = from_a(net, proto, (net.unreachable(), TARGET));
            lab.pod_sends(&ask)?.audited()?.to_stack(&ask).context("without a route")?;
            lab.publish(net.node(), NODE_PORT, proto.number(net), 0, &[(net.b(), TARGET)])?;
            let ask = from_outside(proto, (net.world(), PORT), (net.node(), NODE_PORT));
            let arrives = ask.hop().between((net.world(), PORT), (net.b(), TARGET));
            lab.uplink_in(&ask)?.audited()?.to_the_pod(&arrives).context("by a node port")?;
            lab.forget()?;
            let ask = frame_from(proto, net.world(), net.b());
            lab.to_pod(POD_B, &ask)?.audited()?.to_stack(&ask).context("what the stack forwards")?;
            // The node is exempt, and nothing would deny it.
            let ask = from_host(net, proto, (net.b(), PORT));
            lab.to_pod(POD_B, &ask)?.to_stack(&ask)
        })
    })
}

/// Nobody has a report made in another one's name.
#[test]
fn a_forged_packet_of_a_known_flow_is_not_reported() -> Result<()> {
    labs(|lab, net| {
        each(&ALL, |proto| {
            audited(lab, net)?;
            let ask = a_asks_b(net, proto);
            lab.pod_sends(&ask)?.audited()?.to_the_pod(&ask.hop())?;
            lab.enforce(2)?;
            let bytes = later(&ask).bytes();
            for _ in 0..2 {
                let input = Input { frame: &bytes, ifindex: POD_B, ..Input::default() };
                lab.raw(hook::FROM_POD, &input)?.dropped(Spoofed)?;
            }
            lab.pod_sends(&later(&ask))?.audited()?.to_the_pod(&later(&ask).hop())
        })
    })
}

/// It was judged when nobody had the address, and is reported with the first packet to the pod.
#[test]
fn a_flow_to_an_address_that_a_pod_gets_is_reported() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            audited(lab, net)?;
            lab.put_rule(OUT_OF_A, ANY_CLASS, To::Anything, ALLOW)?;
            lab.drop_endpoint(net.b())?;
            let ask = a_asks_b(net, proto);
            lab.pod_sends(&ask)?.to_stack(&ask)?;
            lab.put_endpoint(net.b(), POD_B, MAC_B)?;
            lab.age(Flow::of(&ask), 1)?;
            let more = later(&ask);
            lab.pod_sends(&more)?.audited()?.to_the_pod(&more.hop())?;
            lab.pod_sends(&more)?.to_the_pod(&more.hop()).context("reported already")
        })
    })
}

/// A later fragment that comes before its first belongs to no flow: each is judged.
#[test]
fn later_fragments_without_their_first() -> Result<()> {
    labs(|lab, net| {
        audited(lab, net)?;
        let pieces = a_asks_b(net, Proto::Udp).map(|f| f.payload = vec![0xa5; 3000]).pieces(60, &[1200, 2400]);
        for piece in &pieces[1..] {
            lab.pod_sends(piece)?.audited()?.to_the_pod(&piece.hop())?;
        }
        Ok(())
    })
}

/// What the stack forwards under the entry of a flow of the node is judged as not from the node.
#[test]
fn under_the_entry_of_a_flow_of_the_node() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            audited(lab, net)?;
            let of_node = from_host(net, proto, (net.b(), TARGET));
            lab.to_pod(POD_B, &of_node)?.to_stack(&of_node)?;
            let bytes = of_node.bytes();
            let forwarded = Input { frame: &bytes, ifindex: POD_B, came_by: SIDE, ..Input::default() };
            lab.raw(hook::TO_POD, &forwarded)?.audited()?.to_stack(&of_node)
        })
    })
}

/// An audited end does not open one that is enforced, and what a rule allows is not reported.
#[test]
fn only_what_is_audited_passes() -> Result<()> {
    labs(|lab, net| {
        let ask = a_asks_b(net, Proto::Tcp);
        audited(lab, net)?;
        lab.drop_rule(INTO_B, ANY_CLASS, To::Anything)?;
        lab.pod_sends(&ask)?.dropped(PolicyDenied)?;
        lab.put_rule(INTO_B, CLASS_A, To::Anything, ALLOW)?;
        lab.pod_sends(&ask)?.audited()?.to_the_pod(&ask.hop()).context("of one end")?;
        lab.forget()?;
        lab.put_rule(OUT_OF_A, ANY_CLASS, To::Anything, ALLOW)?;
        lab.pod_sends(&ask)?.to_the_pod(&ask.hop()).context("of none")?;
        lab.put_rule(OUT_OF_A, OTHERS, To::Anything, ALLOW | AUDIT)?;
        lab.forget()?;
        lab.pod_sends(&ask)?.to_the_pod(&ask.hop()).context("a class that it is not of")
    })
}

/// A flow that was allowed is reported with the first packet after the change, whichever side sends it.
#[test]
fn policies_that_change_are_reported_for_known_flows() -> Result<()> {
    let is_reported = |shot: Shot, frame: &crate::frame::Frame| shot.audited()?.to_the_pod(&frame.hop());
    labs(|lab, net| {
        each(&ALL, |proto| {
            for is_answer in [false, true] {
                lab.forget()?;
                policed(lab, net, OPEN, OPEN)?;
                let ask = a_asks_b(net, proto);
                lab.pod_sends(&ask)?.to_the_pod(&ask.hop())?;
                put_b(lab, net, INTO_B)?;
                lab.put_rule(INTO_B, ANY_CLASS, To::Anything, ALLOW | AUDIT)?;
                let next = if is_answer { answer_of_b(&ask) } else { later(&ask) };
                lab.pod_sends(&next)?.to_the_pod(&next.hop())?;
                lab.enforce(2)?;
                is_reported(lab.pod_sends(&next)?, &next)?;
                lab.pod_sends(&next)?.to_the_pod(&next.hop()).context("reported already")?;
                lab.enforce(3)?;
                is_reported(lab.pod_sends(&next)?, &next)?;
                ensure!(lab.halves()? == 1, "one flow");
            }
            Ok(())
        })
    })
}
