//! nf_conntrack, where a firewall or kubelet's rules switch it on: packets of the tunnel leave no entries there, or few.

use super::{DEVICE, FEW, REQUESTS, introduce_nodes, over, requests};
use crate::fixture::Net;
use anyhow::{Context, Result, ensure};
use rustnet_agent::net::overlay::SOURCE_PORTS;
use std::net::SocketAddr;
use testkit::client::ask;
use testkit::pod::PORT;
use testkit::{Node, Proto};

/// A firewall whose rules look at the state of connections: the kernel tracks all that goes up and
/// down the host's stack.
fn track(node: &Node) -> Result<()> {
    node.netns().exec("nft", &["add table inet watch"])?;
    for hook in ["input", "output"] {
        node.netns()
            .exec("nft", &[&format!("add chain inet watch {hook} {{ type filter hook {hook} priority 0; }}")])?;
        node.netns().exec("nft", &[&format!("add rule inet watch {hook} ct state new counter")])?;
    }
    Ok(())
}

/// Tunnels in the nodes' tables, each by its five numbers.
fn tracked_tunnels(net: &Net) -> Result<usize> {
    let mut count = 0;
    for node in net.fabric.nodes() {
        let table = node.netns().exec("cat", &["/proc/net/nf_conntrack"]);
        let table = table.context("no table of nf_conntrack: is CONFIG_NF_CONNTRACK_PROCFS in the kernel?")?;
        count += table.lines().filter(|line| line.contains(" dport=8472 ")).count();
    }
    Ok(count)
}

/// How many tunnels some hundred connections add.
fn tunnels_of_connections(net: &Net) -> Result<usize> {
    let before = tracked_tunnels(net)?;
    requests(net, Proto::Tcp)?;
    Ok(tracked_tunnels(net)?.saturating_sub(before))
}

pub fn connections_between_pods_leave_no_tunnels_in_nf_conntrack(net: &Net) -> Result<()> {
    net.fabric.nodes().iter().try_for_each(track)?;
    introduce_nodes(net)?;
    let added = tunnels_of_connections(net)?;
    ensure!(added as u64 <= FEW, "{added} tunnels are tracked");
    Ok(())
}

/// An error unless the kernel tracks tunnels, and on each node no more than those of the device's source ports, to the other node and
/// from it. Each connection had one of its own otherwise.
fn are_no_more_than_ports(added: usize) -> Result<()> {
    let most = 2 * 2 * SOURCE_PORTS.len();
    ensure!(added as u64 > FEW && added <= most, "{added} tunnels are tracked, {most} at most");
    Ok(())
}

/// What the test above relies on, too: the kernel tracks.
#[test]
fn connections_between_pods_leave_few_tunnels_in_nf_conntrack_by_the_device() -> Result<()> {
    over(false, DEVICE, |net| {
        net.fabric.nodes().iter().try_for_each(track)?;
        are_no_more_than_ports(tunnels_of_connections(net)?)
    })
}

/// A node's own connections take the device, whatever the setting.
#[test]
fn connections_of_a_node_leave_few_tunnels_in_nf_conntrack() -> Result<()> {
    over(false, &[], |net| {
        net.fabric.nodes().iter().try_for_each(track)?;
        let before = tracked_tunnels(net)?;
        for ip in net.c.addresses() {
            let answers = ask(net.node(1).netns(), Proto::Tcp, SocketAddr::new(*ip, PORT), REQUESTS)?;
            answers.all_answered()?;
        }
        are_no_more_than_ports(tracked_tunnels(net)?.saturating_sub(before))
    })
}
