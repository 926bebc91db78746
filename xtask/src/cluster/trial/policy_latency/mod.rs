//! How long network policies take to be in effect in the whole cluster, and what passes or is lost
//! meanwhile. It follows the two clients of kubernetes/perf-tests
//! (`network/tools/network-policy-enforcement-latency`), with a probe a millisecond in place of a
//! request a second, and denials in addition to permissions.
//!
//! | File | Job |
//! |---|---|
//! | `changes` | policies that are created, changed and deleted |
//! | `servers` | new pods that a policy selects |
//! | `newcomers` | new pods that a policy allows |
//! | `steady`, `requests` | probes |
//! | `api` | requests to the API server |
//! | `judge`, `figures` | what follows from probes, and how it is shown |

mod api;
mod changes;
mod figures;
mod judge;
mod newcomers;
mod requests;
mod servers;
mod steady;

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::cluster::layout::{Cluster, Node};
use crate::cluster::pods;
use api::Api;

const NAMESPACE: &str = "policy-latency";
/// A change that takes longer fails the trial, whatever else the machine does.
const DEADLINE: Duration = Duration::from_secs(10);
/// For a pod's start, which is not what is measured.
const POD_START: Duration = Duration::from_mins(1);
/// How many faults are shown.
const SHOWN: usize = 20;

/// Options of the trial.
#[derive(clap::Args, Debug)]
pub struct Options {
    /// For `policy-latency`: how often each change of policies is made
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u16).range(1..))]
    repeats: u16,
    /// For `policy-latency`: how many servers, and how many clients, are started
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..))]
    pods: u16,
}

/// What one part of the trial returns.
struct Part {
    /// Tables.
    text: String,
    /// How many probes were judged.
    probes: usize,
    /// Probes that passed and must not, or were lost and must not; one line a sequence.
    faults: Vec<String>,
}

/// Measures, and prints the tables.
///
/// # Errors
/// A probe passed that must not, or was lost that must not, or a change took more than
/// [`DEADLINE`].
pub fn run(cluster: &Cluster, options: &Options) -> Result<()> {
    let nodes = cluster.nodes();
    let (near, far) = (nodes.first().context("no node")?, nodes.last().context("no node")?);
    ensure!(near.name != far.name, "it takes two nodes\n  remedy: cargo xtask cluster scale 2");
    let file = cluster.dir.join("policy-latency.yaml");
    fs::write(&file, include_str!("pods.yaml"))?;
    cluster.ask(&["apply", "-f", &file.display().to_string()])?;
    let result = measure(cluster, [near, far], options);
    // After a failure, too: its policies would stand in the way of the next time.
    cluster.ask(&["delete", "namespace", NAMESPACE, "--timeout=120s"])?;
    let mut faults = result?;
    if !faults.is_empty() {
        let more = faults.len().saturating_sub(SHOWN);
        faults.truncate(SHOWN);
        let more = if more > 0 { format!("\n  and {more} more") } else { String::new() };
        bail!("policies were not kept:\n  {}{more}", faults.join("\n  "));
    }
    Ok(())
}

/// Prints the tables; returns the faults.
#[expect(clippy::print_stdout, reason = "the tables are the command's result")]
fn measure(cluster: &Cluster, nodes: [&Node; 2], options: &Options) -> Result<Vec<String>> {
    let find = |app: &str| {
        let set = format!("daemonset/{app}");
        cluster.ask(&[&format!("--namespace={NAMESPACE}"), "rollout", "status", &set, "--timeout=120s"])?;
        nodes.into_iter().map(|node| pods::find(cluster, NAMESPACE, app, node)).collect::<Result<Vec<_>>>()
    };
    let (clients, servers) = (find("client")?, find("server")?);
    let api = Api::start(cluster)?;
    let (repeats, count) = (usize::from(options.repeats), usize::from(options.pods));
    let mut faults = Vec::new();
    let mut show = |part: Part| {
        println!("{}   {} probes\n", part.text, part.probes);
        faults.extend(part.faults);
    };
    show(changes::run(&api, &clients, &servers, repeats)?);
    show(servers::run(&api, nodes, &clients, &servers, count)?);
    show(newcomers::run(&api, nodes, &servers, count)?);
    Ok(faults)
}

fn pods_path() -> String {
    format!("/api/v1/namespaces/{NAMESPACE}/pods")
}

fn policies_path() -> String {
    format!("/apis/networking.k8s.io/v1/namespaces/{NAMESPACE}/networkpolicies")
}
