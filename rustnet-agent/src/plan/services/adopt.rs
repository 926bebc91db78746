//! What a new agent makes of the maps that it finds: whose range and whose backend is whose, and what is damaged.

use super::{Held, Services};
use crate::plan::backends::Backends;
use crate::plan::ids::Ids;
use crate::plan::ranges::Ranges;
use crate::plan::slots::Slots;
use crate::plan::{GRACE, Snapshot, VipKey};
use rustnet_common::backend::{Backend, id};
use rustnet_common::service::SvcEntry;
use rustnet_common::tuple::proto::UDP;
use std::collections::{BTreeMap, HashMap, HashSet};

impl Services {
    /// Begins with what the maps hold, which take so many services and backends.
    pub fn adopt(mut snapshot: Snapshot, capacity: u32, backend_capacity: u32) -> Self {
        snapshot.ids.truncate(backend_capacity as usize);
        snapshot.backends.truncate(backend_capacity as usize);
        let mut seen = HashSet::new();
        for (_, entry) in snapshot.services.iter_mut().filter(|(key, _)| !key.is_wildcard()) {
            if !seen.insert(entry.id) {
                // It gets another one, and backends of its own.
                entry.id = 0;
            }
        }
        let mut ranges = Ranges::new(backend_capacity, GRACE);
        let mut damaged = BTreeMap::new();
        // By slot: whether an entry leads there.
        let mut referred = vec![false; snapshot.backends.len()];
        for (key, entry) in snapshot.services.iter().filter(|(_, entry)| entry.count > 0) {
            let claimed = ranges.claim(entry.first, entry.count);
            if key.is_wildcard() || !claimed || !refer(entry, &snapshot, &mut referred) {
                let ranges = if claimed { vec![(entry.first, entry.count)] } else { Vec::new() };
                damaged.insert(*key, Held { ranges, backends: Vec::new() });
            }
        }
        for (key, held) in &mut damaged {
            let entry = &snapshot.services[key];
            let end = entry.first.saturating_add(entry.count).min(backend_capacity);
            if held.ranges.is_empty() {
                held.ranges.extend((entry.first..end).map(|slot| (slot, 1)).filter(|(slot, _)| ranges.claim(*slot, 1)));
            }
            // Beyond the end there is nothing, however much the entry claims.
            let within = SvcEntry { count: end.saturating_sub(entry.first), ..*entry };
            let backends = snapshot.backends_of(&within).flatten();
            let unused = backends.filter(|b| !std::mem::replace(&mut referred[id::slot_of(b.id) as usize], true));
            held.backends.extend(unused.map(|b| b.id));
        }
        let Snapshot { services: entries, ids, backends, .. } = snapshot;
        // All else that was ever written may have been let go of a moment ago.
        ranges.retire_free_below(ids.len() as u32);
        let last = entries.values().map(|entry| entry.id).max().unwrap_or(0);
        // Those that the last agent's death left without a service bear the number of their slot's
        // last backend.
        let has_service =
            |(slot, b): &(u32, &Backend)| b.id != 0 && (b.service < id::MAX_SLOTS || id::slot_of(b.service) != *slot);
        let last = (0..).zip(&backends).filter(has_service).map(|(_, b)| b.service).max().unwrap_or(0).max(last);
        let last = backends.iter().map(|b| b.max_service).max().unwrap_or(0).max(last);
        let count = |v4: bool| entries.keys().filter(|key| key.ip.is_ipv4() == v4).count() as u32;
        let slots = Slots::new(backends, backend_capacity, GRACE);
        let mut services = Self {
            capacity,
            count: [count(true), count(false)],
            numbers: Ids::after(last),
            entries: entries.into_iter().collect(),
            damaged,
            backends: Backends::new(ids, ranges, slots, backend_capacity),
            orphans: Vec::new(),
            failed: BTreeMap::new(),
            has_new_room: false,
        };
        services.find_strays(&referred);
        services
    }

    /// Backends that no entry leads to: an earlier agent let them linger, or died before it forgot
    /// their flows or cleared their slots.
    fn find_strays(&mut self, referred: &[bool]) {
        let strays =
            |(slot, referred): (u32, &bool)| if *referred { None } else { self.backends.get(slot).map(|b| (slot, *b)) };
        let strays: Vec<(u32, Backend)> = (0..).zip(referred).filter_map(strays).filter(|(_, b)| b.id != 0).collect();
        if strays.is_empty() {
            return;
        }
        let keys: HashMap<u32, VipKey> = self.entries.iter().map(|(key, entry)| (entry.id, *key)).collect();
        for (slot, backend) in strays {
            match keys.get(&backend.service).filter(|key| !key.is_wildcard()) {
                _ if id::slot_of(backend.id) != slot => self.backends.leave([slot]),
                Some(key) if key.proto == UDP => {
                    self.orphans.extend(self.backends.found(*key, &backend));
                }
                Some(_) => self.backends.leave([slot]),
                None => self.orphans.push(backend.id),
            }
        }
    }
}

/// True if all ids in an entry's range are of backends of its own that no other entry has; those
/// are marked then.
fn refer(entry: &SvcEntry, snapshot: &Snapshot, referred: &mut [bool]) -> bool {
    let mut marked = 0;
    for backend in snapshot.backends_of(entry) {
        match backend.map(|b| &mut referred[id::slot_of(b.id) as usize]) {
            Some(mark) if !*mark => *mark = true,
            _ => break,
        }
        marked += 1;
    }
    let sound = marked == entry.count && entry.id != 0;
    if !sound {
        let marked = snapshot.backends_of(&SvcEntry { count: marked, ..*entry });
        marked.flatten().for_each(|b| referred[id::slot_of(b.id) as usize] = false);
    }
    sound
}
