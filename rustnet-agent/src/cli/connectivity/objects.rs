//! The objects of a run, all in one namespace. Pure.
//!
//! Probes are Pods with a node name, and no DaemonSet: each node has exactly one in spite of taints and cordons, a policy that
//! forbids it answers at once, and one that does not start is named without a controller in between.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Namespace, Pod, Service, ServiceAccount};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::plan::SERVICE_PORT;

/// The label that all objects of this command have.
pub const LABEL: (&str, &str) = ("app.kubernetes.io/name", "rustnet-connectivity");
/// The same as a selector.
pub const SELECTOR: &str = "app.kubernetes.io/name=rustnet-connectivity";
/// Name of the second pod of the first node.
pub const PEER: &str = "peer";
/// The user of probes, which no distribution gives a name.
const USER: u32 = 65_532;
const ACCOUNT: &str = "probe";

/// What all objects of a run share.
#[derive(Clone, Debug)]
pub struct Run {
    /// The namespace.
    pub namespace: String,
    /// The image of all probes.
    pub image: String,
    /// Port of questions; echoes are at the next one.
    pub port: u16,
    /// The secret of those who may ask.
    pub token: String,
    /// Part of the names of Services: DNS may answer for half a minute with what an earlier run had by the same name.
    pub id: String,
}

/// Which network a probe is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A pod's, and the Services lead there.
    Pod,
    /// A pod's.
    Peer,
    /// A node's.
    Host,
}

impl Role {
    /// Returns the name of the probe on the node of this number.
    pub fn name(self, number: usize) -> String {
        match self {
            Self::Pod => format!("pod-{number}"),
            Self::Peer => PEER.to_owned(),
            Self::Host => format!("host-{number}"),
        }
    }
}

impl Run {
    /// Returns the namespace, in which pods may use a node's network.
    pub fn namespace_object(&self) -> Namespace {
        let level = "privileged";
        object(json!({"metadata": {"name": self.namespace, "labels": {
            LABEL.0: LABEL.1,
            "pod-security.kubernetes.io/enforce": level,
            "pod-security.kubernetes.io/audit": level,
            "pod-security.kubernetes.io/warn": level,
        }}}))
    }

    /// Returns the account of all probes, which may do nothing. The one called default may come later than the pods.
    pub fn account() -> ServiceAccount {
        object(json!({"metadata": metadata(ACCOUNT, json!({})), "automountServiceAccountToken": false}))
    }

    /// Returns the probe on the node of this number.
    pub fn probe(&self, role: Role, number: usize, node: &str) -> Pod {
        let is_host = role == Role::Host;
        let name = role.name(number);
        let ports: Vec<Value> = if is_host {
            [("TCP", self.port), ("TCP", self.port + 1), ("UDP", self.port + 1)]
                .map(|(protocol, port)| json!({"containerPort": port, "hostPort": port, "protocol": protocol}))
                .into()
        } else {
            Vec::new()
        };
        object(json!({
            "metadata": metadata(&name, json!({"role": role_word(role), "number": number.to_string()})),
            "spec": {
                "nodeName": node,
                "hostNetwork": is_host,
                "dnsPolicy": if is_host { "Default" } else { "ClusterFirst" },
                "serviceAccountName": ACCOUNT,
                "automountServiceAccountToken": false,
                "enableServiceLinks": false,
                "terminationGracePeriodSeconds": 1,
                "tolerations": [{"operator": "Exists"}],
                "securityContext": {
                    "runAsNonRoot": true,
                    "runAsUser": USER,
                    "runAsGroup": USER,
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "containers": [{
                    "name": "probe",
                    "image": self.image,
                    // The agent's image is on every node already.
                    "imagePullPolicy": "IfNotPresent",
                    "command": ["/opt/rustnet/rustnetctl", "connectivity-probe"],
                    "args": [
                        format!("--name={name}"),
                        "--addresses=$(POD_IPS)",
                        format!("--port={}", self.port),
                    ],
                    "env": [
                        {"name": "POD_IPS", "valueFrom": {"fieldRef": {"fieldPath": "status.podIPs"}}},
                        {"name": "PROBE_TOKEN", "value": self.token},
                    ],
                    "ports": ports,
                    // No readiness probe: a node that does not reach its pods is a row, and no reason to have none.
                    "terminationMessagePolicy": "FallbackToLogsOnError",
                    "securityContext": {
                        "allowPrivilegeEscalation": false,
                        "readOnlyRootFilesystem": true,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    "resources": {"requests": {"cpu": "10m", "memory": "16Mi"}, "limits": {"memory": "128Mi"}},
                }],
            },
        }))
    }

    /// Returns the Service that leads to the pod on the node of this number alone: who has to answer is known beforehand.
    pub fn service(&self, number: usize) -> Service {
        let ports = ["TCP", "UDP"].map(|protocol| {
            let name = protocol.to_lowercase();
            json!({"name": name, "protocol": protocol, "port": SERVICE_PORT, "targetPort": self.port + 1})
        });
        object(json!({
            "metadata": metadata(&self.service_name(number), json!({})),
            "spec": {
                "type": "NodePort",
                "ipFamilyPolicy": "PreferDualStack",
                "selector": {LABEL.0: LABEL.1, "role": role_word(Role::Pod), "number": number.to_string()},
                "ports": ports,
            },
        }))
    }

    /// Returns the name of the Service of the node of this number.
    pub fn service_name(&self, number: usize) -> String {
        format!("echo-{number}-{}", self.id)
    }

    /// Returns the name of the headless Service.
    pub fn headless_name(&self) -> String {
        format!("pods-{}", self.id)
    }

    /// Returns the headless Service of all pods that Services lead to.
    pub fn headless(&self) -> Service {
        object(json!({
            "metadata": metadata(&self.headless_name(), json!({})),
            "spec": {
                "clusterIP": "None",
                "ipFamilyPolicy": "PreferDualStack",
                "selector": {LABEL.0: LABEL.1, "role": role_word(Role::Pod)},
                "ports": [{"name": "tcp", "port": self.port + 1}],
            },
        }))
    }
}

/// Returns a pod's addresses.
pub fn pod_addresses(pod: &Pod) -> Vec<IpAddr> {
    let ips = pod.status.as_ref().and_then(|status| status.pod_ips.as_ref());
    ips.into_iter().flatten().filter_map(|it| it.ip.parse().ok()).collect()
}

/// Returns why a pod does not run, or nothing if it does.
pub fn trouble_of(pod: &Pod) -> Option<String> {
    let status = pod.status.clone().unwrap_or_default();
    let state = status.container_statuses.iter().flatten().next();
    if state.is_some_and(|it| it.ready) && !pod_addresses(pod).is_empty() {
        return None;
    }
    let words = |parts: [Option<String>; 2]| parts.into_iter().flatten().collect::<Vec<_>>().join(": ");
    let mut found = Vec::new();
    for container in [state.and_then(|it| it.state.clone()), state.and_then(|it| it.last_state.clone())] {
        let container = container.unwrap_or_default();
        found.extend(container.waiting.map(|it| words([it.reason, it.message])));
        found.extend(container.terminated.map(|it| words([it.reason, it.message])));
    }
    found.push(words([status.reason, status.message]));
    found.retain(|text| !text.trim().is_empty());
    let phase = || format!("its phase is {}", status.phase.as_deref().unwrap_or("unknown"));
    Some(if found.is_empty() { phase() } else { found.join("; ").trim().replace('\n', " ") })
}

fn role_word(role: Role) -> &'static str {
    match role {
        Role::Pod => "pod",
        Role::Peer => "peer",
        Role::Host => "host",
    }
}

fn metadata(name: &str, labels: Value) -> Value {
    let mut labels = labels;
    labels[LABEL.0] = LABEL.1.into();
    json!({"name": name, "labels": labels})
}

/// Returns an object of a known shape.
fn object<T: DeserializeOwned>(value: Value) -> T {
    // What stands above is checked by the tests below; data from outside are strings and numbers alone.
    serde_json::from_value(value).unwrap_or_else(|error| unreachable!("an object of a wrong shape: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run() -> Run {
        Run { namespace: "ns".into(), image: "rustnet:1".into(), port: 19_960, token: "t".into(), id: "1a2b".into() }
    }

    #[test]
    fn probes_have_no_rights() {
        for role in [Role::Pod, Role::Peer, Role::Host] {
            let spec = run().probe(role, 0, "n1").spec.expect("a spec");
            assert_eq!(spec.automount_service_account_token, Some(false));
            assert_eq!(spec.host_network, Some(role == Role::Host));
            assert_eq!(spec.security_context.and_then(|it| it.run_as_non_root), Some(true));
            let own = spec.containers[0].security_context.clone().expect("a context");
            assert_eq!((own.allow_privilege_escalation, own.privileged), (Some(false), None));
            assert_eq!(own.read_only_root_filesystem, Some(true));
            assert_eq!(own.capabilities.and_then(|it| it.drop), Some(vec!["ALL".to_owned()]));
        }
    }

    #[test]
    fn all_objects_have_the_label() {
        let run = run();
        let labels = [
            run.namespace_object().metadata,
            Run::account().metadata,
            run.probe(Role::Host, 1, "n").metadata,
            run.service(0).metadata,
            run.headless().metadata,
        ];
        for metadata in labels {
            let labels = metadata.labels.expect("labels");
            assert_eq!(labels.get(LABEL.0).map(String::as_str), Some(LABEL.1), "{:?}", metadata.name);
        }
        assert_eq!(SELECTOR, format!("{}={}", LABEL.0, LABEL.1));
    }

    #[test]
    fn services_lead_to_one_pod_each_and_the_headless_one_to_all() {
        let labels = run().probe(Role::Pod, 1, "n").metadata.labels.expect("labels");
        let leads = |service: Service, labels: &std::collections::BTreeMap<String, String>| {
            let selector = service.spec.and_then(|spec| spec.selector).expect("a selector");
            selector.iter().all(|(key, value)| labels.get(key) == Some(value))
        };
        assert!(leads(run().service(1), &labels) && leads(run().headless(), &labels));
        assert!(!leads(run().service(0), &labels));
        for role in [Role::Peer, Role::Host] {
            let labels = run().probe(role, 1, "n").metadata.labels.expect("labels");
            assert!(!leads(run().service(1), &labels) && !leads(run().headless(), &labels), "{role:?}");
        }
    }

    #[test]
    fn a_pod_that_does_not_run_says_why() {
        let pod = |status: Value| -> Pod { object(json!({"metadata": {}, "status": status})) };
        let waiting = json!({"waiting": {"reason": "ErrImagePull", "message": "no such image"}});
        let container = |state: &Value, is_ready: bool| json!([{"name": "probe", "image": "x", "imageID": "", "ready": is_ready, "restartCount": 0, "state": state}]);
        for (status, want) in [
            (json!({}), Some("its phase is unknown")),
            (
                json!({"phase": "Pending", "containerStatuses": container(&waiting, false)}),
                Some("ErrImagePull: no such image"),
            ),
            (json!({"phase": "Failed", "reason": "NodePorts", "message": "taken"}), Some("NodePorts: taken")),
            (
                json!({"podIPs": [{"ip": "10.0.0.1"}], "containerStatuses": container(&json!({"running": {}}), true)}),
                None,
            ),
        ] {
            assert_eq!(trouble_of(&pod(status.clone())).as_deref(), want, "{status}");
        }
    }
}
