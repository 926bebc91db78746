//! Health check node ports: which Service's load balancer asks at which port of this node, and the endpoints that count
//! (`pkg/proxy/healthcheck` of kube-proxy). Pure.

use crate::model::{Condition, EndpointSlice, Family, ObjectName, Problem, Service};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// What a port answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// The Service that it is of.
    pub service: ObjectName,
    /// Ready endpoints on this node.
    pub local_endpoints: usize,
}

/// What each port of this node answers, by port.
pub type HealthChecks = BTreeMap<u16, HealthCheck>;

/// Which Services want which ports.
#[derive(Debug, Default)]
pub struct Claims {
    /// Port, age and name: the first of each port has it. The API server gives each port to one Service, manifests may not.
    all: BTreeSet<(u16, i64, ObjectName)>,
    /// Something has changed that answers depend on.
    is_dirty: bool,
}

impl Claims {
    /// Adds a Service; nothing happens if it has no such port.
    pub fn add(&mut self, service: &Service) {
        self.is_dirty |= claim(service).is_some_and(|claim| self.all.insert(claim));
    }

    /// Removes a Service that was added.
    pub fn remove(&mut self, service: &Service) {
        self.is_dirty |= claim(service).is_some_and(|claim| self.all.remove(&claim));
    }

    /// The endpoints of a Service have changed.
    pub fn endpoints_changed(&mut self, service: &Service) {
        self.is_dirty |= service.health_check_port != 0;
    }

    /// True if the answers may be other than at the last call.
    pub fn take_dirty(&mut self) -> bool {
        std::mem::take(&mut self.is_dirty)
    }

    /// Each port, with the Service that has it.
    pub fn winners(&self) -> impl Iterator<Item = (u16, &ObjectName)> {
        // No claim is to port 0.
        let mut last = 0;
        let is_first = move |(port, ..): &&(u16, i64, ObjectName)| std::mem::replace(&mut last, *port) != *port;
        self.all.iter().filter(is_first).map(|(port, _, name)| (*port, name))
    }

    /// Services that do not get the port that they want.
    pub fn conflicts(&self) -> impl Iterator<Item = Problem> {
        let winners: BTreeMap<_, _> = self.winners().collect();
        self.all.iter().filter_map(move |(port, _, name)| {
            let winner = winners.get(port).filter(|winner| **winner != name)?;
            let message = format!("{port} belongs to the older Service {winner}; give one of them another port");
            Some(Problem::new(&format!("Service {name}").into(), FIELD, message))
        })
    }
}

/// The field that a health check node port comes from.
pub const FIELD: &str = "spec.healthCheckNodePort";

fn claim(service: &Service) -> Option<(u16, i64, ObjectName)> {
    (service.health_check_port != 0).then(|| (service.health_check_port, service.created, service.name.clone()))
}

/// Counts the ready endpoints on a node, whatever their ports; those that terminate do not count. A pod with an address of each
/// family is one: of a Service with both families, the larger count is returned.
pub fn count_local_endpoints(slices: &[Arc<EndpointSlice>], node: &str) -> usize {
    let of_family = |family| {
        let slices = slices.iter().filter(|slice| slice.family == family && !slice.ports.is_empty());
        let local = slices.flat_map(|slice| &slice.endpoints).filter(|it| &*it.node == node);
        let ready = local.filter(|it| it.condition == Condition::Ready);
        ready.map(|it| it.addr).collect::<BTreeSet<_>>().len()
    };
    of_family(Family::V4).max(of_family(Family::V6))
}
