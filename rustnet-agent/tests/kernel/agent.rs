//! An agent in a test: start, send objects, wait, stop.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use rustnet_agent::config::Config;
use rustnet_agent::health::Health;
use rustnet_agent::model::{
    Condition, Endpoint, EndpointSlice, Family, Node, ObjectName, Service, ServicePort, TargetPort,
};
use rustnet_agent::reconcile::{self, Surroundings};
use rustnet_agent::source::{Event, Kind, Object};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::sandbox;

/// An agent without its source and its HTTP endpoints.
pub struct Agent {
    events: mpsc::Sender<Event>,
    pub health: Arc<Health>,
    stop: watch::Sender<bool>,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Agent {
    pub fn start(config: Config) -> Self {
        Self::start_in(Surroundings { export_limit: sandbox::deadline(), ..Surroundings::default() }, config)
    }

    pub fn start_in(surroundings: Surroundings, config: Config) -> Self {
        let (events, receiver) = mpsc::channel(1024);
        let (stop, stopped) = watch::channel(false);
        let health = Arc::new(Health::default());
        let (config, shared) = (Arc::new(config), Arc::clone(&health));
        let task = tokio::spawn(reconcile::run(surroundings, config, receiver, shared, stopped));
        Self { events, health, stop, task }
    }

    /// Starts an agent that knows the objects of `events` and no others, and is ready.
    pub async fn start_ready(config: Config, events: impl IntoIterator<Item = Event>) -> Self {
        let agent = Self::start(config);
        agent.make_ready(events).await;
        agent
    }

    pub async fn send(&self, events: impl IntoIterator<Item = Event>) {
        for event in events {
            self.events.send(event).await.unwrap();
        }
    }

    /// Sends `events`, and then that there are no further objects.
    pub async fn send_all(&self, events: impl IntoIterator<Item = Event>) {
        self.send(events).await;
        self.send(Kind::ALL.map(Event::Synced)).await;
    }

    /// Sends `events`, and then that there are no further objects; waits until the agent is ready.
    pub async fn make_ready(&self, events: impl IntoIterator<Item = Event>) {
        self.send_all(events).await;
        self.ready().await;
    }

    pub async fn ready(&self) {
        let wait = tokio::time::timeout(sandbox::deadline(), self.health.wait_ready());
        assert!(wait.await.is_ok(), "not ready: {:?}", self.health.readiness());
    }

    /// Waits until the agent is not ready, for a reason that has all of `parts`.
    pub async fn wait_unready(&self, parts: &[&str]) {
        let is_it = || self.health.readiness().is_err_and(|why| has_all(&why, parts));
        wait_until(&format!("the agent is not ready because of {parts:?}"), is_it).await;
    }

    /// Waits until the agent reports a problem that has all of `parts`.
    pub async fn wait_problem(&self, parts: &[&str]) {
        let is_it = || self.health.complaints().iter().any(|problem| has_all(problem, parts));
        wait_until(&format!("{parts:?} is a problem"), is_it).await;
    }

    /// Waits until the agent reports no problem.
    pub async fn wait_no_problem(&self) {
        wait_until("there is no problem", || self.health.complaints().is_empty()).await;
    }

    pub async fn stop(self) {
        self.stop.send(true).unwrap();
        self.task.await.unwrap().unwrap();
    }
}

fn has_all(text: &str, parts: &[&str]) -> bool {
    parts.iter().all(|part| text.contains(part))
}

/// A runtime whose threads are in this sandbox.
pub fn block_on(future: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future);
}

/// Lets the loop turn until `done`.
pub async fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let end = tokio::time::Instant::now() + sandbox::deadline();
    while !done() {
        assert!(tokio::time::Instant::now() < end, "timed out waiting until {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub fn node(name: &str, address: &str, pod_cidrs: &[&str]) -> Event {
    Event::Apply(Object::Node(Arc::new(Node {
        name: ObjectName::cluster(name),
        created: 0,
        addresses: [address.parse().unwrap()].into(),
        pod_cidrs: pod_cidrs.iter().map(|c| c.parse().unwrap()).collect(),
        zone: "".into(),
        is_leaving: false,
        other_addresses: Box::default(),
        labels: rustnet_agent::model::Labels::default(),
        problems: Box::default(),
    })))
}

/// Makes this host's Node, n1, with the address that [`sandbox::uplink`] gives to eth0.
pub fn make_own_node() -> Event {
    node("n1", "192.0.2.1", &["10.1.1.0/24"])
}

/// Makes this host's Node and another one, n2, on the same link.
pub fn make_two_nodes() -> [Event; 2] {
    [make_own_node(), node("n2", "192.0.2.2", &["10.1.2.0/24"])]
}

/// Makes the Nodes of [`make_two_nodes`] with pod ranges of both families.
pub fn make_two_dual_stack_nodes() -> [Event; 2] {
    let ranges = [["10.1.1.0/24", "fd00:1:1::/64"], ["10.1.2.0/24", "fd00:1:2::/64"]];
    [node("n1", "192.0.2.1", &ranges[0]), node("n2", "192.0.2.2", &ranges[1])]
}

/// Service default/web, 10.96.0.10:80, with so many ready endpoints.
pub fn web(backends: u8) -> [Event; 2] {
    let name = ObjectName::namespaced("default", "web");
    let service = Service {
        name: name.clone(),
        created: 0,
        vips: ["10.96.0.10".parse().unwrap()].into(),
        ports: [ServicePort { name: "".into(), port: 80, proto: 6, node_port: 0 }].into(),
        affinity: 0,
        algorithm: None,
        forwarding: None,
        internal_local: false,
        external: Box::default(),
        balanced: Box::default(),
        source_ranges: None,
        external_local: false,
        health_check_port: 0,
        problems: Box::default(),
    };
    let endpoint = |i: u8| Endpoint {
        addr: [10, 1, 2, i].into(),
        condition: Condition::Ready,
        node: "n2".into(),
        pod: format!("web-{i}").into(),
        hints: None,
    };
    let slice = EndpointSlice {
        name: ObjectName::namespaced("default", "web-1"),
        service: name,
        family: Family::V4,
        ports: [TargetPort { name: "".into(), port: 8080, proto: 6 }].into(),
        endpoints: (1..=backends).map(endpoint).collect(),
        triggered: None,
        problems: Box::default(),
    };
    [Event::Apply(Object::Service(Arc::new(service))), Event::Apply(Object::Slice(Arc::new(slice)))]
}
