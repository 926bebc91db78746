//! Every developer command of rustnet: `cargo xtask --help`.

mod arch;
mod bench;
mod cache;
mod cluster;
mod cmd;
mod cross;
mod dist;
mod e2e;
mod ebpf;
mod elf;
mod host;
mod image;
mod kernels;
mod libraries;
mod lint;
mod nets;
mod oci;
mod paths;
mod play;
mod remap;
mod setup;
mod test;
mod toolchain;
mod ui;
mod v1;
mod verify;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Developer commands of rustnet
///
/// A fresh machine needs Rust (rustup's stable) and root. `setup` installs the rest; the other commands call it for what
/// they need.
#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    arg_required_else_help = true,
    after_help = "Exit status: 0 success, 1 failure (reported on standard error), 2 wrong usage; test, demo and bench end with \
                  the status of the program they run.\n\n\
                  What is built once is kept in $XDG_CACHE_HOME/rustnet (~/.cache/rustnet) and outlives the work tree."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Find what is missing on this machine and install it
    Setup(setup::Args),
    /// Build the kernel side, check it and list its programs with their sizes
    BuildEbpf(ebpf::Args),
    /// Build the programs for users into target/dist
    Dist(dist::Args),
    /// Build the programs of the last release with other maps into target/v1/dist, for tests of upgrades
    AgentV1,
    /// Make the agent's container image
    Image(image::Args),
    /// A real Kubernetes in namespaces of this machine (needs root)
    Cluster(cluster::Args),
    /// Run Kubernetes' own end-to-end tests (needs root)
    E2e(e2e::Args),
    /// Run the conformance tests of the network policy API (needs root)
    PolicyConformance(e2e::policies::Args),
    /// Show the whole thing at work: nodes, pods, services, restarts (needs root)
    Demo(play::Args),
    /// Run the tests (needs root)
    Test(test::Args),
    /// Check format, lints, licences, manifests and tracked files
    Lint(lint::Args),
    /// Measure, and compare with a direct link and other networks (needs root)
    Bench(play::Args),
    /// Load, attach and test on other kernels, in QEMU (needs root)
    Kernels(kernels::Args),
    /// What `kernels` runs as the first process of a guest
    #[command(hide = true)]
    Guest(kernels::guest::Args),
    /// Remove what killed runs of tests and demo left behind (needs root)
    CleanNets(nets::Args),
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Setup(args) => setup::run(&args)?,
        Command::BuildEbpf(args) => {
            setup::ensure(&[setup::Need::Build])?;
            ebpf::build(&args)?;
        }
        Command::Dist(args) => dist::run(&args)?,
        Command::AgentV1 => v1::run()?,
        Command::Image(args) => image::run(&args)?,
        Command::Cluster(args) => return cluster::run(&args),
        Command::E2e(args) => return e2e::run(&args),
        Command::PolicyConformance(args) => return e2e::policies::run(&args),
        Command::Demo(args) => return play::demo(&args),
        Command::Test(args) => return test::run(&args),
        Command::Lint(args) => lint::run(&args)?,
        Command::Bench(args) => return bench::run(&args),
        Command::Kernels(args) => kernels::run(&args)?,
        Command::Guest(args) => return kernels::guest::run(&args),
        Command::CleanNets(args) => nets::run(&args)?,
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn a_mistyped_command_is_answered_with_the_nearest() {
        let Err(error) = Cli::try_parse_from(["xtask", "build-epbf"]) else { panic!("accepted") };
        assert!(error.to_string().contains("build-ebpf"), "{error}");
        assert_eq!(error.exit_code(), 2);
    }

    #[test]
    fn all_options_of_the_demo_are_its_own() {
        let cli = Cli::try_parse_from(["xtask", "demo", "--routing", "native", "--keep", "--help"]);
        assert!(matches!(cli, Ok(Cli { command: Command::Demo(_) })));
    }
}
