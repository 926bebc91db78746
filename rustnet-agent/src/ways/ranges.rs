//! Ranges that do not overlap one another, with their owners.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

/// Ranges that do not overlap one another, with their owners.
#[derive(Default)]
pub struct Ranges(BTreeMap<IpAddr, (IpNet, Arc<str>)>);

impl Ranges {
    /// A range that shares an address with this one. As none overlaps another, only two neighbours can.
    pub fn overlapping(&self, cidr: &IpNet) -> Option<(IpNet, Arc<str>)> {
        let before = self.0.range(..=cidr.network()).next_back();
        let after = self.0.range(cidr.network()..).next();
        let overlaps = |other: &IpNet| other.contains(cidr) || cidr.contains(other);
        before.into_iter().chain(after).map(|(_, found)| found).find(|(other, _)| overlaps(other)).cloned()
    }

    /// Adds one that overlaps none.
    pub fn insert(&mut self, cidr: IpNet, owner: Arc<str>) {
        self.0.insert(cidr.network(), (cidr, owner));
    }
}
