//! Array maps as plain memory of this process, so that a store costs no system call.

use std::num::NonZeroUsize;
use std::ptr::NonNull;

use anyhow::{Context, Result};
use bytemuck::Pod;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::Map;

/// Whether a view may write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// For the command.
    Read,
    /// For the agent.
    Write,
}

/// An array map in this process's memory.
pub struct Memory<T> {
    start: NonNull<T>,
    length: NonZeroUsize,
    capacity: u32,
}

// SAFETY: the mapping belongs to this value alone and is not tied to a thread.
unsafe impl<T: Send> Send for Memory<T> {}

impl<T: Pod> Memory<T> {
    /// From one element to the next: the kernel rounds the size of a value up to eight bytes.
    const STRIDE: usize = size_of::<T>().next_multiple_of(8);

    /// Maps an array that is at hand.
    ///
    /// # Errors
    /// It was not made for that.
    pub fn new(map: &Map<u32, T>, access: Access) -> Result<Self> {
        let (name, capacity) = (map.name(), map.max_entries());
        let bytes = capacity as usize * Self::STRIDE;
        let length = NonZeroUsize::new(bytes.next_multiple_of(page_size()));
        let length = length.with_context(|| format!("{name} has no entries"))?;
        let protection = match access {
            Access::Read => ProtFlags::PROT_READ,
            Access::Write => ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
        };
        // SAFETY: a new mapping at an address of the kernel's choice; it overlaps nothing.
        let start = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, map.fd(), 0) }
            .with_context(|| format!("mapping {name} (was it made without BPF_F_MMAPABLE?)"))?;
        Ok(Self { start: start.cast(), length, capacity })
    }

    /// Elements.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Where an element lies.
    ///
    /// # Safety
    /// The index must be below the capacity.
    pub unsafe fn at(&self, index: u32) -> NonNull<T> {
        // SAFETY: by the caller's promise the result lies inside of the mapping, which is aligned
        // to a page.
        unsafe { self.start.byte_add(index as usize * Self::STRIDE) }
    }

    /// The element; `None` beyond the end.
    pub fn get(&self, index: u32) -> Option<T> {
        // SAFETY: the index is below the capacity. Volatile, since the agent may write while the
        // command reads.
        (index < self.capacity).then(|| unsafe { self.at(index).read_volatile() })
    }

    /// The index behind the last element of this kind.
    pub fn end(&self, wanted: impl Fn(&T) -> bool) -> u32 {
        (0..self.capacity).rev().find(|index| self.get(*index).is_some_and(|it| wanted(&it))).map_or(0, |last| last + 1)
    }

    /// All elements up to the last of this kind.
    pub fn up_to_last(&self, wanted: impl Fn(&T) -> bool) -> Vec<T> {
        (0..self.end(wanted)).filter_map(|index| self.get(index)).collect()
    }
}

impl<T> Drop for Memory<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this length, and nothing refers to it any
        // more.
        let result = unsafe { munmap(self.start.cast(), self.length.get()) };
        debug_assert!(result.is_ok(), "munmap of our own mapping");
    }
}

fn page_size() -> usize {
    // SAFETY: sysconf has no preconditions.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

#[cfg(test)]
pub mod tests {
    #![allow(missing_docs, reason = "helpers of tests")]
    use bytemuck::Pod;

    use crate::bpf::store::Map;
    use crate::bpf::sys::{Layout, map_create};

    const ARRAY: u32 = 2;
    const MMAPABLE: u32 = 1 << 10;

    /// An array that can be mapped.
    pub fn array_of<T: Pod>(name: &str, max_entries: u32) -> Map<u32, T> {
        let layout =
            Layout { kind: ARRAY, key_size: 4, value_size: size_of::<T>() as u32, max_entries, flags: MMAPABLE };
        Map::from_fd(map_create(name, layout).unwrap(), name).unwrap()
    }
}
