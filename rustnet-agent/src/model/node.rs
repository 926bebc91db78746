//! A node of the cluster, as far as packets care.

use super::{Family, Labels, ObjectName, Problem};
use ipnet::IpNet;
use std::net::IpAddr;
use std::sync::Arc;

/// A Node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its name.
    pub name: ObjectName,
    /// Seconds since 1970 at which it was created; 0 when unknown. The older one wins an address.
    pub created: i64,
    /// Its internal addresses, in the order given.
    pub addresses: Box<[IpAddr]>,
    /// Its other addresses, for policies that name Nodes.
    pub other_addresses: Box<[IpAddr]>,
    /// Its labels, for the same.
    pub labels: Labels,
    /// The ranges of its pods, host bits cleared, at most one a family.
    pub pod_cidrs: Box<[IpNet]>,
    /// Its zone; empty when it has none.
    pub zone: Arc<str>,
    /// It is being deleted, or is about to be: load balancers should send it nothing new.
    pub is_leaving: bool,
    /// What was wrong with it.
    pub problems: Box<[Problem]>,
}

impl Node {
    /// Its first address of a family.
    pub fn address(&self, family: Family) -> Option<IpAddr> {
        self.addresses.iter().copied().find(|ip| Family::of(*ip) == family)
    }

    /// Its first address of a family inside one of these networks: reached without a router from who is in it.
    pub fn on_link(&self, family: Family, links: &[IpNet]) -> Option<IpAddr> {
        let of_family = self.addresses.iter().copied().filter(|ip| Family::of(*ip) == family);
        of_family.into_iter().find(|ip| links.iter().any(|net| net.contains(ip)))
    }
}
