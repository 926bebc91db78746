//! The audit: now and then every map is read back and compared with what the plan has written, and what somebody else
//! changed is written again. One piece a step, so that no step keeps events waiting for long.

use super::{Snapshot, SourceRange, Table, VipKey, Write};
use crate::config::AUDIT_PERIOD;
use ipnet::IpNet;
use rustnet_common::backend::Backend;
use rustnet_common::names::map;
use rustnet_common::peer::Peer;
use rustnet_common::service::SvcEntry;
use std::collections::HashSet;
use std::fmt::{Debug, Display};
use std::time::Duration;

/// Something that a map should not hold, or should.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Name of the map.
    pub map: &'static str,
    /// The entry, and what it was.
    pub what: String,
}

/// Words of Maglev tables that an audit reads at once: half a MiB.
pub const AUDIT_WORDS: u32 = 65_536;

/// How far an audit is.
#[derive(Clone, Debug)]
pub struct Progress {
    period: Duration,
    due: Duration,
    table: usize,
    /// Entries of the present table that were found in earlier pieces.
    seen: HashSet<VipKey>,
    /// The first word of the next piece of Maglev tables.
    word: u32,
}

impl Default for Progress {
    fn default() -> Self {
        Self { period: AUDIT_PERIOD, due: AUDIT_PERIOD, table: 0, seen: HashSet::new(), word: 0 }
    }
}

impl Progress {
    /// Another period. The first audit begins after one.
    pub fn set_period(&mut self, period: Duration) {
        (self.period, self.due) = (period, period);
    }

    /// Time between two audits.
    pub fn period(&self) -> Duration {
        self.period
    }

    /// The next audit begins after a period.
    pub fn begin_again(&mut self, now: Duration) {
        *self = Self { period: self.period, due: now + self.period, ..Self::default() };
    }

    /// When the next piece is to be read.
    pub fn due(&self) -> Duration {
        self.due
    }

    /// Whose turn it is.
    pub fn table(&self) -> Table {
        Table::ALL[self.table]
    }

    /// A piece has been compared.
    pub fn advance(&mut self, is_last_piece: bool, now: Duration) {
        if is_last_piece {
            self.table += 1;
            (self.seen, self.word) = (HashSet::new(), 0);
        }
        if self.table == Table::ALL.len() {
            self.begin_again(now);
        } else {
            self.due = now;
        }
    }

    /// The first word of the next piece of Maglev tables.
    pub fn word(&self) -> u32 {
        self.word
    }

    /// So many words have been read.
    pub fn pass_words(&mut self, count: usize) {
        self.word += count as u32;
    }

    /// Notes which of the expected entries were found.
    pub fn note(&mut self, found: impl Iterator<Item = VipKey>) {
        self.seen.extend(found);
    }

    /// Those of `count` expected entries that were not found. To be looked up: they may have been written while the audit went on.
    pub fn unseen<'a>(&self, count: usize, keys: impl Iterator<Item = &'a VipKey>) -> Vec<VipKey> {
        if self.seen.len() == count {
            return Vec::new();
        }
        let mut unseen: Vec<VipKey> = keys.filter(|key| !self.seen.contains(key)).copied().collect();
        unseen.sort_unstable();
        unseen
    }
}

/// What differs, and the writes that put it right.
#[derive(Debug, Default)]
pub struct Repair {
    /// For people.
    pub differences: Vec<Difference>,
    deletes: Vec<Write>,
    puts: Vec<Write>,
}

/// The key of an entry that the plan keeps.
pub trait Key: Copy + Display {
    /// Its value.
    type Value: Copy + PartialEq + Debug;
    /// The name of its map.
    fn map(&self) -> &'static str;
    /// The write that makes it have this value.
    fn put(self, value: Self::Value) -> Write;
    /// The write that deletes it.
    fn delete(self) -> Write;
}

impl Key for VipKey {
    type Value = SvcEntry;
    fn map(&self) -> &'static str {
        if self.ip.is_ipv4() { map::SVC4 } else { map::SVC6 }
    }
    fn put(self, entry: SvcEntry) -> Write {
        Write::PutService { key: self, entry }
    }
    fn delete(self) -> Write {
        Write::DeleteService { key: self }
    }
}

impl Key for IpNet {
    type Value = Peer;
    fn map(&self) -> &'static str {
        if self.addr().is_ipv4() { map::PEERS4 } else { map::PEERS6 }
    }
    fn put(self, peer: Peer) -> Write {
        Write::PutPeer { prefix: self, peer }
    }
    fn delete(self) -> Write {
        Write::DeletePeer { prefix: self }
    }
}

impl Key for SourceRange {
    type Value = u32;
    fn map(&self) -> &'static str {
        map::SOURCE_RANGES
    }
    fn put(self, _: u32) -> Write {
        Write::PutSourceRange { range: self }
    }
    fn delete(self) -> Write {
        Write::DeleteSourceRange { range: self }
    }
}

impl Repair {
    /// In order: what does not belong there goes first, for it may take the room of what does.
    pub fn into_writes(mut self) -> (Vec<Write>, Vec<Difference>) {
        self.deletes.append(&mut self.puts);
        (self.deletes, self.differences)
    }

    /// Compares an entry: what it is with what it should be.
    pub fn entry<K: Key>(&mut self, key: K, is: Option<K::Value>, should: Option<K::Value>) {
        let what = match (is, should) {
            (Some(is), None) => format!("{key} does not belong there: {is:?}"),
            (None, Some(_)) => format!("{key} was missing"),
            (Some(is), Some(should)) if is != should => format!("{key} was changed to {is:?}"),
            _ => return,
        };
        self.differences.push(Difference { map: key.map(), what });
        match should {
            Some(value) => self.puts.push(key.put(value)),
            None => self.deletes.push(key.delete()),
        }
    }

    /// Compares both arrays; behind the end of what they should hold there are zeros.
    pub fn arrays(&mut self, found: &Snapshot, backends: &[Backend], ids: &[u32], capacity: u32) {
        let capacity = capacity as usize;
        let slots = elements(map::BACKENDS, 0, backends, &found.backends, capacity, &mut self.differences);
        if !slots.is_empty() {
            self.puts.push(Write::RestoreBackends { slots });
        }
        let ids = elements(map::BACKEND_IDS, 0, ids, &found.ids, capacity, &mut self.differences);
        if !ids.is_empty() {
            self.puts.push(Write::RestoreIds { ids });
        }
    }

    /// Compares words of the Maglev tables, likewise: a piece that was found at `first`, with all that there should be.
    pub fn tables(&mut self, first: u32, found: &[u64], words: &[u64]) {
        let expected = words.get(first as usize..).unwrap_or_default();
        let expected = &expected[..expected.len().min(found.len())];
        let words = elements(map::MAGLEV, first, expected, found, found.len(), &mut self.differences);
        if !words.is_empty() {
            self.puts.push(Write::RestoreTables { words });
        }
    }
}

/// Compares an array, or a piece that begins at `first`; returns the elements that differ as they should be.
fn elements<T: bytemuck::Pod + PartialEq + Debug>(
    map: &'static str,
    first: u32,
    expected: &[T],
    found: &[T],
    capacity: usize,
    differences: &mut Vec<Difference>,
) -> Vec<(u32, T)> {
    let at = |array: &[T], index| array.get(index).copied().unwrap_or_else(T::zeroed);
    let end = expected.len().max(found.len().min(capacity));
    let mut wrong = Vec::new();
    for index in 0..end {
        let (should, is) = (at(expected, index), at(found, index));
        if should != is {
            let index = first + index as u32;
            differences.push(Difference { map, what: format!("element {index} was changed to {is:?}") });
            wrong.push((index, should));
        }
    }
    wrong
}
