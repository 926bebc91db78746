//! A Service that has virtual addresses.

use super::{Family, ObjectName, Problem};
use crate::config::{Algorithm, Forwarding};
use ipnet::IpNet;
use rustnet_common::service::scope;
use std::net::IpAddr;
use std::sync::Arc;

/// A Service with at least its name; headless, ExternalName and foreign-proxy Services never become one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Its name.
    pub name: ObjectName,
    /// Seconds since 1970 at which it was created; 0 when unknown. The older one wins a virtual address.
    pub created: i64,
    /// Virtual addresses, at most one a family.
    pub vips: Box<[IpAddr]>,
    /// `externalIPs` for clients outside, each once, without those that are a load balancer's, too: such an address is only for the
    /// clients of the load balancer.
    pub external: Box<[IpAddr]>,
    /// Addresses of load balancers for clients outside, each once.
    pub balanced: Box<[IpAddr]>,
    /// The clients that the load balancer is for, each range once; `None` for all, an empty list for nobody.
    pub source_ranges: Option<Box<[IpNet]>>,
    /// Ports, each (port, protocol) once.
    pub ports: Box<[ServicePort]>,
    /// Session affinity in seconds, 0 for none.
    pub affinity: u32,
    /// How its flows are spread; `None`: as the agent is set.
    pub algorithm: Option<Algorithm>,
    /// How clients outside get the answers of backends on other nodes; `None`: as the agent is set.
    pub forwarding: Option<Forwarding>,
    /// `internalTrafficPolicy: Local`.
    pub internal_local: bool,
    /// `externalTrafficPolicy: Local`.
    pub external_local: bool,
    /// TCP port at which load balancers ask whether this node has a ready endpoint; 0 for none.
    pub health_check_port: u16,
    /// What was wrong with it.
    pub problems: Box<[Problem]>,
}

/// How a port of a Service is reached: at which addresses, in which scope, and which endpoints may answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frontend<'a> {
    /// Addresses, of which those of the Service's families are its own.
    at: &'a [IpAddr],
    /// One address of each family of the Service.
    vips: &'a [IpAddr],
    /// Port at these addresses.
    pub port: u16,
    /// IP protocol number.
    pub proto: u8,
    /// Who may come by it: one of `rustnet_common::service::scope`.
    pub scope: u8,
    /// Traffic policy Local: only endpoints of this node.
    pub is_local: bool,
    /// The addresses may be of this node.
    pub is_external: bool,
    /// Clients that may come by it, of both families; `None` for all.
    pub source_ranges: Option<&'a [IpNet]>,
    /// The port of the Service that it leads to.
    pub target: &'a ServicePort,
}

impl<'a> Frontend<'a> {
    /// Its addresses. Nobody outside has a packet for a loopback one.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + use<'a> {
        let (vips, is_outside) = (self.vips, self.scope == scope::EXTERNAL);
        let is_of_family = move |ip: &IpAddr| vips.iter().any(|vip| Family::of(*vip) == Family::of(*ip));
        self.at.iter().copied().filter(is_of_family).filter(move |ip| !(is_outside && ip.is_loopback()))
    }
}

impl Service {
    /// All frontends. `nodes`: the addresses of this node that have node ports.
    ///
    /// Pods and the host of this node get all endpoints at an address for clients outside, whatever its traffic policy (kube-proxy:
    /// "short-circuit").
    pub fn frontends<'a>(&'a self, nodes: &'a [IpAddr]) -> impl Iterator<Item = Frontend<'a>> {
        self.ports.iter().flat_map(move |target| {
            let at = move |at, port, scope, is_local, is_external| {
                let (vips, proto, source_ranges) = (&*self.vips, target.proto, None);
                let frontend = Frontend { at, vips, port, proto, scope, is_local, is_external, source_ranges, target };
                (port != 0).then_some(frontend)
            };
            let (external, balanced, local) = (&*self.external, &*self.balanced, self.external_local);
            let judged = |scope, is_local| {
                let frontend = at(balanced, target.port, scope, is_local, true);
                frontend.map(|frontend| Frontend { source_ranges: self.source_ranges.as_deref(), ..frontend })
            };
            [
                at(&self.vips, target.port, scope::CLUSTER, self.internal_local, false),
                at(external, target.port, scope::CLUSTER, false, true),
                at(external, target.port, scope::EXTERNAL, local, true),
                judged(scope::CLUSTER, false),
                judged(scope::EXTERNAL, local),
                at(nodes, target.node_port, scope::CLUSTER, false, true),
                at(nodes, target.node_port, scope::EXTERNAL, local, true),
            ]
            .into_iter()
            .flatten()
        })
    }

    /// Its addresses for clients outside, without those of nodes.
    pub fn outside(&self) -> impl Iterator<Item = IpAddr> {
        self.external.iter().chain(&self.balanced).copied()
    }

    /// True if not all clients may use its load balancer.
    pub fn has_source_ranges(&self) -> bool {
        self.source_ranges.is_some() && !self.balanced.is_empty()
    }

    /// True if clients outside have an address of it.
    pub fn is_external(&self) -> bool {
        self.outside().next().is_some() || self.has_node_ports()
    }

    /// True if it has a node port.
    pub fn has_node_ports(&self) -> bool {
        self.ports.iter().any(|port| port.node_port != 0)
    }
}

/// One port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Name, by which slices refer to it; empty when it is the only one.
    pub name: Arc<str>,
    /// Port, never 0.
    pub port: u16,
    /// IP protocol number: TCP, UDP or SCTP.
    pub proto: u8,
    /// Port at the addresses of all nodes; 0 for none.
    pub node_port: u16,
}
