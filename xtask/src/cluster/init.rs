//! What runs as process 1 of a node: furnishes its file system, and then reaps what is left to it.
//!
//! The node sees this machine's file system, but what it writes goes to memory; what containerd and kubelet write goes to
//! the cluster's directory. Its bpf file system, `/run`, `/etc/cni` and `/opt/cni` are its own and empty.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{chdir, pivot_root};

use super::layout::{Cluster, Node};
use super::settings::{SWITCH, address};
use super::{cgroup, node};
use crate::paths;

/// Kernel tunables of the whole machine that kubelet would set: it is shown files that hold what it wants.
const TUNABLES: [(&str, &str); 6] = [
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];

/// The directory on a node's disk whose manifests its kubelet runs without the API server.
pub const STATIC_PODS: &str = "manifests";
/// Where the node's own control group of the unified hierarchy is found by the same path on every node.
pub const CGROUP: &str = "/run/node-cgroup";

/// Does not return but by an error, or when the node ends.
pub fn run(cluster: &Cluster, node: &Node) -> Result<()> {
    furnish(cluster, node)?;
    fs::write("/proc/sys/kernel/hostname", &node.name).context("setting the host name")?;
    // In the cluster's directory, which is shared with the outside.
    fs::write(node::ready(cluster, node), "")?;
    reap()
}

fn furnish(cluster: &Cluster, node: &Node) -> Result<()> {
    let dir = cluster.node_dir(node);
    let (root, memory) = (dir.join("root"), dir.join("memory"));
    bind_flags(Path::new("/"), MsFlags::MS_REC | MsFlags::MS_PRIVATE)?;
    for made in [&root, &memory] {
        make_dir(made)?;
    }
    filesystem("tmpfs", &memory, "mode=755")?;
    let (upper, work) = (memory.join("upper"), memory.join("work"));
    make_dir(&upper)?;
    make_dir(&work)?;
    let layers = format!("lowerdir=/,upperdir={},workdir={}", upper.display(), work.display());
    filesystem("overlay", &root, &layers)?;
    filesystem("proc", &root.join("proc"), "")?;
    filesystem("sysfs", &root.join("sys"), "")?;
    bind(Path::new("/sys/fs/cgroup"), &root.join("sys/fs/cgroup"))?;
    filesystem("bpf", &root.join("sys/fs/bpf"), "")?;
    bind(Path::new("/dev"), &root.join("dev"))?;
    for (path, options) in [("run", "mode=755"), ("tmp", "mode=1777"), ("etc/cni", "mode=755"), ("opt/cni", "mode=755")]
    {
        filesystem("tmpfs", &root.join(path), options)?;
    }
    // Programs and the cluster's files.
    let cache = paths::cache();
    bind(&cache, &inside(&root, &cache))?;
    for (name, path) in [
        ("containerd", "var/lib/containerd"),
        ("kubelet", "var/lib/kubelet"),
        ("pods", "var/log/pods"),
        ("containers", "var/log/containers"),
        (STATIC_PODS, "etc/kubernetes/manifests"),
    ] {
        let kept = cluster.disk(node).join(name);
        make_dir(&kept)?;
        bind(&kept, &root.join(path))?;
    }
    for path in ["var/lib/cni", "etc/cni/net.d", "opt/cni/bin", "run/containerd", "run/netns"] {
        make_dir(&root.join(path))?;
    }
    own_cgroup(cluster, node, &root)?;
    tunables(&root)?;
    names(cluster, node, &root)?;
    enter(&root)
}

/// The programs that watch sockets are attached to a directory of the unified hierarchy: to the node's, not the machine's.
fn own_cgroup(cluster: &Cluster, node: &Node, root: &Path) -> Result<()> {
    match cgroup::unified(&cluster.cgroup(node)) {
        Some(own) => bind(&own, &inside(root, Path::new(CGROUP))),
        None => make_dir(&inside(root, Path::new(CGROUP))),
    }
}

fn tunables(root: &Path) -> Result<()> {
    let shown = root.join("run/tunables");
    make_dir(&shown)?;
    for (key, value) in TUNABLES {
        let (file, real) = (shown.join(key.replace('/', "_")), root.join("proc/sys").join(key));
        fs::write(&file, format!("{value}\n"))?;
        if real.exists() {
            bind(&file, &real)?;
        }
    }
    Ok(())
}

fn names(cluster: &Cluster, node: &Node, root: &Path) -> Result<()> {
    let family = cluster.settings.ip_family;
    // Nobody answers there, and soon: there is no Internet to ask.
    let resolver = lines(address(SWITCH).of(family).iter().map(|it| format!("nameserver {it}")));
    let own = lines(node.address().of(family).iter().map(|it| format!("{it} {}", node.name)));
    let etc = root.join("etc");
    // It may be a link to somewhere in the real /run.
    let _ = fs::remove_file(etc.join("resolv.conf"));
    fs::write(etc.join("resolv.conf"), &resolver)?;
    fs::write(root.join("run/resolv.conf"), resolver)?;
    fs::write(etc.join("hostname"), format!("{}\n", node.name))?;
    fs::write(etc.join("hosts"), format!("127.0.0.1 localhost\n::1 localhost\n{own}"))?;
    Ok(())
}

/// Text of these lines, each ended.
fn lines(lines: impl Iterator<Item = String>) -> String {
    lines.flat_map(|line| [line, "\n".to_owned()]).collect()
}

/// Makes `root` the root. Mounts made inside reach containers: volumes are mounted after their start.
fn enter(root: &Path) -> Result<()> {
    let old = root.join("mnt");
    make_dir(&old)?;
    chdir(root)?;
    pivot_root(root, &old).context("changing the root")?;
    chdir("/")?;
    umount2("/mnt", MntFlags::MNT_DETACH)?;
    bind_flags(Path::new("/"), MsFlags::MS_REC | MsFlags::MS_SHARED)
}

/// Waits for children, one's own and orphans, forever.
fn reap() -> Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGCHLD);
    signals.thread_block()?;
    loop {
        signals.wait()?;
        while waitpid(None, Some(WaitPidFlag::WNOHANG)).is_ok_and(|status| status != WaitStatus::StillAlive) {}
    }
}

fn filesystem(kind: &str, at: &Path, options: &str) -> Result<()> {
    make_dir(at)?;
    mount(Some(kind), at, Some(kind), MsFlags::empty(), Some(options))
        .with_context(|| format!("mounting {kind} at {} ({options})", at.display()))
}

/// A directory with all mounts below it, or a file.
fn bind(from: &Path, at: &Path) -> Result<()> {
    if from.is_dir() {
        make_dir(at)?;
    }
    mount(Some(from), at, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
        .with_context(|| format!("binding {} to {}", from.display(), at.display()))
}

fn bind_flags(at: &Path, flags: MsFlags) -> Result<()> {
    mount(None::<&str>, at, None::<&str>, flags, None::<&str>)
        .with_context(|| format!("propagation of {}", at.display()))
}

fn inside(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

fn make_dir(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(path).with_context(|| format!("making the directory {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}
