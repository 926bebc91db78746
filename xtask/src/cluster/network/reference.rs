//! The reference network: bridge, host-local and portmap on each node, plain routes between nodes, and kube-proxy.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{Peer, peers};
use crate::cache;
use crate::cluster::components::{Component, Place, curl};
use crate::cluster::layout::{Cluster, Node};
use crate::cluster::settings::PODS;
use crate::cluster::{node, wires::ip};

/// Where distributions put the plugins.
const PLUGINS: [&str; 2] = ["/usr/lib/cni", "/usr/libexec/cni"];

/// Installs plugins, routes and kube-proxy on every node.
pub fn install(cluster: &Cluster) -> Result<()> {
    let peers = peers(cluster)?;
    for peer in &peers {
        routes(cluster, peer, &peers)?;
        masquerade(cluster, peer)?;
        plugins(cluster, peer)?;
    }
    let proxies: Vec<Component> =
        cluster.nodes().iter().map(|node| kube_proxy(cluster, node)).collect::<Result<_>>()?;
    proxies.iter().try_for_each(|proxy| proxy.start(cluster))?;
    proxies.iter().try_for_each(|proxy| proxy.wait(cluster, Duration::from_secs(30)))
}

fn routes(cluster: &Cluster, own: &Peer, peers: &[Peer]) -> Result<()> {
    for other in peers.iter().filter(|peer| peer.node.number != own.node.number) {
        for (range, gateway) in other.ranges.iter().zip(&other.addresses) {
            let family = if range.contains(':') { "-6" } else { "-4" };
            ip(&["-n", &cluster.netns(&own.node.name), family, "route", "replace", range, "via", gateway])?;
        }
    }
    Ok(())
}

/// What pods send to the world gets the node's address.
fn masquerade(cluster: &Cluster, peer: &Peer) -> Result<()> {
    let rules = PODS.of(cluster.settings.ip_family).into_iter().map(|range| {
        let family = if range.contains(':') { "ip6" } else { "ip" };
        format!("{family} saddr {range} {family} daddr != {range} fib daddr type != local masquerade")
    });
    let rules: Vec<String> = rules.collect();
    let text = format!(
        "table inet reference\ndelete table inet reference\ntable inet reference {{\n\
         chain post {{ type nat hook postrouting priority srcnat + 10; policy accept;\n{}\n}}\n}}\n",
        rules.join("\n")
    );
    let file = cluster.node_dir(&peer.node).join("masquerade.nft");
    fs::write(&file, text)?;
    cluster.inside(&peer.node.name, "nft").arg("-f").arg(file).capture().map(drop)
}

/// The plugins, and last of all the configuration.
fn plugins(cluster: &Cluster, peer: &Peer) -> Result<()> {
    let root = node::root(cluster, &peer.node)?;
    for plugin in ["bridge", "host-local", "portmap", "loopback"] {
        let from = PLUGINS.iter().map(|dir| Path::new(dir).join(plugin)).find(|file| file.is_file());
        let from = from.with_context(|| format!("no CNI plugin {plugin}: cargo xtask setup --with cluster"))?;
        cache::copy(&from, &root.join("opt/cni/bin").join(plugin))?;
    }
    let ranges: Vec<Value> = peer.ranges.iter().map(|range| json!([{"subnet": range}])).collect();
    let config = json!({
        "cniVersion": "0.4.0",
        "name": "reference",
        "plugins": [
            {
                "type": "bridge", "bridge": "cni0", "isGateway": true, "isDefaultGateway": true, "hairpinMode": true,
                "ipMasq": false, "mtu": 1500, "ipam": {"type": "host-local", "ranges": ranges},
            },
            {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true},
        ],
    });
    let (dir, name) = (root.join("etc/cni/net.d"), "10-reference.conflist");
    fs::write(dir.join(".unfinished"), config.to_string())?;
    fs::rename(dir.join(".unfinished"), dir.join(name)).with_context(|| format!("installing {name}"))
}

/// A node's kube-proxy.
pub fn kube_proxy(cluster: &Cluster, node: &Node) -> Result<Component> {
    let file: PathBuf = cluster.node_dir(node).join("kube-proxy.yaml");
    let text = format!(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: nftables\n\
         clusterCIDR: {:?}\nhostnameOverride: {}\nclientConnection: {{kubeconfig: {}}}\n\
         conntrack: {{maxPerCore: 0, min: 0}}\nhealthzBindAddress: \"127.0.0.1:10256\"\nmetricsBindAddress: \"127.0.0.1:10249\"\n",
        cluster.settings.joined(PODS),
        node.name,
        cluster.kubeconfig("proxy"),
    );
    // It ends itself when its file is written, changed or not.
    if fs::read_to_string(&file).ok().as_deref() != Some(&text) {
        fs::write(&file, text)?;
    }
    Ok(Component {
        name: format!("{}.kube-proxy", node.name),
        place: Place::Node(node.clone()),
        argv: vec![cluster.program("kube-proxy")?, format!("--config={}", file.display()), "--v=2".into()],
        ready: curl("http://127.0.0.1:10256/healthz"),
    })
}
