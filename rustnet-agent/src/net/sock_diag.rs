//! Connected sockets of a network namespace: finds them, and ends them.
//!
//! Two requests with fields of a fixed size. The crate for this family of netlink (netlink-packet-sock-diag) has no request that ends
//! a socket.

use std::collections::{BTreeMap, BTreeSet};
use std::mem::offset_of;
use std::net::SocketAddr;
use std::path::Path;

use bytemuck::{Pod, Zeroable};
use netlink_packet_core::NetlinkSerializable;
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use rustnet_common::addr::{Addr, Address, Ip4};
use rustnet_common::tuple::proto::TCP;

use super::netlink::{CHANGE, Error, Socket, unless};
use super::netns;

const AF_INET: u8 = libc::AF_INET as u8;
const AF_INET6: u8 = libc::AF_INET6 as u8;
/// `SOCK_DIAG_BY_FAMILY`.
const LIST: u16 = 20;
/// `SOCK_DESTROY`, since kernel 4.5.
const END: u16 = 21;
/// States of TCP sockets with a peer, `1 << TCP_...`: all but those that listen, are closed, or wait for the end of their time.
const WITH_PEER: u32 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11;
/// The state of UDP sockets with a peer, `TCP_ESTABLISHED`.
const CONNECTED: u32 = 1 << 1;

/// `struct inet_diag_sockid`: addresses and ports, interface, cookie.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct SocketId {
    ports: [u16; 2],
    addresses: [[u32; 4]; 2],
    interface: u32,
    cookie: [u32; 2],
}

impl SocketId {
    fn cookie(&self) -> u64 {
        u64::from(self.cookie[1]) << 32 | u64::from(self.cookie[0])
    }

    /// The address and port that it is connected to. An IPv6 socket that speaks IPv4 has a mapped address, which counts as IPv4.
    fn peer(&self, family: u8) -> SocketAddr {
        let address = self.addresses[1];
        let ip = if family == AF_INET { Ip4::from_word(address[0]).to_addr() } else { Addr::from_words(address) };
        SocketAddr::new(ip.into(), u16::from_be(self.ports[1]))
    }
}

/// `struct inet_diag_req_v2`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Body {
    family: u8,
    proto: u8,
    extensions: u8,
    pad: u8,
    states: u32,
    id: SocketId,
}

/// `struct inet_diag_msg`, its beginning.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Found {
    family: u8,
    state: u8,
    timer: u8,
    retransmissions: u8,
    id: SocketId,
}

const _: () = assert!(size_of::<Body>() == 56 && offset_of!(Found, id) == 4 && size_of::<SocketId>() == 48);

struct Request {
    kind: u16,
    body: Body,
}

impl NetlinkSerializable for Request {
    fn message_type(&self) -> u16 {
        self.kind
    }

    fn buffer_len(&self) -> usize {
        size_of::<Body>()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(bytemuck::bytes_of(&self.body));
    }
}

/// A socket that is connected.
#[derive(Clone, Copy, Debug)]
pub struct Connected {
    family: u8,
    proto: u8,
    id: SocketId,
}

/// Asks the kernel about the sockets of one network namespace.
pub struct SockDiag(Socket);

impl SockDiag {
    /// For the network namespace of the calling thread.
    ///
    /// # Errors
    /// The kernel has no such sockets for us.
    pub fn open() -> Result<Self, Error> {
        Socket::of(NETLINK_SOCK_DIAG).map(Self)
    }

    /// For the network namespace at `path`.
    ///
    /// # Errors
    /// It cannot be entered, or the kernel has no such sockets for us.
    pub fn open_in(path: &Path) -> anyhow::Result<Self> {
        netns::inside(path, || Ok(Self::open()?))
    }

    /// The sockets of a protocol, TCP or UDP, that have these cookies and are connected to these addresses and ports.
    ///
    /// # Errors
    /// The kernel refuses: ENOENT without `CONFIG_UDP_DIAG`.
    pub fn find(
        &mut self,
        proto: u8,
        wanted: &BTreeSet<(u64, SocketAddr)>,
    ) -> Result<BTreeMap<(u64, SocketAddr), Connected>, Error> {
        let states = if proto == TCP { WITH_PEER } else { CONNECTED };
        let mut all = BTreeMap::new();
        for family in [AF_INET, AF_INET6] {
            let body = Body { family, proto, states, ..Body::zeroed() };
            all.extend(self.0.dump(&Request { kind: LIST, body }, |message| {
                let Found { family, id, .. } = bytemuck::pod_read_unaligned(message.get(..size_of::<Found>())?);
                let key = (id.cookie(), id.peer(family));
                wanted.contains(&key).then_some((key, Connected { family, proto, id }))
            })?);
        }
        Ok(all)
    }

    /// Ends a socket: its owner gets ECONNABORTED. False if it has ended by itself meanwhile.
    ///
    /// # Errors
    /// The kernel refuses: EOPNOTSUPP without `CONFIG_INET_DIAG_DESTROY`.
    pub fn end(&mut self, it: &Connected) -> Result<bool, Error> {
        let Connected { family, proto, id } = *it;
        let body = Body { family, proto, id, ..Body::zeroed() };
        unless(self.0.request(&Request { kind: END, body }, CHANGE), &[libc::ENOENT, libc::ESTALE])
    }
}

#[cfg(test)]
mod tests {
    use super::{AF_INET, AF_INET6, SocketId, Zeroable};

    #[test]
    fn a_cookie_is_two_words_the_lower_one_first() {
        let id = SocketId { cookie: [0x8000_0001, 2], ..SocketId::zeroed() };
        assert_eq!(id.cookie(), 0x2_8000_0001);
    }

    #[test]
    fn peers_of_each_family() {
        let port = 80_u16.to_be();
        let word = u32::from_ne_bytes([10, 244, 1, 2]);
        for (family, address, want) in [
            (AF_INET, [word, 0, 0, 0], "10.244.1.2:80"),
            (AF_INET6, [0, 0, 0xffff_u32.to_be(), word], "10.244.1.2:80"),
            (AF_INET6, [0xfd00_0000_u32.to_be(), 0, 0, 7_u32.to_be()], "[fd00::7]:80"),
        ] {
            let id = SocketId { ports: [0, port], addresses: [[0; 4], address], ..SocketId::zeroed() };
            assert_eq!(id.peer(family), want.parse().unwrap());
        }
    }
}
