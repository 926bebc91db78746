//! A Service that has virtual addresses.

use super::{Feature, ObjectName, Problem};
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
