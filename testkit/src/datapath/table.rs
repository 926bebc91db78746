//! A BPF map as a table of plain values.

use super::sys;
use anyhow::{Context, Result, ensure};
use bytemuck::Pod;
use std::marker::PhantomData;
use std::os::fd::BorrowedFd;
use std::sync::OnceLock;

/// A map with keys `K` and values `V`.
pub struct Table<'a, K, V> {
    name: String,
    fd: BorrowedFd<'a>,
    types: PhantomData<(K, V)>,
}

impl<'a, K: Pod, V: Pod> Table<'a, K, V> {
    /// Checks that the map has keys and values of these sizes.
    pub(super) fn new(name: &str, fd: BorrowedFd<'a>) -> Result<Self> {
        let info = sys::map_info(fd)?;
        ensure!(
            (info.key_size as usize, info.value_size as usize) == (size_of::<K>(), size_of::<V>()),
            "{name} has keys of {} and values of {} bytes, not {} and {}",
            info.key_size,
            info.value_size,
            size_of::<K>(),
            size_of::<V>()
        );
        Ok(Self { name: name.to_owned(), fd, types: PhantomData })
    }

    /// The value of a key.
    pub fn get(&self, key: &K) -> Result<Option<V>> {
        let mut value = V::zeroed();
        let found = sys::lookup(self.fd, bytemuck::bytes_of(key), bytemuck::bytes_of_mut(&mut value))
            .with_context(|| format!("cannot read {}", self.name))?;
        Ok(found.then_some(value))
    }

    /// The first `count` elements of a per-CPU array, each on all CPUs.
    pub fn each_cpu(&self, count: u32) -> Result<Vec<Vec<V>>> {
        let stride = size_of::<V>().next_multiple_of(8);
        let row = stride * possible_cpus()?;
        let mut bytes = vec![0; row * count as usize];
        sys::lookup_batch(self.fd, &mut bytes, count).with_context(|| format!("cannot read {}", self.name))?;
        let value = |c: &[u8]| bytemuck::pod_read_unaligned(&c[..size_of::<V>()]);
        Ok(bytes.chunks_exact(row).map(|row| row.chunks_exact(stride).map(value).collect()).collect())
    }

    /// Sets the value of a key.
    pub fn put(&self, key: &K, value: &V) -> Result<()> {
        sys::update(self.fd, bytemuck::bytes_of(key), bytemuck::bytes_of(value))
            .with_context(|| format!("cannot write {}", self.name))
    }

    /// Sets many.
    pub fn put_all(&self, keys: &[K], values: &[V]) -> Result<()> {
        ensure!(keys.len() == values.len(), "{} keys and {} values", keys.len(), values.len());
        if keys.is_empty() {
            return Ok(());
        }
        sys::update_batch(self.fd, bytemuck::cast_slice(keys), bytemuck::cast_slice(values), keys.len() as u32)
            .with_context(|| format!("cannot write {}", self.name))
    }

    /// Deletes a key; false if it was not there.
    pub fn delete(&self, key: &K) -> Result<bool> {
        sys::delete(self.fd, bytemuck::bytes_of(key)).with_context(|| format!("cannot delete from {}", self.name))
    }

    /// All keys. The map must not change meanwhile.
    pub fn keys(&self) -> Result<Vec<K>> {
        let mut keys = Vec::new();
        let mut next = K::zeroed();
        let mut last: Option<K> = None;
        while sys::next_key(self.fd, last.as_ref().map(bytemuck::bytes_of), bytemuck::bytes_of_mut(&mut next))
            .with_context(|| format!("cannot list {}", self.name))?
        {
            keys.push(next);
            last = Some(next);
        }
        Ok(keys)
    }

    /// All keys and values.
    pub fn entries(&self) -> Result<Vec<(K, V)>> {
        let keys = self.keys()?;
        keys.into_iter().filter_map(|k| self.get(&k).map(|v| v.map(|v| (k, v))).transpose()).collect()
    }

    /// Deletes everything.
    pub fn clear(&self) -> Result<()> {
        self.keys()?.iter().try_for_each(|k| self.delete(k).map(drop))
    }
}

/// CPUs that the kernel has room for.
fn possible_cpus() -> Result<usize> {
    static CPUS: OnceLock<usize> = OnceLock::new();
    if let Some(cpus) = CPUS.get() {
        return Ok(*cpus);
    }
    let path = "/sys/devices/system/cpu/possible";
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    let last = text.trim().rsplit([',', '-']).next().unwrap_or_default();
    let cpus = last.parse::<usize>().with_context(|| format!("{path} says {text:?}"))? + 1;
    Ok(*CPUS.get_or_init(|| cpus))
}
