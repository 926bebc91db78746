//! The overlay device: made, brought into shape, and made again when it is another one than wanted.

use std::ops::RangeInclusive;

use anyhow::Result;
use rustnet_common::config::{FIRST_TUNNEL_PORT, NODE_TUNNEL_PORTS};
use rustnet_common::names::OVERLAY_DEV;

use super::link::{self, Link, Vxlan};
use super::netlink::Socket;
use crate::model::Family;

/// UDP ports that the device sends from, by the hash of what is inside. The kernel changes them on no device that is there.
pub const SOURCE_PORTS: RangeInclusive<u16> = FIRST_TUNNEL_PORT..=FIRST_TUNNEL_PORT + NODE_TUNNEL_PORTS - 1;

/// What the overlay device must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spec {
    /// UDP port.
    pub port: u16,
    /// MTU.
    pub mtu: u32,
    /// MAC: each node needs another one, since the kernel drops tunnel packets that seem to come from itself.
    pub mac: [u8; 6],
}

/// What it took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing.
    None,
    /// It was there with other settings.
    Configured,
    /// It was missing.
    Created,
    /// Another kind of device had the name, or it served another port.
    Replaced,
}

/// Octets that VXLAN adds to a packet: inner Ethernet 14, VXLAN 8, UDP 8, and the outer IP header.
pub const fn overhead(underlay: Family) -> u32 {
    match underlay {
        Family::V4 => 50,
        Family::V6 => 70,
    }
}

/// A MAC that is the same at every start: locally administered, from the node's name (FNV-1a).
pub fn mac_of(node_name: &str) -> [u8; 6] {
    let hash = node_name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    let mut mac = [0x02; 6];
    mac[1..].copy_from_slice(&hash.to_be_bytes()[..5]);
    mac
}

impl Spec {
    fn vxlan(&self) -> Vxlan {
        // Peers on an IPv6 underlay send without UDP checksums (RFC 6936), as over IPv4.
        Vxlan { port: self.port, collect_metadata: true, learning: false, zero_csum6_rx: true }
    }

    fn needs(&self, there: Option<&Link>) -> Change {
        match there {
            None => Change::Created,
            Some(link) if link.vxlan != Some(self.vxlan()) => Change::Replaced,
            Some(link) if link.mtu != self.mtu || link.mac != self.mac || !link::is_configured(link) => {
                Change::Configured
            }
            Some(_) => Change::None,
        }
    }
}

/// The overlay device after [`ensure`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ensured {
    /// Index.
    pub index: u32,
    /// What it took.
    pub change: Change,
    /// True if the device was up before, and stays up. A new device is down: its socket accepts
    /// tunnel packets of any sender as soon as the device is up, so that the program that verifies
    /// them must be attached before. See [`link::raise`].
    pub is_up: bool,
}

/// Makes or changes the overlay device so that it is as wanted. Never sets it up.
pub fn ensure(socket: &mut Socket, spec: &Spec) -> Result<Ensured> {
    let there = link::by_name(socket, OVERLAY_DEV)?;
    let change = spec.needs(there.as_ref());
    let (index, is_up) = match (change, there) {
        (Change::None, Some(link)) => return Ok(Ensured { index: link.index, change, is_up: link.is_up() }),
        (Change::Configured, Some(link)) => (link.index, link.is_up()),
        (_, there) => {
            if let Some(link) = there {
                link::delete(socket, link.index)?;
            }
            link::create_vxlan(socket, OVERLAY_DEV, &spec.vxlan(), SOURCE_PORTS, spec.mac, spec.mtu)?;
            (link::by_name(socket, OVERLAY_DEV)?.map(|link| link.index).unwrap_or_default(), false)
        }
    };
    link::configure(socket, index, spec.mac, spec.mtu)?;
    Ok(Ensured { index, change, is_up })
}

/// Removes the overlay device; true when it was there.
pub fn remove(socket: &mut Socket) -> Result<bool> {
    match link::by_name(socket, OVERLAY_DEV)? {
        Some(link) => link::delete(socket, link.index),
        None => Ok(false),
    }
}

#[cfg(test)]
mod tests {
    use super::{Change, Link, Spec, Vxlan, mac_of};

    #[test]
    fn macs_are_local_unicast_and_differ() {
        let macs: std::collections::BTreeSet<_> = (0..1000).map(|i| mac_of(&format!("node-{i}"))).collect();
        assert_eq!(macs.len(), 1000);
        assert!(macs.iter().all(|mac| mac[0] == 2));
        // The other nodes know it by the name, whatever release each of them runs.
        assert_eq!(mac_of("n1"), [2, 8, 179, 123, 7, 181]);
    }

    #[test]
    fn every_difference_is_noticed() {
        let spec = Spec { port: 8472, mtu: 1450, mac: mac_of("n1") };
        let good = Link {
            mtu: 1450,
            mac: spec.mac.to_vec(),
            flags: libc::IFF_NOARP as u32,
            no_link_local: true,
            vxlan: Some(spec.vxlan()),
            ..Link::default()
        };
        assert_eq!(spec.needs(Some(&good)), Change::None);
        assert_eq!(spec.needs(None), Change::Created);
        assert_eq!(spec.needs(Some(&Link { mtu: 1400, ..good.clone() })), Change::Configured);
        assert_eq!(spec.needs(Some(&Link { flags: 0, ..good.clone() })), Change::Configured);
        assert_eq!(spec.needs(Some(&Link { mac: vec![2; 6], ..good.clone() })), Change::Configured);
        assert_eq!(spec.needs(Some(&Link { vxlan: None, ..good.clone() })), Change::Replaced);
        let other = Some(Vxlan { port: 4789, ..spec.vxlan() });
        assert_eq!(spec.needs(Some(&Link { vxlan: other, ..good })), Change::Replaced);
    }
}
