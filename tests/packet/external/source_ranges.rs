//! `loadBalancerSourceRanges`: which clients may come by a load balancer's address.

use crate::flows::{PORT, Proto, SERVED, TARGET, VIP_PORT, from_a, from_host, from_outside, later};
use crate::frame::Frame;
use crate::harness::{Lab, Net, SHOT, each, labs};
use anyhow::{Result, ensure};
use rustnet_common::drop::DropReason;
use rustnet_common::service::flags::{DROP_EMPTY, SOURCE_RANGES};
use std::net::IpAddr;

fn vip(net: Net) -> IpAddr {
    net.ip([203, 0, 114, 7], "2001:db8:7::7")
}

/// A client of the world, by the last number of its address.
fn client(net: Net, n: u8) -> IpAddr {
    net.ip([192, 0, 2, n], &format!("2001:db8:2::{n:x}"))
}

/// Serves a port of the balancer's address to some clients alone, by a pod here.
fn serve(lab: &Lab, net: Net, proto: Proto, port: u16) -> Result<()> {
    lab.share(vip(net))?;
    lab.publish(vip(net), port, proto.number(net), SOURCE_RANGES, &[(net.b(), TARGET)])?;
    Ok(())
}

fn allow(lab: &Lab, net: Net, proto: Proto, port: u16, range: (IpAddr, u8)) -> Result<()> {
    lab.allow(vip(net), port, proto.number(net), range.0, range.1)
}

fn ask(net: Net, proto: Proto, from: IpAddr, port: u16) -> Frame {
    from_outside(proto, (from, PORT), (vip(net), port))
}

fn passes(lab: &Lab, net: Net, proto: Proto, from: IpAddr, port: u16) -> Result<()> {
    let ask = ask(net, proto, from, port);
    lab.uplink_in(&ask)?.to_the_pod(&ask.hop().between((from, PORT), (net.b(), TARGET)))
}

fn is_refused(lab: &Lab, net: Net, proto: Proto, from: IpAddr, port: u16) -> Result<()> {
    lab.uplink_in(&ask(net, proto, from, port))?.dropped(DropReason::NotInSourceRange)
}

#[test]
fn clients_inside_a_range_and_outside() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            lab.forbid_all()?;
            serve(lab, net, proto, VIP_PORT)?;
            let (whole, subnet) = match net {
                Net::V4 => (32, 29),
                Net::V6 => (128, 125),
            };
            // 8 to 15, and 20.
            allow(lab, net, proto, VIP_PORT, (client(net, 8), subnet))?;
            allow(lab, net, proto, VIP_PORT, (client(net, 20), whole))?;
            for inside in [8, 15, 20] {
                passes(lab, net, proto, client(net, inside), VIP_PORT)?;
            }
            for outside in [7, 16, 19, 21] {
                is_refused(lab, net, proto, client(net, outside), VIP_PORT)?;
            }
            is_refused(lab, net, proto, net.router(), VIP_PORT)
        })?;
        ensure!(lab.halves()? == 3 * SERVED.len() * 2, "a refused packet opened a flow");
        Ok(())
    })
}

/// By whatever device they come.
#[test]
fn machines_on_a_bridge_are_clients_outside() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            lab.forbid_all()?;
            serve(lab, net, proto, VIP_PORT)?;
            let ask = ask(net, proto, net.machine(), VIP_PORT);
            lab.side_in(&ask)?.dropped(DropReason::NotInSourceRange)?;
            allow(lab, net, proto, VIP_PORT, (net.machine(), if net == Net::V4 { 24 } else { 64 }))?;
            lab.side_in(&ask)?.to_the_pod(&ask.hop().between((net.machine(), PORT), (net.b(), TARGET)))
        })
    })
}

/// `0.0.0.0/0` and `::/0` are everybody of their family.
#[test]
fn a_range_of_everybody() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            lab.forbid_all()?;
            serve(lab, net, proto, VIP_PORT)?;
            allow(lab, net, proto, VIP_PORT, (net.ip([0, 0, 0, 0], "::"), 0))?;
            passes(lab, net, proto, net.world(), VIP_PORT)?;
            passes(lab, net, proto, net.router(), VIP_PORT)
        })
    })
}

/// The ranges of one port, protocol or address say nothing of another.
#[test]
fn ranges_are_those_of_one_entry() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            lab.forbid_all()?;
            for port in [VIP_PORT, VIP_PORT + 1] {
                serve(lab, net, proto, port)?;
            }
            let everybody = (net.ip([0, 0, 0, 0], "::"), 0);
            allow(lab, net, proto, VIP_PORT + 1, everybody)?;
            for other in SERVED.into_iter().filter(|other| *other != proto) {
                allow(lab, net, other, VIP_PORT, everybody)?;
            }
            lab.allow(net.ip([203, 0, 114, 8], "2001:db8:7::8"), VIP_PORT, proto.number(net), everybody.0, 0)?;
            is_refused(lab, net, proto, net.world(), VIP_PORT)?;
            passes(lab, net, proto, net.world(), VIP_PORT + 1)
        })
    })
}

/// A service whose ranges are of the other family, all invalid, or too many.
#[test]
fn without_ranges_it_is_closed() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            lab.forbid_all()?;
            serve(lab, net, proto, VIP_PORT)?;
            is_refused(lab, net, proto, net.world(), VIP_PORT)?;
            // Neither does it answer that it has no endpoint.
            for flags in [SOURCE_RANGES, SOURCE_RANGES | DROP_EMPTY] {
                lab.publish(vip(net), VIP_PORT, proto.number(net), flags, &[])?;
                is_refused(lab, net, proto, net.world(), VIP_PORT)?;
            }
            ensure!(lab.halves()? == 0, "a refused packet opened a flow");
            Ok(())
        })
    })
}

/// An entry without the flag is everybody's: ranges that stand there already, or still, close nothing.
#[test]
fn ranges_without_the_flag_say_nothing() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            serve(lab, net, proto, VIP_PORT)?;
            allow(lab, net, proto, VIP_PORT, (net.router(), if net == Net::V4 { 32 } else { 128 }))?;
            lab.publish(vip(net), VIP_PORT, proto.number(net), 0, &[(net.b(), TARGET)])?;
            passes(lab, net, proto, net.world(), VIP_PORT)
        })
    })
}

/// As with kube-proxy, new flows are judged.
#[test]
fn known_flows_go_on() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            serve(lab, net, proto, VIP_PORT)?;
            allow(lab, net, proto, VIP_PORT, (net.ip([0, 0, 0, 0], "::"), 0))?;
            passes(lab, net, proto, net.world(), VIP_PORT)?;
            lab.forbid_all()?;
            let more = later(&ask(net, proto, net.world(), VIP_PORT));
            lab.uplink_in(&more)?.to_the_pod(&more.hop().between((net.world(), PORT), (net.b(), TARGET)))?;
            is_refused(lab, net, proto, net.router(), VIP_PORT)
        })
    })
}

/// Pods and the host come by the entry for the cluster, which asks for the same clients.
#[test]
fn clients_in_the_cluster_are_asked() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            lab.forbid_all()?;
            serve(lab, net, proto, VIP_PORT)?;
            lab.serve(vip(net), VIP_PORT, proto.number(net), SOURCE_RANGES, &[(net.b(), TARGET)])?;
            let (pod, host) = (from_a(net, proto, (vip(net), VIP_PORT)), from_host(net, proto, (vip(net), VIP_PORT)));
            lab.pod_sends(&pod)?.dropped(DropReason::NotInSourceRange)?;
            lab.uplink_out(&host)?.dropped(DropReason::NotInSourceRange)?;
            let whole = if net == Net::V4 { 32 } else { 128 };
            allow(lab, net, proto, VIP_PORT, (net.a(), whole))?;
            lab.pod_sends(&pod)?.to_the_pod(&pod.hop().between((net.a(), PORT), (net.b(), TARGET)))?;
            lab.uplink_out(&host)?.dropped(DropReason::NotInSourceRange)?;
            allow(lab, net, proto, VIP_PORT, (net.node(), whole))?;
            let shot = lab.uplink_out(&host)?;
            ensure!(shot.verdict != SHOT, "the host is refused");
            lab.forget()
        })
    })
}
