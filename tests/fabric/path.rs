//! What lies between: hop limits, path MTU, fragments, narrow links.

use crate::fixture::{Net, endpoints, in_each_routing, narrow, observed, world};
use anyhow::{Result, bail, ensure};
use std::net::SocketAddr;
use testkit::client::{Connection, ask_sized};
use testkit::icmp::{Ping, Reply, TIME_EXCEEDED};
use testkit::pod::PORT;
use testkit::{Pod, Proto, Routing, Setup};

in_each_routing!(
    a_traceroute_between_pods_finds_the_node,
    large_transfers_arrive,
    large_datagrams_arrive_in_fragments,
    a_packet_too_big_for_the_pods_link_is_reported,
);

/// The first hop of a pod is its node: where redirects bypass the kernel, the datapath itself must answer.
fn a_traceroute_between_pods_finds_the_node(net: &Net) -> Result<()> {
    for to in [&net.b, &net.c] {
        for address in to.addresses() {
            let reply = Ping { ttl: 1, ..Ping::default() }.send(net.a.netns(), *address)?;
            let Reply::Error { from, kind, code: 0, .. } = reply else { bail!("to {address}: {reply:?}") };
            ensure!(TIME_EXCEEDED.contains(&kind), "to {address}: {reply:?}");
            ensure!(from == net.node(1).address_like(*address), "the hop is not the node's: {reply:?}");
            let reply = Ping { ttl: 4, ..Ping::default() }.send(net.a.netns(), *address)?;
            ensure!(matches!(reply, Reply::Echo { .. }), "to {address}: {reply:?}");
        }
    }
    Ok(())
}

/// A megabyte each way.
pub fn transfer(from: &Pod, target: SocketAddr) -> Result<()> {
    let mut connection = Connection::open_in(from.netns(), target)?;
    connection.upload(1 << 20)?;
    connection.download(1 << 20)?;
    Ok(())
}

pub fn transfers(net: &Net) -> Result<()> {
    for pod in [&net.b, &net.c] {
        let service = net.service(endpoints(&[pod]))?;
        for address in pod.addresses() {
            transfer(&net.a, SocketAddr::new(*address, PORT))?;
            transfer(&net.a, service.target_like(*address))?;
        }
    }
    for address in world().into_iter().chain(net.node(2).addresses()) {
        transfer(&net.a, SocketAddr::new(address, PORT))?;
    }
    Ok(())
}

fn large_transfers_arrive(net: &Net) -> Result<()> {
    transfers(net)
}

fn large_datagrams_arrive_in_fragments(net: &Net) -> Result<()> {
    for pod in [&net.b, &net.c] {
        let service = net.service(endpoints(&[pod]))?;
        for address in pod.addresses() {
            let direct = SocketAddr::new(*address, PORT);
            for target in [direct, service.target_like(*address)] {
                let answers = ask_sized(net.a.netns(), Proto::Udp, target, 5, 8000)?;
                answers.only_by(&[pod.name()])?;
                answers.only_as(net.a.address_like(*address)?)?;
            }
        }
    }
    for address in world() {
        ask_sized(net.a.netns(), Proto::Udp, SocketAddr::new(address, PORT), 5, 8000)?.only_by(&["world"])?;
    }
    Ok(())
}

/// A pod whose own link is too wide hears what fits between the nodes (RFC 1191, RFC 4443).
fn a_packet_too_big_for_the_pods_link_is_reported(net: &Net) -> Result<()> {
    let wide = net.node(1).add_pod("wide")?;
    let host_side = wide.host_interface()?;
    net.node(1).netns().ip(&format!("link set {host_side} mtu 4000\n"))?;
    wide.exec("ip", &["link", "set", "eth0", "mtu", "4000"])?;
    for address in net.c.addresses() {
        let ping = Ping { size: 2000, dont_fragment: true, ..Ping::default() };
        let reply = ping.send(wide.netns(), *address)?;
        let Reply::Error { kind, rest, .. } = reply else { bail!("to {address}: {reply:?}") };
        let too_big = if address.is_ipv4() { 3 } else { 2 };
        ensure!(kind == too_big, "to {address}: {reply:?}");
        ensure!((1280..=1500).contains(&(rest & 0xffff)), "to {address}: MTU {}", rest & 0xffff);
    }
    Ok(())
}

#[test]
fn a_narrow_core_lets_everything_through_vxlan() -> Result<()> {
    observed(&Net::start(narrow())?, transfers)
}

/// Here a router between the nodes says what fits, and its words are for the pods: to the address that they called.
#[test]
fn a_narrow_core_lets_everything_through_native_routes() -> Result<()> {
    observed(&Net::start(Setup { routing: Routing::Native, ..narrow() })?, |net| {
        transfers(net)?;
        large_datagrams_arrive_in_the_end(net)
    })
}

/// Datagrams that fit into the pods' links alone.
fn large_datagrams_arrive_in_the_end(net: &Net) -> Result<()> {
    let service = net.service(endpoints(&[&net.c]))?;
    let pods = net.c.addresses().iter().copied();
    for target in pods.chain(world()).map(|ip| SocketAddr::new(ip, PORT)).chain(service.targets()) {
        // The error for a datagram comes too late for that datagram.
        let _ = ask_sized(net.a.netns(), Proto::Udp, target, 2, 8000)?;
        ask_sized(net.a.netns(), Proto::Udp, target, 5, 8000)?.all_answered()?;
    }
    Ok(())
}

/// No router fragments IPv6, and the kernel's tunnel drops what does not fit without a word: the programs tell the pods.
fn narrow_over_ipv6(agent: &'static [&'static str]) -> Result<()> {
    observed(&Net::start(Setup { ipv6_first: true, agent, ..narrow() })?, |net| {
        transfers(net)?;
        large_datagrams_arrive_in_the_end(net)
    })
}

#[test]
fn a_narrow_core_lets_everything_through_vxlan_over_ipv6() -> Result<()> {
    narrow_over_ipv6(&["--overlay-path", "programs"])
}

#[test]
fn a_narrow_core_lets_everything_through_vxlan_over_ipv6_by_the_device() -> Result<()> {
    narrow_over_ipv6(&["--overlay-path", "device"])
}

#[test]
fn an_overlay_over_ipv6_carries_everything() -> Result<()> {
    observed(&Net::start(Setup { ipv6_first: true, ..Setup::default() })?, |net| {
        transfers(net)?;
        large_datagrams_arrive_in_fragments(net)
    })
}

#[test]
fn jumbo_links_are_used() -> Result<()> {
    observed(&Net::start(Setup { mtu: 9000, ..Setup::default() })?, |net| {
        let link = net.a.exec("ip", &["-o", "link", "show", "eth0"])?;
        ensure!(link.contains("mtu 8950"), "{link}");
        transfers(net)
    })
}
