//! Ranges that the API server takes cluster addresses of Services from.

use super::{ObjectName, Problem};
use ipnet::IpNet;

/// A ServiceCIDR. One that is being deleted counts like others: until it is gone, Services have addresses of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceCidr {
    /// Its name.
    pub name: ObjectName,
    /// Its ranges, host bits cleared.
    pub cidrs: Box<[IpNet]>,
    /// What was wrong with it.
    pub problems: Box<[Problem]>,
}
