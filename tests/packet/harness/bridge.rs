//! Nodes between two agents, whose programs use the tables of the earlier agent, too.

use super::addresses::{BOTH, Net};
use super::connections::{Flow, Plain, tuple};
use super::{HZ, Lab, tables};
use anyhow::{Context, Result};
use bytemuck::{Pod, Zeroable};
use rustnet_agent::bpf::upgrade::earlier;
use rustnet_common::addr::{Address, Ip4, Ip6};
use rustnet_common::conntrack::CtEntry;
use rustnet_common::tuple::Tuple;
use rustnet_common::v1;
use std::cell::Cell;
use testkit::datapath::{Bridge, Datapath, Table};

/// Runs a test for each family, on a node that no other test gets.
pub fn labs_of_bridge(bridge: Bridge, test: impl Fn(&Lab, Net) -> Result<()> + Send + Sync) -> Result<()> {
    let earlier: Vec<String> = tables::<Ip4>().into_iter().chain(tables::<Ip6>()).map(earlier).collect();
    let names = earlier.iter().map(String::as_str).chain([v1::map::CT4, v1::map::CT6]);
    let lab = Lab::with(|sizes| {
        // In the object they are placeholders, in whose place an agent puts the pinned ones.
        let all: Vec<_> = sizes.iter().copied().chain(names.map(|name| (name, 1024))).collect();
        Datapath::load_bridge(bridge, &all)
    })?;
    lab.reset()?;
    lab.netns.run(|| BOTH.into_iter().try_for_each(|net| test(&lab, net).with_context(|| format!("{net:?}"))))?
}

/// Keys and entries of a family's tables.
type Rows<A> = [Vec<(Tuple<A>, CtEntry<A>)>; 2];

/// Connections of both families.
pub struct Copied(Rows<Ip4>, Rows<Ip6>);

impl Lab {
    /// Takes all connections out of the present tables.
    pub fn take_connections(&self) -> Result<Copied> {
        let copied = Copied(self.rows_of()?, self.rows_of()?);
        self.forget()?;
        Ok(copied)
    }

    /// Makes these the only connections of the present tables.
    pub fn put_connections(&self, copied: &Copied) -> Result<()> {
        self.forget()?;
        self.put_rows(&copied.0)?;
        self.put_rows(&copied.1)
    }

    /// Forgets all connections of the earlier agent.
    pub fn forget_earlier(&self) -> Result<()> {
        self.each_earlier::<Ip4>(Table::clear, Table::clear)?;
        self.each_earlier::<Ip6>(Table::clear, Table::clear)
    }

    /// True if the earlier agent has an entry for packets of a flow in this direction.
    pub fn has_earlier(&self, f: Flow) -> Result<bool> {
        match f.net() {
            Net::V4 => self.has_earlier_of::<Ip4>(&f),
            Net::V6 => self.has_earlier_of::<Ip6>(&f),
        }
    }

    fn has_earlier_of<A: Plain>(&self, f: &Flow) -> Result<bool>
    where
        Tuple<A>: Pod,
        CtEntry<A>: Pod,
        v1::CtEntry<A>: Pod,
    {
        let wanted = tuple::<A>(f);
        let is_there = Cell::new(false);
        self.each_earlier::<A>(
            |table| {
                let serves = |entry: CtEntry<A>| entry.serves(&wanted);
                is_there.set(is_there.get() | table.get(&wanted.canonical())?.is_some_and(serves));
                Ok(())
            },
            |table| {
                is_there.set(is_there.get() | table.get(&wanted)?.is_some());
                Ok(())
            },
        )?;
        Ok(is_there.get())
    }

    /// Puts a translated flow into the tables of v1, both halves: packets of `asks` become `becomes`.
    pub fn put_of_v1(&self, asks: Flow, becomes: Flow, flags: u16) -> Result<()> {
        match asks.net() {
            Net::V4 => self.put_halves::<Ip4>(&asks, &becomes, flags),
            Net::V6 => self.put_halves::<Ip6>(&asks, &becomes, flags),
        }
    }

    fn put_halves<A: Plain>(&self, asks: &Flow, becomes: &Flow, flags: u16) -> Result<()>
    where
        Tuple<A>: Pod,
        v1::CtEntry<A>: Pod,
    {
        let table = self.datapath.table(if A::IS_V6 { v1::map::CT6 } else { v1::map::CT4 })?;
        let (asks, becomes) = (tuple::<A>(asks), tuple::<A>(becomes));
        let seen = self.datapath.jiffies()?;
        let half = |to, flags| v1::CtEntry { to, flags, seen, ..v1::CtEntry::zeroed() };
        table.put(&asks, &half(becomes, flags))?;
        table.put(&becomes.reversed(), &half(asks.reversed(), flags | v1::flags::REPLY))
    }

    /// Makes all connections of the earlier agent look as if they had last been seen some seconds (as the programs count) before.
    pub fn age_earlier(&self, seconds: u32) -> Result<()> {
        self.age_family::<Ip4>(seconds * HZ)?;
        self.age_family::<Ip6>(seconds * HZ)
    }

    fn age_family<A: Address>(&self, ticks: u32) -> Result<()>
    where
        Tuple<A>: Pod,
        CtEntry<A>: Pod,
        v1::CtEntry<A>: Pod,
    {
        self.each_earlier::<A>(
            |table| change_all(table, |entry| entry.seen = entry.seen.wrapping_sub(ticks)),
            |table| change_all(table, |half| half.seen = half.seen.wrapping_sub(ticks)),
        )
    }

    /// Calls one function with each table of the present shape, and the other with that of v1.
    fn each_earlier<A: Address>(
        &self,
        present: impl Fn(&Table<Tuple<A>, CtEntry<A>>) -> Result<()>,
        retired: impl Fn(&Table<Tuple<A>, v1::CtEntry<A>>) -> Result<()>,
    ) -> Result<()>
    where
        Tuple<A>: Pod,
        CtEntry<A>: Pod,
        v1::CtEntry<A>: Pod,
    {
        for name in tables::<A>() {
            present(&self.datapath.table(&earlier(name))?)?;
        }
        retired(&self.datapath.table(if A::IS_V6 { v1::map::CT6 } else { v1::map::CT4 })?)
    }

    fn rows_of<A: Address>(&self) -> Result<Rows<A>>
    where
        Tuple<A>: Pod,
        CtEntry<A>: Pod,
    {
        let [tcp, any] = tables::<A>();
        Ok([self.datapath.table(tcp)?.entries()?, self.datapath.table(any)?.entries()?])
    }

    fn put_rows<A: Address>(&self, rows: &Rows<A>) -> Result<()>
    where
        Tuple<A>: Pod,
        CtEntry<A>: Pod,
    {
        for (name, rows) in tables::<A>().into_iter().zip(rows) {
            let table = self.datapath.table(name)?;
            rows.iter().try_for_each(|(key, entry)| table.put(key, entry))?;
        }
        Ok(())
    }
}

fn change_all<K: Pod, V: Pod>(table: &Table<K, V>, change: impl Fn(&mut V)) -> Result<()> {
    for (key, mut value) in table.entries()? {
        change(&mut value);
        table.put(&key, &value)?;
    }
    Ok(())
}
