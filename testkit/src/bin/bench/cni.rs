//! How long the CNI binary takes, compared with the reference plugins. Pods are added to all
//! networks in turn until the nodes are full, then deleted in turn. Then those of each network are added and deleted at once.

use crate::plugins;
use crate::stats::{Sorted, verdict};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::mem::take;
use std::path::PathBuf;
use std::sync::Barrier;
use std::time::Instant;
use testkit::cni::Attachment;
use testkit::netns::{Holder, Own};
use testkit::{Fabric, Node, Setup};

/// Milliseconds: ADD's median and 99th percentile, DEL's median.
const GOALS: (f64, f64, f64) = (4.0, 10.0, 20.0);
/// Milliseconds: the 99th percentile of the ADDs of all pods at once.
const GOAL_AT_ONCE: f64 = 100.0;

/// A network to add pods to.
struct Network<'a> {
    name: &'static str,
    node: &'a Node,
    program: PathBuf,
    configuration: Value,
    ours: bool,
    add: Vec<f64>,
    del: Vec<f64>,
}

/// A pod's namespace, and where the runtime shows it to plugins.
struct Sandbox {
    attachment: Attachment,
    result: Value,
    netns: Holder,
}

/// Measures with so many pods and prints.
pub fn run(pods: usize) -> Result<()> {
    println!(
        "## CNI (`cargo xtask bench cni`)\n\n{pods} pods in each network, added in turn, then deleted in turn. rustnet gives two \
         addresses, its own IPAM; the others one by `host-local`. Times are of whole processes.\n"
    );
    let fabric = Fabric::build(Setup { nodes: 3, ..Setup::default() })?;
    let [quiet, busy, other] = [1, 2, 3].map(|n| fabric.node(n));
    for node in [quiet, busy] {
        node.start_agent(&[])?;
    }
    // The binary works without the agent; like this no agent's reaction to a new interface disturbs the others.
    quiet.stop_agent()?;
    let mut networks = vec![ours("rustnet-cni", quiet)?, ours("rustnet-cni, agent running", busy)?];
    for (name, plugin) in [("bridge, host-local", "bridge"), ("ptp, host-local", "ptp")] {
        match reference(name, plugin, other) {
            Ok(network) => networks.push(network),
            Err(error) => println!("**Not measured: {name}.** {error:#}\n"),
        }
    }
    let mut sandboxes: Vec<Vec<Sandbox>> = networks.iter().map(|_| Vec::new()).collect();
    for n in 0..pods {
        for (network, own) in networks.iter().zip(&mut sandboxes) {
            own.push(sandbox(network, n)?);
        }
    }
    let mut starts = Vec::new();
    for n in 0..pods {
        starts.push(networks[0].call("VERSION", &sandboxes[0][n].attachment, &Value::Null)?.0);
        for (network, own) in networks.iter_mut().zip(&mut sandboxes) {
            let (took, result) = network.call("ADD", &own[n].attachment, &Value::Null)?;
            network.add.push(took);
            own[n].result = result;
        }
    }
    for n in 0..pods {
        for (network, own) in networks.iter_mut().zip(&sandboxes) {
            let took = network.call("DEL", &own[n].attachment, &own[n].result)?.0;
            network.del.push(took);
        }
    }
    let floor = bare_veths(quiet, &sandboxes[0])?;
    println!("| | ADD, ms: least / median / p99 | DEL, ms: least / median / p99 | Goals |\n|---|---|---|---|");
    println!("| process start (VERSION of rustnet-cni) | {} | | |", Sorted::new(starts).three(2));
    println!("| a bare veth: `ip link add`, `ip link del` | {} | {} | |", floor.0.three(2), floor.1.three(2));
    for network in &mut networks {
        let (add, del) = (Sorted::new(take(&mut network.add)), Sorted::new(take(&mut network.del)));
        let goals = format!(
            "ADD {:.0} and {:.0}: {}, {}; DEL {:.0}: {}",
            GOALS.0,
            GOALS.1,
            verdict(add.median() <= GOALS.0),
            verdict(add.p99() <= GOALS.1),
            GOALS.2,
            verdict(del.median() <= GOALS.2)
        );
        let goals = if network.ours { goals } else { String::new() };
        println!("| {} | {} | {} | {goals} |", network.name, add.three(2), del.three(2));
    }
    println!("\n{pods} pods at once:\n");
    println!(
        "| | ADD, ms: least / median / p99 | all added, ms | failed | DEL, ms: least / median / p99 | failed | Goal |"
    );
    println!("|---|---|---|---|---|---|---|");
    for (network, own) in networks.iter().zip(&mut sandboxes) {
        let (add, failed, whole) = network.at_once("ADD", own);
        let (del, failed_del, _) = network.at_once("DEL", own);
        let goal = format!("p99 {GOAL_AT_ONCE:.0}, none failed: {}", verdict(add.p99() <= GOAL_AT_ONCE && failed == 0));
        let goal = if network.ours { goal } else { String::new() };
        let (add, del) = (add.three(2), del.three(2));
        println!("| {} | {add} | {whole:.0} | {failed} | {del} | {failed_del} | {goal} |", network.name);
    }
    Ok(())
}

/// What the kernel takes for a veth of each sandbox alone, in turn: making it, and removing it. No plugin is faster.
fn bare_veths(node: &Node, sandboxes: &[Sandbox]) -> Result<(Sorted, Sorted)> {
    let (mut add, mut del) = (Vec::new(), Vec::new());
    for sandbox in sandboxes {
        let netns = &sandbox.netns;
        let pid = netns.pid().to_string();
        let timed = |args: &[&str]| -> Result<f64> {
            let start = Instant::now();
            node.netns().exec("ip", args)?;
            Ok(start.elapsed().as_secs_f64() * 1e3)
        };
        add.push(timed(&["link", "add", "floor0", "up", "type", "veth", "peer", "name", "eth0", "netns", &pid])?);
        netns.ip("link set eth0 up")?;
        del.push(timed(&["link", "del", "floor0"])?);
    }
    Ok((Sorted::new(add), Sorted::new(del)))
}

/// rustnet, as its agent installed it on a node.
fn ours<'a>(name: &'static str, node: &'a Node) -> Result<Network<'a>> {
    let list = node.conflist()?;
    let mut configuration = list["plugins"][0].clone();
    configuration["cniVersion"] = list["cniVersion"].clone();
    configuration["name"] = list["name"].clone();
    let program = configuration["type"].as_str().context("a plugin without a type")?;
    let program = node.cni_bin_dir().join(program);
    Ok(Network { name, node, program, configuration, ours: true, add: Vec::new(), del: Vec::new() })
}

fn reference<'a>(name: &'static str, plugin: &str, node: &'a Node) -> Result<Network<'a>> {
    plugins::offer(node, "host-local")?;
    let range = if plugin == "bridge" { "10.3.0.0/16" } else { "10.4.0.0/16" };
    let ipam = json!({ "type": "host-local", "subnet": range, "dataDir": node.dir().join("host-local") });
    let mut configuration = json!({ "cniVersion": "0.4.0", "name": plugin, "type": plugin, "ipam": ipam });
    if plugin == "bridge" {
        configuration["bridge"] = json!("cni0");
    }
    let program = plugins::find(plugin)?;
    Ok(Network { name, node, program, configuration, ours: false, add: Vec::new(), del: Vec::new() })
}

fn sandbox(network: &Network<'_>, n: usize) -> Result<Sandbox> {
    let word: String = network.name.chars().filter(char::is_ascii_alphanumeric).collect();
    let name = format!("{word}-{n}");
    let netns = Holder::new(&format!("{}-{name}", network.node.netns().name()), Own::default())?;
    let file = network.node.dir().join("netns").join(&name);
    network.node.netns().bind_netns(&netns, &file)?;
    let attachment = Attachment {
        container_id: name,
        netns: file.display().to_string(),
        ifname: "eth0".into(),
        args: String::new(),
    };
    Ok(Sandbox { attachment, result: Value::Null, netns })
}

impl Network<'_> {
    /// Calls for all pods at the same moment: the times of those that worked, how many failed, and the time until all had ended.
    fn at_once(&self, verb: &str, sandboxes: &mut [Sandbox]) -> (Sorted, usize, f64) {
        let barrier = Barrier::new(sandboxes.len() + 1);
        let (calls, whole) = std::thread::scope(|scope| {
            let start = |sandbox: &'_ mut Sandbox| {
                let (attachment, result) = (sandbox.attachment.clone(), take(&mut sandbox.result));
                let barrier = &barrier;
                scope.spawn(move || {
                    let previous = if verb == "ADD" { Value::Null } else { result };
                    barrier.wait();
                    self.call(verb, &attachment, &previous)
                })
            };
            let threads: Vec<_> = sandboxes.iter_mut().map(start).collect();
            barrier.wait();
            let began = Instant::now();
            let calls: Vec<_> = threads.into_iter().map(|thread| thread.join().expect("a call")).collect();
            (calls, began.elapsed().as_secs_f64() * 1e3)
        });
        let (mut took, mut failed) = (Vec::new(), 0);
        for (sandbox, call) in sandboxes.iter_mut().zip(calls) {
            match call {
                Ok((time, result)) => {
                    took.push(time);
                    sandbox.result = result;
                }
                Err(error) => {
                    failed += 1;
                    println!("{verb} of {}: {error:#}\n", sandbox.attachment.container_id);
                }
            }
        }
        (Sorted::new(took), failed, whole)
    }

    /// One call; milliseconds, and its result.
    fn call(&self, verb: &str, attachment: &Attachment, previous: &Value) -> Result<(f64, Value)> {
        let mut configuration = self.configuration.clone();
        if !previous.is_null() {
            configuration["prevResult"] = previous.clone();
        }
        let input = configuration.to_string();
        let start = Instant::now();
        let result = self.node.cni_exec(&self.program, verb, attachment, input.as_bytes());
        let took = start.elapsed().as_secs_f64() * 1e3;
        Ok((took, result.with_context(|| self.name)?))
    }
}
