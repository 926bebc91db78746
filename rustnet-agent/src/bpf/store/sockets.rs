//! `rn_sock_netns` and `rn_sock_rev`: whose sockets ask for Services, and which of them talk to which backend.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use rustnet_common::names::map;
use rustnet_common::socket::{Asked, SocketKey};

use super::Map;

/// The tables of sockets.
pub struct Sockets {
    namespaces: Map<u64, u32>,
    backends: Map<SocketKey, Asked>,
}

impl Sockets {
    /// Opens the pins in `bpffs`.
    ///
    /// # Errors
    /// There are none.
    pub fn open(bpffs: &Path) -> Result<Self> {
        Ok(Self { namespaces: Map::open(bpffs, map::SOCK_NETNS)?, backends: Map::open(bpffs, map::SOCK_REV)? })
    }

    /// The network namespaces whose sockets ask for Services, with their flags.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn namespaces(&self) -> Result<BTreeMap<u64, u32>> {
        Ok(self.namespaces.entries()?.into_iter().collect())
    }

    /// Has the sockets of these network namespaces ask for Services, with these flags, and no others.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_namespaces(&self, wanted: &BTreeMap<u64, u32>) -> Result<()> {
        let found = self.namespaces()?;
        for (cookie, flags) in wanted.iter().filter(|(cookie, flags)| found.get(cookie) != Some(flags)) {
            self.namespaces.put(cookie, flags)?;
        }
        for cookie in found.keys().filter(|cookie| !wanted.contains_key(cookie)) {
            self.namespaces.delete(cookie)?;
        }
        Ok(())
    }

    /// All sockets that talk to a backend, with what they asked for.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn entries(&self) -> Result<Vec<(SocketKey, Asked)>> {
        self.backends.entries()
    }

    /// True if a socket's entry says that it asked for this.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn has(&self, socket: &SocketKey, asked: &Asked) -> Result<bool> {
        Ok(self.backends.get(socket)?.as_ref() == Some(asked))
    }

    /// Forgets sockets, but for those that have asked for something else since.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn forget(&self, sockets: &[(SocketKey, Asked)]) -> Result<()> {
        for (socket, asked) in sockets {
            if self.has(socket, asked)? {
                self.backends.delete(socket)?;
            }
        }
        Ok(())
    }
}
