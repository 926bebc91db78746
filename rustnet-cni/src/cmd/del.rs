//! DEL: disconnects a pod. Needs neither its namespace, nor prevResult, nor the agent; may be repeated.

use super::detach::Removal;
use crate::call::Call;
use crate::types::conf::Attachment;
use crate::types::error::Error;

/// Removes everything that the attachment has.
pub fn run(call: &Call) -> Result<(), Error> {
    let attachment = Attachment { container_id: call.env.container_id.clone(), ifname: call.env.ifname.clone() };
    Removal::open(&call.conf, &call.env.path)?.remove(&attachment, call.conf.ipam.as_deref())
}
