//! The node's devices, routes and neighbours, and the addresses that all tests share.

use std::net::IpAddr;

pub const UPLINK: u32 = 10;
pub const OVERLAY: u32 = 11;
/// A device with an address of its own, and no uplink: a bridge of machines.
pub const SIDE: u32 = 12;
pub const POD_A: u32 = 21;
pub const POD_B: u32 = 22;
/// Network identifier of the overlay.
pub const VNI: u32 = 1;
/// Largest packet that fits into the overlay.
pub const OVERLAY_MTU: usize = 1450;
/// MTU of pod B's interface.
pub const POD_B_MTU: usize = 1420;
/// MTU of the route to [`Net::narrow`].
pub const NARROW_MTU: usize = 1400;
/// Ticks per second in the programs' configuration. So many that no test lasts a second: `seen`
/// moves only where a test moves it. And so few that a day of them is less than half of what 32
/// bits count.
pub const HZ: u32 = 20_000;
/// Of the flow hash.
pub const SEED: u32 = 7;
pub const SNAT: std::ops::RangeInclusive<u16> = 20_000..=59_999;

pub const MAC_A: [u8; 6] = [2, 0, 0, 0, 0x0a, 1];
pub const MAC_B: [u8; 6] = [2, 0, 0, 0, 0x0b, 1];
/// The host's end of each pod's veth, as pods see it.
pub const MAC_HOST: [u8; 6] = [2, 0, 0, 0, 0xff, 1];
/// Whoever is out there.
pub const MAC_OUT: [u8; 6] = [2, 0, 0, 0, 0xee, 1];

pub(super) const LINKS: &str = "\
    link add eth0 index 10 type veth peer name peer0
    link add rn_vxlan index 11 type veth peer name peer1
    link add virbr0 index 12 type veth peer name peer2
    link add rnva index 21 type veth peer name peera
    link add rnvb index 22 mtu 1420 type veth peer name peerb
    link set eth0 up
    link set peer0 up
    link set rn_vxlan up
    link set peer1 up
    link set virbr0 up
    link set peer2 up
    link set rnva up
    link set peera up
    link set rnvb up
    link set peerb up
    addr add 172.18.0.11/24 dev eth0
    addr add fd00:18::11/64 dev eth0 nodad
    addr add 192.168.122.1/24 dev virbr0
    addr add fd00:7::1/64 dev virbr0 nodad
    route add default via 172.18.0.1 dev eth0
    route add default via fd00:18::1 dev eth0
    route add 10.244.3.0/24 via 172.18.0.13 dev eth0
    route add fd00:244:0:3::/64 via fd00:18::13 dev eth0
    route add 10.244.4.0/24 via 172.18.0.13 dev eth0 mtu lock 1400
    route add fd00:244:0:4::/64 via fd00:18::13 dev eth0 mtu lock 1400
    route add unreachable 203.0.113.0/24
    route add unreachable 2001:db8:dead::/48";

/// Addresses from text.
pub fn parse_addresses(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|text| text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))).collect()
}

/// An IP family, and the addresses that all tests share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Net {
    V4,
    V6,
}

/// Both.
pub const BOTH: [Net; 2] = [Net::V4, Net::V6];

impl Net {
    pub fn ip(self, v4: [u8; 4], v6: &str) -> IpAddr {
        match self {
            Self::V4 => IpAddr::from(v4),
            Self::V6 => parse_addresses(&[v6])[0],
        }
    }
    /// Pod A of this node.
    pub fn a(self) -> IpAddr {
        self.ip([10, 244, 1, 10], "fd00:244:0:1::10")
    }
    /// Pod B of this node.
    pub fn b(self) -> IpAddr {
        self.ip([10, 244, 1, 11], "fd00:244:0:1::11")
    }
    /// An address of this node's range that no pod has.
    pub fn nobody(self) -> IpAddr {
        self.ip([10, 244, 1, 99], "fd00:244:0:1::99")
    }
    /// A pod of node 2, behind the overlay.
    pub fn far(self) -> IpAddr {
        self.ip([10, 244, 2, 20], "fd00:244:0:2::20")
    }
    /// A pod of node 3, reached by the kernel's routes.
    pub fn routed(self) -> IpAddr {
        self.ip([10, 244, 3, 30], "fd00:244:0:3::30")
    }
    /// The same, over a narrow link.
    pub fn narrow(self) -> IpAddr {
        self.ip([10, 244, 4, 40], "fd00:244:0:4::40")
    }
    /// This node.
    pub fn node(self) -> IpAddr {
        self.ip([172, 18, 0, 11], "fd00:18::11")
    }
    /// This host's address on the bridge of machines.
    pub fn side(self) -> IpAddr {
        self.ip([192, 168, 122, 1], "fd00:7::1")
    }
    /// A machine on that bridge.
    pub fn machine(self) -> IpAddr {
        self.ip([192, 168, 122, 10], "fd00:7::10")
    }
    /// Node 2.
    pub fn node2(self) -> IpAddr {
        self.ip([172, 18, 0, 12], "fd00:18::12")
    }
    /// A router of the world.
    pub fn router(self) -> IpAddr {
        self.ip([198, 51, 100, 1], "2001:db8:99::1")
    }
    /// A host of the world.
    pub fn world(self) -> IpAddr {
        self.ip([192, 0, 2, 10], "2001:db8:2::10")
    }
    /// An address to which the kernel knows that there is no way.
    pub fn unreachable(self) -> IpAddr {
        self.ip([203, 0, 113, 5], "2001:db8:dead::5")
    }
    /// A virtual address.
    pub fn vip(self, n: u8) -> IpAddr {
        self.ip([10, 96, 0, n], &format!("fd00:96::{n:x}"))
    }
    /// An address of the family from sixteen bytes.
    pub(super) fn of(addr: IpAddr) -> Self {
        if addr.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}
