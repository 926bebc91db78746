//! The manifests under `examples/`: applied as they are, since their endpoints are the first two pods of each node.

use crate::addresses::family;
use crate::cluster::Cluster;
use crate::rows::enough;
use crate::table::{self, Table};
use anyhow::{Context, Result, ensure};
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use testkit::client::ask;
use testkit::{Fabric, Proto, dist, wait};

/// What the first and the second pod of a node listen on, in addition to the port that all pods
/// have.
pub const PORTS: [&[u16]; 2] = [&[5353, 9090], &[5353, 5354, 8081, 9091]];

/// Which pods serve.
#[derive(Clone, Copy)]
enum By {
    /// The first pod of each node, or the second (from 0).
    Pods(usize),
    /// Both.
    All,
    /// The first pod of the client's own node.
    OwnNode,
    /// Nobody: refused.
    Nobody,
}

/// The services of the examples: name, last part of the address, protocol, port, who serves.
const SERVICES: [(&str, u16, Proto, u16, By); 8] = [
    ("web", 0x10, Proto::Tcp, 80, By::Pods(0)),
    ("echo", 0x53, Proto::Udp, 53, By::Pods(1)),
    ("multiport", 0x20, Proto::Tcp, 80, By::All),
    ("multiport", 0x20, Proto::Tcp, 9000, By::All),
    ("multiport", 0x20, Proto::Udp, 7, By::All),
    ("local", 0x30, Proto::Tcp, 80, By::OwnNode),
    ("empty", 0x40, Proto::Tcp, 80, By::Nobody),
    ("web", 0x10, Proto::Tcp, 443, By::Nobody),
];

/// Files of the examples, without the nodes: the fabric wrote those. The third node's file only where there is one.
pub fn texts(fabric: &Fabric) -> Result<Vec<(String, String)>> {
    let dir = dist::workspace().join("examples");
    let entries = std::fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))?;
    let mut texts = Vec::new();
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let wanted = Path::new(&name).extension().is_some_and(|e| e == "yaml")
            && (name != "n3.yaml" || fabric.nodes().len() >= 3);
        if wanted {
            let text = std::fs::read_to_string(entry.path())?;
            let kept: Vec<&str> = text.split("---\n").filter(|d| !d.lines().any(|l| l == "kind: Node")).collect();
            if !kept.is_empty() {
                texts.push((name, kept.join("---\n")));
            }
        }
    }
    texts.sort();
    ensure!(!texts.is_empty(), "no manifests in {}", dir.display());
    Ok(texts)
}

/// Addresses read alike in both families: 10.96.0.10 and fd00:96::10.
fn vips(last: u16) -> Result<[IpAddr; 2]> {
    Ok([format!("10.96.0.{last:x}").parse()?, format!("fd00:96::{last:x}").parse()?])
}

/// Every service of the examples, from a pod of each node.
pub fn rows(cluster: &Cluster<'_>, requests: usize, table: &mut Table) -> Result<()> {
    let nodes = cluster.fabric.nodes().len();
    if nodes < 2 {
        table::note("the services of examples/ are about two nodes or three: left out");
        return Ok(());
    }
    for (i, pod) in cluster.pods.iter().enumerate() {
        let expected = format!("10.244.{}.{}", i % nodes + 1, i / nodes + 2);
        ensure!(pod.v4()?.to_string() == expected, "the examples expect {} at {expected}", pod.name());
    }
    table::step("the services of examples/");
    table::columns();
    // The examples know three nodes; clients on further ones are served by those.
    let known = nodes.min(3);
    for client in 0..nodes {
        let pod = &cluster.pods[client];
        for (name, last, proto, port, by) in SERVICES {
            let serving: Vec<&str> = match by {
                By::Pods(i) => cluster.pods[i * nodes..][..known].iter().map(testkit::Pod::name).collect(),
                By::All => {
                    [0, nodes].iter().flat_map(|o| &cluster.pods[*o..][..known]).map(testkit::Pod::name).collect()
                }
                By::OwnNode if client < known => vec![pod.name()],
                By::OwnNode => continue,
                By::Nobody => Vec::new(),
            };
            for vip in vips(last)? {
                let target = SocketAddr::new(vip, port);
                let judge = |answers: &testkit::Answers| match by {
                    By::Nobody => answers.all_failed(ErrorKind::ConnectionRefused),
                    _ => answers.only_by(&serving),
                };
                let ask = |requests| ask(pod.netns(), proto, target, requests);
                // What a row asks for is waited for: an agent comes to a file when it comes to it. Then it is counted.
                let count = enough(requests, serving.len());
                let probe = enough(1, serving.len());
                // If it never comes, the row says so.
                let _ = wait::until("the examples known", || judge(&ask(probe)?));
                let answers = ask(count)?;
                let what = format!("{} > {name}:{port}", pod.name());
                table.answers(&what, family(vip), &proto.to_string(), &answers, judge(&answers));
            }
        }
    }
    Ok(())
}
