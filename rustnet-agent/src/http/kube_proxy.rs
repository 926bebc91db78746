//! kube-proxy's own answers: `/healthz` and `/livez`. Load balancers of clouds are built for them (`pkg/proxy/healthcheck` of kube-proxy, KEP-3836).

use super::Health;
use crate::health::ProxyHealth;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use k8s_openapi::jiff::Timestamp;
use serde::Serialize;
use std::sync::Arc;
use std::time::SystemTime;

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

/// The endpoints of the proxy.
pub fn kube_proxy(health: Arc<Health>) -> Router {
    Router::new().route("/healthz", get(healthz)).route("/livez", get(livez)).with_state(health)
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

fn of_proxy(proxy: &ProxyHealth, is_well: bool, now: SystemTime) -> (StatusCode, ProxyBody) {
    let text = |time| Timestamp::try_from(time).map_or_else(|_| String::new(), |time| time.to_string());
    // kube-proxy's releases before 1.28 wrote the time at every turn of their loop; who is well is up to date.
    let last_updated = text(if is_well { now } else { proxy.last_sync });
    (status(is_well), ProxyBody { last_updated, current_time: text(now), node_eligible: None })
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
    use std::time::Duration;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
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
