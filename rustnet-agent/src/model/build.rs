//! Builders of objects for unit tests: name what matters, leave out the rest.
#![expect(clippy::return_self_not_must_use, reason = "builders, in tests only")]

use super::{
    Condition, Endpoint, EndpointSlice, Family, Hints, Node, ObjectName, Service, ServiceCidr, ServicePort, TargetPort,
};
use crate::source::{Event, Object};
use rustnet_common::tuple::proto::TCP;
use std::net::IpAddr;
use std::sync::Arc;

/// An address from its text.
pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// `default/NAME` with these addresses and no port.
pub fn service(name: &str, vips: &[&str]) -> Service {
    Service {
        name: ObjectName::namespaced("default", name),
        created: 0,
        vips: vips.iter().map(|vip| ip(vip)).collect(),
        ports: Box::default(),
        affinity: 0,
        algorithm: None,
        forwarding: None,
        internal_local: false,
        external: Box::default(),
        balanced: Box::default(),
        source_ranges: None,
        external_local: false,
        health_check_port: 0,
        problems: Box::default(),
    }
}

impl Service {
    /// Adds a port.
    pub fn port(mut self, name: &str, port: u16, proto: u8) -> Self {
        let added = ServicePort { name: name.into(), port, proto, node_port: 0 };
        self.ports = self.ports.into_iter().chain([added]).collect();
        self
    }

    /// Adds an unnamed TCP port.
    pub fn tcp(self, port: u16) -> Self {
        self.port("", port, TCP)
    }

    /// Gives its last port a node port.
    pub fn node_port(mut self, node_port: u16) -> Self {
        if let Some(port) = self.ports.last_mut() {
            port.node_port = node_port;
        }
        self
    }

    /// Has its flows spread by a Maglev table.
    pub fn maglev(self) -> Self {
        Self { algorithm: Some(crate::config::Algorithm::Maglev), ..self }
    }

    /// Gives it addresses for clients outside.
    pub fn external(self, addresses: &[&str]) -> Self {
        Self { external: addresses.iter().map(|address| ip(address)).collect(), ..self }
    }

    /// Gives it addresses of a load balancer.
    pub fn balanced(self, addresses: &[&str]) -> Self {
        Self { balanced: addresses.iter().map(|address| ip(address)).collect(), ..self }
    }

    /// Leaves its load balancer to clients in these ranges.
    pub fn source_ranges(self, ranges: &[&str]) -> Self {
        Self { source_ranges: Some(ranges.iter().map(|range| range.parse().unwrap()).collect()), ..self }
    }

    /// Sets the age.
    pub fn created(self, created: i64) -> Self {
        Self { created, ..self }
    }

    /// The event that delivers it.
    pub fn apply(self) -> Event {
        Event::Apply(Object::Service(Arc::new(self)))
    }
}

/// `default/NAME`, a slice of `default/SERVICE`, without ports and endpoints.
pub fn slice(name: &str, service: &str, family: Family) -> EndpointSlice {
    EndpointSlice {
        name: ObjectName::namespaced("default", name),
        service: ObjectName::namespaced("default", service),
        family,
        ports: Box::default(),
        endpoints: Box::default(),
        triggered: None,
        problems: Box::default(),
    }
}

impl EndpointSlice {
    /// Adds a port.
    pub fn port(mut self, name: &str, port: u16, proto: u8) -> Self {
        let added = TargetPort { name: name.into(), port, proto };
        self.ports = self.ports.into_iter().chain([added]).collect();
        self
    }

    /// Adds an unnamed TCP port.
    pub fn tcp(self, port: u16) -> Self {
        self.port("", port, TCP)
    }

    /// Adds an endpoint.
    pub fn endpoint(mut self, endpoint: Endpoint) -> Self {
        self.endpoints = self.endpoints.into_iter().chain([endpoint]).collect();
        self
    }

    /// Adds ready endpoints.
    pub fn ready(self, addrs: &[&str]) -> Self {
        addrs.iter().fold(self, |slice, addr| slice.endpoint(endpoint(addr)))
    }

    /// The event that delivers it.
    pub fn apply(self) -> Event {
        Event::Apply(Object::Slice(Arc::new(self)))
    }
}

/// A ready endpoint on no known node.
pub fn endpoint(addr: &str) -> Endpoint {
    Endpoint { addr: ip(addr), condition: Condition::Ready, node: "".into(), pod: "".into(), hints: None }
}

impl Endpoint {
    /// Puts it on a node.
    pub fn on(self, node: &str) -> Self {
        Self { node: node.into(), ..self }
    }

    /// Gives its pod a name.
    pub fn pod(self, pod: &str) -> Self {
        Self { pod: pod.into(), ..self }
    }

    /// Terminating, and still serving.
    pub fn draining(self) -> Self {
        Self { condition: Condition::Draining, ..self }
    }

    /// Not to be used.
    pub fn unusable(self) -> Self {
        Self { condition: Condition::Unusable, ..self }
    }

    /// Hints at nodes and zones.
    pub fn hints(self, nodes: &[&str], zones: &[&str]) -> Self {
        let strings = |list: &[&str]| list.iter().map(|text| Arc::from(*text)).collect();
        Self { hints: Some(Box::new(Hints { nodes: strings(nodes), zones: strings(zones) })), ..self }
    }
}

/// A node with these addresses and pod ranges.
pub fn node(name: &str, addresses: &[&str], pod_cidrs: &[&str]) -> Node {
    Node {
        name: ObjectName::cluster(name),
        created: 0,
        addresses: addresses.iter().map(|addr| ip(addr)).collect(),
        pod_cidrs: pod_cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect(),
        zone: "".into(),
        is_leaving: false,
        other_addresses: Box::default(),
        labels: crate::model::Labels::default(),
        problems: Box::default(),
    }
}

impl Node {
    /// Sets the age.
    pub fn created(self, created: i64) -> Self {
        Self { created, ..self }
    }

    /// Sets the zone.
    pub fn zone(self, zone: &str) -> Self {
        Self { zone: zone.into(), ..self }
    }

    /// The event that delivers it.
    pub fn apply(self) -> Event {
        Event::Apply(Object::Node(Arc::new(self)))
    }
}

/// An object with ranges of Services.
pub fn service_cidr(name: &str, cidrs: &[&str]) -> ServiceCidr {
    let cidrs = cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect();
    ServiceCidr { name: ObjectName::cluster(name), cidrs, problems: Box::default() }
}

impl ServiceCidr {
    /// The event that adds or changes it.
    pub fn apply(self) -> Event {
        Event::Apply(Object::ServiceCidr(Arc::new(self)))
    }
}
