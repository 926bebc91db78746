//! Running pods, as traffic needs to know them: addresses, and the network namespace.

use std::fs;
use std::net::{IpAddr, UdpSocket};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use super::layout::{Cluster, Node};
use super::{node, wires};

/// A pod.
pub struct Pod {
    /// The app and the node, for people.
    pub name: String,
    /// A file that is its network namespace.
    pub netns: PathBuf,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

/// A running pod of this namespace and app on this node.
pub fn find(cluster: &Cluster, namespace: &str, app: &str, on: &Node) -> Result<Pod> {
    let (namespace, selector) = (format!("--namespace={namespace}"), format!("--selector=app={app}"));
    let field = format!("--field-selector=spec.nodeName={}", on.name);
    let format = "jsonpath={.items[0].status.podIPs[*].ip}";
    let text = cluster.ask(&[&namespace, "get", "pods", &selector, &field, "-o", format])?;
    let addresses: Vec<IpAddr> = text.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    let address = addresses.first().with_context(|| format!("no pod of {app} on {}", on.name))?;
    let netns = netns_of(cluster, on, *address)?;
    Ok(Pod { name: format!("{app} on {}", on.name), netns, addresses })
}

/// The namespace, among those that the node's runtime has made, that has this address.
fn netns_of(cluster: &Cluster, on: &Node, address: IpAddr) -> Result<PathBuf> {
    let dir = node::root(cluster, on)?.join("run/netns");
    for entry in fs::read_dir(&dir)?.flatten() {
        // Only who has an address can bind to it.
        if wires::inside(&entry.path(), || UdpSocket::bind((address, 0)).is_ok()).unwrap_or(false) {
            return Ok(entry.path());
        }
    }
    bail!("no namespace in {} has {address}", dir.display())
}
