//! What a new agent makes of the maps that it finds: whose range and whose backend is whose, and what is damaged.

use super::{Held, Services};
use crate::plan::sets::Sets;
use crate::plan::tables::Tables;
use crate::plan::{Capacity, Snapshot};
use rustnet_common::backend::{Backend, id};
use rustnet_common::service::SvcEntry;
use std::collections::BTreeMap;

impl Services {
    /// Begins with what the maps hold, in which there is so much room.
    pub fn adopt(mut snapshot: Snapshot, room: Capacity) -> Self {
        let backend_capacity = room.backends;
        snapshot.ids.truncate(backend_capacity as usize);
        snapshot.backends.truncate(backend_capacity as usize);
        let tables = Tables::new(std::mem::take(&mut snapshot.tables), room.table_words);
        let (ids, backends) = (snapshot.ids.clone(), snapshot.backends.clone());
        let mut sets = Sets::new(ids, backends, backend_capacity, tables, last_number(&snapshot));
        let mut damaged = BTreeMap::new();
        // By slot: whether an entry leads there.
        let mut referred = vec![false; snapshot.backends.len()];
        for (key, entry) in &snapshot.services {
            if key.is_wildcard() && entry.count == 0 {
                continue;
            }
            let mut is_claimed = false;
            let is_sound = sets.adopt(*key, entry, |ranges| {
                is_claimed = entry.count > 0 && ranges.claim(entry.first, entry.count);
                let has_backends = |referred| is_claimed && refer(entry, &snapshot, referred);
                !key.is_wildcard() && entry.id != 0 && (entry.count == 0 || has_backends(&mut referred))
            });
            if !is_sound && entry.count > 0 {
                let ranges = if is_claimed { vec![(entry.first, entry.count)] } else { Vec::new() };
                damaged.insert(*key, Held { ranges, backends: Vec::new() });
            }
        }
        for (key, held) in &mut damaged {
            let entry = &snapshot.services[key];
            let end = entry.first.saturating_add(entry.count).min(backend_capacity);
            if held.ranges.is_empty() {
                let slots = (entry.first..end).map(|slot| (slot, 1));
                held.ranges.extend(slots.filter(|(slot, _)| sets.ranges().claim(*slot, 1)));
            }
            // Beyond the end there is nothing, however much the entry claims.
            let within = SvcEntry { count: end.saturating_sub(entry.first), ..*entry };
            let backends = snapshot.backends_of(&within).flatten();
            let unused = backends.filter(|b| !std::mem::replace(&mut referred[id::slot_of(b.id) as usize], true));
            held.backends.extend(unused.map(|b| b.id));
        }
        // All else that was ever written may have been let go of a moment ago.
        sets.ranges().retire_free_below(snapshot.ids.len() as u32);
        sets.tables().retire_others();
        // Backends that no entry leads to: an earlier agent let them linger, or died before it forgot their flows or cleared
        // their slots.
        let strays = (0..).zip(&snapshot.backends).zip(&referred).filter(|((_, b), referred)| b.id != 0 && !**referred);
        let orphans = strays.filter_map(|((slot, backend), _)| sets.adopt_stray(slot, backend)).collect();
        let count = |v4: bool| snapshot.services.keys().filter(|key| key.ip.is_ipv4() == v4).count() as u32;
        Self {
            capacity: room.services,
            count: [count(true), count(false)],
            damaged,
            sets,
            orphans,
            failed: BTreeMap::new(),
            without_table: BTreeMap::new(),
            has_new_room: false,
            entries: snapshot.services.into_iter().collect(),
        }
    }
}

/// The highest number that a set ever had, as far as the maps show.
fn last_number(snapshot: &Snapshot) -> u32 {
    let entries = snapshot.services.values().map(|entry| entry.id);
    // Those that the last agent's death left without a service bear the number of their slot's
    // last backend.
    let has_service =
        |(slot, b): &(u32, &Backend)| b.id != 0 && (b.service < id::MAX_SLOTS || id::slot_of(b.service) != *slot);
    let backends = (0..).zip(&snapshot.backends).filter(has_service).map(|(_, b)| b.service);
    let before = snapshot.backends.iter().map(|b| b.max_service);
    entries.chain(backends).chain(before).max().unwrap_or(0)
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
