//! Changes of endpoints at a high rate: how long an agent that watches an API server lets entries lead to an endpoint that left.

mod cluster;
mod observer;

use crate::api::Server;
use crate::control::{Memory, cpu_seconds};
use crate::stats::{Sorted, verdict};
use anyhow::{Context, Result, ensure};
use bytemuck::Zeroable as _;
use cluster::Cluster;
use observer::Observer;
use rustnet_agent::bpf::store::Map;
use rustnet_common::addr::Ip4;
use rustnet_common::conntrack::CtEntry;
use rustnet_common::names::map;
use rustnet_common::tuple::{Tuple, proto};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use testkit::{Fabric, Node, Setup};

/// Changes per second.
const RATE: u32 = 1000;
/// Milliseconds that an entry may lead to an endpoint that left.
const GOAL: f64 = 100.0;
/// The goal is about so many seconds.
pub const FULL: u32 = 60;
/// The agent's collector removes the entries of a filled table every 30 s.
const REFILL: Duration = Duration::from_secs(5);

/// Services that are measured.
struct Case {
    title: &'static str,
    protos: &'static [u8],
    /// `rn_ct4_any` is full.
    is_table_full: bool,
}

const CASES: [Case; 3] = [
    Case { title: "TCP", protos: &[proto::TCP], is_table_full: false },
    Case { title: "TCP and UDP", protos: &[proto::TCP, proto::UDP], is_table_full: false },
    Case { title: "TCP and UDP, full `rn_ct4_any`", protos: &[proto::TCP, proto::UDP], is_table_full: true },
];

/// Measures each case for so many seconds, and prints.
pub fn run(seconds: u32) -> Result<()> {
    println!("## Changes of endpoints (`cargo xtask bench churn`)\n");
    println!(
        "{RATE} changes per second for {seconds} s: one endpoint of one of {} Services leaves, another comes. From the moment at which an API \
         server sends the change until no entry of the Service leads to the endpoint that left (looked at every {} µs).\n\n\
         | Ports of each Service | Changes (per second) | ms: median / p99 / greatest | More than {GOAL} ms | Goal: none | \
         CPU of the agent, per cent of a core | Resident memory, MiB: before / behind / most |\n|---|---|---|---|---|---|---|",
        cluster::SERVICES,
        observer::PAUSE.as_micros()
    );
    let fabric = Fabric::build(Setup { nodes: 1, ..Setup::default() })?;
    let node = fabric.node(1);
    for case in &CASES {
        let measured = case.run(node, RATE * seconds);
        measured.with_context(|| format!("{}; the agent's log ends:\n{}", case.title, node.agent_log(30)))?;
    }
    Ok(())
}

impl Case {
    fn run(&self, node: &Node, count: u32) -> Result<()> {
        let (sender, changes) = channel();
        let cluster = Arc::new(Cluster::new(self.protos, count, Duration::from_secs(1) / RATE, sender));
        let server = Server::start(node, Arc::clone(&cluster))?;
        node.start_agent(&["--kubeconfig", &server.kubeconfig()])?;
        let bpffs = node.bpffs();
        let _filling = self.is_table_full.then(|| Filling::start(node, bpffs.clone())).transpose()?;
        let protos = self.protos;
        let observer = node.netns().thread(move || Observer::open(&bpffs, protos)?.follow(&changes, count))?;
        let pid = node.agent_pid().context("no agent")?;
        let (began, used, before) = (Instant::now(), cpu_seconds(pid)?, Memory::of(node)?);
        cluster.begin();
        let times = observer.join().map_err(|_| anyhow::anyhow!("the observer panicked"))???;
        let seconds = began.elapsed().as_secs_f64();
        let share = (cpu_seconds(pid)? - used) / seconds * 100.0;
        let behind = Memory::of(node)?;
        node.stop_agent()?;
        ensure!(times.len() == count as usize, "{} of {count} changes were seen", times.len());
        let late = times.iter().filter(|ms| **ms > GOAL).count();
        let times = Sorted::new(times);
        // A shorter time proves nothing.
        let word = if count >= RATE * FULL { verdict(late == 0) } else { "" };
        println!(
            "| {} | {count} ({:.0}) | {:.2} / {:.2} / {:.2} | {late} | {word} | {share:.0} | {:.1} / {:.1} / {:.1} |",
            self.title,
            f64::from(count) / seconds,
            times.median(),
            times.p99(),
            times.greatest(),
            before.resident,
            behind.resident,
            behind.peak
        );
        Ok(())
    }
}

/// Keeps a table of connections full of UDP flows to no backend.
struct Filling {
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Result<()>>>>,
}

impl Filling {
    /// Fills it, and goes on with that.
    fn start(node: &Node, bpffs: PathBuf) -> Result<Self> {
        node.netns().run(|| fill(&bpffs))??;
        let is_over = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&is_over);
        let thread = node.netns().thread(move || {
            while !over.load(Ordering::Relaxed) {
                fill(&bpffs)?;
                std::thread::park_timeout(REFILL);
            }
            Ok(())
        })?;
        Ok(Self { is_over, thread: Some(thread) })
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            drop(thread.join());
        }
    }
}

fn fill(bpffs: &Path) -> Result<()> {
    let table = Map::<Tuple<Ip4>, CtEntry<Ip4>>::open(bpffs, map::CT4_ANY)?;
    let tuple = |n: u32| Tuple { src: Ipv4Addr::from(n).into(), proto: proto::UDP, ..Tuple::zeroed() };
    let entries: Vec<_> = (0..table.max_entries()).map(|n| (tuple(n), CtEntry::zeroed())).collect();
    table.put_all(&entries)
}
