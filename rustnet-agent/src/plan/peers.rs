//! The peers table: which prefixes go into the map, and in which order.
//!
//! A packet meets the longest prefix that has its address. So the longest are put first and the shortest deleted first:
//! at no moment does an address have another peer than its old or its new one, or none if the map is too full for both.

use super::Write;
use crate::model::Problem;
use ipnet::IpNet;
use rustnet_common::peer::Peer;
use std::cmp::Reverse;
use std::collections::BTreeMap;

/// What the map of each family holds.
#[derive(Debug)]
pub struct Peers {
    held: BTreeMap<IpNet, Peer>,
    /// Entries of each family that may be in use.
    usable: usize,
    failed: Option<Box<str>>,
    /// Some puts wait for deletions that are planned.
    waits: bool,
}

/// Writes of one plan.
#[derive(Debug, Default)]
pub struct PeerWrites {
    /// Come first.
    pub puts: Vec<Write>,
    /// Come last.
    pub deletes: Vec<Write>,
}

impl Peers {
    /// Begins with what the maps hold, which have this many entries each.
    pub fn new(held: BTreeMap<IpNet, Peer>, capacity: u32) -> Self {
        // Before Linux 6.13 a full trie does not even take another value for a prefix that it has.
        let usable = capacity.saturating_sub(1) as usize;
        Self { held, usable, failed: None, waits: false }
    }

    /// What the maps hold.
    pub fn held(&self) -> &BTreeMap<IpNet, Peer> {
        &self.held
    }

    /// True if a second plan, after the writes of this one, has more to put.
    pub fn waits(&self) -> bool {
        self.waits
    }

    /// What did not fit.
    pub fn problem(&self) -> Option<Problem> {
        self.failed.as_ref().map(|message| Problem::new(&"peers".into(), "", message.clone()))
    }

    /// The writes that lead to these peers. They are taken as applied.
    pub fn plan(&mut self, mut desired: BTreeMap<IpNet, Peer>) -> PeerWrites {
        self.failed = None;
        self.waits = false;
        let mut writes = PeerWrites::default();
        for is_v4 in [true, false] {
            self.leave_out(&mut desired, is_v4);
            self.put(&desired, is_v4, &mut writes.puts);
        }
        let mut stale: Vec<IpNet> = self.held.keys().filter(|prefix| !desired.contains_key(prefix)).copied().collect();
        stale.sort_by_key(|prefix| (prefix.prefix_len(), *prefix));
        for prefix in stale {
            self.held.remove(&prefix);
            writes.deletes.push(Write::DeletePeer { prefix });
        }
        writes
    }

    /// Leaves out the last prefixes of a family, of which there are too many.
    fn leave_out(&mut self, desired: &mut BTreeMap<IpNet, Peer>, is_v4: bool) {
        let wanted = desired.keys().filter(|prefix| is_of(prefix, is_v4)).count();
        if wanted <= self.usable {
            return;
        }
        let usable = self.usable;
        self.failed = Some(
            format!(
                "{wanted} prefixes do not fit into the {usable} entries of the peers map, the last ones are left out; raise \
                 peer-entries"
            )
            .into(),
        );
        let mut kept = 0;
        desired.retain(|prefix, _| {
            kept += usize::from(is_of(prefix, is_v4));
            !is_of(prefix, is_v4) || kept <= usable
        });
    }

    /// Puts what fits next to the prefixes that are to go.
    fn put(&mut self, desired: &BTreeMap<IpNet, Peer>, is_v4: bool, puts: &mut Vec<Write>) {
        let held = self.held.keys().filter(|prefix| is_of(prefix, is_v4)).count();
        let mut free = self.usable.saturating_sub(held);
        let changed =
            desired.iter().filter(|(prefix, peer)| is_of(prefix, is_v4) && self.held.get(prefix) != Some(peer));
        let mut changed: Vec<(IpNet, Peer)> = changed.map(|(prefix, peer)| (*prefix, *peer)).collect();
        changed.sort_by_key(|(prefix, _)| (Reverse(prefix.prefix_len()), *prefix));
        for (prefix, peer) in changed {
            let is_new = !self.held.contains_key(&prefix);
            if held > self.usable || (is_new && free == 0) {
                self.waits = true;
                return;
            }
            free -= usize::from(is_new);
            self.held.insert(prefix, peer);
            puts.push(Write::PutPeer { prefix, peer });
        }
    }
}

fn is_of(prefix: &IpNet, is_v4: bool) -> bool {
    prefix.addr().is_ipv4() == is_v4
}

#[cfg(test)]
mod tests {
    use super::{BTreeMap, IpNet, Peer, PeerWrites, Peers, Write};
    use proptest::prelude::*;
    use rustnet_common::addr::{Addr, Address};
    use std::net::{IpAddr, Ipv4Addr};

    fn peer(identity: u32) -> Peer {
        Peer { node: Addr::UNSPECIFIED, identity, flags: 0, pad: 0 }
    }

    /// Prefixes within 10.0.0.0/28.
    fn prefix(len: u8, n: u8) -> IpNet {
        let ip = Ipv4Addr::new(10, 0, 0, n % 16);
        IpNet::new(ip.into(), len).unwrap().trunc()
    }

    fn meets(peers: &BTreeMap<IpNet, Peer>, ip: IpAddr) -> Option<Peer> {
        let mut matching: Vec<_> = peers.iter().filter(|(prefix, _)| prefix.contains(&ip)).collect();
        matching.sort_by_key(|(prefix, _)| prefix.prefix_len());
        matching.last().map(|(_, peer)| **peer)
    }

    /// As an agent of a release before finds it, which left no entry free.
    #[test]
    fn a_full_trie_takes_no_value_before_a_prefix_has_gone() {
        let table = |prefixes: u8, identity| (0..prefixes).map(|n| (prefix(32, n), peer(identity))).collect();
        let mut peers = Peers::new(table(3, 1), 3);
        let first = peers.plan(table(2, 2));
        assert_eq!((first.puts.len(), first.deletes.len(), peers.waits()), (0, 1, true));
        let second = peers.plan(table(2, 2));
        assert_eq!((second.puts.len(), second.deletes.len(), peers.waits()), (2, 0, false));
    }

    fn table() -> impl Strategy<Value = BTreeMap<IpNet, Peer>> {
        prop::collection::btree_map(
            (27..=32u8, any::<u8>()).prop_map(|(len, n)| prefix(len, n)),
            (0..4u32).prop_map(peer),
            0..10,
        )
    }

    proptest! {
        /// After each write each address has its old or its new peer; where the map cannot hold both tables it may have none or
        /// that of a shorter prefix for a moment, and the map is never too full.
        #[test]
        fn each_address_has_its_old_or_its_new_peer(old in table(), new in table(), capacity in prop::sample::select(vec![11u32, 64])) {
            let mut peers = Peers::new(old.clone(), capacity);
            let mut map = old.clone();
            let mut plans = 0_u32;
            loop {
                let PeerWrites { puts, deletes } = peers.plan(new.clone());
                plans += 1;
                for write in puts.into_iter().chain(deletes) {
                    match write {
                        Write::PutPeer { prefix, peer } => {
                            prop_assert!(map.insert(prefix, peer) != Some(peer));
                        }
                        Write::DeletePeer { prefix } => prop_assert!(map.remove(&prefix).is_some()),
                        other => panic!("{other:?}"),
                    }
                    prop_assert!(map.len() < capacity as usize);
                    for n in (0..16).filter(|_| capacity > 20) {
                        let ip = IpAddr::from([10, 0, 0, n]);
                        let (is, was, will) = (meets(&map, ip), meets(&old, ip), meets(&new, ip));
                        prop_assert!(is == was || is == will, "{ip}: {is:?} is neither {was:?} nor {will:?}");
                    }
                }
                if !peers.waits() {
                    break;
                }
            }
            prop_assert!(plans <= 1 + u32::from(capacity < 20));
            prop_assert_eq!(&map, &new);
            prop_assert_eq!(peers.held(), &new);
        }
    }
}
