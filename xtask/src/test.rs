//! `test`: everything that `cargo test` needs, then `cargo test`, and a table of tiers. With `--long`, the campaigns instead.

mod long;
mod table;

use std::io::{IsTerminal, Write, stdout};
use std::path::PathBuf;
use std::process::{ExitCode, ExitStatus};

use anyhow::{Context, Result};

use crate::cmd::{Cmd, need_root};
use crate::dist::{self, Profile};
use crate::setup::{self, Need};
use crate::{ebpf, paths, ui};
use table::{Counter, Table};

/// Options of `test`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Run only tests whose name holds this; with --long, only campaigns
    filter: Option<String>,
    /// Run the campaigns, which take hours, instead of the tests (docs/testing.md)
    #[arg(long, conflicts_with_all = ["package", "test", "harness"])]
    long: bool,
    /// Run only the tests of this package (rustnet-tests: those that cross crates)
    #[arg(short, long)]
    package: Option<String>,
    /// Run only this test target of the package
    #[arg(long, value_name = "NAME")]
    test: Option<String>,
    /// Test optimised programs instead of those with overflow checks and debug assertions
    #[arg(long)]
    release: bool,
    /// For the test programs themselves: --nocapture, --test-threads 1, --ignored...
    #[arg(last = true)]
    harness: Vec<String>,
}

/// The command; returns the status of `cargo test`, or failure if a campaign failed.
#[expect(clippy::print_stdout, reason = "the table is the command's result")]
pub fn run(args: &Args) -> Result<ExitCode> {
    need_root("test")?;
    let needs = needs(args);
    setup::ensure(&needs)?;
    ebpf::build(&ebpf::Args::default())?;
    // In a process of its own, which enters a mount namespace.
    Cmd::new(this_program()?).args(["build-ebpf", "--verify"]).run()?;
    let profile = if args.release { Profile::Release } else { Profile::Dev };
    dist::build(profile, &[])?;
    if args.long {
        return long::run(args.filter.as_deref(), profile);
    }
    ui::step("cargo test");
    let (status, table) = counted(&prepare(cargo_test(args), profile)?, stdout())?;
    print!("\n{table}");
    Ok(exit_code(status.code()))
}

/// What has to be installed: all, or what tests without Kubernetes need. Campaigns with Kubernetes install the rest themselves.
fn needs(args: &Args) -> Vec<Need> {
    let kubernetes = [Need::ApiServer, Need::KubeProxy, Need::Cluster, Need::E2e];
    let is_local = args.long || matches!(args.test.as_deref(), Some("packet" | "fabric" | "it"));
    let needs = [Need::Build, Need::Network, Need::Cnitool, Need::PolicyOracle];
    needs.into_iter().chain(kubernetes.into_iter().filter(|_| !is_local)).collect()
}

/// Runs tests, copies what they print to `to`, and counts it. Both streams go through one pipe, so that they stay in order.
fn counted(cargo: &Cmd, to: impl Write) -> Result<(ExitStatus, Table)> {
    let colour = if stdout().is_terminal() { "always" } else { "never" };
    let cargo = cargo.clone();
    let cargo =
        if std::env::var_os("CARGO_TERM_COLOR").is_some() { cargo } else { cargo.env("CARGO_TERM_COLOR", colour) };
    let mut counter = Counter::default();
    let status = cargo.status_with(|output| counter.copy(output, to))?;
    Ok((status, counter.table()))
}

fn cargo_test(args: &Args) -> Cmd {
    let mut cargo = Cmd::cargo().args(["test", "--no-fail-fast"]);
    cargo = match &args.package {
        Some(package) => cargo.args(["--package", package]),
        None => cargo.args(["--workspace", "--exclude", "rustnet-ebpf"]),
    };
    if let Some(test) = &args.test {
        cargo = cargo.args(["--test", test]);
    }
    if args.release {
        cargo = cargo.arg("--release");
    }
    cargo = cargo.args(&args.filter);
    if args.harness.is_empty() { cargo } else { cargo.arg("--").args(&args.harness) }
}

/// Tells a program of the test bench where everything is.
pub fn prepare(cmd: Cmd, profile: Profile) -> Result<Cmd> {
    let kubernetes = setup::Kubernetes::default().programs()?;
    Ok(dist::environment(cmd, profile)?
        .env("RUSTNET_DIST", profile.dist())
        .env("RUSTNET_KUBERNETES", &kubernetes)
        .env("RUSTNET_XTASK", this_program()?)
        .env("RUSTNET_CNITOOL", paths::tools().join("cnitool"))
        .env("RUSTNET_POLICY_ORACLE", paths::policy_oracle())
        .path_first(&[paths::tools()])
        .dir(paths::root()))
}

/// As it was called: what the link of the running process says is the file's former name once cargo has built it again.
fn this_program() -> Result<PathBuf> {
    let name = std::env::args_os().next().context("this program was started without a name")?;
    std::path::absolute(name).context("where is this program?")
}

/// A child's status as ours; a child ended by a signal counts as a failure.
pub fn exit_code(status: Option<i32>) -> ExitCode {
    ExitCode::from(status.and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn command(words: &[&str]) -> String {
        let line = Line::try_parse_from([&["test"], words].concat()).unwrap();
        cargo_test(&line.args).to_string()
    }

    #[test]
    fn without_options_the_whole_workspace_is_tested() {
        assert_eq!(command(&[]), "cargo test --no-fail-fast --workspace --exclude rustnet-ebpf");
    }

    #[test]
    fn filter_package_and_harness_options_are_passed_on() {
        assert_eq!(
            command(&["conntrack", "-p", "rustnet-tests", "--test", "packet", "--", "--nocapture"]),
            "cargo test --no-fail-fast --package rustnet-tests --test packet conntrack -- --nocapture"
        );
    }
}
