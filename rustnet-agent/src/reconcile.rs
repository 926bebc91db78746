//! The one loop: events in, maps and host brought to what follows from them, again and again.
//!
//! Nothing here is final: what fails is logged with its remedy and tried again with back-off, while the last good state
//! forwards packets. Killing the agent at any point leaves a state that works.

mod audit;
mod kernel;
pub mod node;
pub mod presence;
mod takeover;

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustnet_common::files::{IPAM_DIR, NodeFile};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

use crate::config::Config;
use crate::ct_gc::Collector;
use crate::health::{Health, STARTING};
use crate::index::Index;
use crate::model::{Node, ObjectName};
use crate::net::monitor::Monitor;
use crate::net::overlay::mac_of;
use crate::net::repair::{Repairer, State, Wanted};
use crate::net::uplink::{Host, networks};
use crate::plan::Planner;
use crate::source::kube::API_SERVER;
use crate::source::{Event, Kind, Object};
use crate::{cni_order, install, nodefile, podfile};
use kernel::{Kernel, Stats};
use presence::AgentFile;

/// Most events taken in before they are applied.
const BATCH: usize = 8192;
/// The host's network is looked at this often even if nothing was heard.
const NET_PERIOD: Duration = Duration::from_secs(30);
/// A burst of changes of the network is waited out this long.
const NET_SETTLE: Duration = Duration::from_millis(50);
/// The same after a failure: what we try ourselves is heard as a change, too.
const NET_SETTLE_FAILED: Duration = Duration::from_secs(1);
/// Share of the time that looking at the network may take, as 1 in so many: hosts with a million routes exist.
const NET_SHARE: u32 = 20;
/// First and longest wait after a failure.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// How long the end of the agent may take; `terminationGracePeriodSeconds` of the DaemonSet is longer.
pub const EXPORT_LIMIT: Duration = Duration::from_secs(20);
/// Problems in the input are looked for at most this often, and names of pods written.
const PROBLEMS_PERIOD: Duration = Duration::from_secs(1);

/// Runs until `shutdown` says so (or its sender is gone).
///
/// # Errors
/// Only if the source has ended, or the loop cannot begin at all.
pub async fn run(
    config: Arc<Config>,
    events: mpsc::Receiver<Event>,
    health: Arc<Health>,
    shutdown: watch::Receiver<bool>,
) -> Result<()> {
    run_within(EXPORT_LIMIT, config, events, health, shutdown).await
}

/// The same with another limit of what the end may take.
///
/// # Errors
/// As of [`run`].
pub async fn run_within(
    limit: Duration,
    config: Arc<Config>,
    mut events: mpsc::Receiver<Event>,
    health: Arc<Health>,
    mut shutdown: watch::Receiver<bool>,
) -> Result<()> {
    let Some(_presence) = takeover::wait(&config.run_dir, &health, &mut shutdown).await? else { return Ok(()) };
    AgentFile::of(&config).write(&config.run_dir)?;
    let mut monitor = Monitor::open()?;
    let begin = Reconciler::begin(config, health, shutdown.clone());
    let mut reconciler = tokio::select! {
        reconciler = begin => reconciler?,
        () = stop(&mut shutdown) => return Ok(()),
    };
    let mut batch = Vec::new();
    loop {
        reconciler.step();
        tokio::select! {
            () = stop(&mut shutdown) => return hand_over(reconciler, limit).await,
            n = events.recv_many(&mut batch, BATCH) => {
                ensure!(n > 0, "the source has ended");
                reconciler.take_in(&mut batch);
            }
            changed = monitor.changed() => match changed {
                Ok(()) => reconciler.net_changed(),
                Err(error) => {
                    tracing::warn!("{error:#}; the network is looked at every {NET_PERIOD:?} only");
                    monitor = Monitor::open()?;
                }
            },
            () = sleep_until(reconciler.next_deadline()) => {}
        }
    }
}

/// Leaves the node to an agent of any release. That takes time, and fails, without harm: connections then end when an agent of
/// v1 follows, and only then.
async fn hand_over(mut reconciler: Reconciler, limit: Duration) -> Result<()> {
    let began = Instant::now();
    let is_late = Arc::new(AtomicBool::new(false));
    let stop = Arc::clone(&is_late);
    let export = tokio::task::spawn_blocking(move || reconciler.export(&stop));
    let result = match tokio::time::timeout(limit, export).await {
        Ok(result) => result.context("the export has panicked").and_then(|result| result),
        Err(_) => Err(anyhow::anyhow!("it took more than {limit:?}")),
    };
    is_late.store(true, Ordering::Relaxed);
    match result {
        Ok(true) => tracing::info!(took = ?began.elapsed(), "maps exported for agents of earlier releases"),
        Ok(false) => {}
        Err(error) => {
            tracing::warn!("maps not exported, an agent of an earlier release would lose connections: {error:#}");
        }
    }
    Ok(())
}

/// The CNI binary of this release, for the maps and programs of this release. A failure is tried again before the agent is
/// ready.
fn install_cni_binary(config: &Config) {
    match install::binary(config) {
        Ok(written) => written.iter().for_each(|path| tracing::info!(path = %path.display(), "CNI binary installed")),
        Err(error) => tracing::error!("{error:#}"),
    }
}

async fn stop(shutdown: &mut watch::Receiver<bool>) {
    // A sender that is gone means shutdown, too.
    let _ = shutdown.wait_for(|stop| *stop).await;
}

/// When to try again.
struct Retry {
    due: Instant,
    wait: Duration,
}

impl Retry {
    fn now() -> Self {
        Self { due: Instant::now(), wait: BACK_OFF.0 }
    }

    fn failed(&mut self) {
        self.due = Instant::now() + self.wait;
        self.wait = (self.wait * 2).min(BACK_OFF.1);
    }

    fn succeeded(&mut self, next: Duration) {
        *self = Self { due: Instant::now() + next, wait: BACK_OFF.0 };
    }
}

/// Everything the loop knows.
struct Reconciler {
    config: Arc<Config>,
    health: Arc<Health>,
    shutdown: watch::Receiver<bool>,
    start: Instant,
    index: Index,
    repairer: Repairer,
    kernel: Option<Kernel>,
    load: Retry,
    planner: Option<Planner>,
    plan: Retry,
    plan_due: bool,
    net: Retry,
    net_took: Duration,
    /// What the last look at the host's network found.
    state: Option<State>,
    /// The network has been looked after since all nodes are known: the routes to them are there.
    routed: bool,
    /// Why the network is not as it should be.
    net_error: Option<String>,
    plan_error: Option<String>,
    load_error: Option<String>,
    problems: BTreeSet<String>,
    problems_due: Option<Instant>,
    /// When to tell the names of pods.
    pods_due: Option<Instant>,
    /// The nodes as last heard of, to tell news from repetition.
    nodes: HashMap<ObjectName, Arc<Node>>,
    /// What `node.json` is known to say; looked at again with the network.
    published: Option<NodeFile>,
}

impl Reconciler {
    /// Waits until the host has an uplink: without one, nothing can be decided.
    async fn begin(config: Arc<Config>, health: Arc<Health>, shutdown: watch::Receiver<bool>) -> Result<Self> {
        let mut repairer = Repairer::new(&config.run_dir, &config.sysctl_dir)?;
        let mut retry = Retry::now();
        let (host, uplinks) = loop {
            health.tick();
            match Host::observe(repairer.socket()).and_then(|host| host.uplinks(&config.uplinks).map(|u| (host, u))) {
                Ok(found) => break found,
                Err(error) => {
                    health.set_not_ready(format!("{error:#}"));
                    retry.failed();
                    sleep_until(retry.due).await;
                }
            }
        };
        let settings = node::index_settings(&config, &host, &uplinks);
        Ok(Self {
            config,
            health,
            shutdown,
            start: Instant::now(),
            index: Index::new(settings),
            repairer,
            kernel: None,
            load: Retry::now(),
            planner: None,
            plan: Retry::now(),
            plan_due: false,
            net: Retry::now(),
            net_took: Duration::ZERO,
            state: None,
            routed: false,
            net_error: None,
            plan_error: None,
            load_error: None,
            problems: BTreeSet::new(),
            problems_due: None,
            pods_due: None,
            nodes: HashMap::new(),
            published: None,
        })
    }

    /// Takes events into the index.
    fn take_in(&mut self, batch: &mut Vec<Event>) {
        for event in batch.drain(..) {
            match event.object_kind() {
                Some(Kind::Service) => self.health.metrics.service_changed(),
                Some(Kind::Slice) => self.health.metrics.endpoints_changed(),
                Some(Kind::Node | Kind::Pod) | None => {}
            }
            if event.object_kind() == Some(Kind::Pod) || event == Event::Synced(Kind::Pod) {
                self.pods_due.get_or_insert_with(|| Instant::now() + PROBLEMS_PERIOD);
            }
            let node = self.concerns_routes(&event);
            self.index.handle(event);
            if node {
                self.net_changed();
            }
            // The first time there is nothing to wait out, and readiness waits for it.
            if !self.routed && self.index.has_synced(Kind::Node) {
                self.net.due = Instant::now();
            }
        }
        self.health.queued();
        self.want_plan();
        self.problems_due.get_or_insert_with(|| Instant::now() + PROBLEMS_PERIOD);
    }

    /// Something changed: apply it at once, or after a failure when its time has come.
    fn want_plan(&mut self) {
        if self.plan_error.is_none() {
            self.plan.due = self.plan.due.min(Instant::now());
        }
        self.plan_due = true;
    }

    /// Tells the `rustnet` command the names of this node's pods. Without them it shows less, so that failing is no trouble.
    fn tell_names(&self) {
        // Before the list is complete, an earlier agent's file is better.
        if self.index.has_synced(Kind::Pod)
            && let Err(error) = podfile::write(&self.config.run_dir, &podfile::names(self.index.pods()))
        {
            tracing::warn!("{error:#}");
        }
    }

    /// True if routes may follow from an event. Nodes are written every few minutes, mostly with nothing new for us.
    fn concerns_routes(&mut self, event: &Event) -> bool {
        match event {
            Event::Apply(Object::Node(node)) => {
                self.nodes.insert(node.name.clone(), Arc::clone(node)).as_ref() != Some(node)
            }
            Event::Delete(object) | Event::Reject(object, _) if object.kind == Kind::Node => {
                self.nodes.remove(&object.name);
                true
            }
            // What the list left out is gone: the table is built again.
            Event::Synced(Kind::Node) => {
                self.nodes.clear();
                true
            }
            _ => false,
        }
    }

    /// Something about the network changed: look soon, but not all the time.
    fn net_changed(&mut self) {
        let least = if self.net_error.is_none() { NET_SETTLE } else { NET_SETTLE_FAILED };
        let gap = least.max(self.net_took * NET_SHARE);
        self.net.due = self.net.due.min(Instant::now() + gap);
    }

    fn next_deadline(&self) -> Instant {
        let mut next = self.net.due;
        if self.kernel.is_none() {
            next = next.min(self.load.due);
        } else if self.can_apply() {
            next = next.min(self.plan.due);
        }
        if let Some(due) = self.planner.as_ref().and_then(Planner::audit_at) {
            next = next.min(self.start + due);
        }
        [self.problems_due, self.pods_due].into_iter().flatten().fold(next, Instant::min)
    }

    /// Does all that is due.
    fn step(&mut self) {
        self.health.tick();
        let now = Instant::now();
        if self.kernel.is_none() && self.load.due <= now {
            self.load();
        }
        if self.net.due <= now {
            self.look_after_network();
        }
        if self.can_apply() && self.plan.due <= now {
            self.apply();
        }
        self.audit();
        if self.problems_due.is_some_and(|due| due <= now) {
            self.problems_due = None;
            self.report_problems();
        }
        if self.pods_due.is_some_and(|due| due <= now) {
            self.pods_due = None;
            self.tell_names();
        }
        self.tell_readiness();
    }

    /// Loads the programs and adopts what the maps hold.
    fn load(&mut self) {
        let loaded = Kernel::load(&self.config).and_then(|kernel| {
            let planner = Planner::adopt(&kernel.maps).context("reading the maps back")?;
            let planner = planner.with_audit_period(self.config.audit_period);
            let collector = Collector::open(kernel.maps_dir(), kernel.clock()?, kernel.hz)?;
            let stats = Stats::open(kernel.maps_dir(), self.config.bpffs.clone())?;
            self.health.metrics.set_kernel_stats(Arc::new(stats));
            Ok((kernel, planner, collector))
        });
        match loaded {
            Ok((kernel, planner, collector)) => {
                tracing::info!(services = planner.service_count(), "programs loaded, maps adopted");
                tokio::spawn(collector.run(self.shutdown.clone()));
                (self.kernel, self.planner, self.load_error) = (Some(kernel), Some(planner), None);
                // Attach at once, then apply what came meanwhile.
                self.net = Retry::now();
                self.plan_due = true;
            }
            Err(error) => {
                let error = format!("{error:#}");
                if self.load_error.as_ref() != Some(&error) {
                    tracing::error!("the programs cannot be loaded; what is attached runs on: {error}");
                }
                self.load_error = Some(error);
                self.load.failed();
            }
        }
    }

    /// Brings the host's network and the hooks to what they should be.
    fn look_after_network(&mut self) {
        let began = Instant::now();
        let result = self.repair_network();
        self.net_took = began.elapsed();
        // Files are looked after like devices and routes: what somebody deleted is put back.
        self.published = None;
        let error = match result {
            Ok(errors) => (!errors.is_empty()).then(|| errors.join("; ")),
            Err(error) => Some(format!("{error:#}")),
        };
        if let Some(error) = &error {
            if self.net_error.as_ref() != Some(error) {
                tracing::error!("the host's network is not as it should be: {error}");
            }
            self.net.failed();
        } else {
            let is_upgrading = self.kernel.as_ref().is_some_and(Kernel::is_upgrading);
            self.net.succeeded(if is_upgrading { Duration::ZERO } else { NET_PERIOD });
        }
        self.net_error = error;
    }

    /// Returns what failed and left the rest standing.
    fn repair_network(&mut self) -> Result<Vec<String>> {
        // All pods that are added from now on get the present programs, or are found below.
        let was_pinned = self.kernel.as_ref().is_some_and(Kernel::is_pinned);
        // Before the interfaces are looked at; see `Kernel::repair_endpoints`.
        let endpoints = self.kernel.as_ref().map(|kernel| kernel.endpoints.read()).transpose()?;
        let own = self.index.own_node();
        let own_pod_cidrs = node::pod_cidrs(&self.config, own);
        let wanted = Wanted {
            uplinks: &self.config.uplinks,
            routing: self.config.routing,
            overlay: self
                .config
                .routing
                .has_overlay()
                .then(|| (self.config.overlay_port, mac_of(&self.config.node_name))),
            own,
            own_pod_cidrs: &own_pod_cidrs,
            peers: self.index.nodes().filter(|node| node.name.as_str() != self.config.node_name).collect(),
            complete: self.index.has_synced(Kind::Node),
        };
        let complete = wanted.complete;
        let mut state = self.repairer.prepare(&wanted)?;
        let mut errors = Vec::new();
        let mut done = Vec::new();
        let mut is_overlay_verified = false;
        let local_ports = node::local_ports()?;
        if let Some(kernel) = &mut self.kernel {
            let mut config = node::config(&self.config, &state, own, kernel.hz, local_ports);
            if own.is_none() {
                node::keep_addresses(&mut config, &kernel.config.read()?, &state.host.own_addresses());
            }
            match kernel.attach(self.repairer.socket(), &config, &state) {
                Ok(attached) => {
                    done.extend(attached.done);
                    if !was_pinned {
                        install_cni_binary(&self.config);
                    }
                    if was_pinned && attached.errors.is_empty() && kernel.is_upgrading() {
                        match kernel.go_on_upgrading() {
                            Ok(changed) => done.extend(changed),
                            Err(error) => errors.push(format!("{error:#}")),
                        }
                    }
                    errors.extend(attached.errors);
                    is_overlay_verified = attached.is_overlay_verified;
                }
                Err(error) => errors.push(format!("{error:#}")),
            }
            match kernel.repair_endpoints(&endpoints.unwrap_or_default(), &state) {
                Ok(changed) => done.extend(changed),
                Err(error) => errors.push(format!("{error:#}")),
            }
        }
        self.repairer.connect(&mut state, &wanted, is_overlay_verified);
        self.routed |= complete && !state.overlay_down;
        errors.extend(std::mem::take(&mut state.errors));
        done.extend(std::mem::take(&mut state.changed));
        for what in done {
            tracing::info!("{what}");
        }
        let leased = |ip: &IpAddr| self.config.run_dir.join(IPAM_DIR).join(ip.to_string()).exists();
        state.problems.extend(node::outsiders(&self.config.node_name, &state.endpoints, &own_pod_cidrs, leased));
        state.problems.extend(node::shared_ports(&self.config, local_ports));
        state.problems.extend(self.config.cni_conf_dir.iter().flat_map(|dir| cni_order::instead_of_ours(dir)));
        if self.index.set_own_addresses(state.host.own_addresses(), networks(&state.uplinks)) {
            self.want_plan();
        }
        self.state = Some(state);
        self.problems_due.get_or_insert_with(Instant::now);
        Ok(errors)
    }

    /// True if there are changes that may be applied. The few moments of an upgrade are waited for: flows that are forgotten
    /// must not come back from an earlier table. An upgrade that a broken hook holds up is not.
    fn can_apply(&self) -> bool {
        let waits = self.net_error.is_none() && self.kernel.as_ref().is_some_and(Kernel::is_upgrading);
        self.plan_due && !waits
    }

    /// Exports the maps for an agent of v1 (see [`crate::bpf::upgrade`]); false if there is nothing to export. Stops between two
    /// steps when it `is_late`.
    fn export(&mut self, is_late: &AtomicBool) -> Result<bool> {
        let Some(kernel) = &mut self.kernel else { return Ok(false) };
        // In the middle of an upgrade the maps of v1 are still there, and the programs of the bridge write them.
        if kernel.is_upgrading() || !kernel.begin_export()? {
            return Ok(false);
        }
        // The first look swaps the hooks, the second finds pods that came while it did.
        for _ in 0..2 {
            ensure!(!is_late.load(Ordering::Relaxed), "no time is left");
            let errors = self.repair_network()?;
            ensure!(errors.is_empty(), "{}", errors.join("; "));
        }
        ensure!(!is_late.load(Ordering::Relaxed), "no time is left");
        if let Some(kernel) = &self.kernel {
            let connections = kernel.finish_export()?;
            tracing::debug!(connections, "maps of v1 pinned");
        }
        Ok(true)
    }

    /// Brings the maps to what the index wants.
    fn apply(&mut self) {
        let (Some(kernel), Some(planner)) = (&mut self.kernel, &mut self.planner) else { return };
        let began = Instant::now();
        match planner.sync(&mut self.index, &mut kernel.maps, began - self.start) {
            Ok(plan) => {
                self.plan_error = None;
                self.plan.succeeded(Duration::ZERO);
                self.plan_due = plan.retry_at.is_some();
                if let Some(at) = plan.retry_at {
                    self.plan.due = self.start + at;
                }
                self.health.metrics.map_writes(plan.writes.len() as u64);
                self.health.applied(began.elapsed());
                if !plan.writes.is_empty() {
                    tracing::debug!(writes = plan.writes.len(), took = ?began.elapsed(), "applied");
                }
            }
            Err(error) => {
                let error = format!("{error:#}");
                tracing::error!("the maps took not all changes, trying again: {error}");
                self.plan_error = Some(error);
                self.plan.failed();
            }
        }
    }

    /// Repairs what somebody else changed in the maps.
    fn audit(&mut self) {
        let (Some(kernel), Some(planner)) = (&mut self.kernel, &mut self.planner) else { return };
        if let Err(error) = audit::step(planner, &mut kernel.maps, self.start.elapsed(), &self.health.metrics) {
            tracing::error!("{error:#}");
            self.want_plan();
        }
    }

    /// Says what is newly wrong with the input, and what is well again.
    fn report_problems(&mut self) {
        let mut now: BTreeSet<String> = self.index.problems().iter().map(ToString::to_string).collect();
        if let Some(planner) = &self.planner {
            now.extend(planner.problems(&self.index).iter().map(ToString::to_string));
        }
        now.extend(self.state.iter().flat_map(|state| state.problems.iter().cloned()));
        self.health.set_problems(self.of_this_node());
        for problem in now.difference(&self.problems) {
            tracing::warn!("{problem}");
        }
        for problem in self.problems.difference(&now) {
            tracing::info!("resolved: {problem}");
        }
        self.problems = now;
    }

    /// What of all that only this node can tell people.
    fn of_this_node(&self) -> BTreeSet<String> {
        let objects = self.index.problems_of_this_node(API_SERVER);
        let state = self.state.iter().flat_map(|state| state.problems.iter().cloned());
        objects.iter().map(ToString::to_string).chain(state).collect()
    }

    /// Tells the probes and the CNI binary how things are.
    fn tell_readiness(&mut self) {
        match self.not_ready() {
            Some(why) => self.health.set_not_ready(why),
            None => match self.publish() {
                Ok(()) => self.health.set_ready(),
                Err(error) => self.health.set_not_ready(format!("{error:#}")),
            },
        }
    }

    /// Why this node must not get pods, if so.
    fn not_ready(&self) -> Option<String> {
        let errors = [&self.load_error, &self.net_error, &self.plan_error];
        if let Some(error) = errors.into_iter().flatten().next() {
            return Some(error.clone());
        }
        if self.kernel.is_none() || self.state.is_none() {
            return Some(format!("{STARTING}the programs are not loaded"));
        }
        if self.kernel.as_ref().is_some_and(Kernel::is_upgrading) {
            return Some(format!("{STARTING}the programs on the hooks are being swapped"));
        }
        if !self.index.synced() {
            let why = self.index.problems_of_source(API_SERVER).next();
            return Some(match why {
                Some(why) => why.to_string(),
                None => format!("{STARTING}the source has not delivered everything"),
            });
        }
        if !self.routed {
            return Some(format!("{STARTING}the routes to the other nodes are not made"));
        }
        (self.plan_due && self.plan.due <= Instant::now()).then(|| format!("{STARTING}changes wait to be applied"))
    }

    /// Writes `node.json`, and then the CNI configuration, whose presence makes the runtime call.
    fn publish(&mut self) -> Result<()> {
        let Some(state) = &self.state else { return Ok(()) };
        let file = node::file(&self.config, state, self.index.own_node());
        let file = match file {
            Ok(file) => file,
            Err(error) => {
                self.publish_refusal(&error)?;
                return Err(error);
            }
        };
        if self.published.as_ref() == Some(&file) {
            return Ok(());
        }
        for path in install::binary(&self.config)? {
            tracing::info!(path = %path.display(), "CNI binary installed");
        }
        nodefile::write(&self.config.run_dir, &file)?;
        if let Some(path) = install::conflist(&self.config)? {
            tracing::info!("{} written", path.display());
        }
        self.published = Some(file);
        Ok(())
    }

    /// Writes for the CNI binary why there are no settings. An earlier node file stays: ADD goes on
    /// with it.
    fn publish_refusal(&self, why: &anyhow::Error) -> Result<()> {
        if nodefile::read(&self.config.run_dir).is_ok_and(|there| there.is_some_and(|file| file.not_ready.is_none())) {
            return Ok(());
        }
        let file = NodeFile {
            version: NodeFile::VERSION,
            node_name: self.config.node_name.clone(),
            pod_cidrs: Vec::new(),
            mtu: 0,
            not_ready: Some(format!("{why:#}")),
        };
        nodefile::write(&self.config.run_dir, &file).map(drop)
    }
}
