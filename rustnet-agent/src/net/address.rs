//! Addresses of interfaces, and how addresses stand in netlink messages.

use std::net::IpAddr;

use anyhow::{Context, Result};
use ipnet::IpNet;

use super::netlink::{Message, Socket, attributes, number};

/// `IFA_ADDRESS`, `IFA_LOCAL`, `IFA_FLAGS`.
const ADDRESS: u16 = 1;
const LOCAL: u16 = 2;
const FLAGS: u16 = 8;

/// An address on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The interface.
    pub ifindex: u32,
    /// The address with the length of its on-link prefix.
    pub net: IpNet,
    /// `RT_SCOPE_*`: 0 is global.
    pub scope: u8,
    /// `IFA_F_*`.
    pub flags: u32,
}

impl Address {
    /// True if packets may have this address as their source for as long as the host runs, whatever its scope.
    pub fn is_usable(&self) -> bool {
        // Tentative: another host may have it, so nobody may use it yet. After a failed check, another host has it.
        // Deprecated: the network withdraws it, and new connections must not begin with it (RFC 4862, 5.5.4).
        let withdrawn = libc::IFA_F_TENTATIVE | libc::IFA_F_DADFAILED | libc::IFA_F_DEPRECATED;
        self.flags & withdrawn == 0 && !self.is_temporary()
    }

    /// True for a privacy address (RFC 8981): the kernel replaces it after a day. IPv4 has none; there the same bit marks
    /// the second address of a network, which lasts (`IFA_F_SECONDARY`).
    pub fn is_temporary(&self) -> bool {
        self.net.addr().is_ipv6() && self.flags & libc::IFA_F_TEMPORARY != 0
    }
}

/// `AF_INET` or `AF_INET6`.
pub fn family(ip: IpAddr) -> u8 {
    match ip {
        IpAddr::V4(_) => libc::AF_INET as u8,
        IpAddr::V6(_) => libc::AF_INET6 as u8,
    }
}

/// The octets of an address.
pub fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// An address from its octets.
pub fn from_octets(value: &[u8]) -> Option<IpAddr> {
    match value.len() {
        4 => <[u8; 4]>::try_from(value).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(value).ok().map(IpAddr::from),
        _ => None,
    }
}

/// All addresses of this network namespace.
pub fn list(socket: &mut Socket) -> Result<Vec<Address>> {
    let replies = socket.dump(Message::new(libc::RTM_GETADDR, 0, &[0; 8])).context("listing addresses")?;
    Ok(replies.iter().filter_map(|reply| parse(&reply.body)).collect())
}

/// `struct ifaddrmsg` and attributes.
fn parse(body: &[u8]) -> Option<Address> {
    let (head, rest) = body.split_at_checked(8)?;
    let find = |wanted| attributes(rest).find(|(kind, _)| *kind == wanted).and_then(|(_, v)| from_octets(v));
    // On point-to-point interfaces the other end is ADDRESS and ours is LOCAL.
    let ip = find(LOCAL).or_else(|| find(ADDRESS))?;
    // The header has room for eight flags; the attribute has all.
    let flags = attributes(rest).find(|(kind, _)| *kind == FLAGS).and_then(|(_, v)| number(v));
    Some(Address {
        ifindex: number(&head[4..])?,
        net: IpNet::new(ip, head[1]).ok()?,
        scope: head[3],
        flags: flags.unwrap_or(head[2].into()),
    })
}

#[cfg(test)]
mod tests {
    use super::Address;

    #[test]
    fn only_lasting_addresses_are_usable() {
        let usable = |net: &str, flags| Address { ifindex: 2, net: net.parse().unwrap(), scope: 0, flags }.is_usable();
        for (flags, expected) in [
            (0, true),
            (libc::IFA_F_PERMANENT, true),
            (libc::IFA_F_PERMANENT | libc::IFA_F_TENTATIVE, false),
            (libc::IFA_F_TENTATIVE | libc::IFA_F_DADFAILED, false),
            (libc::IFA_F_DADFAILED, false),
            (libc::IFA_F_DEPRECATED, false),
        ] {
            assert_eq!(usable("2001:db8::1/64", flags), expected, "{flags:#x}");
            assert_eq!(usable("192.0.2.1/24", flags), expected, "{flags:#x}");
        }
        assert!(!usable("2001:db8::1/64", libc::IFA_F_TEMPORARY));
        assert!(usable("192.0.2.1/24", libc::IFA_F_SECONDARY));
    }
}
