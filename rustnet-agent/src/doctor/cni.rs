//! The directories of the container runtime: which network it will use, and whether ours can be put there.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::unistd::{AccessFlags, access};

use super::Stage;
use super::finding::{Finding, Level};
use crate::config::Config;
use crate::install::{BINARY, CONFLIST, NETWORK};

/// What runtimes take for a configuration.
const SUFFIXES: [&str; 3] = ["conf", "conflist", "json"];

/// A configuration: its file, and the name of its network or what is wrong with it.
pub type Configuration = (String, Result<String>);

/// What was found.
#[derive(Default)]
pub struct Facts {
    /// All of them in the order of the runtime.
    pub configurations: Option<Result<Vec<Configuration>>>,
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

/// The files that a runtime reads, in its order.
fn configurations(dir: &Path) -> Result<Vec<Configuration>> {
    let entries = match std::fs::read_dir(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("reading {}", dir.display()))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("reading {}", dir.display()))?.path();
        let suffix = path.extension().and_then(|it| it.to_str()).unwrap_or_default();
        if SUFFIXES.contains(&suffix) {
            names.extend(path.file_name().map(|it| it.to_string_lossy().into_owned()));
        }
    }
    names.sort();
    Ok(names.into_iter().map(|name| (name.clone(), network(&dir.join(name)))).collect())
}

/// The name of the network of a configuration.
fn network(path: &Path) -> Result<String> {
    let text = std::fs::read(path).context("cannot be read")?;
    let value: serde_json::Value = serde_json::from_slice(&text).context("is not JSON")?;
    let is_list = path.extension().is_some_and(|it| it == "conflist");
    if is_list && value["plugins"].as_array().is_none_or(Vec::is_empty) {
        bail!("has no plugins");
    }
    if !is_list && value["type"].as_str().is_none_or(str::is_empty) {
        bail!("has no type");
    }
    Ok(value["name"].as_str().unwrap_or("without a name").to_owned())
}

/// Judges.
pub fn check(facts: &Facts, stage: Stage) -> Vec<Finding> {
    let mut found = Vec::new();
    match &facts.configurations {
        None => {}
        Some(Err(error)) => found.push(Finding::unknown("configurations", error)),
        Some(Ok(all)) => found.extend(order(all, stage)),
    }
    found.extend(facts.conf_dir.as_ref().map(|dir| directory("configuration directory", "cni-conf-dir", dir)));
    found.extend(facts.bin_dir.as_ref().map(|dir| directory("binary directory", "cni-bin-dir", dir)));
    if let (Some((dir, _)), Stage::Beside, false) = (&facts.bin_dir, stage, facts.binary) {
        let missing = format!("{BINARY} is not in {}: no pod can be added", dir.display());
        found.push(Finding::new(Level::Fault, "binary", missing).hint("restart the agent, which puts it there"));
    }
    found
}

/// What the runtime takes in place of our configuration, or stops at: a line each. One that names our network calls it.
pub fn instead_of_ours(dir: &Path) -> Vec<String> {
    let all = match configurations(dir) {
        Ok(all) => all,
        Err(error) => return vec![format!("{error:#}; check --cni-conf-dir and the mount behind it")],
    };
    let calls_us = |file: &str| {
        let text = std::fs::read_to_string(dir.join(file)).unwrap_or_default();
        [NETWORK, BINARY].iter().any(|name| text.contains(&format!("\"{name}\"")))
    };
    let others: Vec<_> = all.into_iter().filter(|(file, _)| !calls_us(file)).collect();
    let line = |it: Finding| format!("{}: {}; {}", dir.join(it.what).display(), it.detail, it.hint);
    before_ours(&others).map(line).collect()
}

fn before_ours(all: &[Configuration]) -> impl Iterator<Item = Finding> {
    all.iter().filter(|(file, _)| file.as_str() < CONFLIST).map(|(file, network)| match network {
        Ok(network) => {
            Finding::new(Level::Warning, file, format!("network {network} comes before {CONFLIST}: pods get that one"))
                .hint("remove it, unless it is a plugin that calls rustnet itself (Multus)")
        }
        Err(error) => {
            Finding::new(Level::Fault, file, format!("{error:#}: the runtime stops at it, before {CONFLIST}"))
                .hint("mend it or remove it")
        }
    })
}

fn order(all: &[Configuration], stage: Stage) -> Vec<Finding> {
    let mut found: Vec<_> = before_ours(all).collect();
    match all.iter().find(|(file, _)| file == CONFLIST) {
        Some((file, Err(error))) => {
            found.push(
                Finding::new(Level::Fault, file, format!("{error:#}")).hint("remove it: a ready agent writes it anew"),
            );
        }
        Some((file, Ok(network))) => found.push(Finding::ok(file, format!("network {network}"))),
        None if stage == Stage::Beside => found.push(
            Finding::new(Level::Fault, CONFLIST, "is missing: no pod can be added")
                .hint("see why the agent is not ready: it writes it then"),
        ),
        None => found.push(Finding::ok(CONFLIST, "not there yet: the agent writes it once it is ready")),
    }
    found
}

/// The agent runs nevertheless, and tries on: what an earlier one has put there may still do.
fn directory(what: &str, flag: &str, (dir, writable): &(PathBuf, Result<()>)) -> Finding {
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
            conf_dir: Some(("/etc/cni/net.d".into(), Ok(()))),
            bin_dir: Some(("/opt/cni/bin".into(), Ok(()))),
            binary: true,
        }
    }

    const OURS: (&str, Result<&str, &str>) = ("05-rustnet.conflist", Ok("rustnet"));

    #[test]
    fn ours_first_is_well_and_nothing_is_before_the_agent() {
        assert_well(&check(&facts(&[OURS, ("10-flannel.conflist", Err("is not JSON"))]), Stage::Beside));
        assert_well(&check(&Facts { binary: false, ..facts(&[]) }, Stage::Before));
        assert_well(&check(&Facts::default(), Stage::Beside));
    }

    #[test]
    fn one_fault_at_a_time() {
        let read_only = || Some(("/opt/cni/bin".into(), Err(anyhow::anyhow!("EROFS"))));
        for (facts, level, detail, hint) in [
            (facts(&[("00-multus.conf", Ok("multus")), OURS]), Level::Warning, "network multus", "Multus"),
            (facts(&[("04-x.json", Err("is not JSON")), OURS]), Level::Fault, "the runtime stops", "mend"),
            (facts(&[(CONFLIST, Err("has no plugins"))]), Level::Fault, "no plugins", "writes it anew"),
            (facts(&[]), Level::Fault, "is missing", "not ready"),
            (Facts { binary: false, ..facts(&[OURS]) }, Level::Fault, BINARY, "restart"),
            (Facts { bin_dir: read_only(), ..facts(&[OURS]) }, Level::Fault, "EROFS", "--cni-bin-dir"),
            (Facts { conf_dir: read_only(), ..facts(&[OURS]) }, Level::Fault, "EROFS", "--cni-conf-dir"),
            (Facts { configurations: Some(Err(anyhow::anyhow!("EIO"))), ..facts(&[]) }, Level::Warning, "EIO", "root"),
        ] {
            assert_only(&check(&facts, Stage::Beside), level, detail, hint);
        }
    }

    #[test]
    fn only_what_does_not_call_us_is_instead_of_us() {
        let dir = tempfile::tempdir().expect("dir");
        for (name, text) in [
            ("00-multus.conf", r#"{"name":"multus","type":"multus","clusterNetwork":"rustnet"}"#),
            ("01-other.conf", r#"{"name":"other","type":"bridge"}"#),
            ("02-broken.conf", "{"),
            ("05-rustnet.conflist", r#"{"name":"rustnet","plugins":[{"type":"rustnet-cni"}]}"#),
            ("10-late.conf", r#"{"name":"late","type":"bridge"}"#),
        ] {
            std::fs::write(dir.path().join(name), text).expect("written");
        }
        let told = instead_of_ours(dir.path());
        let [other, broken] = &told[..] else { panic!("{told:?}") };
        assert!(other.contains("01-other.conf: network other comes before") && other.contains("remove it"), "{other}");
        assert!(broken.contains("02-broken.conf: is not JSON") && broken.contains("mend it"), "{broken}");
        assert!(instead_of_ours(&dir.path().join("absent")).is_empty());
    }

    #[test]
    fn files_are_read_as_runtimes_do() {
        let dir = tempfile::tempdir().expect("dir");
        for (name, text) in [
            ("20-list.conflist", r#"{"name":"a","plugins":[{"type":"bridge"}]}"#),
            ("10-one.conf", r#"{"name":"b","type":"bridge"}"#),
            ("05-empty.conflist", r#"{"name":"c","plugins":[]}"#),
            ("04-typeless.json", r#"{"name":"d"}"#),
            ("03-broken.conf", "{"),
            ("README", "x"),
            ("99-off.conf.bak", "{"),
        ] {
            std::fs::write(dir.path().join(name), text).expect("written");
        }
        let read: Vec<_> =
            configurations(dir.path()).expect("read").into_iter().map(|(file, net)| (file, net.ok())).collect();
        let want = [
            ("03-broken.conf", None),
            ("04-typeless.json", None),
            ("05-empty.conflist", None),
            ("10-one.conf", Some("b")),
            ("20-list.conflist", Some("a")),
        ];
        assert_eq!(read, want.map(|(file, net)| (file.to_owned(), net.map(str::to_owned))));
        assert!(configurations(&dir.path().join("absent")).expect("none").is_empty());
        assert!(writable(&dir.path().join("absent/below")).is_ok());
        assert!(writable(&dir.path().join("README/below")).is_err());
        assert!(writable(Path::new("/proc/sys/net")).is_ok() || writable(Path::new("/proc/sys")).is_err());
    }
}
