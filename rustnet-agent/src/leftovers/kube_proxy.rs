//! What kube-proxy leaves on a host when it is gone, by its modes: tables of nftables; chains of iptables and the rules that
//! lead to them; the device and the virtual servers of IPVS, and its sets of ipset. And the removal of that, and of nothing else.
//!
//! Names decide, each of them known: others have chains called `KUBE-...`, too. The kubelet's are `KUBE-FIREWALL`,
//! `KUBE-MARK-DROP`, `KUBE-IPTABLES-HINT` and `KUBE-KUBELET-CANARY` (KEP-3178); kube-router's `KUBE-ROUTER-...`,
//! `KUBE-POD-FW-...` and `KUBE-NWPLCY-...`.

use anyhow::Result;

use super::ipvs::{self, VirtualServer};
use super::nftables::{Chain, Family, Jump, Nftables, Removal, Table};
use super::{ipset, iptables};
use crate::net::address;
use crate::net::link::{self, Link};
use crate::net::netlink::Socket;
use std::collections::BTreeSet;
use std::net::IpAddr;

/// Its table in nftables, in both families.
const TABLE: &str = "kube-proxy";
/// The device that bears all service addresses in IPVS mode.
const DEVICE: &str = "kube-ipvs0";
/// Where it serves metrics, on loopback, and its health, by default.
pub const METRICS_PORT: u16 = 10249;
/// See [`METRICS_PORT`].
pub const HEALTH_PORT: u16 = 10256;
/// The tables of iptables that it uses.
const IPTABLES: [&str; 3] = ["filter", "nat", "mangle"];
/// Its chains, of all versions; those from `KUBE-NODE-PORT` on are of IPVS mode.
const CHAINS: [&str; 16] = [
    "KUBE-SERVICES",
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-NODEPORTS",
    "KUBE-POSTROUTING",
    "KUBE-MARK-MASQ",
    "KUBE-FORWARD",
    "KUBE-PROXY-FIREWALL",
    "KUBE-PROXY-CANARY",
    "KUBE-PORTALS-CONTAINER",
    "KUBE-PORTALS-HOST",
    "KUBE-NODE-PORT",
    "KUBE-LOAD-BALANCER",
    "KUBE-FIRE-WALL",
    "KUBE-SOURCE-RANGES-FIREWALL",
    "KUBE-IPVS-FILTER",
    "KUBE-IPVS-OUT-FILTER",
];
/// Chains of one service or endpoint: these, and the begin of a hash in base 32.
const PREFIXES: [&str; 6] = ["KUBE-SVC-", "KUBE-SVL-", "KUBE-SEP-", "KUBE-FW-", "KUBE-EXT-", "KUBE-XLB-"];
/// Length of that hash.
const HASH: usize = 16;

/// Its sets of ipset in IPVS mode. Those for IPv6 have `KUBE-6-` in place of `KUBE-`.
const SETS: [&str; 17] = [
    "LOOP-BACK",
    "CLUSTER-IP",
    "EXTERNAL-IP",
    "EXTERNAL-IP-LOCAL",
    "LOAD-BALANCER",
    "LOAD-BALANCER-LOCAL",
    "LOAD-BALANCER-FW",
    "LOAD-BALANCER-SOURCE-IP",
    "LOAD-BALANCER-SOURCE-CIDR",
    "NODE-PORT-TCP",
    "NODE-PORT-LOCAL-TCP",
    "NODE-PORT-UDP",
    "NODE-PORT-LOCAL-UDP",
    "NODE-PORT-SCTP-HASH",
    "NODE-PORT-LOCAL-SCTP-HASH",
    "HEALTH-CHECK-NODE-PORT",
    "IPVS-IPS",
];

/// True if kube-proxy makes sets of this name.
fn is_its_set(name: &str) -> bool {
    let rest = name.strip_prefix("KUBE-6-").or_else(|| name.strip_prefix("KUBE-"));
    rest.is_some_and(|rest| SETS.contains(&rest))
}

/// True if kube-proxy makes chains of this name, and nobody else does.
pub fn is_its_chain(name: &str) -> bool {
    let is_hash = |text: &str| text.len() == HASH && text.bytes().all(|b| matches!(b, b'A'..=b'Z' | b'2'..=b'7'));
    CHAINS.contains(&name) || PREFIXES.iter().any(|prefix| name.strip_prefix(prefix).is_some_and(is_hash))
}

/// What is left of it in this network namespace.
#[derive(Debug, Default)]
pub struct Leftovers {
    /// Its own tables.
    pub tables: Vec<Table>,
    /// Its chains in the tables of iptables-nft.
    pub chains: Vec<Chain>,
    /// Rules in others' chains that lead to its own.
    pub jumps: Vec<Jump>,
    /// Its device.
    pub device: Option<Link>,
    /// Its chains in iptables-legacy, as people write them.
    pub legacy: Vec<String>,
    /// Its sets of ipset. While it has chains in iptables-legacy, which may ask them, they stay.
    pub sets: Vec<String>,
    /// Its virtual servers of IPVS.
    pub virtual_servers: Vec<VirtualServer>,
    /// Virtual servers of which nothing tells that they are its.
    pub other_servers: Vec<VirtualServer>,
}

impl Leftovers {
    /// Looks for it.
    pub fn find() -> Result<Self> {
        let mut this = Self { device: link::by_name(&mut Socket::open()?, DEVICE)?, ..Self::default() };
        this.find_virtual_servers()?;
        if let Some(mut nftables) = Nftables::open()? {
            this.tables = nftables.tables()?.into_iter().filter(|table| table.name == TABLE).collect();
            let in_iptables = |table: &Table| IPTABLES.contains(&table.name.as_str());
            this.chains = nftables.chains()?;
            this.chains.retain(|chain| in_iptables(&chain.table) && is_its_chain(&chain.name));
            if !this.chains.is_empty() {
                this.jumps = nftables.jumps()?;
                this.jumps.retain(|jump| {
                    in_iptables(&jump.chain.table) && is_its_chain(&jump.to) && !is_its_chain(&jump.chain.name)
                });
            }
        }
        for family in Family::ALL {
            let chains = iptables::legacy_chains(family)?.into_iter().filter(|(_, chain)| is_its_chain(chain));
            this.legacy.extend(chains.map(|(table, chain)| format!("{family} {table} {chain}")));
        }
        if this.legacy.is_empty() {
            this.sets = ipset::names()?.into_iter().filter(|name| is_its_set(name)).collect();
            this.sets.sort();
        }
        Ok(this)
    }

    fn find_virtual_servers(&mut self) -> Result<()> {
        self.other_servers = ipvs::virtual_servers()?;
        if let Some(device) = self.device.as_ref().filter(|_| !self.other_servers.is_empty()) {
            let all = address::list(&mut Socket::open()?)?;
            let addresses = |is_on_device: bool| -> BTreeSet<IpAddr> {
                let chosen = all.iter().filter(|it| (it.ifindex == device.index) == is_on_device);
                chosen.map(|it| it.net.addr()).collect()
            };
            self.virtual_servers = ipvs::take_its(&mut self.other_servers, &addresses(true), &addresses(false));
        }
        Ok(())
    }

    /// True if there is nothing that [`Self::remove`] would remove.
    pub fn is_empty(&self) -> bool {
        self.names().is_empty()
    }

    /// All that [`Self::remove`] would remove, as people name it.
    pub fn names(&self) -> Vec<String> {
        let tables = self.tables.iter().map(|table| format!("table {table}"));
        let jumps = self.jumps.iter().map(|jump| format!("rule in {} that leads to {}", jump.chain, jump.to));
        let chains = self.chains.iter().map(|chain| format!("chain {chain}"));
        let device = self.device.iter().map(|link| format!("device {}", link.name));
        let servers = self.virtual_servers.iter().map(ToString::to_string);
        let sets = self.sets.iter().map(|name| format!("set {name} of ipset"));
        tables.chain(jumps).chain(chains).chain(servers).chain(device).chain(sets).collect()
    }

    /// Removes it: what leads to its chains, what is in them, then the chains, so that no packet meets half of it.
    pub fn remove(&self) -> Result<()> {
        if let Some(mut nftables) = Nftables::open()? {
            let mut removals: Vec<_> = self.tables.iter().map(Removal::Table).collect();
            removals.extend(self.jumps.iter().map(Removal::Rule));
            removals.extend(self.chains.iter().map(Removal::Rules));
            removals.extend(self.chains.iter().map(Removal::Chain));
            nftables.remove(&removals)?;
        }
        // The device after them: its addresses tell whose the virtual servers are.
        ipvs::remove(&self.virtual_servers)?;
        if let Some(device) = &self.device {
            link::delete(&mut Socket::open()?, device.index)?;
        }
        // Last: somebody else's rule may ask one of them, which keeps nothing else here.
        ipset::remove(&self.sets)
    }
}

#[cfg(test)]
mod tests {
    use super::{Leftovers, is_its_chain, is_its_set};
    use crate::leftovers::ipset;
    use nix::sched::{CloneFlags, unshare};

    #[test]
    fn its_sets_go_and_others_stay() {
        let test = || {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace: run the tests as root");
            for name in ["KUBE-CLUSTER-IP", "KUBE-6-LOOP-BACK", "KUBE-CLUSTER-IP-MINE"] {
                ipset::create(name).unwrap();
            }
            let found = Leftovers::find().unwrap();
            assert_eq!(found.names(), ["set KUBE-6-LOOP-BACK of ipset", "set KUBE-CLUSTER-IP of ipset"]);
            found.remove().unwrap();
            assert!(Leftovers::find().unwrap().is_empty());
            assert_eq!(ipset::names().unwrap(), ["KUBE-CLUSTER-IP-MINE"]);
        };
        std::thread::spawn(test).join().unwrap();
    }

    #[test]
    fn its_sets_are_distinguished_from_all_others() {
        for name in ["KUBE-CLUSTER-IP", "KUBE-6-CLUSTER-IP", "KUBE-IPVS-IPS", "KUBE-6-NODE-PORT-LOCAL-SCTP-HASH"] {
            assert!(is_its_set(name), "{name}");
        }
        // kube-router's, and people's.
        for name in ["KUBE-DST-ABCDEF", "KUBE-6-", "KUBE-CLUSTER-IP-MINE", "CLUSTER-IP", "kube-router-pod-subnets"] {
            assert!(!is_its_set(name), "{name}");
        }
    }

    #[test]
    fn its_chains_are_distinguished_from_all_others() {
        for name in ["KUBE-SERVICES", "KUBE-SVC-NPX46M4PTMTKRN6Y", "KUBE-SEP-AAAAAAAAAAAAAA27", "KUBE-PROXY-CANARY"] {
            assert!(is_its_chain(name), "{name}");
        }
        let others = [
            // The kubelet's.
            "KUBE-FIREWALL",
            "KUBE-MARK-DROP",
            "KUBE-IPTABLES-HINT",
            "KUBE-KUBELET-CANARY",
            // kube-router's.
            "KUBE-ROUTER-INPUT",
            "KUBE-POD-FW-AAAAAAAAAAAAAAAA",
            "KUBE-NWPLCY-DEFAULT",
            // People's.
            "KUBE-SERVICES-EXTRA",
            "KUBE-SVC-mine",
            "KUBE-SVC-",
            "KUBE-SVC-NPX46M4PTMTKRN6YX",
            "DOCKER",
            "INPUT",
        ];
        for name in others {
            assert!(!is_its_chain(name), "{name}");
        }
    }
}
