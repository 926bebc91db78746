//! Blocks of addresses in use: which of them hold for an address.
//!
//! The longest of all prefixes in use that has an address decides. Blocks nest or are apart, so each prefix has one list of blocks:
//! those of the prefix around it, with those that begin here, without those that leave it out.

use super::ids::ContentHash;
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

/// Number of a list of blocks.
pub type Region = usize;

/// All blocks in use, by number.
#[derive(Debug, Default)]
pub struct Blocks {
    numbers: BTreeMap<Block, usize>,
    /// The lists of blocks. The first is empty.
    regions: Vec<Vec<usize>>,
    prefixes: HashMap<IpNet, Region>,
    /// Lengths of prefixes, the longest first: IPv4, IPv6.
    lengths: [Vec<u8>; 2],
}

impl Blocks {
    /// These blocks.
    pub fn new(blocks: BTreeSet<Block>) -> Self {
        let mut edges: BTreeMap<IpNet, (Vec<usize>, Vec<usize>)> = BTreeMap::new();
        for (i, block) in blocks.iter().enumerate() {
            edges.entry(block.cidr).or_default().0.push(i);
            for except in &block.except {
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
            list.retain(|block| end.binary_search(block).is_err());
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
        it.numbers = blocks.into_iter().enumerate().map(|(i, block)| (block, i)).collect();
        it
    }

    /// All blocks with their numbers.
    pub fn iter(&self) -> impl Iterator<Item = (&Block, usize)> {
        self.numbers.iter().map(|(block, number)| (block, *number))
    }

    /// The number of a block.
    pub fn number(&self, block: &Block) -> Option<usize> {
        self.numbers.get(block).copied()
    }

    /// The blocks of a region, in order.
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
    use super::{Block, Blocks};

    fn block(cidr: &str, except: &[&str]) -> Block {
        Block { cidr: cidr.parse().unwrap(), except: except.iter().map(|it| it.parse().unwrap()).collect() }
    }

    #[test]
    fn overlapping_blocks_are_a_union_and_excepts_concern_their_own_block() {
        let all = [
            block("0.0.0.0/0", &["10.0.0.0/8"]),
            block("10.0.0.0/8", &["10.1.0.0/16", "10.1.2.0/24"]),
            block("10.1.2.0/24", &[]),
            block("fd00::/16", &["fd00:1::/32"]),
        ];
        let it = Blocks::new(all.clone().into());
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
        let it = Blocks::new([block("::/0", &[])].into());
        assert_eq!(it.list(it.region("10.0.0.1".parse().unwrap())), [0; 0]);
        assert_eq!(it.list(it.region("fd00::1".parse().unwrap())), [0]);
        let prefixes: std::collections::BTreeMap<_, _> = it.prefixes().collect();
        assert_eq!(prefixes.get(&"0.0.0.0/0".parse().unwrap()), Some(&0));
    }
}
