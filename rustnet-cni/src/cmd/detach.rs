//! Taking an attachment away, found by names, records and leases alone: DEL, GC and a failed ADD share it.
//!
//! The order is the reverse of ADD's. A step that fails keeps no other from being tried, with one exception: what finds and
//! protects the rest (record, leases) stays until map entries and veth have gone. So an address is never free while something
//! still points to it, and the next DEL finds what this one left.

use crate::fault;
use crate::ipam::delegate::Delegate;
use crate::ipam::local::Pool;
use crate::link::{self, Link};
use crate::maps::{Endpoints, HostPorts};
use crate::netlink::Socket;
use crate::state::{self, Mark};
use crate::types::conf::{Attachment, NetConf};
use crate::types::error::{Error, Failures, code};
use rustnet_common::files::EndpointFile;
use serde_json::{Map, Value};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// The alias of the host's veth: the network and attachment that own it, readable by `ip link` and
/// by GC. What is longer than the kernel's limit is hashed.
pub fn alias(conf: &NetConf, a: &Attachment) -> String {
    let text = format!("{} {} {}@{}", conf.run_dir.display(), conf.name, a.container_id, a.ifname);
    if text.len() <= link::IFALIAS_MAX { text } else { format!("rustnet {:016x}", link::hash(text.as_bytes())) }
}

/// The reverse of [`alias`], for a link of this configuration's network.
pub fn attachment_of_alias(conf: &NetConf, alias: &str) -> Option<Attachment> {
    let rest = alias.strip_prefix(&format!("{} {} ", conf.run_dir.display(), conf.name))?;
    let (container_id, ifname) = rest.split_once('@')?;
    Some(Attachment { container_id: container_id.into(), ifname: ifname.into() })
}

/// The group of a network's links, by which GC knows one that has no alias yet.
pub fn group(conf: &NetConf) -> u32 {
    let hash = link::hash(format!("{} {}", conf.run_dir.display(), conf.name).as_bytes());
    // 0 is everybody's.
    ((hash ^ (hash >> 32)) as u32).max(1)
}

/// Removes attachments of one run directory.
pub struct Removal<'a> {
    conf: &'a NetConf,
    /// CNI_PATH.
    path: &'a [PathBuf],
    endpoints: Result<Option<Endpoints>, Error>,
    host: Socket,
}

impl<'a> Removal<'a> {
    /// Opens what removals need. Pins that are not there, or another version's, are no obstacle.
    ///
    /// # Errors
    /// No netlink socket.
    pub fn open(conf: &'a NetConf, path: &'a [PathBuf]) -> Result<Self, Error> {
        let host = Socket::open().map_err(|e| Error::io("netlink socket", &e))?;
        Ok(Self { conf, path, endpoints: Endpoints::open_for_removal(&conf.bpffs), host })
    }

    /// The socket in the host's namespace.
    pub fn host(&mut self) -> &mut Socket {
        &mut self.host
    }

    /// Removes map entries, veth, record and leases. What has gone already is no error. `named` is the IPAM plugin that the
    /// configuration names, for an attachment of its network of which no mark tells who gave it an address.
    ///
    /// # Errors
    /// The first step that failed, with the others as details.
    pub fn remove(&mut self, a: &Attachment, named: Option<&str>) -> Result<(), Error> {
        let run_dir = &self.conf.run_dir;
        let mut failures = Failures::default();
        let record = failures.note(state::read_record(run_dir, a)).flatten();
        let veth = failures.note(self.own_veth(a, record.as_ref())).flatten();
        if let Some(record) = &record {
            failures.note(self.give_ports_back(record).and_then(|()| fault::point("unport")));
        }
        let pool = Pool::new(run_dir);
        let held = failures.note(pool.held_by(a)).unwrap_or_default();
        let indices = [record.as_ref().map(|r| r.ifindex), veth.as_ref().map(|l| l.index)];
        for ip in held.iter().chain(record.iter().flat_map(|r| &r.addresses)) {
            failures.note(self.delete_entry(*ip, indices));
        }
        failures.note(fault::point("unmap"));
        if let Some(veth) = veth {
            failures.note(link::delete(&mut self.host, veth.index).map_err(Error::from));
        }
        failures.note(fault::point("unlink"));
        if !failures.is_empty() {
            let kept = "its record and its addresses are kept until that works: DEL it again";
            return failures.into_result().map_err(|e| e.details(kept));
        }
        failures.note(state::remove_record(run_dir, a).and_then(|()| fault::point("unrecord")));
        failures.note(pool.release(a, &held));
        self.release_delegated(a, named, &mut failures);
        failures.into_result()
    }

    /// The host's end of the attachment's veth. A link with this name that is another attachment's, or of another run directory, is
    /// none: of two attachments, the names may agree by chance.
    fn own_veth(&mut self, a: &Attachment, record: Option<&EndpointFile>) -> Result<Option<Link>, Error> {
        let found = link::get(&mut self.host, &link::host_name(&a.container_id, &a.ifname))?;
        let whole = alias(self.conf, a);
        let (before, behind) =
            (format!("{} ", self.conf.run_dir.display()), format!(" {}@{}", a.container_id, a.ifname));
        let group = group(self.conf);
        Ok(found.filter(|link| {
            let is_named = link.alias == whole || link.alias.starts_with(&before) && link.alias.ends_with(&behind);
            // A call was killed before it gave the alias. The group tells the network; releases before gave none.
            let is_new = link.alias.is_empty() && (link.group == 0 || link.group == group);
            is_new || is_named || record.is_some_and(|record| record.ifindex == link.index)
        }))
    }

    /// Deletes an entry of the endpoints map, unless it is of another pod that lives: another IPAM, or another run directory, may have
    /// given the address out again.
    fn delete_entry(&mut self, ip: IpAddr, indices: [Option<u32>; 2]) -> Result<(), Error> {
        let map = match &self.endpoints {
            Ok(Some(map)) => map,
            Ok(None) => return Ok(()),
            Err(e) => return Err(e.clone()),
        };
        let failed = |e: io::Error| Error::io(format!("delete {ip} from the endpoints map"), &e);
        let Some(found) = map.get(ip.into()).map_err(failed)? else { return Ok(()) };
        let is_ours = indices.contains(&Some(found.ifindex)) || link::of_pod(&mut self.host, found.ifindex)?.is_none();
        if is_ours { map.delete_if(ip.into(), |entry| *entry == found).map_err(failed) } else { Ok(()) }
    }

    /// Deletes the entries of the node's ports that still are this interface's: a pod that came since may have them.
    fn give_ports_back(&self, record: &EndpointFile) -> Result<(), Error> {
        if record.host_ports.is_empty() {
            return Ok(());
        }
        let Some(map) = HostPorts::open_for_removal(&self.conf.bpffs)? else { return Ok(()) };
        for (key, own) in record.host_port_entries() {
            map.delete_if(key, |entry| entry.ifindex == own.ifindex)
                .map_err(|e| Error::io(format!("delete port {} from the map of host ports", key.port), &e))?;
        }
        Ok(())
    }

    /// Has the IPAM plugins that may have given the attachment an address take it back. A mark has the configuration of the ADD,
    /// which may have named another plugin, another range or another network than today's.
    fn release_delegated(&self, a: &Attachment, named: Option<&str>, failures: &mut Failures) {
        let run_dir = &self.conf.run_dir;
        let marks = failures.note(state::marks(run_dir)).unwrap_or_default();
        let mut is_marked = false;
        for mark in marks.into_iter().filter(|mark| mark.owner == *a) {
            is_marked = true;
            let done = self.release_marked(&mark, named).and_then(|()| fault::point("undelegate"));
            failures.note(done.and_then(|()| mark.remove(run_dir)));
        }
        // After a reboot the marks have gone, and leases on a disk have not.
        if let Some(kind) = named.filter(|_| !is_marked) {
            failures.note(Delegate::find(self.conf, kind, self.path).and_then(|delegate| delegate.del(a)));
        }
    }

    fn release_marked(&self, mark: &Mark, named: Option<&str>) -> Result<(), Error> {
        if let Some(then) = then_of(&mark.configuration(&self.conf.run_dir), &self.conf.stdin) {
            let conf = NetConf::parse(then, true)?;
            let kind = conf.ipam.as_deref().ok_or_else(|| unknown(mark, &self.conf.run_dir))?;
            return Delegate::find(&conf, kind, self.path)?.del(&mark.owner);
        }
        if let Some(kind) = named {
            return Delegate::find(self.conf, kind, self.path)?.del(&mark.owner);
        }
        // Of an earlier release. To refuse would keep the pod for ever.
        eprintln!("rustnet-cni: {}", unknown(mark, &self.conf.run_dir));
        Ok(())
    }
}

fn unknown(mark: &Mark, run_dir: &Path) -> Error {
    let Mark { network, owner } = mark;
    let text = format!(
        "{}@{} of network {network} in {} may hold an address of an IPAM plugin that nothing names any more",
        owner.container_id,
        owner.ifname,
        run_dir.display()
    );
    Error::new(code::CONFIG, text)
        .details("give it back by that plugin's own means; host-local: remove the file in /var/lib/cni/networks")
}

/// The configuration of the ADD, if today's differs in what concerns addresses; today's `prevResult` goes with it.
fn then_of(then: &[u8], now: &[u8]) -> Option<Vec<u8>> {
    let object = |bytes: &[u8]| serde_json::from_slice::<Map<String, Value>>(bytes).ok();
    let (mut then, now) = (object(then)?, object(now)?);
    if ["name", "ipam"].iter().all(|key| then.get(*key) == now.get(*key)) {
        return None;
    }
    then.remove("prevResult");
    then.extend(now.get("prevResult").map(|prev| ("prevResult".to_owned(), prev.clone())));
    Some(Value::from(then).to_string().into_bytes())
}
