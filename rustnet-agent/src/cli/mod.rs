//! The `rustnetctl` command prints what the maps hold, as text or JSON. It needs no agent and no API
//! server; `connectivity` is about a whole cluster, and needs its API server.
//!
//! Exit codes: 0 all is well, 1 something is not (or went wrong), 2 wrong usage; `connectivity` and `policy why`: it could not run.

mod cleanup;
mod connectivity;
mod ct;
mod doctor;
mod endpoints;
#[cfg(test)]
mod golden;
mod kube_proxy;
mod maps;
mod monitor;
mod nodes;
mod output;
mod peers;
mod policy;
mod reader;
mod services;
mod settings;
mod status;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::{CommandFactory, Parser, Subcommand};
use rustnet_common::names::{DEFAULT_BPFFS, DEFAULT_RUN_DIR};

use crate::reconcile::presence::AgentFile;
use output::{Format, Output};

/// Shows and clears what rustnet keeps in this host's kernel.
#[derive(Debug, Parser)]
#[command(name = "rustnetctl", version, max_term_width = 120)]
struct Cli {
    /// The agent's directory of pinned maps [default: the one that the agent of --run-dir uses]
    #[arg(long, global = true, env = "RUSTNET_BPFFS", value_name = "DIR")]
    bpffs: Option<PathBuf>,
    /// The agent's run directory
    #[arg(long, global = true, env = "RUSTNET_RUN_DIR", value_name = "DIR", default_value = DEFAULT_RUN_DIR)]
    run_dir: PathBuf,
    /// How to print
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table)]
    output: Format,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Is everything in its place? Exit code 1 if not
    Status(status::Args),
    /// What keeps rustnet from working here, and the remedies; takes the agent's settings. Exit code 1 if there is a cross
    Doctor(Box<doctor::Args>),
    /// Virtual addresses and their backends
    Services(Box<services::Args>),
    /// This node's pods
    Endpoints,
    /// Nodes, their pod ranges, and how they are reached
    Nodes,
    /// What the programs know of each address range, as the maps have it
    Peers,
    /// What network policies mean for this node's pods, for one pod in full, or for a flow
    Policy(policy::Args),
    /// Connections
    #[command(subcommand)]
    Ct(CtCommand),
    /// How full the maps are
    Maps,
    /// Packets dropped, by reason and hook, with what to do about it
    Drops,
    /// Drops (and new flows, where the agent reports them) as they happen
    Monitor(monitor::Args),
    /// Has pods on all nodes ask each other, the nodes, Services and names; needs a kubeconfig. Exit code 1 if a row failed, 2 if it
    /// could not run
    Connectivity(Box<connectivity::Args>),
    #[command(hide = true)]
    ConnectivityProbe(Box<connectivity::probe::Args>),
    /// Removes everything of rustnet's from this host, or what kube-proxy left, and nothing else
    Cleanup(cleanup::Args),
    /// Prints a completion script
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Subcommand)]
enum CtCommand {
    /// Lists connections, by default only in the direction that opened them
    List(ct::Args),
}

/// Where to look.
struct Places {
    /// `None`: nothing says where that agent pins.
    bpffs: Option<PathBuf>,
    /// `bpffs` was given, rather than found out.
    bpffs_is_given: bool,
    run_dir: PathBuf,
    agent: Option<AgentFile>,
}

impl Places {
    fn find(bpffs: Option<PathBuf>, run_dir: PathBuf) -> Result<Self> {
        let agent = AgentFile::read(&run_dir)?;
        let known = agent.as_ref().map(|agent| agent.bpffs.clone());
        // The default run directory goes with the default pins; another one must not lead to another agent's.
        let default = (run_dir == Path::new(DEFAULT_RUN_DIR)).then(|| DEFAULT_BPFFS.into());
        Ok(Self { bpffs_is_given: bpffs.is_some(), bpffs: bpffs.or(known).or(default), run_dir, agent })
    }

    fn bpffs(&self) -> Result<&Path> {
        self.bpffs.as_deref().ok_or_else(|| {
            let dir = self.run_dir.display();
            output::Usage(format!("no agent has run with --run-dir {dir}: say where it pins with --bpffs")).into()
        })
    }
}

/// Runs the command of this process.
pub fn main() -> ExitCode {
    run(std::env::args_os())
}

/// Runs a command line.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            let wrong = error.use_stderr();
            // Nowhere to say it if this fails.
            let _ = error.print();
            return ExitCode::from(if wrong { 2 } else { 0 });
        }
    };
    match dispatch(cli) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rustnetctl: {error:#}");
            ExitCode::from(if error.is::<output::Usage>() || error.is::<output::CannotRun>() { 2 } else { 1 })
        }
    }
}

/// Whoever read our output has seen enough.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

/// True if all is well.
fn dispatch(cli: Cli) -> Result<bool> {
    let out = Output::stdout(cli.output);
    let places = || Places::find(cli.bpffs.clone(), cli.run_dir.clone());
    match cli.command {
        Command::Status(args) => return status::run(places, &args, &out),
        Command::Services(args) => return services::run(&places()?, *args, &out),
        Command::Doctor(args) => return doctor::run(places, *args, &out),
        Command::Connectivity(args) => return connectivity::run(&args, &out),
        Command::ConnectivityProbe(args) => connectivity::probe::run(&args)?,
        Command::Endpoints => endpoints::run(&places()?, &out)?,
        Command::Nodes => nodes::run(&places()?, &out)?,
        Command::Peers => peers::run(&places()?, &out)?,
        Command::Policy(args) => return policy::run(&places()?, &args, &out),
        Command::Ct(CtCommand::List(args)) => ct::run(&places()?, &args, &out)?,
        Command::Maps => maps::run(&places()?, &out)?,
        Command::Drops => maps::drops(&places()?, &out)?,
        Command::Monitor(args) => monitor::run(&places()?, &args, &out)?,
        Command::Cleanup(args) => return cleanup::run(places, &args, &out),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut shown_commands(), "rustnetctl", &mut std::io::stdout());
        }
    }
    Ok(true)
}

/// Returns the grammar without commands that are no use to people: scripts for shells would offer hidden ones, too.
fn shown_commands() -> clap::Command {
    let all = Cli::command();
    let shown = all.get_subcommands().filter(|command| !command.is_hide_set()).cloned();
    clap::Command::new("rustnetctl").args(all.get_arguments().cloned()).subcommands(shown)
}

#[cfg(test)]
mod tests {
    use super::{Cli, CommandFactory, Format, Parser, shown_commands};

    #[test]
    fn completions_offer_no_hidden_command() {
        let mut script = Vec::new();
        clap_complete::generate(clap_complete::Shell::Bash, &mut shown_commands(), "rustnetctl", &mut script);
        let script = String::from_utf8(script).expect("text");
        for (word, is_offered) in [("connectivity", true), ("--bpffs", true), ("connectivity-probe", false)] {
            assert_eq!(script.contains(word), is_offered, "{word}");
        }
    }

    #[test]
    fn the_grammar_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn global_flags_go_before_and_behind_the_command() {
        let cli = Cli::try_parse_from(["rustnetctl", "--run-dir", "/r", "status", "-o", "json"]).unwrap();
        assert_eq!((cli.run_dir.to_str(), cli.output), (Some("/r"), Format::Json));
    }
}
