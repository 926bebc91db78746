//! Maglev: from the event that an endpoint has gone or come to the last map write, for Services of many ports and of many backends.

use crate::maps::{Timed, load};
use crate::stats::{Sorted, verdict};
use anyhow::{Context, Result, ensure};
use rustnet_agent::config::{MapSizes, Routing};
use rustnet_agent::host::HostFacts;
use rustnet_agent::index::{Index, Settings};
use rustnet_agent::plan::{Maps, Planner, Snapshot};
use rustnet_agent::source::convert::Converter;
use rustnet_agent::source::{Event, Kind};
use rustnet_common::backend::id;
use serde_json::{Value, json};
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::time::{Duration, Instant};
use testkit::{Fabric, Setup};

/// Time between two changes: what the one before has let go of is free again.
const PAUSE: Duration = Duration::from_millis(250);

/// A Service that is measured.
struct Case {
    title: &'static str,
    ports: u16,
    backends: u32,
    table_size: u32,
    /// Milliseconds that a change may take.
    goal: f64,
}

const CASES: [Case; 2] = [
    Case {
        title: "400 ports, 50 backends, table of 16,381 places",
        ports: 400,
        backends: 50,
        table_size: 16_381,
        goal: 10.0,
    },
    Case {
        title: "1 port, 1,000 backends, table of 65,537 places",
        ports: 1,
        backends: 1000,
        table_size: 65_537,
        goal: 2.0,
    },
];

/// Measures so many changes of each case, and prints.
pub fn run(changes: u32) -> Result<()> {
    println!("## Maglev (`cargo xtask bench maglev`)\n");
    println!(
        "One endpoint of a Service goes or comes, {changes} times: from the event to the last map write. Places that lead elsewhere once \
         one of the backends has gone, its own apart (goal 1 %).\n\n\
         | | ms: least / median / p99 | Goal (median) | | Tables | Places moved |\n|---|---|---|---|---|---|"
    );
    let fabric = Fabric::build(Setup { nodes: 1, ..Setup::default() })?;
    let node = fabric.node(1);
    for (i, case) in CASES.iter().enumerate() {
        let bpffs = node.dir().join(format!("bpf/maglev-{i}"));
        let result = node.netns().run(|| case.run(&bpffs, changes))?.context(case.title)?;
        let (times, goal) = (Sorted::new(result.times), case.goal);
        println!(
            "| {} | {} | {goal} | {} | {} | {:.2} % |",
            case.title,
            times.three(2),
            verdict(times.median() <= goal),
            result.tables,
            result.moved
        );
    }
    Ok(())
}

struct Measured {
    times: Vec<f64>,
    tables: usize,
    moved: f64,
}

impl Case {
    fn run(&self, bpffs: &Path, changes: u32) -> Result<Measured> {
        let entries = u32::from(self.ports) * self.backends * 3 + 4096;
        let mut maps = Timed::new(load(bpffs, &MapSizes { backends: entries, ..MapSizes::default() })?);
        let mut planner = Planner::adopt(&maps)?;
        let settings = Settings { maglev_table_size: self.table_size, ..Settings::new("n1", Routing::Vxlan) };
        let mut index = Index::new(settings);
        index.set_host(HostFacts::default());
        let mut converter = Converter::new();
        let first = [self.service(&mut converter)?, self.slice(&mut converter, self.backends)?];
        for event in first.into_iter().chain(Kind::REQUIRED.map(Event::Synced)) {
            index.handle(event);
        }
        planner.sync(&mut index, &mut maps, Duration::ZERO)?;
        let mut now = Duration::ZERO;
        let before = led(&maps.snapshot()?)?;
        let (mut times, mut moved, mut tables) = (Vec::new(), 0.0, 0);
        for n in 0..changes {
            // What was let go of rests, and is cleared, before the next change.
            for _ in 0..3 {
                now += PAUSE;
                planner.sync(&mut index, &mut maps, now)?;
            }
            let event = self.slice(&mut converter, self.backends - 1 + n % 2)?;
            let start = Instant::now();
            index.handle(event);
            planner.sync(&mut index, &mut maps, now)?;
            times.push(start.elapsed().as_secs_f64() * 1e3);
            if n == 0 {
                let (snapshot, gone) = (maps.snapshot()?, backend(self.backends - 1));
                let after = led(&snapshot)?;
                let others = before.iter().zip(&after).filter(|(was, is)| **was != gone && was != is).count();
                moved = f64::from(u32::try_from(others)?) * 100.0 / f64::from(self.table_size);
                let used: std::collections::BTreeSet<u16> =
                    snapshot.services.values().map(|entry| entry.table).collect();
                tables = used.iter().filter(|table| **table != 0).count();
            }
        }
        ensure!(planner.problems(&index).is_empty(), "{:?}", planner.problems(&index).first());
        Ok(Measured { times, tables, moved })
    }

    fn service(&self, converter: &mut Converter) -> Result<Event> {
        let ports: Vec<Value> = (0..self.ports).map(|n| json!({"name": format!("p{n}"), "port": 1000 + n})).collect();
        let object = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "web", "namespace": "default", "annotations": {"rustnet.io/lb-algorithm": "maglev"}},
            "spec": {"clusterIPs": ["10.96.0.10"], "ports": ports},
        });
        Ok(converter.service(&serde_json::from_value(object)?)?)
    }

    fn slice(&self, converter: &mut Converter, count: u32) -> Result<Event> {
        let ports: Vec<Value> = (0..self.ports).map(|n| json!({"name": format!("p{n}"), "port": 2000 + n})).collect();
        let endpoints: Vec<Value> =
            (0..count).map(|n| json!({"addresses": [backend(n).to_string()], "conditions": {"ready": true}})).collect();
        let object = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": "web-x", "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
            "ports": ports, "endpoints": endpoints,
        });
        Ok(converter.slice(&serde_json::from_value(object)?)?)
    }
}

fn backend(n: u32) -> IpAddr {
    Ipv4Addr::from(0x0af4_0002 + n).into()
}

/// The address that each place of an entry's table leads to.
fn led(held: &Snapshot) -> Result<Vec<IpAddr>> {
    let entry = held.services.values().find(|entry| entry.table != 0).context("no entry has a table")?;
    let ordinals = held.ordinals(entry.table).context("no table")?;
    let to = |ordinal: u32| {
        let id = held.ids.get((entry.first + ordinal) as usize)?;
        held.backends.get(id::slot_of(*id) as usize).map(|backend| backend.addr.into())
    };
    ordinals.map(to).collect::<Option<_>>().context("a place leads nowhere")
}
