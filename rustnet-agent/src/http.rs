//! The endpoints that probes and Prometheus ask: `/healthz`, `/livez` and `/readyz` on one port, `/metrics` on another.
//!
//! A port that somebody else holds is reported and tried again, because the network must not wait for it; the old agent
//! holds it during an upgrade, for one.

pub use crate::health::Health;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use k8s_openapi::jiff::Timestamp;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;

const RETRY: Duration = Duration::from_secs(1);
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
    Router::new().route("/metrics", get(scrape)).with_state(health)
}

/// Serves a router at an address until shutdown. `flag` is the setting to name when the address cannot be had.
pub async fn serve(router: Router, addr: SocketAddr, flag: &'static str, mut shutdown: watch::Receiver<bool>) {
    let stop = {
        let mut shutdown = shutdown.clone();
        async move {
            // A sender that is gone means shutdown, too.
            let _ = shutdown.wait_for(|stop| *stop).await;
        }
    };
    let listener = tokio::select! {
        listener = listen(addr, flag) => listener,
        _ = shutdown.wait_for(|stop| *stop) => return,
    };
    if let Err(error) = axum::serve(listener, router).with_graceful_shutdown(stop).await {
        tracing::error!(%addr, %error, "{flag}: stopped serving");
    }
}

async fn listen(addr: SocketAddr, flag: &str) -> TcpListener {
    let mut complained = false;
    loop {
        match TcpListener::bind(addr).await {
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

async fn scrape(State(health): State<Arc<Health>>) -> Response {
    // Maps are read with system calls: not on a thread that serves others.
    let metrics = health.metrics.clone();
    match tokio::task::spawn_blocking(move || metrics.encode()).await {
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
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;

    /// Serves on a port of the kernel's choice and asks one question of a plain socket.
    async fn ask(router: Router, path: &str) -> (u16, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let addr = listener.local_addr().expect("its address");
        let server = tokio::spawn(axum::serve(listener, router).into_future());
        let mut stream = TcpStream::connect(addr).await.expect("connected");
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("asked");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("answered");
        server.abort();
        let code = answer.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
        (code, answer)
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
