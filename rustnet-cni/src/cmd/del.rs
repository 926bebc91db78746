//! DEL: disconnects a pod. Needs neither its namespace, nor prevResult, nor the agent; may be repeated.

use super::detach::find_and_remove;
use crate::call::Call;
use crate::ipam::delegate::Delegate;
use crate::maps::Endpoints;
use crate::netlink::Socket;
use crate::types::conf::Attachment;
use crate::types::error::Error;

/// Removes everything that the attachment has.
pub fn run(call: &Call) -> Result<(), Error> {
    let attachment = Attachment { container_id: call.env.container_id.clone(), ifname: call.env.ifname.clone() };
    let delegate = Delegate::find(&call.conf, &call.env.path)?;
    let endpoints = Endpoints::open_for_removal(&call.conf.bpffs)?;
    let mut host = Socket::open().map_err(|e| Error::io("netlink socket", &e))?;
    find_and_remove(&call.conf, &attachment, delegate.as_ref(), endpoints.as_ref(), &mut host)
}
