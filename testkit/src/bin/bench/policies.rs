//! Network policies of large clusters: an agent that watches an API server, from its start and from events to the maps, its memory and
//! CPU; and what policies cost a packet.

mod changes;
mod cluster;
mod observer;
mod programs;
mod server;

use crate::api::{CLUSTER_POLICIES, Server};
use crate::control::{Memory, cpu_seconds};
use crate::stats::{Sorted, verdict};
use anyhow::{Context, Result, ensure};
use changes::{Changes, RATE, ROWS};
use cluster::{PODS_OF_NODE, Shape, uid};
use observer::{Figures, Observer, Sign};
use server::{Cluster, Feed};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use testkit::cni::Attachment;
use testkit::pod::Sandbox;
use testkit::{Fabric, Node, Setup};

/// Seconds from the last list to all maps; milliseconds from an event to the maps, at the median and at p99; MiB; per cent of a core.
const GOALS: Goals = Goals { start: 2.0, median: 5.0, p99: 50.0, memory: 120.0, share: 5.0 };
/// The cluster that goals of memory and of policies of the cluster speak of.
const FIRST: Shape = Shape { nodes: 1000, label_sets: 6000, policies: 30_000 };
/// The same with more pods of the same workloads.
const SECOND: Shape = Shape { nodes: 5000, ..FIRST };
const SMALL: Shape = Shape { nodes: 100, label_sets: 600, policies: 3000 };
/// The size of `rn_policy_pods` that the second cluster needs.
const POD_ENTRIES: &str = "262144";
/// Policies of the cluster, and the most rules that the API takes in one.
const CLUSTER_RULES: (u32, u32) = (4, 25);
/// How long an agent may take to start.
const PATIENCE: Duration = Duration::from_mins(5);

struct Goals {
    start: f64,
    median: f64,
    p99: f64,
    memory: f64,
    share: f64,
}

/// How much to measure.
pub struct Extent {
    /// A tenth of the cluster alone: too small for the goals.
    pub is_small: bool,
    /// Single changes of each kind.
    pub changes: u32,
    /// How long pods come and go.
    pub time: Duration,
    /// Runs, loads and packets of programs.
    pub packets: crate::packets::Extent,
}

/// Measures and prints.
pub fn run(extent: &Extent) -> Result<()> {
    println!("## Network policies (`cargo xtask bench policies`)\n");
    let shapes = if extent.is_small { &[SMALL][..] } else { &[FIRST, SECOND][..] };
    for (i, shape) in shapes.iter().enumerate() {
        measure(*shape, extent, i == 0)?;
    }
    programs::run(&extent.packets).context("programs")
}

/// Measures one cluster in a fabric of its own.
fn measure(shape: Shape, extent: &Extent, is_first: bool) -> Result<()> {
    let fabric = Fabric::build(Setup { nodes: 1, ..Setup::default() })?;
    let node = fabric.node(1);
    // The CNI binary needs the maps of an agent. The one that is measured finds them empty.
    node.start_agent(&["--network-policy", "off", "--policy-pod-entries", POD_ENTRIES])?;
    let pods = (0..PODS_OF_NODE).map(|n| LocalPod::new(node, shape, n)).collect::<Result<Vec<_>>>()?;
    node.stop_agent()?;
    let local: Vec<Vec<IpAddr>> = pods.iter().map(|pod| pod.addresses.clone()).collect();
    let (cluster, feed) = Cluster::new(shape, local.clone());
    let bench = Bench { shape, node, local, cluster: Arc::new(cluster), feed, is_small: extent.is_small };
    let done = bench.run(extent, is_first);
    done.with_context(|| format!("the agent's log ends:\n{}", node.agent_log(30)))
}

/// A pod of the node, without any program in it.
struct LocalPod {
    addresses: Vec<IpAddr>,
    _sandbox: Sandbox,
}

impl LocalPod {
    fn new(node: &Node, shape: Shape, n: u32) -> Result<Self> {
        let sandbox = Sandbox::new(node, &format!("pod-{n}"))?;
        let attachment = sandbox.attachment(&format!("pod-{n}"));
        let args = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME=pod-{n};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
            shape.workload(n).namespace(),
            attachment.container_id,
            uid(n)
        );
        let result = node.cni_add(&node.conflist()?, &Attachment { args, ..attachment })?;
        Ok(Self { addresses: testkit::pod::addresses(&result)?, _sandbox: sandbox })
    }
}

/// A cluster, and the node whose agent is measured.
struct Bench<'a> {
    shape: Shape,
    node: &'a Node,
    local: Vec<Vec<IpAddr>>,
    cluster: Arc<Cluster>,
    feed: Feed,
    is_small: bool,
}

impl Bench<'_> {
    fn run(&self, extent: &Extent, has_cluster_policies: bool) -> Result<()> {
        let server = Server::start(self.node, Arc::clone(&self.cluster))?;
        let began = Instant::now();
        self.node.spawn_agent(&["--kubeconfig", &server.kubeconfig(), "--policy-pod-entries", POD_ENTRIES])?;
        let observer = Observer::open(self.node)?;
        let [listed, applied] = self.start(&observer)?.map(|at| (at - began).as_secs_f64());
        self.node.wait_ready()?;
        let figures = observer.figures(self.node)?;
        self.describe(&figures);
        let memory = Memory::of(self.node)?;
        println!("| | | Goal | |\n|---|---|---|---|");
        println!("| from the agent's start to its last list, s | {listed:.2} | | |");
        let took = applied - listed;
        let goal = GOALS.start;
        println!("| from there to all maps, pods open, s | {took:.2} | {goal} | {} |", self.word(took <= goal));
        self.print_memory("then", &memory, true);

        let changes = Changes { shape: self.shape, feed: &self.feed, observer: &observer, local: &self.local };
        let pid = self.node.agent_pid().context("no agent")?;
        let (at, used) = (Instant::now(), cpu_seconds(pid)?);
        let seen = changes.steady(extent.time)?;
        let share = (cpu_seconds(pid)? - used) / at.elapsed().as_secs_f64() * 100.0;
        let goal = GOALS.share;
        println!(
            "| CPU while {RATE} pods per second come and go, five events each, for {} s, per cent of a core | {share:.1} | {goal} | {} |",
            extent.time.as_secs(),
            self.word(share <= goal)
        );
        println!("| from the event that such a pod runs to its entry, ms: median / p99 | {} | | |", two(&seen));
        self.print_memory("behind that", &Memory::of(self.node)?, false);
        println!(
            "\n| {} changes of each kind, one at a time: from the event to the maps, ms | Least / median / p99 | Goal | |",
            extent.changes
        );
        println!("|---|---|---|---|");
        for (row, times) in ROWS.iter().zip(changes.single(extent.changes)?) {
            let is_reached = times.median() <= GOALS.median && times.p99() <= GOALS.p99;
            let (median, p99) = (GOALS.median, GOALS.p99);
            println!("| {row} | {} | {median} / {p99} | {} |", times.three(2), self.word(is_reached));
        }
        println!();
        if has_cluster_policies {
            self.cluster_policies(&observer)?;
        }
        self.node.stop_agent()
    }

    /// Waits for the agent; returns when it had all lists, and when its pods were decided.
    fn start(&self, observer: &Observer) -> Result<[Instant; 2]> {
        let ips: Vec<IpAddr> = self.local.iter().flatten().copied().collect();
        let began = Instant::now();
        loop {
            ensure!(began.elapsed() < PATIENCE, "policies are not in the maps after {PATIENCE:?}");
            if observer.is_enforced()? {
                break;
            }
            std::thread::sleep(observer::PAUSE);
        }
        // The state is written behind all else.
        let applied = Instant::now();
        for ip in ips {
            let pod = observer.pod(ip)?.with_context(|| format!("{ip} is not decided"))?;
            ensure!(pod.ifindex != 0, "{ip} is closed");
        }
        Ok([self.cluster.all_listed().context("not all kinds are listed")?, applied])
    }

    fn describe(&self, figures: &Figures) {
        let Shape { nodes, label_sets, policies } = self.shape;
        println!(
            "{nodes} Nodes, {} pods, {label_sets} sets of labels in {} namespaces, {policies} NetworkPolicies; {PODS_OF_NODE} pods on the \
             node. Its maps: {} pods, {} of them addresses of its own, {} ranges, {} rules; {} sets, {} classes.\n",
            self.shape.pods(),
            self.shape.namespaces(),
            figures.pods,
            figures.decided,
            figures.cidrs,
            figures.rules,
            figures.sets,
            figures.classes
        );
    }

    fn print_memory(&self, when: &str, memory: &Memory, has_goal: bool) {
        let (resident, peak, goal) = (memory.resident, memory.peak, GOALS.memory);
        let is_reached = resident <= goal && peak <= goal;
        // The goal is about the first cluster.
        let has_goal = has_goal && self.shape.nodes <= FIRST.nodes;
        let (goal, word) = if has_goal { (format!("{goal}"), self.word(is_reached)) } else { Default::default() };
        println!("| memory {when}, MiB: resident / most so far | {resident:.1} / {peak:.1} | {goal} | {word} |");
    }

    /// Policies of the cluster with many rules about all pods.
    fn cluster_policies(&self, observer: &Observer) -> Result<()> {
        let (policies, rules) = CLUSTER_RULES;
        println!(
            "{policies} ClusterNetworkPolicies of the tier Admin with {rules} rules each, from all namespaces (`namespaces: {{}}`), for all \
             pods, one after the other:\n\n\
             | Rules | From the event to the maps, ms | Entries of rules | Classes | Addresses of the node's pods that are decided | Memory, \
             MiB: resident / most so far | Problems |\n|---|---|---|---|---|---|---|"
        );
        for n in 0..policies {
            let before = observer.before(Sign::Generation)?;
            let began = Instant::now();
            self.feed.send(CLUSTER_POLICIES, "ADDED", cluster::cluster_policy(n, rules))?;
            let is_there = observer.wait(Sign::Generation, &before)?;
            let took = began.elapsed().as_secs_f64() * 1e3;
            let more = if is_there { "" } else { "more than " };
            // What the agent deletes behind the last change, and its report.
            std::thread::sleep(Duration::from_secs(3));
            let (figures, memory) = (observer.figures(self.node)?, Memory::of(self.node)?);
            println!(
                "| {} | {more}{took:.0} | {} | {} | {} | {:.1} / {:.1} | {} |",
                (n + 1) * rules,
                figures.rules,
                figures.classes,
                figures.decided,
                memory.resident,
                memory.peak,
                self.problems()?
            );
        }
        println!();
        Ok(())
    }

    /// How many problems the agent reports.
    fn problems(&self) -> Result<usize> {
        let answer = self.node.http_get("127.0.0.1:9879".parse()?, "/readyz")?;
        let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        Ok(body.lines().filter(|line| *line != "ok").count())
    }

    /// A smaller cluster proves nothing.
    fn word(&self, is_reached: bool) -> &'static str {
        if self.is_small { "" } else { verdict(is_reached) }
    }
}

/// Median and 99th percentile.
fn two(times: &Sorted) -> String {
    format!("{:.0} / {:.0}", times.median(), times.p99())
}
