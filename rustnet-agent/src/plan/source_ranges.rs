//! The clients that may come by load balancers' addresses: which ranges go into the map, and in which order.
//!
//! What an entry asks for is put before the entry, and deleted after it: at no moment does a client get through that neither the old
//! ranges have nor the new ones, and none is refused that both have. Where an entry passes from one set of backends to another,
//! with other ranges, the clients that both have are the only ones at that moment. If the map is too full for the old and the new
//! ranges, clients may be refused for a moment.

use super::{SourceRange, VipKey, Write};
use crate::index::ServiceRanges;
use crate::model::Problem;
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};

/// What the map holds.
#[derive(Debug)]
pub struct SourceRanges {
    held: Ranges,
    /// Entries that may be in use.
    usable: usize,
    failed: Vec<Problem>,
    /// Some puts wait for deletions that are planned.
    waits: bool,
    /// Some ranges wait, or stay, until an entry changes.
    keeps: bool,
}

type Ranges = BTreeMap<VipKey, BTreeSet<IpNet>>;

/// What becomes of an entry in the same plan; what asks for more care is greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Entry {
    /// It goes on to lead to the same set of backends, or asks for no client, before or after.
    Stays,
    /// It passes to another set of backends.
    Passes,
    /// It should change, and did not fit: it goes on as it was.
    Stuck,
}

/// Writes of one plan.
#[derive(Debug, Default)]
pub struct RangeWrites {
    /// Come before the entries: puts, then deletions.
    pub before: Vec<Write>,
    /// Come after the entries: puts, then deletions.
    pub after: Vec<Write>,
}

impl SourceRanges {
    /// Begins with what the map holds, which has this many entries.
    pub fn new(held: impl Iterator<Item = SourceRange>, capacity: u32) -> Self {
        let mut ranges = Ranges::new();
        for SourceRange { key, clients } in held {
            ranges.entry(key).or_default().insert(clients);
        }
        // Before Linux 6.13 a full trie does not even take another value for a prefix that it has.
        let usable = capacity.saturating_sub(1) as usize;
        Self { held: ranges, usable, failed: Vec::new(), waits: false, keeps: false }
    }

    /// What the map holds.
    pub fn held(&self) -> impl Iterator<Item = SourceRange> {
        self.held.iter().flat_map(|(key, all)| all.iter().map(|clients| SourceRange { key: *key, clients: *clients }))
    }

    /// Entries of services for which the map holds ranges.
    pub fn keys(&self) -> impl Iterator<Item = VipKey> {
        self.held.keys().copied()
    }

    /// True if a second plan, after the writes of this one, has more to put.
    pub fn waits(&self) -> bool {
        self.waits
    }

    /// True if the next plan may do more, even if the index wants the same.
    pub fn is_unfinished(&self) -> bool {
        self.keeps
    }

    /// What did not fit.
    pub fn problems(&self) -> impl Iterator<Item = Problem> {
        self.failed.iter().cloned()
    }

    /// The writes that lead to these ranges. They are taken as applied. `becomes`: of the entry in the same plan.
    pub fn plan(&mut self, desired: Vec<ServiceRanges>, becomes: impl Fn(&VipKey) -> Entry) -> RangeWrites {
        (self.waits, self.keeps) = (false, false);
        let mut is_short = false;
        let wanted = self.fitting(desired);
        let mut free = self.usable.saturating_sub(self.held.values().map(BTreeSet::len).sum());
        let (mut before, mut after) = (Step::default(), Step::default());
        let keys: BTreeSet<VipKey> = self.held.keys().chain(wanted.keys()).copied().collect();
        for key in keys {
            let becomes = becomes(&key);
            self.keeps |= becomes == Entry::Stuck;
            let Some(new) = wanted.get(&key).or((becomes != Entry::Stuck).then_some(&NOBODY)) else {
                // It still asks for the clients.
                continue;
            };
            let held = self.held.entry(key).or_default();
            let mut moves = Moves::new(held, new, becomes);
            if becomes == Entry::Passes && moves.puts_before.len() + moves.puts_after.len() > free {
                // What is deleted for others to fit does not let the next Service's clients through for that long.
                moves.deletes_before.append(&mut moves.deletes_after);
            }
            let range = |clients| SourceRange { key, clients };
            for (puts, step) in [(moves.puts_before, &mut before), (moves.puts_after, &mut after)] {
                let fit = puts.len().min(free);
                is_short |= fit < puts.len();
                free -= fit;
                held.extend(&puts[..fit]);
                step.puts.extend(puts[..fit].iter().map(|clients| Write::PutSourceRange { range: range(*clients) }));
            }
            for (deletes, step) in [(moves.deletes_before, &mut before), (moves.deletes_after, &mut after)] {
                held.retain(|clients| !deletes.contains(clients));
                let deletes = deletes.into_iter();
                step.deletes.extend(deletes.map(|clients| Write::DeleteSourceRange { range: range(clients) }));
            }
            if held.is_empty() {
                self.held.remove(&key);
            }
        }
        // Without deletions another plan has no more room.
        self.waits = is_short && !(before.deletes.is_empty() && after.deletes.is_empty());
        self.keeps |= is_short;
        RangeWrites { before: before.in_order(), after: after.in_order() }
    }

    /// The ranges of the Services that fit; those of another leave it closed.
    fn fitting(&mut self, desired: Vec<ServiceRanges>) -> Ranges {
        self.failed.clear();
        let mut wanted = Ranges::new();
        let mut left = self.usable;
        for ServiceRanges { service, entries } in desired {
            let count: usize = entries.values().map(BTreeSet::len).sum();
            if count <= left {
                left -= count;
                wanted.extend(entries);
                continue;
            }
            wanted.extend(entries.into_keys().map(|key| (key, BTreeSet::new())));
            let message = format!(
                "its {count} ranges, of all ports and addresses, do not fit into the {left} of {} entries that older services leave, so \
                 that no client may use its load balancer; raise source-range-entries",
                self.usable
            );
            let subject = format!("Service {service}");
            self.failed.push(Problem::new(&subject.into(), "spec.loadBalancerSourceRanges", message));
        }
        wanted
    }
}

static NOBODY: BTreeSet<IpNet> = BTreeSet::new();

/// Writes of one side of the entries.
#[derive(Default)]
struct Step {
    puts: Vec<Write>,
    deletes: Vec<Write>,
}

impl Step {
    fn in_order(mut self) -> Vec<Write> {
        self.puts.append(&mut self.deletes);
        self.puts
    }
}

/// What changes about the ranges of one entry, and when.
struct Moves {
    puts_before: Vec<IpNet>,
    deletes_before: BTreeSet<IpNet>,
    puts_after: Vec<IpNet>,
    deletes_after: BTreeSet<IpNet>,
}

impl Moves {
    fn new(old: &BTreeSet<IpNet>, new: &BTreeSet<IpNet>, becomes: Entry) -> Self {
        let (added, gone) = (new.difference(old).copied(), old.difference(new).copied());
        if becomes == Entry::Stays {
            let (puts_before, deletes_after) = (added.collect(), gone.collect());
            return Self { puts_before, deletes_before: BTreeSet::new(), puts_after: Vec::new(), deletes_after };
        }
        // Of two ranges with common clients, one has the other: what both sides have are ranges of either.
        let is_within = |all: &BTreeSet<IpNet>, range: &IpNet| all.iter().any(|other| other.contains(range));
        let (puts_before, puts_after) = added.partition(|range| is_within(old, range));
        let (deletes_after, deletes_before) = gone.partition(|range| is_within(new, range));
        if becomes == Entry::Passes {
            return Self { puts_before, deletes_before, puts_after, deletes_after };
        }
        Self { puts_before, deletes_before, puts_after: Vec::new(), deletes_after: BTreeSet::new() }
    }
}
