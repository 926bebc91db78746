//! What the host's firewall does with a packet, as far as that can be known: its rules as the kernel has them, read only.
//!
//! `read` has nftables by netlink, iptables-nft included; `legacy` the table `filter` of the older iptables; `xtables` knows the matches of iptables; `walk` judges, and is pure. What a
//! rule depends on and nobody knows beforehand (addresses, limits) may be so or not: both ways are followed.

mod legacy;
mod read;
mod walk;
mod xtables;

pub use read::read;
pub use walk::{Outcome, Packet};

use std::collections::HashMap;
use std::fmt;

/// All rules of the families that IP packets pass.
#[derive(Clone, Debug, Default)]
pub struct Ruleset {
    /// Chains by table and name.
    pub chains: HashMap<ChainName, Chain>,
    /// Elements of the sets that rules look into, by table and name.
    pub sets: HashMap<ChainName, Vec<Element>>,
}

/// A chain, or a set, which is called alike.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChainName {
    /// `NFPROTO_*`: 1 is both families.
    pub family: u8,
    /// Its table.
    pub table: String,
    /// Its name.
    pub name: String,
}

impl ChainName {
    /// It is of the older iptables.
    pub fn is_legacy(&self) -> bool {
        self.table == legacy::TABLE
    }
}

impl fmt::Display for ChainName {
    /// As `nft` writes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = match self.family {
            1 => "inet",
            2 => "ip",
            _ => "ip6",
        };
        write!(f, "{family} {} {}", self.table, self.name)
    }
}

/// Where packets enter a base chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Before the way of a packet is known.
    Prerouting,
    /// To this host.
    Input,
    /// Any other.
    Other,
}

/// One chain.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    /// Where packets enter, for a base chain.
    pub hook: Option<Hook>,
    /// What its end does is to drop; for a base chain.
    pub is_policy_drop: bool,
    /// Its rules, each a list of expressions.
    pub rules: Vec<Vec<Expression>>,
}

/// What a rule decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The packet passes this base chain.
    Accept,
    /// It does not.
    Drop,
    /// The next rule.
    Continue,
    /// Back to where the chain was entered from.
    Return,
    /// Into a chain, and back.
    Jump(String),
    /// Into a chain, and not back.
    Goto(String),
}

/// What is loaded into a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// `NFT_META_*`.
    Meta(u32),
    /// `NFT_CT_*`.
    Ct(u32),
    /// Octets of a header: base, offset, length.
    Payload(u32, u32, u32),
    /// A look into the routing tables: `NFT_FIB_RESULT_*` and `NFTA_FIB_F_*`.
    Fib(u32, u32),
}

/// How a register is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// `==`
    Equal,
    /// `!=`
    Unequal,
    /// `<`, `<=`, `>`, `>=`, by number from 2 on.
    Ordered(u32),
}

/// One step of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expression {
    /// Into the register.
    Load(u32, Load),
    /// From a register into one: and, then exclusive or.
    Mask(u32, u32, Vec<u8>, Vec<u8>),
    /// Goes on if so.
    Compare(u32, Comparison, Vec<u8>),
    /// Goes on if the register lies between; or, with true, if it does not.
    Range(u32, bool, Vec<u8>, Vec<u8>),
    /// Goes on if the register is in the set; or, with true, if it is not.
    Lookup(u32, bool, String),
    /// Decides.
    Verdict(Verdict),
    /// A match of iptables: its name and data.
    Match(String, Vec<u8>),
    /// Changes nothing of the way, such as a counter.
    Pass,
    /// May go on or not, and write any register.
    Unknown,
}

/// An element of a set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Element {
    /// The value, or where an interval begins or ends.
    pub key: Vec<u8>,
    /// An interval that began before ends here.
    pub is_end: bool,
    /// What a verdict map decides for it.
    pub verdict: Option<Verdict>,
}

impl Ruleset {
    /// The base chains of a hook that packets of a family pass, in order.
    pub fn base(&self, hook: Hook, family: u8) -> Vec<&ChainName> {
        let passes = |name: &ChainName| [1, family].contains(&name.family);
        let mut found: Vec<_> = self
            .chains
            .iter()
            .filter(|(name, chain)| chain.hook == Some(hook) && passes(name))
            .map(|it| it.0)
            .collect();
        found.sort();
        found
    }
}
