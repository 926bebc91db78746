//! The AppArmor profile that runtimes give to containers, compiled for the guests by Debian's own parser.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::apt::Apt;
use crate::cmd::Cmd;
use crate::{cache, paths};

/// The suite whose parser is taken. It is old, and so is what it needs of this machine's libraries.
const SUITE: &str = "bookworm";
/// The package with the parser.
const PACKAGE: &str = "apparmor";

/// The profile that `setup` has rendered, as the kernel takes it.
pub fn policy() -> Result<Vec<u8>> {
    let profile = paths::apparmor_profile();
    let text = fs::read_to_string(&profile).with_context(|| format!("reading {}", profile.display()))?;
    let mut key = cache::Key::default();
    key.text("profile", &text);
    let compiled = paths::cache().join("kernels").join(format!("apparmor-{}", key.finish()));
    if !cache::holds(&compiled) {
        let work = paths::target().join("kernels/apparmor");
        let _ = fs::remove_dir_all(&work); // of a run that was killed
        let file = work.join("policy");
        fs::create_dir_all(&work).with_context(|| format!("making {}", work.display()))?;
        compile(&profile, &work, &file)?;
        cache::store(&file, &compiled)?;
        fs::remove_dir_all(&work).with_context(|| format!("removing {}", work.display()))?;
    }
    fs::read(&compiled).with_context(|| format!("reading {}", compiled.display()))
}

fn compile(profile: &Path, work: &Path, to: &Path) -> Result<()> {
    let root = work.join("root");
    for package in Apt::new(work, SUITE)?.download(&[PACKAGE.to_owned()], SUITE)? {
        Cmd::new("dpkg-deb").arg("-x").args([&package, &root]).capture()?;
    }
    // This machine's kernel may have no AppArmor: what the guest's is able to do comes from the package, too.
    let features = root.join("usr/share/apparmor-features/features");
    Cmd::new(root.join("sbin/apparmor_parser"))
        .args(["--config-file", "/dev/null", "--skip-cache", "--skip-kernel-load", "--base"])
        .arg(root.join("etc/apparmor.d"))
        .arg("--kernel-features")
        .arg(&features)
        .arg("--policy-features")
        .arg(&features)
        .arg("--ofile")
        .args([to, profile])
        .capture()?;
    Ok(())
}
