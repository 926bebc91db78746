//! The service addresses of the demo, where the examples leave the choice.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The VIPs of service number `n`, one of each family.
pub fn vips(n: u8) -> [IpAddr; 2] {
    [Ipv4Addr::new(10, 96, 1, n).into(), Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 1, n.into()).into()]
}

/// The load balancer's addresses.
pub fn balancer() -> [IpAddr; 2] {
    [Ipv4Addr::new(203, 0, 113, 10).into(), Ipv6Addr::new(0x2001, 0xdb8, 0x113, 0, 0, 0, 0, 0x10).into()]
}

/// What people call the family of an address.
pub const fn family(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "IPv4" } else { "IPv6" }
}
