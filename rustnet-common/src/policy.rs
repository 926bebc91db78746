//! `rn_policy`, `rn_policy_pods`, `rn_policy_cidrs`, `rn_policy_rules`: network policies as the programs read them. Written by the
//! agent alone.
//!
//! A *class* is a number that this node gives to all addresses which the selectors and blocks of its policies cannot tell apart; a
//! *set* is what all policies that select a pod say of one direction. A set and the class of the other side lead to rules.

use crate::addr::Addr;
use crate::shared_type;

/// The one value of `rn_policy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Policies {
    /// Counts the changes after which known flows have to be judged again; never 0 once policies have existed. Flows remember it in
    /// [`crate::conntrack::CtEntry::generation`].
    pub generation: u32,
    /// See [`flags`].
    pub flags: u32,
}

impl Policies {
    /// The value after a change that has known flows judged again. Its generation is never 0, which flows have that no policy has judged.
    #[must_use]
    pub const fn changed(self, flags: u32) -> Self {
        let generation = if self.generation == u32::MAX { 1 } else { self.generation + 1 };
        Self { generation, flags }
    }
}

/// Bits of [`Policies::flags`].
pub mod flags {
    /// Policies exist: a pod of this node that `rn_policy_pods` does not have with its interface opens no flow, and gets none.
    pub const ENFORCED: u32 = 1;
}

/// Value of `rn_policy_pods`, whose key is a pod's address, IPv4 as mapped. Pods of other nodes are there only if a selector in use
/// matches them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct PolicyPod {
    /// Class of the pod.
    pub class: u32,
    /// Set of the flows to it, or [`OPEN`].
    pub ingress: u32,
    /// Set of the flows that it opens, or [`OPEN`].
    pub egress: u32,
    /// Interface of a pod of this node, as `rn_endpoints` has it; 0 for those of other nodes. What another pod with the address is
    /// allowed says nothing of this one.
    pub ifindex: u32,
}

/// The set of pods that no policy selects for a direction: all may pass.
pub const OPEN: u32 = 0;

/// In a [`PolicyMatch`]: addresses of any class. Also the class of addresses that no selector and no block has.
pub const ANY_CLASS: u32 = 0;

/// Key of `rn_policy_cidrs`, as a longest-prefix-match trie wants it; its value is the class of the addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct PolicyCidrKey {
    /// Length of the prefix in bits; of an IPv4 range 96 more, for it is stored mapped.
    pub prefix_len: u32,
    /// The prefix.
    pub data: Addr,
}

/// Key of `rn_policy_rules`, as a longest-prefix-match trie wants it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct PolicyRuleKey {
    /// Length of the prefix in bits: [`ANY_PROTO`], or [`ANY_PORT`] plus the bits of the port that count.
    pub prefix_len: u32,
    /// The prefix.
    pub data: PolicyMatch,
}

/// The prefix of a [`PolicyRuleKey`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct PolicyMatch {
    /// The set.
    pub set: u32,
    /// Class of the other side, or [`ANY_CLASS`].
    pub class: u32,
    /// IP protocol number.
    pub proto: u8,
    /// Zero.
    pub pad: u8,
    /// Port of the flow's destination, the upper byte first: ranges of ports are prefixes.
    pub port: [u8; 2],
}

/// Length of the prefix of a rule for all protocols.
pub const ANY_PROTO: u32 = 64;
/// Length of the prefix of a rule for all ports of a protocol.
pub const ANY_PORT: u32 = 80;
/// Length of the prefix for a look-up, and of a rule for one port.
pub const FULL: u32 = 96;

/// Value of `rn_policy_rules`: what all policies of a set decide in their order of precedence. An entry of the other side's class counts
/// before those of [`ANY_CLASS`], and of one class the entry with the longest prefix counts. Without one the flow is denied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct PolicyRule {
    /// [`ALLOW`] and [`AUDIT`], or 0: the flow is denied.
    pub flags: u32,
    /// Number of the rule, for people; 0 without one.
    pub rule: u32,
}

/// In [`PolicyRule::flags`]: the flow is allowed.
pub const ALLOW: u32 = 1;

/// In [`PolicyRule::flags`], with [`ALLOW`]: the flow would be denied, but its namespace is audited. The flow is reported.
pub const AUDIT: u32 = 2;

shared_type!(Policies, 8);
shared_type!(PolicyPod, 16);
shared_type!(PolicyCidrKey, 20);
shared_type!(PolicyMatch, 12);
shared_type!(PolicyRuleKey, 16);
shared_type!(PolicyRule, 8);
