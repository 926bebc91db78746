//! Routes to other nodes, and which of them tunnels take past the device.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use testkit::check::VXLAN_PORT;
use testkit::packet::{mac_of, neighbour_mac};
use testkit::pod::PORT;
use testkit::sniff::{Frame, Sniffer};
use testkit::stream::Stream;
use testkit::{Netns, wait};

use super::noise::exchange_until;
use super::{FEW, STREAM, all_device_packets, introduce_nodes};
use crate::fixture::Net;

/// Node 1's ways to node 2.
struct Ways {
    /// Node 2's address on the underlay.
    to: IpAddr,
    /// A router on the same segment.
    router: &'static str,
    /// MAC of node 2.
    direct: [u8; 6],
    /// MAC of the router.
    routed: [u8; 6],
}

fn ways(net: &Net) -> Result<Ways> {
    let (node, switch) = (net.node(1).netns(), net.fabric.switch());
    // A router that knows a shorter way tells so, and the kernel would take it.
    for link in ["all", "br0"] {
        switch.sysctl(&format!("ipv4/conf/{link}/send_redirects"), "0")?;
    }
    for link in ["all", "eth0"] {
        node.sysctl(&format!("ipv6/conf/{link}/accept_redirects"), "0")?;
    }
    introduce_nodes(net)?;
    let outer = usize::from(net.fabric.setup().ipv6_first);
    let (to, router) = (net.node(2).addresses()[outer], ["172.18.0.1", "fd00:18::1"][outer]);
    Ok(Ways { to, router, direct: neighbour_mac(node, "eth0", to)?, routed: mac_of(switch, "br0")? })
}

/// The way to the other node leads by its link, then by a router and back, and by a route that is
/// narrower than the link.
pub fn streams_survive_routes_that_change(net: &Net) -> Result<()> {
    let node = net.node(1).netns();
    let Ways { to, router, direct, routed } = ways(net)?;
    let mut changes = vec![
        (format!("route add {to} via {router}"), routed),
        (format!("route change {to} dev eth0"), direct),
        (format!("route change {to} via {router} mtu 1500"), routed),
        (format!("route del {to}"), direct),
        (format!("route add {to} via {router} metric 7"), routed),
        (format!("route add {to} dev eth0 metric 5"), direct),
        (format!("route del {to} metric 5"), routed),
        (format!("route del {to} metric 7"), direct),
    ];
    if to.is_ipv4() {
        // The device fragments outer packets. Over IPv6 it does not (docs/status.md).
        changes.push((format!("route add {to} dev eth0 mtu 1400"), direct));
        changes.push((format!("route del {to}"), direct));
    }
    let targets: Vec<SocketAddr> = net.c.addresses().iter().map(|ip| SocketAddr::new(*ip, STREAM)).collect();
    let stop = AtomicBool::new(false);
    let received: [[AtomicU64; 2]; 2] = Default::default();
    thread::scope(|scope| {
        let streams: Vec<_> = targets
            .iter()
            .zip(&received)
            .map(|(target, received)| {
                let is_enough = |_| stop.load(Ordering::Relaxed);
                let server = (net.c.netns(), *target);
                scope.spawn(move || exchange_until(net.a.netns(), server, *target, &is_enough, received))
            })
            .collect();
        let datagrams = net
            .c
            .addresses()
            .iter()
            .map(|ip| Stream::start(net.a.netns(), SocketAddr::new(*ip, PORT), 4, Duration::from_millis(1)));
        let changed = datagrams.collect::<Result<Vec<_>>>().and_then(|datagrams| {
            for (change, mac) in &changes {
                node.ip(&format!("{change}\n"))?;
                goes_on(node, &received, *mac).with_context(|| change.clone())?;
            }
            datagrams.into_iter().try_for_each(|stream| stream.stop()?.no_loss())
        });
        stop.store(true, Ordering::Relaxed);
        let ends = streams.into_iter().map(|stream| stream.join().unwrap_or_else(|_| bail!("panicked")));
        let ended = ends.collect::<Result<Vec<_>>>();
        changed.and(ended.map(drop))
    })
}

/// Waits until all packets of the tunnel leave a node for this MAC, and until all streams have brought more since.
fn goes_on(node: &Netns, received: &[[AtomicU64; 2]; 2], mac: [u8; 6]) -> Result<()> {
    const LOOK: usize = 50;
    let is_of_tunnel = |f: &Frame| f.outgoing && f.headers().is_some_and(|h| h.dport == VXLAN_PORT);
    wait::until("the packets take the new way", || {
        let wire = Sniffer::start_short(node, "eth0")?;
        let frames = wait::until("packets of the tunnel", || {
            let frames = wire.matching(LOOK, is_of_tunnel);
            ensure!(frames.len() == LOOK, "{} of {LOOK}", frames.len());
            Ok(frames)
        })?;
        let old = frames.iter().filter(|frame| !frame.bytes.starts_with(&mac)).count();
        ensure!(old == 0, "{old} of {LOOK} take another one");
        Ok(())
    })?;
    let counts = || received.iter().flatten().map(|count| count.load(Ordering::Relaxed)).collect::<Vec<_>>();
    let before = counts();
    wait::until("all streams go on", || {
        let now = counts();
        ensure!(now.iter().zip(&before).all(|(now, before)| *now >= before + (1 << 20)), "{before:?}, then {now:?}");
        Ok(())
    })
}

/// Source ports by which the programs ask the kernel, one for each way that they remember.
const ASKED: std::ops::Range<u16> = 0xc000..0xc004;

/// The next hops that the kernel chooses for packets from these ports.
fn next_hops(node: &Netns, from: IpAddr, to: IpAddr) -> Result<BTreeSet<String>> {
    let (from, to, dport) = (from.to_string(), to.to_string(), VXLAN_PORT.to_string());
    ASKED
        .map(|sport| {
            let sport = sport.to_string();
            let words = ["route", "get", &to, "from", &from, "ipproto", "udp", "sport", &sport, "dport", &dport];
            let text = node.exec("ip", &words)?;
            let via = text.split(" via ").nth(1).and_then(|rest| rest.split_whitespace().next());
            Ok(via.with_context(|| format!("no next hop: {text}"))?.to_owned())
        })
        .collect()
}

/// Where ports decide between equal routes, flows take all of these, and the packets of one flow take one.
pub fn flows_spread_over_equal_routes(net: &Net) -> Result<()> {
    const FLOWS: usize = 32;
    const LOOK: usize = 50 * FLOWS;
    let node = net.node(1).netns();
    let Ways { to, router, direct, routed } = ways(net)?;
    for family in ["ipv4", "ipv6"] {
        node.sysctl(&format!("{family}/fib_multipath_hash_policy"), "1")?;
    }
    node.ip(&format!("route add {to} nexthop via {router} dev eth0 onlink nexthop via {to} dev eth0 onlink\n"))?;
    node.exec("ping", &["-c", "1", router])?;
    // Four samples of a hash may all be the same.
    for seed in 1..=64 {
        if next_hops(node, net.node(1).address_like(to), to)?.len() == 2 {
            break;
        }
        ensure!(seed < 64, "the kernel gives all flows one next hop");
        node.sysctl("ipv4/fib_multipath_hash_seed", &seed.to_string())?;
    }
    let start = |n: usize| {
        let target = SocketAddr::new(net.c.addresses()[n % 2], PORT);
        Stream::start(net.a.netns(), target, 1, Duration::from_millis(10))
    };
    let streams = (0..FLOWS).map(start).collect::<Result<Vec<_>>>()?;
    wait::until("flows by both next hops, each by one", || {
        let before = all_device_packets(net)?;
        let wire = Sniffer::start_short(node, "eth0")?;
        let is_of_tunnel = |f: &Frame| f.outgoing && f.headers().is_some_and(|h| h.dport == VXLAN_PORT);
        let frames = wait::until("packets of the tunnel", || {
            let frames = wire.matching(LOOK, is_of_tunnel);
            ensure!(frames.len() == LOOK, "{} of {LOOK}", frames.len());
            Ok(frames)
        })?;
        let by_device = all_device_packets(net)? - before;
        ensure!(by_device <= FEW, "{by_device} packets took the device, which chooses by itself");
        let mut macs = BTreeMap::<u16, BTreeSet<&[u8]>>::new();
        for frame in &frames {
            let sport = frame.headers().context("no packet")?.sport;
            macs.entry(sport).or_default().insert(&frame.bytes[..6]);
        }
        ensure!(macs.values().all(|macs| macs.len() == 1), "a flow takes two ways: {macs:?}");
        let all: BTreeSet<&[u8]> = macs.into_values().flatten().collect();
        ensure!(all == BTreeSet::from([&direct[..], &routed[..]]), "{all:?}");
        Ok(())
    })?;
    streams.into_iter().try_for_each(|stream| stream.stop()?.no_loss())
}
