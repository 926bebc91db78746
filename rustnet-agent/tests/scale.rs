//! Size: very large services, and very many of them. Times and memory are printed (`--nocapture`), not asserted: they depend
//! on the machine and on the profile. What is asserted is the work done: which writes a change leads to.

use rustnet_agent::config::Routing;
use rustnet_agent::host::HostFacts;
use rustnet_agent::index::{Index, Settings};
use rustnet_agent::model::Problem;
use rustnet_agent::plan::{Maps, MemoryMaps, Plan, Planner, Snapshot, Write};
use rustnet_agent::servicefile;
use rustnet_agent::source::convert::Converter;
use rustnet_agent::source::{Event, Kind, ObjectRef};
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

/// Maps that forget: what is measured is the control plane alone.
struct NoMaps;

impl Maps for NoMaps {
    fn snapshot(&self) -> anyhow::Result<Snapshot> {
        Ok(Snapshot::default())
    }
    fn apply(&mut self, _: &[Write]) -> anyhow::Result<()> {
        Ok(())
    }
    fn backend_capacity(&self) -> u32 {
        1 << 20
    }
}

fn synced() -> Index {
    let mut index = Index::new(Settings::new("n1", Routing::Vxlan));
    index.set_host(HostFacts::default());
    for kind in Kind::REQUIRED {
        index.handle(Event::Synced(kind));
    }
    index
}

fn service(converter: &mut Converter, n: u32) -> Event {
    let object = serde_json::json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": format!("service-{n}"), "namespace": format!("namespace-{}", n % 100)},
        "spec": {"clusterIPs": [Ipv4Addr::from(0x0a60_0001 + n).to_string()], "ports": [{"name": "http", "port": 80}]},
    });
    converter.service(&serde_json::from_value(object).unwrap()).unwrap()
}

/// Slice `part` of a service with these endpoints.
fn slice(converter: &mut Converter, n: u32, part: u32, endpoints: impl Iterator<Item = u32>) -> Event {
    let endpoint = |e: u32| {
        serde_json::json!({
            "addresses": [Ipv4Addr::from(0x0af4_0000 + e).to_string()], "nodeName": format!("node-{}", e % 500),
            "conditions": {"ready": true, "serving": true, "terminating": false},
        })
    };
    let object = serde_json::json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": format!("service-{n}-{part}"), "namespace": format!("namespace-{}", n % 100),
                     "labels": {"kubernetes.io/service-name": format!("service-{n}")}},
        "ports": [{"name": "http", "port": 8080}],
        "endpoints": endpoints.map(endpoint).collect::<Vec<_>>(),
    });
    converter.slice(&serde_json::from_value(object).unwrap()).unwrap()
}

/// Backends and ids that are written.
fn written(plan: &Plan) -> (usize, usize) {
    plan.writes.iter().fold((0, 0), |(backends, ids), write| match write {
        Write::Backends { backends: more } => (backends + more.len(), ids),
        Write::BackendIds { ids: more, .. } => (backends, ids + more.len()),
        _ => (backends, ids),
    })
}

/// Resident memory of this process in KiB.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse().unwrap_or(0)
}

#[test]
fn ten_thousand_endpoints_in_one_service() {
    let mut converter = Converter::new();
    let (mut index, mut maps) = (synced(), MemoryMaps::new(1 << 16));
    let mut planner = Planner::adopt(&maps).unwrap();
    index.handle(service(&mut converter, 0));
    for part in 0..10 {
        index.handle(slice(&mut converter, 0, part, part * 1000..(part + 1) * 1000));
    }
    let plan = planner.sync(&mut index, &mut maps, Duration::ZERO).unwrap();
    assert_eq!(written(&plan), (10_000, 10_000));
    let before: Vec<_> = maps.held().backends.clone();
    // One endpoint goes: 9,999 keep their ids.
    index.handle(slice(&mut converter, 0, 3, 3001..4000));
    let began = Instant::now();
    let plan = planner.sync(&mut index, &mut maps, Duration::from_secs(1)).unwrap();
    println!("one of 10,000 endpoints goes: planned and applied in {:?}", began.elapsed());
    assert_eq!((plan.writes.len(), written(&plan)), (2, (0, 9_999)));
    let entry = maps.held().services.values().find(|entry| entry.count > 0).unwrap();
    let after = maps.backends(entry);
    let stayed: Vec<_> = before.iter().filter(|b| b.addr != before[3000].addr).copied().collect();
    assert_eq!(after, stayed);
}

#[test]
fn one_change_among_a_hundred_thousand_services() {
    const SERVICES: u32 = if cfg!(debug_assertions) { 20_000 } else { 100_000 };
    let mut converter = Converter::new();
    let mut index = synced();
    let began = Instant::now();
    let empty = resident();
    for n in 0..SERVICES {
        index.handle(service(&mut converter, n));
        index.handle(slice(&mut converter, n, 0, n * 3..n * 3 + 3));
    }
    println!(
        "{SERVICES} services: converted and indexed in {:?}, {} MiB",
        began.elapsed(),
        (resident() - empty) / 1024
    );
    let mut planner = Planner::adopt(&NoMaps).unwrap();
    let began = Instant::now();
    let plan = planner.sync(&mut index, &mut NoMaps, Duration::ZERO).unwrap();
    println!("{SERVICES} services x 3 backends: planned in {:?}, {} MiB", began.elapsed(), (resident() - empty) / 1024);
    assert_eq!(written(&plan), (SERVICES as usize * 3, SERVICES as usize * 3));
    drop(plan);
    index.handle(slice(&mut converter, SERVICES / 2, 0, 0..4));
    let began = Instant::now();
    let plan = planner.sync(&mut index, &mut NoMaps, Duration::from_secs(1)).unwrap();
    println!("one service of them changes: planned in {:?}", began.elapsed());
    assert_eq!((plan.writes.len(), written(&plan)), (3, (4, 4)));
    let began = Instant::now();
    assert_eq!(planner.sync(&mut index, &mut NoMaps, Duration::from_secs(2)).unwrap().writes, []);
    println!("nothing changes: planned in {:?}", began.elapsed());
}

#[test]
fn five_thousand_nodes_and_ten_thousand_problems() {
    const ROUNDS: u32 = 10;
    let mut index = Index::new(Settings::new("n1", Routing::Vxlan));
    let mut converter = Converter::new();
    for n in 0..5_000_u32 {
        let object = serde_json::json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": format!("node-{n}")},
            "spec": {"podCIDRs": [format!("10.{}.{}.0/24", n >> 8, n & 255)]},
            "status": {"addresses": [{"type": "InternalIP", "address": Ipv4Addr::from(0xac10_0001 + n).to_string()}]},
        });
        index.handle(converter.node(&serde_json::from_value(object).unwrap()).unwrap());
    }
    for n in 0..10_000 {
        let subject = format!("EndpointSlice default/s{n}").into();
        let name = rustnet_agent::model::ObjectName::namespaced("default", &format!("s{n}"));
        let object = ObjectRef { kind: Kind::Slice, name };
        let problem = Problem::new(&subject, "metadata.labels", "it names no Service");
        index.handle(Event::Reject(object, [problem].into()));
    }
    let report = |subject: &str| Problem::new(&subject.into(), "", "does not answer");
    index.handle(Event::Report { origin: "server".into(), problems: [report("the server")].into() });
    let time = |what: &str, mut work: Box<dyn FnMut() -> usize + '_>| {
        let began = Instant::now();
        let found = (0..ROUNDS).map(|_| work()).sum::<usize>() / ROUNDS as usize;
        println!("{what}: {found} in {:?}", began.elapsed() / ROUNDS);
        found
    };
    assert_eq!(time("peers", Box::new(|| index.desired_peers().len())), 10_000);
    assert_eq!(time("all problems", Box::new(|| index.problems().len())), 10_001);
    assert_eq!(time("problems of this node", Box::new(|| index.problems_of_this_node("the server").len())), 1);
    assert_eq!(time("the source's problems", Box::new(|| index.problems_of_source("the server").count())), 1);
}

#[test]
fn ten_thousand_services_with_five_endpoints() {
    let mut converter = Converter::new();
    let (mut index, mut planner) = (synced(), Planner::adopt(&NoMaps).unwrap());
    let empty = resident();
    for n in 0..10_000 {
        index.handle(service(&mut converter, n));
        index.handle(slice(&mut converter, n, 0, n * 5..n * 5 + 5));
    }
    let plan = planner.sync(&mut index, &mut NoMaps, Duration::ZERO).unwrap();
    assert_eq!(written(&plan), (50_000, 50_000));
    drop(plan);
    println!("10,000 services x 5 endpoints: {} KiB resident for index and plan", resident().saturating_sub(empty));
    let run = tempfile::tempdir().unwrap();
    let began = Instant::now();
    servicefile::write(run.path(), &servicefile::Objects::of(&index)).unwrap();
    let size = std::fs::metadata(run.path().join(servicefile::FILE)).unwrap().len();
    println!("their details for the command: {} KiB written in {:?}", size / 1024, began.elapsed());
}
