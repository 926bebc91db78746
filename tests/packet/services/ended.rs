//! Flows to a backend that serves no more: of UDP they end with their next packet, a client of TCP keeps its connection.

use super::{exchange, serve};
use crate::errors::refusal;
use crate::flows::{
    PORT, Proto, SERVED, TARGET, VIP_PORT, answer_of_b, at_backend, at_client, from_a, from_outside, later,
};
use crate::harness::{Flow, Lab, Net, each, labs};
use crate::states::silence;
use anyhow::{Result, ensure};
use rustnet_common::drop::DropReason;
use rustnet_common::service::scope;

const NODE_PORT: u16 = 30_053;

/// The first Service leads to pod B, which ends, and then to a pod elsewhere.
fn replace(lab: &Lab, net: Net, proto: Proto, id: u32) -> Result<u32> {
    let next = serve(lab, net, proto, net.vip(1), (net.far(), TARGET))?;
    lab.end(id)?;
    Ok(next)
}

#[test]
fn the_next_datagram_finds_another_backend() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            let id = serve(lab, net, proto, net.vip(1), (net.b(), TARGET))?;
            let ask = from_a(net, proto, (net.vip(1), VIP_PORT));
            exchange(lab, net, &ask)?;
            let next = replace(lab, net, proto, id)?;
            let more = later(&ask);
            let shot = lab.pod_sends(&more)?;
            if proto != Proto::Udp {
                return shot.to_the_pod(&at_backend(net, &more, net.b()));
            }
            let arrives = at_backend(net, &more, net.far());
            shot.onto_wire(&arrives)?;
            ensure!(lab.half(Flow::of(&ask))?.backend == next);
            lab.overlay_in(net.node2(), &arrives.reply())?.to_the_pod(&at_client(net, &arrives.reply(), 1))
        })
    })
}

/// What the one that has ended still sends is no answer of the Service.
#[test]
fn its_late_datagrams_are_no_answers() -> Result<()> {
    labs(|lab, net| {
        let proto = Proto::Udp;
        let id = serve(lab, net, proto, net.vip(1), (net.b(), TARGET))?;
        let ask = from_a(net, proto, (net.vip(1), VIP_PORT));
        let answer = exchange(lab, net, &ask)?;
        replace(lab, net, proto, id)?;
        lab.pod_sends(&answer)?.to_the_pod(&answer.hop())?;
        let arrives = at_backend(net, &ask, net.far());
        lab.pod_sends(&ask)?.onto_wire(&arrives)?;
        // Nor is that flow in the way of the Service's.
        lab.pod_sends(&answer)?.to_the_pod(&answer.hop())?;
        lab.overlay_in(net.node2(), &arrives.reply())?.to_the_pod(&at_client(net, &arrives.reply(), 1))
    })
}

#[test]
fn without_another_it_is_refused_and_recovers() -> Result<()> {
    labs(|lab, net| {
        let proto = Proto::Udp;
        let number = proto.number(net);
        let id = serve(lab, net, proto, net.vip(1), (net.b(), TARGET))?;
        let ask = from_a(net, proto, (net.vip(1), VIP_PORT));
        exchange(lab, net, &ask)?;
        lab.serve(net.vip(1), VIP_PORT, number, 0, &[])?;
        lab.end(id)?;
        lab.pod_sends(&ask)?.answered(DropReason::NoBackend, &refusal(&ask))?;
        ensure!(lab.halves()? == 0, "the flow is left");
        lab.drop_service(net.vip(1), VIP_PORT, number)?;
        serve(lab, net, proto, net.vip(1), (net.b(), TARGET))?;
        exchange(lab, net, &ask).map(drop)
    })
}

/// The port of a masqueraded flow is free again, and the answers come back by the new one.
#[test]
fn clients_outside_get_another_backend() -> Result<()> {
    labs(|lab, net| {
        each(&[Proto::Udp, Proto::Tcp], |proto| {
            let at = (net.node(), NODE_PORT);
            let publish = |to| lab.publish(at.0, at.1, proto.number(net), 0, &[(to, TARGET)]).map(|ids| ids[0]);
            let id = publish(net.far())?;
            let ask = from_outside(proto, (net.world(), PORT), at);
            lab.uplink_in(&ask)?;
            let before = lab.half(Flow::of(&ask))?;
            publish(net.b())?;
            lab.end(id)?;
            let more = later(&ask);
            let shot = lab.uplink_in(&more)?;
            if proto == Proto::Tcp {
                return shot.onto_wire(&more.hop().between((net.node(), before.to.sport), (net.far(), TARGET)));
            }
            let arrives = more.hop().between((net.world(), PORT), (net.b(), TARGET));
            shot.to_the_pod(&arrives)?;
            ensure!(lab.half(before.to.reversed()).is_err(), "the answers of the one before are left");
            let answer = answer_of_b(&arrives);
            lab.pod_sends(&answer)?.onto_wire(&answer.hop().between(at, (net.world(), PORT)))
        })
    })
}

/// The backend still serves other ports or addresses: programs find out with the first packet of a second.
#[test]
fn a_frontend_that_goes_takes_its_flows_along() -> Result<()> {
    labs(|lab, net| {
        each(&[Proto::Udp, Proto::Tcp], |proto| {
            let number = proto.number(net);
            let id = serve(lab, net, proto, net.vip(1), (net.b(), TARGET))?;
            let entry = lab.service(net.vip(1), VIP_PORT, number)?;
            lab.put_service(net.vip(1), 81, number, &entry)?;
            let outside = (net.node(), NODE_PORT);
            let published = lab.publish(outside.0, outside.1, number, 0, &[(net.b(), TARGET)])?[0];
            let asks = [VIP_PORT, 81].map(|port| from_a(net, proto, (net.vip(1), port)));
            for (n, ask) in asks.iter().enumerate() {
                let ask = ask.map(|f| f.set_ports(PORT + n as u16, if n == 0 { VIP_PORT } else { 81 }));
                lab.pod_sends(&ask)?;
                ensure!(lab.half(Flow::of(&ask))?.backend == id);
            }
            let external = from_outside(proto, (net.world(), PORT), outside);
            lab.uplink_in(&external)?;
            ensure!(lab.half(Flow::of(&external))?.backend == published);
            silence(lab, net, 1)?;
            // While all are there, no flow is opened again.
            let kept = later(&asks[0]);
            lab.pod_sends(&kept)?.to_the_pod(&at_backend(net, &kept, net.b()))?;
            lab.uplink_in(&later(&external))?
                .to_the_pod(&later(&external).hop().between((net.world(), PORT), (net.b(), TARGET)))?;
            let counts = [&kept, &external].map(|f| lab.half(Flow::of(f)).map_or(0, |half| half.packets));
            ensure!(counts == [2, 2], "packets of the flows: {counts:?}");
            silence(lab, net, 1)?;
            lab.drop_entry(scope::CLUSTER, net.vip(1), 81, number)?;
            lab.drop_entry(scope::EXTERNAL, outside.0, outside.1, number)?;
            let gone = later(&asks[1].map(|f| f.set_ports(PORT + 1, 81)));
            let (shot, from_outside) = (lab.pod_sends(&gone)?, lab.uplink_in(&later(&external))?);
            if proto == Proto::Tcp {
                shot.to_the_pod(&gone.hop().between((net.a(), PORT + 1), (net.b(), TARGET)))?;
                return from_outside
                    .to_the_pod(&later(&external).hop().between((net.world(), PORT), (net.b(), TARGET)));
            }
            shot.answered(DropReason::NoServicePort, &refusal(&gone))?;
            from_outside.to_stack(&later(&external))?;
            lab.pod_sends(&kept)?.to_the_pod(&at_backend(net, &kept, net.b()))
        })
    })
}

/// An external IP that a Service loses is no node port, although this node has a port of that number for the same backends.
#[test]
fn an_external_ip_that_goes_is_no_node_port() -> Result<()> {
    labs(|lab, net| {
        let (number, gone) = (Proto::Udp.number(net), net.ip([203, 0, 113, 9], "2001:db8:7::9"));
        lab.publish(gone, NODE_PORT, number, 0, &[(net.b(), TARGET)])?;
        let entry = lab.entry(scope::EXTERNAL, gone, NODE_PORT, number)?;
        lab.put_entry(scope::EXTERNAL, net.node(), NODE_PORT, number, &entry)?;
        let ask = from_outside(Proto::Udp, (net.world(), PORT), (gone, NODE_PORT));
        let arrives = ask.hop().between((net.world(), PORT), (net.b(), TARGET));
        lab.uplink_in(&ask)?.to_the_pod(&arrives)?;
        lab.drop_entry(scope::EXTERNAL, gone, NODE_PORT, number)?;
        silence(lab, net, 1)?;
        lab.uplink_in(&ask)?.to_stack(&ask)
    })
}

/// Session affinity does not lead back to one that has ended.
#[test]
fn affinity_ends_with_its_backend() -> Result<()> {
    labs(|lab, net| {
        let number = Proto::Udp.number(net);
        let ids = lab.serve(net.vip(1), VIP_PORT, number, 0, &[(net.b(), TARGET), (net.far(), TARGET)])?;
        lab.stick(net.vip(1), VIP_PORT, number, 60)?;
        let ask = |port: u16| from_a(net, Proto::Udp, (net.vip(1), VIP_PORT)).map(|f| f.set_ports(port, VIP_PORT));
        let backend_of = |port: u16| {
            lab.pod_sends(&ask(port))?;
            anyhow::Ok(lab.half(Flow::of(&ask(port)))?.backend)
        };
        let had = backend_of(PORT)?;
        ensure!(ids.contains(&had));
        // The set without it, of the same number.
        let other = ids.iter().position(|id| *id != had).unwrap_or_default() as u32;
        let entry = lab.service(net.vip(1), VIP_PORT, number)?;
        let left = rustnet_common::service::SvcEntry { first: entry.first + other, count: 1, ..entry };
        lab.put_service(net.vip(1), VIP_PORT, number, &left)?;
        lab.end(had)?;
        ensure!(backend_of(PORT + 1)? == ids[other as usize], "a new flow goes to the one that has ended");
        Ok(())
    })
}
