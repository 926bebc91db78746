//! What the tests do to a cluster, and the agent's view of it: the source, the index and the plan on maps in memory.

use super::server::{ADMIN, Server, Store, User};
use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Client;
use kube::api::{
    Api, ApiResource, DeleteParams, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams,
    ValidationDirective,
};
use rustnet_agent::api::{Connection, Deadlines, NodeStatus, connect};
use rustnet_agent::config::{self, Routing};
use rustnet_agent::host::HostFacts;
use rustnet_agent::index::{Index, Settings, is_service_range};
use rustnet_agent::metrics::Metrics;
use rustnet_agent::plan::{MemoryMaps, Planner};
use rustnet_agent::source::convert::Converter;
use rustnet_agent::source::kube::KubeSource;
use rustnet_agent::source::{Event, Kind, Object};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use testkit::netns::{Holder, Own};
use tokio::sync::{mpsc, watch};

/// Name of the node whose agent is tested.
pub const NODE: &str = "n1";
/// The service that the API server makes for itself.
const OWN_SERVICE: &str = "10.96.0.1";
/// Only a broken system waits this long.
const DEADLINE: Duration = Duration::from_mins(1);

/// Runs a test with a server of its own, inside that server's namespace. One at a time: each takes 400 MB.
pub fn with_server<F: Future<Output = Result<()>>>(
    arguments: &[&str],
    test: impl FnOnce(Server) -> F + Send,
) -> Result<()> {
    with_store(Store::Pinned, arguments, test)
}

/// The same with a choice of the store.
pub fn with_store<F: Future<Output = Result<()>>>(
    store: Store,
    arguments: &[&str],
    test: impl FnOnce(Server) -> F + Send,
) -> Result<()> {
    with_namespace(|netns| {
        let server = Server::start(netns, store, arguments)?;
        netns.run(|| block_on(test(server)))?
    })
}

/// The same, with the server prepared but not started.
pub fn with_absent_server<F: Future<Output = Result<()>>>(test: impl FnOnce(Server) -> F + Send) -> Result<()> {
    with_namespace(|netns| {
        let server = Server::prepare(netns, Store::Pinned, &[])?;
        netns.run(|| block_on(test(server)))?
    })
}

/// Held while there is a server.
pub fn one_at_a_time() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn with_namespace(test: impl FnOnce(&testkit::Netns) -> Result<()>) -> Result<()> {
    let _one = one_at_a_time();
    let holder = Holder::new(&format!("rn{}-kubernetes", std::process::id()), Own::default())?;
    test(&holder)
}

/// Runs a future in this thread, and so in its namespace.
pub fn block_on<T>(test: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(test)
}

/// The objects of a YAML text.
pub fn documents(yaml: &str) -> Result<Vec<Value>> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(yaml)?;
    Ok(documents.into_iter().filter(|document| !document.is_null()).collect())
}

/// A cluster, by its administrator's hand.
pub struct Cluster {
    client: Client,
}

impl Cluster {
    /// Of this server.
    pub fn new(server: &Server) -> Result<Self> {
        Ok(Self { client: server.client(ADMIN)? })
    }

    /// Applies every object of a YAML text, status included.
    pub async fn apply(&self, yaml: &str) -> Result<()> {
        for document in documents(yaml)? {
            self.apply_one(&document, false).await?;
        }
        Ok(())
    }

    /// Applies one object, status included.
    pub async fn apply_object(&self, object: &Value) -> Result<()> {
        self.apply_one(object, false).await
    }

    /// Asks the server what it thinks of an object: unknown fields and wrong types are errors. Nothing is stored.
    pub async fn check(&self, document: &Value) -> Result<()> {
        self.apply_one(document, true).await
    }

    /// Deletes an object; the namespace is `default` for those that are in one.
    pub async fn delete(&self, api_version: &str, kind: &str, name: &str) -> Result<()> {
        self.delete_as(api_version, kind, name, &DeleteParams::default()).await
    }

    /// The same without waiting for a kubelet, which nobody is here.
    pub async fn delete_at_once(&self, api_version: &str, kind: &str, name: &str) -> Result<()> {
        self.delete_as(api_version, kind, name, &DeleteParams::default().grace_period(0)).await
    }

    async fn delete_as(&self, api_version: &str, kind: &str, name: &str, how: &DeleteParams) -> Result<()> {
        let api = self.api(api_version, kind, Some("default"));
        api.delete(name, how).await.with_context(|| format!("deleting {kind} {name}"))?;
        Ok(())
    }

    /// An object as it is.
    pub async fn get(&self, api_version: &str, kind: &str, name: &str) -> Result<DynamicObject> {
        Ok(self.api(api_version, kind, Some("default")).get(name).await?)
    }

    /// Gives a pod to a node, as the scheduler does.
    pub async fn bind(&self, pod: &str, node: &str) -> Result<()> {
        let binding = serde_json::json!({
            "apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node},
        });
        let pods = Api::<Pod>::namespaced(self.client.clone(), "default");
        let params = PostParams::default();
        let answer = pods.create_subresource::<_, Value>("binding", pod, &params, &binding);
        answer.await.with_context(|| format!("binding {pod} to {node}"))?;
        Ok(())
    }

    async fn apply_one(&self, document: &Value, dry_run: bool) -> Result<()> {
        let field = |pointer: &str| document.pointer(pointer).and_then(Value::as_str);
        let kind = field("/kind").context("an object without kind")?;
        let name = field("/metadata/name").context("an object without name")?;
        let api_version = field("/apiVersion").context("an object without apiVersion")?;
        let api = self.api(api_version, kind, field("/metadata/namespace").or(Some("default")));
        let mut params = PatchParams::apply("test").force();
        params.dry_run = dry_run;
        params.field_validation = Some(ValidationDirective::Strict);
        let what = || format!("applying {kind} {name}");
        let mut document = document.clone();
        // A Node's list of addresses has two of one type, which its merge key forbids; a Pod's status is a resource of its own.
        let has_status = ["Node", "Pod", "Service"].contains(&kind);
        let status = document.as_object_mut().filter(|_| has_status).and_then(|it| it.remove("status"));
        api.patch(name, &params, &Patch::Apply(document)).await.with_context(what)?;
        if let Some(status) = status.filter(|_| !dry_run) {
            let status = serde_json::json!({ "status": status });
            api.patch_status(name, &PatchParams::default(), &Patch::Merge(status)).await.with_context(what)?;
        }
        Ok(())
    }

    fn api(&self, api_version: &str, kind: &str, namespace: Option<&str>) -> Api<DynamicObject> {
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind));
        let cluster_wide = [
            "Namespace",
            "Node",
            "ClusterRole",
            "ClusterRoleBinding",
            "ServiceCIDR",
            "ValidatingAdmissionPolicy",
            "ValidatingAdmissionPolicyBinding",
        ];
        let cluster_wide = cluster_wide.contains(&kind);
        match namespace {
            Some(namespace) if !cluster_wide => Api::namespaced_with(self.client.clone(), namespace, &resource),
            _ => Api::all_with(self.client.clone(), &resource),
        }
    }
}

/// What is in the maps, without numbers that depend on history.
pub type Dump = BTreeSet<String>;

/// The agent's control plane on maps in memory, which refuse every order of writes that would hurt a packet.
struct Plane {
    index: Index,
    planner: Planner,
    maps: MemoryMaps,
    start: Instant,
}

impl Plane {
    fn new() -> Result<Self> {
        let maps = MemoryMaps::new(65_536);
        let mut index = Index::new(Settings::new(NODE, Routing::Vxlan));
        index.set_host(HostFacts::default());
        Ok(Self { index, planner: Planner::adopt(&maps)?, maps, start: Instant::now() })
    }

    fn sync(&mut self) -> Result<()> {
        let now = self.start.elapsed();
        self.maps.set_now(now);
        self.planner.sync(&mut self.index, &mut self.maps, now)?;
        Ok(())
    }

    fn dump(&self) -> Dump {
        let mut dump = Dump::new();
        let held = self.maps.held();
        for (key, entry) in held.services.iter().filter(|(key, _)| key.ip.to_string() != OWN_SERVICE) {
            let backends: BTreeSet<String> = self
                .maps
                .backends(entry)
                .iter()
                .map(|backend| format!("{:?}:{} flags {}", backend.addr, backend.port, backend.flags))
                .collect();
            dump.insert(format!("{key:?} affinity {} flags {} -> {backends:?}", entry.affinity, entry.flags));
        }
        let peers = held.peers.iter().filter(|(_, peer)| !is_service_range(peer));
        dump.extend(peers.map(|(prefix, peer)| format!("{prefix} {peer:?}")));
        dump
    }

    /// The ranges of Services, of which every server has its own.
    fn service_ranges(&self) -> BTreeSet<String> {
        let ranges = self.maps.held().peers.iter().filter(|(_, peer)| is_service_range(peer));
        ranges.map(|(prefix, _)| prefix.to_string()).collect()
    }
}

/// What the maps hold when exactly these objects are there.
pub fn expected(yaml: &str) -> Result<Dump> {
    let mut plane = Plane::new()?;
    let mut converter = Converter::new();
    for document in documents(yaml)? {
        let event = match document["kind"].as_str() {
            Some("Service") => converter.service(&serde_json::from_value::<Service>(document)?)?,
            Some("EndpointSlice") => converter.slice(&serde_json::from_value::<EndpointSlice>(document)?)?,
            Some("Node") => converter.node(&serde_json::from_value::<Node>(document)?)?,
            other => bail!("no source delivers {other:?}"),
        };
        plane.index.handle(event);
    }
    for kind in Kind::REQUIRED {
        plane.index.handle(Event::Synced(kind));
    }
    plane.sync()?;
    Ok(plane.dump())
}

/// What the agent has seen so far.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// What is in its maps, but for the ranges of Services.
    pub dump: Dump,
    /// Those.
    pub service_ranges: BTreeSet<String>,
    /// Every kind that the agent needs has been delivered in full.
    pub synced: bool,
    /// The kinds that have been delivered in full.
    pub listed: BTreeSet<Kind>,
    /// How often each kind was listed.
    pub lists: BTreeMap<Kind, u32>,
    /// This node's pods and their addresses.
    pub pods: BTreeMap<String, Vec<IpAddr>>,
    /// Every pod that was ever spoken of.
    pub pods_heard_of: BTreeSet<String>,
    /// Origins that are in trouble.
    pub trouble: BTreeMap<String, String>,
    broken: Option<String>,
}

/// An agent's source and control plane at work.
pub struct Agent {
    /// What it counts.
    pub metrics: Metrics,
    seen: watch::Receiver<Seen>,
}

/// How an agent is started.
pub struct Start<'a> {
    /// Who it is.
    pub user: User,
    /// The server's address, in place of its kubeconfig's, which leads nowhere.
    pub url: &'a str,
    /// Ends watches early.
    pub watch_seconds: Option<u32>,
    /// How long requests may take.
    pub deadlines: Deadlines,
    /// Hears of the node's object.
    pub node_status: NodeStatus,
    /// Watches what network policies follow from.
    pub has_policies: bool,
}

impl<'a> Start<'a> {
    /// As the administrator, with an address.
    pub fn new(url: &'a str) -> Self {
        let deadlines = Deadlines::default();
        Self {
            user: ADMIN,
            url,
            watch_seconds: None,
            deadlines,
            node_status: NodeStatus::new(NODE),
            has_policies: true,
        }
    }
}

impl Agent {
    /// Starts it. It ends with the runtime.
    pub async fn start(server: &Server, start: Start<'_>) -> Result<Self> {
        let connection = Self::connect_within(server, start.user, start.url, start.deadlines).await?;
        let metrics = Metrics::default();
        let mut source =
            KubeSource::new(connection, metrics.clone(), start.node_status).with_policies(start.has_policies);
        if let Some(seconds) = start.watch_seconds {
            source = source.watch_seconds(seconds);
        }
        let (events, receiver) = mpsc::channel(256);
        let (seen, watched) = watch::channel(Seen::default());
        tokio::spawn(source.run(events));
        let plane = Plane::new()?;
        tokio::spawn(async move {
            if let Err(error) = follow(plane, receiver, &seen).await {
                seen.send_modify(|seen| seen.broken = Some(format!("{error:#}")));
            }
        });
        Ok(Self { metrics, seen: watched })
    }

    /// The agent's connection, made as the agent makes it.
    pub async fn connect(server: &Server, user: User, url: &str) -> Result<Connection> {
        Self::connect_within(server, user, url, Deadlines::default()).await
    }

    async fn connect_within(server: &Server, user: User, url: &str, deadlines: Deadlines) -> Result<Connection> {
        // 203.0.113.0/24 is for documentation: whoever ignores the override gets nowhere.
        let kubeconfig = Some(server.kubeconfig(user, "https://203.0.113.1:6443")?);
        connect(&config::KubeSource { kubeconfig, api_server: Some(url.to_owned()) }, deadlines).await
    }

    /// Waits until what it has seen is as asked.
    pub async fn wait(&mut self, what: &str, is: impl Fn(&Seen) -> bool) -> Result<Seen> {
        let look = self.seen.wait_for(|seen| is(seen) || seen.broken.is_some());
        let seen = tokio::time::timeout(DEADLINE, look).await.ok().map(|seen| seen.map(|seen| seen.clone()));
        let Some(seen) = seen else {
            let Seen { synced, lists, trouble, .. } = &*self.seen.borrow();
            bail!("{what}: not so after {DEADLINE:?}: synced {synced}, lists {lists:?}, trouble {trouble:?}");
        };
        let seen = seen.context("the agent's task is gone")?;
        ensure!(seen.broken.is_none(), "{what}: {:?}", seen.broken);
        Ok(seen)
    }

    /// Waits until the maps hold what these objects mean and every kind has been listed: Pods, of which maps tell nothing, too.
    pub async fn wait_for_first_lists(&mut self, yaml: &str) -> Result<Seen> {
        self.wait("every kind is listed", |seen| seen.listed.len() == Kind::ALL.len()).await?;
        self.wait_for_maps("the first list", yaml).await
    }

    /// Waits until the maps hold what these objects mean.
    pub async fn wait_for_maps(&mut self, what: &str, yaml: &str) -> Result<Seen> {
        let expected = expected(yaml)?;
        let result = self.wait(what, |seen| seen.synced && seen.dump == expected).await;
        result.with_context(|| {
            let seen = self.seen.borrow();
            let missing: Vec<_> = expected.difference(&seen.dump).collect();
            let surplus: Vec<_> = seen.dump.difference(&expected).collect();
            format!("missing: {missing:#?}\nsurplus: {surplus:#?}")
        })
    }
}

async fn follow(mut plane: Plane, mut events: mpsc::Receiver<Event>, seen: &watch::Sender<Seen>) -> Result<()> {
    let mut batch = Vec::new();
    while events.recv_many(&mut batch, 256).await > 0 {
        let mut now = seen.borrow().clone();
        for event in batch.drain(..) {
            match &event {
                Event::Synced(kind) => drop(now.listed.insert(*kind)),
                Event::Restart(kind) => *now.lists.entry(*kind).or_default() += 1,
                Event::Report { origin, problems } => match problems.first() {
                    Some(problem) => drop(now.trouble.insert(origin.to_string(), problem.to_string())),
                    None => drop(now.trouble.remove(&origin.to_string())),
                },
                Event::Apply(Object::Pod(pod)) => drop(now.pods_heard_of.insert(pod.name.to_string())),
                _ => {}
            }
            plane.index.handle(event);
        }
        plane.sync()?;
        now.synced = plane.index.synced();
        now.dump = plane.dump();
        now.service_ranges = plane.service_ranges();
        now.pods = plane.index.pods().map(|pod| (pod.name.to_string(), pod.addresses.to_vec())).collect();
        seen.send_replace(now);
    }
    Ok(())
}
