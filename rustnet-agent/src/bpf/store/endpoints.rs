//! `rn_endpoints`: the pods of this node. The CNI binary writes it; the agent removes what has no interface and no record.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;

use anyhow::Result;
use rustnet_common::endpoint::{Endpoint, EndpointKey};
use rustnet_common::names::map;

use super::Map;

/// The pods of this node.
pub struct Endpoints {
    map: Map<EndpointKey, Endpoint>,
}

impl Endpoints {
    /// Opens the pin in `bpffs`.
    pub fn open(bpffs: &Path) -> Result<Self> {
        Ok(Self { map: Map::open(bpffs, map::ENDPOINTS)? })
    }

    /// All pods, by address.
    pub fn read(&self) -> Result<Vec<(IpAddr, Endpoint)>> {
        let mut all: Vec<_> = self.map.entries()?.into_iter().map(|(k, v)| (IpAddr::from(k), v)).collect();
        all.sort_unstable_by_key(|(ip, _)| *ip);
        Ok(all)
    }

    /// Adds or replaces a pod's entry.
    pub fn put(&self, ip: IpAddr, endpoint: &Endpoint) -> Result<()> {
        self.map.put(&ip.into(), endpoint)
    }

    /// Writes a pod's entry, unless the CNI binary has written it since it was read, or absent. False if so.
    pub fn put_back(&self, ip: IpAddr, read: Option<&Endpoint>, endpoint: &Endpoint) -> Result<bool> {
        let key = ip.into();
        let Some(read) = read else { return self.map.insert(&key, endpoint) };
        if self.map.get(&key)?.is_some_and(|now| now.ifindex != read.ifindex) {
            return Ok(false);
        }
        self.put(ip, endpoint).map(|()| true)
    }

    /// Removes a pod's entry if it still is for this interface: the address may be another pod's by now.
    pub fn delete(&self, ip: IpAddr, ifindex: u32) -> Result<bool> {
        let same = self.map.get(&ip.into())?.is_some_and(|now| now.ifindex == ifindex);
        Ok(same && self.map.delete(&ip.into())?)
    }
}

/// The addresses, with their interfaces, whose interface is gone and that no record mentions: leftovers of a DEL that was cut
/// short. An address with an interface but no record belongs to an ADD that is under way.
pub fn stale(
    entries: &[(IpAddr, Endpoint)],
    interfaces: &BTreeSet<u32>,
    recorded: &BTreeSet<IpAddr>,
) -> Vec<(IpAddr, u32)> {
    let gone = entries.iter().filter(|(ip, e)| !interfaces.contains(&e.ifindex) && !recorded.contains(ip));
    gone.map(|(ip, e)| (*ip, e.ifindex)).collect()
}

#[cfg(test)]
mod tests {
    use super::{Endpoint, stale};
    use std::collections::BTreeSet;
    use std::net::IpAddr;

    #[test]
    fn only_what_has_neither_interface_nor_record_is_stale() {
        let entry = |ifindex| Endpoint { ifindex, identity: 0, mac: [0; 6], host_mac: [0; 6], flags: 0, pad: 0 };
        let ip = |n| IpAddr::from([10, 0, 0, n]);
        let entries = [(ip(1), entry(1)), (ip(2), entry(2)), (ip(3), entry(3)), (ip(4), entry(4))];
        let interfaces = BTreeSet::from([1, 2]);
        let recorded = BTreeSet::from([ip(1), ip(3)]);
        assert_eq!(stale(&entries, &interfaces, &recorded), [(ip(4), 4)]);
    }
}
