//! Netlink filters on clsact qdiscs: one direct-action classifier a direction, at our priority and handle, so that a
//! replace swaps the program atomically (`cls_bpf_change`).

use std::os::fd::{AsRawFd, BorrowedFd};

use anyhow::{Context, Result};
use rustnet_common::names::{PROGRAMS, TC_HANDLE, TC_PRIORITY};

use super::netlink::{CREATE, Message, Socket, attributes, number, text, unless};

/// Which way packets go past a hook, seen from the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Into the host.
    Ingress,
    /// Out of the host.
    Egress,
}

impl Direction {
    /// In and out.
    pub const BOTH: [Self; 2] = [Self::Ingress, Self::Egress];
}

/// `TCA_KIND`, `TCA_OPTIONS`.
const KIND: u16 = 1;
const OPTIONS: u16 = 2;
/// `TCA_BPF_FD`, `TCA_BPF_NAME`, `TCA_BPF_FLAGS`, `TCA_BPF_ID`.
const BPF_FD: u16 = 6;
const BPF_NAME: u16 = 7;
const BPF_FLAGS: u16 = 8;
const BPF_ID: u16 = 11;
/// `TCA_BPF_FLAG_ACT_DIRECT`.
const DIRECT_ACTION: u32 = 1;
/// `TC_H_CLSACT`.
const CLSACT: u32 = 0xffff_fff1;

/// `struct tcmsg`.
fn tcmsg(ifindex: u32, handle: u32, parent: u32, info: u32) -> [u8; 20] {
    let mut out = [0; 20];
    out[4..8].copy_from_slice(&ifindex.to_ne_bytes());
    out[8..12].copy_from_slice(&handle.to_ne_bytes());
    out[12..16].copy_from_slice(&parent.to_ne_bytes());
    out[16..20].copy_from_slice(&info.to_ne_bytes());
    out
}

/// `TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS or _EGRESS)`.
const fn parent(direction: Direction) -> u32 {
    match direction {
        Direction::Ingress => 0xffff_fff2,
        Direction::Egress => 0xffff_fff3,
    }
}

/// Priority and protocol (`ETH_P_ALL`, network order) as tcmsg has them.
const fn info() -> u32 {
    (TC_PRIORITY as u32) << 16 | (libc::ETH_P_ALL as u16).to_be() as u32
}

/// Has `prog` as our classifier on a device, in place of the one before. Makes the qdisc where there is none.
pub fn set_filter(
    socket: &mut Socket,
    ifindex: u32,
    direction: Direction,
    prog: BorrowedFd<'_>,
    name: &str,
) -> Result<()> {
    let qdisc = Message::new(libc::RTM_NEWQDISC, CREATE, &tcmsg(ifindex, CLSACT & 0xffff_0000, CLSACT, 0));
    // Also EEXIST when it is the older `ingress` qdisc: the filter below then names what is wrong.
    unless(socket.request(qdisc.string(KIND, "clsact")), &[libc::EEXIST])
        .with_context(|| format!("adding a clsact qdisc to interface {ifindex}"))?;
    let body = tcmsg(ifindex, TC_HANDLE, parent(direction), info());
    let filter = Message::new(libc::RTM_NEWTFILTER, libc::NLM_F_CREATE as u16, &body).string(KIND, "bpf");
    let filter = filter.nested(OPTIONS, |m| {
        m.u32(BPF_FD, prog.as_raw_fd().cast_unsigned()).string(BPF_NAME, name).u32(BPF_FLAGS, DIRECT_ACTION)
    });
    socket.request(filter).with_context(|| format!("adding classifier {name} to interface {ifindex}"))?;
    Ok(())
}

/// A classifier of ours on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// The name it was given: a program's.
    pub name: String,
    /// Id of the program that it runs.
    pub prog_id: u32,
}

/// Our classifier on a device; `None` when there is no such classifier (or no device).
pub fn filter(socket: &mut Socket, ifindex: u32, direction: Direction) -> Result<Option<Filter>> {
    let dump = Message::new(libc::RTM_GETTFILTER, 0, &tcmsg(ifindex, 0, parent(direction), 0));
    let filters = match socket.dump(dump) {
        Ok(filters) => filters,
        Err(e) if matches!(e.errno(), Some(libc::ENODEV | libc::EINVAL | libc::ENOENT)) => return Ok(None),
        Err(e) => return Err(e).with_context(|| format!("listing the classifiers of interface {ifindex}")),
    };
    Ok(filters.iter().find_map(|filter| ours(&filter.body)))
}

/// True if a classifier has one of our programs' names; on devices with several uplinks, the device follows it.
fn is_our_name(name: &str) -> bool {
    PROGRAMS
        .iter()
        .any(|program| name.strip_prefix(program).is_some_and(|rest| rest.is_empty() || rest.starts_with('_')))
}

/// A filter, if it has our priority, handle, type and one of our names: others use the first handle, too.
fn ours(body: &[u8]) -> Option<Filter> {
    let (head, rest) = body.split_at_checked(20)?;
    if number(&head[8..])? != TC_HANDLE || number(&head[16..])? != info() {
        return None;
    }
    let kind = attributes(rest).find(|(kind, _)| *kind == KIND).map(|(_, v)| text(v));
    let options = attributes(rest).find(|(kind, _)| *kind == OPTIONS)?.1;
    let prog_id = attributes(options).find(|(kind, _)| *kind == BPF_ID).and_then(|(_, v)| number(v))?;
    let name = attributes(options).find(|(kind, _)| *kind == BPF_NAME).map(|(_, v)| text(v))?;
    (kind.as_deref() == Some("bpf") && is_our_name(&name)).then_some(Filter { name, prog_id })
}

/// Removes our classifier from a device; true when it was there. The qdisc stays: removing it loses packets, and it may
/// carry filters of others.
pub fn remove_filter(socket: &mut Socket, ifindex: u32, direction: Direction) -> Result<bool> {
    if filter(socket, ifindex, direction)?.is_none() {
        return Ok(false);
    }
    let body = tcmsg(ifindex, TC_HANDLE, parent(direction), info());
    let delete = Message::new(libc::RTM_DELTFILTER, 0, &body).string(KIND, "bpf");
    unless(socket.request(delete), &[libc::ENOENT, libc::ENODEV])
        .with_context(|| format!("removing our classifier from interface {ifindex}"))
}
