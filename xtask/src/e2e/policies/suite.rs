//! One run of the tests' program, with each test's result as it comes.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::Sctp;
use super::events::{Events, ROOT};
use crate::cluster::{self, Cluster};
use crate::e2e::report::Test;
use crate::{paths, ui};

const CRD: &str = "crd/clusternetworkpolicies.policy.networking.k8s.io";
/// Much more than they take, but for a network that enforces nothing: then each question takes ten seconds.
const TIMEOUT: &str = "-test.timeout=3h";

/// Installs `ClusterNetworkPolicy`, or brings it to the tests' version. It stays: policies of others may be of that kind.
pub fn install(cluster: &Cluster) -> Result<()> {
    cluster.kubectl()?.args(["apply", "--server-side", "-f"]).arg(paths::policy_crd()).capture()?;
    cluster.ask(&["wait", "--for=condition=Established", "--timeout=60s", CRD]).map(drop)
}

/// Runs the tests that the pattern selects, all without one, and returns what came of each.
pub fn run(cluster: &Cluster, pattern: Option<&str>, sctp: Sctp, dir: &Path) -> Result<Vec<Test>> {
    let mut log = File::create(dir.join("log"))?;
    let report = dir.join("report.yaml");
    let _ = std::fs::remove_file(&report); // of an earlier run
    let pattern = pattern.map(|it| format!("/{it}")).unwrap_or_default();
    let mut tests = Command::new("nsenter");
    tests
        .arg(format!("--net={}", cluster.netns_file("sw").display()))
        .arg(paths::test2json())
        .arg("-t")
        .arg(paths::policy_tests())
        .args(["-test.v=test2json", TIMEOUT, &format!("-test.run=^{ROOT}${pattern}")])
        .args(["-conformance-profiles=ClusterNetworkPolicy", "-all-features"])
        // The report wants them; none of them is checked.
        .args(["-organization=rustnet", "-project=rustnet", "-contact=-", "-url=https://rustnet.io"])
        .arg(format!("-version={}", crate::e2e::report::version(cluster)))
        .arg(format!("-additional-info=cargo xtask policy-conformance; SCTP: {}", sctp.word()));
    if pattern.is_empty() {
        // A test that was not selected would be one that passed there.
        tests.arg(format!("-report-output={}", report.display()));
    }
    let mut tests = tests
        .current_dir(dir)
        // No proxies, no other cluster.
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", dir)
        .env("KUBECONFIG", cluster.kubeconfig("inside"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log.try_clone()?)
        .spawn()
        .context("cannot run the tests")?;
    let output = tests.stdout.take().context("the tests have an output")?;
    let mut events = Events::default();
    for line in BufReader::new(output).lines() {
        let said = events.line(&line?)?;
        log.write_all(said.output.as_bytes())?;
        if let Some(text) = said.result {
            ui::detail(&text);
        }
    }
    tests.wait()?;
    let tests = events.tests();
    ensure!(
        !tests.is_empty(),
        "no test ran; the end of {}:\n{}",
        dir.join("log").display(),
        cluster::tail(&dir.join("log"), 20)
    );
    Ok(tests)
}
