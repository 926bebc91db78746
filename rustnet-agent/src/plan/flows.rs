//! UDP flows whose backend gets no new ones: which of them go on, and which end.
//!
//! UDP has no handshake that would fail and make a client try again. So flows to a backend that no
//! longer serves end at once, as with kube-proxy. Their next packet finds another backend, or is
//! refused. While the backend still serves (it terminates, or is meant for other
//! nodes) they go on: the backend *lingers*. Its slot stays taken meanwhile, so that the next agent
//! finds it there.

use crate::index::Choice;
use rustnet_common::addr::Addr;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;

/// Address and port of a backend.
pub type Target = (Addr, u16);

/// All backends that linger, by the number of their set.
#[derive(Debug, Default)]
pub struct Flows {
    lingering: HashMap<u32, BTreeMap<Target, u32>>,
}

impl Flows {
    /// These backends leave a set.
    pub fn leave(&mut self, set: u32, gone: BTreeMap<Target, u32>) {
        if !gone.is_empty() {
            self.lingering.entry(set).or_default().extend(gone);
        }
    }

    /// A backend was read back that its set does not lead to. Gives the one that had its place.
    pub fn found(&mut self, set: u32, target: Target, id: u32) -> Option<u32> {
        self.lingering.entry(set).or_default().insert(target, id)
    }

    /// Those that linger for a set.
    pub fn of(&self, set: u32) -> impl Iterator<Item = &u32> {
        self.lingering.get(&set).into_iter().flat_map(BTreeMap::values)
    }

    /// Takes those that linger for a set, which may get some of them back.
    pub fn take(&mut self, set: u32) -> BTreeMap<Target, u32> {
        self.lingering.remove(&set).unwrap_or_default()
    }

    /// A set has this choice now. Gives the backends whose flows end, and whose slots are free by that.
    pub fn settle(&mut self, set: u32, choice: &Choice) -> Vec<u32> {
        let Some(lingering) = self.lingering.get_mut(&set) else {
            return Vec::new();
        };
        let target = |(addr, port): &(IpAddr, u16)| (Addr::from(*addr), *port);
        let serving: HashSet<Target> = choice.serving.iter().map(target).collect();
        let gone = lingering.extract_if(.., |target, _| !serving.contains(target)).map(|(_, id)| id).collect();
        if lingering.is_empty() {
            self.lingering.remove(&set);
        }
        gone
    }
}
