//! `demo` and `bench`: build everything as for users, then become the program of the test bench that does the work.

use std::process::ExitCode;

use anyhow::Result;

use crate::cmd::{Cmd, need_root};
use crate::dist::{self, Profile};
use crate::setup::{self, Need};
use crate::{ebpf, paths, test};

/// Everything after the command's name goes to the program.
#[derive(clap::Args, Debug)]
#[command(disable_help_flag = true)]
pub struct Args {
    /// Options of the program itself; --help lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub args: Vec<String>,
}

impl Args {
    /// True where the program only prints its options.
    pub fn asks_for_help(&self) -> bool {
        self.args.iter().any(|a| a == "--help" || a == "-h")
    }
}

/// The demo.
pub fn demo(args: &Args) -> Result<ExitCode> {
    let mut needs = vec![Need::Build, Need::Network];
    if args.args.iter().any(|a| a == "--api-server") {
        needs.push(Need::ApiServer);
    }
    play("demo", args, &needs)
}

/// The benchmarks.
pub fn bench(args: &Args) -> Result<ExitCode> {
    let mut needs = vec![Need::Build, Need::Network];
    if needs_kubernetes(&args.args) {
        needs.extend([Need::ApiServer, Need::KubeProxy]);
    }
    play("bench", args, &needs)
}

/// The program of the benchmarks, built, with the options of its command.
pub fn bench_program(args: &Args) -> Result<Cmd> {
    Ok(build("bench", &[Need::Build, Need::Network])?.args(&args.args))
}

/// kube-proxy, and the API server that it asks, are compared with by the group `network` alone.
fn needs_kubernetes(args: &[String]) -> bool {
    let named = |group: &str| args.iter().any(|a| a == group);
    let others = ["packets", "control", "maglev", "churn", "policies", "xdp", "cni"];
    named("network") || named("all") || !others.into_iter().any(named)
}

fn play(name: &str, args: &Args, needs: &[Need]) -> Result<ExitCode> {
    if args.asks_for_help() {
        // Help must not wait for an optimised build, nor ask for root.
        let run = Cmd::cargo().args(["run", "--quiet", "--package", "testkit", "--bin", name, "--", "--help"]);
        return Ok(test::exit_code(run.dir(paths::root()).status()?.code()));
    }
    let program = build(name, needs)?;
    // Replacing this process: Ctrl-C reaches the program alone, and its status is the command's.
    Err(program.args(&args.args).exec())
}

/// Builds everything as for users; returns the program without arguments.
fn build(name: &str, needs: &[Need]) -> Result<Cmd> {
    need_root(name)?;
    setup::ensure(needs)?;
    ebpf::build(&ebpf::Args::default())?;
    dist::build(Profile::Release, &["testkit"])?;
    test::prepare(Cmd::new(Profile::Release.built().join(name)), Profile::Release)
}

#[cfg(test)]
mod tests {
    use super::needs_kubernetes;

    #[test]
    fn kubernetes_is_built_only_for_the_group_that_compares_with_it() {
        for (words, wanted) in [
            (&[][..], true),
            (&["--quick"], true),
            (&["all"], true),
            (&["network", "--rounds", "3"], true),
            (&["packets", "network"], true),
            (&["packets", "--runs", "5"], false),
            (&["control", "cni"], false),
            (&["churn", "--quick"], false),
            (&["policies"], false),
        ] {
            let words: Vec<String> = words.iter().map(ToString::to_string).collect();
            assert_eq!(needs_kubernetes(&words), wanted, "{words:?}");
        }
    }
}
