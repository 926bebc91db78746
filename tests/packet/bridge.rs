//! Programs between two agents whose tables differ: while the hooks are swapped, connections that programs of the earlier agent
//! open count before what is left over of older ones.

use crate::flows::{PORT, Proto, TARGET, VIP_PORT, answer_of_b, at_backend, at_client, from_a, from_outside, later};
use crate::frame::Frame;
use crate::harness::{Flow, Lab, MAC_A, Net, POD_A, Shot, labs_of_bridge};
use crate::services::exchange;
use crate::states::silence;
use anyhow::{Context, Result, ensure};
use rustnet_common::v1;
use testkit::datapath::Bridge;

/// Both shapes that the earlier tables can have.
const BRIDGES: [Bridge; 2] = [Bridge::Resized, Bridge::V1];
/// Protocols of the tests: one of each table.
const PROTOS: [Proto; 2] = [Proto::Tcp, Proto::Udp];

/// Seconds after which every connection is over.
const LONG: u32 = 86_401;

/// A port of the usual range.
const NODE_PORT: u16 = 30_080;

fn for_each_bridge(test: impl Fn(&Lab, Net, Proto, Bridge) -> Result<()> + Send + Sync) -> Result<()> {
    BRIDGES.into_iter().try_for_each(|bridge| {
        labs_of_bridge(bridge, |lab, net| {
            PROTOS.into_iter().try_for_each(|proto| {
                lab.forget()?;
                lab.forget_earlier()?;
                lab.serve(net.vip(1), VIP_PORT, proto.number(net), 0, &[(net.b(), TARGET)])?;
                test(lab, net, proto, bridge).with_context(|| format!("{bridge:?} {proto:?}"))
            })
        })
    })
}

/// Redirected to a device, marked as done for the hook there, that of v1 included.
fn onto_wire(mut shot: Shot, bridge: Bridge, want: &Frame) -> Result<()> {
    let of_v1 = if bridge == Bridge::V1 { v1::MARK } else { 0 };
    ensure!(shot.mark & v1::MARK == of_v1, "mark {:#x}", shot.mark);
    shot.mark &= !v1::MARK;
    shot.onto_wire(want)
}

/// A connection of pod A through a service is over, and the earlier programs have opened one to its backend from the same port. Returns
/// what opened that.
fn supersede(lab: &Lab, net: Net, proto: Proto) -> Result<Frame> {
    exchange(lab, net, &from_a(net, proto, (net.vip(1), VIP_PORT)))?;
    silence(lab, net, LONG)?;
    let stale = lab.take_connections()?;
    lab.forget_earlier()?;
    let ask = from_a(net, proto, (net.b(), TARGET));
    lab.pod_sends(&ask)?.to_the_pod(&ask.hop())?;
    lab.put_connections(&stale)?;
    Ok(ask)
}

/// A connection through a service is over, and the earlier programs opened one to its backend from the same port.
#[test]
fn a_backend_asked_itself_on_the_port_of_an_expired_connection() -> Result<()> {
    for_each_bridge(|lab, net, proto, _| {
        let ask = supersede(lab, net, proto)?;
        let answer = answer_of_b(&ask.hop());
        lab.pod_sends(&answer)?.to_the_pod(&answer.hop())
    })
}

/// The other way round: the connection to the backend itself is over.
#[test]
fn a_service_asked_on_the_port_of_an_expired_connection_to_its_backend() -> Result<()> {
    for_each_bridge(|lab, net, proto, _| {
        let direct = from_a(net, proto, (net.b(), TARGET));
        lab.pod_sends(&direct)?.to_the_pod(&direct.hop())?;
        silence(lab, net, LONG)?;
        let stale = lab.take_connections()?;
        lab.forget_earlier()?;
        let ask = from_a(net, proto, (net.vip(1), VIP_PORT));
        let arrives = at_backend(net, &ask, net.b());
        lab.pod_sends(&ask)?.to_the_pod(&arrives)?;
        lab.put_connections(&stale)?;
        let answer = answer_of_b(&arrives);
        lab.pod_sends(&answer)?.to_the_pod(&at_client(net, &answer, 1))
    })
}

/// Nothing of a connection is left in either table once it is forgotten.
#[test]
fn what_is_forgotten_does_not_come_back() -> Result<()> {
    for_each_bridge(|lab, net, proto, _| {
        let ask = from_a(net, proto, (net.vip(1), VIP_PORT));
        let answer = exchange(lab, net, &ask)?;
        ensure!(
            lab.has_earlier(Flow::of(&ask))? && lab.has_earlier(Flow::of(&answer))?,
            "it is in the earlier tables, too"
        );
        // Another pod has the client's address: answers to the one before are none of its own.
        silence(lab, net, 2)?;
        lab.put_endpoint(net.a(), POD_A + 7, MAC_A)?;
        lab.pod_sends(&answer)?;
        lab.put_endpoint(net.a(), POD_A, MAC_A)?;
        ensure!(lab.half(Flow::of(&ask)).is_err() && !lab.has_earlier(Flow::of(&ask))?, "the question's entry is left");
        Ok(())
    })
}

/// A flow without an entry in the present table whose backend has gone has ended.
#[test]
fn a_flow_whose_backend_has_gone_is_not_taken_over() -> Result<()> {
    for_each_bridge(|lab, net, proto, bridge| {
        let id = lab.serve(net.vip(1), VIP_PORT, proto.number(net), 0, &[(net.b(), TARGET)])?[0];
        let ask = from_a(net, proto, (net.vip(1), VIP_PORT));
        exchange(lab, net, &ask)?;
        lab.forget()?;
        lab.serve(net.vip(1), VIP_PORT, proto.number(net), 0, &[(net.far(), TARGET)])?;
        lab.withdraw(id)?;
        let more = later(&ask);
        let shot = lab.pod_sends(&more)?;
        // A client of TCP keeps its backend until it ends; ids of v1 say nothing.
        match proto {
            Proto::Udp if bridge == Bridge::Resized => shot.onto_wire(&at_backend(net, &more, net.far())),
            _ => shot.to_the_pod(&at_backend(net, &more, net.b())),
        }
    })
}

/// A flow that nothing translates has one entry, whichever of its directions comes first.
#[test]
fn a_flow_that_supersedes_another_has_one_entry() -> Result<()> {
    for_each_bridge(|lab, net, proto, _| {
        let ask = supersede(lab, net, proto)?;
        let (more, answer) = (later(&ask), answer_of_b(&ask.hop()));
        lab.pod_sends(&more)?.to_the_pod(&more.hop())?;
        lab.pod_sends(&answer)?.to_the_pod(&answer.hop())?;
        // Of the expired connection, the entry of the question is left.
        let there = lab.connections(net)?;
        ensure!(there.len() == 2, "{there:?}");
        Ok(())
    })
}

/// What the earlier tables have is older: it changes nothing.
#[test]
fn an_older_connection_of_the_earlier_tables_does_not_count() -> Result<()> {
    for_each_bridge(|lab, net, proto, _| {
        let ask = from_a(net, proto, (net.vip(1), VIP_PORT));
        let answer = exchange(lab, net, &ask)?;
        let present = lab.take_connections()?;
        lab.forget_earlier()?;
        let direct = from_a(net, proto, (net.b(), TARGET));
        lab.pod_sends(&direct)?.to_the_pod(&direct.hop())?;
        lab.put_connections(&present)?;
        lab.age_earlier(1)?;
        lab.pod_sends(&answer)?.to_the_pod(&at_client(net, &answer, 1))
    })
}

/// A flow of a client outside of which the present tables have no entry any more. v1 has no such flows.
#[test]
fn an_evicted_flow_of_a_client_outside_goes_on() -> Result<()> {
    for_each_bridge(|lab, net, proto, bridge| {
        lab.publish(net.node(), NODE_PORT, proto.number(net), 0, &[(net.routed(), TARGET)])?;
        let ask = from_outside(proto, (net.world(), PORT), (net.node(), NODE_PORT));
        lab.uplink_in(&ask)?;
        let source = lab.half(Flow::of(&ask))?.to.sport;
        let arrives = ask.hop().between((net.node(), source), (net.routed(), TARGET));
        for flow in [&ask, &arrives.reply()] {
            ensure!(lab.has_earlier(Flow::of(flow))? == (bridge == Bridge::Resized), "in the earlier tables: {flow:?}");
        }
        lab.forget()?;
        onto_wire(lab.uplink_in(&ask)?, bridge, &arrives)?;
        let back = arrives.reply().hop().between((net.node(), NODE_PORT), (net.world(), PORT));
        onto_wire(lab.uplink_in(&arrives.reply())?, bridge, &back)
    })
}

/// Earlier releases exported such flows to v1 without what sets them apart.
#[test]
fn a_flow_of_a_client_outside_in_tables_of_v1_is_not_taken_over() -> Result<()> {
    for_each_bridge(|lab, net, proto, bridge| {
        lab.publish(net.node(), NODE_PORT, proto.number(net), 0, &[(net.routed(), TARGET)])?;
        let ask = from_outside(proto, (net.world(), PORT), (net.node(), NODE_PORT));
        let other = ask.hop().between((net.node(), PORT + 1), (net.routed(), TARGET));
        lab.put_of_v1(Flow::of(&ask), Flow::of(&other), v1::flags::NAT | v1::flags::MASQ)?;
        let shot = lab.uplink_in(&ask)?;
        let source = lab.half(Flow::of(&ask))?.to.sport;
        onto_wire(shot, bridge, &ask.hop().between((net.node(), source), (net.routed(), TARGET)))?;
        lab.forget()?;
        // Its answer, too, is that of a flow that nobody knows.
        lab.uplink_in(&other.reply())?.to_stack(&other.reply())
    })
}
