//! The endpoints that probes, load balancers and Prometheus ask: `/healthz`, `/livez` and `/readyz` on one port, `/metrics` on
//! another; kube-proxy's on its own ports (`kube_proxy`, `check_ports`).
//!
//! A port that somebody else holds is reported and tried again, because the network must not wait for it; the old agent
//! holds it during an upgrade, for one.
//!
//! Anybody who reaches a port may ask, so that connections are few and short: each has one request, little time for it, and is
//! closed. `/metrics` answers one at a time.

mod check_ports;
mod kube_proxy;

pub use self::check_ports::CheckPorts;
pub use self::kube_proxy::kube_proxy;
pub use crate::health::Health;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use k8s_openapi::jiff::Timestamp;
use nix::sys::socket::{setsockopt, sockopt::Ipv6V6Only};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;

const RETRY: Duration = Duration::from_secs(1);
/// Connections that wait for being accepted.
const BACKLOG: u32 = 128;
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The probes' endpoints.
pub fn probes(health: Arc<Health>) -> Router {
    Router::new()
        .route("/healthz", get(healthz))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .with_state(health)
}

/// The endpoint of Prometheus.
pub fn metrics(health: Arc<Health>) -> Router {
    let one = Arc::new(Semaphore::new(1));
    Router::new().route("/metrics", get(scrape)).with_state(Scrapes { health, one })
}

/// What one port grants those who ask.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Connections at a time; more wait in the kernel's queue.
    pub(crate) connections: usize,
    /// Until the head of the request is there.
    pub(crate) head: Duration,
    /// From the first to the last byte.
    pub(crate) whole: Duration,
}

/// What the agent's ports grant.
pub(crate) const LIMITS: Limits =
    Limits { connections: 16, head: Duration::from_secs(3), whole: Duration::from_secs(10) };

/// Serves a router at an address until shutdown. `flag` is the setting to name when the address cannot be had.
pub async fn serve(router: Router, addr: SocketAddr, flag: &'static str, mut shutdown: watch::Receiver<bool>) {
    // A sender that is gone means shutdown, too.
    let listener = tokio::select! {
        listener = listen(addr, flag) => listener,
        _ = shutdown.wait_for(|stop| *stop) => return,
    };
    tokio::select! {
        () = serve_on(listener, router, LIMITS) => {}
        _ = shutdown.wait_for(|stop| *stop) => {}
    }
}

/// Serves a router at a port that is there, for good.
pub(crate) async fn serve_on(listener: TcpListener, router: Router, limits: Limits) {
    let places = Arc::new(Semaphore::new(limits.connections));
    // Those that are open end with it.
    let mut open = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = accept(&listener, &places) => accepted,
            Some(_) = open.join_next() => continue,
        };
        match accepted {
            Ok((stream, place)) => drop(open.spawn(answer(stream, router.clone(), limits, place))),
            Err(error) => {
                // Out of descriptors, most likely: those of others count, too.
                tracing::warn!(%error, "a connection cannot be accepted");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

async fn accept(listener: &TcpListener, places: &Arc<Semaphore>) -> io::Result<(TcpStream, OwnedSemaphorePermit)> {
    let place = Arc::clone(places).acquire_owned().await.map_err(io::Error::other)?;
    Ok((listener.accept().await?.0, place))
}

/// Answers one request.
async fn answer(stream: TcpStream, router: Router, limits: Limits, _place: OwnedSemaphorePermit) {
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(limits.head).keep_alive(false);
    let connection = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    // Who asks badly or too slowly is sent nothing.
    let _ = tokio::time::timeout(limits.whole, connection).await;
}

async fn listen(addr: SocketAddr, flag: &str) -> TcpListener {
    let mut complained = false;
    loop {
        match bind(addr) {
            Ok(listener) => {
                let addr = listener.local_addr().unwrap_or(addr);
                tracing::info!(%addr, "{flag}: serving");
                return listener;
            }
            Err(error) if !complained => {
                tracing::error!(%addr, %error, "--{flag}: cannot listen, trying on; free the port, choose another one, or say off");
                complained = true;
            }
            Err(_) => {}
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Listens; `[::]` stands for both families, whatever the host's `net.ipv6.bindv6only`.
pub(crate) fn bind(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = if addr.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
    let socket = match socket {
        Err(error) => return bind(without_ipv6(addr, &error).ok_or(error)?),
        Ok(socket) => socket,
    };
    if addr.ip() == IpAddr::from(Ipv6Addr::UNSPECIFIED) {
        setsockopt(&socket, Ipv6V6Only, &false)?;
    }
    // As an earlier agent's connections linger on the port.
    socket.set_reuseaddr(true)?;
    socket.bind(addr)?;
    socket.listen(BACKLOG)
}

/// What to listen on instead where the kernel has no IPv6.
fn without_ipv6(addr: SocketAddr, error: &io::Error) -> Option<SocketAddr> {
    let is_off = error.raw_os_error() == Some(libc::EAFNOSUPPORT) && addr.ip() == IpAddr::from(Ipv6Addr::UNSPECIFIED);
    is_off.then(|| (Ipv4Addr::UNSPECIFIED, addr.port()).into())
}

/// kube-proxy's answer, so that whoever parses that can parse this.
async fn healthz(State(health): State<Arc<Health>>) -> Response {
    let liveness = health.liveness();
    let code = status(&liveness);
    health.metrics.healthz(code.as_u16());
    let time = |time| Timestamp::try_from(time).map_or_else(|_| String::new(), |time| time.to_string());
    let mut body = serde_json::json!({
        "lastUpdated": time(health.last_sync()),
        "currentTime": time(std::time::SystemTime::now()),
        "nodeEligible": true,
    });
    if let Err(why) = liveness {
        body["reason"] = why.into();
    }
    (code, Json(body)).into_response()
}

async fn livez(State(health): State<Arc<Health>>) -> Response {
    let liveness = health.liveness();
    health.metrics.livez(status(&liveness).as_u16());
    plain(liveness)
}

/// Ready with problems is ready: packets go on. The problems follow, one a line.
async fn readyz(State(health): State<Arc<Health>>) -> Response {
    let readiness = health.readiness();
    if readiness.is_err() {
        return plain(readiness);
    }
    let lines: Vec<_> = [String::from("ok")].into_iter().chain(health.complaints()).collect();
    (lines.join("\n") + "\n").into_response()
}

/// What scrapes share.
#[derive(Clone)]
struct Scrapes {
    health: Arc<Health>,
    one: Arc<Semaphore>,
}

async fn scrape(State(Scrapes { health, one }): State<Scrapes>) -> Response {
    let Ok(turn) = one.try_acquire_owned() else {
        return (StatusCode::SERVICE_UNAVAILABLE, "another scrape is being answered\n").into_response();
    };
    // Counters are read with system calls: not on a thread that serves others.
    let metrics = health.metrics.clone();
    let encode = move || {
        let text = metrics.encode();
        // Not before: who hangs up while it runs does not make room for another one.
        drop(turn);
        text
    };
    match tokio::task::spawn_blocking(encode).await {
        Ok(Ok(text)) => ([(header::CONTENT_TYPE, OPENMETRICS)], text).into_response(),
        _ => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

fn status(result: &Result<(), String>) -> StatusCode {
    if result.is_ok() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

fn plain(result: Result<(), String>) -> Response {
    let code = status(&result);
    let text = result.err().unwrap_or_else(|| "ok".to_owned());
    (code, text + "\n").into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{HookCount, KernelStats, MapFill};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;

    /// Serves on a port of the kernel's choice and asks one question of a plain socket.
    pub(super) async fn ask(router: Router, path: &str) -> (u16, String) {
        let (addr, server) = start(router, LIMITS);
        let answer = ask_at(addr, path).await;
        server.abort();
        answer
    }

    fn start(router: Router, limits: Limits) -> (SocketAddr, tokio::task::JoinHandle<()>) {
        let listener = bind((Ipv4Addr::LOCALHOST, 0).into()).expect("a port");
        let addr = listener.local_addr().expect("its address");
        (addr, tokio::spawn(serve_on(listener, router, limits)))
    }

    /// Asks without `Connection: close`: the server ends the connection by itself.
    pub(super) async fn ask_at(addr: SocketAddr, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(addr).await.expect("connected");
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("asked");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("answered");
        let code = answer.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
        (code, answer)
    }

    /// Before, they stayed for ever, and enough of them left the agent no descriptors.
    #[tokio::test]
    async fn silent_connections_make_room() {
        let limits = Limits { connections: 2, head: Duration::from_millis(50), ..LIMITS };
        let (addr, server) = start(probes(Arc::new(Health::default())), limits);
        let mut silent = Vec::new();
        for _ in 0..6 {
            silent.push(TcpStream::connect(addr).await.expect("in the queue at least"));
        }
        assert_eq!(ask_at(addr, "/livez").await.0, 200);
        for mut stream in silent {
            let mut rest = Vec::new();
            // A reset is an end, too.
            let _ = stream.read_to_end(&mut rest).await;
        }
        server.abort();
    }

    /// A connection has one request: whoever asks for more does not keep its place.
    #[tokio::test]
    async fn a_connection_ends_with_its_answer() {
        let (addr, server) = start(probes(Arc::new(Health::default())), LIMITS);
        let mut stream = TcpStream::connect(addr).await.expect("connected");
        let requests = "GET /livez HTTP/1.1\r\nHost: x\r\n\r\n".repeat(2);
        stream.write_all(requests.as_bytes()).await.expect("asked");
        let mut answers = Vec::new();
        // A reset is an end, too.
        let _ = stream.read_to_end(&mut answers).await;
        assert_eq!(String::from_utf8_lossy(&answers).matches("HTTP/1.1 200").count(), 1);
        server.abort();
    }

    /// Its counters are there once somebody sends for them.
    struct Slow(std::sync::Mutex<std::sync::mpsc::Receiver<()>>, Arc<tokio::sync::Notify>);

    impl KernelStats for Slow {
        fn counters(&self) -> Vec<HookCount> {
            self.1.notify_one();
            self.0.lock().expect("one at a time").recv().expect("a word");
            Vec::new()
        }

        fn maps(&self) -> Vec<MapFill> {
            Vec::new()
        }
    }

    #[tokio::test]
    async fn one_scrape_at_a_time() {
        let health = Arc::new(Health::default());
        let (go, wait) = std::sync::mpsc::channel();
        let begun = Arc::new(tokio::sync::Notify::new());
        health.metrics.set_kernel_stats(Arc::new(Slow(std::sync::Mutex::new(wait), Arc::clone(&begun))));
        let (addr, server) = start(metrics(health), LIMITS);
        let first = tokio::spawn(ask_at(addr, "/metrics"));
        begun.notified().await;
        let (code, text) = ask_at(addr, "/metrics").await;
        assert!(code == 503 && text.contains("another scrape"), "{text}");
        go.send(()).expect("heard");
        assert_eq!(first.await.expect("answered").0, 200);
        go.send(()).expect("heard");
        assert_eq!(ask_at(addr, "/metrics").await.0, 200, "and then the next");
        server.abort();
    }

    #[tokio::test]
    async fn any_address_means_both_families() {
        let listener = bind((Ipv6Addr::UNSPECIFIED, 0).into()).expect("a port");
        let port = listener.local_addr().expect("its address").port();
        let server = tokio::spawn(serve_on(listener, probes(Arc::new(Health::default())), LIMITS));
        assert_eq!(ask_at((Ipv4Addr::LOCALHOST, port).into(), "/livez").await.0, 200);
        server.abort();
    }

    #[test]
    fn without_ipv6_the_other_family_serves() {
        let [off, taken] = [libc::EAFNOSUPPORT, libc::EADDRINUSE].map(io::Error::from_raw_os_error);
        let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 9962));
        assert_eq!(without_ipv6(any, &off), "0.0.0.0:9962".parse().ok());
        assert_eq!(without_ipv6(any, &taken), None);
        assert_eq!(without_ipv6((Ipv6Addr::LOCALHOST, 9962).into(), &off), None, "somebody chose it");
    }

    #[tokio::test]
    async fn readyz_follows_readiness() {
        let health = Arc::new(Health::default());
        let (code, body) = ask(probes(health.clone()), "/readyz").await;
        assert!(code == 503 && body.contains("nothing has been applied yet"), "{body}");
        health.set_ready();
        assert_eq!(ask(probes(health.clone()), "/readyz").await.0, 200);
        health.set_problems(["API server: gives no answer in time".to_owned()].into());
        let (code, body) = ask(probes(health.clone()), "/readyz").await;
        assert!(code == 200 && body.ends_with("\r\n\r\nok\nAPI server: gives no answer in time\n"), "{body}");
        health.set_not_ready(crate::health::NotReady::Failed("the verifier rejected from_pod".to_owned()));
        let (code, body) = ask(probes(health), "/readyz").await;
        assert!(code == 503 && body.contains("rejected from_pod"), "{body}");
    }

    #[tokio::test]
    async fn healthz_answers_as_kube_proxy_does() {
        let health = Arc::new(Health::default());
        let (code, answer) = ask(probes(health.clone()), "/healthz").await;
        assert_eq!(code, 200, "{answer}");
        let body = answer.split("\r\n\r\n").nth(1).expect("a body");
        let body: serde_json::Value = serde_json::from_str(body).expect("JSON");
        for key in ["lastUpdated", "currentTime"] {
            let text = body[key].as_str().expect("a time");
            text.parse::<Timestamp>().expect("RFC 3339");
        }
        assert_eq!(body["nodeEligible"], true);
        assert_eq!(ask(probes(health.clone()), "/livez").await.0, 200);
        let (code, text) = ask(metrics(health), "/metrics").await;
        assert_eq!(code, 200);
        assert!(text.contains(OPENMETRICS), "{text}");
        assert!(text.contains("kubeproxy_proxy_healthz_total{code=\"200\"} 1"), "{text}");
        assert!(text.contains("kubeproxy_proxy_livez_total{code=\"200\"} 1"), "{text}");
    }

    #[tokio::test]
    async fn the_two_ports_keep_apart() {
        let health = Arc::new(Health::default());
        assert_eq!(ask(probes(health.clone()), "/metrics").await.0, 404);
        assert_eq!(ask(metrics(health), "/healthz").await.0, 404);
    }

    #[tokio::test]
    async fn a_taken_port_is_tried_again_until_it_is_free() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let addr = taken.local_addr().expect("its address");
        let (stop, shutdown) = watch::channel(false);
        let server = tokio::spawn(serve(probes(Arc::new(Health::default())), addr, "health-addr", shutdown));
        tokio::task::yield_now().await;
        drop(taken);
        let mut stream = loop {
            match TcpStream::connect(addr).await {
                Ok(stream) => break stream,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        };
        stream.write_all(b"GET /livez HTTP/1.0\r\n\r\n").await.expect("asked");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("answered");
        assert!(answer.starts_with("HTTP/1.0 200"), "{answer}");
        stop.send(true).expect("heard");
        server.await.expect("ended by the shutdown");
    }
}
