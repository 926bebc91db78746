//! A Service that has virtual addresses.

use super::{Feature, ObjectName, Problem};
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
    /// Ports, each (port, protocol) once.
    pub ports: Box<[ServicePort]>,
    /// Session affinity in seconds, 0 for none.
    pub affinity: u32,
    /// `internalTrafficPolicy: Local`.
    pub internal_local: bool,
    /// What it asks for and does not get, besides affinity.
    pub unserved: Box<[Feature]>,
    /// What was wrong with it.
    pub problems: Box<[Problem]>,
}

/// How a port of a Service is reached: at which addresses, in which scope, and which endpoints may answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frontend<'a> {
    /// Its addresses, of both families.
    pub addresses: &'a [IpAddr],
    /// Port at these addresses.
    pub port: u16,
    /// IP protocol number.
    pub proto: u8,
    /// Who may come by it: one of `rustnet_common::service::scope`.
    pub scope: u8,
    /// Traffic policy Local: only endpoints of this node.
    pub is_local: bool,
    /// The port of the Service that it leads to.
    pub target: &'a ServicePort,
}

impl Service {
    /// All frontends: today each port at the virtual addresses.
    pub fn frontends(&self) -> impl Iterator<Item = Frontend<'_>> {
        self.ports.iter().map(|target| Frontend {
            addresses: &self.vips,
            port: target.port,
            proto: target.proto,
            scope: scope::CLUSTER,
            is_local: self.internal_local,
            target,
        })
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
}
