//! `rustnetctl connectivity`: pods on all nodes ask each other, the nodes, Services and names, and each row says whether the
//! answer was the right one. It needs a cluster's credentials, and neither an agent nor maps on the machine where it runs.
//!
//! | File | Job |
//! |---|---|
//! | `row` | data: nodes, probes, scenarios, rows |
//! | `plan` | nodes, probes and families -> rows; pure |
//! | `objects` | the objects of a run; pure |
//! | `cluster` | the API server: objects, and questions through its proxy for pods |
//! | `wire` | questions and answers between the command and its probes |
//! | `probe` | what runs in the pods |
//! | `verdict` | answer -> failure and remedy; pure |
//! | `evidence` | counters of drops; pure |
//! | `report` | progress, table and JSON |
//! | `stage` | the course of a run |

mod cluster;
mod evidence;
mod objects;
mod plan;
pub mod probe;
mod report;
mod row;
mod stage;
mod verdict;
mod wire;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use tokio::signal::unix::{SignalKind, signal};

use super::output::{CannotRun, Output};
use cluster::Cluster;
use objects::Run;
use report::Progress;
use row::Scenario;

/// Options.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The namespace to create; it is removed at the end
    #[arg(long, value_name = "NAME", default_value = "rustnet-connectivity", value_parser = parse_namespace)]
    namespace: String,
    /// The image of the probes [default: that of rustnet's DaemonSet]
    #[arg(long)]
    image: Option<String>,
    /// The kubeconfig [default: as kubectl; else the pod's service account]
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// A context of the kubeconfig [default: the current one]
    #[arg(long, value_name = "NAME")]
    context: Option<String>,
    /// Only these nodes, by commas [default: the first eight that are ready]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    nodes: Vec<String>,
    /// Scenarios to try, by commas, as in column SCENARIO [default: all]
    #[arg(long, value_name = "NAME", value_delimiter = ',', hide_possible_values = true)]
    scenario: Vec<Scenario>,
    /// TCP port of the probes, which must be free on the nodes, and the next one for TCP and UDP
    #[arg(long, default_value_t = 19_960, value_parser = clap::value_parser!(u16).range(1024..=65_534))]
    port: u16,
    /// Seconds to wait for the probes to start, and for the namespace to go
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    timeout: u64,
    /// Have each pod open a TCP connection to a server outside of the cluster
    #[arg(long, value_name = "HOST:PORT", value_parser = parse_world)]
    world: Option<(String, u16)>,
    /// Remove a namespace that an earlier run left
    #[arg(long)]
    replace: bool,
    /// Leave the namespace and all that is in it
    #[arg(long)]
    keep: bool,
}

/// A name that fits into a path of the API server: a DNS label.
fn parse_namespace(text: &str) -> Result<String, String> {
    let is_label = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let is_well =
        (1..=63).contains(&text.len()) && text.chars().all(is_label) && !text.starts_with('-') && !text.ends_with('-');
    if is_well { Ok(text.to_owned()) } else { Err("no name of a namespace: up to 63 of a-z, 0-9 and -".to_owned()) }
}

fn parse_world(text: &str) -> Result<(String, u16), String> {
    let (host, port) = text.rsplit_once(':').ok_or("no port: give HOST:PORT, or [ADDRESS]:PORT")?;
    let host = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
    let port = port.parse().ok().filter(|port| *port > 0).ok_or("the port is no number from 1 to 65535")?;
    if wire::is_host(host) { Ok((host.to_owned(), port)) } else { Err("neither an address nor a name".to_owned()) }
}

/// Runs all rows; true if none failed.
///
/// # Errors
/// [`CannotRun`]: no row could be tried, or the run was interrupted.
pub fn run(args: &Args, out: &Output) -> Result<bool> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start a runtime")?;
    let report = runtime.block_on(run_all(args, out)).map_err(|error| CannotRun(format!("{error:#}")))?;
    report.print(out)?;
    Ok(report.ok)
}

async fn run_all(args: &Args, out: &Output) -> Result<report::Report> {
    let progress = Progress::new(out);
    let limit = Duration::from_secs(args.timeout);
    let cluster = Cluster::connect(args.kubeconfig.as_deref(), args.context.as_deref()).await?;
    progress.begin("looking at the cluster");
    let agents = cluster.agents().await?;
    let image = args.image.clone().or_else(|| agents.image.clone()).context(
        "no DaemonSet has the label app.kubernetes.io/name=rustnet-agent: install rustnet, or give the image of the probes with --image",
    )?;
    let chosen = stage::choose(cluster.nodes().await?, &agents, &args.nodes)?;
    let namespace = &args.namespace;
    cluster.clear(namespace, args.replace, limit).await?;
    let id = cluster::make_token()?[..6].to_owned();
    let run = Run { namespace: namespace.clone(), image, port: args.port, token: cluster::make_token()?, id };
    // From here on a signal must not leave anything behind.
    let mut interrupts = Interrupts::new()?;
    let uid = cluster.create_namespace(&run).await?;
    let stage = stage::Stage {
        cluster: &cluster,
        agents: &agents,
        run: &run,
        progress: &progress,
        limit,
        scenarios: &args.scenario,
    };
    let result = tokio::select! {
        result = stage.run(chosen, args.world.clone()) => result,
        () = interrupts.next() => Err(anyhow!("interrupted")),
    };
    if args.keep {
        progress.say(&format!("namespace {namespace} stays: `kubectl delete namespace {namespace}` removes it"));
        return result;
    }
    progress.begin(&format!("removing namespace {namespace}"));
    let removed = tokio::select! {
        removed = cluster.remove(namespace, uid, limit) => removed,
        () = interrupts.next() => Err(anyhow!("interrupted; `kubectl delete namespace {namespace}` removes what is left")),
    };
    match (result, removed) {
        (result, Ok(())) => {
            progress.begin("");
            result
        }
        (Ok(report), Err(error)) => {
            progress.say(&format!("warning: {error:#}"));
            Ok(report)
        }
        (Err(error), Err(other)) => bail!("{error:#}; and {other:#}"),
    }
}

/// SIGINT and SIGTERM.
struct Interrupts {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

impl Interrupts {
    fn new() -> Result<Self> {
        let of = |kind| signal(kind).context("cannot wait for signals");
        Ok(Self { interrupt: of(SignalKind::interrupt())?, terminate: of(SignalKind::terminate())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_outside_are_addresses_or_names() {
        for (text, want) in [
            ("192.0.2.1:443", Ok(("192.0.2.1", 443))),
            ("[2001:db8::1]:80", Ok(("2001:db8::1", 80))),
            ("example.org:443", Ok(("example.org", 443))),
            ("example.org", Err("no port")),
            ("example.org:0", Err("the port")),
            ("a/b:1", Err("neither")),
        ] {
            match (parse_world(text), want) {
                (Ok(found), Ok((host, port))) => assert_eq!(found, (host.to_owned(), port)),
                (Err(found), Err(word)) => assert!(found.contains(word), "{text}: {found}"),
                (found, _) => panic!("{text}: {found:?}"),
            }
        }
    }

    #[test]
    fn names_of_namespaces_fit_into_a_path() {
        assert!(parse_namespace("rustnet-connectivity").is_ok());
        for text in ["", "A", "a/b", "-a", "a."] {
            assert!(parse_namespace(text).is_err(), "{text}");
        }
    }
}
