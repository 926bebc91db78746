//! What the API server of a measurement has: a [`Shape`] of a cluster, and the changes that the measurement makes.

use super::cluster::{self, PODS_OF_NODE, PodOf, Shape, Stage};
use crate::api::{CLUSTER_POLICIES, Changes, NAMESPACES, NODES, Objects, PODS, POLICIES};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Kinds that change, or that policies follow from.
const KINDS: [&str; 5] = [NODES, PODS, NAMESPACES, POLICIES, CLUSTER_POLICIES];
/// Between two looks whether the server ends.
const IDLE: Duration = Duration::from_millis(100);

/// How long a watch lasts. The agent leaves one that is silent for much longer, and what is sent there is lost.
const WATCH: Duration = Duration::from_secs(200);

/// What becomes of an object: `ADDED`, `MODIFIED` or `DELETED`, and the object.
type Change = (&'static str, Value);

/// The objects.
pub struct Cluster {
    shape: Shape,
    /// Addresses of the first node's pods.
    local: Vec<Vec<IpAddr>>,
    changes: BTreeMap<&'static str, Mutex<Receiver<Change>>>,
    /// When the agent had the list of each kind.
    listed: Mutex<BTreeMap<String, Instant>>,
}

/// Sends changes by the watches of a [`Cluster`].
pub struct Feed(BTreeMap<&'static str, Sender<Change>>);

impl Feed {
    /// Sends a change of a kind.
    pub fn send(&self, path: &str, what: &'static str, object: Value) -> Result<()> {
        let sender = self.0.get(path).with_context(|| format!("{path} does not change"))?;
        sender.send((what, object)).context("the server has ended")
    }
}

impl Cluster {
    /// A cluster whose first node has pods with these addresses.
    pub fn new(shape: Shape, local: Vec<Vec<IpAddr>>) -> (Self, Feed) {
        let (senders, receivers): (BTreeMap<_, _>, BTreeMap<_, _>) = KINDS
            .into_iter()
            .map(|kind| {
                let (sender, receiver) = channel();
                ((kind, sender), (kind, Mutex::new(receiver)))
            })
            .unzip();
        (Self { shape, local, changes: receivers, listed: Mutex::default() }, Feed(senders))
    }

    /// When the agent had the lists of all kinds; `None`: not yet.
    pub fn all_listed(&self) -> Option<Instant> {
        let listed = self.listed.lock().unwrap_or_else(PoisonError::into_inner);
        let times: Option<Vec<Instant>> = KINDS.into_iter().map(|kind| listed.get(kind).copied()).collect();
        times?.into_iter().max()
    }
}

impl Objects for Cluster {
    fn count(&self, path: &str) -> u32 {
        match path {
            NODES => self.shape.nodes,
            PODS => self.shape.pods(),
            NAMESPACES => self.shape.namespaces(),
            POLICIES => self.shape.policies,
            _ => 0,
        }
    }

    fn object(&self, path: &str, n: u32) -> Value {
        match path {
            NODES => cluster::node(n),
            NAMESPACES => cluster::namespace(n, None, 1),
            POLICIES => cluster::policy(self.shape, n),
            PODS => {
                let (node, place) = (n / PODS_OF_NODE, n % PODS_OF_NODE);
                let elsewhere = [cluster::address(node, place)];
                let addresses = self.local.get(n as usize).map_or(&elsewhere[..], |own| own);
                let workload = self.shape.workload(n);
                PodOf { number: n, workload, node, addresses, stage: Stage::Running, version: 1 }.object()
            }
            _ => json!({}),
        }
    }

    fn watch(&self, path: &str, changes: &mut Changes, is_wanted: &dyn Fn() -> bool) -> Result<()> {
        self.listed.lock().unwrap_or_else(PoisonError::into_inner).entry(path.to_owned()).or_insert_with(Instant::now);
        let Some(queue) = self.changes.get(path) else {
            while is_wanted() {
                std::thread::sleep(IDLE);
            }
            return Ok(());
        };
        let queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
        let began = Instant::now();
        while is_wanted() {
            if began.elapsed() > WATCH {
                return changes.end();
            }
            match queue.recv_timeout(IDLE) {
                Ok((what, object)) => changes.send_as(what, &object)?,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        Ok(())
    }
}
