//! Rows: what a set says of a class, port by port, and what two rows have in common.

use super::{PolicySnapshot, PortPrefix, RuleKey};
use ipnet::IpNet;
use rustnet_common::policy::{ALLOW, ANY_CLASS, OPEN, PolicyRule};
use std::collections::{BTreeMap, BTreeSet};

/// The rules of a set for a class.
pub type Row = BTreeMap<PortPrefix, PolicyRule>;

/// The rules of a set for a class, of all rules.
pub fn row(rules: &BTreeMap<RuleKey, PolicyRule>, set: u32, class: u32) -> Row {
    let from = RuleKey { set, class, ports: PortPrefix::ANY };
    let own = rules.range(from..).take_while(|(key, _)| (key.set, key.class) == (set, class));
    own.map(|(key, rule)| (key.ports, *rule)).collect()
}

/// What a set says of a class, without what it says of any.
pub fn own_row(state: &PolicySnapshot, set: u32, class: u32) -> Row {
    if set == OPEN {
        let all = (PortPrefix::ANY, PolicyRule { flags: ALLOW, rule: 0 });
        return Row::from_iter((class == ANY_CLASS).then_some(all));
    }
    row(&state.rules, set, class)
}

/// All that a set says of a class: at each prefix that the class or any has, what becomes of its ports.
pub fn full_row(state: &PolicySnapshot, set: u32, class: u32) -> Row {
    let (own, any) = (own_row(state, set, class), own_row(state, set, ANY_CLASS));
    let all: BTreeSet<PortPrefix> = own.keys().chain(any.keys()).copied().collect();
    all.into_iter().map(|ports| (ports, find(&own, ports).or_else(|| find(&any, ports)).unwrap_or(DENIED))).collect()
}

/// What no rule allows.
const DENIED: PolicyRule = PolicyRule { flags: 0, rule: 0 };

/// The entry that counts for some ports: that of the longest prefix which has them all.
fn find(row: &Row, ports: PortPrefix) -> Option<PolicyRule> {
    let longest_first = std::iter::once(ports).chain(ports.around().collect::<Vec<_>>().into_iter().rev());
    longest_first.into_iter().find_map(|it| row.get(&it)).copied()
}

/// What both rows allow. Ports that a row does not have are denied there.
pub fn both(a: &Row, b: &Row) -> Row {
    let all: BTreeSet<PortPrefix> = a.keys().chain(b.keys()).copied().collect();
    let found = all.into_iter().map(|ports| {
        let rules = [a, b].map(|row| find(row, ports).unwrap_or(DENIED));
        let denying = rules.iter().find(|rule| rule.flags & ALLOW == 0);
        (ports, *denying.unwrap_or(&rules[0]))
    });
    found.collect()
}

/// The entries of a class that are needed: those whose ports would meet something else without them, in its own row or, behind that, in
/// one of these of any class.
pub fn reduce(row: &Row, any: &[&Row]) -> Row {
    let mut all = row.clone();
    for ports in any.iter().flat_map(|row| row.keys()).filter(|ports| !row.contains_key(ports)) {
        all.insert(*ports, find(row, *ports).unwrap_or(DENIED));
    }
    let mut needed = Row::new();
    // The shortest prefixes come first.
    for (ports, rule) in all {
        let is_same = |met: Option<PolicyRule>| met.unwrap_or(DENIED).flags & ALLOW == rule.flags & ALLOW;
        let is_met = match find(&needed, ports) {
            Some(own) => is_same(Some(own)),
            None if any.is_empty() => is_same(None),
            None => any.iter().all(|row| is_same(find(row, ports))),
        };
        if !is_met {
            needed.insert(ports, rule);
        }
    }
    needed
}

/// True if the first row allows nothing that the second one does not.
pub fn is_within(a: &Row, b: &Row) -> bool {
    let allows = |row, ports| find(row, ports).unwrap_or(DENIED).flags & ALLOW != 0;
    a.keys().chain(b.keys()).all(|ports| !allows(a, *ports) || allows(b, *ports))
}

/// The class of an address that no entry of pods has.
pub fn class_of(cidrs: &BTreeMap<IpNet, u32>, lengths: &BTreeSet<u8>, prefix: IpNet) -> u32 {
    let shorter = lengths.range(..=prefix.prefix_len()).rev();
    let mut around = shorter.filter_map(|length| cidrs.get(&IpNet::new(prefix.addr(), *length).ok()?.trunc()));
    around.next().copied().unwrap_or(ANY_CLASS)
}
