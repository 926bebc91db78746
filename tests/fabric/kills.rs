//! Agents are killed at random moments, and replaced by other builds, under sequenced traffic: not one packet is lost.
//!
//! `RUSTNET_KILLS`, `RUSTNET_PACKETS` and `RUSTNET_FLOWS` name the least of each. `cargo xtask test --long` asks for what the claim
//! says: a million sequenced packets (datagrams and their answers) and 50,000 new flows through thirty kills.

use crate::fixture::{Net, endpoints, figure, observed};
use anyhow::{Context, Result, ensure};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;
use testkit::load::{Kind, Load};
use testkit::pod::PORT;
use testkit::stream::Stream;
use testkit::{Node, Proto, Routing, Setup};

/// Kills of an agent.
const KILLS: usize = 10;
/// Sequenced packets through them.
const PACKETS: usize = 100_000;
/// New flows through them.
const FLOWS: usize = 5_000;
/// Datagrams in one burst of a stream, and the time between two: so that the agents, too, get some of two CPUs.
const BURST: (usize, Duration) = (12, Duration::from_millis(8));
/// Time between two requests of the other traffic.
const PAUSE: Duration = Duration::from_millis(4);

/// All that goes on meanwhile.
pub struct Traffic {
    streams: Vec<Stream>,
    connections: Vec<Load>,
    new: Vec<Load>,
}

impl Traffic {
    /// Both families, to pods by their own addresses and to a service, from pods of both nodes and from a host.
    pub fn start(net: &Net, services: [SocketAddr; 2]) -> Result<Self> {
        let pod = |pod: &testkit::Pod, like: SocketAddr| {
            Ok::<_, anyhow::Error>(SocketAddr::new(pod.address_like(like.ip())?, PORT))
        };
        let (mut streams, mut connections, mut new) = (Vec::new(), Vec::new(), Vec::new());
        for service in services {
            let ways = [
                (net.a.netns(), service),
                (net.a.netns(), pod(&net.c, service)?),
                (net.c.netns(), service),
                (net.a.netns(), pod(&net.b, service)?),
                (net.node(2).netns(), service),
            ];
            for (from, target) in ways {
                streams.push(Stream::start(from, target, BURST.0, BURST.1)?);
            }
            for (from, target) in &ways[..3] {
                connections.push(Load::start(from, Kind::Established, Proto::Tcp, *target, PAUSE)?);
                for proto in Proto::ALL {
                    new.push(Load::start(from, Kind::New, proto, *target, PAUSE)?);
                }
            }
        }
        Ok(Self { streams, connections, new })
    }

    /// Packets of the streams, there and back.
    fn packets(&self) -> usize {
        2 * self.streams.iter().map(Stream::answered).sum::<usize>()
    }

    fn new_flows(&self) -> usize {
        self.new.iter().map(Load::done).sum()
    }

    /// Every one of them goes on.
    pub fn wait_more(&self, n: usize) -> Result<()> {
        self.new.iter().chain(&self.connections).try_for_each(|load| load.wait_more(n))
    }

    /// Ends it. An error names every kind of traffic that lost something.
    pub fn nothing_lost(self) -> Result<()> {
        let (packets, flows) = (self.packets(), self.new_flows());
        let mut bad = Vec::new();
        for load in self.new.into_iter().chain(self.connections) {
            bad.extend(load.stop()?.no_loss().err().map(|e| e.to_string()));
        }
        for stream in self.streams {
            bad.extend(stream.stop()?.no_loss().err().map(|e| e.to_string()));
        }
        println!("{packets} sequenced packets, {flows} new flows");
        ensure!(bad.is_empty(), "lost something:\n{}", bad.join("\n"));
        Ok(())
    }
}

/// Numbers without a pattern, the same in every run.
pub struct Dice(pub u64);

impl Dice {
    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

fn killed(net: &Net) -> Result<()> {
    let (packets, flows) = (figure("RUSTNET_PACKETS", PACKETS)?, figure("RUSTNET_FLOWS", FLOWS)?);
    let wanted_kills = figure("RUSTNET_KILLS", KILLS)?;
    let service = net.service(endpoints(&[&net.a, &net.b, &net.c]))?;
    let traffic = Traffic::start(net, service.targets())?;
    traffic.wait_more(20)?;
    let (mut dice, mut kills, mut round) = (Dice(0x9e37_79b9), 0, 0);
    while kills < wanted_kills || traffic.packets() < packets || traffic.new_flows() < flows {
        for node in net.fabric.nodes() {
            if node.agent_runs() {
                node.kill_agent()?;
                kills += 1;
            }
        }
        for node in net.fabric.nodes() {
            node.spawn_agent(&[])?;
        }
        // Now and then an agent lives to be ready: then programs were swapped. Else it dies somewhere on the way there.
        if round % 4 == 0 {
            net.fabric.nodes().iter().try_for_each(Node::wait_ready)?;
        }
        traffic.wait_more(1 + dice.below(150) as usize)?;
        round += 1;
    }
    net.fabric.nodes().iter().try_for_each(Node::wait_ready)?;
    traffic.wait_more(20)?;
    println!("{kills} kills in {round} rounds");
    traffic.nothing_lost()
}

#[test]
fn kills_lose_no_packet_vxlan() -> Result<()> {
    observed_without_captures(Routing::Vxlan, killed)
}

#[test]
#[ignore = "the same code as over VXLAN; `cargo xtask test --long` runs it"]
fn kills_lose_no_packet_native() -> Result<()> {
    observed_without_captures(Routing::Native, killed)
}

/// A capture of every packet would cost more than the traffic itself; `RUSTNET_CAPTURE=1` makes one nevertheless.
pub fn observed_without_captures(routing: Routing, test: impl FnOnce(&Net) -> Result<()>) -> Result<()> {
    let net = Net::start(Setup { routing, ..Setup::default() })?;
    if std::env::var_os("RUSTNET_CAPTURE").is_some() {
        return observed(&net, test);
    }
    test(&net).map_err(|e| {
        let drops = net.fabric.nodes().iter().map(|n| n.rustnetctl(&["drops"]).unwrap_or_else(|e| format!("{e:#}")));
        e.context(drops.collect::<Vec<_>>().join("\n")).context(net.fabric.logs())
    })
}

/// An agent whose programs are other ones for the kernel: the name of their licence is part of the object.
pub fn other_build(net: &Net) -> Result<PathBuf> {
    let (one, two): (&[u8], &[u8]) = (b"Dual MIT/GPL", b"Dual BSD/GPL");
    let mut bytes = std::fs::read(testkit::dist::find("rustnet-agent")?)?;
    let places: Vec<usize> = bytes.windows(one.len()).enumerate().filter(|(_, w)| *w == one).map(|(i, _)| i).collect();
    ensure!(!places.is_empty(), "the agent holds no eBPF object");
    for at in places {
        bytes[at..at + two.len()].copy_from_slice(two);
    }
    let dir = net.fabric.dir().join("other");
    std::fs::create_dir(&dir)?;
    // The agent installs the CNI binary of its own directory.
    std::fs::copy(testkit::dist::find("rustnet-cni")?, dir.join("rustnet-cni"))?;
    let path = dir.join("rustnet-agent");
    std::fs::write(&path, bytes)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

/// The numbers of the programs that are pinned on a node.
fn programs(node: &Node) -> Result<Vec<u64>> {
    ["from_pod", "to_pod", "uplink_in", "overlay_in"]
        .iter()
        .map(|name| {
            let pin = node.bpffs().join("prog").join(name);
            let text = node.netns().command("bpftool")?.args(["-j", "prog", "show", "pinned"]).args([pin]).text()?;
            let program: serde_json::Value = serde_json::from_str(&text)?;
            program["id"].as_u64().with_context(|| format!("no program {name}: {text}"))
        })
        .collect()
}

/// Upgrades and downgrades, one node after the other, each as soon as the one before is ready.
#[test]
fn upgrades_and_downgrades_lose_nothing() -> Result<()> {
    observed_without_captures(Routing::Vxlan, |net| {
        let builds = [other_build(net)?, testkit::dist::find("rustnet-agent")?];
        let service = net.service(endpoints(&[&net.a, &net.b, &net.c]))?;
        let traffic = Traffic::start(net, service.targets())?;
        traffic.wait_more(20)?;
        for build in builds.iter().chain(&builds) {
            for node in net.fabric.nodes() {
                let before = programs(node)?;
                node.stop_agent()?;
                node.spawn_agent_of(build, &[], &[])?;
                node.wait_ready()?;
                let after = programs(node)?;
                ensure!(before.iter().all(|id| !after.contains(id)), "not swapped: {before:?} {after:?}");
                traffic.wait_more(20)?;
            }
        }
        traffic.nothing_lost()
    })
}
