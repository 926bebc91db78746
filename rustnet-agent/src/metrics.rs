//! What is counted, and how Prometheus reads it.
//!
//! kube-proxy's names stand where they mean the same, so that dashboards go on working; the rest begins with `rustnet_`.
//! The encoder appends `_total` to counters: names are registered without it. What lives in the maps is read through
//! [`KernelStats`]: counters when somebody scrapes, the rest every 30 s, however often that is.

mod changes;

use crate::config::OverlayPath;
use crate::model::Feature;
use crate::source::{Event, Kind};
use changes::Changes;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::{MetricType, info::Info};
use prometheus_client::registry::{Registry, Unit};
use rustnet_common::drop::{Counter as HookCounter, DropReason, hook};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

/// What the kernel side can tell. Implemented on the pinned maps.
pub trait KernelStats: Send + Sync + 'static {
    /// All elements of `rn_counters` that are not zero, summed over CPUs. Asked on every scrape: it must be cheap.
    fn counters(&self) -> Vec<HookCount>;
    /// How full the maps are: all entries are counted, which takes a tenth of a second when they are full.
    fn maps(&self) -> Vec<MapFill>;
}

/// Packets with one fate at one hook. [`DropReason::Forwarded`] is a fate, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HookCount {
    /// Their fate.
    pub reason: DropReason,
    /// Code of the hook, an index into [`hook::NAMES`].
    pub hook: u8,
    /// How many.
    pub count: HookCounter,
}

/// How full a map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapFill {
    /// Its name.
    pub name: &'static str,
    /// Entries in use.
    pub used: u64,
    /// Entries there is room for.
    pub max: u64,
}

/// What the maps of network policies hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PolicyFigures {
    /// Sets of policies that pods of this node have.
    pub sets: usize,
    /// Classes of addresses that policies tell apart.
    pub classes: usize,
    /// Number of the changes after which known flows are judged again.
    pub generation: u32,
    /// How full each map is.
    pub maps: [MapFill; 3],
}

/// All metrics of the agent. Cheap to clone; clones count together.
#[derive(Clone, Debug, Default)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    changes: Mutex<Changes>,
    sync_duration: Histogram,
    network_programming: Histogram,
    last_sync: Gauge<f64, AtomicU64>,
    service_changes: Counter,
    service_changes_pending: Gauge,
    endpoint_changes: Counter,
    endpoint_changes_pending: Gauge,
    no_local_endpoints: Family<PolicyLabel, Gauge>,
    healthz: Family<Code, Counter>,
    livez: Family<Code, Counter>,
    map_writes: Counter,
    map_repairs: Family<MapLabel, Counter>,
    policy_duration: Histogram,
    policy_sets: Gauge,
    policy_classes: Gauge,
    policy_generation: Gauge,
    policy_entries: Family<MapLabel, Gauge>,
    policy_capacity: Family<MapLabel, Gauge>,
    ready: Gauge,
    overlay_path: Family<PathLabel, Gauge>,
    unsupported: Family<FeatureLabel, Gauge>,
    source_events: Family<KindLabel, Counter>,
    source_relists: Family<KindLabel, Counter>,
    source_errors: Family<KindLabel, Counter>,
    source_synced: Family<KindLabel, Gauge>,
    source_silence: OnceLock<Silence>,
    kernel: OnceLock<Kernel>,
    fills: Mutex<Arc<[MapFill]>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Code {
    code: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PolicyLabel {
    traffic_policy: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MapLabel {
    map: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PathLabel {
    path: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FeatureLabel {
    feature: &'static str,
}

impl From<Kind> for KindLabel {
    fn from(kind: Kind) -> Self {
        Self { kind: kind.to_string() }
    }
}

impl Default for Inner {
    fn default() -> Self {
        Self {
            changes: Mutex::new(Changes::new(SystemTime::now())),
            // kube-proxy's buckets: 1 ms, doubled 14 times.
            sync_duration: Histogram::new(exponential_buckets(0.001, 2.0, 15)),
            network_programming: Histogram::new(programming_buckets()),
            last_sync: Gauge::default(),
            service_changes: Counter::default(),
            service_changes_pending: Gauge::default(),
            endpoint_changes: Counter::default(),
            endpoint_changes_pending: Gauge::default(),
            no_local_endpoints: Family::default(),
            healthz: Family::default(),
            livez: Family::default(),
            map_writes: Counter::default(),
            map_repairs: Family::default(),
            policy_duration: Histogram::new(exponential_buckets(0.001, 2.0, 15)),
            policy_sets: Gauge::default(),
            policy_classes: Gauge::default(),
            policy_generation: Gauge::default(),
            policy_entries: Family::default(),
            policy_capacity: Family::default(),
            ready: Gauge::default(),
            overlay_path: Family::default(),
            unsupported: Family::default(),
            source_events: Family::default(),
            source_relists: Family::default(),
            source_errors: Family::default(),
            source_synced: Family::default(),
            source_silence: OnceLock::new(),
            kernel: OnceLock::new(),
            fills: Mutex::new(Arc::default()),
        }
    }
}

impl Metrics {
    /// The loop has taken in an event, which waits to be applied.
    pub fn received(&self, event: &Event) {
        let is_change = lock(&self.0.changes).received(event);
        let (changes, pending) = match event.object_kind() {
            Some(Kind::Service) => (&self.0.service_changes, &self.0.service_changes_pending),
            Some(Kind::Slice) => (&self.0.endpoint_changes, &self.0.endpoint_changes_pending),
            Some(
                Kind::Node
                | Kind::Pod
                | Kind::Namespace
                | Kind::NetworkPolicy
                | Kind::ServiceCidr
                | Kind::ClusterNetworkPolicy,
            )
            | None => return,
        };
        pending.inc();
        changes.inc_by(u64::from(is_change));
    }

    /// Counts the entries of the maps. What is counted stands in each answer until the next time.
    pub fn count_entries(&self) {
        if let Some(kernel) = self.0.kernel.get() {
            let fills = kernel.0.maps().into();
            *lock(&self.0.fills) = fills;
        }
    }

    /// This many map writes have been made.
    pub fn map_writes(&self, writes: u64) {
        self.0.map_writes.inc_by(writes);
    }

    /// An entry of a map was not as the agent had written it, and was written again.
    pub fn map_repaired(&self, map: &'static str) {
        self.0.map_repairs.get_or_create(&MapLabel { map }).inc();
    }

    /// Network policies have been applied, which took so long. This is what their maps hold now.
    pub fn policies_applied(&self, took: Duration, figures: &PolicyFigures) {
        let count = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        self.0.policy_duration.observe(took.as_secs_f64());
        self.0.policy_sets.set(count(figures.sets as u64));
        self.0.policy_classes.set(count(figures.classes as u64));
        self.0.policy_generation.set(i64::from(figures.generation));
        for MapFill { name, used, max } in figures.maps {
            self.0.policy_entries.get_or_create(&MapLabel { map: name }).set(count(used));
            self.0.policy_capacity.get_or_create(&MapLabel { map: name }).set(count(max));
        }
    }

    /// From now on the kernel side can be asked. The first caller wins.
    pub fn set_kernel_stats(&self, stats: Arc<dyn KernelStats>) {
        let _ = self.0.kernel.set(Kernel(stats));
    }

    /// So many objects ask for a feature that is not served.
    pub fn set_unsupported(&self, feature: Feature, objects: usize) {
        let count = i64::try_from(objects).unwrap_or(i64::MAX);
        self.0.unsupported.get_or_create(&FeatureLabel { feature: feature.name() }).set(count);
    }

    /// So many ports of Services with a traffic policy (`internal` or `external`) of Local have endpoints elsewhere and none here.
    pub fn set_no_local_endpoints(&self, traffic_policy: &'static str, ports: usize) {
        let count = i64::try_from(ports).unwrap_or(i64::MAX);
        self.0.no_local_endpoints.get_or_create(&PolicyLabel { traffic_policy }).set(count);
    }

    /// A source has delivered an event of this kind.
    pub fn source_event(&self, kind: Kind) {
        self.0.source_events.get_or_create(&kind.into()).inc();
    }

    /// A source begins a new list of this kind.
    pub fn source_restarted(&self, kind: Kind) {
        self.0.source_relists.get_or_create(&kind.into()).inc();
    }

    /// A source has delivered its whole list of this kind.
    pub fn source_synced(&self, kind: Kind) {
        self.0.source_synced.get_or_create(&kind.into()).set(1);
    }

    /// A source has failed with this kind and will try again.
    pub fn source_failed(&self, kind: Kind) {
        self.0.source_errors.get_or_create(&kind.into()).inc();
    }

    /// From now on it can be asked for how long the source's server has sent nothing of a kind; `None`: the kind is not watched. The first
    /// caller wins.
    pub fn set_source_silence(&self, silence: Box<dyn Fn(Kind) -> Option<Duration> + Send + Sync>) {
        let _ = self.0.source_silence.set(Silence(silence));
    }

    pub(crate) fn synced(&self, took: Duration) {
        self.0.sync_duration.observe(took.as_secs_f64());
        let now = SystemTime::now();
        for took in lock(&self.0.changes).applied(now) {
            self.0.network_programming.observe(took.as_secs_f64());
        }
        let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.0.last_sync.set(now.as_secs_f64());
        self.0.service_changes_pending.set(0);
        self.0.endpoint_changes_pending.set(0);
    }

    pub(crate) fn set_ready(&self, ready: bool) {
        self.0.ready.set(i64::from(ready));
    }

    /// The overlay's packets take this way from now on; `None` if there is no overlay.
    pub fn set_overlay_path(&self, used: Option<OverlayPath>) {
        if used.is_none() {
            self.0.overlay_path.clear();
        }
        for path in OverlayPath::ALL.into_iter().filter(|_| used.is_some()) {
            self.0.overlay_path.get_or_create(&PathLabel { path: path.word() }).set(i64::from(used == Some(path)));
        }
    }

    pub(crate) fn healthz(&self, code: u16) {
        self.0.healthz.get_or_create(&Code { code }).inc();
    }

    pub(crate) fn livez(&self, code: u16) {
        self.0.livez.get_or_create(&Code { code }).inc();
    }

    /// Everything in the text format of OpenMetrics.
    ///
    /// # Errors
    /// Only if a collector fails to write into memory.
    pub fn encode(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry())?;
        Ok(text)
    }

    fn registry(&self) -> Registry {
        let it = &*self.0;
        let mut registry = Registry::default();
        let proxy = registry.sub_registry_with_prefix("kubeproxy");
        let rules = proxy.sub_registry_with_prefix("sync_proxy_rules");
        rules.register_with_unit("duration", "Time to apply a change", Unit::Seconds, it.sync_duration.clone());
        rules.register_with_unit(
            "last_timestamp",
            "When changes were last applied",
            Unit::Seconds,
            it.last_sync.clone(),
        );
        rules.register("service_changes", "Service changes received", it.service_changes.clone());
        rules.register(
            "service_changes_pending",
            "Service changes not yet applied",
            it.service_changes_pending.clone(),
        );
        rules.register("endpoint_changes", "EndpointSlice changes received", it.endpoint_changes.clone());
        rules.register(
            "endpoint_changes_pending",
            "EndpointSlice changes not yet applied",
            it.endpoint_changes_pending.clone(),
        );
        // A gauge by kube-proxy's name: no suffix is appended.
        rules.register(
            "no_local_endpoints_total",
            "Ports of Services with a Local traffic policy that have endpoints, and none on this node",
            it.no_local_endpoints.clone(),
        );
        proxy.register_with_unit(
            "network_programming_duration",
            "From what set off a change of an EndpointSlice to its being in the maps",
            Unit::Seconds,
            it.network_programming.clone(),
        );
        proxy.register("proxy_healthz", "Answers of /healthz", it.healthz.clone());
        proxy.register("proxy_livez", "Answers of /livez", it.livez.clone());

        let own = registry.sub_registry_with_prefix("rustnet");
        own.register("build", "The agent's version", Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]));
        own.register("ready", "1 when the agent is ready", it.ready.clone());
        let help = "1 for the way of the overlay's packets that is in use, 0 for the other one";
        own.register("overlay_path", help, it.overlay_path.clone());
        own.register("map_writes", "Writes to the maps of services and peers", it.map_writes.clone());
        let help = "Entries of the maps that somebody else had changed, written again";
        own.register("map_repairs", help, it.map_repairs.clone());
        let help = "Time to apply a change of network policies, or of what they depend on";
        own.register_with_unit("policy_apply_duration", help, Unit::Seconds, it.policy_duration.clone());
        own.register("policy_sets", "Sets of network policies that pods of this node have", it.policy_sets.clone());
        let help = "Classes of addresses that network policies of this node tell apart";
        own.register("policy_classes", help, it.policy_classes.clone());
        let help = "Changes of network policies after which known flows are judged again";
        own.register("policy_generation", help, it.policy_generation.clone());
        let help = "Entries of the maps of network policies as they were last applied";
        own.register("policy_entries", help, it.policy_entries.clone());
        let help = "Entries that the maps of network policies have room for";
        own.register("policy_capacity", help, it.policy_capacity.clone());
        own.register("unsupported", "Objects that ask for what is not served", it.unsupported.clone());
        own.register("source_events", "Objects applied or deleted by the source", it.source_events.clone());
        own.register("source_relists", "Full lists begun by the source", it.source_relists.clone());
        own.register("source_errors", "Failures of the source, each followed by another try", it.source_errors.clone());
        own.register("source_synced", "1 once the full list has been delivered", it.source_synced.clone());
        if let Some(Silence(of)) = it.source_silence.get() {
            let silence = Family::<KindLabel, Gauge<f64, AtomicU64>>::default();
            for kind in Kind::ALL {
                if let Some(time) = of(kind) {
                    silence.get_or_create(&kind.into()).set(time.as_secs_f64());
                }
            }
            own.register_with_unit(
                "source_silence",
                "Time since the API server last sent anything, or since the start",
                Unit::Seconds,
                silence,
            );
        }
        if let Some(kernel) = it.kernel.get() {
            registry.register_collector(Box::new(kernel.clone()));
            registry.register_collector(Box::new(Fills(lock(&it.fills).clone())));
        }
        registry.register_collector(Box::new(ProcessMemory));
        registry
    }
}

struct Silence(Box<dyn Fn(Kind) -> Option<Duration> + Send + Sync>);

impl std::fmt::Debug for Silence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Silence")
    }
}

#[derive(Clone)]
struct Kernel(Arc<dyn KernelStats>);

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Kernel")
    }
}

/// A name, words for it, and where the number is.
type Column<T> = (&'static str, &'static str, fn(&T) -> u64);

impl Collector for Kernel {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let counters = self.0.counters();
        let of = |is_wanted: fn(DropReason) -> bool| {
            counters.iter().filter(move |it| is_wanted(it.reason)).collect::<Vec<_>>()
        };
        let forwarded = of(|it| it == DropReason::Forwarded);
        let audited = of(|it| it == DropReason::PolicyAudited);
        let dropped = of(DropReason::is_drop);
        let at = |code: u8| ("hook", hook::NAMES.get(usize::from(code)).copied().unwrap_or("unknown"));
        let packets = |it: &HookCount| it.count.packets;
        let bytes = |it: &HookCount| it.count.bytes;
        let fates: [Column<HookCount>; 2] = [("packets", "Packets", packets), ("bytes", "Bytes of frames", bytes)];
        for (what, words, value) in fates {
            let name = format!("rustnet_drop_{what}");
            let help = format!("{words} dropped or refused, by reason");
            let mut family = encoder.encode_descriptor(&name, &help, None, MetricType::Counter)?;
            for it in &dropped {
                let labels = [("reason", it.reason.name()), at(it.hook)];
                ConstCounter::new(value(it)).encode(family.encode_family(&labels)?)?;
            }
            let name = format!("rustnet_forward_{what}");
            let help = format!("{words} forwarded");
            let mut family = encoder.encode_descriptor(&name, &help, None, MetricType::Counter)?;
            for it in &forwarded {
                ConstCounter::new(value(it)).encode(family.encode_family(&[at(it.hook)])?)?;
            }
            let name = format!("rustnet_policy_audited_{what}");
            let help = format!("{words} with which flows were judged that network policies deny and audit lets pass");
            let mut family = encoder.encode_descriptor(&name, &help, None, MetricType::Counter)?;
            for it in &audited {
                ConstCounter::new(value(it)).encode(family.encode_family(&[at(it.hook)])?)?;
            }
        }
        Ok(())
    }
}

/// How full the maps were when they were counted.
#[derive(Debug)]
struct Fills(Arc<[MapFill]>);

impl Collector for Fills {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let fills: [Column<MapFill>; 2] = [
            ("rustnet_map_entries", "Entries in use, counted every 30 s", |map| map.used),
            ("rustnet_map_max_entries", "Entries there is room for", |map| map.max),
        ];
        for (name, help, value) in fills {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for map in &*self.0 {
                ConstGauge::new(value(map)).encode(family.encode_family(&[("map", map.name)])?)?;
            }
        }
        Ok(())
    }
}

/// kube-proxy's: up to a minute by the second, up to five by more.
fn programming_buckets() -> impl Iterator<Item = f64> {
    let seconds = (1..60).chain((60..120).step_by(5)).chain((120..=300).step_by(30));
    [0.25, 0.5].into_iter().chain(seconds.map(f64::from))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind it is a count or a list: nothing that a panic leaves half done matters.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Resident memory of this process, by the name that Prometheus' own client libraries use.
#[derive(Debug)]
struct ProcessMemory;

impl Collector for ProcessMemory {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let Some(bytes) = resident_bytes() else { return Ok(()) };
        let gauge = ConstGauge::new(bytes);
        let help = "Resident memory of the agent";
        gauge.encode(encoder.encode_descriptor(
            "process_resident_memory",
            help,
            Some(&Unit::Bytes),
            MetricType::Gauge,
        )?)
    }
}

fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{EndpointSlice, Family, build};
    use std::sync::atomic::{AtomicU32, Ordering};

    /// Counts how often its maps are gone through.
    #[derive(Default)]
    struct Fake(AtomicU32);

    impl KernelStats for Fake {
        fn counters(&self) -> Vec<HookCount> {
            let count = |packets, bytes| HookCounter { packets, bytes };
            vec![
                HookCount { reason: DropReason::Forwarded, hook: hook::FROM_POD, count: count(10, 1000) },
                HookCount { reason: DropReason::Forwarded, hook: hook::TUNNEL_IN, count: count(3, 300) },
                HookCount { reason: DropReason::NoBackend, hook: hook::FROM_POD, count: count(2, 148) },
                HookCount { reason: DropReason::Spoofed, hook: hook::OVERLAY_IN, count: count(1, 60) },
            ]
        }

        fn maps(&self) -> Vec<MapFill> {
            self.0.fetch_add(1, Ordering::Relaxed);
            vec![MapFill { name: "rn_ct4_tcp", used: 7, max: 131_072 }]
        }
    }

    fn lines(metrics: &Metrics) -> Vec<String> {
        metrics.encode().expect("encoded").lines().map(str::to_owned).collect()
    }

    #[test]
    fn names_are_those_that_dashboards_ask_for() {
        let metrics = Metrics::default();
        metrics.received(&build::service("web", &[]).apply());
        let slice = build::slice("web-1", "web", Family::V4);
        metrics.received(&EndpointSlice { triggered: Some(SystemTime::now()), ..slice.clone() }.apply());
        metrics.synced(Duration::from_millis(3));
        metrics.received(&slice.clone().apply());
        for event in [Event::Restart(Kind::Slice), slice.apply(), Event::Synced(Kind::Slice)] {
            metrics.received(&event);
        }
        metrics.healthz(200);
        metrics.livez(503);
        metrics.set_no_local_endpoints("internal", 0);
        metrics.set_no_local_endpoints("external", 3);
        metrics.map_writes(12);
        metrics.map_repaired("rn_svc4_v2");
        let fill = |name| MapFill { name, used: 5, max: 16 };
        let maps = [fill("rn_policy_pods"), fill("rn_policy_cidrs"), fill("rn_policy_rules")];
        let figures = PolicyFigures { sets: 2, classes: 3, generation: 4, maps };
        metrics.policies_applied(Duration::from_millis(3), &figures);
        metrics.set_ready(true);
        metrics.set_overlay_path(Some(OverlayPath::Device));
        metrics.set_overlay_path(Some(OverlayPath::Programs));
        metrics.source_event(Kind::Slice);
        metrics.set_source_silence(Box::new(|kind| {
            (kind != Kind::Namespace).then(|| Duration::from_secs(if kind == Kind::Node { 7 } else { 0 }))
        }));
        metrics.set_unsupported(Feature::HostPort, 2);
        metrics.set_kernel_stats(Arc::new(Fake::default()));
        metrics.count_entries();
        let lines = lines(&metrics);
        for want in [
            "kubeproxy_sync_proxy_rules_duration_seconds_count 1",
            "kubeproxy_sync_proxy_rules_duration_seconds_bucket{le=\"0.002\"} 0",
            "kubeproxy_sync_proxy_rules_duration_seconds_bucket{le=\"0.004\"} 1",
            "kubeproxy_sync_proxy_rules_service_changes_total 1",
            "kubeproxy_sync_proxy_rules_service_changes_pending 0",
            "kubeproxy_sync_proxy_rules_endpoint_changes_total 2",
            "kubeproxy_sync_proxy_rules_endpoint_changes_pending 2",
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{traffic_policy=\"internal\"} 0",
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{traffic_policy=\"external\"} 3",
            "# TYPE kubeproxy_sync_proxy_rules_no_local_endpoints_total gauge",
            "kubeproxy_network_programming_duration_seconds_count 1",
            "kubeproxy_network_programming_duration_seconds_bucket{le=\"0.25\"} 1",
            "kubeproxy_network_programming_duration_seconds_bucket{le=\"300.0\"} 1",
            "kubeproxy_proxy_healthz_total{code=\"200\"} 1",
            "kubeproxy_proxy_livez_total{code=\"503\"} 1",
            "rustnet_ready 1",
            "rustnet_overlay_path{path=\"programs\"} 1",
            "rustnet_overlay_path{path=\"device\"} 0",
            "rustnet_unsupported{feature=\"host_port\"} 2",
            "rustnet_map_writes_total 12",
            "rustnet_map_repairs_total{map=\"rn_svc4_v2\"} 1",
            "rustnet_policy_apply_duration_seconds_count 1",
            "rustnet_policy_apply_duration_seconds_bucket{le=\"0.004\"} 1",
            "rustnet_policy_sets 2",
            "rustnet_policy_classes 3",
            "rustnet_policy_generation 4",
            "rustnet_policy_entries{map=\"rn_policy_pods\"} 5",
            "rustnet_policy_capacity{map=\"rn_policy_rules\"} 16",
            "rustnet_source_events_total{kind=\"EndpointSlice\"} 1",
            "rustnet_source_silence_seconds{kind=\"Node\"} 7.0",
            "rustnet_drop_packets_total{reason=\"no_backend\",hook=\"from_pod\"} 2",
            "rustnet_drop_bytes_total{reason=\"spoofed\",hook=\"overlay_in\"} 60",
            "rustnet_forward_packets_total{hook=\"from_pod\"} 10",
            "rustnet_forward_packets_total{hook=\"tunnel_in\"} 3",
            "rustnet_map_entries{map=\"rn_ct4_tcp\"} 7",
            "rustnet_map_max_entries{map=\"rn_ct4_tcp\"} 131072",
            "# EOF",
        ] {
            assert!(lines.iter().any(|line| line == want), "{want} is missing in\n{}", lines.join("\n"));
        }
        for prefix in ["kubeproxy_sync_proxy_rules_last_timestamp_seconds 1", "process_resident_memory_bytes "] {
            assert!(lines.iter().any(|line| line.starts_with(prefix)), "{prefix}");
        }
    }

    /// Before, each scrape went through all maps: 0.1 s of CPU when they are full.
    #[test]
    fn a_scrape_goes_through_no_map() {
        let (metrics, fake) = (Metrics::default(), Arc::new(Fake::default()));
        metrics.set_kernel_stats(Arc::clone(&fake) as Arc<dyn KernelStats>);
        metrics.count_entries();
        for _ in 0..10 {
            assert!(lines(&metrics).contains(&"rustnet_map_entries{map=\"rn_ct4_tcp\"} 7".to_owned()));
        }
        assert_eq!(fake.0.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn the_largest_bucket_is_kube_proxys() {
        let lines = lines(&Metrics::default());
        let buckets: Vec<_> = lines.iter().filter(|line| line.contains("rules_duration_seconds_bucket")).collect();
        assert_eq!(buckets.len(), 16, "15 and +Inf");
        assert!(buckets[14].contains("16.384"), "{}", buckets[14]);
    }

    #[test]
    fn programming_buckets_are_kube_proxys() {
        let buckets: Vec<_> = programming_buckets().collect();
        assert_eq!(buckets[..4], [0.25, 0.5, 1.0, 2.0]);
        assert_eq!(buckets[60..63], [59.0, 60.0, 65.0]);
        assert_eq!(buckets[72..], [115.0, 120.0, 150.0, 180.0, 210.0, 240.0, 270.0, 300.0]);
        assert!(buckets.is_sorted(), "{buckets:?}");
    }

    #[test]
    fn nothing_ends_in_total_twice() {
        let metrics = Metrics::default();
        metrics.set_kernel_stats(Arc::new(Fake::default()));
        assert!(!metrics.encode().expect("encoded").contains("_total_total"));
    }
}
