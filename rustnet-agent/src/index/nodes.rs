//! Nodes, and the peers table, which formats the ways to them.

use crate::model::{Node, ObjectName};
use crate::ways::{Entry, Owner, Way, Ways};
use ipnet::IpNet;
use rustnet_common::addr::{Addr, Address};
use rustnet_common::peer::{Peer, flags, identity};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A node before it changed; `None` for a new one.
type Before = Option<Arc<Node>>;

/// All nodes.
#[derive(Debug, Default)]
pub struct Nodes(BTreeMap<ObjectName, Arc<Node>>);

impl Nodes {
    /// Takes a node in; returns what was known of it before, or `None` if it is no news. Every node's status is written every few
    /// minutes, mostly with nothing new.
    pub fn apply(&mut self, node: &Arc<Node>) -> Option<Before> {
        let is_news = self.0.get(&node.name) != Some(node);
        is_news.then(|| self.0.insert(node.name.clone(), Arc::clone(node)))
    }

    /// Removes a node and returns it.
    pub fn delete(&mut self, name: &ObjectName) -> Option<Arc<Node>> {
        self.0.remove(name)
    }

    pub fn get(&self, name: &str) -> Option<&Node> {
        self.0.get(name).map(|node| &**node)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Node> + Clone {
        self.0.values().map(|node| &**node)
    }
}

/// The peers table of these ways.
pub fn peers(ways: &Ways) -> BTreeMap<IpNet, Peer> {
    ways.entries.iter().map(|(prefix, entry)| (*prefix, peer(entry))).collect()
}

fn peer(entry: &Entry) -> Peer {
    let (identity, owner) = match entry.owner {
        Owner::Host => (identity::HOST, flags::HOST),
        Owner::OwnPods => (identity::POD, flags::LOCAL_PODS),
        Owner::Node => (identity::NODE, flags::NODE),
        Owner::Pods => (identity::POD, flags::POD),
        Owner::Outside => (identity::WORLD, 0),
    };
    let (node, way) = match entry.way {
        Way::Here => (None, 0),
        Way::Direct { gateway, .. } => (Some(gateway), 0),
        Way::Routed { node } => (node, 0),
        Way::Tunnel { far_end } => (Some(far_end), flags::TUNNEL),
    };
    let masquerade = if entry.is_unmasqueraded { flags::NO_MASQ } else { 0 };
    Peer { node: node.map_or(Addr::UNSPECIFIED, Addr::from), identity, flags: owner | way | masquerade, pad: 0 }
}
