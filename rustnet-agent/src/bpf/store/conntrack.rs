//! `rn_ct4/6`: read, swept and forgotten by user space; written by the programs.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::hash::Hash;
use std::path::Path;

use anyhow::Result;
use rustnet_common::addr::{Address, Ip4, Ip6};
use rustnet_common::conntrack::CtEntry;
use rustnet_common::names::map;
use rustnet_common::tuple::Tuple;

use super::Map;

/// Connections of one family.
type Table<A> = Map<Tuple<A>, CtEntry<A>>;

/// Both connection tables.
pub struct Conntrack {
    /// `rn_ct4`.
    pub v4: Table<Ip4>,
    /// `rn_ct6`.
    pub v6: Table<Ip6>,
}

/// What a sweep found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Entries there were, both halves counted.
    pub seen: usize,
    /// Entries deleted.
    pub deleted: usize,
}

impl std::ops::Add for Swept {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self { seen: self.seen + other.seen, deleted: self.deleted + other.deleted }
    }
}

impl Conntrack {
    /// Opens the pins in `bpffs`.
    pub fn open(bpffs: &Path) -> Result<Self> {
        Ok(Self { v4: Map::open(bpffs, map::CT4)?, v6: Map::open(bpffs, map::CT6)? })
    }

    /// Deletes both halves of each connection of a protocol whose backend is in that protocol's set.
    pub fn forget(&self, backends: &BTreeMap<u8, BTreeSet<u32>>) -> Result<Swept> {
        Ok(forget(&self.v4, backends)? + forget(&self.v6, backends)?)
    }

    /// Deletes connections of which both halves have expired. `expired` decides for one half.
    pub fn sweep(&self, expired: impl Fn(u8, u8, u32) -> bool) -> Result<Swept> {
        Ok(sweep(&self.v4, &expired)? + sweep(&self.v6, &expired)?)
    }
}

/// The key of the other half of a connection.
pub fn other_half<A: Address>(entry: &CtEntry<A>) -> Tuple<A> {
    entry.to.reversed()
}

fn forget<A>(table: &Table<A>, backends: &BTreeMap<u8, BTreeSet<u32>>) -> Result<Swept>
where
    A: Address + Eq + Hash,
    Tuple<A>: bytemuck::Pod,
    CtEntry<A>: bytemuck::Pod,
{
    let mut seen = 0;
    let mut keys = HashSet::new();
    table.for_each(|key, entry| {
        seen += 1;
        if backends.get(&key.proto).is_some_and(|ids| ids.contains(&entry.backend)) {
            keys.insert(*key);
            keys.insert(other_half(entry));
        }
    })?;
    let keys: Vec<_> = keys.into_iter().collect();
    Ok(Swept { seen, deleted: table.delete_all(&keys)? })
}

fn sweep<A>(table: &Table<A>, expired: impl Fn(u8, u8, u32) -> bool) -> Result<Swept>
where
    A: Address + Eq + Hash,
    Tuple<A>: bytemuck::Pod,
    CtEntry<A>: bytemuck::Pod,
{
    let mut seen = 0;
    let mut old = Vec::new();
    table.for_each(|key, entry| {
        seen += 1;
        if expired(key.proto, entry.state, entry.seen) {
            old.push((*key, other_half(entry)));
        }
    })?;
    // Both halves are looked at again, right before they go: they are refreshed apart from each other, so that one that is in
    // use keeps both; and a client may use its port again while the table is read, which revives what was old then.
    let is_dead = |key: &Tuple<A>| Ok(table.get(key)?.is_none_or(|half| expired(key.proto, half.state, half.seen)));
    let mut deleted = 0;
    for (key, other) in old {
        let dead: Result<bool> = is_dead(&key).and_then(|dead| Ok(dead && is_dead(&other)?));
        if dead? {
            deleted += usize::from(table.delete(&key)?) + usize::from(table.delete(&other)?);
        }
    }
    Ok(Swept { seen, deleted })
}

#[cfg(test)]
pub mod build {
    //! Tables for tests.

    use super::{Conntrack, CtEntry, Map, Table, Tuple};
    use crate::bpf::sys::{Layout, map_create};
    use bytemuck::Pod;

    fn table<A>() -> Table<A>
    where
        Tuple<A>: Pod,
        CtEntry<A>: Pod,
    {
        let (key_size, value_size) = (size_of::<Tuple<A>>() as u32, size_of::<CtEntry<A>>() as u32);
        let fd = map_create("rn_ct", Layout { kind: 9, key_size, value_size, max_entries: 4096, flags: 0 }).unwrap();
        Map::from_fd(fd, "rn_ct").unwrap()
    }

    /// Empty tables, pinned nowhere.
    pub fn tables() -> Conntrack {
        Conntrack { v4: table(), v6: table() }
    }
}

#[cfg(test)]
mod tests {
    use super::build::tables;
    use super::{Map, Swept};
    use bytemuck::Zeroable;
    use rustnet_common::addr::Ip4;
    use rustnet_common::conntrack::CtEntry;
    use rustnet_common::tuple::{Tuple, proto};
    use std::cell::Cell;
    use std::collections::{BTreeMap, BTreeSet};
    use std::net::Ipv4Addr;

    fn tuple(sport: u16, proto: u8) -> Tuple<Ip4> {
        let (src, dst) = (Ipv4Addr::new(10, 0, 0, 2).into(), Ipv4Addr::new(10, 96, 0, 1).into());
        Tuple { src, dst, sport, dport: 80, proto, ..Tuple::zeroed() }
    }

    /// A connection translated to 10.0.1.9:8080; the halves were seen at the times given.
    fn add(table: &Map<Tuple<Ip4>, CtEntry<Ip4>>, orig: Tuple<Ip4>, backend: u32, seen: [u32; 2]) {
        let to = Tuple { dst: Ipv4Addr::new(10, 0, 1, 9).into(), dport: 8080, ..orig };
        let half = |to, seen| CtEntry { to, seen, backend, ..CtEntry::zeroed() };
        table.put(&orig, &half(to, seen[0])).unwrap();
        table.put(&to.reversed(), &half(orig.reversed(), seen[1])).unwrap();
    }

    #[test]
    fn a_sweep_deletes_pairs_of_which_both_halves_are_old() {
        let ct = tables();
        add(&ct.v4, tuple(1, proto::TCP), 1, [10, 10]);
        add(&ct.v4, tuple(2, proto::TCP), 1, [10, 90]);
        add(&ct.v4, tuple(3, proto::TCP), 1, [90, 10]);
        add(&ct.v4, tuple(4, proto::TCP), 1, [90, 90]);
        let swept = ct.sweep(|_, _, seen| seen < 50).unwrap();
        assert_eq!(swept, Swept { seen: 8, deleted: 2 });
        assert_eq!(ct.v4.get(&tuple(1, proto::TCP)).unwrap(), None);
        assert_eq!(ct.v4.len().unwrap(), 6);
    }

    #[test]
    fn a_connection_that_is_used_again_while_the_table_is_read_stays() {
        let revived = tuple(1, proto::UDP);
        for which in [0, 1] {
            let ct = tables();
            add(&ct.v4, revived, 1, [10, 10]);
            let looks = Cell::new(0);
            let swept = ct.sweep(|_, _, seen| {
                looks.set(looks.get() + 1);
                // Both halves have been read by now.
                if looks.get() == 2 {
                    let mut seen = [10, 10];
                    seen[which] = 90;
                    add(&ct.v4, revived, 1, seen);
                }
                seen < 50
            });
            assert_eq!(swept.unwrap().deleted, 0);
            assert_eq!(ct.v4.len().unwrap(), 2);
        }
    }

    #[test]
    fn a_half_whose_other_was_evicted_goes_when_old() {
        let ct = tables();
        add(&ct.v4, tuple(1, proto::UDP), 1, [10, 10]);
        ct.v4.delete(&tuple(1, proto::UDP)).unwrap();
        assert_eq!(ct.sweep(|_, _, _| true).unwrap(), Swept { seen: 1, deleted: 1 });
    }

    #[test]
    fn forgetting_takes_both_halves_of_the_named_backends_and_protocol() {
        let ct = tables();
        add(&ct.v4, tuple(1, proto::UDP), 7, [0, 0]);
        add(&ct.v4, tuple(2, proto::UDP), 8, [0, 0]);
        add(&ct.v4, tuple(3, proto::TCP), 7, [0, 0]);
        let swept = ct.forget(&BTreeMap::from([(proto::UDP, BTreeSet::from([7]))])).unwrap();
        assert_eq!(swept, Swept { seen: 6, deleted: 2 });
        assert_eq!(ct.v4.get(&tuple(1, proto::UDP)).unwrap(), None);
        assert!(ct.v4.get(&tuple(3, proto::TCP)).unwrap().is_some());
    }
}
