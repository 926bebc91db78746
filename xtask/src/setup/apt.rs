//! Packages of Debian and Ubuntu.

use std::path::Path;

use anyhow::{Result, bail};

use super::Work;
use crate::cmd::{Cmd, which};
use crate::ui;

impl Work {
    /// Installs packages, after refreshing the lists once. Says the exact command where the rights for it are missing.
    pub(super) fn install_packages(&mut self, packages: &[&str]) -> Result<()> {
        if which("apt-get").is_none() {
            bail!(
                "no apt-get here\n  remedy: install by your package manager what Debian calls {}",
                packages.join(" ")
            );
        }
        if !self.dry_run && !nix::unistd::geteuid().is_root() {
            bail!(
                "installing packages needs root\n  remedy: sudo apt-get update && sudo apt-get install -y \
                 --no-install-recommends {}\n  and then this command again",
                packages.join(" ")
            );
        }
        self.refresh()?;
        let etcd = packages.contains(&"etcd-server");
        let install = apt_get()
            .args(["install", "-y", "--no-install-recommends"])
            .args(packages)
            .remedy("read what apt-get says above; `apt-get update` and `apt --fix-broken install` fix most of it");
        self.step(&format!("installing {}", packages.join(" ")), &install)?;
        if etcd && !self.dry_run && Path::new("/run/systemd/system").is_dir() {
            // The package starts a server on this machine's own ports; only the program is wanted.
            ui::detail("stopping the etcd service that the package started");
            Cmd::new("systemctl").args(["disable", "--now", "etcd"]).succeeds();
        }
        Ok(())
    }

    /// The version that apt would install, without its epoch; none when the package is unknown.
    pub(super) fn package_version(&mut self, package: &str) -> Option<String> {
        if nix::unistd::geteuid().is_root() {
            self.refresh().ok()?;
        }
        let policy = Cmd::new("apt-cache").args(["policy", package]).env("LC_ALL", "C").capture().ok()?;
        candidate(&policy)
    }

    fn refresh(&mut self) -> Result<()> {
        if self.updated {
            return Ok(());
        }
        self.updated = true;
        self.step("refreshing the package lists", &apt_get().arg("update").remedy("check /etc/apt/sources.list*"))
    }
}

fn apt_get() -> Cmd {
    // Another apt may be at work on a developer's machine: wait for it instead of failing.
    Cmd::new("apt-get").args(["-o", "DPkg::Lock::Timeout=300"]).env("DEBIAN_FRONTEND", "noninteractive")
}

/// The candidate in the output of `apt-cache policy`.
fn candidate(policy: &str) -> Option<String> {
    let version = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "))?;
    let version = version.split_once(':').map_or(version, |(_, v)| v);
    (version != "(none)").then(|| version.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_candidate_is_read_without_its_epoch() {
        let policy = "golang-go:\n  Installed: (none)\n  Candidate: 2:1.19~1\n  Version table:\n";
        assert_eq!(candidate(policy).as_deref(), Some("1.19~1"));
        assert_eq!(candidate("x:\n  Installed: (none)\n  Candidate: (none)\n"), None);
        assert_eq!(candidate(""), None);
    }
}
