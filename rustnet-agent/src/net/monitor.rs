//! Hears of changes to links, addresses, routes, neighbours and classifiers, so that repair need not wait for its period.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use anyhow::{Context, Result};
use netlink_packet_core::NetlinkBuffer;
use netlink_sys::{Socket, SocketAddr, protocols};
use rtnetlink::MulticastGroup;
use tokio::io::unix::AsyncFd;

use super::netlink::messages;

/// What is listened to.
const GROUPS: [MulticastGroup; 7] = [
    MulticastGroup::Link,
    MulticastGroup::Neigh,
    MulticastGroup::Tc,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv6Route,
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

/// False for what cannot concern us: the kernel's own upkeep of neighbours, which is most of the traffic.
fn is_of_interest(message: &NetlinkBuffer<&[u8]>) -> bool {
    message.message_type() != libc::RTM_NEWNEIGH
}
