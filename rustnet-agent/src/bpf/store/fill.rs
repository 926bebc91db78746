//! How full the maps are.

use std::path::Path;

use anyhow::Result;
use bytemuck::Pod;
use rustnet_common::addr::{Addr, Ip4, Ip6};
use rustnet_common::affinity::{Affinity, AffinityKey};
use rustnet_common::conntrack::CtEntry;
use rustnet_common::endpoint::{Endpoint, EndpointKey};
use rustnet_common::frag::{FragKey, FragPorts};
use rustnet_common::host_port::{HostPort, HostPortKey};
use rustnet_common::names::map;
use rustnet_common::peer::{Peer, PeerKey};
use rustnet_common::policy::{PolicyCidrKey, PolicyPod, PolicyRule, PolicyRuleKey};
use rustnet_common::service::{SvcEntry, SvcKey};
use rustnet_common::socket::{Asked, SocketKey};
use rustnet_common::source_range::SourceRangeKey;
use rustnet_common::tuple::Tuple;

use super::Map;
use super::backends::Backends;
use super::maglev::Tables;
use super::memory::Access;

/// One map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    /// Its name.
    pub name: &'static str,
    /// Entries in use.
    pub used: u64,
    /// Entries there is room for.
    pub max: u64,
}

/// Counts the entries of all maps that fill up.
pub fn read(bpffs: &Path) -> Result<Vec<Fill>> {
    let [ids, slots] = backends(bpffs)?;
    Ok(vec![
        count::<SvcKey<Ip4>, SvcEntry>(bpffs, map::SVC4)?,
        count::<SvcKey<Ip6>, SvcEntry>(bpffs, map::SVC6)?,
        ids,
        slots,
        tables(bpffs)?,
        count::<Tuple<Ip4>, CtEntry<Ip4>>(bpffs, map::CT4_TCP)?,
        count::<Tuple<Ip4>, CtEntry<Ip4>>(bpffs, map::CT4_ANY)?,
        count::<Tuple<Ip6>, CtEntry<Ip6>>(bpffs, map::CT6_TCP)?,
        count::<Tuple<Ip6>, CtEntry<Ip6>>(bpffs, map::CT6_ANY)?,
        count::<FragKey<Ip4>, FragPorts>(bpffs, map::FRAG4)?,
        count::<FragKey<Ip6>, FragPorts>(bpffs, map::FRAG6)?,
        count::<AffinityKey, Affinity>(bpffs, map::AFFINITY)?,
        count::<SocketKey, Asked>(bpffs, map::SOCK_REV)?,
        count::<SocketKey, u32>(bpffs, map::SOCK_FWD)?,
        count::<SourceRangeKey, u32>(bpffs, map::SOURCE_RANGES)?,
        count::<Addr, PolicyPod>(bpffs, map::POLICY_PODS)?,
        count::<PolicyCidrKey, u32>(bpffs, map::POLICY_CIDRS)?,
        count::<PolicyRuleKey, PolicyRule>(bpffs, map::POLICY_RULES)?,
        count::<EndpointKey, Endpoint>(bpffs, map::ENDPOINTS)?,
        count::<HostPortKey, HostPort>(bpffs, map::HOST_PORTS)?,
        count::<PeerKey<Ip4>, Peer>(bpffs, map::PEERS4)?,
        count::<PeerKey<Ip6>, Peer>(bpffs, map::PEERS6)?,
    ])
}

fn count<K: Pod, V: Pod>(bpffs: &Path, name: &'static str) -> Result<Fill> {
    let map = Map::<K, V>::open(bpffs, name)?;
    Ok(Fill { name, used: map.len()? as u64, max: u64::from(map.max_entries()) })
}

/// Words up to the last that was ever written, for the same reason as below.
fn tables(bpffs: &Path) -> Result<Fill> {
    let tables = Tables::open(bpffs, Access::Read)?;
    Ok(Fill { name: map::MAGLEV, used: u64::from(tables.used()), max: u64::from(tables.capacity()) })
}

/// Ids up to the last that was ever written, since what is behind is free for sure; and slots that
/// hold a backend.
fn backends(bpffs: &Path) -> Result<[Fill; 2]> {
    let arrays = Backends::open(bpffs, Access::Read)?;
    let (ids, slots) = arrays.used();
    let fill = |name, used: u32| Fill { name, used: u64::from(used), max: u64::from(arrays.capacity()) };
    Ok([fill(map::BACKEND_IDS, ids), fill(map::BACKENDS, slots)])
}
