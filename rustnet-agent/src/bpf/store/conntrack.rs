//! The connection tables: read and swept by user space; written by the programs.

use std::collections::BTreeSet;
use std::mem::offset_of;
use std::net::IpAddr;
use std::path::Path;

use anyhow::Result;
use bytemuck::Pod;
use rustnet_common::addr::{Address, Ip4, Ip6};
use rustnet_common::conntrack::{CtEntry, SLOT_CONTESTED, flags};
use rustnet_common::names::map;
use rustnet_common::tuple::{Tuple, proto};

use super::Map;

/// Connections of one family and kind of protocol.
pub type Table<A> = Map<Tuple<A>, CtEntry<A>>;

/// Connections of one family.
pub struct Tables<A> {
    /// TCP.
    pub tcp: Table<A>,
    /// All other protocols.
    pub any: Table<A>,
}

/// All connection tables.
pub struct Conntrack {
    /// `rn_ct4_tcp`, `rn_ct4_any`.
    pub v4: Tables<Ip4>,
    /// `rn_ct6_tcp`, `rn_ct6_any`.
    pub v6: Tables<Ip6>,
}

/// What a sweep found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Entries there were; a translated flow has two.
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
        Ok(Self {
            v4: Tables { tcp: Map::open(bpffs, map::CT4_TCP)?, any: Map::open(bpffs, map::CT4_ANY)? },
            v6: Tables { tcp: Map::open(bpffs, map::CT6_TCP)?, any: Map::open(bpffs, map::CT6_ANY)? },
        })
    }

    /// Deletes flows that are masqueraded as one of these addresses: none of them gets answers any more, and the next packet of
    /// a pod opens its flow again, with another address. Returns how many.
    pub fn forget_sources(&self, gone: &BTreeSet<IpAddr>) -> Result<usize> {
        let mut forgotten = 0;
        for table in self.v4.both() {
            forgotten += forget_sources(table, gone)?;
        }
        for table in self.v6.both() {
            forgotten += forget_sources(table, gone)?;
        }
        Ok(forgotten)
    }

    /// Deletes connections that have expired in all their directions. `expired` decides for one entry.
    pub fn sweep(&self, expired: impl Fn(u8, u64, u32) -> bool) -> Result<Swept> {
        let four = sweep(&self.v4.tcp, &expired)? + sweep(&self.v4.any, &expired)?;
        Ok(four + sweep(&self.v6.tcp, &expired)? + sweep(&self.v6.any, &expired)?)
    }
}

/// Where the values of a connection table hold the time that they were last seen at. `None`: it is no such table.
pub fn clock_offset(name: &str) -> Option<usize> {
    match name {
        map::CT4_TCP | map::CT4_ANY => Some(offset_of!(CtEntry<Ip4>, seen)),
        map::CT6_TCP | map::CT6_ANY => Some(offset_of!(CtEntry<Ip6>, seen)),
        _ => None,
    }
}

/// True if a value of a connection table is of a flow, not of TCP, whose backend serves no more.
pub fn has_ended(name: &str, value: &[u8], is_serving: impl Fn(u32) -> bool) -> bool {
    fn backend_of<A: Address>(value: &[u8]) -> u32
    where
        CtEntry<A>: Pod,
    {
        bytemuck::try_pod_read_unaligned::<CtEntry<A>>(value).map_or(0, |entry| entry.backend)
    }
    let backend = match name {
        map::CT4_ANY => backend_of::<Ip4>(value),
        map::CT6_ANY => backend_of::<Ip6>(value),
        _ => 0,
    };
    backend != 0 && !is_serving(backend)
}

/// True if a value of a connection table supersedes another one of the same key. False for other maps.
pub fn is_superseded(name: &str, here: &[u8], there: &[u8]) -> bool {
    fn is_of<A: Address>(here: &[u8], there: &[u8]) -> bool
    where
        CtEntry<A>: Pod,
    {
        let read = bytemuck::try_pod_read_unaligned::<CtEntry<A>>;
        matches!((read(here), read(there)), (Ok(here), Ok(there)) if here.is_superseded_by(&there))
    }
    match name {
        map::CT4_TCP | map::CT4_ANY => is_of::<Ip4>(here, there),
        map::CT6_TCP | map::CT6_ANY => is_of::<Ip6>(here, there),
        _ => false,
    }
}

impl<A: Address + Ord> Tables<A>
where
    Tuple<A>: Pod,
    CtEntry<A>: Pod,
{
    /// Both tables.
    pub fn both(&self) -> [&Table<A>; 2] {
        [&self.tcp, &self.any]
    }

    /// The entry that serves packets of a tuple, with its key.
    pub fn find(&self, tuple: &Tuple<A>) -> Result<Option<(Tuple<A>, CtEntry<A>)>> {
        find(if tuple.proto == proto::TCP { &self.tcp } else { &self.any }, tuple)
    }

    /// Entries in both tables.
    pub fn len(&self) -> Result<usize> {
        Ok(self.tcp.len()? + self.any.len()?)
    }

    /// True if both tables are empty.
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }
}

fn find<A: Address>(table: &Table<A>, tuple: &Tuple<A>) -> Result<Option<(Tuple<A>, CtEntry<A>)>>
where
    Tuple<A>: Pod,
    CtEntry<A>: Pod,
{
    for pad in [0, SLOT_CONTESTED] {
        let key = Tuple { pad, ..tuple.canonical() };
        if let Some(entry) = table.get(&key)?.filter(|entry| entry.serves(tuple)) {
            return Ok(Some((key, entry)));
        }
    }
    Ok(None)
}

/// The entry of a translated flow's other direction, with its key.
fn counterpart<A: Address>(
    table: &Table<A>,
    key: &Tuple<A>,
    entry: &CtEntry<A>,
) -> Result<Option<(Tuple<A>, CtEntry<A>)>>
where
    Tuple<A>: Pod,
    CtEntry<A>: Pod,
{
    if entry.flags & flags::NAT == 0 {
        return Ok(None);
    }
    let back = entry.tuple(key).reversed();
    Ok(find(table, &entry.to.reversed())?.filter(|(_, other)| other.to == back))
}

fn forget_sources<A>(table: &Table<A>, gone: &BTreeSet<IpAddr>) -> Result<usize>
where
    A: Address,
    Tuple<A>: Pod,
    CtEntry<A>: Pod,
{
    let mut found = Vec::new();
    table.for_each(|key, entry| {
        let is_masqueraded = entry.flags & flags::MASQ != 0 && entry.flags & flags::REPLY == 0;
        if is_masqueraded && gone.contains(&IpAddr::from(entry.to.src.to_addr())) {
            found.push((*key, *entry));
        }
    })?;
    let mut forgotten = 0;
    for (key, entry) in found {
        let other = counterpart(table, &key, &entry)?;
        // The original direction first: from the other one a packet of the pod would restore nothing.
        forgotten += usize::from(table.delete(&key)?);
        if let Some((key, _)) = other {
            table.delete(&key)?;
        }
    }
    Ok(forgotten)
}

fn sweep<A>(table: &Table<A>, expired: impl Fn(u8, u64, u32) -> bool) -> Result<Swept>
where
    A: Address,
    Tuple<A>: Pod,
    CtEntry<A>: Pod,
{
    let mut seen = 0;
    let mut old = Vec::new();
    table.for_each(|key, entry| {
        seen += 1;
        if expired(key.proto, entry.state, entry.seen) {
            old.push(*key);
        }
    })?;
    // Entries are read again right before they go: those of a translated flow are refreshed apart from each other, so that one
    // that is in use keeps both; and a client may use its port again while the table is read, which revives what was old then.
    let is_dead = |key: &Tuple<A>, entry: &CtEntry<A>| expired(key.proto, entry.state, entry.seen);
    let mut deleted = 0;
    for key in old {
        let Some(entry) = table.get(&key)?.filter(|entry| is_dead(&key, entry)) else { continue };
        let other = counterpart(table, &key, &entry)?;
        if other.as_ref().is_none_or(|(key, entry)| is_dead(key, entry)) {
            deleted += usize::from(table.delete(&key)?);
            if let Some((key, _)) = other {
                deleted += usize::from(table.delete(&key)?);
            }
        }
    }
    Ok(Swept { seen, deleted })
}

#[cfg(test)]
pub mod build {
    //! Tables for tests.

    use super::{Conntrack, CtEntry, Map, Table, Tables, Tuple};
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
        Conntrack { v4: Tables { tcp: table(), any: table() }, v6: Tables { tcp: table(), any: table() } }
    }
}

#[cfg(test)]
mod tests {
    use super::build::tables;
    use super::{Conntrack, Swept, Tables};
    use bytemuck::Zeroable;
    use rustnet_common::addr::Ip4;
    use rustnet_common::conntrack::{CtEntry, SLOT_CONTESTED, flags};
    use rustnet_common::tuple::{Tuple, proto};
    use std::cell::Cell;
    use std::net::Ipv4Addr;

    fn tuple(sport: u16, proto: u8) -> Tuple<Ip4> {
        let (src, dst) = (Ipv4Addr::new(10, 0, 0, 2).into(), Ipv4Addr::new(10, 96, 0, 1).into());
        Tuple { src, dst, sport, dport: 80, proto, ..Tuple::zeroed() }
    }

    fn put(tables: &Tables<Ip4>, tuple: &Tuple<Ip4>, entry: CtEntry<Ip4>) {
        let table = if tuple.proto == proto::TCP { &tables.tcp } else { &tables.any };
        let swapped = if tuple.is_swapped() { flags::SWAPPED } else { 0 };
        table.put(&tuple.canonical(), &CtEntry { flags: entry.flags | swapped, ..entry }).unwrap();
    }

    /// A connection translated to 10.0.1.9:8080; its entries were seen at the times given.
    fn add(tables: &Tables<Ip4>, orig: Tuple<Ip4>, backend: u32, seen: [u32; 2]) {
        let to = Tuple { dst: Ipv4Addr::new(10, 0, 1, 9).into(), dport: 8080, ..orig };
        let entry = |to, seen, flags| CtEntry { to, seen, backend, flags, ..CtEntry::zeroed() };
        put(tables, &orig, entry(to, seen[0], flags::NAT));
        put(tables, &to.reversed(), entry(orig.reversed(), seen[1], flags::NAT | flags::REPLY));
    }

    fn is_there(ct: &Conntrack, tuple: &Tuple<Ip4>) -> bool {
        ct.v4.find(tuple).unwrap().is_some()
    }

    #[test]
    fn a_sweep_deletes_pairs_of_which_both_entries_are_old() {
        let ct = tables();
        add(&ct.v4, tuple(1, proto::TCP), 1, [10, 10]);
        add(&ct.v4, tuple(2, proto::TCP), 1, [10, 90]);
        add(&ct.v4, tuple(3, proto::TCP), 1, [90, 10]);
        add(&ct.v4, tuple(4, proto::TCP), 1, [90, 90]);
        let swept = ct.sweep(|_, _, seen| seen < 50).unwrap();
        assert_eq!(swept, Swept { seen: 8, deleted: 2 });
        assert!(!is_there(&ct, &tuple(1, proto::TCP)));
        assert_eq!(ct.v4.len().unwrap(), 6);
    }

    #[test]
    fn a_sweep_deletes_old_flows_that_nothing_translates() {
        let ct = tables();
        for (sport, seen) in [(1, 10), (2, 90)] {
            let t = tuple(sport, proto::UDP);
            put(&ct.v4, &t, CtEntry { to: t, seen, ..CtEntry::zeroed() });
        }
        assert_eq!(ct.sweep(|_, _, seen| seen < 50).unwrap(), Swept { seen: 2, deleted: 1 });
        assert!(is_there(&ct, &tuple(2, proto::UDP).reversed()), "one entry serves both directions");
        assert!(!is_there(&ct, &tuple(1, proto::UDP)));
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
                // Both entries have been read by now.
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
    fn an_entry_whose_counterpart_was_evicted_goes_when_old() {
        let ct = tables();
        add(&ct.v4, tuple(1, proto::UDP), 1, [10, 10]);
        ct.v4.any.delete(&tuple(1, proto::UDP).canonical()).unwrap();
        assert_eq!(ct.sweep(|_, _, _| true).unwrap(), Swept { seen: 1, deleted: 1 });
    }

    /// Another flow has the key of the counterpart, in the opposite direction: it is none of this connection.
    #[test]
    fn a_contested_key_is_distinguished_by_its_slot() {
        let ct = tables();
        let orig = tuple(1, proto::TCP);
        add(&ct.v4, orig, 1, [10, 10]);
        let reply = Tuple { src: Ipv4Addr::new(10, 0, 1, 9).into(), sport: 8080, dst: orig.src, dport: 1, ..orig };
        let direct = reply.reversed();
        let key = Tuple { pad: SLOT_CONTESTED, ..direct.canonical() };
        let swapped = if direct.is_swapped() { flags::SWAPPED } else { 0 };
        let to = Tuple { sport: 20_000, ..direct };
        ct.v4.tcp.put(&key, &CtEntry { to, seen: 90, flags: flags::NAT | swapped, ..CtEntry::zeroed() }).unwrap();
        let (found, entry) = ct.v4.find(&direct).unwrap().unwrap();
        assert!(found.pad == SLOT_CONTESTED && entry.to == to);
        assert_eq!(ct.sweep(|_, _, seen| seen < 50).unwrap(), Swept { seen: 3, deleted: 2 });
        assert!(is_there(&ct, &direct));
    }

    #[test]
    fn flows_of_an_address_that_went_are_forgotten_in_both_directions() {
        let ct = tables();
        let masquerade = |sport: u16, address: [u8; 4]| {
            let orig = tuple(sport, proto::UDP);
            let to = Tuple { src: Ipv4Addr::from(address).into(), sport: 20_000 + sport, ..orig };
            let entry = |to, flags| CtEntry { to, flags, ..CtEntry::zeroed() };
            put(&ct.v4, &orig, entry(to, flags::NAT | flags::MASQ));
            put(&ct.v4, &to.reversed(), entry(orig.reversed(), flags::NAT | flags::MASQ | flags::REPLY));
        };
        masquerade(1, [192, 0, 2, 1]);
        masquerade(2, [192, 0, 2, 2]);
        add(&ct.v4, tuple(3, proto::UDP), 7, [0, 0]);
        assert_eq!(ct.forget_sources(&[Ipv4Addr::new(192, 0, 2, 1).into()].into()).unwrap(), 1);
        assert!(!is_there(&ct, &tuple(1, proto::UDP)) && is_there(&ct, &tuple(2, proto::UDP)));
        assert_eq!(ct.v4.len().unwrap(), 4);
    }
}
