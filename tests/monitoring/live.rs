//! A scrape of a live agent, and the metrics that such an agent serves only after something has happened.

use super::exposed::Exposed;
use anyhow::{Context as _, Result, anyhow, ensure};
use rustnet_agent::config::OverlayPath;
use rustnet_agent::health::Health;
use rustnet_agent::metrics::{HookCount, KernelStats, MapFill};
use rustnet_agent::model::Feature;
use rustnet_agent::source::Kind;
use rustnet_common::drop::{Counter, DropReason, hook};
use rustnet_common::names;
use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use testkit::client::ask;
use testkit::manifest::Service;
use testkit::pod::PORT;
use testkit::{Fabric, Proto, Setup, wait};

const METRICS: &str = "127.0.0.1:9962";
/// Where kube-proxy's `/healthz` and `/livez` are.
const PROXY: &str = "127.0.0.1:10256";

/// What the agent of these tests cannot serve: its source is a directory, and nobody changes its maps.
const NOT_YET: [&str; 8] = [
    "rustnet_map_repairs_total",
    "rustnet_policy_audited_bytes_total",
    "rustnet_policy_audited_packets_total",
    "rustnet_source_errors_total",
    "rustnet_source_events_total",
    "rustnet_source_relists_total",
    "rustnet_source_silence_seconds",
    "rustnet_source_synced",
];

/// All series of an agent, with all values of their labels.
pub fn all() -> Result<Exposed> {
    let mut all = registered()?;
    all.merge(&scraped()?)?;
    // The agent answers with one of these; the live one is well.
    for name in ["kubeproxy_proxy_healthz_total", "kubeproxy_proxy_livez_total"] {
        let series = all.0.get_mut(name).with_context(|| format!("{name} is not there"))?;
        series.labels.insert("code".to_owned(), ["200", "503"].map(str::to_owned).into());
    }
    Ok(all)
}

/// What an agent of a node with one pod and one Service serves.
fn scraped() -> Result<Exposed> {
    static SCRAPED: OnceLock<Result<String, String>> = OnceLock::new();
    let text = SCRAPED.get_or_init(|| scrape().map_err(|error| format!("{error:#}")));
    Exposed::parse(text.as_ref().map_err(|error| anyhow!("no scrape of a live agent: {error}"))?)
}

fn scrape() -> Result<String> {
    let fabric = Fabric::start(Setup { nodes: 1, ..Setup::default() })?;
    scrape_of(&fabric).map_err(|error| error.context(fabric.logs()))
}

fn scrape_of(fabric: &Fabric) -> Result<String> {
    let node = fabric.node(1);
    let pod = node.add_pod("a")?;
    // Nobody is behind it: refusals are drops, which a node without one has no series for.
    let vips: [IpAddr; 2] = [Ipv4Addr::new(10, 96, 1, 1).into(), Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 1, 1).into()];
    fabric.manifests().apply(&Service::new("nobody", &vips, 80, PORT))?;
    for vip in vips {
        wait::until("the Service refuses", || {
            ask(pod.netns(), Proto::Udp, SocketAddr::new(vip, 80), 1)?.all_failed(ErrorKind::ConnectionRefused)
        })?;
    }
    for path in ["/healthz", "/livez"] {
        let answer = node.http_get(PROXY.parse()?, path)?;
        ensure!(answer.starts_with("HTTP/1.1 200"), "{path} says: {answer}");
    }
    wait::until("maps are counted, and the refusals", || {
        let answer = node.http_get(METRICS.parse()?, "/metrics")?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no body")?;
        ensure!(head.starts_with("HTTP/1.1 200"), "/metrics says: {answer}");
        let content = head.to_lowercase();
        ensure!(content.contains("content-type: application/openmetrics-text; version=1.0.0"), "{head}");
        for series in ["rustnet_map_entries{", "rustnet_drop_packets_total{reason=\"no_backend\""] {
            ensure!(body.contains(series), "{series} is not there yet");
        }
        Ok(body.to_owned())
    })
}

/// Every drop at every hook.
struct Everything;

impl KernelStats for Everything {
    fn counters(&self) -> Vec<HookCount> {
        let count = Counter { packets: 1, bytes: 1 };
        let hooks = 0..hook::NAMES.len() as u8;
        let at = |hook| DropReason::ALL.iter().map(move |reason| HookCount { reason: *reason, hook, count });
        hooks.flat_map(at).collect()
    }

    /// The live agent's are the real ones.
    fn maps(&self) -> Vec<MapFill> {
        Vec::new()
    }
}

/// The same metrics after all that can happen, from the agent's own code.
fn registered() -> Result<Exposed> {
    let health = Health::default();
    let metrics = &health.metrics;
    health.applied(Duration::ZERO);
    for map in names::map::ALL {
        metrics.map_repaired(map);
    }
    for feature in Feature::ALL {
        metrics.set_unsupported(feature, 1);
    }
    for policy in ["internal", "external"] {
        metrics.set_no_local_endpoints(policy, 1);
    }
    for kind in Kind::ALL {
        metrics.source_event(kind);
        metrics.source_restarted(kind);
        metrics.source_synced(kind);
        metrics.source_failed(kind);
    }
    metrics.set_source_silence(Box::new(|_| Some(Duration::ZERO)));
    metrics.set_overlay_path(Some(OverlayPath::Programs));
    metrics.set_kernel_stats(Arc::new(Everything));
    Exposed::parse(&metrics.encode()?)
}

/// What [`registered`] adds to a scrape is no more than what cannot happen here.
#[test]
fn a_live_agent_serves_all_but_what_has_not_happened() -> Result<()> {
    let (live, registered) = (scraped()?, registered()?);
    let missing: BTreeSet<_> = registered.0.keys().filter(|name| !live.0.contains_key(*name)).collect();
    assert_eq!(missing.into_iter().collect::<Vec<_>>(), NOT_YET);
    for (name, series) in &live.0 {
        let Some(same) = registered.0.get(name) else { continue };
        assert_eq!(series.kind, same.kind, "{name}");
        assert!(series.labels.keys().eq(same.labels.keys()), "{name}: {series:?}");
    }
    Ok(())
}
