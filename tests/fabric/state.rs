//! Everything that a node holds, as lines of text: taken before and after, and compared.

use anyhow::{Context, Result, bail, ensure};
use bytemuck::Pod;
use rustnet_agent::bpf::store::conntrack::Conntrack;
use rustnet_agent::bpf::store::endpoints::Endpoints;
use rustnet_agent::bpf::store::{BpfMaps, Map};
use rustnet_agent::plan::{Maps, Snapshot};
use rustnet_common::addr::{Ip4, Ip6};
use rustnet_common::frag::{FragKey, FragPorts};
use rustnet_common::names::map;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::path::Path;
use std::time::Duration;
use testkit::{Node, wait};

/// Lines by what they are about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State(BTreeMap<&'static str, BTreeSet<String>>);

/// The plan's maps of a node.
pub fn snapshot(node: &Node) -> Result<Snapshot> {
    node.netns().run(|| BpfMaps::open(&node.bpffs())?.snapshot())?
}

/// Connection entries of a node, both families.
pub fn connections(node: &Node) -> Result<usize> {
    node.netns().run(|| {
        let all = Conntrack::open(&node.bpffs())?;
        Ok(all.v4.len()? + all.v6.len()?)
    })?
}

/// Takes all connection entries of a node away, as an eviction would.
pub fn forget_connections(node: &Node) -> Result<usize> {
    node.netns().run(|| {
        let all = Conntrack::open(&node.bpffs())?;
        let mut deleted = 0;
        for table in all.v4.both() {
            let keys: Vec<_> = table.entries()?.into_iter().map(|(key, _)| key).collect();
            deleted += table.delete_all(&keys)?;
        }
        for table in all.v6.both() {
            let keys: Vec<_> = table.entries()?.into_iter().map(|(key, _)| key).collect();
            deleted += table.delete_all(&keys)?;
        }
        Ok(deleted)
    })?
}

fn keys<K: Pod + Debug, V: Pod>(map: &Map<K, V>) -> Result<BTreeSet<String>> {
    Ok(map.entries()?.iter().map(|(key, _)| format!("{key:?}")).collect())
}

/// All files below a directory; directories that are made once and stay empty are nobody's trace.
fn tree(dir: &Path, into: &mut BTreeSet<String>) -> Result<()> {
    for entry in std::fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            tree(&path, into)?;
        } else {
            into.insert(path.display().to_string());
        }
    }
    Ok(())
}

impl State {
    /// Devices, addresses, routes, permanent neighbours, programs on devices, pins, files of the run directory, and all
    /// maps but those that only count.
    pub fn of(node: &Node) -> Result<Self> {
        let lines = |text: String| text.lines().map(|l| l.trim().to_owned()).collect::<BTreeSet<_>>();
        let ip = |args: &str| node.netns().exec("ip", &args.split(' ').collect::<Vec<_>>()).map(lines);
        let mut all = BTreeMap::from([
            ("device", names_of(&node.netns().exec("ip", &["-j", "link"])?)?),
            (
                "address",
                ip("-o addr")?.into_iter().map(|l| l.split(" valid_lft").next().unwrap_or("").into()).collect(),
            ),
            ("route", &ip("-4 route show table all")? | &ip("-6 route show table all")?),
            ("rule", &ip("-4 rule")? | &ip("-6 rule")?),
            ("neighbour", ip("neigh show nud permanent")?),
            ("qdisc", node.netns().exec("tc", &["qdisc"]).map(lines)?),
            ("program", attached(&node.netns().exec("bpftool", &["-j", "net"])?)?),
        ]);
        let mut files = BTreeSet::new();
        tree(&node.run_dir(), &mut files)?;
        // The agent writes it whenever it first hears of pods.
        for names in
            ["pods.json", "nodes.json", "services.json", "service-details.json", "unserved.json", "policies.json"]
        {
            files.remove(&node.run_dir().join(names).display().to_string());
        }
        tree(&node.bpffs_from_outside(), &mut files)?;
        all.insert("file", files);
        let snapshot = snapshot(node)?;
        let mut lines = BTreeSet::new();
        for (key, entry) in &snapshot.services {
            let backends: Option<Vec<_>> = snapshot.backends_of(entry).collect();
            let backends = backends.with_context(|| format!("{key} leads to what is no backend of it: {entry:?}"))?;
            lines.insert(format!("{key} {entry:?} {backends:?}"));
        }
        all.insert("service", lines);
        all.insert("peer", snapshot.peers.iter().map(|(prefix, peer)| format!("{prefix} {peer:?}")).collect());
        node.netns().run(|| -> Result<()> {
            let bpffs = node.bpffs();
            let endpoints = Endpoints::open(&bpffs)?.read()?;
            all.insert("endpoint", endpoints.iter().map(|(ip, e)| format!("{ip} {e:?}")).collect());
            let connections = Conntrack::open(&bpffs)?;
            let mut lines = BTreeSet::new();
            for table in connections.v4.both() {
                lines.extend(keys(table)?);
            }
            for table in connections.v6.both() {
                lines.extend(keys(table)?);
            }
            all.insert("connection", lines);
            let four = Map::<FragKey<Ip4>, FragPorts>::open(&bpffs, map::FRAG4)?;
            let six = Map::<FragKey<Ip6>, FragPorts>::open(&bpffs, map::FRAG6)?;
            all.insert("fragment", &keys(&four)? | &keys(&six)?);
            Ok(())
        })??;
        Ok(Self(all))
    }

    /// Leaves out what comes and goes with traffic.
    pub fn at_rest(mut self) -> Self {
        self.0.retain(|about, _| !["connection", "fragment"].contains(about));
        self
    }

    /// How many lines are about something.
    pub fn count(&self, about: &str) -> usize {
        self.0.get(about).map_or(0, BTreeSet::len)
    }

    /// An error that names what has come or gone since `before`.
    pub fn same_as(&self, before: &Self) -> Result<()> {
        let mut changes = Vec::new();
        for (about, now) in &self.0 {
            let then = before.0.get(about).with_context(|| format!("nothing about {about} before"))?;
            changes.extend(now.difference(then).map(|line| format!("new {about}: {line}")));
            changes.extend(then.difference(now).map(|line| format!("gone {about}: {line}")));
        }
        ensure!(
            changes.is_empty(),
            "{} changes, such as:\n{}",
            changes.len(),
            changes[..changes.len().min(12)].join("\n")
        );
        Ok(())
    }

    /// Waits until a node is as it was. The agent looks at its host every 30 s at the latest.
    pub fn wait_for(&self, node: &Node) -> Result<()> {
        wait::until_deadline(&format!("{} as it was", node.name()), Duration::from_secs(90), || {
            Self::of(node)?.at_rest().same_as(&self.clone().at_rest())
        })
    }
}

fn json(text: &str) -> Result<Vec<serde_json::Value>> {
    match serde_json::from_str(text)? {
        serde_json::Value::Array(all) => Ok(all),
        other => bail!("not a list: {other}"),
    }
}

fn names_of(links: &str) -> Result<BTreeSet<String>> {
    Ok(json(links)?.iter().map(|l| l["ifname"].as_str().unwrap_or_default().to_owned()).collect())
}

/// Which programs are on which devices; their numbers change whenever an agent starts.
fn attached(net: &str) -> Result<BTreeSet<String>> {
    let all = json(net)?;
    let tc = all.iter().filter_map(|a| a["tc"].as_array()).flatten();
    // TCX links are pinned, and count among the files.
    let text = |p: &serde_json::Value, key: &str| p[key].as_str().unwrap_or_default().to_owned();
    Ok(tc.map(|p| ["devname", "kind", "name"].map(|key| text(p, key)).join(" ")).collect())
}
