//! Ranges of pods, services and nodes, which must lie apart: from each other, and from what the kernel keeps for itself.

use std::str::FromStr;

use ipnet::IpNet;

use super::Config;
use super::text::Reader;

/// What the addresses of a range belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Pods, of this node or of all.
    Pods,
    /// Services.
    Services,
    /// Nodes.
    Nodes,
}

impl Role {
    /// For messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pods => "pod range",
            Self::Services => "service range",
            Self::Nodes => "node range",
        }
    }
}

struct Range {
    flag: &'static str,
    role: Role,
    net: IpNet,
}

impl Config {
    /// Says with which configured range a range or address learnt later collides: `what` is such as "pod range of node n1".
    /// `of` tells what the newcomer is, so that pods are not compared with pods.
    pub fn conflict(&self, of: Role, what: &str, net: IpNet) -> Option<String> {
        self.ranges()
            .into_iter()
            .filter(|range| range.role != of && overlap(range.net, net))
            .map(|range| format!("{what} {net} overlaps {} {}; give them ranges apart", range.role.name(), range.net))
            .next()
    }

    fn ranges(&self) -> Vec<Range> {
        let groups = [
            ("pod-cidrs", Role::Pods, &self.pod_cidrs),
            ("cluster-pod-cidrs", Role::Pods, &self.cluster_pod_cidrs),
            ("service-cidrs", Role::Services, &self.service_cidrs),
            ("node-cidrs", Role::Nodes, &self.node_cidrs),
        ];
        let range = |flag, role, net: &IpNet| Range { flag, role, net: *net };
        groups.into_iter().flat_map(|(flag, role, nets)| nets.iter().map(move |net| range(flag, role, net))).collect()
    }

    pub(super) fn check_ranges(&self, read: &mut Reader<'_>) {
        let ranges = self.ranges();
        for (i, a) in ranges.iter().enumerate() {
            for b in ranges.iter().take(i).filter(|b| b.role != a.role && overlap(a.net, b.net)) {
                read.problems.push(format!(
                    "{}: {} {} overlaps {} {} of {}; give them ranges apart",
                    read.name(a.flag),
                    a.role.name(),
                    a.net,
                    b.role.name(),
                    b.net,
                    read.name(b.flag),
                ));
            }
            if let Some(reserved) = reserved_range(a.net) {
                read.problems.push(format!(
                    "{}: {} {} overlaps {reserved}; choose another range",
                    read.name(a.flag),
                    a.role.name(),
                    a.net
                ));
            }
        }
        for v4 in [true, false] {
            let of_family: Vec<_> = self.pod_cidrs.iter().filter(|net| net.addr().is_ipv4() == v4).collect();
            if let [first, second, ..] = of_family[..] {
                read.problems.push(format!(
                    "{}: {first} and {second} are of one family; give one IPv4 and one IPv6 range at most",
                    read.name("pod-cidrs")
                ));
            }
        }
        for net in &self.pod_cidrs {
            let same = |other: &&IpNet| other.addr().is_ipv4() == net.addr().is_ipv4();
            let mut cluster = self.cluster_pod_cidrs.iter().filter(same).peekable();
            if cluster.peek().is_some() && !cluster.any(|other| other.contains(net)) {
                read.problems.push(format!(
                    "{}: {net} lies outside the ranges of {}; widen those or choose a range inside",
                    read.name("pod-cidrs"),
                    read.name("cluster-pod-cidrs")
                ));
            }
        }
    }
}

fn overlap(a: IpNet, b: IpNet) -> bool {
    a.contains(&b) || b.contains(&a)
}

/// The range that neither pods nor services nor nodes can have, if this one shares addresses with one: for messages.
pub fn reserved_range(net: IpNet) -> Option<String> {
    let table = [
        ("127.0.0.0/8", "the loopback range"),
        ("169.254.0.0/16", "the link-local range, which holds the pods' gateway"),
        ("224.0.0.0/4", "the multicast range"),
        ("::1/128", "the loopback address"),
        ("fe80::/10", "the link-local range, which holds the pods' gateway"),
        ("ff00::/8", "the multicast range"),
        ("::ffff:0:0/96", "the range of IPv4-mapped addresses"),
    ];
    table
        .into_iter()
        .filter_map(|(range, name)| Some((IpNet::from_str(range).ok()?, name)))
        .find(|(range, _)| overlap(*range, net))
        .map(|(range, name)| format!("{range}, {name}"))
}
