//! Taking an attachment away, found by names, records and leases alone: DEL, GC and a failed ADD share it.
//!
//! The order is the reverse of ADD's, and each step's traces outlive it: map entries are found through the record, the
//! lease goes last, so that an address is never free while something still points to it.

use crate::fault;
use crate::ipam::delegate::Delegate;
use crate::ipam::local::Pool;
use crate::link;
use crate::maps::{Endpoints, HostPorts};
use crate::netlink::Socket;
use crate::state;
use crate::types::conf::{Attachment, NetConf};
use crate::types::error::Error;
use rustnet_common::files::EndpointFile;
use std::net::IpAddr;

/// The alias of the host's veth: the network and attachment that own it, readable by `ip link` and
/// by GC.
pub fn alias(conf: &NetConf, a: &Attachment) -> String {
    format!("{} {} {}@{}", conf.run_dir.display(), conf.name, a.container_id, a.ifname)
}

/// The reverse of [`alias`], for a link of this configuration's network.
pub fn attachment_of_alias(conf: &NetConf, alias: &str) -> Option<Attachment> {
    let rest = alias.strip_prefix(&format!("{} {} ", conf.run_dir.display(), conf.name))?;
    let (container_id, ifname) = rest.split_once('@')?;
    Some(Attachment { container_id: container_id.into(), ifname: ifname.into() })
}

/// Removes map entries, veth, record and leases. What has gone already is no error; what fails does not keep the rest
/// from being tried, unless a lease would be freed under something that still uses it.
pub fn find_and_remove(
    conf: &NetConf,
    a: &Attachment,
    delegate: Option<&Delegate<'_>>,
    endpoints: Option<&Endpoints>,
    host: &mut Socket,
) -> Result<(), Error> {
    let run_dir = &conf.run_dir;
    let pool = Pool::new(run_dir);
    let record = state::read_record(run_dir, a)?;
    let veth = link::get(host, &link::host_name(&a.container_id, &a.ifname))?;

    if let Some(record) = &record {
        give_ports_back(conf, record)?;
        fault::point("unport")?;
    }
    let held = pool.held_by(a)?;
    if let Some(map) = endpoints {
        // An address leased to this attachment is nobody else's. One that only the record names may have been given out
        // again by another IPAM, so that its entry must still be for our interface.
        for ip in &held {
            delete_entry(map, *ip)?;
        }
        let indices = [record.as_ref().map(|r| r.ifindex), veth.as_ref().map(|l| l.index)];
        for ip in record.iter().flat_map(|r| &r.addresses) {
            let entry = map.get((*ip).into()).map_err(|e| Error::io(format!("read {ip} in the endpoints map"), &e))?;
            if entry.is_some_and(|e| indices.contains(&Some(e.ifindex))) {
                delete_entry(map, *ip)?;
            }
        }
    }
    fault::point("unmap")?;
    if let Some(veth) = veth {
        link::delete(host, veth.index)?;
    }
    fault::point("unlink")?;
    state::remove_record(run_dir, a)?;
    fault::point("unrecord")?;
    pool.release(a, &held)?;
    if let Some(delegate) = delegate {
        delegate.del(a)?;
        fault::point("undelegate")?;
    }
    state::unmark_delegated(run_dir, &conf.name, a)
}

/// Deletes the entries of the node's ports that still are this interface's: a pod that came since may have them.
fn give_ports_back(conf: &NetConf, record: &EndpointFile) -> Result<(), Error> {
    if record.host_ports.is_empty() {
        return Ok(());
    }
    let Some(map) = HostPorts::open_for_removal(&conf.bpffs)? else { return Ok(()) };
    for (key, own) in record.host_port_entries() {
        map.delete_if(key, |entry| entry.ifindex == own.ifindex)
            .map_err(|e| Error::io(format!("delete port {} from the map of host ports", key.port), &e))?;
    }
    Ok(())
}

fn delete_entry(map: &Endpoints, ip: IpAddr) -> Result<(), Error> {
    map.delete(ip.into()).map_err(|e| Error::io(format!("delete {ip} from the endpoints map"), &e))
}
