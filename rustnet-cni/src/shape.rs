//! Queues that limit bandwidth: a token bucket filter (TBF) at the root of one end of a veth, made and read by netlink.
//!
//! On the host's end it limits what the pod receives, on the pod's end what it sends. It goes when the device goes.

use crate::attach::tcmsg;
use crate::netlink::{Message, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, Refused, Socket};
use crate::types::error::Error;
use libc::{TCA_KIND, TCA_OPTIONS};
use netlink_packet_core::Emitable;
use netlink_packet_route::tc::{TcHandle, TcHeader};
use rustnet_common::files::Limit;

const KIND: &str = "tbf";
const TC_H_ROOT: u32 = 0xffff_ffff;
/// `1:`, as people write it.
const HANDLE: u32 = 0x1_0000;
const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;
const TC_LINKLAYER_ETHERNET: u8 = 1;
/// Offsets in `struct tc_tbf_qopt`: two `struct tc_ratespec` of twelve bytes, limit, buffer, mtu.
const QOPT: usize = 36;
const QOPT_LINKLAYER: usize = 1;
const QOPT_RATE: usize = 8;
const QOPT_LIMIT: usize = 24;
/// How long a packet waits at most behind a bucket's worth of others, in milliseconds; what the reference plugin takes.
const LATENCY_MS: u64 = 25;

/// A bucket in the kernel's units. The burst cannot be read back as it was set (the kernel tells a time that overflows); the
/// limit holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bucket {
    /// Bytes a second.
    rate: u64,
    /// Bytes that may wait.
    limit: u32,
}

fn bucket(limit: Limit) -> Bucket {
    let (rate, burst) = (limit.rate / 8, limit.burst / 8);
    let waiting = (rate / 1000).saturating_mul(LATENCY_MS).saturating_add(burst);
    Bucket { rate, limit: u32::try_from(waiting).unwrap_or(u32::MAX) }
}

/// Puts the queue on a link that has none.
pub fn add(socket: &mut Socket, index: u32, limit: Limit) -> Result<(), Error> {
    let Bucket { rate, limit: waiting } = bucket(limit);
    let burst = u32::try_from(limit.burst / 8).unwrap_or(u32::MAX);
    let mut parms = [0; QOPT];
    parms[QOPT_LINKLAYER] = TC_LINKLAYER_ETHERNET;
    let low = u32::try_from(rate).unwrap_or(u32::MAX);
    parms[QOPT_RATE..QOPT_RATE + 4].copy_from_slice(&low.to_ne_bytes());
    parms[QOPT_LIMIT..QOPT_LIMIT + 4].copy_from_slice(&waiting.to_ne_bytes());
    let header = tcmsg(index, HANDLE, TC_H_ROOT, 0);
    let what = format!("limit the bandwidth to {} bit/s (qdisc {KIND})", limit.rate);
    let message = Message::new(what, libc::RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, &header)
        .text(TCA_KIND, KIND)
        .nested(TCA_OPTIONS, |m| {
            let m = m.attr(TCA_TBF_PARMS, &parms).u32(TCA_TBF_BURST, burst);
            if rate > u64::from(u32::MAX) { m.attr(TCA_TBF_RATE64, &rate.to_ne_bytes()) } else { m }
        });
    socket.run(vec![message]).map(drop).map_err(explained)
}

/// The kernel says "no such file" to a kind of queue that it does not have and finds no module for.
fn explained(refused: Refused) -> Error {
    let unknown = refused.errno == libc::ENOENT;
    let e = Error::from(refused);
    if unknown {
        return e.details(format!(
            "the kernel has no token bucket filter: install and load the module sch_{KIND} (CONFIG_NET_SCH_TBF), or take \
             the annotations kubernetes.io/ingress-bandwidth and egress-bandwidth off the pod"
        ));
    }
    e
}

/// What is wrong with the queue of a link, if anything is.
pub fn wrong(socket: &mut Socket, index: u32, limit: Limit) -> Result<Option<String>, Refused> {
    let want = bucket(limit);
    let dump = Message::new("list qdiscs", libc::RTM_GETQDISC, NLM_F_DUMP, &tcmsg(index, 0, 0, 0));
    for reply in socket.run(vec![dump])? {
        let Ok(header) = TcHeader::parse(&reply.body) else { continue };
        let attrs = reply.attrs(header.buffer_len());
        let root = reply.kind == libc::RTM_NEWQDISC
            && header.index == index.cast_signed()
            && header.parent == TcHandle::from(TC_H_ROOT);
        if !root || attrs.text(TCA_KIND) != Some(KIND) {
            continue;
        }
        let options = attrs.nested(TCA_OPTIONS);
        let parms = options.get(TCA_TBF_PARMS).unwrap_or_default();
        let number = |at: usize| parms.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_ne_bytes);
        let large = options.get(TCA_TBF_RATE64).and_then(|b| b.try_into().ok()).map(u64::from_ne_bytes);
        let rate = large.or(number(QOPT_RATE).map(u64::from)).unwrap_or_default();
        let found = Bucket { rate, limit: number(QOPT_LIMIT).unwrap_or_default() };
        let differs = || format!("lets {} bytes/s through and {} wait, not {want:?}", found.rate, found.limit);
        return Ok((found != want).then(differs));
    }
    Ok(Some("is not limited any more".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::{Bucket, bucket, explained};
    use crate::netlink::Refused;
    use rustnet_common::files::Limit;

    #[test]
    fn the_reference_plugins_latency_of_25_ms() {
        for ((rate, burst), want) in [
            ((8_000_000, 800_000), (1_000_000, 125_000)),
            ((1000, 12_112), (125, 1514)),
            ((100_000_000_000, 8_000_000), (12_500_000_000, 313_500_000)),
            ((1_000_000_000_000_000, u64::from(u32::MAX) * 8), (125_000_000_000_000, u32::MAX)),
        ] {
            let (rate, limit) = (bucket(Limit { rate, burst }), Bucket { rate: want.0, limit: want.1 });
            assert_eq!(rate, limit);
        }
    }

    #[test]
    fn a_kernel_without_the_module_is_distinguished_from_other_refusals() {
        let text = |errno| explained(Refused::new("qdisc", errno)).to_string();
        assert!(text(libc::ENOENT).contains("sch_tbf") && text(libc::ENOENT).contains("annotations"));
        assert!(!text(libc::EINVAL).contains("sch_tbf"));
    }
}
