//! Netlink filters on clsact qdiscs: one direct-action classifier a direction, at our priority and handle, so that a
//! replace swaps the program atomically (`cls_bpf_change`).

use std::os::fd::{AsRawFd, BorrowedFd};

use anyhow::{Context, Result, bail};
use netlink_packet_core::{Emitable, NLM_F_CREATE, Parseable, parse_string};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcHeader, TcMessage, TcOption,
};
use rustnet_common::names::{PROGRAMS, TC_HANDLE, TC_PRIORITY};

use super::netlink::{CHANGE, CREATE, Socket, attributes, unless, value};

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

/// A message about a device's classifiers or qdiscs.
fn message(ifindex: u32, parent: TcHandle, handle: TcHandle, info: u32, attributes: Vec<TcAttribute>) -> TcMessage {
    let index = ifindex.cast_signed();
    TcMessage::from_parts(TcHeader { index, handle, parent, info, ..TcHeader::default() }, attributes)
}

/// Our classifier.
fn ours(ifindex: u32, direction: Direction, options: Vec<TcFilterBpfOption>) -> TcMessage {
    let mut attributes = vec![TcAttribute::Kind(TcFilterBpf::KIND.to_owned())];
    if !options.is_empty() {
        attributes.push(TcAttribute::Options(options.into_iter().map(TcOption::Bpf).collect()));
    }
    message(ifindex, parent(direction), TC_HANDLE.into(), info(), attributes)
}

const fn parent(direction: Direction) -> TcHandle {
    let minor = match direction {
        Direction::Ingress => TcHandle::MIN_INGRESS,
        Direction::Egress => TcHandle::MIN_EGRESS,
    };
    TcHandle { minor, ..TcHandle::CLSACT }
}

/// Priority and protocol (`ETH_P_ALL`, network order) as tcmsg has them.
const fn info() -> u32 {
    (TC_PRIORITY as u32) << 16 | (libc::ETH_P_ALL as u16).to_be() as u32
}

/// Has `prog` as our classifier on a device. Makes the qdisc where there is none. `replace`: one of ours is there and gives
/// way; without, the kernel refuses the place when another program's classifier has it.
pub fn set_filter(
    socket: &mut Socket,
    ifindex: u32,
    direction: Direction,
    prog: BorrowedFd<'_>,
    name: &str,
    replace: bool,
) -> Result<()> {
    let handle = TcHandle { minor: 0, ..TcHandle::CLSACT };
    let qdisc = message(ifindex, TcHandle::CLSACT, handle, 0, vec![TcAttribute::Kind("clsact".to_owned())]);
    let is_new = unless(socket.request(&RouteNetlinkMessage::NewQueueDiscipline(qdisc), CREATE), &[libc::EEXIST])
        .with_context(|| format!("adding a clsact qdisc to interface {ifindex}"))?;
    // The kernel would take the classifier, and put it into the place of the one for the other direction.
    if !is_new && direction == Direction::Egress && has_ingress_qdisc(socket, ifindex)? {
        bail!(
            "adding classifier {name} to interface {ifindex}: another program has put the older qdisc `ingress` there, which is for \
             one direction only: remove it (`tc qdisc del dev DEV ingress`), or let that program use clsact"
        );
    }
    let options = vec![
        TcFilterBpfOption::ProgFd(prog.as_raw_fd().cast_unsigned()),
        TcFilterBpfOption::ProgName(name.to_owned()),
        TcFilterBpfOption::Flags(TcBpfFlags::DirectAction),
    ];
    let filter = RouteNetlinkMessage::NewTrafficFilter(ours(ifindex, direction, options));
    match socket.request(&filter, if replace { NLM_F_CREATE } else { CREATE }) {
        Ok(()) => Ok(()),
        Err(e) if e.errno() == Some(libc::EEXIST) => Err(e).with_context(|| {
            format!(
                "adding classifier {name} to interface {ifindex}: another program's has priority {TC_PRIORITY} and handle \
                 {TC_HANDLE} (`tc filter show`): remove it, or give it another priority"
            )
        }),
        Err(e) => Err(e).with_context(|| format!("adding classifier {name} to interface {ifindex}")),
    }
}

/// True if a device has the qdisc `ingress` where clsact would be.
fn has_ingress_qdisc(socket: &mut Socket, ifindex: u32) -> Result<bool> {
    let kind = |body: &[u8]| {
        let header = TcHeader::parse(body).ok()?;
        let is_here = header.index == ifindex.cast_signed() && header.parent == TcHandle::CLSACT;
        let kind = attributes(&body[header.buffer_len()..]).find(|attribute| attribute.kind() == KIND)?;
        parse_string(kind.value()).ok().filter(|_| is_here)
    };
    let all = message(ifindex, TcHandle::UNSPEC, TcHandle::UNSPEC, 0, Vec::new());
    let there = socket.dump(&RouteNetlinkMessage::GetQueueDiscipline(all), kind).context("listing qdiscs")?;
    Ok(there.iter().any(|kind| kind == "ingress"))
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
    let all = message(ifindex, parent(direction), TcHandle::UNSPEC, 0, Vec::new());
    match socket.dump(&RouteNetlinkMessage::GetTrafficFilter(all), parse) {
        Ok(filters) => Ok(filters.into_iter().next()),
        Err(e) if matches!(e.errno(), Some(libc::ENODEV | libc::EINVAL | libc::ENOENT)) => Ok(None),
        Err(e) => Err(e).with_context(|| format!("listing the classifiers of interface {ifindex}")),
    }
}

/// True if a classifier has one of our programs' names; on devices with several uplinks, the device follows it.
fn is_our_name(name: &str) -> bool {
    PROGRAMS
        .iter()
        .any(|program| name.strip_prefix(program).is_some_and(|rest| rest.is_empty() || rest.starts_with('_')))
}

/// A filter, if it has our priority, handle, type and one of our names: others use the first handle, too.
fn parse(body: &[u8]) -> Option<Filter> {
    let header = TcHeader::parse(body).ok()?;
    if header.handle != TC_HANDLE.into() || header.info != info() {
        return None;
    }
    let find = |wanted| attributes(&body[header.buffer_len()..]).find(|attribute| attribute.kind() == wanted);
    if parse_string(find(KIND)?.value()).ok()? != TcFilterBpf::KIND {
        return None;
    }
    let (mut name, mut prog_id) = (None, None);
    for option in attributes(value(find(OPTIONS)?)) {
        match TcFilterBpfOption::parse(&option) {
            Ok(TcFilterBpfOption::ProgName(text)) => name = Some(text),
            Ok(TcFilterBpfOption::ProgId(id)) => prog_id = Some(id),
            _ => {}
        }
    }
    Some(Filter { name: name.filter(|name| is_our_name(name))?, prog_id: prog_id? })
}

/// Removes our classifier from a device; true when it was there. The qdisc stays: removing it loses packets, and it may
/// carry filters of others.
pub fn remove_filter(socket: &mut Socket, ifindex: u32, direction: Direction) -> Result<bool> {
    if filter(socket, ifindex, direction)?.is_none() {
        return Ok(false);
    }
    let delete = RouteNetlinkMessage::DelTrafficFilter(ours(ifindex, direction, Vec::new()));
    unless(socket.request(&delete, CHANGE), &[libc::ENOENT, libc::ENODEV])
        .with_context(|| format!("removing our classifier from interface {ifindex}"))
}
