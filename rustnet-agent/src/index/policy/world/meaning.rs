//! What objects mean: a plain reading of the API's rules for one flow, over all objects, each time from the beginning.

use super::{Flow, KubeClusterPolicy, NODE, World};
use crate::source::convert::POLICY_AUDIT;
use crate::source::policy_api::{Peer, Protocol, Rule};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::api::networking::v1::{NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// What one end says of a flow.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Allowed,
    Audited,
    Denied,
}

type Labels = BTreeMap<String, String>;

impl World {
    /// True if the flow may be opened.
    pub fn allows(&self, flow: &Flow) -> bool {
        self.ends(flow).iter().all(|end| *end != End::Denied)
    }

    /// True if the flow may be opened, and is reported.
    pub fn is_audited(&self, flow: &Flow) -> bool {
        self.allows(flow) && self.ends(flow).contains(&End::Audited)
    }

    /// What each end of a flow says of it.
    fn ends(&self, flow: &Flow) -> [End; 2] {
        if self.policies.is_empty() && self.cluster.is_empty() {
            return [End::Allowed; 2];
        }
        let end = |own: IpAddr, other: IpAddr, direction: &str| {
            if !self.interfaces.contains_key(&own) {
                return End::Allowed;
            }
            match self.pod(own).filter(|pod| node(pod) == NODE) {
                Some(pod) if self.allows_in_all_tiers(pod, other, direction, flow) => End::Allowed,
                // What the Admin tier denies is not audited.
                Some(pod)
                    if self.audits(pod) && self.allows_in_tier("Admin", pod, other, direction, flow, &|| true) =>
                {
                    End::Audited
                }
                _ => End::Denied,
            }
        };
        [end(flow.client, flow.server, "Egress"), end(flow.server, flow.client, "Ingress")]
    }

    /// True if the namespace of a pod is audited.
    fn audits(&self, pod: &Pod) -> bool {
        let object = self.namespaces.iter().find(|it| it.metadata.name == pod.metadata.namespace).unwrap();
        object.metadata.annotations.as_ref().is_some_and(|all| all.contains_key(POLICY_AUDIT))
    }

    /// The pod with an address of its own.
    pub(super) fn pod(&self, ip: IpAddr) -> Option<&Pod> {
        let has = |pod: &&Pod| {
            let status = pod.status.as_ref().unwrap();
            let is_over = ["Succeeded", "Failed"].contains(&status.phase.as_deref().unwrap_or(""));
            let is_hosts = pod.spec.as_ref().unwrap().host_network == Some(true);
            let ips = status.pod_ips.iter().flatten();
            !is_over && !is_hosts && ips.into_iter().any(|it| it.ip.parse() == Ok(ip))
        };
        self.pods.iter().find(has)
    }

    /// "Policy tiers are evaluated in the following order: Admin tier, NetworkPolicy tier, Baseline tier."
    fn allows_in_all_tiers(&self, pod: &Pod, other: IpAddr, direction: &str, flow: &Flow) -> bool {
        let of_tier = |tier, next: &dyn Fn() -> bool| self.allows_in_tier(tier, pod, other, direction, flow, next);
        let of_namespace = || self.allows_in_namespace(pod, other, direction, flow);
        of_tier("Admin", &|| of_namespace().unwrap_or_else(|| of_tier("Baseline", &|| true)))
    }

    /// What a tier of policies of the cluster decides, or `next` behind it. Of an address of pods without a known one, nobody knows
    /// which rules for pods match: it may what every pod may.
    fn allows_in_tier(
        &self,
        tier: &str,
        pod: &Pod,
        other: IpAddr,
        direction: &str,
        flow: &Flow,
        next: &dyn Fn() -> bool,
    ) -> bool {
        let mut policies: Vec<&KubeClusterPolicy> = self.cluster.iter().filter(|it| it.spec.tier == tier).collect();
        // "Policies with lower priority values have higher precedence." Of two alike the API leaves the choice; ours is by name.
        policies.sort_by_key(|it| (it.spec.priority, it.metadata.name.clone()));
        for policy in policies {
            let subject = &policy.spec.subject;
            let is_subject = match (&subject.namespaces, &subject.pods) {
                (Some(namespaces), _) => self.is_in(namespaces, pod),
                (None, Some(it)) => self.is_in(&it.namespace_selector, pod) && has_labels(&it.pod_selector, pod),
                (None, None) => false,
            };
            let rules = if direction == "Ingress" { &policy.spec.ingress } else { &policy.spec.egress };
            for rule in rules.iter().filter(|_| is_subject) {
                let is_certain = self.is_match(rule, other, flow, false);
                match rule.action.as_str() {
                    _ if !self.is_match(rule, other, flow, true) => {}
                    "Accept" if is_certain => return true,
                    "Deny" => return false,
                    // "Skips all further ClusterNetworkPolicy rules in the current tier."
                    "Pass" if is_certain || !next() => return next(),
                    _ => {}
                }
            }
        }
        next()
    }

    /// True if a rule matches a flow. `may`: or may match it.
    fn is_match(&self, rule: &Rule, other: IpAddr, flow: &Flow, may: bool) -> bool {
        let peers = rule.from.iter().chain(&rule.to).flatten();
        let is_unknown = may && self.pod(other).is_none() && self.nodes.iter().any(|node| has_range(node, other));
        let may_be = |peer: &Peer| is_unknown && (peer.namespaces.is_some() || peer.pods.is_some());
        let is_peer = |peer: &Peer| self.is_cluster_peer(peer, other) || may_be(peer);
        let is_port = |it: &Protocol| self.is_protocol(it, flow, is_unknown);
        peers.into_iter().any(is_peer) && rule.protocols.as_ref().is_none_or(|all| all.iter().any(is_port))
    }

    fn is_cluster_peer(&self, peer: &Peer, ip: IpAddr) -> bool {
        let pod = self.pod(ip);
        let is_node = |node: &Node| {
            let status = node.status.as_ref().unwrap();
            status.addresses.iter().flatten().any(|it| it.address.parse() == Ok(ip))
        };
        peer.namespaces.as_ref().is_some_and(|it| pod.is_some_and(|pod| self.is_in(it, pod)))
            || peer.pods.as_ref().is_some_and(|it| {
                pod.is_some_and(|pod| self.is_in(&it.namespace_selector, pod) && has_labels(&it.pod_selector, pod))
            })
            || peer.nodes.as_ref().is_some_and(|it| {
                self.nodes.iter().any(|node| is_node(node) && selects(it, node.metadata.labels.as_ref()))
            })
            || peer.networks.iter().flatten().any(|text| text.parse::<IpNet>().unwrap().contains(&ip))
    }

    fn is_protocol(&self, given: &Protocol, flow: &Flow, is_unknown: bool) -> bool {
        let kinds = [(&given.tcp, 6), (&given.udp, 17), (&given.sctp, 132)];
        let is_number = kinds.iter().any(|(ports, proto)| {
            let Some(ports) = ports.as_ref().filter(|_| flow.proto == *proto) else { return false };
            let port = i32::from(flow.port);
            ports.destination_port.as_ref().is_none_or(|it| {
                it.number == Some(port) || it.range.as_ref().is_some_and(|it| (it.start..=it.end).contains(&port))
            })
        });
        let has_ports = kinds.iter().any(|(_, proto)| flow.proto == *proto);
        is_number
            || given.destination_named_port.as_ref().is_some_and(|name| {
                let server = self.pod(flow.server);
                server.is_some_and(|pod| port_of(pod, name, flow.proto) == Some(i32::from(flow.port)))
                    || (is_unknown && server.is_none() && has_ports)
            })
    }

    fn is_in(&self, namespaces: &LabelSelector, pod: &Pod) -> bool {
        let name = pod.metadata.namespace.as_ref();
        let object = self.namespaces.iter().find(|it| it.metadata.name.as_ref() == name).unwrap();
        selects(namespaces, object.metadata.labels.as_ref())
    }

    /// What NetworkPolicies decide; `None`: none selects the pod.
    fn allows_in_namespace(&self, pod: &Pod, other: IpAddr, direction: &str, flow: &Flow) -> Option<bool> {
        let mut is_isolated = false;
        for policy in &self.policies {
            let spec = policy.spec.as_ref().unwrap();
            let default =
                if spec.egress.as_ref().is_some_and(|rules| !rules.is_empty()) { "Ingress Egress" } else { "Ingress" };
            let types =
                spec.policy_types.as_ref().filter(|it| !it.is_empty()).map_or(default.to_owned(), |it| it.join(" "));
            let is_ours = policy.metadata.namespace == pod.metadata.namespace
                && selects(spec.pod_selector.as_ref().unwrap(), pod.metadata.labels.as_ref())
                && types.contains(direction);
            if !is_ours {
                continue;
            }
            is_isolated = true;
            let rules: Vec<_> = if direction == "Ingress" {
                spec.ingress.iter().flatten().map(|rule| (rule.from.as_ref(), rule.ports.as_ref())).collect()
            } else {
                spec.egress.iter().flatten().map(|rule| (rule.to.as_ref(), rule.ports.as_ref())).collect()
            };
            for (peers, ports) in rules {
                let peer =
                    peers.is_none_or(|all| all.is_empty() || all.iter().any(|it| self.is_peer(policy, it, other)));
                let port = ports.is_none_or(|all| all.is_empty() || all.iter().any(|it| self.is_port(it, flow)));
                if peer && port {
                    return Some(true);
                }
            }
        }
        is_isolated.then_some(false)
    }

    fn is_peer(&self, policy: &NetworkPolicy, peer: &NetworkPolicyPeer, ip: IpAddr) -> bool {
        if let Some(block) = &peer.ip_block {
            let has = |text: &String| text.parse::<IpNet>().unwrap().contains(&ip);
            return has(&block.cidr) && !block.except.iter().flatten().any(has);
        }
        let Some(pod) = self.pod(ip) else { return false };
        let namespace = pod.metadata.namespace.as_ref().unwrap();
        let is_in = match &peer.namespace_selector {
            None => policy.metadata.namespace.as_ref() == Some(namespace),
            Some(selector) => {
                let object = self.namespaces.iter().find(|it| it.metadata.name.as_ref() == Some(namespace)).unwrap();
                selects(selector, object.metadata.labels.as_ref())
            }
        };
        is_in && peer.pod_selector.as_ref().is_none_or(|it| selects(it, pod.metadata.labels.as_ref()))
    }

    fn is_port(&self, given: &NetworkPolicyPort, flow: &Flow) -> bool {
        let is_proto = |name: Option<&String>| {
            flow.proto
                == [("TCP", 6), ("UDP", 17), ("SCTP", 132)]
                    .iter()
                    .find(|it| it.0 == name.map_or("TCP", |it| it))
                    .unwrap()
                    .1
        };
        let port = i32::from(flow.port);
        is_proto(given.protocol.as_ref())
            && match &given.port {
                None => true,
                Some(IntOrString::Int(first)) => (*first..=given.end_port.unwrap_or(*first)).contains(&port),
                Some(IntOrString::String(name)) => {
                    self.pod(flow.server).is_some_and(|pod| port_of(pod, name, flow.proto) == Some(port))
                }
            }
    }
}

/// The number of a named port: that of the first container which has one for the protocol.
fn port_of(pod: &Pod, name: &str, proto: u8) -> Option<i32> {
    let containers = &pod.spec.as_ref().unwrap().containers;
    let mut ports = containers.iter().filter_map(|it| it.ports.as_ref()).flatten();
    let is_it = |it: &&k8s_openapi::api::core::v1::ContainerPort| {
        let of = it.protocol.as_deref().unwrap_or("TCP");
        it.name.as_deref() == Some(name) && [("TCP", 6), ("UDP", 17), ("SCTP", 132)].contains(&(of, proto))
    };
    ports.find(is_it).map(|it| it.container_port)
}

fn has_labels(selector: &LabelSelector, pod: &Pod) -> bool {
    selects(selector, pod.metadata.labels.as_ref())
}

fn has_range(node: &Node, ip: IpAddr) -> bool {
    let ranges = node.spec.iter().flat_map(|spec| spec.pod_cidrs.iter().flatten());
    ranges.into_iter().any(|text| text.parse::<IpNet>().unwrap().contains(&ip))
}

fn node(pod: &Pod) -> &str {
    pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or("")
}

fn selects(selector: &LabelSelector, labels: Option<&Labels>) -> bool {
    let get = |key: &String| labels.and_then(|labels| labels.get(key));
    selector.match_labels.iter().flatten().all(|(key, value)| get(key) == Some(value))
        && selector.match_expressions.iter().flatten().all(|it| {
            let has = get(&it.key).is_some_and(|value| it.values.iter().flatten().any(|other| other == value));
            match it.operator.as_str() {
                "In" => has,
                "NotIn" => !has,
                "Exists" => get(&it.key).is_some(),
                "DoesNotExist" => get(&it.key).is_none(),
                other => panic!("{other}"),
            }
        })
}
