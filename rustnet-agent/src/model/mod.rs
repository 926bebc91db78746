//! The cluster's objects as rustnet uses them: validated, compact, free of Kubernetes types.
//!
//! Only `source/convert.rs` makes these. What was wrong with an object travels with it as
//! [`Problem`]s, so that a report disappears by itself once the object is fixed.

#[cfg(test)]
pub mod build;
mod feature;
mod name;
mod namespace;
mod node;
mod pod;
mod policy;
mod problem;
mod selector;
mod service;
mod service_cidr;
mod slice;

pub use feature::Feature;
pub use name::{Interner, ObjectName, Pool};
pub use namespace::{NAME_LABEL, Namespace};
pub use node::Node;
pub use pod::{NamedPort, Pod};
pub use policy::{
    Action, ClusterNetworkPolicy, ClusterRule, NetworkPolicy, PolicyPeer, PolicyPort, PolicyRule, Ports, Subject, Tier,
};
pub use problem::Problem;
pub use selector::{LabelPool, Labels, Requirement, Selector, Wanted};
pub use service::{Frontend, Service, ServicePort};
pub use service_cidr::ServiceCidr;
pub use slice::{Condition, Endpoint, EndpointSlice, Hints, TargetPort};

use std::fmt;
use std::net::IpAddr;

use serde::Serialize;

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub enum Family {
    /// IPv4.
    #[serde(rename = "IPv4")]
    V4,
    /// IPv6.
    #[serde(rename = "IPv6")]
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// Returns the first address of this family.
    pub fn pick(self, addresses: &[IpAddr]) -> Option<IpAddr> {
        addresses.iter().copied().find(|address| Self::of(*address) == self)
    }

    /// The family of an address.
    pub const fn of(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}
