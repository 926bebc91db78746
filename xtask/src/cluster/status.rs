//! `status`: what runs of a cluster, what does not, and what that said last.

use anyhow::{Result, bail};

use super::components::{self, Component};
use super::layout::Cluster;
use super::network;
use super::process::{Processes, tail};
use super::settings::Network;
use crate::cmd::Cmd;

/// The command; an error when something does not work.
#[expect(clippy::print_stdout, reason = "this is the command's result")]
pub fn run(name: &str) -> Result<()> {
    let Some(cluster) = Cluster::find(name)? else { bail!("there is no cluster\n  remedy: cargo xtask cluster up") };
    println!("{}\n", cluster.settings);
    let mut lame = 0;
    for component in all(&cluster)? {
        let state = match (Processes::of(&cluster).find(&component.name), component.is_ready(&cluster)) {
            (Some(_), true) => "ready",
            (Some(_), false) => "runs, is not ready",
            (None, _) => "does not run",
        };
        lame += usize::from(state != "ready");
        println!("{:<26} {state}", component.name);
        if state != "ready" {
            print!("{}", Processes::of(&cluster).tail(&component.name));
        }
    }
    println!();
    let nodes = cluster.kubectl()?.args(["get", "nodes", "-o", "wide"]).status()?;
    let pods = cluster.kubectl()?.args(["get", "pods", "--all-namespaces", "-o", "wide"]).status()?;
    println!("\nexport KUBECONFIG={}", cluster.kubeconfig("admin"));
    if lame > 0 || !nodes.success() || !pods.success() {
        bail!("{lame} components are not ready");
    }
    Ok(())
}

/// Why a cluster does not become ready, as far as pods and logs tell.
pub fn trouble(cluster: &Cluster) -> String {
    let mut text = String::new();
    let mut show = |title: &str, command: Result<Cmd>| {
        let output = command.and_then(|command| command.capture()).unwrap_or_else(|error| format!("{error:#}"));
        let lines: Vec<&str> = output.lines().collect();
        let last = &lines[lines.len().saturating_sub(20)..];
        text.extend(["  ", title, ":\n    ", &last.join("\n    "), "\n"]);
    };
    let kubectl = |args: &[&str]| cluster.kubectl().map(|kubectl| kubectl.args(args));
    show("pods", kubectl(&["get", "pods", "--all-namespaces", "-o", "wide"]));
    show(
        "warnings",
        kubectl(&["get", "events", "--all-namespaces", "--field-selector=type=Warning", "--sort-by=.lastTimestamp"]),
    );
    if cluster.settings.network == Network::Rustnet {
        let agents =
            ["logs", "--namespace=rustnet-system", "daemonset/rustnet-agent", "--all-pods", "--tail=10", "--prefix"];
        show("agents", kubectl(&agents));
    }
    for node in cluster.nodes() {
        let log = Processes::of(cluster).log(&format!("{}.kubelet", node.name));
        text.extend(["  ", &log.display().to_string(), ":\n", &tail(&log, 5)]);
    }
    text
}

/// Every component of a cluster.
fn all(cluster: &Cluster) -> Result<Vec<Component>> {
    let mut all = vec![
        components::etcd(cluster)?,
        components::apiserver(cluster)?,
        components::controller_manager(cluster)?,
        components::scheduler(cluster)?,
    ];
    for node in cluster.nodes() {
        all.push(components::containerd(cluster, &node)?);
        all.push(components::kubelet(cluster, &node)?);
    }
    all.extend(network::components(cluster)?);
    Ok(all)
}
