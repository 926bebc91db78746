//! The directories of the container runtime: which network it will use, and whether ours can be put there.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::unistd::{AccessFlags, access};

use super::Stage;
use super::finding::{Finding, Level};
use crate::cni_order::{Configuration, Misfit, Rival, before_ours, configurations, misfits};
use crate::config::Config;
use crate::install::{BINARY, CONFLIST};

/// What was found.
#[derive(Default)]
pub struct Facts {
    /// All of them in the order of the runtime.
    pub configurations: Option<Result<Vec<Configuration>>>,
    /// Plugins behind ours that do not fit.
    pub misfits: Vec<Misfit>,
    /// The configuration directory, and whether it can be written.
    pub conf_dir: Option<(PathBuf, Result<()>)>,
    /// The binary directory, and whether it can be written.
    pub bin_dir: Option<(PathBuf, Result<()>)>,
    /// The binary is there.
    pub binary: bool,
}

/// Looks.
pub fn gather(config: &Config) -> Facts {
    let with_access = |dir: &PathBuf| (dir.clone(), writable(dir));
    Facts {
        configurations: config.cni_conf_dir.as_deref().map(configurations),
        misfits: config.cni_conf_dir.as_deref().map(misfits).unwrap_or_default(),
        conf_dir: config.cni_conf_dir.as_ref().map(with_access),
        bin_dir: config.cni_bin_dir.as_ref().map(with_access),
        binary: config.cni_bin_dir.as_ref().is_some_and(|dir| dir.join(BINARY).exists()),
    }
}

/// Nothing is written to find out. A directory that is missing is made by the agent: then its parent counts.
fn writable(dir: &Path) -> Result<()> {
    let there = dir.ancestors().find(|it| it.exists()).unwrap_or(Path::new("/"));
    anyhow::ensure!(there.is_dir(), "{} is not a directory", there.display());
    access(there, AccessFlags::W_OK | AccessFlags::X_OK).with_context(|| there.display().to_string())
}

/// Judges.
pub fn check(facts: &Facts, stage: Stage) -> Vec<Finding> {
    let mut found = Vec::new();
    match &facts.configurations {
        None => {}
        Some(Err(error)) => found.push(Finding::unknown("configurations", error)),
        Some(Ok(all)) => found.extend(order(all, stage)),
    }
    found.extend(facts.misfits.iter().map(|misfit| {
        Finding::new(Level::Warning, "plugin behind ours", misfit.what.clone()).called(&misfit.file).hint(misfit.remedy)
    }));
    found.extend(facts.conf_dir.as_ref().map(|dir| directory("configuration directory", "cni-conf-dir", dir)));
    found.extend(facts.bin_dir.as_ref().map(|dir| directory("binary directory", "cni-bin-dir", dir)));
    if let (Some((dir, _)), Stage::Running, false) = (&facts.bin_dir, stage, facts.binary) {
        let missing = format!("{BINARY} is not in {}: no pod can be added", dir.display());
        found.push(Finding::new(Level::Fault, "binary", missing).hint("restart the agent, which puts it there"));
    }
    found
}

fn finding(rival: Rival<'_>) -> Finding {
    let level = if rival.is_broken { Level::Fault } else { Level::Warning };
    Finding::new(level, "configuration before ours", rival.what).called(rival.file).hint(rival.remedy)
}

fn order(all: &[Configuration], stage: Stage) -> Vec<Finding> {
    let ours = |level, detail: &str| Finding::new(level, "own configuration", detail).called(CONFLIST);
    let mut found: Vec<_> = before_ours(all).map(finding).collect();
    match all.iter().find(|(file, _)| file == CONFLIST) {
        Some((_, Err(error))) => {
            found.push(ours(Level::Fault, &format!("{error:#}")).hint("remove it: a ready agent writes it again"));
        }
        Some((_, Ok(network))) => found.push(ours(Level::Ok, &format!("network {network}"))),
        None if stage == Stage::Running => found.push(
            ours(Level::Fault, "is missing: no pod can be added")
                .hint("see why the agent is not ready: it writes it then"),
        ),
        None => found.push(ours(Level::Ok, "not there yet: the agent writes it once it is ready")),
    }
    found
}

/// The agent runs nevertheless, and tries on: what an earlier one has put there may still do.
fn directory(what: &'static str, flag: &str, (dir, writable): &(PathBuf, Result<()>)) -> Finding {
    match writable {
        Ok(()) => Finding::ok(what, format!("{} can be written", dir.display())),
        Err(error) => Finding::new(Level::Fault, what, format!("{} cannot be written: {error:#}", dir.display()))
            .hint(format!("check --{flag} and the mount behind it: it must be writable")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::{assert_only, assert_well};
    use super::*;

    fn facts(files: &[(&str, Result<&str, &str>)]) -> Facts {
        let one = |(file, network): &(&str, Result<&str, &str>)| {
            ((*file).to_owned(), network.map(str::to_owned).map_err(|error| anyhow::anyhow!(error.to_owned())))
        };
        Facts {
            configurations: Some(Ok(files.iter().map(one).collect())),
            misfits: Vec::new(),
            conf_dir: Some(("/etc/cni/net.d".into(), Ok(()))),
            bin_dir: Some(("/opt/cni/bin".into(), Ok(()))),
            binary: true,
        }
    }

    const OURS: (&str, Result<&str, &str>) = ("05-rustnet.conflist", Ok("rustnet"));

    #[test]
    fn ours_first_is_well_and_nothing_is_before_the_agent() {
        assert_well(&check(&facts(&[OURS, ("10-flannel.conflist", Err("is not JSON"))]), Stage::Running));
        assert_well(&check(&Facts { binary: false, ..facts(&[]) }, Stage::Before));
        assert_well(&check(&Facts::default(), Stage::Running));
    }

    #[test]
    fn one_fault_at_a_time() {
        let read_only = || Some(("/opt/cni/bin".into(), Err(anyhow::anyhow!("EROFS"))));
        for (facts, level, detail, hint) in [
            (facts(&[("00-multus.conf", Ok("multus")), OURS]), Level::Warning, "network multus", "Multus"),
            (facts(&[("04-x.json", Err("is not JSON")), OURS]), Level::Fault, "the runtime stops", "fix"),
            (facts(&[(CONFLIST, Err("has no plugins"))]), Level::Fault, "no plugins", "writes it again"),
            (facts(&[]), Level::Fault, "is missing", "not ready"),
            (Facts { binary: false, ..facts(&[OURS]) }, Level::Fault, BINARY, "restart"),
            (Facts { bin_dir: read_only(), ..facts(&[OURS]) }, Level::Fault, "EROFS", "--cni-bin-dir"),
            (Facts { conf_dir: read_only(), ..facts(&[OURS]) }, Level::Fault, "EROFS", "--cni-conf-dir"),
            (Facts { configurations: Some(Err(anyhow::anyhow!("EIO"))), ..facts(&[]) }, Level::Warning, "EIO", "root"),
        ] {
            assert_only(&check(&facts, Stage::Running), level, detail, hint);
        }
    }

    #[test]
    fn a_plugin_that_does_not_fit_is_named_with_its_file() {
        let dir = tempfile::tempdir().expect("dir");
        let write = |behind: &str| {
            let list = format!(r#"{{"name":"rustnet","plugins":[{{"type":"rustnet-cni"}},{behind}]}}"#);
            std::fs::write(dir.path().join(CONFLIST), list).expect("written");
            Facts { misfits: misfits(dir.path()), ..facts(&[OURS]) }
        };
        for (behind, detail, hint) in [
            (r#"{"type":"tuning","mac":"02:00:00:00:00:01"}"#, "tuning changes the MAC", "capability mac"),
            (r#"{"type":"tuning","capabilities":{"mac":true}}"#, "tuning changes the MAC", "capability mac"),
            (r#"{"type":"bandwidth"}"#, "bandwidth behind rustnet-cni fails", "capability bandwidth"),
            (r#"{"type":"sbr"}"#, "sbr", "several interfaces"),
        ] {
            assert_only(&check(&write(behind), Stage::Running), Level::Warning, detail, hint);
        }
        for behind in [r#"{"type":"tuning","sysctl":{"x":"1"}}"#, r#"{"type":"portmap"}"#, r#"{"type":7}"#] {
            assert_well(&check(&write(behind), Stage::Running));
        }
        // Before ours, or without ours, they are somebody else's.
        for list in
            [r#"{"plugins":[{"type":"sbr"},{"type":"rustnet-cni"}]}"#, r#"{"plugins":[{"type":"ptp"},{"type":"sbr"}]}"#]
        {
            std::fs::write(dir.path().join(CONFLIST), list).expect("written");
            assert_eq!(misfits(dir.path()), []);
        }
    }

    #[test]
    fn nothing_is_written_to_see_whether_it_can_be() {
        let dir = tempfile::tempdir().expect("dir");
        std::fs::write(dir.path().join("README"), "x").expect("written");
        assert!(writable(&dir.path().join("absent/below")).is_ok());
        assert!(writable(&dir.path().join("README/below")).is_err());
        assert!(writable(Path::new("/proc/sys/net")).is_ok() || writable(Path::new("/proc/sys")).is_err());
    }
}
