//! The API server's side of a run: what the cluster has, the objects of the run, and questions to probes and agents through the
//! proxy for pods.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::pin::Pin;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use axum::body::HttpBody as _;
use axum::http::{Request, StatusCode};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service, ServiceAccount};
use kube::api::{DeleteParams, ListParams, PostParams, Preconditions};
use kube::client::Body;
use kube::{Api, Client};
use tokio::time::{Instant, sleep, timeout};

use super::evidence::Drops;
use super::objects::{LABEL, Run, SELECTOR};
use super::wire::{Answer, HEALTH_PATH, PATH, Question, TOKEN_HEADER};
use crate::api;

/// What finds the agents' DaemonSet.
const AGENT: &str = "app.kubernetes.io/name=rustnet-agent";
/// What finds the Service of DNS.
const DNS: &str = "k8s-app=kube-dns";
const METRICS_PORT: i32 = 9962;
/// Between two looks at something that is waited for.
pub const PAUSE: Duration = Duration::from_millis(200);
/// Of one question, the API server's own limit for a connection to a pod included.
const PATIENCE: Duration = Duration::from_secs(40);
/// Longest answer of a probe.
const ANSWER: usize = 64 << 10;
/// Longest metrics of an agent.
const METRICS: usize = 4 << 20;

/// A connection to a cluster.
#[derive(Clone)]
pub struct Cluster {
    client: Client,
}

/// The agents of a cluster.
#[derive(Clone, Debug, Default)]
pub struct Agents {
    /// Their image; none: there is no DaemonSet.
    pub image: Option<String>,
    /// By node: namespace, name of the pod, and port of its metrics.
    pods: BTreeMap<String, (String, String, i32)>,
}

impl Agents {
    /// True if an agent's pod is on a node.
    pub fn has(&self, node: &str) -> bool {
        self.pods.contains_key(node)
    }

    /// True if there is any.
    pub fn is_known(&self) -> bool {
        !self.pods.is_empty()
    }
}

/// A node of the cluster.
#[derive(Clone, Debug)]
pub struct KnownNode {
    /// Its name.
    pub name: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// The kubelet reports that it is ready.
    pub is_ready: bool,
}

impl Cluster {
    /// Reads the kubeconfig or the service account. Nothing is sent yet.
    ///
    /// # Errors
    /// See [`api::operator_settings`].
    pub async fn connect(kubeconfig: Option<&Path>, context: Option<&str>) -> Result<Self> {
        let settings = api::operator_settings(kubeconfig, context).await?;
        Ok(Self { client: api::connection(&settings)?.client })
    }

    /// Finds the agents' DaemonSet and its pods, in whichever namespace.
    ///
    /// # Errors
    /// Those of the API server.
    pub async fn agents(&self) -> Result<Agents> {
        let all = ListParams::default().labels(AGENT);
        let sets = Api::<DaemonSet>::all(self.client.clone()).list(&all).await;
        let sets = sets.map_err(|error| refusal("listing the DaemonSet of rustnet's agents", &error))?;
        let image = sets.items.iter().find_map(|set| {
            let spec = set.spec.as_ref()?.template.spec.as_ref()?;
            spec.containers.iter().find(|it| it.name == "agent").and_then(|it| it.image.clone())
        });
        let pods = Api::<Pod>::all(self.client.clone()).list(&all).await;
        let pods = pods.map_err(|error| refusal("listing the pods of rustnet's agents", &error))?;
        let pods = pods.items.into_iter().filter_map(|pod| {
            let spec = pod.spec?;
            let ports = spec.containers.iter().flat_map(|it| it.ports.iter().flatten());
            let metrics =
                ports.filter(|port| port.name.as_deref() == Some("metrics")).map(|it| it.container_port).next();
            let place = (pod.metadata.namespace?, pod.metadata.name?, metrics.unwrap_or(METRICS_PORT));
            Some((spec.node_name?, place))
        });
        Ok(Agents { image, pods: pods.collect() })
    }

    /// Lists the nodes, by name.
    ///
    /// # Errors
    /// Those of the API server.
    pub async fn nodes(&self) -> Result<Vec<KnownNode>> {
        let nodes = Api::<Node>::all(self.client.clone()).list(&ListParams::default()).await;
        let nodes = nodes.map_err(|error| refusal("listing nodes", &error))?;
        let mut nodes: Vec<_> = nodes.items.into_iter().map(known_node).collect();
        nodes.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(nodes)
    }

    /// Returns why names cannot be resolved, or nothing if they can. Who may not look assumes that they can.
    pub async fn without_dns(&self) -> Option<String> {
        let services = Api::<Service>::namespaced(self.client.clone(), "kube-system");
        let found = services.list(&ListParams::default().labels(DNS)).await.ok()?;
        found.items.is_empty().then(|| format!("no Service in kube-system has the label {DNS}: the cluster has no DNS"))
    }

    /// Returns the addresses of the API server's Service.
    ///
    /// # Errors
    /// Why they are not known.
    pub async fn api_server(&self) -> Result<Vec<SocketAddr>, String> {
        let services = Api::<Service>::namespaced(self.client.clone(), "default");
        let service =
            services.get("kubernetes").await.map_err(|error| say("reading Service default/kubernetes", &error))?;
        let spec = service.spec.unwrap_or_default();
        let port = spec.ports.iter().flatten().next().map_or(443, |it| it.port);
        let ips = spec.cluster_ips.into_iter().flatten().filter_map(|ip| ip.parse().ok());
        Ok(ips.map(|ip: IpAddr| SocketAddr::new(ip, u16::try_from(port).unwrap_or(443))).collect())
    }

    /// Makes room for a run: refuses a namespace that is there, or removes one of an earlier run if that is asked for.
    ///
    /// # Errors
    /// The namespace is there and stays, or the API server refuses.
    pub async fn clear(&self, namespace: &str, replaces: bool, limit: Duration) -> Result<()> {
        let namespaces = Api::<Namespace>::all(self.client.clone());
        let found = namespaces.get_opt(namespace).await;
        let Some(found) = found.map_err(|error| refusal(&format!("reading namespace {namespace}"), &error))? else {
            return Ok(());
        };
        let is_ours =
            found.metadata.labels.iter().flatten().any(|(key, value)| (key.as_str(), value.as_str()) == LABEL);
        if !is_ours {
            bail!("namespace {namespace} is there, and is not of this command: give another --namespace");
        }
        if !replaces {
            bail!(
                "namespace {namespace} is there: another run goes on, or one was left by --keep; remove it with --replace, or \
                 `kubectl delete namespace {namespace}`"
            );
        }
        self.remove(namespace, found.metadata.uid, limit).await
    }

    /// Creates a namespace and returns its UID.
    ///
    /// # Errors
    /// Those of the API server.
    pub async fn create_namespace(&self, run: &Run) -> Result<Option<String>> {
        let namespaces = Api::<Namespace>::all(self.client.clone());
        let made = namespaces.create(&PostParams::default(), &run.namespace_object()).await;
        let made = made.map_err(|error| refusal(&format!("creating namespace {}", run.namespace), &error))?;
        Ok(made.metadata.uid)
    }

    /// Removes a namespace with all that is in it, and waits until it is gone. One of another UID stays.
    ///
    /// # Errors
    /// It is not gone in time, or the API server refuses.
    pub async fn remove(&self, namespace: &str, uid: Option<String>, limit: Duration) -> Result<()> {
        let namespaces = Api::<Namespace>::all(self.client.clone());
        let preconditions = Some(Preconditions { uid: uid.clone(), resource_version: None });
        let result = namespaces.delete(namespace, &DeleteParams { preconditions, ..DeleteParams::background() }).await;
        match result {
            Ok(_) => {}
            Err(error) if is_absent(&error) => return Ok(()),
            // It is being removed already.
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            Err(error) => return Err(refusal(&format!("removing namespace {namespace}"), &error)),
        }
        let end = Instant::now() + limit;
        loop {
            match namespaces.get_opt(namespace).await {
                Ok(Some(found)) if found.metadata.uid == uid => {}
                Ok(_) => return Ok(()),
                Err(error) => return Err(refusal(&format!("reading namespace {namespace}"), &error)),
            }
            if Instant::now() >= end {
                bail!(
                    "namespace {namespace} is not gone within {limit:?}: `kubectl describe namespace {namespace}` says what is left"
                );
            }
            sleep(PAUSE).await;
        }
    }

    /// Creates the account of all probes.
    ///
    /// # Errors
    /// Those of the API server.
    pub async fn create_account(&self, run: &Run) -> Result<()> {
        let accounts = Api::<ServiceAccount>::namespaced(self.client.clone(), &run.namespace);
        let made = accounts.create(&PostParams::default(), &Run::account()).await;
        made.map(drop).map_err(|error| refusal("creating the ServiceAccount of the probes", &error))
    }

    /// Creates a pod.
    ///
    /// # Errors
    /// The API server's own words, for example those of Pod Security; see [`is_policy`].
    pub async fn create_pod(&self, namespace: &str, pod: &Pod) -> Result<(), kube::Error> {
        let pods = Api::<Pod>::namespaced(self.client.clone(), namespace);
        pods.create(&PostParams::default(), pod).await.map(drop)
    }

    /// Creates a Service and returns it as the API server completed it.
    ///
    /// # Errors
    /// Those of the API server.
    pub async fn create_service(&self, namespace: &str, service: &Service) -> Result<Service> {
        let services = Api::<Service>::namespaced(self.client.clone(), namespace);
        let made = services.create(&PostParams::default(), service).await;
        made.map_err(|error| refusal("creating a Service of the run", &error))
    }

    /// Lists the run's pods, by name.
    ///
    /// # Errors
    /// Those of the API server.
    pub async fn pods(&self, namespace: &str) -> Result<BTreeMap<String, Pod>> {
        let pods =
            Api::<Pod>::namespaced(self.client.clone(), namespace).list(&ListParams::default().labels(SELECTOR)).await;
        let pods = pods.map_err(|error| refusal("listing the probes", &error))?;
        Ok(pods.items.into_iter().filter_map(|pod| Some((pod.metadata.name.clone()?, pod))).collect())
    }

    /// Waits until a probe answers, or the end of the time.
    ///
    /// # Errors
    /// Why it does not.
    pub async fn wait_for_probe(&self, run: &Run, probe: &str, end: Instant) -> Result<(), String> {
        loop {
            let result = self.get(&run.namespace, probe, run.port.into(), HEALTH_PATH, None, ANSWER).await;
            if result.is_ok() || Instant::now() >= end {
                return result.map(drop);
            }
            sleep(PAUSE).await;
        }
    }

    /// Has a probe ask a question.
    ///
    /// # Errors
    /// Why the probe gave no answer.
    pub async fn ask(&self, run: &Run, probe: &str, question: &Question) -> Result<Answer, String> {
        let path = format!("{PATH}?{}", question.to_query());
        let text = self.get(&run.namespace, probe, run.port.into(), &path, Some(&run.token), ANSWER).await?;
        serde_json::from_str(&text)
            .map_err(|error| format!("{probe} answers what no probe of this release does: {error}"))
    }

    /// Reads the counters of drops of a node's agent.
    ///
    /// # Errors
    /// Why they are not known.
    pub async fn drops(&self, agents: &Agents, node: &str) -> Result<Drops, String> {
        let Some((namespace, pod, port)) = agents.pods.get(node) else {
            return Err("no pod of an agent was found there".to_owned());
        };
        let text = self.get(namespace, pod, *port, "/metrics", None, METRICS).await?;
        Ok(Drops::parse(&text))
    }

    /// Sends a GET request to a pod through the API server's proxy.
    async fn get(
        &self,
        namespace: &str,
        pod: &str,
        port: i32,
        path: &str,
        token: Option<&str>,
        limit: usize,
    ) -> Result<String, String> {
        let uri = format!("/api/v1/namespaces/{namespace}/pods/{pod}:{port}/proxy{path}");
        let mut request = Request::get(uri);
        if let Some(token) = token {
            request = request.header(TOKEN_HEADER, token);
        }
        let request = request.body(Body::empty()).map_err(|error| format!("{pod}: {error}"))?;
        let work = async {
            let answer = self.client.send(request).await.map_err(|error| api::chain(&error))?;
            let status = answer.status();
            let text = read(answer.into_body(), limit).await?;
            if status == StatusCode::OK { Ok(text) } else { Err(words_of(status, &text)) }
        };
        let result = timeout(PATIENCE, work).await.unwrap_or_else(|_| Err(format!("no answer within {PATIENCE:?}")));
        result.map_err(|why| format!("{pod}, through the API server: {why}"))
    }
}

/// True if the API server refused an object because of what is in it: an admission policy, as Pod Security is one (403). Others
/// answer as webhooks (400) and expressions (422) do.
pub fn is_policy(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if [400, 403, 422].contains(&status.code))
}

/// Returns an operation and the API server's words about its failure.
pub fn say(what: &str, error: &kube::Error) -> String {
    let words = match error {
        kube::Error::Api(status) if !status.message.is_empty() => status.message.clone(),
        other => api::chain(other),
    };
    format!("{what}: {words}")
}

/// The same as an error with its remedy.
pub fn refusal(what: &str, error: &kube::Error) -> anyhow::Error {
    let text = say(what, error);
    match api::Failure::of(error) {
        api::Failure::Rights => anyhow!("{text}; the role that this command needs is in docs/debugging.md"),
        api::Failure::Server => anyhow!("{text}"),
        other => anyhow!("{text}; {}", other.remedy()),
    }
}

fn is_absent(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}

fn known_node(node: Node) -> KnownNode {
    let status = node.status.unwrap_or_default();
    let is_ready = status.conditions.iter().flatten().any(|it| it.type_ == "Ready" && it.status == "True");
    let of = |kind: &str| {
        let addresses = status.addresses.iter().flatten().filter(|it| it.type_ == kind);
        addresses.filter_map(|it| it.address.parse().ok()).collect::<Vec<IpAddr>>()
    };
    KnownNode {
        addresses: [of("InternalIP"), of("ExternalIP")].concat(),
        is_ready,
        name: node.metadata.name.unwrap_or_default(),
    }
}

/// Reads a body of limited length.
async fn read(mut body: Body, limit: usize) -> Result<String, String> {
    let mut bytes = Vec::new();
    while let Some(frame) = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
        if let Ok(data) = frame.map_err(|error| api::chain(&error))?.into_data() {
            if bytes.len() + data.len() > limit {
                return Err(format!("an answer of more than {limit} bytes"));
            }
            bytes.extend_from_slice(&data);
        }
    }
    String::from_utf8(bytes).map_err(|_| "an answer that is no text".to_owned())
}

/// Returns what a failed answer says: that of the API server has a message, that of a pod is its text.
fn words_of(status: StatusCode, text: &str) -> String {
    let message = serde_json::from_str::<serde_json::Value>(text).ok();
    let message = message.as_ref().and_then(|it| it["message"].as_str()).unwrap_or(text).trim();
    if message.is_empty() { status.to_string() } else { format!("{message} ({})", status.as_u16()) }
}

/// Returns a secret that nobody guesses.
///
/// # Errors
/// The kernel gives no random bytes.
pub fn make_token() -> Result<String> {
    use std::io::Read as _;
    let mut bytes = [0; 16];
    let mut source = std::fs::File::open("/dev/urandom").context("/dev/urandom: cannot open")?;
    source.read_exact(&mut bytes).context("/dev/urandom: cannot read")?;
    Ok(format!("{:032x}", u128::from_ne_bytes(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_have_the_servers_words() {
        let proxy = r#"{"kind":"Status","message":"error trying to reach service: dial tcp: i/o timeout","code":503}"#;
        assert_eq!(
            words_of(StatusCode::SERVICE_UNAVAILABLE, proxy),
            "error trying to reach service: dial tcp: i/o timeout (503)"
        );
        assert_eq!(words_of(StatusCode::BAD_REQUEST, "host is missing\n"), "host is missing (400)");
        assert_eq!(words_of(StatusCode::BAD_GATEWAY, ""), "502 Bad Gateway");
    }

    #[tokio::test]
    async fn answers_have_a_limit() {
        assert_eq!(read(Body::from(b"four".to_vec()), 4).await.as_deref(), Ok("four"));
        assert!(read(Body::from(b"fiver".to_vec()), 4).await.is_err());
    }

    #[test]
    fn policies_and_troubles_of_the_server_differ() {
        let error = |code| {
            let mut status = kube::core::Status::failure("no", "because");
            status.code = code;
            kube::Error::Api(Box::new(status))
        };
        assert!([400, 403, 422].into_iter().all(|code| is_policy(&error(code))));
        assert!(![401, 404, 409, 500].into_iter().any(|code| is_policy(&error(code))));
        assert!(format!("{}", refusal("creating", &error(403))).contains("docs/debugging.md"));
    }

    #[test]
    fn secrets_differ() {
        assert_ne!(make_token().expect("random bytes"), make_token().expect("random bytes"));
    }
}
