//! `cargo xtask bench`: measures, and prints tables as docs/performance.md holds them. Figures are compared with a peer of
//! the same run, never with a bound: a benchmark is no test.

mod api;
mod churn;
mod cni;
mod control;
mod maglev;
mod maps;
mod network;
mod nodes;
mod packets;
mod plugins;
mod policies;
mod stats;
mod xdp;

use anyhow::{Context, Result};
use clap::Parser;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

/// Measures rustnet, compared with other networks and the kernel itself, and prints tables.
#[derive(Parser)]
#[command(name = "cargo xtask bench")]
struct Args {
    /// What to measure
    #[arg(value_enum, default_values_t = [What::All])]
    what: Vec<What>,
    /// Few and short runs: the figures are rough
    #[arg(long)]
    quick: bool,
    /// packets: runs of each measurement; the least of them counts
    #[arg(long)]
    runs: Option<u32>,
    /// packets: loads of the programs over which known flows are measured
    #[arg(long)]
    loads: Option<u32>,
    /// packets: packets in a run
    #[arg(long)]
    repeat: Option<u32>,
    /// packets: an eBPF object of another release, measured in turn with this one; a relative path starts at the work tree
    #[arg(long, value_name = "FILE")]
    baseline: Option<PathBuf>,
    /// network: turns of each case
    #[arg(long)]
    rounds: Option<usize>,
    /// network: length of a turn
    #[arg(long, value_name = "MS")]
    turn: Option<u64>,
    /// network: services in the tables of rustnet and kube-proxy
    #[arg(long, default_value_t = 10)]
    services: u32,
    /// network: the CPU that both ends of a connection share; the last one when absent
    #[arg(long)]
    cpu: Option<usize>,
    /// network: measure in a real cluster instead (rnb without a name); one that runs is used as it is, else one is started and removed,
    /// for each routing
    #[arg(long, value_name = "NAME", num_args = 0..=1, require_equals = true, default_missing_value = "rnb")]
    cluster: Option<String>,
    /// network: with --cluster, measure only this routing
    #[arg(long, value_enum, requires = "cluster")]
    routing: Option<Routing>,
    /// packets, network: measure only rows or tables whose title holds this, such as "established", "VXLAN" or "TCP_RR"
    #[arg(long, default_value = "")]
    only: String,
    /// cni: pods of each network
    #[arg(long)]
    pods: Option<usize>,
}

/// Groups of measurements.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum What {
    /// Everything below
    All,
    /// Nanoseconds that each program takes for a packet, and what loading it costs
    Packets,
    /// Latency and throughput between pods, compared with the kernel, the bridge plugin and
    /// kube-proxy
    Network,
    /// Writing very many services, and the agent's memory
    Control,
    /// Changes of Services whose flows Maglev tables spread
    Maglev,
    /// Changes of endpoints at a high rate: how long entries lead to an endpoint that left
    Churn,
    /// Network policies of a large cluster: from events to the maps, the agent's memory and CPU, and their cost per packet
    Policies,
    /// Packets a second of a known flow to a node port, by XDP, by TC and by the kernel's netfilter
    Xdp,
    /// How long the CNI binary takes, compared with the reference plugins
    Cni,
}

/// Routings of clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Routing {
    /// In a tunnel
    Vxlan,
    /// By plain routes
    Native,
}

impl Args {
    fn wants(&self, what: What) -> bool {
        self.what.contains(&what) || self.what.contains(&What::All)
    }

    /// The full size or that of a quick run, unless it was given.
    fn size<T>(&self, given: Option<T>, full: T, quick: T) -> T {
        given.unwrap_or(if self.quick { quick } else { full })
    }

    /// Runs of programs on packets.
    fn packets(&self) -> packets::Extent {
        packets::Extent {
            runs: self.size(self.runs, 40, 5),
            loads: self.size(self.loads, 7, 3),
            repeat: self.size(self.repeat, 200_000, 20_000),
            baseline: self.baseline.clone(),
            only: self.only.clone(),
        }
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    println!("{}\n", machine());
    if args.wants(What::Packets) {
        packets::run(&args.packets()).context("packets")?;
        println!();
    }
    if args.wants(What::Network) {
        let extent = network::Extent {
            rounds: args.size(args.rounds, 25, 5),
            time: Duration::from_millis(args.size(args.turn, 100, 50)),
            services: args.services,
            cpu: args.cpu.unwrap_or(cpus().saturating_sub(1)),
            only: args.only.clone(),
        };
        match &args.cluster {
            Some(_) => network::cluster::run(&extent).context("network")?,
            None => network::run(&extent).context("network")?,
        }
        println!();
    }
    if args.wants(What::Control) {
        let extent = control::Extent {
            rounds: args.size(None, 5, 1),
            services: args.size(None, control::FULL.0, 10_000),
            changes: args.size(None, 2000, 200),
            remembered: args.size(None, control::FULL.1, 1000),
            nodes: args.size(None, (nodes::FULL, Duration::from_mins(2)), (500, Duration::from_secs(10))),
        };
        control::run(&extent).context("control")?;
        println!();
    }
    if args.wants(What::Maglev) {
        maglev::run(args.size(None, 200, 20)).context("maglev")?;
        println!();
    }
    if args.wants(What::Churn) {
        churn::run(args.size(None, churn::FULL, 5)).context("churn")?;
        println!();
    }
    if args.wants(What::Policies) {
        let extent = policies::Extent {
            is_small: args.quick,
            changes: args.size(None, 50, 5),
            time: Duration::from_secs(args.size(None, 20, 5)),
            packets: args.packets(),
        };
        policies::run(&extent).context("policies")?;
        println!();
    }
    if args.wants(What::Xdp) {
        xdp::run(args.size(None, 15, 3), args.size(args.repeat, 2_000_000, 200_000)).context("xdp")?;
        println!();
    }
    if args.wants(What::Cni) {
        cni::run(args.size(args.pods, 100, 10)).context("cni")?;
    }
    Ok(())
}

fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The machine, in a line.
fn machine() -> String {
    let cpus = cpus();
    let kernel =
        Command::new("uname").args(["-srm"]).output().map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned());
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find_map(|l| l.strip_prefix("model name")).unwrap_or(": unknown");
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or_default();
    format!(
        "Machine: {cpus} CPUs ({}), {}, load {load} at the start.",
        model.trim_start_matches([' ', '\t', ':']),
        kernel.unwrap_or_else(|_| "unknown kernel".into())
    )
}
