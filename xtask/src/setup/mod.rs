//! `setup`: finds what is missing and installs it. Says what it does; with nothing missing it takes a fraction of a second,
//! so the other commands call it first.

mod apt;
mod bpf;
mod go;
mod kubernetes;
mod policy_tests;
mod tools;

use std::time::Instant;

use anyhow::{Result, bail};

use crate::cmd::Cmd;
use crate::ui;

pub use kubernetes::{AGNHOST_SCTP, Kubernetes};
pub use policy_tests::{api_version as policy_api_version, cyclonus_version};
pub use tools::cargo_deny;

/// What a command needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Compiling: a C compiler, the eBPF toolchain.
    Build,
    /// Namespaces and what tests and the demo do in them.
    Network,
    /// The linters.
    Lint,
    /// The foreign CNI driver.
    Cnitool,
    /// Somebody else's reading of network policies.
    PolicyOracle,
    /// A real API server and its store, Helm and promtool.
    ApiServer,
    /// The reference that benchmarks compare with.
    KubeProxy,
    /// Throughput measurements.
    Iperf,
    /// Everything that a node of a real cluster runs, and the images in it.
    Cluster,
    /// Kubernetes' own end-to-end tests.
    E2e,
    /// Others' tests of network policies.
    PolicyTests,
    /// A real Ingress controller.
    Ingress,
    /// Booting other kernels.
    Kernels,
    /// Building for arm64 on another machine, and trying what was built.
    Cross,
}

/// Options of `setup`.
#[derive(clap::Args, Debug, Default)]
pub struct Args {
    /// Say what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// Install this too (tests and the demo with --api-server ask for it themselves)
    #[arg(long, value_name = "WHAT")]
    with: Vec<Extra>,
    /// The version of Kubernetes
    #[arg(long, value_enum, default_value_t)]
    kubernetes: Kubernetes,
    /// Build bpf-linker for the present toolchain's LLVM even when there is one
    #[arg(long)]
    force_linker: bool,
}

/// Large things that are installed only when asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Extra {
    /// kube-apiserver, kubectl, etcd, helm and promtool, built from the Go module proxy (minutes on 2 cores, 2 GB of memory)
    Kubernetes,
    /// kube-proxy, from the same sources, for benchmarks and the comparison with it
    KubeProxy,
    /// All that `cluster up` and `e2e` need: the rest of Kubernetes, containerd, CoreDNS, images (8 minutes on 2 cores)
    Cluster,
    /// QEMU, which boots the kernels that `kernels` downloads, and the AppArmor profile of containers
    Kernels,
    /// The C compiler and library for arm64, and QEMU for its programs
    Arm64,
}

/// The command.
pub fn run(args: &Args) -> Result<()> {
    let mut needs = vec![Need::Build, Need::Network, Need::Lint, Need::Cnitool, Need::PolicyOracle, Need::Iperf];
    needs.extend(args.with.iter().flat_map(|extra| match extra {
        Extra::Kubernetes => vec![Need::ApiServer],
        Extra::KubeProxy => vec![Need::KubeProxy],
        Extra::Cluster => vec![Need::ApiServer, Need::KubeProxy, Need::Cluster, Need::E2e],
        Extra::Kernels => vec![Need::Kernels],
        Extra::Arm64 => vec![Need::Cross],
    }));
    let start = Instant::now();
    let mut work =
        Work { dry_run: args.dry_run, force_linker: args.force_linker, kubernetes: args.kubernetes, ..Work::default() };
    work.all(&needs)?;
    let time = ui::seconds(start.elapsed());
    match (work.done, args.dry_run) {
        (0, _) => ui::step(&format!("setup: nothing is missing ({time})")),
        (_, true) => ui::step("setup: that was a dry run; nothing was changed"),
        (n, false) => ui::step(&format!("setup: complete after {n} installation steps ({time})")),
    }
    Ok(())
}

/// Installs what is missing of `needs`; silent when nothing is.
pub fn ensure(needs: &[Need]) -> Result<()> {
    ensure_with(Kubernetes::default(), needs)
}

/// The same with this version of Kubernetes.
pub fn ensure_with(kubernetes: Kubernetes, needs: &[Need]) -> Result<()> {
    Work { kubernetes, ..Work::default() }.all(needs)
}

/// One run of setup.
#[derive(Default)]
struct Work {
    dry_run: bool,
    force_linker: bool,
    /// The version of its programs.
    kubernetes: Kubernetes,
    /// Installation steps taken, or named in a dry run.
    done: usize,
    /// Whether the package lists have been refreshed.
    updated: bool,
}

impl Work {
    fn all(&mut self, needs: &[Need]) -> Result<()> {
        let missing = tools::missing(needs);
        if !missing.is_empty() {
            for tool in &missing {
                ui::detail(&format!("{} is missing: {}", tool.name, tool.purpose));
            }
            self.install_packages(&tools::packages(&missing)?)?;
            if let (false, Some(tool)) = (self.dry_run, tools::missing(needs).first()) {
                bail!("{} is still missing after the installation of its package", tool.name);
            }
        }
        for need in needs {
            match need {
                Need::Build => bpf::ensure(self)?,
                Need::Lint => tools::ensure_cargo_deny(self)?,
                Need::Cnitool => go::ensure_cnitool(self)?,
                Need::PolicyOracle => go::ensure_policy_oracle(self)?,
                Need::ApiServer => {
                    kubernetes::ensure(self, "kube-apiserver")?;
                    kubernetes::ensure(self, "kubectl")?;
                    kubernetes::ensure(self, "etcd")?;
                    go::ensure_helm(self)?;
                    go::ensure_promtool(self)?;
                }
                Need::KubeProxy => kubernetes::ensure(self, "kube-proxy")?,
                Need::Cluster => {
                    for program in ["kube-controller-manager", "kube-scheduler", "kubelet"] {
                        kubernetes::ensure(self, program)?;
                    }
                    for program in ["pause", "agnhost", "regression-issue-74839"] {
                        kubernetes::ensure(self, program)?;
                    }
                    kubernetes::ensure_fixtures(self)?;
                    go::ensure_coredns(self)?;
                }
                Need::E2e => {
                    kubernetes::ensure(self, "ginkgo")?;
                    kubernetes::ensure(self, "e2e.test")?;
                }
                Need::PolicyTests => policy_tests::ensure(self)?,
                Need::Ingress => go::ensure_skipper(self)?,
                Need::Kernels => go::ensure_profile(self)?,
                Need::Network | Need::Iperf | Need::Cross => {}
            }
        }
        Ok(())
    }

    /// Runs one installation step, or names it in a dry run.
    fn step(&mut self, title: &str, command: &Cmd) -> Result<()> {
        self.done += 1;
        if self.dry_run {
            ui::step(&format!("would run ({title}): {command}"));
            return Ok(());
        }
        ui::detail(&format!("running {command}"));
        command.run_behind(title)
    }
}
