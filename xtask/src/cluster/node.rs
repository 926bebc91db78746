//! A node: mount, process, UTS and IPC namespaces in addition to its network namespace, and control
//! groups of its own. Made here, furnished from within by [`super::init`], which is its process 1.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::unistd::Pid;

use super::layout::{Cluster, Node};
use super::process::Processes;
use super::{cgroup, wait};
use crate::cmd::Cmd;

/// How long furnishing may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// Starts the namespaces of a node unless they are there.
pub fn start(cluster: &Cluster, node: &Node) -> Result<()> {
    let processes = Processes::of(cluster);
    let (name, ready) = (record(node), ready(cluster, node));
    if processes.find(&name).is_some() && ready.exists() {
        return Ok(());
    }
    cgroup::make(&cluster.cgroup(node))?;
    let _ = std::fs::remove_file(&ready); // that of an earlier life
    let this = std::env::current_exe().context("cannot tell where this program is")?.display().to_string();
    let netns = format!("--net={}", cluster.netns_file(&node.name).display());
    let namespaces = ["unshare", "-m", "-u", "-i", "-p", "--fork", "--kill-child", "--propagation", "private"];
    let init = [&this, "cluster", "--name", &cluster.name, "node-init", &node.name];
    let argv = [&["nsenter", &netns][..], &namespaces, &init].concat();
    processes.start(&name, &argv.iter().map(ToString::to_string).collect::<Vec<_>>())?;
    let over = || processes.find(&name).is_none();
    if !wait::until(PATIENCE, || ready.exists() || over()) || over() {
        bail!("node {} did not start; the last it said:\n{}", node.name, processes.tail(&name));
    }
    Ok(())
}

/// Ends everything in a node and removes what it had of the machine, except its files.
pub fn stop(cluster: &Cluster, node: &Node) -> Result<()> {
    let processes = Processes::of(cluster);
    // The end of process 1 is the end of all others, shims and containers too.
    if let Some(init) = init(cluster, node) {
        let _ = nix::sys::signal::kill(init, nix::sys::signal::Signal::SIGKILL);
    }
    processes.end(&record(node))
}

/// Process 1 of a node, as this machine numbers it.
pub fn init(cluster: &Cluster, node: &Node) -> Option<Pid> {
    Processes::of(cluster).child(&record(node))
}

/// The words before a command that make it run in all namespaces of a node, among its daemons.
pub fn enter(cluster: &Cluster, node: &Node) -> Result<Vec<String>> {
    let init = init(cluster, node).with_context(|| format!("node {} does not run", node.name))?;
    let mut words = Vec::new();
    if let Some(group) = cgroup::daemons(&cluster.cgroup(node)) {
        let join = r#"echo 0 > "$0" && exec "$@""#;
        words.extend(["sh", "-c", join].map(str::to_owned));
        words.push(group.display().to_string());
    }
    words.extend(["nsenter", "-m", "-u", "-i", "-n", "-p", "-t"].map(str::to_owned));
    words.extend([init.to_string(), "--".to_owned()]);
    Ok(words)
}

/// A command in a node.
pub fn command(cluster: &Cluster, node: &Node) -> Result<Cmd> {
    let words = enter(cluster, node)?;
    let (first, rest) = words.split_first().context("no command")?;
    Ok(Cmd::new(first).args(rest))
}

/// The node's file system as this machine sees it.
pub fn root(cluster: &Cluster, node: &Node) -> Result<PathBuf> {
    let init = init(cluster, node).with_context(|| format!("node {} does not run", node.name))?;
    Ok(PathBuf::from(format!("/proc/{init}/root")))
}

/// The file by which process 1 says that all is in place.
pub fn ready(cluster: &Cluster, node: &Node) -> PathBuf {
    cluster.node_dir(node).join("ready")
}

fn record(node: &Node) -> String {
    format!("{}.namespaces", node.name)
}
