//! `rn_backends_v2` and `rn_backend_ids` as plain memory: both maps are mapped into this process,
//! so that a new range costs no system call.

use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail, ensure};
use rustnet_common::backend::{Backend, flags, id};
use rustnet_common::names::map::{BACKEND_IDS, BACKENDS};
use rustnet_common::service::SvcEntry;

use super::Map;
use super::memory::{Access, Memory};

/// The backends of all services.
pub struct Backends {
    ids: Memory<u32>,
    slots: Memory<Backend>,
}

impl Backends {
    /// Maps both arrays that are pinned in `bpffs`.
    pub fn open(bpffs: &Path, access: Access) -> Result<Self> {
        Self::from_maps(&Map::open(bpffs, BACKEND_IDS)?, &Map::open(bpffs, BACKENDS)?, access)
    }

    /// Maps arrays that are at hand.
    pub fn from_maps(ids: &Map<u32, u32>, slots: &Map<u32, Backend>, access: Access) -> Result<Self> {
        Ok(Self { ids: Memory::new(ids, access)?, slots: Memory::new(slots, access)? })
    }

    /// Number of the set of a backend, while it serves.
    pub fn set_of(&self, backend: u32) -> Option<u32> {
        let held = self.slots.get(id::slot_of(backend)).filter(|held| held.serves(backend))?;
        Some(held.service)
    }

    /// Ids and slots, each.
    pub fn capacity(&self) -> u32 {
        self.ids.capacity().min(self.slots.capacity()).min(id::MAX_SLOTS)
    }

    /// Stores each backend to the slot of its id. A slot that is in use keeps all but the flags, so
    /// that a program that reads it meanwhile sees nothing else; a free one may be written piece by
    /// piece, as no service refers to it.
    pub fn store(&mut self, backends: &[Backend]) -> Result<()> {
        for backend in backends {
            let slot = id::slot_of(backend.id);
            let held = self.slots.get(slot).with_context(|| self.too_small(BACKENDS, slot))?;
            let same = Backend { flags: backend.flags, ..held } == *backend;
            ensure!(
                same || held.id == 0,
                "slot {slot} of {BACKENDS} is in use: {held:?} cannot become {backend:?}; restart the agent and report this"
            );
            // SAFETY: `get` has shown that the slot lies inside of the mapping.
            let held = unsafe { self.slots.at(slot) }.as_ptr();
            // The agent may die between any two stores. An id without its service is no service's
            // backend; the id that the slot had last is kept until the new one stands there.
            // SAFETY: as above; only this process writes there.
            unsafe {
                (&raw mut (*held).addr).write_volatile(backend.addr);
                (&raw mut (*held).port).write_volatile(backend.port);
                (&raw mut (*held).flags).write_volatile(backend.flags);
                (&raw mut (*held).max_service).write_volatile(backend.max_service);
                AtomicU32::from_ptr(&raw mut (*held).id).store(backend.id, Ordering::Release);
                AtomicU32::from_ptr(&raw mut (*held).service).store(backend.service, Ordering::Release);
            }
        }
        Ok(())
    }

    /// Stores a range of ids. No service refers to it yet; the backends are there already.
    pub fn store_ids(&mut self, first: u32, ids: &[u32]) -> Result<()> {
        let end = first as usize + ids.len();
        if end > self.ids.capacity() as usize {
            bail!(self.too_small(BACKEND_IDS, end as u32 - 1));
        }
        for (index, id) in (first..).zip(ids) {
            // SAFETY: the index is below the capacity, so it lies inside of the mapping.
            unsafe { AtomicU32::from_ptr(self.ids.at(index).as_ptr()) }.store(*id, Ordering::Release);
        }
        Ok(())
    }

    /// Marks the backends of these ids as ended. No service refers to them.
    pub fn end(&mut self, ids: &[u32]) -> Result<()> {
        for ended in ids {
            let slot = id::slot_of(*ended);
            let held = self.slots.get(slot).with_context(|| self.too_small(BACKENDS, slot))?;
            // SAFETY: `get` has shown that the slot lies inside of the mapping.
            let at = unsafe { self.slots.at(slot) }.as_ptr();
            // SAFETY: as above; only this process writes there.
            unsafe { (&raw mut (*at).flags).write_volatile(held.flags | flags::ENDED) };
        }
        Ok(())
    }

    /// Frees the slots of these ids, to which no service refers.
    pub fn clear(&mut self, ids: &[u32]) -> Result<()> {
        for last in ids {
            let slot = id::slot_of(*last);
            let left = self.slots.get(slot).with_context(|| self.too_small(BACKENDS, slot))?.left();
            // SAFETY: `get` has shown that the slot lies inside of the mapping.
            let held = unsafe { self.slots.at(slot) }.as_ptr();
            // SAFETY: as above; only this process writes there.
            unsafe {
                (&raw mut (*held).max_service).write_volatile(left.max_service);
                AtomicU32::from_ptr(&raw mut (*held).service).store(*last, Ordering::Release);
                AtomicU32::from_ptr(&raw mut (*held).id).store(0, Ordering::Release);
                held.write_volatile(Backend { service: *last, ..left });
            }
        }
        Ok(())
    }

    /// Puts elements back that somebody else has changed. Programs find no backend in the slot until it is complete.
    pub fn restore(&mut self, slots: &[(u32, Backend)]) -> Result<()> {
        for (slot, backend) in slots {
            ensure!(*slot < self.slots.capacity(), self.too_small(BACKENDS, *slot));
            // SAFETY: the slot is below the capacity, so it lies inside of the mapping.
            let held = unsafe { self.slots.at(*slot) }.as_ptr();
            // SAFETY: as above; only this process writes there, or nobody should.
            unsafe {
                AtomicU32::from_ptr(&raw mut (*held).id).store(0, Ordering::Release);
                (&raw mut (*held).addr).write_volatile(backend.addr);
                (&raw mut (*held).port).write_volatile(backend.port);
                (&raw mut (*held).flags).write_volatile(backend.flags);
                (&raw mut (*held).max_service).write_volatile(backend.max_service);
                AtomicU32::from_ptr(&raw mut (*held).service).store(backend.service, Ordering::Release);
                AtomicU32::from_ptr(&raw mut (*held).id).store(backend.id, Ordering::Release);
            }
        }
        Ok(())
    }

    /// The backends that a service leads to, in order; `None` in place of each id that leads to no
    /// backend of it.
    pub fn of(&self, entry: &SvcEntry) -> impl Iterator<Item = Option<Backend>> {
        (0..entry.count).map(|i| {
            let id = self.ids.get(entry.first.checked_add(i)?)?;
            let backend = self.slots.get(id::slot_of(id))?;
            (id != 0 && backend.id == id && backend.service == entry.id).then_some(backend)
        })
    }

    /// All ids up to the last that was ever written.
    pub fn ids(&self) -> Vec<u32> {
        self.ids.up_to_last(|id| *id != 0)
    }

    /// All slots up to the last that ever had a backend.
    pub fn slots(&self) -> Vec<Backend> {
        self.slots.up_to_last(|backend| backend.last_id() != 0)
    }

    /// Ids that were ever written, or that stand before such; and slots that hold a backend.
    pub fn used(&self) -> (u32, u32) {
        let slots = (0..self.slots.capacity()).filter(|slot| self.slots.get(*slot).is_some_and(|b| b.id != 0));
        (self.ids.end(|id| *id != 0), slots.count() as u32)
    }

    fn too_small(&self, name: &str, index: u32) -> String {
        let needed = u64::from(index) + 1;
        let capacity = self.capacity();
        format!("{name} has {capacity} slots, {needed} are needed: raise backend-entries in the configuration")
    }
}

#[cfg(test)]
mod tests {
    use super::{Access, BACKEND_IDS, BACKENDS, Backend, Backends, Map, SvcEntry, flags, id};
    use crate::bpf::store::memory::tests::array_of;
    use std::net::IpAddr;

    fn maps(max_entries: u32) -> (Map<u32, u32>, Map<u32, Backend>) {
        (array_of(BACKEND_IDS, max_entries), array_of(BACKENDS, max_entries))
    }

    fn backend(id: u32) -> Backend {
        Backend { addr: IpAddr::from([10, 0, 0, 1]).into(), port: 80, flags: 0, id, service: 7, max_service: 0 }
    }

    fn entry(first: u32, count: u32, id: u32) -> SvcEntry {
        SvcEntry { first, count, id, affinity: 0, flags: 0, table: 0 }
    }

    #[test]
    fn plain_stores_are_what_the_kernel_reads() {
        let (ids, slots) = maps(1000);
        let mut both = Backends::from_maps(&ids, &slots, Access::Write).unwrap();
        assert_eq!((both.ids(), both.slots(), both.used()), (Vec::new(), Vec::new(), (0, 0)));
        let three: Vec<u32> = [997, 3, 999].map(|slot| id::make(slot, 1)).to_vec();
        both.store(&three.iter().map(|id| backend(*id)).collect::<Vec<_>>()).unwrap();
        both.store_ids(500, &three).unwrap();
        assert_eq!(slots.get(&3).unwrap(), Some(backend(three[1])));
        assert_eq!((ids.get(&501).unwrap(), ids.get(&502).unwrap()), (Some(three[1]), Some(three[2])));
        assert_eq!((both.ids().len(), both.slots().len(), both.used()), (503, 1000, (503, 3)));

        let view = Backends::from_maps(&ids, &slots, Access::Read).unwrap();
        let found = |entry| view.of(&entry).map(|b| b.map(|b| b.id)).collect::<Vec<_>>();
        assert_eq!(found(entry(500, 3, 7)), three.iter().map(|id| Some(*id)).collect::<Vec<_>>());
        // Another service's, never written, beyond the end.
        assert_eq!(found(entry(500, 1, 8)), [None]);
        assert_eq!(found(entry(503, 1, 7)), [None]);
        assert_eq!(found(entry(u32::MAX, 2, 7)), [None, None]);
    }

    #[test]
    fn a_slot_in_use_keeps_all_but_its_flags() {
        let (ids, slots) = maps(16);
        let mut both = Backends::from_maps(&ids, &slots, Access::Write).unwrap();
        let first = backend(id::make(5, 1));
        both.store(&[first]).unwrap();
        both.store(&[Backend { flags: 3, ..first }]).unwrap();
        assert_eq!(slots.get(&5).unwrap(), Some(Backend { flags: 3, ..first }));
        for other in [Backend { port: 81, ..first }, backend(id::make(5, 2)), Backend { service: 8, ..first }] {
            assert!(both.store(&[other]).unwrap_err().to_string().contains("slot 5"), "{other:?}");
        }
        both.clear(&[first.id]).unwrap();
        assert_eq!(slots.get(&5).unwrap(), Some(Backend { max_service: 7, ..Backend::cleared(first.id) }));
        assert_eq!((both.slots().len(), both.used()), (6, (0, 0)));
        both.store(&[backend(id::make(5, 2))]).unwrap();
        assert_eq!(slots.get(&5).unwrap(), Some(backend(id::make(5, 2))));
    }

    #[test]
    fn one_that_has_ended_serves_no_more_and_keeps_its_slot() {
        let (ids, slots) = maps(16);
        let mut both = Backends::from_maps(&ids, &slots, Access::Write).unwrap();
        let first = Backend { flags: flags::LOCAL, ..backend(id::make(5, 1)) };
        both.store(&[first]).unwrap();
        assert_eq!(both.set_of(first.id), Some(7));
        both.end(&[first.id]).unwrap();
        assert_eq!(slots.get(&5).unwrap(), Some(Backend { flags: flags::LOCAL | flags::ENDED, ..first }));
        assert_eq!(both.set_of(first.id), None);
        both.clear(&[first.id]).unwrap();
        assert_eq!(slots.get(&5).unwrap().unwrap().flags, 0);
    }

    #[test]
    fn stores_beyond_the_end_are_refused() {
        let (ids, slots) = maps(16);
        let mut both = Backends::from_maps(&ids, &slots, Access::Write).unwrap();
        let id = id::make(16, 1);
        for text in [both.store(&[backend(id)]), both.store_ids(15, &[id, id]), both.clear(&[id])] {
            let text = text.unwrap_err().to_string();
            assert!(text.contains("16 slots, 17 are needed") && text.contains("backend-entries"), "{text}");
        }
        assert_eq!(both.used(), (0, 0));
    }
}
