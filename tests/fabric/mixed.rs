//! `direct-and-vxlan`: two nodes of one segment reach each other's pods by plain routes, a third one, behind a narrow core,
//! in the tunnel.

use crate::fixture::{Net, endpoints, observed};
use crate::path::{transfer, transfers};
use anyhow::{Result, ensure};
use std::net::{IpAddr, SocketAddr};
use testkit::client::ask;
use testkit::pod::PORT;
use testkit::sniff::{Capture, Frame, Sniffer};
use testkit::{Pod, Proto, Routing, Setup, Topology, check};

#[test]
fn the_segment_is_used_directly_and_the_rest_through_the_tunnel() -> Result<()> {
    let topology = Topology::Mixed { core_mtu: 1400 };
    let setup = Setup { nodes: 3, routing: Routing::DirectAndVxlan, topology, ..Setup::default() };
    observed(&Net::start(setup)?, |net| {
        let far = net.node(3).add_pod("far")?;
        for (to, tunnelled) in [(&net.c, false), (&far, true)] {
            let wire = Sniffer::start(net.node(1).netns(), "eth0")?;
            both_ways(net, &net.a, to)?;
            let capture = wire.stop();
            ensure!(in_tunnel(&capture) == tunnelled, "to {}, in the tunnel: {}", to.name(), !tunnelled);
            ensure!(plain(&capture, to) != tunnelled, "to {}, by plain routes: {tunnelled}", to.name());
            capture.verify_checksums()?;
        }
        transfers(net)?;
        for address in far.addresses() {
            transfer(&net.a, SocketAddr::new(*address, PORT))?;
        }
        // What the maps hold is what the node does when the agent is dead, and what the next agent finds.
        net.node(1).kill_agent()?;
        for to in [&net.c, &far] {
            talk(&net.a, to, to.addresses())?;
            talk(to, &net.a, net.a.addresses())?;
        }
        net.node(1).spawn_agent(&[])?;
        net.node(1).wait_ready()?;
        both_ways(net, &net.a, &net.c)?;
        both_ways(net, &net.a, &far)
    })
}

/// Each calls the other, and a service of the other.
fn both_ways(net: &Net, one: &Pod, other: &Pod) -> Result<()> {
    for (from, to) in [(one, other), (other, one)] {
        talk(from, to, to.addresses())?;
        let service = net.service(endpoints(&[to]))?;
        for target in service.targets() {
            answered(from, to, target)?;
        }
    }
    Ok(())
}

fn talk(from: &Pod, to: &Pod, addresses: &[IpAddr]) -> Result<()> {
    addresses.iter().try_for_each(|address| answered(from, to, SocketAddr::new(*address, PORT)))
}

/// By this pod, which sees the other's own address.
fn answered(from: &Pod, by: &Pod, target: SocketAddr) -> Result<()> {
    for proto in Proto::ALL {
        let answers = ask(from.netns(), proto, target, 2)?;
        answers.only_by(&[by.name()])?;
        answers.only_as(from.address_like(target.ip())?)?;
    }
    Ok(())
}

fn in_tunnel(capture: &Capture) -> bool {
    capture.frames().iter().filter_map(Frame::headers).any(|h| h.dport == check::VXLAN_PORT)
}

fn plain(capture: &Capture, pod: &Pod) -> bool {
    capture.frames().iter().filter_map(Frame::headers).any(|h| pod.addresses().contains(&h.dst))
}
