//! A real cluster: Kubernetes with kubelets and containerd, rustnet installed as users install it, and Kubernetes' own
//! end-to-end tests as the judge.
//!
//! What is run here is a choice for every day; all of it is `cargo xtask e2e` (docs/conformance.md). The clusters are those
//! of `cargo xtask cluster`, with programs as every other test has them.

use std::collections::VecDeque;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};

use anyhow::{Context, Result, ensure};

/// Upstream tests for a cluster of both families: what a first user meets, each way of a packet once.
const DUAL: &str = "Networking Granular Checks: Pods|\
    DNS should provide DNS for (services|the cluster|pods for Hostname)|\
    NoSNAT|\
    Connectivity Pod Lifecycle should be able to connect (from|to)|\
    Proxy version v1 should proxy through a service and a pod|\
    Services should (serve a basic endpoint|serve multiport|be able to up and down|be rejected when no endpoints exist)|\
    Services should (allow pods to hairpin|preserve source pod IP|support named targetPorts|provide secure master)|\
    Conntrack should be able to preserve UDP traffic when server pod cycles for a ClusterIP service|\
    IPv6DualStack.*(should be able to reach pod on ipv4 and ipv6|should create pod, add)";
/// And for one of a single family: the same ways, fewer of them.
const SINGLE: &str = "Networking Granular Checks: Pods should function for intra-pod communication|\
    DNS should provide DNS for services|\
    Services should (serve a basic endpoint|allow pods to hairpin|be rejected when no endpoints exist)";

#[test]
fn dual_stack_over_vxlan_installed_by_kustomize() -> Result<()> {
    let cluster = Cluster::up("dual", &["--ip-family=dual", "--routing=vxlan"])?;
    cluster.judge(DUAL)?;
    // The command for operators finds all well, and a fault; annotations limit; no request is lost while the agents are replaced; nothing is left of them in the end.
    cluster.xtask(&["trial", "connectivity", "bandwidth", "restart", "upgrade", "uninstall"])
}

#[test]
fn ipv6_by_native_routes_installed_by_helm() -> Result<()> {
    let cluster = Cluster::up("six", &["--ip-family=ipv6", "--routing=native", "--install=helm"])?;
    cluster.judge(SINGLE)?;
    cluster.xtask(&["trial", "delete"])
}

#[test]
fn ipv4_over_vxlan() -> Result<()> {
    let cluster = Cluster::up("four", &["--ip-family=ipv4", "--routing=vxlan"])?;
    cluster.judge(SINGLE)
}

/// A cluster that ends with its test. One at a time: they share the machine's processors, and time limits of Kubernetes.
struct Cluster {
    name: String,
    _turn: std::sync::MutexGuard<'static, ()>,
}

impl Cluster {
    fn up(family: &str, options: &[&str]) -> Result<Self> {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let image = image()?.display().to_string();
        // Short: it is a part of names of interfaces.
        let cluster = Self { name: format!("t{}{}", &family[..1], std::process::id()), _turn: turn };
        cluster.xtask(&[&["up", "--image", &image], options].concat())?;
        Ok(cluster)
    }

    fn xtask(&self, args: &[&str]) -> Result<()> {
        let result = run(&[&["cluster", "--name", &self.name], args].concat());
        if result.is_err() {
            let _ = run(&["cluster", "--name", &self.name, "status"]);
        }
        result
    }

    /// Kubernetes' tests of these names pass. What they said is left for a look when they do not.
    fn judge(&self, focus: &str) -> Result<()> {
        let report = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("e2e-{}", &self.name[..2]));
        let report = report.display().to_string();
        run(&["e2e", "--name", &self.name, "--focus", focus, "--report", &report])
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Err(error) = run(&["cluster", "--name", &self.name, "down"]) {
            eprintln!("{error:#}");
        }
    }
}

/// The container image with the programs of this run of the tests.
fn image() -> Result<PathBuf> {
    static IMAGE: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let make = || {
        let dist = std::env::var("RUSTNET_DIST").context("RUSTNET_DIST is not set")?;
        let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("rustnet-test.tar");
        let path = file.display().to_string();
        run(&["image", "--dist", &dist, "--tag", "test", "--output", &path])?;
        Ok::<_, anyhow::Error>(file)
    };
    IMAGE.get_or_init(|| make().map_err(|error| format!("{error:#}"))).clone().map_err(anyhow::Error::msg)
}

/// Runs a command of `cargo xtask`; its progress goes where this program's does. The error repeats the command's last lines: whoever
/// reads only the list of failures needs them.
fn run(args: &[&str]) -> Result<()> {
    const LINES: usize = 30;
    let program = std::env::var("RUSTNET_XTASK").context(
        "RUSTNET_XTASK is not set\n  remedy: run the tests by cargo xtask test, which says where everything is",
    )?;
    let mut child = Command::new(program).args(args).stderr(Stdio::piped()).spawn().context("running xtask")?;
    let mut last = VecDeque::new();
    for line in BufReader::new(child.stderr.take().context("no stderr")?).lines() {
        let line = line?;
        writeln!(io::stderr(), "{line}")?;
        last.push_back(line);
        if last.len() > LINES {
            last.pop_front();
        }
    }
    let status = child.wait()?;
    let last = last.make_contiguous().join("\n");
    ensure!(status.success(), "cargo xtask {} ended with {status}:\n{last}", args.join(" "));
    Ok(())
}
