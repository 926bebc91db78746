//! The plan: what the maps hold, compared with what the index wants.
//!
//! Order of writes: peers; each service's backends, then the range of their ids, then its entry;
//! wildcard entries; deletions the other way round, a backend's value no sooner than a grace period
//! after; and before the peers' deletions the flows to forget, as by then no packet makes them
//! again. A range of ids is never rewritten while an entry points to it: a change writes a new
//! range and flips the entry. Of a backend that an entry leads to only the flags ever change.

use super::audit::{Difference, Progress, Repair};
use super::flows::Flows;
use super::ids::Ids;
use super::peers::{PeerWrites, Peers};
use super::ranges::Ranges;
use super::slots::Slots;
use super::{Maps, Snapshot, Table, VipKey, Write};
use crate::index::{Choice, DesiredBackend, DesiredService, Index};
use crate::model::Problem;
use ipnet::IpNet;
use rustnet_common::addr::Addr;
use rustnet_common::backend::{Backend, id};
use rustnet_common::peer::Peer;
use rustnet_common::service::SvcEntry;
use rustnet_common::tuple::proto::UDP;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

/// How long what is freed waits before it is written again, and a backend before its slot is
/// cleared. A program that read the old entry is done with it in microseconds; this also covers one
/// that was interrupted.
pub const GRACE: Duration = Duration::from_millis(100);

/// What to do next.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The writes, in order.
    pub writes: Vec<Write>,
    /// Something waits for this time: plan again then, even if no event came.
    pub retry_at: Option<Duration>,
}

/// What the maps hold, and all that is needed to go on from there.
#[derive(Debug)]
pub struct Planner {
    services: HashMap<VipKey, SvcEntry>,
    /// Entries read back that are not to be trusted: a range out of bounds or shared, ids of no
    /// backend of theirs.
    damaged: BTreeMap<VipKey, Held>,
    /// `rn_backend_ids`, and who has which range of it.
    ids: Vec<u32>,
    ranges: Ranges,
    /// `rn_backends_v2`.
    slots: Slots,
    service_ids: Ids,
    peers: Peers,
    flows: Flows,
    /// Backends read back whose service is gone.
    orphans: Vec<u32>,
    /// What did not fit, and why.
    failed: BTreeMap<VipKey, Box<str>>,
    /// What did not fit may fit once the writes of the last plan are applied.
    has_new_room: bool,
    /// Entries in the maps, by family.
    count: [u32; 2],
    room: Capacity,
    audit: Progress,
    /// Compare everything, not only what changed.
    compare_all: bool,
    /// Writes were refused: what the maps hold is not known.
    lost_track: bool,
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

/// How much fits.
#[derive(Clone, Copy, Debug)]
struct Capacity {
    services: u32,
    backends: u32,
    peers: u32,
}

impl Capacity {
    fn of(maps: &impl Maps) -> Self {
        Self { services: maps.service_capacity(), backends: maps.backend_capacity(), peers: maps.peer_capacity() }
    }
}

/// The writes of one plan, by the place they have in the order.
#[derive(Default)]
struct Draft {
    puts: Vec<Write>,
    wildcards: Vec<Write>,
    forget: Vec<u32>,
    wildcard_deletes: Vec<Write>,
    deletes: Vec<Write>,
    /// Entries that are deleted, by family. They are in the map until everything else has been put.
    freed: [u32; 2],
}

impl Planner {
    /// Begins with what the maps hold.
    pub fn adopt(maps: &impl Maps) -> anyhow::Result<Self> {
        Ok(Self::from_snapshot(maps.snapshot()?, Capacity::of(maps)))
    }

    fn from_snapshot(mut snapshot: Snapshot, room: Capacity) -> Self {
        snapshot.ids.truncate(room.backends as usize);
        snapshot.backends.truncate(room.backends as usize);
        let mut seen = HashSet::new();
        for (_, entry) in snapshot.services.iter_mut().filter(|(key, _)| !key.is_wildcard()) {
            if !seen.insert(entry.id) {
                // It gets another one, and backends of its own.
                entry.id = 0;
            }
        }
        let mut ranges = Ranges::new(room.backends, GRACE);
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
            let end = entry.first.saturating_add(entry.count).min(room.backends);
            if held.ranges.is_empty() {
                held.ranges.extend((entry.first..end).map(|slot| (slot, 1)).filter(|(slot, _)| ranges.claim(*slot, 1)));
            }
            // Beyond the end there is nothing, however much the entry claims.
            let within = SvcEntry { count: end.saturating_sub(entry.first), ..*entry };
            let backends = snapshot.backends_of(&within).flatten();
            let unused = backends.filter(|b| !std::mem::replace(&mut referred[id::slot_of(b.id) as usize], true));
            held.backends.extend(unused.map(|b| b.id));
        }
        let Snapshot { services, ids, backends, peers } = snapshot;
        // All else that was ever written may have been let go of a moment ago.
        ranges.retire_free_below(ids.len() as u32);
        let last = services.values().map(|entry| entry.id).max().unwrap_or(0);
        // Those that the last agent's death left without a service bear the number of their slot's
        // last backend.
        let has_service =
            |(slot, b): &(u32, &Backend)| b.id != 0 && (b.service < id::MAX_SLOTS || id::slot_of(b.service) != *slot);
        let last = (0..).zip(&backends).filter(has_service).map(|(_, b)| b.service).max().unwrap_or(0).max(last);
        let last = backends.iter().map(|b| b.max_service).max().unwrap_or(0).max(last);
        let count = |v4: bool| services.keys().filter(|key| key.ip.is_ipv4() == v4).count() as u32;
        let mut planner = Self {
            count: [count(true), count(false)],
            service_ids: Ids::after(last),
            services: services.into_iter().collect(),
            damaged,
            ids,
            ranges,
            slots: Slots::new(backends, room.backends, GRACE),
            peers: Peers::new(peers, room.peers),
            flows: Flows::default(),
            orphans: Vec::new(),
            failed: BTreeMap::new(),
            has_new_room: false,
            room,
            audit: Progress::default(),
            compare_all: true,
            lost_track: false,
        };
        planner.find_strays(&referred);
        planner
    }

    /// Backends that no entry leads to: an earlier agent let them linger, or died before it forgot
    /// their flows or cleared their slots.
    fn find_strays(&mut self, referred: &[bool]) {
        let strays =
            |(slot, referred): (u32, &bool)| if *referred { None } else { self.slots.get(slot).map(|b| (slot, *b)) };
        let strays: Vec<(u32, Backend)> = (0..).zip(referred).filter_map(strays).filter(|(_, b)| b.id != 0).collect();
        if strays.is_empty() {
            return;
        }
        let keys: HashMap<u32, VipKey> = self.services.iter().map(|(key, entry)| (entry.id, *key)).collect();
        for (slot, backend) in strays {
            match keys.get(&backend.service).filter(|key| !key.is_wildcard()) {
                _ if id::slot_of(backend.id) != slot => self.slots.leave(slot),
                Some(key) if key.proto == UDP => {
                    self.orphans.extend(self.flows.found(*key, (backend.addr, backend.port), backend.id));
                }
                Some(_) => self.slots.leave(slot),
                None => self.orphans.push(backend.id),
            }
        }
    }

    /// Brings the maps to what the index wants. `now` is the time since any fixed moment. After an error call it again, soon:
    /// it then begins with what the maps really hold.
    pub fn sync(&mut self, index: &mut Index, maps: &mut impl Maps, now: Duration) -> anyhow::Result<Plan> {
        if self.lost_track {
            let period = self.audit.period();
            *self = Self::adopt(maps)?.with_audit_period(period);
            self.audit.begin_again(now);
        }
        let mut plan = self.plan(index, now);
        self.apply(&plan.writes, maps)?;
        // Once more if the deletions make room in a full map: an entry fits only after another has gone. Twice is enough, as
        // the second plan deletes nothing.
        if self.has_new_room {
            let more = self.plan(index, now);
            self.apply(&more.writes, maps)?;
            plan.writes.extend(more.writes);
            plan.retry_at = more.retry_at;
        }
        Ok(plan)
    }

    /// The same with this time between two audits.
    #[must_use]
    pub fn with_audit_period(mut self, period: Duration) -> Self {
        self.audit.set_period(period);
        self
    }

    /// When [`Self::audit`] is to be called next. `None`: first a sync has to find out what the maps should hold.
    pub fn audit_at(&self) -> Option<Duration> {
        (!self.compare_all && !self.lost_track).then(|| self.audit.due())
    }

    /// Compares the next piece of the maps with what it should hold, and repairs it. Returns what differed.
    ///
    /// # Errors
    /// A map cannot be read, or not written: the next [`Self::sync`] then reads everything back.
    pub fn audit(&mut self, maps: &mut impl Maps, now: Duration) -> anyhow::Result<Vec<Difference>> {
        if self.audit_at().is_none() {
            return Ok(Vec::new());
        }
        let table = self.audit.table();
        let (found, is_last_piece) = maps.read(table)?;
        let mut repair = Repair::default();
        match table {
            Table::Backends => repair.arrays(&found, self.slots.all(), &self.ids, self.room.backends),
            Table::Services4 | Table::Services6 => {
                let is_of_table = |key: &&VipKey| key.ip.is_ipv4() == (table == Table::Services4);
                self.audit.note(found.services.keys().filter(|key| self.services.contains_key(key)).copied());
                for (key, entry) in found.services.iter().filter(|(key, _)| is_of_table(key)) {
                    self.compare(*key, Some(*entry), &mut repair);
                }
                let keys = self.services.keys().filter(is_of_table);
                let count = self.count[usize::from(table == Table::Services6)] as usize;
                let unseen = if is_last_piece { self.audit.unseen(count, keys) } else { Vec::new() };
                for key in unseen {
                    self.compare(key, maps.service(&key)?, &mut repair);
                }
            }
            Table::Peers => {
                let held = self.peers.held();
                let prefixes: BTreeSet<&IpNet> = held.keys().chain(found.peers.keys()).collect();
                for prefix in prefixes {
                    repair.entry(*prefix, found.peers.get(prefix).copied(), held.get(prefix).copied());
                }
            }
        }
        self.audit.advance(is_last_piece, now);
        let (writes, differences) = repair.into_writes();
        self.apply(&writes, maps)?;
        Ok(differences)
    }

    /// Compares an entry, unless it is damaged: such a one stays as it is until it is replaced.
    fn compare(&self, key: VipKey, is: Option<SvcEntry>, repair: &mut Repair) {
        if !self.damaged.contains_key(&key) {
            repair.entry(key, is, self.services.get(&key).copied());
        }
    }

    fn apply(&mut self, writes: &[Write], maps: &mut impl Maps) -> anyhow::Result<()> {
        if !writes.is_empty() {
            self.lost_track = true;
            maps.apply(writes)?;
            self.lost_track = false;
        }
        Ok(())
    }

    /// The writes that lead from what the maps hold to what the index wants. They are taken as applied.
    pub fn plan(&mut self, index: &mut Index, now: Duration) -> Plan {
        let released = self.ranges.tick(now) | self.slots.tick(now);
        if !index.synced() {
            return Plan::default();
        }
        let mut keys = index.take_dirty_services();
        if released || self.compare_all || self.has_new_room {
            keys.extend(self.failed.keys());
        }
        let peers_dirty = index.take_peers_dirty() || self.peers.waits();
        let mut draft = Draft::default();
        let mut writes = Vec::new();
        if self.compare_all {
            keys.extend(index.service_keys());
            keys.extend(self.services.keys());
        }
        let peers = if self.compare_all || peers_dirty {
            self.peers.plan(index.desired_peers())
        } else {
            PeerWrites::default()
        };
        writes.extend(peers.puts);
        self.plan_services(keys, index, &mut draft);
        if self.compare_all {
            let orphans = std::mem::take(&mut self.orphans);
            self.forget(orphans, &mut draft);
            self.compare_all = false;
        }
        for (count, freed) in self.count.iter_mut().zip(draft.freed) {
            *count -= freed;
        }
        self.has_new_room = self.peers.waits() || (draft.freed != [0; 2] && !self.failed.is_empty());
        writes.append(&mut draft.puts);
        writes.append(&mut draft.wildcards);
        writes.append(&mut draft.wildcard_deletes);
        writes.append(&mut draft.deletes);
        if !draft.forget.is_empty() {
            draft.forget.sort_unstable();
            draft.forget.dedup();
            writes.push(Write::ForgetFlows { proto: UDP, backends: draft.forget });
        }
        let ids = self.slots.clear(now);
        if !ids.is_empty() {
            writes.push(Write::ClearBackends { ids });
        }
        writes.extend(peers.deletes);
        Plan { writes, retry_at: self.retry_at(now) }
    }

    /// When slots are to be cleared, or are free for what did not fit.
    fn retry_at(&self, now: Duration) -> Option<Duration> {
        let mut times = vec![self.slots.next_clear(now), self.has_new_room.then_some(now)];
        if !self.failed.is_empty() {
            let released = || self.ranges.next_release().unwrap_or(now + GRACE);
            times.push((self.ranges.held() > 0).then(released));
            times.push(self.slots.next_free(now));
        }
        times.into_iter().flatten().min()
    }

    /// What did not fit into the maps.
    pub fn problems(&self, index: &Index) -> Vec<Problem> {
        let services = self.failed.iter().map(|(key, message)| {
            let subject: Arc<str> = match index.owner(key) {
                Some((name, port)) if port.name.is_empty() => format!("Service {name}").into(),
                Some((name, port)) => format!("Service {name} port {}", port.name).into(),
                None => format!("{key}").into(),
            };
            Problem::new(&subject, "", message.clone())
        });
        services.chain(self.peers.problem()).collect()
    }

    /// The peers that the maps hold.
    pub fn peers(&self) -> &BTreeMap<IpNet, Peer> {
        self.peers.held()
    }

    /// Service entries that the maps hold.
    pub fn service_count(&self) -> usize {
        self.services.len()
    }

    fn plan_services(&mut self, mut keys: Vec<VipKey>, index: &Index, draft: &mut Draft) {
        // Ports before wildcards: what refuses all other ports of an address has to know which of its ports wait.
        keys.sort_unstable_by_key(|key| (key.is_wildcard(), *key));
        keys.dedup();
        let mut choice = Choice::default();
        for key in keys {
            match index.desired_service(&key, &mut choice) {
                Some(desired) => match self.put(key, desired, &choice, draft) {
                    Ok(()) => {
                        self.failed.remove(&key);
                    }
                    Err(message) => {
                        self.failed.insert(key, message.into());
                    }
                },
                None => self.delete(key, draft),
            }
        }
    }

    fn put(&mut self, key: VipKey, desired: DesiredService, choice: &Choice, draft: &mut Draft) -> Result<(), String> {
        let backends = &choice.backends;
        let old = self.services.get(&key).copied();
        let trusted = old.filter(|_| !self.damaged.contains_key(&key));
        let same = trusted.filter(|entry| self.leads_to(entry, backends));
        let family = usize::from(key.ip.is_ipv6());
        let is_full = self.count[family] >= self.room.services;
        if old.is_none() && (is_full || self.waits_for_port(&key, draft)) {
            let full = self.room.services;
            return Err(format!(
                "all {full} entries of the service map are taken, it is left out; raise service-entries"
            ));
        }
        let first = match same {
            Some(entry) => entry.first,
            None if backends.is_empty() => 0,
            None => {
                self.check_slots(key, trusted.as_ref(), backends, old.is_some())?;
                let count = backends.len() as u32;
                self.ranges.alloc(count).ok_or_else(|| self.no_range(key, count, old.is_some()))?
            }
        };
        let id = match old {
            _ if key.is_wildcard() => 0,
            Some(entry) if entry.id != 0 => entry.id,
            _ => self.service_ids.take(|| self.services.values().map(|entry| entry.id).collect()),
        };
        let count = backends.len() as u32;
        let entry = SvcEntry { first, count, id, affinity: desired.affinity, flags: desired.flags, pad: 0 };
        match same {
            Some(entry) => self.write_flags(&entry, backends, draft),
            None => self.write_backends(key, trusted, &entry, backends, draft),
        }
        if key.proto == UDP {
            let gone = self.flows.settle(key, choice);
            self.forget(gone, draft);
        }
        self.release_damaged(&key, draft);
        if old == Some(entry) {
            return Ok(());
        }
        if self.services.insert(key, entry).is_none() {
            self.count[family] += 1;
        }
        let writes = if key.is_wildcard() { &mut draft.wildcards } else { &mut draft.puts };
        writes.push(Write::PutService { key, entry });
        Ok(())
    }

    /// True for a wildcard entry of which a port comes only with the next plan: until then it would refuse that port.
    fn waits_for_port(&self, key: &VipKey, draft: &Draft) -> bool {
        let mut of_address = self.failed.range(VipKey::wildcard(key.ip)..).take_while(|(other, _)| other.ip == key.ip);
        key.is_wildcard()
            && draft.freed[usize::from(key.ip.is_ipv6())] > 0
            && of_address.any(|(other, _)| !other.is_wildcard())
    }

    /// The backends of an entry stay; their flags may be others.
    fn write_flags(&mut self, entry: &SvcEntry, backends: &[DesiredBackend], draft: &mut Draft) {
        let mut changed = Vec::new();
        for (id, desired) in range(&self.ids, entry).iter().zip(backends) {
            if self.slots.backend(*id).is_some_and(|backend| backend.flags != desired.flags) {
                changed.extend(self.slots.set_flags(*id, desired.flags));
            }
        }
        if !changed.is_empty() {
            draft.puts.push(Write::Backends { backends: changed });
        }
    }

    /// Writes the backends and the range of ids of a new entry, in which a backend that the old one
    /// had too keeps its id, and lets go of the old one's.
    fn write_backends(
        &mut self,
        key: VipKey,
        old: Option<SvcEntry>,
        entry: &SvcEntry,
        backends: &[DesiredBackend],
        draft: &mut Draft,
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
            self.forget(gone, draft);
        } else {
            self.leave(known.into_values().chain(gone));
        }
        if let Some(entry) = old {
            self.ranges.retire(entry.first, entry.count);
        }
        if !written.is_empty() {
            draft.puts.push(Write::Backends { backends: written });
        }
        if !ids.is_empty() {
            let at = entry.first as usize..entry.first as usize + ids.len();
            if self.ids.len() < at.end {
                self.ids.resize(at.end, 0);
            }
            self.ids[at].copy_from_slice(&ids);
            draft.puts.push(Write::BackendIds { first: entry.first, ids });
        }
    }

    /// The flows of these backends are to be forgotten, and their slots are free.
    fn forget(&mut self, gone: impl IntoIterator<Item = u32>, draft: &mut Draft) {
        for id in gone {
            draft.forget.push(id);
            self.slots.leave(id::slot_of(id));
        }
    }

    /// The slots of these backends are free, flows to them go on.
    fn leave(&mut self, gone: impl IntoIterator<Item = u32>) {
        for id in gone {
            self.slots.leave(id::slot_of(id));
        }
    }

    fn delete(&mut self, key: VipKey, draft: &mut Draft) {
        self.failed.remove(&key);
        let Some(entry) = self.services.remove(&key) else {
            return;
        };
        let lingering = self.flows.take(&key);
        self.forget(lingering.into_values(), draft);
        draft.freed[usize::from(key.ip.is_ipv6())] += 1;
        if !self.release_damaged(&key, draft) {
            self.release(&key, [(entry.first, entry.count)], range(&self.ids, &entry).to_vec(), draft);
        }
        let writes = if key.is_wildcard() { &mut draft.wildcard_deletes } else { &mut draft.deletes };
        writes.push(Write::DeleteService { key });
    }

    /// No entry has this any more.
    fn release(
        &mut self,
        key: &VipKey,
        ranges: impl IntoIterator<Item = (u32, u32)>,
        backends: Vec<u32>,
        draft: &mut Draft,
    ) {
        ranges.into_iter().for_each(|(first, len)| self.ranges.retire(first, len));
        if key.proto == UDP {
            // Else a service that comes back at this address would find flows to whatever served it
            // then.
            self.forget(backends, draft);
        } else {
            self.leave(backends);
        }
    }

    /// An entry that was damaged is replaced or deleted. False if it was not.
    fn release_damaged(&mut self, key: &VipKey, draft: &mut Draft) -> bool {
        let Some(Held { ranges, backends }) = self.damaged.remove(key) else {
            return false;
        };
        self.release(key, ranges, backends, draft);
        true
    }

    /// True if an entry leads to these addresses and ports, in this order.
    fn leads_to(&self, entry: &SvcEntry, backends: &[DesiredBackend]) -> bool {
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
            self.room.backends,
            outcome(had)
        ))
    }

    fn no_range(&self, key: VipKey, count: u32, had: bool) -> String {
        let ((free, longest), held) = (self.ranges.room(), self.ranges.held());
        format!(
            "{key} needs {count} slots next to each other in rn_backend_ids, of {} there are {free} free (longest run {longest}) \
             and {held} about to be: {}; raise backend-entries",
            self.room.backends,
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

#[cfg(test)]
mod tests;
