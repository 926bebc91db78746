//! UDP flows whose backend gets no new ones: which of them go on, and which are forgotten.
//!
//! UDP has no handshake that would fail and make a client try anew, so flows to a backend that no longer serves are forgotten
//! at once, as kube-proxy does: their next packet finds another backend, or is refused. While it still serves (it terminates,
//! or is meant for other nodes) they go on: the backend *lingers*. Its slot stays taken meanwhile, so that the next agent
//! finds its id there.

use super::VipKey;
use crate::index::Choice;
use rustnet_common::addr::Addr;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;

/// Address and port of a backend.
pub type Target = (Addr, u16);

/// A backend of which only the flows it had are left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parked {
    /// Its id.
    pub id: u32,
    /// The slot it was last in.
    pub slot: u32,
}

/// All backends that linger.
#[derive(Debug, Default)]
pub struct Flows {
    lingering: HashMap<VipKey, BTreeMap<Target, Parked>>,
    /// Backends read back that no entry refers to. An earlier agent let them linger, or died before it forgot their flows.
    strays: BTreeMap<Target, Vec<Parked>>,
}

impl Flows {
    /// A backend was read back that no entry refers to.
    pub fn add_stray(&mut self, target: Target, parked: Parked) {
        self.strays.entry(target).or_default().push(parked);
    }

    /// These backends leave the range of a service.
    pub fn leave(&mut self, key: VipKey, gone: BTreeMap<Target, Parked>) {
        if !gone.is_empty() {
            self.lingering.entry(key).or_default().extend(gone);
        }
    }

    /// Those that linger for a service, which may get some of them back.
    pub fn take(&mut self, key: &VipKey) -> BTreeMap<Target, Parked> {
        self.lingering.remove(key).unwrap_or_default()
    }

    /// A service has this choice now. Gives the backends whose flows are to be forgotten, and whose slots are free by that.
    pub fn settle(&mut self, key: VipKey, choice: &Choice) -> Vec<Parked> {
        let target = |(addr, port): &(IpAddr, u16)| (Addr::from(*addr), *port);
        for target in choice.serving.iter().map(target) {
            if let Some(parked) = self.strays.get_mut(&target).and_then(Vec::pop)
                && let Some(older) = self.lingering.entry(key).or_default().insert(target, parked)
            {
                self.add_stray(target, older);
            }
        }
        let Some(lingering) = self.lingering.get_mut(&key) else {
            return Vec::new();
        };
        let serving: HashSet<Target> = choice.serving.iter().map(target).collect();
        let gone = lingering.extract_if(.., |target, _| !serving.contains(target)).map(|(_, parked)| parked).collect();
        if lingering.is_empty() {
            self.lingering.remove(&key);
        }
        gone
    }

    /// Every service has been settled: the strays that are left belong to nobody.
    pub fn take_strays(&mut self) -> impl Iterator<Item = Parked> + use<> {
        std::mem::take(&mut self.strays).into_values().flatten()
    }
}
