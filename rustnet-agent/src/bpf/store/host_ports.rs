//! `rn_host_ports`: the pods that have ports of this node. The CNI binary writes it; the agent removes what has no interface, and puts
//! back what the records say.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::Result;
use rustnet_common::files::EndpointFile;
use rustnet_common::host_port::{HostPort, HostPortKey};
use rustnet_common::names::map;

use super::Map;

/// Entries by address, port and protocol.
pub type Entries = BTreeMap<HostPortKey, HostPort>;

/// The ports of this node that pods have.
pub struct HostPorts {
    map: Map<HostPortKey, HostPort>,
}

impl HostPorts {
    /// Opens the pin in `bpffs`.
    ///
    /// # Errors
    /// There is none, or it is another version's.
    pub fn open(bpffs: &Path) -> Result<Self> {
        Ok(Self { map: Map::open(bpffs, map::HOST_PORTS)? })
    }

    /// All entries.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn read(&self) -> Result<Entries> {
        Ok(self.map.entries()?.into_iter().collect())
    }

    /// Carries out a change, unless the CNI binary has written the entry meanwhile. True if it was carried out.
    ///
    /// # Errors
    /// The kernel refuses, or the map is full.
    pub fn carry_out(&self, change: &Change) -> Result<bool> {
        let Change { key, before, after } = change;
        if before.is_some() {
            if self.map.get(key)? != *before {
                return Ok(false);
            }
            match self.map.take(key)? {
                there if there == *before => {}
                // Written between the two calls: it goes back, unless there is another one by now.
                there => {
                    if let Some(there) = there {
                        self.map.insert(key, &there)?;
                    }
                    return Ok(false);
                }
            }
        }
        after.as_ref().map_or(Ok(true), |value| self.map.insert(key, value))
    }
}

/// What is to become of one entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// Its key.
    pub key: HostPortKey,
    /// What was read.
    pub before: Option<HostPort>,
    /// What it is to be.
    pub after: Option<HostPort>,
}

/// The changes that make the entries what the records of living pods say. Of two pods with one port, the later has it: of their
/// interfaces, the one with the higher index. An entry of an interface without a record belongs to a call of the CNI binary that is under
/// way. `interfaces`: those of this host by index, with their names.
pub fn repair(entries: &Entries, interfaces: &BTreeMap<u32, &str>, records: &[EndpointFile]) -> Vec<Change> {
    let mut wanted = Entries::new();
    let lives = |record: &&EndpointFile| interfaces.get(&record.ifindex) == Some(&record.host_ifname.as_str());
    for (key, value) in records.iter().filter(lives).flat_map(EndpointFile::host_port_entries) {
        let known = wanted.entry(key).or_insert(value);
        if known.ifindex < value.ifindex {
            *known = value;
        }
    }
    let keys: BTreeSet<_> = entries.keys().chain(wanted.keys()).copied().collect();
    let change = |key: HostPortKey| {
        let (before, after) = (entries.get(&key).copied(), wanted.get(&key).copied());
        let is_later = |value: HostPort| after.is_none_or(|after| value.ifindex > after.ifindex);
        let stays = before.is_some_and(|value| interfaces.contains_key(&value.ifindex) && is_later(value));
        (before != after && !stays).then_some(Change { key, before, after })
    };
    keys.into_iter().filter_map(change).collect()
}

#[cfg(test)]
mod tests {
    use super::{Change, Entries, repair};
    use rustnet_common::addr::Addr;
    use rustnet_common::files::{Bandwidth, EndpointFile, PortMapping, Protocol};
    use rustnet_common::host_port::{HostPort, HostPortKey, any};
    use std::collections::BTreeMap;

    fn record(ifindex: u32, port: u16) -> EndpointFile {
        EndpointFile {
            container_id: format!("c{ifindex}"),
            ifname: "eth0".into(),
            netns: "/n".into(),
            netns_cookie: None,
            network: "rustnet".into(),
            host_ifname: format!("rnv{ifindex}"),
            ifindex,
            mac: "02:00:00:00:00:07".into(),
            addresses: vec!["10.1.1.5".parse().unwrap()],
            pod_namespace: String::new(),
            pod_name: String::new(),
            pod_uid: String::new(),
            bandwidth: Bandwidth::default(),
            host_ports: vec![PortMapping {
                host_ip: None,
                host_port: port,
                container_port: 80,
                protocol: Protocol::Tcp,
            }],
            has_routes: false,
        }
    }

    fn key(port: u16) -> HostPortKey {
        HostPortKey { addr: any(true), port, proto: 6, pad: 0 }
    }

    fn value(ifindex: u32) -> HostPort {
        HostPort { pod: Addr::from("10.1.1.5".parse::<std::net::IpAddr>().unwrap()), ifindex, port: 80, pad: 0 }
    }

    fn check(
        entries: &[(u16, u32)],
        living: &[u32],
        records: &[EndpointFile],
        want: &[(u16, Option<u32>, Option<u32>)],
    ) {
        let entries: Entries = entries.iter().map(|(port, ifindex)| (key(*port), value(*ifindex))).collect();
        let names: BTreeMap<u32, String> = living.iter().map(|index| (*index, format!("rnv{index}"))).collect();
        let interfaces = names.iter().map(|(index, name)| (*index, name.as_str())).collect();
        let want: Vec<_> = want
            .iter()
            .map(|(port, before, after)| Change { key: key(*port), before: before.map(value), after: after.map(value) })
            .collect();
        assert_eq!(repair(&entries, &interfaces, records), want);
    }

    #[test]
    fn entries_follow_the_records_of_living_pods() {
        check(&[(80, 7)], &[7], &[record(7, 80)], &[]);
        check(&[], &[7], &[record(7, 80)], &[(80, None, Some(7))]);
        check(&[], &[], &[record(7, 80)], &[]);
        check(&[(80, 7)], &[], &[record(7, 80)], &[(80, Some(7), None)]);
        check(&[(80, 7)], &[], &[], &[(80, Some(7), None)]);
        // An ADD or a DEL is under way.
        check(&[(80, 7)], &[7], &[], &[]);
        check(&[(80, 6)], &[7], &[record(7, 80)], &[(80, Some(6), Some(7))]);
        check(&[(80, 7)], &[7, 8], &[record(7, 80), record(8, 81)], &[(81, None, Some(8))]);
    }

    #[test]
    fn of_two_pods_with_one_port_the_later_has_it() {
        let both = [record(7, 80), record(8, 80)];
        check(&[(80, 8)], &[7, 8], &both, &[]);
        check(&[(80, 7)], &[7, 8], &both, &[(80, Some(7), Some(8))]);
        check(&[], &[7, 8], &both, &[(80, None, Some(8))]);
        // The later has gone.
        check(&[(80, 8)], &[7], &both, &[(80, Some(8), Some(7))]);
        // Its record is not read yet.
        check(&[(80, 8)], &[7, 8], &both[..1], &[]);
    }

    #[test]
    fn a_changed_entry_is_put_back() {
        let wrong = HostPort { port: 1, ..value(7) };
        let entries = Entries::from([(key(80), wrong)]);
        let interfaces = BTreeMap::from([(7, "rnv7")]);
        let want = Change { key: key(80), before: Some(wrong), after: Some(value(7)) };
        assert_eq!(repair(&entries, &interfaces, &[record(7, 80)]), [want]);
    }
}
