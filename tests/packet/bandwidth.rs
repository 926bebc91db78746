//! Pods with a limited bandwidth: whatever is for them goes by the host's end of their veth, where the queue is, at every
//! hook; nothing changes for all other pods.

use crate::flows::{ALL, PORT, Proto, SERVED, answer_of_b, as_from_b, from_a, from_b, from_host, from_outside, later};
use crate::frame::Frame;
use crate::harness::{Flow, Lab, MAC_A, MAC_B, Net, POD_A, POD_B, SNAT, each, labs, source_of_mac};
use anyhow::{Result, ensure};
use rustnet_common::conntrack::VIA_QDISC;
use rustnet_common::drop::DropReason;
use rustnet_common::endpoint::flags;

/// On a node where pod B is limited.
fn limited(test: impl Fn(&Lab, Net) -> Result<()> + Send + Sync) -> Result<()> {
    labs(|lab, net| {
        lab.put_endpoint_with(net.b(), POD_B, MAC_B, flags::VIA_QDISC)?;
        test(lab, net)
    })
}

#[test]
fn from_the_same_node() -> Result<()> {
    limited(|lab, net| {
        each(&ALL, |proto| {
            let ask = from_a(net, proto, (net.b(), 80));
            lab.pod_sends(&ask)?.by_the_queue(&ask.hop())?;
            ensure!(lab.half(Flow::of(&ask))?.out == POD_B | VIA_QDISC, "{:#x}", lab.half(Flow::of(&ask))?.out);
            // The other way there is no queue.
            let answer = as_from_b(&ask.reply());
            lab.pod_sends(&answer)?.to_the_pod(&answer.hop())?;
            ensure!(lab.half(Flow::of(&answer))?.out == POD_A);
            let more = later(&ask);
            lab.pod_sends(&more)?.by_the_queue(&more.hop())
        })
    })
}

#[test]
fn from_elsewhere() -> Result<()> {
    limited(|lab, net| {
        each(&ALL, |proto| {
            for remote in [net.far(), net.routed()] {
                let arrives =
                    |f: &Frame| if remote == net.far() { lab.overlay_in(net.node2(), f) } else { lab.uplink_in(f) };
                let ask = from_outside(proto, (remote, PORT), (net.b(), 80));
                arrives(&ask)?.by_the_queue(&ask.hop())?;
                arrives(&later(&ask))?.by_the_queue(&later(&ask).hop())?;
                // Answers to what the pod asked.
                let ask = from_b(net, proto, (remote, 81));
                lab.pod_sends(&ask)?.onto_wire(&ask.hop())?;
                arrives(&ask.reply())?.by_the_queue(&ask.reply().hop())?;
                // Another pod.
                let other = from_outside(proto, (remote, PORT), (net.a(), 80));
                arrives(&other)?.to_the_pod(&other.hop())?;
            }
            Ok(())
        })
    })
}

#[test]
fn by_services_masquerade_and_hairpin() -> Result<()> {
    limited(|lab, net| {
        each(&SERVED, |proto| {
            lab.serve(net.vip(1), 80, proto.number(net), 0, &[(net.b(), 8080)])?;
            let ask = from_a(net, proto, (net.vip(1), 80));
            lab.pod_sends(&ask)?.by_the_queue(&ask.hop().between((net.a(), PORT), (net.b(), 8080)))?;

            // To itself, under the node's address.
            let hairpin = from_b(net, proto, (net.vip(1), 80));
            let arrives = hairpin.hop().between((net.node(), PORT), (net.b(), 8080));
            lab.pod_sends(&hairpin)?.by_the_queue(&arrives)?;
            let answer = answer_of_b(&arrives);
            let back = answer.hop().between((net.vip(1), 80), (net.b(), PORT));
            lab.pod_sends(&answer)?.by_the_queue(&back)?;

            // The host asks; it is no router.
            let host = from_host(net, proto, (net.vip(1), 80)).map(|f| f.set_ports(PORT + 1, 80));
            lab.uplink_out(&host)?.by_the_queue(&host.between((net.node(), PORT + 1), (net.b(), 8080)))?;

            // The world answers.
            ensure!(SNAT.contains(&PORT), "the port is kept");
            let out = from_b(net, proto, (net.world(), 82));
            let leaves = out.hop().between((net.node(), PORT), (net.world(), 82));
            lab.pod_sends(&out)?.onto_wire(&leaves)?;
            let answer = leaves.reply().map(|f| f.ttl = 60);
            lab.uplink_in(&answer)?.by_the_queue(&answer.hop().between((net.world(), 82), (net.b(), PORT)))
        })
    })
}

/// An interface that is gone: the record of a pod that is being removed.
#[test]
fn without_an_interface_there_is_no_way() -> Result<()> {
    labs(|lab, net| {
        let ask = from_outside(Proto::Udp, (net.far(), PORT), (net.b(), 80));
        lab.put_endpoint_with(net.b(), 99, MAC_B, flags::VIA_QDISC)?;
        lab.overlay_in(net.node2(), &ask)?.dropped(DropReason::NoFib)
    })
}

/// A limit that comes or goes is known to flows after a second.
#[test]
fn an_established_flow_learns_of_it() -> Result<()> {
    labs(|lab, net| {
        let ask = from_a(net, Proto::Udp, (net.b(), 80));
        lab.pod_sends(&ask)?.to_the_pod(&ask.hop())?;
        let answer = as_from_b(&ask.reply());
        lab.pod_sends(&answer)?.to_the_pod(&answer.hop())?;
        ensure!(lab.half(Flow::of(&ask))?.source == source_of_mac(MAC_A));
        lab.put_endpoint_with(net.b(), POD_B, MAC_B, flags::VIA_QDISC)?;
        lab.pod_sends(&ask)?.to_the_pod(&ask.hop())?;
        lab.age(Flow::of(&ask), 1)?;
        lab.pod_sends(&ask)?.by_the_queue(&ask.hop())?;
        lab.put_endpoint(net.b(), POD_B, MAC_B)?;
        lab.age(Flow::of(&ask), 1)?;
        lab.pod_sends(&ask)?.to_the_pod(&ask.hop())
    })
}
