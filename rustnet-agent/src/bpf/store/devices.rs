//! `rn_devices`: the addresses that masqueraded packets get, by the device that they leave by.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;

use anyhow::Result;
use rustnet_common::addr::{Address, Ip4, Ip6};
use rustnet_common::device::Device;
use rustnet_common::names::map;

use super::Map;
use crate::model::Family;
use crate::ways::Sources;

/// The devices.
pub struct Devices {
    map: Map<u32, Device>,
}

impl Devices {
    /// Opens the pin in `bpffs`.
    pub fn open(bpffs: &Path) -> Result<Self> {
        Ok(Self { map: Map::open(bpffs, map::DEVICES)? })
    }

    /// Brings the map to `wanted`; only adds devices to it unless `is_complete`. Returns the addresses that no device has any
    /// more.
    pub fn write(&self, wanted: &BTreeMap<u32, Sources>, is_complete: bool) -> Result<BTreeSet<IpAddr>> {
        let before: BTreeMap<u32, Device> = self.map.entries()?.into_iter().collect();
        let wanted: BTreeMap<u32, Device> = wanted.iter().map(|(index, it)| (*index, device(it))).collect();
        if !is_complete {
            for (index, device) in wanted.iter().filter(|(index, _)| !before.contains_key(index)) {
                self.map.put(index, device)?;
            }
            return Ok(BTreeSet::new());
        }
        for index in before.keys().filter(|index| !wanted.contains_key(index)) {
            self.map.delete(index)?;
        }
        for (index, device) in wanted.iter().filter(|(index, device)| before.get(index) != Some(device)) {
            self.map.put(index, device)?;
        }
        let now: BTreeSet<IpAddr> = wanted.values().flat_map(addresses).collect();
        Ok(before.values().flat_map(addresses).filter(|ip| !now.contains(ip)).collect())
    }
}

fn device(sources: &Sources) -> Device {
    let address = |family| sources.of(family).map(rustnet_common::addr::Addr::from);
    Device {
        ip4: address(Family::V4).map_or(Ip4::UNSPECIFIED, Ip4::from_addr),
        ip6: address(Family::V6).map_or(Ip6::UNSPECIFIED, Ip6::from_addr),
    }
}

fn addresses(device: &Device) -> Vec<IpAddr> {
    let all = [IpAddr::from(device.ip4.to_addr()), IpAddr::from(device.ip6)];
    all.into_iter().filter(|ip| !ip.is_unspecified()).collect()
}
