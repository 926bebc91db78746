//! Worlds for tests: random namespaces, pods and policies as the API server has them, what they mean, and what the maps say.

mod make;
mod meaning;
mod oracle;

pub use make::Random;
pub use oracle::{DIFFERENCES, Difference, Oracle};

use crate::index::policy::{DesiredPolicies, LocalInterface, Policies, PortPrefix, RuleKey};
use crate::model::{ClusterNetworkPolicy, Namespace, NetworkPolicy, Node, Pod};
use crate::source::convert::Converter;
use crate::source::policy_api::ClusterNetworkPolicy as KubeClusterPolicy;
use crate::source::{Event, Object};
use ipnet::{IpNet, Ipv6Net};
use k8s_openapi::api::core::v1::{Namespace as KubeNamespace, Node as KubeNode, Pod as KubePod};
use k8s_openapi::api::networking::v1::NetworkPolicy as KubePolicy;
use rustnet_common::policy::{ANY_CLASS, AUDIT, OPEN, PolicyRule};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

/// The node of the maps.
pub const NODE: &str = "n1";

/// All objects, and the interfaces of the node's pods.
#[derive(Clone, Debug, Default)]
pub struct World {
    /// Namespaces.
    pub namespaces: Vec<KubeNamespace>,
    /// Pods of all nodes.
    pub pods: Vec<KubePod>,
    /// Policies.
    pub policies: Vec<KubePolicy>,
    /// Policies of the cluster.
    pub cluster: Vec<KubeClusterPolicy>,
    /// Nodes, where there are policies of the cluster.
    pub nodes: Vec<KubeNode>,
    /// `rn_endpoints`.
    pub interfaces: BTreeMap<IpAddr, u32>,
}

/// Namespaces, pods and policies.
pub type Objects = (Vec<Arc<Namespace>>, Vec<Arc<Pod>>, Vec<Arc<NetworkPolicy>>);

/// A new flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Flow {
    /// Who opens it.
    pub client: IpAddr,
    /// Who gets it.
    pub server: IpAddr,
    /// IP protocol number.
    pub proto: u8,
    /// The server's port.
    pub port: u16,
}

impl World {
    /// What they are to the agent.
    pub fn objects(&self) -> Objects {
        let mut converter = Converter::new();
        let (mut namespaces, mut pods, mut policies) = (Vec::new(), Vec::new(), Vec::new());
        let events = self.namespaces.iter().map(|it| converter.namespace(it)).collect::<Vec<_>>();
        let events = events.into_iter().chain(self.pods.iter().map(|it| converter.pod(it)).collect::<Vec<_>>());
        let events = events.chain(self.policies.iter().map(|it| converter.network_policy(it)).collect::<Vec<_>>());
        for event in events {
            match event.unwrap() {
                Event::Apply(Object::Namespace(it)) => namespaces.push(it),
                Event::Apply(Object::Pod(it)) => pods.push(it),
                Event::Apply(Object::NetworkPolicy(it)) => policies.push(it),
                other => panic!("{other:?}"),
            }
        }
        (namespaces, pods, policies)
    }

    /// The nodes, and the policies of the cluster.
    fn cluster_objects(&self) -> (Vec<Arc<Node>>, Vec<Arc<ClusterNetworkPolicy>>) {
        let mut converter = Converter::new();
        let nodes = self.nodes.iter().map(|it| match converter.node(it) {
            Ok(Event::Apply(Object::Node(node))) => node,
            other => panic!("{other:?}"),
        });
        let nodes = nodes.collect();
        let policies = self.cluster.iter().map(|it| match converter.cluster_network_policy(it) {
            Ok(Event::Apply(Object::ClusterNetworkPolicy(policy))) => policy,
            other => panic!("{other:?}"),
        });
        (nodes, policies.collect())
    }

    /// What it leads to from the beginning.
    pub fn desired(&self) -> DesiredPolicies {
        let mut it = Policies::new(NODE.into());
        self.lead(&mut it);
        it.desired()
    }

    /// Brings the index to this world, from whatever it has.
    pub fn lead(&self, it: &mut Policies) {
        let (namespaces, pods, policies) = self.objects();
        for gone in it.policy_names().cloned().collect::<Vec<_>>() {
            if policies.iter().all(|policy| policy.name != gone) {
                it.delete_policy(&gone);
            }
        }
        for policy in &policies {
            it.apply_policy(policy);
        }
        for pod in &pods {
            it.apply_pod(pod);
        }
        for gone in it.pod_names().cloned().collect::<Vec<_>>() {
            if pods.iter().all(|pod| pod.name != gone) {
                it.delete_pod(&gone);
            }
        }
        for gone in it.namespace_names().collect::<Vec<_>>() {
            if namespaces.iter().all(|namespace| namespace.name != gone) {
                it.delete_namespace(&gone);
            }
        }
        for namespace in &namespaces {
            it.apply_namespace(namespace);
        }
        let (nodes, cluster) = self.cluster_objects();
        for gone in it.cluster_policy_names().cloned().collect::<Vec<_>>() {
            if cluster.iter().all(|policy| policy.name != gone) {
                it.delete_cluster_policy(&gone);
            }
        }
        for policy in &cluster {
            it.apply_cluster_policy(policy);
        }
        for node in &nodes {
            it.apply_node(node);
        }
        let interface = |ifindex: &u32| LocalInterface { ifindex: *ifindex, ..LocalInterface::default() };
        it.set_interfaces(self.interfaces.iter().map(|(ip, ifindex)| (*ip, interface(ifindex))).collect());
    }
}

/// The maps as they would be if no namespace were audited.
pub fn without_audit(maps: &DesiredPolicies) -> DesiredPolicies {
    let mut enforcing = maps.clone();
    enforcing.rules.values_mut().filter(|rule| rule.flags & AUDIT != 0).for_each(|rule| rule.flags = 0);
    enforcing
}

/// What the programs make of a flow.
pub fn passes(maps: &DesiredPolicies, interfaces: &BTreeMap<IpAddr, u32>, flow: &Flow) -> bool {
    let Flow { client, server, proto, port } = *flow;
    if !maps.is_enforced {
        return true;
    }
    let class_of = |ip: IpAddr| maps.pods.get(&ip).map_or_else(|| class_of_cidr(&maps.cidrs, ip), |pod| pod.class);
    let decides = |own: IpAddr, other: IpAddr, is_client: bool| {
        let Some(ifindex) = interfaces.get(&own) else { return true };
        let Some(pod) = maps.pods.get(&own).filter(|pod| pod.ifindex == *ifindex) else { return false };
        let set = if is_client { pod.egress } else { pod.ingress };
        let look_up = |class| look_up(&maps.rules, set, class, proto, port);
        let hit = look_up(class_of(other)).or_else(|| look_up(ANY_CLASS));
        set == OPEN || hit.is_some_and(|rule| rule.flags % 2 == 1)
    };
    decides(client, server, true) && decides(server, client, false)
}

fn look_up(rules: &BTreeMap<RuleKey, PolicyRule>, set: u32, class: u32, proto: u8, port: u16) -> Option<PolicyRule> {
    let ports = PortPrefix::new(proto, port, 16);
    let mut longest_first = ports.around().collect::<Vec<_>>();
    longest_first.push(ports);
    longest_first.into_iter().rev().find_map(|ports| rules.get(&RuleKey { set, class, ports }).copied())
}

/// The trie holds IPv4 as mapped.
fn class_of_cidr(cidrs: &BTreeMap<IpNet, u32>, ip: IpAddr) -> u32 {
    let mapped = |net: &IpNet| match net {
        IpNet::V4(net) => Ipv6Net::new(net.addr().to_ipv6_mapped(), net.prefix_len() + 96).unwrap(),
        IpNet::V6(net) => *net,
    };
    let ip = match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    let having = cidrs.iter().map(|(net, class)| (mapped(net), class)).filter(|(net, _)| net.contains(&ip));
    having.max_by_key(|(net, _)| net.prefix_len()).map_or(ANY_CLASS, |(_, class)| *class)
}
