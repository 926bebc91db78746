//! A cluster with network policies, made up from numbers: the same number gives the same object in each run.

use serde_json::{Value, json};
use std::net::{IpAddr, Ipv4Addr};

/// Pods of each node.
pub const PODS_OF_NODE: u32 = 30;
/// Workloads of each namespace, and labels of their pods.
const APPS: u32 = 20;
const TIERS: u32 = 4;
/// Values of the namespaces' labels.
const TEAMS: u32 = 30;
const ENVIRONMENTS: [&str; 3] = ["prod", "test", "dev"];
/// A prime: pods that are neighbours by number are of other workloads.
const STRIDE: u32 = 1009;
/// The first node's addresses, as the fabric has them.
const NODE: &str = "172.18.0.11";
const POD_RANGES: [&str; 2] = ["10.244.1.0/24", "fd00:244:0:1::/64"];

/// How many objects of each kind there are.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Nodes with [`PODS_OF_NODE`] pods each.
    pub nodes: u32,
    /// Namespaces times workloads.
    pub label_sets: u32,
    /// `NetworkPolicies`.
    pub policies: u32,
}

impl Shape {
    /// All pods.
    pub const fn pods(self) -> u32 {
        self.nodes * PODS_OF_NODE
    }

    /// All namespaces.
    pub const fn namespaces(self) -> u32 {
        self.label_sets / APPS
    }

    /// The workload of pod number `n`.
    pub const fn workload(self, n: u32) -> Workload {
        let number = (n % self.label_sets) * STRIDE % self.label_sets;
        Workload { namespace: number / APPS, app: number % APPS }
    }

    /// The first pod of another node that is of a workload.
    pub fn pod_of(self, workload: Workload) -> Option<u32> {
        (PODS_OF_NODE..self.pods()).find(|n| self.workload(*n) == workload)
    }
}

/// Pods with the same labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Number of the namespace.
    pub namespace: u32,
    /// Number within the namespace.
    pub app: u32,
}

impl Workload {
    /// Another one of the namespace.
    pub const fn next(self, by: u32) -> Self {
        Self { app: (self.app + by) % APPS, ..self }
    }

    /// Pods of another namespace that may come to these, by their [`cross`] policy.
    pub const fn friend(self) -> Self {
        Self { namespace: team_asked(self), app: self.app % TIERS }
    }

    /// The namespace's name.
    pub fn namespace(self) -> String {
        format!("ns-{}", self.namespace)
    }

    fn labels(self) -> Value {
        json!({
            "app": app(self.app), "tier": tier(self.app), "pod-template-hash": format!("{:x}", self.app * 7919 + 65_536),
            "app.kubernetes.io/managed-by": "Helm",
        })
    }
}

/// How far a pod is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Nobody has bound it.
    Pending,
    /// It has a node.
    Bound,
    /// It has an address.
    Running,
    /// It is to go.
    Ending,
}

/// A pod.
#[derive(Clone, Copy, Debug)]
pub struct PodOf<'a> {
    /// Its number.
    pub number: u32,
    /// Its labels.
    pub workload: Workload,
    /// The number of its node.
    pub node: u32,
    /// Its addresses.
    pub addresses: &'a [IpAddr],
    /// How far it is.
    pub stage: Stage,
    /// Its version.
    pub version: u32,
}

impl PodOf<'_> {
    /// Its object.
    pub fn object(&self) -> Value {
        let Self { number, workload, node, addresses, stage, version } = *self;
        let port = |name: &str, port: u32| json!({"name": name, "containerPort": port, "protocol": "TCP"});
        let mut object = json!({
            "kind": "Pod", "apiVersion": "v1",
            "metadata": {
                "name": format!("pod-{number}"), "namespace": workload.namespace(), "uid": uid(number),
                "resourceVersion": version.to_string(), "creationTimestamp": "2026-01-01T00:00:00Z",
                "labels": workload.labels(),
                "annotations": {"kubernetes.io/config.source": "api", "checksum/config": format!("{number:064x}")},
                "ownerReferences": [{
                    "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": format!("app-{}", workload.app),
                    "uid": uid(workload.app), "controller": true, "blockOwnerDeletion": true,
                }],
            },
            "spec": {
                "serviceAccountName": "default", "restartPolicy": "Always", "schedulerName": "default-scheduler",
                "containers": [{
                    "name": "app", "image": "registry.example.com/team/application:v1.2.3",
                    "ports": [port("http", 8080), port("metrics", 9100 + workload.app % 2)],
                    "env": [{"name": "LOG_LEVEL", "value": "info"}, {"name": "REGION", "value": "eu-central-1"}],
                    "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "256Mi"}},
                    "livenessProbe": {"httpGet": {"path": "/healthz", "port": "http"}, "periodSeconds": 10},
                }],
            },
            "status": {
                "phase": if stage == Stage::Running { "Running" } else { "Pending" },
                "conditions": [
                    {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"},
                    {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"},
                ],
            },
        });
        if stage != Stage::Pending {
            object["spec"]["nodeName"] = node_name(node).into();
        }
        if matches!(stage, Stage::Running | Stage::Ending) {
            let ips: Vec<Value> = addresses.iter().map(|ip| json!({"ip": ip.to_string()})).collect();
            object["status"]["phase"] = "Running".into();
            object["status"]["podIP"] = ips.first().map_or(Value::Null, |ip| ip["ip"].clone());
            object["status"]["podIPs"] = ips.into();
        }
        if stage == Stage::Ending {
            object["metadata"]["deletionTimestamp"] = "2026-01-01T00:01:00Z".into();
            object["metadata"]["deletionGracePeriodSeconds"] = 30.into();
        }
        object
    }
}

/// The UID of a pod.
pub fn uid(number: u32) -> String {
    format!("5ca1ab1e-0000-4000-8000-{number:012x}")
}

/// The address of a pod of another node: of the first ones, and of those that come later.
pub fn address(node: u32, place: u32) -> IpAddr {
    let [high, low, last] = [128 + node / 250, node % 250 + 1, 10 + place].map(|n| n.to_le_bytes()[0]);
    Ipv4Addr::new(10, high, low, last).into()
}

fn node_name(n: u32) -> String {
    if n == 0 { "n1".to_owned() } else { format!("node-{n}") }
}

/// The object of node number `n`.
pub fn node(n: u32) -> Value {
    let ranges = match address(n, 0) {
        IpAddr::V4(ip) if n > 0 => vec![format!("{}/24", Ipv4Addr::from(u32::from(ip) & !0xff))],
        _ => POD_RANGES.map(str::to_owned).into(),
    };
    let ip = if n == 0 { NODE.to_owned() } else { format!("172.19.{}.{}", n / 250, n % 250 + 1) };
    json!({
        "kind": "Node", "apiVersion": "v1",
        "metadata": {"name": node_name(n), "resourceVersion": "1", "labels": {"kubernetes.io/os": "linux"}},
        "spec": {"podCIDRs": ranges},
        "status": {"addresses": [{"type": "InternalIP", "address": ip}]},
    })
}

/// The object of namespace number `n`, with its own team or another one.
pub fn namespace(n: u32, team: Option<&str>, version: u32) -> Value {
    let own = format!("team-{}", n % TEAMS);
    let environment = ENVIRONMENTS[(n % 3) as usize];
    json!({
        "kind": "Namespace", "apiVersion": "v1",
        "metadata": {
            "name": format!("ns-{n}"), "resourceVersion": version.to_string(),
            "labels": {
                "kubernetes.io/metadata.name": format!("ns-{n}"), "team": team.unwrap_or(&own), "env": environment,
            },
        },
    })
}

/// The object of policy number `n`: each workload has one of each kind, from the first namespace to the last and then again.
pub fn policy(shape: Shape, n: u32) -> Value {
    let (namespace, place) = (n % shape.namespaces(), n / shape.namespaces());
    let workload = Workload { namespace, app: place % APPS };
    let spec = match place / APPS % 5 {
        0 => own(workload),
        1 => cross(workload),
        2 => blocks(workload, n),
        3 => named(workload),
        _ if workload.app == 0 => json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}),
        _ => from_namespaces(workload, shape),
    };
    policy_object(&workload.namespace(), &format!("policy-{n}"), &spec, 1)
}

/// A policy with one more rule for a workload, in a version that differs by the port.
pub fn further_policy(workload: Workload, number: u32, port: u32) -> Value {
    let from = [json!({"podSelector": labelled("app", &app(workload.next(5).app))})];
    let spec = json!({
        "podSelector": labelled("app", &app(workload.app)), "policyTypes": ["Ingress"],
        "ingress": [{"from": from, "ports": [{"protocol": "TCP", "port": port}]}],
    });
    policy_object(&workload.namespace(), &format!("further-{number}"), &spec, port)
}

/// A policy of the cluster with `rules` rules for all pods and from all pods, each for a port of its own.
pub fn cluster_policy(number: u32, rules: u32) -> Value {
    let rule = |i: u32| {
        let action = ["Deny", "Accept", "Pass"][(i % 3) as usize];
        json!({
            "name": format!("rule {i}"), "action": action,
            "from": [{"namespaces": {}}],
            "protocols": [{"tcp": {"destinationPort": {"number": 20_000 + number * rules + i}}}],
        })
    };
    json!({
        "kind": "ClusterNetworkPolicy", "apiVersion": "policy.networking.k8s.io/v1beta1",
        "metadata": {"name": format!("cluster-{number}"), "resourceVersion": "2"},
        "spec": {
            "tier": "Admin", "priority": number, "subject": {"namespaces": {}},
            "ingress": (0..rules).map(rule).collect::<Vec<_>>(),
        },
    })
}

fn policy_object(namespace: &str, name: &str, spec: &Value, version: u32) -> Value {
    json!({
        "kind": "NetworkPolicy", "apiVersion": "networking.k8s.io/v1",
        "metadata": {"name": name, "namespace": namespace, "resourceVersion": version.to_string()},
        "spec": spec,
    })
}

/// Pods of the own namespace, by a label and by an expression.
fn own(workload: Workload) -> Value {
    let some = json!({"matchExpressions": [
        {"key": "app", "operator": "In", "values": [app(workload.next(2).app), app(workload.next(3).app)]},
    ]});
    json!({
        "podSelector": labelled("app", &app(workload.app)), "policyTypes": ["Ingress"],
        "ingress": [{
            "from": [{"podSelector": labelled("app", &app(workload.next(1).app))}, {"podSelector": some}],
            "ports": [{"protocol": "TCP", "port": 8080}],
        }],
    })
}

/// Pods of a tier in the namespaces of a team, at a range of ports.
fn cross(workload: Workload) -> Value {
    let team = format!("team-{}", team_asked(workload));
    json!({
        "podSelector": labelled("app", &app(workload.app)), "policyTypes": ["Ingress"],
        "ingress": [{
            "from": [{"namespaceSelector": labelled("team", &team), "podSelector": labelled("tier", &tier(workload.app))}],
            "ports": [{"protocol": "TCP", "port": 9000, "endPort": 9100}, {"protocol": "UDP", "port": 5353}],
        }],
    })
}

const fn team_asked(workload: Workload) -> u32 {
    (workload.namespace + workload.app) % TEAMS
}

/// Ranges of addresses with exceptions, and names.
fn blocks(workload: Workload, n: u32) -> Value {
    let (high, low) = (64 + n % 64, n / 64 % 200);
    let dns = json!({"namespaceSelector": labelled("kubernetes.io/metadata.name", "ns-0"), "podSelector": labelled("app", &app(0))});
    json!({
        "podSelector": labelled("app", &app(workload.app)), "policyTypes": ["Egress"],
        "egress": [
            {
                "to": [
                    {"ipBlock": {"cidr": format!("100.{high}.0.0/16"), "except": [format!("100.{high}.{low}.0/24")]}},
                    {"ipBlock": {"cidr": "203.0.113.0/24"}},
                ],
                "ports": [{"protocol": "TCP", "port": 443}],
            },
            {"to": [dns], "ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]},
        ],
    })
}

/// Ports by their names.
fn named(workload: Workload) -> Value {
    json!({
        "podSelector": labelled("app", &app(workload.app)), "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"from": [{"podSelector": {}}], "ports": [{"protocol": "TCP", "port": "http"}]}],
        "egress": [{
            "to": [{"namespaceSelector": labelled("env", ENVIRONMENTS[0])}],
            "ports": [{"protocol": "TCP", "port": "metrics"}],
        }],
    })
}

/// All namespaces, or two by their names.
fn from_namespaces(workload: Workload, shape: Shape) -> Value {
    let name = |by: u32| format!("ns-{}", (workload.namespace + by) % shape.namespaces());
    let some = json!({"matchExpressions": [
        {"key": "kubernetes.io/metadata.name", "operator": "In", "values": [name(1), name(2)]},
    ]});
    let selector = if workload.app % 4 == 1 { json!({}) } else { some };
    json!({
        "podSelector": labelled("app", &app(workload.app)), "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"namespaceSelector": selector}], "ports": [{"protocol": "TCP", "port": 80}]}],
    })
}

fn labelled(key: &str, value: &str) -> Value {
    json!({"matchLabels": {key: value}})
}

fn app(n: u32) -> String {
    format!("app-{n}")
}

fn tier(app: u32) -> String {
    format!("tier-{}", app % TIERS)
}
