//! Nanoseconds per packet by `BPF_PROG_TEST_RUN`, above a program that does nothing; on request next to another object's
//! programs, in turn with them.

use crate::stats::Sorted;
use anyhow::{Context, Result, ensure};
use etherparse::PacketBuilder;
use rustnet_common::addr::{Addr, Ip4, Ip6};
use rustnet_common::config::NodeConfig;
use rustnet_common::endpoint::Endpoint;
use rustnet_common::names::map;
use rustnet_common::peer::{Peer, PeerKey, flags};
use rustnet_common::tuple::proto;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use testkit::datapath::{Datapath, EMPTY, Input, Service, Timer, Vary, object_path, service_sizes};
use testkit::netns::{Holder, Own};

/// The interface of all pods here.
pub const POD: u32 = 21;
const MAC: [u8; 6] = [2, 0, 0, 0, 0x0a, 1];
const MAC_B: [u8; 6] = [2, 0, 0, 0, 0x0b, 1];
const MAC_HOST: [u8; 6] = [2, 0, 0, 0, 0xff, 1];
/// Sources, all of one pod: new flows need more of them than there are ports.
pub const A4: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 16);
const A6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x244, 0, 1, 0, 0, 0, 0x10);
/// A server.
pub const B4: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 200);
const B6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x244, 0, 1, 0, 0, 0, 0x200);
const FAR4: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 20);
const FAR6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x244, 0, 2, 0, 0, 0, 0x20);
const NODE4: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 11);
const NODE6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x18, 0, 0, 0, 0, 0, 0x11);
/// The first of 65,536 addresses out in the world (RFC 2544 sets them aside for benchmarks).
const WORLD: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 0);
const VIPS: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 0);
/// The port of all backends.
const BACKEND_PORT: u16 = 8080;
/// Bytes of a padded frame.
const FRAME: usize = 106;
/// The one service of TCP.
const TCP_VIP: Ipv4Addr = Ipv4Addr::new(10, 97, 0, 1);
const VIP6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 1);
/// First backend of the IPv6 service, behind those of all others.
const BACKEND6: u32 = 500_000;
/// Services of most cases.
const FEW_SERVICES: u32 = 10;
/// Backends of each service.
const BACKENDS: u32 = 3;
/// Offsets in a frame of the first address's last byte, the destination, and the source port.
const HOST4: u8 = 29;
const TO4: u8 = 30;
const PORT4: u8 = 34;
/// All ports that masquerade can have, and so few that they are soon taken.
const ALL_PORTS: (u16, u16) = (1024, 65_535);
const FEW_PORTS: (u16, u16) = (20_000, 21_023);
/// `TC_ACT_REDIRECT` and `TC_ACT_SHOT`.
const REDIRECT: i32 = 7;
const SHOT: i32 = 2;
/// Packets that fill the connection table, so that each new flow evicts an old one.
const FILL: u32 = 150_000;
/// A refused flow takes so many times as long as others that fewer packets have to do.
const SLOW: u32 = 10;

/// What to measure.
pub struct Extent {
    /// Runs of each measurement.
    pub runs: u32,
    /// Loads of the programs over which known flows are measured.
    pub loads: u32,
    /// Packets in a run.
    pub repeat: u32,
    /// Only rows whose names hold this.
    pub only: String,
    /// Another object whose programs are measured in turn with these.
    pub baseline: Option<PathBuf>,
}

/// An object under measurement.
pub struct Side {
    /// What it is called.
    pub name: &'static str,
    /// Its programs and maps.
    pub datapath: Datapath,
}

/// A row of the table.
pub struct Case {
    /// What it is called.
    pub name: &'static str,
    /// Services in the tables.
    services: u32,
    frame: Vec<u8>,
    /// What the two ends send before.
    before: Vec<Vec<u8>>,
    vary: Vary,
    /// Packets before the measurement.
    warm: u32,
    /// What the program must return.
    verdict: i32,
}

/// Measures all and prints it.
pub fn run(extent: &Extent) -> Result<()> {
    with_devices(|| measure(extent))
}

/// Runs a closure where the programs find the devices of their packets.
pub fn with_devices<T: Send>(measure: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let netns = Holder::new(&format!("rn{}-bench", std::process::id()), Own::default())?;
    netns.ip("link add rnva index 21 type veth peer name peera\nlink set rnva up\nlink set peera up")?;
    // The way into the world. No packet takes it: a run performs no redirect.
    netns.ip("addr add 172.18.0.11/24 dev rnva\nroute add default via 172.18.0.1 dev rnva")?;
    netns.sysctl("ipv4/ip_forward", "1")?;
    netns.run(measure)?
}

fn measure(extent: &Extent) -> Result<()> {
    let sides = load(extent)?;
    println!("| Object | Program | Verified instructions | Machine code, bytes | Load, ms |\n|---|---|---|---|---|");
    for side in &sides {
        for fact in side.datapath.facts() {
            let name = side.name;
            println!("| {name} | {} | {} | {} | {:.1} |", fact.program, fact.verified, fact.jited, fact.millis);
        }
    }
    let mut columns: Vec<String> = sides.iter().map(|side| format!("{}: least / median", side.name)).collect();
    if sides.len() > 1 {
        columns.push("Ratio: of the least / median of the rounds".to_owned());
    }
    println!("\n| from_pod, UDP, ns per packet above empty | Services | {} |", columns.join(" | "));
    println!("|---|---|{}", "---|".repeat(columns.len()));
    drop(sides);
    let cases = led()?.into_iter().filter(|case| case.name.contains(&extent.only));
    let (known, others): (Vec<_>, Vec<_>) = cases.partition(|case| case.services == FEW_SERVICES && case.warm == 1);
    let mut samples: Vec<Samples> = known.iter().map(|_| Samples::default()).collect();
    // What a known flow costs differs by a tenth with the addresses that the kernel chooses for the programs.
    for _ in 0..extent.loads.max(1) {
        let sides = load(extent)?;
        serve_all(&sides, 0, FEW_SERVICES)?;
        for (case, samples) in known.iter().zip(&mut samples) {
            sample(&sides, case, extent, samples)?;
        }
    }
    for (case, samples) in known.iter().zip(samples) {
        samples.print(case);
    }
    let sides = load(extent)?;
    let mut services = 0;
    for case in others {
        serve_all(&sides, services, case.services)?;
        services = case.services;
        row(&sides, &case, extent)?;
    }
    drop(sides);
    // With empty tables: what is refused evicts nothing.
    let sides = load(extent)?;
    let masqueraded = [(refused()?, FEW_PORTS), (accepted()?, ALL_PORTS)];
    for (case, ports) in masqueraded.into_iter().filter(|(case, _)| case.name.contains(&extent.only)) {
        for side in &sides {
            configure(&side.datapath, ports)?;
        }
        row(&sides, &case, extent)?;
    }
    println!("\nEmpty is a program that only restores the packet, as is done for each of the others, too.");
    Ok(())
}

/// The baseline, if there is one, and the object of this work tree, both filled.
fn load(extent: &Extent) -> Result<Vec<Side>> {
    let objects = extent.baseline.iter().map(|path| ("baseline", path.clone()));
    let sizes = service_sizes(131_072, 524_288);
    let sides = objects.chain([("this tree", object_path())]).map(|(name, path)| load_side(name, &path, &sizes));
    sides.collect()
}

/// An object with maps of these sizes, filled.
pub fn load_side(name: &'static str, path: &Path, sizes: &[(&str, u32)]) -> Result<Side> {
    let datapath = Datapath::load_object(path, sizes)?;
    fill(&datapath).with_context(|| format!("filling the maps of {}", path.display()))?;
    Ok(Side { name, datapath })
}

/// Flows within the cluster.
fn led() -> Result<Vec<Case>> {
    let vip4 = Ipv4Addr::from(u32::from(VIPS) + 1);
    let established = |name, services, frame| Case {
        name,
        services,
        frame,
        before: Vec::new(),
        vary: Vary::Nothing,
        warm: 1,
        verdict: REDIRECT,
    };
    let tcp = |name, port, to| -> Result<Case> {
        let (ask, answer) = ((MAC, (A4, port), to), (MAC_B, (B4, BACKEND_PORT), (A4, port)));
        let before = vec![
            tcp4(ask, true, false)?,
            tcp4(answer, true, true)?,
            tcp4(ask, false, true)?,
            tcp4(answer, false, true)?,
        ];
        Ok(Case { before, ..established(name, FEW_SERVICES, tcp4(ask, false, true)?) })
    };
    let flow = Vary::Flow { port: PORT4, host: HOST4 };
    let any = Vary::FlowAndAddress { port: PORT4, host: HOST4, to: TO4, first: u32::from(VIPS) };
    let new = |name, services, frame, vary| Case {
        name,
        services,
        frame,
        before: Vec::new(),
        vary,
        warm: FILL,
        verdict: REDIRECT,
    };
    Ok(vec![
        established("established, to a pod here, IPv4", FEW_SERVICES, udp4(B4, 80)?),
        tcp("established TCP, to a pod here, IPv4", 40_000, (B4, BACKEND_PORT))?,
        tcp("established TCP, to a service, IPv4", 40_001, (TCP_VIP, 80))?,
        established("established, to a pod here, IPv6", FEW_SERVICES, udp6(B6, 80)?),
        established("established, to a pod behind the overlay, IPv4", FEW_SERVICES, udp4(FAR4, 80)?),
        established("established, to a pod behind the overlay, IPv6", FEW_SERVICES, udp6(FAR6, 80)?),
        established("established, to a service, IPv4", FEW_SERVICES, udp4(vip4, 80)?),
        established("established, to a service, IPv6", FEW_SERVICES, udp6(VIP6, 80)?),
        new("new, to a pod here, IPv4", FEW_SERVICES, udp4(B4, 80)?, flow),
        new("new, to one service, IPv4", FEW_SERVICES, udp4(vip4, 80)?, flow),
        new("new, to one service, IPv4", 10_000, udp4(vip4, 80)?, flow),
        established("established, to a service, IPv4", 100_000, udp4(vip4, 80)?),
        new("new, to one service, IPv4", 100_000, udp4(vip4, 80)?, flow),
        new("new, to any of 65,536 services, IPv4", 100_000, udp4(vip4, 80)?, any),
    ])
}

/// A known flow and new ones from one pod here to another.
pub fn within_node() -> Result<[Case; 2]> {
    let case = |name, vary, warm| {
        let (before, verdict) = (Vec::new(), REDIRECT);
        anyhow::Ok(Case { name, services: 0, frame: udp4(B4, 80)?, before, vary, warm, verdict })
    };
    let flow = Vary::Flow { port: PORT4, host: HOST4 };
    Ok([case("established flow", Vary::Nothing, 1)?, case("new flow", flow, FILL)?])
}

/// New flows to one server outside, all of whose ports are taken.
fn refused() -> Result<Case> {
    let vary = Vary::Flow { port: PORT4, host: HOST4 };
    let name = "new, masqueraded, all ports taken: refused, IPv4";
    Ok(Case { name, services: 0, frame: udp4(WORLD, 53)?, before: Vec::new(), vary, warm: FILL / SLOW, verdict: SHOT })
}

/// New flows to many servers outside.
fn accepted() -> Result<Case> {
    let vary = Vary::FlowAndAddress { port: PORT4, host: HOST4, to: TO4, first: u32::from(WORLD) };
    let name = "new, masqueraded, to any of 65,536 servers: accepted, IPv4";
    Ok(Case { name, services: 0, frame: udp4(WORLD, 53)?, before: Vec::new(), vary, warm: FILL, verdict: REDIRECT })
}

fn udp4(to: Ipv4Addr, port: u16) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    let step = PacketBuilder::ethernet2(MAC, MAC_HOST).ipv4(A4.octets(), to.octets(), 64);
    step.udp(40_000, port).write(&mut out, &[7; 64])?;
    Ok(out)
}

/// A segment without data, in a frame with padding: each repetition is the next segment of its connection.
fn tcp4((mac, from, to): ([u8; 6], (Ipv4Addr, u16), (Ipv4Addr, u16)), syn: bool, ack: bool) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    let step = PacketBuilder::ethernet2(mac, MAC_HOST).ipv4(from.0.octets(), to.0.octets(), 64);
    // A SYN counts as a byte.
    let mut step = step.tcp(from.1, to.1, if syn { 1000 } else { 1001 }, 4096);
    if syn {
        step = step.syn();
    }
    if ack {
        step = step.ack(1001);
    }
    step.write(&mut out, &[])?;
    out.resize(FRAME, 0);
    Ok(out)
}

fn udp6(to: Ipv6Addr, port: u16) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    let step = PacketBuilder::ethernet2(MAC, MAC_HOST).ipv6(A6.octets(), to.octets(), 64);
    step.udp(40_000, port).write(&mut out, &[7; 64])?;
    Ok(out)
}

/// The runs of a case.
#[derive(Default)]
pub struct Samples {
    /// Of the empty program.
    pub base: Vec<f64>,
    /// Of each side.
    pub own: Vec<Vec<f64>>,
}

impl Samples {
    fn print(self, case: &Case) {
        let Self { base, own } = self;
        // The machine may change its pace from round to round: compared are runs of the same one.
        let paired = match &own[..] {
            [before, now] => {
                let rounds = base.iter().zip(before).zip(now);
                let ratios = rounds.map(|((base, before), now)| (now - base) / (before - base));
                Some(Sorted::new(ratios.collect()).median())
            }
            _ => None,
        };
        let base = Sorted::new(base);
        let above = |times: Vec<f64>| {
            let times = Sorted::new(times);
            (times.least() - base.least(), times.median() - base.median())
        };
        let own: Vec<(f64, f64)> = own.into_iter().map(above).collect();
        let mut columns: Vec<String> = own.iter().map(|(least, median)| format!("{least:.0} / {median:.0}")).collect();
        if let (Some(paired), [before, now]) = (paired, &own[..]) {
            columns.push(format!("{:.2} / {paired:.2}", now.0 / before.0));
        }
        println!("| {} | {} | {} |", case.name, case.services, columns.join(" | "));
    }
}

/// Measures a case and prints it.
fn row(sides: &[Side], case: &Case, extent: &Extent) -> Result<()> {
    let mut samples = Samples::default();
    sample(sides, case, extent, &mut samples)?;
    samples.print(case);
    Ok(())
}

/// Measures a case on all sides, turn by turn so that they see the same machine.
pub fn sample(sides: &[Side], case: &Case, extent: &Extent, samples: &mut Samples) -> Result<()> {
    let name = case.name;
    let input = Input { frame: &case.frame, ifindex: POD, ..Input::default() };
    let first = sides.first().context("nothing to measure")?;
    let mut empty = first.datapath.timer(EMPTY, &input, case.vary)?;
    let timer = |side: &Side| side.datapath.timer("from_pod", &input, case.vary);
    let mut timers: Vec<Timer> = sides.iter().map(timer).collect::<Result<_>>()?;
    for (timer, side) in timers.iter_mut().zip(sides) {
        for frame in &case.before {
            side.datapath.run("from_pod", &Input { frame, ..input })?;
        }
        timer.run(case.warm)?;
        let verdict = timer.run(1)?.1;
        ensure!(verdict == case.verdict, "{}: {name}: verdict {verdict}, not {}", side.name, case.verdict);
    }
    let repeat = if case.verdict == SHOT { extent.repeat.div_ceil(SLOW) } else { extent.repeat };
    samples.own.resize(sides.len(), Vec::new());
    for _ in 0..extent.runs.max(1) {
        samples.base.push(f64::from(empty.run(extent.repeat)?.0));
        for (timer, times) in timers.iter_mut().zip(&mut samples.own) {
            let (took, verdict) = timer.run(repeat)?;
            ensure!(verdict == case.verdict, "{name}: verdict {verdict} in the end, not {}", case.verdict);
            times.push(f64::from(took));
        }
    }
    Ok(())
}

fn configure(d: &Datapath, (snat_min, snat_max): (u16, u16)) -> Result<()> {
    let config = NodeConfig {
        node4: Ip4::from(NODE4),
        node6: Ip6::from(NODE6),
        mark: rustnet_common::config::mark::DEFAULT,
        mark_mask: rustnet_common::config::mark::DEFAULT_MASK,
        overlay_mtu: 1450,
        overlay: POD,
        overlay_port: 8472,
        snat_min,
        snat_max,
        vni: 1,
        hz: 1000,
        flags: rustnet_common::config::flags::MASQUERADE,
        ..bytemuck::Zeroable::zeroed()
    };
    d.table(map::CONFIG)?.put(&0_u32, &config)
}

fn fill(d: &Datapath) -> Result<()> {
    configure(d, ALL_PORTS)?;
    let endpoint = Endpoint { ifindex: POD, identity: 0, mac: MAC, host_mac: MAC_HOST, flags: 0, pad: 0 };
    let table = d.table::<Addr, Endpoint>(map::ENDPOINTS)?;
    for i in 0..16 {
        table.put(&Addr::from(IpAddr::V4(Ipv4Addr::from(u32::from(A4) + i))), &endpoint)?;
        table.put(&Addr::from(IpAddr::V6(Ipv6Addr::from(u128::from(A6) + u128::from(i)))), &endpoint)?;
    }
    for other in [IpAddr::V4(B4), IpAddr::V6(B6)] {
        table.put(&Addr::from(other), &Endpoint { mac: MAC_B, ..endpoint })?;
    }
    let node = Addr::from(IpAddr::V4(Ipv4Addr::new(172, 18, 0, 12)));
    let peer = Peer { node, identity: 0, flags: flags::POD | flags::TUNNEL, pad: 0 };
    d.table(map::PEERS4)?.put(&PeerKey { prefix_len: 24, data: Ip4::from(FAR4) }, &peer)?;
    d.table(map::PEERS6)?.put(&PeerKey { prefix_len: 64, data: Ip6::from(FAR6) }, &peer)?;
    let one = |vip: IpAddr, proto, id, first, backend: IpAddr| Service {
        vip,
        port: 80,
        proto,
        id,
        first,
        backends: vec![(backend, BACKEND_PORT).into()],
    };
    d.serve(&[
        one(VIP6.into(), proto::UDP, u32::MAX, BACKEND6, B6.into()),
        one(TCP_VIP.into(), proto::TCP, u32::MAX - 1, BACKEND6 + 1, B4.into()),
    ])
}

/// Adds services to the tables of all sides, which have some already.
fn serve_all(sides: &[Side], from: u32, to: u32) -> Result<()> {
    sides.iter().filter(|_| from < to).try_for_each(|side| serve(&side.datapath, from, to))
}

/// Services `from..to`, each with three backends, all of which are the same pod.
fn serve(d: &Datapath, from: u32, to: u32) -> Result<()> {
    let service = |n: u32| Service {
        vip: Ipv4Addr::from(u32::from(VIPS) + n).into(),
        port: 80,
        proto: proto::UDP,
        id: n + 1,
        first: n * BACKENDS,
        backends: vec![(B4, 8080).into(); BACKENDS as usize],
    };
    d.serve(&(from..to).map(service).collect::<Vec<_>>())
}
