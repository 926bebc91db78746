//! `rn_backends` as plain memory: the map is mapped into this process, so that a new range costs no system call.

use std::num::NonZeroUsize;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{Ordering, fence};

use anyhow::{Context, Result, bail};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use rustnet_common::backend::Backend;
use rustnet_common::names::map::BACKENDS;

use super::Map;

/// The array of backends.
pub struct Backends {
    memory: NonNull<Backend>,
    length: NonZeroUsize,
    capacity: u32,
}

// SAFETY: the mapping belongs to this value alone and is not tied to a thread.
unsafe impl Send for Backends {}

impl Backends {
    /// Maps `<bpffs>/rn_backends`. Read-only views are for the command.
    pub fn open(bpffs: &Path, write: bool) -> Result<Self> {
        Self::from_map(&Map::open(bpffs, BACKENDS)?, write)
    }

    /// Maps an array that is at hand.
    pub fn from_map(map: &Map<u32, Backend>, write: bool) -> Result<Self> {
        let bytes = map.max_entries() as usize * size_of::<Backend>();
        let length = NonZeroUsize::new(bytes.next_multiple_of(page_size())).context("rn_backends has no entries")?;
        let protection = if write { ProtFlags::PROT_READ | ProtFlags::PROT_WRITE } else { ProtFlags::PROT_READ };
        // SAFETY: a new mapping at an address of the kernel's choice; it overlaps nothing.
        let memory = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, map.fd(), 0) }
            .with_context(|| format!("mapping {BACKENDS} (was it made without BPF_F_MMAPABLE?)"))?;
        Ok(Self { memory: memory.cast(), length, capacity: map.max_entries() })
    }

    /// Slots.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Stores `backends` from slot `first` on. A slot is not written in one piece: no service may refer to it yet.
    pub fn store(&mut self, first: u32, backends: &[Backend]) -> Result<()> {
        let end = first as usize + backends.len();
        if end > self.capacity as usize {
            bail!(
                "{BACKENDS} has {} slots, {end} are needed: raise backend-entries in the configuration",
                self.capacity
            );
        }
        for (i, backend) in backends.iter().enumerate() {
            // SAFETY: `first + i` is below the capacity, hence inside the mapping. Volatile, since the kernel reads it.
            unsafe { self.memory.add(first as usize + i).write_volatile(*backend) };
        }
        // The service entry that will point here must not become visible before the slots.
        fence(Ordering::Release);
        Ok(())
    }

    /// The backend in a slot; `None` beyond the end.
    pub fn get(&self, slot: u32) -> Option<Backend> {
        // SAFETY: the slot is below the capacity, hence inside the mapping.
        (slot < self.capacity).then(|| unsafe { self.memory.add(slot as usize).read_volatile() })
    }

    /// All slots up to the last that holds a backend.
    pub fn used(&self) -> Vec<Backend> {
        let last = (0..self.capacity).rev().find(|slot| self.get(*slot).is_some_and(|b| b.id != 0));
        last.map_or_else(Vec::new, |last| (0..=last).filter_map(|slot| self.get(slot)).collect())
    }
}

impl Drop for Backends {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `from_map` with this length, and nothing refers to it any more.
        let result = unsafe { munmap(self.memory.cast(), self.length.get()) };
        debug_assert!(result.is_ok(), "munmap of our own mapping");
    }
}

fn page_size() -> usize {
    // SAFETY: sysconf has no preconditions.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

#[cfg(test)]
mod tests {
    use super::{BACKENDS, Backend, Backends, Map};
    use crate::bpf::sys::{Layout, map_create};
    use std::net::IpAddr;

    fn array_of(max_entries: u32) -> Map<u32, Backend> {
        let layout = Layout { kind: 2, key_size: 4, value_size: 24, max_entries, flags: 1 << 10 };
        Map::from_fd(map_create(BACKENDS, layout).unwrap(), BACKENDS).unwrap()
    }

    fn backend(id: u32) -> Backend {
        Backend { addr: IpAddr::from([10, 0, 0, 1]).into(), port: 80, flags: 0, id }
    }

    #[test]
    fn plain_stores_are_what_the_kernel_reads() {
        let map = array_of(1000);
        let mut array = Backends::from_map(&map, true).unwrap();
        assert!(array.used().is_empty());
        array.store(997, &[backend(1), backend(2), backend(3)]).unwrap();
        assert_eq!(map.get(&998).unwrap(), Some(backend(2)));
        assert_eq!(array.used().len(), 1000);
        assert_eq!(Backends::from_map(&map, false).unwrap().get(999), Some(backend(3)));
        assert_eq!(array.get(1000), None);
    }

    #[test]
    fn stores_beyond_the_end_are_refused_whole() {
        let map = array_of(16);
        let mut array = Backends::from_map(&map, true).unwrap();
        let text = array.store(15, &[backend(1), backend(2)]).unwrap_err().to_string();
        assert!(text.contains("16 slots") && text.contains("backend-entries"), "{text}");
        assert!(array.used().is_empty());
    }
}
