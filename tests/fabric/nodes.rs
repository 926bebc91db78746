//! Nodes come and go, change their addresses and their pod ranges, while others talk.

use crate::fixture::{Net, endpoints, observed, world};
use crate::odd_hosts::replace_addresses;
use anyhow::{Result, ensure};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use testkit::client::ask;
use testkit::load::{Kind, Load};
use testkit::manifest::node_yaml;
use testkit::pod::PORT;
use testkit::{Netns, Node, Pod, Proto, Routing, Setup, wait};

/// Between two requests of the traffic that must not suffer.
const PAUSE: Duration = Duration::from_millis(2);

macro_rules! in_each_mode {
    ($($name:ident: $nodes:expr),+ $(,)?) => {
        mod vxlan {
            $(#[test]
            fn $name() -> anyhow::Result<()> {
                super::on(testkit::Routing::Vxlan, $nodes, super::$name)
            })+
        }
        mod native {
            $(#[test]
            fn $name() -> anyhow::Result<()> {
                super::on(testkit::Routing::Native, $nodes, super::$name)
            })+
        }
    };
}
in_each_mode!(
    a_node_that_goes_and_comes_back_disturbs_no_other: 3,
    a_node_with_new_addresses_is_found: 2,
    a_node_with_another_pod_range_gets_pods_of_that: 2,
);

fn on(routing: Routing, nodes: u8, test: impl FnOnce(&Net) -> Result<()>) -> Result<()> {
    observed(&Net::start(Setup { routing, nodes, ..Setup::default() })?, test)
}

fn a_node_that_goes_and_comes_back_disturbs_no_other(net: &Net) -> Result<()> {
    let third = net.node(3).add_pod("third")?;
    reached(net.a.netns(), &third)?;
    let loads = traffic(net.a.netns(), &net.c)?;
    let file = "node-n3.yaml";
    let manifest = std::fs::read_to_string(net.fabric.manifests().dir().join(file))?;
    net.fabric.manifests().remove(file)?;
    wait::until("the node is forgotten", || {
        for family in ["-4", "-6"] {
            let routes = net.node(1).netns().exec("ip", &[family, "route", "show"])?;
            let left = net.node(3).pod_cidrs().iter().find(|cidr| routes.contains(&cidr.to_string()));
            ensure!(left.is_none(), "{left:?} is there still");
        }
        let nodes = net.node(1).rustnetctl(&["peers", "-o", "json"])?;
        ensure!(!nodes.contains("10.244.3."), "{nodes}");
        Ok(())
    })?;
    let refused = ask(net.a.netns(), Proto::Tcp, SocketAddr::new(third.v4()?.into(), PORT), 1)?;
    ensure!(refused.answered() == 0, "a pod of no node answers: {refused}");
    net.fabric.manifests().write(file, &manifest)?;
    wait::until("the node is back", || reached(net.a.netns(), &third))?;
    reached(third.netns(), &net.a)?;
    nothing_lost(loads)
}

fn a_node_with_new_addresses_is_found(net: &Net) -> Result<()> {
    let loads = traffic(net.a.netns(), &net.b)?;
    let new: [IpAddr; 2] = ["172.18.0.112".parse()?, "fd00:18::112".parse()?];
    let node = net.node(2);
    replace_addresses(node, &new)?;
    // Only then the kubelet says so.
    declare(net, node, &new, node.pod_cidrs())?;
    wait::until("pods of both nodes meet", || {
        reached(net.a.netns(), &net.c)?;
        reached(net.c.netns(), &net.a)
    })?;
    let service = net.service(endpoints(&[&net.c]))?;
    for target in service.targets() {
        ask(net.a.netns(), Proto::Tcp, target, 2)?.only_by(&["c"])?;
    }
    // Nor does the world hear of the old address.
    for (address, seen) in world().into_iter().zip(new) {
        wait::until("masquerade uses the new address", || {
            let answers = ask(net.c.netns(), Proto::Tcp, SocketAddr::new(address, PORT), 2)?;
            answers.only_by(&["world"])?;
            answers.only_as(seen)
        })?;
    }
    for address in new {
        wait::until("a pod reaches the node by it", || {
            ask(net.a.netns(), Proto::Udp, SocketAddr::new(address, PORT), 2)?.only_by(&["n2"])
        })?;
    }
    nothing_lost(loads)
}

/// A Node object that was created again: its range may be another one.
fn a_node_with_another_pod_range_gets_pods_of_that(net: &Net) -> Result<()> {
    let loads = traffic(net.a.netns(), &net.b)?;
    let ranges = ["10.244.77.0/24".parse()?, "fd00:244:0:77::/64".parse()?];
    declare(net, net.node(2), &net.node(2).addresses(), &ranges)?;
    let pod = wait::until("pods get addresses of the new range", || {
        let pod = net.node(2).add_pod("renumbered")?;
        let inside = |ip: &IpAddr| ranges.iter().any(|range: &ipnet::IpNet| range.contains(ip));
        if pod.addresses().iter().all(inside) {
            return Ok(pod);
        }
        let got = pod.addresses().to_vec();
        pod.delete()?;
        anyhow::bail!("{got:?}")
    })?;
    wait::until("the other node knows the range", || reached(net.a.netns(), &pod))?;
    reached(pod.netns(), &net.a)?;
    for address in world() {
        ask(pod.netns(), Proto::Tcp, SocketAddr::new(address, PORT), 2)?.only_by(&["world"])?;
    }
    nothing_lost(loads)
}

/// What the cluster says of a node from now on.
fn declare(net: &Net, node: &Node, addresses: &[IpAddr], ranges: &[ipnet::IpNet]) -> Result<()> {
    let text = node_yaml(node.name(), addresses, ranges);
    net.fabric.manifests().write(&format!("node-{}.yaml", node.name()), &text)
}

fn reached(from: &Netns, pod: &Pod) -> Result<()> {
    for address in pod.addresses() {
        for proto in Proto::ALL {
            ask(from, proto, SocketAddr::new(*address, PORT), 1)?.only_by(&[pod.name()])?;
        }
    }
    Ok(())
}

fn traffic(from: &Netns, to: &Pod) -> Result<Vec<Load>> {
    let mut loads = Vec::new();
    for address in to.addresses() {
        for (kind, proto) in [(Kind::Established, Proto::Tcp), (Kind::New, Proto::Tcp), (Kind::New, Proto::Udp)] {
            loads.push(Load::start(from, kind, proto, SocketAddr::new(*address, PORT), PAUSE)?);
        }
    }
    loads.iter().try_for_each(|load| load.wait_more(20))?;
    Ok(loads)
}

fn nothing_lost(loads: Vec<Load>) -> Result<()> {
    loads.iter().try_for_each(|load| load.wait_more(20))?;
    loads.into_iter().try_for_each(|load| load.stop()?.no_loss())
}
