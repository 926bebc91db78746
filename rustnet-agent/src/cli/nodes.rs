//! `rustnetctl nodes`: the nodes of the cluster and how their pods are reached: names from the agent's file, ways from
//! `rn_peers4/6`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::Result;
use ipnet::IpNet;
use rustnet_common::addr::{Addr, Address};
use rustnet_common::peer::{Peer, flags};
use serde::Serialize;

use super::Places;
use super::output::Output;
use crate::bpf::store;
use crate::namefile::{self, NODES, Nodes};

/// How packets get to a node and its pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Way {
    /// It is this node.
    Here,
    /// Through the tunnel.
    Overlay,
    /// By the kernel's routes.
    Routes,
}

#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    /// Null where the maps know an address that the agent's file does not name.
    name: Option<String>,
    addresses: BTreeSet<IpAddr>,
    pod_cidrs: BTreeSet<IpNet>,
    /// One, unless the two families or two ranges go different ways; none when the maps know nothing of it.
    reached: BTreeSet<Way>,
    /// What the maps do not have: packets to it take the way of the world.
    missing: BTreeSet<IpNet>,
}

/// Prints the nodes.
pub fn run(places: &Places, out: &Output) -> Result<()> {
    let names: Nodes = namefile::read(&places.run_dir, NODES)?;
    let rows = rows(names, &store::peers(places.bpffs()?)?);
    out.print(&rows, &["NAME", "ADDRESSES", "POD RANGES", "REACHED BY", "NOT IN THE MAPS"], || {
        rows.iter().map(line).collect()
    })
}

/// The named nodes in order, then what else the maps know of nodes, by its far end.
fn rows(names: Nodes, peers: &BTreeMap<IpNet, Peer>) -> Vec<Row> {
    let mut left: BTreeMap<_, _> = peers.iter().filter_map(|(prefix, peer)| Some((*prefix, way(peer)?))).collect();
    let mut rows = Vec::new();
    for (name, node) in names {
        let mut row = Row { name: Some(name), ..Row::default() };
        row.addresses.extend(node.addresses);
        row.pod_cidrs.extend(node.pod_cidrs);
        for prefix in row.addresses.iter().map(|ip| IpNet::from(*ip)).chain(row.pod_cidrs.iter().copied()) {
            match left.remove(&prefix) {
                Some(way) => drop(row.reached.insert(way)),
                None => drop(row.missing.insert(prefix)),
            }
        }
        rows.push(row);
    }
    let mut unnamed: BTreeMap<Option<IpAddr>, Row> = BTreeMap::new();
    for (prefix, way) in left {
        // All addresses of this host's interfaces are in the maps; a Node names few of them.
        if way == Way::Here && peers[&prefix].flags & flags::HOST != 0 {
            continue;
        }
        let far_end = peers[&prefix].node;
        let row = unnamed.entry((far_end != Addr::UNSPECIFIED).then(|| far_end.into())).or_default();
        if peers[&prefix].flags & flags::NODE != 0 {
            row.addresses.insert(prefix.addr());
        } else {
            row.pod_cidrs.insert(prefix);
        }
        row.reached.insert(way);
    }
    rows.extend(unnamed.into_values());
    rows
}

/// The way to a node or its pods; `None` for what is neither.
fn way(peer: &Peer) -> Option<Way> {
    let has = |flag| peer.flags & flag != 0;
    if has(flags::HOST | flags::LOCAL_PODS) {
        Some(Way::Here)
    } else if has(flags::NODE | flags::POD) {
        Some(if has(flags::TUNNEL) { Way::Overlay } else { Way::Routes })
    } else {
        None
    }
}

fn line(row: &Row) -> Vec<String> {
    let list = |words: Vec<String>| if words.is_empty() { "-".to_owned() } else { words.join(", ") };
    let ways = row.reached.iter().map(|way| match way {
        Way::Here => "this node",
        Way::Overlay => "overlay",
        Way::Routes => "routes",
    });
    vec![
        row.name.clone().unwrap_or_else(|| "-".to_owned()),
        list(row.addresses.iter().map(ToString::to_string).collect()),
        list(row.pod_cidrs.iter().map(ToString::to_string).collect()),
        list(ways.map(str::to_owned).collect()),
        list(row.missing.iter().map(ToString::to_string).collect()),
    ]
}

#[cfg(test)]
mod tests {
    use super::{line, rows};
    use crate::cli::golden::assert_golden;
    use crate::namefile::NodeName;
    use ipnet::IpNet;
    use rustnet_common::addr::{Addr, Address};
    use rustnet_common::peer::{Peer, flags};
    use std::net::IpAddr;

    fn peer(prefix: &str, node: Option<&str>, flags: u16) -> (IpNet, Peer) {
        let node = node.map_or(Addr::UNSPECIFIED, |ip| Addr::from(ip.parse::<IpAddr>().unwrap()));
        (prefix.parse().unwrap(), Peer { node, identity: 0, flags, pad: 0 })
    }

    fn node(name: &str, address: &str, range: &str) -> (String, NodeName) {
        let known = NodeName { addresses: vec![address.parse().unwrap()], pod_cidrs: vec![range.parse().unwrap()] };
        (name.to_owned(), known)
    }

    #[test]
    fn nodes_have_names_and_ways() {
        let names = [
            node("n1", "192.0.2.1", "10.1.1.0/24"),
            node("n2", "192.0.2.2", "10.1.2.0/24"),
            node("n3", "192.0.2.3", "10.1.3.0/24"),
        ];
        let peers = [
            peer("192.0.2.1/32", None, flags::HOST),
            peer("172.17.0.1/32", None, flags::HOST),
            peer("10.1.1.0/24", None, flags::LOCAL_PODS),
            peer("192.0.2.2/32", Some("192.0.2.2"), flags::NODE),
            peer("10.1.2.0/24", Some("192.0.2.2"), flags::POD | flags::TUNNEL),
            peer("192.0.2.3/32", Some("192.0.2.3"), flags::NODE),
            peer("192.0.2.4/32", Some("192.0.2.4"), flags::NODE),
            peer("10.1.4.0/24", Some("192.0.2.4"), flags::POD),
            peer("10.0.0.0/8", None, flags::NO_MASQ),
            peer("10.96.0.0/16", None, flags::SERVICES),
        ];
        let rows = rows(names.into(), &peers.into());
        let lines: Vec<_> = rows.iter().map(|row| line(row).join(" | ")).collect();
        assert_eq!(
            lines,
            [
                "n1 | 192.0.2.1 | 10.1.1.0/24 | this node | -",
                "n2 | 192.0.2.2 | 10.1.2.0/24 | overlay, routes | -",
                "n3 | 192.0.2.3 | 10.1.3.0/24 | routes | 10.1.3.0/24",
                "- | 192.0.2.4 | 10.1.4.0/24 | routes | -",
            ]
        );
        assert_golden("nodes", &rows);
    }
}
