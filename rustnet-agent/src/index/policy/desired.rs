//! The desired content of the maps of policies.

use crate::model::ObjectName;
use ipnet::IpNet;
use rustnet_common::policy::{ANY_PORT, ANY_PROTO, PolicyMatch, PolicyPod, PolicyRule, PolicyRuleKey};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;

/// What the maps of policies should hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DesiredPolicies {
    /// `rn_policy_pods`.
    pub pods: BTreeMap<IpAddr, PolicyPod>,
    /// `rn_policy_cidrs`.
    pub cidrs: BTreeMap<IpNet, u32>,
    /// `rn_policy_rules`.
    pub rules: BTreeMap<RuleKey, PolicyRule>,
    /// Policies exist: pods that are not in the maps are closed.
    pub is_enforced: bool,
    /// The policies of each set, for messages.
    pub sets: BTreeMap<u32, Box<[ObjectName]>>,
    /// What people call each rule, by [`PolicyRule::rule`]: `default/web ingress[0]`.
    pub rule_names: BTreeMap<u32, Box<str>>,
    /// What holds for each class but [`rustnet_common::policy::ANY_CLASS`], for people.
    pub class_names: BTreeMap<u32, ClassName>,
}

/// Texts of the selectors, named ports and blocks that hold for a class: a few, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClassName {
    /// The texts.
    pub texts: Box<[Arc<str>]>,
    /// How many more there are.
    pub more: usize,
}

/// Key of `rn_policy_rules`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RuleKey {
    /// The set.
    pub set: u32,
    /// Class of the other side, or [`rustnet_common::policy::ANY_CLASS`].
    pub class: u32,
    /// Protocols and ports of the server.
    pub ports: PortPrefix,
}

/// Ports that one entry stands for: all of all protocols, all of a protocol, or those with the same upper bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortPrefix {
    /// Length of the whole key's prefix: [`ANY_PROTO`], or [`ANY_PORT`] plus bits of the port.
    len: u8,
    proto: u8,
    port: u16,
}

impl PortPrefix {
    /// Any protocol and port.
    pub const ANY: Self = Self { len: ANY_PROTO as u8, proto: 0, port: 0 };

    /// The ports of a protocol whose upper `bits` are those of `port`.
    pub const fn new(proto: u8, port: u16, bits: u8) -> Self {
        let kept = if bits == 0 { 0 } else { port & (u16::MAX << (16 - bits)) };
        Self { len: ANY_PORT as u8 + bits, proto, port: kept }
    }

    /// The fewest prefixes that have all ports from the first to the last and no others, in order.
    pub fn of_range(proto: u8, first: u16, last: u16) -> Vec<Self> {
        let mut prefixes = Vec::new();
        let (mut at, end) = (u32::from(first), u32::from(last) + 1);
        while at < end {
            let aligned = at.trailing_zeros().min(16);
            let fits = (end - at).ilog2();
            let free = aligned.min(fits);
            prefixes.push(Self::new(proto, at as u16, 16 - free as u8));
            at += 1 << free;
        }
        prefixes
    }

    /// The protocol; `None`: all.
    pub const fn proto(self) -> Option<u8> {
        if self.len == Self::ANY.len { None } else { Some(self.proto) }
    }

    /// The first and the last of the ports.
    pub const fn bounds(self) -> RangeInclusive<u16> {
        let free = match self.len.checked_sub(ANY_PORT as u8) {
            Some(bits) if bits > 0 => u16::MAX.unbounded_shr(bits as u32),
            _ => u16::MAX,
        };
        self.port..=self.port | free
    }

    /// All prefixes that contain it but itself, the widest first.
    pub fn around(self) -> impl DoubleEndedIterator<Item = Self> {
        let bits = self.len.checked_sub(ANY_PORT as u8);
        let any = bits.map(|_| Self::ANY);
        any.into_iter().chain((0..bits.unwrap_or(0)).map(move |bits| Self::new(self.proto, self.port, bits)))
    }

    /// It and all prefixes that contain it, the longest first: so the programs look for an entry.
    pub fn longest_first(self) -> impl Iterator<Item = Self> {
        std::iter::once(self).chain(self.around().rev())
    }

    /// The entry that counts for these ports: that of the longest prefix which has them all.
    pub fn find<T: Copy>(self, entries: &BTreeMap<Self, T>) -> Option<T> {
        self.longest_first().find_map(|it| entries.get(&it).copied())
    }

    /// The entries that are needed. `is_met`: whether some ports meet the same without their entry, which they find among the needed
    /// ones of shorter prefixes, or not.
    pub fn needed<T: Copy>(all: &BTreeMap<Self, T>, is_met: impl Fn(Self, T, Option<T>) -> bool) -> BTreeMap<Self, T> {
        let mut needed = BTreeMap::new();
        // The shortest prefixes come first.
        for (ports, entry) in all {
            if !is_met(*ports, *entry, ports.find(&needed)) {
                needed.insert(*ports, *entry);
            }
        }
        needed
    }

    /// True if all that the other stands for is here, too.
    pub const fn contains(&self, other: &Self) -> bool {
        if self.len == Self::ANY.len {
            return true;
        }
        let bits = self.len - ANY_PORT as u8;
        self.len <= other.len && self.proto == other.proto && Self::new(self.proto, other.port, bits).port == self.port
    }
}

impl From<RuleKey> for PolicyRuleKey {
    fn from(key: RuleKey) -> Self {
        let PortPrefix { len, proto, port } = key.ports;
        let data = PolicyMatch { set: key.set, class: key.class, proto, pad: 0, port: port.to_be_bytes() };
        Self { prefix_len: u32::from(len), data }
    }
}

impl From<PolicyRuleKey> for RuleKey {
    fn from(PolicyRuleKey { prefix_len, data }: PolicyRuleKey) -> Self {
        let (len, port) = (prefix_len as u8, u16::from_be_bytes(data.port));
        Self { set: data.set, class: data.class, ports: PortPrefix { len, proto: data.proto, port } }
    }
}

#[cfg(test)]
mod tests {
    use super::PortPrefix;

    #[test]
    fn ranges_of_ports_are_few_prefixes() {
        for (first, last, count) in [
            (0, u16::MAX, 1),
            (1, u16::MAX, 16),
            (80, 80, 1),
            (80, 81, 1),
            (81, 82, 2),
            (1, 65534, 30),
            (1024, 65535, 6),
        ] {
            let prefixes = PortPrefix::of_range(6, first, last);
            assert_eq!(prefixes.len(), count, "{first}-{last}: {prefixes:?}");
            for port in 0..=u16::MAX {
                let one = PortPrefix::new(6, port, 16);
                let having = prefixes.iter().filter(|prefix| prefix.contains(&one)).count();
                assert_eq!(having, usize::from((first..=last).contains(&port)), "{port} in {first}-{last}");
            }
            let bounds: Vec<_> = prefixes.iter().map(|prefix| prefix.bounds()).collect();
            assert_eq!((*bounds[0].start(), *bounds[count - 1].end()), (first, last));
            assert!(bounds.windows(2).all(|pair| pair[0].end() + 1 == *pair[1].start()), "{bounds:?}");
        }
    }

    #[test]
    fn what_contains_what() {
        let (any, tcp, port) = (PortPrefix::ANY, PortPrefix::new(6, 9, 0), PortPrefix::new(6, 80, 16));
        assert!(any.contains(&any) && any.contains(&tcp) && any.contains(&port) && tcp.contains(&port));
        assert_eq!(port.around().count(), 17);
        assert!(port.around().all(|it| it.contains(&port) && !port.contains(&it)));
        assert_eq!((any.around().count(), tcp.around().collect::<Vec<_>>()), (0, vec![any]));
        assert_eq!((any.proto(), tcp.proto(), any.bounds()), (None, Some(6), 0..=u16::MAX));
        assert!(!tcp.contains(&any) && !port.contains(&tcp) && !PortPrefix::new(17, 0, 0).contains(&port));
    }
}
