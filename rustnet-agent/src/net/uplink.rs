//! The devices towards the other nodes, and this host's addresses.

use std::net::IpAddr;

use anyhow::{Result, bail};
use ipnet::IpNet;

use super::address::{self, Address};
use super::link::{self, Link};
use super::netlink::Socket;
use super::route::{self, Route, Target};

/// A device towards the other nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uplink {
    /// Its name.
    pub name: String,
    /// Its index.
    pub ifindex: u32,
    /// Its MTU.
    pub mtu: u32,
    /// Its addresses of global scope with their on-link prefixes, in the kernel's order: the primary one first.
    pub addresses: Vec<IpNet>,
}

/// The networks that these devices are in: who is there is reached without a router.
pub fn networks(uplinks: &[Uplink]) -> Vec<IpNet> {
    uplinks.iter().flat_map(|uplink| &uplink.addresses).copied().collect()
}

/// What the host looks like.
#[derive(Clone, Debug, Default)]
pub struct Host {
    /// All interfaces.
    pub links: Vec<Link>,
    /// All addresses.
    pub addresses: Vec<Address>,
    /// All routes of the main table.
    pub routes: Vec<Route>,
}

impl Host {
    /// Looks.
    pub fn observe(socket: &mut Socket) -> Result<Self> {
        Ok(Self { links: link::list(socket)?, addresses: address::list(socket)?, routes: route::list(socket)? })
    }

    /// The uplinks of these names, each once; without names, the device of the default route.
    pub fn uplinks(&self, names: &[String]) -> Result<Vec<Uplink>> {
        if names.is_empty() {
            let Some(link) = self.default_device() else {
                bail!("no default route says which device leads to the other nodes: name it with --uplink DEV");
            };
            return Ok(vec![self.uplink(link)]);
        }
        let mut found: Vec<Uplink> = Vec::new();
        for name in names {
            let uplink = self.named(name)?;
            // A device takes a program once.
            if !found.contains(&uplink) {
                found.push(uplink);
            }
        }
        Ok(found)
    }

    fn named(&self, name: &str) -> Result<Uplink> {
        if let Some(link) = self.links.iter().find(|link| link.name == name) {
            return Ok(self.uplink(link));
        }
        let there: Vec<_> = self.links.iter().map(|link| link.name.as_str()).collect();
        bail!("--uplink {name}: there is no such device here; there are: {}", there.join(", "))
    }

    /// The device of the default route, IPv4's first, the smallest metric first.
    fn default_device(&self) -> Option<&Link> {
        let defaults = self.routes.iter().filter(|r| r.dst.prefix_len() == 0);
        let oif = defaults
            .filter_map(|r| match r.target {
                Target::Via { oif, .. } => Some((matches!(r.dst, IpNet::V6(_)), r.metric, oif)),
                _ => None,
            })
            .min()?
            .2;
        self.links.iter().find(|link| link.index == oif)
    }

    fn uplink(&self, link: &Link) -> Uplink {
        let own = self.addresses.iter().filter(|a| a.ifindex == link.index && is_global(a));
        Uplink { name: link.name.clone(), ifindex: link.index, mtu: link.mtu, addresses: own.map(|a| a.net).collect() }
    }

    /// Every address that this host has on any interface, loopback and IPv6 link-local ones left out; sorted. Those on pods'
    /// veths count: a delegated IPAM has its gateway there, and a packet to it is for this host's stack, never for the world.
    pub fn own_addresses(&self) -> Vec<IpAddr> {
        let mut own: Vec<_> = self.addresses.iter().map(|a| a.net.addr()).filter(|ip| is_own(*ip)).collect();
        own.sort_unstable();
        own.dedup();
        own
    }
}

fn is_own(ip: IpAddr) -> bool {
    let link_local = matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
    !ip.is_loopback() && !link_local
}

fn is_global(address: &Address) -> bool {
    address.scope == libc::RT_SCOPE_UNIVERSE && !address.net.addr().is_loopback()
}

#[cfg(test)]
mod tests {
    use super::{Address, Host, Link, Route, Target};
    use ipnet::IpNet;

    fn host() -> Host {
        let link = |index, name: &str| Link { index, name: name.into(), mtu: 1500, ..Link::default() };
        let address = |ifindex, net: &str, scope| Address { ifindex, net: net.parse().unwrap(), scope, flags: 0 };
        let default = |dst: &str, oif, metric| Route {
            dst: dst.parse::<IpNet>().unwrap(),
            target: Target::Via { oif, gateway: None },
            source: None,
            metric,
            protocol: 3,
        };
        Host {
            links: vec![link(1, "lo"), link(2, "eth0"), link(3, "eth1"), link(4, "rnvab"), link(5, "rnvac")],
            addresses: vec![
                address(1, "127.0.0.1/8", 254),
                address(2, "192.0.2.9/24", 0),
                address(2, "2001:db8::9/64", 0),
                address(2, "fe80::9/64", 253),
                address(4, "198.51.100.1/32", 0),
                address(5, "198.51.100.1/32", 0),
                address(5, "2001:db8:7::1/128", 0),
                address(5, "fe80::5/64", 253),
                address(1, "10.9.9.9/32", 254),
                address(1, "::1/128", 254),
            ],
            routes: vec![default("::/0", 3, 0), default("0.0.0.0/0", 3, 200), default("0.0.0.0/0", 2, 100)],
        }
    }

    #[test]
    fn the_default_route_names_the_uplink_by_default() {
        let found = host().uplinks(&[]).unwrap();
        assert_eq!((found[0].name.as_str(), found[0].ifindex), ("eth0", 2));
        assert_eq!(found[0].addresses, ["192.0.2.9/24".parse().unwrap(), "2001:db8::9/64".parse::<IpNet>().unwrap()]);
        assert_eq!(host().uplinks(&["eth1".into()]).unwrap()[0].ifindex, 3);
        let twice = host().uplinks(&["eth1".into(), "eth0".into(), "eth1".into()]).unwrap();
        assert_eq!(twice.iter().map(|it| it.ifindex).collect::<Vec<_>>(), [3, 2]);
    }

    #[test]
    fn without_either_the_error_says_what_to_do() {
        let text = host().uplinks(&["eth7".into()]).unwrap_err().to_string();
        assert!(text.contains("eth7") && text.contains("eth0, eth1"), "{text}");
        let text = Host { routes: vec![], ..host() }.uplinks(&[]).unwrap_err().to_string();
        assert!(text.contains("--uplink"), "{text}");
    }

    #[test]
    fn addresses_of_all_interfaces_are_own_once_each() {
        let own: Vec<_> = host().own_addresses().iter().map(ToString::to_string).collect();
        assert_eq!(own, ["10.9.9.9", "192.0.2.9", "198.51.100.1", "2001:db8::9", "2001:db8:7::1"]);
    }
}
