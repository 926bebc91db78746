//! Which backend has which slot of `rn_backends_v2`: its id for life, and what becomes of the slot
//! after it.
//!
//! A slot goes from free to used, to left (no entry refers to its backend any more, but a program
//! may have read one that did), to cleared, and back to free. Each step takes a grace period,
//! counted from the first call of [`Slots::tick`] after it: by then the write that made the step
//! has been applied. Slots that never had a backend go first, then the one that is free for
//! longest, with the next generation: what remembers an old id finds out for as long as possible.

use rustnet_common::backend::{Backend, flags, id};
use std::collections::VecDeque;
use std::time::Duration;

/// Slots that wait, in the order in which they began to.
#[derive(Debug, Default)]
struct Waiting(VecDeque<(u32, Option<Duration>)>);

impl Waiting {
    fn push(&mut self, slot: u32) {
        self.0.push_back((slot, None));
    }

    /// Those without a time stand at the end.
    fn stamp(&mut self, now: Duration) {
        self.0.iter_mut().rev().take_while(|(_, since)| since.is_none()).for_each(|(_, since)| *since = Some(now));
    }

    fn pop(&mut self, latest: Duration) -> Option<u32> {
        self.0.pop_front_if(|(_, since)| since.is_some_and(|since| since <= latest)).map(|(slot, _)| slot)
    }
}

/// The slots of the array, with what the map holds.
#[derive(Debug)]
pub struct Slots {
    /// The map's content up to the last slot that ever had a backend.
    held: Vec<Backend>,
    capacity: u32,
    left: Waiting,
    cleared: Waiting,
    /// The next to be used stands first.
    free: VecDeque<u32>,
    grace: Duration,
}

impl Slots {
    /// Slots as read back. Free ones may have been cleared a moment ago.
    pub fn new(mut held: Vec<Backend>, capacity: u32, grace: Duration) -> Self {
        let capacity = capacity.min(id::MAX_SLOTS);
        held.truncate(capacity as usize);
        let (mut cleared, mut free) = (Waiting::default(), VecDeque::new());
        for (slot, backend) in (0..).zip(&mut held) {
            match backend.last_id() {
                0 => free.push_back(slot),
                last if backend.id == 0 => {
                    // Whatever stands there, the next id has to name this slot.
                    let max_service = backend.max_service;
                    *backend = Backend { max_service, ..Backend::cleared(id::make(slot, id::generation_of(last))) };
                    cleared.push(slot);
                }
                _ => {}
            }
        }
        Self { held, capacity, left: Waiting::default(), cleared, free, grace }
    }

    /// What a slot holds, or will once all writes are applied.
    pub fn get(&self, slot: u32) -> Option<&Backend> {
        self.held.get(slot as usize)
    }

    /// The map's content up to the last slot that ever had a backend, once all writes are applied.
    pub fn all(&self) -> &[Backend] {
        &self.held
    }

    /// The backend of an id that an entry refers to.
    pub fn backend(&self, id: u32) -> Option<&Backend> {
        self.get(id::slot_of(id)).filter(|backend| backend.id == id)
    }

    /// Changes the flags of a backend; gives what is to be written.
    pub fn set_flags(&mut self, id: u32, flags: u16) -> Option<Backend> {
        let backend = self.held.get_mut(id::slot_of(id) as usize).filter(|backend| backend.id == id)?;
        backend.flags = flags;
        Some(*backend)
    }

    /// Flows to a backend end: it has [`flags::ENDED`]. False if it had already, or is none.
    pub fn end(&mut self, id: u32) -> bool {
        let held = self.held.get_mut(id::slot_of(id) as usize).filter(|backend| backend.serves(id));
        held.map(|backend| backend.flags |= flags::ENDED).is_some()
    }

    /// Slots that new backends can have now.
    pub fn room(&self) -> u32 {
        self.capacity - self.held.len() as u32 + self.free.len() as u32
    }

    /// Slots that are about to be free.
    pub fn waiting(&self) -> u32 {
        (self.left.0.len() + self.cleared.0.len()) as u32
    }

    /// Gives a new backend its id. `None` if there is no room.
    pub fn add(&mut self, backend: Backend) -> Option<Backend> {
        let unused = self.held.len() as u32;
        if unused < self.capacity {
            let backend = Backend { id: id::make(unused, 1), max_service: backend.service, ..backend };
            self.held.push(backend);
            return Some(backend);
        }
        let slot = self.free.pop_front()?;
        let held = &mut self.held[slot as usize];
        let max_service = held.max_service.max(backend.service);
        *held = Backend { id: id::next(slot, held.last_id()), max_service, ..backend };
        Some(*held)
    }

    /// No entry will refer to this slot's backend.
    pub fn leave(&mut self, slot: u32) {
        self.left.push(slot);
    }

    /// Time passes. True if slots became free.
    pub fn tick(&mut self, now: Duration) -> bool {
        let before = self.free.len();
        if let Some(latest) = now.checked_sub(self.grace) {
            self.free.extend(std::iter::from_fn(|| self.cleared.pop(latest)));
        }
        self.left.stamp(now);
        self.cleared.stamp(now);
        self.free.len() > before
    }

    /// The slots to clear now, by the ids that they had.
    pub fn clear(&mut self, now: Duration) -> Vec<u32> {
        let mut ids = Vec::new();
        while let Some(slot) = now.checked_sub(self.grace).and_then(|latest| self.left.pop(latest)) {
            let held = &mut self.held[slot as usize];
            let last = id::make(slot, id::generation_of(held.id));
            *held = Backend { id: last, ..*held }.left();
            ids.push(last);
            self.cleared.push(slot);
        }
        ids
    }

    /// When the next slot is to be cleared; nothing waits for that if `None`. `now` is the time of
    /// the last tick.
    pub fn next_clear(&self, now: Duration) -> Option<Duration> {
        self.left.0.front().map(|(_, since)| since.unwrap_or(now) + self.grace)
    }

    /// When the next slot is free, if one is cleared. `now` is the time of the last tick.
    pub fn next_free(&self, now: Duration) -> Option<Duration> {
        self.cleared.0.front().map(|(_, since)| since.unwrap_or(now) + self.grace)
    }
}

#[cfg(test)]
mod tests {
    use super::Slots;
    use proptest::prelude::*;
    use rustnet_common::addr::{Addr, Address};
    use rustnet_common::backend::{Backend, id};
    use std::collections::{HashMap, HashSet};
    use std::time::Duration;

    const GRACE: Duration = Duration::from_millis(100);

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn backend(service: u32) -> Backend {
        Backend { addr: Addr::UNSPECIFIED, port: 80, flags: 0, id: 0, service, max_service: 0 }
    }

    fn add(slots: &mut Slots) -> Option<u32> {
        slots.add(backend(1)).map(|backend| backend.id)
    }

    #[test]
    fn unused_slots_go_before_freed_ones_and_those_in_order() {
        let mut slots = Slots::new(Vec::new(), 4, GRACE);
        let ids: Vec<_> = (0..3).filter_map(|_| add(&mut slots)).collect();
        assert_eq!(ids, [id::make(0, 1), id::make(1, 1), id::make(2, 1)]);
        slots.leave(2);
        slots.leave(0);
        for n in 0..4 {
            slots.tick(ms(n * 100));
            slots.clear(ms(n * 100));
        }
        assert_eq!(slots.room(), 3);
        let ids: Vec<_> = (0..4).map_while(|_| add(&mut slots)).collect();
        assert_eq!(ids, [id::make(3, 1), id::make(2, 2), id::make(0, 2)]);
    }

    #[test]
    fn a_slot_waits_until_it_is_cleared_and_once_more_until_it_is_used_again() {
        let mut slots = Slots::new(Vec::new(), 1, GRACE);
        let id = add(&mut slots).unwrap();
        slots.leave(0);
        assert!(slots.clear(ms(1000)).is_empty(), "nothing has been applied yet");
        slots.tick(ms(1000));
        assert_eq!(slots.next_clear(ms(1000)), Some(ms(1100)));
        assert!(slots.clear(ms(1099)).is_empty());
        assert_eq!(slots.backend(id).map(|b| b.id), Some(id));
        assert_eq!(slots.clear(ms(1100)), [id]);
        assert_eq!(slots.backend(id), None);
        assert_eq!(slots.get(0), Some(&Backend { max_service: 1, ..Backend::cleared(id) }));
        assert!(!slots.tick(ms(1100)));
        assert_eq!(slots.next_free(ms(1100)), Some(ms(1200)));
        assert!(!slots.tick(ms(1199)));
        assert_eq!(add(&mut slots), None);
        assert!(slots.tick(ms(1200)));
        assert_eq!(add(&mut slots), Some(id::make(0, 2)));
    }

    #[test]
    fn generations_are_read_back() {
        let held = vec![Backend::cleared(id::make(0, 6)), Backend { id: id::make(1, 4), ..backend(1) }];
        let mut slots = Slots::new(held, 2, GRACE);
        assert_eq!((slots.room(), slots.waiting()), (0, 1));
        slots.tick(ms(0));
        slots.tick(ms(100));
        assert_eq!(add(&mut slots), Some(id::make(0, 7)));
    }

    #[test]
    fn ids_of_other_slots_are_put_right() {
        let wrong = Backend { id: id::make(9, 3), ..backend(1) };
        let mut slots = Slots::new(vec![Backend::cleared(id::make(7, 2)), wrong, backend(0)], 3, GRACE);
        slots.leave(1);
        slots.tick(ms(0));
        assert_eq!(slots.clear(ms(100)), [id::make(1, 3)]);
        slots.tick(ms(100));
        slots.tick(ms(200));
        // The slot without any id never had a backend.
        let ids: Vec<_> = (0..4).map_while(|_| add(&mut slots)).collect();
        assert_eq!(ids, [id::make(2, 1), id::make(0, 3), id::make(1, 4)]);
    }

    proptest! {
        /// Whatever is done: no two backends have one slot, none is used again too early, no id
        /// comes twice.
        #[test]
        fn never_twice_and_never_lost(steps in prop::collection::vec((0u32..6, any::<prop::sample::Index>()), 1..300)) {
            const SLOTS: u32 = 16;
            let mut slots = Slots::new(Vec::new(), SLOTS, GRACE);
            let (mut used, mut left, mut seen) = (Vec::new(), HashMap::new(), HashSet::new());
            let mut now = 0;
            for (adds, pick) in steps {
                now += 30;
                slots.tick(ms(now));
                for id in slots.clear(ms(now)) {
                    prop_assert!(now >= left[&id::slot_of(id)] + 100);
                    left.insert(id::slot_of(id), now);
                }
                for _ in 0..adds.min(3) {
                    let room = slots.room();
                    let Some(id) = add(&mut slots) else {
                        prop_assert_eq!(room, 0);
                        break;
                    };
                    prop_assert!(!used.contains(&id::slot_of(id)));
                    prop_assert!(left.get(&id::slot_of(id)).is_none_or(|at| now >= at + 100));
                    prop_assert!(seen.insert(id));
                    used.push(id::slot_of(id));
                }
                if adds > 2 && !used.is_empty() {
                    let slot = used.swap_remove(pick.index(used.len()));
                    slots.leave(slot);
                    left.insert(slot, now);
                }
                prop_assert_eq!(slots.room() + slots.waiting() + used.len() as u32, SLOTS);
            }
        }
    }
}
