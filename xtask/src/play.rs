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
    args: Vec<String>,
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

/// kube-proxy, and the API server that it asks, are compared with by the group `network` alone.
fn needs_kubernetes(args: &[String]) -> bool {
    let named = |group: &str| args.iter().any(|a| a == group);
    named("network") || named("all") || !["packets", "control", "cni"].into_iter().any(named)
}

fn play(name: &str, args: &Args, needs: &[Need]) -> Result<ExitCode> {
    if args.args.iter().any(|a| a == "--help" || a == "-h") {
        // Help must not wait for an optimised build, nor ask for root.
        let run = Cmd::cargo().args(["run", "--quiet", "--package", "testkit", "--bin", name, "--", "--help"]);
        return Ok(test::exit_code(run.dir(paths::root()).status()?.code()));
    }
    need_root(name)?;
    setup::ensure(needs)?;
    ebpf::build(&ebpf::Args::default())?;
    dist::build(Profile::Release, &["testkit"])?;
    let program = test::prepare(Cmd::new(Profile::Release.built().join(name)), Profile::Release)?;
    // Replacing this process: Ctrl-C reaches the program alone, and its status is the command's.
    Err(program.args(&args.args).exec())
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
        ] {
            let words: Vec<String> = words.iter().map(ToString::to_string).collect();
            assert_eq!(needs_kubernetes(&words), wanted, "{words:?}");
        }
    }
}
