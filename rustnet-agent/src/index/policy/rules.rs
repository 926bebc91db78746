//! The rules of each set for each class that it has something for.

use super::classes::{Holders, Place};
use super::desired::{PortPrefix, RuleKey};
use super::sets::{Set, SetPort, SetRule, Side};
use rustnet_common::policy::{ALLOW, ANY_CLASS, PolicyRule};
use std::collections::{BTreeMap, BTreeSet};

/// The rule that each entry of one set and one class leads to.
type Entries = BTreeMap<PortPrefix, u32>;

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
        let mut of_class: BTreeMap<Place, Entries> = BTreeMap::new();
        let mut of_any = Entries::new();
        for (rule, number) in set.rules.iter().zip(numbers) {
            let Some(sides) = &rule.sides else {
                add(&mut of_any, &rule.ports, *number);
                self.add_named(rule, None, *number, &mut of_class);
                continue;
            };
            let places: BTreeSet<Place> =
                sides.iter().flat_map(|side| (self.classes_of)(side).iter().copied()).collect();
            for place in &places {
                // Addresses for which nothing holds are of no side.
                add(of_class.entry(*place).or_default(), &rule.ports, *number);
            }
            self.add_named(rule, Some(&places), *number, &mut of_class);
        }
        let mut rules = Vec::new();
        let mut take = |class: u32, entries: &Entries, beyond: Option<&Entries>| {
            // What wider entries say already needs none of its own.
            let is_said = |ports: &PortPrefix| {
                ports
                    .around()
                    .any(|it| entries.contains_key(&it) || beyond.is_some_and(|beyond| beyond.contains_key(&it)))
                    || beyond.is_some_and(|beyond| beyond.contains_key(ports))
            };
            let needed = entries.iter().filter(|(ports, _)| !is_said(ports));
            rules.extend(needed.map(|(ports, rule)| {
                (RuleKey { set: number, class, ports: *ports }, PolicyRule { order: ALLOW, rule: *rule })
            }));
        };
        take(ANY_CLASS, &of_any, None);
        for (place, entries) in &of_class {
            take(self.classes[*place], entries, Some(&of_any));
        }
        rules
    }

    /// Adds the ports that each server resolves itself, for those of some classes or for all.
    fn add_named(
        &self,
        rule: &SetRule,
        places: Option<&BTreeSet<Place>>,
        number: u32,
        of_class: &mut BTreeMap<Place, Entries>,
    ) {
        for port in &rule.ports {
            let SetPort::Named(name, proto) = port else { continue };
            let resolving = self.holders.names.get(&(name.clone(), *proto)).into_iter().flatten();
            for (place, port) in resolving.filter(|(place, _)| places.is_none_or(|places| places.contains(place))) {
                let prefix = PortPrefix::new(*proto, *port, 16);
                of_class.entry(*place).or_default().entry(prefix).or_insert(number);
            }
        }
    }
}

/// Adds the ports that are known by number. Of rules that say the same the first counts.
fn add(entries: &mut Entries, ports: &[SetPort], number: u32) {
    for port in ports {
        if let SetPort::Prefix(prefix) = port {
            entries.entry(*prefix).or_insert(number);
        }
    }
}
