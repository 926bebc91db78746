//! Copies the content of a map to another one that differs in its number of entries only. Keys and
//! values are bytes here.

use std::collections::HashMap;
use std::io;
use std::os::fd::BorrowedFd;

use rustnet_common::conntrack::is_later;

use super::store::map::possible_cpus;
use super::sys::{self, Layout};

/// Entries that one batched call reads.
const BATCH: u32 = 4096;

/// Kinds of maps (`enum bpf_map_type`).
mod kind {
    pub(super) const ARRAY: u32 = 2;
    pub(super) const PERCPU_ARRAY: u32 = 6;
    pub(super) const LRU_HASH: u32 = 9;
    pub(super) const RINGBUF: u32 = 27;
}

/// A map with its shape.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    /// The map.
    pub map: BorrowedFd<'a>,
    /// Its shape.
    pub layout: Layout,
}

/// All entries of a map, as read at one time.
pub struct Content {
    key_size: usize,
    value_size: usize,
    keys: Vec<u8>,
    values: Vec<u8>,
}

impl<'a> Place<'a> {
    /// A map, whose shape the kernel returns.
    pub fn of(map: BorrowedFd<'a>) -> io::Result<Self> {
        Ok(Self { map, layout: sys::map_info(map)?.layout() })
    }

    fn is_array(&self) -> bool {
        matches!(self.layout.kind, kind::ARRAY | kind::PERCPU_ARRAY)
    }

    /// Octets of a value in a system call: that of a per-CPU map holds one for each possible CPU.
    fn value_size(&self) -> io::Result<usize> {
        let size = self.layout.value_size as usize;
        if self.layout.kind == kind::PERCPU_ARRAY {
            return Ok(size.next_multiple_of(8) * possible_cpus().map_err(io::Error::other)?);
        }
        Ok(size)
    }

    /// Reads all entries. Of arrays, the elements that are not zero.
    pub fn read(&self) -> io::Result<Content> {
        let (key_size, value_size) = (self.layout.key_size as usize, self.value_size()?);
        let mut content = Content { key_size, value_size, keys: Vec::new(), values: Vec::new() };
        match self.layout.kind {
            kind::RINGBUF => return Ok(content),
            kind::PERCPU_ARRAY => self.read_each(&mut content)?,
            _ => self.read_batches(&mut content)?,
        }
        if self.is_array() {
            content.retain(|_, value| value.iter().any(|byte| *byte != 0));
        }
        Ok(content)
    }

    fn read_batches(&self, content: &mut Content) -> io::Result<()> {
        let mut count = BATCH.min(self.layout.max_entries).max(1);
        let mut cursor = sys::Cursor::default();
        loop {
            let mut keys = vec![0; content.key_size * count as usize];
            let mut values = vec![0; content.value_size * count as usize];
            match sys::map_lookup_batch(self.map, &mut cursor, &mut keys, &mut values, count) {
                Ok((n, end)) => {
                    content.keys.extend_from_slice(&keys[..n * content.key_size]);
                    content.values.extend_from_slice(&values[..n * content.value_size]);
                    if end {
                        return Ok(());
                    }
                }
                // A bucket that is larger than the buffer.
                Err(e)
                    if e.raw_os_error() == Some(libc::ENOSPC) && count <= self.layout.max_entries.saturating_mul(2) =>
                {
                    count = count.saturating_mul(2);
                }
                Err(e) if sys::has_no_batch(&e) => {
                    content.keys.clear();
                    content.values.clear();
                    return self.read_each(content);
                }
                Err(e) => return Err(e),
            }
        }
    }

    fn read_each(&self, content: &mut Content) -> io::Result<()> {
        let mut last: Option<Vec<u8>> = None;
        let mut value = vec![0; content.value_size];
        loop {
            let mut key = vec![0; content.key_size];
            if !sys::map_next_key(self.map, last.as_deref(), &mut key)? {
                return Ok(());
            }
            if sys::map_lookup(self.map, &key, &mut value)? {
                content.keys.extend_from_slice(&key);
                content.values.extend_from_slice(&value);
            }
            last = Some(key);
        }
    }

    /// Writes all entries, in order.
    pub fn write(&self, content: &Content) -> io::Result<()> {
        content.iter().try_for_each(|(key, value)| sys::map_update(self.map, key, value))
    }

    /// Makes this map hold what `other` holds: what user space alone writes.
    pub fn mirror(&self, other: &Self) -> io::Result<()> {
        let (here, mut there) = (self.read()?, other.read()?);
        if self.is_array() {
            // What had no room was left out before.
            there.keep_below(self.layout.max_entries);
        }
        let mut stale: HashMap<&[u8], &[u8]> = here.iter().collect();
        for (key, value) in there.iter() {
            if stale.remove(key) != Some(value) {
                sys::map_update(self.map, key, value)?;
            }
        }
        for key in stale.into_keys() {
            if self.is_array() {
                sys::map_update(self.map, key, &vec![0; here.value_size])?;
            } else {
                sys::map_delete(self.map, key)?;
            }
        }
        Ok(())
    }

    /// Adds the entries of `content` that are missing here; those that are here stay as they are.
    /// Returns how many were. An array lacks none, and the kernel refuses elements beyond its end.
    pub fn insert_missing(&self, content: &Content) -> io::Result<usize> {
        if self.is_array() {
            return Ok(0);
        }
        self.insert_later(content, |_, _| false)
    }

    /// As [`Place::insert_missing`], and replaces those that an entry of `content` supersedes. Programs that
    /// write the same entry between the look and the replacement lose it: they have written it into both
    /// maps.
    pub fn insert_later(&self, content: &Content, is_superseded: impl Fn(&[u8], &[u8]) -> bool) -> io::Result<usize> {
        let mut added = 0;
        let mut here = vec![0; content.value_size];
        for (key, value) in content.iter() {
            let mut is_added = sys::map_insert(self.map, key, value)?;
            if !is_added && sys::map_lookup(self.map, key, &mut here)? && is_superseded(&here, value) {
                sys::map_update(self.map, key, value)?;
                is_added = true;
            }
            added += usize::from(is_added);
        }
        Ok(added)
    }

    /// True if the kernel evicts entries when the map is full.
    pub fn evicts(&self) -> bool {
        self.layout.kind == kind::LRU_HASH
    }
}

impl Content {
    /// How many entries.
    pub fn len(&self) -> usize {
        self.keys.len() / self.key_size.max(1)
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// The entries.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.keys.chunks_exact(self.key_size).zip(self.values.chunks_exact(self.value_size))
    }

    /// Keeps the entries for which `keep` returns true.
    pub fn retain(&mut self, keep: impl Fn(&[u8], &[u8]) -> bool) {
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for (key, value) in self.iter().filter(|(key, value)| keep(key, value)) {
            keys.extend_from_slice(key);
            values.extend_from_slice(value);
        }
        (self.keys, self.values) = (keys, values);
    }

    /// Keeps the elements of an array below an index.
    pub fn keep_below(&mut self, end: u32) {
        self.retain(|key, _| key.try_into().is_ok_and(|key| u32::from_ne_bytes(key) < end));
    }

    /// Sorts by the clock value at an offset of the values, the oldest first: a smaller LRU map
    /// then keeps the newest. Returns the newest.
    pub fn sort_by_age(&mut self, offset: usize) -> Option<u32> {
        let clock = |value: &[u8]| clock_at(value, offset);
        // Clocks wrap: all are compared with one of them, half a turn before it.
        let base = clock(self.iter().next()?.1).wrapping_sub(1 << 31);
        let mut order: Vec<(u32, usize)> =
            self.iter().enumerate().map(|(i, (_, value))| (clock(value).wrapping_sub(base), i)).collect();
        order.sort_unstable();
        let newest = order.last().map(|(age, _)| age.wrapping_add(base));
        let at = |all: &[u8], size: usize| -> Vec<u8> {
            order.iter().flat_map(|(_, i)| &all[i * size..(i + 1) * size]).copied().collect()
        };
        (self.keys, self.values) = (at(&self.keys, self.key_size), at(&self.values, self.value_size));
        newest
    }

    /// Keeps the last entries, so many at most.
    pub fn keep_last(&mut self, count: usize) {
        let first = self.len().saturating_sub(count);
        self.keys.drain(..first * self.key_size);
        self.values.drain(..first * self.value_size);
    }

    /// Keeps what was seen at `since` or later.
    pub fn retain_since(&mut self, offset: usize, since: u32) {
        self.retain(|_, value| !is_later(since, clock_at(value, offset)));
    }
}

/// Entries that an LRU map of a size takes for sure before it evicts: each CPU may hold back some
/// that are free.
pub fn lru_room(max_entries: u32) -> usize {
    /// `LOCAL_FREE_TARGET` of the kernel's `bpf_lru_list.c`.
    const HELD_BACK: usize = 128;
    let max_entries = max_entries as usize;
    let held_back = possible_cpus().unwrap_or(1) * HELD_BACK;
    max_entries - held_back.min(max_entries / 2)
}

fn clock_at(value: &[u8], offset: usize) -> u32 {
    value.get(offset..offset + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::{Content, Place, kind};
    use crate::bpf::sys::{self, Layout};
    use std::os::fd::{AsFd, OwnedFd};

    fn map(kind: u32, max_entries: u32) -> OwnedFd {
        sys::map_create("rn_test", Layout { kind, key_size: 4, value_size: 8, max_entries, flags: 0 }).unwrap()
    }

    fn place(map: &OwnedFd) -> Place<'_> {
        Place::of(map.as_fd()).unwrap()
    }

    fn put(map: &OwnedFd, key: u32, value: u64) {
        sys::map_update(map.as_fd(), &key.to_ne_bytes(), &value.to_ne_bytes()).unwrap();
    }

    fn fill(map: &OwnedFd, entries: &[(u32, u64)]) {
        for (key, value) in entries {
            put(map, *key, *value);
        }
    }

    fn content(map: &OwnedFd) -> Vec<(u32, u64)> {
        let read = place(map).read().unwrap();
        let mut all: Vec<_> = read
            .iter()
            .map(|(k, v)| (u32::from_ne_bytes(k.try_into().unwrap()), u64::from_ne_bytes(v[..8].try_into().unwrap())))
            .collect();
        all.sort_unstable();
        all
    }

    #[test]
    fn every_kind_of_map_is_copied_to_a_larger_one() {
        for kind in [1, kind::ARRAY, kind::LRU_HASH] {
            let (old, new) = (map(kind, 6000), map(kind, 9000));
            for key in 0..5000 {
                put(&old, key, u64::from(key) + 1);
            }
            place(&new).write(&place(&old).read().unwrap()).unwrap();
            assert_eq!(content(&new), content(&old), "kind {kind}");
            assert_eq!(content(&new).len(), 5000);
        }
    }

    #[test]
    fn per_cpu_elements_are_copied_whole() {
        let (old, new) = (map(kind::PERCPU_ARRAY, 4), map(kind::PERCPU_ARRAY, 8));
        let size = place(&old).value_size().unwrap();
        let value: Vec<u8> = (0..size).map(|i| i as u8 + 1).collect();
        sys::map_update(old.as_fd(), &2_u32.to_ne_bytes(), &value).unwrap();
        place(&new).write(&place(&old).read().unwrap()).unwrap();
        let mut found = vec![0; size];
        assert!(sys::map_lookup(new.as_fd(), &2_u32.to_ne_bytes(), &mut found).unwrap());
        assert_eq!(found, value);
    }

    #[test]
    fn a_prefix_trie_is_copied() {
        let layout = Layout { kind: 11, key_size: 8, value_size: 8, max_entries: 16, flags: 1 };
        let old = sys::map_create("rn_test", layout).unwrap();
        let new = sys::map_create("rn_test", Layout { max_entries: 32, ..layout }).unwrap();
        for n in 0..10_u8 {
            let key = [8 + u32::from(n), u32::from_ne_bytes([10 + n, 0, 0, 0])];
            sys::map_update(old.as_fd(), bytemuck::cast_slice(&key), &[n; 8]).unwrap();
        }
        place(&new).write(&place(&old).read().unwrap()).unwrap();
        assert_eq!(place(&new).read().unwrap().len(), 10);
    }

    #[test]
    fn a_mirror_adds_changes_and_removes() {
        for kind in [1, kind::ARRAY] {
            let (old, new) = (map(kind, 8), map(kind, 16));
            fill(&old, &[(1, 10), (2, 20), (3, 30)]);
            fill(&new, &[(2, 20), (3, 31), (4, 40)]);
            place(&new).mirror(&place(&old)).unwrap();
            assert_eq!(content(&new), [(1, 10), (2, 20), (3, 30)]);
        }
    }

    #[test]
    fn what_is_there_is_not_overwritten() {
        let (old, new) = (map(kind::LRU_HASH, 1024), map(kind::LRU_HASH, 2048));
        fill(&old, &[(1, 10), (2, 20)]);
        put(&new, 2, 22);
        assert_eq!(place(&new).insert_missing(&place(&old).read().unwrap()).unwrap(), 1);
        assert_eq!(content(&new), [(1, 10), (2, 22)]);
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        for kind in [1, kind::ARRAY] {
            let (old, new) = (map(kind, 64), map(kind, 16));
            (0..32).for_each(|key| put(&old, key, 1));
            assert!(place(&new).write(&place(&old).read().unwrap()).is_err(), "kind {kind}");
        }
    }

    fn aged(ages: &[u32]) -> Content {
        let values = ages.iter().flat_map(|age| [0_u32.to_ne_bytes(), age.to_ne_bytes()].concat()).collect();
        let keys = (0..ages.len() as u32).flat_map(u32::to_ne_bytes).collect();
        Content { key_size: 4, value_size: 8, keys, values }
    }

    fn ages(content: &Content) -> Vec<u32> {
        content.iter().map(|(_, value)| super::clock_at(value, 4)).collect()
    }

    #[test]
    fn the_oldest_come_first_across_the_wrap_of_the_clock() {
        let mut all = aged(&[2, u32::MAX, 7, u32::MAX - 5]);
        assert_eq!(all.sort_by_age(4), Some(7));
        assert_eq!(ages(&all), [u32::MAX - 5, u32::MAX, 2, 7]);
        all.retain_since(4, u32::MAX);
        assert_eq!(ages(&all), [u32::MAX, 2, 7]);
        all.keep_last(2);
        assert_eq!(ages(&all), [2, 7]);
        assert_eq!(aged(&[]).sort_by_age(4), None);
    }
}
