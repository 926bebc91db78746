//! `rn_maglev` as plain memory: the Maglev tables of services.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Result, bail};
use rustnet_common::names::map::MAGLEV;

use super::Map;
use super::memory::{Access, Memory};

/// All tables.
pub struct Tables(Memory<u64>);

impl Tables {
    /// Maps the array that is pinned in `bpffs`.
    ///
    /// # Errors
    /// There is none.
    pub fn open(bpffs: &Path, access: Access) -> Result<Self> {
        Ok(Self(Memory::new(&Map::open(bpffs, MAGLEV)?, access)?))
    }

    /// Words that there is room for.
    pub fn capacity(&self) -> u32 {
        self.0.capacity()
    }

    /// All words up to the last that was ever written.
    pub fn words(&self) -> Vec<u64> {
        self.0.up_to_last(|word| *word != 0)
    }

    /// So many words from `first` on, fewer at the end.
    pub fn range(&self, first: u32, count: u32) -> Vec<u64> {
        (first..first.saturating_add(count)).map_while(|index| self.0.get(index)).collect()
    }

    /// The index behind the last word that was ever written.
    pub fn used(&self) -> u32 {
        self.0.end(|word| *word != 0)
    }

    /// Stores words.
    ///
    /// # Errors
    /// They do not fit.
    pub fn store(&mut self, first: u32, words: &[u64]) -> Result<()> {
        let (end, capacity) = (first as usize + words.len(), self.capacity());
        if end > capacity as usize {
            bail!("{MAGLEV} has {capacity} words, {end} are needed: raise maglev-entries in the configuration");
        }
        for (index, word) in (first..).zip(words) {
            // SAFETY: the index is below the capacity, so it lies inside of the mapping.
            unsafe { AtomicU64::from_ptr(self.0.at(index).as_ptr()) }.store(*word, Ordering::Release);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{Access, MAGLEV, Memory, Tables};
    use crate::bpf::store::memory::tests::array_of;

    #[test]
    fn plain_stores_are_what_the_kernel_reads() {
        let map = array_of::<u64>(MAGLEV, 1024);
        let mut tables = Tables(Memory::new(&map, Access::Write).unwrap());
        assert_eq!((tables.capacity(), tables.used(), tables.words()), (1024, 0, vec![]));
        tables.store(256, &[3, 0x0002_0001_0000]).unwrap();
        assert_eq!((map.get(&256).unwrap(), map.get(&257).unwrap()), (Some(3), Some(0x0002_0001_0000)));
        assert_eq!((tables.used(), tables.words().len()), (258, 258));
        assert_eq!(tables.range(255, 3), [0, 3, 0x0002_0001_0000]);
        assert_eq!([tables.range(1020, 9), tables.range(1024, 9)].map(|words| words.len()), [4, 0]);
        let error = tables.store(1023, &[1, 2]).unwrap_err().to_string();
        assert!(error.contains("1024 words, 1025 are needed: raise maglev-entries"), "{error}");
    }
}
