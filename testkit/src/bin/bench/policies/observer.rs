//! The maps of policies of an agent, read as the programs read them.

use anyhow::{Context, Result};
use rustnet_agent::bpf::store::{Map, policy};
use rustnet_common::addr::Addr;
use rustnet_common::names::map;
use rustnet_common::policy::{ANY_CLASS, OPEN, Policies, PolicyPod, flags};
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use testkit::Node;

/// Between two looks at the maps.
pub const PAUSE: Duration = Duration::from_micros(100);
/// A change that takes longer is never going to come.
pub const PATIENCE: Duration = Duration::from_mins(1);

/// The maps.
pub struct Observer {
    bpffs: PathBuf,
    state: Map<u32, Policies>,
    pods: Map<Addr, PolicyPod>,
}

/// What is in the maps, in numbers.
pub struct Figures {
    /// Entries of `rn_policy_pods`.
    pub pods: usize,
    /// Entries of `rn_policy_cidrs`.
    pub cidrs: usize,
    /// Entries of `rn_policy_rules`.
    pub rules: usize,
    /// Sets of this node's pods.
    pub sets: usize,
    /// Classes of pods and ranges.
    pub classes: usize,
    /// Addresses of this node's pods that are decided.
    pub decided: usize,
}

/// What is to be seen of a change.
#[derive(Clone, Copy, Debug)]
pub enum Sign {
    /// The pod's class is another one, and flows are judged again.
    Class(IpAddr),
    /// The set of flows to the pod is another one, and flows are judged again.
    Set(IpAddr),
    /// The pod has an entry.
    Entry(IpAddr),
    /// The pod has no entry.
    NoEntry(IpAddr),
    /// Flows are judged again.
    Generation,
}

/// The maps before a change.
#[derive(Clone, Copy)]
pub struct Before {
    generation: u32,
    pod: Option<PolicyPod>,
}

impl Observer {
    /// Opens the maps of a node's agent.
    pub fn open(node: &Node) -> Result<Self> {
        let bpffs = node.bpffs();
        let open = |bpffs: &Path| anyhow::Ok((Map::open(bpffs, map::POLICY)?, Map::open(bpffs, map::POLICY_PODS)?));
        let (state, pods) = node.netns().run(|| open(&bpffs))??;
        Ok(Self { bpffs, state, pods })
    }

    /// True once policies are enforced.
    pub fn is_enforced(&self) -> Result<bool> {
        Ok(self.state()?.flags & flags::ENFORCED != 0)
    }

    /// The entry of an address.
    pub fn pod(&self, ip: IpAddr) -> Result<Option<PolicyPod>> {
        self.pods.get(&Addr::from(ip))
    }

    /// What is there before a change.
    pub fn before(&self, sign: Sign) -> Result<Before> {
        Ok(Before { generation: self.state()?.generation, pod: sign.ip().map_or(Ok(None), |ip| self.pod(ip))? })
    }

    /// True once a change is in the maps.
    pub fn sees(&self, sign: Sign, before: &Before) -> Result<bool> {
        let judges_again = || anyhow::Ok(self.state()?.generation != before.generation);
        let pod = sign.ip().map_or(Ok(None), |ip| self.pod(ip))?;
        Ok(match sign {
            Sign::Class(_) => pod.map(|pod| pod.class) != before.pod.map(|pod| pod.class) && judges_again()?,
            Sign::Set(_) => pod.map(|pod| pod.ingress) != before.pod.map(|pod| pod.ingress) && judges_again()?,
            Sign::Entry(_) => pod.is_some(),
            Sign::NoEntry(_) => pod.is_none(),
            Sign::Generation => judges_again()?,
        })
    }

    /// Waits until a change is in the maps; false if it does not come.
    pub fn wait(&self, sign: Sign, before: &Before) -> Result<bool> {
        let began = Instant::now();
        while !self.sees(sign, before)? {
            if began.elapsed() > PATIENCE {
                return Ok(false);
            }
            std::thread::sleep(PAUSE);
        }
        Ok(true)
    }

    /// Counts what is in the maps.
    pub fn figures(&self, node: &Node) -> Result<Figures> {
        let snapshot = node.netns().run(|| policy::read(&self.bpffs))??;
        let local = snapshot.pods.values().filter(|pod| pod.ifindex != 0);
        let sets: BTreeSet<u32> = local.clone().flat_map(|pod| [pod.ingress, pod.egress]).collect();
        let classes: BTreeSet<u32> =
            snapshot.pods.values().map(|pod| pod.class).chain(snapshot.cidrs.values().copied()).collect();
        Ok(Figures {
            pods: snapshot.pods.len(),
            cidrs: snapshot.cidrs.len(),
            rules: snapshot.rules.len(),
            sets: sets.iter().filter(|set| **set != OPEN).count(),
            classes: classes.iter().filter(|class| **class != ANY_CLASS).count(),
            decided: local.count(),
        })
    }

    fn state(&self) -> Result<Policies> {
        self.state.get(&0)?.context("rn_policy is empty")
    }
}

impl Sign {
    const fn ip(self) -> Option<IpAddr> {
        match self {
            Self::Class(ip) | Self::Set(ip) | Self::Entry(ip) | Self::NoEntry(ip) => Some(ip),
            Self::Generation => None,
        }
    }
}
