//! `rn_maglev`: tables of Services that ask for Maglev. A table has a backend for each range of hashes, so that few flows move when a
//! backend comes or goes, on whichever node they arrive.
//!
//! The map is an array of words. A table is a run of them: its size first, then its places, four in a word, the first in the lowest
//! bits. A place holds the ordinal of a backend: its index in the range of `rn_backend_ids` that the Service's entry has. Sets of
//! backends that have the same addresses can share a table, whatever their ports.

use crate::hash;

/// Words that a table's run is a multiple of; [`SvcEntry::table`](crate::service::SvcEntry::table) counts in them.
pub const UNIT: u32 = 256;
/// Places in a word.
pub const PLACES: u32 = 4;
/// Most places of a table, a prime: twice as many as ordinals fit into 16 bits.
pub const MAX_SIZE: u32 = 131_071;
/// Most units of the map: those that 16 bits can number. Unit 0 has no table.
pub const MAX_UNITS: u32 = 1 << 16;

/// The word with a table's size.
#[inline(always)]
pub const fn head(table: u16) -> u32 {
    table as u32 * UNIT
}

/// The word and the bits in it of the place that a hash leads to, in a table of this size.
#[inline(always)]
pub const fn place(table: u16, size: u32, hash: u32) -> (u32, u32) {
    let place = hash::pick(hash, size);
    // Of a damaged size no more than the index is wrong, and the array has bounds.
    (head(table).wrapping_add(1).wrapping_add(place / PLACES), place % PLACES * 16)
}

/// The ordinal in a word, at these bits of it.
#[inline(always)]
pub const fn ordinal(word: u64, bits: u32) -> u32 {
    (word >> (bits & 0x30)) as u16 as u32
}

/// Units of a table of this size.
pub const fn units(size: u32) -> u32 {
    (1 + size.div_ceil(PLACES)).div_ceil(UNIT)
}

#[cfg(test)]
mod tests {
    use super::{MAX_SIZE, UNIT, head, ordinal, place, units};

    #[test]
    fn a_table_has_its_size_and_all_places() {
        assert_eq!((units(1), units(4 * 255), units(4 * 255 + 1)), (1, 1, 2));
        for size in [1, 251, 16_381, MAX_SIZE] {
            let (first, _) = place(3, size, 0);
            let (last, bits) = place(3, size, u32::MAX);
            assert_eq!((first, bits), (3 * UNIT + 1, (size - 1) % 4 * 16));
            assert!(last < head(3) + units(size) * UNIT, "{size}");
        }
    }

    #[test]
    fn a_word_has_four_ordinals() {
        let word = 0x0004_0003_0002_ffff;
        assert_eq!([0, 16, 32, 48].map(|bits| ordinal(word, bits)), [0xffff, 2, 3, 4]);
    }
}
