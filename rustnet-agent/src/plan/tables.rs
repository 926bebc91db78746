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
}

impl Tables {
    /// Begins with what the map holds, which has room for so many words. Tables that entries lead to are adopted next.
    pub fn new(mut words: Vec<u64>, capacity: u32) -> Self {
        words.truncate(capacity as usize);
        let capacity = (capacity / UNIT).min(MAX_UNITS);
        let mut units = Ranges::new(capacity, GRACE);
        // The number 0 stands for no table.
        let _ = units.claim(0, 1);
        Self { by_unit: HashMap::new(), by_name: HashMap::new(), words, units, capacity }
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
        let size = self.words.get(head(unit) as usize).map_or(0, |size| u32::try_from(*size).unwrap_or(0));
        let is_sound = unit != 0 && (1..=MAX_SIZE).contains(&size) && self.units.claim(unit.into(), units(size));
        if is_sound {
            self.by_unit.insert(unit, Table { name: None, units: units(size), users: 1 });
        }
        is_sound
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
        let table = match self.by_name.get(&name) {
            Some(unit) if *unit == held => return Ok(held),
            Some(unit) => Ok(Some(*unit)),
            None => self.make(held, name, writes),
        };
        if let Ok(Some(unit)) = table {
            self.by_unit.entry(unit).and_modify(|table| table.users += 1);
        }
        self.leave(held);
        table?.ok_or_else(|| self.no_room(units(size)))
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
    fn make(&mut self, held: u16, name: Name, writes: &mut Vec<Write>) -> Result<Option<u16>, String> {
        let Name { size, addresses } = &name;
        let places = maglev::fill(*size, addresses)
            .ok_or_else(|| format!("has {} backends, too many for a Maglev table of {size} places", addresses.len()));
        let words = maglev::words(&places.map_err(|error| format!("{error}; raise maglev-table-size"))?);
        let at = |unit: u16| head(unit) as usize..head(unit) as usize + words.len();
        let read_back = self.by_unit.get_mut(&held).filter(|table| table.name.is_none());
        if let Some(table) = read_back.filter(|_| self.words.get(at(held)).is_some_and(|there| *there == *words)) {
            table.name = Some(name.clone());
            self.by_name.insert(name, held);
            return Ok(Some(held));
        }
        let wanted = units(*size);
        let Some(unit) = self.units.alloc(wanted).and_then(|unit| u16::try_from(unit).ok()) else { return Ok(None) };
        let at = at(unit);
        if self.words.len() < at.end {
            self.words.resize(at.end, 0);
        }
        self.words[at].copy_from_slice(&words);
        writes.push(Write::MaglevTable { unit, words });
        self.by_unit.insert(unit, Table { name: Some(name.clone()), units: wanted, users: 0 });
        self.by_name.insert(name, unit);
        Ok(Some(unit))
    }

    fn no_room(&self, wanted: u32) -> String {
        let ((free, longest), held) = (self.units.room(), self.units.held());
        let of = |units: u32| units * UNIT;
        format!(
            "needs {} words of rn_maglev, of {} there are {} free (longest run {}) and {} about to be; raise maglev-entries",
            of(wanted),
            self.capacity(),
            of(free),
            of(longest),
            of(held)
        )
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

    #[test]
    fn damaged_sizes_are_no_tables() {
        for size in [0, u64::MAX, 1 << 20, 5000] {
            let mut words = vec![0; 2 * UNIT as usize];
            words[UNIT as usize] = size;
            assert!(!Tables::new(words, 2 * UNIT).adopt(1), "{size}");
        }
    }
}
