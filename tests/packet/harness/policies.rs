//! Network policies, written as the agent writes them.

use super::Lab;
use anyhow::Result;
use rustnet_common::addr::Addr;
use rustnet_common::names::map;
use rustnet_common::policy::{
    ANY_PORT, ANY_PROTO, Policies, PolicyCidrKey, PolicyMatch, PolicyPod, PolicyRule, PolicyRuleKey, flags,
};
use std::net::IpAddr;

/// What a rule is for.
#[derive(Clone, Copy, Debug)]
pub enum To {
    /// All protocols.
    Anything,
    /// All ports of a protocol.
    Proto(u8),
    /// The ports of a protocol whose first bits are those of this one.
    Ports(u8, u16, u32),
}

impl To {
    /// One port of a protocol.
    pub fn port(proto: u8, port: u16) -> Self {
        Self::Ports(proto, port, 16)
    }
}

impl Lab {
    /// Takes all policies away.
    pub fn forget_policies(&self) -> Result<()> {
        let d = &self.datapath;
        d.table(map::POLICY)?.put(&0_u32, &Policies::default())?;
        d.table::<Addr, PolicyPod>(map::POLICY_PODS)?.clear()?;
        d.table::<PolicyCidrKey, u32>(map::POLICY_CIDRS)?.clear()?;
        d.table::<PolicyRuleKey, PolicyRule>(map::POLICY_RULES)?.clear()
    }

    /// Has policies enforced, of this generation.
    pub fn enforce(&self, generation: u32) -> Result<()> {
        self.datapath.table(map::POLICY)?.put(&0_u32, &Policies { generation, flags: flags::ENFORCED })
    }

    /// The same with none to enforce.
    pub fn enforce_nothing(&self, generation: u32) -> Result<()> {
        self.datapath.table(map::POLICY)?.put(&0_u32, &Policies { generation, flags: 0 })
    }

    /// Writes what policies say of a pod.
    pub fn put_policy_pod(&self, ip: IpAddr, pod: PolicyPod) -> Result<()> {
        self.datapath.table(map::POLICY_PODS)?.put(&Addr::from(ip), &pod)
    }

    /// Gives the addresses of a range a class.
    pub fn put_class(&self, ip: IpAddr, len: u32, class: u32) -> Result<()> {
        let prefix_len = if ip.is_ipv4() { 96 + len } else { len };
        self.datapath.table(map::POLICY_CIDRS)?.put(&PolicyCidrKey { prefix_len, data: ip.into() }, &class)
    }

    /// Writes a rule of a set, for a class of the other side.
    pub fn put_rule(&self, set: u32, class: u32, to: To, flags: u32) -> Result<()> {
        self.datapath.table(map::POLICY_RULES)?.put(&rule_key(set, class, to), &PolicyRule { flags, rule: 1 })
    }

    /// Takes a rule away.
    pub fn drop_rule(&self, set: u32, class: u32, to: To) -> Result<()> {
        self.datapath.table::<_, PolicyRule>(map::POLICY_RULES)?.delete(&rule_key(set, class, to)).map(drop)
    }
}

fn rule_key(set: u32, class: u32, to: To) -> PolicyRuleKey {
    let (proto, port, prefix_len) = match to {
        To::Anything => (0, 0, ANY_PROTO),
        To::Proto(proto) => (proto, 0, ANY_PORT),
        To::Ports(proto, port, bits) => (proto, port, ANY_PORT + bits),
    };
    PolicyRuleKey { prefix_len, data: PolicyMatch { set, class, proto, pad: 0, port: port.to_be_bytes() } }
}
