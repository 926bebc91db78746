//! `lint`: formatting, clippy for both sides, licences and advisories, manifests, and what tracked files must not hold. All
//! checks run, also after one has failed, so that one run tells everything.

mod files;
mod layers;
mod words;

use anyhow::{Result, bail};

use crate::cmd::{Cmd, is_executable, which};
use crate::setup::{self, Need};
use crate::{paths, ui};

/// What cargo-deny checks without the network.
const DENY_OFFLINE: [&str; 3] = ["bans", "licenses", "sources"];

type Check = fn() -> Result<()>;

/// Options of `lint`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Let rustfmt and clippy fix what they can first
    #[arg(long)]
    fix: bool,
}

/// The command.
pub fn run(args: &Args) -> Result<()> {
    setup::ensure(&[Need::Lint])?;
    if args.fix {
        Cmd::cargo().args(["fmt", "--all"]).dir(paths::root()).run()?;
        let fix = [
            "clippy",
            "--workspace",
            "--exclude",
            "rustnet-ebpf",
            "--all-targets",
            "--fix",
            "--allow-dirty",
            "--allow-staged",
        ];
        Cmd::cargo().args(fix).dir(paths::root()).run()?;
    }
    let checks: [(&str, Check); 7] = [
        ("rustfmt", format),
        ("clippy", clippy_host),
        ("clippy, kernel side", clippy_kernel),
        ("cargo deny", deny),
        ("manifests", manifests),
        ("layers", layers::check),
        ("tracked files", files::check),
    ];
    let mut failed = Vec::new();
    for (name, check) in checks {
        ui::step(name);
        if let Err(error) = check() {
            ui::detail(&format!("{error:#}"));
            failed.push(name);
        }
    }
    if failed.is_empty() {
        ui::step("lint: all checks passed");
        return Ok(());
    }
    bail!("lint: failed: {}", failed.join(", "))
}

fn format() -> Result<()> {
    Cmd::cargo().args(["fmt", "--all", "--check"]).dir(paths::root()).remedy("cargo fmt --all").run()
}

fn clippy_host() -> Result<()> {
    let args =
        ["clippy", "--workspace", "--exclude", "rustnet-ebpf", "--all-targets", "--keep-going", "--", "-D", "warnings"];
    Cmd::cargo().args(args).dir(paths::root()).run()
}

/// The kernel side with the same lints, checked for this machine's target: that takes no eBPF toolchain, and the profile's
/// `panic = "abort"` lets a program without the standard library pass.
fn clippy_kernel() -> Result<()> {
    Cmd::cargo()
        .args(["clippy", "--package", "rustnet-ebpf", "--profile", "bpf", "--", "-D", "warnings"])
        .env("CARGO_TARGET_DIR", paths::target().join("bpf-build"))
        .dir(paths::root())
        .run()
}

fn deny() -> Result<()> {
    let Some(deny) = setup::cargo_deny() else { bail!("no cargo-deny\n  remedy: cargo xtask setup") };
    let check = Cmd::new(deny).args(["--log-level", "error", "check"]).clean_cargo_env().dir(paths::root());
    check.clone().args(DENY_OFFLINE).remedy("the allowed licences and sources are in deny.toml").run()?;
    match check.args(["advisories"]).capture() {
        Ok(_) => ui::detail("advisories ok"),
        Err(error) if database_is_out_of_reach(&error.to_string()) => {
            ui::warn("the advisory database cannot be fetched here: known vulnerabilities were not looked for");
        }
        Err(error) => return Err(error),
    }
    Ok(())
}

/// Whether cargo-deny failed for want of its database and not because of what stands in it.
fn database_is_out_of_reach(error: &str) -> bool {
    ["failed to fetch advisory database", "failed to load advisory database", "unable to load advisory database"]
        .iter()
        .any(|phrase| error.contains(phrase))
}

/// The deployment renders.
fn manifests() -> Result<()> {
    if !paths::root().join("deploy/kustomization.yaml").is_file() {
        bail!("deploy/kustomization.yaml is missing");
    }
    let built = setup::Kubernetes::default().programs()?.join("kubectl");
    let Some(kubectl) = Some(built).filter(|k| is_executable(k)).or_else(|| which("kubectl")) else {
        ui::warn("no kubectl here: `kubectl kustomize deploy` was not tried");
        return Ok(());
    };
    let rendered = Cmd::new(kubectl).args(["kustomize", "deploy"]).dir(paths::root()).capture()?;
    if !rendered.contains("kind: DaemonSet") {
        bail!("kubectl kustomize deploy renders no DaemonSet");
    }
    ui::detail(&format!("deploy renders {} objects", rendered.split("\n---").count()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_database_is_no_finding() {
        assert!(database_is_out_of_reach("[ERROR] failed to fetch advisory database https://x"));
        assert!(!database_is_out_of_reach("error[vulnerability]: RUSTSEC-2026-0001 in x"));
    }
}
