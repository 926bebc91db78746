//! What objects mean: a plain reading of the API's rules for one flow, over all objects, each time from the beginning.

use super::{Flow, NODE, World};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::networking::v1::{NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use std::collections::BTreeMap;
use std::net::IpAddr;

type Labels = BTreeMap<String, String>;

impl World {
    /// True if the flow may be opened.
    pub fn allows(&self, flow: &Flow) -> bool {
        if self.policies.is_empty() {
            return true;
        }
        let is_fine = |own: IpAddr, other: IpAddr, direction: &str| {
            if !self.interfaces.contains_key(&own) {
                return true;
            }
            match self.pod(own).filter(|pod| node(pod) == NODE) {
                Some(pod) => self.allows_one(pod, other, direction, flow),
                None => false,
            }
        };
        is_fine(flow.client, flow.server, "Egress") && is_fine(flow.server, flow.client, "Ingress")
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

    fn allows_one(&self, pod: &Pod, other: IpAddr, direction: &str, flow: &Flow) -> bool {
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
                    return true;
                }
            }
        }
        !is_isolated
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
                Some(IntOrString::String(name)) => self.pod(flow.server).is_some_and(|pod| {
                    let containers = &pod.spec.as_ref().unwrap().containers;
                    let mut ports = containers.iter().filter_map(|it| it.ports.as_ref()).flatten();
                    let first = ports.find(|it| it.name.as_ref() == Some(name) && is_proto(it.protocol.as_ref()));
                    first.is_some_and(|it| it.container_port == port)
                }),
            }
    }
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
