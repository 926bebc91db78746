//! The rules of each set for each class that it has something for.
//!
//! Policies have an order of precedence, and some pass a flow on to the next tier. The programs look for one entry: here each entry
//! gets what becomes of its flows in the end.

use super::classes::{Holders, NamedPort, Place};
use super::desired::{PortPrefix, RuleKey};
use super::sets::{Set, SetPort, SetRule, Side};
use crate::model::{Action, Tier};
use rustnet_common::policy::{ALLOW, ANY_CLASS, AUDIT, PolicyRule};
use std::collections::{BTreeMap, BTreeSet};

/// What the rules of sets follow from.
pub struct Compiler<'a> {
    /// Which classes have what.
    pub holders: &'a Holders,
    /// Numbers of classes.
    pub classes: &'a [u32],
    /// Classes that a side has.
    pub classes_of: &'a dyn Fn(&Side) -> &'a [Place],
    /// Classes that a side may have, or may not: not known yet.
    pub doubted_of: &'a dyn Fn(&Side) -> &'a [Place],
}

/// Class (`None`: any), ports, and the rule that matches.
type Hit = (Option<Place>, PortPrefix, Match);
/// The rules that match flows of one class, by ports.
type Hits = BTreeMap<PortPrefix, Vec<Match>>;

/// A rule that matches flows.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Match {
    /// Its place in its set.
    place: usize,
    /// It may match or not: less is known of the other side than it asks.
    is_doubted: bool,
}

/// What becomes of flows of one class, by ports.
type Verdicts = BTreeMap<PortPrefix, Verdict>;

/// What becomes of a flow.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Verdict {
    is_allowed: bool,
    /// It would be denied, and passes because the namespace is audited.
    is_audited: bool,
    /// The rule that decides; `None`: none does.
    by: Option<usize>,
}

impl Verdict {
    const NONE: Self = Self { is_allowed: false, is_audited: false, by: None };
}

impl Compiler<'_> {
    /// The rules of a set with this number, whose rules have these numbers.
    pub fn compile(&self, number: u32, set: &Set, numbers: &[u32]) -> Vec<(RuleKey, PolicyRule)> {
        let mut hits: Vec<Hit> = Vec::new();
        for (place, rule) in set.rules.iter().enumerate() {
            self.add_hits(place, rule, &mut hits);
        }
        hits.sort_unstable();
        hits.dedup();
        let mut rows = hits.chunk_by(|a, b| a.0 == b.0).peekable();
        let of_any = rows.next_if(|row| matches!(row, [(None, ..), ..])).map(by_ports).unwrap_or_default();
        let any = reduce(set, &verdicts_of_any(set, &of_any), &Verdicts::new());
        let mut rules = Vec::new();
        let mut add = |class, verdicts: &Verdicts| {
            let rule = |(ports, verdict): (&PortPrefix, &Verdict)| {
                let rule = verdict.by.and_then(|place| numbers.get(place)).copied().unwrap_or_default();
                let flags = if verdict.is_allowed { ALLOW } else { 0 } | if verdict.is_audited { AUDIT } else { 0 };
                (RuleKey { set: number, class, ports: *ports }, PolicyRule { flags, rule })
            };
            rules.extend(verdicts.iter().map(rule));
        };
        add(ANY_CLASS, &any);
        for row in rows {
            let [(Some(class), ..), ..] = row else { continue };
            let own = by_ports(row);
            add(self.classes[*class], &reduce(set, &verdicts(set, &own, &of_any), &any));
        }
        rules
    }

    /// Adds what a rule says of any, of classes, and of the ports that servers resolve themselves.
    fn add_hits(&self, place: usize, rule: &SetRule, hits: &mut Vec<Hit>) {
        let Some(sides) = &rule.sides else {
            let certain = Match { place, is_doubted: false };
            for port in &rule.ports {
                match port {
                    SetPort::Prefix(ports) => hits.push((None, *ports, certain)),
                    SetPort::Named(name, proto) => self.add_named(&(name.clone(), *proto), None, certain, hits),
                }
            }
            return;
        };
        let classes: BTreeSet<Place> = sides.iter().flat_map(|side| (self.classes_of)(side)).copied().collect();
        // That a rule accepts who may be its peer would only allow more.
        let counting = sides.iter().filter(|_| rule.action != Action::Accept);
        let doubted: BTreeSet<Place> = counting.flat_map(|side| (self.doubted_of)(side)).copied().collect();
        let [certain, doubt] = [false, true].map(|is_doubted| Match { place, is_doubted });
        for port in &rule.ports {
            let ports = match port {
                SetPort::Prefix(ports) => {
                    hits.extend(classes.iter().map(|class| (Some(*class), *ports, certain)));
                    *ports
                }
                SetPort::Named(name, proto) => {
                    self.add_named(&(name.clone(), *proto), Some(&classes), certain, hits);
                    PortPrefix::new(*proto, 0, 0)
                }
            };
            hits.extend(doubted.iter().map(|class| (Some(*class), ports, doubt)));
        }
    }

    /// Adds the numbers of a named port. `among`: classes that count; `None`: all.
    fn add_named(&self, port: &NamedPort, among: Option<&BTreeSet<Place>>, by: Match, hits: &mut Vec<Hit>) {
        let resolving = self.holders.names.get(port).into_iter().flatten();
        let own = resolving.filter(|(class, _)| among.is_none_or(|classes| classes.contains(class)));
        hits.extend(own.map(|(class, number)| (Some(*class), PortPrefix::new(port.1, *number, 16), by)));
    }
}

fn by_ports(row: &[Hit]) -> Hits {
    let mut hits = Hits::new();
    for (_, ports, by) in row {
        hits.entry(*ports).or_default().push(*by);
    }
    hits
}

/// The rules that match all of some ports.
fn matching(hits: &Hits, ports: PortPrefix) -> impl Iterator<Item = Match> + '_ {
    let having = ports.longest_first().filter(|_| !hits.is_empty());
    having.filter_map(|it| hits.get(&it)).flatten().copied()
}

/// What becomes of flows of classes that no rule names.
fn verdicts_of_any(set: &Set, any: &Hits) -> Verdicts {
    let all = any.keys().copied().chain([PortPrefix::ANY]);
    all.map(|ports| (ports, decide(set, matching(any, ports).collect()))).collect()
}

/// What becomes of flows of a class, with what any may do. Rules that only allow add to that: they have no need to repeat it.
fn verdicts(set: &Set, own: &Hits, any: &Hits) -> Verdicts {
    let repeats = own.values().flatten().any(|by| set.rules[by.place].tier != Tier::Namespaced);
    let all = own.keys().chain(any.keys().filter(|_| repeats));
    all.map(|ports| (*ports, decide(set, matching(own, *ports).chain(matching(any, *ports)).collect()))).collect()
}

/// What becomes of a flow that these rules match. Whoever may annotate a namespace may change its NetworkPolicies, which come before the
/// Baseline tier, but not what the Admin tier denies: that is not audited.
fn decide(set: &Set, mut matching: Vec<Match>) -> Verdict {
    matching.sort_unstable();
    let enforced = decide_as(set, &matching, false);
    if enforced.is_allowed || !set.is_audited || !decide_as(set, &matching, true).is_allowed {
        return enforced;
    }
    Verdict { is_allowed: true, is_audited: true, by: enforced.by }
}

/// The same, as if all tiers behind that of Admin allowed the flow, or not. Where a rule may match or not, the flow is allowed only if it
/// is allowed either way.
fn decide_as(set: &Set, matching: &[Match], is_open: bool) -> Verdict {
    let of_tier = |tier| matching.iter().filter(move |by| set.rules[by.place].tier == tier);
    let mut verdict = Verdict { is_allowed: !set.is_isolated, ..Verdict::NONE };
    // From the last tier to the first: each has what the next one decides. A NetworkPolicy decides all that comes to its tier.
    for tier in [Tier::Baseline, Tier::Namespaced, Tier::Admin] {
        if set.is_isolated && tier == Tier::Baseline {
            continue;
        }
        if is_open && tier == Tier::Admin {
            verdict = Verdict { is_allowed: true, ..Verdict::NONE };
        }
        let next = verdict;
        let mut may_pass = false;
        for Match { place, is_doubted } in of_tier(tier).copied() {
            let by = Some(place);
            match set.rules[place].action {
                Action::Accept => verdict = Verdict { is_allowed: true, is_audited: false, by },
                Action::Deny => verdict = Verdict { is_allowed: false, is_audited: false, by },
                Action::Pass if is_doubted => {
                    may_pass = true;
                    continue;
                }
                Action::Pass => verdict = next,
            }
            break;
        }
        if may_pass && !next.is_allowed {
            verdict = next;
        }
    }
    verdict
}

/// The entries that are needed: those that differ from what flows would meet without them. `any` has the entries that they meet behind
/// all of these.
fn reduce(set: &Set, all: &Verdicts, any: &Verdicts) -> Verdicts {
    // NetworkPolicies are a sum: which of them allows a flow does not matter.
    let is_of_sum = |by: Option<usize>| by.is_some_and(|place| set.rules[place].tier == Tier::Namespaced);
    let is_same = |a: &Verdict, b: &Verdict| {
        (a.is_allowed, a.is_audited) == (b.is_allowed, b.is_audited)
            && (a.by == b.by || (is_of_sum(a.by) && is_of_sum(b.by)))
    };
    PortPrefix::needed(all, |ports, verdict, own| {
        is_same(&verdict, &own.or_else(|| ports.find(any)).unwrap_or(Verdict::NONE))
    })
}
