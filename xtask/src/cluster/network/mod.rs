//! What gives pods their network: one of several, each with the same three moments.

mod reference;
pub mod rustnet;

use anyhow::Result;

use super::components::Component;
use super::layout::{Cluster, Node};
use super::settings::Network;
use super::wires::ip;

/// Before the nodes start: whatever has to be built.
pub fn prepare(cluster: &Cluster) -> Result<()> {
    match cluster.settings.network {
        Network::Rustnet => rustnet::prepare(cluster),
        Network::Reference | Network::None => Ok(()),
    }
}

/// Once containerd runs on every node: image files to load there.
pub fn images(cluster: &Cluster) -> Vec<std::path::PathBuf> {
    match cluster.settings.network {
        Network::Rustnet => vec![rustnet::image(cluster)],
        Network::Reference | Network::None => Vec::new(),
    }
}

/// Once the nodes are known and have their pod ranges.
pub fn install(cluster: &Cluster) -> Result<()> {
    // The API server calls pods by their addresses. It is no node, and has no agent.
    for peer in peers(cluster)? {
        for (range, gateway) in peer.ranges.iter().zip(&peer.addresses) {
            let family = if range.contains(':') { "-6" } else { "-4" };
            ip(&["-n", &cluster.netns("cp"), family, "route", "replace", range, "via", gateway])?;
        }
    }
    match cluster.settings.network {
        Network::Rustnet => rustnet::install(cluster),
        Network::Reference => reference::install(cluster),
        Network::None => Ok(()),
    }
}

/// The network's own programs in addition to those of every cluster; rustnet has none: it runs in
/// pods.
pub fn components(cluster: &Cluster) -> Result<Vec<Component>> {
    match cluster.settings.network {
        Network::Reference => cluster.nodes().iter().map(|node| reference::kube_proxy(cluster, node)).collect(),
        Network::Rustnet | Network::None => Ok(Vec::new()),
    }
}

/// A node as others need to know it; ranges and addresses in the same order of families.
struct Peer {
    node: Node,
    addresses: Vec<String>,
    ranges: Vec<String>,
}

fn peers(cluster: &Cluster) -> Result<Vec<Peer>> {
    let of = |node: Node| {
        let ranges = cluster.ask(&["get", "node", &node.name, "-o", "jsonpath={.spec.podCIDRs[*]}"])?;
        let ranges = ranges.split_whitespace().map(str::to_owned).collect();
        Ok(Peer { addresses: node.address().of(cluster.settings.ip_family), ranges, node })
    };
    cluster.nodes().into_iter().map(of).collect()
}
