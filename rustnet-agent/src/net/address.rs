//! Addresses of interfaces, and how addresses stand in netlink messages.

use std::net::IpAddr;

use anyhow::{Context, Result};
use ipnet::IpNet;

use super::netlink::{Message, Socket, attributes, number};

/// `IFA_ADDRESS`, `IFA_LOCAL`.
const ADDRESS: u16 = 1;
const LOCAL: u16 = 2;

/// An address on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The interface.
    pub ifindex: u32,
    /// The address with the length of its on-link prefix.
    pub net: IpNet,
    /// `RT_SCOPE_*`: 0 is global.
    pub scope: u8,
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
    Some(Address { ifindex: number(&head[4..])?, net: IpNet::new(ip, head[1]).ok()?, scope: head[3] })
}
