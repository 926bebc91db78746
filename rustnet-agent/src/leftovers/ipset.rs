//! Sets of ipset, by netlink: their names, and the removal of single ones.

use anyhow::{Context, Result};
use netlink_packet_core::{DefaultNla, Emitable, NetlinkSerializable};
use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::net::netlink::{Error, Socket, attributes, value};

/// `NFNL_SUBSYS_IPSET`, in the upper octet of a message's type.
const SUBSYSTEM: u16 = 6;
/// `struct nfgenmsg`.
const HEADER: usize = 4;
/// The oldest protocol that kernels still speak.
const PROTOCOL: u8 = 6;

/// `IPSET_CMD_*`.
mod command {
    #[cfg(test)]
    pub(super) const CREATE: u16 = 2;
    pub(super) const DESTROY: u16 = 3;
    pub(super) const LIST: u16 = 7;
}

/// `IPSET_ATTR_*`.
mod attr {
    pub(super) const PROTOCOL: u16 = 1;
    pub(super) const SET_NAME: u16 = 2;
    /// With `NLA_F_NET_BYTEORDER`.
    pub(super) const FLAGS: u16 = 6 | 1 << 14;
}

/// `IPSET_FLAG_LIST_SETNAME`: only names.
const NAMES_ONLY: u32 = 2;

/// Names of all sets of this network namespace; none where the kernel has no ipset.
pub fn names() -> Result<Vec<String>> {
    let mut socket = match Socket::of(NETLINK_NETFILTER) {
        Ok(socket) => socket,
        Err(Error::Io(error)) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(Vec::new()),
        Err(error) => return Err(error).context("opening a netfilter socket"),
    };
    let list = Message::new(command::LIST).with(attr::FLAGS, &NAMES_ONLY.to_be_bytes());
    let name = |body: &[u8]| {
        let found = attributes(body.get(HEADER..)?).find(|found| found.kind() == attr::SET_NAME)?;
        super::nftables::text(value(found))
    };
    match socket.dump(&list, name) {
        // Netfilter is there, but this part of it is not.
        Err(error) if matches!(error.errno(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => Ok(Vec::new()),
        result => result.context("listing the sets of ipset"),
    }
}

/// Removes sets, which no rule may ask any more.
///
/// # Errors
/// The kernel refuses: a rule still asks one.
pub fn remove(names: &[String]) -> Result<()> {
    if names.is_empty() {
        return Ok(());
    }
    let mut socket = Socket::of(NETLINK_NETFILTER).context("opening a netfilter socket")?;
    for name in names {
        let destroy = Message::new(command::DESTROY).with(attr::SET_NAME, &text(name));
        match socket.request(&destroy, 0) {
            // It is gone.
            Err(error) if error.errno() == Some(libc::ENOENT) => {}
            result => result.with_context(|| format!("removing set {name} of ipset, which a rule may still ask"))?,
        }
    }
    Ok(())
}

fn text(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}

/// A request to ipset.
struct Message {
    command: u16,
    attributes: Vec<DefaultNla>,
}

impl Message {
    fn new(command: u16) -> Self {
        Self { command, attributes: vec![DefaultNla::new(attr::PROTOCOL, vec![PROTOCOL])] }
    }

    fn with(mut self, kind: u16, value: &[u8]) -> Self {
        self.attributes.push(DefaultNla::new(kind, value.to_vec()));
        self
    }
}

impl NetlinkSerializable for Message {
    fn message_type(&self) -> u16 {
        SUBSYSTEM << 8 | self.command
    }

    fn buffer_len(&self) -> usize {
        HEADER + self.attributes.as_slice().buffer_len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer[..HEADER].copy_from_slice(&[libc::AF_INET as u8, 0, 0, 0]);
        self.attributes.as_slice().emit(&mut buffer[HEADER..]);
    }
}

/// For tests, on hosts without `ipset`: makes an empty set of addresses.
#[cfg(test)]
pub fn create(name: &str) -> Result<()> {
    // `IPSET_ATTR_TYPENAME`, `REVISION`, `FAMILY`, and `DATA` with `NLA_F_NESTED`.
    let create = Message::new(command::CREATE).with(attr::SET_NAME, &text(name)).with(3, &text("hash:ip"));
    let create = create.with(4, &[0]).with(5, &[libc::AF_INET as u8]).with(7 | 1 << 15, &[]);
    Socket::of(NETLINK_NETFILTER)?.request(&create, crate::net::netlink::CREATE).context("creating a set")
}

#[cfg(test)]
mod tests {
    use super::{create, names, remove};
    use nix::sched::{CloneFlags, unshare};

    #[test]
    fn sets_are_listed_and_removed_one_by_one() {
        let test = || {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace: run the tests as root");
            assert!(names().unwrap().is_empty());
            for name in ["KUBE-CLUSTER-IP", "KUBE-CLUSTER-IP-MINE", "blocked"] {
                create(name).unwrap();
            }
            remove(&["KUBE-CLUSTER-IP".to_owned(), "KUBE-6-CLUSTER-IP".to_owned()]).unwrap();
            let mut left = names().unwrap();
            left.sort();
            assert_eq!(left, ["KUBE-CLUSTER-IP-MINE", "blocked"]);
        };
        std::thread::spawn(test).join().unwrap();
    }
}
