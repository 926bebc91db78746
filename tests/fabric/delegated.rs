//! Addresses from another IPAM plugin (the reference `host-local`): the same network, and a gateway that answers.

use crate::fixture::endpoints;
use crate::state::State;
use anyhow::{Result, anyhow, ensure};
use serde_json::{Value, json};
use std::net::{IpAddr, SocketAddr};
use testkit::client::{Proto, ask};
use testkit::icmp::reachable;
use testkit::manifest::Service;
use testkit::pod::PORT;
use testkit::server::Server;
use testkit::sniff::recorded;
use testkit::{Fabric, Node, Pod, Routing, Setup, wait};

/// A configuration with `host-local` over the node's own pod ranges.
fn host_local(node: &Node) -> Value {
    let ranges: Vec<Value> = node.pod_cidrs().iter().map(|cidr| json!([{"subnet": cidr.to_string()}])).collect();
    json!({"ipam": {"type": "host-local", "dataDir": node.dir().join("host-local"), "ranges": ranges}})
}

fn add(node: &Node, name: &str) -> Result<Pod> {
    let mut pod = node.add_pod_with(name, &host_local(node))?;
    pod.serve(PORT)?;
    Ok(pod)
}

/// The gateways that the plugin named.
fn gateways(pod: &Pod) -> Result<Vec<IpAddr>> {
    let ips = pod.result()["ips"].as_array().map_or(&[][..], Vec::as_slice);
    let found: Vec<IpAddr> = ips.iter().filter_map(|ip| ip["gateway"].as_str()?.parse().ok()).collect();
    ensure!(found.len() == 2, "no gateway of each family: {}", pod.result());
    Ok(found)
}

fn connected(fabric: &Fabric) -> Result<()> {
    let servers =
        fabric.nodes().iter().map(|n| Server::start(n.netns(), n.name(), PORT)).collect::<Result<Vec<_>>>()?;
    let before = State::of(fabric.node(1))?;
    let (a, b, c) = (add(fabric.node(1), "a")?, add(fabric.node(1), "b")?, add(fabric.node(2), "c")?);
    for pod in [&a, &b, &c] {
        for gateway in gateways(pod)? {
            reachable(pod.netns(), gateway)?;
            for proto in Proto::ALL {
                let answers = ask(pod.netns(), proto, SocketAddr::new(gateway, PORT), 5)?;
                answers.only_by(&[pod.node().name()]).map_err(|e| e.context(format!("{proto} to {gateway}")))?;
                answers.only_as(pod.address_like(gateway)?)?;
            }
        }
        for node in fabric.nodes() {
            for address in node.addresses() {
                ask(pod.netns(), Proto::Tcp, SocketAddr::new(address, PORT), 5)?.only_by(&[node.name()])?;
            }
        }
        for address in pod.addresses() {
            ask(pod.node().netns(), Proto::Tcp, SocketAddr::new(*address, PORT), 5)?.only_by(&[pod.name()])?;
        }
    }
    let mut service = Service::new("web", &["10.96.0.10".parse()?, "fd00:96::10".parse()?], 80, PORT);
    service.endpoints = endpoints(&[&b, &c]);
    fabric.manifests().apply(&service)?;
    for (from, to) in [(&a, &b), (&a, &c), (&c, &a), (&b, &a)] {
        for address in to.addresses() {
            reachable(from.netns(), *address)?;
            let vip = SocketAddr::new(service.vips[usize::from(address.is_ipv6())], 80);
            for proto in Proto::ALL {
                let answers = ask(from.netns(), proto, SocketAddr::new(*address, PORT), 5)?;
                answers.only_by(&[to.name()])?;
                answers.only_as(from.address_like(*address)?)?;
                wait::until("the service", || ask(from.netns(), proto, vip, 20)?.only_by(&["b", "c"]))?;
            }
        }
    }
    fabric.manifests().delete(&service)?;
    [a, b, c].into_iter().try_for_each(Pod::delete)?;
    drop(servers);
    before.wait_for(fabric.node(1))?;
    let leases = std::fs::read_dir(fabric.node(1).dir().join("host-local/rustnet"))?.flatten();
    let left: Vec<_> = leases.map(|e| e.file_name()).filter(|n| n.to_string_lossy().contains("10.244")).collect();
    ensure!(left.is_empty(), "leases are left: {left:?}");
    Ok(())
}

fn on_a_fabric_of_its_own(routing: Routing) -> Result<()> {
    let fabric = Fabric::start(Setup { routing, ..Setup::default() })?;
    let uplinks: Vec<_> = fabric.nodes().iter().map(|n| (n.netns(), "eth0")).collect();
    recorded(&uplinks, || connected(&fabric)).map_err(|e| anyhow!(e).context(fabric.logs()))
}

#[test]
fn pods_with_delegated_addresses_are_pods_like_others_vxlan() -> Result<()> {
    on_a_fabric_of_its_own(Routing::Vxlan)
}

#[test]
fn pods_with_delegated_addresses_are_pods_like_others_native() -> Result<()> {
    on_a_fabric_of_its_own(Routing::Native)
}
