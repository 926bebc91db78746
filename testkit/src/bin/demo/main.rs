//! The demo: nodes as namespaces, one agent each, pods by the real CNI binary, real servers, and a table of what holds.
//!
//! The exit status is 0 only if every row held. Nothing is left behind, whatever happens: see `testkit::janitor`.

mod addresses;
mod cluster;
mod examples;
mod external;
mod policies;
mod rows;
mod signals;
mod table;
mod traffic;

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use std::io::Write;
use std::process::ExitCode;
use std::time::Instant;
use table::Table;
use testkit::apiserver::ApiServer;
use testkit::manifest::node_yaml;
use testkit::{Fabric, Routing, Setup};

/// Two nodes on one machine: pods talk and services work, with the agents alive or dead.
#[derive(Parser, Debug)]
#[command(name = "cargo xtask demo")]
struct Args {
    /// Number of nodes
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=50))]
    nodes: u8,
    /// How pods of other nodes are reached
    #[arg(long, value_enum, default_value_t = Mode::Vxlan)]
    routing: Mode,
    /// Let the agents learn everything from a real etcd and kube-apiserver instead of a directory of manifests
    #[arg(long)]
    api_server: bool,
    /// Requests in each row
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u16).range(1..))]
    requests: u16,
    /// Leave everything up at the end, tell how to look inside, and wait for Ctrl-C
    #[arg(long)]
    keep: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Mode {
    /// In VXLAN
    Vxlan,
    /// By routes
    Native,
    /// By routes on one segment, in VXLAN beyond
    DirectAndVxlan,
}

impl From<Mode> for Routing {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Vxlan => Self::Vxlan,
            Mode::Native => Self::Native,
            Mode::DirectAndVxlan => Self::DirectAndVxlan,
        }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    // Before any thread exists, so that all of them leave the signals to the one that waits.
    let signals = match signals::Signals::block() {
        Ok(signals) => signals,
        Err(e) => return failed(&e),
    };
    if let Err(e) = signals.clean_up_on_arrival() {
        return failed(&e);
    }
    match run(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => failed(&e),
    }
}

fn failed(e: &anyhow::Error) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "demo: {e:#}");
    ExitCode::FAILURE
}

fn run(args: &Args) -> Result<bool> {
    if !nix::unistd::geteuid().is_root() {
        bail!("the demo makes network namespaces and loads eBPF programs: run it as root");
    }
    let start = Instant::now();
    let mut table = Table::new();
    let setup = Setup { nodes: args.nodes, routing: args.routing.into(), ..Setup::default() };
    table::step(&format!("{} nodes, dual stack, routing {}", args.nodes, setup.routing.word()));
    let fabric = Fabric::build(setup).context("cannot build the nodes")?;
    let api = if args.api_server { Some(control_plane(&fabric)?) } else { None };
    let mut cluster = cluster::Cluster::start(&fabric, api.as_ref()).with_context(|| fabric.logs())?;
    let requests = usize::from(args.requests);
    let held = rows::all(&cluster, requests, &mut table)
        .and_then(|()| external::rows(&cluster, requests, &mut table))
        .and_then(|()| examples::rows(&cluster, requests, &mut table))
        .and_then(|()| policies::rows(&cluster, &mut table))
        .and_then(|()| traffic::all(&mut cluster, requests, &mut table))
        .and_then(|()| rows::refusals(&cluster, requests, &mut table));
    if let Err(e) = &held {
        table.broken(e);
        table::note(&fabric.logs());
    }
    table.summary(start.elapsed());
    if args.keep {
        keep(&cluster);
    }
    Ok(table.held())
}

/// A real API server that knows the nodes.
fn control_plane(fabric: &Fabric) -> Result<ApiServer> {
    let start = Instant::now();
    let api = ApiServer::start(fabric)?;
    for node in fabric.nodes() {
        api.apply(&node_yaml(node.name(), &node.addresses(), node.pod_cidrs()), "create")?;
    }
    table::note(&format!("etcd and kube-apiserver ready after {} ms", start.elapsed().as_millis()));
    Ok(api)
}

/// Tells how to look inside and waits for a signal, which ends the process.
fn keep(cluster: &cluster::Cluster<'_>) {
    table::step("kept up: Ctrl-C takes everything down. To look inside, from another terminal:");
    for line in cluster.hints() {
        table::note(&line);
    }
    loop {
        std::thread::park();
    }
}
