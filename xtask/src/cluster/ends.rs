//! Two pods for the benchmark, one a node, and a file that tells its program where they and their nodes are.

use std::fs;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::layout::{Cluster, Node};
use super::pods;
use super::settings::{Both, Family, Network, Settings};

/// Starts the pods; returns the file.
pub fn start(cluster: &Cluster) -> Result<PathBuf> {
    let settings = &cluster.settings;
    ensure!(
        settings.network == Network::Rustnet && settings.ip_family == Family::Dual && settings.nodes >= 2,
        "{settings}: the benchmark wants rustnet, both families and two nodes"
    );
    let manifest = cluster.dir.join("ends.yaml");
    fs::write(&manifest, include_str!("ends.yaml"))?;
    cluster.ask(&["apply", "-f", &manifest.display().to_string()])?;
    cluster.ask(&["--namespace=bench", "rollout", "status", "daemonset/end", "--timeout=120s"])?;
    let nodes = cluster.nodes();
    let places = nodes.iter().take(2).map(|node| place(cluster, node)).collect::<Result<Vec<_>>>()?;
    // The place of an image on this machine is nothing for a table.
    let shown = Settings { image: None, ..settings.clone() };
    let text = json!({"cluster": shown.to_string(), "routing": settings.routing.word(), "nodes": places});
    let file = cluster.dir.join("ends.json");
    fs::write(&file, text.to_string())?;
    Ok(file)
}

/// Removes the pods.
pub fn remove(cluster: &Cluster) -> Result<()> {
    cluster.ask(&["delete", "namespace", "bench", "--ignore-not-found", "--timeout=120s"]).map(drop)
}

/// A node and its pod.
fn place(cluster: &Cluster, node: &Node) -> Result<Value> {
    let pod = pods::find(cluster, "bench", "end", node)?;
    let Both { v4, v6 } = node.address();
    Ok(json!({
        "name": node.name,
        "netns": cluster.netns_file(&node.name),
        "addresses": [v4, v6],
        "pod": {"netns": pod.netns, "addresses": pod.addresses},
    }))
}
