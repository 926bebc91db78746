//! What the kernel knows of addresses and of their owners. It outlives the files: a run directory may be emptied, moved, or another
//! installation's.

use super::local::Knowledge;
use crate::link;
use crate::maps::Endpoints;
use crate::netlink::Socket;
use crate::types::conf::Attachment;
use crate::types::error::Error;
use std::collections::HashSet;
use std::io;
use std::net::IpAddr;

/// The host's tables.
pub struct Tables<'a> {
    endpoints: &'a Endpoints,
    host: &'a mut Socket,
    /// Addresses of the host, also of links that are down.
    own: HashSet<IpAddr>,
}

impl<'a> Tables<'a> {
    /// Reads the host's addresses; all else is read when it is asked for.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn read(endpoints: &'a Endpoints, host: &'a mut Socket) -> Result<Self, Error> {
        let own = link::all_addresses(host)?.into_iter().map(|(_, ip, _)| ip).collect();
        Ok(Self { endpoints, host, own })
    }
}

impl Knowledge for Tables<'_> {
    /// True for an address of the host, one that a living pod has in the endpoints map, and one with a route of its own.
    fn is_used(&mut self, ip: IpAddr) -> Result<bool, Error> {
        if self.own.contains(&ip) {
            return Ok(true);
        }
        let failed = |e: io::Error| Error::io(format!("read {ip} in the endpoints map"), &e);
        if let Some(entry) = self.endpoints.get(ip.into()).map_err(failed)?
            && link::of_pod(self.host, entry.ifindex)?.is_some()
        {
            return Ok(true);
        }
        Ok(link::has_own_route(self.host, ip)?)
    }

    fn has_device(&mut self, owner: &Attachment) -> Result<bool, Error> {
        Ok(link::get(self.host, &link::host_name(&owner.container_id, &owner.ifname))?.is_some())
    }
}
