//! Clients of entries that ask for them: which of them each write of a list lets through.

use crate::plan::{Snapshot, VipKey, Write};
use anyhow::ensure;
use ipnet::IpNet;
use rustnet_common::service::{flags, scope};
use rustnet_common::source_range::ALLOWED;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The number of the set of backends that a client gets by an entry; `None` if it does not get through.
pub fn passes(held: &Snapshot, key: &VipKey, client: IpAddr) -> Option<u32> {
    let entry = held.services.get(key)?;
    // Both entries of an address ask for the same clients.
    let key = VipKey { scope: scope::EXTERNAL, ..*key };
    let mut ranges = held.source_ranges.keys().filter(|range| range.key == key);
    let is_allowed = entry.flags & flags::SOURCE_RANGES == 0 || ranges.any(|range| range.clients.contains(&client));
    is_allowed.then_some(entry.id)
}

/// What some clients get before a list of writes, and after it.
pub struct Clients {
    known: Vec<Client>,
    /// The map may hold not all that it should: clients are refused until others have gone.
    is_full: bool,
}

struct Client {
    key: VipKey,
    ip: IpAddr,
    before: Option<u32>,
    after: Option<u32>,
}

impl Clients {
    /// The first and the last of each range that stands in the maps or in the writes, and somebody else. `room`: what the map can hold.
    pub fn new(held: &Snapshot, writes: &[Write], room: u32) -> Self {
        let is_judged = |write: &Write| match write {
            Write::PutService { entry, .. } => entry.flags & flags::SOURCE_RANGES != 0,
            Write::PutSourceRange { .. } | Write::DeleteSourceRange { .. } => true,
            _ => false,
        };
        if held.source_ranges.is_empty() && !writes.iter().any(is_judged) {
            // Nobody is asked, or nobody gets through before.
            return Self { known: Vec::new(), is_full: false };
        }
        let mut later = Snapshot {
            services: held.services.clone(),
            source_ranges: held.source_ranges.clone(),
            ..Snapshot::default()
        };
        let mut ranges: Vec<(VipKey, IpNet)> = held.source_ranges.keys().map(|r| (r.key, r.clients)).collect();
        for write in writes {
            match write {
                Write::PutService { key, entry } => drop(later.services.insert(*key, *entry)),
                Write::DeleteService { key } => drop(later.services.remove(key)),
                Write::PutSourceRange { range } => {
                    ranges.push((range.key, range.clients));
                    later.source_ranges.insert(*range, ALLOWED);
                }
                Write::DeleteSourceRange { range } => drop(later.source_ranges.remove(range)),
                _ => {}
            }
        }
        let is_full = ranges.len() + 1 >= room as usize;
        let judged = [held, &later].into_iter().flat_map(|maps| &maps.services);
        let judged = judged.filter(|(_, entry)| entry.flags & flags::SOURCE_RANGES != 0).map(|(key, _)| *key);
        let mut all: BTreeSet<(VipKey, IpAddr)> = judged.map(|key| (key, somebody(key.ip))).collect();
        all.extend(ranges.into_iter().flat_map(|(key, range)| [(key, range.network()), (key, range.broadcast())]));
        let known = all.into_iter().map(|(key, ip)| {
            let (before, after) = (passes(held, &key, ip), passes(&later, &key, ip));
            Client { key, ip, before, after }
        });
        Self { known: known.collect(), is_full }
    }

    /// Compares what they get after some of the writes.
    ///
    /// # Errors
    /// One gets what it gets neither before nor after, or nothing, though it gets something before and after.
    pub fn check(&self, held: &Snapshot) -> anyhow::Result<()> {
        for Client { key, ip, before, after } in &self.known {
            let now = passes(held, key, *ip);
            ensure!(now.is_none() || now == *before || now == *after, "{ip} gets through to {key} for a moment");
            let is_refused = now.is_none() && before.is_some() && after.is_some();
            ensure!(self.is_full || !is_refused, "{ip} is refused by {key} for a moment");
        }
        Ok(())
    }
}

/// A client that no test has in a range of its own.
fn somebody(like: IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => Ipv4Addr::new(203, 0, 113, 254).into(),
        IpAddr::V6(_) => Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 1).into(),
    }
}
