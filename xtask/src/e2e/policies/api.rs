//! The conformance tests of the network policy API: what they need in the cluster, and how they are called.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use super::Sctp;
use super::events::ROOT;
use crate::cluster::Cluster;
use crate::e2e::report;
use crate::paths;

const CRD: &str = "crd/clusternetworkpolicies.policy.networking.k8s.io";
/// Much more than they take; but where nothing is enforced, each denied question takes ten seconds.
const TIMEOUT: &str = "-test.timeout=3h";

/// Installs `ClusterNetworkPolicy`, or brings it to the tests' version. It stays: policies of others may be of that kind.
pub fn install(cluster: &Cluster) -> Result<()> {
    cluster.kubectl()?.args(["apply", "--server-side", "-f"]).arg(paths::policy_crd()).capture()?;
    cluster.ask(&["wait", "--for=condition=Established", "--timeout=60s", CRD]).map(drop)
}

/// Completes the command that runs the tests that the pattern selects, all without one.
pub fn call(command: &mut Command, cluster: &Cluster, pattern: Option<&str>, sctp: Sctp, dir: &Path) {
    let report = dir.join("report.yaml");
    let _ = std::fs::remove_file(&report); // of an earlier run
    let part = pattern.map(|it| format!("/{it}")).unwrap_or_default();
    command
        .arg(paths::test2json())
        .arg("-t")
        .arg(paths::policy_tests())
        .args(["-test.v=test2json", TIMEOUT, &format!("-test.run=^{ROOT}${part}")])
        .args(["-conformance-profiles=ClusterNetworkPolicy", "-all-features"])
        // The report wants them; none of them is checked.
        .args(["-organization=rustnet", "-project=rustnet", "-contact=-", "-url=https://rustnet.io"])
        .arg(format!("-version={}", report::version(cluster)))
        .arg(format!("-additional-info=cargo xtask policy-conformance; SCTP: {}", sctp.word()));
    if pattern.is_none() {
        // It counts a test that was not selected as one that passed.
        command.arg(format!("-report-output={}", report.display()));
    }
}
