//! `down`: removes a cluster, and says what it could not remove.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::layout::Cluster;
use super::process::Processes;
use super::settings::Settings;
use super::{cgroup, node, wires};
use crate::ui;

/// The command. It goes on after each failure, and reports at the end what is left.
pub fn run(name: &str, fallback: Settings) -> Result<()> {
    let found = Cluster::find(name)?;
    let present = found.is_some();
    let cluster = found.unwrap_or_else(|| Cluster::new(name, fallback));
    let mut failures = Vec::new();
    let mut note = |result: Result<()>| failures.extend(result.err().map(|error| format!("{error:#}")));
    let processes = Processes::of(&cluster);
    // kubelets first, or they would start again what is ended.
    for node in cluster.nodes() {
        note(processes.end(&format!("{}.kubelet", node.name)));
    }
    for node in cluster.nodes() {
        note(node::stop(&cluster, &node));
    }
    for name in processes.names() {
        note(processes.end(&name));
    }
    note(wires::remove(&cluster));
    for node in cluster.nodes() {
        note(cgroup::remove(&cluster.cgroup(&node)));
    }
    let left = left(&cluster);
    if !left.is_empty() || !failures.is_empty() {
        bail!("something is left of the cluster:\n  {}", [failures, left].concat().join("\n  "));
    }
    remove_dir(&cluster.dir)?;
    ui::step(if present { "the cluster is gone" } else { "there was no cluster" });
    Ok(())
}

/// What a stopped cluster must not leave: namespaces, mounts, control groups, processes.
fn left(cluster: &Cluster) -> Vec<String> {
    let mut left: Vec<String> =
        wires::all(&cluster.name).iter().map(|name| format!("network namespace {name}")).collect();
    left.extend(mounts(&cluster.dir).iter().map(|mount| format!("mount {}", mount.display())));
    for node in cluster.nodes() {
        left.extend(
            cgroup::left(&cluster.cgroup(&node)).iter().map(|group| format!("control group {}", group.display())),
        );
    }
    left.extend(Processes::of(cluster).names().iter().map(|name| format!("process {name}")));
    left
}

/// Mount points at and below a directory.
fn mounts(dir: &Path) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(PathBuf::from);
    points.filter(|point| point.starts_with(dir)).collect()
}

/// Only when nothing is mounted there: it would be emptied, too.
fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", dir.display()))
        }
        _ => Ok(()),
    }
}
