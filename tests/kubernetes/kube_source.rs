//! The source on a real API server: what it delivers, what it survives, what it asks for.

use super::cluster::{Agent, Cluster, NODE, Seen, Start, with_server, with_store};
use super::relay::Relay;
use super::server::{ADMIN, AGENT, Request, Server, Store};
use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use kube::api::ListParams;
use rustnet_agent::api::NodeStatus;
use rustnet_agent::health::Health;
use rustnet_agent::source::kube::list::list;
use rustnet_agent::source::{Event, Kind};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

pub const RBAC: &str = include_str!("../../deploy/rbac.yaml");
pub const NAMESPACE: &str = include_str!("../../deploy/namespace.yaml");

pub const NODES: &str = r#"
apiVersion: v1
kind: Node
metadata: {name: n1, labels: {topology.kubernetes.io/zone: a}}
spec: {podCIDR: 10.244.1.0/24, podCIDRs: [10.244.1.0/24, "fd00:244:0:1::/64"]}
status: {addresses: [{type: InternalIP, address: 172.18.0.11}, {type: InternalIP, address: "fd00:18::11"}]}
---
apiVersion: v1
kind: Node
metadata: {name: n2, labels: {topology.kubernetes.io/zone: b}}
spec: {podCIDR: 10.244.2.0/24, podCIDRs: [10.244.2.0/24, "fd00:244:0:2::/64"]}
status: {addresses: [{type: InternalIP, address: 172.18.0.12}, {type: InternalIP, address: "fd00:18::12"}]}
"#;

/// What a roll-out leaves of the service `web`: all before its affinity and its ports.
macro_rules! web_service {
    () => {
        r#"
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec:
  clusterIP: 10.96.7.1
  clusterIPs: [10.96.7.1, "fd00:96::71"]
  ipFamilies: [IPv4, IPv6]
  ipFamilyPolicy: RequireDualStack
"#
    };
}

/// The slice of `web` that a roll-out leaves as it is.
macro_rules! web_slice_of_ipv6 {
    () => {
        r#"---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-6, namespace: default, labels: {kubernetes.io/service-name: web}}
addressType: IPv6
ports: [{name: http, port: 8000}]
endpoints: [{addresses: ["fd00:244:0:1::5"], nodeName: n1}]
"#
    };
}

pub const WEB: &str = concat!(
    web_service!(),
    r"  sessionAffinity: ClientIP
  ports: [{name: http, port: 80, targetPort: web}, {name: alt, port: 8080, targetPort: 8080}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-a, namespace: default, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8000}, {name: alt, port: 8080}]
endpoints:
- {addresses: [10.244.1.5], nodeName: n1, conditions: {ready: true}}
- {addresses: [10.244.2.5], nodeName: n2, conditions: {ready: false, serving: true, terminating: true}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-b, namespace: default, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 9000}]
endpoints: [{addresses: [10.244.2.6], nodeName: n2}]
",
    web_slice_of_ipv6!()
);

pub const DNS: &str = r"
apiVersion: v1
kind: Service
metadata: {name: dns, namespace: default}
spec:
  clusterIP: 10.96.0.10
  ports: [{name: dns, port: 53, protocol: UDP}, {name: dns-tcp, port: 53, protocol: TCP}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: dns-a, namespace: default, labels: {kubernetes.io/service-name: dns}}
addressType: IPv4
ports: [{name: dns, port: 53, protocol: UDP}, {name: dns-tcp, port: 53}]
endpoints: [{addresses: [10.244.2.53], nodeName: n2}]
";

/// Services that are not for rustnet, and one without endpoints.
const OTHERS: &str = r"
apiVersion: v1
kind: Service
metadata: {name: headless, namespace: default}
spec: {clusterIP: None, ports: [{port: 1}]}
---
apiVersion: v1
kind: Service
metadata: {name: alias, namespace: default}
spec: {type: ExternalName, externalName: example.org}
---
apiVersion: v1
kind: Service
metadata: {name: foreign, namespace: default, labels: {service.kubernetes.io/service-proxy-name: other}}
spec: {clusterIP: 10.96.9.9, ports: [{port: 1}]}
---
apiVersion: v1
kind: Service
metadata: {name: empty, namespace: default}
spec: {clusterIP: 10.96.9.1, ports: [{port: 443}]}
";

/// `web` after a roll-out: other endpoints, one port less.
pub const WEB_LATER: &str = concat!(
    web_service!(),
    r"  sessionAffinity: None
  ports: [{name: http, port: 80, targetPort: web}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-a, namespace: default, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8001}]
endpoints: [{addresses: [10.244.1.77], nodeName: n1}]
",
    web_slice_of_ipv6!()
);

pub fn yaml(parts: &[&str]) -> String {
    parts.join("\n---\n")
}

pub fn direct() -> String {
    format!("https://{}", Server::address())
}

pub async fn delete_service(cluster: &Cluster, name: &str, slices: &[&str]) -> Result<()> {
    cluster.delete("v1", "Service", name).await?;
    for slice in slices {
        cluster.delete("discovery.k8s.io/v1", "EndpointSlice", slice).await?;
    }
    Ok(())
}

/// The requests that watch or list one kind.
fn of<'a>(requests: &'a [Request], resource: &str, verb: &str) -> Vec<&'a str> {
    let path = format!("/{resource}?");
    requests.iter().filter(|it| it.verb == verb && it.uri.contains(&path)).map(|it| it.uri.as_str()).collect()
}

/// Starts an agent with its own rights at the server's own address.
async fn start_agent(server: &Server) -> Result<Agent> {
    Agent::start(server, Start { user: AGENT, ..Start::new(&direct()) }).await
}

/// Starts an agent whose role lacks the right to see some kinds; it may see `kept`.
async fn start_agent_that_sees(server: &Server, cluster: &Cluster, kept: &str) -> Result<Agent> {
    let rbac = RBAC.replace("resources: [services, nodes, pods, namespaces]", &format!("resources: [{kept}]"));
    ensure!(rbac != RBAC, "the right is where it was");
    cluster.apply(&yaml(&[NAMESPACE, &rbac, NODES, WEB])).await?;
    start_agent(server).await
}

/// Looks again and again until something is done; fails with this text after a minute.
pub async fn wait_until(failure: &'static str, mut is_done: impl AsyncFnMut() -> Result<bool>) -> Result<()> {
    let done = async {
        while !is_done().await? {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    };
    let result: Result<Result<()>, _> = tokio::time::timeout(Duration::from_mins(1), done).await;
    result.context(failure)?
}

#[test]
fn the_maps_follow_the_cluster_with_the_agents_own_rights() -> Result<()> {
    with_server(&[], async |server| {
        let cluster = Cluster::new(&server)?;
        cluster.apply(&yaml(&[NAMESPACE, RBAC])).await?;
        let before = yaml(&[NODES, WEB, DNS, OTHERS]);
        cluster.apply(&before).await?;
        let mut agent = start_agent(&server).await?;
        agent.wait_for_maps("the first list", &before).await?;

        cluster.apply(WEB_LATER).await?;
        cluster.delete("discovery.k8s.io/v1", "EndpointSlice", "web-b").await?;
        delete_service(&cluster, "dns", &["dns-a"]).await?;
        // Handed over to another proxy: gone for us.
        cluster
            .apply(
                &OTHERS
                    .replace("name: empty,", "name: empty, labels: {service.kubernetes.io/service-proxy-name: other},"),
            )
            .await?;
        let seen = agent.wait_for_maps("changes", &yaml(&[NODES, WEB_LATER])).await?;
        ensure!(seen.lists.values().all(|lists| *lists == 1), "one list of each kind: {:?}", seen.lists);
        ensure!(seen.trouble.is_empty(), "{:?}", seen.trouble);

        cluster.delete("v1", "Node", "n2").await?;
        let one_node = NODES.split("---").next().unwrap_or_default();
        agent.wait_for_maps("a node that went", &yaml(&[one_node, WEB_LATER])).await?;
        asked_only_what_it_may(&server.audit(AGENT)?, true)?;

        let secrets = Api::<Secret>::all(Agent::connect(&server, AGENT, &direct()).await?.client)
            .list(&ListParams::default())
            .await;
        ensure!(matches!(&secrets, Err(kube::Error::Api(status)) if status.code == 403), "secrets: {secrets:?}");
        Ok(())
    })
}

fn asked_only_what_it_may(requests: &[Request], has_policies: bool) -> Result<()> {
    for request in requests {
        let path = request.uri.split('?').next().unwrap_or_default();
        // Whose store it is, and how far.
        if request.verb == "list" && path == "/api/v1/namespaces/default/services" {
            ensure!(request.uri.contains("metadata.name%3Dkubernetes"), "{request:?}");
            continue;
        }
        let kinds = [
            "/api/v1/services",
            "/api/v1/nodes",
            "/api/v1/pods",
            "/api/v1/namespaces",
            "/apis/discovery.k8s.io/v1/endpointslices",
            "/apis/networking.k8s.io/v1/networkpolicies",
            "/apis/networking.k8s.io/v1/servicecidrs",
            "/apis/policy.networking.k8s.io/v1beta1/clusternetworkpolicies",
            "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies",
        ];
        ensure!(path == "/version" || kinds.contains(&path), "the source asked for {request:?}");
        ensure!(path == "/version" || request.verb == "watch", "lists are streamed: {request:?}");
    }
    let for_policies = ["namespaces", "networkpolicies"].into_iter().filter(|_| has_policies);
    for resource in ["services", "endpointslices", "nodes", "pods", "servicecidrs"].into_iter().chain(for_policies) {
        let watches = of(requests, resource, "watch");
        let first = watches.first().with_context(|| format!("no watch of {resource}"))?;
        ensure!(first.contains("sendInitialEvents=true"), "{first}");
        ensure!(!first.contains("resourceVersion=0"), "any state will do, even one of long ago: {first}");
        for uri in watches {
            ensure!(uri.contains("allowWatchBookmarks=true"), "{uri}");
            let of_services = ["services", "endpointslices"].contains(&resource);
            for label in ["service.kubernetes.io%2Fheadless", "service.kubernetes.io%2Fservice-proxy-name"] {
                ensure!(uri.contains(&format!("%21{label}")) == of_services, "{uri}");
            }
            // Policies select pods of all nodes.
            let is_narrow = resource == "pods" && !has_policies;
            ensure!(uri.contains("fieldSelector=spec.nodeName%3Dn1") == is_narrow, "{uri}");
        }
    }
    Ok(())
}

#[test]
fn without_streaming_lists_pages_are_read() -> Result<()> {
    with_server(&["--feature-gates=WatchList=false"], async |server| {
        let cluster = Cluster::new(&server)?;
        let mut all = yaml(&[NODES, WEB]);
        // More than a page.
        for i in 0..300 {
            let (a, b) = (i / 250 + 3, i % 250 + 1);
            write!(
                all,
                "\n---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
                 metadata: {{name: web-x{i}, namespace: default, labels: {{kubernetes.io/service-name: web}}}}\n\
                 ports: [{{name: http, port: 80}}]\nendpoints: [{{addresses: [10.244.{a}.{b}]}}]\n"
            )?;
        }
        cluster.apply(&all).await?;
        let url = direct();
        let mut agent = Agent::start(&server, Start { user: ADMIN, ..Start::new(&url) }).await?;
        let seen = agent.wait_for_maps("all pages", &all).await?;
        ensure!(seen.trouble.is_empty(), "{:?}", seen.trouble);
        let requests = server.audit(ADMIN)?;
        let lists = of(&requests, "endpointslices", "list");
        ensure!(lists.iter().any(|uri| uri.contains("continue=")), "a second page was asked for: {lists:?}");

        delete_service(&cluster, "web", &[]).await?;
        agent.wait_for_maps("a change after the pages", NODES).await?;
        Ok(())
    })
}

/// An etcd before 3.4.31 makes the server break off a streamed list after it began.
#[test]
fn the_distributions_store_will_do() -> Result<()> {
    with_store(Store::Distribution, &[], async |server| {
        let cluster = Cluster::new(&server)?;
        cluster.apply(&yaml(&[NODES, WEB, DNS])).await?;
        let url = direct();
        let mut agent = Agent::start(&server, Start::new(&url)).await?;
        let seen = agent.wait_for_maps("the first list", &yaml(&[NODES, WEB, DNS])).await?;
        ensure!(seen.trouble.is_empty(), "{:?}", seen.trouble);
        delete_service(&cluster, "dns", &["dns-a"]).await?;
        let seen = agent.wait_for_maps("a change", &yaml(&[NODES, WEB])).await?;
        ensure!(seen.lists.values().all(|lists| *lists == 1), "{:?}", seen.lists);
        Ok(())
    })
}

/// A pod of one container; on no node when that is empty.
fn pod(name: &str, node: &str, address: &str) -> String {
    let node = if node.is_empty() { String::new() } else { format!("nodeName: {node}, ") };
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: default}}\n\
         spec: {{{node}containers: [{{name: c, image: c}}]}}\n\
         status: {{phase: Running, podIP: {address}, podIPs: [{{ip: {address}}}]}}\n"
    )
}

/// A cluster's pods are many: without network policies those of other nodes must not even arrive, for each passes through the agent's
/// memory.
#[test]
fn only_this_nodes_pods_arrive() -> Result<()> {
    // Nobody here makes the service accounts that pods usually need.
    with_server(&["--disable-admission-plugins=ServiceAccount"], async |mut server| {
        let cluster = Cluster::new(&server)?;
        cluster.apply(&yaml(&[NAMESPACE, RBAC, NODES])).await?;
        let early = [pod("here", NODE, "10.244.1.5"), pod("there", "n2", "10.244.2.5")];
        cluster.apply(&yaml(&early.each_ref().map(String::as_str))).await?;
        let relay = Relay::start().await?;
        let mut agent =
            Agent::start(&server, Start { user: AGENT, has_policies: false, ..Start::new(&relay.url()) }).await?;
        let is = |pods: &[(&str, &str)]| {
            let pods: BTreeMap<_, _> =
                pods.iter().map(|(name, ip)| (format!("default/{name}"), ip.parse().into_iter().collect())).collect();
            move |seen: &Seen| seen.pods == pods
        };
        agent.wait("the first list", is(&[("here", "10.244.1.5")])).await?;

        // It gets a node later, as most do; another one comes to the other node.
        cluster.apply(&pod("late", "", "10.244.1.6")).await?;
        cluster.apply(&pod("elsewhere", "n2", "10.244.2.6")).await?;
        cluster.bind("late", NODE).await?;
        agent.wait("a pod that came", is(&[("here", "10.244.1.5"), ("late", "10.244.1.6")])).await?;
        cluster.apply(&pod("here", NODE, "10.244.1.5").replace("Running", "Succeeded")).await?;
        agent.wait("a pod that finished", is(&[("here", ""), ("late", "10.244.1.6")])).await?;

        // It goes, and another of its name comes, behind a line that is cut, and the server forgets how.
        relay.cut();
        agent.wait("the cut is reported", |seen| seen.trouble.len() == Kind::ALL.len() - 3).await?;
        cluster.delete_at_once("v1", "Pod", "late").await?;
        cluster.delete_at_once("v1", "Pod", "here").await?;
        cluster.apply(&pod("late", NODE, "10.244.1.7")).await?;
        server.compact()?;
        server.stop_api();
        server.start_api()?;
        relay.repair();
        let seen = agent.wait("what happened before the server forgot", is(&[("late", "10.244.1.7")])).await?;
        ensure!(seen.lists.get(&Kind::Pod) == Some(&2), "listed again: {:?}", seen.lists);
        ensure!(seen.pods_heard_of == ["default/here", "default/late"].map(str::to_owned).into(), "{seen:?}");
        asked_only_what_it_may(&server.audit(AGENT)?, false)?;
        Ok(())
    })
}

/// The server has one for the ranges of its own settings, and administrators add and remove others.
#[test]
fn ranges_of_services_come_and_go() -> Result<()> {
    with_server(&[], async |server| {
        let cluster = Cluster::new(&server)?;
        cluster.apply(&yaml(&[NAMESPACE, RBAC, NODES])).await?;
        let mut agent = start_agent(&server).await?;
        let is = |ranges: &[&str]| {
            let ranges: BTreeSet<String> = ranges.iter().map(|range| (*range).to_owned()).collect();
            move |seen: &Seen| seen.service_ranges == ranges
        };
        agent.wait("the server's own", is(&["10.96.0.0/16", "fd00:96::/108"])).await?;
        let second = "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {name: second}\n\
                      spec: {cidrs: [10.97.0.0/24, 'fd00:97::/112']}\n";
        cluster.apply(second).await?;
        let all = ["10.96.0.0/16", "10.97.0.0/24", "fd00:96::/108", "fd00:97::/112"];
        agent.wait("a second one", is(&all)).await?;
        cluster.delete("networking.k8s.io/v1", "ServiceCIDR", "second").await?;
        let seen = agent.wait("without the second", is(&["10.96.0.0/16", "fd00:96::/108"])).await?;
        ensure!(seen.trouble.is_empty(), "{:?}", seen.trouble);
        asked_only_what_it_may(&server.audit(AGENT)?, true)?;
        Ok(())
    })
}

/// Somebody upgrades the agent and not its rights: what packets need goes on, and the agent reports
/// the missing right.
#[test]
fn without_the_right_to_see_pods_services_work() -> Result<()> {
    with_server(&[], async |server| {
        let cluster = Cluster::new(&server)?;
        let mut agent = start_agent_that_sees(&server, &cluster, "services, nodes").await?;
        agent.wait_for_maps("the first list", &yaml(&[NODES, WEB])).await?;
        let seen = agent.wait("the refusal is reported", |seen| !seen.trouble.is_empty()).await?;
        let report = seen.trouble.get("watch of Pod").context("its origin")?;
        ensure!(report.contains("pods is forbidden"), "{report}");
        cluster.apply(RBAC).await?;
        agent.wait("the right is there", |seen| seen.trouble.is_empty() && seen.lists.contains_key(&Kind::Pod)).await?;
        Ok(())
    })
}

/// The same for what packets need: each kind holds up what follows from it, and nothing else.
#[test]
fn without_the_right_to_see_nodes_services_work() -> Result<()> {
    with_server(&[], async |server| {
        let cluster = Cluster::new(&server)?;
        let mut agent = start_agent_that_sees(&server, &cluster, "services").await?;
        let has = |seen: &Seen, part: &str| seen.dump.iter().any(|line| line.contains(part));
        let seen = agent.wait("services are written", |seen| has(seen, " affinity ")).await?;
        ensure!(!seen.synced && !has(&seen, "Peer {"), "{seen:?}");
        cluster.apply(RBAC).await?;
        agent.wait_for_maps("the rest", &yaml(&[NODES, WEB])).await?;
        Ok(())
    })
}

#[test]
fn an_idle_watch_moves_on_by_bookmarks() -> Result<()> {
    with_server(&[], async |server| {
        let cluster = Cluster::new(&server)?;
        cluster.apply(&yaml(&[NODES, WEB])).await?;
        let url = direct();
        let start = Start { watch_seconds: Some(4), ..Start::new(&url) };
        let mut agent = Agent::start(&server, start).await?;
        agent.wait_for_maps("the first list", &yaml(&[NODES, WEB])).await?;

        // The store moves on, but not by anything that is watched.
        let churn = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "churn"}, "data": {"a": "b"}});
        cluster.apply(&churn.to_string()).await?;
        let version = |text: Option<String>| text.and_then(|text| text.parse::<u64>().ok()).context("a version");
        let moved = version(cluster.get("v1", "ConfigMap", "churn").await?.metadata.resource_version)?;
        let resumed_at = |uri: &str| -> Option<u64> {
            uri.split(['?', '&']).find_map(|part| part.strip_prefix("resourceVersion="))?.parse().ok()
        };
        wait_until("no watch was resumed after the versions of the bookmarks", async || {
            let requests = server.audit(ADMIN)?;
            let watches = of(&requests, "services", "watch");
            Ok(watches.iter().filter_map(|uri| resumed_at(uri)).any(|at| at >= moved))
        })
        .await?;
        let seen = agent.wait("nothing was listed again", |_| true).await?;
        ensure!(seen.lists.values().all(|lists| *lists == 1), "{:?}", seen.lists);
        Ok(())
    })
}

#[test]
fn the_nodes_object_tells_of_its_network_once_the_agent_is_ready() -> Result<()> {
    with_server(&[], async |server| {
        let cluster = Cluster::new(&server)?;
        cluster.apply(&yaml(&[NAMESPACE, RBAC])).await?;
        let unavailable =
            r#"conditions: [{type: NetworkUnavailable, status: "True"}, {type: Ready, status: "False"}], addresses"#;
        let taints =
            "taints: [{key: rustnet.io/agent-not-ready, effect: NoExecute}, {key: mine, effect: NoSchedule}], podCIDR:";
        let nodes = NODES.replace("status: {addresses", &format!("status: {{{unavailable}"));
        cluster.apply(&nodes.replace("spec: {podCIDR:", &format!("spec: {{{taints}"))).await?;

        let url = direct();
        let node_status = NodeStatus::new(NODE);
        let health = Arc::new(Health::default());
        let (_stop, shutdown) = watch::channel(false);
        let client = Agent::connect(&server, AGENT, &url).await?.client;
        tokio::spawn(node_status.clone().run(client, health.clone(), shutdown));
        let mut agent = Agent::start(&server, Start { user: AGENT, node_status, ..Start::new(&url) }).await?;
        agent.wait("the first list", |seen| seen.synced).await?;
        let patches = |server: &Server| -> Result<usize> {
            Ok(server.audit(AGENT)?.iter().filter(|request| request.verb == "patch").count())
        };
        ensure!(patches(&server)? == 0, "nothing is said before the agent is ready");

        health.set_ready();
        wait_until("the node's object was not repaired", async || {
            let node = serde_json::to_value(cluster.get("v1", "Node", NODE).await?)?;
            let keys =
                json!(node["spec"]["taints"].as_array().into_iter().flatten().map(|it| &it["key"]).collect::<Vec<_>>());
            let status = |of: &str| {
                let conditions = node["status"]["conditions"].as_array()?;
                Some(conditions.iter().find(|it| it["type"] == of)?["status"].clone())
            };
            // The API server adds and removes taints of its own by conditions; ours and the
            // administrator's count.
            let ours = keys.to_string().contains("rustnet.io/agent-not-ready");
            let others = keys.to_string().contains("mine") && status("Ready") == Some(json!("False"));
            ensure!(others, "what others say stays: {keys} {:?}", status("Ready"));
            Ok(!ours && status("NetworkUnavailable") == Some(json!("False")))
        })
        .await?;
        let other = serde_json::to_value(cluster.get("v1", "Node", "n2").await?)?;
        ensure!(
            other.to_string().contains("rustnet.io/agent-not-ready"),
            "the other node's object is not ours: {other}"
        );
        Ok(())
    })
}

/// Commands that read once get what the agent gets, over more than one page.
#[test]
fn a_list_is_what_a_source_delivers() -> Result<()> {
    with_server(&[], async |server| {
        let (cluster, url) = (Cluster::new(&server)?, format!("https://{}", Server::address()));
        cluster.apply(NODES).await?;
        cluster.apply(WEB).await?;
        let mut slices = String::new();
        for i in 0..260 {
            writeln!(
                slices,
                "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\nports: []\nendpoints: []\n\
                 metadata: {{name: many-{i}, namespace: default, labels: {{kubernetes.io/service-name: many}}}}"
            )?;
        }
        cluster.apply(&slices).await?;
        // Not for us.
        let headless = "apiVersion: v1\nkind: Service\nmetadata: {name: db, namespace: default, \
                        labels: {service.kubernetes.io/headless: ''}}\nspec: {clusterIP: None, ports: [{port: 1}]}\n";
        cluster.apply(headless).await?;
        let events = list(&Agent::connect(&server, ADMIN, &url).await?).await?;
        let mut count: BTreeMap<Kind, usize> = BTreeMap::new();
        let mut names = Vec::new();
        for event in &events {
            if let Event::Apply(object) = event {
                *count.entry(object.kind()).or_default() += 1;
                names.extend((object.kind() == Kind::Service).then(|| object.reference().name.to_string()));
            }
        }
        names.sort();
        assert_eq!(names, ["default/kubernetes", "default/web"]);
        // The server has a slice of its own.
        ensure!(count[&Kind::Slice] >= 263 && count[&Kind::Node] == 2, "{count:?}");
        let synced: Vec<_> = events.iter().rev().take(3).collect();
        ensure!(Kind::REQUIRED.iter().all(|kind| synced.contains(&&Event::Synced(*kind))), "{synced:?}");
        let refused = list(&Agent::connect(&server, AGENT, &url).await?).await;
        let refused = refused.err().context("no rights")?.to_string();
        ensure!(refused.contains("listing Services") && refused.contains("forbidden"), "{refused}");
        Ok(())
    })
}
