//! A cluster whose endpoints change at a steady rate, as an API server has it.

use crate::api::{Changes, NODES, Objects, SERVICES as SERVICES_PATH, SLICES};
use anyhow::{Context, Result};
use rustnet_common::tuple::proto;
use serde_json::{Value, json};
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Services, in which changes go round.
pub const SERVICES: u32 = 200;
/// Endpoints of each.
const ENDPOINTS: u32 = 5;
/// The port of each Service.
pub const PORT: u16 = 80;
/// The port of its endpoints.
const TARGET: u16 = 8080;
/// Between two looks whether anything is to be done.
const IDLE: Duration = Duration::from_millis(10);

/// A change: the oldest endpoint of a Service left, another one came.
#[derive(Clone, Copy, Debug)]
pub struct Change {
    /// Number of the Service.
    pub service: u32,
    /// Round of the change; in round `r` the endpoints of a Service are those of numbers `r..r + ENDPOINTS`.
    pub round: u32,
    /// When the server began to send it.
    pub at: Instant,
}

/// Services with their endpoints.
pub struct Cluster {
    protos: &'static [u8],
    changes: u32,
    period: Duration,
    /// Changes that were made so far, and where they are reported.
    made: Mutex<(u32, Sender<Change>)>,
    has_begun: AtomicBool,
}

impl Cluster {
    /// Services with one port of each protocol, so many changes of them, and where each is reported.
    pub fn new(protos: &'static [u8], changes: u32, period: Duration, sender: Sender<Change>) -> Self {
        Self { protos, changes, period, made: Mutex::new((0, sender)), has_begun: AtomicBool::new(false) }
    }

    /// Begins with the changes.
    pub fn begin(&self) {
        self.has_begun.store(true, Ordering::Relaxed);
    }

    fn ports(&self, field: &str, number: u16) -> Vec<Value> {
        let name = |of: u8| if of == proto::TCP { "TCP" } else { "UDP" };
        self.protos
            .iter()
            .map(|of| json!({"name": name(*of).to_lowercase(), "protocol": name(*of), field: number}))
            .collect()
    }

    fn service(&self, n: u32) -> Value {
        json!({
            "kind": "Service", "apiVersion": "v1",
            "metadata": {"name": format!("web-{n}"), "namespace": "default", "resourceVersion": "1"},
            "spec": {"clusterIPs": [vip(n).to_string()], "ports": self.ports("port", PORT)},
        })
    }

    fn slice(&self, n: u32, round: u32) -> Value {
        let endpoints: Vec<Value> = (round..round + ENDPOINTS)
            .map(|number| {
                json!({
                    "addresses": [endpoint(n, number).to_string()], "nodeName": format!("node-{}", number % 50),
                    "conditions": {"ready": true, "serving": true, "terminating": false},
                })
            })
            .collect();
        json!({
            "kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1", "addressType": "IPv4",
            "metadata": {
                "name": format!("web-{n}-x"), "namespace": "default", "resourceVersion": (round + 1).to_string(),
                "labels": {"kubernetes.io/service-name": format!("web-{n}")},
            },
            "ports": self.ports("port", TARGET), "endpoints": endpoints,
        })
    }

    /// Makes the next change, reports it and sends it; false if all were made.
    fn change(&self, changes: &mut Changes) -> Result<bool> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if made.0 == self.changes {
            return Ok(false);
        }
        let (service, round) = (made.0 % SERVICES, made.0 / SERVICES + 1);
        made.0 += 1;
        let slice = self.slice(service, round);
        made.1.send(Change { service, round, at: Instant::now() }).context("nobody observes")?;
        changes.send(&slice)?;
        Ok(true)
    }
}

impl Objects for Cluster {
    fn count(&self, path: &str) -> u32 {
        match path {
            NODES => 1,
            SERVICES_PATH | SLICES => SERVICES,
            _ => 0,
        }
    }

    fn object(&self, path: &str, n: u32) -> Value {
        match path {
            NODES => node(),
            SERVICES_PATH => self.service(n),
            _ => self.slice(n, 0),
        }
    }

    fn watch(&self, path: &str, changes: &mut Changes, is_wanted: &dyn Fn() -> bool) -> Result<()> {
        let mut first: Option<Instant> = None;
        let mut sent = 0;
        while is_wanted() {
            if path != SLICES || !self.has_begun.load(Ordering::Relaxed) {
                std::thread::sleep(IDLE);
                continue;
            }
            let due = *first.get_or_insert_with(Instant::now) + self.period * sent;
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            if !self.change(changes)? {
                std::thread::sleep(IDLE);
            }
            sent += 1;
        }
        Ok(())
    }
}

/// The address of Service number `n`.
pub fn vip(n: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x0a60_0001 + n)
}

/// The address of endpoint `number` of a Service.
fn endpoint(service: u32, number: u32) -> Ipv4Addr {
    Ipv4Addr::from((64 << 24) + (service << 16) + number)
}

/// The number of the endpoint with this address.
pub fn number_of(address: Ipv4Addr) -> u32 {
    u32::from(address) & 0xffff
}

/// The node that the agent is on.
fn node() -> Value {
    json!({
        "kind": "Node", "apiVersion": "v1", "metadata": {"name": "n1", "resourceVersion": "1"},
        "spec": {"podCIDRs": ["10.244.1.0/24"]},
        "status": {"addresses": [{"type": "InternalIP", "address": "172.18.0.11"}]},
    })
}
