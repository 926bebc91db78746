//! What clients outside must not get by a Service, and what a Service for them must not do to other flows.

use super::{NODE_PORT, ask, publish};
use crate::errors::error;
use crate::flows::{PORT, Proto, TARGET, VIP_PORT, answer_of_b, as_from_b, from_outside};
use crate::frame::Piece;
use crate::harness::{Flow, MAC_A, MAC_HOST, Net, POD_A, SIDE, UPLINK, each, lab_apart, labs};
use crate::icmp::kinds;
use anyhow::{Context, Result, ensure};
use rustnet_common::config;
use rustnet_common::drop::{DropReason, hook};
use rustnet_common::peer;
use testkit::datapath::Input;

/// Who may write an EndpointSlice could name another node's tunnel as a backend, and this node would lend everybody its address
/// there.
#[test]
fn nobody_reaches_the_overlays_port_by_a_service() -> Result<()> {
    labs(|lab, net| {
        for to in [net.node2(), net.far(), net.routed(), net.world(), net.node()] {
            publish(lab, net, Proto::Udp, (to, 8472))?;
            let ask = ask(net, Proto::Udp);
            lab.uplink_in(&ask)?.dropped(DropReason::EncapProhibited).with_context(|| format!("to {to}"))?;
            ensure!(lab.halves()? == 0, "a refused packet opened a flow");
        }
        // A pod that listens there is no tunnel's end.
        publish(lab, net, Proto::Udp, (net.b(), 8472))?;
        let ask = ask(net, Proto::Udp);
        lab.uplink_in(&ask)?.to_the_pod(&ask.hop().between((net.world(), PORT), (net.b(), 8472)))
    })
}

/// A client that claims another node's overlay's port would get a backend's answers there, from this node.
#[test]
fn no_answer_goes_to_the_overlays_port() -> Result<()> {
    labs(|lab, net| {
        publish(lab, net, Proto::Udp, (net.far(), TARGET))?;
        let ask = from_outside(Proto::Udp, (net.node2(), 8472), (net.node(), NODE_PORT));
        lab.uplink_in(&ask)?;
        let source = lab.half(Flow::of(&ask))?.to.sport;
        let answer = ask.hop().between((net.node(), source), (net.far(), TARGET)).reply();
        lab.overlay_in(net.node2(), &answer)?.dropped(DropReason::EncapProhibited)
    })
}

/// What the stack forwards is not this host's, and says nothing of a pod's flows: whoever forges a pod's address behind a device
/// without a program of ours would end them, and so would answers that netfilter sends another way than their requests came.
#[test]
fn what_the_stack_forwards_ends_no_flow() -> Result<()> {
    labs(|lab, net| {
        lab.configure(|c| c.flags |= config::flags::EXTERNAL)?;
        each(&[Proto::Tcp, Proto::Udp], |proto| {
            publish(lab, net, proto, (net.b(), TARGET))?;
            let ask = ask(net, proto);
            lab.uplink_in(&ask)?;
            let answer = answer_of_b(&ask.hop().between((net.world(), PORT), (net.b(), TARGET)));
            let forged = answer.map(|f| (f.smac, f.dmac) = (MAC_HOST, MAC_A));
            let forwarded = Input { frame: &forged.bytes(), ifindex: UPLINK, came_by: SIDE, ..Input::default() };
            lab.raw(hook::UPLINK_OUT, &forwarded)?.to_stack(&forged)?;
            lab.half(Flow::of(&answer)).context("the forged answer ended the flow")?;

            let comes = from_outside(proto, (net.world(), PORT + 1), (net.a(), TARGET));
            lab.to_pod(POD_A, &comes.map(|f| (f.smac, f.dmac) = (MAC_HOST, MAC_A)))?;
            let back = comes.reply();
            lab.pod_sends(&back.map(|f| (f.smac, f.dmac) = (MAC_A, MAC_HOST)))?;
            let forwarded = Input { frame: &back.bytes(), ifindex: UPLINK, came_by: POD_A, ..Input::default() };
            lab.raw(hook::UPLINK_OUT, &forwarded)?.to_stack(&back)?;
            ensure!(lab.connections(net)?.contains_key(&Flow::of(&comes)), "the answer ended the flow");
            lab.forget()
        })
    })
}

/// The stack would send back to its router what no step can read, and it would circle.
#[test]
fn nothing_for_a_load_balancers_address_circles() -> Result<()> {
    labs(|lab, net| {
        let vip = net.ip([203, 0, 114, 7], "2001:db8:7::7");
        lab.share(vip)?;
        lab.publish(vip, VIP_PORT, Proto::Udp.number(net), 0, &[(net.b(), TARGET)])?;
        let ask = from_outside(Proto::Udp, (net.world(), PORT), (vip, VIP_PORT));
        let later = ask.map(|f| f.piece = Some(Piece { id: 77, from: 16, to: 24, more: false }));
        lab.uplink_in(&later)?.dropped(DropReason::FragNotFound)?;
        let unknown = ask.reply().map(|f| f.set_ports(VIP_PORT, 1));
        for kind in kinds(net) {
            lab.uplink_in(&error(&unknown, net.router(), kind, 1000))?.dropped(DropReason::IcmpUnrelated)?;
        }
        // To this node they are the stack's.
        let later = later.map(|f| f.dst = net.node());
        lab.uplink_in(&later)?.to_stack(&later)
    })
}

/// The host routes by source, as hosts with two uplinks do: answers leave by the device of the address that the client asked.
/// IPv4 alone: a batch of `ip` takes a rule for no other family.
#[test]
fn answers_leave_by_the_way_of_the_address_that_was_asked() -> Result<()> {
    const WAYS: &str = "\
        link set virbr0 mtu 1400
        rule add from 172.18.0.99 lookup 77
        route add default via 192.168.122.10 dev virbr0 table 77";
    let net = Net::V4;
    let second = net.ip([172, 18, 0, 99], "");
    lab_apart(|lab| {
        lab.ip(WAYS)?;
        lab.put_peer(second, None, peer::flags::HOST, None)?;
        for to in [net.b(), net.far()] {
            lab.publish(second, NODE_PORT, Proto::Udp.number(net), 0, &[(to, TARGET)])?;
            let ask = from_outside(Proto::Udp, (net.world(), PORT), (second, NODE_PORT));
            lab.uplink_in(&ask)?;
            let opened = lab.half(Flow::of(&ask))?.to.src;
            let source = lab.half(Flow::of(&ask))?.to.sport;
            let answer = ask.hop().between((opened, source), (to, TARGET)).reply();
            // No answer of this length fits into the device of the second address, and each fits into the first's.
            let long = answer.map(|f| f.payload = vec![7; 1400]);
            let shot =
                if to == net.b() { lab.pod_sends(&as_from_b(&long))? } else { lab.overlay_in(net.node2(), &long)? };
            let is_too_big = shot.counted.keys().any(|(reason, _)| *reason == DropReason::FragNeeded as u8);
            ensure!(is_too_big, "of {to}: {:?}", shot.counted);
            lab.forget()?;
        }
        Ok(())
    })
}
