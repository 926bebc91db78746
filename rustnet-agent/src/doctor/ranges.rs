//! Ranges of pods, services and nodes against what the host and the Nodes really have. The agent's own rules judge
//! ([`Config::conflict`]); that the configured ranges lie apart is a condition for there being a [`Config`].

use ipnet::IpNet;
use rustnet_common::names::{OVERLAY_DEV, VETH_PREFIX};

use super::finding::{Finding, Level, split_remedy};
use super::nodes::KnownNode;
use crate::config::{Config, Role, Routing};
use crate::net::host::Host;
use crate::net::route::{self, Target};

/// Judges; the host and the Nodes are the facts.
pub fn check(config: &Config, host: &Host, nodes: &[KnownNode]) -> Vec<Finding> {
    let conflict = |level, of, what: &str, net: IpNet| {
        let message = config.conflict(of, what, net)?;
        let (detail, hint) = split_remedy(&message);
        Some(Finding::new(level, "overlap", detail).hint(hint))
    };
    let mut found = Vec::new();
    for (device, net) in networks(host) {
        let finding = conflict(Level::Fault, Role::Nodes, &format!("the network of {device}"), net);
        found.extend(finding.map(|finding| if of_pods(config, net) { former(finding, device) } else { finding }));
    }
    if found.is_empty() {
        found.extend(networks(host).filter_map(|(device, net)| in_pod_range(device, net, nodes)));
    }
    for (device, net) in routes(config, host) {
        found.extend(conflict(Level::Warning, Role::Nodes, &format!("the route by {device} to"), net));
    }
    for known in nodes {
        let node = &known.node;
        for cidr in &node.pod_cidrs {
            found.extend(conflict(Level::Fault, Role::Pods, &format!("the pod range of node {}", node.name), *cidr));
        }
        for ip in &node.addresses {
            found.extend(conflict(
                Level::Fault,
                Role::Nodes,
                &format!("the address of node {}", node.name),
                (*ip).into(),
            ));
        }
    }
    found.dedup();
    if found.is_empty() {
        let (pods, services) = (&config.cluster_pod_cidrs, &config.service_cidrs);
        let detail = if pods.is_empty() && services.is_empty() && config.pod_cidrs.is_empty() {
            "none configured, so that overlaps cannot be found (clusterPodCIDRs, serviceCIDRs)".to_owned()
        } else {
            let all: Vec<_> = config.pod_cidrs.iter().chain(pods).chain(services).map(ToString::to_string).collect();
            format!("{} lie apart from all networks and nodes", all.join(", "))
        };
        found.push(Finding::ok("ranges", detail));
    }
    found
}

/// A network in the range that a Node has for its pods: the Nodes tell those, whether settings do or not.
fn in_pod_range(device: &str, net: IpNet, nodes: &[KnownNode]) -> Option<Finding> {
    let overlap = |cidr: &IpNet| cidr.contains(&net) || net.contains(cidr);
    let (name, cidr) =
        nodes.iter().find_map(|it| Some((&it.node.name, it.node.pod_cidrs.iter().find(|cidr| overlap(cidr))?)))?;
    let detail = format!("the network of {device} {net} overlaps the pod range of node {name} {cidr}");
    Some(former(Finding::new(Level::Warning, "overlap", detail), device))
}

/// Whether a network is a part of the pods' ranges, as one node's share of them is.
fn of_pods(config: &Config, net: IpNet) -> bool {
    config.cluster_pod_cidrs.iter().chain(&config.pod_cidrs).any(|range| range.contains(&net))
}

/// What is most likely then.
fn former(finding: Finding, device: &str) -> Finding {
    finding.hint(format!(
        "give them ranges apart; if {device} is the former network's, delete it when its last pod has gone: ip link delete {device}"
    ))
}

fn is_ours(device: &str) -> bool {
    device.starts_with(VETH_PREFIX) || device == OVERLAY_DEV
}

/// Networks that devices of others are in.
fn networks(host: &Host) -> impl Iterator<Item = (&str, IpNet)> {
    host.addresses.iter().filter_map(|address| {
        let device = host.links.iter().find(|link| link.index == address.ifindex)?.name.as_str();
        let net = address.net;
        let link_local = match net {
            IpNet::V4(net) => net.addr().is_link_local(),
            IpNet::V6(net) => net.addr().is_unicast_link_local(),
        };
        let whole = net.prefix_len() == net.max_prefix_len();
        (!is_ours(device) && !net.addr().is_loopback() && !link_local && !whole).then(|| (device, net.trunc()))
    })
}

/// Routes of others to networks that no device is in. In native routing they may be what leads to the pods.
fn routes<'a>(config: &Config, host: &'a Host) -> Vec<(&'a str, IpNet)> {
    if config.routing == Routing::Native {
        return Vec::new();
    }
    let on_link: Vec<_> = networks(host).map(|(_, net)| net).collect();
    let routes = host.routes.iter().filter(|it| it.protocol != route::PROTOCOL && it.dst.prefix_len() > 0);
    let named = routes.filter_map(|it| {
        let Target::Via { oif, .. } = it.target else { return None };
        let device = host.links.iter().find(|link| link.index == oif)?.name.as_str();
        (!is_ours(device) && !on_link.contains(&it.dst)).then_some((device, it.dst))
    });
    named.collect()
}

#[cfg(test)]
mod tests {
    use super::super::finding::{assert_only, assert_well};
    use super::super::nodes::tests::node;
    use super::*;
    use crate::net::address::Address;
    use crate::net::link::Link;
    use crate::net::route::Route;

    fn config() -> Config {
        let args = [
            "x",
            "--node-name=n1",
            "--manifests=/m",
            "--cluster-pod-cidrs=10.244.0.0/16",
            "--service-cidrs=10.96.0.0/16",
        ];
        Config::load(args, &|_| None).expect("good")
    }

    fn host(nets: &[(&str, &str)], routes: &[(&str, &str)]) -> Host {
        let mut host = Host::default();
        for (i, (device, _)) in nets.iter().chain(routes).enumerate() {
            host.links.push(Link { index: i as u32 + 1, name: (*device).into(), ..Link::default() });
        }
        for (i, (_, net)) in nets.iter().enumerate() {
            host.addresses.push(Address { ifindex: i as u32 + 1, net: net.parse().expect("net"), scope: 0, flags: 0 });
        }
        for (i, (_, dst)) in routes.iter().enumerate() {
            let target = Target::Via { oif: (nets.len() + i) as u32 + 1, gateway: None };
            let dst = dst.parse().expect("net");
            host.routes.push(Route { dst, target, source: None, metric: 0, protocol: 4 });
        }
        host
    }

    #[test]
    fn ranges_apart_are_well() {
        let usual = host(
            &[
                ("lo", "127.0.0.1/8"),
                ("eth0", "192.0.2.1/24"),
                ("docker0", "172.17.0.1/16"),
                ("rnv1", "10.244.1.1/32"),
                // A single address is no network, wherever it lies.
                ("kube-ipvs0", "10.96.0.10/32"),
            ],
            &[("eth0", "0.0.0.0/0"), ("rnv1", "10.244.1.5/32"), ("eth0", "192.0.2.0/24"), ("wg0", "10.8.0.0/24")],
        );
        assert_well(&check(&config(), &usual, &[node("n1", "192.0.2.1", "10.244.1.0/24")]));
        let bare = Config::load(["x", "--node-name=n1", "--manifests=/m"], &|_| None).expect("good");
        assert_well(&check(&bare, &Host::default(), &[]));
    }

    #[test]
    fn one_fault_at_a_time() {
        let none = || host(&[], &[]);
        for (host, nodes, level, detail) in [
            (
                host(&[("eth0", "10.96.5.1/24")], &[]),
                vec![],
                Level::Fault,
                "the network of eth0 10.96.5.0/24 overlaps service range",
            ),
            (host(&[], &[("wg0", "10.244.0.0/15")]), vec![], Level::Warning, "the route by wg0 to 10.244.0.0/15"),
            (
                none(),
                vec![node("n2", "192.0.2.2", "10.96.7.0/24")],
                Level::Fault,
                "the pod range of node n2 10.96.7.0/24",
            ),
            (
                none(),
                vec![node("n2", "10.244.9.9", "10.244.2.0/24")],
                Level::Fault,
                "the address of node n2 10.244.9.9/32",
            ),
        ] {
            assert_only(&check(&config(), &host, &nodes), level, detail, "ranges apart");
        }
    }

    #[test]
    fn a_former_networks_bridge_is_reported_as_such() {
        let host = host(&[("cni0", "10.244.1.1/24")], &[]);
        let detail = "cni0 10.244.1.0/24 overlaps pod range";
        assert_only(&check(&config(), &host, &[]), Level::Fault, detail, "ip link delete cni0");
    }

    /// The Nodes tell the ranges, whether settings do or not.
    #[test]
    fn a_network_in_a_nodes_pod_range_is_reported_without_configured_ranges() {
        let bare = Config::load(["x", "--node-name=n1", "--manifests=/m"], &|_| None).expect("good");
        let nodes = [node("n1", "192.0.2.1", "172.17.1.0/24"), node("n2", "192.0.2.2", "172.17.2.0/24")];
        let docker = host(&[("eth0", "192.0.2.1/24"), ("docker0", "172.17.0.1/16")], &[]);
        let detail = "the network of docker0 172.17.0.0/16 overlaps the pod range of node n1 172.17.1.0/24";
        assert_only(&check(&bare, &docker, &nodes), Level::Warning, detail, "ip link delete docker0");
        assert_well(&check(&bare, &host(&[("eth0", "192.0.2.1/24")], &[]), &nodes));
    }

    #[test]
    fn configured_overlaps_never_become_a_configuration() {
        let args = [
            "x",
            "--node-name=n1",
            "--manifests=/m",
            "--cluster-pod-cidrs=10.96.0.0/12",
            "--service-cidrs=10.96.0.0/16",
        ];
        let refused = Config::load(args, &|_| None).expect_err("overlap");
        let refused = refused.downcast_ref().expect("a refusal");
        let groups = super::super::without_config(refused);
        let first = &groups[0].findings[0];
        assert_eq!(
            (groups[0].name, first.level, first.hint.as_str()),
            ("Configuration", Level::Fatal, "give them ranges apart")
        );
    }
}
