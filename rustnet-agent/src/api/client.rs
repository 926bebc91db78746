//! The connection to the API server.
//!
//! Tokens are rotated, certificates renewed and kubeconfigs rewritten while the agent runs: a token's file is read for each
//! request, and everything is read again once the server refuses who asks (401) or cannot be reached.
//!
//! Dead connections are noticed by TCP keep-alive: a watch is silent for minutes, and a node that lost its server without
//! a word would serve endpoints that are long gone. Dead servers behind living connections are noticed by [`Deadlines`].

use super::API_SERVER;
use super::answers::{Answers, kind_of};
use super::backoff::Backoff;
use super::deadline::{Deadlines, Timed, in_time, is_watch};
use super::herd::Herd;
use crate::config::KubeSource;
use crate::model::Problem;
use crate::source::Event;
use anyhow::{Context, ensure};
use axum::body::{Bytes, HttpBody};
use axum::http::header::{AUTHORIZATION, USER_AGENT};
use axum::http::{HeaderValue, Request, Response, StatusCode, Uri};
use futures::future::BoxFuture;
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::{Body, ConfigExt as _};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc::Sender;
use tower::{BoxError, Service, ServiceBuilder, ServiceExt as _, service_fn};

/// User-Agent, for the API server's audit log and flow schemas.
const AGENT: HeaderValue = HeaderValue::from_static(concat!("rustnet-agent/", env!("CARGO_PKG_VERSION")));
/// A silent connection is probed after this, then every [`PROBE_INTERVAL`], and given up after [`PROBES`].
const PROBE_AFTER: Duration = Duration::from_secs(10);
const PROBE_INTERVAL: Duration = Duration::from_secs(5);
const PROBES: u32 = 4;
const UNANSWERED: Duration = Duration::from_secs(30);

/// A client of an API server, a record of its answers, and the other nodes that ask it.
#[derive(Clone)]
pub struct Connection {
    /// The client.
    pub client: Client,
    pub(crate) answers: Answers,
    pub(crate) herd: Herd,
}

impl Connection {
    pub(crate) fn new(client: Client, answers: Answers) -> Self {
        Self { client, answers, herd: Herd::default() }
    }
}

/// A connection to the API server that the settings name. Nothing is sent yet: the server need not be there.
///
/// # Errors
/// A kubeconfig or service account that is missing or broken.
pub async fn connect(source: &KubeSource, deadlines: Deadlines) -> anyhow::Result<Connection> {
    let config = settings(source).await?;
    tracing::info!(server = %config.cluster_url, "API server");
    let (answers, namespace) = (Answers::default(), config.default_namespace.clone());
    let current = Arc::new(Mutex::new(way(config, answers.clone(), deadlines)?));
    let (source, noted) = (Arc::new(source.clone()), answers.clone());
    let service = service_fn(move |request: Request<Body>| {
        let (current, source, noted) = (Arc::clone(&current), Arc::clone(&source), noted.clone());
        async move {
            let now = current.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let answer = now.oneshot(request).await;
            // Whoever asked comes again, after a pause, and is sent by the new way.
            if answer.as_ref().map_or(true, |answer| answer.status() == StatusCode::UNAUTHORIZED) {
                match settings(&source).await.and_then(|config| way(config, noted, deadlines)) {
                    Ok(new) => *current.lock().unwrap_or_else(PoisonError::into_inner) = new,
                    Err(error) => tracing::warn!("{error:#}; what was read before is used on"),
                }
            }
            answer
        }
    });
    Ok(Connection::new(Client::new(service, namespace), answers))
}

/// The same, tried until it can be had: a kubeconfig may come later than the agent, or be fixed.
/// `None`: the receiver of events is gone.
pub async fn connect_in_time(source: &KubeSource, events: &Sender<Event>) -> Option<Connection> {
    let mut backoff = Backoff::default();
    loop {
        let (result, origin) = (connect(source, Deadlines::default()).await, "credentials".into());
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
        refuse_proxy(&file).with_context(|| format!("{shown}: cannot use as kubeconfig"))?;
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

/// Where the API server is for a person's command, as kubectl finds it: `kubeconfig`, the files of `KUBECONFIG`,
/// `~/.kube/config`, the pod's service account. `context` names another context than the current one.
///
/// # Errors
/// A kubeconfig or service account that is missing or broken.
pub async fn operator_settings(kubeconfig: Option<&Path>, context: Option<&str>) -> anyhow::Result<Config> {
    let default = std::env::home_dir().map(|home| home.join(".kube/config")).filter(|path| path.is_file());
    let read = |path: &Path| {
        let shown = path.display();
        Kubeconfig::read_from(path).with_context(|| format!("{shown}: cannot use as kubeconfig; check --kubeconfig"))
    };
    let file = match (kubeconfig, default) {
        (Some(path), _) => Some(read(path)?),
        (None, default) => match Kubeconfig::from_env().context("KUBECONFIG: cannot use its files as kubeconfig")? {
            Some(file) => Some(file),
            None => default.map(|path| read(&path)).transpose()?,
        },
    };
    let Some(mut file) = file else {
        return Config::incluster().context("no kubeconfig and no service account: give --kubeconfig");
    };
    if let Some(context) = context {
        file.current_context = Some(context.to_owned());
    }
    refuse_proxy(&file).context("cannot use the kubeconfig")?;
    let hint = "the kubeconfig's current context is not complete: check it, or give another --context";
    Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.context(hint)
}

/// A connection with these settings, for good.
///
/// # Errors
/// Certificates or credentials that cannot be used.
pub fn connection(config: &Config) -> anyhow::Result<Connection> {
    let answers = Answers::default();
    let way = way(config.clone(), answers.clone(), Deadlines::default())?;
    Ok(Connection::new(Client::new(way, config.default_namespace.clone()), answers))
}

/// Refuses a proxy: no request goes through one, and a direct connection may be what the proxy is to prevent. Proxies of the
/// environment (`HTTPS_PROXY`) are not used for the API server.
fn refuse_proxy(file: &Kubeconfig) -> anyhow::Result<()> {
    let context = file.contexts.iter().find(|it| Some(&it.name) == file.current_context.as_ref());
    let name = context.and_then(|it| it.context.as_ref()).map(|it| &it.cluster);
    let cluster = file.clusters.iter().find(|it| Some(&it.name) == name).and_then(|it| it.cluster.as_ref());
    let proxy = cluster.and_then(|it| it.proxy_url.as_deref()).filter(|url| !url.is_empty());
    ensure!(
        proxy.is_none(),
        "proxy-url {} is not supported; remove it, and name an address that every node reaches without a proxy",
        proxy.unwrap_or_default()
    );
    Ok(())
}

/// Sends requests to the server of these settings, with their credentials, and gives up what is late. `answers` records
/// successful answers.
fn way(
    mut config: Config,
    answers: Answers,
    deadlines: Deadlines,
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
    connector.set_connect_timeout(Some(deadlines.connection));
    connector.set_keepalive(Some(PROBE_AFTER));
    connector.set_keepalive_interval(Some(PROBE_INTERVAL));
    connector.set_keepalive_retries(Some(PROBES));
    connector.set_tcp_user_timeout(Some(UNANSWERED));
    let connector = config
        .rustls_https_connector_with_connector(connector)
        .context("the API server's certificate authority, or the client's certificate or key, cannot be used")?;
    let connector = service_fn(move |server: Uri| {
        let connector = connector.clone();
        let connection: BoxFuture<'_, _> =
            Box::pin(in_time("connection", deadlines.connection, connector.oneshot(server)));
        connection
    });
    let http: HttpClient<_, Body> = HttpClient::builder(TokioExecutor::new()).build(connector);
    let auth = &mut config.auth_info;
    // kube reads it once a minute only, and takes a line's end for a part of the token.
    let token_file = if auth.token.is_none() { auth.token_file.take().map(PathBuf::from) } else { None };
    let way = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer().context("the API server's credentials cannot be used")?)
        .layer(
            config
                .extra_headers_layer()
                .context("the user that the kubeconfig impersonates (as) is no valid header")?,
        )
        .map_err(BoxError::from)
        .service_fn(move |mut request: Request<Body>| {
            let (http, answers, token_file) = (http.clone(), answers.clone(), token_file.clone());
            async move {
                if let Some(path) = token_file {
                    request.headers_mut().insert(AUTHORIZATION, bearer(&path)?);
                }
                request.headers_mut().insert(USER_AGENT, AGENT);
                if let Some(uri) = of_the_newest(request.uri()) {
                    *request.uri_mut() = uri;
                }
                let (kind, is_watch) = (kind_of(request.uri().path()), is_watch(&request));
                let answer = http.request(request).await?;
                let is_success = answer.status().is_success();
                let kind = kind.filter(|_| is_success);
                if let Some(kind) = kind {
                    answers.begun(kind);
                }
                let heard = move || kind.map_or((), |kind| answers.heard(kind));
                Ok::<_, BoxError>(answer.map(|body| Timed::new(body, is_watch && is_success, &deadlines, heard)))
            }
        });
    Ok(service_fn(move |request| in_time("answer", deadlines.head, way.clone().oneshot(request))))
}

/// The address for a streamed list of the newest state, which the API server checks with its store. kube asks for any state
/// (`resourceVersion=0`): an API server that lags behind would take the node back in time.
fn of_the_newest(uri: &Uri) -> Option<Uri> {
    let query = uri.query().filter(|query| query.split('&').any(|pair| pair == "sendInitialEvents=true"))?;
    let kept: Vec<_> = query.split('&').filter(|pair| *pair != "resourceVersion=0").collect();
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(format!("{}?{}", uri.path(), kept.join("&")).parse().ok()?);
    Uri::from_parts(parts).ok()
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
        match connect(&source, Deadlines::default()).await {
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

    /// A kubeconfig with a line more for its cluster, and for its user.
    fn config_file(server: &str, cluster: &str, user: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: x\n\
             clusters:\n- {{name: other, cluster: {{server: \"https://192.0.2.9\", proxy-url: \"http://192.0.2.8\"}}}}\n\
             - name: c\n  cluster:\n    server: {server}\n    {cluster}\n\
             users:\n- name: u\n  user:\n    token: secret\n    {user}\n\
             contexts: [{{name: x, context: {{cluster: c, user: u}}}}]\n"
        )
    }

    #[tokio::test]
    async fn a_proxy_is_refused_by_name() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("kubeconfig");
        for proxy in ["http://192.0.2.7:3128", "socks5://192.0.2.7:1080"] {
            std::fs::write(&path, config_file("https://192.0.2.1", &format!("proxy-url: {proxy}"), ""))
                .expect("written");
            let message = refused(kubeconfig(&path)).await;
            for word in ["kubeconfig", "proxy-url", proxy, "remove it"] {
                assert!(message.contains(word), "{word}: {message}");
            }
        }
        // One of a cluster that is not meant is no matter.
        std::fs::write(&path, config_file("https://192.0.2.1", "", "")).expect("written");
        assert!(connect(&kubeconfig(&path), Deadlines::default()).await.is_ok());
    }

    #[tokio::test]
    async fn a_persons_kubeconfig_is_refused_by_name_and_by_context() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("kubeconfig");
        let refused = async |context| match operator_settings(Some(&path), context).await {
            Ok(config) => panic!("accepted {}", config.cluster_url),
            Err(error) => format!("{error:#}"),
        };
        let message = refused(None).await;
        assert!(message.contains("--kubeconfig"), "{message}");
        std::fs::write(&path, config_file("https://192.0.2.1", "", "")).expect("written");
        let found = operator_settings(Some(&path), Some("x")).await.expect("settings");
        assert_eq!(found.cluster_url.host(), Some("192.0.2.1"));
        let message = refused(Some("absent")).await;
        assert!(message.contains("--context"), "{message}");
        std::fs::write(&path, config_file("https://192.0.2.1", "proxy-url: http://192.0.2.7", "")).expect("written");
        let message = refused(None).await;
        assert!(message.contains("proxy-url"), "{message}");
    }

    #[tokio::test]
    async fn requests_name_their_sender_and_the_impersonated_user() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("kubeconfig");
        let (asked, mut requests) = tokio::sync::mpsc::channel(1);
        let server = axum::Router::new().fallback(async move |request: Request<axum::body::Body>| {
            asked.send(request).await.expect("received");
            axum::Json(serde_json::json!({"metadata": {}, "items": []}))
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("its address"));
        tokio::spawn(axum::serve(listener, server).into_future());
        let user = "as: deputy\n    as-groups: [g1, g2]\n    as-user-extra: {scope: [s]}";
        std::fs::write(&path, config_file(&url, "", user)).expect("written");
        let connection = connect(&kubeconfig(&path), Deadlines::default()).await.expect("connected");
        kube::Api::<k8s_openapi::api::core::v1::Node>::all(connection.client.clone())
            .list(&kube::api::ListParams::default())
            .await
            .expect("a list");
        let request = requests.recv().await.expect("a request");
        let all = |name: &str| -> Vec<_> {
            request.headers().get_all(name).iter().map(|value| value.to_str().expect("text")).collect()
        };
        assert_eq!(all("user-agent"), [concat!("rustnet-agent/", env!("CARGO_PKG_VERSION"))]);
        assert_eq!(all("authorization"), ["Bearer secret"]);
        assert_eq!(all("impersonate-user"), ["deputy"]);
        assert_eq!(all("impersonate-group"), ["g1", "g2"]);
        assert_eq!(all("impersonate-extra-scope"), ["s"]);
        // The record of Pods begins with the connection, and is read first: time goes on between the two.
        let never_heard = connection.answers.silence(crate::source::Kind::Pod);
        assert!(connection.answers.silence(crate::source::Kind::Node) < never_heard, "the answer is noted");
    }

    /// The time until the kernel probes the connection to this port, in hundredths of a second, if that is what its timer is for.
    fn time_to_probe(port: u16) -> Option<u64> {
        let table = std::fs::read_to_string("/proc/net/tcp").expect("the kernel's table");
        let line = table.lines().find_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let is_ours = fields[2].ends_with(&format!(":{port:04X}")) && fields[3] == "01";
            is_ours.then(|| fields[5].to_owned())
        })?;
        let left = line.strip_prefix("02:")?;
        Some(u64::from_str_radix(left, 16).expect("a number"))
    }

    /// The kernel's own remedy for a server that goes without a word, next to the deadlines.
    #[tokio::test]
    async fn silent_connections_are_probed() {
        let server =
            axum::Router::new().fallback(async || axum::Json(serde_json::json!({"metadata": {}, "items": []})));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("its address");
        tokio::spawn(axum::serve(listener, server).into_future());
        let config = Config::new(format!("http://{address}").parse().expect("a URL"));
        let connection = connection(&config).expect("settings");
        let nodes = kube::Api::<k8s_openapi::api::core::v1::Node>::all(connection.client.clone());
        nodes.list(&kube::api::ListParams::default()).await.expect("a list");
        // Until all is acknowledged, the timer is for that.
        let probe = async {
            loop {
                if let Some(left) = time_to_probe(address.port()) {
                    break left;
                }
                tokio::task::yield_now().await;
            }
        };
        let left = tokio::time::timeout(Duration::from_secs(30), probe).await.expect("a timer for probes");
        assert!(left <= 1000, "{left} hundredths of a second");
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_accepts_and_stays_silent_is_left() {
        // The kernel accepts for it.
        let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = silent.local_addr().expect("its address");
        for (scheme, words) in [("http", "no answer within 30s"), ("https", "no connection within 10s")] {
            let mut config = Config::new(format!("{scheme}://{address}").parse().expect("a URL"));
            config.accept_invalid_certs = true;
            let connection = connection(&config).expect("settings");
            let start = tokio::time::Instant::now();
            let error = connection.client.apiserver_version().await.expect_err("silence");
            assert!(start.elapsed() <= Deadlines::default().head, "{:?}", start.elapsed());
            let text = super::super::chain(&error);
            assert!(text.contains(words), "{text}");
            assert_eq!(super::super::Failure::of(&error), super::super::Failure::Silent, "{text}");
        }
    }

    #[test]
    fn streamed_lists_are_asked_for_as_they_are_now() {
        for (uri, want) in [
            (
                "https://h/api/v1/nodes?&watch=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&resourceVersion=0",
                Some("https://h/api/v1/nodes?&watch=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan"),
            ),
            ("https://h/api/v1/nodes?&watch=true&resourceVersion=0", None),
            ("https://h/api/v1/nodes?&watch=true&resourceVersion=77", None),
            ("https://h/api/v1/nodes", None),
        ] {
            let got = of_the_newest(&uri.parse().expect("a URI")).map(|uri| uri.to_string());
            assert_eq!(got.as_deref(), want, "{uri}");
        }
    }
}
