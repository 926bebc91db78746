//! Which network a container runtime will use: the first configuration by name of its directory, ours or another's.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::install::{BINARY, CONFLIST, NETWORK};

/// What runtimes take for a configuration.
const SUFFIXES: [&str; 3] = ["conf", "conflist", "json"];

/// A configuration: its file, and the name of its network or what is wrong with it.
pub type Configuration = (String, Result<String>);

/// The files that a runtime reads, in its order.
///
/// # Errors
/// A directory that cannot be read; one that is not there has no files.
pub fn configurations(dir: &Path) -> Result<Vec<Configuration>> {
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
    let value: Value = serde_json::from_slice(&text).context("is not JSON")?;
    let is_list = path.extension().is_some_and(|it| it == "conflist");
    if is_list && value["plugins"].as_array().is_none_or(Vec::is_empty) {
        bail!("has no plugins");
    }
    if !is_list && value["type"].as_str().is_none_or(str::is_empty) {
        bail!("has no type");
    }
    Ok(value["name"].as_str().unwrap_or("without a name").to_owned())
}

/// A plugin behind ours in a list that takes pods' network away, or fails ([docs/chaining.md](../../docs/chaining.md)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misfit {
    /// The list's file.
    pub file: String,
    /// What becomes of pods.
    pub what: String,
    /// What to do.
    pub remedy: &'static str,
}

/// Those of all lists of a directory. Files that cannot be read are [`configurations`]' matter.
pub fn misfits(dir: &Path) -> Vec<Misfit> {
    let files = configurations(dir).unwrap_or_default();
    let lists = files.into_iter().filter_map(|(file, _)| {
        let list = serde_json::from_slice(&std::fs::read(dir.join(&file)).ok()?).ok()?;
        Some(misfits_of(&file, &list))
    });
    lists.flatten().collect()
}

/// ADD of the CNI binary does not see which plugins come behind it.
fn misfits_of(file: &str, list: &Value) -> Vec<Misfit> {
    let plugins = list["plugins"].as_array().map_or(&[][..], Vec::as_slice);
    let behind = plugins.iter().skip_while(|plugin| plugin["type"] != BINARY).skip(1);
    let judged = behind.filter_map(|plugin| {
        let sets_mac =
            plugin["mac"].as_str().is_some_and(|mac| !mac.is_empty()) || plugin["capabilities"]["mac"] == true;
        match plugin["type"].as_str()? {
            "tuning" if sets_mac => Some((
                "tuning changes the MAC address behind rustnet-cni: pods get no packet",
                "take mac from tuning, and give rustnet-cni the capability mac, or MAC= in CNI_ARGS",
            )),
            "bandwidth" => Some((
                "bandwidth behind rustnet-cni fails, for its qdisc has the place of the programs': no pod starts",
                "remove it, and give rustnet-cni the capability bandwidth",
            )),
            "sbr" => Some((
                "sbr behind rustnet-cni moves the routes: what a pod sends without a source address finds none",
                "remove it, unless pods have several interfaces",
            )),
            _ => None,
        }
    });
    judged.map(|(what, remedy)| Misfit { file: file.to_owned(), what: what.to_owned(), remedy }).collect()
}

/// A configuration that the runtime takes in place of ours, or stops at.
pub struct Rival<'a> {
    /// Its file.
    pub file: &'a str,
    /// No runtime can read it.
    pub is_broken: bool,
    /// What is so.
    pub what: String,
    /// What to do.
    pub remedy: &'static str,
}

/// Those before ours.
pub fn before_ours(all: &[Configuration]) -> impl Iterator<Item = Rival<'_>> {
    all.iter().filter(|(file, _)| file.as_str() < CONFLIST).map(|(file, network)| match network {
        Ok(network) => Rival {
            file,
            is_broken: false,
            what: format!("network {network} comes before {CONFLIST}: pods get that one"),
            remedy: "remove it, unless it is a plugin that calls rustnet itself (Multus)",
        },
        Err(error) => Rival {
            file,
            is_broken: true,
            what: format!("{error:#}: the runtime stops at it, before {CONFLIST}"),
            remedy: "fix it or remove it",
        },
    })
}

/// What the runtime takes in place of our configuration, or stops at: a line each. One that names our network calls it.
pub fn instead_of_ours(dir: &Path) -> Vec<String> {
    let mut all = match configurations(dir) {
        Ok(all) => all,
        Err(error) => return vec![format!("{error:#}; check --cni-conf-dir and the mount behind it")],
    };
    all.retain(|(file, _)| {
        let text = std::fs::read_to_string(dir.join(file)).unwrap_or_default();
        ![NETWORK, BINARY].iter().any(|name| text.contains(&format!("\"{name}\"")))
    });
    let line = |it: Rival<'_>| format!("{}: {}; {}", dir.join(it.file).display(), it.what, it.remedy);
    before_ours(&all).map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let found = instead_of_ours(dir.path());
        let [other, broken] = &found[..] else { panic!("{found:?}") };
        assert!(other.contains("01-other.conf: network other comes before") && other.contains("remove it"), "{other}");
        assert!(broken.contains("02-broken.conf: is not JSON") && broken.contains("fix it"), "{broken}");
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
    }
}
