//! What pods must not get away with: foreign addresses, foreign MACs, tunnels of their own.

use crate::fixture::{Net, in_each_routing};
use anyhow::{Result, ensure};
use rustnet_common::drop::DropReason;
use std::net::{IpAddr, SocketAddr};
use testkit::check::VXLAN_PORT;
use testkit::packet::{Macs, echo, mac_of, neighbour_mac, send, tcp_syn, udp, vxlan};
use testkit::sniff::Sniffer;
use testkit::{Pod, wait};

in_each_routing!(
    a_foreign_source_address_goes_nowhere,
    a_foreign_source_mac_goes_nowhere,
    a_tunnel_packet_of_a_pod_goes_nowhere,
);

/// The pod's own MAC and that of its gateway.
fn macs(pod: &Pod) -> Result<Macs> {
    let gateway: IpAddr = IpAddr::from(rustnet_common::names::GATEWAY4);
    Ok(Macs { from: mac_of(pod.netns(), "eth0")?, to: neighbour_mac(pod.netns(), "eth0", gateway)? })
}

/// Waits until a counter has grown by `by`.
fn counted(net: &Net, reason: DropReason, before: u64, by: u64) -> Result<()> {
    wait::until(&format!("{} counted", reason.name()), || {
        let now = net.node(1).counter(reason)?;
        ensure!(now >= before + by, "{} is {now}, was {before}, expected {by} more", reason.name());
        Ok(())
    })
}

fn a_foreign_source_address_goes_nowhere(net: &Net) -> Result<()> {
    let macs = macs(&net.a)?;
    let victims = [&net.b, &net.c].map(|p| Sniffer::start(p.netns(), "eth0"));
    let before = net.node(1).counter(DropReason::Spoofed)?;
    let mut frames = Vec::new();
    for to in [&net.b, &net.c] {
        for (address, foreign) in
            to.addresses().iter().zip([["203.0.113.9", "10.244.1.99"], ["2001:db8:9::9", "fd00:244:0:1::99"]])
        {
            for source in foreign {
                let (from, to) = (SocketAddr::new(source.parse()?, 4444), SocketAddr::new(*address, 5555));
                frames.push(udp(macs, from, to, b"spoofed")?);
                frames.push(tcp_syn(macs, from, to)?);
                frames.push(echo(macs, from.ip(), to.ip())?);
            }
        }
    }
    ensure!(frames.len() == 24, "{} frames", frames.len());
    send(net.a.netns(), "eth0", frames.iter().map(Vec::as_slice))?;
    counted(net, DropReason::Spoofed, before, 24)?;
    for victim in victims {
        victim?.none("a spoofed packet arrived", |h| h.sport == 4444 || h.src.to_string().starts_with("203."))?;
    }
    let connections = net.node(1).rustnetctl(&["ct", "list", "-o", "json"])?;
    ensure!(!connections.contains("203.0.113.9"), "a spoofed packet has a connection entry: {connections}");
    Ok(())
}

fn a_foreign_source_mac_goes_nowhere(net: &Net) -> Result<()> {
    let macs = Macs { from: [2, 0xba, 0xd0, 0, 0, 1], ..macs(&net.a)? };
    let victim = Sniffer::start(net.b.netns(), "eth0")?;
    let before = net.node(1).counter(DropReason::Spoofed)?;
    let mut frames = Vec::new();
    for address in net.b.addresses() {
        let from = SocketAddr::new(net.a.address_like(*address)?, 4445);
        frames.push(udp(macs, from, SocketAddr::new(*address, 5555), b"spoofed")?);
    }
    send(net.a.netns(), "eth0", frames.iter().map(Vec::as_slice))?;
    counted(net, DropReason::Spoofed, before, 2)?;
    victim.none("a packet with a foreign MAC arrived", |h| h.sport == 4445)
}

/// A pod that speaks VXLAN to the other node could pretend to be any pod.
fn a_tunnel_packet_of_a_pod_goes_nowhere(net: &Net) -> Result<()> {
    let macs = macs(&net.a)?;
    let victim = Sniffer::start(net.c.netns(), "eth0")?;
    let wire = Sniffer::start(net.node(2).netns(), "eth0")?;
    let before = net.node(1).counter(DropReason::EncapProhibited)?;
    for (target, inner_to) in net.node(2).addresses().into_iter().zip(net.c.addresses()) {
        let inner_from = SocketAddr::new(net.b.address_like(*inner_to)?, 4446);
        let inner = udp(
            Macs { from: [2, 0, 0, 0, 0, 1], to: [2, 0, 0, 0, 0, 2] },
            inner_from,
            SocketAddr::new(*inner_to, 5555),
            b"smuggled",
        )?;
        let from = SocketAddr::new(net.a.address_like(target)?, 40_000);
        let outer = udp(macs, from, SocketAddr::new(target, VXLAN_PORT), &vxlan(1, &inner))?;
        send(net.a.netns(), "eth0", [outer.as_slice()])?;
    }
    counted(net, DropReason::EncapProhibited, before, 2)?;
    victim.none("a smuggled packet arrived", |h| h.sport == 4446)?;
    wire.none("a pod's tunnel packet is on the wire", |h| h.sport == 40_000 && h.dport == VXLAN_PORT)
}
