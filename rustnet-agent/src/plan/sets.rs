//! Sets of backends: written once, and shared by all entries that lead to the same endpoints. A set has the number that its
//! backends bear, a range of ids, and lives for as long as an entry leads there.
//!
//! A range of ids is never rewritten while an entry points to it: a change writes a new range, and all entries of the set flip
//! to it in the same plan. Of a backend that an entry leads to only the flags ever change.

use super::flows::Flows;
use super::ids::Ids;
use super::ranges::Ranges;
use super::slots::Slots;
use super::tables::Tables;
use super::{GRACE, VipKey, Write};
use crate::index::{BackendSet, Choice, DesiredBackend};
use rustnet_common::addr::Addr;
use rustnet_common::backend::{Backend, flags, id};
use rustnet_common::service::SvcEntry;
use rustnet_common::tuple::proto::UDP;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::time::Duration;

/// A range of `rn_backend_ids`, and the table that spreads flows over it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// Index of the first id.
    pub first: u32,
    /// Ids.
    pub count: u32,
    /// Unit that the Maglev table begins with; 0 for none.
    pub table: u16,
}

impl Span {
    /// The range of an entry.
    pub fn of(entry: &SvcEntry) -> Self {
        Self { first: entry.first, count: entry.count, table: entry.table }
    }
}

/// A set that entries lead to.
#[derive(Debug, Default)]
struct Set {
    /// `None`: it was read back, and no entry of it has been planned yet.
    name: Option<BackendSet>,
    span: Span,
    users: Vec<VipKey>,
}

/// What became free with time.
#[derive(Clone, Copy, Debug)]
pub struct Freed {
    /// Ranges or slots.
    pub any: bool,
    /// Room for Maglev tables.
    pub tables: bool,
}

/// Where an entry is to lead.
#[derive(Debug, Default)]
pub struct Led {
    /// Number of the set.
    pub number: u32,
    /// Its range.
    pub span: Span,
    /// It has another range or table than before, and other entries have to follow.
    pub has_moved: bool,
    /// Why it has no table, though it should.
    pub without_table: Option<String>,
}

/// All sets, `rn_backends_v2` and `rn_backend_ids`.
#[derive(Debug)]
pub struct Sets {
    by_number: HashMap<u32, Set>,
    by_name: HashMap<BackendSet, u32>,
    numbers: Ids,
    /// Elements of each of the two arrays.
    capacity: u32,
    /// `rn_backend_ids`, and who has which range of it.
    ids: Vec<u32>,
    ranges: Ranges,
    /// `rn_backends_v2`.
    slots: Slots,
    tables: Tables,
    flows: Flows,
}

/// Writes of one plan.
#[derive(Debug, Default)]
pub struct BackendWrites {
    /// Come before the entries that lead there.
    pub puts: Vec<Write>,
    /// Backends whose flows end once no entry leads there.
    pub ended: Vec<u32>,
}

impl Sets {
    /// Begins with what the arrays hold; numbers go on after the last. Entries are adopted next.
    pub fn new(ids: Vec<u32>, backends: Vec<Backend>, capacity: u32, tables: Tables, last_number: u32) -> Self {
        Self {
            by_number: HashMap::new(),
            by_name: HashMap::new(),
            numbers: Ids::after(last_number),
            capacity,
            ids,
            ranges: Ranges::new(capacity, GRACE),
            slots: Slots::new(backends, capacity, GRACE),
            tables,
            flows: Flows::default(),
        }
    }

    /// The ranges, for those that take damaged entries apart.
    pub fn ranges(&mut self) -> &mut Ranges {
        &mut self.ranges
    }

    /// `rn_backends_v2`, once all writes are applied.
    pub fn all(&self) -> &[Backend] {
        self.slots.all()
    }

    /// `rn_backend_ids`, likewise.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// The Maglev tables.
    pub fn tables(&mut self) -> &mut Tables {
        &mut self.tables
    }

    /// Elements of each array.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Time passes.
    pub fn tick(&mut self, now: Duration) -> Freed {
        let tables = self.tables.tick(now);
        Freed { any: self.ranges.tick(now) | self.slots.tick(now), tables }
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
            times.push(self.tables.next_release(now));
        }
        times.into_iter().flatten().min()
    }

    /// A set was read back, in whose range an entry has found its own backends; or there is one already that has this number
    /// and range. False: it is another one.
    pub fn adopt(&mut self, key: VipKey, entry: &SvcEntry, is_sound: impl FnOnce(&mut Ranges) -> bool) -> bool {
        let mut span = if entry.count == 0 { Span::default() } else { Span::of(entry) };
        if let Some(set) = self.by_number.get_mut(&entry.id) {
            // An entry without its set's table follows the set.
            let is_same = Span { table: 0, ..set.span } == Span { table: 0, ..span };
            set.users.extend(is_same.then_some(key));
            if set.span.table != span.table {
                self.tables.hold(span.table);
            }
            return is_same;
        }
        let is_sound = is_sound(&mut self.ranges);
        if is_sound {
            // One that leads to no table gets another value with the first plan.
            span.table = if self.tables.adopt(span.table) { span.table } else { 0 };
            self.by_number.insert(entry.id, Set { name: None, span, users: vec![key] });
        } else {
            self.tables.hold(span.table);
        }
        is_sound
    }

    /// A backend was read back that no entry leads to. Its set may have let it linger; else its flows are to end,
    /// which gives its id, or that of the one whose place it has.
    pub fn adopt_stray(&mut self, slot: u32, backend: &Backend) -> Option<u32> {
        let user = self.by_number.get(&backend.service).and_then(|set| set.users.first());
        if id::slot_of(backend.id) != slot || backend.flags & flags::ENDED != 0 {
            self.slots.leave(slot);
            return None;
        }
        match user {
            Some(user) if user.proto == UDP => {
                self.flows.found(backend.service, (backend.addr, backend.port), backend.id)
            }
            Some(_) => {
                self.slots.leave(slot);
                None
            }
            None => Some(backend.id),
        }
    }

    /// Brings a set to a choice for one of its entries, which has a set already if it is `held` by one.
    ///
    /// # Errors
    /// It does not fit, and nothing has changed; `had` tells whether the entry leads anywhere.
    pub fn lead(
        &mut self,
        key: VipKey,
        held: Option<u32>,
        name: BackendSet,
        choice: &Choice,
        had: bool,
        writes: &mut BackendWrites,
    ) -> Result<Led, String> {
        let backends = &choice.backends;
        let held = held.filter(|number| self.by_number.get(number).is_some_and(|set| set.users.contains(&key)));
        // A set that was read back, or that nothing else uses, follows its entry: flows to a backend that stays go on.
        let is_free =
            |number: &u32| self.by_number.get(number).is_some_and(|set| set.name.is_none() || set.users == [key]);
        let known = self.by_name.get(&name).copied().or_else(|| held.filter(is_free));
        let old = known.and_then(|number| self.by_number.get(&number)).map(|set| set.span);
        let same = old.filter(|span| self.leads_to(*span, backends));
        let mut span = match same {
            Some(span) => span,
            None => self.reserve(key, known, old, backends, had)?,
        };
        let number = known.unwrap_or_else(|| self.numbers.take(|| self.by_number.keys().copied().collect()));
        match same {
            Some(span) => self.write_flags(span, backends, writes),
            None => self.write(number, key.proto == UDP, old, span, backends, writes),
        }
        if key.proto == UDP {
            let gone = self.flows.settle(number, choice);
            self.end(gone, writes);
        }
        let addresses = backends.iter().map(|backend| backend.addr);
        let table = self.tables.lead(old.map_or(0, |span| span.table), choice.table_size, addresses, &mut writes.puts);
        span.table = *table.as_ref().unwrap_or(&0);
        let set = self.by_number.entry(number).or_default();
        set.span = span;
        let has_moved = old != Some(span) && set.users.iter().any(|user| *user != key);
        if !set.users.contains(&key) {
            set.users.push(key);
        }
        if set.name.as_ref() != Some(&name) {
            if let Some(before) = set.name.replace(name.clone()) {
                self.by_name.remove(&before);
            }
            self.by_name.insert(name, number);
        }
        if let Some(before) = held.filter(|before| *before != number) {
            self.unuse(&key, before, writes);
        }
        Ok(Led { number, span, has_moved, without_table: table.err() })
    }

    /// The range of a set, and all entries that lead there.
    pub fn users(&self, number: u32) -> (Span, &[VipKey]) {
        self.by_number.get(&number).map_or((Span::default(), &[]), |set| (set.span, &set.users))
    }

    /// An entry leads to a set no more. The last one lets go of all that the set has.
    pub fn unuse(&mut self, key: &VipKey, number: u32, writes: &mut BackendWrites) {
        let Some(set) = self.by_number.get_mut(&number).filter(|set| set.users.contains(key)) else { return };
        set.users.retain(|user| user != key);
        let ids = range(&self.ids, set.span).to_vec();
        if !set.users.is_empty() {
            // Programs find out within a second that flows of UDP have lost this entry.
            return;
        }
        let (span, name) = (set.span, set.name.take());
        self.by_number.remove(&number);
        self.tables.leave(span.table);
        if let Some(name) = name {
            self.by_name.remove(&name);
        }
        let lingering = self.flows.take(number);
        self.end(lingering.into_values(), writes);
        self.release(key, [(span.first, span.count)], ids, writes);
    }

    /// Takes a range for these backends.
    ///
    /// # Errors
    /// They do not fit; `had` tells whether the service has others.
    fn reserve(
        &mut self,
        key: VipKey,
        number: Option<u32>,
        old: Option<Span>,
        backends: &[DesiredBackend],
        had: bool,
    ) -> Result<Span, String> {
        if backends.is_empty() {
            return Ok(Span::default());
        }
        self.check_slots(key, number, old, backends, had)?;
        let count = backends.len() as u32;
        let first = self.ranges.alloc(count).ok_or_else(|| self.no_range(key, count, had))?;
        Ok(Span { first, count, table: 0 })
    }

    /// The backends of a set stay; their flags may be others.
    fn write_flags(&mut self, span: Span, backends: &[DesiredBackend], writes: &mut BackendWrites) {
        let mut changed = Vec::new();
        for (id, desired) in range(&self.ids, span).iter().zip(backends) {
            if self.slots.backend(*id).is_some_and(|backend| backend.flags != desired.flags) {
                changed.extend(self.slots.set_flags(*id, desired.flags));
            }
        }
        if !changed.is_empty() {
            writes.puts.push(Write::Backends { backends: changed });
        }
    }

    /// Writes backends and a new range of ids, in which a backend that the old one had too keeps its id, and lets go of the old
    /// one.
    fn write(
        &mut self,
        number: u32,
        is_udp: bool,
        old: Option<Span>,
        span: Span,
        backends: &[DesiredBackend],
        writes: &mut BackendWrites,
    ) {
        // One that lingered has flows by the id it had.
        let mut known = if is_udp { self.flows.take(number) } else { BTreeMap::new() };
        let mut gone = Vec::new();
        for id in old.iter().flat_map(|span| range(&self.ids, *span)) {
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
                self.slots.add(Backend { addr, port, flags, id: 0, service: number, max_service: 0 })
            {
                ids.push(backend.id);
                written.push(backend);
            }
        }
        debug_assert_eq!(ids.len(), backends.len(), "there was room");
        if is_udp {
            self.flows.leave(number, known);
            self.end(gone, writes);
        } else {
            self.leave(known.into_values().chain(gone));
        }
        if let Some(span) = old {
            self.ranges.retire(span.first, span.count);
        }
        if !written.is_empty() {
            writes.puts.push(Write::Backends { backends: written });
        }
        if !ids.is_empty() {
            let at = span.first as usize..span.first as usize + ids.len();
            if self.ids.len() < at.end {
                self.ids.resize(at.end, 0);
            }
            self.ids[at].copy_from_slice(&ids);
            writes.puts.push(Write::BackendIds { first: span.first, ids });
        }
    }

    /// The flows of these backends end, and their slots are free.
    pub fn end(&mut self, gone: impl IntoIterator<Item = u32>, writes: &mut BackendWrites) {
        for id in gone {
            writes.ended.extend(self.slots.end(id).then_some(id));
            self.slots.leave(id::slot_of(id));
        }
    }

    /// The slots of these backends are free, flows to them go on.
    fn leave(&mut self, gone: impl IntoIterator<Item = u32>) {
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
            self.end(backends, writes);
        } else {
            self.leave(backends);
        }
    }

    /// True if a range leads to these addresses and ports, in this order.
    fn leads_to(&self, span: Span, backends: &[DesiredBackend]) -> bool {
        span.count as usize == backends.len()
            && range(&self.ids, span).iter().zip(backends).all(|(id, desired)| {
                let backend = self.slots.backend(*id);
                backend.is_some_and(|b| b.port == desired.port && IpAddr::from(b.addr) == desired.addr)
            })
    }

    /// Refuses a set of backends of which the new ones do not all get a slot.
    fn check_slots(
        &self,
        key: VipKey,
        number: Option<u32>,
        old: Option<Span>,
        backends: &[DesiredBackend],
        had: bool,
    ) -> Result<(), String> {
        let (free, waiting) = (self.slots.room(), self.slots.waiting());
        if backends.len() <= free as usize {
            return Ok(());
        }
        let lingering = number.into_iter().flat_map(|number| self.flows.of(number));
        let had_ids = old.iter().flat_map(|span| range(&self.ids, *span)).chain(lingering);
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

/// The ids in a range; none if it is out of bounds.
fn range(ids: &[u32], span: Span) -> &[u32] {
    let first = span.first as usize;
    ids.get(first..first + span.count as usize).unwrap_or_default()
}
