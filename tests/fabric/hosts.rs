//! Hosts and pods: probes, pods that talk to nodes, and the world, which sees a node's address.

use crate::fixture::{Net, endpoints, in_each_routing, world};
use anyhow::{Result, ensure};
use std::net::SocketAddr;
use testkit::Proto;
use testkit::client::ask;
use testkit::icmp::reachable;
use testkit::pod::PORT;

in_each_routing!(
    a_host_reaches_its_own_pods,
    a_host_reaches_pods_of_another_node,
    a_kubelet_probe_gets_its_answer,
    a_pod_reaches_its_own_node,
    a_pod_reaches_another_node,
    the_world_sees_the_nodes_address,
    the_world_cannot_reach_pods_by_a_connection_of_its_own,
    nodes_reach_each_other,
    the_first_packet_to_a_service_waits_for_the_nodes_neighbour_and_goes_there,
);

fn a_host_reaches_its_own_pods(net: &Net) -> Result<()> {
    for address in net.a.addresses() {
        reachable(net.node(1).netns(), *address)?;
        for proto in Proto::ALL {
            let answers = ask(net.node(1).netns(), proto, SocketAddr::new(*address, PORT), 5)?;
            answers.only_by(&["a"])?;
            answers.only_as(net.node(1).address_like(*address))?;
        }
    }
    Ok(())
}

fn a_host_reaches_pods_of_another_node(net: &Net) -> Result<()> {
    for address in net.c.addresses() {
        reachable(net.node(1).netns(), *address)?;
        for proto in Proto::ALL {
            let answers = ask(net.node(1).netns(), proto, SocketAddr::new(*address, PORT), 5)?;
            answers.only_by(&["c"])?;
            answers.only_as(net.node(1).address_like(*address))?;
        }
    }
    Ok(())
}

fn a_kubelet_probe_gets_its_answer(net: &Net) -> Result<()> {
    for address in net.a.addresses() {
        let answer = net.node(1).http_get(SocketAddr::new(*address, PORT), "/healthz")?;
        ensure!(answer.starts_with("HTTP/1.1 200") && answer.contains("\na "), "{answer}");
    }
    Ok(())
}

fn a_pod_reaches_its_own_node(net: &Net) -> Result<()> {
    reach_node(net, 1)
}

fn a_pod_reaches_another_node(net: &Net) -> Result<()> {
    reach_node(net, 2)
}

fn reach_node(net: &Net, n: usize) -> Result<()> {
    let node = net.node(n);
    for address in node.addresses() {
        reachable(net.a.netns(), address)?;
        for proto in Proto::ALL {
            let answers = ask(net.a.netns(), proto, SocketAddr::new(address, PORT), 5)?;
            answers.only_by(&[node.name()])?;
            answers.only_as(net.a.address_like(address)?)?;
        }
    }
    Ok(())
}

fn the_world_sees_the_nodes_address(net: &Net) -> Result<()> {
    for pod in [&net.a, &net.c] {
        for address in world() {
            reachable(pod.netns(), address)?;
            for proto in Proto::ALL {
                let answers = ask(pod.netns(), proto, SocketAddr::new(address, PORT), 10)?;
                answers.only_by(&["world"])?;
                answers.only_as(pod.node().address_like(address))?;
            }
        }
    }
    Ok(())
}

/// The world has no route to pods; a packet to a node's address at a pod's port is the node's, not the pod's.
fn the_world_cannot_reach_pods_by_a_connection_of_its_own(net: &Net) -> Result<()> {
    for address in net.node(1).addresses() {
        ask(net.fabric.world(), Proto::Tcp, SocketAddr::new(address, PORT), 3)?.only_by(&["n1"])?;
    }
    Ok(())
}

fn nodes_reach_each_other(net: &Net) -> Result<()> {
    for address in net.node(2).addresses() {
        reachable(net.node(1).netns(), address)?;
        for proto in Proto::ALL {
            let answers = ask(net.node(1).netns(), proto, SocketAddr::new(address, PORT), 5)?;
            answers.only_by(&["n2"])?;
            answers.only_as(net.node(1).address_like(address))?;
        }
    }
    Ok(())
}

/// The kernel sends what waited for a neighbour by the packet's own route (`neigh_update`). For a host's packet to a Service that is
/// the route to the Service's address, by the default gateway, which has no route to pods.
fn the_first_packet_to_a_service_waits_for_the_nodes_neighbour_and_goes_there(net: &Net) -> Result<()> {
    let service = net.service(endpoints(&[&net.c]))?;
    let host = net.node(1).netns();
    for target in service.targets() {
        for proto in Proto::ALL {
            let family = if target.is_ipv4() { "-4" } else { "-6" };
            host.exec("ip", &[family, "neigh", "flush", "dev", "eth0"])?;
            ask(host, proto, target, 1)?.only_by(&["c"])?;
        }
    }
    Ok(())
}
