//! The policy of `deploy/admission.yaml`, installed as users install it, and tokens that the API server gives out: an agent
//! writes to the Node of its pod alone, and there what it has to.

use super::cluster::{Agent, Cluster, NODE, Start, with_server};
use super::deploy;
use super::kube_source::{NAMESPACE, RBAC, direct, wait_until, yaml};
use super::reports::{again, wait_for_events};
use super::rig::Rig;
use super::server::{ADMIN, AGENT, Server, User};
use anyhow::{Context as _, Result, anyhow, bail, ensure};
use axum::http::{Method, Request};
use kube::Client;
use kube::core::Status;
use rustnet_agent::api::{NodeStatus, reports};
use rustnet_agent::health::{Health, NotReady};
use serde_json::{Value, json};
use std::sync::Arc;
use testkit::wait;
use tokio::sync::watch;

const ADMISSION: &str = include_str!("../../deploy/admission.yaml");
/// As it is in every answer of the policy's.
const POLICY: &str = "ValidatingAdmissionPolicy 'rustnet-agent-own-node'";
/// What the policy says to a token that names no Node: the cause, and both remedies.
const NAMELESS: [&str; 4] = [POLICY, "names no Node", "ServiceAccountTokenPodNodeInfo", "admissionPolicy=false"];

/// Two Nodes that wait for the agent, with all that it has to leave as it is.
const NODES: &str = r#"
apiVersion: v1
kind: Node
metadata: {name: n1, labels: {zone: a}, annotations: {mine: a}}
spec:
  unschedulable: true
  taints: [{key: rustnet.io/agent-not-ready, effect: NoExecute}, {key: mine, effect: NoSchedule}]
status:
  capacity: {pods: "110"}
  addresses: [{type: InternalIP, address: 172.18.0.11}]
  conditions: [{type: NetworkUnavailable, status: "True"}, {type: Ready, status: "False"}]
---
apiVersion: v1
kind: Node
metadata: {name: n2}
spec: {taints: [{key: rustnet.io/agent-not-ready, effect: NoExecute}]}
status: {conditions: [{type: NetworkUnavailable, status: "True"}]}
"#;

const PODS: &str = r"
apiVersion: v1
kind: Pod
metadata: {name: agent-1, namespace: rustnet-system}
spec: {nodeName: n1, serviceAccountName: rustnet-agent, containers: [{name: agent, image: rustnet}]}
";

/// Rights that the agent does not have: the policy holds for more than RBAC lets through.
const MORE_RIGHTS: &str = r"
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: more}
rules:
  - {apiGroups: [''], resources: [events], verbs: [create, patch]}
  - {apiGroups: [''], resources: [nodes, nodes/status], verbs: [update]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: more}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: more}
subjects: [{kind: ServiceAccount, name: rustnet-agent, namespace: rustnet-system}]
";

/// Installs everything of `deploy/`, and waits until the policy is at work.
async fn install(server: &Server) -> Result<Cluster> {
    let cluster = Cluster::new(server)?;
    cluster.apply(NODES).await?;
    server.kubectl(&["apply", "-k", &deploy::dir().display().to_string()])?;
    cluster.apply(&yaml(&[PODS, MORE_RIGHTS])).await?;
    let client = server.client(of_pod(server)?)?;
    wait_until("the policy is not at work", async || {
        let answer = ask(&client, &Write::node("n2", &add("/metadata/labels", &json!({"x": "y"})))).await;
        Ok(answer.is_err_and(|status| status.message.contains(POLICY)))
    })
    .await?;
    Ok(cluster)
}

/// The agent's account, with a token for which these options ask.
fn account(server: &Server, options: &[&str]) -> Result<User> {
    let words = ["create", "token", "rustnet-agent", "--namespace=rustnet-system"];
    let token = server.kubectl(&[&words, options].concat())?;
    // Users are constants elsewhere.
    Ok(User { name: "agent-of-a-test", groups: "", token: token.trim().to_owned().leak() })
}

/// The agent's account with the token that the kubelet of n1 gives to the agent's pod.
fn of_pod(server: &Server) -> Result<User> {
    account(server, &["--bound-object-kind=Pod", "--bound-object-name=agent-1"])
}

/// A request that writes.
#[derive(Clone, Debug)]
struct Write {
    method: Method,
    path: String,
    body: Value,
}

impl Write {
    /// A JSON patch of a Node (RFC 6902); `name` may have `/status` at its end.
    fn node(name: &str, operation: &Value) -> Self {
        Self { method: Method::PATCH, path: format!("/api/v1/nodes/{name}"), body: json!([operation]) }
    }

    fn create_event(namespace: &str, body: &Value) -> Self {
        let path = format!("/apis/events.k8s.io/v1/namespaces/{namespace}/events");
        Self { method: Method::POST, path, body: body.clone() }
    }

    /// The same object in the older group.
    fn create_core_event(body: &Value) -> Self {
        Self { method: Method::POST, path: "/api/v1/namespaces/default/events".to_owned(), body: body.clone() }
    }

    /// A merge patch of an event of this name.
    fn patch_event(group: &str, name: &str, body: &Value) -> Self {
        let path = format!("/{group}/namespaces/default/events/{name}");
        Self { method: Method::PATCH, path, body: body.clone() }
    }
}

fn add(path: &str, value: &Value) -> Value {
    json!({"op": "add", "path": path, "value": value})
}

fn replace(path: &str, value: &Value) -> Value {
    json!({"op": "replace", "path": path, "value": value})
}

fn remove(path: &str) -> Value {
    json!({"op": "remove", "path": path})
}

/// Sends a request whose result is not stored. Returns the server's refusal.
async fn ask(client: &Client, write: &Write) -> Result<(), Status> {
    let content = match (&write.method, &write.body) {
        (&Method::PATCH, Value::Array(_)) => "application/json-patch+json",
        (&Method::PATCH, _) => "application/merge-patch+json",
        _ => "application/json",
    };
    let request = Request::builder().method(write.method.clone()).uri(format!("{}?dryRun=All", write.path));
    let request = request.header("content-type", content).body(write.body.to_string().into_bytes());
    match client.request::<Value>(request.expect("a path")).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) => Err(*status),
        Err(other) => panic!("{write:?}: {other:?}"),
    }
}

/// Fails unless the policy refuses this with these words, and nothing but the policy: an administrator may do it.
async fn refused(agent: &Client, admin: &Client, write: &Write, words: &[&str]) -> Result<()> {
    if let Err(status) = ask(admin, write).await {
        bail!("{write:?} is not a request that anybody may send: {}", status.message);
    }
    match ask(agent, write).await {
        Ok(()) => bail!("admitted: {write:?}"),
        Err(status) => ensure!(
            status.code == 403 && status.message.contains(POLICY) && words.iter().all(|it| status.message.contains(it)),
            "{write:?}: not refused with {words:?}: {} {}",
            status.code,
            status.message
        ),
    }
    Ok(())
}

async fn admitted(agent: &Client, write: &Write) -> Result<()> {
    ask(agent, write).await.map_err(|status| anyhow!("{write:?}: refused: {}", status.message))
}

/// A Node as the server has it.
async fn node(cluster: &Cluster, name: &str) -> Result<Value> {
    Ok(serde_json::to_value(cluster.get("v1", "Node", name).await?)?)
}

/// The path of an element of a list, which has this field.
fn place(node: &Value, list: &str, field: (&str, &str)) -> Result<String> {
    let elements = node.pointer(list).and_then(Value::as_array).with_context(|| format!("no {list}"))?;
    let at = elements.iter().position(|it| it[field.0] == field.1).with_context(|| format!("no {field:?}"))?;
    Ok(format!("{list}/{at}"))
}

const TAINTS: &str = "/spec/taints";
const CONDITIONS: &str = "/status/conditions";
const OURS: (&str, &str) = ("key", "rustnet.io/agent-not-ready");
const NETWORK: (&str, &str) = ("type", "NetworkUnavailable");

/// What the agent of n1 may not write, by the words of the refusal. `own` and `other` are the Nodes.
fn writes_to_nodes(own: &Value, other: &Value) -> Result<[(&'static str, Vec<Write>); 6]> {
    let spec = |operation: &Value| Write::node("n1", operation);
    let status = |operation: &Value| Write::node("n1/status", operation);
    let add_label = add("/metadata/labels/x", &json!("y"));
    let mine = place(own, TAINTS, ("key", "mine"))?;
    let (network, ready) = (place(own, CONDITIONS, NETWORK)?, place(own, CONDITIONS, ("type", "Ready"))?);
    let others_network = place(other, CONDITIONS, NETWORK)?;
    let pressure = json!({"type": "MemoryPressure", "status": "False"});
    let address = json!({"type": "InternalIP", "address": "172.18.0.12"});
    let others = vec![
        Write::node("n2", &remove(&place(other, TAINTS, OURS)?)),
        Write::node("n2", &add("/metadata/annotations", &json!({"x": "y"}))),
        Write::node("n2/status", &replace(&format!("{others_network}/status"), &json!("False"))),
    ];
    let metadata = vec![
        spec(&add_label),
        spec(&replace("/metadata/labels/zone", &json!("b"))),
        spec(&remove("/metadata/labels/zone")),
        spec(&add("/metadata/annotations/x", &json!("y"))),
        spec(&remove("/metadata/annotations")),
        spec(&add("/metadata/finalizers", &json!(["example.org/x"]))),
        // A Node's metadata can be written with its status, too.
        status(&add_label),
        status(&remove("/metadata/annotations")),
    ];
    let specs = vec![
        spec(&add("/spec/podCIDRs", &json!(["10.244.9.0/24"]))),
        spec(&add("/spec/providerID", &json!("x"))),
        spec(&remove("/spec/unschedulable")),
    ];
    let taints = vec![
        spec(&add(&format!("{TAINTS}/-"), &json!({"key": "x", "effect": "NoSchedule"}))),
        // An administrator gives it to nodes, not the agent.
        spec(&add(&format!("{TAINTS}/-"), &json!({"key": OURS.1, "effect": "NoSchedule"}))),
        spec(&remove(&mine)),
        spec(&add(&format!("{mine}/value"), &json!("x"))),
        spec(&replace(&format!("{mine}/effect"), &json!("NoExecute"))),
        spec(&remove(TAINTS)),
    ];
    let fields = vec![
        status(&add("/status/addresses/-", &address)),
        status(&remove("/status/addresses")),
        status(&replace("/status/capacity/pods", &json!("1"))),
    ];
    let conditions = vec![
        status(&replace(&format!("{ready}/status"), &json!("True"))),
        status(&remove(&ready)),
        status(&add(&format!("{CONDITIONS}/-"), &pressure)),
        status(&replace(&format!("{network}/status"), &json!("Unknown"))),
        status(&remove(&network)),
    ];
    Ok([
        ("the agent of Node n1 may not change Node n2", others),
        ("nothing in a Node's metadata", metadata),
        ("nothing in a Node's spec", specs),
        ("of a Node's taints", taints),
        ("nothing in a Node's status", fields),
        ("of a Node's conditions", conditions),
    ])
}

#[test]
fn the_agent_changes_two_things_of_its_own_node() -> Result<()> {
    with_server(&[], async |server| {
        let cluster = install(&server).await?;
        let (agent, admin) = (server.client(of_pod(&server)?)?, server.client(ADMIN)?);
        let (own, other) = (node(&cluster, "n1").await?, node(&cluster, "n2").await?);
        admitted(&agent, &Write::node("n1", &remove(&place(&own, TAINTS, OURS)?))).await?;
        let network = place(&own, CONDITIONS, NETWORK)?;
        admitted(&agent, &Write::node("n1/status", &replace(&format!("{network}/status"), &json!("False")))).await?;
        for (words, writes) in writes_to_nodes(&own, &other)? {
            for write in writes {
                refused(&agent, &admin, &write, &[words]).await?;
            }
        }

        // With the right to replace the whole object.
        let mut whole = own.clone();
        whole["metadata"]["labels"]["zone"] = json!("b");
        let put = Write { method: Method::PUT, path: "/api/v1/nodes/n1".to_owned(), body: whole };
        refused(&agent, &admin, &put, &["nothing in a Node's metadata"]).await
    })
}

/// An event as the agent writes it.
fn event() -> Value {
    json!({
        "apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": {"name": "n1.1"},
        "eventTime": "2026-01-01T00:00:00.000000Z", "type": "Warning", "reason": "NetworkProblem", "action": "Networking",
        "reportingController": "rustnet-agent", "reportingInstance": "n1",
        "regarding": {"apiVersion": "v1", "kind": "Node", "name": "n1", "uid": "n1"},
    })
}

/// The same in the older group, with a source.
fn core_event(host: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Event", "metadata": {"name": "n1.1"}, "type": "Warning", "reason": "NetworkProblem",
        "firstTimestamp": "2026-01-01T00:00:00Z", "source": {"component": "rustnet-agent", "host": host},
        "reportingComponent": "rustnet-agent", "reportingInstance": "n1",
        "involvedObject": {"apiVersion": "v1", "kind": "Node", "name": "n1", "uid": "n1"},
    })
}

#[test]
fn the_agent_writes_events_in_its_own_name_about_its_own_node() -> Result<()> {
    with_server(&[], async |server| {
        let cluster = install(&server).await?;
        let (agent, admin) = (server.client(of_pod(&server)?)?, server.client(ADMIN)?);
        admitted(&agent, &Write::create_event("default", &event())).await?;
        admitted(&agent, &Write::create_core_event(&core_event("n1"))).await?;

        let with = |edit: fn(&mut Value)| {
            let mut event = event();
            edit(&mut event);
            event
        };
        let names = [
            Write::create_event("default", &with(|it| it["reportingInstance"] = json!("n2"))),
            Write::create_event("default", &with(|it| it["reportingController"] = json!("kubelet"))),
            Write::create_event("kube-system", &event()),
            Write::create_core_event(&core_event("n2")),
        ];
        for write in names {
            refused(&agent, &admin, &write, &["reportingInstance n1 alone"]).await?;
        }
        let objects = [
            with(|it| it["regarding"]["name"] = json!("n2")),
            with(|it| it["regarding"]["kind"] = json!("Pod")),
            with(|it| it["related"] = json!({"apiVersion": "v1", "kind": "Node", "name": "n2"})),
        ];
        for event in objects {
            refused(&agent, &admin, &Write::create_event("default", &event), &["events about this Node alone"]).await?;
        }

        // The kubelet's event on the same node: neither continued nor taken over.
        let mut kubelets = event();
        kubelets["metadata"] = json!({"name": "kubelets", "namespace": "default"});
        kubelets["reportingController"] = json!("kubelet");
        let mut of_n2 = event();
        of_n2["metadata"] = json!({"name": "of-n2", "namespace": "default"});
        of_n2["regarding"]["name"] = json!("n2");
        for event in [&kubelets, &of_n2] {
            cluster.apply_object(event).await?;
        }
        let series = json!({"series": {"count": 2, "lastObservedTime": "2026-01-01T00:01:00.000000Z"}});
        let events = [
            Write::patch_event("apis/events.k8s.io/v1", "kubelets", &series),
            Write::patch_event("api/v1", "kubelets", &json!({"reportingComponent": "rustnet-agent"})),
        ];
        for write in events {
            refused(&agent, &admin, &write, &["reportingInstance n1 alone"]).await?;
        }
        let taken = json!({"involvedObject": {"name": "n1"}});
        refused(&agent, &admin, &Write::patch_event("api/v1", "of-n2", &taken), &["events about this Node alone"]).await
    })
}

/// A token that is bound to no pod, and a user of another authenticator.
#[test]
fn without_the_name_of_a_node_the_agent_writes_nothing() -> Result<()> {
    with_server(&[], async |server| {
        let cluster = install(&server).await?;
        let (admin, own) = (server.client(ADMIN)?, node(&cluster, "n1").await?);
        let writes = [
            Write::node("n1", &remove(&place(&own, TAINTS, OURS)?)),
            Write::node(
                "n1/status",
                &replace(&format!("{}/status", place(&own, CONDITIONS, NETWORK)?), &json!("False")),
            ),
            Write::create_event("default", &event()),
        ];
        for user in [account(&server, &[])?, AGENT] {
            let agent = server.client(user)?;
            for write in &writes {
                refused(&agent, &admin, write, &NAMELESS).await?;
            }
        }
        Ok(())
    })
}

/// What the agent's own code writes, with the token of its pod.
#[test]
fn the_agents_own_writes_are_admitted() -> Result<()> {
    with_server(&[], async |server| {
        let cluster = install(&server).await?;
        let (user, url) = (of_pod(&server)?, direct());
        let (health, (_stop, shutdown)) = (Arc::new(Health::default()), watch::channel(false));
        let node_status = NodeStatus::new(NODE);
        let connection = Agent::connect(&server, user, &url).await?;
        tokio::spawn(node_status.clone().run(connection.client.clone(), health.clone(), shutdown.clone()));
        tokio::spawn(reports::run(connection, NODE.into(), health.clone(), shutdown));
        let mut agent = Agent::start(&server, Start { user, node_status, ..Start::new(&url) }).await?;
        agent.wait("the first list", |seen| seen.synced).await?;

        let broken = "/opt/cni/bin/rustnet-cni: cannot write; check that the directory exists and is writable";
        health.set_not_ready(NotReady::Failed(broken.to_owned()));
        wait_for_events(&server, &[("Warning", broken)]).await?;
        health.set_ready();
        wait_for_events(&server, &[("Warning", broken), ("Normal", broken)]).await?;
        health.set_not_ready(NotReady::Failed(broken.to_owned()));
        again(&server, broken).await?;
        health.set_ready();

        wait_until("the Node was not patched", async || {
            let own = node(&cluster, "n1").await?;
            ensure!(place(&own, TAINTS, ("key", "mine")).is_ok(), "another's taint is gone: {own}");
            let network = place(&own, CONDITIONS, NETWORK)?;
            let status = own.pointer(&format!("{network}/status"));
            Ok(place(&own, TAINTS, OURS).is_err() && status == Some(&json!("False")))
        })
        .await
    })
}

/// An API server that does not put the Node into tokens: the Node stays as it is, the network does not, and people are helped.
#[test]
fn without_the_name_of_a_node_the_network_goes_on_and_the_remedy_is_named() -> Result<()> {
    let rig = Rig::start(&[])?;
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: first, namespace: default}\n\
                   spec: {clusterIP: 10.96.7.1, ports: [{port: 80}]}";
    let nodes = NODES.replace("spec:\n", "spec:\n  podCIDR: 10.244.1.0/24\n  podCIDRs: [10.244.1.0/24]\n");
    rig.apply(&yaml(&[NAMESPACE, RBAC, ADMISSION, &nodes, service]))?;
    let identity = format!("--as={}", AGENT.name);
    wait::until("the policy is at work", || {
        let answer = rig.server.kubectl(&["label", "node", "n1", "x=y", "--dry-run=server", &identity]);
        ensure!(answer.as_ref().is_err_and(|error| error.to_string().contains(POLICY)), "{answer:?}");
        Ok(())
    })?;
    rig.start_agent(&rig.server.kubeconfig(AGENT, &direct())?)?;
    rig.logs(&[&NAMELESS[..], &["WARN", "cannot patch this node's object"]].concat())?;
    rig.answers(200, &[])?;
    rig.holds("services are served nevertheless", &["10.96.7.1"], &[])?;
    let said = rig.node().rustnetctl(&["doctor"]).unwrap_or_else(|error| format!("{error:#}"));
    ensure!([&NAMELESS[..], &["admission"]].concat().iter().all(|word| said.contains(word)), "{said}");
    Ok(())
}
