//! Numbers that follow from content: an agent that starts again finds the maps full of the numbers that it computes.

use std::collections::HashSet;

/// A hash of some bytes that all releases compute alike (FNV-1a).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContentHash(u64);

impl ContentHash {
    /// The hash of nothing.
    pub const EMPTY: Self = Self(0xcbf2_9ce4_8422_2325);

    /// The hash of a text.
    pub fn of(text: &str) -> u64 {
        Self::EMPTY.add(text.as_bytes()).0
    }

    /// The hash with more bytes behind those that it has.
    pub fn add(self, bytes: &[u8]) -> Self {
        Self(bytes.iter().fold(self.0, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)))
    }

    /// The number.
    pub fn value(self) -> u64 {
        self.0
    }
}

/// A number for each of some contents by their hashes, never 0, never the greatest one (undecided pods have it in the
/// programs), and no two alike. The same hashes get the same numbers, whatever their
/// order; contents with one hash get theirs in order.
pub fn numbers(hashes: &[u64]) -> Vec<u32> {
    let mut order: Vec<usize> = (0..hashes.len()).collect();
    order.sort_by_key(|place| hashes[*place]);
    let mut numbers = vec![0; hashes.len()];
    let mut taken = HashSet::new();
    for place in order {
        let hash = hashes[place];
        let mut number = (hash ^ (hash >> 32)) as u32;
        while number == 0 || number == u32::MAX || !taken.insert(number) {
            number = number.wrapping_add(1);
        }
        numbers[place] = number;
    }
    numbers
}

#[cfg(test)]
mod tests {
    use super::{ContentHash, numbers};

    #[test]
    fn numbers_differ_and_are_never_those_with_a_meaning() {
        assert_eq!(numbers(&[u64::from(u32::MAX), 0]), [2, 1]);
        // The halves of these hashes cancel each other out, or leave the same.
        let all = [0, 1, 0x1_0000_0001, 1, 0x1_0000_0000, 0x7_0000_0007];
        let given = numbers(&all);
        let mut distinct = given.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), all.len());
        assert!(!given.contains(&0));
        let reversed: Vec<u64> = [0x7_0000_0007, 0x1_0000_0000, 1, 1, 0x1_0000_0001, 0].into();
        let back: Vec<u32> = numbers(&reversed).into_iter().rev().collect();
        assert_eq!((back[0], back[1], back[4], back[5]), (given[0], given[2], given[4], given[5]));
    }

    #[test]
    fn hashes_do_not_change_between_releases() {
        assert_eq!(ContentHash::of(""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(ContentHash::of("a"), 0xaf63_dc4c_8601_ec8c);
    }
}
