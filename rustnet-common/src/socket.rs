//! `rn_sock_netns`, `rn_sock_fwd`, `rn_sock_rev` and `rn_sock_led`: which sockets ask for Services, and what the programs made of their addresses.

use crate::addr::Addr;
use crate::shared_type;

/// A socket and an address that it sends to. Key of `rn_sock_fwd`, where the address is a Service's, and of `rn_sock_rev`, where it is
/// a backend's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(Hash, PartialOrd, Ord))]
#[repr(C)]
pub struct SocketKey {
    /// The kernel's number of the socket, as `SO_COOKIE` returns it.
    pub cookie: u64,
    /// The address; IPv4 as mapped.
    pub addr: Addr,
    /// Port, host order.
    pub port: u16,
    /// Zero.
    pub pad: u16,
    /// Zero.
    pub pad2: u32,
}

/// Value of `rn_sock_rev`: what a socket asked for that talks to a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Asked {
    /// The Service's address; IPv4 as mapped.
    pub addr: Addr,
    /// Port, host order.
    pub port: u16,
    /// IP protocol number.
    pub proto: u8,
    /// Where to look for the socket: see [`netns::bucket`].
    pub bucket: u8,
    /// Id of the backend; 0 for a pod that has a port of this host.
    pub backend: u32,
}

/// Where a socket was led once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Led {
    /// The Service's address; IPv4 as mapped.
    pub asked: Addr,
    /// The backend's address; IPv4 as mapped.
    pub to: Addr,
    /// The Service's port, host order.
    pub asked_port: u16,
    /// The backend's port, host order; 0 in an element that is free.
    pub to_port: u16,
    /// Zero.
    pub pad: u32,
}

/// How many of its entries a socket remembers.
pub const TRAIL: usize = 8;

/// Value of `rn_sock_led`, which the kernel keeps with a socket and frees with it: the last entries that the socket got in
/// `rn_sock_rev` and `rn_sock_fwd`, to be deleted when it closes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Trail {
    /// The element that is written next.
    pub next: u32,
    /// Zero.
    pub pad: u32,
    /// A ring, filled from its beginning.
    pub led: [Led; TRAIL],
}

/// Values of `rn_sock_netns`, whose keys are the kernel's numbers of network namespaces, as `SO_NETNS_COOKIE` returns them. Sockets of
/// other namespaces keep their addresses.
pub mod netns {
    /// The host's: its sockets reach node ports at loopback addresses, too.
    pub const HOST: u32 = 1;
    /// A pod's: no flags.
    pub const POD: u32 = 0;

    /// The number by which a socket's entry says in which network namespaces it may be: 0 for the host's alone, else one that a pod's
    /// namespace shares with few others of its node. Of a pod there is room for no more than 8 bits.
    pub const fn bucket(cookie: u64, flags: u32) -> u8 {
        if flags & HOST != 0 { 0 } else { 1 + (cookie % 255) as u8 }
    }
}

/// High half of the address that stands for a network namespace in `rn_affinity`, its number being the low half: a multicast address
/// (`ff00::`), which every hook refuses as a source. Else a client outside could choose the backend of a namespace.
pub const CLIENT_HIGH: u64 = (u32::from_ne_bytes([0xff, 0, 0, 0]) as u64) << 32;

shared_type!(SocketKey, 32);
shared_type!(Asked, 24);
shared_type!(Led, 40);
shared_type!(Trail, 328);
