//! Permanent neighbours: the pods' addresses on their veths, which nobody could resolve otherwise.

use std::net::IpAddr;

use anyhow::{Context, Result};

use super::address::{family, from_octets, octets};
use super::netlink::{Message, REPLACE, Socket, attributes, number};

/// `NDA_DST`, `NDA_LLADDR`.
const DST: u16 = 1;
const LLADDR: u16 = 2;
/// `NUD_PERMANENT`.
const PERMANENT: u16 = 0x80;

/// `NUD_REACHABLE`, `NUD_STALE`, `NUD_DELAY`, `NUD_PROBE`: somebody has answered.
const LEARNT: u16 = 0x02 | 0x04 | 0x08 | 0x10;

/// A neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Neighbour {
    /// The interface.
    pub ifindex: u32,
    /// Its address.
    pub ip: IpAddr,
    /// Its MAC.
    pub mac: [u8; 6],
}

/// `struct ndmsg`.
fn ndmsg(family: u8, ifindex: u32, state: u16) -> [u8; 12] {
    let mut out = [0; 12];
    out[0] = family;
    out[4..8].copy_from_slice(&ifindex.to_ne_bytes());
    out[8..10].copy_from_slice(&state.to_ne_bytes());
    out
}

/// All permanent neighbours, both families.
pub fn list(socket: &mut Socket) -> Result<Vec<Neighbour>> {
    let replies = socket.dump(Message::new(libc::RTM_GETNEIGH, 0, &ndmsg(0, 0, 0))).context("listing neighbours")?;
    Ok(replies.iter().filter_map(|reply| parse(&reply.body, PERMANENT)).collect())
}

/// All neighbours whose MAC the kernel has learnt, both families.
pub fn learnt(socket: &mut Socket) -> Result<Vec<Neighbour>> {
    let replies = socket.dump(Message::new(libc::RTM_GETNEIGH, 0, &ndmsg(0, 0, 0))).context("listing neighbours")?;
    Ok(replies.iter().filter_map(|reply| parse(&reply.body, LEARNT)).collect())
}

/// A neighbour in one of these states.
fn parse(body: &[u8], states: u16) -> Option<Neighbour> {
    let (head, rest) = body.split_at_checked(12)?;
    let find = |wanted| attributes(rest).find(|(kind, _)| *kind == wanted).map(|(_, v)| v);
    if u16::from_ne_bytes([head[8], head[9]]) & states == 0 {
        return None;
    }
    let mac = find(LLADDR)?.try_into().ok()?;
    Some(Neighbour { ifindex: number(&head[4..])?, ip: from_octets(find(DST)?)?, mac })
}

/// Adds a permanent neighbour, in place of any other of the same address.
pub fn put(socket: &mut Socket, neighbour: &Neighbour) -> Result<()> {
    let Neighbour { ifindex, ip, mac } = neighbour;
    let body = ndmsg(family(*ip), *ifindex, PERMANENT);
    let put = Message::new(libc::RTM_NEWNEIGH, REPLACE, &body).attr(DST, &octets(*ip)).attr(LLADDR, mac);
    socket.request(put).with_context(|| format!("adding the neighbour {ip} on interface {ifindex}"))?;
    Ok(())
}
