//! What is counted, and how Prometheus reads it.
//!
//! kube-proxy's names stand where they mean the same, so that dashboards go on working; the rest begins with `rustnet_`.
//! The encoder appends `_total` to counters: names are registered without it. What lives in the maps is read through
//! [`KernelStats`] when somebody scrapes.

use crate::source::Kind;
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
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

/// What the kernel side can tell. Implemented on the pinned maps; asked on every scrape, so it must be cheap.
pub trait KernelStats: Send + Sync + 'static {
    /// All elements of `rn_counters` that are not zero, summed over CPUs.
    fn counters(&self) -> Vec<HookCount>;
    /// How full the maps are.
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

/// All metrics of the agent. Cheap to clone; clones count together.
#[derive(Clone, Debug, Default)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    sync_duration: Histogram,
    last_sync: Gauge<f64, AtomicU64>,
    service_changes: Counter,
    service_changes_pending: Gauge,
    endpoint_changes: Counter,
    endpoint_changes_pending: Gauge,
    healthz: Family<Code, Counter>,
    livez: Family<Code, Counter>,
    map_writes: Counter,
    map_repairs: Family<MapLabel, Counter>,
    ready: Gauge,
    source_events: Family<KindLabel, Counter>,
    source_relists: Family<KindLabel, Counter>,
    source_errors: Family<KindLabel, Counter>,
    source_synced: Family<KindLabel, Gauge>,
    source_silence: OnceLock<Silence>,
    kernel: OnceLock<Kernel>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Code {
    code: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MapLabel {
    map: &'static str,
}

impl From<Kind> for KindLabel {
    fn from(kind: Kind) -> Self {
        Self { kind: kind.to_string() }
    }
}

impl Default for Inner {
    fn default() -> Self {
        Self {
            // kube-proxy's buckets: 1 ms, doubled 14 times.
            sync_duration: Histogram::new(exponential_buckets(0.001, 2.0, 15)),
            last_sync: Gauge::default(),
            service_changes: Counter::default(),
            service_changes_pending: Gauge::default(),
            endpoint_changes: Counter::default(),
            endpoint_changes_pending: Gauge::default(),
            healthz: Family::default(),
            livez: Family::default(),
            map_writes: Counter::default(),
            map_repairs: Family::default(),
            ready: Gauge::default(),
            source_events: Family::default(),
            source_relists: Family::default(),
            source_errors: Family::default(),
            source_synced: Family::default(),
            source_silence: OnceLock::new(),
            kernel: OnceLock::new(),
        }
    }
}

impl Metrics {
    /// A Service has changed and waits to be applied.
    pub fn service_changed(&self) {
        self.0.service_changes.inc();
        self.0.service_changes_pending.inc();
    }

    /// An EndpointSlice has changed and waits to be applied.
    pub fn endpoints_changed(&self) {
        self.0.endpoint_changes.inc();
        self.0.endpoint_changes_pending.inc();
    }

    /// This many map writes have been made.
    pub fn map_writes(&self, writes: u64) {
        self.0.map_writes.inc_by(writes);
    }

    /// An entry of a map was not as the agent had written it, and was written again.
    pub fn map_repaired(&self, map: &'static str) {
        self.0.map_repairs.get_or_create(&MapLabel { map }).inc();
    }

    /// From now on the kernel side can be asked. The first caller wins.
    pub fn set_kernel_stats(&self, stats: Arc<dyn KernelStats>) {
        let _ = self.0.kernel.set(Kernel(stats));
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

    /// From now on it can be asked for how long the source's server has sent nothing of a kind. The first caller wins.
    pub fn set_source_silence(&self, silence: Box<dyn Fn(Kind) -> Option<Duration> + Send + Sync>) {
        let _ = self.0.source_silence.set(Silence(silence));
    }

    pub(crate) fn synced(&self, took: Duration) {
        self.0.sync_duration.observe(took.as_secs_f64());
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.0.last_sync.set(now.as_secs_f64());
        self.0.service_changes_pending.set(0);
        self.0.endpoint_changes_pending.set(0);
    }

    pub(crate) fn set_ready(&self, ready: bool) {
        self.0.ready.set(i64::from(ready));
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
        proxy.register("proxy_healthz", "Answers of /healthz", it.healthz.clone());
        proxy.register("proxy_livez", "Answers of /livez", it.livez.clone());

        let own = registry.sub_registry_with_prefix("rustnet");
        own.register("build", "The agent's version", Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]));
        own.register("ready", "1 when the agent is ready", it.ready.clone());
        own.register("map_writes", "Writes to the maps of services and peers", it.map_writes.clone());
        let help = "Entries of the maps that somebody else had changed, written again";
        own.register("map_repairs", help, it.map_repairs.clone());
        own.register("source_events", "Objects applied or deleted by the source", it.source_events.clone());
        own.register("source_relists", "Full lists begun by the source", it.source_relists.clone());
        own.register("source_errors", "Failures of the source, each followed by another try", it.source_errors.clone());
        own.register("source_synced", "1 once the full list has been delivered", it.source_synced.clone());
        if let Some(Silence(of)) = it.source_silence.get() {
            let silence = Family::<KindLabel, Gauge<f64, AtomicU64>>::default();
            for (kind, time) in Kind::ALL.into_iter().filter_map(|kind| Some((kind, of(kind)?))) {
                silence.get_or_create(&kind.into()).set(time.as_secs_f64());
            }
            own.register_with_unit(
                "source_silence",
                "Time since the API server last sent anything",
                Unit::Seconds,
                silence,
            );
        }
        if let Some(kernel) = it.kernel.get() {
            registry.register_collector(Box::new(kernel.clone()));
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
        let (forwarded, dropped): (Vec<_>, Vec<_>) =
            counters.into_iter().partition(|it| it.reason == DropReason::Forwarded);
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
        }
        let maps = self.0.maps();
        let fills: [Column<MapFill>; 2] = [
            ("rustnet_map_entries", "Entries in use", |map| map.used),
            ("rustnet_map_max_entries", "Entries there is room for", |map| map.max),
        ];
        for (name, help, value) in fills {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for map in &maps {
                ConstGauge::new(value(map)).encode(family.encode_family(&[("map", map.name)])?)?;
            }
        }
        Ok(())
    }
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

    struct Fake;

    impl KernelStats for Fake {
        fn counters(&self) -> Vec<HookCount> {
            let count = |packets, bytes| HookCounter { packets, bytes };
            vec![
                HookCount { reason: DropReason::Forwarded, hook: hook::FROM_POD, count: count(10, 1000) },
                HookCount { reason: DropReason::NoBackend, hook: hook::FROM_POD, count: count(2, 148) },
                HookCount { reason: DropReason::Spoofed, hook: hook::OVERLAY_IN, count: count(1, 60) },
            ]
        }

        fn maps(&self) -> Vec<MapFill> {
            vec![MapFill { name: "rn_ct4_tcp", used: 7, max: 131_072 }]
        }
    }

    fn lines(metrics: &Metrics) -> Vec<String> {
        metrics.encode().expect("encoded").lines().map(str::to_owned).collect()
    }

    #[test]
    fn names_are_those_that_dashboards_ask_for() {
        let metrics = Metrics::default();
        metrics.service_changed();
        metrics.endpoints_changed();
        metrics.synced(Duration::from_millis(3));
        metrics.endpoints_changed();
        metrics.healthz(200);
        metrics.livez(503);
        metrics.map_writes(12);
        metrics.map_repaired("rn_svc4_v2");
        metrics.set_ready(true);
        metrics.source_event(Kind::Slice);
        metrics.set_source_silence(Box::new(|kind| (kind == Kind::Node).then_some(Duration::from_secs(7))));
        metrics.set_kernel_stats(Arc::new(Fake));
        let lines = lines(&metrics);
        for want in [
            "kubeproxy_sync_proxy_rules_duration_seconds_count 1",
            "kubeproxy_sync_proxy_rules_duration_seconds_bucket{le=\"0.002\"} 0",
            "kubeproxy_sync_proxy_rules_duration_seconds_bucket{le=\"0.004\"} 1",
            "kubeproxy_sync_proxy_rules_service_changes_total 1",
            "kubeproxy_sync_proxy_rules_service_changes_pending 0",
            "kubeproxy_sync_proxy_rules_endpoint_changes_total 2",
            "kubeproxy_sync_proxy_rules_endpoint_changes_pending 1",
            "kubeproxy_proxy_healthz_total{code=\"200\"} 1",
            "kubeproxy_proxy_livez_total{code=\"503\"} 1",
            "rustnet_ready 1",
            "rustnet_map_writes_total 12",
            "rustnet_map_repairs_total{map=\"rn_svc4_v2\"} 1",
            "rustnet_source_events_total{kind=\"EndpointSlice\"} 1",
            "rustnet_source_silence_seconds{kind=\"Node\"} 7.0",
            "rustnet_drop_packets_total{reason=\"no_backend\",hook=\"from_pod\"} 2",
            "rustnet_drop_bytes_total{reason=\"spoofed\",hook=\"overlay_in\"} 60",
            "rustnet_forward_packets_total{hook=\"from_pod\"} 10",
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

    #[test]
    fn the_largest_bucket_is_kube_proxys() {
        let lines = lines(&Metrics::default());
        let buckets: Vec<_> = lines.iter().filter(|line| line.contains("duration_seconds_bucket")).collect();
        assert_eq!(buckets.len(), 16, "15 and +Inf");
        assert!(buckets[14].contains("16.384"), "{}", buckets[14]);
    }

    #[test]
    fn nothing_ends_in_total_twice() {
        let metrics = Metrics::default();
        metrics.set_kernel_stats(Arc::new(Fake));
        assert!(!metrics.encode().expect("encoded").contains("_total_total"));
    }
}
