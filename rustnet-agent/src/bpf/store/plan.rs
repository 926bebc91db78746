//! The plan's maps on the real ones: services, backends, peers and ranges of clients.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use anyhow::{Context, Result};
use bytemuck::Pod;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use rustnet_common::addr::{Addr, Ip4, Ip6};
use rustnet_common::maglev;
use rustnet_common::names::map;
use rustnet_common::peer::{Peer, PeerKey};
use rustnet_common::service::{SvcEntry, SvcKey, scope};
use rustnet_common::source_range::{self, SourceRangeKey};

use super::backends::Backends;
use super::maglev::Tables;
use super::memory::Access;
use super::{Map, runs};
use crate::bpf::sys;
use crate::plan::{Capacity, Maps, Snapshot, SourceRange, Table, VipKey, Write};

/// Services that an audit reads at once: some milliseconds' work.
const AUDIT_BATCH: usize = 16_384;

/// The maps that the plan reads and writes.
pub struct BpfMaps {
    svc4: Map<SvcKey<Ip4>, SvcEntry>,
    svc6: Map<SvcKey<Ip6>, SvcEntry>,
    peers4: Map<PeerKey<Ip4>, Peer>,
    peers6: Map<PeerKey<Ip6>, Peer>,
    source_ranges: SourceRanges,
    backends: Backends,
    tables: Tables,
    /// Where the audit of a service map goes on.
    cursor: sys::Cursor,
}

impl BpfMaps {
    /// Opens the pins in `bpffs`.
    pub fn open(bpffs: &Path) -> Result<Self> {
        Ok(Self {
            svc4: Map::open(bpffs, map::SVC4)?,
            svc6: Map::open(bpffs, map::SVC6)?,
            peers4: Map::open(bpffs, map::PEERS4)?,
            peers6: Map::open(bpffs, map::PEERS6)?,
            source_ranges: Map::open(bpffs, map::SOURCE_RANGES)?,
            backends: Backends::open(bpffs, Access::Write)?,
            tables: Tables::open(bpffs, Access::Write)?,
            cursor: sys::Cursor::default(),
        })
    }

    /// Number of the set of a backend that serves.
    pub fn set_of(&self, backend: u32) -> Option<u32> {
        self.backends.set_of(backend)
    }

    fn put_services(&self, services: &[(VipKey, SvcEntry)]) -> Result<()> {
        let (mut four, mut six) = (Vec::new(), Vec::new());
        for (key, entry) in services {
            match svc_key(key) {
                Either::V4(key) => four.push((key, *entry)),
                Either::V6(key) => six.push((key, *entry)),
            }
        }
        self.svc4.put_all(&four)?;
        self.svc6.put_all(&six)
    }

    fn put_peers(&self, peers: &[(IpNet, Peer)]) -> Result<()> {
        // A trie has batches only on some kernels, and is small.
        for (prefix, peer) in peers {
            match peer_key(prefix) {
                Either::V4(key) => self.peers4.put(&key, peer),
                Either::V6(key) => self.peers6.put(&key, peer),
            }
            .with_context(|| format!("peer {prefix}"))?;
        }
        Ok(())
    }

    fn apply_run(&mut self, run: &[Write]) -> Result<()> {
        match &run[0] {
            Write::Backends { .. }
            | Write::BackendIds { .. }
            | Write::MaglevTable { .. }
            | Write::PutService { .. } => {
                for write in run {
                    if let Write::Backends { backends } = write {
                        self.backends.store(backends)?;
                    }
                }
                for write in run {
                    match write {
                        Write::BackendIds { first, ids } => self.backends.store_ids(*first, ids)?,
                        Write::MaglevTable { unit, words } => self.tables.store(maglev::head(*unit), words)?,
                        _ => {}
                    }
                }
                self.put_services(&pick(run, |w| match w {
                    Write::PutService { key, entry } => Some((*key, *entry)),
                    _ => None,
                }))
            }
            Write::DeleteService { .. } => {
                let keys = pick(run, |w| if let Write::DeleteService { key } = w { Some(svc_key(key)) } else { None });
                delete(&keys, &self.svc4, &self.svc6)
            }
            Write::PutPeer { .. } => self.put_peers(&pick(run, |w| match w {
                Write::PutPeer { prefix, peer } => Some((*prefix, *peer)),
                _ => None,
            })),
            Write::DeletePeer { .. } => {
                let keys =
                    pick(run, |w| if let Write::DeletePeer { prefix } = w { Some(peer_key(prefix)) } else { None });
                delete(&keys, &self.peers4, &self.peers6)
            }
            Write::PutSourceRange { .. } => run.iter().try_for_each(|write| match write {
                Write::PutSourceRange { range } => self
                    .source_ranges
                    .put(&range_key(range), &source_range::ALLOWED)
                    .with_context(|| format!("source range {range}")),
                _ => Ok(()),
            }),
            Write::DeleteSourceRange { .. } => run.iter().try_for_each(|write| match write {
                Write::DeleteSourceRange { range } => self.source_ranges.delete(&range_key(range)).map(drop),
                _ => Ok(()),
            }),
            Write::ClearBackends { .. } => run.iter().try_for_each(|write| match write {
                Write::ClearBackends { ids } => self.backends.clear(ids),
                _ => Ok(()),
            }),
            Write::RestoreBackends { .. } | Write::RestoreIds { .. } | Write::RestoreTables { .. } => {
                run.iter().try_for_each(|write| match write {
                    Write::RestoreBackends { slots } => self.backends.restore(slots),
                    Write::RestoreTables { words } => {
                        words.iter().try_for_each(|(at, word)| self.tables.store(*at, &[*word]))
                    }
                    Write::RestoreIds { ids } => {
                        ids.iter().try_for_each(|(at, id)| self.backends.store_ids(*at, &[*id]))
                    }
                    _ => Ok(()),
                })
            }
            Write::EndBackends { .. } => run.iter().try_for_each(|write| match write {
                Write::EndBackends { ids } => self.backends.end(ids),
                _ => Ok(()),
            }),
        }
    }
}

impl Maps for BpfMaps {
    fn snapshot(&self) -> Result<Snapshot> {
        Ok(Snapshot {
            services: services_of(&self.svc4, &self.svc6)?,
            ids: self.backends.ids(),
            backends: self.backends.slots(),
            tables: self.tables.words(),
            peers: peers_of(&self.peers4, &self.peers6)?,
            source_ranges: ranges_of(&self.source_ranges)?,
        })
    }

    fn read(&mut self, table: Table) -> Result<(Snapshot, bool)> {
        let mut out = Snapshot::default();
        let services = &mut out.services;
        let is_last = match table {
            Table::Services4 => self.svc4.next_batch(&mut self.cursor, AUDIT_BATCH, |k, v| {
                services.insert(vip_key(IpAddr::V4(k.vip.into()), k), *v);
            })?,
            Table::Services6 => self.svc6.next_batch(&mut self.cursor, AUDIT_BATCH, |k, v| {
                services.insert(vip_key(IpAddr::V6(k.vip.into()), k), *v);
            })?,
            Table::Backends => {
                (out.ids, out.backends) = (self.backends.ids(), self.backends.slots());
                true
            }
            // By words: see `read_words`.
            Table::Maglev => true,
            Table::SourceRanges => {
                out.source_ranges = ranges_of(&self.source_ranges)?;
                true
            }
            Table::Peers => {
                out.peers = peers_of(&self.peers4, &self.peers6)?;
                true
            }
        };
        if is_last {
            self.cursor = sys::Cursor::default();
        }
        Ok((out, is_last))
    }

    fn read_words(&self, first: u32, count: u32) -> Result<Vec<u64>> {
        Ok(self.tables.range(first, count))
    }

    fn service(&self, key: &VipKey) -> Result<Option<SvcEntry>> {
        match svc_key(key) {
            Either::V4(key) => self.svc4.get(&key),
            Either::V6(key) => self.svc6.get(&key),
        }
    }

    /// Runs of writes of one kind go in one batch; the order of the runs is kept. Backends, their
    /// ids and the entries that flip to them are one run, the backends of all first, then all ids:
    /// nothing refers to a new slot or range before its entry is written, so that no program sees
    /// the difference, and a hundred thousand services cost a few dozen calls.
    fn apply(&mut self, writes: &[Write]) -> Result<()> {
        runs::apply(writes, |a, b| rank(a) == rank(b), |run| self.apply_run(run))
    }

    fn backend_capacity(&self) -> u32 {
        self.backends.capacity()
    }

    fn table_capacity(&self) -> u32 {
        self.tables.capacity()
    }

    fn service_capacity(&self) -> u32 {
        self.svc4.max_entries().min(self.svc6.max_entries())
    }

    fn peer_capacity(&self) -> u32 {
        self.peers4.max_entries().min(self.peers6.max_entries())
    }

    fn source_range_capacity(&self) -> u32 {
        self.source_ranges.max_entries()
    }
}

/// Writes of one rank may go together.
fn rank(write: &Write) -> u8 {
    match write {
        Write::Backends { .. } | Write::BackendIds { .. } | Write::MaglevTable { .. } | Write::PutService { .. } => 0,
        Write::DeleteService { .. } => 1,
        Write::PutPeer { .. } => 2,
        Write::DeletePeer { .. } => 3,
        Write::EndBackends { .. } => 4,
        Write::ClearBackends { .. } => 5,
        Write::RestoreBackends { .. } | Write::RestoreIds { .. } | Write::RestoreTables { .. } => 6,
        Write::PutSourceRange { .. } => 7,
        Write::DeleteSourceRange { .. } => 8,
    }
}

/// A key of either family.
enum Either<A, B> {
    V4(A),
    V6(B),
}

fn pick<T>(run: &[Write], of: impl Fn(&Write) -> Option<T>) -> Vec<T> {
    run.iter().filter_map(of).collect()
}

fn delete<A: Pod, B: Pod, V: Pod>(keys: &[Either<A, B>], four: &Map<A, V>, six: &Map<B, V>) -> Result<()> {
    keys.iter().try_for_each(|key| match key {
        Either::V4(key) => four.delete(key).map(drop),
        Either::V6(key) => six.delete(key).map(drop),
    })
}

fn svc_key(key: &VipKey) -> Either<SvcKey<Ip4>, SvcKey<Ip6>> {
    let VipKey { ip, port, proto, scope } = *key;
    match ip {
        IpAddr::V4(ip) => Either::V4(SvcKey { vip: ip.into(), port, proto, scope }),
        IpAddr::V6(ip) => Either::V6(SvcKey { vip: ip.into(), port, proto, scope }),
    }
}

fn vip_key<A>(ip: IpAddr, key: &SvcKey<A>) -> VipKey {
    VipKey { ip, port: key.port, proto: key.proto, scope: key.scope }
}

fn peer_key(prefix: &IpNet) -> Either<PeerKey<Ip4>, PeerKey<Ip6>> {
    let prefix_len = u32::from(prefix.prefix_len());
    match prefix.network() {
        IpAddr::V4(ip) => Either::V4(PeerKey { prefix_len, data: ip.into() }),
        IpAddr::V6(ip) => Either::V6(PeerKey { prefix_len, data: ip.into() }),
    }
}

fn range_key(range: &SourceRange) -> SourceRangeKey {
    let SourceRange { key: VipKey { ip, port, proto, .. }, clients } = *range;
    let (vip, client) = (Addr::from(ip), Addr::from(clients.network()));
    let data = source_range::SourceRange { vip, port, proto, pad: 0, client };
    SourceRangeKey { prefix_len: source_range::prefix_len(ip.is_ipv4(), clients.prefix_len()), data }
}

/// `None` for a key that the agent never writes.
fn range_of(key: &SourceRangeKey) -> Option<SourceRange> {
    let source_range::SourceRange { vip, port, proto, client, .. } = key.data;
    let (ip, client) = (IpAddr::from(vip), IpAddr::from(client));
    let len = source_range::range_len(ip.is_ipv4(), key.prefix_len)?;
    let clients = IpNet::new(client, len).ok()?;
    Some(SourceRange { key: VipKey { ip, port, proto, scope: scope::EXTERNAL }, clients })
}

fn prefix4(key: PeerKey<Ip4>) -> Option<IpNet> {
    Ipv4Net::new(Ipv4Addr::from(key.data), u8::try_from(key.prefix_len).ok()?).ok().map(IpNet::V4)
}

fn prefix6(key: &PeerKey<Ip6>) -> Option<IpNet> {
    Ipv6Net::new(Ipv6Addr::from(key.data), u8::try_from(key.prefix_len).ok()?).ok().map(IpNet::V6)
}

type Services<A> = Map<SvcKey<A>, SvcEntry>;
type Peers<A> = Map<PeerKey<A>, Peer>;
type SourceRanges = Map<SourceRangeKey, u32>;

fn services_of(four: &Services<Ip4>, six: &Services<Ip6>) -> Result<BTreeMap<VipKey, SvcEntry>> {
    let mut out = BTreeMap::new();
    four.for_each(|k, v| {
        out.insert(vip_key(IpAddr::V4(k.vip.into()), k), *v);
    })?;
    six.for_each(|k, v| {
        out.insert(vip_key(IpAddr::V6(k.vip.into()), k), *v);
    })?;
    Ok(out)
}

fn peers_of(four: &Peers<Ip4>, six: &Peers<Ip6>) -> Result<BTreeMap<IpNet, Peer>> {
    let mut out = BTreeMap::new();
    four.for_each(|k, v| out.extend(prefix4(*k).map(|prefix| (prefix, *v))))?;
    six.for_each(|k, v| out.extend(prefix6(k).map(|prefix| (prefix, *v))))?;
    Ok(out)
}

fn ranges_of(ranges: &SourceRanges) -> Result<BTreeMap<SourceRange, u32>> {
    let mut out = BTreeMap::new();
    ranges.for_each(|k, v| out.extend(range_of(k).map(|range| (range, *v))))?;
    Ok(out)
}

/// Reads all that the plan writes, and how much fits, for the command.
pub fn snapshot(bpffs: &Path) -> Result<(Snapshot, Capacity)> {
    let (backends, tables) = (Backends::open(bpffs, Access::Read)?, Tables::open(bpffs, Access::Read)?);
    let (svc4, svc6) = (Services::<Ip4>::open(bpffs, map::SVC4)?, Services::<Ip6>::open(bpffs, map::SVC6)?);
    let (peers4, peers6) = (Peers::<Ip4>::open(bpffs, map::PEERS4)?, Peers::<Ip6>::open(bpffs, map::PEERS6)?);
    let source_ranges = SourceRanges::open(bpffs, map::SOURCE_RANGES)?;
    let room = Capacity {
        services: svc4.max_entries().min(svc6.max_entries()),
        backends: backends.capacity(),
        table_words: tables.capacity(),
        peers: peers4.max_entries().min(peers6.max_entries()),
        source_ranges: source_ranges.max_entries(),
    };
    let snapshot = Snapshot {
        services: services_of(&svc4, &svc6)?,
        ids: backends.ids(),
        backends: backends.slots(),
        tables: tables.words(),
        peers: peers_of(&peers4, &peers6)?,
        source_ranges: ranges_of(&source_ranges)?,
    };
    Ok((snapshot, room))
}

/// Reads `rn_source_ranges`, for the command.
pub fn source_ranges(bpffs: &Path) -> Result<BTreeSet<SourceRange>> {
    Ok(ranges_of(&Map::open(bpffs, map::SOURCE_RANGES)?)?.into_keys().collect())
}

/// Reads the services of both families, for the command.
pub fn services(bpffs: &Path) -> Result<BTreeMap<VipKey, SvcEntry>> {
    services_of(&Map::open(bpffs, map::SVC4)?, &Map::open(bpffs, map::SVC6)?)
}

/// Reads `rn_peers4` and `rn_peers6`, for the command.
pub fn peers(bpffs: &Path) -> Result<BTreeMap<IpNet, Peer>> {
    peers_of(&Map::open(bpffs, map::PEERS4)?, &Map::open(bpffs, map::PEERS6)?)
}
