//! What must be one of a kind in the cluster: addresses, names, MACs, machines. Nodes come from the agent's own source.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::Result;
use rustnet_common::names::{OVERLAY_DEV, VETH_PREFIX};

use super::finding::{Finding, Level, split_remedy};
use crate::config::Config;
use crate::index::Index;
use crate::model::Node;
use crate::net::host::Host;
use crate::net::neighbour;
use crate::net::netlink::Socket;
use crate::net::overlay::mac_of;
use crate::reconcile::node::settings;
use crate::source::{Event, Kind, Object};

/// A Node, with what only an API server tells of it.
#[derive(Clone, Debug)]
pub struct KnownNode {
    /// As the agent uses it.
    pub node: Arc<Node>,
    /// Label `kubernetes.io/hostname`.
    pub host_name: Option<String>,
    /// `status.nodeInfo.systemUUID`.
    pub system_uuid: Option<String>,
}

/// What was found.
pub struct Facts {
    /// Name of this node.
    pub node_name: String,
    /// All Nodes; or why they are not known.
    pub nodes: Result<Vec<KnownNode>, String>,
    /// What the agent's own rules find wrong with them.
    pub problems: Vec<String>,
    /// The host's addresses.
    pub own_addresses: Vec<IpAddr>,
    /// MACs of the host's devices towards others.
    pub own_macs: Vec<[u8; 6]>,
    /// Who has answered on the link: address, device, MAC.
    pub neighbours: Vec<(IpAddr, u32, [u8; 6])>,
    /// There is an overlay, whose MACs come from names.
    pub overlay: bool,
}

/// Looks.
pub fn gather(config: &Config, host: &Host, nodes: Result<&Vec<KnownNode>, &String>) -> Facts {
    let neighbours = Socket::open().map_err(anyhow::Error::from).and_then(|mut socket| neighbour::learnt(&mut socket));
    let outside = host.links.iter().filter(|it| !it.name.starts_with(VETH_PREFIX) && it.name != OVERLAY_DEV);
    Facts {
        node_name: config.node_name.clone(),
        problems: nodes.map(|nodes| problems(config, host, nodes)).unwrap_or_default(),
        nodes: nodes.cloned().map_err(Clone::clone),
        own_addresses: host.facts().own_addresses(),
        own_macs: outside.filter_map(|it| it.mac.as_slice().try_into().ok()).filter(|mac| *mac != [0; 6]).collect(),
        neighbours: neighbours.unwrap_or_default().into_iter().map(|it| (it.ip, it.ifindex, it.mac)).collect(),
        overlay: config.routing.has_overlay(),
    }
}

/// What the agent will say of these Nodes.
fn problems(config: &Config, host: &Host, nodes: &[KnownNode]) -> Vec<String> {
    let mut index = Index::new(settings(config));
    index.set_host(host.facts());
    index.handle(Event::Restart(Kind::Node));
    for known in nodes {
        index.handle(Event::Apply(Object::Node(Arc::clone(&known.node))));
    }
    index.handle(Event::Synced(Kind::Node));
    index.problems().iter().map(ToString::to_string).collect()
}

/// Judges.
pub fn check(facts: &Facts) -> Vec<Finding> {
    let nodes = match &facts.nodes {
        Ok(nodes) => nodes,
        Err(why) => {
            return vec![Finding::new(Level::Warning, "nodes", format!("not checked: {why}")).hint("fix that first")];
        }
    };
    let mut found = Vec::new();
    for problem in &facts.problems {
        let (detail, hint) = split_remedy(problem);
        found.push(Finding::new(Level::Fault, "Nodes as the agent sees them", detail).hint(hint));
    }
    found.extend(own_addresses(facts, nodes));
    let name = |it: &KnownNode| it.node.name.as_str().to_owned();
    found.extend(twice(nodes.iter().map(|it| (it.host_name.clone(), name(it)))).map(|(host, names)| {
        Finding::new(Level::Warning, "host names", format!("{names} are all called {host}"))
            .hint("give each machine its own (`hostnamectl set-hostname`), and register its kubelet again")
    }));
    found.extend(twice(nodes.iter().map(|it| (it.system_uuid.clone(), name(it)))).map(|(uuid, names)| {
        Finding::new(
            Level::Warning,
            "machines",
            format!("{names} have one system UUID, {uuid}: copies of one machine?"),
        )
        .hint("give each copy a UUID and MACs of its own before it joins")
    }));
    if facts.overlay {
        found.extend(twice(nodes.iter().map(|it| (Some(mac_of(&name(it))), name(it)))).map(|(mac, names)| {
            Finding::new(Level::Fault, "overlay MACs", format!("the names of {names} give one MAC, {}", shown(mac)))
                .hint("rename one of them")
        }));
    }
    found.extend(neighbours(facts, nodes));
    if found.is_empty() {
        // Before the agent starts, its own is the only one that is asked for.
        let whose = if nodes.len() == 1 { "this node alone".to_owned() } else { format!("{} nodes", nodes.len()) };
        found.push(Finding::ok("one of a kind", format!("addresses, names, machines and MACs of {whose}")));
    }
    found
}

/// Things that several nodes have, with the names of those.
fn twice<T: Ord>(all: impl Iterator<Item = (Option<T>, String)>) -> impl Iterator<Item = (T, String)> {
    let mut by_thing: BTreeMap<T, Vec<String>> = BTreeMap::new();
    for (thing, name) in all {
        if let Some(thing) = thing {
            by_thing.entry(thing).or_default().push(name);
        }
    }
    by_thing.into_iter().filter(|(_, names)| names.len() > 1).map(|(thing, names)| (thing, names.join(", ")))
}

fn own_addresses(facts: &Facts, nodes: &[KnownNode]) -> Option<Finding> {
    let own = nodes.iter().find(|it| it.node.name.as_str() == facts.node_name)?;
    let absent: Vec<_> =
        own.node.addresses.iter().filter(|ip| !facts.own_addresses.contains(ip)).map(ToString::to_string).collect();
    (!absent.is_empty()).then(|| {
        let detail =
            format!("this host has no interface with {}, which Node {} names", absent.join(", "), facts.node_name);
        Finding::new(Level::Fault, "own addresses", detail)
            .hint("check --node-name, and give the kubelet --node-ip with an address of this host")
    })
}

/// MACs on the link. Several nodes behind one MAC may be a cloud's way; one with our own MAC hears none of our packets.
fn neighbours(facts: &Facts, nodes: &[KnownNode]) -> Vec<Finding> {
    let of = |ip: &IpAddr| {
        nodes.iter().find(|it| it.node.addresses.contains(ip) && it.node.name.as_str() != facts.node_name)
    };
    let peers =
        facts.neighbours.iter().filter_map(|(ip, device, mac)| Some((of(ip)?.node.name.as_str(), *device, *mac)));
    let ours: Vec<_> = peers.clone().filter(|(_, _, mac)| facts.own_macs.contains(mac)).collect();
    let mut found = Vec::new();
    for (name, _, mac) in ours {
        found.push(
            Finding::new(Level::Fault, "MACs", format!("node {name} has a MAC of this host's, {}", shown(mac)))
                .hint("give one of the two machines another MAC"),
        );
    }
    let mut by_mac: Vec<_> = peers.map(|(name, device, mac)| (Some((device, mac)), name.to_owned())).collect();
    by_mac.sort();
    by_mac.dedup();
    by_mac.retain(|(key, _)| key.is_none_or(|(_, mac)| !facts.own_macs.contains(&mac)));
    found.extend(twice(by_mac.into_iter()).map(|((_, mac), names)| {
        Finding::new(Level::Warning, "MACs", format!("{names} have one MAC, {}", shown(mac)))
            .hint("unless a router or a cloud's network answers for them, give each machine its own")
    }));
    found
}

fn shown(mac: [u8; 6]) -> String {
    mac.map(|octet| format!("{octet:02x}")).join(":")
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::finding::{assert_only, assert_well};
    use super::*;
    use crate::model::ObjectName;

    /// A Node with one address and one range.
    pub fn node(name: &str, address: &str, cidr: &str) -> KnownNode {
        let node = Node {
            name: ObjectName::cluster(name),
            created: 0,
            addresses: [address.parse().expect("ip")].into(),
            pod_cidrs: [cidr.parse().expect("net")].into(),
            zone: "".into(),
            is_leaving: false,
            other_addresses: Box::default(),
            labels: crate::model::Labels::default(),
            problems: [].into(),
        };
        KnownNode { node: Arc::new(node), host_name: Some(name.into()), system_uuid: Some(format!("uuid of {name}")) }
    }

    fn three() -> Vec<KnownNode> {
        (1..=3).map(|i| node(&format!("n{i}"), &format!("192.0.2.{i}"), &format!("10.244.{i}.0/24"))).collect()
    }

    fn facts(nodes: Vec<KnownNode>) -> Facts {
        let mac = |last| [2, 0, 0, 0, 0, last];
        let config = Config::load(["x", "--node-name=n1", "--manifests=/m"], &|_| None).expect("good");
        Facts {
            node_name: "n1".into(),
            problems: problems(&config, &Host::default(), &nodes),
            nodes: Ok(nodes),
            own_addresses: vec!["192.0.2.1".parse().expect("ip")],
            own_macs: vec![mac(1)],
            neighbours: (2..=3).map(|i| (IpAddr::from([192, 0, 2, i]), 2, mac(i))).collect(),
            overlay: true,
        }
    }

    #[test]
    fn nodes_of_a_kind_are_well() {
        assert_well(&check(&facts(three())));
        // A gateway has a MAC, too, and is no node.
        let mut behind = facts(three());
        behind.neighbours.push(("192.0.2.254".parse().expect("ip"), 2, [2, 0, 0, 0, 0, 2]));
        assert_well(&check(&behind));
        // Two addresses of one node have one MAC.
        let mut nodes = three();
        let addresses = ["192.0.2.2", "2001:db8::2"].map(|ip| ip.parse().expect("ip"));
        Arc::make_mut(&mut nodes[1].node).addresses = addresses.into();
        let mut both = facts(nodes);
        both.neighbours.push((addresses[1], 2, [2, 0, 0, 0, 0, 2]));
        assert_well(&check(&both));
    }

    #[test]
    fn one_fault_at_a_time() {
        let change = |of: usize, change: &dyn Fn(&mut KnownNode)| {
            let mut nodes = three();
            change(&mut nodes[of]);
            facts(nodes)
        };
        let same_name = change(2, &|it| it.host_name = Some("n2".into()));
        let same_machine = change(2, &|it| it.system_uuid = Some("uuid of n2".into()));
        let same_address =
            change(2, &|it| Arc::make_mut(&mut it.node).addresses = ["192.0.2.2".parse().expect("ip")].into());
        let same_range =
            change(2, &|it| Arc::make_mut(&mut it.node).pod_cidrs = ["10.244.2.0/25".parse().expect("net")].into());
        let mac_of_ours = Facts { own_macs: vec![[2, 0, 0, 0, 0, 3]], ..facts(three()) };
        let one_mac = Facts {
            neighbours: (2..=3).map(|i| (IpAddr::from([192, 0, 2, i]), 2, [2; 6])).collect(),
            ..facts(three())
        };
        for (facts, level, detail, hint) in [
            (same_name, Level::Warning, "n2, n3 are all called n2", "hostnamectl"),
            (same_machine, Level::Warning, "n2, n3 have one system UUID", "before it joins"),
            (same_address, Level::Fault, "192.0.2.2 belongs to node", "addresses of its own"),
            (same_range, Level::Fault, "10.244.2.0/25", ""),
            (mac_of_ours, Level::Fault, "node n3 has a MAC of this host's, 02:00:00:00:00:03", "another MAC"),
            (one_mac, Level::Warning, "n2, n3 have one MAC, 02:02:02:02:02:02", "router"),
            (Facts { own_addresses: Vec::new(), ..facts(three()) }, Level::Fault, "192.0.2.1", "--node-ip"),
            (facts(three().split_off(1)), Level::Fault, "own object is missing", "--node-name"),
            (Facts { nodes: Err("no API server".into()), ..facts(three()) }, Level::Warning, "no API server", "first"),
        ] {
            assert_only(&check(&facts), level, detail, hint);
        }
    }

    #[test]
    fn things_that_several_have() {
        let all = [(Some(1), "a"), (None, "b"), (None, "c"), (Some(2), "d"), (Some(1), "e")];
        let found: Vec<_> = twice(all.into_iter().map(|(it, name)| (it, name.to_owned()))).collect();
        assert_eq!(found, [(1, "a, e".to_owned())]);
    }
}
