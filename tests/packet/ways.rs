//! Destinations to which there is no way that a packet may take: dropped or left to the stack, and
//! nothing is translated.

use crate::flows::{ALL, Proto, SERVED, from_a};
use crate::harness::{Net, OVERLAY_MTU, labs};
use anyhow::{Context, Result, ensure};
use rustnet_common::addr::{Ip4, Ip6};
use rustnet_common::config::NodeConfig;
use rustnet_common::drop::DropReason;
use std::net::IpAddr;

/// Loopback and "this network" are of no use beyond a machine: the host's local services would be
/// reached by pods (CVE-2020-8558).
#[test]
fn a_pod_to_loopback() -> Result<()> {
    labs(|lab, net| {
        let addresses: &[IpAddr] = match net {
            Net::V4 => &[[127, 0, 0, 1], [127, 1, 2, 3], [0, 0, 0, 0], [0, 1, 2, 3]].map(IpAddr::from),
            Net::V6 => &[net.ip([0; 4], "::1"), net.ip([0; 4], "::")],
        };
        for dst in addresses {
            for proto in ALL {
                let f = from_a(net, proto, (*dst, 10_248));
                let shot = lab.pod_sends(&f)?;
                shot.dropped(DropReason::Martian)
                    .or_else(|e| shot.dropped(DropReason::NoFib).map_err(|_| e))
                    .with_context(|| format!("{proto:?} to {dst}"))?;
            }
        }
        ensure!(lab.halves()? == 0, "tracked");
        Ok(())
    })
}

/// What the kernel's routes do not lead out of a device is the stack's as the pod sent it, and no
/// translation stays behind that would meet the stack's answer.
#[test]
fn no_way_leaves_no_translation() -> Result<()> {
    labs(|lab, net| {
        let (local, hole) = match net {
            Net::V4 => ("10.99.7.0/24", "10.99.8.0/24"),
            Net::V6 => ("fd00:99:7::/64", "fd00:99:8::/64"),
        };
        lab.ip(&format!("route replace local {local} dev lo\nroute replace blackhole {hole}"))?;
        for dst in [net.unreachable(), net.ip([10, 99, 7, 5], "fd00:99:7::5"), net.ip([10, 99, 8, 5], "fd00:99:8::5")] {
            for proto in ALL {
                let f = from_a(net, proto, (dst, proto.port(80)));
                lab.pod_sends(&f)?.to_stack(&f).with_context(|| format!("{proto:?} to {dst}"))?;
                let halves = lab.halves()?;
                ensure!(halves == 0, "{proto:?} to {dst}: {halves} entries in the connection table");
            }
        }
        Ok(())
    })
}

/// A route that encapsulates is none that a redirect takes, nor one for the stack: it would send
/// the pod's address out.
#[test]
fn a_way_that_encapsulates() -> Result<()> {
    labs(|lab, net| {
        lab.ip(match net {
            Net::V4 => "route replace 10.99.9.0/24 encap ip id 5 dst 172.18.0.13 dev eth0",
            Net::V6 => "route replace fd00:99:9::/64 encap ip6 id 5 dst fd00:18::13 dev eth0",
        })?;
        for proto in SERVED {
            let f = from_a(net, proto, (net.ip([10, 99, 9, 5], "fd00:99:9::5"), 80));
            lab.pod_sends(&f)?.dropped(DropReason::NoFib).with_context(|| format!("{proto:?}"))?;
        }
        ensure!(lab.halves()? == 0, "tracked");
        Ok(())
    })
}

fn without_address(config: &mut NodeConfig) {
    config.node4 = Ip4::from_word(0);
    config.node6 = Ip6::from_words([0; 4]);
}

/// A node without an address of the family cannot lend it.
#[test]
fn a_node_without_address() -> Result<()> {
    labs(|lab, net| {
        lab.configure(without_address)?;
        for proto in SERVED {
            let f = from_a(net, proto, (net.world(), 443));
            lab.pod_sends(&f)?.dropped(DropReason::NoFib).with_context(|| format!("{proto:?} to the world"))?;
            lab.serve(net.vip(1), 80, proto.number(net), 0, &[(net.a(), 8080)])?;
            let f = from_a(net, proto, (net.vip(1), 80));
            lab.pod_sends(&f)?.dropped(DropReason::NoFib).with_context(|| format!("{proto:?} to itself"))?;
            lab.serve(net.vip(2), 80, proto.number(net), 0, &[(net.world(), 8080)])?;
            let f = from_a(net, proto, (net.vip(2), 80));
            lab.pod_sends(&f)?.dropped(DropReason::NoFib).with_context(|| format!("{proto:?} to a service"))?;
        }
        ensure!(lab.halves()? == 0, "tracked");
        // Errors in the node's name are not sent, and counted as what they would have said.
        let f = from_a(net, Proto::Udp, (net.far(), 80));
        lab.pod_sends(&f.map(|f| f.ttl = 1))?.dropped(DropReason::TtlExceeded)?;
        lab.pod_sends(&f.with_length(OVERLAY_MTU + 1))?.dropped(DropReason::FragNeeded)?;
        // The rest goes on.
        lab.pod_sends(&f)?.onto_wire(&f.hop())
    })
}
