//! `rn_policy`, `rn_policy_pods`, `rn_policy_cidrs`, `rn_policy_rules`: what NetworkPolicies say, as the programs read it. The agent alone
//! writes them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context, Result};
use ipnet::IpNet;
use rustnet_common::addr::Addr;
use rustnet_common::names::map;
use rustnet_common::policy::{Policies, PolicyCidrKey, PolicyPod, PolicyRule, PolicyRuleKey};

use super::Map;

/// The one key of `rn_policy`.
const ONLY: u32 = 0;
/// Bits by which an IPv4 prefix grows when it is stored mapped.
const MAPPED: u8 = 96;

/// What the maps hold.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PolicyContent {
    /// Whether policies are enforced, and the generation.
    pub state: Policies,
    /// Pods by address.
    pub pods: BTreeMap<IpAddr, PolicyPod>,
    /// Classes of other addresses.
    pub cidrs: BTreeMap<IpNet, u32>,
    /// What sets allow, in no order.
    pub rules: Vec<(PolicyRuleKey, PolicyRule)>,
}

/// The four maps.
pub struct PolicyStore {
    state: Map<u32, Policies>,
    pods: Map<Addr, PolicyPod>,
    cidrs: Map<PolicyCidrKey, u32>,
    rules: Map<PolicyRuleKey, PolicyRule>,
}

impl PolicyStore {
    /// Opens the pins in `bpffs`.
    ///
    /// # Errors
    /// One is not there, or is another version's.
    pub fn open(bpffs: &Path) -> Result<Self> {
        Ok(Self {
            state: Map::open(bpffs, map::POLICY)?,
            pods: Map::open(bpffs, map::POLICY_PODS)?,
            cidrs: Map::open(bpffs, map::POLICY_CIDRS)?,
            rules: Map::open(bpffs, map::POLICY_RULES)?,
        })
    }

    /// Reads all four.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn read(&self) -> Result<PolicyContent> {
        let mut content = PolicyContent { state: self.state()?, ..PolicyContent::default() };
        self.pods.for_each(|key, pod| {
            content.pods.insert(IpAddr::from(*key), *pod);
        })?;
        self.cidrs.for_each(|key, class| content.cidrs.extend(range_of(key).map(|range| (range, *class))))?;
        self.rules.for_each(|key, rule| content.rules.push((*key, *rule)))?;
        Ok(content)
    }

    /// Reads `rn_policy`.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn state(&self) -> Result<Policies> {
        Ok(self.state.get(&ONLY)?.unwrap_or_default())
    }

    /// Writes `rn_policy`: from now on, programs judge by the other maps as they are, or not at all.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_state(&self, state: &Policies) -> Result<()> {
        self.state.put(&ONLY, state)
    }

    /// Writes entries of pods.
    ///
    /// # Errors
    /// The kernel refuses, or the map is full.
    pub fn put_pods(&self, pods: &[(IpAddr, PolicyPod)]) -> Result<()> {
        let entries: Vec<_> = pods.iter().map(|(ip, pod)| (Addr::from(*ip), *pod)).collect();
        self.pods.put_all(&entries)
    }

    /// Deletes entries of pods.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn delete_pods(&self, pods: &[IpAddr]) -> Result<()> {
        let keys: Vec<_> = pods.iter().map(|ip| Addr::from(*ip)).collect();
        self.pods.delete_all(&keys).map(drop)
    }

    /// Writes classes of ranges.
    ///
    /// # Errors
    /// The kernel refuses, or the map is full.
    pub fn put_cidrs(&self, cidrs: &[(IpNet, u32)]) -> Result<()> {
        let entries: Vec<_> = cidrs.iter().map(|(range, class)| (cidr_key(range), *class)).collect();
        self.cidrs.put_all(&entries)
    }

    /// Deletes classes of ranges.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn delete_cidrs(&self, cidrs: &[IpNet]) -> Result<()> {
        let keys: Vec<_> = cidrs.iter().map(cidr_key).collect();
        self.cidrs.delete_all(&keys).map(drop)
    }

    /// Writes rules.
    ///
    /// # Errors
    /// The kernel refuses, or the map is full.
    pub fn put_rules(&self, rules: &[(PolicyRuleKey, PolicyRule)]) -> Result<()> {
        self.rules.put_all(rules)
    }

    /// Deletes rules.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn delete_rules(&self, rules: &[PolicyRuleKey]) -> Result<()> {
        self.rules.delete_all(rules).map(drop)
    }
}

/// Reads the maps that are pinned in `bpffs`, for the command.
///
/// # Errors
/// One is not there, or the kernel refuses.
pub fn read(bpffs: &Path) -> Result<PolicyContent> {
    PolicyStore::open(bpffs)?.read().context("reading the maps of network policies")
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
