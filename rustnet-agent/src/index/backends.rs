//! Which endpoints a service port leads to: the rules of kube-proxy's `CategorizeEndpoints`.

use crate::model::{Condition, EndpointSlice, Family, Hints, ObjectName, ServicePort};
use rustnet_common::backend::flags as backend;
use rustnet_common::service::flags as service;
use std::net::IpAddr;
use std::sync::Arc;

/// One backend as it should be; its id is the plan's business.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DesiredBackend {
    /// Address.
    pub addr: IpAddr,
    /// Port, host order.
    pub port: u16,
    /// See `rustnet_common::backend::flags`.
    pub flags: u16,
}

/// What identifies a set of backends: all frontends of a port that lead to the same endpoints share it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BackendSet {
    /// The Service.
    pub service: ObjectName,
    /// Its port.
    pub port: u16,
    /// IP protocol number.
    pub proto: u8,
    /// Family of the backends.
    pub family: Family,
    /// Only endpoints of this node (traffic policy Local).
    pub is_local: bool,
}

/// Where the packets of a service port go.
#[derive(Debug, Default)]
pub struct Choice {
    /// Where new flows go, in order of address and port.
    pub backends: Vec<DesiredBackend>,
    /// Endpoints that still serve, but get no new flows: they terminate, or are meant for other nodes.
    pub serving: Vec<(IpAddr, u16)>,
    /// Places of the Maglev table that spreads the flows; 0: none does.
    pub table_size: u32,
    /// Hints of the endpoints say which nodes choose which: others may choose otherwise.
    pub is_hinted: bool,
}

impl Choice {
    /// Empties it, to be used again.
    pub fn clear(&mut self) {
        self.backends.clear();
        self.serving.clear();
        self.table_size = 0;
        self.is_hinted = false;
    }
}

/// Where this node is.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Its name.
    pub node: &'a str,
    /// Its zone; empty when unknown.
    pub zone: &'a str,
}

/// An endpoint's port that could be used, with what the choice depends on.
struct Candidate<'a> {
    addr: IpAddr,
    port: u16,
    condition: Condition,
    local: bool,
    hints: Option<&'a Hints>,
}

/// Fills `out`, which is empty, with the backends of one port, and gives the entry's flags. `is_local`: traffic policy Local.
pub fn choose(
    is_local: bool,
    port: &ServicePort,
    family: Family,
    slices: &[Arc<EndpointSlice>],
    here: Place<'_>,
    out: &mut Choice,
) -> u16 {
    let candidates = candidates(port, family, slices, here.node);
    let flags = backends(is_local, &candidates, here, &mut out.backends);
    out.is_hinted = candidates.iter().any(|c| {
        c.condition == Condition::Ready
            && c.hints.is_some_and(|hints| !hints.nodes.is_empty() || !hints.zones.is_empty())
    });
    // Both are in order of address and port.
    let mut chosen = out.backends.iter().peekable();
    out.serving.extend(candidates.iter().map(|c| (c.addr, c.port)).filter(|target| {
        let is_chosen = chosen.peek().is_some_and(|b| (b.addr, b.port) == *target);
        if is_chosen {
            chosen.next();
        }
        !is_chosen
    }));
    flags
}

fn backends(is_local: bool, candidates: &[Candidate<'_>], here: Place<'_>, out: &mut Vec<DesiredBackend>) -> u16 {
    let mut take = |wanted: Condition, filter: &dyn Fn(&Candidate<'_>) -> bool| {
        let chosen = candidates.iter().filter(|c| c.condition == wanted && filter(c));
        let draining = if wanted == Condition::Draining { backend::TERMINATING } else { 0 };
        out.extend(chosen.map(|c| DesiredBackend {
            addr: c.addr,
            port: c.port,
            flags: draining | if c.local { backend::LOCAL } else { 0 },
        }));
        !out.is_empty()
    };
    if is_local {
        // The set of this node falls back to terminating endpoints by itself, and knows no topology.
        let here = take(Condition::Ready, &|c| c.local) || take(Condition::Draining, &|c| c.local);
        let elsewhere = candidates.iter().any(|c| c.condition <= Condition::Draining);
        return if !here && elsewhere { service::DROP_EMPTY } else { 0 };
    }
    let topology = Topology::of(candidates, here);
    let _ = take(Condition::Ready, &|c| topology.allows(c, here)) || take(Condition::Draining, &|_| true);
    0
}

/// The union of the slices without those that do not serve, each address and port once: in the best condition that any
/// slice gives it.
fn candidates<'a>(
    port: &ServicePort,
    family: Family,
    slices: &'a [Arc<EndpointSlice>],
    node: &str,
) -> Vec<Candidate<'a>> {
    let mut all = Vec::new();
    for slice in slices.iter().filter(|slice| slice.family == family) {
        let Some(target) = slice.ports.iter().find(|p| p.proto == port.proto && p.name == port.name) else {
            continue;
        };
        all.extend(slice.endpoints.iter().filter(|e| e.condition != Condition::Unusable).map(|e| Candidate {
            addr: e.addr,
            port: target.port,
            condition: e.condition,
            local: &*e.node == node,
            hints: e.hints.as_deref(),
        }));
    }
    // Stable: among equals the slice that is first by name decides.
    all.sort_by_key(|c| (c.addr, c.port, c.condition));
    all.dedup_by(|later, first| {
        let same = later.addr == first.addr && later.port == first.port;
        first.local |= same && later.local;
        same
    });
    all
}

/// How far the hints of the ready endpoints narrow the choice.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Topology {
    SameNode,
    SameZone,
    All,
}

impl Topology {
    fn of(candidates: &[Candidate<'_>], here: Place<'_>) -> Self {
        fn narrows(candidates: &[Candidate<'_>], me: &str, names: fn(&Hints) -> &[Arc<str>]) -> bool {
            let mut ready = candidates.iter().filter(|c| c.condition == Condition::Ready);
            let mut mine = false;
            let all = ready.all(|c| {
                let names = c.hints.map_or(&[][..], names);
                mine |= names.iter().any(|name| &**name == me);
                !names.is_empty()
            });
            all && mine && !me.is_empty()
        }
        if narrows(candidates, here.node, |hints| &hints.nodes) {
            Self::SameNode
        } else if narrows(candidates, here.zone, |hints| &hints.zones) {
            Self::SameZone
        } else {
            Self::All
        }
    }

    fn allows(self, candidate: &Candidate<'_>, here: Place<'_>) -> bool {
        let named = |names: &[Arc<str>], me: &str| names.iter().any(|name| &**name == me);
        match self {
            Self::All => true,
            Self::SameNode => candidate.hints.is_some_and(|hints| named(&hints.nodes, here.node)),
            Self::SameZone => candidate.hints.is_some_and(|hints| named(&hints.zones, here.zone)),
        }
    }
}
