//! Classes: addresses that nothing in use can tell apart.

use super::blocks::{Blocks, Region};
use super::desired::ClassName;
use super::groups::{GroupId, Groups, PeerId};
use super::ids::{ContentHash, numbers};
use rustnet_common::policy::ANY_CLASS;
use rustnet_common::tuple::proto;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

/// Place of a class in [`Classes`].
pub type Place = usize;

/// A named port in use: its name and protocol.
pub type NamedPort = (Arc<str>, u8);

/// Texts of a class at most.
const NAMED: usize = 8;

/// What holds for an address.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Content {
    /// Selectors.
    peers: Vec<PeerId>,
    /// Named ports in use that it resolves, by place.
    ports: Vec<(usize, u16)>,
    region: Region,
}

/// All classes of one state. The first is that of addresses for which nothing holds.
pub struct Classes<'a> {
    groups: &'a Groups,
    blocks: &'a Blocks,
    /// Named ports in use.
    names: Vec<NamedPort>,
    contents: Vec<Content>,
    places: HashMap<Content, Place>,
    /// Selectors and named ports of a group.
    pods: HashMap<GroupId, Content>,
    of_pods: HashMap<(GroupId, Region), Place>,
}

/// Which classes have what.
#[derive(Debug, Default)]
pub struct Holders {
    /// By selector.
    pub peers: HashMap<PeerId, Vec<Place>>,
    /// By number of a block.
    pub blocks: HashMap<usize, Vec<Place>>,
    /// By named port, with its number there.
    pub names: HashMap<NamedPort, Vec<(Place, u16)>>,
}

impl<'a> Classes<'a> {
    /// No class but the first.
    pub fn new(groups: &'a Groups, blocks: &'a Blocks, names: BTreeSet<NamedPort>) -> Self {
        Self {
            groups,
            blocks,
            names: names.into_iter().collect(),
            contents: vec![Content::default()],
            places: HashMap::from([(Content::default(), 0)]),
            pods: HashMap::new(),
            of_pods: HashMap::new(),
        }
    }

    /// The class of a pod's address.
    pub fn of_pod(&mut self, group: GroupId, region: Region) -> Place {
        if let Some(place) = self.of_pods.get(&(group, region)) {
            return *place;
        }
        let content = Content { region, ..self.pod(group).clone() };
        let place = self.place(content);
        self.of_pods.insert((group, region), place);
        place
    }

    /// The class of an address that several pods claim: what holds for all of them.
    pub fn of_all(&mut self, groups: &[GroupId], region: Region) -> Place {
        let mut contents = groups.iter().map(|group| self.pod(*group).clone()).collect::<Vec<_>>().into_iter();
        let mut common = contents.next().unwrap_or_default();
        for other in contents {
            common.peers.retain(|peer| other.peers.contains(peer));
            common.ports.retain(|port| other.ports.contains(port));
        }
        self.place(Content { region, ..common })
    }

    /// The class of an address that no pod has.
    pub fn of_region(&mut self, region: Region) -> Place {
        self.place(Content { region, ..Content::default() })
    }

    /// True if nothing in use but blocks tells a class from addresses of no pod.
    pub fn is_plain(&self, place: Place) -> bool {
        self.contents[place].peers.is_empty() && self.contents[place].ports.is_empty()
    }

    /// True if nothing in use but blocks tells pods of a group from addresses of no pod.
    pub fn is_plain_group(&mut self, group: GroupId) -> bool {
        let content = self.pod(group);
        content.peers.is_empty() && content.ports.is_empty()
    }

    /// The numbers of all classes, by place.
    pub fn numbers(&self) -> Vec<u32> {
        let peers: HashMap<PeerId, u64> = self.groups.hashes().collect();
        let blocks: HashMap<usize, u64> = self.blocks.iter().map(|(block, number)| (number, block.hash())).collect();
        let hash = |content: &Content| {
            let ports = content.ports.iter().map(|(name, port)| {
                let (name, proto) = &self.names[*name];
                ContentHash::of(&format!("port {name}/{proto}={port}"))
            });
            let blocks = self.blocks.list(content.region).iter().filter_map(|block| blocks.get(block).copied());
            let peers = content.peers.iter().filter_map(|peer| peers.get(peer).copied());
            let mut parts: Vec<u64> = peers.chain(ports).chain(blocks).collect();
            // By their texts, not by numbers that the next start gives out otherwise.
            parts.sort_unstable();
            parts.iter().fold(ContentHash::EMPTY, |hash, part| hash.add(&part.to_be_bytes())).value()
        };
        let hashes: Vec<u64> = self.contents.iter().skip(1).map(hash).collect();
        [ANY_CLASS].into_iter().chain(numbers(&hashes)).collect()
    }

    /// What holds for each class, for people, by place.
    pub fn names(&self) -> Vec<ClassName> {
        let mut texts: Vec<Arc<str>> = Vec::new();
        let mut add = |text: String| {
            texts.push(text.into());
            texts.len() - 1
        };
        // By content, for numbers of selectors and blocks are other ones after the next start.
        let peers: HashMap<PeerId, usize> = self.groups.peers().map(|(peer, id)| (id, add(peer.text()))).collect();
        let blocks: HashMap<usize, usize> =
            self.blocks.iter().map(|(block, number)| (number, add(block.text()))).collect();
        let mut ports: HashMap<(usize, u16), usize> = HashMap::new();
        let used: BTreeSet<_> = self.contents.iter().flat_map(|content| &content.ports).collect();
        for (name, port) in used {
            let (text, proto) = &self.names[*name];
            ports.insert((*name, *port), add(format!("port {text} is {}/{port}", proto::name(*proto))));
        }
        let name = |content: &Content| {
            let of_peers = content.peers.iter().filter_map(|id| peers.get(id));
            let of_ports = content.ports.iter().filter_map(|port| ports.get(port));
            let of_blocks = self.blocks.list(content.region).iter().filter_map(|block| blocks.get(block));
            let mut ranks: Vec<usize> = of_peers.chain(of_ports).chain(of_blocks).copied().collect();
            ranks.sort_unstable();
            let more = ranks.len().saturating_sub(NAMED);
            ranks.truncate(NAMED);
            ClassName { texts: ranks.into_iter().map(|rank| Arc::clone(&texts[rank])).collect(), more }
        };
        self.contents.iter().map(name).collect()
    }

    /// Which classes have what.
    pub fn holders(&self) -> Holders {
        let mut holders = Holders::default();
        for (place, content) in self.contents.iter().enumerate() {
            for peer in &content.peers {
                holders.peers.entry(*peer).or_default().push(place);
            }
            for block in self.blocks.list(content.region) {
                holders.blocks.entry(*block).or_default().push(place);
            }
            for (name, port) in &content.ports {
                holders.names.entry(self.names[*name].clone()).or_default().push((place, *port));
            }
        }
        holders
    }

    fn place(&mut self, content: Content) -> Place {
        *self.places.entry(content).or_insert_with_key(|content| {
            self.contents.push(content.clone());
            self.contents.len() - 1
        })
    }

    fn pod(&mut self, group: GroupId) -> &Content {
        let (groups, names) = (self.groups, &self.names);
        self.pods.entry(group).or_insert_with(|| {
            let port = |(i, (name, proto)): (usize, &NamedPort)| Some((i, groups.key(group)?.port(name, *proto)?));
            let ports = names.iter().enumerate().filter_map(port).collect();
            Content { peers: groups.held(group).to_vec(), ports, region: 0 }
        })
    }
}
