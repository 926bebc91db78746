//! Service entries: which of them the maps hold, and the range of backends that each leads to.
//!
//! Order: the backends of an entry, the entry, wildcard entries; deletions the other way round. A wildcard refuses every port
//! of its address that has no entry.

mod adopt;

use super::audit::{Progress, Repair};
use super::sets::{BackendWrites, Led, Sets, Span};
use super::{Snapshot, VipKey, Write};
use crate::index::{Choice, DesiredService, Index};
use crate::model::Problem;
use rustnet_common::service::{SvcEntry, flags};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

/// What the service maps hold, and the backends.
#[derive(Debug)]
pub struct Services {
    /// Entries that each family's map can hold.
    capacity: u32,
    entries: HashMap<VipKey, SvcEntry>,
    /// Entries in the maps, by family.
    count: [u32; 2],
    /// Entries read back that are not to be trusted: a range out of bounds or shared, ids of no
    /// backend of theirs.
    damaged: BTreeMap<VipKey, Held>,
    sets: Sets,
    /// Backends read back whose service is gone.
    orphans: Vec<u32>,
    /// What did not fit, and why.
    failed: BTreeMap<VipKey, Box<str>>,
    /// What leads to its backends without the Maglev table that it should have, and why.
    without_table: BTreeMap<VipKey, Box<str>>,
    /// What did not fit may fit once the writes of the last plan are applied.
    has_new_room: bool,
}

/// What a damaged entry may lead packets into, and no other entry has: it stays as it is until that
/// entry is replaced.
#[derive(Debug, Default)]
struct Held {
    /// First and length.
    ranges: Vec<(u32, u32)>,
    /// Ids.
    backends: Vec<u32>,
}

/// Writes of one plan, by the place they have in the order.
#[derive(Debug, Default)]
pub struct ServiceWrites {
    /// Of the entry that is being planned; and the backends of all that end once entries are deleted.
    backends: BackendWrites,
    /// Backends and the range of their ids before each entry.
    puts: Vec<Write>,
    /// Sets that have another range now, and other entries than the one that was planned.
    moved: Vec<u32>,
    wildcards: Vec<Write>,
    wildcard_deletes: Vec<Write>,
    deletes: Vec<Write>,
    clear: Option<Write>,
    /// Entries that are deleted, by family. They are in the map until everything else has been put.
    freed: [u32; 2],
}

impl ServiceWrites {
    /// All in order.
    pub fn in_order(self) -> impl Iterator<Item = Write> {
        let mut ids = self.backends.ended;
        ids.sort_unstable();
        let end = (!ids.is_empty()).then_some(Write::EndBackends { ids });
        let puts = self.puts.into_iter().chain(self.wildcards);
        puts.chain(self.wildcard_deletes).chain(self.deletes).chain(end).chain(self.clear)
    }
}

impl Services {
    /// The writes that lead to what the index wants. They are taken as applied. `all` compares everything, not only what
    /// changed.
    pub fn plan(&mut self, index: &mut Index, all: bool, now: Duration) -> ServiceWrites {
        let mut draft = ServiceWrites::default();
        let mut keys = index.take_dirty_services();
        let freed = self.sets.tick(now);
        if freed.any || all || self.has_new_room {
            keys.extend(self.failed.keys());
        }
        if freed.tables || all {
            keys.extend(self.without_table.keys());
        }
        if all {
            keys.extend(index.service_keys());
            keys.extend(self.entries.keys());
        }
        self.plan_keys(keys, index, &mut draft);
        if all {
            let orphans = std::mem::take(&mut self.orphans);
            self.sets.end(orphans, &mut draft.backends);
            self.sets.tables().leave_stale();
        }
        for (count, freed) in self.count.iter_mut().zip(draft.freed) {
            *count -= freed;
        }
        self.has_new_room = draft.freed != [0; 2] && !self.failed.is_empty();
        draft.clear = self.sets.clear(now);
        draft
    }

    /// Time passes, and nothing may be planned yet.
    pub fn tick(&mut self, now: Duration) {
        self.sets.tick(now);
    }

    /// True if a second plan, after the writes of this one, has more to put.
    pub fn waits(&self) -> bool {
        self.has_new_room
    }

    /// When slots are to be cleared, or are free for what did not fit.
    pub fn next_time(&self, now: Duration) -> Option<Duration> {
        self.sets.next_time(now, !self.failed.is_empty() || !self.without_table.is_empty())
    }

    /// Entries that the maps hold.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// The number of the set that an entry leads to, if it asks for the client.
    pub fn judged(&self, key: &VipKey) -> Option<u32> {
        self.entries.get(key).filter(|entry| entry.flags & flags::SOURCE_RANGES != 0).map(|entry| entry.id)
    }

    /// True for an entry that did not fit: it stayed as it was, or away.
    pub fn has_failed(&self, key: &VipKey) -> bool {
        self.failed.contains_key(key)
    }

    /// Entries that did not fit, or did not get their Maglev table, and why.
    pub fn failed(&self) -> impl Iterator<Item = (VipKey, &str)> {
        self.failed.iter().chain(&self.without_table).map(|(key, why)| (*key, &**why))
    }

    /// What did not fit.
    pub fn problems(&self, index: &Index) -> impl Iterator<Item = Problem> {
        self.failed.iter().chain(&self.without_table).map(|(key, message)| {
            let subject: Arc<str> = match index.owner(key) {
                Some((name, port)) if port.name.is_empty() => format!("Service {name}").into(),
                Some((name, port)) => format!("Service {name} port {}", port.name).into(),
                None => format!("{key}").into(),
            };
            Problem::new(&subject, "", message.clone())
        })
    }

    /// Compares both arrays of backends.
    pub fn audit_backends(&self, found: &Snapshot, repair: &mut Repair) {
        repair.arrays(found, self.sets.all(), self.sets.ids(), self.sets.capacity());
    }

    /// Compares words of the Maglev tables that were found from `first` on. Returns whether they are the last.
    pub fn audit_tables(&mut self, first: u32, found: &[u64], repair: &mut Repair) -> bool {
        let tables = self.sets.tables();
        repair.tables(first, found, tables.words());
        first + found.len() as u32 >= tables.capacity()
    }

    /// Compares a piece of a family's map; after the last one also what no piece had, which `look_up` then reads.
    ///
    /// # Errors
    /// Those of `look_up`.
    pub fn audit(
        &self,
        is_v4: bool,
        found: &Snapshot,
        progress: &mut Progress,
        look_up: Option<impl Fn(&VipKey) -> anyhow::Result<Option<SvcEntry>>>,
        repair: &mut Repair,
    ) -> anyhow::Result<()> {
        let is_of_map = |key: &&VipKey| key.ip.is_ipv4() == is_v4;
        progress.note(found.services.keys().filter(|key| self.entries.contains_key(key)).copied());
        for (key, entry) in found.services.iter().filter(|(key, _)| is_of_map(key)) {
            self.compare(*key, Some(*entry), repair);
        }
        if let Some(look_up) = look_up {
            let count = self.count[usize::from(!is_v4)] as usize;
            for key in progress.unseen(count, self.entries.keys().filter(is_of_map)) {
                self.compare(key, look_up(&key)?, repair);
            }
        }
        Ok(())
    }

    /// Compares an entry, unless it is damaged: such a one stays as it is until it is replaced.
    fn compare(&self, key: VipKey, is: Option<SvcEntry>, repair: &mut Repair) {
        if !self.damaged.contains_key(&key) {
            repair.entry(key, is, self.entries.get(&key).copied());
        }
    }

    fn plan_keys(&mut self, mut keys: Vec<VipKey>, index: &Index, draft: &mut ServiceWrites) {
        // Ports before wildcards: what refuses all other ports of an address has to know which of its ports wait.
        keys.sort_unstable_by_key(|key| (key.is_wildcard(), *key));
        keys.dedup();
        let mut choice = Choice::default();
        // Before the sets that they lead to change: an entry that goes leads to its old backends until then.
        for key in keys.extract_if(.., |key| !index.is_desired(key)) {
            self.delete(key, draft);
        }
        for key in keys {
            let Some(desired) = index.desired_service(&key, &mut choice) else { continue };
            let judged = desired.flags & flags::SOURCE_RANGES;
            match self.put(key, desired, &choice, draft) {
                Ok(()) => {
                    self.failed.remove(&key);
                }
                Err(message) => {
                    self.judge(key, judged, draft);
                    self.failed.insert(key, message.into());
                }
            }
        }
        self.follow_sets(draft);
    }

    /// An entry that has no room to change asks for its clients all the same, if it should.
    fn judge(&mut self, key: VipKey, judged: u16, draft: &mut ServiceWrites) {
        if let Some(entry) = self.entries.get_mut(&key).filter(|entry| entry.flags & judged != judged) {
            entry.flags |= judged;
            draft.puts.push(Write::PutService { key, entry: *entry });
        }
    }

    /// Entries flip with their set, also those of which nothing else changed.
    fn follow_sets(&mut self, draft: &mut ServiceWrites) {
        for number in std::mem::take(&mut draft.moved) {
            let (span, users) = self.sets.users(number);
            for key in users {
                if let Some(entry) = self.entries.get_mut(key).filter(|entry| Span::of(entry) != span) {
                    (entry.first, entry.count, entry.table) = (span.first, span.count, span.table);
                    if span.table != 0 {
                        self.without_table.remove(key);
                    }
                    draft.puts.push(Write::PutService { key: *key, entry: *entry });
                }
            }
        }
    }

    fn put(
        &mut self,
        key: VipKey,
        desired: DesiredService,
        choice: &Choice,
        draft: &mut ServiceWrites,
    ) -> Result<(), String> {
        let old = self.entries.get(&key).copied();
        let family = usize::from(key.ip.is_ipv6());
        let is_full = self.count[family] >= self.capacity;
        if old.is_none() && (is_full || self.waits_for_port(&key, draft)) {
            let full = self.capacity;
            return Err(format!(
                "all {full} entries of the service map are taken, it is left out; raise service-entries"
            ));
        }
        let trusted = old.filter(|_| !self.damaged.contains_key(&key)).map(|entry| entry.id);
        let Led { number, span, has_moved, without_table } = match desired.set {
            Some(name) => self.sets.lead(key, trusted, name, choice, old.is_some(), &mut draft.backends)?,
            None => Led::default(),
        };
        draft.puts.append(&mut draft.backends.puts);
        self.release_damaged(&key, draft);
        draft.moved.extend(has_moved.then_some(number));
        match without_table {
            Some(why) => {
                self.without_table.insert(key, format!("{key} {why}; until then its flows are spread at random").into())
            }
            None => self.without_table.remove(&key),
        };
        let Span { first, count, table } = span;
        let entry = SvcEntry { first, count, id: number, affinity: desired.affinity, flags: desired.flags, table };
        if old == Some(entry) {
            return Ok(());
        }
        if self.entries.insert(key, entry).is_none() {
            self.count[family] += 1;
        }
        let writes = if key.is_wildcard() { &mut draft.wildcards } else { &mut draft.puts };
        writes.push(Write::PutService { key, entry });
        Ok(())
    }

    /// True for a wildcard entry of which a port comes only with the next plan: until then it would refuse that port.
    fn waits_for_port(&self, key: &VipKey, draft: &ServiceWrites) -> bool {
        let mut of_address = self.failed.range(VipKey::wildcard(key.ip)..).take_while(|(other, _)| other.ip == key.ip);
        key.is_wildcard()
            && draft.freed[usize::from(key.ip.is_ipv6())] > 0
            && of_address.any(|(other, _)| !other.is_wildcard())
    }

    fn delete(&mut self, key: VipKey, draft: &mut ServiceWrites) {
        self.failed.remove(&key);
        self.without_table.remove(&key);
        let Some(entry) = self.entries.remove(&key) else {
            return;
        };
        draft.freed[usize::from(key.ip.is_ipv6())] += 1;
        if !self.release_damaged(&key, draft) {
            self.sets.unuse(&key, entry.id, &mut draft.backends);
        }
        let writes = if key.is_wildcard() { &mut draft.wildcard_deletes } else { &mut draft.deletes };
        writes.push(Write::DeleteService { key });
    }

    /// An entry that was damaged is replaced or deleted. False if it was not.
    fn release_damaged(&mut self, key: &VipKey, draft: &mut ServiceWrites) -> bool {
        let Some(Held { ranges, backends }) = self.damaged.remove(key) else {
            return false;
        };
        self.sets.release(key, ranges, backends, &mut draft.backends);
        true
    }
}
