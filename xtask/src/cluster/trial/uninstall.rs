//! The removal of rustnet from a cluster, and the look at what is left.

use anyhow::{Result, ensure};

use crate::cluster::layout::{Cluster, Node};
use crate::cluster::network::rustnet;
use crate::cluster::node;

/// Removes the agents, then what they left on every node, then the objects; an error if anything stays. Returns what to tell.
pub fn run(cluster: &Cluster) -> Result<String> {
    let system = "--namespace=rustnet-system";
    cluster.ask(&[
        system,
        "delete",
        "daemonset/rustnet-agent",
        "--ignore-not-found",
        "--wait",
        "--cascade=foreground",
    ])?;
    let overlay = rustnet::uninstall(cluster)?.display().to_string();
    cluster.ask(&["apply", "-k", &overlay])?;
    cluster.ask(&[system, "rollout", "status", "daemonset/rustnet-cleanup", "--timeout=120s"])?;
    for node in cluster.nodes() {
        let left = left(cluster, &node)?;
        ensure!(left.is_empty(), "left on {}:\n{left}", node.name);
    }
    cluster.ask(&["delete", "-k", &overlay, "--wait=false"])?;
    cluster.ask(&["delete", "namespace", "rustnet-system", "--wait=false"])?;
    for object in [
        "clusterrole/rustnet-agent",
        "clusterrolebinding/rustnet-agent",
        "validatingadmissionpolicybinding/rustnet-agent-own-node",
        "validatingadmissionpolicy/rustnet-agent-own-node",
    ] {
        cluster.ask(&["delete", object])?;
    }
    Ok(format!("nothing is left on {} nodes", cluster.settings.nodes))
}

/// Pins, devices, routes, hooks on the uplink, files: one line each. The empty run directory stays, for it is mounted.
fn left(cluster: &Cluster, node: &Node) -> Result<String> {
    let script = "ls -d /sys/fs/bpf/* /run/rustnet/* /opt/cni/bin/* /etc/cni/net.d/* 2>/dev/null | grep -v '\\.debug$'
        ip -o link | grep -E ' (rn_|rnv)'
        ip -4 route show proto 114; ip -6 route show proto 114
        ls -A /etc/cni/net.d /opt/cni/bin | grep -v -e : -e '^$'
        true";
    node::command(cluster, node)?.args(["sh", "-c", script]).capture()
}
