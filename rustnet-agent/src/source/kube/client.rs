//! The connection to the API server.
//!
//! Dead connections are noticed by TCP keep-alive: a watch is silent for minutes, and a node that lost its server without
//! a word would serve endpoints that are long gone.

use crate::config::KubeSource;
use crate::source::Kind;
use anyhow::Context;
use axum::http::Request;
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::{Body, ConfigExt as _};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tower::{BoxError, ServiceBuilder};

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
pub(super) struct Answers(Arc<[Notify; Kind::ALL.len()]>);

impl Answers {
    /// For waiting until the server has begun to answer a request for this kind.
    pub(super) fn of(&self, kind: Kind) -> &Notify {
        &self.0[kind as usize]
    }

    fn note(&self, path: &str) {
        let resource = path.rsplit('/').next().unwrap_or_default();
        let kind = match resource {
            "services" => Kind::Service,
            "endpointslices" => Kind::Slice,
            "nodes" => Kind::Node,
            "pods" => Kind::Pod,
            _ => return,
        };
        self.of(kind).notify_one();
    }
}

/// A connection to the API server that the settings name. Nothing is sent yet: the server need not be there.
///
/// # Errors
/// A kubeconfig or service account that is missing or broken.
pub async fn connect(source: &KubeSource) -> anyhow::Result<Connection> {
    let config = settings(source).await?;
    tracing::info!(server = %config.cluster_url, "API server");
    connection(&config)
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

/// A connection with these settings.
///
/// # Errors
/// Certificates or credentials that cannot be used.
pub fn connection(config: &Config) -> anyhow::Result<Connection> {
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
    let answers = Answers::default();
    let told = answers.clone();
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer().context("the API server's credentials cannot be used")?)
        .map_err(BoxError::from)
        .service_fn(move |request: Request<Body>| {
            let (path, answer, told) = (request.uri().path().to_owned(), http.request(request), told.clone());
            async move {
                let answer = answer.await?;
                if answer.status().is_success() {
                    told.note(&path);
                }
                Ok::<_, BoxError>(answer)
            }
        });
    Ok(Connection { client: Client::new(service, config.default_namespace.clone()), answers })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

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
