//! `cluster`: a real Kubernetes in namespaces of this machine: etcd, API server, controllers, scheduler, and on each node
//! containerd and kubelet.
//!
//! | File | Job |
//! |---|---|
//! | `settings` | what is asked for, and the addresses that follow |
//! | `layout` | names and places |
//! | `process`, `wait` | programs that outlive the command |
//! | `wires`, `cgroup`, `pki` | what the components need around them |
//! | `node`, `init` | a node's namespaces, from outside and from inside |
//! | `components` | each program with its arguments and its sign of readiness |
//! | `images` | what containers run |
//! | `network` | rustnet, or the reference to compare with |
//! | `balancer` | load balancers, as a cloud has them |
//! | `relay` | the API server for this machine's own shells |
//! | `pods`, `ends` | running pods: their namespaces; those of the benchmark |
//! | `lifecycle` | nodes that reboot, come and go |
//! | `up`, `down`, `status`, `trial` | the commands |

mod balancer;
mod cgroup;
mod components;
mod down;
pub mod ends;
mod images;
mod init;
mod layout;
mod lifecycle;
mod network;
mod node;
mod pki;
mod pods;
mod process;
mod relay;
mod settings;
mod status;
mod trial;
mod up;
mod wait;
mod wires;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;

use crate::cmd::need_root;
use crate::test::exit_code;
pub use layout::Cluster;
pub use process::tail;
pub use settings::{Family, Network, Routing, SERVICES, Settings};

use layout::Node;

/// The cluster's name where none is given.
pub const DEFAULT: &str = "rnk";

/// Options of `cluster`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Name of the cluster: several may run side by side
    #[arg(long, default_value = DEFAULT, global = true)]
    name: String,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(clap::Subcommand, Debug)]
enum Verb {
    /// Start it, or complete what runs; prints what a shell needs to use it
    Up(Settings),
    /// Remove it, completely
    Down,
    /// Tell what runs and what does not
    Status,
    /// End everything on a node at once, and start it again
    Reboot {
        /// n1, n2...
        node: String,
    },
    /// Add nodes, or remove the last ones
    Scale {
        /// The number of nodes afterwards
        #[arg(value_parser = clap::value_parser!(u8).range(1..=9))]
        nodes: u8,
    },
    /// Restart, upgrade and remove rustnet in it under load, and count what is lost; other trials, too
    Trial {
        /// Which, in this order
        #[arg(value_enum, default_values_t = trial::DEFAULT)]
        trials: Vec<trial::Trial>,
        #[command(flatten)]
        other: trial::Other,
        #[command(flatten)]
        latency: trial::PolicyLatency,
    },
    /// Run kubectl against it
    #[command(disable_help_flag = true)]
    Kubectl {
        /// What kubectl takes
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Run a command in a node, such as n1, or in the network namespace sw (the world) or cp (the control plane)
    Exec {
        /// n1, n2..., sw, cp
        place: String,
        /// The command
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<String>,
    },
    /// Start a provider of load balancers: Services of that type get addresses, which lead there from the world
    Balancer,
    #[command(hide = true)]
    Balance,
    #[command(hide = true)]
    NodeInit { node: String },
    #[command(hide = true)]
    Relay,
}

/// Starts a cluster, or completes it.
pub fn up(name: &str, settings: &Settings) -> Result<()> {
    up::run(name, settings)
}

/// Starts a provider of load balancers, unless there is one.
pub fn start_balancer(cluster: &Cluster) -> Result<()> {
    balancer::start(cluster)
}

/// Loads what the pods of tests of network policies run into all nodes.
pub fn load_policy_tests(cluster: &Cluster) -> Result<()> {
    let image = images::policy_tests(cluster.settings.version)?;
    cluster.nodes().iter().try_for_each(|node| up::load(cluster, node, &image))
}

/// Removes a cluster.
pub fn down(name: &str) -> Result<()> {
    down::run(name, defaults()?)
}

/// The command.
#[expect(clippy::print_stdout, reason = "a shell evaluates it")]
pub fn run(args: &Args) -> Result<ExitCode> {
    need_root("cluster")?;
    let name = &args.name;
    match &args.verb {
        Verb::Up(settings) => {
            up(name, settings)?;
            println!("{}", up::environment(&running(name)?)?);
        }
        Verb::Down => down(name)?,
        Verb::Status => status::run(name)?,
        Verb::Reboot { node } => {
            let cluster = running(name)?;
            lifecycle::reboot(&cluster, &find(&cluster, node)?)?;
        }
        Verb::Scale { nodes } => drop(lifecycle::scale(&running(name)?, *nodes)?),
        Verb::Trial { trials, other, latency } => trial::run(&running(name)?, trials, other, latency)?,
        Verb::Kubectl { args } => return Ok(exit_code(running(name)?.kubectl()?.args(args).status()?.code())),
        Verb::Exec { place, command } => return exec(&running(name)?, place, command),
        Verb::NodeInit { node } => {
            let cluster = running(name)?;
            init::run(&cluster, &find(&cluster, node)?)?;
        }
        Verb::Balancer => start_balancer(&running(name)?)?,
        Verb::Balance => balancer::run(&running(name)?)?,
        Verb::Relay => relay::run(&running(name)?)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn exec(cluster: &Cluster, place: &str, command: &[String]) -> Result<ExitCode> {
    let (program, args) = command.split_first().context("no command")?;
    let command = match place {
        "sw" | "cp" => cluster.inside(place, program),
        node => node::command(cluster, &find(cluster, node)?)?.arg(program),
    };
    Ok(exit_code(command.args(args).status()?.code()))
}

fn running(name: &str) -> Result<Cluster> {
    Cluster::find(name)?.context("there is no cluster\n  remedy: cargo xtask cluster up")
}

fn find(cluster: &Cluster, name: &str) -> Result<Node> {
    let names = || cluster.nodes().into_iter().map(|node| node.name).collect::<Vec<_>>().join(", ");
    cluster
        .nodes()
        .into_iter()
        .find(|node| node.name == name)
        .with_context(|| format!("no node {name}: there are {}", names()))
}

/// What `up` would take without options; `down` after a `down` that was interrupted needs some.
fn defaults() -> Result<Settings> {
    settings(&["--nodes", "9"])
}

/// What `up` takes with these options.
pub fn settings(options: &[&str]) -> Result<Settings> {
    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        settings: Settings,
    }
    Ok(Line::try_parse_from([&["up"], options].concat())?.settings)
}
