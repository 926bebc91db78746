//! Hears of changes to links, addresses, routes, neighbours, classifiers, sysctls and IPsec policies, so that repair need not wait
//! for its period.

use std::future::pending;
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

use super::ipsec;
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

/// `XFRMNLGRP_POLICY`. Policies whose time is over are reported elsewhere, among all keys': those are not heard.
const POLICIES: u32 = 4;

/// What has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changed {
    /// Something about the host's network.
    Network,
    /// IPsec policies, and nothing else that was heard.
    Policies,
}

/// A subscription to the kernel's notices.
pub struct Monitor {
    network: AsyncFd<Listener>,
    /// `None` on a kernel without IPsec, or where nothing can be heard of it.
    policies: Option<AsyncFd<Listener>>,
}

impl Monitor {
    /// Subscribes in the network namespace of the calling thread. Needs a tokio runtime.
    pub fn open() -> Result<Self> {
        let network = Listener::open(protocols::NETLINK_ROUTE, GROUPS.map(|group| group as u32), is_of_interest);
        let network = network.context("subscribing to changes of the network")?;
        let policies = match Listener::open(protocols::NETLINK_XFRM, [POLICIES], |_| true) {
            Ok(listener) => Some(listener),
            Err(e) if ipsec::is_absent(&e) => None,
            Err(e) => {
                tracing::warn!(
                    "changes of IPsec policies are not heard: {e}; they are counted with each look at the network"
                );
                None
            }
        };
        Ok(Self { network: register(network)?, policies: policies.map(register).transpose()? })
    }

    /// Waits until something changed that may concern us.
    pub async fn changed(&mut self) -> Result<Changed> {
        let policies = async {
            match &mut self.policies {
                Some(listener) => heard(listener).await,
                None => pending().await,
            }
        };
        tokio::select! {
            heard = heard(&mut self.network) => heard.map(|()| Changed::Network),
            heard = policies => heard.map(|()| Changed::Policies),
        }
    }
}

fn register(listener: Listener) -> Result<AsyncFd<Listener>> {
    // SAFETY: the listener owns its descriptor and returns the same one until it is dropped.
    let listener = unsafe { AsyncFd::register(listener) }.map_err(io::Error::from);
    listener.context("waiting for changes of the network")
}

/// Waits until a message of interest has arrived, and takes all there are.
async fn heard(listener: &mut AsyncFd<Listener>) -> Result<()> {
    loop {
        let mut ready = listener.readable_mut().await.context("waiting for changes of the network")?;
        let heard = ready.get_inner_mut().drain().context("hearing of changes of the network")?;
        ready.clear_ready();
        if heard {
            return Ok(());
        }
    }
}

/// The socket; not blocking.
struct Listener {
    socket: Socket,
    buffer: Vec<u8>,
    /// Whether a message may concern us.
    is_of_interest: fn(&NetlinkBuffer<&[u8]>) -> bool,
}

impl Listener {
    fn open(
        protocol: isize,
        groups: impl IntoIterator<Item = u32>,
        is_of_interest: fn(&NetlinkBuffer<&[u8]>) -> bool,
    ) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.set_non_blocking(true)?;
        socket.set_rx_buf_sz::<i32>(1 << 20)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        for group in groups {
            socket.add_membership(group)?;
        }
        Ok(Self { socket, buffer: Vec::with_capacity(1 << 16), is_of_interest })
    }

    /// Takes everything that has arrived. True if a message that concerns us was among it, or if so much came that some was
    /// lost.
    fn drain(&mut self) -> io::Result<bool> {
        let mut heard = false;
        loop {
            self.buffer.clear();
            match self.socket.recv(&mut self.buffer, 0) {
                Ok(_) => heard = heard || messages(&self.buffer).any(|message| (self.is_of_interest)(&message)),
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
