//! `up`: brings a cluster to work, whatever of it runs already.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::components::{self, Component};
use super::layout::{Cluster, Node};
use super::settings::{DNS, Network, Settings};
use super::{images, network, node, pki, relay, status, wait, wires};
use crate::setup::{self, Need};
use crate::{cache, ui};

/// How long one component may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(90);

/// The command.
pub fn run(name: &str, settings: &Settings) -> Result<()> {
    ensure!(name.len() <= 12 && name.starts_with(|c: char| c.is_ascii_lowercase()), "--name: a short word, please");
    let needs = [Need::Build, Need::Network, Need::ApiServer, Need::KubeProxy, Need::Cluster];
    setup::ensure_with(settings.version, &needs)?;
    let cluster = Cluster::new(name, settings.clone());
    if let Some(present) = Cluster::find(name)? {
        ensure!(
            present.settings == *settings,
            "there is a cluster already: {}\n  remedy: cargo xtask cluster down, or the same options as then",
            present.settings
        );
    }
    network::prepare(&cluster)?;
    images::ensure(settings.version)?;
    let start = Instant::now();
    ui::step(&format!("starting {settings}"));
    cluster.keep()?;
    complete(&cluster)?;
    ui::step(&format!("the cluster is up, after {}", ui::seconds(start.elapsed())));
    Ok(())
}

/// Starts what does not run, and waits until all of it works.
pub fn complete(cluster: &Cluster) -> Result<()> {
    let test_images = images::ensure(cluster.settings.version)?;
    wires::make(cluster)?;
    pki::make(cluster)?;
    let outside = relay::start(cluster)?;
    pki::kubeconfigs(cluster, &outside)?;
    let nodes = cluster.nodes();
    nodes.iter().try_for_each(|node| node::start(cluster, node))?;
    let (etcd, apiserver) = (components::etcd(cluster)?, components::apiserver(cluster)?);
    etcd.start(cluster)?;
    apiserver.start(cluster)?;
    let runtimes = each(&nodes, |node| components::containerd(cluster, node))?;
    runtimes.iter().try_for_each(|runtime| runtime.start(cluster))?;
    // What the machine has two hands for: images into the nodes, while the control plane starts.
    let files = [network::images(cluster), vec![test_images]].concat();
    thread::scope(|scope| {
        let load = |(node, runtime): (_, &Component)| -> Result<()> {
            runtime.wait(cluster, PATIENCE)?;
            files.iter().try_for_each(|file| load(cluster, node, file))
        };
        let loads: Vec<_> = nodes.iter().zip(&runtimes).map(|pair| scope.spawn(move || load(pair))).collect();
        let control = control_plane(cluster, &etcd, &apiserver);
        // A kubelet ends when its runtime is not there in its first moment.
        let runtimes = control.and_then(|()| runtimes.iter().try_for_each(|runtime| runtime.wait(cluster, PATIENCE)));
        let kubelets = runtimes.and_then(|()| kubelets(cluster, &nodes));
        for load in loads {
            load.join().map_err(|_| anyhow!("loading images panicked"))??;
        }
        kubelets
    })?;
    ui::detail("nodes are registered");
    network::install(cluster)?;
    if cluster.settings.network == Network::None {
        return Ok(());
    }
    dns(cluster)?;
    ready(cluster)
}

fn control_plane(cluster: &Cluster, etcd: &Component, apiserver: &Component) -> Result<()> {
    etcd.wait(cluster, PATIENCE)?;
    apiserver.wait(cluster, PATIENCE)?;
    ui::detail("the API server is ready");
    // They end when the API server is not there in their first seconds.
    let rest = [components::controller_manager(cluster)?, components::scheduler(cluster)?];
    rest.iter().try_for_each(|component| component.start(cluster))
}

/// Starts the kubelets and waits until the nodes have pod ranges.
fn kubelets(cluster: &Cluster, nodes: &[Node]) -> Result<()> {
    let kubelets = each(nodes, |node| components::kubelet(cluster, node))?;
    kubelets.iter().try_for_each(|kubelet| kubelet.start(cluster))?;
    kubelets.iter().try_for_each(|kubelet| kubelet.wait(cluster, PATIENCE))?;
    let ranges = || cluster.ask(&["get", "nodes", "-o", "jsonpath={range .items[*]}{.spec.podCIDR}{\"\\n\"}{end}"]);
    let known = || ranges().is_ok_and(|text| text.lines().filter(|line| !line.is_empty()).count() == nodes.len());
    if wait::until(PATIENCE, known) {
        return Ok(());
    }
    // Who gives out the ranges has the explanation.
    let manager = components::controller_manager(cluster)?;
    manager.wait(cluster, Duration::ZERO)?;
    bail!("not every node has registered and got a pod range: cargo xtask cluster status")
}

/// Loads an image file into a node, unless this very file is there.
pub fn load(cluster: &Cluster, node: &Node, file: &std::path::Path) -> Result<()> {
    let mut key = cache::Key::default();
    let meta = file.metadata().with_context(|| format!("{} is missing", file.display()))?;
    key.text(&file.display().to_string(), &format!("{:?} {}", meta.modified()?, meta.len()));
    let loaded = cluster.disk(node).join(format!("loaded-{}", key.finish()));
    if loaded.exists() {
        return Ok(());
    }
    // The node sees this machine's files, but for what is in memory or mounted apart; standard input it always sees.
    node::command(cluster, node)?
        .args(["ctr", "-n", "k8s.io", "images", "import", "--snapshotter", "overlayfs", "-"])
        .stdin(file)
        .capture()?;
    fs::write(loaded, "").map_err(Into::into)
}

fn dns(cluster: &Cluster) -> Result<()> {
    let addresses = DNS.of(cluster.settings.ip_family);
    let all: Vec<String> = addresses.iter().map(|address| format!("\"{address}\"")).collect();
    let text = include_str!("coredns.yaml").replace("@FIRST@", addresses[0]).replace("@ALL@", &all.join(", "));
    let file = cluster.dir.join("coredns.yaml");
    fs::write(&file, text)?;
    cluster.kubectl()?.args(["apply", "-f"]).arg(file).capture().map(drop)
}

/// Waits until nodes are ready and DNS serves; tells what is wrong otherwise.
fn ready(cluster: &Cluster) -> Result<()> {
    let wait = |what: &[&str]| {
        let result =
            cluster.kubectl().and_then(|kubectl| kubectl.arg("wait").args(what).arg("--timeout=90s").capture());
        result.map_err(|error| anyhow!("{error:#}\n{}", status::trouble(cluster)))
    };
    wait(&["--for=condition=Ready", "nodes", "--all"])?;
    ui::detail("nodes are ready");
    wait(&["--for=condition=Available", "deployment/coredns", "--namespace=kube-system"])?;
    if cluster.settings.network == Network::Rustnet {
        // CoreDNS is there as soon as one node is; the agents of all must have said that they are ready.
        let rollout = ["rollout", "status", "--namespace=rustnet-system", "daemonset/rustnet-agent", "--timeout=90s"];
        cluster.ask(&rollout).map_err(|error| anyhow!("{error:#}\n{}", status::trouble(cluster)))?;
    }
    // Pods need it, and it is made by a controller, some time.
    let account = || cluster.ask(&["get", "serviceaccount", "default"]).is_ok();
    ensure!(wait::until(PATIENCE, account), "the service account default does not appear");
    Ok(())
}

fn each<T>(nodes: &[Node], make: impl Fn(&Node) -> Result<T>) -> Result<Vec<T>> {
    nodes.iter().map(make).collect()
}

/// What a shell needs to use the cluster.
pub fn environment(cluster: &Cluster) -> Result<String> {
    let kubectl = cluster.program("kubectl")?;
    let dir = std::path::Path::new(&kubectl).parent().context("kubectl has a directory")?.display();
    Ok(format!("export KUBECONFIG={}\nexport PATH={dir}:$PATH", cluster.kubeconfig("admin")))
}
