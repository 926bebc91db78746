//! `rn_backends_v2`: everything that a service can lead to, by slot; and `rn_backend_ids`: which of
//! it a service leads to.

use crate::addr::{Addr, Address};
use crate::shared_type;

/// One backend of one service port: the value of `rn_backends_v2` at [`id::slot_of`] its id.
///
/// A program that holds an id reads the slot and compares: another id there means that the backend
/// is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Backend {
    /// Address; IPv4 as mapped.
    pub addr: Addr,
    /// Port, host order.
    pub port: u16,
    /// See [`flags`].
    pub flags: u16,
    /// Number of (service port, endpoint) for as long as the endpoint belongs to the service; see
    /// [`id`]. 0: the slot is free.
    pub id: u32,
    /// [`SvcEntry::id`](crate::service::SvcEntry::id) of the service port. In a free slot: the id
    /// that the slot had last, so that its next backend gets the next generation.
    pub service: u32,
    /// Highest number of a service port that the slot ever had, free or not: numbers up to it are not given again. Releases
    /// that did not know it left 0.
    pub max_service: u32,
}

impl Backend {
    /// The value of a slot that the backend of this id has left.
    pub const fn cleared(last_id: u32) -> Self {
        Self { addr: Addr::UNSPECIFIED, port: 0, flags: 0, id: 0, service: last_id, max_service: 0 }
    }

    /// The value of this backend's slot once it has left.
    #[must_use]
    pub const fn left(&self) -> Self {
        let max_service = if self.service > self.max_service { self.service } else { self.max_service };
        Self { max_service, ..Self::cleared(self.id) }
    }

    /// True if flows to the backend of this id go on: the slot still has it, and it has not [`flags::ENDED`].
    #[inline(always)]
    pub const fn serves(&self, id: u32) -> bool {
        self.id == id && id != 0 && self.flags & flags::ENDED == 0
    }

    /// The id that the slot has, or had last; 0 if it never had one.
    pub const fn last_id(&self) -> u32 {
        if self.id == 0 { self.service } else { self.id }
    }
}

/// Bits of [`Backend::flags`].
pub mod flags {
    /// The endpoint is on this node.
    pub const LOCAL: u16 = 1;
    /// The endpoint is terminating and serves only because no ready one is left (KEP-1669).
    pub const TERMINATING: u16 = 2;
    /// UDP: the endpoint serves no more. Its flows end with their next packet, which finds another backend or is refused. Set from the
    /// moment when no entry leads to the backend until its slot is cleared.
    pub const ENDED: u16 = 4;
}

/// Backend ids: the slot in the lower 20 bits, above it the slot's generation, from 1 to 4095. An
/// id is never 0.
pub mod id {
    /// Bits of the slot.
    pub const SLOT_BITS: u32 = 20;
    /// Slots that ids can name.
    pub const MAX_SLOTS: u32 = 1 << SLOT_BITS;
    /// The last generation; 1 follows it.
    pub const MAX_GENERATION: u32 = u32::MAX >> SLOT_BITS;

    /// The id of a slot's backend of this generation. Bits of either that have no room are left
    /// out; generation 0 counts as 1.
    pub const fn make(slot: u32, generation: u32) -> u32 {
        let generation = generation & MAX_GENERATION;
        (slot & (MAX_SLOTS - 1)) | (if generation == 0 { 1 } else { generation }) << SLOT_BITS
    }

    /// Index in `rn_backends_v2`.
    #[inline(always)]
    pub const fn slot_of(id: u32) -> u32 {
        id & (MAX_SLOTS - 1)
    }

    /// Which backend of its slot: 1 is the first. 0 is no generation of an id that [`make`] gave.
    pub const fn generation_of(id: u32) -> u32 {
        id >> SLOT_BITS
    }

    /// The id of the same slot's next backend. After `last` 0, the slot never had one, it is the
    /// first.
    pub const fn next(slot: u32, last: u32) -> u32 {
        make(slot, generation_of(last) + 1)
    }
}

shared_type!(Backend, 32);

#[cfg(test)]
mod tests {
    use super::Backend;
    use super::id::{MAX_GENERATION, MAX_SLOTS, generation_of, make, next, slot_of};

    #[test]
    fn an_id_is_its_slot_and_its_generation() {
        for slot in [0, 1, 77, MAX_SLOTS - 1] {
            for generation in [1, 2, MAX_GENERATION] {
                let id = make(slot, generation);
                assert_eq!((slot_of(id), generation_of(id)), (slot, generation));
            }
        }
        assert_eq!(make(5, 3), 0x0030_0005);
    }

    #[test]
    fn no_id_is_zero() {
        assert_eq!(make(0, 0), 1 << 20);
        assert_eq!(make(MAX_SLOTS, MAX_GENERATION + 1), 1 << 20);
    }

    #[test]
    fn generations_go_round_and_leave_out_zero() {
        assert_eq!(next(9, 0), make(9, 1));
        assert_eq!(next(9, make(9, 1)), make(9, 2));
        assert_eq!(next(9, make(9, MAX_GENERATION)), make(9, 1));
    }

    #[test]
    fn a_cleared_slot_keeps_its_last_id() {
        let id = make(3, 7);
        assert_eq!(Backend::cleared(id).last_id(), id);
        assert_eq!(Backend { id, service: 12, ..Backend::cleared(0) }.last_id(), id);
        assert_eq!(Backend::cleared(0).last_id(), 0);
        let left = Backend { id, service: 12, ..Backend::cleared(0) }.left();
        assert_eq!((left.last_id(), left.max_service), (id, 12));
        assert_eq!(Backend { id, service: 5, ..left }.left(), left);
    }
}
