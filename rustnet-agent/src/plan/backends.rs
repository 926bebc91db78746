//! Backends and the ranges of ids that lead to them: what an entry's backends are, and which flows go on to those that it has
//! no more.
//!
//! A range of ids is never rewritten while an entry points to it: a change writes a new range, and the entry flips to it. Of a
//! backend that an entry leads to only the flags ever change.

use super::flows::Flows;
use super::ranges::Ranges;
use super::slots::Slots;
use super::{GRACE, VipKey, Write};
use crate::index::{Choice, DesiredBackend};
use rustnet_common::addr::Addr;
use rustnet_common::backend::{Backend, id};
use rustnet_common::service::SvcEntry;
use rustnet_common::tuple::proto::UDP;
use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::time::Duration;

/// `rn_backends_v2` and `rn_backend_ids`.
#[derive(Debug)]
pub struct Backends {
    /// Elements of each of the two.
    capacity: u32,
    /// `rn_backend_ids`, and who has which range of it.
    ids: Vec<u32>,
    ranges: Ranges,
    /// `rn_backends_v2`.
    slots: Slots,
    flows: Flows,
}

/// Writes of one plan.
#[derive(Debug, Default)]
pub struct BackendWrites {
    /// Come before the entries that lead there.
    pub puts: Vec<Write>,
    /// Backends whose flows are to be forgotten once no entry leads there.
    pub forget: Vec<u32>,
}

impl Backends {
    /// Begins with what the arrays hold. `ranges` has been claimed by those who have them.
    pub fn new(ids: Vec<u32>, ranges: Ranges, slots: Slots, capacity: u32) -> Self {
        Self { capacity, ids, ranges, slots, flows: Flows::default() }
    }

    /// `rn_backends_v2`, once all writes are applied.
    pub fn all(&self) -> &[Backend] {
        self.slots.all()
    }

    /// `rn_backend_ids`, likewise.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Elements of each array.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// What a slot holds.
    pub fn get(&self, slot: u32) -> Option<&Backend> {
        self.slots.get(slot)
    }

    /// The ids in an entry's range; none if it is out of bounds.
    pub fn range(&self, entry: &SvcEntry) -> &[u32] {
        range(&self.ids, entry)
    }

    /// Time passes. True if ranges or slots became free.
    pub fn tick(&mut self, now: Duration) -> bool {
        self.ranges.tick(now) | self.slots.tick(now)
    }

    /// Clears slots that nothing leads to any more.
    pub fn clear(&mut self, now: Duration) -> Option<Write> {
        let ids = self.slots.clear(now);
        (!ids.is_empty()).then_some(Write::ClearBackends { ids })
    }

    /// When slots are to be cleared; or, for those who wait for room, when some is free.
    pub fn next_time(&self, now: Duration, is_waited_for: bool) -> Option<Duration> {
        let mut times = vec![self.slots.next_clear(now)];
        if is_waited_for {
            let released = || self.ranges.next_release().unwrap_or(now + GRACE);
            times.push((self.ranges.held() > 0).then(released));
            times.push(self.slots.next_free(now));
        }
        times.into_iter().flatten().min()
    }

    /// A backend was read back that its service does not lead to: it lingers. Gives the one that had its place.
    pub fn found(&mut self, key: VipKey, backend: &Backend) -> Option<u32> {
        self.flows.found(key, (backend.addr, backend.port), backend.id)
    }

    /// Takes a range for these backends.
    ///
    /// # Errors
    /// They do not fit; `had` tells whether the service has others.
    pub fn reserve(
        &mut self,
        key: VipKey,
        old: Option<&SvcEntry>,
        backends: &[DesiredBackend],
        had: bool,
    ) -> Result<u32, String> {
        if backends.is_empty() {
            return Ok(0);
        }
        self.check_slots(key, old, backends, had)?;
        let count = backends.len() as u32;
        self.ranges.alloc(count).ok_or_else(|| self.no_range(key, count, had))
    }

    /// The backends of an entry stay; their flags may be others.
    pub fn write_flags(&mut self, entry: &SvcEntry, backends: &[DesiredBackend], writes: &mut BackendWrites) {
        let mut changed = Vec::new();
        for (id, desired) in range(&self.ids, entry).iter().zip(backends) {
            if self.slots.backend(*id).is_some_and(|backend| backend.flags != desired.flags) {
                changed.extend(self.slots.set_flags(*id, desired.flags));
            }
        }
        if !changed.is_empty() {
            writes.puts.push(Write::Backends { backends: changed });
        }
    }

    /// Writes the backends and the range of ids of a new entry, in which a backend that the old one
    /// had too keeps its id, and lets go of the old one's.
    pub fn write(
        &mut self,
        key: VipKey,
        old: Option<SvcEntry>,
        entry: &SvcEntry,
        backends: &[DesiredBackend],
        writes: &mut BackendWrites,
    ) {
        // One that lingered has flows by the id it had.
        let is_udp = key.proto == UDP;
        let mut known = if is_udp { self.flows.take(&key) } else { BTreeMap::new() };
        let mut gone = Vec::new();
        for id in old.iter().flat_map(|entry| range(&self.ids, entry)) {
            if let Some(b) = self.slots.backend(*id) {
                gone.extend(known.insert((b.addr, b.port), *id));
            }
        }
        let mut written = Vec::new();
        let mut ids = Vec::with_capacity(backends.len());
        for &DesiredBackend { addr, port, flags } in backends {
            let addr = Addr::from(addr);
            if let Some(id) = known.remove(&(addr, port)) {
                ids.push(id);
                if self.slots.backend(id).is_some_and(|backend| backend.flags != flags) {
                    written.extend(self.slots.set_flags(id, flags));
                }
            } else if let Some(backend) =
                self.slots.add(Backend { addr, port, flags, id: 0, service: entry.id, max_service: 0 })
            {
                ids.push(backend.id);
                written.push(backend);
            }
        }
        debug_assert_eq!(ids.len(), backends.len(), "there was room");
        if is_udp {
            self.flows.leave(key, known);
            self.forget(gone, writes);
        } else {
            self.leave(known.into_values().chain(gone));
        }
        if let Some(entry) = old {
            self.ranges.retire(entry.first, entry.count);
        }
        if !written.is_empty() {
            writes.puts.push(Write::Backends { backends: written });
        }
        if !ids.is_empty() {
            let at = entry.first as usize..entry.first as usize + ids.len();
            if self.ids.len() < at.end {
                self.ids.resize(at.end, 0);
            }
            self.ids[at].copy_from_slice(&ids);
            writes.puts.push(Write::BackendIds { first: entry.first, ids });
        }
    }

    /// A service has this choice now: flows to what serves it no more are to be forgotten.
    pub fn settle(&mut self, key: VipKey, choice: &Choice, writes: &mut BackendWrites) {
        if key.proto == UDP {
            let gone = self.flows.settle(key, choice);
            self.forget(gone, writes);
        }
    }

    /// A service goes, and with it what lingers for it.
    pub fn let_go(&mut self, key: &VipKey, writes: &mut BackendWrites) {
        let lingering = self.flows.take(key);
        self.forget(lingering.into_values(), writes);
    }

    /// The flows of these backends are to be forgotten, and their slots are free.
    pub fn forget(&mut self, gone: impl IntoIterator<Item = u32>, writes: &mut BackendWrites) {
        for id in gone {
            writes.forget.push(id);
            self.slots.leave(id::slot_of(id));
        }
    }

    /// The slots of these backends are free, flows to them go on.
    pub fn leave(&mut self, gone: impl IntoIterator<Item = u32>) {
        for id in gone {
            self.slots.leave(id::slot_of(id));
        }
    }

    /// No entry has this any more.
    pub fn release(
        &mut self,
        key: &VipKey,
        ranges: impl IntoIterator<Item = (u32, u32)>,
        backends: Vec<u32>,
        writes: &mut BackendWrites,
    ) {
        ranges.into_iter().for_each(|(first, len)| self.ranges.retire(first, len));
        if key.proto == UDP {
            // Else a service that comes back at this address would find flows to whatever served it
            // then.
            self.forget(backends, writes);
        } else {
            self.leave(backends);
        }
    }

    /// True if an entry leads to these addresses and ports, in this order.
    pub fn leads_to(&self, entry: &SvcEntry, backends: &[DesiredBackend]) -> bool {
        entry.count as usize == backends.len()
            && range(&self.ids, entry).iter().zip(backends).all(|(id, desired)| {
                let backend = self.slots.backend(*id);
                backend.is_some_and(|b| b.port == desired.port && IpAddr::from(b.addr) == desired.addr)
            })
    }

    /// Refuses a set of backends of which the new ones do not all get a slot.
    fn check_slots(
        &self,
        key: VipKey,
        old: Option<&SvcEntry>,
        backends: &[DesiredBackend],
        had: bool,
    ) -> Result<(), String> {
        let (free, waiting) = (self.slots.room(), self.slots.waiting());
        if backends.len() <= free as usize {
            return Ok(());
        }
        let had_ids = old.iter().flat_map(|entry| range(&self.ids, entry)).chain(self.flows.of(&key));
        let known: HashSet<(Addr, u16)> =
            had_ids.filter_map(|id| self.slots.backend(*id)).map(|b| (b.addr, b.port)).collect();
        let new = backends.iter().filter(|b| !known.contains(&(Addr::from(b.addr), b.port))).count();
        if new <= free as usize {
            return Ok(());
        }
        Err(format!(
            "{key} needs {new} slots in rn_backends_v2, of {} there are {free} free and {waiting} about to be: {}; raise \
             backend-entries",
            self.capacity,
            outcome(had)
        ))
    }

    fn no_range(&self, key: VipKey, count: u32, had: bool) -> String {
        let ((free, longest), held) = (self.ranges.room(), self.ranges.held());
        format!(
            "{key} needs {count} slots next to each other in rn_backend_ids, of {} there are {free} free (longest run {longest}) \
             and {held} about to be: {}; raise backend-entries",
            self.capacity,
            outcome(had)
        )
    }
}

/// What becomes of a service that does not fit.
fn outcome(had: bool) -> &'static str {
    if had { "its last good backends stay" } else { "it is left out" }
}

/// The ids in an entry's range; none if it is out of bounds.
fn range<'a>(ids: &'a [u32], entry: &SvcEntry) -> &'a [u32] {
    let first = entry.first as usize;
    ids.get(first..first + entry.count as usize).unwrap_or_default()
}
