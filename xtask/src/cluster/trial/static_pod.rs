//! A static pod: its node's kubelet starts it from a file, before there is an agent on the node, or any network. It gets its
//! network when the agent has come, without anybody's help.

use std::fs;
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};

use super::load::{self, Kind, Stream};
use super::pod;
use crate::cluster::init::STATIC_PODS;
use crate::cluster::layout::{Cluster, Node};
use crate::cluster::lifecycle;

const MANIFEST: &str = "apiVersion: v1
kind: Pod
metadata: {name: static, namespace: trial, labels: {app: static}}
spec:
  terminationGracePeriodSeconds: 0
  containers: [{name: server, image: \"registry.k8s.io/e2e-test-images/agnhost:2.56\", args: [netexec]}]
";

/// Returns what to tell of it.
pub fn run(cluster: &Cluster) -> Result<String> {
    let number = cluster.settings.nodes + 1;
    let node = Node { name: format!("n{number}"), number };
    let dir = cluster.disk(&node).join(STATIC_PODS);
    fs::create_dir_all(&dir)?;
    fs::write(dir.join("static.yaml"), MANIFEST)?;
    let larger = lifecycle::scale(cluster, number)?;
    let result = reached(&larger, &node);
    lifecycle::scale(&larger, cluster.settings.nodes)?;
    // Its node cannot say any more that it has ended.
    let name = format!("static-{}", node.name);
    let delete = ["--namespace=trial", "delete", "pod", &name, "--grace-period=0", "--force", "--ignore-not-found"];
    cluster.ask(&delete)?;
    result
}

fn reached(cluster: &Cluster, node: &Node) -> Result<String> {
    let name = format!("static-{}", node.name);
    cluster.ask(&["--namespace=trial", "wait", "--for=condition=Ready", "pod", &name, "--timeout=120s"])?;
    let about = format!("--field-selector=involvedObject.name={name}");
    let events = cluster.ask(&["--namespace=trial", "get", "events", &about, "-o", "jsonpath={.items[*].reason}"])?;
    let waited = events.split(' ').any(|reason| ["NetworkNotReady", "FailedCreatePodSandBox"].contains(&reason));
    ensure!(waited, "{name} did not have to wait for a network: {events}");
    let server = pod(cluster, "static", node)?;
    for from in cluster.nodes() {
        cluster.ask(&["--namespace=trial", "rollout", "status", "daemonset/client", "--timeout=60s"])?;
        let client = pod(cluster, "client", &from)?;
        for address in &server.addresses {
            let to = SocketAddr::new(*address, 8080);
            let stream = Stream { name: client.name.clone(), from: client.netns.clone(), kind: Kind::NewTcp, to };
            load::once(&stream).with_context(|| format!("{} does not reach {to}", client.name))?;
        }
    }
    Ok(format!(
        "{name} waited for the network of its new node, and was then reached from all {} nodes",
        cluster.settings.nodes
    ))
}
