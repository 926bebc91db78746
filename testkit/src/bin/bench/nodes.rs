//! An agent in a cluster of thousands of Nodes whose kubelets report, fed by an API server that has nothing else.

use crate::api::{Changes, NODES, Objects, Server};
use crate::control::{Memory, cpu_seconds};
use crate::stats::verdict;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant};
use testkit::{Fabric, wait};

/// Nodes that the goals speak of.
pub const FULL: u32 = 5000;
/// A kubelet reports so often if nothing has changed (`nodeStatusReportFrequency`).
const REPORT: Duration = Duration::from_mins(5);
/// Images that a kubelet lists in each report (`nodeStatusMaxImages`).
const IMAGES: u32 = 50;
/// Share of a core, in per cent, and MiB.
const GOALS: (f64, f64) = (2.0, 60.0);

/// Measures for some time and prints.
pub fn run(fabric: &Fabric, nodes: u32, time: Duration) -> Result<()> {
    let node = fabric.node(1);
    let server = Server::start(node, Arc::new(Nodes(nodes)))?;
    let start = Instant::now();
    node.spawn_agent(&["--kubeconfig", &server.kubeconfig()])?;
    let maps = || node.rustnetctl(&["peers", "-o", "json"]);
    wait::until_deadline("all Nodes in the maps", Duration::from_mins(5), || {
        let peers: Value = serde_json::from_str(&maps()?)?;
        let known = peers.as_array().map_or(0, Vec::len);
        ensure!(known >= nodes as usize, "{known} of {nodes}");
        Ok(())
    })
    .with_context(|| format!("the agent's log ends:\n{}", node.agent_log(30)))?;
    let ready = start.elapsed().as_secs_f64();
    let pid = node.agent_pid().context("no agent")?;
    let (began, used) = (Instant::now(), cpu_seconds(pid)?);
    std::thread::sleep(time);
    let share = (cpu_seconds(pid)? - used) / began.elapsed().as_secs_f64() * 100.0;
    let memory = Memory::of(node)?;
    node.stop_agent()?;
    // Fewer Nodes prove nothing.
    let word = |reached| if nodes >= FULL { verdict(reached) } else { "" };
    println!(
        "\nAgent with {nodes} Nodes, each of which reports every {} s, over {} s; in the maps after {ready:.1} s:\n\n\
         | | | Goal | |\n|---|---|---|---|\n\
         | CPU, per cent of a core | {share:.2} | {} | {} |\n\
         | resident memory, MiB (most so far {:.1}) | {:.1} | {} | {} |",
        REPORT.as_secs(),
        time.as_secs(),
        GOALS.0,
        word(share <= GOALS.0),
        memory.peak,
        memory.resident,
        GOALS.1,
        word(memory.resident <= GOALS.1),
    );
    Ok(())
}

/// Nodes alone, each of which reports in turn, all of them once a period.
struct Nodes(u32);

impl Objects for Nodes {
    fn count(&self, path: &str) -> u32 {
        if path == NODES { self.0 } else { 0 }
    }

    fn object(&self, _: &str, n: u32) -> Value {
        object(n, 0)
    }

    fn watch(&self, path: &str, changes: &mut Changes, is_wanted: &dyn Fn() -> bool) -> Result<()> {
        let pause = REPORT / self.count(path).max(1);
        for report in 1.. {
            std::thread::sleep(pause.min(Duration::from_secs(1)));
            if !is_wanted() {
                break;
            }
            if self.count(path) > 0 {
                changes.send(&object(report % self.0, report))?;
            }
        }
        Ok(())
    }
}

/// Node number `n` as a kubelet reports it: all of its conditions and images come each time.
fn object(n: u32, report: u32) -> Value {
    let (high, low) = (n / 250, n % 250 + 1);
    let time = format!("2026-01-01T{:02}:{:02}:{:02}Z", report / 3600 % 24, report / 60 % 60, report % 60);
    let condition = |kind: &str, status: &str| {
        json!({
            "type": kind, "status": status, "lastHeartbeatTime": time, "lastTransitionTime": "2026-01-01T00:00:00Z",
            "reason": "KubeletReports", "message": "the kubelet has what it needs of this",
        })
    };
    let image = |i: u32| {
        let name = format!("registry.example.com/team-{}/application-{i}", i % 7);
        json!({"names": [format!("{name}@sha256:{:064x}", u64::from(i) << 32 | 0xabcd), format!("{name}:v1.{i}")], "sizeBytes": 123_456_789})
    };
    json!({
        "kind": "Node", "apiVersion": "v1",
        "metadata": {
            "name": if n == 0 { "n1".to_owned() } else { format!("node-{n}") },
            "resourceVersion": (report + 1).to_string(),
            "labels": {"kubernetes.io/arch": "amd64", "kubernetes.io/os": "linux", "topology.kubernetes.io/zone": format!("z{}", n % 3)},
        },
        "spec": {"podCIDRs": [format!("10.{}.{low}.0/24", 128 + high)]},
        "status": {
            "addresses": [
                {"type": "InternalIP", "address": if n == 0 { "172.18.0.11".to_owned() } else { format!("172.19.{high}.{low}") }},
                {"type": "Hostname", "address": format!("node-{n}")},
            ],
            "conditions": [
                condition("Ready", "True"), condition("MemoryPressure", "False"), condition("DiskPressure", "False"),
                condition("PIDPressure", "False"), condition("NetworkUnavailable", "False"),
            ],
            "images": (0..IMAGES).map(image).collect::<Vec<_>>(),
        },
    })
}
