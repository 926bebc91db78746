//! Session affinity: a client's new flows go to the backend that it has, for as long as it comes again in time.

use crate::flows::{PORT, Proto, SERVED, TARGET, VIP_PORT, from_a, from_b, from_outside};
use crate::frame::Frame;
use crate::harness::{Flow, Lab, Net, each, labs};
use anyhow::{Result, ensure};
use rustnet_common::addr::Addr;
use rustnet_common::drop::DropReason;
use rustnet_common::socket::CLIENT_HIGH;
use std::collections::BTreeSet;
use std::net::IpAddr;

const SECONDS: u32 = 60;
/// Flows of which some would go elsewhere: of 30, with four backends, all by chance to one in 4^29.
const FLOWS: u16 = 30;

/// Backends on other nodes.
fn backends(net: Net) -> Vec<(IpAddr, u16)> {
    (1..=4).map(|n| (net.ip([10, 244, 3, n], &format!("fd00:244:0:3::{n}")), TARGET)).collect()
}

fn serve(lab: &Lab, net: Net, proto: Proto) -> Result<Vec<u32>> {
    let ids = lab.serve(net.vip(1), VIP_PORT, proto.number(net), 0, &backends(net))?;
    lab.stick(net.vip(1), VIP_PORT, proto.number(net), SECONDS)?;
    Ok(ids)
}

/// The backends that a client's new flows get, which come from as many ports.
fn chosen(lab: &Lab, ask: &Frame, ports: std::ops::Range<u16>) -> Result<BTreeSet<u32>> {
    ports
        .map(|port| {
            let ask = ask.map(|f| f.set_ports(PORT + port, VIP_PORT));
            lab.pod_sends(&ask)?;
            Ok(lab.half(Flow::of(&ask))?.backend)
        })
        .collect()
}

#[test]
fn a_client_stays_with_its_backend() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            serve(lab, net, proto)?;
            let (a, b) = (from_a(net, proto, (net.vip(1), VIP_PORT)), from_b(net, proto, (net.vip(1), VIP_PORT)));
            let first = chosen(lab, &a, 0..FLOWS)?;
            ensure!(first.len() == 1, "one client, several backends: {first:?}");
            // Each client has its own; one that has none gets one by its flow's hash.
            let others: BTreeSet<_> = (0..FLOWS)
                .map(|n| {
                    lab.age_affinities(SECONDS)?;
                    Ok(chosen(lab, &b, n..n + 1)?.into_iter().next().unwrap_or(0))
                })
                .collect::<Result<_>>()?;
            ensure!(others.len() > 1, "all new clients get one backend");
            Ok(())
        })
    })
}

#[test]
fn affinity_expires() -> Result<()> {
    labs(|lab, net| {
        serve(lab, net, Proto::Tcp)?;
        let ask = from_a(net, Proto::Tcp, (net.vip(1), VIP_PORT));
        let first = chosen(lab, &ask, 0..1)?;
        // Each flow begins the time again.
        for n in 0..3 {
            lab.age_affinities(SECONDS - 1)?;
            ensure!(chosen(lab, &ask, n * FLOWS..(n + 1) * FLOWS)? == first, "it left in time");
        }
        let after: BTreeSet<_> = (0..FLOWS)
            .map(|n| {
                lab.age_affinities(SECONDS)?;
                Ok(chosen(lab, &ask, 1000 + n..1001 + n)?.into_iter().next().unwrap_or(0))
            })
            .collect::<Result<_>>()?;
        ensure!(after.len() > 1, "it stayed for ever");
        Ok(())
    })
}

#[test]
fn a_backend_that_is_gone_is_replaced() -> Result<()> {
    labs(|lab, net| {
        let ids = serve(lab, net, Proto::Udp)?;
        let ask = from_a(net, Proto::Udp, (net.vip(1), VIP_PORT));
        let first = *chosen(lab, &ask, 0..1)?.first().unwrap_or(&0);
        // As after an update: what is left stands in its place.
        let left: Vec<_> =
            backends(net).into_iter().zip(&ids).filter(|(_, id)| **id != first).map(|(b, _)| b).collect();
        lab.withdraw(first)?;
        lab.serve(net.vip(1), VIP_PORT, Proto::Udp.number(net), 0, &left)?;
        lab.stick(net.vip(1), VIP_PORT, Proto::Udp.number(net), SECONDS)?;
        let second = chosen(lab, &ask, 1..FLOWS)?;
        ensure!(second.len() == 1 && !second.contains(&first), "{first} is gone: {second:?}");
        Ok(())
    })
}

/// A service's id may have been another's, whose clients are remembered yet.
#[test]
fn a_backend_of_another_service_is_none() -> Result<()> {
    labs(|lab, net| {
        let other = lab.serve(net.vip(2), VIP_PORT, Proto::Tcp.number(net), 0, &[(net.far(), TARGET)])?[0];
        let ids = serve(lab, net, Proto::Tcp)?;
        let ask = from_a(net, Proto::Tcp, (net.vip(1), VIP_PORT));
        chosen(lab, &ask, 0..1)?;
        lab.change_affinities(|known| known.backend = other)?;
        let now = chosen(lab, &ask, 1..FLOWS)?;
        ensure!(now.len() == 1 && now.is_subset(&ids.iter().copied().collect()), "{now:?}, not of {ids:?}");
        Ok(())
    })
}

/// Without affinity, or with it taken away, flows spread.
#[test]
fn without_affinity_flows_spread() -> Result<()> {
    labs(|lab, net| {
        serve(lab, net, Proto::Tcp)?;
        let ask = from_a(net, Proto::Tcp, (net.vip(1), VIP_PORT));
        ensure!(chosen(lab, &ask, 0..FLOWS)?.len() == 1, "affinity");
        lab.stick(net.vip(1), VIP_PORT, Proto::Tcp.number(net), 0)?;
        ensure!(chosen(lab, &ask, FLOWS..2 * FLOWS)?.len() > 1, "no affinity, one backend");
        Ok(())
    })
}

/// Each address outside is a client of its own.
#[test]
fn clients_outside_have_affinity_too() -> Result<()> {
    labs(|lab, net| {
        let number = Proto::Tcp.number(net);
        lab.publish_sticky(net.node(), 30_080, number, SECONDS, &backends(net))?;
        let mut chosen = BTreeSet::new();
        for port in 0..FLOWS {
            let ask = from_outside(Proto::Tcp, (net.world(), PORT + port), (net.node(), 30_080));
            lab.uplink_in(&ask)?;
            chosen.insert(lab.half(Flow::of(&ask))?.backend);
        }
        ensure!(chosen.len() == 1, "{chosen:?}");
        Ok(())
    })
}

/// Sockets ask in the name of their network namespace, which no packet can have as its source.
#[test]
fn a_client_outside_is_no_network_namespace() -> Result<()> {
    labs(|lab, net| {
        if net == Net::V4 {
            return Ok(());
        }
        let number = Proto::Udp.number(net);
        lab.publish_sticky(net.node(), 30_080, number, SECONDS, &backends(net))?;
        for namespace in [1, 4096, u64::MAX] {
            let client = Addr::from_halves(CLIENT_HIGH, namespace).into();
            let ask = from_outside(Proto::Udp, (client, PORT), (net.node(), 30_080));
            lab.uplink_in(&ask)?.dropped(DropReason::Martian)?;
        }
        ensure!(lab.halves()? == 0, "a forged packet opened a flow");
        Ok(())
    })
}
