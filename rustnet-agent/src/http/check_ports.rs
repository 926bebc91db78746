//! The listeners of health check node ports: one a port, opened and closed as Services come and go.
//!
//! A port that moves from one Service to another stays open. A port that somebody else holds is a failure of its Service, and is
//! tried again by the caller.

use super::kube_proxy::health_check;
use super::{Health, LIMITS, Limits, bind, serve_on};
use crate::failure::{Failure, Scope};
use crate::index::{HealthCheck, HealthChecks};
use std::collections::BTreeMap;
use std::net::Ipv6Addr;
use std::sync::Arc;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Of each port: there may be thousands, and an answer takes no time.
const PORT_LIMITS: Limits = Limits { connections: 8, ..LIMITS };

/// All ports.
#[derive(Debug)]
pub struct CheckPorts {
    health: Arc<Health>,
    wanted: HealthChecks,
    open: BTreeMap<u16, Open>,
}

/// A port that is served until this is dropped.
#[derive(Debug)]
struct Open {
    answer: watch::Sender<HealthCheck>,
    server: JoinHandle<()>,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl CheckPorts {
    /// No port is open.
    pub fn new(health: Arc<Health>) -> Self {
        Self { health, wanted: HealthChecks::new(), open: BTreeMap::new() }
    }

    /// Sets the answers of all ports; closes those without one. Returns whether some are to be opened ([`Self::open`]).
    pub fn set(&mut self, wanted: HealthChecks) -> bool {
        self.open.retain(|port, open| {
            let check = wanted.get(port);
            if let Some(check) = check {
                open.answer.send_replace(check.clone());
            }
            check.is_some()
        });
        self.wanted = wanted;
        self.wanted.len() != self.open.len()
    }

    /// Opens the ports that are not open yet, on all addresses of both families. Must be called in a runtime.
    ///
    /// Returns the failures, each with its Service, field and remedy.
    pub fn open(&mut self) -> Vec<Failure> {
        let mut failures = Vec::new();
        for (port, check) in &self.wanted {
            if self.open.contains_key(port) {
                continue;
            }
            match bind((Ipv6Addr::UNSPECIFIED, *port).into()) {
                Ok(listener) => {
                    tracing::debug!(port, service = %check.service, "health check node port: serving");
                    let (answer, receiver) = watch::channel(check.clone());
                    let router = health_check(receiver, Arc::clone(&self.health));
                    let server = tokio::spawn(serve_on(listener, router, PORT_LIMITS));
                    self.open.insert(*port, Open { answer, server });
                }
                Err(error) => {
                    let message = format!(
                        "Service {}: spec.healthCheckNodePort: cannot listen on TCP port {port}: {error}; free the port (`ss -ltnp` \
                         shows who has it), or give the Service another one; it is tried again",
                        check.service
                    );
                    failures.push(Failure { scope: Scope::Service, message });
                }
            }
        }
        failures
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::ask_at;
    use super::*;
    use crate::model::ObjectName;
    use std::net::TcpListener;

    #[tokio::test]
    async fn a_taken_port_is_a_failure_of_its_service_until_it_is_free() {
        let holder = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = holder.local_addr().expect("its address");
        let port = address.port();
        let mut it = CheckPorts::new(Arc::new(Health::default()));
        let check = HealthCheck { service: ObjectName::namespaced("default", "web"), local_endpoints: 1 };
        assert!(it.set([(port, check.clone())].into()));
        let failures = it.open();
        let [failure] = &failures[..] else { panic!("{failures:?}") };
        let start = format!("Service default/web: spec.healthCheckNodePort: cannot listen on TCP port {port}: ");
        assert!(failure.message.starts_with(&start) && failure.message.contains("; free the port"), "{failure}");
        assert_eq!(failure.scope, Scope::Service);
        drop(holder);
        assert_eq!(it.open(), []);
        assert_eq!(ask_at(address, "/").await.0, 200);
        assert!(!it.set([(port, HealthCheck { local_endpoints: 0, ..check })].into()), "it is open");
        assert_eq!(ask_at(address, "/").await.0, 503);
    }
}
