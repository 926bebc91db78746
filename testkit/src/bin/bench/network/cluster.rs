//! Pods of a real cluster, compared with the kernel's own network twice: in the same nodes, and between two bare namespaces.
//! `cargo xtask bench` starts the cluster and the pods; a file says where they are.

use super::case::{Case, Goal, Group};
use super::kernel::{Both, Hosts, Pair, Place};
use super::measure::{self, CONGESTION, IS_OVER};
use super::traffic::{self, Test};
use super::{Extent, table};
use anyhow::{Context, Result, bail};
use nix::sys::signal::{SigHandler, Signal, signal};
use serde_json::Value;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use testkit::netns::Holder;

/// Names the file.
const VARIABLE: &str = "RUSTNET_BENCH_CLUSTER";

const PLAIN: usize = 0;
const SAME: usize = 1;
const TUNNEL_GOALS: &[Goal] = &[
    Goal { test: Test::Rr, peer: PLAIN, least: 1.05 },
    Goal { test: Test::Crr, peer: PLAIN, least: 1.0 },
    Goal { test: Test::Stream, peer: PLAIN, least: 0.95 },
    Goal { test: Test::Rr, peer: SAME, least: 1.4 },
    Goal { test: Test::Crr, peer: SAME, least: 1.5 },
    Goal { test: Test::Stream, peer: SAME, least: 1.15 },
];
const ROUTED_GOALS: &[Goal] = &[
    Goal { test: Test::Rr, peer: PLAIN, least: 1.0 },
    Goal { test: Test::Crr, peer: PLAIN, least: 0.97 },
    Goal { test: Test::Stream, peer: PLAIN, least: 1.0 },
    Goal { test: Test::Rr, peer: SAME, least: 1.0 },
    Goal { test: Test::Crr, peer: SAME, least: 0.97 },
    Goal { test: Test::Stream, peer: SAME, least: 1.0 },
];

/// What the file says.
#[derive(Debug, PartialEq, Eq)]
struct Cluster {
    /// In words.
    text: String,
    is_tunnelled: bool,
    nodes: [Node; 2],
}

/// A node, and the pod on it.
#[derive(Debug, PartialEq, Eq)]
struct Node {
    name: String,
    netns: PathBuf,
    addresses: Both,
    pod_netns: PathBuf,
    pod_addresses: Vec<IpAddr>,
}

impl Cluster {
    fn read() -> Result<Self> {
        let Some(file) = std::env::var_os(VARIABLE) else {
            bail!("{VARIABLE} does not say where the pods are: start this by `cargo xtask bench network --cluster`")
        };
        let file = Path::new(&file);
        let text = std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
        Self::parse(&text).with_context(|| format!("reading {}", file.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let all: Value = serde_json::from_str(text)?;
        let nodes = all["nodes"].as_array().context("no nodes")?;
        let nodes: Vec<Node> = nodes.iter().map(Node::parse).collect::<Result<_>>()?;
        let is_tunnelled = match text_of(&all, "routing")? {
            "vxlan" => true,
            "native" => false,
            other => bail!("routing {other}: only vxlan and native are measured"),
        };
        let nodes = <[Node; 2]>::try_from(nodes).map_err(|nodes| anyhow::anyhow!("{} nodes, not two", nodes.len()))?;
        Ok(Self { text: text_of(&all, "cluster")?.to_owned(), is_tunnelled, nodes })
    }
}

impl Node {
    fn parse(value: &Value) -> Result<Self> {
        let own = addresses(value)?;
        let v4 = own.iter().find_map(|it| if let IpAddr::V4(it) = it { Some(*it) } else { None });
        let v6 = own.iter().find_map(|it| if let IpAddr::V6(it) = it { Some(*it) } else { None });
        let pod = &value["pod"];
        Ok(Self {
            name: text_of(value, "name")?.to_owned(),
            netns: text_of(value, "netns")?.into(),
            addresses: v4.zip(v6).context("a node without both families")?,
            pod_netns: text_of(pod, "netns")?.into(),
            pod_addresses: addresses(pod)?,
        })
    }

    /// Names of processes that hold a namespace begin with the id of this one.
    fn hold(&self, what: &str, netns: &Path) -> Result<Holder> {
        Holder::of(&format!("rn{}-{what}-{}", std::process::id(), self.name), netns)
    }
}

fn text_of<'a>(value: &'a Value, key: &str) -> Result<&'a str> {
    value[key].as_str().with_context(|| format!("no {key}"))
}

fn addresses(value: &Value) -> Result<Vec<IpAddr>> {
    let all = value["addresses"].as_array().context("no addresses")?;
    let parse =
        |it: &Value| it.as_str().and_then(|text| text.parse().ok()).with_context(|| format!("no address: {it}"));
    all.iter().map(parse).collect()
}

/// The kernel's network in the nodes of the cluster, in addition to what they have; removed when dropped.
struct Peers<'a> {
    pods: Option<[Place; 2]>,
    pair: Pair<'a>,
}

impl<'a> Peers<'a> {
    fn add(nodes: &'a [Holder; 2], cluster: &Cluster) -> Result<Self> {
        let [one, two] = &cluster.nodes;
        let pair = Pair { hosts: [&nodes[0], &nodes[1]], addresses: [one.addresses, two.addresses] };
        // A run that was killed may have left some.
        pair.remove()?;
        // First of all what removes them: a part may fail.
        let mut peers = Self { pods: None, pair };
        peers.pods = Some(if cluster.is_tunnelled {
            peers.pair.add_tunnel()?;
            peers.pair.add_tunnelled_pods("same-vxlan")?
        } else {
            peers.pair.add_routes()?;
            peers.pair.add_routed_pods("same-routed")?
        });
        Ok(peers)
    }

    fn pods(&self) -> Result<&[Place; 2]> {
        self.pods.as_ref().context("the peers have no pods")
    }
}

impl Drop for Peers<'_> {
    fn drop(&mut self) {
        // Interfaces of the nodes go with the pods at their other ends.
        self.pods = None;
        if let Err(error) = self.pair.remove() {
            eprintln!("{error:#}");
        }
    }
}

/// Measures and prints.
pub fn run(extent: &Extent) -> Result<()> {
    let cluster = Cluster::read()?;
    end_on_signals()?;
    println!(
        "## Pod to pod in a cluster (`cargo xtask bench network --cluster`)\n\n{}. {} rounds of {} ms a case, both ends on CPU {}, \
         {CONGESTION}. The ends are threads of the bench in the namespaces of the pods. The first table of a test has ratios to the kernel's \
         network between two bare namespaces that one veth pair joins. The second one has ratios to the kernel's network in the cluster's \
         own nodes: behind the same bridge, with kubelet's rules, which switch nf_conntrack on for IPv4, and with rustnet's programs on \
         the uplinks. None of them are on this peer's own devices.",
        cluster.text,
        extent.rounds,
        extent.time.as_millis(),
        extent.cpu,
    );
    let plain = Hosts::new()?;
    let [one, two] = &cluster.nodes;
    let nodes = [one.hold("node", &one.netns)?, two.hold("node", &two.netns)?];
    let pods = [one.hold("pod", &one.pod_netns)?, two.hold("pod", &two.pod_netns)?];
    let peers = Peers::add(&nodes, &cluster)?;
    let [client, server] = peers.pods()?;
    let (title, names, bare, goals) = if cluster.is_tunnelled {
        let names = ["kernel VXLAN, bare", "kernel VXLAN, same nodes", "rustnet VXLAN, pod"];
        ("Cluster, VXLAN, MTU 1450", names, [&plain.tunnelled[0], &plain.tunnelled[1]], TUNNEL_GOALS)
    } else {
        let names = ["kernel routing, bare", "kernel routing, same nodes", "rustnet native, pod"];
        ("Cluster, routed, MTU 1500", names, [&plain.routed[0], &plain.routed[2]], ROUTED_GOALS)
    };
    let cases = vec![
        Case::places(names[PLAIN], bare[0], bare[1]),
        Case::places(names[SAME], client, server),
        Case::to_address(names[2], &pods[0], &pods[1], &two.pod_addresses)?.goals(goals),
    ];
    let group = Group { title, cases, peers: &[PLAIN, SAME] };
    let groups = [group];
    measure::prepare(&groups)
        .context("a rule of the nodes may forbid the path: `nft list ruleset` there lists them")?;
    let results = measure::run(&groups, extent)?;
    table::print_all(&groups, &results);
    print_tracked(&groups[0], &nodes, extent)
}

/// What nf_conntrack of the nodes remembers of each case: whether it is on, and who pays for it.
fn print_tracked(group: &Group<'_>, nodes: &[Holder; 2], extent: &Extent) -> Result<()> {
    let count = || -> Result<usize> {
        let of = |node: &Holder| -> Result<usize> { Ok(node.read_sysctl("netfilter/nf_conntrack_count")?.parse()?) };
        Ok(of(&nodes[0])? + of(&nodes[1])?)
    };
    if let Err(error) = count() {
        println!("\n**nf_conntrack is not measured.** {error:#}");
        return Ok(());
    }
    println!("\n| nf_conntrack in both nodes, TCP_CRR | Connections | New entries |\n|---|---|---|");
    for (family, name) in ["IPv4", "IPv6"].into_iter().enumerate() {
        for case in &group.cases {
            let before = count()?;
            let turn = traffic::turn(Test::Crr, &case.ends(family), extent.cpu, extent.time)?;
            println!("| {name}, {} | {} | {} |", case.name, turn.each().len(), count()?.saturating_sub(before));
        }
    }
    Ok(())
}

/// Ends the run after the present turn at Ctrl-C and its like, so that the nodes lose what was added.
fn end_on_signals() -> Result<()> {
    extern "C" fn end(_: libc::c_int) {
        IS_OVER.store(true, Ordering::Relaxed);
    }
    for it in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler only stores a value.
        unsafe { signal(it, SigHandler::Handler(end)) }.context("cannot set a handler of signals")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"{
        "cluster": "two nodes", "routing": "vxlan",
        "nodes": [
            {"name": "n1", "netns": "/run/netns/x-n1", "addresses": ["172.18.0.11", "fd00:18::11"],
             "pod": {"netns": "/proc/7/root/run/netns/cni-1", "addresses": ["10.244.0.5", "fd00:244::5"]}},
            {"name": "n2", "netns": "/run/netns/x-n2", "addresses": ["fd00:18::12", "172.18.0.12"],
             "pod": {"netns": "/proc/8/root/run/netns/cni-2", "addresses": ["10.244.1.5", "fd00:244:0:1::5"]}}
        ]
    }"#;

    #[test]
    fn places_are_read_whatever_the_order_of_families() -> Result<()> {
        let cluster = Cluster::parse(TEXT)?;
        assert!(cluster.is_tunnelled);
        let two = &cluster.nodes[1];
        assert_eq!(two.addresses, ("172.18.0.12".parse()?, "fd00:18::12".parse()?));
        assert_eq!((two.netns.to_str(), two.pod_addresses.len()), (Some("/run/netns/x-n2"), 2));
        assert!(!Cluster::parse(&TEXT.replace("vxlan", "native"))?.is_tunnelled);
        Ok(())
    }

    #[test]
    fn what_cannot_be_measured_is_refused_with_a_reason() {
        for (from, to, reason) in [
            ("vxlan", "direct-and-vxlan", "direct-and-vxlan"),
            ("\"172.18.0.11\"", "\"fd00:18::13\"", "both families"),
            ("10.244.1.5", "10.244.1", "no address"),
            ("\"nodes\"", "\"node\"", "no nodes"),
        ] {
            let error = Cluster::parse(&TEXT.replace(from, to)).expect_err(to);
            assert!(format!("{error:#}").contains(reason), "{to}: {error:#}");
        }
    }
}
