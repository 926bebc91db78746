//! The questions about a Service: each of its addresses and ports, asked from each place.

use super::model::{Case, Family, Type, vip};
use super::world::{NODES, Place, led_to, second_address};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use testkit::{Node, Proto};

/// What kind of address is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Front {
    /// The cluster address.
    Cluster,
    /// The node port at a node's address that its object names.
    NodePort(&'static str),
    /// The node port at another address of a node.
    SecondAddress(&'static str),
    /// The node port at the loopback address of the node that asks.
    Loopback,
    /// An address of the load balancer; false if its `ipMode` is `Proxy`.
    Balancer(bool),
    /// An external IP.
    External,
    /// Both of the two.
    ExternalBalancer,
    /// A port that no Service has at the cluster address.
    ClusterOther,
    /// A port that no Service has at a load balancer's address or an external IP.
    OutsideOther,
    /// An address of the cluster's range that no Service has.
    Unallocated,
}

/// One question.
#[derive(Clone, Copy, Debug)]
pub struct Question {
    /// The Service, by its place in the list.
    pub case: usize,
    pub front: Front,
    pub proto: Proto,
    pub target: SocketAddr,
    pub from: Place,
    /// The port of the Service that is asked, by its place in the list; `None` for one that no Service has.
    pub port: Option<usize>,
}

impl Question {
    /// The node whose proxy has to know the answer.
    pub fn entry(&self) -> &'static str {
        if let Front::NodePort(node) | Front::SecondAddress(node) = self.front {
            return node;
        }
        self.from.node().unwrap_or_else(|| led_to(self.target.ip()))
    }

    /// True if a client of the cluster asks, at its own node.
    pub fn is_asked_at_home(&self) -> bool {
        self.from.node() == Some(self.entry())
    }

    /// Its family.
    pub const fn family(&self) -> Family {
        Family::of(self.target.ip())
    }
}

/// A port that no Service has.
const UNKNOWN_PORT: u16 = 9999;
/// The number of a Service that nobody draws.
const UNALLOCATED: u16 = 0x7000;

/// All questions about these Services.
pub fn all(cases: &[Case], nodes: &[Node]) -> Vec<Question> {
    let mut questions: Vec<Question> = cases.iter().enumerate().flat_map(|(i, case)| about(i, case, nodes)).collect();
    for family in [Family::V4, Family::V6] {
        let target = SocketAddr::new(vip(UNALLOCATED, family), UNKNOWN_PORT);
        for proto in Proto::ALL {
            for from in Place::ALL {
                questions.push(Question { case: 0, front: Front::Unallocated, proto, target, from, port: None });
            }
        }
    }
    questions
}

fn about(index: usize, case: &Case, nodes: &[Node]) -> Vec<Question> {
    let mut found = Vec::new();
    let mut ask = |front, proto, ip: IpAddr, number, port, places: &[Place]| {
        let target = SocketAddr::new(ip, number);
        found.extend(places.iter().map(|from| Question { case: index, front, proto, target, from: *from, port }));
    };
    for family in [Family::V4, Family::V6] {
        for (i, port) in case.ports.iter().enumerate() {
            if let Some(ip) = case.vip(family) {
                ask(Front::Cluster, port.proto, ip, port.number, Some(i), &Place::ALL);
            }
            if case.type_ == Type::ClusterIp {
                continue;
            }
            for (name, node) in NODES.into_iter().zip(nodes) {
                let ip = if family == Family::V4 { node.v4().into() } else { node.v6().into() };
                ask(Front::NodePort(name), port.proto, ip, port.node_port, Some(i), &Place::ALL);
            }
            let second = second_address("n1", family);
            // To pods of other nodes, it is an address of the world: they are masqueraded there.
            let all = [Place::Outside, Place::PodA, Place::NodeA, Place::NodeB];
            ask(Front::SecondAddress("n1"), port.proto, second, port.node_port, Some(i), &all);
            let loopback = if family == Family::V4 { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
            ask(Front::Loopback, port.proto, loopback, port.node_port, Some(i), &[Place::NodeA]);
        }
    }
    for ip in case.outside() {
        for (i, port) in case.ports.iter().enumerate() {
            ask(front_of(case, ip), port.proto, ip, port.number, Some(i), &Place::ALL);
        }
        // No Service has the family there, and no proxy the address.
        if case.vip(Family::of(ip)).is_some() && case.is_served_at(ip) {
            for proto in Proto::ALL {
                ask(Front::OutsideOther, proto, ip, UNKNOWN_PORT, None, &Place::ALL);
            }
        }
    }
    for ip in case.families.iter().filter_map(|family| case.vip(*family)) {
        ask(Front::ClusterOther, Proto::Tcp, ip, UNKNOWN_PORT, None, &Place::ALL);
    }
    found
}

fn front_of(case: &Case, ip: IpAddr) -> Front {
    match (case.external_ips.contains(&ip), case.is_balanced_at(ip)) {
        (true, true) => Front::ExternalBalancer,
        (true, false) => Front::External,
        (false, is_served) => Front::Balancer(is_served),
    }
}

/// For each question the one that tells what the answer would be if something did not stand in the way: of source ranges, the
/// node port at the client's own node; of a node's second address, its first; of a loopback address, the node's own; of a pod that asks another node, a client outside.
pub fn siblings(questions: &[Question]) -> Vec<Option<usize>> {
    let key = |it: &Question, from, node| (it.case, it.port, it.family(), from, node);
    let nodes = questions.iter().enumerate().filter_map(|(i, it)| match it.front {
        Front::NodePort(node) => Some((key(it, it.from, node), i)),
        _ => None,
    });
    let nodes: BTreeMap<_, _> = nodes.collect();
    let of = |it: &Question| {
        let (from, node) = match it.front {
            Front::NodePort(node) if !it.from.is_node() && !it.is_asked_at_home() => (Place::Outside, node),
            Front::SecondAddress(node) => (it.from, node),
            Front::Balancer(true) | Front::ExternalBalancer | Front::Loopback => (it.from, it.from.node()?),
            _ => return None,
        };
        nodes.get(&key(it, from, node)).copied()
    };
    questions.iter().map(of).collect()
}
