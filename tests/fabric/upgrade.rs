//! Agents whose maps have another size or another shape follow each other under traffic: not one
//! packet is lost.

use crate::fixture::{Net, endpoints};
use crate::kills::{Traffic, observed_without_captures, other_build};
use anyhow::{Context, Result, ensure};
use rustnet_common::v1;
use std::path::{Path, PathBuf};
use testkit::{Fabric, Node, Routing, Setup, dist, wait};

/// Sizes of the maps that grow, shrink and stay.
const SIZES: [&[&str]; 3] = [
    &[
        "--ct-tcp-entries",
        "16384",
        "--ct-any-entries",
        "8192",
        "--service-entries",
        "1024",
        "--endpoint-entries",
        "512",
    ],
    &["--ct-tcp-entries", "131072", "--ct-any-entries", "65536", "--backend-entries", "8192", "--peer-entries", "1024"],
    &[],
];

/// A map whose size changes.
const SERVICES: &str = rustnet_common::names::map::SVC4;

/// The number that the kernel has for a pinned map, and its entries at most.
fn pinned(node: &Node, name: &str) -> Result<(u64, u64)> {
    let text = node
        .netns()
        .command("bpftool")?
        .args(["-j", "map", "show", "pinned"])
        .args([node.bpffs().join(name)])
        .text()?;
    let map: serde_json::Value = serde_json::from_str(&text)?;
    let field = |name: &str| map[name].as_u64().with_context(|| format!("no {name}: {text}"));
    Ok((field("id")?, field("max_entries")?))
}

/// Nothing of an upgrade is left: no maps of earlier agents, no load that is on no hook.
fn is_tidy(node: &Node) -> Result<()> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(node.bpffs_from_outside())? {
        names.push(entry?.file_name().into_string().unwrap_or_default());
    }
    ensure!(!names.iter().any(|name| ["old", "next"].contains(&name.as_str())), "left over: {names:?}");
    Ok(())
}

#[test]
fn other_map_sizes_lose_nothing() -> Result<()> {
    observed_without_captures(Routing::Vxlan, |net| {
        let service = net.service(endpoints(&[&net.a, &net.b, &net.c]))?;
        let traffic = Traffic::start(net, service.targets())?;
        traffic.wait_more(20)?;
        for sizes in SIZES {
            for node in net.fabric.nodes() {
                let before = pinned(node, SERVICES)?;
                node.stop_agent()?;
                node.spawn_agent(sizes)?;
                node.wait_ready()?;
                is_tidy(node)?;
                if sizes.contains(&"--service-entries") {
                    let after = pinned(node, SERVICES)?;
                    ensure!(before.0 != after.0 && after.1 == 1024, "{before:?} {after:?}");
                }
                traffic.wait_more(20)?;
            }
        }
        traffic.nothing_lost()
    })
}

/// An agent that cannot adopt the pinned maps leaves the CNI binary that works with them: pods come
/// and go.
#[test]
fn an_agent_that_cannot_load_leaves_the_cni_binary() -> Result<()> {
    observed_without_captures(Routing::Vxlan, |net| {
        let node = net.node(1);
        let other = other_build(net)?;
        let installed = node.cni_bin_dir().join("rustnet-cni");
        let before = std::fs::read(&installed)?;
        std::fs::write(other.with_file_name("rustnet-cni"), [&before[..], b"another"].concat())?;
        node.stop_agent()?;
        let (pin, kept) = (node.bpffs().join("rn_peers4"), node.bpffs().join("rn_peers4_kept"));
        let run = |program: &str, args: &[&str]| node.netns().command(program)?.args(args).text().map(drop);
        let [pin, kept] = [&pin, &kept].map(|path| path.display().to_string());
        run("mv", &[&pin, &kept])?;
        let shape = ["type", "hash", "key", "8", "value", "77", "entries", "16", "name", "rn_peers4"];
        run("bpftool", &[&["map", "create", &*pin][..], &shape].concat())?;
        node.spawn_agent_of(&other, &[], &[])?;
        wait::until("the refusal is known", || {
            let answer = node.http_get("127.0.0.1:9879".parse()?, "/readyz")?;
            ensure!(answer.contains("rn_peers4 is pinned as"), "{answer}");
            Ok(())
        })?;
        ensure!(std::fs::read(&installed)? == before, "the CNI binary was replaced");
        drop(node.add_pod("late")?);
        node.stop_agent()?;
        run("mv", &[&kept, &pin])?;
        node.spawn_agent_of(&other, &[], &[])?;
        node.wait_ready()?;
        ensure!(std::fs::read(&installed)? != before, "the CNI binary was not replaced");
        Ok(())
    })
}

/// The agent of v1, then this one, then v1 again, and so on: one node after the other, each as soon
/// as the one before is ready.
fn versions(routing: Routing) -> Result<()> {
    let (v1, present) = (dist::find_v1("rustnet-agent")?, dist::find("rustnet-agent")?);
    let fabric = Fabric::build(Setup { routing, ..Setup::default() })?;
    for node in fabric.nodes() {
        node.spawn_agent_of(&v1, &[], &[])?;
    }
    fabric.nodes().iter().try_for_each(Node::wait_ready)?;
    let net = Net::on(fabric).map_err(|(error, fabric)| error.context(fabric.logs()))?;
    follow(&net, &[present.clone(), v1, present]).map_err(|error| error.context(net.fabric.logs()))
}

fn follow(net: &Net, builds: &[PathBuf]) -> Result<()> {
    let service = net.service(endpoints(&[&net.a, &net.b, &net.c]))?;
    let traffic = Traffic::start(net, service.targets())?;
    traffic.wait_more(20)?;
    for build in builds {
        for node in net.fabric.nodes() {
            replace(node, build).with_context(|| format!("{} gets {}", node.name(), build.display()))?;
            traffic.wait_more(50)?;
        }
    }
    traffic.nothing_lost()
}

fn replace(node: &Node, build: &Path) -> Result<()> {
    node.stop_agent()?;
    let is_v1 = build == dist::find_v1("rustnet-agent")?;
    if is_v1 {
        pinned(node, v1::map::CT4).context("the agent exported no maps, or not in time")?;
    }
    node.spawn_agent_of(build, &[], &[])?;
    node.wait_ready()?;
    if is_v1 {
        return Ok(());
    }
    ensure!(pinned(node, v1::map::CT4).is_err(), "maps of v1 are left");
    is_tidy(node)
}

#[test]
#[ignore = "needs the programs of v1: cargo xtask agent-v1"]
fn upgrades_from_v1_and_back_lose_nothing_vxlan() -> Result<()> {
    versions(Routing::Vxlan)
}

#[test]
#[ignore = "needs the programs of v1: cargo xtask agent-v1"]
fn upgrades_from_v1_and_back_lose_nothing_native() -> Result<()> {
    versions(Routing::Native)
}
