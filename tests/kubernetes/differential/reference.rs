//! The reference: kube-proxy in nftables mode as kubeadm configures it, pods behind plain veths, and routes between the nodes.

use super::model::Backend;
use super::world::nft;
use crate::server::kubernetes;
use anyhow::{Context as _, Result};
use std::fmt::Write as _;
use std::fs::File;
use std::path::{Path, PathBuf};
use testkit::janitor::Process;
use testkit::netns::{Holder, Own};
use testkit::{Fabric, Node};

/// The ranges of all pods.
const PODS: [&str; 2] = ["10.244.0.0/16", "fd00:244::/48"];
/// The ranges of all nodes, which know the way to all pods.
const NODES: [&str; 2] = ["172.18.0.0/24", "fd00:18::/64"];
/// The gateway of all pods: no interface has it, and every veth answers for it.
const GATEWAY: &str = "169.254.1.1";

/// Forwarding, routes to the other node's pods, and what any CNI plugin does to what pods send to the world: it gets the node's
/// address.
pub fn wire(fabric: &Fabric) -> Result<()> {
    for node in fabric.nodes() {
        let netns = node.netns();
        netns.sysctl("ipv4/ip_forward", "1")?;
        netns.sysctl("ipv6/conf/all/forwarding", "1")?;
        let mut routes = String::new();
        for other in fabric.nodes().iter().filter(|other| other.name() != node.name()) {
            for range in other.pod_cidrs() {
                let _ = writeln!(routes, "route add {range} via {}", other.address_like(range.addr()));
            }
        }
        netns.ip(&routes)?;
        let mut rules = String::new();
        for (pods, nodes) in PODS.into_iter().zip(NODES) {
            let family = if pods.contains(':') { "ip6" } else { "ip" };
            let _ = writeln!(
                rules,
                "{family} saddr {pods} {family} daddr != {{ {pods}, {nodes} }} fib daddr type != local masquerade"
            );
        }
        nft(
            netns,
            &format!(
                "table inet cni {{ chain post {{ type nat hook postrouting priority srcnat + 10; policy accept;\n{rules}}}\n}}\n"
            ),
        )?;
    }
    Ok(())
}

/// A pod with the addresses of `like`.
pub fn add_pod(node: &Node, name: &str, like: &Backend) -> Result<Holder> {
    let pod = Holder::new(&format!("{}-{name}", node.netns().name()), Own::default())?;
    for key in ["all", "default"] {
        pod.sysctl(&format!("ipv6/conf/{key}/accept_dad"), "0")?;
        pod.sysctl(&format!("ipv6/conf/{key}/accept_ra"), "0")?;
    }
    let host = node.netns();
    let Backend { v4, v6, .. } = like;
    host.ip(&format!(
        "link add {name} type veth peer name eth0 netns {}\naddr add fe80::1/64 dev {name} nodad\nlink set {name} up\n",
        pod.pid()
    ))?;
    host.sysctl(&format!("ipv4/conf/{name}/proxy_arp"), "1")?;
    host.sysctl(&format!("ipv4/neigh/{name}/proxy_delay"), "0")?;
    host.ip(&format!("route add {v4} dev {name}\nroute add {v6} dev {name}\n"))?;
    pod.ip(&format!(
        "addr add {v4}/32 dev eth0\naddr add {v6}/128 dev eth0 nodad\nlink set eth0 up\n\
         route add {GATEWAY} dev eth0\nroute add default via {GATEWAY}\nroute add default via fe80::1 dev eth0\n"
    ))?;
    Ok(pod)
}

/// Starts kube-proxy.
pub fn start_proxy(node: &Node, kubeconfig: &Path) -> Result<Process> {
    let config = node.dir().join("kube-proxy.yaml");
    std::fs::write(
        &config,
        format!(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: nftables\n\
             clusterCIDR: {:?}\nhostnameOverride: {}\nclientConnection: {{kubeconfig: {}}}\n\
             conntrack: {{maxPerCore: 0, min: 0}}\nnftables: {{minSyncPeriod: 50ms, syncPeriod: 30s}}\n",
            PODS.join(","),
            node.name(),
            kubeconfig.display()
        ),
    )
    .with_context(|| format!("cannot write {}", config.display()))?;
    let output = File::create(log(node))?;
    let command = node.netns().command(kubernetes("kube-proxy")?)?;
    let command = command.args(["--config", &config.display().to_string(), "--v=2"]);
    command.stdout(output.try_clone()?).stderr(output).spawn()
}

/// The log of a node's kube-proxy.
pub fn log(node: &Node) -> PathBuf {
    node.dir().join("kube-proxy.log")
}
