//! Nexthop objects (`ip nexthop`): the ways out of this host that routes may share.
//!
//! With net.ipv4.nexthop_compat_mode off, as some routing daemons ask for, a route names its object and nothing else.
//! netlink-packet-route 0.34 has no messages about them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use netlink_packet_core::{NetlinkSerializable, parse_ip, parse_u32};

use super::netlink::{Error, Socket, attributes};

/// `RTM_GETNEXTHOP` (uapi/linux/rtnetlink.h).
const GET: u16 = 106;
/// `struct nhmsg` (uapi/linux/nexthop.h).
const HEADER: usize = 8;
/// `struct nexthop_grp`: an id, a weight, reserved octets.
const MEMBER: usize = 8;

/// `NHA_*`.
mod attr {
    pub(super) const ID: u16 = 1;
    pub(super) const GROUP: u16 = 2;
    pub(super) const OIF: u16 = 5;
    pub(super) const GATEWAY: u16 = 6;
}

/// A way out of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Hop {
    /// The interface.
    pub oif: u32,
    /// The next router; `None`: the destination is on the link.
    pub gateway: Option<IpAddr>,
}

/// An object as the kernel describes it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Object {
    id: u32,
    hop: Option<Hop>,
    members: Vec<u32>,
}

/// The request for all objects.
struct All;

impl NetlinkSerializable for All {
    fn message_type(&self) -> u16 {
        GET
    }

    fn buffer_len(&self) -> usize {
        HEADER
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.fill(0);
    }
}

/// The ways out of each object, by its id: one, or those of a group's members. A blackhole has none.
pub fn list(socket: &mut Socket) -> Result<BTreeMap<u32, Vec<Hop>>, Error> {
    Ok(resolve(&socket.dump(&All, parse)?))
}

fn resolve(objects: &[Object]) -> BTreeMap<u32, Vec<Hop>> {
    let hops: BTreeMap<u32, Hop> = objects.iter().filter_map(|object| Some((object.id, object.hop?))).collect();
    let of =
        |object: &Object| object.members.iter().filter_map(|id| hops.get(id)).chain(&object.hop).copied().collect();
    objects.iter().map(|object| (object.id, of(object))).collect()
}

fn parse(body: &[u8]) -> Option<Object> {
    let (mut object, mut oif, mut gateway) = (Object::default(), None, None);
    for attribute in attributes(body.get(HEADER..)?) {
        let value = attribute.value();
        match attribute.kind() {
            attr::ID => object.id = parse_u32(value).ok()?,
            attr::OIF => oif = parse_u32(value).ok(),
            attr::GATEWAY => gateway = parse_ip(value).ok(),
            attr::GROUP => {
                object.members = value.chunks_exact(MEMBER).filter_map(|member| parse_u32(&member[..4]).ok()).collect();
            }
            _ => {}
        }
    }
    object.hop = oif.map(|oif| Hop { oif, gateway });
    Some(object)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_has_the_ways_of_its_members() {
        let hop = |oif| Hop { oif, gateway: Some([192, 0, 2, oif as u8].into()) };
        let single = |id, oif| Object { id, hop: Some(hop(oif)), members: Vec::new() };
        let group = Object { id: 9, hop: None, members: vec![2, 3, 7] };
        let blackhole = Object { id: 7, ..Object::default() };
        let found = resolve(&[single(2, 20), blackhole, group, single(3, 30)]);
        let expected = [(2, vec![hop(20)]), (3, vec![hop(30)]), (7, vec![]), (9, vec![hop(20), hop(30)])];
        assert_eq!(found, BTreeMap::from(expected));
    }
}
