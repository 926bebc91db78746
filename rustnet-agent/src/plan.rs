//! Plans the writes that lead from the present state of the maps to the desired one. Pure: maps and
//! time are arguments.

mod audit;
mod flows;
mod ids;
mod maglev;
mod memory;
mod peers;
mod planner;
pub mod policies;
mod ranges;
mod services;
mod sets;
mod slots;
mod source_ranges;
mod tables;
mod verify;

pub use crate::index::{SourceRange, VipKey};
pub use audit::Difference;
pub use memory::MemoryMaps;
pub use planner::{Capacity, Plan, Planner};
pub use verify::{Deviation, Kind as DeviationKind, verify};

use ipnet::IpNet;
use rustnet_common::backend::{Backend, id};
use rustnet_common::maglev::{PLACES, head, ordinal};
use rustnet_common::peer::Peer;
use rustnet_common::service::SvcEntry;
use std::collections::BTreeMap;
use std::time::Duration;

/// How long what is freed waits before it is written again, and a backend before its slot is
/// cleared. A program that read the old entry is done with it in microseconds; this also covers one
/// that was interrupted.
pub const GRACE: Duration = Duration::from_millis(100);

/// One map write. The order of a list of writes is the order to apply them in: after each of them every service has
/// either its old backends or its new ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    /// Plain stores to `rn_backends_v2`, each to the slot of its id. A slot that services refer to
    /// keeps all but the flags.
    Backends {
        /// What to store.
        backends: Vec<Backend>,
    },
    /// Plain stores to `rn_backend_ids[first..]`. No service refers to this range yet, and all the
    /// backends are written.
    BackendIds {
        /// Index of the first id.
        first: u32,
        /// What to store.
        ids: Vec<u32>,
    },
    /// Plain stores of a Maglev table to `rn_maglev`. No service refers to these words yet.
    MaglevTable {
        /// Unit that it begins with.
        unit: u16,
        /// What to store.
        words: Vec<u64>,
    },
    /// Adds or flips a service.
    PutService {
        /// Which.
        key: VipKey,
        /// Its new value.
        entry: SvcEntry,
    },
    /// Removes a service.
    DeleteService {
        /// Which.
        key: VipKey,
    },
    /// Adds or replaces a peer.
    PutPeer {
        /// Its prefix.
        prefix: IpNet,
        /// Its value.
        peer: Peer,
    },
    /// Removes a peer.
    DeletePeer {
        /// Its prefix.
        prefix: IpNet,
    },
    /// Lets clients come by an entry that asks for them.
    PutSourceRange {
        /// Who, and by which.
        range: SourceRange,
    },
    /// The opposite.
    DeleteSourceRange {
        /// Who, and by which.
        range: SourceRange,
    },
    /// Frees slots of `rn_backends_v2`. No service has referred to them for a grace period.
    ClearBackends {
        /// The ids that the slots hold.
        ids: Vec<u32>,
    },
    /// Puts elements of `rn_backends_v2` back that somebody else has changed, by slot.
    RestoreBackends {
        /// What should stand there.
        slots: Vec<(u32, Backend)>,
    },
    /// Puts elements of `rn_backend_ids` back that somebody else has changed, by index.
    RestoreIds {
        /// What should stand there.
        ids: Vec<(u32, u32)>,
    },
    /// Puts words of `rn_maglev` back that somebody else has changed, by index.
    RestoreTables {
        /// What should stand there.
        words: Vec<(u32, u64)>,
    },
    /// Marks backends of UDP that serve no more ([`ENDED`](rustnet_common::backend::flags::ENDED)): programs end their flows. No service
    /// refers to them.
    EndBackends {
        /// The ids that the slots hold.
        ids: Vec<u32>,
    },
}

/// What the maps hold, read back at start.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Snapshot {
    /// Services of both families.
    pub services: BTreeMap<VipKey, SvcEntry>,
    /// `rn_backend_ids`, from index 0 to the last that was ever written at least.
    pub ids: Vec<u32>,
    /// `rn_backends_v2`, from index 0 to the last that was ever written at least. Slots that no
    /// service refers to are welcome: their ids are not given out again soon.
    pub backends: Vec<Backend>,
    /// `rn_maglev`, from index 0 to the last word that was ever written at least.
    pub tables: Vec<u64>,
    /// Peers of both families.
    pub peers: BTreeMap<IpNet, Peer>,
    /// `rn_source_ranges`: each range is `rustnet_common::source_range::ALLOWED`.
    pub source_ranges: BTreeMap<SourceRange, u32>,
}

impl Snapshot {
    /// The backends that a service leads to, in order; `None` in place of each id that leads to no
    /// backend of it.
    pub fn backends_of(&self, entry: &SvcEntry) -> impl Iterator<Item = Option<&Backend>> + use<'_> {
        let SvcEntry { first, count, id: service, .. } = *entry;
        (0..count).map(move |i| {
            let id = *self.ids.get(first.checked_add(i)? as usize)?;
            let backend = self.backends.get(id::slot_of(id) as usize)?;
            (id != 0 && backend.id == id && backend.service == service).then_some(backend)
        })
    }

    /// The ordinals in the places of the Maglev table that begins with a unit; `None` if there is no table.
    pub fn ordinals(&self, unit: u16) -> Option<impl Iterator<Item = u32> + use<'_>> {
        let first = head(unit) as usize;
        let size = usize::try_from(*self.tables.get(first)?).ok().filter(|size| *size > 0)?;
        let words = self.tables.get(first + 1..first + 1 + size.div_ceil(PLACES as usize))?;
        let ordinals = words.iter().flat_map(|word| [0, 16, 32, 48].map(|bits| ordinal(*word, bits)));
        Some(ordinals.take(size))
    }
}

/// What an audit reads, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// Backends and their ids.
    Backends,
    /// Maglev tables.
    Maglev,
    /// Ranges of clients, of both families.
    SourceRanges,
    /// Services, IPv4.
    Services4,
    /// Services, IPv6.
    Services6,
    /// Peers of both families.
    Peers,
}

impl Table {
    /// All of them, in the order in which they are read: what is led to before what leads there.
    pub const ALL: [Self; 6] =
        [Self::Backends, Self::Maglev, Self::SourceRanges, Self::Services4, Self::Services6, Self::Peers];
}

/// The maps, as the plan sees them.
pub trait Maps {
    /// Reads everything back.
    fn snapshot(&self) -> anyhow::Result<Snapshot>;
    /// Reads the next piece of a table back; the other tables may be missing in the result. True: it is the last piece, and
    /// the next call begins again.
    fn read(&mut self, _table: Table) -> anyhow::Result<(Snapshot, bool)> {
        Ok((self.snapshot()?, true))
    }
    /// Reads so many words of Maglev tables back, fewer at the end of the map.
    fn read_words(&self, first: u32, count: u32) -> anyhow::Result<Vec<u64>> {
        let words = self.snapshot()?.tables;
        let end = self.table_capacity().min(first.saturating_add(count));
        Ok((first..end).map(|index| words.get(index as usize).copied().unwrap_or_default()).collect())
    }
    /// Reads one service.
    fn service(&self, key: &VipKey) -> anyhow::Result<Option<SvcEntry>> {
        Ok(self.snapshot()?.services.get(key).copied())
    }
    /// Applies writes in order. After an error some prefix of them is in effect; take a new snapshot and adopt it.
    fn apply(&mut self, writes: &[Write]) -> anyhow::Result<()>;
    /// Slots of `rn_backend_ids` and of `rn_backends_v2`, each.
    fn backend_capacity(&self) -> u32;
    /// Words of Maglev tables that the map can hold.
    fn table_capacity(&self) -> u32 {
        0
    }
    /// Services of either family that the maps can hold.
    fn service_capacity(&self) -> u32 {
        u32::MAX
    }
    /// Peers of either family that the maps can hold.
    fn peer_capacity(&self) -> u32 {
        u32::MAX
    }
    /// Ranges of clients that the map can hold.
    fn source_range_capacity(&self) -> u32 {
        u32::MAX
    }
}
