//! `cluster trial`: what rustnet's own restart, upgrade and removal cost the traffic, counted
//! request by request. The same for an ordinary application's rolling update.

mod bandwidth;
mod connectivity;
mod crowd;
mod ingress;
mod load;
mod policy_latency;
mod static_pod;
mod uninstall;

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::layout::{Cluster, Node};
use super::network::rustnet;
use super::pods::{self, Pod};
use super::settings::Network;
use super::{lifecycle, node, up, wait};
use crate::{image, paths, ui};
use load::{Kind, Load, Stream, Tally};
pub use policy_latency::Options as PolicyLatency;

/// A thing done to the cluster while requests run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Trial {
    /// Nothing: the yardstick
    Nothing,
    /// `kubectl rollout restart` of the agents
    Restart,
    /// Every agent's pod deleted at once
    Delete,
    /// Another image, and back again
    Upgrade,
    /// A rolling update of the application itself
    RollingUpdate,
    /// The last node reboots: what the others carry goes on, and afterwards its pods are back
    Reboot,
    /// Another node comes, gets pods, and goes
    Nodes,
    /// A hundred pods at once on the first node, and their end
    Crowd,
    /// A node joins that has a static pod, which starts before the node has a network
    StaticPod,
    /// Limits by annotations, which containerd hands to the plugin
    Bandwidth,
    /// `rustnetctl connectivity`, and again with a fault
    Connectivity,
    /// A real Ingress controller behind node ports and a load balancer, asked by host name from outside
    Ingress,
    /// Network policies in effect after how long, with probes every millisecond; new pods, too
    PolicyLatency,
    /// The agents removed: forwarding goes on
    Remove,
    /// All of rustnet removed from the nodes, as `deploy/uninstall` tells; no traffic survives that
    Uninstall,
}

/// Another version to upgrade to.
#[derive(clap::Args, Debug)]
pub struct Other {
    /// For `upgrade`: the image of another version, made by its `cargo xtask image`, instead of this one by another name
    #[arg(long = "other", value_name = "FILE")]
    image: Option<PathBuf>,
    /// That version's deploy/, if it differs from this one's
    #[arg(long = "other-deploy", value_name = "DIR", requires = "image")]
    deploy: Option<PathBuf>,
}

/// Those that leave the cluster as it was.
pub const DEFAULT: [Trial; 5] = [Trial::Nothing, Trial::Restart, Trial::Delete, Trial::Upgrade, Trial::RollingUpdate];
/// How much traffic there has to be before and after: less would prove little.
const REQUESTS: u64 = 100;
const PATIENCE: Duration = Duration::from_mins(1);
const AGENT: &str = "daemonset/rustnet-agent";
const SYSTEM: &str = "--namespace=rustnet-system";

/// The command; an error when a request was lost.
#[expect(clippy::print_stdout, reason = "the table is the command's result")]
pub fn run(cluster: &Cluster, trials: &[Trial], other: &Other, latency: &PolicyLatency) -> Result<()> {
    let any = [Trial::Nothing, Trial::RollingUpdate];
    if let Some(trial) = trials.iter().find(|it| cluster.settings.network != Network::Rustnet && !any.contains(it)) {
        bail!("{trial:?}: only for clusters with rustnet");
    }
    if let Some(image) = &other.image {
        cluster.nodes().iter().try_for_each(|node| up::load(cluster, node, image))?;
    }
    let file = cluster.dir.join("trial.yaml");
    fs::write(&file, include_str!("app.yaml"))?;
    let path = file.display().to_string();
    cluster.ask(&["apply", "-f", &path])?;
    cluster.ask(&["--namespace=trial", "rollout", "status", "deployment/web", "--timeout=120s"])?;
    cluster.ask(&["--namespace=trial", "rollout", "status", "daemonset/client", "--timeout=120s"])?;
    let mut lost = 0;
    for trial in trials {
        if let Some(run) = apart(*trial) {
            println!("== {trial:?}\n   {}", run(cluster)?);
            continue;
        }
        if *trial == Trial::PolicyLatency {
            println!("== {trial:?}");
            policy_latency::run(cluster, latency)?;
            continue;
        }
        let streams = streams(cluster, *trial)?;
        let start = Instant::now();
        println!("== {trial:?}");
        let tallies = under_load(&streams, || act(cluster, *trial, other))?;
        println!("   done after {}", ui::seconds(start.elapsed()));
        for (stream, tally) in streams.iter().zip(&tallies) {
            println!("   {}", line(stream, tally));
            lost += tally.lost;
        }
    }
    // Without a network no pod ends.
    if !trials.contains(&Trial::Uninstall) {
        cluster.ask(&["delete", "namespace", "trial", "--timeout=120s"])?;
    }
    if lost > 0 {
        bail!("{lost} requests were lost");
    }
    Ok(())
}

/// A trial that is not about requests lost meanwhile; it returns what to tell of it.
fn apart(trial: Trial) -> Option<fn(&Cluster) -> Result<String>> {
    match trial {
        Trial::Crowd => Some(crowd::run),
        Trial::Bandwidth => Some(bandwidth::run),
        Trial::StaticPod => Some(static_pod::run),
        Trial::Connectivity => Some(connectivity::run),
        Trial::Ingress => Some(ingress::run),
        Trial::Uninstall => Some(uninstall::run),
        _ => None,
    }
}

fn line(stream: &Stream, tally: &Tally) -> String {
    let Tally { sent, lost, gap, servers, error } = tally;
    let error = error.as_ref().map(|text| format!("; {text}")).unwrap_or_default();
    let (name, kind) = (&stream.name, format!("{:?}", stream.kind));
    let gap = gap.as_millis();
    format!(
        "{name:<34} {kind:<15} {sent:>6} sent {lost:>4} lost {gap:>6} ms longest gap, {} servers{error}",
        servers.len()
    )
}

/// Runs the action amid traffic; returns each stream's tally.
fn under_load(streams: &[Stream], action: impl FnOnce() -> Result<()>) -> Result<Vec<Tally>> {
    let loads: Vec<Load> = streams.iter().map(Load::start).collect();
    let more = |loads: &[Load]| {
        let goals: Vec<u64> = loads.iter().map(|load| load.done() + REQUESTS).collect();
        wait::until(PATIENCE, || loads.iter().zip(&goals).all(|(load, goal)| load.done() >= *goal))
    };
    let before = more(&loads);
    let result = if before { action() } else { Ok(()) };
    let after = more(&loads);
    let tallies = loads.into_iter().map(Load::finish).collect::<Result<Vec<_>>>()?;
    result?;
    if !before || !after {
        for (stream, tally) in streams.iter().zip(&tallies) {
            ui::detail(&line(stream, tally));
        }
        bail!("too few requests get through, {} the action", if before { "after" } else { "before" });
    }
    Ok(tallies)
}

fn act(cluster: &Cluster, trial: Trial, other: &Other) -> Result<()> {
    let settled = || cluster.ask(&[SYSTEM, "rollout", "status", AGENT, "--timeout=120s"]).map(drop);
    match trial {
        Trial::Nothing => {
            thread::sleep(Duration::from_secs(10));
            Ok(())
        }
        Trial::Restart => {
            cluster.ask(&[SYSTEM, "rollout", "restart", AGENT])?;
            settled()
        }
        Trial::Delete => {
            cluster.ask(&[SYSTEM, "delete", "pods", "--selector=app.kubernetes.io/name=rustnet-agent"])?;
            settled()
        }
        Trial::Upgrade => {
            if let Some(image) = &other.image {
                // As users go from one release to another: its objects and its image.
                let ours = paths::root().join("deploy");
                rustnet::apply(cluster, image, other.deploy.as_ref().unwrap_or(&ours))?;
                settled()?;
                rustnet::apply(cluster, &rustnet::image(cluster), &ours)?;
                return settled();
            }
            let present =
                cluster.ask(&[SYSTEM, "get", AGENT, "-o", "jsonpath={.spec.template.spec.containers[0].image}"])?;
            // The same programs by another name: what differs between versions is not this trial's subject.
            for node in cluster.nodes() {
                let (from, to) = (format!("docker.io/library/{present}"), format!("{}:trial", image::NAME));
                let tag = ["ctr", "-n", "k8s.io", "images", "tag", "--force", &from, &to];
                node::command(cluster, &node)?.args(tag).capture()?;
            }
            let containers = ["agent=rustnet:trial", "mount-bpffs=rustnet:trial"];
            cluster.kubectl()?.args([SYSTEM, "set", "image", AGENT]).args(containers).capture()?;
            settled()?;
            cluster.ask(&[SYSTEM, "rollout", "undo", AGENT])?;
            settled()
        }
        Trial::RollingUpdate => {
            cluster.ask(&["--namespace=trial", "rollout", "restart", "deployment/web"])?;
            cluster.ask(&["--namespace=trial", "rollout", "status", "deployment/web", "--timeout=180s"])?;
            // The last old pod serves on for a while, and must not be missed when it is gone.
            let old = || {
                let phases = cluster.ask(&["--namespace=trial", "get", "pods", "--selector=app=web", "-o", "name"]);
                phases.is_ok_and(|text| text.lines().count() == 3)
            };
            ensure!(wait::until(PATIENCE, old), "the old pods do not go");
            Ok(())
        }
        Trial::Remove => {
            cluster.ask(&[SYSTEM, "delete", AGENT, "--wait=true"])?;
            let pods = || cluster.ask(&[SYSTEM, "get", "pods", "-o", "name"]);
            ensure!(wait::until(PATIENCE, || pods().is_ok_and(|text| text.is_empty())), "the agents' pods do not go");
            // Long enough for many requests without anybody to look after the tables.
            thread::sleep(Duration::from_secs(10));
            Ok(())
        }
        Trial::Reboot => {
            let nodes = cluster.nodes();
            lifecycle::reboot(cluster, nodes.last().context("no node")?)?;
            everywhere(cluster)
        }
        Trial::Nodes => {
            let larger = lifecycle::scale(cluster, cluster.settings.nodes + 1)?;
            everywhere(&larger)?;
            lifecycle::scale(&larger, cluster.settings.nodes).map(drop)
        }
        Trial::Uninstall
        | Trial::Crowd
        | Trial::Bandwidth
        | Trial::StaticPod
        | Trial::Connectivity
        | Trial::Ingress
        | Trial::PolicyLatency => {
            bail!("not a trial under load")
        }
    }
}

/// Waits until every pod of the trial runs, those of nodes that were away too, and clients of all
/// nodes reach the service and each server. What the API server says of a node's pods is old for a
/// while after that came back: all of it is read again.
fn everywhere(cluster: &Cluster) -> Result<()> {
    let mut result = Ok(());
    wait::until(Duration::from_mins(4), || {
        result = all_reached(cluster);
        result.is_ok()
    });
    result
}

fn all_reached(cluster: &Cluster) -> Result<()> {
    for what in ["daemonset/client", "deployment/web"] {
        cluster.ask(&["--namespace=trial", "rollout", "status", what, "--timeout=60s"])?;
    }
    let format = "jsonpath={range .items[*]}{range .status.podIPs[*]}{.ip} {end}{end}";
    let text = cluster.ask(&["--namespace=trial", "get", "pods", "--selector=app=web", "-o", format])?;
    let servers: Vec<IpAddr> = text.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    let mut targets: Vec<SocketAddr> = servers.into_iter().map(|ip| SocketAddr::new(ip, 8080)).collect();
    targets.extend(services(cluster)?.into_iter().map(|ip| SocketAddr::new(ip, 80)));
    for node in cluster.nodes() {
        let client = pod(cluster, "client", &node)?;
        for to in &targets {
            let stream = Stream { name: client.name.clone(), from: client.netns.clone(), kind: Kind::NewTcp, to: *to };
            load::once(&stream).with_context(|| format!("{} does not reach {to}", stream.name))?;
        }
    }
    Ok(())
}

/// The addresses of the trial's service.
fn services(cluster: &Cluster) -> Result<Vec<IpAddr>> {
    let text = cluster.ask(&["--namespace=trial", "get", "service", "web", "-o", "jsonpath={.spec.clusterIPs[*]}"])?;
    text.split_whitespace().map(str::parse).collect::<Result<_, _>>().map_err(Into::into)
}

fn streams(cluster: &Cluster, trial: Trial) -> Result<Vec<Stream>> {
    let nodes = cluster.nodes();
    let client = pod(cluster, "client", &nodes[0])?;
    // Where a node goes away, only what the others carry can go on.
    let away = trial == Trial::Reboot;
    let far = if away { &nodes[0] } else { nodes.last().context("no node")? };
    let server = pod(cluster, "web", far)?;
    let services = if away { Vec::new() } else { services(cluster)? };
    let mut streams = Vec::new();
    let mut add = |name: String, from: &Path, kinds: &[Kind], to: SocketAddr| {
        let stream = |kind: &Kind| Stream { name: name.clone(), from: from.to_owned(), kind: *kind, to };
        streams.extend(kinds.iter().map(stream));
    };
    // A server's end is the end of its connections, whatever the network does.
    let kinds: &[Kind] = if trial == Trial::RollingUpdate {
        &[Kind::NewTcp, Kind::NewUdp]
    } else {
        &[Kind::NewTcp, Kind::EstablishedTcp, Kind::NewUdp, Kind::EstablishedUdp]
    };
    let host = cluster.netns_file(&nodes[0].name);
    for service in &services {
        let to = SocketAddr::new(*service, 80);
        let family = if service.is_ipv4() { "IPv4" } else { "IPv6" };
        add(format!("{} > service, {family}", client.name), &client.netns, kinds, to);
        add(format!("node {} > service, {family}", nodes[0].name), &host, &[Kind::NewTcp], to);
    }
    if trial != Trial::RollingUpdate {
        for address in &server.addresses {
            let to = SocketAddr::new(*address, 8080);
            let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
            add(format!("{} > {}, {family}", client.name, server.name), &client.netns, &kinds[..2], to);
            // From outside of the cluster, through the pod's node.
            add(format!("outside > {}, {family}", server.name), &cluster.netns_file("cp"), &kinds[..2], to);
        }
    }
    Ok(streams)
}

/// A running pod of this app of the trial on this node.
fn pod(cluster: &Cluster, app: &str, on: &Node) -> Result<Pod> {
    pods::find(cluster, "trial", app, on)
}
