//! Nanoseconds for a packet by `BPF_PROG_TEST_RUN`, above a program that does nothing.

use anyhow::{Context, Result, ensure};
use etherparse::PacketBuilder;
use rustnet_common::addr::{Addr, Ip4, Ip6};
use rustnet_common::backend::{Backend, id};
use rustnet_common::config::NodeConfig;
use rustnet_common::endpoint::Endpoint;
use rustnet_common::names::map;
use rustnet_common::peer::{Peer, PeerKey, flags};
use rustnet_common::service::{SvcEntry, SvcKey};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use testkit::datapath::{Datapath, EMPTY, Input, Timer, Vary};
use testkit::netns::{Holder, Own};

const POD: u32 = 21;
const MAC: [u8; 6] = [2, 0, 0, 0, 0x0a, 1];
const MAC_HOST: [u8; 6] = [2, 0, 0, 0, 0xff, 1];
/// Sources, all of one pod: new flows need more of them than there are ports.
const A4: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 16);
const A6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x244, 0, 1, 0, 0, 0, 0x10);
const B4: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 200);
const B6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x244, 0, 1, 0, 0, 0, 0x200);
const FAR4: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 20);
const VIPS: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 0);
const VIP6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 1);
/// Offsets in a frame of the first address's last byte, the destination, and the source port.
const HOST4: u8 = 29;
const TO4: u8 = 30;
const PORT4: u8 = 34;

/// Measures all and prints it.
pub fn run(runs: u32, repeat: u32) -> Result<()> {
    let netns = Holder::new(&format!("rn{}-bench", std::process::id()), Own::default())?;
    netns.ip("link add rnva index 21 type veth peer name peera\nlink set rnva up\nlink set peera up")?;
    netns.run(|| measure(runs, repeat))?
}

fn measure(runs: u32, repeat: u32) -> Result<()> {
    let sizes = [(map::SVC4, 131_072), (map::BACKEND_IDS, 524_288), (map::BACKENDS, 524_288)];
    let datapath = Datapath::load(&sizes)?;
    println!("| Program | Verified instructions | Machine code, bytes | Load, ms |\n|---|---|---|---|");
    for fact in datapath.facts() {
        println!("| {} | {} | {} | {:.1} |", fact.program, fact.verified, fact.jited, fact.millis);
    }
    fill(&datapath)?;

    let udp4 = |to: Ipv4Addr, port: u16| -> Result<Vec<u8>> {
        let mut out = Vec::new();
        let step = PacketBuilder::ethernet2(MAC, MAC_HOST).ipv4(A4.octets(), to.octets(), 64);
        step.udp(40_000, port).write(&mut out, &[7; 64])?;
        Ok(out)
    };
    let udp6 = |to: Ipv6Addr, port: u16| -> Result<Vec<u8>> {
        let mut out = Vec::new();
        let step = PacketBuilder::ethernet2(MAC, MAC_HOST).ipv6(A6.octets(), to.octets(), 64);
        step.udp(40_000, port).write(&mut out, &[7; 64])?;
        Ok(out)
    };
    let vip4 = Ipv4Addr::from(u32::from(VIPS) + 1);
    let flow = Vary::Flow { port: PORT4, host: HOST4 };
    let any = Vary::FlowAndAddress { port: PORT4, host: HOST4, to: TO4, first: u32::from(VIPS) };
    let one = Vary::Nothing;

    println!(
        "\n| from_pod, UDP, one packet | Services | Least, ns | Median, ns | Above empty, ns |\n|---|---|---|---|---|"
    );
    let mut services = 0;
    let rows: [(&str, u32, Vec<u8>, Vary); 11] = [
        ("established, to a pod here, IPv4", 10, udp4(B4, 80)?, one),
        ("established, to a pod here, IPv6", 10, udp6(B6, 80)?, one),
        ("established, to a pod behind the overlay, IPv4", 10, udp4(FAR4, 80)?, one),
        ("established, to a service, IPv4", 10, udp4(vip4, 80)?, one),
        ("established, to a service, IPv6", 10, udp6(VIP6, 80)?, one),
        ("new, to a pod here, IPv4", 10, udp4(B4, 80)?, flow),
        ("new, to one service, IPv4", 10, udp4(vip4, 80)?, flow),
        ("new, to one service, IPv4", 10_000, udp4(vip4, 80)?, flow),
        ("established, to a service, IPv4", 100_000, udp4(vip4, 80)?, one),
        ("new, to one service, IPv4", 100_000, udp4(vip4, 80)?, flow),
        ("new, to any of 65,536 services, IPv4", 100_000, udp4(vip4, 80)?, any),
    ];
    for (name, wanted, frame, vary) in rows {
        while services < wanted {
            serve(&datapath, services, wanted)?;
            services = wanted;
        }
        let input = Input { frame: &frame, ifindex: POD, ..Input::default() };
        let mut empty = datapath.timer(EMPTY, &input, vary)?;
        let mut timer = datapath.timer("from_pod", &input, vary)?;
        // Opens the flow, or fills the table so that each new one evicts an old one.
        let (_, verdict) = timer.run(if vary == one { 1 } else { 150_000 })?;
        ensure!(verdict == 7, "{name}: verdict {verdict}");
        let (base, own) = interleaved(&mut empty, &mut timer, runs, repeat).context(name)?;
        let (least, median) = (own[0], own[own.len() / 2]);
        println!("| {name} | {services} | {least} | {median} | {} |", i64::from(least) - i64::from(base[0]));
    }
    let frame = udp4(B4, 80)?;
    let input = Input { frame: &frame, ifindex: POD, ..Input::default() };
    let mut empty = datapath.timer(EMPTY, &input, one)?;
    let mut all: Vec<u32> = (0..runs).map(|_| empty.run(repeat).map(|r| r.0)).collect::<Result<_>>()?;
    all.sort_unstable();
    println!("| (the empty program, which restores the packet, too) | | {} | {} | 0 |", all[0], all[all.len() / 2]);
    Ok(())
}

/// Turn by turn, so that both see the same machine; sorted.
fn interleaved(a: &mut Timer, b: &mut Timer, runs: u32, repeat: u32) -> Result<(Vec<u32>, Vec<u32>)> {
    let (mut of_a, mut of_b) = (Vec::new(), Vec::new());
    for _ in 0..runs.max(1) {
        of_a.push(a.run(repeat)?.0);
        of_b.push(b.run(repeat)?.0);
    }
    of_a.sort_unstable();
    of_b.sort_unstable();
    Ok((of_a, of_b))
}

fn fill(d: &Datapath) -> Result<()> {
    let config = NodeConfig {
        node4: Ip4::from(Ipv4Addr::new(172, 18, 0, 11)),
        node6: Ip6::from(Ipv6Addr::new(0xfd00, 0x18, 0, 0, 0, 0, 0, 0x11)),
        uplink_mtu: 1500,
        overlay_mtu: 1450,
        overlay: POD,
        overlay_port: 8472,
        snat_min: 1024,
        snat_max: 65_535,
        vni: 1,
        hz: 1000,
        flags: rustnet_common::config::flags::MASQUERADE,
        ..bytemuck::Zeroable::zeroed()
    };
    d.table(map::CONFIG)?.put(&0_u32, &config)?;
    let endpoint = Endpoint { ifindex: POD, identity: 0, mac: MAC, host_mac: MAC_HOST, flags: 0, pad: 0 };
    let table = d.table::<Addr, Endpoint>(map::ENDPOINTS)?;
    for i in 0..16 {
        table.put(&Addr::from(IpAddr::V4(Ipv4Addr::from(u32::from(A4) + i))), &endpoint)?;
        table.put(&Addr::from(IpAddr::V6(Ipv6Addr::from(u128::from(A6) + u128::from(i)))), &endpoint)?;
    }
    for other in [IpAddr::V4(B4), IpAddr::V6(B6)] {
        table.put(&Addr::from(other), &Endpoint { mac: [2, 0, 0, 0, 0x0b, 1], ..endpoint })?;
    }
    let node = Addr::from(IpAddr::V4(Ipv4Addr::new(172, 18, 0, 12)));
    let peer = Peer { node, identity: 0, flags: flags::POD | flags::TUNNEL, pad: 0 };
    d.table(map::PEERS4)?.put(&PeerKey { prefix_len: 24, data: Ip4::from(FAR4) }, &peer)?;
    let b6 = Backend {
        addr: Addr::from(IpAddr::V6(B6)),
        port: 8080,
        flags: 0,
        id: id::make(500_000, 1),
        service: 500_000,
        pad: 0,
    };
    d.table(map::BACKENDS)?.put(&500_000_u32, &b6)?;
    d.table(map::BACKEND_IDS)?.put(&500_000_u32, &b6.id)?;
    let entry = SvcEntry { first: 500_000, count: 1, id: b6.service, affinity: 0, flags: 0, pad: 0 };
    d.table(map::SVC6)?.put(&SvcKey { vip: Ip6::from(VIP6), port: 80, proto: 17, scope: 0 }, &entry)
}

/// Services `from..to`, each with three backends, all of which are the same pod.
fn serve(d: &Datapath, from: u32, to: u32) -> Result<()> {
    let addr = Addr::from(IpAddr::V4(B4));
    let (mut entries, mut backends, mut ids) = (Vec::new(), Vec::new(), Vec::new());
    for n in from..to {
        let key = SvcKey { vip: Ip4::from(Ipv4Addr::from(u32::from(VIPS) + n)), port: 80, proto: 17, scope: 0 };
        entries.push((key, SvcEntry { first: n * 3, count: 3, id: n + 1, affinity: 0, flags: 0, pad: 0 }));
        for slot in n * 3..n * 3 + 3 {
            let id = id::make(slot, 1);
            backends.push((slot, Backend { addr, port: 8080, flags: 0, id, service: n + 1, pad: 0 }));
            ids.push((slot, id));
        }
    }
    d.table(map::BACKENDS)?.put_all(&backends)?;
    d.table(map::BACKEND_IDS)?.put_all(&ids)?;
    d.table(map::SVC4)?.put_all(&entries)
}
