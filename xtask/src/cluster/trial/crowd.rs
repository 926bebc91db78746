//! A hundred pods at once on one node: each gets addresses of its own and is reached, and when they are gone nothing is left.

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::PATIENCE;
use crate::cluster::layout::{Cluster, Node};
use crate::cluster::{node, wait};
use crate::ui;

const PODS: usize = 100;

/// Returns what to tell of it.
pub fn run(cluster: &Cluster) -> Result<String> {
    let node = cluster.nodes().into_iter().next().context("no node")?;
    let before = interfaces(cluster, &node)?;
    let file = cluster.dir.join("crowd.yaml");
    fs::write(&file, manifest(&node))?;
    let start = Instant::now();
    cluster.ask(&["apply", "-f", &file.display().to_string()])?;
    cluster.ask(&["--namespace=crowd", "rollout", "status", "deployment/crowd", "--timeout=600s"])?;
    let made = start.elapsed();
    let addresses = addresses(cluster)?;
    let families = if addresses.iter().any(IpAddr::is_ipv4) && addresses.iter().any(IpAddr::is_ipv6) { 2 } else { 1 };
    ensure!(addresses.len() == PODS * families, "{} addresses of {PODS} pods", addresses.len());
    for address in &addresses {
        let ping = ["ping", "-n", "-c", "1", "-W", "10", &address.to_string()];
        node::command(cluster, &node)?.args(ping).capture().with_context(|| format!("{address} is not reached"))?;
    }
    let start = Instant::now();
    cluster.ask(&["delete", "namespace", "crowd", "--timeout=600s"])?;
    let gone = start.elapsed();
    let left = || interfaces(cluster, &node).is_ok_and(|now| now == before);
    ensure!(wait::until(PATIENCE, left), "{:?}, and before {before:?}", interfaces(cluster, &node)?);
    Ok(format!(
        "{PODS} pods on {} ready after {}, each reached by its {families} addresses; all gone after {}",
        node.name,
        ui::seconds(made),
        ui::seconds(gone)
    ))
}

/// Distinct ones.
fn addresses(cluster: &Cluster) -> Result<BTreeSet<IpAddr>> {
    let format = "jsonpath={range .items[*]}{range .status.podIPs[*]}{.ip} {end}{end}";
    let text = cluster.ask(&["--namespace=crowd", "get", "pods", "-o", format])?;
    text.split_whitespace().map(str::parse).collect::<Result<_, _>>().map_err(Into::into)
}

/// The pods' links on a node, and what rustnet knows of them.
fn interfaces(cluster: &Cluster, node: &Node) -> Result<(usize, usize)> {
    let links = node::command(cluster, node)?.args(["ip", "-o", "link"]).capture()?;
    let records = node::command(cluster, node)?.args(["ls", "/run/rustnet/endpoints"]).capture()?;
    Ok((links.lines().filter(|line| line.contains(": rnv")).count(), records.lines().count()))
}

fn manifest(node: &Node) -> String {
    format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{name: crowd}}\n---\n\
         apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: crowd, namespace: crowd}}\nspec:\n  \
           replicas: {PODS}\n  progressDeadlineSeconds: 600\n  selector: {{matchLabels: {{app: crowd}}}}\n  \
           template:\n    metadata: {{labels: {{app: crowd}}}}\n    spec:\n      nodeName: {}\n      \
               terminationGracePeriodSeconds: 0\n      \
               containers: [{{name: pause, image: \"registry.k8s.io/pause:3.10\"}}]\n",
        node.name
    )
}
