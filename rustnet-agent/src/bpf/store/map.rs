//! A typed view of one pinned map: every read and write of a map's entries goes through here.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result, bail};
use bytemuck::Pod;

use crate::bpf::sys;

/// Entries that a batched call handles at once.
const BATCH: usize = 4096;

/// A map with keys `K` and values `V`.
pub struct Map<K, V> {
    fd: OwnedFd,
    name: String,
    max_entries: u32,
    types: PhantomData<(K, V)>,
}

impl<K: Pod, V: Pod> Map<K, V> {
    /// Opens `<bpffs>/<name>` and makes sure that it holds what we take it for.
    pub fn open(bpffs: &Path, name: &str) -> Result<Self> {
        let path = bpffs.join(name);
        let fd = sys::obj_get(&path).with_context(|| open_hint(&path))?;
        Self::from_fd(fd, name)
    }

    /// The same for a map that is at hand.
    pub fn from_fd(fd: OwnedFd, name: &str) -> Result<Self> {
        let layout = sys::map_info(fd.as_fd()).with_context(|| format!("{name}: not a BPF map"))?.layout();
        if layout.key_size as usize != size_of::<K>() || layout.value_size as usize != size_of::<V>() {
            bail!(
                "{name} was pinned by another version ({layout}; expected key {} B, value {} B): \
                 use the matching release, or remove the old state with `rustnetctl cleanup`",
                size_of::<K>(),
                size_of::<V>()
            );
        }
        Ok(Self { fd, name: name.to_owned(), max_entries: layout.max_entries, types: PhantomData })
    }

    /// The map's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Most entries the map takes.
    pub fn max_entries(&self) -> u32 {
        self.max_entries
    }

    /// The descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The value of a key.
    pub fn get(&self, key: &K) -> Result<Option<V>> {
        let mut value = V::zeroed();
        let found = sys::map_lookup(self.fd(), bytemuck::bytes_of(key), bytemuck::bytes_of_mut(&mut value))
            .with_context(|| format!("reading {}", self.name))?;
        Ok(found.then_some(value))
    }

    /// Writes one entry.
    pub fn put(&self, key: &K, value: &V) -> Result<()> {
        sys::map_update(self.fd(), bytemuck::bytes_of(key), bytemuck::bytes_of(value)).map_err(|e| self.write_error(e))
    }

    /// Writes one entry unless the key has one; false when it has.
    pub fn insert(&self, key: &K, value: &V) -> Result<bool> {
        sys::map_insert(self.fd(), bytemuck::bytes_of(key), bytemuck::bytes_of(value)).map_err(|e| self.write_error(e))
    }

    /// Writes one entry if the key has one; false when it has none.
    pub fn replace(&self, key: &K, value: &V) -> Result<bool> {
        sys::map_replace(self.fd(), bytemuck::bytes_of(key), bytemuck::bytes_of(value)).map_err(|e| self.write_error(e))
    }

    /// Deletes one entry; true when there was one.
    pub fn delete(&self, key: &K) -> Result<bool> {
        sys::map_delete(self.fd(), bytemuck::bytes_of(key)).with_context(|| format!("deleting from {}", self.name))
    }

    /// Takes one entry out.
    pub fn take(&self, key: &K) -> Result<Option<V>> {
        let mut value = V::zeroed();
        let found = sys::map_take(self.fd(), bytemuck::bytes_of(key), bytemuck::bytes_of_mut(&mut value))
            .with_context(|| format!("taking from {}", self.name))?;
        Ok(found.then_some(value))
    }

    /// Writes many entries, in order, by as few calls as possible.
    pub fn put_all(&self, entries: &[(K, V)]) -> Result<()> {
        if let [(key, value)] = entries {
            return self.put(key, value);
        }
        for chunk in entries.chunks(BATCH) {
            let keys: Vec<K> = chunk.iter().map(|e| e.0).collect();
            let values: Vec<V> = chunk.iter().map(|e| e.1).collect();
            let (keys, values) = (bytemuck::cast_slice(&keys), bytemuck::cast_slice(&values));
            match sys::map_update_batch(self.fd(), keys, values, chunk.len() as u32) {
                Ok(()) => {}
                Err((_, e)) if sys::has_no_batch(&e) => chunk.iter().try_for_each(|(k, v)| self.put(k, v))?,
                Err((_, e)) => return Err(self.write_error(e)),
            }
        }
        Ok(())
    }

    /// Deletes many keys; those that are not there do not matter. Returns how many went.
    pub fn delete_all(&self, keys: &[K]) -> Result<usize> {
        let mut gone = 0;
        for chunk in keys.chunks(BATCH) {
            match sys::map_delete_batch(self.fd(), bytemuck::cast_slice(chunk), chunk.len() as u32) {
                Ok(()) => gone += chunk.len(),
                // Somebody else (the LRU) took one, or there are no batches: go on one by one.
                Err((done, e)) => {
                    let done = if sys::has_no_batch(&e) { 0 } else { done as usize };
                    gone += done;
                    for key in &chunk[done..] {
                        gone += usize::from(self.delete(key)?);
                    }
                }
            }
        }
        Ok(gone)
    }

    /// Deletes every entry.
    pub fn clear(&self) -> Result<()> {
        let keys: Vec<K> = self.entries()?.iter().map(|entry| entry.0).collect();
        self.delete_all(&keys).map(drop)
    }

    /// Calls `visit` for each entry, reading in batches. Entries that change meanwhile may be seen or not.
    pub fn for_each(&self, mut visit: impl FnMut(&K, &V)) -> Result<()> {
        let mut cursor = sys::Cursor::default();
        while !self.next_batch(&mut cursor, BATCH, &mut visit)? {}
        Ok(())
    }

    /// Calls `visit` for the next entries, about as many as are asked for. True once all have been read.
    pub fn next_batch(&self, cursor: &mut sys::Cursor, count: usize, mut visit: impl FnMut(&K, &V)) -> Result<bool> {
        let mut count = count.min(self.max_entries as usize).max(1);
        loop {
            let mut keys = vec![K::zeroed(); count];
            let mut values = vec![V::zeroed(); count];
            let read = sys::map_lookup_batch(
                self.fd(),
                cursor,
                bytemuck::cast_slice_mut(&mut keys),
                bytemuck::cast_slice_mut(&mut values),
                count as u32,
            );
            match read {
                Ok((n, end)) => {
                    keys.iter().zip(&values).take(n).for_each(|(k, v)| visit(k, v));
                    return Ok(end);
                }
                // A bucket larger than the buffer; cannot go on for ever, since a map has an end.
                Err(e) if e.raw_os_error() == Some(libc::ENOSPC) && count <= self.max_entries as usize * 2 => {
                    count *= 2;
                }
                Err(e) if sys::has_no_batch(&e) => return self.for_each_single(visit).map(|()| true),
                Err(e) => return Err(e).with_context(|| format!("reading {}", self.name)),
            }
        }
    }

    /// The same with one call an entry.
    fn for_each_single(&self, mut visit: impl FnMut(&K, &V)) -> Result<()> {
        let mut key: Option<K> = None;
        loop {
            let mut next = K::zeroed();
            let found =
                sys::map_next_key(self.fd(), key.as_ref().map(bytemuck::bytes_of), bytemuck::bytes_of_mut(&mut next))
                    .with_context(|| format!("reading {}", self.name))?;
            if !found {
                return Ok(());
            }
            if let Some(value) = self.get(&next)? {
                visit(&next, &value);
            }
            key = Some(next);
        }
    }

    /// All entries.
    pub fn entries(&self) -> Result<Vec<(K, V)>> {
        let mut out = Vec::new();
        self.for_each(|k, v| out.push((*k, *v)))?;
        Ok(out)
    }

    /// How many entries there are.
    pub fn len(&self) -> Result<usize> {
        let mut n = 0;
        self.for_each(|_, _| n += 1)?;
        Ok(n)
    }

    /// True when there is none.
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    fn write_error(&self, e: io::Error) -> anyhow::Error {
        let remedy = match e.raw_os_error() {
            Some(libc::E2BIG | libc::ENOSPC) => format!(
                ": the map is full ({} entries); raise its size in the configuration and restart the agent",
                self.max_entries
            ),
            Some(libc::EPERM) => ": needs CAP_BPF (or CAP_SYS_ADMIN)".into(),
            _ => String::new(),
        };
        anyhow::Error::from(e).context(format!("writing {}{remedy}", self.name))
    }
}

fn open_hint(path: &Path) -> String {
    format!("opening {} (is the agent installed on this node, and is --bpffs the agent's?)", path.display())
}

/// One-element and indexed arrays of plain values.
impl<V: Pod> Map<u32, V> {
    /// Reads element `index` of a per-CPU array on every CPU.
    pub fn per_cpu(&self, index: u32, cpus: usize) -> Result<Vec<V>> {
        let stride = size_of::<V>().next_multiple_of(8);
        let mut buffer = vec![0_u64; stride / 8 * cpus];
        let found = sys::map_lookup(self.fd(), bytemuck::bytes_of(&index), bytemuck::cast_slice_mut(&mut buffer))
            .with_context(|| format!("reading {}", self.name))?;
        if !found {
            return Ok(Vec::new());
        }
        let bytes: &[u8] = bytemuck::cast_slice(&buffer);
        Ok(bytes.chunks_exact(stride).map(|c| bytemuck::pod_read_unaligned(&c[..size_of::<V>()])).collect())
    }
}

/// CPUs that per-CPU maps have room for: `/sys/devices/system/cpu/possible`, as the kernel sizes values by it.
pub fn possible_cpus() -> Result<usize> {
    const FILE: &str = "/sys/devices/system/cpu/possible";
    let text = std::fs::read_to_string(FILE).with_context(|| format!("reading {FILE}"))?;
    parse_possible(text.trim()).with_context(|| format!("{FILE} holds {text:?}"))
}

fn parse_possible(text: &str) -> Option<usize> {
    let last = text.rsplit([',', '-']).next()?;
    last.parse::<usize>().ok().map(|n| n + 1)
}

#[cfg(test)]
mod tests {
    use super::{Map, parse_possible};
    use crate::bpf::sys::{Layout, map_create};

    fn map(kind: u32, entries: u32) -> Map<u32, u64> {
        let flags = 0;
        let layout = Layout { kind, key_size: 4, value_size: 8, max_entries: entries, flags };
        Map::from_fd(map_create("rn_test", layout).unwrap(), "rn_test").unwrap()
    }

    #[test]
    fn cpu_lists() {
        assert_eq!(parse_possible("0-7"), Some(8));
        assert_eq!(parse_possible("0"), Some(1));
        assert_eq!(parse_possible("0,2-3"), Some(4));
        assert_eq!(parse_possible(""), None);
    }

    #[test]
    fn entries_come_back_from_single_and_batched_writes() {
        for kind in [1, 9] {
            let map = map(kind, 20_000);
            map.put(&1_000_000, &7).unwrap();
            let many: Vec<(u32, u64)> = (0..10_000).map(|i| (i, u64::from(i) * 3)).collect();
            map.put_all(&many).unwrap();
            assert_eq!(map.get(&1_000_000).unwrap(), Some(7));
            assert_eq!(map.get(&9_999).unwrap(), Some(29_997));
            assert_eq!(map.get(&10_000).unwrap(), None);
            assert_eq!(map.len().unwrap(), 10_001);
            // Key 10,000 is missing: the batch stops there and the rest goes one by one.
            let keys: Vec<u32> = (9_990..10_010).collect();
            assert_eq!(map.delete_all(&keys).unwrap(), 10);
            assert_eq!(map.len().unwrap(), 9_991);
            map.clear().unwrap();
            assert!(map.is_empty().unwrap());
        }
    }

    #[test]
    fn a_full_map_names_itself_and_the_remedy() {
        let map = map(1, 4);
        let error = map.put_all(&(0..5).map(|i| (i, 0)).collect::<Vec<_>>()).unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains("rn_test") && text.contains("full (4 entries)"), "{text}");
    }

    #[test]
    fn another_layout_is_refused() {
        let fd = map_create("rn_x", Layout { kind: 1, key_size: 8, value_size: 8, max_entries: 1, flags: 0 }).unwrap();
        let text = Map::<u32, u64>::from_fd(fd, "rn_x").err().unwrap().to_string();
        assert!(text.contains("rn_x") && text.contains("key 8 B") && text.contains("cleanup"), "{text}");
    }
}
