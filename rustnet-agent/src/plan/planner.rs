//! The plan: what the maps hold, compared with what the index wants.
//!
//! Order of writes: peers; each service's backends, then its entry; wildcard entries; deletions the other way round; and
//! before the peers' deletions the flows to forget, as by then no packet makes them anew. A range of backends is never rewritten while an entry points to it: a change writes a new range and flips
//! the entry.

use super::flows::{Flows, Parked};
use super::ids::Ids;
use super::ranges::Ranges;
use super::{Maps, Snapshot, VipKey, Write};
use crate::index::{Choice, DesiredBackend, DesiredService, Index};
use crate::model::Problem;
use ipnet::IpNet;
use rustnet_common::addr::Addr;
use rustnet_common::backend::Backend;
use rustnet_common::peer::Peer;
use rustnet_common::service::SvcEntry;
use rustnet_common::tuple::proto::UDP;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

/// How long a freed range of backends waits before it is written again. A program that read the old entry is done with it in
/// microseconds; this also covers one that was interrupted.
pub const GRACE: Duration = Duration::from_millis(100);

/// What to do next.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The writes, in order.
    pub writes: Vec<Write>,
    /// Something waits for slots that are free at this time: plan again then, even if no event came.
    pub retry_at: Option<Duration>,
}

/// What the maps hold, and all that is needed to go on from there.
#[derive(Debug)]
pub struct Planner {
    services: HashMap<VipKey, SvcEntry>,
    /// Entries read back whose range is not to be trusted (out of bounds, shared, or with slots never written), and the slots
    /// of it that nobody else has.
    damaged: BTreeMap<VipKey, Vec<u32>>,
    slots: Vec<Backend>,
    ranges: Ranges,
    service_ids: Ids,
    backend_ids: Ids,
    peers: BTreeMap<IpNet, Peer>,
    flows: Flows,
    /// What did not fit, and why.
    failed: BTreeMap<VipKey, Box<str>>,
    peers_failed: Option<Box<str>>,
    /// Entries in the maps, by family.
    count: [u32; 2],
    room: Capacity,
    /// Compare everything, not only what changed.
    compare_all: bool,
    /// Writes were refused: what the maps hold is not known.
    lost_track: bool,
}

/// How much fits.
#[derive(Clone, Copy, Debug)]
struct Capacity {
    services: u32,
    backends: u32,
    peers: u32,
}

/// The writes of one plan, by the place they have in the order.
#[derive(Default)]
struct Draft {
    puts: Vec<Write>,
    wildcards: Vec<Write>,
    forget: Vec<u32>,
    wildcard_deletes: Vec<Write>,
    deletes: Vec<Write>,
}

impl Planner {
    /// Begins with what the maps hold.
    pub fn adopt(maps: &impl Maps) -> anyhow::Result<Self> {
        let room = Capacity {
            services: maps.service_capacity(),
            backends: maps.backend_capacity(),
            peers: maps.peer_capacity(),
        };
        Ok(Self::from_snapshot(maps.snapshot()?, room))
    }

    fn from_snapshot(snapshot: Snapshot, room: Capacity) -> Self {
        let Snapshot { services, backends: slots, peers } = snapshot;
        let mut ranges = Ranges::new(room.backends, GRACE);
        let mut damaged = BTreeMap::new();
        for (key, entry) in services.iter().filter(|(_, entry)| entry.count > 0) {
            let end = entry.first as usize + entry.count as usize;
            let written = slots.get(entry.first as usize..end).is_some_and(|slots| slots.iter().all(|b| b.id != 0));
            if key.is_wildcard() || !written || !ranges.claim(entry.first, entry.count) {
                damaged.insert(*key, Vec::new());
            }
        }
        // Packets may still be led into the range of a damaged entry: nothing else is written there until it is mended.
        for (key, held) in &mut damaged {
            let SvcEntry { first, count, .. } = services[key];
            let end = first.saturating_add(count).min(room.backends);
            held.extend((first..end).filter(|slot| ranges.claim(*slot, 1)));
        }
        // All else that was ever written may have been let go of a moment ago.
        let (unused, live): (Vec<_>, Vec<_>) =
            (0..).zip(&slots).filter(|(_, backend)| backend.id != 0).partition(|(slot, _)| ranges.claim(*slot, 1));
        let live: HashSet<u32> = live.into_iter().map(|(_, backend)| backend.id).collect();
        let mut flows = Flows::default();
        for (slot, backend) in unused {
            // What merely moved to another range is no stray.
            if live.contains(&backend.id) {
                ranges.retire(slot, 1);
            } else {
                flows.add_stray((backend.addr, backend.port), Parked { id: backend.id, slot });
            }
        }
        let count = |v4: bool| services.keys().filter(|key| key.ip.is_ipv4() == v4).count() as u32;
        Self {
            count: [count(true), count(false)],
            service_ids: Ids::after(services.values().map(|entry| entry.id).max().unwrap_or(0)),
            backend_ids: Ids::after(slots.iter().map(|b| b.id).max().unwrap_or(0)),
            services: services.into_iter().collect(),
            damaged,
            slots,
            ranges,
            peers,
            flows,
            failed: BTreeMap::new(),
            peers_failed: None,
            room,
            compare_all: true,
            lost_track: false,
        }
    }

    /// Brings the maps to what the index wants. `now` is the time since any fixed moment. After an error call it again, soon:
    /// it then begins with what the maps really hold.
    pub fn sync(&mut self, index: &mut Index, maps: &mut impl Maps, now: Duration) -> anyhow::Result<Plan> {
        if self.lost_track {
            *self = Self::adopt(maps)?;
        }
        let plan = self.plan(index, now);
        if !plan.writes.is_empty() {
            self.lost_track = true;
            maps.apply(&plan.writes)?;
            self.lost_track = false;
        }
        Ok(plan)
    }

    /// The writes that lead from what the maps hold to what the index wants. They are taken as applied.
    pub fn plan(&mut self, index: &mut Index, now: Duration) -> Plan {
        let released = self.ranges.tick(now);
        if !index.synced() {
            return Plan::default();
        }
        let mut keys = index.take_dirty_services();
        if released || self.compare_all {
            keys.extend(self.failed.keys());
        }
        let peers_dirty = index.take_peers_dirty();
        let mut draft = Draft::default();
        let mut writes = Vec::new();
        if self.compare_all {
            keys.extend(index.service_keys());
            keys.extend(self.services.keys());
        }
        let stale_peers = if self.compare_all || peers_dirty {
            self.plan_peers(index.desired_peers(), &mut writes)
        } else {
            Vec::new()
        };
        self.plan_services(keys, index, &mut draft);
        if self.compare_all {
            let strays = self.flows.take_strays();
            self.forget(strays, &mut draft);
            self.compare_all = false;
        }
        // Entries that were deleted made room for some that did not fit.
        if !draft.deletes.is_empty() && !self.failed.is_empty() {
            self.plan_services(self.failed.keys().copied().collect(), index, &mut draft);
        }
        writes.append(&mut draft.puts);
        writes.append(&mut draft.wildcards);
        writes.append(&mut draft.wildcard_deletes);
        writes.append(&mut draft.deletes);
        if !draft.forget.is_empty() {
            draft.forget.sort_unstable();
            draft.forget.dedup();
            writes.push(Write::ForgetFlows { proto: UDP, backends: draft.forget });
        }
        writes.extend(stale_peers);
        let waits = !self.failed.is_empty() && self.ranges.held() > 0;
        let retry_at = waits.then(|| self.ranges.next_release().unwrap_or(now + GRACE));
        Plan { writes, retry_at }
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
        let peers = self.peers_failed.iter().map(|message| Problem::new(&"peers".into(), "", message.clone()));
        services.chain(peers).collect()
    }

    /// The peers that the maps hold.
    pub fn peers(&self) -> &BTreeMap<IpNet, Peer> {
        &self.peers
    }

    /// Service entries that the maps hold.
    pub fn service_count(&self) -> usize {
        self.services.len()
    }

    fn plan_services(&mut self, mut keys: Vec<VipKey>, index: &Index, draft: &mut Draft) {
        keys.sort_unstable();
        keys.dedup();
        let mut choice = Choice::default();
        // Ports before wildcards, so that no packet meets a wildcard without the ports that are to come.
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
        let trusted = !self.damaged.contains_key(&key);
        let same = trusted && old.is_some_and(|entry| equal(self.slots_of(entry), backends));
        let family = usize::from(key.ip.is_ipv6());
        if old.is_none() && self.count[family] >= self.room.services {
            let full = self.room.services;
            return Err(format!(
                "all {full} entries of the service map are taken, it is left out; raise service-entries"
            ));
        }
        let (first, count) = match old {
            Some(entry) if same => (entry.first, entry.count),
            _ if backends.is_empty() => (0, 0),
            _ => {
                let count = backends.len() as u32;
                let Some(first) = self.ranges.alloc(count) else {
                    return Err(self.no_room(key, count, old.is_some()));
                };
                (first, count)
            }
        };
        if !same {
            self.write_backends(key, old.filter(|_| trusted), first, backends, draft);
        }
        if key.proto == UDP {
            let gone = self.flows.settle(key, choice);
            self.forget(gone, draft);
        }
        let id = match old {
            _ if key.is_wildcard() => 0,
            Some(entry) if entry.id != 0 => entry.id,
            _ => self.service_ids.take(|| self.services.values().map(|entry| entry.id).collect()),
        };
        let entry = SvcEntry { first, count, id, affinity: desired.affinity, flags: desired.flags, pad: 0 };
        self.release_damaged(&key);
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

    /// Writes a new range, in which a backend that the old one had too keeps its id, and lets go of the old one.
    fn write_backends(
        &mut self,
        key: VipKey,
        old: Option<SvcEntry>,
        first: u32,
        backends: &[DesiredBackend],
        draft: &mut Draft,
    ) {
        // One that lingered has flows by the id it had.
        let is_udp = key.proto == UDP;
        let mut known = if is_udp { self.flows.take(&key) } else { BTreeMap::new() };
        if let Some(entry) = old {
            let slots = (entry.first..).zip(self.slots_of(entry));
            known.extend(slots.map(|(slot, b)| ((b.addr, b.port), Parked { id: b.id, slot })));
        }
        let (ids, slots, ranges) = (&mut self.backend_ids, &self.slots, &mut self.ranges);
        let written: Vec<Backend> = backends
            .iter()
            .map(|b| {
                let addr = Addr::from(b.addr);
                let id = match known.remove(&(addr, b.port)) {
                    Some(Parked { id, slot }) => {
                        if is_udp {
                            ranges.retire(slot, 1);
                        }
                        id
                    }
                    None => ids.take(|| slots.iter().map(|b| b.id).collect()),
                };
                Backend { addr, port: b.port, flags: b.flags, id }
            })
            .collect();
        if is_udp {
            self.flows.leave(key, known);
        } else if let Some(entry) = old {
            ranges.retire(entry.first, entry.count);
        }
        if !written.is_empty() {
            let at = first as usize..first as usize + written.len();
            if self.slots.len() < at.end {
                self.slots.resize(at.end, bytemuck::Zeroable::zeroed());
            }
            self.slots[at].copy_from_slice(&written);
            draft.puts.push(Write::Backends { first, backends: written });
        }
    }

    /// The flows of these backends are to be forgotten, and their slots are free.
    fn forget(&mut self, gone: impl IntoIterator<Item = Parked>, draft: &mut Draft) {
        for Parked { id, slot } in gone {
            draft.forget.push(id);
            self.ranges.retire(slot, 1);
        }
    }

    fn delete(&mut self, key: VipKey, draft: &mut Draft) {
        self.failed.remove(&key);
        let Some(entry) = self.services.remove(&key) else {
            return;
        };
        if key.proto == UDP {
            // Else a service that comes back at this address would find flows to whatever served it then.
            let trusted = !self.damaged.contains_key(&key);
            draft.forget.extend(self.slots_of(entry).iter().map(|b| b.id).filter(|_| trusted));
            let lingering = self.flows.take(&key);
            self.forget(lingering.into_values(), draft);
        }
        self.count[usize::from(key.ip.is_ipv6())] -= 1;
        if !self.release_damaged(&key) {
            self.ranges.retire(entry.first, entry.count);
        }
        let writes = if key.is_wildcard() { &mut draft.wildcard_deletes } else { &mut draft.deletes };
        writes.push(Write::DeleteService { key });
    }

    /// Adds the puts to `writes`; gives the deletions, which come last.
    fn plan_peers(&mut self, mut desired: BTreeMap<IpNet, Peer>, writes: &mut Vec<Write>) -> Vec<Write> {
        self.peers_failed = None;
        for v4 in [true, false] {
            let of_family = |prefix: &IpNet| prefix.addr().is_ipv4() == v4;
            let wanted = desired.keys().filter(|prefix| of_family(prefix)).count();
            if wanted > self.room.peers as usize {
                self.peers_failed = Some(
                    format!(
                        "{wanted} prefixes do not fit into the {} entries of the peers map, the last ones are left out; raise \
                         peer-entries",
                        self.room.peers
                    )
                    .into(),
                );
                let mut kept = 0;
                desired.retain(|prefix, _| {
                    kept += u32::from(of_family(prefix));
                    !of_family(prefix) || kept <= self.room.peers
                });
            }
        }
        let stale = self.peers.keys().filter(|prefix| !desired.contains_key(prefix));
        let deletes = stale.map(|prefix| Write::DeletePeer { prefix: *prefix }).collect();
        let changed = desired.iter().filter(|(prefix, peer)| self.peers.get(prefix) != Some(peer));
        writes.extend(changed.map(|(prefix, peer)| Write::PutPeer { prefix: *prefix, peer: *peer }));
        self.peers = desired;
        deletes
    }

    /// An entry that was damaged is replaced or deleted. False if it was not.
    fn release_damaged(&mut self, key: &VipKey) -> bool {
        let Some(slots) = self.damaged.remove(key) else {
            return false;
        };
        for slot in slots {
            self.ranges.retire(slot, 1);
        }
        true
    }

    /// The backends of an entry that is trusted.
    fn slots_of(&self, entry: SvcEntry) -> &[Backend] {
        let first = entry.first as usize;
        self.slots.get(first..first + entry.count as usize).unwrap_or_default()
    }

    fn no_room(&self, key: VipKey, count: u32, had: bool) -> String {
        let ((free, longest), held) = (self.ranges.room(), self.ranges.held());
        let outcome = if had { "its last good backends stay" } else { "it is left out" };
        format!(
            "{key} needs {count} slots side by side in rn_backends, of {} there are {free} free (longest run {longest}) and \
             {held} about to be: {outcome}; raise backend-entries",
            self.room.backends
        )
    }
}

fn equal(slots: &[Backend], backends: &[DesiredBackend]) -> bool {
    slots.len() == backends.len()
        && slots.iter().zip(backends).all(|(slot, backend)| {
            IpAddr::from(slot.addr) == backend.addr && slot.port == backend.port && slot.flags == backend.flags
        })
}

#[cfg(test)]
mod tests;
