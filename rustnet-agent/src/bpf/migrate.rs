//! The content of the retired maps passes to the present ones, and back. See [`super::convert`] for
//! what becomes what.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::Hash;
use std::os::fd::OwnedFd;

use anyhow::{Context, Result};
use bytemuck::Pod;
use rustnet_common::addr::{Address, Ip4, Ip6};
use rustnet_common::backend::{Backend, id};
use rustnet_common::conntrack::{CtEntry, SLOT_CONTESTED, is_later};
use rustnet_common::endpoint::{Endpoint, EndpointKey};
use rustnet_common::names::map;
use rustnet_common::service::SvcKey;
use rustnet_common::tuple::{Tuple, proto};
use rustnet_common::v1;

use super::convert::{self, Range, Retired, Tables};
use super::copy::lru_room;
use super::store::Map;
use super::sys::{self, Layout};

/// Maps by name.
pub type Maps = BTreeMap<String, OwnedFd>;

/// An upgrade from v1.
pub struct Upgrade {
    tables: Tables,
    /// When the newest connection of each family was seen that has been copied.
    newest: [Option<u32>; 2],
}

/// The map of a name as what it holds; `None` if it is not there.
fn open<K: Pod, V: Pod>(maps: &Maps, name: &str) -> Result<Option<Map<K, V>>> {
    let Some(fd) = maps.get(name) else { return Ok(None) };
    let fd = fd.try_clone().with_context(|| format!("duplicating the descriptor of {name}"))?;
    Map::from_fd(fd, name).map(Some)
}

/// The same for one that has to be there.
fn present<K: Pod, V: Pod>(maps: &Maps, name: &str) -> Result<Map<K, V>> {
    open(maps, name)?.with_context(|| format!("no map {name}"))
}

/// The services of one family, whose shape is the same in both.
type Services<A> = Map<SvcKey<A>, v1::SvcEntry>;

impl Upgrade {
    /// Fills the present maps. `is_live`: programs use them, so that only connections that are
    /// missing are added.
    pub fn run(old: &Maps, new: &Maps, is_live: bool) -> Result<Self> {
        let (four, six) = (entries(old, v1::map::SVC4)?, entries(old, v1::map::SVC6)?);
        let ranges: Vec<Range> = ranges(&four).chain(ranges(&six)).collect();
        let retired =
            Retired { backends: elements(open(old, v1::map::BACKENDS)?.as_ref(), |b: &v1::Backend| b.id != 0)? };
        let mut tables = Tables::upgrade(&retired, ranges)?;
        let backends: Map<u32, Backend> = present(new, map::BACKENDS)?;
        if is_live {
            tables = tables.with_ids_of(&elements(Some(&backends), |b| b.id != 0)?);
        } else {
            // Invariant: backends before the entries that lead to them.
            backends.put_all(&used(&tables.backends, |b| b.id != 0))?;
            present::<u32, u32>(new, map::BACKEND_IDS)?.put_all(&used(&tables.ids, |id| *id != 0))?;
            present::<SvcKey<Ip4>, _>(new, map::SVC4)?.put_all(&four)?;
            present::<SvcKey<Ip6>, _>(new, map::SVC6)?.put_all(&six)?;
        }
        let mut upgrade = Self { tables, newest: [None; 2] };
        let copied = [upgrade.connections::<Ip4>(old, new)?, upgrade.connections::<Ip6>(old, new)?];
        upgrade.newest = copied.map(|(newest, _)| newest);
        Ok(upgrade)
    }

    /// Adds the connections that were opened in the retired tables since. Returns how many entries
    /// that were.
    pub fn catch_up(&self, old: &Maps, new: &Maps) -> Result<usize> {
        let added = self.connections::<Ip4>(old, new)?.1 + self.connections::<Ip6>(old, new)?.1;
        self.rename_backends::<Ip4>(new)?;
        self.rename_backends::<Ip6>(new)?;
        Ok(added)
    }

    /// Gives connections that a program took over from a retired table the present ids of their
    /// backends.
    fn rename_backends<A>(&self, new: &Maps) -> Result<()>
    where
        A: Address,
        Tuple<A>: Pod,
        CtEntry<A>: Pod,
    {
        let used = elements(Some(&present::<u32, Backend>(new, map::BACKENDS)?), |b| b.id != 0)?;
        let is_present = |id: u32| used.get(id::slot_of(id) as usize).is_some_and(|backend| backend.id == id);
        let (_, tcp, any) = names::<A>();
        for name in [tcp, any] {
            let table: Map<Tuple<A>, CtEntry<A>> = present(new, name)?;
            for (key, entry) in table.entries()? {
                if entry.backend != 0 && !is_present(entry.backend) && self.tables.is_renamed(entry.backend) {
                    let backend = self.tables.present_id(entry.backend);
                    table.replace(&key, &CtEntry { backend, ..entry })?;
                }
            }
        }
        Ok(())
    }

    /// Returns when the newest connection was seen, and how many entries were missing.
    fn connections<A>(&self, old: &Maps, new: &Maps) -> Result<(Option<u32>, usize)>
    where
        A: Address + Eq + Hash,
        Tuple<A>: Pod,
        CtEntry<A>: Pod,
        v1::CtEntry<A>: Pod,
    {
        let (retired, tcp, any) = names::<A>();
        let Some(table) = open::<Tuple<A>, v1::CtEntry<A>>(old, retired)? else { return Ok((None, 0)) };
        let mut halves = table.entries()?;
        let newest = newest(halves.iter().map(|(_, half)| half.seen));
        if let Some(since) = self.newest[usize::from(A::IS_V6)] {
            halves.retain(|(_, half)| !is_later(since, half.seen));
        }
        let pods: Map<EndpointKey, Endpoint> = present(new, map::ENDPOINTS)?;
        let pods: HashSet<EndpointKey> = pods.entries()?.into_iter().map(|(address, _)| address).collect();
        let is_pod = |address: A| pods.contains(&address.to_addr());
        let mut entries = convert::upgrade(&halves, is_pod, |id| self.tables.present_id(id));
        if let Some(newest) = newest {
            entries.sort_by_key(|(_, entry)| std::cmp::Reverse(newest.wrapping_sub(entry.seen)));
        }
        let (of_tcp, of_any): (Vec<_>, Vec<_>) = entries.into_iter().partition(|(key, _)| key.proto == proto::TCP);
        let mut added = 0;
        let contested = present(new, map::CT_CONTESTED)?;
        for (table, entries) in [(tcp, of_tcp), (any, of_any)] {
            let table = present(new, table)?;
            for (key, entry) in newest_of(&entries, table.max_entries()) {
                added += usize::from(insert(&table, &contested, *key, entry)?);
            }
        }
        Ok((newest, added))
    }
}

/// Adds an entry unless there is one for packets of it, which it does not supersede. False if so.
fn insert<A>(
    table: &Map<Tuple<A>, CtEntry<A>>,
    contested: &Map<u32, u32>,
    mut key: Tuple<A>,
    entry: &CtEntry<A>,
) -> Result<bool>
where
    A: Address,
    Tuple<A>: Pod,
    CtEntry<A>: Pod,
{
    for slot in [0, SLOT_CONTESTED] {
        key.pad = slot;
        if slot == SLOT_CONTESTED {
            // Programs look into the second slot only after this.
            contested.put(&0, &1)?;
        }
        if table.insert(&key, entry)? {
            return Ok(true);
        }
        let Some(there) = table.get(&key)?.filter(|there| there.is_rival_of(entry)) else { continue };
        if there.is_superseded_by(entry) {
            table.put(&key, entry)?;
            return Ok(true);
        }
        return Ok(false);
    }
    Ok(false)
}

/// Those that a table takes, of entries of which the newest come last.
fn newest_of<T>(entries: &[T], max_entries: u32) -> &[T] {
    &entries[entries.len().saturating_sub(lru_room(max_entries))..]
}

/// The latest of times of a clock that wraps.
fn newest(times: impl Iterator<Item = u32>) -> Option<u32> {
    times.reduce(|one, other| if is_later(other, one) { other } else { one })
}

/// The tables of a family: the retired one, that of TCP, that of all else.
fn names<A: Address>() -> (&'static str, &'static str, &'static str) {
    if A::IS_V6 { (v1::map::CT6, map::CT6_TCP, map::CT6_ANY) } else { (v1::map::CT4, map::CT4_TCP, map::CT4_ANY) }
}

fn entries<A>(maps: &Maps, name: &str) -> Result<Vec<(SvcKey<A>, v1::SvcEntry)>>
where
    SvcKey<A>: Pod,
{
    let services: Option<Services<A>> = open(maps, name)?;
    services.map_or_else(|| Ok(Vec::new()), |services| services.entries())
}

fn ranges<A>(services: &[(SvcKey<A>, v1::SvcEntry)]) -> impl Iterator<Item = Range> {
    services.iter().map(|(_, entry)| Range { first: entry.first, count: entry.count, service: entry.id })
}

/// The elements of an array up to the last that is used.
fn elements<V: Pod>(array: Option<&Map<u32, V>>, is_used: impl Fn(&V) -> bool) -> Result<Vec<V>> {
    let mut all = Vec::new();
    let Some(array) = array else { return Ok(all) };
    array.for_each(|index, value| {
        if is_used(value) {
            let index = *index as usize;
            if all.len() <= index {
                all.resize(index + 1, V::zeroed());
            }
            all[index] = *value;
        }
    })?;
    Ok(all)
}

fn used<V: Copy>(all: &[V], is_used: impl Fn(&V) -> bool) -> Vec<(u32, V)> {
    (0..).zip(all.iter().copied()).filter(|(_, value)| is_used(value)).collect()
}

/// Maps of v1 with the present content, pinned nowhere.
pub struct Export {
    maps: Maps,
}

impl Export {
    /// Makes the maps, of these sizes by name, and fills them.
    pub fn new(present_maps: &Maps, sizes: &BTreeMap<String, u32>) -> Result<Self> {
        let mut maps = Maps::new();
        for shape in v1::RETIRED {
            let v1::Shape { name, kind, key_size, value_size, flags } = shape;
            let max_entries = *sizes.get(name).with_context(|| format!("no size of {name}"))?;
            let layout = Layout { kind, key_size, value_size, max_entries, flags };
            maps.insert(name.to_owned(), sys::map_create(name, layout).with_context(|| format!("making {name}"))?);
        }
        let export = Self { maps };
        export.services(present_maps)?;
        export.catch_up(present_maps)?;
        Ok(export)
    }

    /// The maps. By name, which puts backends before services.
    pub fn maps(&self) -> &Maps {
        &self.maps
    }

    fn services(&self, new: &Maps) -> Result<()> {
        let (four, six) = (entries(new, map::SVC4)?, entries(new, map::SVC6)?);
        let ids = elements(Some(&present::<u32, u32>(new, map::BACKEND_IDS)?), |id| *id != 0)?;
        let backends = elements(Some(&present::<u32, Backend>(new, map::BACKENDS)?), |b| b.id != 0)?;
        let array: Map<u32, v1::Backend> = present(&self.maps, v1::map::BACKENDS)?;
        let ranges = ranges(&four).chain(ranges(&six));
        let retired = Tables::of(ids, backends).downgrade(ranges, array.max_entries() as usize)?;
        array.put_all(&used(&retired.backends, |b| b.id != 0))?;
        present::<SvcKey<Ip4>, _>(&self.maps, v1::map::SVC4)?.put_all(&four)?;
        present::<SvcKey<Ip6>, _>(&self.maps, v1::map::SVC6)?.put_all(&six)
    }

    /// Adds the connections that are missing. Returns how many halves that were.
    pub fn catch_up(&self, present_maps: &Maps) -> Result<usize> {
        Ok(self.connections::<Ip4>(present_maps)? + self.connections::<Ip6>(present_maps)?)
    }

    fn connections<A>(&self, new: &Maps) -> Result<usize>
    where
        A: Address + Eq + Hash,
        Tuple<A>: Pod,
        CtEntry<A>: Pod,
        v1::CtEntry<A>: Pod,
    {
        let (retired, tcp, any) = names::<A>();
        let mut entries = Vec::new();
        for name in [tcp, any] {
            entries.extend(present::<Tuple<A>, CtEntry<A>>(new, name)?.entries()?);
        }
        let mut halves = convert::downgrade(&entries);
        if let Some(newest) = newest(halves.iter().map(|(_, half)| half.seen)) {
            halves.sort_by_key(|(_, half)| std::cmp::Reverse(newest.wrapping_sub(half.seen)));
        }
        let table: Map<Tuple<A>, v1::CtEntry<A>> = present(&self.maps, retired)?;
        let there: HashMap<Tuple<A>, v1::CtEntry<A>> = table.entries()?.into_iter().collect();
        // What another flow has superseded since goes, too.
        halves.retain(|(key, half)| {
            there.get(key).is_none_or(|there| there.to != half.to && is_later(half.seen, there.seen))
        });
        let mut added = 0;
        for (key, half) in newest_of(&halves, table.max_entries()) {
            // What programs have written since the look stays.
            let is_added = table.insert(key, half)?;
            if !is_added && there.contains_key(key) {
                table.put(key, half)?;
            }
            added += usize::from(is_added || there.contains_key(key));
        }
        Ok(added)
    }
}

#[cfg(test)]
mod tests;
