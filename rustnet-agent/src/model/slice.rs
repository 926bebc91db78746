//! An EndpointSlice: some of the endpoints of one Service, all of one address family.

use super::{Family, ObjectName, Problem};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

/// An EndpointSlice that belongs to a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Its name.
    pub name: ObjectName,
    /// The Service that it belongs to.
    pub service: ObjectName,
    /// Family of all its addresses.
    pub family: Family,
    /// Where each named port leads to in this slice; another slice of the same Service may say otherwise.
    pub ports: Box<[TargetPort]>,
    /// The endpoints.
    pub endpoints: Box<[Endpoint]>,
    /// When what its last change followed from happened, if it says so.
    pub triggered: Option<SystemTime>,
    /// What was wrong with it.
    pub problems: Box<[Problem]>,
}

/// One port that the endpoints of a slice listen on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetPort {
    /// Name of the Service's port.
    pub name: Arc<str>,
    /// Port, never 0.
    pub port: u16,
    /// IP protocol number.
    pub proto: u8,
}

/// One endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Its address: `addresses[0]`, all others mean the same endpoint.
    pub addr: IpAddr,
    /// Whether it may be used.
    pub condition: Condition,
    /// Name of its node; empty when unknown.
    pub node: Arc<str>,
    /// Name of its pod, in the slice's namespace; empty when it is none. For people alone.
    pub pod: Box<str>,
    /// The nodes and zones to which the controller assigns it; `None` is the common case and costs
    /// nothing.
    pub hints: Option<Box<Hints>>,
}

/// Whether an endpoint may be used, from best to worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Condition {
    /// Ready.
    Ready,
    /// Terminating, and still serving: for want of anything better.
    Draining,
    /// Not to be chosen, but what it serves already goes on.
    Holding,
    /// Not to be used.
    Unusable,
}

/// Topology hints: the nodes and the zones that an endpoint is meant for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    /// Names of nodes.
    pub nodes: Box<[Arc<str>]>,
    /// Names of zones.
    pub zones: Box<[Arc<str>]>,
}
