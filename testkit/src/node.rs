//! A node: its namespaces, its directories, and its place in the fabric.

use crate::janitor::{self, Process, RunDir};
use crate::netns::{Holder, Netns, NsCommand, Own};
use anyhow::{Context, Result};
use ipnet::IpNet;
use nix::mount::{MsFlags, mount};
use rustnet_agent::bpf::store::counters::Counters;
use rustnet_agent::config::Routing;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a node is to be.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Name of its Node object.
    pub name: String,
    /// Name of its namespace.
    pub full_name: String,
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
    pub pod_cidrs: Vec<IpNet>,
    pub routing: Routing,
    pub agent: &'static [&'static str],
    pub manifests: PathBuf,
    pub run: Arc<RunDir>,
}

/// A control group; removed when dropped.
#[derive(Debug)]
struct Cgroup(PathBuf);

impl Drop for Cgroup {
    fn drop(&mut self) {
        janitor::drop_cgroup(&self.0);
    }
}

/// The order of the fields is the order of their end: processes first, then what they use.
#[derive(Debug)]
struct Inner {
    agent: Mutex<Option<Agent>>,
    holder: Holder,
    cgroup: Option<Cgroup>,
    dir: PathBuf,
    plan: Plan,
}

/// A node. Cheap to clone; it ends with its last clone, and pods hold one.
#[derive(Clone, Debug)]
pub struct Node(Arc<Inner>);

/// A running agent; `agent.rs` starts and stops it.
#[derive(Debug)]
pub(crate) struct Agent {
    pub process: Process,
}

impl Node {
    pub(crate) fn new(plan: Plan) -> Result<Self> {
        let dir = plan.run.path().join(&plan.name);
        for folder in ["bpf", "run", "netns", "cni/bin", "cni/net.d"] {
            let path = dir.join(folder);
            std::fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        }
        let cgroup = janitor::make_cgroup(&plan.full_name).map(Cgroup);
        let own = Own { mounts: true, cgroup: cgroup.as_ref().map(|c| c.0.clone()) };
        let holder = Holder::new(&plan.full_name, own)?;
        let bpf = dir.join("bpf");
        holder.run(|| mount(Some("bpf"), &bpf, Some("bpf"), MsFlags::empty(), None::<&str>))?.with_context(|| {
            format!("cannot mount a bpf file system on {}: is CONFIG_BPF_SYSCALL in the kernel?", bpf.display())
        })?;
        Ok(Self(Arc::new(Inner { agent: Mutex::new(None), holder, cgroup, dir, plan })))
    }

    pub(crate) fn agent(&self) -> MutexGuard<'_, Option<Agent>> {
        self.0.agent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn plan(&self) -> &Plan {
        &self.0.plan
    }

    /// Name of its Node object.
    pub fn name(&self) -> &str {
        &self.0.plan.name
    }

    /// Its namespaces: the host's side, not a pod.
    pub fn netns(&self) -> &Netns {
        &self.0.holder
    }

    /// Switches checksum offload of its uplink. Without it, packets leave the node with finished checksums.
    pub fn set_tx_checksum(&self, on: bool) -> Result<()> {
        self.netns().run(|| crate::raw::set_tx_checksum("eth0", on))?
    }

    /// Its IPv4 address.
    pub fn v4(&self) -> Ipv4Addr {
        self.0.plan.v4
    }

    /// Its IPv6 address.
    pub fn v6(&self) -> Ipv6Addr {
        self.0.plan.v6
    }

    /// Its address of the same family as another.
    pub fn address_like(&self, other: IpAddr) -> IpAddr {
        if other.is_ipv4() { self.v4().into() } else { self.v6().into() }
    }

    /// Both addresses.
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4().into(), self.v6().into()]
    }

    /// Its pod ranges.
    pub fn pod_cidrs(&self) -> &[IpNet] {
        &self.0.plan.pod_cidrs
    }

    /// Everything of this node on disk.
    pub fn dir(&self) -> &Path {
        &self.0.dir
    }

    /// The agent's bpffs directory; to be seen from inside the node only.
    pub fn bpffs(&self) -> PathBuf {
        self.0.dir.join("bpf/rustnet")
    }

    /// The same, as seen from outside.
    pub fn bpffs_from_outside(&self) -> PathBuf {
        let inside = self.bpffs();
        let below_root = inside.strip_prefix("/").unwrap_or(&inside);
        PathBuf::from(format!("/proc/{}/root", self.netns().pid())).join(below_root)
    }

    /// The agent's run directory.
    pub fn run_dir(&self) -> PathBuf {
        self.0.dir.join("run")
    }

    /// Where the CNI binary is installed.
    pub fn cni_bin_dir(&self) -> PathBuf {
        self.0.dir.join("cni/bin")
    }

    /// Where the CNI configuration is installed.
    pub fn cni_conf_dir(&self) -> PathBuf {
        self.0.dir.join("cni/net.d")
    }

    /// The control group of its processes, where there is one.
    pub fn cgroup(&self) -> Option<&Path> {
        self.0.cgroup.as_ref().map(|c| c.0.as_path())
    }

    /// Runs the `rustnetctl` command on this node and gives its standard output.
    pub fn rustnetctl(&self, args: &[&str]) -> Result<String> {
        self.rustnetctl_command(args)?.text()
    }

    /// Runs the `rustnetctl` command on this node and gives its exit code, whatever it is, with both outputs.
    pub fn try_rustnetctl(&self, args: &[&str]) -> Result<(Option<i32>, String)> {
        let output = self.rustnetctl_command(args)?.output(None)?;
        let texts = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned());
        Ok((output.status.code(), texts.concat()))
    }

    fn rustnetctl_command(&self, args: &[&str]) -> Result<NsCommand> {
        let program = crate::dist::find("rustnetctl")?;
        let command = self.netns().command(program)?;
        Ok(command.args(["--bpffs"]).args([self.bpffs()]).args(["--run-dir"]).args([self.run_dir()]).args(args))
    }

    /// The value of a counter: packets by reason name, over all hooks.
    pub fn counter(&self, reason: rustnet_common::drop::DropReason) -> Result<u64> {
        self.counters(&[reason])
    }

    /// Packets that a hook has forwarded.
    pub fn forwarded_at(&self, hook: u8) -> Result<u64> {
        let rows = Counters::open(&self.bpffs_from_outside())?.read()?;
        let is_of = |reason: rustnet_common::drop::DropReason| reason == rustnet_common::drop::DropReason::Forwarded;
        Ok(rows.iter().filter(|row| is_of(row.reason) && row.hook == hook).map(|row| row.count.packets).sum())
    }

    /// The sum of several counters.
    pub fn counters(&self, reasons: &[rustnet_common::drop::DropReason]) -> Result<u64> {
        let rows = Counters::open(&self.bpffs_from_outside())?.read()?;
        Ok(rows.iter().filter(|row| reasons.contains(&row.reason)).map(|row| row.count.packets).sum())
    }
}
