//! Permanent neighbours: the pods' addresses on their veths, which nobody could resolve otherwise.

use std::net::IpAddr;

use anyhow::{Context, Result};
use netlink_packet_core::{Emitable, ParseableParametrized};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourHeader, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::netlink::{CHANGE, REPLACE, Socket, attributes, unless};

/// A neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Neighbour {
    /// The interface.
    pub ifindex: u32,
    /// Its address.
    pub ip: IpAddr,
    /// Its MAC.
    pub mac: [u8; 6],
}

/// All permanent neighbours, both families.
pub fn list(socket: &mut Socket) -> Result<Vec<Neighbour>> {
    list_in(socket, |state| state == NeighbourState::Permanent)
}

/// All neighbours whose MAC the kernel has learnt, both families.
pub fn learnt(socket: &mut Socket) -> Result<Vec<Neighbour>> {
    use NeighbourState::{Delay, Probe, Reachable, Stale};
    list_in(socket, |state| matches!(state, Reachable | Stale | Delay | Probe))
}

fn list_in(socket: &mut Socket, is_wanted: fn(NeighbourState) -> bool) -> Result<Vec<Neighbour>> {
    let all = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
    socket.dump(&all, |body| parse(body, is_wanted)).context("listing neighbours")
}

fn parse(body: &[u8], is_wanted: fn(NeighbourState) -> bool) -> Option<Neighbour> {
    let header = NeighbourHeader::parse(body).ok().filter(|header| is_wanted(header.state))?;
    let (mut ip, mut mac) = (None, None);
    for attribute in attributes(&body[header.buffer_len()..]) {
        match NeighbourAttribute::parse_with_param(&attribute, header.family) {
            Ok(NeighbourAttribute::Destination(NeighbourAddress::Inet(v4))) => ip = Some(IpAddr::V4(v4)),
            Ok(NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6))) => ip = Some(IpAddr::V6(v6)),
            Ok(NeighbourAttribute::LinkLayerAddress(address)) => mac = address.try_into().ok(),
            _ => {}
        }
    }
    Some(Neighbour { ifindex: header.ifindex, ip: ip?, mac: mac? })
}

/// Adds a permanent neighbour, in place of any other of the same address.
pub fn put(socket: &mut Socket, neighbour: &Neighbour) -> Result<()> {
    let Neighbour { ifindex, ip, .. } = *neighbour;
    socket
        .request(&RouteNetlinkMessage::NewNeighbour(message(neighbour)), REPLACE)
        .with_context(|| format!("adding the neighbour {ip} on interface {ifindex}"))
}

/// Deletes a neighbour; false when it was gone.
pub fn delete(socket: &mut Socket, neighbour: &Neighbour) -> Result<bool> {
    unless(
        socket.request(&RouteNetlinkMessage::DelNeighbour(message(neighbour)), CHANGE),
        &[libc::ENOENT, libc::ENXIO, libc::ENODEV],
    )
    .with_context(|| format!("deleting the neighbour {}", neighbour.ip))
}

fn message(neighbour: &Neighbour) -> NeighbourMessage {
    let Neighbour { ifindex, ip, mac } = *neighbour;
    let mut message = NeighbourMessage::default();
    message.header.family = if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.header.ifindex = ifindex;
    message.header.state = NeighbourState::Permanent;
    message.attributes =
        vec![NeighbourAttribute::Destination(ip.into()), NeighbourAttribute::LinkLayerAddress(mac.to_vec())];
    message
}
