//! `policy-conformance`: others' tests of network policies against a cluster of ours.
//!
//! | File | Job |
//! |---|---|
//! | `api`, `cyclonus` | how each suite is called, and what it needs in the cluster |
//! | `suite` | runs it in the namespace of the outside world, with live results |
//! | `events` | what Go says of its tests -> one outcome for each |
//! | `page` | several runs -> their part of `docs/conformance.md` |

mod api;
mod cyclonus;
mod events;
mod page;
mod suite;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::evidence;
use super::report::{self, Outcome, Run};
use crate::cluster::{self, Cluster, Settings};
use crate::cmd::need_root;
use crate::setup::{self, Need};
use crate::{host, paths, ui};

/// Others' tests of network policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Suite {
    /// The conformance tests of sigs.k8s.io/network-policy-api: ClusterNetworkPolicy
    NetworkPolicyApi,
    /// The test cases of cyclonus: NetworkPolicy, asked from all pods to all pods after each change
    Cyclonus,
}

impl Suite {
    const fn title(self) -> &'static str {
        match self {
            Self::NetworkPolicyApi => "conformance tests of the network policy API",
            Self::Cyclonus => "test cases of cyclonus",
        }
    }

    /// Where its report goes, below the target directory.
    const fn dir(self) -> &'static str {
        match self {
            Self::NetworkPolicyApi => "policy-conformance",
            Self::Cyclonus => "cyclonus",
        }
    }
}

/// Options of `policy-conformance`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Which tests
    #[arg(long, value_enum, default_value_t = Suite::NetworkPolicyApi)]
    suite: Suite,
    /// Name of the cluster; one that runs is used as it is, another is started and removed afterwards
    #[arg(long, default_value = cluster::DEFAULT)]
    name: String,
    #[command(flatten)]
    settings: Settings,
    /// Run only these tests: a regular expression, for those of the API as Go's -run takes it (CNPAdminTierEgressTCP/allow)
    #[arg(long, value_name = "RE")]
    run: Option<String>,
    /// Where log, reports and table are put
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    /// Run nothing: write the part of docs/conformance.md from the reports in these directories
    #[arg(long, value_name = "DIR", num_args = 1.., conflicts_with_all = ["run", "report"])]
    record: Vec<PathBuf>,
}

/// What the pods speak SCTP by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Sctp {
    /// The kernel.
    Kernel,
    /// A program over raw sockets (`tests/kubernetes/sctp`): the kernel has none.
    RawSockets,
}

impl Sctp {
    /// What runs with it are to be reported as.
    const fn word(self) -> &'static str {
        match self {
            Self::Kernel => "the kernel's",
            Self::RawSockets => "over raw sockets",
        }
    }
}

/// A run of a suite.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct PolicyRun {
    #[serde(flatten)]
    run: Run,
    suite: Suite,
    /// The version of the tests.
    tests_version: String,
    sctp: Sctp,
}

/// The command; failure when a test failed.
pub fn run(args: &Args) -> Result<ExitCode> {
    if !args.record.is_empty() {
        return page::write(args.suite, &args.record).map(|()| ExitCode::SUCCESS);
    }
    need_root("policy-conformance")?;
    let dir = args.report.clone().unwrap_or_else(|| paths::target().join(args.suite.dir()));
    std::fs::create_dir_all(&dir).with_context(|| format!("making the directory {}", dir.display()))?;
    let dir = dir.canonicalize()?;
    super::in_cluster(&args.name, &args.settings, &[Need::Cluster, Need::PolicyTests], |cluster| {
        ui::step(&format!("{} on {}", args.suite.title(), cluster.settings));
        tests(args, cluster, &dir)
    })
}

/// Waits for namespaces that are being deleted: those of the run before, in which nothing can be created.
fn settle(cluster: &Cluster) -> Result<()> {
    let ending = cluster.ask(&["get", "namespaces", "--field-selector=status.phase=Terminating", "-o", "name"])?;
    let names: Vec<&str> = ending.split_whitespace().collect();
    if names.is_empty() {
        return Ok(());
    }
    cluster.ask(&[&["wait", "--for=delete", "--timeout=3m"], names.as_slice()].concat()).map(drop)
}

#[expect(clippy::print_stdout, reason = "the table is the command's result")]
fn tests(args: &Args, cluster: &Cluster, dir: &Path) -> Result<ExitCode> {
    let sctp = if host::has_sctp() { Sctp::Kernel } else { Sctp::RawSockets };
    cluster::load_policy_tests(cluster)?;
    settle(cluster)?;
    let pattern = args.run.as_deref();
    let (tests, tests_version) = match args.suite {
        Suite::NetworkPolicyApi => {
            api::install(cluster)?;
            let tests = suite::run(cluster, dir, |it| api::call(it, cluster, pattern, sctp, dir))?;
            (tests, setup::policy_api_version()?)
        }
        Suite::Cyclonus => (suite::run(cluster, dir, |it| cyclonus::call(it, pattern))?, setup::cyclonus_version()?),
    };
    let run = PolicyRun { run: Run::of(cluster, tests)?, suite: args.suite, tests_version, sctp };
    report::keep(&run, dir)?;
    let run = &run.run;
    run.keep_table(dir)?;
    print!("{}", run.table());
    let failed = run.count(Outcome::Failed);
    if failed > 0 {
        evidence::nodes(cluster, dir)?;
    }
    println!("\n{}; all of it is in {}", run.counts(), dir.display());
    Ok(if failed == 0 && run.count(Outcome::Passed) > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
