//! GC: removes what belongs to this network and to no valid attachment, and what has neither a device nor an owner any more.
//! Without a list it removes nothing.

use super::detach::{Removal, attachment_of_alias, group};
use crate::call::Call;
use crate::fault;
use crate::ipam::delegate::Delegate;
use crate::ipam::local::Pool;
use crate::link::{self, Link};
use crate::netlink::Socket;
use crate::state;
use crate::types::conf::Attachment;
use crate::types::error::{Error, Failures};
use rustnet_common::files::EndpointFile;
use rustnet_common::names::VETH_PREFIX;
use std::collections::{BTreeMap, HashSet};

/// Removes stale attachments; tries all of them, and reports the first failure with the others as details.
pub fn run(call: &Call) -> Result<(), Error> {
    let conf = &call.conf;
    let Some(valid) = &conf.valid_attachments else { return Ok(()) };
    let valid: HashSet<&Attachment> = valid.iter().collect();
    let mut removal = Removal::open(conf, &call.env.path)?;
    let mut failures = Failures::default();

    // Files before links: an ADD makes its link first, so that whoever has a file and no link has lost it.
    let records = failures.note(state::records(&conf.run_dir));
    let mut known: BTreeMap<Attachment, bool> = BTreeMap::new();
    let mut add = |a: Attachment, is_ours: bool| *known.entry(a).or_default() |= is_ours;
    for record in records.iter().flatten() {
        add(attachment_of(record), record.network == conf.name);
    }
    for lease in failures.note(Pool::new(&conf.run_dir).leases()).unwrap_or_default() {
        add(lease.owner, lease.network == conf.name);
    }
    for mark in failures.note(state::marks(&conf.run_dir)).unwrap_or_default() {
        add(mark.owner, mark.network == conf.name);
    }
    let listed = fault::point("links").and_then(|()| Ok(link::list(removal.host())?));
    let mut links = failures.note(listed).unwrap_or_default();
    links.retain(|link| link.name.starts_with(VETH_PREFIX));
    for a in links.iter().filter_map(|link| attachment_of_alias(conf, &link.alias)) {
        add(a, true);
    }
    for (a, is_ours) in known.iter().filter(|(a, _)| !valid.contains(a)) {
        // Networks that were renamed have no GC of their own any more. Their living pods have a device. It is looked up now: since the
        // list, an ADD of that network may have made it.
        let is_stale = *is_ours || failures.note(has_device(removal.host(), a)) == Some(false);
        if is_stale {
            failures.note(removal.remove(a, conf.ipam.as_deref().filter(|_| *is_ours)));
        }
    }
    if let Some(records) = records {
        for orphan in orphans(&links, group(conf), &valid, &records) {
            failures.note(link::delete(removal.host(), orphan.index).map_err(Error::from));
        }
    }
    if let Some(kind) = &conf.ipam {
        let done = Delegate::find(conf, kind, &call.env.path).and_then(|delegate| delegate.optional("GC"));
        failures.note(done);
    }
    failures.into_result()
}

/// The links of this network, by their group, that neither a valid attachment nor a record names: a call was killed right after it made
/// them, or their record got lost.
fn orphans<'a>(
    links: &'a [Link],
    group: u32,
    valid: &HashSet<&Attachment>,
    records: &[EndpointFile],
) -> impl Iterator<Item = &'a Link> {
    let mut named: HashSet<String> = valid.iter().map(|a| link::host_name(&a.container_id, &a.ifname)).collect();
    named.extend(records.iter().map(|record| record.host_ifname.clone()));
    links.iter().filter(move |link| link.group == group && !named.contains(&link.name))
}

fn has_device(host: &mut Socket, a: &Attachment) -> Result<bool, Error> {
    Ok(link::get(host, &link::host_name(&a.container_id, &a.ifname))?.is_some())
}

fn attachment_of(record: &EndpointFile) -> Attachment {
    Attachment { container_id: record.container_id.clone(), ifname: record.ifname.clone() }
}
