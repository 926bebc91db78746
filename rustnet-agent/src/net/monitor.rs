//! Hears of changes to links, addresses, routes, neighbours and classifiers, so that repair need not wait for its period.

use anyhow::{Context, Result};
use tokio::io::unix::AsyncFd;

use super::netlink::Listener;

/// Kinds of messages that cannot concern us: the kernel's own upkeep of neighbours, which is most of the traffic.
const UPKEEP: [u16; 1] = [libc::RTM_NEWNEIGH];

/// A subscription to the kernel's notices.
pub struct Monitor {
    listener: AsyncFd<Listener>,
}

impl Monitor {
    /// Subscribes in the network namespace of the calling thread. Needs a tokio runtime.
    pub fn open() -> Result<Self> {
        let groups = libc::RTMGRP_LINK
            | libc::RTMGRP_NEIGH
            | libc::RTMGRP_TC
            | libc::RTMGRP_IPV4_IFADDR
            | libc::RTMGRP_IPV4_ROUTE
            | libc::RTMGRP_IPV6_IFADDR
            | libc::RTMGRP_IPV6_ROUTE;
        let listener = Listener::open(groups.cast_unsigned()).context("subscribing to changes of the network")?;
        // SAFETY: the listener owns its descriptor and returns the same one until it is dropped.
        let listener = unsafe { AsyncFd::register(listener) }.map_err(std::io::Error::from);
        Ok(Self { listener: listener.context("waiting for changes of the network")? })
    }

    /// Waits until something changed that may concern us.
    pub async fn changed(&mut self) -> Result<()> {
        loop {
            let mut ready = self.listener.readable_mut().await.context("waiting for changes of the network")?;
            let heard = ready.get_inner_mut().drain(|kind| !UPKEEP.contains(&kind))?;
            ready.clear_ready();
            if heard {
                return Ok(());
            }
        }
    }
}
