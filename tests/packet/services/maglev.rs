//! Services that ask for Maglev: the hash of a flow leads to a place of the table, and the ordinal there to the backend.

use crate::flows::{PORT, Proto, SERVED, TARGET, VIP_PORT, from_a, from_outside};
use crate::frame::Frame;
use crate::harness::{Flow, Net, SEED, each, labs};
use anyhow::{Result, ensure};
use rustnet_common::addr::{Ip4, Ip6};
use rustnet_common::hash;
use rustnet_common::names::map;
use rustnet_common::service::{SvcEntry, scope};
use rustnet_common::tuple::Tuple;
use std::net::IpAddr;

/// The first unit of a table, and places that no count of backends would give: the last backend has none.
const UNIT: u16 = 3;
const PLACES: [u16; 13] = [2, 2, 0, 2, 1, 2, 2, 2, 1, 2, 2, 2, 2];
const FLOWS: u16 = 60;

/// Backends on other nodes.
fn backends(net: Net) -> Vec<(IpAddr, u16)> {
    (1..=4).map(|n| (net.ip([10, 244, 3, n], &format!("fd00:244:0:3::{n}")), TARGET)).collect()
}

/// The place of a table that a new flow leads to.
fn place(ask: &Frame, size: usize) -> usize {
    let Flow { src, sport, dst, dport, proto } = Flow::of(ask);
    let hash = match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let (src, dst) = (Ip4::from(src), Ip4::from(dst));
            hash::flow(&Tuple { src, dst, sport, dport, proto, pad: 0, pad2: 0 }, SEED)
        }
        (src, dst) => {
            let (src, dst) = (Ip6::from(src), Ip6::from(dst));
            hash::flow(&Tuple { src, dst, sport, dport, proto, pad: 0, pad2: 0 }, SEED)
        }
    };
    hash::pick(hash, size as u32) as usize
}

fn with_port(ask: &Frame, port: u16) -> Frame {
    ask.map(|f| f.set_ports(PORT + port, Flow::of(ask).dport))
}

#[test]
fn the_table_leads_to_the_backend() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            let number = proto.number(net);
            let ids = lab.serve(net.vip(1), VIP_PORT, number, 0, &backends(net))?;
            lab.spread(scope::CLUSTER, net.vip(1), VIP_PORT, number, UNIT, &PLACES)?;
            for port in 0..FLOWS {
                let ask = with_port(&from_a(net, proto, (net.vip(1), VIP_PORT)), port);
                lab.pod_sends(&ask)?;
                let (found, place) = (lab.half(Flow::of(&ask))?.backend, place(&ask, PLACES.len()));
                let wanted = ids[usize::from(PLACES[place])];
                ensure!(found == wanted, "port {port}, place {place}: {found:#x}, not {wanted:#x}");
            }
            lab.forget()
        })
    })
}

/// The client's port and address, and what it asks for, lead to the same backend on whichever node it arrives.
#[test]
fn clients_outside_are_led_by_the_table() -> Result<()> {
    labs(|lab, net| {
        let number = Proto::Udp.number(net);
        let ids = lab.publish(net.node(), 30_080, number, 0, &backends(net))?;
        lab.spread(scope::EXTERNAL, net.node(), 30_080, number, UNIT, &PLACES)?;
        for port in 0..FLOWS {
            let ask = with_port(&from_outside(Proto::Udp, (net.world(), PORT), (net.node(), 30_080)), port);
            lab.uplink_in(&ask)?;
            let (found, place) = (lab.half(Flow::of(&ask))?.backend, place(&ask, PLACES.len()));
            ensure!(found == ids[usize::from(PLACES[place])], "port {port}, place {place}: {found:#x}");
        }
        Ok(())
    })
}

/// Whatever stands in the table, a flow gets a backend of its Service.
#[test]
fn a_damaged_table_leads_nowhere_else() -> Result<()> {
    labs(|lab, net| {
        let number = Proto::Udp.number(net);
        // The elements after this Service's are another's.
        let ids = lab.serve(net.vip(1), VIP_PORT, number, 0, &backends(net))?;
        lab.serve(net.vip(2), VIP_PORT, number, 0, &backends(net))?;
        let ask = from_a(net, Proto::Udp, (net.vip(1), VIP_PORT));
        let is_led = |what: &str| {
            lab.pod_sends(&ask)?;
            let backend = lab.half(Flow::of(&ask))?.backend;
            ensure!(ids.contains(&backend), "{what}: {backend:#x}");
            lab.forget()
        };
        for ordinal in [4, 5, u16::MAX] {
            lab.spread(scope::CLUSTER, net.vip(1), VIP_PORT, number, UNIT, &[ordinal; 13])?;
            is_led(&format!("ordinal {ordinal}"))?;
        }
        let words = lab.datapath().table::<u32, u64>(map::MAGLEV)?;
        for size in [0, u64::from(u32::MAX), u64::MAX] {
            lab.spread(scope::CLUSTER, net.vip(1), VIP_PORT, number, UNIT, &[1; 13])?;
            words.put(&(u32::from(UNIT) * 256), &size)?;
            is_led(&format!("size {size}"))?;
        }
        // A table outside of the map.
        let entry = lab.service(net.vip(1), VIP_PORT, number)?;
        lab.put_service(net.vip(1), VIP_PORT, number, &SvcEntry { table: u16::MAX, ..entry })?;
        is_led("no table")
    })
}
