//! The host's network as far as decisions depend on it: devices, their addresses, default routes. Pure data, an input like the
//! cluster's objects: [`crate::net`] observes it, [`crate::ways`] decides by it.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::model::Family;

/// What packets that leave by a device look like, and whether a hook of ours can be there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceKind {
    /// With Ethernet headers: a NIC, a bond, a bridge, a VLAN device.
    #[default]
    Ethernet,
    /// Without them: WireGuard, TUN, PPP. The programs read Ethernet headers.
    LayerThree,
    /// None leave by it, but its addresses are the host's: loopback, dummy devices.
    Local,
    /// Part of a bond or a bridge, whose packets they are.
    Member,
    /// Ours: the overlay device and the pods' veths.
    Internal,
}

/// An address of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceAddress {
    /// The address with the length of its on-link prefix.
    pub net: IpNet,
    /// Of global scope, and no duplicate: the kernel sends from it.
    pub is_usable: bool,
    /// Usable, and for new connections: neither deprecated nor temporary (RFC 4862, 8981).
    pub is_preferred: bool,
}

/// A device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Device {
    /// Interface index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// MTU in octets.
    pub mtu: u32,
    /// What its packets look like.
    pub kind: DeviceKind,
    /// Its addresses, in the kernel's order: the primary one first.
    pub addresses: Vec<DeviceAddress>,
    /// Further prefixes on the link, which routes tell: DHCPv6 gives addresses alone.
    pub on_link: Vec<IpNet>,
}

/// A default route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DefaultRoute {
    /// Family.
    pub family: Family,
    /// Metric: the smallest one is used.
    pub metric: u32,
    /// Index of the device of a next hop.
    pub device: u32,
}

/// The host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostFacts {
    /// All devices.
    pub devices: Vec<Device>,
    /// All default routes, one entry for each next hop; sorted.
    pub defaults: Vec<DefaultRoute>,
}

/// The device on which kube-proxy's IPVS mode keeps the addresses of Services.
const IPVS_DEVICE: &str = "kube-ipvs0";

impl Device {
    /// Usable addresses with their on-link prefixes.
    pub fn networks(&self) -> Vec<IpNet> {
        self.addresses.iter().filter(|it| it.is_usable).map(|it| it.net).collect()
    }

    /// Prefixes whose addresses are reached without a router.
    pub fn link_prefixes(&self) -> Vec<IpNet> {
        self.networks().into_iter().chain(self.on_link.iter().copied()).collect()
    }

    /// True if it has this address, and can send from it.
    pub fn has(&self, ip: IpAddr) -> bool {
        self.addresses.iter().any(|it| it.is_usable && it.net.addr() == ip)
    }

    /// Address of a family that packets get which leave by it: its primary one, unless that is not for new connections.
    pub fn source(&self, family: Family) -> Option<IpAddr> {
        let of_family = || self.addresses.iter().filter(|it| Family::of(it.net.addr()) == family);
        of_family().find(|it| it.is_preferred).or_else(|| of_family().find(|it| it.is_usable)).map(|it| it.net.addr())
    }
}

impl HostFacts {
    /// The device of this index.
    pub fn device(&self, index: u32) -> Option<&Device> {
        self.devices.iter().find(|it| it.index == index)
    }

    /// The devices that have this address, and can send from it.
    pub fn devices_with(&self, ip: IpAddr) -> impl Iterator<Item = &Device> {
        self.devices.iter().filter(move |it| it.has(ip))
    }

    /// True if a device has this address, and can send from it.
    pub fn has(&self, ip: IpAddr) -> bool {
        self.devices_with(ip).next().is_some()
    }

    /// Every address of the host, loopback and IPv6 link-local ones left out; sorted. Those on pods' veths count: a delegated
    /// IPAM has its gateway there, and a packet to it is for this host's stack. Those that IPVS keeps are Services'.
    pub fn own_addresses(&self) -> Vec<IpAddr> {
        let devices = self.devices.iter().filter(|it| it.name != IPVS_DEVICE);
        let all = devices.flat_map(|it| &it.addresses).map(|it| it.net.addr());
        let mut own: Vec<_> = all.filter(|ip| is_own(*ip)).collect();
        own.sort_unstable();
        own.dedup();
        own
    }
}

fn is_own(ip: IpAddr) -> bool {
    let is_link_local = matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
    !ip.is_loopback() && !is_link_local
}

#[cfg(test)]
pub mod build {
    //! Hosts for tests.

    use super::{DefaultRoute, Device, DeviceAddress, DeviceKind, HostFacts};
    use crate::model::Family;

    /// A device with these addresses, all preferred.
    pub fn device(index: u32, name: &str, nets: &[&str]) -> Device {
        let address = |net: &&str| DeviceAddress { net: net.parse().unwrap(), is_usable: true, is_preferred: true };
        Device {
            index,
            name: name.into(),
            mtu: 1500,
            kind: DeviceKind::Ethernet,
            addresses: nets.iter().map(address).collect(),
            on_link: Vec::new(),
        }
    }

    /// A host whose default routes of both families lead through the first device.
    pub fn host(devices: impl IntoIterator<Item = Device>) -> HostFacts {
        let devices: Vec<_> = devices.into_iter().collect();
        let defaults = [Family::V4, Family::V6].map(|family| default(family, 0, devices[0].index)).into();
        HostFacts { devices, defaults }
    }

    /// A default route.
    pub fn default(family: Family, metric: u32, device: u32) -> DefaultRoute {
        DefaultRoute { family, metric, device }
    }
}

#[cfg(test)]
mod tests {
    use super::build::{device, host};
    use super::{DeviceAddress, Family};

    #[test]
    fn addresses_of_all_devices_are_own_once_each() {
        let it = host([
            device(2, "eth0", &["192.0.2.9/24", "2001:db8::9/64", "fe80::9/64"]),
            device(1, "lo", &["127.0.0.1/8", "10.9.9.9/32", "::1/128"]),
            device(4, "rnvab", &["198.51.100.1/32"]),
            device(5, "rnvac", &["198.51.100.1/32", "2001:db8:7::1/128"]),
            device(6, "kube-ipvs0", &["10.96.0.10/32"]),
        ]);
        let own: Vec<_> = it.own_addresses().iter().map(ToString::to_string).collect();
        assert_eq!(own, ["10.9.9.9", "192.0.2.9", "198.51.100.1", "2001:db8::9", "2001:db8:7::1"]);
    }

    #[test]
    fn a_source_is_preferred_or_at_least_usable() {
        let mut it = device(2, "eth0", &["2001:db8::1/64", "2001:db8::2/64", "2001:db8::3/64"]);
        it.addresses[0].is_preferred = false;
        assert_eq!(it.source(Family::V6), Some("2001:db8::2".parse().unwrap()));
        it.addresses[1] = DeviceAddress { is_usable: false, is_preferred: false, ..it.addresses[1] };
        it.addresses[2].is_preferred = false;
        assert_eq!(it.source(Family::V6), Some("2001:db8::1".parse().unwrap()));
        assert_eq!(it.source(Family::V4), None);
    }
}
