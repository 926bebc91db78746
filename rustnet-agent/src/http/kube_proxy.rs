//! kube-proxy's own answers: `/healthz` and `/livez` of the proxy, and the health check of one Service. Load balancers of clouds
//! are built for them (`pkg/proxy/healthcheck` of kube-proxy, KEP-3836).

use super::Health;
use crate::health::ProxyHealth;
use crate::index::HealthCheck;
use axum::Router;
use axum::extract::State;
use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use k8s_openapi::jiff::Timestamp;
use serde::Serialize;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::sync::watch;

/// How many endpoints this node has: some load balancers send as many connections in proportion.
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// The answer of the proxy.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ProxyBody {
    last_updated: String,
    current_time: String,
    /// Only of `/healthz`.
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
}

/// The answer of one Service.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ServiceBody<'a> {
    service: ServiceName<'a>,
    local_endpoints: usize,
    service_proxy_healthy: bool,
}

#[derive(Debug, Serialize)]
struct ServiceName<'a> {
    namespace: &'a str,
    name: &'a str,
}

/// The endpoints of the proxy.
pub fn kube_proxy(health: Arc<Health>) -> Router {
    Router::new().route("/healthz", get(healthz)).route("/livez", get(livez)).with_state(health)
}

/// The endpoint of one Service, whatever the path.
pub(super) fn health_check(check: watch::Receiver<HealthCheck>, health: Arc<Health>) -> Router {
    Router::new().fallback(of_service).with_state((check, health))
}

async fn healthz(State(health): State<Arc<Health>>) -> Response {
    let proxy = health.proxy();
    let (code, body) = of_proxy(&proxy, proxy.is_healthy && proxy.is_node_eligible, SystemTime::now());
    health.metrics.healthz(code.as_u16());
    answer(code, &ProxyBody { node_eligible: Some(proxy.is_node_eligible), ..body })
}

async fn livez(State(health): State<Arc<Health>>) -> Response {
    let proxy = health.proxy();
    let (code, body) = of_proxy(&proxy, proxy.is_healthy, SystemTime::now());
    health.metrics.livez(code.as_u16());
    answer(code, &body)
}

async fn of_service(State((check, health)): State<(watch::Receiver<HealthCheck>, Arc<Health>)>) -> Response {
    let check = check.borrow().clone();
    let (code, body) = service_body(&check, health.proxy().is_healthy);
    let weight = [(WEIGHT, check.local_endpoints.to_string())];
    (weight, answer(code, &body)).into_response()
}

fn of_proxy(proxy: &ProxyHealth, is_well: bool, now: SystemTime) -> (StatusCode, ProxyBody) {
    let text = |time| Timestamp::try_from(time).map_or_else(|_| String::new(), |time| time.to_string());
    // kube-proxy's releases before 1.28 wrote the time at every turn of their loop; who is well is up to date.
    let last_updated = text(if is_well { now } else { proxy.last_sync });
    (status(is_well), ProxyBody { last_updated, current_time: text(now), node_eligible: None })
}

fn service_body(check: &HealthCheck, is_proxy_healthy: bool) -> (StatusCode, ServiceBody<'_>) {
    let (namespace, name) = check.service.as_str().split_once('/').unwrap_or_default();
    let service = ServiceName { namespace, name };
    let body = ServiceBody { service, local_endpoints: check.local_endpoints, service_proxy_healthy: is_proxy_healthy };
    (status(check.local_endpoints > 0 && is_proxy_healthy), body)
}

fn status(is_well: bool) -> StatusCode {
    if is_well { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

fn answer(code: StatusCode, body: &impl Serialize) -> Response {
    let Ok(text) = serde_json::to_string(body) else { return StatusCode::INTERNAL_SERVER_ERROR.into_response() };
    let headers = [(header::CONTENT_TYPE, "application/json"), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];
    (code, headers, text).into_response()
}

#[cfg(test)]
mod tests {
    use super::super::tests::ask;
    use super::*;
    use crate::model::ObjectName;
    use std::time::Duration;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn check(local_endpoints: usize) -> HealthCheck {
        HealthCheck { service: ObjectName::namespaced("shop", "web"), local_endpoints }
    }

    #[test]
    fn the_json_is_kube_proxys() {
        let last_sync = at(1_795_867_200);
        let proxy = ProxyHealth { is_healthy: true, waiting: None, is_node_eligible: false, last_sync };
        let text = |body: &ProxyBody| serde_json::to_string(body).expect("JSON");
        let (code, body) = of_proxy(&proxy, false, at(1_795_867_260));
        assert_eq!(code, 503);
        let times = r#""lastUpdated":"2026-11-28T12:00:00Z","currentTime":"2026-11-28T12:01:00Z""#;
        assert_eq!(text(&body), format!("{{{times}}}"));
        let body = ProxyBody { node_eligible: Some(false), ..body };
        assert_eq!(text(&body), format!(r#"{{{times},"nodeEligible":false}}"#));
        let (code, body) = of_proxy(&proxy, true, at(1_795_867_260));
        assert_eq!(code, 200);
        assert_eq!(body.last_updated, body.current_time, "who is well is up to date");

        let service = r#"{"service":{"namespace":"shop","name":"web"},"#;
        for (endpoints, is_healthy, want) in [(2, true, 200), (0, true, 503), (2, false, 503), (0, false, 503)] {
            let check = check(endpoints);
            let (code, body) = service_body(&check, is_healthy);
            let rest = format!(r#""localEndpoints":{endpoints},"serviceProxyHealthy":{is_healthy}}}"#);
            assert_eq!(serde_json::to_string(&body).expect("JSON"), format!("{service}{rest}"));
            assert_eq!(code, want, "{endpoints} {is_healthy}");
        }
    }

    #[tokio::test]
    async fn a_service_answers_on_every_path_with_its_weight() {
        let (sender, receiver) = watch::channel(check(3));
        let router = health_check(receiver, Arc::new(Health::default()));
        for path in ["/", "/healthz", "/a/b?c"] {
            let (code, text) = ask(router.clone(), path).await;
            assert_eq!(code, 200, "{text}");
            for header in ["content-type: application/json", "x-content-type-options: nosniff", "endpoint-weight: 3"] {
                assert!(text.contains(&format!("{header}\r\n")), "{header} is missing in {text}");
            }
        }
        sender.send_replace(check(0));
        let (code, text) = ask(router, "/").await;
        assert!(code == 503 && text.contains("endpoint-weight: 0\r\n"), "{text}");
    }

    #[tokio::test]
    async fn a_leaving_node_is_alive_and_takes_nothing_new() {
        let health = Arc::new(Health::default());
        let router = kube_proxy(Arc::clone(&health));
        let (code, text) = ask(router.clone(), "/healthz").await;
        assert!(code == 200 && text.ends_with(r#""nodeEligible":true}"#), "{text}");
        health.set_node_eligible(false);
        let (code, text) = ask(router.clone(), "/healthz").await;
        assert!(code == 503 && text.ends_with(r#""nodeEligible":false}"#), "{text}");
        let (code, text) = ask(router.clone(), "/livez").await;
        assert!(code == 200 && !text.contains("nodeEligible"), "{text}");
        health.set_node_eligible(true);
        assert_eq!(ask(router.clone(), "/healthz").await.0, 200);
        assert_eq!(ask(router, "/readyz").await.0, 404, "that is the agent's own");
        let counted = health.metrics.encode().expect("encoded");
        for want in ["healthz_total{code=\"200\"} 2", "healthz_total{code=\"503\"} 1", "livez_total{code=\"200\"} 1"] {
            assert!(counted.contains(&format!("kubeproxy_proxy_{want}\n")), "{want} is missing in {counted}");
        }
    }
}
