//! `v1/Node`: addresses and pod ranges.

use super::{BadName, Converter, Findings, created, range, reference, unicast};
use crate::model::Node;
use crate::source::{Event, Kind, Object};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Node as KubeNode, NodeSpec};
use std::net::IpAddr;
use std::sync::Arc;

/// Label of a node's zone.
const ZONE: &str = "topology.kubernetes.io/zone";
/// Taint of a node that the cluster autoscaler is about to remove.
const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

impl Converter {
    /// What an added or changed Node means.
    pub fn node(&mut self, node: &KubeNode) -> Result<Event, BadName> {
        let object = reference(Kind::Node, &node.metadata)?;
        let mut findings = Findings::new(&object);
        let mut addresses: Vec<IpAddr> = Vec::new();
        let given = node.status.as_ref().and_then(|status| status.addresses.as_deref()).unwrap_or_default();
        for (i, address) in given.iter().enumerate().filter(|(_, address)| address.type_ == "InternalIP") {
            match unicast(&address.address) {
                Ok(ip) if addresses.contains(&ip) => {}
                Ok(ip) => addresses.push(ip),
                Err(wrong) => findings.add(format!("status.addresses[{i}]"), wrong),
            }
        }
        // Names among them are none.
        let others = given.iter().filter(|address| address.type_ != "InternalIP");
        let mut other_addresses: Vec<IpAddr> = others.filter_map(|address| unicast(&address.address).ok()).collect();
        other_addresses.retain(|ip| !addresses.contains(ip));
        other_addresses.sort_unstable();
        other_addresses.dedup();
        if addresses.is_empty() {
            let message =
                "no InternalIP, so that its pods cannot be reached from other nodes; give the kubelet --node-ip";
            findings.add("status.addresses", message);
        }
        let pod_cidrs = node.spec.as_ref().map(|spec| pod_cidrs(spec, &mut findings)).unwrap_or_default();
        if pod_cidrs.is_empty() {
            let message = "no pod range, so that it can have no pods; set podCIDRs or let the controller manager do it \
                           (--allocate-node-cidrs --cluster-cidr)";
            findings.add("spec.podCIDRs", message);
        }
        let zone = node.metadata.labels.as_ref().and_then(|labels| labels.get(ZONE)).map_or("", String::as_str);
        let node = Node {
            name: object.name,
            created: created(&node.metadata),
            addresses: addresses.into(),
            other_addresses: other_addresses.into(),
            labels: node.metadata.labels.as_ref().map(|labels| self.labels(labels)).unwrap_or_default(),
            pod_cidrs,
            zone: self.strings.intern(zone),
            is_leaving: is_leaving(node),
            problems: findings.done(),
        };
        Ok(Event::Apply(Object::Node(Arc::new(node))))
    }
}

/// True if kube-proxy reports such a node as not eligible for load balancers' traffic (KEP-3836).
fn is_leaving(node: &KubeNode) -> bool {
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
    node.metadata.deletion_timestamp.is_some() || taints.iter().any(|taint| taint.key == TO_BE_DELETED)
}

fn pod_cidrs(spec: &NodeSpec, findings: &mut Findings) -> Box<[IpNet]> {
    let all = spec.pod_cidrs.as_deref().unwrap_or_default();
    let given: Vec<&str> = if all.is_empty() {
        spec.pod_cidr.as_deref().filter(|cidr| !cidr.is_empty()).into_iter().collect()
    } else {
        all.iter().map(String::as_str).collect()
    };
    let mut cidrs: Vec<IpNet> = Vec::new();
    for (i, text) in given.into_iter().enumerate() {
        let at = format!("spec.podCIDRs[{i}]");
        let Some(cidr) = range(text) else {
            findings.add(at, format!("{text:?} is not a range, it is left out; write it like 10.244.1.0/24"));
            continue;
        };
        if cidr.prefix_len() == 0 {
            findings.add(at, format!("{cidr} is everything, it is left out; give the node a range of its own"));
            continue;
        }
        if cidr.addr() != cidr.network() {
            findings.add(at.as_str(), format!("{cidr} has host bits, it is taken as {}; write it so", cidr.trunc()));
        }
        let cidr = cidr.trunc();
        if cidrs.iter().any(|other| other.addr().is_ipv4() == cidr.addr().is_ipv4()) {
            findings
                .add(at, format!("{cidr} is a second range of its family, it is left out; a node has one a family"));
            continue;
        }
        cidrs.push(cidr);
    }
    cidrs.into()
}
