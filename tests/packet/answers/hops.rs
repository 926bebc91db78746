//! Packets whose last hop this node is: it reports that their time is exceeded, for redirects
//! bypass the kernel.

use crate::errors::icmp_error;
use crate::flows::{ALL, Proto, from_a, from_outside};
use crate::frame::Frame;
use crate::harness::{Net, REDIRECT, each, labs};
use anyhow::{Context, Result, ensure};
use rustnet_common::drop::DropReason;
use std::net::IpAddr;

/// Time exceeded, from this node.
fn time_exceeded(net: Net, f: &Frame) -> Frame {
    let (kind, code) = if net == Net::V4 { (11, 0) } else { (3, 0) };
    icmp_error(f, net.node(), kind, code, 0)
}

/// One of each way there is.
fn destinations(net: Net) -> [IpAddr; 4] {
    [net.b(), net.far(), net.routed(), net.world()]
}

#[test]
fn the_last_hop_is_reported() -> Result<()> {
    labs(|lab, net| {
        each(&ALL, |proto| {
            for dst in destinations(net) {
                for ttl in [0, 1] {
                    let f = from_a(net, proto, (dst, proto.port(80))).map(|f| f.ttl = ttl);
                    lab.pod_sends(&f)?
                        .answered(DropReason::TtlExceeded, &time_exceeded(net, &f))
                        .with_context(|| format!("to {dst}"))?;
                }
                let f = from_a(net, proto, (dst, proto.port(80))).map(|f| f.ttl = 2);
                let shot = lab.pod_sends(&f)?;
                ensure!(shot.verdict == REDIRECT, "two hops are enough");
            }
            // To this node itself no hop is needed.
            let f = from_a(net, proto, (net.node(), proto.port(80))).map(|f| f.ttl = 1);
            lab.pod_sends(&f)?.to_stack(&f)
        })
    })
}

/// The error quotes what the client sent, not what it became.
#[test]
fn the_last_hop_on_the_way_to_a_service() -> Result<()> {
    labs(|lab, net| {
        lab.serve(net.vip(1), 80, 17, 0, &[(net.b(), 8080)])?;
        let f = from_a(net, Proto::Udp, (net.vip(1), 80)).map(|f| f.ttl = 1);
        lab.pod_sends(&f)?.answered(DropReason::TtlExceeded, &time_exceeded(net, &f))
    })
}

/// Through the uplink and through the overlay, errors of ours find their way back.
#[test]
fn the_last_hop_of_what_comes_from_outside() -> Result<()> {
    labs(|lab, net| {
        let f = from_outside(Proto::Udp, (net.routed(), 1234), (net.b(), 80)).map(|f| f.ttl = 1);
        lab.uplink_in(&f)?.answered(DropReason::TtlExceeded, &time_exceeded(net, &f))?;
        let f = from_outside(Proto::Udp, (net.far(), 1234), (net.b(), 80)).map(|f| f.ttl = 1);
        lab.overlay_in(net.node2(), &f)?.answered(DropReason::TtlExceeded, &time_exceeded(net, &f))
    })
}
