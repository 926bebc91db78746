//! `v1/Pod` and `v1/Namespace`: addresses, labels, named ports, and a pod's wish for its sockets.

use super::{BadName, Converter, Findings, address, port, protocol, reference};
use crate::model::{NAME_LABEL, NamedPort, Namespace, Pod};
use crate::source::{Event, Kind, Object};
use k8s_openapi::api::core::v1::{Namespace as KubeNamespace, Pod as KubePod, PodSpec, PodStatus};
use std::sync::Arc;

/// Annotation of a Pod: `true` has its sockets ask for Services by themselves, `false` leaves that to its packets.
pub const SOCKET_LB: &str = "rustnet.io/socket-lb";
/// Annotation of a Namespace: `true` lets flows of its pods pass, and has them reported, that NetworkPolicies and the Baseline tier deny.
pub const POLICY_AUDIT: &str = "rustnet.io/policy-audit";
/// Annotation by which the kubelet says of what static pod an object is the mirror: the UID by which the runtime knows that one.
pub const MIRROR: &str = "kubernetes.io/config.mirror";

impl Converter {
    /// What an added or changed Namespace means.
    pub fn namespace(&mut self, namespace: &KubeNamespace) -> Result<Event, BadName> {
        let object = reference(Kind::Namespace, &namespace.metadata)?;
        let mut labels = namespace.metadata.labels.clone().unwrap_or_default();
        // The API server sets it; a manifest may be without.
        labels.insert(NAME_LABEL.to_owned(), object.name.to_string());
        let labels = self.labels(&labels);
        let mut findings = Findings::new(&object);
        let is_audited = is_audited(namespace, &mut findings);
        let namespace = Namespace { name: object.name, labels, is_audited, problems: findings.done() };
        Ok(Event::Apply(Object::Namespace(Arc::new(namespace))))
    }

    /// What an added or changed Pod means.
    pub fn pod(&mut self, pod: &KubePod) -> Result<Event, BadName> {
        let object = reference(Kind::Pod, &pod.metadata)?;
        let mut findings = Findings::new(&object);
        let (spec, status) = (pod.spec.as_ref(), pod.status.as_ref());
        // Its status keeps the addresses of a pod that has finished; they may be another's by now.
        let finished = |status: &&PodStatus| matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
        let given = status.filter(|it| !finished(it)).and_then(|it| it.pod_ips.as_deref()).unwrap_or_default();
        let pod = Pod {
            name: object.name,
            uid: pod
                .metadata
                .annotations
                .as_ref()
                .and_then(|all| all.get(MIRROR))
                .or(pod.metadata.uid.as_ref())
                .map_or("", |it| it)
                .into(),
            node: self.strings.intern(spec.and_then(|spec| spec.node_name.as_deref()).unwrap_or("")),
            addresses: given.iter().filter_map(|pod_ip| address(&pod_ip.ip)).collect(),
            host_network: spec.and_then(|spec| spec.host_network).unwrap_or(false),
            host_ports: spec.is_some_and(|spec| {
                let ports = spec.containers.iter().filter_map(|container| container.ports.as_ref()).flatten();
                ports.into_iter().any(|port| port.host_port.is_some_and(|port| port > 0))
            }),
            socket_lb: socket_lb(pod, &mut findings),
            labels: pod.metadata.labels.as_ref().map(|labels| self.labels(labels)).unwrap_or_default(),
            ports: spec.map(|spec| self.named_ports(spec)).unwrap_or_default(),
            problems: findings.done(),
        };
        Ok(Event::Apply(Object::Pod(Arc::new(pod))))
    }

    /// The named ports of containers that run all the time. What is wrong with one is for the kubelet to say.
    fn named_ports(&mut self, spec: &PodSpec) -> Box<[NamedPort]> {
        // As the API server's own search does (`podutil.FindPort`).
        let sidecars =
            spec.init_containers.iter().flatten().filter(|it| it.restart_policy.as_deref() == Some("Always"));
        let ports = spec.containers.iter().chain(sidecars).filter_map(|container| container.ports.as_deref()).flatten();
        let named = ports.filter_map(|given| {
            let name = given.name.as_deref().filter(|name| !name.is_empty())?;
            let (proto, port) = (protocol(given.protocol.as_deref()).ok()?, port(given.container_port).ok()?);
            Some(NamedPort { name: self.strings.intern(name), proto, port })
        });
        named.collect()
    }
}

fn socket_lb(pod: &KubePod, findings: &mut Findings) -> Option<bool> {
    let text = pod.metadata.annotations.as_ref()?.get(SOCKET_LB)?;
    let wanted = text.parse().ok();
    if wanted.is_none() {
        let message =
            format!("{text:?} is neither, its sockets do as the setting --socket-lb says; give \"true\" or \"false\"");
        findings.add(format!("metadata.annotations[{SOCKET_LB}]"), message);
    }
    wanted
}

fn is_audited(namespace: &KubeNamespace, findings: &mut Findings) -> bool {
    let text = namespace.metadata.annotations.as_ref().and_then(|all| all.get(POLICY_AUDIT));
    let wanted = text.map(|text| text.parse());
    if let (Some(text), Some(Err(_))) = (text, &wanted) {
        let message = format!("{text:?} is neither, its network policies are enforced; give \"true\" or \"false\"");
        findings.add(format!("metadata.annotations[{POLICY_AUDIT}]"), message);
    }
    matches!(wanted, Some(Ok(true)))
}

#[cfg(test)]
mod tests;
