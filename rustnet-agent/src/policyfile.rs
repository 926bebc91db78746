//! `policies.json` in the run directory: names of what the maps of network policies hold as numbers, for the `rustnetctl` command.
//! The agent writes it from what the index wants in the maps.
//!
//! Sets, rules and classes have numbers that follow from their content. A number that an old file has means the same still; one that it
//! does not have has no name.

use crate::index::DesiredPolicies;
use crate::index::policy::RuleKey;
use crate::install::write_atomic;
use crate::model::ObjectName;
use crate::namefile;
use anyhow::Context;
use rustnet_common::policy::{PolicyPod, PolicyRule};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;

/// Name of the file.
pub const FILE: &str = "policies.json";

/// Entries of each kind at most, and names of one set. With all of them, and names as long as Kubernetes takes them, the file has 10 MB.
const MOST_SETS: usize = 1024;
const MOST_OF_SET: usize = 8;
const MOST_RULES: usize = 4096;
const MOST_CLASSES: usize = 2048;
const MOST_PODS: usize = 4096;
/// Characters of a text at most: a selector may have thousands.
const MOST_CHARS: usize = 200;

/// Names by number.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Names {
    /// The policies of each set.
    pub sets: BTreeMap<u32, List>,
    /// Rules.
    pub rules: BTreeMap<u32, String>,
    /// Selectors, named ports and blocks of each class.
    pub classes: BTreeMap<u32, List>,
    /// Pods of other nodes that `rn_policy_pods` has, by address.
    pub pods: BTreeMap<IpAddr, String>,
}

/// Some texts, and how many more there are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct List {
    /// The texts.
    pub texts: Vec<String>,
    /// How many more.
    pub more: usize,
}

impl Names {
    /// Names of all but pods.
    pub fn of(desired: &DesiredPolicies) -> Self {
        let sets = desired.sets.iter().take(MOST_SETS).map(|(number, policies)| {
            let texts = policies.iter().take(MOST_OF_SET).map(ToString::to_string).collect();
            (*number, List { texts, more: policies.len().saturating_sub(MOST_OF_SET) })
        });
        let classes = desired.class_names.iter().take(MOST_CLASSES).map(|(number, name)| {
            let texts = name.texts.iter().map(|text| shorten(text)).collect();
            (*number, List { texts, more: name.more })
        });
        let rules = desired.rule_names.iter().take(MOST_RULES);
        Self {
            sets: sets.collect(),
            rules: rules.map(|(number, name)| (*number, name.to_string())).collect(),
            classes: classes.collect(),
            pods: BTreeMap::new(),
        }
    }

    /// The same with what an earlier file says of sets and rules that the map still has: what has no room is not wanted there, and pods
    /// keep what they had.
    #[must_use]
    pub fn with_held(mut self, before: &Self, held: &BTreeMap<RuleKey, PolicyRule>) -> Self {
        for (key, rule) in held {
            if let Some(list) = before.sets.get(&key.set) {
                self.sets.entry(key.set).or_insert_with(|| list.clone());
            }
            if let Some(name) = before.rules.get(&rule.rule) {
                self.rules.entry(rule.rule).or_insert_with(|| name.clone());
            }
        }
        self
    }

    /// The same with the names of pods of other nodes that the map has. An address that two pods have gets no name.
    #[must_use]
    pub fn with_pods<'a>(
        &self,
        pods: impl Iterator<Item = (&'a ObjectName, &'a [IpAddr])>,
        held: &BTreeMap<IpAddr, PolicyPod>,
    ) -> Self {
        let mut found: BTreeMap<IpAddr, Option<&ObjectName>> = BTreeMap::new();
        for (name, addresses) in pods {
            for ip in addresses.iter().filter(|ip| held.get(ip).is_some_and(|pod| pod.ifindex == 0)) {
                found.entry(*ip).and_modify(|known| *known = None).or_insert(Some(name));
            }
        }
        let named = found.into_iter().filter_map(|(ip, name)| Some((ip, name?.to_string())));
        Self { pods: named.take(MOST_PODS).collect(), ..self.clone() }
    }
}

fn shorten(text: &str) -> String {
    let mut short: String = text.chars().take(MOST_CHARS).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

/// Makes the file say this; unchanged content is not written again.
///
/// # Errors
/// The run directory cannot be written.
pub fn write(run_dir: &Path, names: &Names) -> anyhow::Result<bool> {
    // Without spaces: of a large cluster it is megabytes.
    let text = serde_json::to_vec(names).context(FILE)?;
    write_atomic(&run_dir.join(FILE), &text, 0o644)
}

/// What the file says; nothing where there is none, as with agents of earlier releases.
///
/// # Errors
/// The file cannot be read.
pub fn read(run_dir: &Path) -> anyhow::Result<Names> {
    namefile::read(run_dir, FILE)
}

#[cfg(test)]
mod tests {
    use super::{FILE, List, MOST_OF_SET, MOST_PODS, MOST_RULES, Names, read, write};
    use crate::index::DesiredPolicies;
    use crate::index::policy::{ClassName, PortPrefix, RuleKey};
    use crate::model::ObjectName;
    use rustnet_common::policy::{PolicyPod, PolicyRule};
    use std::net::{IpAddr, Ipv4Addr};

    fn name(i: usize) -> ObjectName {
        ObjectName::namespaced("shop", &format!("web-{i}"))
    }

    #[test]
    fn what_is_written_is_read_and_written_once() {
        let run = tempfile::tempdir().unwrap();
        assert_eq!(read(run.path()).unwrap(), Names::default());
        let class = ClassName { texts: ["pods of shop".into()].into(), more: 0 };
        let desired = DesiredPolicies {
            sets: [(7, [name(0)].into())].into(),
            rule_names: [(9, "shop/web-0 ingress[0]".into())].into(),
            class_names: [(8, class)].into(),
            ..DesiredPolicies::default()
        };
        let ip = |n| IpAddr::from([10, 1, 1, n]);
        let pod = |ifindex| PolicyPod { ifindex, ..PolicyPod::default() };
        let held = [(ip(1), pod(0)), (ip(2), pod(5)), (ip(3), pod(0))].into();
        let pods = [(name(1), [ip(1), ip(2), ip(3)]), (name(2), [ip(3), ip(4), ip(5)])];
        let names = Names::of(&desired);
        let names = names.with_pods(pods.iter().map(|(name, addresses)| (name, &addresses[..])), &held);
        assert_eq!(names.pods, [(ip(1), "shop/web-1".to_owned())].into(), "of other nodes, in the map, of one pod");
        assert!(write(run.path(), &names).unwrap());
        assert!(!write(run.path(), &names).unwrap(), "unchanged");
        assert_eq!(read(run.path()).unwrap(), names);
        assert_eq!(names.sets[&7], List { texts: vec!["shop/web-0".to_owned()], more: 0 });
        std::fs::write(run.path().join(FILE), "{}").unwrap();
        assert_eq!(read(run.path()).unwrap(), Names::default(), "a file of a later release may lack some");
        std::fs::write(run.path().join(FILE), "[").unwrap();
        assert!(read(run.path()).unwrap_err().to_string().contains(FILE));
    }

    #[test]
    fn names_of_what_the_map_still_has_stay() {
        let list = |text: &str| List { texts: vec![text.to_owned()], more: 0 };
        let before = Names {
            sets: [(1, list("old")), (2, list("gone"))].into(),
            rules: [(7, "old ingress[0]".to_owned()), (8, "gone ingress[0]".to_owned())].into(),
            ..Names::default()
        };
        let now = Names { sets: [(3, list("new"))].into(), ..Names::default() };
        let key = RuleKey { set: 1, class: 0, ports: PortPrefix::ANY };
        let names = now.with_held(&before, &[(key, PolicyRule { flags: 1, rule: 7 })].into());
        assert_eq!(names.sets.keys().collect::<Vec<_>>(), [&1, &3]);
        assert_eq!(names.rules, [(7, "old ingress[0]".to_owned())].into());
    }

    #[test]
    fn the_file_is_bounded() {
        let class = ClassName { texts: ["é".repeat(9000).into()].into(), more: 4 };
        let desired = DesiredPolicies {
            sets: (0..9000).map(|number| (number, (0..100).map(name).collect())).collect(),
            rule_names: (0..9000).map(|number| (number, "a".repeat(300).into())).collect(),
            class_names: (0..9000).map(|number| (number, class.clone())).collect(),
            ..DesiredPolicies::default()
        };
        let addresses: Vec<IpAddr> = (0..9000).map(|n| IpAddr::from(Ipv4Addr::from_bits(n))).collect();
        let held = addresses.iter().map(|ip| (*ip, PolicyPod::default())).collect();
        let names = Names::of(&desired).with_pods([(&name(0), &addresses[..])].into_iter(), &held);
        assert_eq!((names.sets[&0].texts.len(), names.sets[&0].more), (MOST_OF_SET, 100 - MOST_OF_SET));
        assert_eq!((names.rules.len(), names.pods.len()), (MOST_RULES, MOST_PODS));
        let class = &names.classes[&0];
        assert_eq!((class.texts[0].chars().count(), class.more), (201, 4));
        assert!(serde_json::to_vec(&names).unwrap().len() < 10_000_000);
    }
}
