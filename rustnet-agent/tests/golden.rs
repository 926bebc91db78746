//! Golden tests: manifests in, dump of the maps out, one file a case under `tests/golden/cases`.
//!
//! A case is a sequence of sections. `-- settings --` (first, optional) sets this node; `-- NAME.yaml --` writes a file,
//! `-- remove NAME.yaml --` removes one, `-- restart --` starts a new agent on the same maps (after the changes so far), and
//! `-- expect --` brings the maps up to date and holds what they must look like then. Text before the first section says what
//! the case is about. With `UPDATE_GOLDEN=1` the expectations are written instead of compared.

use anyhow::{Context, bail, ensure};
use ipnet::IpNet;
use rustnet_agent::config::{Forwarding, Routing};
use rustnet_agent::host::{DefaultRoute, Device, DeviceAddress, DeviceKind, HostFacts};
use rustnet_agent::index::{Index, Settings};
use rustnet_agent::model::Family;
use rustnet_agent::plan::{GRACE, MemoryMaps, Planner, Write};
use rustnet_agent::source::manifests::{Catalog, scan};
use rustnet_agent::source::{Event, Kind};
use rustnet_common::backend::{flags as backend, id};
use rustnet_common::maglev::UNIT;
use rustnet_common::peer::{Peer, flags as peer, identity};
use rustnet_common::service::flags as service;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

/// One section of a case: its heading and its text.
type Section = (String, String);

/// A node's agent on a directory of its own.
struct Node {
    settings: Settings,
    host: HostFacts,
    dir: TempDir,
    catalog: Catalog,
    index: Index,
    planner: Planner,
    maps: MemoryMaps,
    now: Duration,
}

impl Node {
    fn new((settings, host): (Settings, HostFacts)) -> anyhow::Result<Self> {
        let maps = MemoryMaps::new(1024).with_tables(4 * UNIT);
        let mut index = Index::new(settings.clone());
        index.set_host(host.clone());
        Ok(Self {
            dir: TempDir::new()?,
            catalog: Catalog::default(),
            index,
            planner: Planner::adopt(&maps)?,
            settings,
            host,
            maps,
            now: Duration::ZERO,
        })
    }

    fn restart(&mut self) -> anyhow::Result<()> {
        self.catalog = Catalog::default();
        self.index = Index::new(self.settings.clone());
        self.index.set_host(self.host.clone());
        self.planner = Planner::adopt(&self.maps)?;
        Ok(())
    }

    /// Reads the directory, brings the maps up to date, and says what they hold.
    fn dump(&mut self) -> anyhow::Result<String> {
        for event in scan(&mut self.catalog, self.dir.path())? {
            self.index.handle(event);
        }
        if !self.index.synced() {
            for kind in Kind::ALL {
                self.index.handle(Event::Synced(kind));
            }
        }
        self.now += GRACE;
        self.maps.set_now(self.now);
        let plan = self.planner.sync(&mut self.index, &mut self.maps, self.now)?;
        let mut text = String::new();
        self.services(&mut text)?;
        self.peers(&mut text)?;
        writeln!(text, "writes: {}", count(&plan.writes))?;
        let ended: Vec<String> = self.maps.take_ended().into_iter().map(short).collect();
        if !ended.is_empty() {
            writeln!(text, "ended: {}", ended.join(", "))?;
        }
        let mut problems = self.index.problems();
        if self.index.nodes().next().is_none() {
            // Most cases are about services and have no nodes at all.
            problems.retain(|problem| !problem.message.starts_with("this node's own object is missing"));
        }
        for problem in problems.into_iter().chain(self.planner.problems(&self.index)) {
            writeln!(text, "problem: {problem}")?;
        }
        Ok(text)
    }

    fn services(&self, text: &mut String) -> anyhow::Result<()> {
        for (key, entry) in &self.maps.held().services {
            write!(text, "{key}")?;
            if let Some((name, port)) = self.index.owner(key) {
                write!(text, " = {name}")?;
                if !port.name.is_empty() {
                    write!(text, " {}", port.name)?;
                }
                write!(text, ", id {}", entry.id)?;
            }
            if entry.affinity > 0 {
                write!(text, ", affinity {} s", entry.affinity)?;
            }
            if entry.table > 0 {
                write!(text, ", maglev table {}", entry.table)?;
            }
            if entry.flags & service::DIRECT != 0 {
                write!(text, ", direct")?;
            }
            if entry.flags & service::DROP_EMPTY != 0 {
                write!(text, ", drop")?;
            } else if entry.count == 0 {
                write!(text, ", refuse")?;
            }
            writeln!(text)?;
            let ordinals: Option<Vec<u32>> = self.maps.held().ordinals(entry.table).map(Iterator::collect);
            for (i, b) in (0..).zip(self.maps.backends(entry)) {
                let target = std::net::SocketAddr::new(IpAddr::from(b.addr), b.port);
                write!(text, "    {target} id {}", short(b.id))?;
                for (bit, name) in [(backend::LOCAL, "local"), (backend::TERMINATING, "terminating")] {
                    if b.flags & bit != 0 {
                        write!(text, " {name}")?;
                    }
                }
                if let Some(ordinals) = ordinals.iter().find(|_| entry.table > 0) {
                    write!(text, ", {} places", ordinals.iter().filter(|ordinal| **ordinal == i).count())?;
                }
                writeln!(text)?;
            }
        }
        Ok(())
    }

    fn peers(&self, text: &mut String) -> anyhow::Result<()> {
        for (prefix, Peer { node, identity, flags, .. }) in &self.maps.held().peers {
            let who = match *identity {
                identity::WORLD => "world",
                identity::HOST => "this host",
                identity::NODE => "node",
                identity::POD => "pods",
                other => bail!("identity {other}"),
            };
            write!(text, "{prefix}: {who}")?;
            for (bit, name) in
                [(peer::LOCAL_PODS, "here"), (peer::NO_MASQ, "not masqueraded"), (peer::SERVICES, "Services")]
            {
                if flags & bit != 0 {
                    write!(text, ", {name}")?;
                }
            }
            let node = IpAddr::from(*node);
            if flags & peer::TUNNEL != 0 {
                write!(text, ", tunnel to {node}")?;
            } else if !node.is_unspecified() {
                write!(text, ", at {node}")?;
            }
            writeln!(text)?;
        }
        Ok(())
    }
}

/// A backend's id: slot and generation.
fn short(id: u32) -> String {
    format!("{}.{}", id::slot_of(id), id::generation_of(id))
}

/// How many writes of each sort, in order of their first.
fn count(writes: &[Write]) -> String {
    let mut counts: Vec<(&str, usize)> = Vec::new();
    for write in writes {
        let sort = match write {
            Write::Backends { .. } => "backends",
            Write::BackendIds { .. } => "backend ids",
            Write::ClearBackends { .. } => "clear backends",
            Write::MaglevTable { .. } => "maglev table",
            Write::PutService { .. } => "put service",
            Write::DeleteService { .. } => "delete service",
            Write::PutPeer { .. } => "put peer",
            Write::DeletePeer { .. } => "delete peer",
            Write::PutSourceRange { .. } => "put source range",
            Write::DeleteSourceRange { .. } => "delete source range",
            Write::EndBackends { .. } => "end backends",
            Write::RestoreBackends { .. } | Write::RestoreIds { .. } | Write::RestoreTables { .. } => "restore",
        };
        match counts.iter_mut().find(|(name, _)| *name == sort) {
            Some((_, n)) => *n += 1,
            None => counts.push((sort, 1)),
        }
    }
    let counts: Vec<String> = counts.into_iter().map(|(sort, n)| format!("{n} {sort}")).collect();
    if counts.is_empty() { "none".to_owned() } else { counts.join(", ") }
}

fn settings(text: &str) -> anyhow::Result<(Settings, HostFacts)> {
    let mut addresses: Vec<IpNet> = Vec::new();
    let mut settings = Settings::new("n1", Routing::Vxlan);
    for line in text.lines().filter(|line| !line.is_empty()) {
        let (name, value) = line.split_once(": ").with_context(|| format!("{line:?} is no setting"))?;
        match (name, value) {
            ("node", name) => settings.node_name = name.into(),
            ("routing", word) => {
                let routing = Routing::ALL.into_iter().find(|routing| routing.word() == word);
                settings.routing = routing.context("no such routing")?;
            }
            ("address", net) => addresses.push(net.parse()?),
            ("forwarding", word) => settings.forwarding = Forwarding::parse(word).context("no such mode")?,
            ("services", range) => settings.service_cidrs.push(range.parse()?),
            ("no masquerade", range) => settings.no_masquerade.push(range.parse()?),
            _ => bail!("{line:?} is no setting"),
        }
    }
    let addresses =
        addresses.into_iter().map(|net| DeviceAddress { net, is_usable: true, is_preferred: true }).collect();
    let eth0 =
        Device { index: 2, name: "eth0".into(), mtu: 1500, kind: DeviceKind::Ethernet, addresses, on_link: Vec::new() };
    let default = DefaultRoute { family: Family::V4, metric: 0, device: 2 };
    Ok((settings, HostFacts { devices: vec![eth0], defaults: vec![default] }))
}

/// The text before the first section, and the sections.
fn sections(text: &str) -> (String, Vec<Section>) {
    let mut about = String::new();
    let mut sections: Vec<Section> = Vec::new();
    for line in text.split_inclusive('\n') {
        let heading = line.trim_end().strip_prefix("-- ").and_then(|rest| rest.strip_suffix(" --"));
        match (heading, sections.last_mut()) {
            (Some(heading), _) => sections.push((heading.to_owned(), String::new())),
            (None, Some((_, text))) => text.push_str(line),
            (None, None) => about.push_str(line),
        }
    }
    (about, sections)
}

/// Runs a case; gives its text as it should read.
fn run(text: &str) -> anyhow::Result<String> {
    let (mut result, sections) = sections(text);
    ensure!(!result.trim().is_empty(), "say at the top what the case is about");
    let mut node: Option<Node> = None;
    for (heading, text) in sections {
        let mut text = text;
        if heading == "settings" {
            ensure!(node.is_none(), "settings come first");
            node = Some(Node::new(settings(&text)?)?);
        } else {
            let node = match &mut node {
                Some(node) => node,
                None => node.insert(Node::new(settings("")?)?),
            };
            match heading.split_once(' ') {
                None if heading == "expect" => text = node.dump()? + "\n",
                None if heading == "restart" => node.restart()?,
                None => std::fs::write(node.dir.path().join(&heading), &text)?,
                Some(("remove", name)) => std::fs::remove_file(node.dir.path().join(name)).context(heading.clone())?,
                Some(_) => bail!("{heading:?} is no section"),
            }
        }
        write!(result, "-- {heading} --\n{text}")?;
    }
    Ok(result.trim_end().to_owned() + "\n")
}

fn cases() -> anyhow::Result<BTreeMap<String, PathBuf>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/cases");
    let mut cases = BTreeMap::new();
    for entry in std::fs::read_dir(&dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "txt") {
            cases.insert(path.file_stem().unwrap_or_default().to_string_lossy().into_owned(), path);
        }
    }
    Ok(cases)
}

#[test]
fn every_case_ends_in_its_maps() {
    let update = std::env::var_os("UPDATE_GOLDEN").is_some();
    let cases = cases().unwrap();
    assert!(cases.len() > 20, "cases are missing: {:?}", cases.keys());
    let mut failed = Vec::new();
    for (name, path) in cases {
        let text = std::fs::read_to_string(&path).unwrap();
        match run(&text) {
            Ok(result) if result == text => {}
            Ok(result) if update => std::fs::write(&path, result).unwrap(),
            Ok(result) => failed.push(format!("{name}: {}", difference(&text, &result))),
            Err(error) => failed.push(format!("{name}: {error:#}")),
        }
    }
    assert!(failed.is_empty(), "\n{}\nUPDATE_GOLDEN=1 accepts the new state\n", failed.join("\n"));
}

#[test]
fn the_examples_are_flawless() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    for third in [true, false] {
        let mut node = Node::new(settings("").unwrap()).unwrap();
        for entry in std::fs::read_dir(&examples).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap();
            if third || name != "n3.yaml" {
                std::fs::copy(&path, node.dir.path().join(name)).unwrap();
            }
        }
        let dump = node.dump().unwrap();
        assert!(!dump.contains("problem:"), "{dump}");
        // web, echo, three ports of multiport, local, empty: in two families, with a wildcard for each address.
        assert_eq!(node.maps.held().services.len(), 2 * (7 + 5), "{dump}");
        assert_eq!(dump.contains("10.244.3.2"), third, "{dump}");
    }
}

/// The lines around the first difference.
fn difference(want: &str, got: &str) -> String {
    let (want, got): (Vec<&str>, Vec<&str>) = (want.lines().collect(), got.lines().collect());
    let at = want.iter().zip(&got).take_while(|(want, got)| want == got).count();
    let window = |lines: &[&str], sign: char| {
        lines.iter().skip(at).take(8).fold(String::new(), |text, line| text + &format!("  {sign} {line}\n"))
    };
    format!("differs at line {}\n{}{}", at + 1, window(&want, '-'), window(&got, '+'))
}
