//! The programs that come from packages, and cargo-deny.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use super::{Need, Work};
use crate::cmd::{Cmd, is_executable, which};
use crate::host::Distro;
use crate::{paths, toolchain};

/// cargo-deny as setup installs it; another one in PATH is used when it is not older.
const CARGO_DENY: &str = "0.20.2";

/// A program, and the package it comes in.
pub struct Tool {
    /// Command, or the path of a file.
    pub name: &'static str,
    /// What rustnet uses it for.
    pub purpose: &'static str,
    need: Need,
    debian: &'static [&'static str],
    /// Where Ubuntu's names differ.
    ubuntu: Option<&'static [&'static str]>,
}

const fn tool(name: &'static str, need: Need, debian: &'static [&'static str], purpose: &'static str) -> Tool {
    Tool { name, purpose, need, debian, ubuntu: None }
}

/// All of them.
static TOOLS: [Tool; 33] = [
    tool("cc", Need::Build, &["build-essential"], "linking Rust programs"),
    tool("git", Need::Lint, &["git"], "listing tracked files"),
    tool("ip", Need::Network, &["iproute2"], "looking at links and routes"),
    tool("tc", Need::Network, &["iproute2"], "looking at qdiscs and filters"),
    tool("nft", Need::Network, &["nftables"], "rules of the outside world in tests"),
    tool("tcpdump", Need::Network, &["tcpdump"], "captures in failure reports"),
    Tool {
        name: "bpftool",
        purpose: "looking at maps and programs",
        need: Need::Network,
        debian: &["bpftool"],
        ubuntu: Some(&["linux-tools-common", "linux-tools-generic"]),
    },
    tool("ping", Need::Network, &["iputils-ping"], "echo requests"),
    tool("ethtool", Need::Network, &["ethtool"], "offload settings of links"),
    tool("modprobe", Need::Network, &["kmod"], "loading the vxlan module where it is one"),
    tool("etcd", Need::ApiServer, &["etcd-server"], "the API server's store"),
    tool("openssl", Need::ApiServer, &["openssl"], "the API server's certificates"),
    tool(
        "/usr/lib/cni/host-local",
        Need::Network,
        &["containernetworking-plugins"],
        "delegated IPAM, and the plugins to compare with",
    ),
    tool("iperf3", Need::Iperf, &["iperf3"], "throughput measurements"),
    tool("containerd", Need::Cluster, &["containerd"], "the container runtime of each node"),
    tool("runc", Need::Cluster, &["runc"], "what containerd starts containers with"),
    tool("conntrack", Need::Cluster, &["conntrack"], "kube-proxy of the reference network"),
    tool(
        "iptables",
        Need::Network,
        &["iptables"],
        "rules of older tools in tests, host ports of the reference network",
    ),
    tool("curl", Need::Cluster, &["curl"], "asking components whether they are ready; in the test images, too"),
    tool("busybox", Need::Cluster, &["busybox"], "the shell of the test images"),
    tool("dash", Need::Cluster, &["dash"], "the test images"),
    tool("wget", Need::Cluster, &["wget"], "the test images"),
    tool("dig", Need::Cluster, &["bind9-dnsutils"], "the test images"),
    tool("nc.openbsd", Need::Cluster, &["netcat-openbsd"], "the test images"),
    tool("iperf", Need::Cluster, &["iperf"], "the test images"),
    tool("socat", Need::Cluster, &["socat"], "the test images"),
    tool("qemu-system-x86_64", Need::Kernels, &["qemu-system-x86"], "booting other kernels"),
    tool("dpkg-deb", Need::Kernels, &["dpkg"], "unpacking kernels"),
    tool("depmod", Need::Kernels, &["kmod"], "finding which modules need which"),
    tool("xz", Need::Kernels, &["xz-utils"], "unpacking modules"),
    tool("strip", Need::Kernels, &["binutils"], "keeping guests small"),
    tool(
        "aarch64-linux-gnu-gcc",
        Need::Cross,
        &["gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross"],
        "linking programs for arm64",
    ),
    tool("qemu-aarch64-static", Need::Cross, &["qemu-user-static"], "trying programs for arm64"),
];

/// Where distributions and people put CNI plugins.
const PLUGIN_DIRS: [&str; 3] = ["/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni"];

/// The programs of `needs` that this machine lacks.
pub fn missing(needs: &[Need]) -> Vec<&'static Tool> {
    TOOLS.iter().filter(|tool| needs.contains(&tool.need) && !present(tool.name)).collect()
}

/// The packages that hold these programs.
pub fn packages(tools: &[&Tool]) -> Result<Vec<&'static str>> {
    packages_of(&Distro::this(), tools)
}

fn packages_of(distro: &Distro, tools: &[&Tool]) -> Result<Vec<&'static str>> {
    let mut packages: Vec<&str> = Vec::new();
    for tool in tools {
        let names = match distro {
            Distro::Debian => tool.debian,
            Distro::Ubuntu => tool.ubuntu.unwrap_or(tool.debian),
            Distro::Other(name) => {
                let all: Vec<&str> = tools.iter().flat_map(|t| t.debian).copied().collect();
                bail!(
                    "setup knows the package names of Debian and Ubuntu, and this is {name}\n  remedy: install what Debian calls {}",
                    all.join(" ")
                )
            }
        };
        packages.extend(names);
    }
    packages.sort_unstable();
    packages.dedup();
    Ok(packages)
}

fn present(name: &str) -> bool {
    match Path::new(name).file_name() {
        Some(plugin) if name.starts_with('/') => {
            PLUGIN_DIRS.iter().any(|dir| is_executable(&Path::new(dir).join(plugin)))
        }
        _ => which(name).is_some(),
    }
}

/// cargo-deny: the one that setup built, or a recent one in PATH.
pub fn cargo_deny() -> Option<PathBuf> {
    let own = cargo_deny_root().join("bin/cargo-deny");
    if is_executable(&own) {
        return Some(own);
    }
    let found = which("cargo-deny")?;
    let version = Cmd::new(&found).arg("--version").capture().ok()?;
    let version = toolchain::parse_version(version.split_whitespace().nth(1)?);
    (version.is_some() && version >= toolchain::parse_version(CARGO_DENY)).then_some(found)
}

pub(super) fn ensure_cargo_deny(work: &mut Work) -> Result<()> {
    if cargo_deny().is_some() {
        return Ok(());
    }
    let install = Cmd::cargo()
        .args(["install", "--locked", &format!("cargo-deny@{CARGO_DENY}"), "--root"])
        .arg(cargo_deny_root())
        .env_remove("CARGO_TARGET_DIR")
        // Its own settings (one unit, fat LTO) triple the time for a tool that runs a few seconds.
        .env("CARGO_PROFILE_RELEASE_LTO", "off")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16")
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1")
        .remedy("cargo reaches crates.io? Any cargo-deny in PATH that is not older will do, too");
    work.step("building cargo-deny (a few minutes, once)", &install)
}

fn cargo_deny_root() -> PathBuf {
    paths::cache().join(format!("cargo-deny-{CARGO_DENY}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(distro: &Distro, wanted: &[&str]) -> Vec<&'static str> {
        let tools: Vec<&Tool> = TOOLS.iter().filter(|t| wanted.contains(&t.name)).collect();
        packages_of(distro, &tools).unwrap()
    }

    #[test]
    fn names_follow_the_distribution() {
        assert_eq!(names(&Distro::Debian, &["bpftool", "tcpdump"]), ["bpftool", "tcpdump"]);
        assert_eq!(
            names(&Distro::Ubuntu, &["bpftool", "tcpdump"]),
            ["linux-tools-common", "linux-tools-generic", "tcpdump"]
        );
    }

    #[test]
    fn a_package_of_two_programs_is_named_once() {
        assert_eq!(names(&Distro::Debian, &["ip", "tc"]), ["iproute2"]);
    }

    #[test]
    fn elsewhere_the_packages_are_named() {
        let error = packages_of(&Distro::Other("Fedora 44".into()), &[&TOOLS[0]]).unwrap_err().to_string();
        assert!(error.contains("Fedora 44") && error.contains("build-essential"), "{error}");
    }

    #[test]
    fn a_program_nobody_has_is_missing() {
        assert!(!present("no-such-program-here") && !present("/usr/lib/cni/no-such-plugin") && present("sh"));
    }
}
