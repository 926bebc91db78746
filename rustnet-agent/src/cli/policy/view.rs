//! What the maps of this node and the agent's files say of network policies, read at one time.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::Result;
use ipnet::IpNet;
use rustnet_common::addr::{Addr, Address};
use rustnet_common::peer::{Peer, flags};
use rustnet_common::tuple::proto;

use crate::bpf::store;
use crate::bpf::store::endpoints::Endpoints;
use crate::bpf::store::policy;
use crate::cli::{Places, endpoints};
use crate::namefile::{self, NODES, Nodes};
use crate::plan::policies::PolicySnapshot;
use crate::plan::policies::judge::Surroundings;
use crate::podfile;
use crate::policyfile::{self, List};

/// Maps and names.
#[derive(Debug, Default)]
pub struct View {
    /// The maps of policies.
    pub maps: PolicySnapshot,
    /// Pods and addresses of this node.
    pub around: Surroundings,
    /// Names of sets, rules and classes.
    pub names: policyfile::Names,
    /// Names of pods by address: of this node, and of others that policies in use are about.
    pub pods: podfile::Names,
    /// Nodes by name.
    pub nodes: Nodes,
    /// What lies behind addresses that are no pods of this node.
    pub peers: BTreeMap<IpNet, Peer>,
}

impl View {
    /// Reads all of it.
    ///
    /// # Errors
    /// A map or a file cannot be read. A file that is not there only means numbers in place of names.
    pub fn read(places: &Places) -> Result<Self> {
        let bpffs = places.bpffs()?;
        let maps = policy::read(bpffs)?;
        let names = policyfile::read(&places.run_dir)?;
        // What the map does not have any more is of an earlier time.
        let elsewhere = names.pods.iter().filter(|(ip, _)| maps.pods.contains_key(ip));
        let mut pods: podfile::Names = elsewhere.map(|(ip, name)| (*ip, name.clone())).collect();
        pods.extend(endpoints::names(places, &endpoints::by_address(places)?)?);
        let peers = store::peers(bpffs)?;
        let host = peers.iter().filter(|(_, peer)| peer.flags & flags::HOST != 0).map(|(range, _)| range.addr());
        let endpoints = Endpoints::open(bpffs)?.read()?.into_iter().map(|(ip, endpoint)| (ip, endpoint.ifindex));
        let around = Surroundings { endpoints: endpoints.collect(), host: host.collect() };
        Ok(Self { maps, around, names, pods, nodes: namefile::read(&places.run_dir, NODES)?, peers })
    }

    /// The policies of a set; none if they are not known.
    pub fn policies(&self, set: u32) -> List {
        self.names.sets.get(&set).cloned().unwrap_or_default()
    }

    /// What people call a rule; its number if the name is not known, and nothing for a rule without one.
    pub fn rule(&self, rule: u32) -> Option<String> {
        let unknown = || format!("rule {rule:08x}");
        (rule != 0).then(|| self.names.rules.get(&rule).cloned().unwrap_or_else(unknown))
    }

    /// An address with the name of its pod, if that is known.
    pub fn show(&self, ip: IpAddr) -> String {
        self.pods.get(&ip).map_or_else(|| ip.to_string(), |name| format!("{name} ({ip})"))
    }

    /// The addresses of a pod, in order.
    pub fn addresses(&self, pod: &str) -> Vec<IpAddr> {
        self.pods.iter().filter(|(_, name)| *name == pod).map(|(ip, _)| *ip).collect()
    }

    /// True if an address is no pod and no node of the cluster, as far as this node knows.
    pub fn is_outside(&self, ip: IpAddr) -> bool {
        let is_pod = self.around.endpoints.contains_key(&ip) || self.maps.pods.contains_key(&ip);
        !is_pod && self.peer(ip).is_none() && self.other_node(ip).is_none()
    }

    /// True if an address is in a range of Services.
    pub fn is_of_services(&self, ip: IpAddr) -> bool {
        self.peer(ip).is_some_and(|peer| peer.flags & flags::SERVICES != 0)
    }

    /// What lies behind an address, by the longest range.
    fn peer(&self, ip: IpAddr) -> Option<&Peer> {
        let around = self.peers.iter().filter(|(range, _)| range.contains(&ip));
        around.max_by_key(|(range, _)| range.prefix_len()).map(|(_, peer)| peer)
    }

    /// The other node whose pod an address may be: its name, else its address.
    pub fn other_node(&self, ip: IpAddr) -> Option<String> {
        if self.around.endpoints.contains_key(&ip) {
            return None;
        }
        match self.peer(ip) {
            Some(peer) if peer.flags & flags::POD == 0 => None,
            Some(peer) if peer.node != Addr::UNSPECIFIED => {
                let address = IpAddr::from(peer.node);
                let named = self.nodes.iter().find(|(_, node)| node.addresses.contains(&address));
                Some(named.map_or_else(|| address.to_string(), |(name, _)| name.clone()))
            }
            _ => {
                let has = |range: &IpNet| range.contains(&ip);
                self.nodes.iter().find(|(_, node)| node.pod_cidrs.iter().any(has)).map(|(name, _)| name.clone())
            }
        }
    }
}

/// A list as people read it.
pub fn show_list(list: &List) -> String {
    let more = if list.more == 0 { String::new() } else { format!(" and {} more", list.more) };
    format!("{}{more}", list.texts.join(", "))
}

/// The policies of a set as people read them; its number if they are not known.
pub fn show_policies(set: u32, policies: &List) -> String {
    if policies.texts.is_empty() { format!("set {set:08x}") } else { show_list(policies) }
}

/// The name of a protocol, or its number.
pub fn show_proto(number: u8) -> String {
    match proto::name(number) {
        "other" => number.to_string(),
        name => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::namefile::NodeName;

    #[test]
    fn numbers_stand_where_no_names_are() {
        let mut view = View::default();
        assert_eq!(show_policies(0x1a, &view.policies(0x1a)), "set 0000001a");
        assert_eq!((view.rule(0x2b), view.rule(0)), (Some("rule 0000002b".to_owned()), None));
        view.names.sets.insert(0x1a, List { texts: vec!["a/b".to_owned(), "a/c".to_owned()], more: 3 });
        view.names.rules.insert(0x2b, "a/b ingress[0]".to_owned());
        assert_eq!(show_policies(0x1a, &view.policies(0x1a)), "a/b, a/c and 3 more");
        assert_eq!(view.rule(0x2b).as_deref(), Some("a/b ingress[0]"));
    }

    #[test]
    fn another_node_has_a_name_or_an_address() {
        let peer =
            |node: &str, flags| Peer { node: node.parse::<IpAddr>().unwrap().into(), identity: 0, flags, pad: 0 };
        let none = Peer { node: Addr::UNSPECIFIED, identity: 0, flags: flags::LOCAL_PODS, pad: 0 };
        let node = |address: &str, range: &str| NodeName {
            addresses: vec![address.parse().unwrap()],
            pod_cidrs: vec![range.parse().unwrap()],
        };
        let view = View {
            peers: [
                ("10.1.2.0/24".parse().unwrap(), peer("192.0.2.2", flags::POD | flags::TUNNEL)),
                ("10.1.3.0/24".parse().unwrap(), peer("192.0.2.3", flags::POD)),
                ("192.0.2.2/32".parse().unwrap(), peer("192.0.2.2", flags::NODE)),
                ("10.1.1.0/24".parse().unwrap(), none),
            ]
            .into(),
            nodes: [
                ("n2".to_owned(), node("192.0.2.2", "10.1.2.0/24")),
                ("n4".into(), node("192.0.2.4", "10.1.4.0/24")),
            ]
            .into(),
            ..View::default()
        };
        for (ip, want) in [
            ("10.1.2.9", Some("n2")),
            ("10.1.3.9", Some("192.0.2.3")),
            ("10.1.4.9", Some("n4")),
            ("192.0.2.2", None),
            ("10.1.1.9", None),
            ("203.0.113.1", None),
        ] {
            assert_eq!(view.other_node(ip.parse().unwrap()).as_deref(), want, "{ip}");
        }
    }
}
