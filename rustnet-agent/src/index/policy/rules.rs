//! The rules of each set for each class that it has something for.

use super::classes::{Holders, Place};
use super::desired::{PortPrefix, RuleKey};
use super::sets::{Set, SetPort, SetRule, Side};
use rustnet_common::policy::{ALLOW, ANY_CLASS, PolicyRule};
use std::collections::BTreeSet;

/// What the rules of sets follow from.
pub struct Compiler<'a> {
    /// Which classes have what.
    pub holders: &'a Holders,
    /// Numbers of classes.
    pub classes: &'a [u32],
    /// Classes that a side has.
    pub classes_of: &'a dyn Fn(&Side) -> &'a [Place],
}

impl Compiler<'_> {
    /// The rules of a set with this number, whose rules have these numbers. NetworkPolicies have one place in the order of
    /// precedence, the first, and only allow.
    pub fn compile(&self, number: u32, set: &Set, numbers: &[u32]) -> Vec<(RuleKey, PolicyRule)> {
        let (mut hits, mut of_any) = (Vec::new(), BTreeSet::new());
        let mut rules = Vec::new();
        let rule = |class, ports, place: usize| {
            let rule = numbers.get(place).copied().unwrap_or_default();
            (RuleKey { set: number, class, ports }, PolicyRule { order: ALLOW, rule })
        };
        for (place, of_rule) in set.rules.iter().enumerate() {
            if of_rule.sides.is_some() {
                continue;
            }
            of_any.extend(fixed(of_rule));
            hits.extend(fixed(of_rule).map(|ports| (None, ports, place)));
        }
        for (place, of_rule) in set.rules.iter().enumerate() {
            self.add_hits(place, of_rule, &mut hits);
        }
        // Of rules that say the same the first counts.
        hits.sort_unstable();
        hits.dedup_by_key(|(class, ports, _)| (*class, *ports));
        for hits in hits.chunk_by(|a, b| a.0 == b.0) {
            let own = |ports: &PortPrefix| hits.binary_search_by_key(ports, |(_, ports, _)| *ports).is_ok();
            for (class, ports, place) in hits {
                // What wider entries say already needs none of its own.
                let is_said = (hits.len() > 1 && ports.around().any(|it| own(&it)))
                    || (class.is_some() && !is_new(&of_any, *ports));
                if !is_said {
                    rules.push(rule(class.map_or(ANY_CLASS, |class| self.classes[class]), *ports, *place));
                }
            }
        }
        rules
    }

    /// Adds what a rule says of classes, and of the ports that servers resolve themselves.
    fn add_hits(&self, place: usize, rule: &SetRule, hits: &mut Vec<Hit>) {
        let mut classes: Vec<Place> = Vec::new();
        for side in rule.sides.iter().flatten() {
            classes.extend_from_slice((self.classes_of)(side));
        }
        classes.sort_unstable();
        classes.dedup();
        for port in &rule.ports {
            match port {
                SetPort::Prefix(ports) => hits.extend(classes.iter().map(|class| (Some(*class), *ports, place))),
                SetPort::Named(name, proto) => {
                    let resolving = self.holders.names.get(&(name.clone(), *proto)).into_iter().flatten();
                    let own =
                        resolving.filter(|(class, _)| rule.sides.is_none() || classes.binary_search(class).is_ok());
                    hits.extend(own.map(|(class, port)| (Some(*class), PortPrefix::new(*proto, *port, 16), place)));
                }
            }
        }
    }
}

/// Class (`None`: any), ports, and the place of the rule in its set.
type Hit = (Option<Place>, PortPrefix, usize);

/// The ports of a rule that are known by number.
fn fixed(rule: &SetRule) -> impl Iterator<Item = PortPrefix> + '_ {
    rule.ports.iter().filter_map(|port| match port {
        SetPort::Prefix(ports) => Some(*ports),
        SetPort::Named(..) => None,
    })
}

/// True if no prefix among these has such ports.
fn is_new(all: &BTreeSet<PortPrefix>, ports: PortPrefix) -> bool {
    !all.contains(&ports) && ports.around().all(|it| !all.contains(&it))
}
