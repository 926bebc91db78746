//! Maps in memory, which refuse every order of writes that would hurt a reader, and can fail after any step.

mod clients;

use super::{GRACE, Maps, Snapshot, VipKey, Write};
use anyhow::{Context, bail, ensure};
use clients::Clients;
#[cfg(test)]
pub use clients::passes;
use ipnet::IpNet;
use rustnet_common::backend::{Backend, flags, id};
use rustnet_common::maglev;
use rustnet_common::service::SvcEntry;
use rustnet_common::source_range::ALLOWED;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// The maps of one node, for tests of everything above them.
#[derive(Clone, Debug)]
pub struct MemoryMaps {
    held: Snapshot,
    capacity: u32,
    /// Words of Maglev tables.
    table_words: u32,
    /// Services and peers, of each family.
    room: (u32, u32),
    /// Ranges of clients.
    range_room: u32,
    now: Duration,
    /// When an index of `rn_backend_ids` was last let go of.
    let_go: BTreeMap<u32, Duration>,
    /// When a unit of `rn_maglev` was last let go of.
    tables_let_go: BTreeMap<u16, Duration>,
    /// When the last entry let go of a backend, by slot; or when the slot was cleared after that.
    unused: BTreeMap<u32, Duration>,
    /// Steps until the crash; backends and ids count one each.
    steps_left: Option<usize>,
    /// Backends that have ended, in order.
    ended: Vec<u32>,
}

impl MemoryMaps {
    /// Empty maps with this much room for ids and for backends.
    pub fn new(capacity: u32) -> Self {
        Self {
            held: Snapshot::default(),
            capacity,
            table_words: 0,
            room: (u32::MAX, u32::MAX),
            range_room: u32::MAX,
            now: Duration::ZERO,
            let_go: BTreeMap::new(),
            tables_let_go: BTreeMap::new(),
            unused: BTreeMap::new(),
            steps_left: None,
            ended: Vec::new(),
        }
    }

    /// Maps that hold this already.
    pub fn with(held: Snapshot, capacity: u32) -> Self {
        Self { held, ..Self::new(capacity) }
    }

    /// The same maps with room for so many services and so many peers of each family. Like the kernel's, they refuse
    /// the entry that is one too many at the moment of its write, whatever is deleted after it.
    #[must_use]
    pub fn with_room(self, services: u32, peers: u32) -> Self {
        Self { room: (services, peers), ..self }
    }

    /// The same maps with room for so many ranges of clients.
    #[must_use]
    pub fn with_range_room(self, range_room: u32) -> Self {
        Self { range_room, ..self }
    }

    /// The same maps with room for so many words of Maglev tables.
    #[must_use]
    pub fn with_tables(self, table_words: u32) -> Self {
        Self { table_words, ..self }
    }

    /// Sets the time, by which the reuse of slots is judged.
    pub fn set_now(&mut self, now: Duration) {
        self.now = now;
    }

    /// Fail after this many steps. One write is one step, but each backend and each id is one, too.
    pub fn crash_after(&mut self, steps: usize) {
        self.steps_left = Some(steps);
    }

    /// No crash any more.
    pub fn repair(&mut self) {
        self.steps_left = None;
    }

    /// What the maps hold.
    pub fn held(&self) -> &Snapshot {
        &self.held
    }

    /// What the maps hold, for a test that changes it as somebody else would.
    pub fn meddle(&mut self) -> &mut Snapshot {
        &mut self.held
    }

    /// Backends that have ended since the last call.
    pub fn take_ended(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.ended)
    }

    /// The backends that an entry leads to.
    pub fn backends(&self, entry: &SvcEntry) -> Vec<Backend> {
        self.found(entry).copied().collect()
    }

    /// Maps made up by a test may hold entries of any length.
    fn found(&self, entry: &SvcEntry) -> impl Iterator<Item = &Backend> + use<'_> {
        self.held.backends_of(entry).take(self.capacity as usize).flatten()
    }

    fn step(&mut self) -> anyhow::Result<()> {
        if let Some(left) = &mut self.steps_left {
            *left = left.checked_sub(1).context("crash, as the test asked for")?;
        }
        Ok(())
    }

    fn user_of(&self, index: u32) -> Option<VipKey> {
        self.held.services.iter().find(|(_, e)| index >= e.first && index - e.first < e.count).map(|(key, _)| *key)
    }

    /// Slots that an entry leads to.
    fn used(&self) -> BTreeSet<u32> {
        self.held.services.values().flat_map(|entry| self.found(entry)).map(|b| id::slot_of(b.id)).collect()
    }

    fn rested(&self, slot: u32, what: &str) -> anyhow::Result<()> {
        let rested = self.unused.get(&slot).is_none_or(|since| self.now >= *since + GRACE);
        ensure!(rested, "slot {slot} is {what} too soon");
        Ok(())
    }

    fn store(&mut self, backends: &[Backend]) -> anyhow::Result<()> {
        ensure!(!backends.is_empty(), "no backends are written");
        for backend in backends {
            let slot = id::slot_of(backend.id);
            ensure!(slot < self.capacity, "slot {slot} exceeds the array");
            ensure!(id::generation_of(backend.id) > 0, "backend without an id at {slot}");
            if self.held.backends.len() <= slot as usize {
                self.held.backends.resize(slot as usize + 1, bytemuck::Zeroable::zeroed());
            }
            let held = self.held.backends[slot as usize];
            if held.id == 0 {
                let next = id::next(slot, held.last_id());
                ensure!(backend.id == next, "slot {slot} gets the id {:#x}, not {next:#x}", backend.id);
                let max = held.max_service.max(backend.service);
                ensure!(backend.max_service == max, "slot {slot} forgets a service: {held:?} becomes {backend:?}");
                self.rested(slot, "written")?;
            } else {
                let changed = Backend { flags: backend.flags, ..held };
                ensure!(changed == *backend, "slot {slot} is in use: {held:?} becomes {backend:?}");
                ensure!(held != *backend, "slot {slot} is written, but it holds that already");
            }
            if let Err(crash) = self.step() {
                // The service is written last.
                let service = if held.id == 0 { held.last_id() } else { held.service };
                self.held.backends[slot as usize] = Backend { service, ..*backend };
                return Err(crash);
            }
            self.held.backends[slot as usize] = *backend;
        }
        Ok(())
    }

    fn store_ids(&mut self, first: u32, ids: &[u32]) -> anyhow::Result<()> {
        ensure!(!ids.is_empty(), "an empty range of ids is written at {first}");
        let end = first.checked_add(ids.len() as u32).filter(|end| *end <= self.capacity);
        let end = end.with_context(|| format!("{} ids at {first} exceed the array", ids.len()))?;
        for (key, entry) in &self.held.services {
            let apart = entry.count == 0 || entry.first >= end || end_of(entry) <= first;
            ensure!(apart, "ids {first}..{end} are written while {key} leads there");
        }
        for (index, since) in self.let_go.range(first..end) {
            ensure!(self.now >= *since + GRACE, "id {index} is written too soon after it was let go of");
        }
        for id in ids {
            let written = self.held.backends.get(id::slot_of(*id) as usize);
            ensure!(written.is_some_and(|b| b.id == *id), "id {id:#x} is written before its backend");
        }
        if self.held.ids.len() < end as usize {
            self.held.ids.resize(end as usize, 0);
        }
        for (index, id) in (first..end).zip(ids) {
            self.step()?;
            self.held.ids[index as usize] = *id;
        }
        Ok(())
    }

    fn store_table(&mut self, unit: u16, words: &[u64]) -> anyhow::Result<()> {
        let first = maglev::head(unit);
        let end = first + words.len() as u32;
        ensure!(unit != 0 && end <= self.table_words, "a table at unit {unit} exceeds the array");
        let units = maglev::units(words[0] as u32) as u16;
        ensure!(words.len() <= (u32::from(units) * maglev::UNIT) as usize, "a table of more words than its size has");
        for (key, entry) in self.held.services.iter().filter(|(_, entry)| entry.table != 0) {
            let there = (entry.table, entry.table + self.units_at(entry.table));
            let is_apart = there.1 <= unit || unit + units <= there.0;
            ensure!(is_apart, "a table is written at unit {unit} while {key} leads there");
        }
        for (other, since) in self.tables_let_go.range(unit..unit + units) {
            ensure!(self.now >= *since + GRACE, "unit {other} is written too soon after it was let go of");
        }
        if self.held.tables.len() < end as usize {
            self.held.tables.resize(end as usize, 0);
        }
        for (index, word) in (first as usize..).zip(words) {
            self.held.tables[index] = *word;
        }
        Ok(())
    }

    /// Units of the table that begins there; 1 if there is none.
    fn units_at(&self, unit: u16) -> u16 {
        let size = self.held.tables.get(maglev::head(unit) as usize).copied().unwrap_or(0);
        maglev::units(size.min(maglev::MAX_SIZE.into()) as u32) as u16
    }

    fn put(&mut self, key: VipKey, entry: SvcEntry) -> anyhow::Result<()> {
        let backends: Option<Vec<&Backend>> = self.held.backends_of(&entry).collect();
        let backends =
            backends.with_context(|| format!("{key} leads to ids that are of no backend of it: {entry:?}"))?;
        let ids: BTreeSet<u32> = backends.iter().map(|b| b.id).collect();
        ensure!(ids.len() == backends.len(), "{key} has two backends of one id");
        ensure!(ids.is_empty() || entry.id != 0, "{key} has backends, but no id");
        if entry.table != 0 {
            let ordinals: Option<BTreeSet<u32>> = self.held.ordinals(entry.table).map(Iterator::collect);
            let all: BTreeSet<u32> = (0..entry.count).collect();
            ensure!(ordinals == Some(all), "the table of {key} does not lead to each of its backends: {entry:?}");
        }
        for (other, held) in self.held.services.iter().filter(|(other, _)| **other != key) {
            let apart =
                held.count == 0 || entry.count == 0 || held.first >= end_of(&entry) || entry.first >= end_of(held);
            let is_shared = (held.first, held.count, held.id) == (entry.first, entry.count, entry.id);
            ensure!(apart || is_shared, "{key} and {other} share a range of ids, and are no entries of one set");
        }
        let of_family = self.held.services.keys().filter(|other| other.ip.is_ipv4() == key.ip.is_ipv4());
        let is_full = of_family.count() as u32 >= self.room.0 && !self.held.services.contains_key(&key);
        ensure!(!is_full, "{key} does not fit: the service map is full ({} entries)", self.room.0);
        let before = self.used();
        let old = self.held.services.insert(key, entry);
        self.let_go_of(old, &before);
        Ok(())
    }

    fn delete(&mut self, key: VipKey) -> anyhow::Result<()> {
        let before = self.used();
        let old = self.held.services.remove(&key);
        ensure!(old.is_some(), "{key} is deleted, but it is not there");
        self.let_go_of(old, &before);
        Ok(())
    }

    /// An entry is gone; `before`: the slots that were in use while it was there.
    fn let_go_of(&mut self, entry: Option<SvcEntry>, before: &BTreeSet<u32>) {
        for index in entry.iter().flat_map(|e| e.first..end_of(e).min(self.capacity)) {
            if self.user_of(index).is_none() {
                self.let_go.insert(index, self.now);
            }
        }
        let is_used = |unit| self.held.services.values().any(|entry| entry.table == unit);
        if let Some(unit) = entry.map(|entry| entry.table).filter(|unit| *unit != 0 && !is_used(*unit)) {
            let units = unit..unit + self.units_at(unit);
            self.tables_let_go.extend(units.map(|unit| (unit, self.now)));
        }
        let after = self.used();
        self.unused.extend(before.difference(&after).map(|slot| (*slot, self.now)));
    }

    fn end(&mut self, ids: &[u32]) -> anyhow::Result<()> {
        ensure!(!ids.is_empty(), "no backends end");
        let used = self.used();
        for id in ids {
            let slot = id::slot_of(*id);
            let serves = self.held.backends.get(slot as usize).is_some_and(|held| held.serves(*id));
            ensure!(serves, "backend {id:#x} ends, but it serves no more");
            ensure!(!used.contains(&slot), "backend {id:#x} ends while an entry leads there");
            self.step()?;
            self.held.backends[slot as usize].flags |= flags::ENDED;
            self.ended.push(*id);
        }
        Ok(())
    }

    fn clear(&mut self, ids: &[u32]) -> anyhow::Result<()> {
        ensure!(!ids.is_empty(), "no backends are cleared");
        let used = self.used();
        for id in ids {
            let slot = id::slot_of(*id);
            let held = self.held.backends.get(slot as usize).copied();
            ensure!(held.is_some_and(|b| b.id != 0), "slot {slot} is cleared, but it is free");
            ensure!(!used.contains(&slot), "slot {slot} is cleared while an entry leads there");
            self.rested(slot, "cleared")?;
            let left = self.held.backends[slot as usize].left();
            if let Err(crash) = self.step() {
                let half = &mut self.held.backends[slot as usize];
                (half.max_service, half.service) = (left.max_service, *id);
                return Err(crash);
            }
            self.held.backends[slot as usize] = Backend { service: *id, ..left };
            self.unused.insert(slot, self.now);
        }
        Ok(())
    }
}

/// Writes elements that are not as they should be.
fn restore<T: bytemuck::Pod + PartialEq>(array: &mut Vec<T>, elements: &[(u32, T)]) -> anyhow::Result<()> {
    for (index, element) in elements {
        let index = *index as usize;
        if array.len() <= index {
            array.resize(index + 1, T::zeroed());
        }
        ensure!(array[index] != *element, "element {index} is as it should be");
        array[index] = *element;
    }
    Ok(())
}

/// The index behind an entry's last one; maps made up by a test may hold anything.
fn end_of(entry: &SvcEntry) -> u32 {
    entry.first.saturating_add(entry.count)
}

impl Maps for MemoryMaps {
    fn snapshot(&self) -> anyhow::Result<Snapshot> {
        let mut held = self.held.clone();
        // As of the kernel's arrays, no more is read than up to the last word that was ever written.
        let end = held.tables.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1);
        held.tables.truncate(end);
        Ok(held)
    }

    fn apply(&mut self, writes: &[Write]) -> anyhow::Result<()> {
        let clients = Clients::new(&self.held, writes, self.range_room);
        for write in writes {
            match write {
                Write::Backends { .. }
                | Write::BackendIds { .. }
                | Write::EndBackends { .. }
                | Write::ClearBackends { .. } => {}
                _ => self.step()?,
            }
            match write {
                Write::Backends { backends } => self.store(backends)?,
                Write::BackendIds { first, ids } => self.store_ids(*first, ids)?,
                Write::ClearBackends { ids } => self.clear(ids)?,
                Write::RestoreBackends { slots } => restore(&mut self.held.backends, slots)?,
                Write::RestoreIds { ids } => restore(&mut self.held.ids, ids)?,
                Write::MaglevTable { unit, words } => self.store_table(*unit, words)?,
                Write::RestoreTables { words } => restore(&mut self.held.tables, words)?,
                Write::PutService { key, entry } => self.put(*key, *entry)?,
                Write::DeleteService { key } => self.delete(*key)?,
                Write::PutPeer { prefix, peer } => {
                    let of_family = |other: &&IpNet| other.addr().is_ipv4() == prefix.addr().is_ipv4();
                    // Before Linux 6.13 a full trie refuses to replace a value, too.
                    let is_full = self.held.peers.keys().filter(of_family).count() as u32 >= self.room.1;
                    ensure!(!is_full, "peer {prefix} does not fit: the map is full ({} entries)", self.room.1);
                    if self.held.peers.insert(*prefix, *peer) == Some(*peer) {
                        bail!("peer {prefix} is written, but it is there already");
                    }
                }
                Write::DeletePeer { prefix } => {
                    ensure!(self.held.peers.remove(prefix).is_some(), "peer {prefix} is deleted, but it is not there");
                }
                Write::PutSourceRange { range } => {
                    let is_full = self.held.source_ranges.len() as u32 >= self.range_room;
                    ensure!(!is_full, "{range} does not fit: the map is full ({} entries)", self.range_room);
                    let old = self.held.source_ranges.insert(*range, ALLOWED);
                    ensure!(old != Some(ALLOWED), "{range} is written, but it is there already");
                }
                Write::DeleteSourceRange { range } => {
                    let was = self.held.source_ranges.remove(range).is_some();
                    ensure!(was, "{range} is deleted, but it is not there");
                }
                Write::EndBackends { ids } => self.end(ids)?,
            }
            clients.check(&self.held).with_context(|| format!("{write:?}"))?;
        }
        Ok(())
    }

    fn backend_capacity(&self) -> u32 {
        self.capacity
    }

    fn table_capacity(&self) -> u32 {
        self.table_words
    }

    fn service_capacity(&self) -> u32 {
        self.room.0
    }

    fn peer_capacity(&self) -> u32 {
        self.room.1
    }

    fn source_range_capacity(&self) -> u32 {
        self.range_room
    }
}

#[cfg(test)]
mod tests {
    use super::{Backend, GRACE, MemoryMaps, SvcEntry, VipKey, Write, id};
    use crate::model::build::ip;
    use crate::plan::{Maps, SourceRange};
    use rustnet_common::service::flags::SOURCE_RANGES;
    use std::time::Duration;

    fn backend(slot: u32, generation: u32, service: u32) -> Backend {
        let addr = ip("10.244.1.2").into();
        Backend { addr, port: 8080, flags: 0, id: id::make(slot, generation), service, max_service: service }
    }

    fn store(backend: Backend) -> Write {
        Write::Backends { backends: vec![backend] }
    }

    fn range(first: u32, slots: &[u32]) -> Write {
        Write::BackendIds { first, ids: slots.iter().map(|slot| id::make(*slot, 1)).collect() }
    }

    fn put(port: u16, first: u32, count: u32, id: u32) -> Write {
        let key = VipKey { ip: ip("10.96.0.1"), port, proto: 6, scope: 0 };
        Write::PutService { key, entry: SvcEntry { first, count, id, affinity: 0, flags: 0, table: 0 } }
    }

    fn clear(slot: u32) -> Write {
        Write::ClearBackends { ids: vec![id::make(slot, 1)] }
    }

    /// One service with two backends, and a third that nothing leads to.
    fn maps() -> MemoryMaps {
        let mut maps = MemoryMaps::new(16);
        let backends = [0, 1, 2].map(|slot| backend(slot, 1, 1));
        maps.apply(&[Write::Backends { backends: backends.to_vec() }, range(0, &[0, 1]), put(80, 0, 2, 1)]).unwrap();
        maps
    }

    #[test]
    fn orders_that_would_hurt_a_reader_are_refused() {
        for (write, why) in [
            (range(4, &[3]), "before its backend"),
            (range(1, &[2]), "while 10.96.0.1:80/TCP leads there"),
            (put(80, 4, 1, 1), "of no backend of it"),
            (put(81, 0, 1, 1), "share a range"),
            (put(81, 0, 1, 2), "of no backend of it"),
            (clear(0), "while an entry leads there"),
            (clear(3), "it is free"),
            (store(Backend { port: 1, ..backend(0, 1, 1) }), "in use"),
            (store(backend(0, 2, 1)), "in use"),
            (store(backend(0, 1, 1)), "holds that already"),
            (store(backend(3, 2, 1)), "gets the id"),
            (store(backend(16, 1, 1)), "exceeds the array"),
        ] {
            let error = maps().apply(std::slice::from_ref(&write)).unwrap_err().to_string();
            assert!(error.contains(why), "{write:?}: {error}");
        }
    }

    #[test]
    fn orders_that_would_hurt_clients_are_refused() {
        let key = VipKey { ip: ip("203.0.113.7"), port: 80, proto: 6, scope: 1 };
        let range = |clients: &str| SourceRange { key, clients: clients.parse().unwrap() };
        let (office, home) = (range("192.0.2.0/24"), range("198.51.100.0/24"));
        let entry = |flags, id| Write::PutService {
            key,
            entry: SvcEntry { first: 0, count: 0, id, affinity: 0, flags, table: 0 },
        };
        let (open, closed, others) = (entry(0, 1), entry(SOURCE_RANGES, 1), entry(SOURCE_RANGES, 2));
        let (put, delete) = (|range| Write::PutSourceRange { range }, |range| Write::DeleteSourceRange { range });
        for (held, writes, why) in [
            (vec![open.clone()], [closed.clone(), put(office)], "192.0.2.0 is refused"),
            (vec![closed.clone(), put(office)], [delete(office), open.clone()], "192.0.2.0 is refused"),
            (vec![closed.clone(), put(office)], [delete(office), put(range("192.0.2.0/28"))], "192.0.2.0 is refused"),
            (vec![closed.clone(), put(office)], [put(home), others.clone()], "198.51.100.0 gets through"),
            (vec![closed.clone(), put(office)], [others, delete(office)], "192.0.2.0 gets through"),
        ] {
            let mut maps = MemoryMaps::new(16);
            maps.apply(&held).unwrap();
            let error = format!("{:#}", maps.apply(&writes).unwrap_err());
            assert!(error.contains(why), "{writes:?}: {error}");
        }
    }

    #[test]
    fn what_was_let_go_of_rests_before_it_is_cleared_and_before_it_is_written() {
        let mut maps = maps();
        let mut at = |now: Duration, write: Write| {
            maps.set_now(now);
            maps.apply(&[write]).map_err(|error| error.to_string())
        };
        at(Duration::ZERO, range(2, &[1, 2])).unwrap();
        at(Duration::ZERO, put(80, 2, 2, 1)).unwrap();
        let short = GRACE * 99 / 100;
        assert!(at(short, range(0, &[2])).unwrap_err().contains("too soon"));
        assert!(at(short, clear(0)).unwrap_err().contains("cleared too soon"));
        at(GRACE, range(0, &[2])).unwrap();
        at(GRACE, clear(0)).unwrap();
        assert!(at(GRACE + short, store(backend(0, 2, 1))).unwrap_err().contains("written too soon"));
        assert!(at(2 * GRACE, store(backend(0, 1, 1))).unwrap_err().contains("gets the id"));
        at(2 * GRACE, store(backend(0, 2, 1))).unwrap();
    }
}
