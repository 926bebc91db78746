//! Settings of the kernel that the agent sets: right already, or in reach of it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustnet_common::names::VETH_PREFIX;

use super::Stage;
use super::finding::{Finding, Level};
use crate::config::Config;
use crate::net::host::Host;
use crate::net::repair::devices;
use crate::net::sysctl::{self, Sysctl};
use crate::ways::Ways;

/// A setting that is not as the agent wants it.
pub struct Wrong {
    /// The setting.
    pub sysctl: Sysctl,
    /// Its value; or why it cannot be read.
    pub value: Result<String>,
    /// It can be written.
    pub writable: bool,
}

/// What was found.
pub struct Facts {
    /// Where the agent sets them.
    pub dir: PathBuf,
    /// That is there.
    pub exists: bool,
    /// How many settings were looked at.
    pub looked: usize,
    /// Those that differ.
    pub wrong: Vec<Wrong>,
    /// `rp_filter` of `all`, and whether the agent can write it.
    pub rp_filter: Option<(u32, bool)>,
}

/// Looks.
pub fn gather(config: &Config, host: &Host, ways: &Ways) -> Facts {
    let dir = &config.sysctl_dir;
    let veths: Vec<_> =
        host.links.iter().map(|it| it.name.clone()).filter(|name| name.starts_with(VETH_PREFIX)).collect();
    let wanted = sysctl::wanted(&devices(host, &ways.place.uplinks, ways, config.routing.has_overlay(), veths));
    let looked = wanted.len();
    let is_forwarding_off = |path: &str| {
        // Switching the host's on switches those of all devices on.
        let all = wanted.iter().find(|it| it.path == "ipv4/ip_forward");
        path.ends_with("/forwarding") && all.is_some_and(|it| it.wrong(dir).is_ok_and(|wrong| wrong.is_some()))
    };
    let wrong = wanted.iter().filter(|it| !(it.path.starts_with("ipv4/conf/") && is_forwarding_off(&it.path))).cloned();
    let wrong = wrong.filter_map(|sysctl| {
        let value = sysctl.wrong(dir).transpose()?;
        let writable = is_writable(&dir.join(&sysctl.path));
        Some(Wrong { sysctl, value, writable })
    });
    let all = dir.join("ipv4/conf/all/rp_filter");
    let value = std::fs::read_to_string(&all).ok().and_then(|text| text.trim().parse().ok());
    Facts {
        dir: dir.clone(),
        exists: dir.join("ipv4").exists(),
        looked,
        wrong: wrong.collect(),
        rp_filter: value.map(|value| (value, is_writable(&all))),
    }
}

/// Opened, but nothing is written.
fn is_writable(path: &Path) -> bool {
    std::fs::OpenOptions::new().write(true).open(path).context("opening").is_ok()
}

/// Judges.
pub fn check(facts: &Facts, stage: Stage) -> Vec<Finding> {
    let shown = facts.dir.display();
    if !facts.exists {
        let hint = "mount the host's /proc/sys/net there (--sysctl-dir); an agent's own is seen with `kubectl exec` in its pod";
        let missing = format!("{shown} does not exist here");
        // While an agent runs, people may run this on the host. Only the agent's container has the
        // mount.
        let level = if stage == Stage::Before { Level::Fatal } else { Level::Warning };
        return vec![Finding::new(level, "sysctl directory", missing).hint(hint)];
    }
    let mut found: Vec<_> = facts.wrong.iter().map(|wrong| judge(wrong, &facts.dir, stage)).collect();
    if let Some((value @ 1.., false)) = facts.rp_filter {
        found.push(
            Finding::new(
                Level::Fault,
                "ipv4.conf.all.rp_filter",
                format!("{value}, and {shown} is read-only: answers with a service's address are dropped"),
            )
            .hint("sysctl -w net.ipv4.conf.all.rp_filter=0 on the host, or give --sysctl-dir a writable mount"),
        );
    }
    let right = facts.looked - facts.wrong.len();
    found.push(Finding::ok("as the agent wants them", format!("{right} of {} in {shown}", facts.looked)));
    found
}

fn judge(wrong: &Wrong, dir: &Path, stage: Stage) -> Finding {
    let (name, want) = (wrong.sysctl.path.replace('/', "."), wrong.sysctl.want);
    let what = "sysctl";
    let finding = match &wrong.value {
        Err(error) => Finding::new(Level::Fault, what, format!("{error:#}"))
            .hint(format!("mount the host's /proc/sys/net at {} (--sysctl-dir)", dir.display())),
        Ok(value) if !wrong.writable => {
            Finding::new(Level::Fault, what, format!("{value}, and {} is read-only", dir.display()))
                .hint(format!("sysctl -w net.{name}={want} on the host, or give --sysctl-dir a writable mount"))
        }
        Ok(value) if stage == Stage::Before => Finding::ok(what, format!("{value}; the agent will set it to {want}")),
        Ok(value) => Finding::new(Level::Warning, what, format!("{value}, not {want}")).hint(
            "a running agent sets it within 30 s; if it does not stay, see who else sets it (/etc/sysctl.d, systemd)",
        ),
    };
    finding.called(name)
}

#[cfg(test)]
mod tests {
    use super::super::finding::{assert_only, assert_well};
    use super::*;

    fn facts(wrong: Vec<Wrong>) -> Facts {
        Facts { dir: "/host/proc/sys/net".into(), exists: true, looked: 5, wrong, rp_filter: Some((0, false)) }
    }

    fn forwarding(value: Result<&str>, writable: bool) -> Vec<Wrong> {
        let sysctl = Sysctl { path: "ipv4/ip_forward".into(), want: "1", also: &[], optional: false };
        vec![Wrong { sysctl, value: value.map(str::to_owned), writable }]
    }

    #[test]
    fn what_the_agent_can_set_is_well_before_it() {
        assert_well(&check(&facts(Vec::new()), Stage::Running));
        assert_well(&check(&facts(forwarding(Ok("0"), true)), Stage::Before));
        assert_well(&check(&Facts { rp_filter: Some((2, true)), ..facts(Vec::new()) }, Stage::Before));
    }

    #[test]
    fn one_fault_at_a_time() {
        let unreadable = || facts(forwarding(Err(anyhow::anyhow!("EACCES")), false));
        let absent = || Facts { exists: false, ..facts(Vec::new()) };
        let filter = Facts { rp_filter: Some((1, false)), ..facts(Vec::new()) };
        for (facts, stage, level, detail, hint) in [
            (facts(forwarding(Ok("0"), false)), Stage::Before, Level::Fault, "read-only", "net.ipv4.ip_forward=1"),
            (facts(forwarding(Ok("0"), true)), Stage::Running, Level::Warning, "0, not 1", "who else"),
            (unreadable(), Stage::Running, Level::Fault, "EACCES", "--sysctl-dir"),
            (absent(), Stage::Before, Level::Fatal, "does not exist", "--sysctl-dir"),
            (absent(), Stage::Running, Level::Warning, "does not exist", "kubectl exec"),
            (filter, Stage::Before, Level::Fault, "dropped", "rp_filter=0"),
        ] {
            assert_only(&check(&facts, stage), level, detail, hint);
        }
    }
}
