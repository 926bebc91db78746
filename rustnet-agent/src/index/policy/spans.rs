//! Spans of addresses in use: which of them hold for an address.
//!
//! The longest of all prefixes in use that has an address decides. Prefixes nest or are apart, so each has one list of spans: those of
//! the prefix around it, with those that begin here, without those that leave it out.

use super::ids::ContentHash;
use crate::model::{Node, Selector};
use ipnet::{IpNet, Ipv4Net};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr};

/// A range without some parts of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Block {
    /// The range.
    pub cidr: IpNet,
    /// What does not count.
    pub except: Box<[IpNet]>,
}

impl Block {
    /// A text for people.
    pub fn text(&self) -> String {
        let except: Vec<String> = self.except.iter().map(ToString::to_string).collect();
        if except.is_empty() { self.cidr.to_string() } else { format!("{} except {}", self.cidr, except.join(", ")) }
    }

    /// The hash of its canonical text.
    pub fn hash(&self) -> u64 {
        let except: Vec<String> = self.except.iter().map(ToString::to_string).collect();
        ContentHash::of(&format!("block {} - {}", self.cidr, except.join(" ")))
    }
}

/// Addresses that policies name, whatever pod has them.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Span {
    /// A range.
    Block(Block),
    /// The addresses of Nodes with such labels.
    Nodes(Selector),
    /// The pod ranges of all Nodes. In use while policies deny or pass pods: an address of these that no known pod has may be any of them.
    PodRanges,
}

impl Span {
    /// A text for people; `None`: none of theirs.
    pub fn text(&self) -> Option<String> {
        match self {
            Self::Block(block) => Some(block.text()),
            Self::Nodes(selector) if selector.requirements().is_empty() => Some("all nodes".to_owned()),
            Self::Nodes(selector) => Some(format!("nodes with {selector}")),
            Self::PodRanges => None,
        }
    }

    /// The hash of its canonical text.
    pub fn hash(&self) -> u64 {
        match self {
            Self::Block(block) => block.hash(),
            Self::Nodes(selector) => ContentHash::of(&format!("nodes with {selector}")),
            Self::PodRanges => ContentHash::of("pod ranges"),
        }
    }

    /// Its ranges, and what does not count of them.
    fn ranges<'a>(&self, nodes: impl Iterator<Item = &'a Node>) -> (Vec<IpNet>, &[IpNet]) {
        match self {
            Self::Block(block) => (vec![block.cidr], &block.except),
            Self::Nodes(selector) => {
                let selected = nodes.filter(|node| selector.is_met(&node.labels));
                let addresses = selected.flat_map(|node| node.addresses.iter().chain(&node.other_addresses));
                (addresses.map(|ip| IpNet::from(*ip)).collect::<BTreeSet<_>>().into_iter().collect(), &[])
            }
            // Neighbours become one range.
            Self::PodRanges => {
                let all: Vec<IpNet> = nodes.flat_map(|node| node.pod_cidrs.iter().copied()).collect();
                (IpNet::aggregate(&all), &[])
            }
        }
    }
}

/// Number of a list of spans.
pub type Region = usize;

/// All spans in use, by number.
#[derive(Debug, Default)]
pub struct Spans {
    numbers: BTreeMap<Span, usize>,
    /// The lists of spans. The first is empty.
    regions: Vec<Vec<usize>>,
    prefixes: HashMap<IpNet, Region>,
    /// Lengths of prefixes, the longest first: IPv4, IPv6.
    lengths: [Vec<u8>; 2],
}

impl Spans {
    /// These spans, in a cluster of these nodes.
    pub fn new<'a>(spans: BTreeSet<Span>, nodes: &(impl Iterator<Item = &'a Node> + Clone)) -> Self {
        let mut edges: BTreeMap<IpNet, (Vec<usize>, Vec<usize>)> = BTreeMap::new();
        for (i, span) in spans.iter().enumerate() {
            let (begin, end) = span.ranges(nodes.clone());
            for range in begin {
                edges.entry(range).or_default().0.push(i);
            }
            for except in end {
                edges.entry(*except).or_default().1.push(i);
            }
        }
        // The trie holds IPv4 as mapped: no range of IPv6 may stand for these addresses.
        let mapped = IpAddr::V6(Ipv4Addr::UNSPECIFIED.to_ipv6_mapped());
        if edges.keys().any(|prefix| prefix.contains(&mapped)) {
            edges.entry(IpNet::V4(Ipv4Net::default())).or_default();
        }
        let mut it = Self { regions: vec![Vec::new()], ..Self::default() };
        let mut known: HashMap<Vec<usize>, Region> = HashMap::from([(Vec::new(), 0)]);
        let mut around: Vec<(IpNet, Region)> = Vec::new();
        for (prefix, (begin, end)) in edges {
            while around.pop_if(|(outer, _)| !outer.contains(&prefix)).is_some() {}
            let outer = around.last().map_or(0, |(_, region)| *region);
            let mut list = it.regions[outer].clone();
            list.retain(|span| end.binary_search(span).is_err());
            list.extend(begin);
            list.sort_unstable();
            let region = *known.entry(list).or_insert_with_key(|list| {
                it.regions.push(list.clone());
                it.regions.len() - 1
            });
            around.push((prefix, region));
            it.prefixes.insert(prefix, region);
            let lengths = &mut it.lengths[usize::from(prefix.addr().is_ipv6())];
            if let Err(place) = lengths.binary_search_by(|known| prefix.prefix_len().cmp(known)) {
                lengths.insert(place, prefix.prefix_len());
            }
        }
        it.numbers = spans.into_iter().enumerate().map(|(i, span)| (span, i)).collect();
        it
    }

    /// All spans with their numbers.
    pub fn iter(&self) -> impl Iterator<Item = (&Span, usize)> {
        self.numbers.iter().map(|(span, number)| (span, *number))
    }

    /// The number of a span.
    pub fn number(&self, span: &Span) -> Option<usize> {
        self.numbers.get(span).copied()
    }

    /// True if a region is part of the pod ranges, while they are in use.
    pub fn has_pods(&self, region: Region) -> bool {
        self.number(&Span::PodRanges).is_some_and(|number| self.list(region).contains(&number))
    }

    /// The spans of a region, in order.
    pub fn list(&self, region: Region) -> &[usize] {
        self.regions.get(region).map_or(&[], |list| list)
    }

    /// The prefixes in use, each with its region.
    pub fn prefixes(&self) -> impl Iterator<Item = (IpNet, Region)> + '_ {
        self.prefixes.iter().map(|(prefix, region)| (*prefix, *region))
    }

    /// The region of an address.
    pub fn region(&self, ip: IpAddr) -> Region {
        let net = |length: u8| IpNet::new(ip, length).ok().map(|net| net.trunc());
        let lengths = &self.lengths[usize::from(ip.is_ipv6())];
        lengths.iter().find_map(|length| self.prefixes.get(&net(*length)?).copied()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::{Block, Span, Spans};
    use crate::model::build::node;

    fn block(cidr: &str, except: &[&str]) -> Span {
        let block =
            Block { cidr: cidr.parse().unwrap(), except: except.iter().map(|it| it.parse().unwrap()).collect() };
        Span::Block(block)
    }

    #[test]
    fn overlapping_blocks_are_a_union_and_excepts_concern_their_own_block() {
        let all = [
            block("0.0.0.0/0", &["10.0.0.0/8"]),
            block("10.0.0.0/8", &["10.1.0.0/16", "10.1.2.0/24"]),
            block("10.1.2.0/24", &[]),
            block("fd00::/16", &["fd00:1::/32"]),
        ];
        let it = Spans::new(all.clone().into(), &std::iter::empty());
        for (ip, want) in [
            ("192.0.2.1", &[0][..]),
            ("10.2.0.1", &[1]),
            ("10.1.0.1", &[]),
            ("10.1.2.3", &[2]),
            ("fd00:2::1", &[3]),
            ("fd00:1::1", &[]),
            ("2001:db8::1", &[]),
        ] {
            let found: Vec<usize> = it.list(it.region(ip.parse().unwrap())).to_vec();
            let want: Vec<usize> = want.iter().map(|i| it.number(&all[*i]).unwrap()).collect();
            assert_eq!(found, want, "{ip}");
        }
        assert_eq!(it.prefixes().count(), 6);
    }

    #[test]
    fn a_range_of_ipv6_does_not_stand_for_ipv4() {
        let it = Spans::new([block("::/0", &[])].into(), &std::iter::empty());
        assert_eq!(it.list(it.region("10.0.0.1".parse().unwrap())), [0; 0]);
        assert_eq!(it.list(it.region("fd00::1".parse().unwrap())), [0]);
        let prefixes: std::collections::BTreeMap<_, _> = it.prefixes().collect();
        assert_eq!(prefixes.get(&"0.0.0.0/0".parse().unwrap()), Some(&0));
    }

    #[test]
    fn nodes_and_the_ranges_of_pods_are_spans_like_blocks() {
        let mut nodes = [
            node("n1", &["192.0.2.1", "2001:db8::1"], &["10.1.0.0/24", "fd00:0:0:2::/64"]),
            node("n2", &["192.0.2.2"], &["10.1.1.0/24", "fd00:0:0:3::/64"]),
        ];
        nodes[1].other_addresses = ["203.0.113.2".parse().unwrap()].into();
        nodes[1].labels = [("zone".into(), "b".into())].into_iter().collect();
        let zone = crate::model::Requirement::new("zone".into(), crate::model::Wanted::Exists);
        let all = Span::Nodes(crate::model::Selector::default());
        let some = Span::Nodes(crate::model::Selector::new(vec![zone]));
        let spans = [block("192.0.2.0/24", &[]), all, some, Span::PodRanges];
        let it = Spans::new(spans.clone().into(), &nodes.iter());
        for (ip, want) in [
            ("192.0.2.1", &[0, 1][..]),
            ("192.0.2.2", &[0, 1, 2]),
            ("192.0.2.3", &[0]),
            ("2001:db8::1", &[1]),
            ("203.0.113.2", &[1, 2]),
            ("10.1.1.7", &[3]),
            ("10.1.2.7", &[]),
            ("fd00:0:0:2::7", &[3]),
        ] {
            let region = it.region(ip.parse().unwrap());
            let mut want: Vec<usize> = want.iter().map(|i| it.number(&spans[*i]).unwrap()).collect();
            want.sort_unstable();
            assert_eq!(
                (it.list(region), it.has_pods(region)),
                (&want[..], ip.contains("10.1.1") || ip.contains(":0:2::")),
                "{ip}"
            );
        }
        assert_eq!(it.prefixes().count(), 7, "neighbouring ranges of pods are one");
    }
}
