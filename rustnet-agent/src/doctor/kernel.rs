//! Rights of the process, features of the kernel, and the file systems that programs and groups of processes are in.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use super::finding::{Finding, Level};
use crate::bpf::{fs, load, object, probe};
use crate::config::{Config, SocketLb};

/// Where the kernel says whether it compiles programs.
const JIT: &str = "/proc/sys/net/core/bpf_jit_enable";

/// Holds 1 on kernels with PREEMPT_RT.
const REALTIME: &str = "/sys/kernel/realtime";

/// From this release on, PREEMPT_RT kernels run two softirq sections on one CPU at a time, unless they are built with [`BH_LOCK`]
/// (commit 3253cb49cbad).
const REALTIME_PREEMPTS: (u32, u32) = (6, 18);

/// See [`REALTIME_PREEMPTS`].
const BH_LOCK: &str = "CONFIG_PREEMPT_RT_NEEDS_BH_LOCK=y";

/// What was found; `Err` where it could not be.
pub struct Facts {
    /// Effective capabilities.
    pub capabilities: Result<u64>,
    /// `uname -r`.
    pub release: String,
    /// What the programs need and the kernel lacks.
    pub missing: Result<Vec<String>>,
    /// It has TCX.
    pub tcx: Result<bool>,
    /// The programs need the kernel's BTF, and it is not there.
    pub lacks_btf: Result<bool>,
    /// It is a PREEMPT_RT kernel.
    pub is_realtime: bool,
    /// The kernel's configuration, where the host has it below `/boot`.
    pub options: Option<String>,
    /// `net.core.bpf_jit_enable`; `None` where this namespace does not show it.
    pub jit: Option<String>,
    /// Where pins go, and whether that is on a BPF file system.
    pub bpffs: Option<(PathBuf, Result<bool>)>,
    /// The agent is to end sockets in all pods.
    pub has_pod_sockets: bool,
    /// The cgroup directory for socket load-balancing, and whether it is one of version 2.
    pub cgroup: Option<(PathBuf, Result<bool>)>,
}

/// Looks.
pub fn gather(config: Option<&Config>) -> Facts {
    Facts {
        capabilities: probe::effective_capabilities(),
        release: probe::release(),
        missing: probe::missing_features(),
        tcx: probe::has_tcx(),
        lacks_btf: object::embedded().and_then(load::lacks_btf),
        is_realtime: std::fs::read_to_string(REALTIME).is_ok_and(|text| text.trim() == "1"),
        options: std::fs::read_to_string(format!("/boot/config-{}", probe::release())).ok(),
        jit: std::fs::read_to_string(JIT).ok().map(|text| text.trim().to_owned()),
        bpffs: config.map(|it| (it.bpffs.clone(), fs::is_bpffs(&fs::nearest_existing(&it.bpffs)))),
        has_pod_sockets: config.is_some_and(|it| it.socket_lb == SocketLb::All),
        cgroup: config.filter(|it| it.socket_lb != SocketLb::Off).map(|it| (it.cgroup.clone(), is_cgroup2(&it.cgroup))),
    }
}

/// True if there is a control group of version 2 in a directory.
pub fn is_cgroup2(dir: &Path) -> Result<bool> {
    let stat = statfs(dir).with_context(|| format!("looking at {}", dir.display()))?;
    Ok(stat.filesystem_type() == CGROUP2_SUPER_MAGIC)
}

/// Judges.
pub fn check(facts: &Facts) -> Vec<Finding> {
    let mut found = vec![capabilities(&facts.capabilities), version(&facts.release)];
    // Without rights every trial fails, and says nothing of the kernel.
    if facts.capabilities.as_ref().is_ok_and(|it| probe::missing_capabilities(*it).is_empty()) {
        found.extend([features(&facts.missing), tcx(&facts.tcx)]);
    }
    found.extend([btf(&facts.lacks_btf), realtime(facts), jit(facts.jit.as_deref())]);
    found.extend(facts.bpffs.as_ref().map(|(dir, is)| bpffs(dir, is)));
    found.extend(facts.cgroup.as_ref().map(|(dir, is)| cgroup(dir, is)));
    found.extend(facts.capabilities.as_ref().ok().filter(|_| facts.has_pod_sockets).map(|it| pod_sockets(*it)));
    found
}

fn capabilities(effective: &Result<u64>) -> Finding {
    let what = "capabilities";
    match effective {
        Err(error) => Finding::unknown(what, error),
        Ok(effective) => {
            let missing = probe::missing_capabilities(*effective);
            if missing.is_empty() {
                return Finding::ok(what, "CAP_NET_ADMIN, CAP_BPF, CAP_PERFMON");
            }
            Finding::new(Level::Fatal, what, format!("this process lacks {}", missing.join(", ")))
                .hint(probe::RIGHTS_REMEDY)
        }
    }
}

fn version(release: &str) -> Finding {
    let (what, name) = ("version", |(major, minor)| format!("{major}.{minor}"));
    let (oldest, tried) = (probe::OLDEST_KERNEL, probe::OLDEST_TRIED_KERNEL);
    match probe::version(release) {
        Some(version) if version < oldest => {
            Finding::new(Level::Fatal, what, format!("{release}, but at least {} is needed", name(oldest)))
                .hint(format!("boot a newer kernel, {} or later if you can", name(tried)))
        }
        Some(version) if version < tried => {
            Finding::new(Level::Warning, what, format!("{release}, older than any that rustnet is tried with"))
                .hint(format!("boot a kernel {} or later", name(tried)))
        }
        _ => Finding::ok(what, release),
    }
}

fn features(missing: &Result<Vec<String>>) -> Finding {
    let what = "BPF features";
    match missing {
        Err(error) => Finding::new(Level::Fatal, what, format!("cannot be tried: {error:#}"))
            .hint("let the process call bpf(2): capabilities, seccomp profile, kernel lockdown"),
        Ok(missing) if missing.is_empty() => Finding::ok(what, "all that the programs need"),
        Ok(missing) => Finding::new(Level::Fatal, what, format!("this kernel lacks {}", missing.join(", ")))
            .hint("boot a newer kernel, or one that is built with CONFIG_BPF_SYSCALL and CONFIG_NET_CLS_BPF"),
    }
}

fn tcx(tcx: &Result<bool>) -> Finding {
    match tcx {
        Err(error) => Finding::unknown("TCX", error),
        Ok(true) => Finding::ok("TCX", "there"),
        // The agent falls back by itself; nothing need be done.
        Ok(false) => Finding::ok("TCX", "not there (before 6.6): classifiers on a clsact qdisc are used"),
    }
}

fn btf(lacks: &Result<bool>) -> Finding {
    match lacks {
        Err(error) => Finding::new(Level::Fatal, "BTF", format!("{error:#}")).hint("use a build with its eBPF object"),
        Ok(true) => Finding::new(Level::Fatal, "BTF", "the kernel tells no types (/sys/kernel/btf/vmlinux is missing)")
            .hint("boot a kernel built with CONFIG_DEBUG_INFO_BTF=y"),
        Ok(false) => Finding::ok("BTF", "there, or not needed"),
    }
}

/// Programs keep a packet's state in memory per CPU, between their functions.
fn realtime(facts: &Facts) -> Finding {
    let what = "PREEMPT_RT";
    let has_lock = facts.options.as_ref().is_some_and(|text| text.lines().any(|line| line == BH_LOCK));
    let preempts = probe::version(&facts.release).is_none_or(|version| version >= REALTIME_PREEMPTS);
    if !facts.is_realtime || !preempts || has_lock {
        return Finding::ok(what, if facts.is_realtime { "softirqs of a CPU run one by one" } else { "no" });
    }
    let hint = format!("boot a kernel without PREEMPT_RT, or one built with {BH_LOCK}");
    Finding::new(Level::Fatal, what, "a packet can interrupt another one's programs on the same CPU").hint(hint)
}

fn jit(value: Option<&str>) -> Finding {
    match value {
        Some("0") => Finding::new(Level::Warning, "JIT", "off: every packet's programs are interpreted")
            .hint("sysctl -w net.core.bpf_jit_enable=1"),
        None => Finding::ok("JIT", "not shown in this network namespace"),
        Some(_) => Finding::ok("JIT", "on"),
    }
}

fn bpffs(dir: &Path, is: &Result<bool>) -> Finding {
    let (what, shown) = ("BPF file system", dir.display());
    match is {
        Err(error) => Finding::unknown(what, error),
        Ok(true) => Finding::ok(what, format!("{shown} is on one")),
        Ok(false) => Finding::new(Level::Fatal, what, format!("{shown} is not on one")).hint(
            "`mount -t bpf bpf /sys/fs/bpf` on the host, or run `rustnet-agent --prepare` with all privileges first",
        ),
    }
}

fn cgroup(dir: &Path, is: &Result<bool>) -> Finding {
    let (what, shown) = ("cgroup v2", dir.display());
    if matches!(is, Ok(true)) {
        return Finding::ok(what, format!("{shown} is one"));
    }
    // Pods do without.
    let lost = "processes of this host do not reach its own node ports";
    Finding::new(Level::Warning, what, format!("{shown} is not mounted as cgroup2: {lost}"))
        .hint("boot with systemd.unified_cgroup_hierarchy=1, or name the mount with --cgroup, or give --socket-lb off")
}

fn pod_sockets(effective: u64) -> Finding {
    let what = "sockets of pods";
    if probe::may_enter_namespaces(effective) {
        return Finding::ok(what, "CAP_SYS_ADMIN: the agent may enter the pods' network namespaces");
    }
    let lost = "connected sockets of pods stay with backends that are gone";
    Finding::new(Level::Warning, what, format!("--socket-lb all, and this process lacks CAP_SYS_ADMIN: {lost}"))
        .hint("add the component deploy/pod-sockets, or set the chart's config.socketLb; or give --socket-lb host")
}

#[cfg(test)]
mod tests {
    use super::super::finding::{assert_only, assert_well};
    use super::*;

    fn good() -> Facts {
        Facts {
            capabilities: Ok(1 << 12 | 1 << 38 | 1 << 39),
            release: "6.18.44-cloud".into(),
            missing: Ok(Vec::new()),
            tcx: Ok(true),
            lacks_btf: Ok(false),
            is_realtime: false,
            options: None,
            jit: Some("1".into()),
            bpffs: Some(("/sys/fs/bpf/rustnet".into(), Ok(true))),
            has_pod_sockets: false,
            cgroup: Some(("/sys/fs/cgroup".into(), Ok(true))),
        }
    }

    #[test]
    fn a_good_kernel() {
        assert_well(&check(&good()));
        assert_well(&check(&Facts { release: "6.1.0-18".into(), tcx: Ok(false), jit: None, ..good() }));
        let realtime = || Facts { is_realtime: true, ..good() };
        assert_well(&check(&Facts { release: "6.12.1-rt".into(), ..realtime() }));
        assert_well(&check(&Facts { options: Some(format!("CONFIG_PREEMPT_RT=y\n{BH_LOCK}\n")), ..realtime() }));
        assert_well(&check(&Facts { capabilities: Ok(1 << 12 | 1 << 21), has_pod_sockets: true, ..good() }));
        assert_well(&check(&gather(None)));
    }

    #[test]
    fn one_fault_at_a_time() {
        let no = || Some(("/sys/fs/bpf/rustnet".into(), Ok(false)));
        let missing = || Ok(vec!["bpf_loop".to_owned()]);
        for (facts, level, detail, hint) in [
            (Facts { capabilities: Ok(1 << 12), ..good() }, Level::Fatal, "CAP_BPF, CAP_PERFMON", "securityContext"),
            (Facts { release: "5.10.0-32".into(), ..good() }, Level::Fatal, "at least 6.0", "newer kernel"),
            (Facts { release: "6.0.12".into(), ..good() }, Level::Warning, "older", "6.1"),
            (Facts { missing: missing(), ..good() }, Level::Fatal, "lacks bpf_loop", "CONFIG_BPF_SYSCALL"),
            (Facts { missing: Err(anyhow::anyhow!("EPERM")), ..good() }, Level::Fatal, "EPERM", "seccomp"),
            (Facts { lacks_btf: Ok(true), ..good() }, Level::Fatal, "vmlinux", "CONFIG_DEBUG_INFO_BTF"),
            (Facts { is_realtime: true, ..good() }, Level::Fatal, "interrupt", "without PREEMPT_RT"),
            (Facts { jit: Some("0".into()), ..good() }, Level::Warning, "interpreted", "bpf_jit_enable=1"),
            (Facts { bpffs: no(), ..good() }, Level::Fatal, "is not on one", "mount -t bpf"),
            (Facts { cgroup: no(), ..good() }, Level::Warning, "cgroup2", "--cgroup"),
            (Facts { has_pod_sockets: true, ..good() }, Level::Warning, "CAP_SYS_ADMIN", "deploy/pod-sockets"),
        ] {
            assert_only(&check(&facts), level, detail, hint);
        }
    }
}
