//! The control plane at size: from events to entries in real pinned maps, compared with writing the
//! same entries in bulk; and the memory of an agent.

use crate::maps::{Timed, load};
use crate::nodes;
use crate::stats::{Sorted, verdict};
use anyhow::{Context, Result, ensure};
use bytemuck::Zeroable as _;
use rustnet_agent::bpf::store::Map;
use rustnet_agent::bpf::store::backends::Backends;
use rustnet_agent::bpf::store::memory::Access;
use rustnet_agent::config::{MapSizes, Routing};
use rustnet_agent::host::HostFacts;
use rustnet_agent::index::{Index, Settings};
use rustnet_agent::plan::{Maps, Planner, Snapshot};
use rustnet_agent::source::convert::Converter;
use rustnet_agent::source::{Event, Kind};
use rustnet_common::addr::Ip4;
use rustnet_common::conntrack::CtEntry;
use rustnet_common::names::map;
use rustnet_common::service::{SvcEntry, SvcKey};
use rustnet_common::tuple::{Tuple, proto};
use serde_json::{Value, json};
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::time::{Duration, Instant};
use testkit::manifest::{Endpoint, Outside, Port, Service};
use testkit::{Fabric, Node, Proto, Setup, wait};

/// Endpoints of each service that is written.
const ENDPOINTS: u32 = 3;
/// Seconds for a hundred thousand services, and the factor above bulk writes.
const GOALS: (f64, f64) = (1.5, 3.0);
/// Services that the goals speak of: all written, and remembered by an agent.
pub const FULL: (u32, u32) = (100_000, 10_000);
/// Milliseconds: 99 of 100 changes are in the map by then.
const CHANGE_GOAL: f64 = 1.0;
/// MiB of an agent that knows 10,000 services with five endpoints each.
const MEMORY_GOAL: f64 = 60.0;
/// Milliseconds of CPU for a scrape.
const SCRAPE_GOAL: f64 = 20.0;
/// How many are measured together: a tick of the clock is long.
const SCRAPES: u32 = 100;
/// Reading that many manifests takes an unoptimised agent a while.
const READY: Duration = Duration::from_mins(5);

/// How much to measure.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// Times that everything is written again.
    pub rounds: usize,
    /// Services.
    pub services: u32,
    /// Single changes among them.
    pub changes: u32,
    /// Services of the agent whose memory is looked at.
    pub remembered: u32,
    /// Nodes whose reports an agent follows, and for how long.
    pub nodes: (u32, Duration),
}

/// Seconds that the parts of one round took.
#[derive(Default)]
struct Times {
    index: Vec<f64>,
    plan: Vec<f64>,
    write: Vec<f64>,
    all: Vec<f64>,
    bulk: Vec<f64>,
    factor: Vec<f64>,
    change: Vec<f64>,
}

/// Measures and prints.
pub fn run(extent: &Extent) -> Result<()> {
    println!("## Control plane (`cargo xtask bench control`)\n");
    let fabric = Fabric::build(Setup { nodes: 1, ..Setup::default() })?;
    let node = fabric.node(1);
    let times = node.netns().run(|| write(node, extent))??;
    let Extent { rounds, services, .. } = extent;
    println!(
        "{services} services with {ENDPOINTS} endpoints each, from events to pinned maps, {rounds} times, compared with the same \
         entries written in bulk to maps of the same size.\n\n| | Least / median / p99 | Goal | |\n|---|---|---|---|"
    );
    let row = |name: &str, unit: &str, values: Vec<f64>, digits: usize, goal: Option<(f64, f64)>| {
        let sorted = Sorted::new(values);
        // Fewer services prove nothing.
        let goal = goal.filter(|_| *services >= FULL.0);
        let (goal, word) = match goal {
            Some((goal, reached)) => (format!("{goal}"), verdict(reached <= goal)),
            None => (String::new(), ""),
        };
        println!("| {name}, {unit} | {} | {goal} | {word} |", sorted.three(digits));
    };
    let median = |values: &[f64]| Sorted::new(values.to_vec()).median();
    let goals = [(GOALS.0, median(&times.all)), (GOALS.1, median(&times.factor))];
    let p99 = Sorted::new(times.change.clone()).p99();
    row("events into the index", "s", times.index, 3, None);
    row("plan", "s", times.plan, 3, None);
    row("writes to the maps", "s", times.write, 3, None);
    row("all three", "s", times.all, 3, Some(goals[0]));
    row("the same entries in bulk", "s", times.bulk, 3, None);
    row("all three / in bulk", "times", times.factor, 1, Some(goals[1]));
    row("one endpoint more or less, from event to map (p99 counts)", "ms", times.change, 3, Some((CHANGE_GOAL, p99)));
    memory(&fabric, extent.remembered)?;
    nodes::run(&fabric, extent.nodes.0, extent.nodes.1)
}

/// Maps that are big enough.
fn sizes_for(services: u32) -> MapSizes {
    let entries = (services * 2 + 1000).next_power_of_two();
    MapSizes { services: entries, backends: services * ENDPOINTS + 4096, ..MapSizes::default() }
}

fn write(node: &Node, extent: &Extent) -> Result<Times> {
    let mut times = Times::default();
    for round in 0..extent.rounds {
        let [own, bulk] = ["own", "bulk"].map(|name| node.dir().join(format!("bpf/{name}-{round}")));
        let mut converter = Converter::new();
        let mut events = Vec::new();
        for n in 0..extent.services {
            events.push(service(&mut converter, n)?);
            events.push(slice(&mut converter, n, ENDPOINTS)?);
        }
        let mut maps = Timed::new(load(&own, &sizes_for(extent.services))?);
        let mut planner = Planner::adopt(&maps)?;
        let start = Instant::now();
        let mut index = Index::new(Settings::new("n1", Routing::Vxlan));
        index.set_host(HostFacts::default());
        for event in events.into_iter().chain(Kind::REQUIRED.map(Event::Synced)) {
            index.handle(event);
        }
        let indexed = start.elapsed();
        let plan = planner.sync(&mut index, &mut maps, Duration::ZERO)?;
        let all = start.elapsed();
        drop(plan);
        let written = maps.took();
        let snapshot = maps.snapshot()?;
        let services = snapshot.services.values().filter(|entry| entry.count == ENDPOINTS).count();
        ensure!(services == extent.services as usize, "{services} services in the maps, not {}", extent.services);
        let raw = in_bulk(&bulk, &snapshot, extent.services)?;
        let [indexed, written, all, raw] = [indexed, written, all, raw].map(|t| t.as_secs_f64());
        times.index.push(indexed);
        times.plan.push(all - indexed - written);
        times.write.push(written);
        times.all.push(all);
        times.bulk.push(raw);
        times.factor.push(all / raw);
        if round == 0 {
            times.change = changes(&mut converter, &mut index, &mut planner, &mut maps, extent)?;
        }
    }
    Ok(times)
}

/// Writes the entries that stand in a snapshot to other maps, in as few calls as possible.
fn in_bulk(bpffs: &Path, snapshot: &Snapshot, services: u32) -> Result<Duration> {
    drop(load(bpffs, &sizes_for(services))?);
    let svc: Map<SvcKey<Ip4>, SvcEntry> = Map::open(bpffs, map::SVC4)?;
    let mut backends = Backends::open(bpffs, Access::Write)?;
    let entries: Vec<(SvcKey<Ip4>, SvcEntry)> = snapshot
        .services
        .iter()
        .filter_map(|(key, entry)| {
            let IpAddr::V4(ip) = key.ip else { return None };
            Some((SvcKey { vip: ip.into(), port: key.port, proto: key.proto, scope: key.scope }, *entry))
        })
        .collect();
    let start = Instant::now();
    backends.store(&snapshot.backends)?;
    backends.store_ids(0, &snapshot.ids)?;
    svc.put_all(&entries)?;
    Ok(start.elapsed())
}

/// Milliseconds from the event to the map, for services here and there that lose an endpoint or get it back.
fn changes(
    converter: &mut Converter,
    index: &mut Index,
    planner: &mut Planner,
    maps: &mut Timed,
    extent: &Extent,
) -> Result<Vec<f64>> {
    let mut all = Vec::new();
    let began = Instant::now();
    for n in 0..extent.changes {
        let which = n.wrapping_mul(7919) % extent.services;
        let event = slice(converter, which, ENDPOINTS - 1 + n % 2)?;
        let start = Instant::now();
        index.handle(event);
        planner.sync(index, maps, Duration::from_secs(1) + began.elapsed())?;
        all.push(start.elapsed().as_secs_f64() * 1e3);
    }
    Ok(all)
}

/// Addresses of services and endpoints number `n`.
fn vip(n: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x0a60_0001 + n)
}

fn endpoint(n: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x0b00_0001 + n)
}

fn service(converter: &mut Converter, n: u32) -> Result<Event> {
    let object = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": format!("service-{n}"), "namespace": format!("namespace-{}", n % 100) },
        "spec": { "clusterIPs": [vip(n).to_string()], "ports": [{ "name": "http", "port": 80 }] },
    });
    Ok(converter.service(&serde_json::from_value(object)?)?)
}

fn slice(converter: &mut Converter, n: u32, count: u32) -> Result<Event> {
    let endpoints: Vec<Value> = (n * ENDPOINTS..n * ENDPOINTS + count)
        .map(|e| {
            json!({
                "addresses": [endpoint(e).to_string()], "nodeName": format!("node-{}", e % 500),
                "conditions": { "ready": true, "serving": true, "terminating": false },
            })
        })
        .collect();
    let object = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": { "name": format!("service-{n}-x"), "namespace": format!("namespace-{}", n % 100),
                      "labels": { "kubernetes.io/service-name": format!("service-{n}") } },
        "ports": [{ "name": "http", "port": 8080 }], "endpoints": endpoints,
    });
    Ok(converter.slice(&serde_json::from_value(object)?)?)
}

/// An agent without services, and one with many, both fed by manifests.
fn memory(fabric: &Fabric, services: u32) -> Result<()> {
    let node = fabric.node(1);
    node.start_agent(&[])?;
    let empty = Memory::of(node)?;
    node.stop_agent()?;
    let all: Vec<Service> = (0..services).map(remembered).collect();
    for (i, some) in all.chunks(1000).enumerate() {
        let yaml: Vec<String> = some.iter().map(Service::yaml).collect();
        fabric.manifests().write(&format!("many-{i}.yaml"), &yaml.join("---\n"))?;
    }
    let start = Instant::now();
    node.spawn_agent(&[])?;
    wait::until_deadline("agent ready", READY, || {
        let answer = node.http_get("127.0.0.1:9879".parse()?, "/readyz")?;
        ensure!(answer.starts_with("HTTP/1.1 200"), "/readyz says: {answer}");
        Ok(())
    })
    .with_context(|| format!("the agent's log ends:\n{}", node.agent_log(30)))?;
    let ready = start.elapsed().as_secs_f64();
    let full = Memory::of(node)?;
    let scrape = scrape(node)?;
    node.stop_agent()?;
    println!(
        "\nMemory of rustnet-agent ({}), MiB:\n\n| | Resident | Its share (Pss) | Most so far | Goal | |\n|---|---|---|---|---|---|",
        testkit::dist::find("rustnet-agent")?
            .parent()
            .and_then(Path::file_name)
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default()
    );
    println!("| no services | {} | | |", empty.row());
    let word = if services >= FULL.1 { verdict(full.resident <= MEMORY_GOAL) } else { "" };
    println!(
        "| {services} services with 5 endpoints, from manifests, ready after {ready:.1} s | {} | {MEMORY_GOAL} at {} | {word} |",
        full.row(),
        FULL.1
    );
    println!(
        "\nCPU of the agent for a scrape of /metrics with a full rn_ct4_tcp, ms: {scrape:.1} (goal {SCRAPE_GOAL}: {})",
        verdict(scrape <= SCRAPE_GOAL)
    );
    Ok(())
}

/// Milliseconds of CPU that the agent spends on a scrape while a table of connections is full.
fn scrape(node: &Node) -> Result<f64> {
    node.netns().run(|| fill(&node.bpffs()))??;
    let pid = node.agent_pid().context("no agent")?;
    let before = cpu_seconds(pid)?;
    for _ in 0..SCRAPES {
        let answer = node.http_get("127.0.0.1:9962".parse()?, "/metrics")?;
        ensure!(answer.starts_with("HTTP/1.1 200"), "/metrics says: {answer}");
    }
    Ok((cpu_seconds(pid)? - before) * 1000.0 / f64::from(SCRAPES))
}

fn fill(bpffs: &Path) -> Result<()> {
    let table = Map::<Tuple<Ip4>, CtEntry<Ip4>>::open(bpffs, map::CT4_TCP)?;
    let tuple = |n: u32| Tuple { src: Ipv4Addr::from(n).into(), proto: proto::TCP, ..Tuple::zeroed() };
    let entries: Vec<_> = (0..table.max_entries()).map(|n| (tuple(n), CtEntry::zeroed())).collect();
    table.put_all(&entries)
}

/// Seconds of CPU that a process has used so far.
pub fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name may hold spaces; fields 14 and 15 of the whole are 11 and 12 behind it.
    let fields: Vec<_> = stat.rsplit_once(')').context("no stat")?.1.split_whitespace().collect();
    let tick = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("no clock ticks")?;
    Ok((fields[11].parse::<f64>()? + fields[12].parse::<f64>()?) / f64::from(u32::try_from(tick)?))
}

fn remembered(n: u32) -> Service {
    let endpoint = |e| Endpoint::ready(endpoint(e).into(), Some("n1"));
    Service {
        name: format!("service-{n}"),
        vips: vec![vip(n).into()],
        ports: vec![Port { name: "http".into(), proto: Proto::Tcp, port: 80, target: 8080 }],
        outside: Outside::default(),
        affinity: false,
        is_maglev: false,
        is_direct: false,
        endpoints: (n * 5..n * 5 + 5).map(endpoint).collect(),
    }
}

/// MiB of a process.
pub struct Memory {
    /// In memory now.
    pub resident: f64,
    proportional: f64,
    /// The most that were in memory.
    pub peak: f64,
}

impl Memory {
    /// Of a node's agent.
    pub fn of(node: &Node) -> Result<Self> {
        let pid = node.agent_pid().context("no agent")?;
        let field = |file: &str, name: &str| -> Result<f64> {
            let path = format!("/proc/{pid}/{file}");
            let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            let kib = line.and_then(|l| l.trim_start_matches(':').trim().trim_end_matches(" kB").parse::<f64>().ok());
            Ok(kib.with_context(|| format!("{path} has no {name}"))? / 1024.0)
        };
        Ok(Self {
            resident: field("status", "VmRSS")?,
            proportional: field("smaps_rollup", "Pss")?,
            peak: field("status", "VmHWM")?,
        })
    }

    fn row(&self) -> String {
        format!("{:.1} | {:.1} | {:.1}", self.resident, self.proportional, self.peak)
    }
}
