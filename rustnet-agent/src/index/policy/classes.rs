//! Classes: addresses that nothing in use can tell apart.

use super::desired::ClassName;
use super::groups::{GroupId, Groups, PeerId};
use super::ids::{ContentHash, numbers};
use super::spans::{Region, Spans};
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
    /// What may hold, too.
    doubt: Doubt,
    /// Named ports in use that it resolves, by place.
    ports: Vec<(usize, u16)>,
    region: Region,
}

/// Selectors that may hold or not: less is known of the address than policies ask. Kept only while policies deny or pass pods.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
enum Doubt {
    /// All is known.
    #[default]
    None,
    /// Some may hold, and named ports are not known.
    Some(Vec<PeerId>),
    /// Nothing is known but that it is an address of pods.
    Any,
}

/// All classes of one state. The first is that of addresses for which nothing holds.
pub struct Classes<'a> {
    groups: &'a Groups,
    spans: &'a Spans,
    /// Policies deny or pass pods: who may be such a pod has another class than who is not.
    has_doubts: bool,
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
    /// By selector: those for which it may hold or not.
    pub doubted: HashMap<PeerId, Vec<Place>>,
    /// By number of a span.
    pub spans: HashMap<usize, Vec<Place>>,
    /// By named port, with its number there.
    pub names: HashMap<NamedPort, Vec<(Place, u16)>>,
}

impl<'a> Classes<'a> {
    /// No class but the first.
    pub fn new(groups: &'a Groups, spans: &'a Spans, names: BTreeSet<NamedPort>, has_doubts: bool) -> Self {
        Self {
            groups,
            spans,
            has_doubts,
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
        let mut all: BTreeSet<PeerId> = common.peers.iter().copied().collect();
        let mut has_ports = true;
        for other in contents {
            has_ports &= common.ports == other.ports;
            common.peers.retain(|peer| other.peers.contains(peer));
            common.ports.retain(|port| other.ports.contains(port));
            all.extend(other.peers);
        }
        if self.has_doubts {
            all.extend(groups.iter().flat_map(|group| self.groups.doubted(*group)));
            // Of a selector that holds for all, the number of a named port may be in doubt.
            let is_certain = |peer: &PeerId| has_ports && common.peers.contains(peer);
            common.doubt = Doubt::Some(all.into_iter().filter(|peer| !is_certain(peer)).collect());
        }
        self.place(Content { region, ..common })
    }

    /// The class of an address that no pod has.
    pub fn of_region(&mut self, region: Region) -> Place {
        let doubt = if self.is_of_pods(region) { Doubt::Any } else { Doubt::None };
        self.place(Content { doubt, region, ..Content::default() })
    }

    /// True if nothing in use but spans tells a class from addresses of no pod.
    pub fn is_plain(&self, place: Place) -> bool {
        let content = &self.contents[place];
        content.is_plain() && !self.is_of_pods(content.region)
    }

    /// The class of an address of a pod elsewhere; `None` if nothing in use but spans tells it from addresses of no pod.
    pub fn of_pod_elsewhere(&mut self, group: GroupId, region: Region) -> Option<Place> {
        let is_plain = self.pod(group).is_plain() && !self.is_of_pods(region);
        (!is_plain).then(|| self.of_pod(group, region))
    }

    /// True for addresses that may be pods' without one being known.
    fn is_of_pods(&self, region: Region) -> bool {
        self.has_doubts && self.spans.has_pods(region)
    }

    /// The numbers of all classes, by place.
    pub fn numbers(&self) -> Vec<u32> {
        let peers: HashMap<PeerId, u64> = self.groups.hashes().collect();
        let spans: HashMap<usize, u64> = self.spans.iter().map(|(span, number)| (number, span.hash())).collect();
        let hash = |content: &Content| {
            let ports = content.ports.iter().map(|(name, port)| {
                let (name, proto) = &self.names[*name];
                ContentHash::of(&format!("port {name}/{proto}={port}"))
            });
            let spans = self.spans.list(content.region).iter().filter_map(|span| spans.get(span).copied());
            let held = content.peers.iter().filter_map(|peer| peers.get(peer).copied());
            let doubt = match &content.doubt {
                Doubt::None => Vec::new(),
                Doubt::Some(doubted) => {
                    let doubted = doubted.iter().filter_map(|peer| peers.get(peer).copied());
                    doubted.map(u64::reverse_bits).chain([ContentHash::of("doubt")]).collect()
                }
                Doubt::Any => vec![ContentHash::of("any pod")],
            };
            let mut parts: Vec<u64> = held.chain(ports).chain(spans).chain(doubt).collect();
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
        let spans: HashMap<usize, usize> =
            self.spans.iter().filter_map(|(span, number)| Some((number, add(span.text()?)))).collect();
        let unknown = add("a pod that is not known".to_owned());
        let plain = add("pods that no selector has".to_owned());
        let mut ports: HashMap<(usize, u16), usize> = HashMap::new();
        let used: BTreeSet<_> = self.contents.iter().flat_map(|content| &content.ports).collect();
        for (name, port) in used {
            let (text, proto) = &self.names[*name];
            ports.insert((*name, *port), add(format!("port {text} is {}/{port}", proto::name(*proto))));
        }
        let name = |content: &Content| {
            let of_peers = content.peers.iter().filter_map(|id| peers.get(id));
            let of_ports = content.ports.iter().filter_map(|port| ports.get(port));
            let of_spans = self.spans.list(content.region).iter().filter_map(|span| spans.get(span));
            let of_doubt = Some(&unknown).filter(|_| content.doubt == Doubt::Any);
            let mut ranks: Vec<usize> = of_peers.chain(of_ports).chain(of_spans).chain(of_doubt).copied().collect();
            if ranks.is_empty() {
                ranks.push(plain);
            }
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
            match &content.doubt {
                Doubt::None => {}
                Doubt::Some(peers) => {
                    for peer in peers {
                        holders.doubted.entry(*peer).or_default().push(place);
                    }
                }
                Doubt::Any => {
                    for (peer, _) in self.groups.hashes() {
                        holders.doubted.entry(peer).or_default().push(place);
                    }
                }
            }
            for span in self.spans.list(content.region) {
                holders.spans.entry(*span).or_default().push(place);
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
        let (groups, names, has_doubts) = (self.groups, &self.names, self.has_doubts);
        self.pods.entry(group).or_insert_with(|| {
            let port = |(i, (name, proto)): (usize, &NamedPort)| Some((i, groups.key(group)?.port(name, *proto)?));
            let ports = names.iter().enumerate().filter_map(port).collect();
            let doubted = groups.doubted(group);
            let has_doubt = has_doubts && !doubted.is_empty();
            let doubt = if has_doubt { Doubt::Some(doubted.to_vec()) } else { Doubt::None };
            Content { peers: groups.held(group).to_vec(), doubt, ports, region: 0 }
        })
    }
}

impl Content {
    /// True if nothing but its region is known of it.
    fn is_plain(&self) -> bool {
        self.peers.is_empty() && self.ports.is_empty() && self.doubt == Doubt::None
    }
}
