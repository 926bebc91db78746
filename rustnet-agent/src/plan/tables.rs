//! Maglev tables: which unit of `rn_maglev` each begins with, and who shares it. Sets of backends with the same addresses have one
//! table, so that a Service of many ports has one, too.
//!
//! A table is never rewritten while an entry leads to it: other addresses get another one.

use super::ranges::Ranges;
use super::{GRACE, Write, maglev};
use rustnet_common::maglev::{MAX_SIZE, MAX_UNITS, UNIT, head, units};
use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

/// What identifies a table.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Name {
    size: u32,
    /// Of the backends, in order.
    addresses: Box<[IpAddr]>,
}

/// A table that sets lead to.
#[derive(Debug)]
struct Table {
    /// `None`: it was read back, and no set of it has been planned yet.
    name: Option<Name>,
    units: u32,
    /// Sets.
    users: u32,
}

/// All tables, and `rn_maglev`.
#[derive(Debug)]
pub struct Tables {
    by_unit: HashMap<u16, Table>,
    by_name: HashMap<Name, u16>,
    /// What the map holds, up to the last word that was ever written.
    words: Vec<u64>,
    units: Ranges,
    capacity: u32,
    /// Tables that entries led to which are none of their set any more, until the first plan.
    stale: Vec<u16>,
}

impl Tables {
    /// Begins with what the map holds, which has room for so many words. Tables that entries lead to are adopted next.
    pub fn new(mut words: Vec<u64>, capacity: u32) -> Self {
        words.truncate(capacity as usize);
        let capacity = (capacity / UNIT).min(MAX_UNITS);
        let mut units = Ranges::new(capacity, GRACE);
        // The number 0 stands for no table.
        let _ = units.claim(0, 1);
        Self { by_unit: HashMap::new(), by_name: HashMap::new(), words, units, capacity, stale: Vec::new() }
    }

    /// The words of the map, once all writes are applied.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Words that the map has room for.
    pub fn capacity(&self) -> u32 {
        self.capacity * UNIT
    }

    /// A set was read back that has this table. False: there is no such table.
    pub fn adopt(&mut self, unit: u16) -> bool {
        if let Some(table) = self.by_unit.get_mut(&unit) {
            table.users += 1;
            return true;
        }
        let Some(units) = self.size_at(unit).map(units).filter(|units| self.units.claim(unit.into(), *units)) else {
            return false;
        };
        self.by_unit.insert(unit, Table { name: None, units, users: 1 });
        // Words of zeros at the end of the map were not read.
        let end = (head(unit) + units * UNIT) as usize;
        self.words.resize(self.words.len().max(end), 0);
        true
    }

    /// An entry was read back that leads to this table, and its set does not. Nobody else gets its place before the first plan.
    pub fn hold(&mut self, unit: u16) {
        if self.adopt(unit) {
            self.stale.push(unit);
        }
    }

    /// All entries have been planned.
    pub fn leave_stale(&mut self) {
        for unit in std::mem::take(&mut self.stale) {
            self.leave(unit);
        }
    }

    /// All tables have been adopted: what else was ever written may have been let go of a moment ago.
    pub fn retire_others(&mut self) {
        self.units.retire_free_below((self.words.len() as u32).div_ceil(UNIT));
    }

    /// The table of a set that has `held` now, 0 for none: one of this size for these addresses. The set leads to it, and to `held` no
    /// more.
    ///
    /// # Errors
    /// There is no room, or the size is too small. The set has none, and leads to `held` no more.
    pub fn lead(
        &mut self,
        held: u16,
        size: u32,
        addresses: impl Iterator<Item = IpAddr>,
        writes: &mut Vec<Write>,
    ) -> Result<u16, String> {
        let addresses: Box<[IpAddr]> = if size == 0 { Box::default() } else { addresses.collect() };
        // Where there is no choice, no table is needed.
        if addresses.len() < 2 {
            self.leave(held);
            return Ok(0);
        }
        let name = Name { size, addresses };
        let known = self.by_name.get(&name).copied();
        if known.is_some_and(|unit| unit == held) {
            return Ok(held);
        }
        let table = match known {
            Some(unit) => Ok(Some(unit)),
            None => self.make(held, &name, writes),
        };
        let table = match table {
            // Flows are spread over these addresses already, by a table of another size.
            Ok(None) if self.leads_to(held, &name.addresses) => return Ok(held),
            Ok(None) => Err(format!("has no room for its Maglev table of {size} places; raise maglev-entries")),
            Ok(Some(unit)) => {
                self.by_unit.entry(unit).and_modify(|table| table.users += 1);
                Ok(unit)
            }
            Err(error) => Err(error),
        };
        self.leave(held);
        table
    }

    /// One set less leads to a table.
    pub fn leave(&mut self, unit: u16) {
        let Some(table) = self.by_unit.get_mut(&unit) else { return };
        table.users -= 1;
        if table.users == 0 {
            self.units.retire(unit.into(), table.units);
            if let Some(name) = self.by_unit.remove(&unit).and_then(|table| table.name) {
                self.by_name.remove(&name);
            }
        }
    }

    /// Makes a table, or takes the one that was read back if it is the same. `None`: there is no room.
    ///
    /// # Errors
    /// The size is too small.
    fn make(&mut self, held: u16, name: &Name, writes: &mut Vec<Write>) -> Result<Option<u16>, String> {
        let Name { size, addresses } = name;
        if !maglev::fits(*size, addresses.len()) {
            let count = addresses.len();
            return Err(format!(
                "has {count} backends, too many for a Maglev table of {size} places; raise maglev-table-size"
            ));
        }
        let is_read_back = self.by_unit.get(&held).is_some_and(|table| table.name.is_none());
        if is_read_back && self.size_at(held) == Some(*size) && self.leads_to(held, addresses) {
            self.name(held, name);
            return Ok(Some(held));
        }
        // Before it is filled, which takes far longer.
        let wanted = units(*size);
        let Some(unit) = self.units.alloc(wanted).and_then(|unit| u16::try_from(unit).ok()) else { return Ok(None) };
        let words = maglev::words(&maglev::fill(*size, addresses));
        let at = head(unit) as usize..head(unit) as usize + words.len();
        if self.words.len() < at.end {
            self.words.resize(at.end, 0);
        }
        self.words[at].copy_from_slice(&words);
        writes.push(Write::MaglevTable { unit, words });
        self.by_unit.insert(unit, Table { name: None, units: wanted, users: 0 });
        self.name(unit, name);
        Ok(Some(unit))
    }

    fn name(&mut self, unit: u16, name: &Name) {
        if let Some(table) = self.by_unit.get_mut(&unit) {
            table.name = Some(name.clone());
            self.by_name.insert(name.clone(), unit);
        }
    }

    /// Places of the table that begins there.
    fn size_at(&self, unit: u16) -> Option<u32> {
        let size = u32::try_from(*self.words.get(head(unit) as usize)?).ok()?;
        (unit != 0 && (1..=MAX_SIZE).contains(&size)).then_some(size)
    }

    /// True if a table, whatever its size, spreads flows over these addresses.
    fn leads_to(&self, unit: u16, addresses: &[IpAddr]) -> bool {
        let Some(table) = self.by_unit.get(&unit) else { return false };
        if let Some(name) = &table.name {
            return *name.addresses == *addresses;
        }
        let Some(size) = self.size_at(unit).filter(|size| maglev::fits(*size, addresses.len())) else { return false };
        let words = maglev::words(&maglev::fill(size, addresses));
        let first = head(unit) as usize;
        self.words.get(first..first + words.len()).is_some_and(|there| *there == *words)
    }

    /// Time passes. True if room became free.
    pub fn tick(&mut self, now: Duration) -> bool {
        self.units.tick(now)
    }

    /// When room is free for those who wait for it, if some is about to be.
    pub fn next_release(&self, now: Duration) -> Option<Duration> {
        (self.units.held() > 0).then(|| self.units.next_release().unwrap_or(now + GRACE))
    }
}

#[cfg(test)]
mod tests {
    use super::{Tables, UNIT, Write};
    use std::net::IpAddr;
    use std::time::Duration;

    fn addresses(hosts: &[u8]) -> impl Iterator<Item = IpAddr> {
        hosts.iter().map(|host| IpAddr::from([10, 244, 0, *host]))
    }

    fn lead(tables: &mut Tables, held: u16, hosts: &[u8]) -> (Result<u16, String>, Vec<Write>) {
        let mut writes = Vec::new();
        (tables.lead(held, 251, addresses(hosts), &mut writes), writes)
    }

    #[test]
    fn sets_with_the_same_addresses_share_a_table() {
        let mut tables = Tables::new(Vec::new(), 4 * UNIT);
        let (first, writes) = lead(&mut tables, 0, &[1, 2, 3]);
        assert_eq!((first, writes.len()), (Ok(1), 1));
        assert_eq!(lead(&mut tables, 0, &[1, 2, 3]), (Ok(1), vec![]));
        assert_eq!(lead(&mut tables, 1, &[1, 2, 3]), (Ok(1), vec![]));
        let (other, writes) = lead(&mut tables, 1, &[1, 2]);
        assert_eq!((other, writes.len()), (Ok(2), 1));
        // The first is still led to by the other set.
        tables.leave(1);
        assert_eq!(lead(&mut tables, 0, &[1, 2, 3]).0, Ok(3));
    }

    #[test]
    fn one_backend_needs_no_table() {
        let mut tables = Tables::new(Vec::new(), 4 * UNIT);
        assert_eq!(lead(&mut tables, 0, &[1]), (Ok(0), vec![]));
        assert_eq!(tables.lead(0, 0, addresses(&[1, 2]), &mut Vec::new()), Ok(0));
    }

    #[test]
    fn what_was_let_go_of_rests_and_is_free_then() {
        let mut tables = Tables::new(Vec::new(), 3 * UNIT);
        let ms = Duration::from_millis;
        assert_eq!(lead(&mut tables, 0, &[1, 2]).0, Ok(1));
        assert_eq!(lead(&mut tables, 0, &[1, 3]).0, Ok(2));
        let (full, writes) = lead(&mut tables, 2, &[1, 4]);
        assert!(full.unwrap_err().contains("raise maglev-entries") && writes.is_empty());
        assert_eq!(tables.next_release(ms(0)), Some(ms(100)));
        assert!(!tables.tick(ms(0)));
        assert!(lead(&mut tables, 0, &[1, 4]).0.is_err());
        assert!(tables.tick(ms(100)));
        assert_eq!(lead(&mut tables, 0, &[1, 4]).0, Ok(2));
    }

    #[test]
    fn tables_that_were_read_back_stay_if_they_are_the_same() {
        let mut before = Tables::new(Vec::new(), 8 * UNIT);
        assert_eq!([&[1, 2][..], &[1, 3]].map(|hosts| lead(&mut before, 0, hosts).0), [Ok(1), Ok(2)]);
        let mut words = before.words().to_vec();
        words[2 * UNIT as usize + 5] ^= 1;
        let mut tables = Tables::new(words, 8 * UNIT);
        assert_eq!([1, 1, 2, 3, 0, 900].map(|unit| tables.adopt(unit)), [true, true, true, false, false, false]);
        tables.retire_others();
        assert_eq!(lead(&mut tables, 1, &[1, 2]), (Ok(1), vec![]));
        assert_eq!(lead(&mut tables, 1, &[1, 2]), (Ok(1), vec![]));
        let (repaired, writes) = lead(&mut tables, 2, &[1, 3]);
        assert_eq!((repaired, writes.len()), (Ok(3), 1));
    }

    /// The last place may be of the first backend, and stand alone in its word.
    #[test]
    fn words_of_zeros_at_the_end_are_not_missed() {
        for (size, last) in [13, 17, 257, 16_381].into_iter().flat_map(|size| (2..12).map(move |last| (size, last))) {
            let mut before = Tables::new(Vec::new(), 32 * UNIT);
            assert_eq!(before.lead(0, size, addresses(&[1, last]), &mut Vec::new()), Ok(1));
            let mut words = before.words().to_vec();
            words.truncate(words.iter().rposition(|word| *word != 0).unwrap() + 1);
            let mut tables = Tables::new(words, 32 * UNIT);
            assert!(tables.adopt(1));
            let mut writes = Vec::new();
            assert_eq!(tables.lead(1, size, addresses(&[1, last]), &mut writes), Ok(1));
            assert_eq!(writes, [], "{size} places, 10.244.0.{last}");
        }
    }

    /// While there is no room for one of the size that is wanted now.
    #[test]
    fn a_table_of_another_size_stays_where_there_is_no_room() {
        let mut tables = Tables::new(Vec::new(), 2 * UNIT);
        assert_eq!(lead(&mut tables, 0, &[1, 2]).0, Ok(1));
        let mut writes = Vec::new();
        assert_eq!(tables.lead(1, 257, addresses(&[1, 2]), &mut writes), Ok(1));
        assert!(tables.lead(1, 257, addresses(&[1, 3]), &mut writes).is_err() && writes.is_empty());
    }

    #[test]
    fn damaged_sizes_are_no_tables() {
        for size in [0, u64::MAX, 1 << 20, 5000] {
            let mut words = vec![0; 2 * UNIT as usize];
            words[UNIT as usize] = size;
            assert!(!Tables::new(words, 2 * UNIT).adopt(1), "{size}");
        }
    }
}
