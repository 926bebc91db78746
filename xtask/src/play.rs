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
    play("bench", args, &[Need::Build, Need::Network, Need::Iperf, Need::KubeProxy])
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
