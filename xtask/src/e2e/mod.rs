//! `e2e`: Kubernetes' own end-to-end tests against a cluster of ours, and a table of what came of each.
//!
//! | File | Job |
//! |---|---|
//! | `exclusions` | what is not run, and why |
//! | `suite` | runs ginkgo in the namespace of the outside world, with live results |
//! | `report` | ginkgo's report -> one outcome for each test -> table |
//! | `conformance` | several runs -> `docs/conformance.md` |
//! | `evidence` | what agents and nodes know, kept when something failed |
//! | `policies` | `policy-conformance`: the same for the tests of the network policy API |

mod conformance;
mod evidence;
mod exclusions;
pub mod policies;
mod report;
mod suite;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::cluster::{self, Cluster, Settings};
use crate::cmd::need_root;
use crate::setup::{self, Need};
use crate::{paths, ui};
use report::{Outcome, Run};

/// Options of `e2e`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Name of the cluster; one that runs is used as it is, another is started and removed afterwards
    #[arg(long, default_value = cluster::DEFAULT)]
    name: String,
    #[command(flatten)]
    settings: Settings,
    /// Run only tests whose full name matches this regular expression
    #[arg(long, value_name = "RE", default_value = r"\[sig-network\]")]
    focus: String,
    /// Do not run tests whose full name matches this
    #[arg(long, value_name = "RE")]
    skip: Option<String>,
    /// Run also what is known not to work here (`xtask/src/e2e/exclusions.rs`)
    #[arg(long)]
    all: bool,
    /// Where log, JUnit, report and table are put
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    /// How many tests at a time
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=16))]
    procs: u8,
    /// Run nothing: write docs/conformance.md from the reports in these directories; several of one cluster and one commit are one run
    #[arg(long, value_name = "DIR", num_args = 1.., conflicts_with_all = ["focus", "skip", "report"])]
    record: Vec<PathBuf>,
}

/// The command; failure when a test failed.
pub fn run(args: &Args) -> Result<ExitCode> {
    if !args.record.is_empty() {
        return conformance::write(&args.record).map(|()| ExitCode::SUCCESS);
    }
    need_root("e2e")?;
    let dir = args.report.clone().unwrap_or_else(|| paths::target().join("e2e"));
    std::fs::create_dir_all(&dir).with_context(|| format!("making the directory {}", dir.display()))?;
    let dir = dir.canonicalize()?;
    in_cluster(&args.name, &args.settings, &[Need::Cluster, Need::E2e], |cluster| {
        ui::step(&format!("end-to-end tests on {}", cluster.settings));
        tests(args, cluster, &dir)
    })
}

/// Runs tests in the cluster of this name, or in one with these settings that is removed afterwards.
fn in_cluster(
    name: &str,
    settings: &Settings,
    needs: &[Need],
    tests: impl FnOnce(&Cluster) -> Result<ExitCode>,
) -> Result<ExitCode> {
    let present = Cluster::find(name)?;
    let version = present.as_ref().map_or(settings.version, |cluster| cluster.settings.version);
    setup::ensure_with(version, needs)?;
    let is_ours = present.is_none();
    if is_ours {
        cluster::up(name, settings)?;
    }
    let cluster = match present {
        Some(cluster) => cluster,
        None => Cluster::find(name)?.context("the cluster vanished")?,
    };
    let result = tests(&cluster);
    if is_ours {
        cluster::down(name)?;
    }
    result
}

#[expect(clippy::print_stdout, reason = "the table is the command's result")]
fn tests(args: &Args, cluster: &Cluster, dir: &std::path::Path) -> Result<ExitCode> {
    cluster::start_balancer(cluster)?;
    let skips: Vec<String> = args.skip.iter().cloned().chain(excluded(args, &cluster.settings)).collect();
    suite::run(cluster, &args.focus, &skips.join("|"), args.procs, dir)?;
    let run = Run::read(dir, cluster, &args.focus, args.skip.as_deref())?;
    report::keep(&run, dir)?;
    run.keep_table(dir)?;
    print!("{}", run.table());
    let failed = run.count(Outcome::Failed);
    if failed > 0 {
        evidence::collect(cluster, &run, dir)?;
    }
    println!("\n{}; all of it is in {}", run.counts(), dir.display());
    Ok(if failed == 0 && run.count(Outcome::Passed) > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// As regular expressions.
fn excluded(args: &Args, settings: &Settings) -> Vec<String> {
    if args.all {
        return Vec::new();
    }
    exclusions::of(settings).map(|it| regex::escape(it.part)).collect()
}
