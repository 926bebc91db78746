//! Rows: what a set says of a class, port by port, and what two rows have in common; and which class an address has.

use super::{PolicySnapshot, PortPrefix, RuleKey};
use ipnet::IpNet;
use rustnet_common::policy::{ALLOW, ANY_CLASS, AUDIT, OPEN, PolicyRule};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

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
    all.into_iter().map(|ports| (ports, ports.find(&own).or_else(|| ports.find(&any)).unwrap_or(DENIED))).collect()
}

/// What no rule allows.
const DENIED: PolicyRule = PolicyRule { flags: 0, rule: 0 };

/// What both rows allow. Ports that a row does not have are denied there.
pub fn both(a: &Row, b: &Row) -> Row {
    let all: BTreeSet<PortPrefix> = a.keys().chain(b.keys()).copied().collect();
    let found = all.into_iter().map(|ports| {
        let rules = [a, b].map(|row| ports.find(row).unwrap_or(DENIED));
        let denying = rules.iter().find(|rule| rule.flags & ALLOW == 0);
        let reporting = || rules.iter().find(|rule| rule.flags & AUDIT != 0);
        (ports, *denying.or_else(reporting).unwrap_or(&rules[0]))
    });
    found.collect()
}

/// The entries of a class that are needed: those whose ports would meet something else without them, in its own row or, behind that, in
/// one of these of any class.
pub fn reduce(row: &Row, any: &[&Row]) -> Row {
    let mut all = row.clone();
    for ports in any.iter().flat_map(|row| row.keys()).filter(|ports| !row.contains_key(ports)) {
        all.insert(*ports, ports.find(row).unwrap_or(DENIED));
    }
    PortPrefix::needed(&all, |ports, rule, own| {
        let is_same = |met: Option<PolicyRule>| met.unwrap_or(DENIED).flags == rule.flags;
        match own {
            Some(_) => is_same(own),
            None if any.is_empty() => is_same(None),
            None => any.iter().all(|row| is_same(ports.find(row))),
        }
    })
}

/// True if flows pass.
pub fn allows(rule: PolicyRule) -> bool {
    rule.flags & ALLOW != 0
}

/// True if flows pass and are not reported.
pub fn allows_silently(rule: PolicyRule) -> bool {
    rule.flags & (ALLOW | AUDIT) == ALLOW
}

/// True if the first row allows nothing that the second one does not.
pub fn is_within(a: &Row, b: &Row, allows: fn(PolicyRule) -> bool) -> bool {
    let allows = |row: &Row, ports: PortPrefix| allows(ports.find(row).unwrap_or(DENIED));
    a.keys().chain(b.keys()).all(|ports| !allows(a, *ports) || allows(b, *ports))
}

/// The classes of addresses in some maps.
pub struct Classes<'a> {
    maps: &'a PolicySnapshot,
    /// Lengths of the ranges.
    lengths: BTreeSet<u8>,
}

impl<'a> Classes<'a> {
    /// Those of these maps.
    pub fn new(maps: &'a PolicySnapshot) -> Self {
        Self { maps, lengths: maps.cidrs.keys().map(IpNet::prefix_len).collect() }
    }

    /// The class of the addresses of a range that no entry of pods has.
    pub fn of_range(&self, range: IpNet) -> u32 {
        let shorter = self.lengths.range(..=range.prefix_len()).rev();
        let mut around = shorter.filter_map(|length| {
            let around = IpNet::new(range.addr(), *length).ok()?.trunc();
            self.maps.cidrs.get(&around)
        });
        around.next().copied().unwrap_or(ANY_CLASS)
    }

    /// The class of an address.
    pub fn of(&self, ip: IpAddr) -> u32 {
        self.maps.pods.get(&ip).map_or_else(|| self.of_range(IpNet::from(ip)), |pod| pod.class)
    }
}
