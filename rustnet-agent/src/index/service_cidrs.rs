//! Ranges of Services, and their place in the peers table: an address in one that no Service has does not exist.
//!
//! A packet meets the longest prefix that has its address, so that nodes and pods inside a range stay reachable. A range that would
//! hide others is left out.

use crate::model::{ObjectName, Problem, ServiceCidr};
use crate::ways::{Owner, Ways};
use ipnet::IpNet;
use rustnet_common::addr::{Addr, Address};
use rustnet_common::peer::{Peer, flags, identity};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

/// The peer of a range.
const PEER: Peer = Peer { node: Addr::UNSPECIFIED, identity: identity::WORLD, flags: flags::SERVICES, pad: 0 };

/// The widest ranges whose addresses are refused: wider ones have been meant for more than Services. The API server takes no wider one
/// for IPv4, and far narrower ones for IPv6.
const WIDEST: (u8, u8) = (12, 48);

/// All objects with ranges of Services.
#[derive(Debug, Default)]
pub struct ServiceCidrs(BTreeMap<ObjectName, Arc<ServiceCidr>>);

impl ServiceCidrs {
    /// Takes an object in.
    pub fn apply(&mut self, object: Arc<ServiceCidr>) {
        self.0.insert(object.name.clone(), object);
    }

    /// Removes an object.
    pub fn delete(&mut self, name: &ObjectName) {
        self.0.remove(name);
    }

    /// The names of all objects.
    pub fn names(&self) -> impl Iterator<Item = ObjectName> + '_ {
        self.0.keys().cloned()
    }

    /// All ranges, those of a setting included, each with who names it.
    fn ranges(&self, configured: &[IpNet]) -> BTreeMap<IpNet, Arc<str>> {
        let by_object = self.0.values().flat_map(|it| {
            let subject: Arc<str> = format!("ServiceCIDR {}", it.name).into();
            it.cidrs.iter().map(move |cidr| (*cidr, Arc::clone(&subject)))
        });
        let by_setting = configured.iter().map(|cidr| (*cidr, "--service-cidrs".into()));
        by_object.chain(by_setting).collect()
    }

    /// True if an address is in one of the ranges.
    pub fn contains(&self, configured: &[IpNet], ip: IpAddr) -> bool {
        let by_object = self.0.values().flat_map(|it| it.cidrs.iter());
        by_object.chain(configured).any(|cidr| cidr.contains(&ip))
    }

    /// Adds the ranges to the peers table of these ways. Those with endpoints in them that are no pods of the table are left out: the
    /// API server itself is one.
    pub fn add_to(
        &self,
        peers: &mut BTreeMap<IpNet, Peer>,
        configured: &[IpNet],
        ways: &Ways,
        endpoints: impl Iterator<Item = IpAddr>,
    ) {
        for cidr in self.ranges(configured).into_keys() {
            // What nodes and pods have comes first; that pods keep their address says nothing about who is there.
            let is_others = ways.entries.get(&cidr).is_some_and(|entry| entry.owner != Owner::Outside);
            if !is_others && !is_too_wide(&cidr) && hidden(&cidr, ways).is_none() {
                peers.insert(cidr, PEER);
            }
        }
        for ip in endpoints {
            while let Some(range) = longest(peers, ip).filter(|range| peers.get(range).is_some_and(is_range)) {
                peers.remove(&range);
            }
        }
    }

    /// The ranges that share addresses with pods or with networks of this host.
    pub fn problems(&self, configured: &[IpNet], ways: &Ways, endpoints: impl Iterator<Item = IpAddr>) -> Vec<Problem> {
        let ranges = self.ranges(configured);
        let mut machines: BTreeMap<IpNet, IpAddr> = BTreeMap::new();
        for ip in endpoints {
            let is_known = ways.entries.iter().any(|(prefix, it)| it.owner != Owner::Outside && prefix.contains(&ip));
            for cidr in ranges.keys().filter(|cidr| !is_known && cidr.contains(&ip)) {
                machines.entry(*cidr).or_insert(ip);
            }
        }
        let problem = |(cidr, subject): (IpNet, Arc<str>)| {
            let message = if let Some((what, other)) = hidden(&cidr, ways) {
                format!(
                    "{cidr} overlaps {what} {other}: its addresses that no Service has are not refused; give them ranges apart"
                )
            } else if is_too_wide(&cidr) {
                format!("{cidr} is too wide for a range of Services: its addresses that no Service has are not refused")
            } else if let Some(ip) = machines.get(&cidr) {
                format!(
                    "{cidr} has {ip} in it, which is no Service but an endpoint: its addresses that no Service has are not refused; give \
                     them ranges apart"
                )
            } else {
                let other = pod_ranges(ways).find(|other| cidr.contains(*other))?;
                format!(
                    "{cidr} has the pod range {other} in it: a Service gets an address there that a pod may have; give them ranges apart"
                )
            };
            Some(Problem::new(&subject, "", message))
        };
        ranges.into_iter().filter_map(problem).collect()
    }
}

/// True for the peer of a range of Services.
pub fn is_range(peer: &Peer) -> bool {
    peer.flags & flags::SERVICES != 0
}

fn is_too_wide(cidr: &IpNet) -> bool {
    cidr.prefix_len() < if cidr.addr().is_ipv4() { WIDEST.0 } else { WIDEST.1 }
}

/// The longest prefix of a table that has an address.
fn longest(peers: &BTreeMap<IpNet, Peer>, ip: IpAddr) -> Option<IpNet> {
    let max = if ip.is_ipv4() { 32 } else { 128 };
    let prefixes = (0..=max).rev().filter_map(|len| IpNet::new(ip, len).ok().map(|net| net.trunc()));
    prefixes.into_iter().find(|prefix| peers.contains_key(prefix))
}

/// What a range would hide from the packets: pods behind a shorter prefix, or machines on a link of this host that are no nodes.
fn hidden(cidr: &IpNet, ways: &Ways) -> Option<(&'static str, IpNet)> {
    let place = &ways.place;
    let links = place.uplinks.iter().chain(&place.side_devices).flat_map(|device| &device.prefixes);
    // One address, as proxies and caches give a Service's to a device, is no network; nor is all that a point-to-point link leads to.
    let mut networks = links.filter(|net| net.prefix_len() != 0 && net.prefix_len() != net.max_prefix_len());
    let pods = pod_ranges(ways).find(|pods| pods.contains(cidr)).map(|pods| ("the pod range", *pods));
    let overlap = |net: &&IpNet| net.contains(cidr) || cidr.contains(*net);
    pods.or_else(|| networks.find(overlap).map(|net| ("the network of this host", net.trunc())))
}

fn pod_ranges(ways: &Ways) -> impl Iterator<Item = &IpNet> {
    let is_pods = |owner| matches!(owner, Owner::OwnPods | Owner::Pods);
    ways.entries.iter().filter(move |(_, entry)| is_pods(entry.owner)).map(|(prefix, _)| prefix)
}
