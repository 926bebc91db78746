//! Changes of a large cluster: single ones, from the event to the maps, and pods that come and go all the time.

use super::cluster::{self, PODS_OF_NODE, PodOf, Shape, Stage, Workload};
use super::observer::{self, Observer, Sign};
use super::server::Feed;
use crate::api::{NAMESPACES, PODS, POLICIES};
use crate::stats::Sorted;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Between the end of a change and the next one: the agent spends no more than a share of the time on policies.
const QUIET: Duration = Duration::from_secs(1);
/// Pods that come per second, and as many go.
pub const RATE: u32 = 100;
/// How long such a pod lives, and when after its birth it is bound, runs and is gone.
const LIFE: Duration = Duration::from_secs(2);
const BOUND: Duration = Duration::from_millis(5);
const RUNS: Duration = Duration::from_millis(300);
const GONE: Duration = Duration::from_millis(2100);
/// Numbers of pods and of addresses that the cluster does not have.
const FURTHER: u32 = 10_000_000;
const PLACES: (u32, u32) = (100, 140);
/// A pod that is not in the maps by then is never going to be.
const PATIENCE: Duration = Duration::from_secs(20);

/// The rows of the table.
pub const ROWS: [&str; 7] = [
    "labels of a pod elsewhere change",
    "a pod elsewhere comes",
    "a pod elsewhere goes",
    "a policy for a pod here comes",
    "a policy for a pod here changes",
    "a policy for a pod here goes",
    "labels of a namespace change",
];

/// A cluster, its agent's maps, and the pods of the agent's node.
pub struct Changes<'a> {
    /// The cluster.
    pub shape: Shape,
    /// Where events go.
    pub feed: &'a Feed,
    /// The maps.
    pub observer: &'a Observer,
    /// Addresses of the node's pods.
    pub local: &'a [Vec<IpAddr>],
}

impl Changes<'_> {
    /// Milliseconds from the event to the maps, for so many changes of each of [`ROWS`].
    pub fn single(&self, count: u32) -> Result<[Sorted; ROWS.len()]> {
        let mut times: [Vec<f64>; ROWS.len()] = Default::default();
        for n in 0..count {
            let here = self.shape.workload(n % PODS_OF_NODE);
            let own = self.local.get((n % PODS_OF_NODE) as usize).and_then(|ips| ips.first());
            let own = *own.context("no pod here")?;
            times[0].push(self.labels(here, n)?);
            let (new, ip) = self.further(n, here.next(1));
            times[1].push(self.one(PODS, "ADDED", new.clone(), Sign::Entry(ip))?);
            times[2].push(self.one(PODS, "DELETED", new, Sign::NoEntry(ip))?);
            for (row, what, port) in [(3, "ADDED", 7000), (4, "MODIFIED", 7001), (5, "DELETED", 7001)] {
                let policy = cluster::further_policy(here, n, port);
                times[row].push(self.one(POLICIES, what, policy, Sign::Set(own))?);
            }
            times[6].push(self.namespace(here, n)?);
        }
        Ok(times.map(Sorted::new))
    }

    /// A pod that may come to one of this node gets the labels of another workload, and its own ones again.
    fn labels(&self, here: Workload, n: u32) -> Result<f64> {
        let from = here.next(1);
        let number = self.shape.pod_of(from).context("the workload has no pod elsewhere")?;
        let (node, place) = (number / PODS_OF_NODE, number % PODS_OF_NODE);
        let ip = cluster::address(node, place);
        let change = |workload: Workload, version| {
            let pod = PodOf { number, workload, node, addresses: &[ip], stage: Stage::Running, version };
            self.one(PODS, "MODIFIED", pod.object(), Sign::Class(ip))
        };
        let took = change(here.next(7), 2 * n + 2)?;
        change(from, 2 * n + 3)?;
        Ok(took)
    }

    /// A namespace whose pods may come to one of this node leaves its team, and joins it again.
    fn namespace(&self, here: Workload, n: u32) -> Result<f64> {
        let friend = here.friend();
        let number = self.shape.pod_of(friend).context("the workload has no pod elsewhere")?;
        let ip = cluster::address(number / PODS_OF_NODE, number % PODS_OF_NODE);
        let change = |team, version| {
            let object = cluster::namespace(friend.namespace, team, version);
            self.one(NAMESPACES, "MODIFIED", object, Sign::Class(ip))
        };
        let took = change(Some("none"), 2 * n + 2)?;
        change(None, 2 * n + 3)?;
        Ok(took)
    }

    /// Milliseconds from one event to the maps.
    fn one(&self, path: &str, what: &'static str, object: Value, sign: Sign) -> Result<f64> {
        let before = self.observer.before(sign)?;
        let began = Instant::now();
        self.feed.send(path, what, object)?;
        ensure!(self.observer.wait(sign, &before)?, "nothing in the maps after {:?}: {sign:?}", observer::PATIENCE);
        let took = began.elapsed();
        std::thread::sleep(QUIET);
        Ok(took.as_secs_f64() * 1e3)
    }

    /// A pod that the cluster does not have, and its address.
    fn further(&self, n: u32, workload: Workload) -> (Value, IpAddr) {
        let pod = Further::new(self.shape, n, workload);
        (pod.object(Stage::Running), pod.ip)
    }

    /// Pods come and go, each with the events that a cluster has of it. Returns the milliseconds from the event that a pod runs until it
    /// is in the maps.
    pub fn steady(&self, time: Duration) -> Result<Sorted> {
        let births = u32::try_from(time.as_secs())? * RATE;
        let period = Duration::from_secs(1) / RATE;
        let mut due: Vec<(Duration, u32, &'static str, Stage)> = Vec::new();
        for n in 0..births {
            let birth = period * n;
            due.push((birth, n, "ADDED", Stage::Pending));
            due.push((birth + BOUND, n, "MODIFIED", Stage::Bound));
            due.push((birth + RUNS, n, "MODIFIED", Stage::Running));
            due.push((birth + LIFE, n, "MODIFIED", Stage::Ending));
            due.push((birth + GONE, n, "DELETED", Stage::Ending));
        }
        due.sort_by_key(|event| event.0);
        let mut due = VecDeque::from(due);
        let began = Instant::now();
        let (mut times, mut waiting) = (Vec::new(), Vec::new());
        while !(due.is_empty() && waiting.is_empty()) {
            while let Some((_, n, what, stage)) = due.pop_front_if(|event| event.0 <= began.elapsed()) {
                let pod = Further::new(self.shape, n, self.shape.workload(n * 13));
                self.feed.send(PODS, what, pod.object(stage))?;
                if stage == Stage::Running {
                    waiting.push((pod.ip, Instant::now()));
                }
            }
            let mut left = Vec::new();
            for (ip, at) in waiting {
                if self.observer.pod(ip)?.is_some() {
                    times.push(at.elapsed().as_secs_f64() * 1e3);
                } else if at.elapsed() + RUNS < LIFE {
                    left.push((ip, at));
                } else {
                    // It has gone again: the agent had no time for it.
                    times.push(f64::INFINITY);
                }
            }
            waiting = left;
            ensure!(began.elapsed() < time + PATIENCE, "{} events are late", due.len());
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(Sorted::new(times))
    }
}

/// A pod that the cluster does not have.
struct Further {
    number: u32,
    workload: Workload,
    node: u32,
    ip: IpAddr,
}

impl Further {
    fn new(shape: Shape, n: u32, workload: Workload) -> Self {
        let others = shape.nodes - 1;
        let (node, place) = (1 + n % others, PLACES.0 + n / others % PLACES.1);
        Self { number: FURTHER + n, workload, node, ip: cluster::address(node, place) }
    }

    fn object(&self, stage: Stage) -> Value {
        let version = match stage {
            Stage::Pending => 1,
            Stage::Bound => 2,
            Stage::Running => 3,
            Stage::Ending => 4,
        };
        let Self { number, workload, node, ip } = *self;
        PodOf { number, workload, node, addresses: &[ip], stage, version }.object()
    }
}
