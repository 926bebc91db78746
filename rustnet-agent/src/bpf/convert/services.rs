//! Services and backends. In v1 a service was a range of backends; now it is a range of ids, and a
//! backend stands in the slot that its id names. Ranges and slots keep their numbers.

use std::collections::HashMap;

use anyhow::{Result, ensure};
use rustnet_common::backend::{Backend, id};
use rustnet_common::v1;

/// The id of a backend that is not known any more: it names a slot that no table has.
pub const GONE: u32 = u32::MAX;

/// A range of a service, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Index of the first element.
    pub first: u32,
    /// Elements.
    pub count: u32,
    /// Number of the service.
    pub service: u32,
}

/// The backends of v1.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Retired {
    /// By index; those that hold nothing have id 0.
    pub backends: Vec<v1::Backend>,
}

/// The present tables of backends.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tables {
    /// Ids, by index; 0 is none.
    pub ids: Vec<u32>,
    /// Backends, by slot; those that hold nothing have id 0.
    pub backends: Vec<Backend>,
    /// The present id of each backend id of v1.
    renamed: HashMap<u32, u32>,
}

const NO_BACKEND: Backend = Backend { addr: UNSPECIFIED, port: 0, flags: 0, id: 0, service: 0, max_service: 0 };
const NO_RETIRED: v1::Backend = v1::Backend { addr: UNSPECIFIED, port: 0, flags: 0, id: 0 };
const UNSPECIFIED: rustnet_common::addr::Addr = rustnet_common::addr::Ip6 { ip: [0; 16] };

impl Tables {
    /// Converts from v1. What is in no range goes on as a backend of no service: flows may still
    /// have it.
    pub fn upgrade(retired: &Retired, ranges: impl IntoIterator<Item = Range>) -> Result<Self> {
        let len = retired.backends.len();
        ensure!(len <= id::MAX_SLOTS as usize, "{len} slots of backends: there is room for {}", id::MAX_SLOTS);
        let mut tables = Self { ids: vec![0; len], backends: vec![NO_BACKEND; len], renamed: HashMap::new() };
        for range in ranges {
            for slot in indices(range, len) {
                tables.place(slot, &retired.backends[slot as usize], range.service);
            }
        }
        for (slot, backend) in (0..).zip(&retired.backends) {
            if !tables.renamed.contains_key(&backend.id) {
                tables.place(slot, backend, 0);
                tables.ids[slot as usize] = 0;
            }
        }
        Ok(tables)
    }

    /// Places a backend of v1 in the slot of the same number, unless a damaged table gave that to
    /// two services.
    fn place(&mut self, slot: u32, old: &v1::Backend, service: u32) {
        let at = slot as usize;
        if old.id == 0 || self.backends[at].id != 0 {
            return;
        }
        let id = id::make(slot, 1);
        let v1::Backend { addr, port, flags, .. } = *old;
        self.backends[at] = Backend { addr, port, flags, id, service, max_service: service };
        self.ids[at] = id;
        self.renamed.insert(old.id, id);
    }

    /// True for an id of v1 that has a present one.
    pub fn is_renamed(&self, old: u32) -> bool {
        self.renamed.contains_key(&old)
    }

    /// The present id of a backend of v1; [`GONE`] if no slot held it any more.
    pub fn present_id(&self, old: u32) -> u32 {
        self.renamed.get(&old).copied().unwrap_or(GONE)
    }

    /// Takes the ids from tables in use, where the same backend stands in the same slot.
    #[must_use]
    pub fn with_ids_of(mut self, used: &[Backend]) -> Self {
        let same = |id: u32| {
            let slot = id::slot_of(id) as usize;
            let (ours, theirs) = (self.backends.get(slot)?, used.get(slot)?);
            (theirs.id != 0 && (ours.addr, ours.port) == (theirs.addr, theirs.port)).then_some(theirs.id)
        };
        self.renamed = self.renamed.iter().filter_map(|(old, id)| Some((*old, same(*id)?))).collect();
        self
    }

    /// Converts to v1 for a table of so many slots. Ids stay. Backends in no range stand behind all
    /// ranges.
    pub fn downgrade(&self, ranges: impl IntoIterator<Item = Range>, capacity: usize) -> Result<Retired> {
        let mut retired = Retired { backends: vec![NO_RETIRED; capacity] };
        let mut placed = std::collections::HashSet::new();
        let mut end = 0;
        for range in ranges {
            ensure!(
                range.first as usize + range.count as usize <= capacity,
                "a service has {} backends from slot {} on, of {capacity}",
                range.count,
                range.first
            );
            end = end.max(range.first as usize + range.count as usize);
            for index in indices(range, self.ids.len()) {
                if let Some(backend) = self.get(self.ids[index as usize]) {
                    retired.backends[index as usize] = without_slot(backend);
                    placed.insert(backend.id);
                }
            }
        }
        let strays = self.backends.iter().filter(|backend| backend.id != 0 && !placed.contains(&backend.id));
        for (place, stray) in retired.backends[end..].iter_mut().zip(strays) {
            *place = without_slot(stray);
        }
        Ok(retired)
    }

    fn get(&self, wanted: u32) -> Option<&Backend> {
        self.backends.get(id::slot_of(wanted) as usize).filter(|backend| wanted != 0 && backend.id == wanted)
    }

    /// Tables as they are in the maps.
    pub fn of(ids: Vec<u32>, backends: Vec<Backend>) -> Self {
        Self { ids, backends, renamed: HashMap::new() }
    }
}

fn without_slot(backend: &Backend) -> v1::Backend {
    let Backend { addr, port, flags, id, .. } = *backend;
    v1::Backend { addr, port, flags, id }
}

/// The indices of a range that a table has.
fn indices(range: Range, len: usize) -> std::ops::Range<u32> {
    let len = u32::try_from(len).unwrap_or(u32::MAX);
    range.first.min(len)..range.first.saturating_add(range.count).min(len)
}

#[cfg(test)]
mod tests {
    use super::{GONE, NO_RETIRED, Range, Retired, Tables, id, v1};
    use proptest::prelude::*;
    use rustnet_common::addr::Addr;
    use std::net::IpAddr;

    fn backend(n: u8, id: u32) -> v1::Backend {
        v1::Backend { addr: Addr::from(IpAddr::from([10, 0, 0, n])), port: 80, flags: u16::from(n % 2), id }
    }

    fn range(first: u32, count: u32, service: u32) -> Range {
        Range { first, count, service }
    }

    #[test]
    fn a_backend_keeps_its_slot_and_gets_the_first_generation() {
        let retired = Retired { backends: vec![NO_RETIRED, backend(1, 900), backend(2, 7), NO_RETIRED, backend(3, 8)] };
        let tables = Tables::upgrade(&retired, [range(1, 2, 5)]).unwrap();
        assert_eq!(tables.ids, [0, id::make(1, 1), id::make(2, 1), 0, 0]);
        assert_eq!((tables.backends[1].service, tables.backends[1].addr), (5, backend(1, 0).addr));
        assert_eq!((tables.present_id(900), tables.present_id(7)), (id::make(1, 1), id::make(2, 1)));
        // In no range: a flow may still have it.
        assert_eq!((tables.backends[4].id, tables.backends[4].service), (id::make(4, 1), 0));
        assert_eq!(tables.present_id(8), id::make(4, 1));
        assert_eq!(tables.present_id(12), GONE);
    }

    #[test]
    fn one_that_moved_to_another_range_is_not_there_twice() {
        let retired = Retired { backends: vec![backend(1, 7), backend(1, 7), backend(2, 9)] };
        let tables = Tables::upgrade(&retired, [range(1, 2, 5)]).unwrap();
        assert_eq!(tables.backends.iter().map(|b| b.id).collect::<Vec<_>>(), [0, id::make(1, 1), id::make(2, 1)]);
    }

    #[test]
    fn ids_of_tables_in_use_count() {
        let retired = Retired { backends: vec![backend(1, 7), backend(2, 8)] };
        let tables = Tables::upgrade(&retired, [range(0, 2, 5)]).unwrap();
        let mut used = tables.backends.clone();
        used[0].id = id::make(0, 4);
        used[1].port = 81;
        let tables = tables.with_ids_of(&used);
        assert_eq!((tables.present_id(7), tables.present_id(8)), (id::make(0, 4), GONE));
    }

    #[test]
    fn damaged_ranges_do_no_harm() {
        let retired = Retired { backends: vec![backend(1, 7), backend(2, 8)] };
        let tables = Tables::upgrade(&retired, [range(0, 2, 5), range(1, 9, 6), range(u32::MAX, 3, 7)]).unwrap();
        assert_eq!(tables.backends[1].service, 5);
        assert!(tables.downgrade([range(1, 2, 1)], 2).is_err());
    }

    #[test]
    fn more_slots_than_ids_can_name_are_refused() {
        let retired = Retired { backends: vec![NO_RETIRED; id::MAX_SLOTS as usize + 1] };
        assert!(Tables::upgrade(&retired, []).is_err());
    }

    proptest! {
        /// Each service has the same backends after the way there and back, and each id of v1 one
        /// present id.
        #[test]
        fn services_keep_their_backends(lens in prop::collection::vec(0u32..5, 1..12), gaps in any::<[u8; 12]>()) {
            let mut retired = Retired::default();
            let mut ranges = Vec::new();
            let mut next = 1;
            for (i, len) in lens.iter().enumerate() {
                // Before each range some slots that nothing or a stray has.
                for stray in 0..gaps[i] % 3 {
                    retired.backends.push(if stray == 1 { backend(200, 5000 + retired.backends.len() as u32) } else { NO_RETIRED });
                }
                ranges.push(range(retired.backends.len() as u32, *len, i as u32 + 1));
                for _ in 0..*len {
                    retired.backends.push(backend(next as u8, next * 3));
                    next += 1;
                }
            }
            let tables = Tables::upgrade(&retired, ranges.clone()).unwrap();
            for range in &ranges {
                for slot in range.first..range.first + range.count {
                    let old = retired.backends[slot as usize];
                    let new = tables.backends[slot as usize];
                    prop_assert_eq!((new.addr, new.port, new.flags, new.service), (old.addr, old.port, old.flags, range.service));
                    prop_assert_eq!((tables.ids[slot as usize], tables.present_id(old.id)), (new.id, new.id));
                }
            }
            let capacity = retired.backends.len() + 40;
            let back = tables.downgrade(ranges.clone(), capacity).unwrap();
            for range in &ranges {
                for slot in range.first as usize..(range.first + range.count) as usize {
                    let id = tables.present_id(retired.backends[slot].id);
                    prop_assert_eq!(back.backends[slot], v1::Backend { id, ..retired.backends[slot] });
                }
            }
            let count = |backends: &[v1::Backend]| backends.iter().filter(|b| b.id != 0).count();
            prop_assert_eq!(count(&back.backends), count(&retired.backends));
        }
    }
}
