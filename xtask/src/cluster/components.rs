//! The programs of a cluster: name, place, arguments, and how one learns that each is ready.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::layout::{Cluster, Node};
use super::process::Processes;
use super::settings::{CONTROL_PLANE, DNS, Family, PODS, SERVICES, address};
use super::{node, wait};
use crate::cmd::Cmd;

/// One program.
#[derive(Clone, Debug)]
pub struct Component {
    /// Its name, its log's and its record's.
    pub name: String,
    /// Where it runs.
    pub place: Place,
    /// What is run.
    pub argv: Vec<String>,
    /// A command in the same place that succeeds once it is ready.
    pub ready: Vec<String>,
}

/// Where a program runs.
#[derive(Clone, Debug)]
pub enum Place {
    /// The network namespace of the control plane.
    ControlPlane,
    /// All namespaces of a node.
    Node(Node),
}

impl Component {
    /// Starts it unless it runs.
    pub fn start(&self, cluster: &Cluster) -> Result<()> {
        let mut argv = self.enter(cluster)?;
        argv.extend(self.argv.iter().cloned());
        Processes::of(cluster).start(&self.name, &argv).map(drop)
    }

    /// Waits until it is ready; the error tells what it said last.
    pub fn wait(&self, cluster: &Cluster, patience: Duration) -> Result<()> {
        let processes = Processes::of(cluster);
        let start = Instant::now();
        let over = || processes.find(&self.name).is_none();
        if wait::until(patience, || over() || self.is_ready(cluster)) && !over() {
            return Ok(());
        }
        let what = if over() { "ended" } else { "is not ready" };
        let (after, log) = (start.elapsed().as_secs(), processes.log(&self.name));
        bail!("{} {what} after {after} s; the end of {}:\n{}", self.name, log.display(), processes.tail(&self.name))
    }

    /// Whether it is ready.
    pub fn is_ready(&self, cluster: &Cluster) -> bool {
        let Ok(enter) = self.enter(cluster) else { return false };
        let Some((first, rest)) = enter.split_first() else { return false };
        Cmd::new(first).args(rest).args(&self.ready).succeeds()
    }

    fn enter(&self, cluster: &Cluster) -> Result<Vec<String>> {
        match &self.place {
            Place::ControlPlane => Ok(vec!["nsenter".into(), format!("--net={}", cluster.netns_file("cp").display())]),
            Place::Node(node) => node::enter(cluster, node),
        }
    }
}

/// The store.
pub fn etcd(cluster: &Cluster) -> Result<Component> {
    let argv = vec![
        cluster.program("etcd")?,
        format!("--data-dir={}", cluster.dir.join("etcd").display()),
        // A cluster of this kind does not outlive its machine.
        "--unsafe-no-fsync".into(),
        "--listen-client-urls=http://127.0.0.1:2379".into(),
        "--advertise-client-urls=http://127.0.0.1:2379".into(),
        "--listen-peer-urls=http://127.0.0.1:2380".into(),
        "--log-level=warn".into(),
    ];
    Ok(control("etcd", argv, "http://127.0.0.1:2379/health"))
}

/// The API server.
pub fn apiserver(cluster: &Cluster) -> Result<Component> {
    let pki = |file: &str| cluster.pki(file);
    let family = cluster.settings.ip_family;
    let own = address(CONTROL_PLANE).of(family).swap_remove(0);
    let any = if family == Family::Ipv6 { "::" } else { "0.0.0.0" };
    let argv = vec![
        cluster.program("kube-apiserver")?,
        "--etcd-servers=http://127.0.0.1:2379".into(),
        format!("--advertise-address={own}"),
        format!("--bind-address={any}"),
        "--secure-port=6443".into(),
        format!("--tls-cert-file={}", pki("apiserver.crt")),
        format!("--tls-private-key-file={}", pki("apiserver.key")),
        format!("--client-ca-file={}", pki("ca.crt")),
        "--authorization-mode=Node,RBAC".into(),
        "--enable-admission-plugins=NodeRestriction".into(),
        "--allow-privileged=true".into(),
        format!("--service-cluster-ip-range={}", cluster.settings.joined(SERVICES)),
        "--service-account-issuer=https://kubernetes.default.svc".into(),
        format!("--service-account-key-file={}", pki("accounts.pub")),
        format!("--service-account-signing-key-file={}", pki("accounts.key")),
        format!("--kubelet-client-certificate={}", pki("kubelet-client.crt")),
        format!("--kubelet-client-key={}", pki("kubelet-client.key")),
        format!("--kubelet-certificate-authority={}", pki("ca.crt")),
        "--kubelet-preferred-address-types=InternalIP".into(),
        format!("--requestheader-client-ca-file={}", pki("ca.crt")),
        "--requestheader-allowed-names=front-proxy".into(),
        "--requestheader-username-headers=X-Remote-User".into(),
        "--requestheader-group-headers=X-Remote-Group".into(),
        "--requestheader-extra-headers-prefix=X-Remote-Extra-".into(),
        format!("--proxy-client-cert-file={}", pki("front-proxy.crt")),
        format!("--proxy-client-key-file={}", pki("front-proxy.key")),
        // It has routes to pods, and no services.
        "--enable-aggregator-routing=true".into(),
        "--max-requests-inflight=2000".into(),
        "--max-mutating-requests-inflight=1000".into(),
    ];
    Ok(control("kube-apiserver", argv, "https://localhost:6443/readyz"))
}

/// The controllers.
pub fn controller_manager(cluster: &Cluster) -> Result<Component> {
    let pki = |file: &str| cluster.pki(file);
    let argv = vec![
        cluster.program("kube-controller-manager")?,
        format!("--kubeconfig={}", cluster.kubeconfig("controller-manager")),
        "--leader-elect=false".into(),
        "--use-service-account-credentials=true".into(),
        format!("--service-account-private-key-file={}", pki("accounts.key")),
        format!("--root-ca-file={}", pki("ca.crt")),
        format!("--cluster-signing-cert-file={}", pki("ca.crt")),
        format!("--cluster-signing-key-file={}", pki("ca.key")),
        "--allocate-node-cidrs=true".into(),
        format!("--cluster-cidr={}", cluster.settings.joined(PODS)),
        format!("--service-cluster-ip-range={}", cluster.settings.joined(SERVICES)),
        "--bind-address=127.0.0.1".into(),
    ];
    Ok(control("kube-controller-manager", argv, "https://127.0.0.1:10257/healthz"))
}

/// The scheduler.
pub fn scheduler(cluster: &Cluster) -> Result<Component> {
    let argv = vec![
        cluster.program("kube-scheduler")?,
        format!("--kubeconfig={}", cluster.kubeconfig("scheduler")),
        "--leader-elect=false".into(),
        "--bind-address=127.0.0.1".into(),
    ];
    Ok(control("kube-scheduler", argv, "https://127.0.0.1:10259/healthz"))
}

/// Whether the kernel has AppArmor on: then containers are confined as on any such node.
fn has_apparmor() -> bool {
    fs::read_to_string("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.trim() == "Y")
}

/// A node's container runtime.
pub fn containerd(cluster: &Cluster, node: &Node) -> Result<Component> {
    let file = cluster.node_dir(node).join("containerd.toml");
    fs::write(&file, CONTAINERD.replace("@WITHOUT_APPARMOR@", &(!has_apparmor()).to_string()))?;
    Ok(Component {
        name: format!("{}.containerd", node.name),
        place: Place::Node(node.clone()),
        argv: vec!["containerd".into(), "-c".into(), file.display().to_string()],
        ready: vec!["ctr".into(), "version".into()],
    })
}

/// A node's kubelet.
pub fn kubelet(cluster: &Cluster, node: &Node) -> Result<Component> {
    let file = cluster.node_dir(node).join("kubelet.yaml");
    let dns = DNS.of(cluster.settings.ip_family)[0];
    let text = KUBELET
        .replace("@CGROUP@", &cluster.cgroup(node))
        .replace("@PKI@", &cluster.pki(""))
        .replace("@NODE@", &node.name)
        .replace("@DNS@", dns);
    fs::write(&file, text)?;
    let argv = vec![
        cluster.program("kubelet")?,
        format!("--config={}", file.display()),
        format!("--kubeconfig={}", cluster.kubeconfig(&node.name)),
        format!("--hostname-override={}", node.name),
        format!("--node-ip={}", cluster.settings.joined(node.address())),
        "--root-dir=/var/lib/kubelet".into(),
        // Never taken off: it stands for a label that an administrator would set.
        format!("--node-labels=topology.kubernetes.io/zone={}", cluster.settings.zone(node.number)),
        "--v=2".into(),
    ];
    let ready = curl("http://127.0.0.1:10248/healthz");
    Ok(Component { name: format!("{}.kubelet", node.name), place: Place::Node(node.clone()), argv, ready })
}

/// A program of the control plane that is ready when this URL answers.
fn control(name: &str, argv: Vec<String>, url: &str) -> Component {
    Component { name: name.into(), place: Place::ControlPlane, argv, ready: curl(url) }
}

/// A command that succeeds when the URL answers with success. Certificates are not looked at: it is one's own machine.
pub fn curl(url: &str) -> Vec<String> {
    ["curl", "-skf", "--noproxy", "*", "--max-time", "2", "-o", "/dev/null", url].map(str::to_owned).to_vec()
}

const CONTAINERD: &str = r#"version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = [
  "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing",
]
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "registry.k8s.io/pause:3.10"
  disable_apparmor = @WITHOUT_APPARMOR@
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
"#;

const KUBELET: &str = r#"apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
cgroupDriver: cgroupfs
cgroupRoot: /@CGROUP@
enforceNodeAllocatable: []
# It checks them only; the node's process 1 shows it what it wants to see.
protectKernelDefaults: true
oomScoreAdj: 0
failSwapOn: false
staticPodPath: /etc/kubernetes/manifests
# Machines that have the older control groups, too.
failCgroupV1: false
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: @PKI@ca.crt}}
authorization: {mode: Webhook}
tlsCertFile: @PKI@@NODE@.crt
tlsPrivateKeyFile: @PKI@@NODE@.key
clusterDNS: ["@DNS@"]
clusterDomain: cluster.local
resolvConf: /run/resolv.conf
evictionHard: {memory.available: 100Mi, nodefs.available: "1%", nodefs.inodesFree: "1%", imagefs.available: "1%"}
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
serializeImagePulls: false
maxPods: 200
kubeAPIQPS: 200
kubeAPIBurst: 400
eventRecordQPS: 0
"#;
