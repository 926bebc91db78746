//! Packets of hostile senders: a pod with raw sockets, a machine on the uplink's segment, a host that reaches the overlay's
//! port. Each of them has to be dropped, for the right reason, and must leave no trace in any table.

mod content;
mod link;
mod tunnel;
mod unread;
mod uplink;

use crate::frame::Frame;
use crate::harness::{Lab, Net, OVERLAY, SHOT, Shot, each};
use anyhow::{Result, bail, ensure};
use rustnet_common::drop::{DropReason, hook};
use std::net::IpAddr;
use testkit::datapath::Input;

/// Dropped for one of these reasons, where the rules leave open which of two checks comes first.
fn dropped_as(shot: &Shot, reasons: &[DropReason]) -> Result<()> {
    match reasons.iter().find(|r| shot.counted.contains_key(&(**r as u8, shot.hook))) {
        Some(reason) => shot.dropped(*reason),
        None => shot.dropped(reasons[0]),
    }
}

/// Of a forged packet nothing may stay behind.
fn no_trace(lab: &Lab) -> Result<()> {
    let halves = lab.halves()?;
    ensure!(halves == 0, "{halves} entries in the connection table");
    Ok(())
}

/// A frame out of a tunnel with this far end and network identifier.
fn out_of_tunnel(lab: &Lab, remote: IpAddr, vni: u32, frame: &Frame) -> Result<Shot> {
    let bytes = frame.bytes();
    let input = Input { frame: &bytes, ifindex: OVERLAY, tunnel: Some(remote), vni, ..Input::default() };
    lab.raw(hook::OVERLAY_IN, &input)
}

/// Source and destination port of a frame without options or extension headers.
pub fn ports_of(net: Net, frame: &[u8]) -> Result<(u16, u16)> {
    let at = if net == Net::V4 { 34 } else { 54 };
    let Some([a, b, c, d]) = frame.get(at..at + 4) else { bail!("a frame of {} bytes has no ports", frame.len()) };
    Ok((u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d])))
}

/// Asserts that a packet passed, without saying how.
fn passed(shot: &Shot) -> Result<()> {
    ensure!(shot.verdict != SHOT, "dropped: {:?}", shot.counted);
    Ok(())
}
