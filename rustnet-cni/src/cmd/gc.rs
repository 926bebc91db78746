//! GC: removes what belongs to this network and to no valid attachment. Without a list it removes nothing.

use super::detach::{attachment_of_alias, find_and_remove};
use crate::call::Call;
use crate::ipam::delegate::Delegate;
use crate::ipam::local::Pool;
use crate::link;
use crate::maps::Endpoints;
use crate::netlink::Socket;
use crate::state;
use crate::types::conf::Attachment;
use crate::types::error::Error;
use rustnet_common::names::VETH_PREFIX;
use std::collections::{BTreeSet, HashSet};

/// Removes stale attachments; tries all of them, and reports the first failure with the others as details.
pub fn run(call: &Call) -> Result<(), Error> {
    let conf = &call.conf;
    let Some(valid) = &conf.valid_attachments else { return Ok(()) };
    let valid: HashSet<&Attachment> = valid.iter().collect();
    let delegate = Delegate::find(conf, &call.env.path)?;
    let endpoints = Endpoints::open_for_removal(&conf.bpffs)?;
    let mut host = Socket::open().map_err(|e| Error::io("netlink socket", &e))?;

    let records = state::records(&conf.run_dir)?;
    let links: Vec<_> = link::list(&mut host)?.into_iter().filter(|l| l.name.starts_with(VETH_PREFIX)).collect();
    let mut known = BTreeSet::new();
    known.extend(
        records
            .iter()
            .filter(|r| r.network == conf.name)
            .map(|r| Attachment { container_id: r.container_id.clone(), ifname: r.ifname.clone() }),
    );
    known.extend(Pool::new(&conf.run_dir).leases()?.into_iter().filter(|l| l.network == conf.name).map(|l| l.owner));
    known.extend(state::delegated(&conf.run_dir, &conf.name)?);
    known.extend(links.iter().filter_map(|l| attachment_of_alias(conf, &l.alias)));

    let mut outcome: Result<(), Error> = Ok(());
    let mut note = |result: Result<(), Error>| {
        outcome = match (std::mem::replace(&mut outcome, Ok(())), result) {
            (Err(first), Err(e)) => Err(first.details(e.to_string())),
            (first, result) => first.and(result),
        };
    };
    for stale in known.iter().filter(|a| !valid.contains(a)) {
        note(find_and_remove(conf, stale, delegate.as_ref(), endpoints.as_ref(), &mut host));
    }
    // A call killed right after it made its veth left neither alias nor record. Its name tells whether a valid attachment
    // of this network has it, the records whether one of another network has.
    let named: HashSet<String> = valid.iter().map(|a| link::host_name(&a.container_id, &a.ifname)).collect();
    let recorded: HashSet<&str> = records.iter().map(|r| r.host_ifname.as_str()).collect();
    for orphan in links.iter().filter(|l| l.alias.is_empty() && !named.contains(&l.name)) {
        if !recorded.contains(orphan.name.as_str()) {
            note(link::delete(&mut host, orphan.index).map_err(Error::from));
        }
    }
    if let Some(delegate) = &delegate {
        note(delegate.optional("GC"));
    }
    outcome
}
