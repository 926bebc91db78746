//! `rn_affinity`: clients of services with session affinity. The programs write it; the agent deletes what is too old.

use std::path::Path;

use anyhow::Result;
use rustnet_common::affinity::{Affinity, AffinityKey};
use rustnet_common::names::map;

use super::Map;

/// The table.
pub struct Affinities {
    map: Map<AffinityKey, Affinity>,
}

impl Affinities {
    /// Opens the pin in `bpffs`.
    ///
    /// # Errors
    /// There is none.
    pub fn open(bpffs: &Path) -> Result<Self> {
        Ok(Self { map: Map::open(bpffs, map::AFFINITY)? })
    }

    /// Deletes the clients that were `seen` too long ago; returns how many. Without this, a clock of 32 bits that wraps would make them
    /// young again.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn sweep(&self, is_expired: impl Fn(u32) -> bool) -> Result<usize> {
        let mut old = Vec::new();
        self.map.for_each(|key, value| {
            if is_expired(value.seen) {
                old.push(*key);
            }
        })?;
        self.map.delete_all(&old)
    }
}
