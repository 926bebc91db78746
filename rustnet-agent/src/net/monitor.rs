//! Hears of changes to links, addresses, routes, neighbours, classifiers and sysctls, so that repair need not wait for its
//! period.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use anyhow::{Context, Result};
use netlink_packet_core::NetlinkBuffer;
use netlink_packet_route::neighbour::NeighbourHeader;
use netlink_sys::{Socket, SocketAddr, protocols};
use nix::net::if_::if_indextoname;
use rtnetlink::MulticastGroup;
use rustnet_common::names::VETH_PREFIX;
use tokio::io::unix::AsyncFd;

use super::netlink::messages;

/// What is listened to. The last two are about sysctls that the kernel reports: forwarding and `rp_filter`, which
/// systemd-udevd sets on each new device, after us.
const GROUPS: [MulticastGroup; 9] = [
    MulticastGroup::Link,
    MulticastGroup::Neigh,
    MulticastGroup::Tc,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv4Netconf,
    MulticastGroup::Ipv6Netconf,
];

/// A subscription to the kernel's notices.
pub struct Monitor {
    listener: AsyncFd<Listener>,
}

impl Monitor {
    /// Subscribes in the network namespace of the calling thread. Needs a tokio runtime.
    pub fn open() -> Result<Self> {
        let listener = Listener::open().context("subscribing to changes of the network")?;
        // SAFETY: the listener owns its descriptor and returns the same one until it is dropped.
        let listener = unsafe { AsyncFd::register(listener) }.map_err(io::Error::from);
        Ok(Self { listener: listener.context("waiting for changes of the network")? })
    }

    /// Waits until something changed that may concern us.
    pub async fn changed(&mut self) -> Result<()> {
        loop {
            let mut ready = self.listener.readable_mut().await.context("waiting for changes of the network")?;
            let heard = ready.get_inner_mut().drain().context("hearing of changes of the network")?;
            ready.clear_ready();
            if heard {
                return Ok(());
            }
        }
    }
}

/// The socket; not blocking.
struct Listener {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Listener {
    fn open() -> io::Result<Self> {
        let mut socket = Socket::new(protocols::NETLINK_ROUTE)?;
        socket.set_non_blocking(true)?;
        socket.set_rx_buf_sz::<i32>(1 << 20)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        for group in GROUPS {
            socket.add_membership(group as u32)?;
        }
        Ok(Self { socket, buffer: Vec::with_capacity(1 << 16) })
    }

    /// Takes everything that has arrived. True if a message that concerns us was among it, or if so much came that some was
    /// lost.
    fn drain(&mut self) -> io::Result<bool> {
        let mut heard = false;
        loop {
            self.buffer.clear();
            match self.socket.recv(&mut self.buffer, 0) {
                Ok(_) => heard = heard || messages(&self.buffer).any(|message| is_of_interest(&message)),
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => heard = true,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(heard),
                Err(e) => return Err(e),
            }
        }
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// False for what cannot concern us: the kernel's own upkeep of neighbours, which is most of the traffic. Of those that go,
/// only the pods' matter, and a busy LAN loses some each second.
fn is_of_interest(message: &NetlinkBuffer<&[u8]>) -> bool {
    match message.message_type() {
        libc::RTM_NEWNEIGH => false,
        libc::RTM_DELNEIGH => NeighbourHeader::parse(message.payload()).is_ok_and(|header| is_pods(header.ifindex)),
        _ => true,
    }
}

/// True for a pod's veth. One that is gone has its own message.
fn is_pods(ifindex: u32) -> bool {
    if_indextoname(ifindex).is_ok_and(|name| name.to_bytes().starts_with(VETH_PREFIX.as_bytes()))
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::{NetlinkHeader, NetlinkMessage};
    use netlink_packet_route::RouteNetlinkMessage;
    use netlink_packet_route::link::LinkMessage;
    use netlink_packet_route::neighbour::NeighbourMessage;
    use netlink_packet_route::route::RouteMessage;

    use super::*;

    fn is_heard(message: RouteNetlinkMessage) -> bool {
        let mut message = NetlinkMessage::new(NetlinkHeader::default(), message.into());
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        is_of_interest(&messages(&bytes).next().expect("a message"))
    }

    #[test]
    fn neighbours_of_other_devices_are_not_heard() {
        // The loopback device, and one that is not there.
        for ifindex in [1, 1 << 30] {
            let mut neighbour = NeighbourMessage::default();
            neighbour.header.ifindex = ifindex;
            assert!(!is_heard(RouteNetlinkMessage::DelNeighbour(neighbour.clone())));
            assert!(!is_heard(RouteNetlinkMessage::NewNeighbour(neighbour)));
        }
        assert!(is_heard(RouteNetlinkMessage::NewLink(LinkMessage::default())));
        assert!(is_heard(RouteNetlinkMessage::DelRoute(RouteMessage::default())));
    }
}
