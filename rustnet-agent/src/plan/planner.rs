//! The plan: what the maps hold, compared with what the index wants. One planner a table; [`in_order`] is the order between
//! them.

use super::audit::{AUDIT_WORDS, Difference, Progress, Repair};
use super::peers::{PeerWrites, Peers};
use super::services::{ServiceWrites, Services};
use super::source_ranges::{Entry, RangeWrites, SourceRanges};
use super::{Maps, Snapshot, SourceRange, Table, VipKey, Write};
use crate::index::{self, Gate, Index, ServiceRanges};
use crate::model::Problem;
use ipnet::IpNet;
use rustnet_common::peer::Peer;
use rustnet_common::service::scope;
use rustnet_common::source_range::ALLOWED;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// What to do next.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The writes, in order.
    pub writes: Vec<Write>,
    /// Something waits for this time: plan again then, even if no event came.
    pub retry_at: Option<Duration>,
}

/// The order between the tables: peers; the ranges of clients that service entries ask for; each service's backends, then the range of
/// their ids, then its entry; wildcard entries; deletions the other way round, a backend's value no sooner than a grace period after;
/// and before the deletions of ranges and peers the backends that end, as by then no entry leads there.
///
/// A range of Services comes after the entries of Services: from then on, an address in it that has none is refused.
///
/// Puts come before deletions, so that a full map takes an entry only after another has gone: what does not fit next to the
/// entries that go is left to a second plan.
fn in_order(peers: PeerWrites, ranges: RangeWrites, services: ServiceWrites) -> Vec<Write> {
    let services = ranges.before.into_iter().chain(services.in_order()).chain(ranges.after);
    let is_service_range =
        |write: &Write| matches!(write, Write::PutPeer { peer, .. } if index::is_service_range(peer));
    let (service_ranges, peer_puts): (Vec<_>, Vec<_>) = peers.puts.into_iter().partition(is_service_range);
    peer_puts.into_iter().chain(services).chain(service_ranges).chain(peers.deletes).collect()
}

/// What the maps hold, and all that is needed to go on from there.
#[derive(Debug)]
pub struct Planner {
    services: Services,
    peers: Peers,
    source_ranges: SourceRanges,
    audit: Progress,
    /// Compare all services, not only what changed.
    compare_services: bool,
    /// The same of peers.
    compare_peers: bool,
    /// Writes were refused: what the maps hold is not known.
    lost_track: bool,
}

impl Planner {
    /// Begins with what the maps hold.
    pub fn adopt(maps: &impl Maps) -> anyhow::Result<Self> {
        let room = Capacity {
            services: maps.service_capacity(),
            backends: maps.backend_capacity(),
            table_words: maps.table_capacity(),
            peers: maps.peer_capacity(),
            source_ranges: maps.source_range_capacity(),
        };
        Ok(Self::from_snapshot(maps.snapshot()?, room))
    }

    /// Begins with this, in maps that can hold so much.
    pub fn from_snapshot(mut snapshot: Snapshot, room: Capacity) -> Self {
        Self {
            peers: Peers::new(std::mem::take(&mut snapshot.peers), room.peers),
            source_ranges: SourceRanges::new(snapshot.source_ranges.keys().copied(), room.source_ranges),
            services: Services::adopt(snapshot, room),
            audit: Progress::default(),
            compare_services: true,
            compare_peers: true,
            lost_track: false,
        }
    }

    /// Brings the maps to what the index wants. `now` is the time since any fixed moment. After an error call it again, soon:
    /// it then begins with what the maps really hold.
    pub fn sync(&mut self, index: &mut Index, maps: &mut impl Maps, now: Duration) -> anyhow::Result<Plan> {
        if self.lost_track {
            let period = self.audit.period();
            *self = Self::adopt(maps)?.with_audit_period(period);
            self.audit.begin_again(now);
        }
        let mut plan = self.plan(index, now);
        self.apply(&plan.writes, maps)?;
        // Once more if the deletions make room in a full map: an entry fits only after another has gone. Twice is enough, as
        // the second plan deletes nothing.
        if self.waits() {
            let more = self.plan(index, now);
            self.apply(&more.writes, maps)?;
            plan.writes.extend(more.writes);
            plan.retry_at = more.retry_at;
        }
        Ok(plan)
    }

    /// The same with this time between two audits.
    #[must_use]
    pub fn with_audit_period(mut self, period: Duration) -> Self {
        self.audit.set_period(period);
        self
    }

    /// When [`Self::audit`] is to be called next. `None`: first a sync has to find out what the maps should hold.
    pub fn audit_at(&self) -> Option<Duration> {
        let is_any_compared = Table::ALL.into_iter().any(|table| self.is_compared(table));
        (is_any_compared && !self.lost_track).then(|| self.audit.due())
    }

    /// True once a table has been compared as a whole with what the index wants.
    fn is_compared(&self, table: Table) -> bool {
        match table {
            Table::Backends | Table::Maglev | Table::SourceRanges | Table::Services4 | Table::Services6 => {
                !self.compare_services
            }
            Table::Peers => !self.compare_peers,
        }
    }

    /// Compares the next piece of the maps with what it should hold, and repairs it. Returns what differed.
    ///
    /// # Errors
    /// A map cannot be read, or not written: the next [`Self::sync`] then reads everything back.
    pub fn audit(&mut self, maps: &mut impl Maps, now: Duration) -> anyhow::Result<Vec<Difference>> {
        if self.audit_at().is_none() {
            return Ok(Vec::new());
        }
        let table = self.audit.table();
        if !self.is_compared(table) {
            self.audit.advance(true, now);
            return Ok(Vec::new());
        }
        let mut repair = Repair::default();
        let is_last_piece = if table == Table::Maglev {
            let first = self.audit.word();
            let found = maps.read_words(first, AUDIT_WORDS)?;
            self.audit.pass_words(found.len());
            self.services.audit_tables(first, &found, &mut repair)
        } else {
            self.audit_piece(table, maps, &mut repair)?
        };
        self.audit.advance(is_last_piece, now);
        let (writes, differences) = repair.into_writes();
        self.apply(&writes, maps)?;
        Ok(differences)
    }

    /// Compares the next piece of a table that [`Maps::read`] reads. Returns whether it is the last.
    fn audit_piece(&mut self, table: Table, maps: &mut impl Maps, repair: &mut Repair) -> anyhow::Result<bool> {
        let (found, is_last_piece) = maps.read(table)?;
        match table {
            Table::Maglev => {}
            Table::Backends => self.services.audit_backends(&found, repair),
            Table::Services4 | Table::Services6 => {
                let look_up = is_last_piece.then_some(|key: &VipKey| maps.service(key));
                self.services.audit(table == Table::Services4, &found, &mut self.audit, look_up, repair)?;
            }
            Table::SourceRanges => {
                let held: BTreeSet<SourceRange> = self.source_ranges.held().collect();
                for range in held.iter().chain(found.source_ranges.keys().filter(|range| !held.contains(range))) {
                    let should = held.contains(range).then_some(ALLOWED);
                    repair.entry(*range, found.source_ranges.get(range).copied(), should);
                }
            }
            Table::Peers => {
                let held = self.peers.held();
                let prefixes: BTreeSet<&IpNet> = held.keys().chain(found.peers.keys()).collect();
                for prefix in prefixes {
                    repair.entry(*prefix, found.peers.get(prefix).copied(), held.get(prefix).copied());
                }
            }
        }
        Ok(is_last_piece)
    }

    fn apply(&mut self, writes: &[Write], maps: &mut impl Maps) -> anyhow::Result<()> {
        if !writes.is_empty() {
            self.lost_track = true;
            maps.apply(writes)?;
            self.lost_track = false;
        }
        Ok(())
    }

    /// The writes that lead from what the maps hold to what the index wants. They are taken as applied.
    pub fn plan(&mut self, index: &mut Index, now: Duration) -> Plan {
        let peers = if index.is_open(Gate::Peers) { self.plan_peers(index) } else { PeerWrites::default() };
        let mut retry_at = self.waits().then_some(now);
        let (services, ranges) = if index.is_open(Gate::Services) {
            let all = std::mem::take(&mut self.compare_services);
            let is_due = index.take_ranges_dirty() | all | self.source_ranges.is_unfinished();
            let desired = is_due.then(|| index.desired_ranges());
            let before = desired.as_ref().map(|desired| self.judged(desired));
            let services = self.services.plan(index, all, now);
            let ranges = desired.zip(before).map(|(desired, before)| self.plan_ranges(desired, &before));
            let ranges = ranges.unwrap_or_default();
            let again = self.waits().then_some(now);
            retry_at = self.services.next_time(now).into_iter().chain(again).min();
            (services, ranges)
        } else {
            self.services.tick(now);
            (ServiceWrites::default(), RangeWrites::default())
        };
        Plan { writes: in_order(peers, ranges, services), retry_at }
    }

    /// Entries that ask for clients, as they are, and the number of the set that each leads to.
    fn judged(&self, desired: &[ServiceRanges]) -> BTreeMap<VipKey, u32> {
        let keys = self.source_ranges.keys().chain(desired.iter().flat_map(|of| of.entries.keys().copied()));
        let both = keys.flat_map(|key| [key, in_cluster(&key)]);
        both.filter_map(|key| Some((key, self.services.judged(&key)?))).collect()
    }

    /// To be called once the entries are planned. `before`: what [`Self::judged`] was before that.
    fn plan_ranges(&mut self, desired: Vec<ServiceRanges>, before: &BTreeMap<VipKey, u32>) -> RangeWrites {
        let services = &self.services;
        let becomes = |key: &VipKey| match (before.get(key), services.judged(key)) {
            (Some(_), Some(_)) if services.has_failed(key) => Entry::Stuck,
            (Some(before), Some(after)) if *before != after => Entry::Passes,
            _ => Entry::Stays,
        };
        // Both entries of an address ask for the same clients.
        self.source_ranges.plan(desired, |key| becomes(key).max(becomes(&in_cluster(key))))
    }

    fn plan_peers(&mut self, index: &mut Index) -> PeerWrites {
        let all = std::mem::take(&mut self.compare_peers);
        let is_due = index.take_peers_dirty() | all | self.peers.waits();
        if !is_due {
            return PeerWrites::default();
        }
        let mut desired = index.desired_peers();
        if !index.knows_service_ranges() {
            // What an agent before has found out stays until it is known again: a restart changes nothing for packets.
            let held = self.peers.held().iter().filter(|(_, peer)| index::is_service_range(peer));
            for (prefix, peer) in held {
                desired.entry(*prefix).or_insert(*peer);
            }
        }
        self.peers.plan(desired)
    }

    /// True if deletions of the last plan make room for what did not fit.
    fn waits(&self) -> bool {
        self.peers.waits() || self.services.waits() || self.source_ranges.waits()
    }

    /// Service entries that did not fit, and why.
    pub fn failed(&self) -> impl Iterator<Item = (VipKey, &str)> {
        self.services.failed()
    }

    /// What did not fit into the maps.
    pub fn problems(&self, index: &Index) -> Vec<Problem> {
        self.services.problems(index).chain(self.source_ranges.problems()).chain(self.peers.problem()).collect()
    }

    /// The peers that the maps hold.
    pub fn peers(&self) -> &BTreeMap<IpNet, Peer> {
        self.peers.held()
    }

    /// Service entries that the maps hold.
    pub fn service_count(&self) -> usize {
        self.services.len()
    }
}

/// The entry of the same address and port for the cluster.
fn in_cluster(key: &VipKey) -> VipKey {
    VipKey { scope: scope::CLUSTER, ..*key }
}

/// How much fits.
#[derive(Clone, Copy, Debug)]
pub struct Capacity {
    /// Services of either family.
    pub services: u32,
    /// Backends, and ids of backends.
    pub backends: u32,
    /// Words of Maglev tables.
    pub table_words: u32,
    /// Peers of either family.
    pub peers: u32,
    /// Ranges of clients.
    pub source_ranges: u32,
}

#[cfg(test)]
mod tests;
