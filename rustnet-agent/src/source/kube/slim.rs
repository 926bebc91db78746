//! Nodes, Pods, Services and ServiceCIDRs of which only what is of use is read.
//!
//! Kubelets write their Node every few minutes, each with its images, conditions, annotations and the owners of all its
//! fields, and each agent of the cluster reads them all. A Pod carries its containers. The JSON of what is not named here
//! is skipped, and nothing is allocated for it.

use k8s_openapi::api::core::v1::{
    Container, ContainerPort, LoadBalancerStatus, Node, NodeAddress, NodeCondition, NodeSpec, NodeStatus, Pod, PodIP,
    PodSpec, PodStatus, Service, ServiceSpec, ServiceStatus, Taint,
};
use k8s_openapi::api::networking::v1::{ServiceCIDR, ServiceCIDRSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::Resource;
use serde::{Deserialize, Deserializer};
use std::borrow::Cow;
use std::collections::BTreeMap;

use crate::source::convert::{MIRROR, SOCKET_LB};

/// A Node with its name, labels, age, deletion, ranges, taints and addresses, and the condition NetworkUnavailable.
#[derive(Clone, Debug)]
pub(super) struct SlimNode(pub(super) Node);

/// A Pod with its name, labels, node, phase and addresses, the named ports of its containers, and its annotation for socket
/// load-balancing.
#[derive(Clone, Debug)]
pub(super) struct SlimPod(pub(super) Pod);

/// A Service without its conditions. Whoever may write a status may leave out what a condition has to have.
#[derive(Clone, Debug)]
pub(super) struct SlimService(pub(super) Service);

/// A ServiceCIDR with its name and ranges.
#[derive(Clone, Debug)]
pub(super) struct SlimServiceCidr(pub(super) ServiceCIDR);

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Meta {
    name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
    creation_timestamp: Option<Time>,
    deletion_timestamp: Option<Time>,
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<Annotations>,
}

/// The annotations that are of use.
#[derive(Deserialize)]
struct Annotations {
    #[serde(rename = "rustnet.io/socket-lb")]
    socket_lb: Option<String>,
    #[serde(rename = "kubernetes.io/config.mirror")]
    mirror: Option<String>,
}

#[derive(Deserialize)]
struct NodeFields {
    #[serde(default)]
    metadata: Meta,
    spec: Option<NodeSpecFields>,
    status: Option<NodeStatusFields>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct NodeSpecFields {
    #[serde(rename = "podCIDR")]
    pod_cidr: Option<String>,
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Option<Vec<String>>,
    taints: Option<Vec<Taint>>,
}

#[derive(Deserialize)]
struct NodeStatusFields {
    addresses: Option<Vec<NodeAddress>>,
    conditions: Option<Vec<Condition>>,
}

#[derive(Deserialize)]
struct Condition {
    #[serde(rename = "type")]
    kind: ConditionKind,
    status: String,
}

#[derive(Deserialize, PartialEq, Eq)]
enum ConditionKind {
    NetworkUnavailable,
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
struct PodFields {
    #[serde(default)]
    metadata: Meta,
    spec: Option<PodSpecFields>,
    status: Option<PodStatusFields>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PodSpecFields {
    node_name: Option<String>,
    host_network: Option<bool>,
    containers: Option<Vec<ContainerFields>>,
    init_containers: Option<Vec<ContainerFields>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ContainerFields {
    restart_policy: Option<String>,
    ports: Option<Vec<PortFields>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PortFields {
    name: Option<String>,
    container_port: i32,
    protocol: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PodStatusFields {
    phase: Option<String>,
    #[serde(rename = "podIPs")]
    pod_ips: Option<Vec<PodIP>>,
}

#[derive(Deserialize)]
struct ServiceFields {
    #[serde(default)]
    metadata: ObjectMeta,
    spec: Option<ServiceSpec>,
    status: Option<ServiceStatusFields>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ServiceStatusFields {
    load_balancer: Option<LoadBalancerStatus>,
}

#[derive(Deserialize)]
struct ServiceCidrFields {
    #[serde(default)]
    metadata: Meta,
    spec: Option<ServiceCidrSpecFields>,
}

#[derive(Deserialize)]
struct ServiceCidrSpecFields {
    cidrs: Option<Vec<String>>,
}

impl From<Meta> for ObjectMeta {
    fn from(it: Meta) -> Self {
        let named = |it: Annotations| [(SOCKET_LB, it.socket_lb), (MIRROR, it.mirror)];
        let annotations = it.annotations.into_iter().flat_map(named);
        let annotations: BTreeMap<_, _> =
            annotations.filter_map(|(name, text)| Some((name.to_owned(), text?))).collect();
        Self {
            name: it.name,
            namespace: it.namespace,
            uid: it.uid,
            resource_version: it.resource_version,
            creation_timestamp: it.creation_timestamp,
            deletion_timestamp: it.deletion_timestamp,
            labels: it.labels,
            annotations: Some(annotations).filter(|all| !all.is_empty()),
            ..Self::default()
        }
    }
}

impl From<NodeStatusFields> for NodeStatus {
    fn from(it: NodeStatusFields) -> Self {
        let ours = |it: &Condition| it.kind == ConditionKind::NetworkUnavailable;
        let condition = |it: Condition| NodeCondition {
            type_: crate::api::CONDITION.to_owned(),
            status: it.status,
            ..NodeCondition::default()
        };
        let conditions = it.conditions.map(|all| all.into_iter().filter(ours).map(condition).collect());
        Self { addresses: it.addresses, conditions, ..Self::default() }
    }
}

/// The containers that have named ports, with these alone.
fn with_named_ports(containers: Vec<ContainerFields>) -> Vec<Container> {
    let port = |it: PortFields| {
        let PortFields { name, container_port, protocol } = it;
        ContainerPort { name, container_port, protocol, ..ContainerPort::default() }
    };
    let container = |it: ContainerFields| {
        let named = it.ports.into_iter().flatten().filter(|port| port.name.is_some());
        let ports: Vec<_> = named.map(port).collect();
        let restart_policy = it.restart_policy;
        (!ports.is_empty()).then(|| Container { ports: Some(ports), restart_policy, ..Container::default() })
    };
    containers.into_iter().filter_map(container).collect()
}

impl<'de> Deserialize<'de> for SlimNode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let it = NodeFields::deserialize(deserializer)?;
        let spec = |it: NodeSpecFields| NodeSpec {
            pod_cidr: it.pod_cidr,
            pod_cidrs: it.pod_cidrs,
            taints: it.taints,
            ..NodeSpec::default()
        };
        let (spec, status) = (it.spec.map(spec), it.status.map(NodeStatus::from));
        Ok(Self(Node { metadata: it.metadata.into(), spec, status }))
    }
}

impl<'de> Deserialize<'de> for SlimPod {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let it = PodFields::deserialize(deserializer)?;
        let spec = |it: PodSpecFields| PodSpec {
            node_name: it.node_name,
            host_network: it.host_network,
            containers: it.containers.map(with_named_ports).unwrap_or_default(),
            init_containers: it.init_containers.map(with_named_ports),
            ..PodSpec::default()
        };
        let status = |it: PodStatusFields| PodStatus { phase: it.phase, pod_ips: it.pod_ips, ..PodStatus::default() };
        Ok(Self(Pod { metadata: it.metadata.into(), spec: it.spec.map(spec), status: it.status.map(status) }))
    }
}

impl<'de> Deserialize<'de> for SlimService {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let it = ServiceFields::deserialize(deserializer)?;
        let status = |it: ServiceStatusFields| ServiceStatus { load_balancer: it.load_balancer, conditions: None };
        Ok(Self(Service { metadata: it.metadata, spec: it.spec, status: it.status.map(status) }))
    }
}

impl<'de> Deserialize<'de> for SlimServiceCidr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let it = ServiceCidrFields::deserialize(deserializer)?;
        let spec = it.spec.map(|it| ServiceCIDRSpec { cidrs: it.cidrs });
        Ok(Self(ServiceCIDR { metadata: it.metadata.into(), spec, status: None }))
    }
}

/// What a slim object is to the API server: the whole one.
macro_rules! is_resource {
    ($slim:ty, $whole:ty) => {
        impl Resource for $slim {
            type DynamicType = ();
            type Scope = <$whole as Resource>::Scope;

            fn kind(_: &()) -> Cow<'_, str> {
                <$whole as Resource>::kind(&())
            }
            fn group(_: &()) -> Cow<'_, str> {
                <$whole as Resource>::group(&())
            }
            fn version(_: &()) -> Cow<'_, str> {
                <$whole as Resource>::version(&())
            }
            fn plural(_: &()) -> Cow<'_, str> {
                <$whole as Resource>::plural(&())
            }
            fn meta(&self) -> &ObjectMeta {
                self.0.meta()
            }
            fn meta_mut(&mut self) -> &mut ObjectMeta {
                self.0.meta_mut()
            }
        }
    };
}

is_resource!(SlimNode, Node);
is_resource!(SlimPod, Pod);
is_resource!(SlimService, Service);
is_resource!(SlimServiceCidr, ServiceCIDR);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::convert::Converter;
    use serde::de::DeserializeOwned;
    use serde_json::{Value, json};

    fn read<T: DeserializeOwned>(value: &Value) -> T {
        serde_json::from_str(&value.to_string()).expect("an object")
    }

    fn node() -> Value {
        json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {
                "name": "n1", "uid": "u", "resourceVersion": "7", "creationTimestamp": "2026-01-02T03:04:05Z",
                "labels": {"topology.kubernetes.io/zone": "a", "kubernetes.io/os": "linux"},
                "annotations": {"big": "x"},
                "managedFields": [{"manager": "kubelet", "fieldsV1": {"f:status": {"f:images": {}}}}],
            },
            "spec": {
                "podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00:244::/64"], "providerID": "p",
                "taints": [{"key": "rustnet.io/agent-not-ready", "effect": "NoExecute", "timeAdded": "2026-01-02T03:04:05Z"}],
            },
            "status": {
                "addresses": [{"type": "InternalIP", "address": "192.0.2.1"}, {"type": "Hostname", "address": "n1"}],
                "conditions": [{"type": "Ready", "status": "True"}, {"type": "NetworkUnavailable", "status": "True"}],
                "images": [{"names": ["a", "b"], "sizeBytes": 1}],
                "nodeInfo": {"machineID": "m"},
            },
        })
    }

    #[test]
    fn a_slim_node_means_what_the_whole_one_means() {
        let (slim, whole) = (read::<SlimNode>(&node()).0, read::<Node>(&node()));
        let convert = |node: &Node| Converter::new().node(node).expect("an event");
        assert_eq!(convert(&slim), convert(&whole));
        let mut leaving = node();
        leaving["metadata"]["deletionTimestamp"] = json!("2026-01-03T03:04:05Z");
        assert_eq!(convert(&read::<SlimNode>(&leaving).0), convert(&read::<Node>(&leaving)));
        assert_ne!(convert(&read::<SlimNode>(&leaving).0), convert(&slim));
        assert_eq!(slim.spec.as_ref().map(|it| &it.taints), whole.spec.as_ref().map(|it| &it.taints));
        assert_eq!(slim.metadata.resource_version, whole.metadata.resource_version);
    }

    #[test]
    fn of_a_node_nothing_is_kept_that_nobody_reads() {
        let slim = read::<SlimNode>(&node()).0;
        let status = slim.status.expect("a status");
        assert_eq!((slim.metadata.annotations, slim.metadata.managed_fields), (None, None));
        assert_eq!((status.images, status.node_info), (None, None));
        let conditions: Vec<_> = status.conditions.into_iter().flatten().map(|it| (it.type_, it.status)).collect();
        assert_eq!(conditions, [("NetworkUnavailable".to_owned(), "True".to_owned())]);
    }

    #[test]
    fn a_slim_pod_means_what_the_whole_one_means() {
        for (phase, annotations) in [
            ("Running", json!({"rustnet.io/socket-lb": "true", "kubernetes.io/config.seen": "x"})),
            ("Running", json!({"rustnet.io/socket-lb": "on"})),
            ("Running", json!({"kubernetes.io/config.mirror": "m"})),
            ("Succeeded", json!(null)),
        ] {
            let pod = json!({
                "metadata": {
                    "name": "a", "namespace": "x", "uid": "u", "resourceVersion": "7", "annotations": annotations,
                    "labels": {"app": "web"},
                },
                "spec": {
                    "nodeName": "n1", "hostNetwork": true,
                    "containers": [
                        {"name": "c", "image": "i"},
                        {"name": "d", "image": "i", "ports": [
                            {"containerPort": 80},
                            {"name": "web", "containerPort": 8080, "protocol": "TCP", "hostIP": ""},
                        ]},
                    ],
                    "initContainers": [
                        {"name": "once", "ports": [{"name": "web", "containerPort": 1}]},
                        {"name": "sidecar", "restartPolicy": "Always", "ports": [{"name": "dns", "containerPort": 53, "protocol": "UDP"}]},
                    ],
                },
                "status": {"phase": phase, "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]},
            });
            let (slim, whole) = (read::<SlimPod>(&pod).0, read::<Pod>(&pod));
            let convert = |pod: &Pod| Converter::new().pod(pod).expect("an event");
            assert_eq!(convert(&slim), convert(&whole));
            assert_eq!(slim.metadata.resource_version, whole.metadata.resource_version);
            let containers = slim.spec.expect("a spec").containers;
            assert_eq!(containers.len(), 1, "of a container without named ports nothing is kept");
            assert_eq!(containers[0].image, None);
        }
    }

    /// The end-to-end test of a Service's status writes such a condition.
    #[test]
    fn a_service_with_an_odd_condition_is_read() {
        let service = |conditions: Value| {
            json!({
                "metadata": {"name": "a", "namespace": "x", "resourceVersion": "7", "annotations": {"k": "v"}},
                "spec": {"clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9"], "type": "LoadBalancer", "ports": [{"port": 80}]},
                "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}]}, "conditions": conditions},
            })
        };
        let condition = json!([{"type": "StatusUpdate", "status": "True", "reason": "E2E", "message": "", "lastTransitionTime": null}]);
        assert!(
            serde_json::from_str::<Service>(&service(condition.clone()).to_string()).is_err(),
            "this type is of no use"
        );
        let convert = |service: &Service| Converter::new().service(service).expect("an event");
        let whole = read::<Service>(&service(json!(null)));
        let slim = read::<SlimService>(&service(condition)).0;
        assert_eq!(convert(&slim), convert(&whole));
        assert_eq!((slim.metadata, slim.spec), (whole.metadata, whole.spec));
    }

    #[test]
    fn a_slim_service_cidr_means_what_the_whole_one_means() {
        for spec in
            [json!({"cidrs": ["10.96.0.0/16", "fd00:96::/112"]}), json!({"cidrs": ["x"]}), json!({}), json!(null)]
        {
            let object = json!({
                "metadata": {
                    "name": "kubernetes", "resourceVersion": "7", "deletionTimestamp": "2026-01-03T03:04:05Z",
                    "finalizers": ["networking.k8s.io/service-cidr-finalizer"],
                },
                "spec": spec,
                "status": {"conditions": null},
            });
            let (slim, whole) = (read::<SlimServiceCidr>(&object).0, read::<ServiceCIDR>(&object));
            let convert = |object: &ServiceCIDR| Converter::new().service_cidr(object).expect("an event");
            assert_eq!(convert(&slim), convert(&whole));
            assert_eq!(slim.metadata.resource_version, whole.metadata.resource_version);
            assert_eq!(slim.status, None);
        }
    }

    #[test]
    fn null_and_absent_fields_are_nothing() {
        for object in [
            json!({"metadata": {"name": "n1"}}),
            json!({"metadata": {"name": "n1", "labels": null}, "spec": {}, "status": {}}),
            json!({"metadata": {"name": "n1"}, "spec": {"taints": null, "podCIDRs": null}, "status": {"conditions": null}}),
        ] {
            let convert = |node: &Node| Converter::new().node(node).expect("an event");
            assert_eq!(convert(&read::<SlimNode>(&object).0), convert(&read::<Node>(&object)), "{object}");
            let convert = |pod: &Pod| Converter::new().pod(pod).expect("an event");
            assert_eq!(convert(&read::<SlimPod>(&object).0), convert(&read::<Pod>(&object)), "{object}");
        }
    }
}
