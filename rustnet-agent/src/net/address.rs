//! Addresses of interfaces.

use anyhow::{Context, Result};
use ipnet::IpNet;
use netlink_packet_core::{Emitable, Parseable};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressHeader, AddressMessage};

use super::netlink::{Socket, attributes};

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

/// All addresses of this network namespace.
pub fn list(socket: &mut Socket) -> Result<Vec<Address>> {
    let all = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    socket.dump(&all, parse).context("listing addresses")
}

fn parse(body: &[u8]) -> Option<Address> {
    let header = AddressHeader::parse(body).ok()?;
    let (mut address, mut local, mut flags) = (None, None, u32::from(header.flags.bits()));
    for attribute in attributes(&body[header.buffer_len()..]) {
        match AddressAttribute::parse(&attribute) {
            Ok(AddressAttribute::Address(ip)) => address = Some(ip),
            Ok(AddressAttribute::Local(ip)) => local = Some(ip),
            // The header has room for eight flags; the attribute has all.
            Ok(AddressAttribute::Flags(all)) => flags = all.bits(),
            _ => {}
        }
    }
    // On point-to-point interfaces the other end is `address` and ours is `local`; the prefix is that of the other end's network.
    let own = local.or(address)?;
    let net = if address.is_none_or(|far| far == own) { IpNet::new(own, header.prefix_len).ok()? } else { own.into() };
    Some(Address { ifindex: header.index, net, scope: header.scope.into(), flags })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `ip addr add 10.0.0.1 peer 192.168.9.2/24 dev eth1`: the network on the link is the other end's.
    #[test]
    fn an_address_with_another_one_at_the_far_end_is_on_no_network() {
        let of = |local: &str, far: &str, prefix_len| {
            let mut message = AddressMessage::default();
            message.header = AddressHeader { prefix_len, index: 3, ..message.header };
            message.attributes =
                vec![AddressAttribute::Address(far.parse().unwrap()), AddressAttribute::Local(local.parse().unwrap())];
            let mut bytes = vec![0; message.buffer_len()];
            message.emit(&mut bytes);
            parse(&bytes).unwrap().net.to_string()
        };
        assert_eq!(of("10.0.0.1", "192.168.9.2", 24), "10.0.0.1/32");
        assert_eq!(of("2001:db8::1", "2001:db8:9::2", 64), "2001:db8::1/128");
        assert_eq!(of("10.0.0.1", "10.0.0.1", 24), "10.0.0.1/24");
    }

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
