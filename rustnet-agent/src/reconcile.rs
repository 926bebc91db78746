//! The one loop: events in, maps and host brought to what follows from them, again and again.
//!
//! Nothing here is final: what fails is logged with its remedy and tried again with back-off, while the last good state
//! forwards packets. Killing the agent at any point leaves a state that works.

mod audit;
mod command;
mod details;
pub mod endings;
mod files;
mod job;
mod kernel;
mod namespaces;
mod network;
pub mod node;
pub mod overlay_path;
mod policies;
pub mod presence;
mod sockets;
mod takeover;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustnet_common::files::EndpointFile;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

use crate::api::API_SERVER;
use crate::config::Config;
use crate::ct_gc::Collector;
use crate::failure::{self, Failure, Scope};
use crate::health::{Health, NotReady};
use crate::http::CheckPorts;
use crate::index::{Gate, Index};
use crate::model::Feature;
use crate::net::host::Host;
use crate::net::monitor::{Changed, Monitor};
use crate::net::netlink::Socket;
use crate::net::repair::Repairer;
use crate::net::sock_diag::SockDiag;
use crate::plan::Planner;
use crate::source::{Event, Kind, Object};
use crate::{install, namefile};
use details::Writing;
use endings::Enter;
use files::Files;
use job::Job;
use kernel::{Kernel, Stats};
use network::{Look, Observe, observed};
use overlay_path::Choice;
use policies::Policies;
use sockets::{Searching, searched};

/// Most events taken in before they are applied.
const BATCH: usize = 256;
/// The host's network is looked at this often even if nothing was heard.
const NET_PERIOD: Duration = Duration::from_secs(30);
/// A burst of changes of the network is waited out this long.
const NET_SETTLE: Duration = Duration::from_millis(50);
/// The same after a failure: what we try ourselves is heard as a change, too.
const NET_SETTLE_FAILED: Duration = Duration::from_secs(1);
/// Share of the time that looking at the network may take, as 1 in so many: hosts with a million routes exist.
const NET_SHARE: u32 = 20;
/// Share of the time that writing the endpoints of all Services may take, as 1 in so many: ten thousand Services are 7 MB.
const FILE_SHARE: u32 = 100;
/// How long the end of the agent may take; `terminationGracePeriodSeconds` of the DaemonSet is longer.
pub const EXPORT_LIMIT: Duration = Duration::from_secs(20);
/// Lists of a million routes take less than a second.
const LOOK_LIMIT: Duration = Duration::from_mins(2);
/// Problems in the input are looked for at most this often, and names of pods written.
const PROBLEMS_PERIOD: Duration = Duration::from_secs(1);

/// What the loop has around it, and tests replace.
pub struct Surroundings {
    /// How long the end of the agent may take.
    pub export_limit: Duration,
    /// A look at the host's network that takes longer is a failure of the node, and a search for sockets one of its processes.
    pub look_limit: Duration,
    /// Looks at the host's network, in a thread of its own.
    pub observe: Observe,
    /// Opens the sockets of a pod's network namespace, in another one.
    pub enter: Enter,
}

impl Default for Surroundings {
    fn default() -> Self {
        let observe = Arc::new(|| Host::observe(&mut Socket::open()?));
        Self { export_limit: EXPORT_LIMIT, look_limit: LOOK_LIMIT, observe, enter: Arc::new(SockDiag::open_in) }
    }
}

/// Runs until `shutdown` says so (or its sender is gone).
///
/// # Errors
/// Only if the source has ended, the loop cannot begin at all, or another agent has this one's locks.
pub async fn run(
    surroundings: Surroundings,
    config: Arc<Config>,
    mut events: mpsc::Receiver<Event>,
    health: Arc<Health>,
    mut shutdown: watch::Receiver<bool>,
) -> Result<()> {
    let Some(mut presence) = takeover::wait(&config.run_dir, &health, &mut shutdown).await else { return Ok(()) };
    let run_dir = config.run_dir.clone();
    let mut monitor = Monitor::open()?;
    let mut arrivals = policies::arrivals(&config);
    let export_limit = surroundings.export_limit;
    let mut reconciler = Reconciler::new(surroundings, config, health, shutdown.clone())?;
    let mut batch = Vec::new();
    loop {
        // An agent that has found no locks meanwhile goes on, and this one ends.
        match presence.hold(&run_dir) {
            Ok(held) => held.map_err(anyhow::Error::msg)?,
            Err(error) => tracing::warn!("{error:#}"),
        }
        reconciler.step();
        let deadline = reconciler.next_deadline();
        tokio::select! {
            () = stop(&mut shutdown) => return hand_over(reconciler, export_limit).await,
            n = events.recv_many(&mut batch, BATCH) => {
                ensure!(n > 0, "the source has ended");
                reconciler.take_in(&mut batch);
            }
            changed = monitor.changed() => match changed {
                Ok(Changed::Network) => reconciler.net_changed(),
                Ok(Changed::Policies) => reconciler.policies_changed(),
                Err(error) => {
                    tracing::warn!("{error:#}; the network is looked at every {NET_PERIOD:?} only");
                    monitor = Monitor::open()?;
                }
            },
            heard = policies::arrived(&mut arrivals) => {
                if let Err(error) = heard {
                    tracing::warn!("{error:#}; new pods wait for the looks at the host's network");
                }
                reconciler.records_changed();
            }
            (host, took) = observed(&mut reconciler.look) => reconciler.end_look(host, took),
            outcome = searched(&mut reconciler.searching) => reconciler.finish_endings(outcome),
            (done, took) = details::written(&mut reconciler.writing) => reconciler.end_details(done, took),
            () = sleep_until(deadline) => {}
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

/// What the loop holds once the programs are loaded.
struct Datapath {
    kernel: Kernel,
    planner: Planner,
}

/// Everything the loop knows: inputs, jobs, and what the jobs have found.
struct Reconciler {
    config: Arc<Config>,
    health: Arc<Health>,
    shutdown: watch::Receiver<bool>,
    look_limit: Duration,
    observe: Observe,
    enter: Enter,
    start: Instant,
    index: Index,
    repairer: Repairer,
    datapath: Option<Datapath>,
    files: Files,
    /// The ports at which load balancers ask for Services.
    check_ports: CheckPorts,
    /// Loads the programs and adopts what the maps hold.
    load: Job,
    /// Brings the host's network and the hooks to what they should be.
    network: Job,
    /// Brings the maps to what the index wants.
    maps: Job,
    /// Brings the maps of network policies to what the index wants.
    policies: Policies,
    /// Opens those ports.
    checks: Job,
    /// Has the programs of socket calls on their hooks.
    sockets: Job,
    /// Ends sockets whose backend is gone.
    endings: Job,
    /// Reports what is newly wrong, and what is resolved.
    report: Job,
    /// Writes where this agent's things are, for the command.
    presence: Job,
    /// Writes the names of pods, for the command.
    names: Job,
    /// Writes those of Services and Nodes.
    objects: Job,
    /// Writes what their objects say of Services and endpoints.
    details: Job,
    details_took: Duration,
    /// What is being written of them.
    writing: Option<Writing>,
    /// Writes the names of network policies, which took so long the last time.
    policy_names: Job,
    policy_names_took: Duration,
    look: Option<Look>,
    /// The network has changed since the look began.
    is_net_changed: bool,
    net_took: Duration,
    /// Who writes the overlay's headers, as the programs' settings say; `None` without an overlay.
    choice: Option<Choice>,
    /// What the last look at the host's network found wrong; `None` before the first one.
    host_problems: Option<Vec<String>>,
    /// The ways that the last look at the network worked by.
    ways_seen: u64,
    /// What the programs' settings say of Services for clients outside.
    external_seen: bool,
    /// There are TCP connections whose backend serves no more, and whose endpoint is known to the API.
    has_outlived: bool,
    /// What the last search for such sockets has left to the next.
    search_progress: endings::Progress,
    searching: Option<Searching>,
    /// How long the loop took to compare them with the backends.
    compare_took: Duration,
    /// The CNI binary's records, as of the last look at the network; `None` before the first one.
    records: Option<Vec<EndpointFile>>,
    /// Octets of packets to other nodes, as of the last look that found a device towards them.
    room: u32,
    /// The network has been looked after since all nodes are known: the routes to them are there.
    routed: bool,
    problems: BTreeSet<String>,
}

impl Reconciler {
    fn new(
        surroundings: Surroundings,
        config: Arc<Config>,
        health: Arc<Health>,
        shutdown: watch::Receiver<bool>,
    ) -> Result<Self> {
        Ok(Self {
            index: Index::new(node::settings(&config)),
            repairer: Repairer::new(&config.run_dir, &config.sysctl_dir)?,
            policies: Policies::new(&config),
            config,
            shutdown,
            look_limit: surroundings.look_limit,
            observe: surroundings.observe,
            enter: surroundings.enter,
            start: Instant::now(),
            datapath: None,
            files: Files::default(),
            check_ports: CheckPorts::new(Arc::clone(&health)),
            load: Job::due("the programs cannot be loaded; what is attached runs on"),
            network: Job::due("the host's network is not as it should be"),
            maps: Job::idle("the maps took not all changes, trying again"),
            checks: Job::idle("load balancers get no answer for a Service"),
            sockets: Job::idle("socket load-balancing is not as it should be"),
            endings: Job::idle("socket load-balancing is not as it should be"),
            report: Job::idle("report"),
            presence: Job::due("rustnetctl does not find this agent"),
            names: Job::idle("rustnetctl does not know the names of pods"),
            objects: Job::idle("rustnetctl does not know the names of Services and Nodes"),
            details: Job::idle("rustnetctl does not know the endpoints of Services"),
            details_took: Duration::ZERO,
            writing: None,
            policy_names: Job::idle("rustnetctl does not know the names of network policies"),
            policy_names_took: Duration::ZERO,
            look: None,
            is_net_changed: false,
            net_took: Duration::ZERO,
            choice: None,
            host_problems: None,
            ways_seen: 0,
            external_seen: false,
            has_outlived: false,
            search_progress: endings::Progress::default(),
            searching: None,
            compare_took: Duration::ZERO,
            records: None,
            room: 0,
            routed: false,
            problems: BTreeSet::new(),
            health,
        })
    }

    /// Takes events into the index.
    fn take_in(&mut self, batch: &mut Vec<Event>) {
        for event in batch.drain(..) {
            self.health.metrics.received(&event);
            if !self.policies.take_in(&event, &self.config) {
                continue;
            }
            if self.is_of_own_pod(&event) || event == Event::Synced(Kind::Pod) {
                self.names.want(PROBLEMS_PERIOD);
                // Its annotation may be another one.
                self.want_sockets();
            }
            if event.object_kind() == Some(Kind::Service) || matches!(event, Event::Synced(_)) {
                self.objects.want(PROBLEMS_PERIOD);
            }
            let is_service = matches!(event.object_kind(), Some(Kind::Service | Kind::Slice));
            if is_service || matches!(event, Event::Synced(_)) {
                self.details.want(PROBLEMS_PERIOD.max(self.details_took * FILE_SHARE));
            }
            self.index.handle(event);
        }
        if self.index.has_external() != self.external_seen {
            // The programs' settings have it.
            self.net_changed();
        }
        if self.index.ways_version() != self.ways_seen {
            self.net_changed();
            self.objects.want(PROBLEMS_PERIOD);
        }
        // The first time there is nothing to wait out, and readiness waits for it.
        if !self.routed && self.index.has_synced(Kind::Node) {
            self.network.want_unless_failed(Duration::ZERO);
        }
        if let Some(node) = self.index.own_node() {
            self.health.set_node_eligible(!node.is_leaving);
        }
        // While lists are incomplete the agent starts, and nothing is late.
        if self.is_any_gate_open() {
            self.health.queued();
        }
        self.maps.want_unless_failed(Duration::ZERO);
        self.report.want(PROBLEMS_PERIOD);
    }

    /// True if an event is about a pod of this node, or one that was.
    fn is_of_own_pod(&self, event: &Event) -> bool {
        match event {
            Event::Apply(Object::Pod(pod)) => *pod.node == *self.config.node_name || self.index.has_pod(&pod.name),
            Event::Delete(object) | Event::Reject(object, _) if object.kind == Kind::Pod => {
                self.index.has_pod(&object.name)
            }
            _ => false,
        }
    }

    fn is_any_gate_open(&self) -> bool {
        Gate::ALL.into_iter().any(|gate| self.index.is_open(gate))
    }

    /// Something about the network changed: look soon, but not all the time.
    fn net_changed(&mut self) {
        if self.look.is_some() {
            // Whether that look has seen it is not known; how soon the next one may be, it decides.
            self.is_net_changed = true;
            return;
        }
        let least = if self.network.has_failed() { NET_SETTLE_FAILED } else { NET_SETTLE };
        self.network.want(least.max(self.net_took * NET_SHARE));
    }

    fn next_deadline(&self) -> Instant {
        let load = self.load.deadline().filter(|_| self.datapath.is_none());
        let maps = self.maps.deadline().filter(|_| self.can_apply());
        let policies = Some(self.policies.deadline()).filter(|_| self.can_apply_policies());
        let others = [&self.network, &self.checks, &self.sockets, &self.endings, &self.report]
            .into_iter()
            .chain(self.files_of_command())
            .map(Job::deadline);
        let audit = self.datapath.as_ref().and_then(|it| it.planner.audit_at()).map(|due| self.start + due);
        let looks = [self.look.as_ref().map(|it| it.began), self.searching.as_ref().map(|it| it.began)];
        let stuck = looks.into_iter().flatten().map(|began| began + self.look_limit).filter(|at| *at > Instant::now());
        // Nothing else is due for long while a look is under way, and the probes want to see the loop turn.
        let turn = Instant::now() + NET_PERIOD;
        others.chain([load, maps, policies, audit]).flatten().chain(stuck).fold(turn, Instant::min)
    }

    /// Does all that is due.
    fn step(&mut self) {
        // A thread that the kernel holds ends with the process alone.
        if self.stuck_look().is_none() {
            self.health.tick();
        }
        if self.presence.is_due() {
            self.write_presence();
        }
        if self.datapath.is_none() && self.load.is_due() {
            self.load();
        }
        if self.network.is_due() {
            self.begin_look();
        }
        if self.can_apply() && self.maps.is_due() {
            self.apply();
        }
        if self.can_apply_policies() && self.policies.deadline() <= Instant::now() {
            self.apply_policies();
        }
        if self.checks.is_due() {
            self.open_check_ports();
        }
        if self.sockets.is_due() {
            self.look_after_sockets();
        }
        if self.endings.is_due() {
            self.begin_endings();
        }
        self.report_stuck_search();
        self.audit();
        if self.report.is_due() {
            self.report_problems();
        }
        if self.names.is_due() {
            self.write_names();
        }
        if self.objects.is_due() {
            self.write_objects();
        }
        if self.details.is_due() {
            self.begin_details();
        }
        if self.policy_names.is_due() {
            self.write_policy_names();
        }
        self.set_readiness();
    }

    /// Loads the programs and adopts what the maps hold.
    fn load(&mut self) {
        let loaded = Kernel::load(&self.config).and_then(|kernel| {
            let planner = Planner::adopt(&kernel.maps).context("reading the maps back")?;
            let planner = planner.with_audit_period(self.config.audit_period);
            let collector = Collector::open(kernel.maps_dir(), kernel.clock()?, kernel.hz)?;
            let stats = Stats::open(kernel.maps_dir(), self.config.bpffs.clone())?;
            self.health.metrics.set_kernel_stats(Arc::new(stats));
            Ok((Datapath { kernel, planner }, collector))
        });
        match loaded {
            Ok((datapath, collector)) => {
                tracing::info!(services = datapath.planner.service_count(), "programs loaded, maps adopted");
                tokio::spawn(collector.run(self.health.metrics.clone(), self.shutdown.clone()));
                self.datapath = Some(datapath);
                self.load.finish(Vec::new(), None);
                // Attach at once, then apply what came meanwhile.
                self.network.want(Duration::ZERO);
                self.maps.want(Duration::ZERO);
            }
            Err(error) => self.load.finish(vec![Failure::new(Scope::Node, &error)], None),
        }
    }

    fn is_upgrading(&self) -> bool {
        self.datapath.as_ref().is_some_and(|it| it.kernel.is_upgrading())
    }

    /// True if there are changes that may be applied. The few moments of an upgrade are waited for: the earlier
    /// programs have tables and backends of their own, in which nothing ends. An upgrade that a broken hook holds up is not.
    fn can_apply(&self) -> bool {
        self.maps.deadline().is_some() && self.datapath.is_some() && self.is_any_gate_open() && !self.is_held_up()
    }

    /// True while changes wait for an upgrade of the programs.
    fn is_held_up(&self) -> bool {
        self.is_upgrading() && (self.look.is_some() || !self.network.has_failed())
    }

    /// Exports the maps for an agent of v1 (see [`crate::bpf::upgrade`]); false if there is nothing to export. Stops between two
    /// steps when it `is_late`.
    fn export(&mut self, is_late: &AtomicBool) -> Result<bool> {
        let Some(Datapath { kernel, .. }) = &self.datapath else { return Ok(false) };
        // In the middle of an upgrade the maps of v1 are still there, and the programs of the bridge write them.
        if kernel.has_earlier_tables() {
            return Ok(false);
        }
        if !kernel.is_pinned() && kernel.has_upgraded() {
            // The last step of the upgrade.
            self.repair_at_once()?;
        }
        let Some(Datapath { kernel, .. }) = &mut self.datapath else { return Ok(false) };
        if kernel.is_upgrading() || !kernel.begin_export()? {
            return Ok(false);
        }
        // The first look swaps the hooks, the second finds pods that came while it did.
        for _ in 0..2 {
            ensure!(!is_late.load(Ordering::Relaxed), "no time is left");
            let failures = self.repair_at_once()?;
            let is_in_the_way = |it: &Failure| !matches!(it.scope, Scope::Peer | Scope::Speed);
            ensure!(!failures.iter().any(is_in_the_way), "{}", failure::texts(&failures));
        }
        ensure!(!is_late.load(Ordering::Relaxed), "no time is left");
        if let Some(Datapath { kernel, .. }) = &self.datapath {
            let connections = kernel.finish_export()?;
            tracing::debug!(connections, "maps of v1 pinned");
        }
        Ok(true)
    }

    /// Brings the maps to what the index wants.
    fn apply(&mut self) {
        let Some(Datapath { kernel, planner }) = &mut self.datapath else { return };
        let began = Instant::now();
        match planner.sync(&mut self.index, &mut kernel.maps, began - self.start) {
            Ok(plan) => {
                self.maps.finish(Vec::new(), plan.retry_at.map(|at| self.start + at));
                self.health.metrics.map_writes(plan.writes.len() as u64);
                self.health.applied(began.elapsed());
                self.set_health_checks();
                self.note_backends(&plan.writes);
                if !plan.writes.is_empty() {
                    tracing::debug!(writes = plan.writes.len(), took = ?began.elapsed(), "applied");
                }
            }
            Err(error) => self.maps.finish(vec![Failure::new(Scope::Node, &error)], None),
        }
    }

    /// Has load balancers hear what has been applied.
    fn set_health_checks(&mut self) {
        // Before the lists are complete, a count would be wrong.
        if self.index.is_open(Gate::Services)
            && let Some(checks) = self.index.take_health_checks()
            && (self.check_ports.set(checks) || self.checks.has_failed())
        {
            self.checks.want(Duration::ZERO);
        }
    }

    /// Opens the ports of load balancers' health checks that are not open yet.
    fn open_check_ports(&mut self) {
        let had_failed = self.checks.has_failed();
        self.checks.finish(self.check_ports.open(), None);
        if had_failed || self.checks.has_failed() {
            self.report.want(Duration::ZERO);
        }
    }

    /// Repairs what somebody else changed in the maps.
    fn audit(&mut self) {
        let Some(Datapath { kernel, planner }) = &mut self.datapath else { return };
        if let Err(error) = audit::step(planner, &mut kernel.maps, self.start.elapsed(), &self.health.metrics) {
            tracing::error!("{error:#}");
            self.maps.want(Duration::ZERO);
        }
    }

    /// Reports what is newly wrong with the input, and what is resolved.
    fn report_problems(&mut self) {
        let mut now: BTreeSet<String> = self.index.problems().iter().map(ToString::to_string).collect();
        if let Some(Datapath { planner, .. }) = &self.datapath {
            now.extend(planner.problems(&self.index).iter().map(ToString::to_string));
        }
        now.extend(self.policies.problems().map(ToString::to_string));
        now.extend(self.host_problems.iter().flatten().cloned());
        self.health.set_problems(self.of_this_node());
        self.count_unserved();
        for problem in now.difference(&self.problems) {
            tracing::warn!("{problem}");
        }
        for problem in self.problems.difference(&now) {
            tracing::info!("resolved: {problem}");
        }
        self.problems = now;
        self.report.finish(Vec::new(), None);
    }

    /// Counts what objects ask for and do not get, and what they want on this node and is elsewhere.
    fn count_unserved(&self) {
        let unserved = self.index.unserved();
        for feature in Feature::ALL {
            let count = unserved.get(&feature).map_or(0, |askers| askers.count);
            self.health.metrics.set_unsupported(feature, count);
        }
        let without = self.index.count_without_local_endpoints();
        for (policy, ports) in [("internal", without.internal), ("external", without.external)] {
            self.health.metrics.set_no_local_endpoints(policy, ports);
        }
        if self.index.synced()
            && let Err(error) = namefile::write_unserved(&self.config.run_dir, &unserved)
        {
            tracing::warn!("{error:#}");
        }
    }

    /// What of all that only this node can report, and what failed for a part of it.
    fn of_this_node(&self) -> BTreeSet<String> {
        let objects = self.index.problems_of_this_node(API_SERVER);
        let state = self.host_problems.iter().flatten().cloned();
        let partial = self.network.failures().iter().filter(|it| it.scope != Scope::Node);
        let partial =
            partial.chain(self.checks.failures()).chain(self.sockets.failures()).chain(self.endings.failures());
        let partial = partial.chain(self.files_of_command().into_iter().flat_map(Job::failures));
        let objects = objects.iter().chain(self.policies.problems());
        objects.map(ToString::to_string).chain(state).chain(partial.map(ToString::to_string)).collect()
    }

    /// Sets what the probes answer, and publishes what the CNI binary reads.
    fn set_readiness(&mut self) {
        let ready = self.not_ready().map_or(Ok(()), Err).and_then(|()| {
            let file = node::file(&self.config, self.room, self.index.own_node());
            self.files.publish(&self.config, file).map_err(|error| NotReady::Failed(format!("{error:#}")))
        });
        match ready {
            Ok(()) => self.health.set_ready(),
            Err(why) => self.health.set_not_ready(why),
        }
    }

    /// Why this node must not get pods, if so.
    fn not_ready(&self) -> Option<NotReady> {
        let starting = |stage: &str| Some(NotReady::Starting(stage.to_owned()));
        if let Some(failure) = self.stuck_look() {
            return Some(NotReady::Failed(failure));
        }
        if let Some(failure) =
            [&self.load, &self.network, &self.maps, &self.policies.job].into_iter().find_map(Job::node_failure)
        {
            return Some(NotReady::Failed(failure));
        }
        if self.datapath.is_none() || self.host_problems.is_none() {
            return starting("the programs are not loaded");
        }
        if self.is_upgrading() {
            return starting("the programs on the hooks are being swapped");
        }
        if !self.index.synced() {
            return match self.index.problems_of_source(API_SERVER).next() {
                Some(why) => Some(NotReady::Failed(why.to_string())),
                None => starting("the source has not delivered everything"),
            };
        }
        if !self.routed {
            return starting("the routes to the other nodes are not made");
        }
        if let Some(why) = self.wait_for_policies() {
            return starting(why);
        }
        if self.maps.is_due() { starting("changes wait to be applied") } else { None }
    }
}
