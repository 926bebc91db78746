//! Who has which slots of `rn_backend_ids`: first fit, with a quarantine for freed ranges.
//!
//! First fit keeps the array dense at its low end, so that little of it is ever touched. A freed range may still be read by
//! a program that loaded the old service entry; it is reused only after a grace period, counted from the first call of
//! [`Ranges::tick`] after it was freed: by then the write that let go of it has been applied.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

/// Candidates of the smallest fitting class that are looked at; beyond, a larger class serves.
const LOOK_AT: usize = 32;

/// A freed range that waits.
#[derive(Debug)]
struct Held {
    first: u32,
    len: u32,
    since: Option<Duration>,
}

/// The slots of the array.
#[derive(Debug)]
pub struct Ranges {
    /// First slot -> length of each free run; no two of them touch.
    free: BTreeMap<u32, u32>,
    /// The same runs by the binary logarithm of their length.
    classes: [BTreeSet<u32>; 32],
    held: VecDeque<Held>,
    grace: Duration,
}

impl Ranges {
    /// An array of which nothing is in use.
    pub fn new(capacity: u32, grace: Duration) -> Self {
        let mut ranges = Self {
            free: BTreeMap::new(),
            classes: std::array::from_fn(|_| BTreeSet::new()),
            held: VecDeque::new(),
            grace,
        };
        if capacity > 0 {
            ranges.insert(0, capacity);
        }
        ranges
    }

    /// Takes this very range. False, and nothing is taken, if a part of it is not free.
    pub fn claim(&mut self, first: u32, len: u32) -> bool {
        let Some(end) = first.checked_add(len) else {
            return false;
        };
        let Some((run, run_len)) = self.free.range(..=first).next_back().map(|(run, len)| (*run, *len)) else {
            return false;
        };
        let run_end = run + run_len;
        if end > run_end {
            return false;
        }
        self.remove(run, run_len);
        if first > run {
            self.insert(run, first - run);
        }
        if run_end > end {
            self.insert(end, run_end - end);
        }
        true
    }

    /// Takes a range of this length, as low as can be found quickly.
    pub fn alloc(&mut self, len: u32) -> Option<u32> {
        let class = len.checked_ilog2()? as usize;
        let fits = |first: &&u32| self.free.get(*first).is_some_and(|run| *run >= len);
        let near = self.classes[class].iter().take(LOOK_AT).find(fits);
        // Every run of a higher class fits.
        let above = self.classes[class + 1..].iter().filter_map(BTreeSet::first);
        // When nothing else is left, the rest of the smallest class is worth a longer look.
        let best = near.into_iter().chain(above).min().or_else(|| self.classes[class].iter().find(fits));
        let first = *best?;
        self.claim(first, len).then_some(first)
    }

    /// Lets go of a range: it is free once the grace period has passed.
    pub fn retire(&mut self, first: u32, len: u32) {
        if len > 0 {
            self.held.push_back(Held { first, len, since: None });
        }
    }

    /// Lets go of all that is free below a slot, as if it had been in use until now.
    pub fn retire_free_below(&mut self, end: u32) {
        let runs: Vec<(u32, u32)> =
            self.free.range(..end).map(|(first, len)| (*first, (*len).min(end - first))).collect();
        for (first, len) in runs {
            if self.claim(first, len) {
                self.retire(first, len);
            }
        }
    }

    /// Time passes. True if slots became free.
    pub fn tick(&mut self, now: Duration) -> bool {
        let mut released = false;
        while let Some(held) = self.held.front()
            && held.since.is_some_and(|since| now >= since + self.grace)
        {
            let (first, len) = (held.first, held.len);
            self.held.pop_front();
            self.give_back(first, len);
            released = true;
        }
        // Those without a time stand at the end.
        for held in self.held.iter_mut().rev().take_while(|held| held.since.is_none()) {
            held.since = Some(now);
        }
        released
    }

    /// When the next range becomes free; `None` if none waits, or no later call passed the time.
    pub fn next_release(&self) -> Option<Duration> {
        self.held.front().and_then(|held| held.since).map(|since| since + self.grace)
    }

    /// Slots that are free now, and the longest run of them.
    pub fn room(&self) -> (u32, u32) {
        (self.free.values().sum(), self.free.values().copied().max().unwrap_or(0))
    }

    /// Slots that wait.
    pub fn held(&self) -> u32 {
        self.held.iter().map(|held| held.len).sum()
    }

    fn give_back(&mut self, mut first: u32, mut len: u32) {
        if let Some((before, before_len)) = self.free.range(..first).next_back().map(|(run, len)| (*run, *len))
            && before + before_len == first
        {
            self.remove(before, before_len);
            first = before;
            len += before_len;
        }
        if let Some(after_len) = self.free.get(&(first + len)).copied() {
            self.remove(first + len, after_len);
            len += after_len;
        }
        self.insert(first, len);
    }

    fn insert(&mut self, first: u32, len: u32) {
        self.free.insert(first, len);
        self.classes[len.ilog2() as usize].insert(first);
    }

    fn remove(&mut self, first: u32, len: u32) {
        self.free.remove(&first);
        self.classes[len.ilog2() as usize].remove(&first);
    }
}

#[cfg(test)]
mod tests {
    use super::Ranges;
    use proptest::prelude::*;
    use std::time::Duration;

    const GRACE: Duration = Duration::from_millis(100);

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn lowest_first() {
        let mut ranges = Ranges::new(10, GRACE);
        assert_eq!((ranges.alloc(3), ranges.alloc(3), ranges.alloc(3)), (Some(0), Some(3), Some(6)));
        assert_eq!((ranges.alloc(2), ranges.alloc(1), ranges.alloc(1)), (None, Some(9), None));
    }

    #[test]
    fn a_freed_range_waits_from_the_tick_after_it() {
        let mut ranges = Ranges::new(4, GRACE);
        ranges.tick(ms(0));
        assert_eq!(ranges.alloc(4), Some(0));
        ranges.retire(0, 4);
        assert_eq!(ranges.next_release(), None);
        assert!(!ranges.tick(ms(1000)));
        assert_eq!(ranges.next_release(), Some(ms(1100)));
        assert!(!ranges.tick(ms(1099)));
        assert_eq!(ranges.alloc(1), None);
        assert!(ranges.tick(ms(1100)));
        assert_eq!(ranges.alloc(4), Some(0));
    }

    #[test]
    fn neighbours_grow_together() {
        let mut ranges = Ranges::new(9, GRACE);
        for _ in 0..3 {
            ranges.alloc(3);
        }
        for first in [0, 6, 3] {
            ranges.retire(first, 3);
        }
        ranges.tick(ms(0));
        ranges.tick(ms(100));
        assert_eq!(ranges.room(), (9, 9));
        assert_eq!(ranges.alloc(9), Some(0));
    }

    #[test]
    fn claims_must_be_free_in_whole() {
        let mut ranges = Ranges::new(10, GRACE);
        assert!(ranges.claim(4, 3));
        assert!(!ranges.claim(6, 2));
        assert!(!ranges.claim(0, 5));
        assert!(!ranges.claim(8, 3));
        assert!(!ranges.claim(u32::MAX, 2));
        assert!(ranges.claim(0, 4));
        assert_eq!(ranges.room(), (3, 3));
    }

    #[test]
    fn what_is_free_below_a_slot_waits() {
        let mut ranges = Ranges::new(10, GRACE);
        assert!(ranges.claim(2, 2));
        ranges.retire_free_below(7);
        assert_eq!((ranges.room(), ranges.held()), ((3, 3), 5));
        ranges.tick(ms(0));
        ranges.tick(ms(100));
        assert_eq!((ranges.room(), ranges.held()), ((8, 6), 0));
    }

    #[test]
    fn nothing_fits_into_nothing() {
        assert_eq!(Ranges::new(0, GRACE).alloc(1), None);
        assert_eq!(Ranges::new(4, GRACE).alloc(0), None);
    }

    #[test]
    fn a_run_deep_in_its_class_is_found_when_nothing_else_is_left() {
        let mut ranges = Ranges::new(64 * 5 + 4, GRACE);
        // Sixty-four free runs of 4 slots and, last, one of 7; each behind a slot in use.
        for i in 0..64 {
            assert!(ranges.claim(i * 5 + 4, 1));
        }
        assert!(ranges.claim(64 * 5 + 3, 1));
        assert_eq!(ranges.alloc(4), Some(0));
        ranges.retire(64 * 5 - 1, 1);
        ranges.tick(ms(0));
        ranges.tick(ms(100));
        assert_eq!(ranges.alloc(7), Some(63 * 5));
    }

    proptest! {
        /// Whatever is done, ranges in use never overlap, none is lost, and a freed one is not handed out too early.
        #[test]
        fn never_twice_and_never_lost(steps in prop::collection::vec((0u32..12, any::<prop::sample::Index>()), 1..300)) {
            const SLOTS: u32 = 64;
            let mut ranges = Ranges::new(SLOTS, GRACE);
            let mut used: Vec<(u32, u32)> = Vec::new();
            let mut freed: Vec<(u32, u32, u64)> = Vec::new();
            let mut now = 0;
            for (len, pick) in steps {
                now += 30;
                ranges.tick(ms(now));
                if len > 0 {
                    if let Some(first) = ranges.alloc(len) {
                        for (other, other_len) in &used {
                            prop_assert!(first + len <= *other || other + other_len <= first);
                        }
                        for (other, other_len, at) in &freed {
                            prop_assert!(now >= at + 100 || first + len <= *other || other + other_len <= first);
                        }
                        used.push((first, len));
                    } else {
                        prop_assert!(ranges.room().1 < len);
                    }
                } else if !used.is_empty() {
                    let (first, len) = used.swap_remove(pick.index(used.len()));
                    ranges.retire(first, len);
                    freed.push((first, len, now));
                }
            }
            for (first, len) in used {
                ranges.retire(first, len);
            }
            ranges.tick(ms(now + 1000));
            ranges.tick(ms(now + 2000));
            prop_assert_eq!(ranges.room(), (SLOTS, SLOTS));
        }
    }
}
