//! Nodes that reboot, come and go while the others run on.

use std::fs;

use anyhow::{Context, Result, ensure};

use super::layout::{Cluster, Node};
use super::process::Processes;
use super::{cgroup, node, up, wires};
use crate::ui;

/// Ends everything on a node at once and starts it again: of what it had, only what is on its disk is left.
pub fn reboot(cluster: &Cluster, node: &Node) -> Result<()> {
    ui::step(&format!("rebooting {}", node.name));
    halt(cluster, node)?;
    up::complete(cluster)
}

/// Gives the cluster this many nodes; the last ones go. Returns the cluster as it is then.
pub fn scale(cluster: &Cluster, nodes: u8) -> Result<Cluster> {
    let mut new = cluster.clone();
    new.settings.nodes = nodes;
    for node in cluster.nodes().iter().filter(|node| node.number > nodes) {
        ui::step(&format!("removing {}", node.name));
        // Its kubelet would register it again.
        halt(cluster, node)?;
        cluster.ask(&["delete", "node", &node.name, "--ignore-not-found"])?;
        cgroup::remove(&cluster.cgroup(node))?;
        fs::remove_dir_all(cluster.node_dir(node)).with_context(|| format!("removing the files of {}", node.name))?;
    }
    new.keep()?;
    if nodes > cluster.settings.nodes {
        ui::step(&format!("adding nodes up to {nodes}"));
        up::complete(&new)?;
    }
    Ok(new)
}

/// As by its power switch.
fn halt(cluster: &Cluster, node: &Node) -> Result<()> {
    let processes = Processes::of(cluster);
    // The kubelet first, or it would start again what is ended.
    let own = |name: &String| name.strip_prefix(&node.name).is_some_and(|rest| rest.starts_with('.'));
    processes.end(&format!("{}.kubelet", node.name))?;
    node::stop(cluster, node)?;
    for name in processes.names().iter().filter(|name| own(name)) {
        processes.end(name)?;
    }
    wires::unplug(cluster, &node.name)?;
    ensure!(node::init(cluster, node).is_none(), "{} does not end", node.name);
    Ok(())
}
