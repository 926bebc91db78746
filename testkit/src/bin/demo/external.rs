//! Rows of clients outside: node ports, and an address that the segment's router leads to the first node.

use crate::addresses::{balancer, family};
use crate::cluster::{Cluster, SERVICE_PORT};
use crate::rows::enough;
use crate::table::{self, Table};
use anyhow::Result;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use testkit::client::ask;
use testkit::{Proto, wait};

/// All of them.
pub fn rows(cluster: &Cluster<'_>, requests: usize, table: &mut Table) -> Result<()> {
    table::step("clients outside: node ports; a load balancer's address, at which pods see their client");
    table::columns();
    let world = cluster.fabric.world();
    let backends: Vec<&str> = cluster.pods.iter().take(cluster.fabric.nodes().len()).map(testkit::Pod::name).collect();
    for node in cluster.fabric.nodes() {
        for address in node.addresses() {
            let target = SocketAddr::new(address, cluster.published.outside.node_port);
            wait_served(cluster, target)?;
            for proto in Proto::ALL {
                let answers = ask(world, proto, target, enough(requests, backends.len()))?;
                let what = format!("outside > {}'s node port", node.name());
                table.answers(&what, family(address), &proto.to_string(), &answers, answers.only_by(&backends));
            }
        }
    }
    if cluster.has_sockets() {
        own_rows(cluster, &backends, requests, table)?;
    }
    let (world4, world6) = testkit::fabric::WORLD;
    let first = cluster.fabric.node(1);
    for vip in balancer() {
        cluster.fabric.switch().ip(&format!("route add {vip} via {}\n", first.address_like(vip)))?;
        let target = SocketAddr::new(vip, SERVICE_PORT);
        wait_served(cluster, target)?;
        let own = if vip.is_ipv4() { IpAddr::from(world4) } else { world6.into() };
        for proto in Proto::ALL {
            let answers = ask(world, proto, target, requests)?;
            let verdict = answers.only_by(&backends[..1]).and_then(|()| answers.only_as(own));
            table.answers("outside > load balancer", family(vip), &proto.to_string(), &answers, verdict);
        }
    }
    Ok(())
}

/// Processes of the nodes at their own node ports: by the node's address, and by loopback ones.
fn own_rows(cluster: &Cluster<'_>, backends: &[&str], requests: usize, table: &mut Table) -> Result<()> {
    for node in cluster.fabric.nodes() {
        let loopback = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        let places = node.addresses().map(|ip| (ip, "its node port")).into_iter();
        for (address, place) in places.chain(loopback.map(|ip: IpAddr| (ip, "localhost"))) {
            let target = SocketAddr::new(address, cluster.published.outside.node_port);
            for proto in Proto::ALL {
                let answers = ask(node.netns(), proto, target, enough(requests, backends.len()))?;
                let what = format!("{} > {place}", node.name());
                table.answers(&what, family(address), &proto.to_string(), &answers, answers.only_by(backends));
            }
        }
    }
    Ok(())
}

fn wait_served(cluster: &Cluster<'_>, target: SocketAddr) -> Result<()> {
    let world = cluster.fabric.world();
    wait::until(&format!("{target} served"), || ask(world, Proto::Udp, target, 1)?.all_answered())
}
