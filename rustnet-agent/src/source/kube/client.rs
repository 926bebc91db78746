//! The connection to the API server.
//!
//! Tokens are rotated, certificates renewed and kubeconfigs rewritten while the agent runs: a token's file is read for each
//! request, and everything is read again once the server refuses who asks (401) or cannot be reached.
//!
//! Dead connections are noticed by TCP keep-alive: a watch is silent for minutes, and a node that lost its server without
//! a word would serve endpoints that are long gone.

use super::API_SERVER;
use super::backoff::Backoff;
use crate::config::KubeSource;
use crate::model::Problem;
use crate::source::{Event, Kind};
use anyhow::Context;
use axum::body::{Bytes, HttpBody};
use axum::http::header::AUTHORIZATION;
use axum::http::{HeaderValue, Request, Response, StatusCode};
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::{Body, ConfigExt as _};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::sync::mpsc::Sender;
use tower::{BoxError, Service, ServiceBuilder, ServiceExt as _, service_fn};

const CONNECT: Duration = Duration::from_secs(10);
/// A silent connection is probed after this, then every [`PROBE_INTERVAL`], and given up after [`PROBES`].
const PROBE_AFTER: Duration = Duration::from_secs(10);
const PROBE_INTERVAL: Duration = Duration::from_secs(5);
const PROBES: u32 = 4;
const UNANSWERED: Duration = Duration::from_secs(30);

/// A client of an API server, and what its answers tell before they end: a watch that works again may stay silent.
#[derive(Clone)]
pub struct Connection {
    /// The client.
    pub client: Client,
    pub(super) answers: Answers,
}

/// Tells of successful answers, by the kind that was asked for.
#[derive(Clone, Debug, Default)]
pub(super) struct Answers(Arc<Waiters>);

#[derive(Debug, Default)]
struct Waiters {
    kinds: [Notify; Kind::ALL.len()],
    any: Notify,
}

impl Answers {
    /// For waiting until the server has begun to answer a request for this kind.
    pub(super) fn of(&self, kind: Kind) -> &Notify {
        &self.0.kinds[kind as usize]
    }

    /// The same for any kind.
    pub(super) fn any(&self) -> &Notify {
        &self.0.any
    }

    fn note(&self, path: &str) {
        // Kinds are asked for in all namespaces.
        if path.contains("/namespaces/") {
            return;
        }
        let resource = path.rsplit('/').next().unwrap_or_default();
        let kind = match resource {
            "services" => Kind::Service,
            "endpointslices" => Kind::Slice,
            "nodes" => Kind::Node,
            "pods" => Kind::Pod,
            _ => return,
        };
        self.of(kind).notify_one();
        self.any().notify_one();
    }
}

/// A connection to the API server that the settings name. Nothing is sent yet: the server need not be there.
///
/// # Errors
/// A kubeconfig or service account that is missing or broken.
pub async fn connect(source: &KubeSource) -> anyhow::Result<Connection> {
    let config = settings(source).await?;
    tracing::info!(server = %config.cluster_url, "API server");
    let (answers, namespace) = (Answers::default(), config.default_namespace.clone());
    let current = Arc::new(Mutex::new(way(config, answers.clone())?));
    let (source, noted) = (Arc::new(source.clone()), answers.clone());
    let service = service_fn(move |request: Request<Body>| {
        let (current, source, noted) = (Arc::clone(&current), Arc::clone(&source), noted.clone());
        async move {
            let now = current.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let answer = now.oneshot(request).await;
            // Whoever asked comes again, after a pause, and is sent by the new way.
            if answer.as_ref().map_or(true, |answer| answer.status() == StatusCode::UNAUTHORIZED) {
                match settings(&source).await.and_then(|config| way(config, noted)) {
                    Ok(new) => *current.lock().unwrap_or_else(PoisonError::into_inner) = new,
                    Err(error) => tracing::warn!("{error:#}; what was read before is used on"),
                }
            }
            answer
        }
    });
    Ok(Connection { client: Client::new(service, namespace), answers })
}

/// The same, tried until it can be had: a kubeconfig may come later than the agent, or be fixed.
/// `None`: the receiver of events is gone.
pub async fn connect_in_time(source: &KubeSource, events: &Sender<Event>) -> Option<Connection> {
    let mut backoff = Backoff::default();
    loop {
        let (result, origin) = (connect(source).await, "credentials".into());
        let problem = |error| Problem::new(&API_SERVER.into(), "", format!("{error:#}; it is read again"));
        let (connection, problems) = match result {
            Ok(connection) => (Some(connection), Box::default()),
            Err(error) => (None, [problem(error)].into()),
        };
        events.send(Event::Report { origin, problems }).await.ok()?;
        if connection.is_some() {
            return connection;
        }
        tokio::select! {
            () = tokio::time::sleep(backoff.next()) => {}
            () = events.closed() => return None,
        }
    }
}

/// Where the API server is and how to talk to it, from kubeconfig or service account.
///
/// # Errors
/// A kubeconfig or service account that is missing or broken.
pub async fn settings(source: &KubeSource) -> anyhow::Result<Config> {
    let mut config = if let Some(path) = &source.kubeconfig {
        let shown = path.display();
        let file = Kubeconfig::read_from(path)
            .with_context(|| format!("{shown}: cannot use as kubeconfig; check --kubeconfig"))?;
        Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
            .await
            .with_context(|| format!("{shown}: its current context is not complete"))?
    } else {
        let hint = "no service account: run the agent in a pod, or give --kubeconfig or --manifests";
        // With an address of its own, the agent does not need the one that Kubernetes put into its environment.
        if source.api_server.is_some() { Config::incluster_dns() } else { Config::incluster() }.context(hint)?
    };
    if let Some(url) = &source.api_server {
        config.cluster_url = url.parse().with_context(|| format!("{url}: not a URL; check --api-server"))?;
    }
    Ok(config)
}

/// A connection with these settings, for good.
///
/// # Errors
/// Certificates or credentials that cannot be used.
pub fn connection(config: &Config) -> anyhow::Result<Connection> {
    let answers = Answers::default();
    let client = Client::new(way(config.clone(), answers.clone())?, config.default_namespace.clone());
    Ok(Connection { client, answers })
}

/// Sends requests to the server of these settings, with their credentials. `answers` receives the
/// path of each successful answer.
fn way(
    mut config: Config,
    answers: Answers,
) -> anyhow::Result<
    impl Service<
        Request<Body>,
        Response = Response<impl HttpBody<Data = Bytes, Error: Into<BoxError>> + Send + 'static>,
        Error = BoxError,
        Future: Send,
    > + Clone
    + Send
    + 'static,
> {
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(CONNECT));
    connector.set_keepalive(Some(PROBE_AFTER));
    connector.set_keepalive_interval(Some(PROBE_INTERVAL));
    connector.set_keepalive_retries(Some(PROBES));
    connector.set_tcp_user_timeout(Some(UNANSWERED));
    let connector = config
        .rustls_https_connector_with_connector(connector)
        .context("the API server's certificate authority, or the client's certificate or key, cannot be used")?;
    let http: HttpClient<_, Body> = HttpClient::builder(TokioExecutor::new()).build(connector);
    let auth = &mut config.auth_info;
    // kube reads it once a minute only, and takes a line's end for a part of the token.
    let token_file = if auth.token.is_none() { auth.token_file.take().map(PathBuf::from) } else { None };
    Ok(ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer().context("the API server's credentials cannot be used")?)
        .map_err(BoxError::from)
        .service_fn(move |mut request: Request<Body>| {
            let (http, answers, token_file) = (http.clone(), answers.clone(), token_file.clone());
            async move {
                if let Some(path) = token_file {
                    request.headers_mut().insert(AUTHORIZATION, bearer(&path)?);
                }
                let path = request.uri().path().to_owned();
                let answer = http.request(request).await?;
                if answer.status().is_success() {
                    answers.note(&path);
                }
                Ok::<_, BoxError>(answer)
            }
        }))
}

/// What a token's file proves now.
fn bearer(path: &Path) -> anyhow::Result<HeaderValue> {
    let shown = path.display();
    let token = std::fs::read_to_string(path).with_context(|| format!("{shown}: cannot read the token"))?;
    let mut value = HeaderValue::try_from(format!("Bearer {}", token.trim()))
        .with_context(|| format!("{shown}: holds no token, but something else"))?;
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn refused(source: KubeSource) -> String {
        match connect(&source).await {
            Ok(_) => panic!("accepted {source:?}"),
            Err(error) => format!("{error:#}"),
        }
    }

    fn kubeconfig(path: impl Into<PathBuf>) -> KubeSource {
        KubeSource { kubeconfig: Some(path.into()), api_server: None }
    }

    #[tokio::test]
    async fn unusable_kubeconfigs_are_refused_by_name() {
        let message = refused(kubeconfig("/nonexistent/kubeconfig")).await;
        assert!(message.contains("/nonexistent/kubeconfig") && message.contains("--kubeconfig"), "{message}");

        let dir = tempfile::tempdir().expect("dir");
        for (name, text) in [
            ("empty", ""),
            ("broken", "{"),
            ("contextless", "apiVersion: v1\nkind: Config\n"),
            ("dangling", "apiVersion: v1\nkind: Config\ncurrent-context: absent\n"),
        ] {
            let path = dir.path().join(name);
            std::fs::write(&path, text).expect("written");
            let message = refused(kubeconfig(&path)).await;
            assert!(message.contains(name), "{message}");
        }
    }

    #[tokio::test]
    async fn without_a_service_account_the_ways_out_are_named() {
        let api_server = Some("https://192.0.2.1:6443".to_owned());
        let message = refused(KubeSource { kubeconfig: None, api_server }).await;
        assert!(message.contains("--kubeconfig") && message.contains("--manifests"), "{message}");
    }
}
