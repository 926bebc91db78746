//! `rn_policy`, `rn_policy_pods`, `rn_policy_cidrs`, `rn_policy_rules`: what NetworkPolicies say, as the programs read it. The agent alone
//! writes them.

use std::mem::discriminant;
use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context, Result};
use ipnet::IpNet;
use rustnet_common::addr::Addr;
use rustnet_common::names::map;
use rustnet_common::policy::{Policies, PolicyCidrKey, PolicyPod, PolicyRule, PolicyRuleKey};

use super::{Map, runs};
use crate::plan::policies::{PolicyCapacities, PolicyMaps, PolicySnapshot, PolicyWrite};

/// The one key of `rn_policy`.
const ONLY: u32 = 0;
/// Bits by which an IPv4 prefix grows when it is stored mapped.
const MAPPED: u8 = 96;

/// The four maps.
pub struct PolicyStore {
    state: Map<u32, Policies>,
    pods: Map<Addr, PolicyPod>,
    cidrs: Map<PolicyCidrKey, u32>,
    rules: Map<PolicyRuleKey, PolicyRule>,
}

impl PolicyStore {
    /// The store of these maps.
    pub const fn new(
        state: Map<u32, Policies>,
        pods: Map<Addr, PolicyPod>,
        cidrs: Map<PolicyCidrKey, u32>,
        rules: Map<PolicyRuleKey, PolicyRule>,
    ) -> Self {
        Self { state, pods, cidrs, rules }
    }

    /// Opens the pins in `bpffs`.
    ///
    /// # Errors
    /// One is not there, or is another version's.
    pub fn open(bpffs: &Path) -> Result<Self> {
        let (state, pods) = (Map::open(bpffs, map::POLICY)?, Map::open(bpffs, map::POLICY_PODS)?);
        Ok(Self::new(state, pods, Map::open(bpffs, map::POLICY_CIDRS)?, Map::open(bpffs, map::POLICY_RULES)?))
    }

    /// Reads `rn_policy`.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn state(&self) -> Result<Policies> {
        Ok(self.state.get(&ONLY)?.unwrap_or_default())
    }

    /// Has the programs enforce nothing. Known flows are judged again afterwards, by the generation.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn switch_off(&self) -> Result<()> {
        self.state.put(&ONLY, &self.state()?.changed(0))
    }

    /// Applies writes of one kind.
    fn apply_run(&self, run: &[PolicyWrite]) -> Result<()> {
        match &run[0] {
            PolicyWrite::PutState { .. } => run.iter().try_for_each(|write| match write {
                PolicyWrite::PutState { state } => self.state.put(&ONLY, state),
                _ => Ok(()),
            }),
            PolicyWrite::PutPod { .. } => self.pods.put_all(&pick(run, |write| match write {
                PolicyWrite::PutPod { ip, pod } => Some((Addr::from(*ip), *pod)),
                _ => None,
            })),
            PolicyWrite::PutCidr { .. } => self.cidrs.put_all(&pick(run, |write| match write {
                PolicyWrite::PutCidr { prefix, class } => Some((cidr_key(prefix), *class)),
                _ => None,
            })),
            PolicyWrite::PutRule { .. } => self.rules.put_all(&pick(run, |write| match write {
                PolicyWrite::PutRule { key, rule } => Some(((*key).into(), *rule)),
                _ => None,
            })),
            PolicyWrite::DeletePod { .. } => {
                let ip = |write: &PolicyWrite| {
                    if let PolicyWrite::DeletePod { ip } = write { Some(Addr::from(*ip)) } else { None }
                };
                self.pods.delete_all(&pick(run, ip)).map(drop)
            }
            PolicyWrite::DeleteCidr { .. } => {
                let key = |write: &PolicyWrite| {
                    if let PolicyWrite::DeleteCidr { prefix } = write { Some(cidr_key(prefix)) } else { None }
                };
                self.cidrs.delete_all(&pick(run, key)).map(drop)
            }
            PolicyWrite::DeleteRule { .. } => {
                let key = |write: &PolicyWrite| {
                    if let PolicyWrite::DeleteRule { key } = write { Some((*key).into()) } else { None }
                };
                self.rules.delete_all(&pick(run, key)).map(drop)
            }
        }
    }
}

fn pick<T>(run: &[PolicyWrite], of: impl Fn(&PolicyWrite) -> Option<T>) -> Vec<T> {
    run.iter().filter_map(of).collect()
}

impl PolicyMaps for PolicyStore {
    fn snapshot(&self) -> Result<PolicySnapshot> {
        let mut snapshot = PolicySnapshot { state: self.state()?, ..PolicySnapshot::default() };
        self.pods.for_each(|key, pod| {
            snapshot.pods.insert(IpAddr::from(*key), *pod);
        })?;
        self.cidrs.for_each(|key, class| snapshot.cidrs.extend(range_of(key).map(|range| (range, *class))))?;
        self.rules.for_each(|key, rule| {
            snapshot.rules.insert((*key).into(), *rule);
        })?;
        Ok(snapshot)
    }

    /// Runs of writes of one kind go in one batch; the order of the runs is kept.
    fn apply(&mut self, writes: &[PolicyWrite]) -> Result<()> {
        runs::apply(writes, |a, b| discriminant(a) == discriminant(b), |run| self.apply_run(run))
    }

    fn capacities(&self) -> PolicyCapacities {
        PolicyCapacities {
            pods: self.pods.max_entries(),
            cidrs: self.cidrs.max_entries(),
            rules: self.rules.max_entries(),
        }
    }
}

/// Reads the maps that are pinned in `bpffs`, for the command.
///
/// # Errors
/// One is not there, or the kernel refuses.
pub fn read(bpffs: &Path) -> Result<PolicySnapshot> {
    PolicyStore::open(bpffs)?.snapshot().context("reading the maps of network policies")
}

fn cidr_key(range: &IpNet) -> PolicyCidrKey {
    let mapped = if range.addr().is_ipv4() { MAPPED } else { 0 };
    PolicyCidrKey { prefix_len: u32::from(range.prefix_len() + mapped), data: Addr::from(range.network()) }
}

/// `None` for a key that the agent never writes.
fn range_of(key: &PolicyCidrKey) -> Option<IpNet> {
    let len = u8::try_from(key.prefix_len).ok()?;
    let ip = IpAddr::from(key.data);
    let len = if ip.is_ipv4() { len.checked_sub(MAPPED)? } else { len };
    IpNet::new(ip, len).ok()
}

#[cfg(test)]
mod tests {
    use super::{IpNet, cidr_key, range_of};

    #[test]
    fn ranges_of_both_families_come_back() {
        for (text, len) in
            [("10.1.0.0/16", 112), ("0.0.0.0/0", 96), ("192.0.2.1/32", 128), ("::/0", 0), ("fd00:1::/64", 64)]
        {
            let range: IpNet = text.parse().unwrap();
            let key = cidr_key(&range);
            assert_eq!((key.prefix_len, range_of(&key)), (len, Some(range)), "{text}");
        }
        // An IPv6 range of which mapped addresses are a part is no IPv4 range.
        let mut key = cidr_key(&"10.0.0.0/8".parse().unwrap());
        key.prefix_len = 8;
        assert_eq!(range_of(&key), None);
    }
}
