//! The API server: is it reached, without the service address that needs a proxy, and may the agent do what it does?

use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec};
use k8s_openapi::api::core::v1::{ConfigMap, Node};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Api;
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use serde_json::json;

use super::Stage;
use super::finding::{Finding, Level, split_remedy};
use super::nodes::KnownNode;
use crate::api::{self, Connection, Failure};
use crate::config::{Config, KubeSource, Source};
use crate::source::convert::Converter;
use crate::source::manifests::{Catalog, scan};
use crate::source::{Event, Object};

/// How long each step may take.
const PATIENCE: Duration = Duration::from_secs(3);
/// Objects that are named of many.
const EXAMPLES: u32 = 3;
/// Nodes a page.
const PAGE: u32 = 500;
/// What the agent does: API group, resource, subresource, verbs. `deploy/rbac.yaml` allows it.
pub const RIGHTS: [(&str, &str, &str, &[&str]); 10] = [
    ("", "services", "", &["list", "watch"]),
    ("discovery.k8s.io", "endpointslices", "", &["list", "watch"]),
    ("", "nodes", "", &["get", "list", "watch", "patch"]),
    ("", "nodes", "status", &["patch"]),
    ("", "pods", "", &["list", "watch"]),
    ("networking.k8s.io", "servicecidrs", "", &["list", "watch"]),
    ("networking.k8s.io", "networkpolicies", "", &["list", "watch"]),
    ("policy.networking.k8s.io", "clusternetworkpolicies", "", &["list", "watch"]),
    ("", "namespaces", "", &["list", "watch"]),
    ("events.k8s.io", "events", "", &["create", "patch"]),
];

/// One of these rights, as [`missing`] names it.
const PATCH_NODES: &str = "patch nodes";

/// How far a request got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reached {
    /// Nothing to reach: manifests are the source.
    NotNeeded(String),
    /// The kubeconfig or the service account cannot be used.
    Settings(String),
    /// The name has no address.
    Dns(String),
    /// Nobody answers at the address.
    Connect(String),
    /// There is an answer, but not the server's with a certificate of its authority.
    Tls(String),
    /// The server does not know who asks.
    Unauthorised(String),
    /// The server knows, and refuses.
    Forbidden(String),
    /// The server has troubles of its own.
    Server(String),
    /// An answer.
    Answer(String),
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The server's address.
    pub server: String,
    /// It is a service address, which needs a proxy.
    pub by_service: bool,
    /// How far a request got.
    pub reached: Reached,
    /// What the agent does and may not.
    pub missing: Result<Vec<String>, String>,
    /// What admission control says to a patch of the agent's own Node; nothing if it was not asked.
    pub admission: Option<Result<(), String>>,
}

/// What the source tells.
pub struct Cluster {
    /// Of the API server.
    pub api: Facts,
    /// The Nodes that were asked for, or why not.
    pub nodes: Result<Vec<KnownNode>, String>,
}

/// Which Nodes to ask for.
#[derive(Clone, Copy, Debug)]
pub enum Scope {
    /// All there are.
    All,
    /// The agent's own alone: every agent begins with a preflight, and in a rollout hundreds begin together.
    Own,
}

/// Looks.
pub fn gather(config: &Config, stage: Stage) -> Cluster {
    let scope = match stage {
        Stage::Before => Scope::Own,
        Stage::Running => Scope::All,
    };
    match &config.source {
        Source::Manifests(dir) => {
            let reached = Reached::NotNeeded(format!("the source is {}", dir.display()));
            let missing = Ok(Vec::new());
            let api = Facts { server: String::new(), by_service: false, reached, missing, admission: None };
            let mut catalog = Catalog::default();
            let events = scan(&mut catalog, dir).map_err(|error| format!("{}: {error}", dir.display()));
            let known = |event| match event {
                Event::Apply(Object::Node(node)) => Some(KnownNode { node, host_name: None, system_uuid: None }),
                _ => None,
            };
            Cluster { api, nodes: events.map(|events| events.into_iter().filter_map(known).collect()) }
        }
        Source::Kube(source) => {
            match tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start a runtime") {
                Ok(runtime) => runtime.block_on(ask(source, &config.node_name, scope)),
                Err(error) => failed(source, String::new(), Reached::Settings(format!("{error:#}"))),
            }
        }
    }
}

fn failed(source: &KubeSource, server: String, reached: Reached) -> Cluster {
    let why = "the API server was not reached".to_owned();
    let by_service = source.kubeconfig.is_none() && source.api_server.is_none();
    let api = Facts { server, by_service, reached, missing: Err(why.clone()), admission: None };
    Cluster { api, nodes: Err(why) }
}

/// Asks an API server, for the agent of the node of this name.
pub async fn ask(source: &KubeSource, node_name: &str, scope: Scope) -> Cluster {
    let settings = match api::settings(source).await {
        Ok(settings) => settings,
        Err(error) => return failed(source, String::new(), Reached::Settings(format!("{error:#}"))),
    };
    let server = settings.cluster_url.to_string();
    if let Err(reached) = connects(&settings.cluster_url) {
        return failed(source, server, reached);
    }
    let connection = match api::connection(&settings) {
        Ok(connection) => connection,
        Err(error) => return failed(source, server, Reached::Settings(format!("{error:#}"))),
    };
    let version = within(connection.client.apiserver_version()).await;
    let reached = match version {
        Ok(version) => Reached::Answer(version.git_version),
        Err(reached) => reached,
    };
    // Anybody may ask for the version: who asks is known only to what follows.
    let missing = missing(&connection).await;
    let reached = match (&reached, &missing) {
        (Reached::Answer(_), Err(why @ (Reached::Unauthorised(_) | Reached::Forbidden(_)))) => why.clone(),
        _ => reached,
    };
    if !matches!(reached, Reached::Answer(_)) {
        return failed(source, server, reached);
    }
    let nodes = match scope {
        Scope::All => nodes(&connection).await,
        Scope::Own => node(&connection, node_name).await,
    };
    let may_patch = missing.as_ref().is_ok_and(|missing| missing.iter().all(|right| right != PATCH_NODES));
    let admission = if may_patch { admission(&connection, node_name).await } else { None };
    let nodes = nodes.map_err(|reached| format!("asking for Nodes: {}", words(&reached)));
    let missing = missing.map_err(|reached| words(&reached).to_owned());
    let by_service = source.kubeconfig.is_none() && source.api_server.is_none();
    Cluster { api: Facts { server, by_service, reached, missing, admission }, nodes }
}

/// NetworkPolicies there are, and the names of a few; only asked while an agent runs, for at every start of every agent it would be
/// many requests. `None` without an API server.
pub fn policies(config: &Config) -> Option<Result<(usize, Vec<String>), String>> {
    let Source::Kube(source) = &config.source else { return None };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    Some(match runtime {
        Ok(runtime) => runtime.block_on(list_policies(source)),
        Err(error) => Err(format!("cannot start a runtime: {error}")),
    })
}

/// The same, of an API server.
///
/// # Errors
/// The server refuses, or is not reached.
pub async fn list_policies(source: &KubeSource) -> Result<(usize, Vec<String>), String> {
    let settings = api::settings(source).await.map_err(|error| format!("{error:#}"))?;
    let connection = api::connection(&settings).map_err(|error| format!("{error:#}"))?;
    let api: Api<NetworkPolicy> = Api::all(connection.client.clone());
    let list = within(api.list_metadata(&ListParams::default().limit(EXAMPLES))).await;
    let list = list.map_err(|reached| words(&reached).to_owned())?;
    let more = list.metadata.remaining_item_count.and_then(|more| usize::try_from(more).ok()).unwrap_or(0);
    let name = |meta: &ObjectMeta| {
        let [namespace, name] = [&meta.namespace, &meta.name].map(|it| it.as_deref().unwrap_or_default());
        format!("{namespace}/{name}")
    };
    Ok((list.items.len() + more, list.items.iter().map(|it| name(&it.metadata)).collect()))
}

/// The data of kubeadm's ConfigMap for kube-proxy. `None` without an API server, or where there is none.
///
/// # Errors
/// Those of [`ask_for_kube_proxy_config`].
pub fn kube_proxy_config(config: &Config) -> Result<Option<String>, Reached> {
    let Source::Kube(source) = &config.source else { return Ok(None) };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Reached::Settings(format!("cannot start a runtime: {error}")))?;
    runtime.block_on(ask_for_kube_proxy_config(source))
}

/// The same, of an API server.
///
/// # Errors
/// The server refuses, as it does an agent's own account, or is not reached.
pub async fn ask_for_kube_proxy_config(source: &KubeSource) -> Result<Option<String>, Reached> {
    let settings = api::settings(source).await.map_err(|error| Reached::Settings(format!("{error:#}")))?;
    let connection = api::connection(&settings).map_err(|error| Reached::Settings(format!("{error:#}")))?;
    let maps: Api<ConfigMap> = Api::namespaced(connection.client.clone(), "kube-system");
    let map = within(maps.get_opt("kube-proxy")).await?;
    let data = map.and_then(|map| map.data).unwrap_or_default();
    Ok(data.into_values().find(|text| text.contains("KubeProxyConfiguration")))
}

/// Whether the address can be found and connected to.
fn connects(url: &axum::http::Uri) -> Result<(), Reached> {
    let port = url.port_u16().unwrap_or(if url.scheme_str() == Some("http") { 80 } else { 443 });
    let host = url.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    let found = (host, port).to_socket_addrs().map_err(|error| Reached::Dns(format!("{host}: {error}")))?;
    let mut last = Reached::Dns(format!("{host}: has no address"));
    for addr in found {
        match connect(addr) {
            Ok(()) => return Ok(()),
            Err(error) => last = Reached::Connect(format!("{addr}: {error}")),
        }
    }
    Err(last)
}

fn connect(addr: SocketAddr) -> std::io::Result<()> {
    TcpStream::connect_timeout(&addr, PATIENCE).map(drop)
}

/// Waits for an answer, for some time; a failure is classified.
async fn within<T>(answer: impl Future<Output = Result<T, kube::Error>>) -> Result<T, Reached> {
    match tokio::time::timeout(PATIENCE, answer).await {
        Ok(answer) => answer.map_err(|error| classify(&error)),
        Err(_) => Err(Reached::Server(format!("no answer within {} s", PATIENCE.as_secs()))),
    }
}

fn classify(error: &kube::Error) -> Reached {
    let text = api::chain(error);
    match error {
        kube::Error::Api(status) if status.code == 401 => Reached::Unauthorised(status.message.clone()),
        kube::Error::Api(status) if status.code == 403 => Reached::Forbidden(status.message.clone()),
        kube::Error::Api(_) => Reached::Server(text),
        // The address has been connected to a moment ago: what fails now is the handshake.
        _ => Reached::Tls(text),
    }
}

/// What is known of it.
pub fn words(reached: &Reached) -> &str {
    match reached {
        Reached::NotNeeded(text)
        | Reached::Settings(text)
        | Reached::Dns(text)
        | Reached::Connect(text)
        | Reached::Tls(text)
        | Reached::Unauthorised(text)
        | Reached::Forbidden(text)
        | Reached::Server(text)
        | Reached::Answer(text) => text,
    }
}

/// What the agent does and may not, as the server itself says.
async fn missing(connection: &Connection) -> Result<Vec<String>, Reached> {
    let reviews: Api<SelfSubjectAccessReview> = Api::all(connection.client.clone());
    let mut missing = Vec::new();
    for (group, resource, subresource, verbs) in RIGHTS {
        for verb in verbs {
            let attributes = ResourceAttributes {
                group: Some(group.to_owned()),
                resource: Some(resource.to_owned()),
                subresource: (!subresource.is_empty()).then(|| subresource.to_owned()),
                verb: Some((*verb).to_owned()),
                ..ResourceAttributes::default()
            };
            let spec = SelfSubjectAccessReviewSpec { resource_attributes: Some(attributes), ..Default::default() };
            let review = SelfSubjectAccessReview { spec, ..Default::default() };
            let answer = within(reviews.create(&PostParams::default(), &review)).await?;
            if !answer.status.is_some_and(|status| status.allowed) {
                let name =
                    if subresource.is_empty() { resource.to_owned() } else { format!("{resource}/{subresource}") };
                missing.push(format!("{verb} {name}"));
            }
        }
    }
    Ok(missing)
}

/// Whether a patch of this Node gets past admission control, which knows more than rights. It changes nothing, and is not stored.
/// `None` if it did not get there: then other checks say why.
async fn admission(connection: &Connection, node_name: &str) -> Option<Result<(), String>> {
    let api: Api<Node> = Api::all(connection.client.clone());
    let params = PatchParams { dry_run: true, ..PatchParams::default() };
    match within(api.patch(node_name, &params, &Patch::Merge(json!({})))).await {
        Ok(_) => Some(Ok(())),
        Err(Reached::Forbidden(why)) => Some(Err(why)),
        Err(_) => None,
    }
}

async fn nodes(connection: &Connection) -> Result<Vec<KnownNode>, Reached> {
    let api: Api<Node> = Api::all(connection.client.clone());
    let (mut known, mut converter) = (Vec::new(), Converter::new());
    let mut page = ListParams::default().limit(PAGE);
    loop {
        let list = within(api.list(&page)).await?;
        known.extend(list.items.iter().filter_map(|node| known_node(&mut converter, node)));
        match list.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => page = page.continue_token(&token),
            None => return Ok(known),
        }
    }
}

/// The Node of this name, if there is one.
async fn node(connection: &Connection, name: &str) -> Result<Vec<KnownNode>, Reached> {
    let api: Api<Node> = Api::all(connection.client.clone());
    let node = within(api.get_opt(name)).await?;
    Ok(node.iter().filter_map(|node| known_node(&mut Converter::new(), node)).collect())
}

fn known_node(converter: &mut Converter, node: &Node) -> Option<KnownNode> {
    let Ok(Event::Apply(Object::Node(model))) = converter.node(node) else { return None };
    let label = node.metadata.labels.as_ref().and_then(|labels| labels.get("kubernetes.io/hostname"));
    let info = node.status.as_ref().and_then(|status| status.node_info.as_ref());
    let uuid = info.map(|info| info.system_uuid.clone()).filter(|uuid| !uuid.is_empty());
    Some(KnownNode { node: model, host_name: label.cloned(), system_uuid: uuid })
}

/// Judges.
pub fn check(facts: &Facts) -> Vec<Finding> {
    let server = &facts.server;
    let fault =
        |what: &'static str, detail: String, hint: &str| vec![Finding::new(Level::Fault, what, detail).hint(hint)];
    match &facts.reached {
        Reached::NotNeeded(why) => return vec![Finding::ok("not needed", why)],
        Reached::Settings(error) => {
            return fault(
                "settings",
                error.clone(),
                "fix the kubeconfig, or mount the service account's token; see deploy/",
            );
        }
        Reached::Dns(error) => {
            return fault(
                "name",
                error.clone(),
                "give --api-server an address, or a name that the host itself can resolve",
            );
        }
        Reached::Connect(error) if facts.by_service => {
            let hint =
                "this service address needs a proxy: give --api-server (apiServer) an address that every node reaches";
            return fault("connection", error.clone(), hint);
        }
        Reached::Connect(error) => return fault("connection", error.clone(), Failure::Unreachable.remedy()),
        Reached::Tls(error) => return fault("TLS", format!("{server} {error}"), Failure::Trust.remedy()),
        Reached::Unauthorised(error) => {
            return fault("identity", format!("{server} {error} (401)"), Failure::Credentials.remedy());
        }
        Reached::Forbidden(error) => {
            return fault("rights", format!("{server} {error} (403)"), Failure::Rights.remedy());
        }
        Reached::Server(error) => return fault("server", format!("{server} {error}"), Failure::Server.remedy()),
        Reached::Answer(_) => {}
    }
    let mut found = vec![Finding::ok("reached", format!("{server} {}", words(&facts.reached)))];
    if facts.by_service {
        let detail = "by its service address, which leads nowhere without a proxy until the agent runs";
        let hint = "give --api-server (apiServer) an address that every node reaches";
        found.push(Finding::new(Level::Warning, "address", detail).hint(hint));
    }
    found.push(match &facts.missing {
        Ok(missing) if missing.is_empty() => Finding::ok("rights", "all that the agent needs"),
        Ok(missing) => Finding::new(Level::Fault, "rights", format!("may not {}", missing.join(", ")))
            .hint(Failure::Rights.remedy()),
        Err(error) => Finding::new(Level::Warning, "rights", format!("not checked: {error}"))
            .hint("let the account create selfsubjectaccessreviews, as system:basic-user does"),
    });
    found.extend(facts.admission.as_ref().map(|admission| match admission {
        Ok(()) => Finding::ok("admission", "patches of this node's object"),
        Err(why) => {
            let (why, remedy) = split_remedy(why);
            Finding::new(Level::Fault, "admission", format!("refuses patches of this node's object: {why}"))
                .hint(remedy)
        }
    }));
    found
}

#[cfg(test)]
mod tests {
    use super::super::finding::{assert_only, assert_well};
    use super::*;
    use std::net::{Ipv4Addr, TcpListener};

    fn facts(reached: Reached) -> Facts {
        let (missing, admission) = (Ok(Vec::new()), Some(Ok(())));
        Facts { server: "https://192.0.2.1:6443".into(), by_service: false, reached, missing, admission }
    }

    fn answer() -> Facts {
        facts(Reached::Answer("v1.34.4".into()))
    }

    #[test]
    fn an_answer_is_well_and_so_is_no_need_of_one() {
        assert_well(&check(&answer()));
        assert_well(&check(&Facts { admission: None, ..answer() }));
        assert_well(&check(&facts(Reached::NotNeeded("the source is /m".into()))));
    }

    #[test]
    fn one_fault_at_a_time() {
        let with = |reached: fn(String) -> Reached| facts(reached("why".into()));
        let by_service = |facts: Facts| Facts { by_service: true, ..facts };
        for (facts, level, detail, hint) in [
            (with(Reached::Settings), Level::Fault, "why", "kubeconfig"),
            (with(Reached::Dns), Level::Fault, "why", "resolve"),
            (with(Reached::Connect), Level::Fault, "why", "firewalls"),
            (by_service(with(Reached::Connect)), Level::Fault, "why", "service address"),
            (with(Reached::Tls), Level::Fault, "why", "certificate"),
            (with(Reached::Unauthorised), Level::Fault, "401", "token"),
            (with(Reached::Forbidden), Level::Fault, "403", "rbac.yaml"),
            (with(Reached::Server), Level::Fault, "why", "log"),
            (by_service(answer()), Level::Warning, "leads nowhere", "apiServer"),
            (
                Facts { missing: Ok(vec!["watch nodes".into()]), ..answer() },
                Level::Fault,
                "may not watch nodes",
                "rbac.yaml",
            ),
            (
                Facts { missing: Err("why".into()), ..answer() },
                Level::Warning,
                "not checked: why",
                "selfsubjectaccessreviews",
            ),
            (
                Facts { admission: Some(Err("policy x; do this".into())), ..answer() },
                Level::Fault,
                "refuses patches of this node's object: policy x",
                "do this",
            ),
        ] {
            assert_only(&check(&facts), level, detail, hint);
        }
    }

    #[test]
    fn names_and_closed_ports_are_distinguished() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound");
        let url = |text: String| text.parse().expect("a URL");
        let port = listener.local_addr().expect("bound").port();
        assert_eq!(connects(&url(format!("https://127.0.0.1:{port}"))), Ok(()));
        drop(listener);
        assert!(matches!(connects(&url(format!("https://127.0.0.1:{port}/"))), Err(Reached::Connect(_))));
        assert!(matches!(connects(&url("https://name.invalid".into())), Err(Reached::Dns(_))));
    }
}
