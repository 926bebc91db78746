//! `rustnet-agent`: reads the settings, starts the source, the endpoints and the reconcile loop, and ends on a signal.
//!
//! Ending means to stop and nothing else: maps, programs, links, routes and the CNI configuration stay, so that packets go
//! on. `rustnetctl cleanup` is what removes them.

use anyhow::Context as _;
use rustnet_agent::api::{self, NodeStatus, reports};
use rustnet_agent::config::{Config, LogFormat, Source};
use rustnet_agent::health::Health;
use rustnet_agent::reconcile::{self, Surroundings};
use rustnet_agent::source::kube::KubeSource;
use rustnet_agent::source::{Event, manifests};
use rustnet_agent::{bpf, http};
use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::sync::Arc;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tracing_subscriber::EnvFilter;

/// Events on their way to the reconcile loop. Small: a full list must not pile up in memory.
const EVENTS: usize = 256;

fn main() -> ExitCode {
    let config = match Config::from_process() {
        Ok(config) => config,
        Err(error) => {
            eprintln!("error: {error:#}");
            return ExitCode::from(2);
        }
    };
    log_to_stderr(&config);
    share_heaps();
    raise_file_limit();
    match start(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(config: Config) -> anyhow::Result<()> {
    if config.prepare {
        return bpf::fs::prepare(&config.bpffs);
    }
    // Two: while the loop is busy with the kernel, somebody must answer the probes.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(4)
        .enable_all()
        .build()
        .context("cannot start threads")?;
    let result = runtime.block_on(run(Arc::new(config)));
    // Whatever still runs (a name look-up, a scrape) has nothing to lose.
    runtime.shutdown_background();
    result
}

async fn run(config: Arc<Config>) -> anyhow::Result<()> {
    tracing::info!(version = env!("CARGO_PKG_VERSION"), node = config.node_name, routing = ?config.routing, "starting");
    let health = Arc::new(Health::default());
    let (stop, shutdown) = watch::channel(false);
    end_on_signals(stop)?;
    let endpoints = [
        (config.health_addr, "health-addr", http::probes(Arc::clone(&health))),
        (config.healthz_bind_address, "healthz-bind-address", http::kube_proxy(Arc::clone(&health))),
        (config.metrics_addr, "metrics-addr", http::metrics(Arc::clone(&health))),
    ];
    for (addr, flag, router) in endpoints {
        if let Some(addr) = addr {
            tokio::spawn(http::serve(router, addr, flag, shutdown.clone()));
        }
    }
    let (sender, events) = mpsc::channel(EVENTS);
    start_source(&config, sender, &health, &shutdown);
    tokio::spawn(trim_after_first_sync(Arc::clone(&health)));
    reconcile::run(Surroundings::default(), config, events, health, shutdown).await?;
    tracing::info!("stopped; forwarding goes on");
    Ok(())
}

fn start_source(config: &Config, events: mpsc::Sender<Event>, health: &Arc<Health>, shutdown: &watch::Receiver<bool>) {
    match &config.source {
        Source::Manifests(dir) => {
            tokio::spawn(manifests::run(dir.clone(), events));
        }
        Source::Kube(server) => {
            let (server, name): (_, Arc<str>) = (server.clone(), config.node_name.as_str().into());
            let (health, shutdown, has_policies) = (Arc::clone(health), shutdown.clone(), config.network_policy);
            tokio::spawn(async move {
                let Some(connection) = api::connect_in_time(&server, &events).await else { return };
                let node_status = NodeStatus::new(&name);
                let client = connection.client.clone();
                tokio::spawn(node_status.clone().run(client, Arc::clone(&health), shutdown.clone()));
                tokio::spawn(reports::run(connection.clone(), name, Arc::clone(&health), shutdown));
                let source = KubeSource::new(connection, health.metrics.clone(), node_status);
                tokio::spawn(source.with_policies(has_policies).run(events));
            });
        }
    }
}

/// The first SIGTERM or SIGINT asks everything to end; the second ends the process at once, which is as safe.
fn end_on_signals(stop: watch::Sender<bool>) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    tokio::spawn(async move {
        for first in [true, false] {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if first {
                tracing::info!("ending on a signal");
                stop.send_replace(true);
            } else {
                std::process::exit(1);
            }
        }
    });
    Ok(())
}

fn log_to_stderr(config: &Config) {
    let filter = EnvFilter::try_new(&config.log_level).unwrap_or_default();
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours);
    match config.log_format {
        LogFormat::Text => log.with_target(false).init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
}

/// One heap for all threads: with one each, what a list leaves free in one is of no use to the others.
fn share_heaps() {
    #[cfg(target_env = "gnu")]
    // SAFETY: called before there are threads; the option exists in every glibc since 2.10.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Each health check node port is an open file, and many systems begin with 1024 of them: the limit is raised as far as this process
/// may, as Go's runtime does.
fn raise_file_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls get a pointer to a structure of their type that lives longer than they run.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        }
    }
}

/// The first full list passes through memory that is never needed again: it goes back to the system.
async fn trim_after_first_sync(health: Arc<Health>) {
    health.wait_ready().await;
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes no pointers and may be called at any time, from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}
