//! The job that brings the maps of network policies to what the index wants. A new pod of this node has no network before, so that its
//! record is heard of at once.

use std::collections::{BTreeMap, BTreeSet};
use std::future::pending;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use rustnet_common::endpoint::Endpoint;
use rustnet_common::files::EndpointFile;
use rustnet_common::names::map;
use rustnet_common::policy::{ANY_CLASS, OPEN, flags};
use tokio::time::Instant;

use super::job::Job;
use super::{Datapath, PROBLEMS_PERIOD, Reconciler};
use crate::bpf::store::policy::PolicyStore;
use crate::config::Config;
use crate::failure::{Failure, Scope};
use crate::index::{DesiredPolicies, Gate, Index, LocalInterface};
use crate::metrics::{MapFill, Metrics, PolicyFigures};
use crate::model::{ObjectName, Problem};
use crate::net::arrivals::Arrivals;
use crate::net::endpoints as records;
use crate::plan::policies::{PolicyMaps as _, PolicyPlanner, PolicySnapshot, PolicyWrite};
use crate::policyfile::Names;
use crate::source::{Event, Kind, Object};

/// Share of the time that working out policies may take, as 1 in so many: in a large cluster some pod always comes or goes. Pods of this
/// node do not wait.
const SHARE: u32 = 20;
/// The same for changes of policies and namespaces: they are rarer, and people wait for them.
const SHARE_OF_POLICIES: u32 = 4;
/// How long a change of policies or namespaces waits at most.
const MOST: Duration = Duration::from_secs(1);
/// How long a pod of another node waits at most.
const MOST_FOR_PODS: Duration = Duration::from_secs(5);
/// Differences between the maps and what was written that are logged one by one.
const LOGGED: usize = 10;

/// What the job needs from one time to the next.
pub struct Policies {
    /// When it is due, and what failed.
    pub job: Job,
    /// What the maps hold; `None`: they are read back first.
    planner: Option<PolicyPlanner>,
    /// Names of what the maps hold, without those of pods.
    names: Names,
    /// How long it took the last time, and when that was over.
    took: Duration,
    done_at: Option<Instant>,
    /// What the maps hold, for the metrics.
    figures: Option<PolicyFigures>,
    /// When the maps are read back.
    audit_at: Instant,
    audit_period: Duration,
    /// The maps have what follows from policies, or from their being switched off.
    pub is_applied: bool,
}

impl Policies {
    /// Nothing is known yet.
    pub fn new(config: &Config) -> Self {
        Self {
            job: Job::due("network policies are not as they should be; what was applied before stays"),
            planner: None,
            names: Names::default(),
            took: Duration::ZERO,
            done_at: None,
            figures: None,
            audit_at: Instant::now() + config.audit_period,
            audit_period: config.audit_period,
            is_applied: false,
        }
    }

    /// Wants done what follows from an event. False if the event is only about policies, and these are switched off.
    pub fn take_in(&mut self, event: &Event, config: &Config) -> bool {
        let kind = match event {
            Event::Restart(kind) | Event::Synced(kind) => Some(*kind),
            other => other.object_kind(),
        };
        if kind == Some(Kind::Node) && config.network_policy {
            // Policies of the cluster name nodes.
            self.job.want_unless_failed(self.rest(SHARE, MOST));
            return true;
        }
        let Some(kind) = kind.filter(|kind| Kind::OF_POLICIES.contains(kind)) else { return true };
        if !config.network_policy {
            return kind == Kind::Pod;
        }
        let is_here = matches!(event, Event::Apply(Object::Pod(pod)) if *pod.node == *config.node_name);
        let (share, most) = if kind == Kind::Pod { (SHARE, MOST_FOR_PODS) } else { (SHARE_OF_POLICIES, MOST) };
        self.job.want_unless_failed(if is_here { Duration::ZERO } else { self.rest(share, most) });
        true
    }

    /// How long a change waits so that working out policies takes no more than this share of the time, as 1 in so many. After a quiet
    /// while, not at all.
    fn rest(&self, share: u32, most: Duration) -> Duration {
        let since = self.done_at.map_or(Duration::MAX, |at| at.elapsed());
        (self.took * share).min(most).saturating_sub(since)
    }

    /// What has no room in the maps.
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.planner.iter().flat_map(PolicyPlanner::problems)
    }

    /// Names of what the maps hold; `None`: what they hold is not known.
    pub fn names(&self, index: &Index) -> Option<Names> {
        let planner = self.planner.as_ref()?;
        Some(self.names.with_pods(index.policy_pods(), &planner.held().pods))
    }

    /// What the maps hold, in figures; `None`: what they hold is not known.
    fn figures(&mut self, maps: &PolicyStore) -> Option<&PolicyFigures> {
        let PolicySnapshot { state, pods, cidrs, rules } = self.planner.as_ref()?.held();
        if let Some(figures) = &mut self.figures {
            // Pods of other nodes alone have changed since.
            figures.generation = state.generation;
            figures.maps[0].used = pods.len() as u64;
            return self.figures.as_ref();
        }
        let room = maps.capacities();
        let sets: BTreeSet<u32> = pods.values().flat_map(|pod| [pod.ingress, pod.egress]).collect();
        let classes: BTreeSet<u32> = pods.values().map(|pod| pod.class).chain(cidrs.values().copied()).collect();
        let fill = |name, used: usize, max: u32| MapFill { name, used: used as u64, max: u64::from(max) };
        self.figures = Some(PolicyFigures {
            sets: sets.iter().filter(|set| **set != OPEN).count(),
            classes: classes.iter().filter(|class| **class != ANY_CLASS).count(),
            generation: state.generation,
            maps: [
                fill(map::POLICY_PODS, pods.len(), room.pods),
                fill(map::POLICY_CIDRS, cidrs.len(), room.cidrs),
                fill(map::POLICY_RULES, rules.len(), room.rules),
            ],
        });
        self.figures.as_ref()
    }

    /// When it has to be done.
    pub fn deadline(&self) -> Instant {
        self.job.deadline().map_or(self.audit_at, |due| due.min(self.audit_at))
    }

    /// True if the maps are to be read back, which is then not due for a while.
    fn is_audit_due(&mut self) -> bool {
        let is_due = self.audit_at <= Instant::now();
        if is_due {
            self.audit_at = Instant::now() + self.audit_period;
        }
        is_due
    }

    /// Brings the maps to what the index wants. Returns how many writes that took; `None`: nothing was to be compared.
    fn apply(
        &mut self,
        is_on: bool,
        index: &mut Index,
        maps: &mut PolicyStore,
        metrics: &Metrics,
    ) -> Result<Option<usize>> {
        let is_audit = self.is_audit_due();
        let is_dirty = index.take_policies_dirty();
        if !is_dirty && self.planner.is_some() && !is_audit {
            return Ok(None);
        }
        if is_on
            && !is_audit
            && let Some(writes) = self.planner.as_mut().and_then(|planner| plan_parts(index, planner))
        {
            let planner = self.planner.take();
            maps.apply(&writes).context("writing network policies")?;
            self.planner = planner;
            return Ok(Some(writes.len()));
        }
        self.figures = None;
        let is_repair = is_audit && !is_dirty && self.planner.is_some();
        let mut planner = match self.planner.take() {
            Some(_) if is_audit => PolicyPlanner::read_back(maps.snapshot()?, maps.capacities()),
            Some(planner) => planner,
            None => PolicyPlanner::adopt(maps.snapshot()?, maps.capacities()),
        };
        let desired = if is_on { index.desired_policies() } else { DesiredPolicies::default() };
        let names = Names::of(&desired);
        let writes = planner.plan(desired);
        if is_repair {
            report_repairs(&writes, metrics);
        }
        maps.apply(&writes).context("writing network policies")?;
        self.names = names.with_held(&self.names, &planner.held().rules);
        self.planner = Some(planner);
        Ok(Some(writes.len()))
    }
}

/// The writes for pods of other nodes, if nothing else has changed: in a large cluster it is nearly always they.
fn plan_parts(index: &mut Index, planner: &mut PolicyPlanner) -> Option<Vec<PolicyWrite>> {
    let held = &planner.held().pods;
    let changes = index.policy_changes(|ip| held.get(&ip).map(|pod| pod.class))?;
    planner.plan_pods(&changes)
}

/// The watch of the CNI binary's records; `None` where nothing waits for it.
pub fn arrivals(config: &Config) -> Option<Arrivals> {
    let watch = config.network_policy.then(|| Arrivals::watch(&config.run_dir));
    watch?.inspect_err(|error| tracing::warn!("{error:#}; new pods wait for the looks at the host's network")).ok()
}

/// Ready once records have come or gone. Never ready without a watch.
pub async fn arrived(arrivals: &mut Option<Arrivals>) -> Result<()> {
    match arrivals {
        Some(arrivals) => arrivals.changed().await,
        None => pending().await,
    }
}

impl Reconciler {
    /// Reads the CNI binary's records again.
    pub(super) fn records_changed(&mut self) {
        match records::read(&self.config.run_dir) {
            Ok(records) => {
                self.records = Some(records.endpoints);
                self.policies.job.want_unless_failed(Duration::ZERO);
            }
            Err(error) => tracing::warn!("{error:#}; the next look at the host's network tries again"),
        }
    }

    /// True if network policies may be applied, or removed where they are switched off.
    pub(super) fn can_apply_policies(&self) -> bool {
        let is_known = !self.config.network_policy || self.index.is_open(Gate::Policies);
        // Before the pins, there would be two maps of each name.
        let is_pinned = self.datapath.as_ref().is_some_and(|it| it.kernel.is_pinned());
        is_pinned && is_known && !self.is_held_up()
    }

    /// Why pods must not come yet; `None`: they may. Where the source may not know policies, none will be applied.
    pub(super) fn wait_for_policies(&self) -> Option<&'static str> {
        if self.policies.is_applied {
            return None;
        }
        if !self.config.network_policy || !self.index.is_refused_policies() {
            return Some("network policies are not applied");
        }
        // Whoever wrote that: new pods would stay closed.
        let state = self.datapath.as_ref().and_then(|it| it.kernel.policies.state().ok());
        let is_enforced = state.is_some_and(|state| state.flags & flags::ENFORCED != 0);
        is_enforced.then_some(
            "network policies are enforced, and the API server refuses what they follow from: apply deploy/rbac.yaml, or set \
             --network-policy off",
        )
    }

    /// Brings the maps of network policies to what the index wants.
    pub(super) fn apply_policies(&mut self) {
        if self.records.is_none() {
            self.records_changed();
        }
        let Some(Datapath { kernel, .. }) = &mut self.datapath else { return };
        let began = Instant::now();
        let records = self.records.as_deref().unwrap_or_default();
        let applied = kernel.endpoints.read().and_then(|endpoints| {
            self.index.set_local_interfaces(interfaces(&endpoints, records));
            let is_on = self.config.network_policy;
            self.policies.apply(is_on, &mut self.index, &mut kernel.policies, &self.health.metrics)
        });
        if applied.is_err() {
            // A deadline that has passed would be due again at once.
            self.policies.is_audit_due();
        }
        match applied {
            Ok(writes) => {
                self.policies.is_applied = true;
                self.policies.job.finish(Vec::new(), None);
                if writes.is_some() {
                    self.policies.took = began.elapsed();
                    self.policies.done_at = Some(Instant::now());
                    let took = self.policies.took;
                    if let Some(figures) = self.policies.figures(&kernel.policies) {
                        self.health.metrics.policies_applied(took, figures);
                    }
                    self.policy_names_changed();
                }
                if let Some(writes) = writes.filter(|writes| *writes > 0) {
                    self.report.want(PROBLEMS_PERIOD);
                    self.health.metrics.map_writes(writes as u64);
                    tracing::debug!(writes, took = ?began.elapsed(), "network policies applied");
                }
            }
            Err(error) => self.policies.job.finish(vec![Failure::new(Scope::Node, &error)], None),
        }
    }
}

/// The interface of each address of this node's pods: of two, the one with the higher index came later. The CNI binary writes the record
/// before the entry, and in it the pod's name and UID: the API server has no address of the pod yet.
fn interfaces(endpoints: &[(IpAddr, Endpoint)], records: &[EndpointFile]) -> BTreeMap<IpAddr, LocalInterface> {
    let unnamed = |ifindex| LocalInterface { ifindex, ..LocalInterface::default() };
    let mut interfaces: BTreeMap<_, _> =
        endpoints.iter().map(|(ip, endpoint)| (*ip, unnamed(endpoint.ifindex))).collect();
    for record in records {
        let name = || ObjectName::namespaced(&record.pod_namespace, &record.pod_name);
        let pod = (!record.pod_name.is_empty()).then(name);
        for ip in &record.addresses {
            if interfaces.get(ip).is_none_or(|known| known.ifindex <= record.ifindex) {
                let uid = record.pod_uid.as_str().into();
                interfaces.insert(*ip, LocalInterface { ifindex: record.ifindex, pod: pod.clone(), uid });
            }
        }
    }
    interfaces
}

/// Logs and counts what somebody else has changed in the maps.
fn report_repairs(writes: &[PolicyWrite], metrics: &Metrics) {
    let repairs: Vec<_> = writes.iter().filter_map(|write| Some((map_of(write)?, write))).collect();
    for (map, write) in repairs.iter().take(LOGGED) {
        tracing::warn!("{map}: {write:?}; written again. Does another program write this map?");
    }
    if let Some(more) = repairs.len().checked_sub(LOGGED).filter(|more| *more > 0) {
        tracing::warn!("{more} more entries of network policies were not as they should be; written again");
    }
    for (map, _) in repairs {
        metrics.map_repaired(map);
    }
}

/// The map of a write; `None` for the state, which is written after repairs.
const fn map_of(write: &PolicyWrite) -> Option<&'static str> {
    match write {
        PolicyWrite::PutState { .. } => None,
        PolicyWrite::PutPod { .. } | PolicyWrite::DeletePod { .. } => Some(map::POLICY_PODS),
        PolicyWrite::PutCidr { .. } | PolicyWrite::DeleteCidr { .. } => Some(map::POLICY_CIDRS),
        PolicyWrite::PutRule { .. } | PolicyWrite::DeleteRule { .. } => Some(map::POLICY_RULES),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::convert::Converter;

    /// Working it out takes long in a large cluster, and each pod of it is a reason to. After a quiet while nobody waits.
    #[tokio::test(start_paused = true)]
    async fn pods_of_other_nodes_wait_and_own_ones_do_not() {
        let config = Config::load(["x", "--node-name=n1", "--manifests=/m"], &|_| None).unwrap();
        let pod = |node: &str| {
            let object = serde_json::json!({"metadata": {"name": "a"}, "spec": {"nodeName": node}});
            Converter::new().pod(&serde_json::from_value(object).unwrap()).ok().unwrap()
        };
        let gap = |took: u64, quiet: u64, event: Event| {
            let mut policies = Policies::new(&config);
            policies.job.finish(Vec::new(), None);
            policies.took = Duration::from_millis(took);
            policies.done_at = Instant::now().checked_sub(Duration::from_millis(quiet));
            assert!(policies.take_in(&event, &config));
            policies.deadline() - Instant::now()
        };
        for (took, quiet, event, want) in [
            (3, 0, pod("n1"), 0),
            (3, 0, pod("n2"), 60),
            (3, 20, pod("n2"), 40),
            (3, 60, pod("n2"), 0),
            (3000, 0, pod("n1"), 0),
            (3000, 0, pod("n2"), 5000),
            (3, 0, Event::Synced(Kind::NetworkPolicy), 12),
            (3, 12, Event::Synced(Kind::NetworkPolicy), 0),
            (3, 0, Event::Synced(Kind::Node), 60),
            (3000, 0, Event::Synced(Kind::NetworkPolicy), 1000),
            (3000, 400, Event::Synced(Kind::Namespace), 600),
        ] {
            let found = gap(took, quiet, event.clone());
            assert_eq!(found, Duration::from_millis(want), "{took} ms, then {quiet} ms of quiet, {event:?}");
        }
    }

    #[test]
    fn the_later_interface_of_an_address_counts_with_the_name_of_its_record() {
        let ip = |n: u8| IpAddr::from([10, 1, 1, n]);
        let endpoint = |ifindex| Endpoint { ifindex, identity: 0, mac: [0; 6], host_mac: [0; 6], flags: 0, pad: 0 };
        let record = |name: &str, ifindex: u32, n: u8| -> EndpointFile {
            serde_json::from_value(serde_json::json!({
                "containerId": "c", "ifname": "eth0", "netns": "", "network": "n", "hostIfname": "rnv1", "ifindex": ifindex,
                "mac": "", "addresses": [ip(n)], "podNamespace": "shop", "podName": name, "podUid": format!("u{n}"),
            }))
            .unwrap()
        };
        let endpoints = [(ip(1), endpoint(1)), (ip(2), endpoint(2)), (ip(3), endpoint(3)), (ip(4), endpoint(4))];
        let records =
            [record("a", 1, 1), record("", 2, 2), record("new", 9, 3), record("old", 1, 4), record("soon", 10, 5)];
        let found: Vec<(IpAddr, LocalInterface)> = interfaces(&endpoints, &records).into_iter().collect();
        let want = [(1, 1, Some("a")), (2, 2, None), (3, 9, Some("new")), (4, 4, None), (5, 10, Some("soon"))];
        let want = want.map(|(n, ifindex, name)| {
            let pod = name.map(|name| ObjectName::namespaced("shop", name));
            let uid = if [1, 2, 3, 5].contains(&n) { format!("u{n}") } else { String::new() };
            (ip(n), LocalInterface { ifindex, pod, uid: uid.into() })
        });
        assert_eq!(found, want);
    }
}
