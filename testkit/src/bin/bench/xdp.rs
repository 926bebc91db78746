//! Packets a second on one CPU: known flows from outside to a node port whose backend is reached by the same device.
//!
//! One veth pair. Its far end sends frames that stand ready (`BPF_F_TEST_XDP_LIVE_FRAMES`), and drops and counts what comes back. So each
//! figure has the cost of both ends in it, which the rows that only send back show.

use crate::stats::{Sorted, verdict};
use anyhow::{Context, Result, ensure};
use etherparse::PacketBuilder;
use rustnet_agent::bpf::probe;
use rustnet_agent::bpf::store::Map;
use rustnet_agent::bpf::sys::{self, Layout, TestRun, instruction};
use rustnet_common::addr::{Addr, Address, Ip4, Ip6};
use rustnet_common::backend::{Backend, id};
use rustnet_common::config::{self, NodeConfig};
use rustnet_common::drop::hook;
use rustnet_common::names::map;
use rustnet_common::peer::{Peer, PeerKey, flags};
use rustnet_common::service::{SvcEntry, SvcKey, scope};
use rustnet_common::tuple::proto;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Instant;
use testkit::datapath::Datapath;
use testkit::netns::{Holder, Own};
use testkit::packet::stay_on_one_cpu;

/// The node's end of the veth pair, and the other one.
const NODE: u32 = 21;
const FAR: u32 = 22;
const MAC_NODE: [u8; 6] = [2, 0, 0, 0, 0xff, 1];
const MAC_FAR: [u8; 6] = [2, 0, 0, 0, 0xee, 1];
const NODE_PORT: u16 = 30_080;
const TARGET: u16 = 8080;
/// The first of the clients' ports, as many as the mask says and one more.
const FIRST_PORT: u16 = 20_000;
const PORTS: u32 = 0x3ff;
/// A frame of the shortest length.
const FRAME: u8 = 64;
/// Part of the packets that have to come back.
const RETURNED: f64 = 0.9;

/// What kube-proxy has in nftables mode for one such Service, and no others.
const RULES: &str = "\
    table ip bench {
      chain endpoint { meta l4proto udp dnat to 10.244.3.30:8080; }
      chain service { meta mark set meta mark or 0x4000; numgen random mod 1 vmap { 0 : goto endpoint }; }
      map ports { type inet_proto . inet_service : verdict; elements = { udp . 30080 : goto service }; }
      map services { type ipv4_addr . inet_proto . inet_service : verdict; }
      chain prerouting {
        type nat hook prerouting priority -100;
        ip daddr . meta l4proto . th dport vmap @services
        ip daddr 172.18.0.11 meta l4proto . th dport vmap @ports
      }
      chain postrouting {
        type nat hook postrouting priority 100;
        meta mark & 0x4000 == 0x4000 meta mark set meta mark xor 0x4000 masquerade fully-random
      }
    }";

/// Measures so many rounds of so many packets each, and prints.
pub fn run(rounds: u32, packets: u32) -> Result<()> {
    println!("## XDP (`cargo xtask bench xdp`)\n");
    println!(
        "Millions of packets a second on one CPU, {} UDP flows to a node port, {FRAME} octets each: median of {rounds} rounds, in turn.\n",
        PORTS + 1
    );
    let netns = Holder::new(&format!("rn{}-bench-xdp", std::process::id()), Own::default())?;
    let far = Holder::new(&format!("rn{}-bench-far", std::process::id()), Own::default())?;
    netns.ip(&format!(
        "link add eth0 index {NODE} address 02:00:00:00:ff:01 type veth peer name far index {FAR} address 02:00:00:00:ee:01 netns {}\n\
         link set eth0 up\nlink set lo up\naddr add 172.18.0.11/24 dev eth0\naddr add fd00:18::11/64 dev eth0 nodad\n\
         route add default via 172.18.0.1\nroute add default via fd00:18::1\n\
         route add 10.244.3.0/24 via 172.18.0.1\nroute add fd00:244:0:3::/64 via fd00:18::1\n\
         neigh add 172.18.0.1 lladdr 02:00:00:00:ee:01 dev eth0 nud permanent\n\
         neigh add fd00:18::1 lladdr 02:00:00:00:ee:01 dev eth0 nud permanent\n",
        far.pid()
    ))?;
    far.ip("link set far up\n")?;
    netns.sysctl("ipv4/ip_forward", "1")?;
    netns.sysctl("ipv6/conf/all/forwarding", "1")?;
    stay_on_one_cpu()?;
    for net in [Net::V4, Net::V6] {
        measure(net, &netns, &far, rounds, packets).with_context(|| format!("{net:?}"))?;
    }
    Ok(())
}

/// A family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Net {
    V4,
    V6,
}

impl Net {
    fn ip(self, v4: [u8; 4], v6: &str) -> Result<IpAddr> {
        Ok(match self {
            Self::V4 => IpAddr::V4(Ipv4Addr::from(v4)),
            Self::V6 => IpAddr::V6(v6.parse::<Ipv6Addr>()?),
        })
    }

    fn node(self) -> Result<IpAddr> {
        self.ip([172, 18, 0, 11], "fd00:18::11")
    }

    fn backend(self) -> Result<IpAddr> {
        self.ip([10, 244, 3, 30], "fd00:244:0:3::30")
    }

    /// A datagram of a client outside. The first two octets of its payload make up for the port, so that all have one checksum.
    fn frame(self) -> Result<Vec<u8>> {
        let builder = PacketBuilder::ethernet2(MAC_FAR, MAC_NODE);
        let builder = match (self.ip([192, 0, 2, 10], "2001:db8:2::10")?, self.node()?) {
            (IpAddr::V4(from), IpAddr::V4(to)) => builder.ipv4(from.octets(), to.octets(), 64),
            (IpAddr::V6(from), IpAddr::V6(to)) => builder.ipv6(from.octets(), to.octets(), 64),
            _ => anyhow::bail!("two families"),
        };
        let mut payload = vec![0; usize::from(FRAME - self.port_at() - 8)];
        payload[..2].copy_from_slice(&(!FIRST_PORT).to_be_bytes());
        let mut frame = Vec::new();
        builder.udp(FIRST_PORT, NODE_PORT).write(&mut frame, &payload)?;
        ensure!(frame.len() == usize::from(FRAME), "a frame of {} octets", frame.len());
        Ok(frame)
    }

    /// Offset of the client's port in the frame.
    fn port_at(self) -> u8 {
        if self == Self::V4 { 34 } else { 54 }
    }
}

const MOV: u8 = 0xb7;
const MOV_REG: u8 = 0xbf;
const ADD: u8 = 0x07;
const AND: u8 = 0x57;
const XOR: u8 = 0xa7;
const SWAP_16: u8 = 0xdc;
const STORE_WORD: u8 = 0x62;
const STORE_HALF_REG: u8 = 0x6b;
const LOAD_WORD: u8 = 0x61;
const LOAD_IMM64: u8 = 0x18;
const JUMP_IF_GREATER: u8 = 0x2d;
const JUMP_IF_ZERO: u8 = 0x15;
const ATOMIC_ADD: u8 = 0xdb;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
const MAP_LOOKUP: u32 = 1;
const RANDOM: u32 = 7;
const REDIRECT: u32 = 23;
/// `XDP_DROP` and `XDP_TX`.
const DROP: u32 = 1;
const TX: u32 = 3;

/// Writes a frame of one of the flows, and sends it.
fn sender(net: Net) -> Result<OwnedFd> {
    let port = i16::from(net.port_at());
    let mut code = vec![
        instruction(LOAD_WORD, 6, 1, 0, 0),
        instruction(LOAD_WORD, 8, 1, 4, 0),
        instruction(MOV_REG, 2, 6, 0, 0),
        instruction(ADD, 2, 0, 0, FRAME.into()),
        instruction(MOV, 0, 0, 0, DROP),
        // To the end.
        instruction(JUMP_IF_GREATER, 2, 8, i16::from(FRAME / 4 + 8), 0),
    ];
    for (i, word) in (0_i16..).zip(net.frame()?.chunks_exact(4)) {
        code.push(instruction(STORE_WORD, 6, 0, i * 4, u32::from_ne_bytes([word[0], word[1], word[2], word[3]])));
    }
    code.extend([
        instruction(CALL, 0, 0, 0, RANDOM),
        instruction(AND, 0, 0, 0, PORTS),
        instruction(ADD, 0, 0, 0, u32::from(FIRST_PORT)),
        instruction(SWAP_16, 0, 0, 0, 16),
        instruction(STORE_HALF_REG, 6, 0, port, 0),
        instruction(XOR, 0, 0, 0, 0xffff),
        instruction(STORE_HALF_REG, 6, 0, port + 8, 0),
        instruction(MOV, 0, 0, 0, TX),
        instruction(EXIT, 0, 0, 0, 0),
    ]);
    sys::prog_load_xdp("sender", &code).context("cannot load the sender")
}

/// Drops and counts.
fn sink(counter: &OwnedFd) -> Result<OwnedFd> {
    const PSEUDO_MAP_FD: u8 = 1;
    let code = [
        instruction(STORE_WORD, 10, 0, -4, 0),
        instruction(MOV_REG, 2, 10, 0, 0),
        instruction(ADD, 2, 0, 0, (-4_i32).cast_unsigned()),
        instruction(LOAD_IMM64, 1, PSEUDO_MAP_FD, 0, counter.as_raw_fd().cast_unsigned()),
        0,
        instruction(CALL, 0, 0, 0, MAP_LOOKUP),
        instruction(JUMP_IF_ZERO, 0, 0, 2, 0),
        instruction(MOV, 1, 0, 0, 1),
        instruction(ATOMIC_ADD, 0, 1, 0, 0),
        instruction(MOV, 0, 0, 0, DROP),
        instruction(EXIT, 0, 0, 0, 0),
    ];
    sys::prog_load_xdp("sink", &code).context("cannot load the sink")
}

/// What the node has on its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    BareXdp,
    Xdp,
    BareTc,
    Tc,
    Netfilter,
}

impl Way {
    const ALL: [Self; 5] = [Self::BareXdp, Self::Xdp, Self::BareTc, Self::Tc, Self::Netfilter];

    fn title(self) -> &'static str {
        match self {
            Self::BareXdp => "XDP that only sends back",
            Self::Xdp => "rustnet, XDP",
            Self::BareTc => "TC that only sends back",
            Self::Tc => "rustnet, TC",
            Self::Netfilter => "nf_conntrack and the rules of kube-proxy (nftables) for this Service alone",
        }
    }

    /// The programs or rules, until the result is dropped.
    fn prepare(self, node: &Holder, datapath: &Datapath) -> Result<Vec<OwnedFd>> {
        let netfilter = if self == Self::Netfilter { RULES } else { "flush ruleset" };
        node.command("nft")?.args([netfilter]).text()?;
        node.run(|| -> Result<Vec<OwnedFd>> {
            match self {
                Self::BareXdp => {
                    let code = [instruction(MOV, 0, 0, 0, TX), instruction(EXIT, 0, 0, 0, 0)];
                    let program = sys::prog_load_xdp("bare", &code)?;
                    Ok(vec![sys::link_create_xdp(program.as_fd(), NODE)?])
                }
                Self::Xdp => {
                    let mut links = datapath.attach_uplink(NODE)?;
                    links.push(datapath.attach_xdp(NODE)?);
                    Ok(links)
                }
                Self::BareTc => {
                    let code = [
                        instruction(MOV, 1, 0, 0, NODE),
                        instruction(MOV, 2, 0, 0, 0),
                        instruction(CALL, 0, 0, 0, REDIRECT),
                        instruction(EXIT, 0, 0, 0, 0),
                    ];
                    let program = sys::prog_load_sched_cls("bare", &code)?;
                    Ok(vec![sys::link_create_tcx(program.as_fd(), NODE, sys::TCX_INGRESS)?])
                }
                Self::Tc => datapath.attach_uplink(NODE),
                Self::Netfilter => Ok(Vec::new()),
            }
        })?
    }
}

fn measure(net: Net, node: &Holder, far: &Holder, rounds: u32, packets: u32) -> Result<()> {
    let datapath = node.run(|| Datapath::load(&[]))??;
    fill(&datapath, net)?;
    let layout = Layout { kind: 2, key_size: 4, value_size: 8, max_entries: 1, flags: 0 };
    let counter = sys::map_create("rn_sunk", layout)?;
    let counted = Map::<u32, u64>::from_fd(counter.try_clone()?, "rn_sunk")?;
    let (sender, sink) = (sender(net)?, sink(&counter)?);
    let _sink = far.run(|| sys::link_create_xdp(sink.as_fd(), FAR))??;
    // The node's end takes frames without an XDP program of its own, too.
    node.command("ethtool")?.args(["-K", "eth0", "gro", "on"]).text()?;
    let send = |count: u32| -> Result<f64> {
        let before = counted.get(&0)?.context("no counter")?;
        let start = Instant::now();
        far.run(|| {
            let mut context = [0, FRAME.into(), 0, FAR, 0, 0];
            let run = TestRun {
                packet: &[0; FRAME as usize],
                out: &mut [],
                context: &mut context,
                repeat: count,
                flags: sys::LIVE_FRAMES,
            };
            sys::test_run(sender.as_fd(), run)
        })?
        .context("sending")?;
        let took = start.elapsed().as_secs_f64();
        let back = f64::from(u32::try_from(counted.get(&0)?.context("no counter")? - before)?);
        ensure!(back >= RETURNED * f64::from(count), "{back} of {count} packets have come back");
        Ok(back / took / 1e6)
    };
    let mut results = vec![Vec::new(); Way::ALL.len()];
    for round in 0..rounds {
        for (way, results) in Way::ALL.into_iter().zip(&mut results) {
            if way == Way::Netfilter && net == Net::V6 {
                continue;
            }
            let _links = way.prepare(node, &datapath)?;
            // All flows are known afterwards.
            let warm = || send(64 * (PORTS + 1)).map(drop);
            warm().with_context(|| format!("{way:?}, round {round}"))?;
            let before = datapath.counts()?;
            results.push(send(packets).with_context(|| format!("{way:?}, round {round}"))?);
            let after = datapath.counts()?;
            let count = |code: u8| {
                let of =
                    |counts: &std::collections::BTreeMap<(u8, u8), u64>| counts.get(&(0, code)).copied().unwrap_or(0);
                of(&after) - of(&before)
            };
            let by = [hook::UPLINK_XDP, hook::UPLINK_IN].map(count);
            let want = match way {
                Way::Xdp => by[0] >= u64::from(packets) * 9 / 10,
                Way::Tc => by[1] >= u64::from(packets) * 9 / 10 && by[0] == 0,
                _ => by == [0, 0],
            };
            ensure!(want, "{way:?}: XDP has sent {} packets, TC {}", by[0], by[1]);
        }
    }
    let medians: Vec<f64> =
        results.into_iter().map(|it| if it.is_empty() { f64::NAN } else { Sorted::new(it).median() }).collect();
    println!("| {net:?} | Mpps | ns a packet |\n|---|---|---|");
    for (way, median) in Way::ALL.into_iter().zip(&medians).filter(|(_, median)| !median.is_nan()) {
        println!("| {} | {median:.2} | {:.0} |", way.title(), 1e3 / median);
    }
    let [bare_xdp, xdp, _, tc, netfilter] = medians[..] else { anyhow::bail!("rows") };
    let above = 1e3 / xdp - 1e3 / bare_xdp;
    println!(
        "\nXDP above a program that only sends back: {above:.0} ns (goal 100: {}). XDP to TC: {:.2} (goal 3: {}).",
        verdict(above <= 100.0),
        xdp / tc,
        verdict(xdp >= 3.0 * tc)
    );
    if !netfilter.is_nan() {
        println!("TC to netfilter: {:.2} (goal 2: {}).", tc / netfilter, verdict(tc >= 2.0 * netfilter));
    }
    println!();
    Ok(())
}

/// The node's settings, and one Service with a backend elsewhere.
fn fill(d: &Datapath, net: Net) -> Result<()> {
    let (node, backend) = (net.node()?, net.backend()?);
    let mut config = NodeConfig {
        mark: config::mark::DEFAULT,
        mark_mask: config::mark::DEFAULT_MASK,
        snat_min: 32_768,
        snat_max: 60_999,
        hz: probe::hz()?,
        flags: config::flags::MASQUERADE | config::flags::EXTERNAL,
        ..bytemuck::Zeroable::zeroed()
    };
    let peer = |flags| Peer { node: Addr::UNSPECIFIED, identity: 0, flags, pad: 0 };
    let entry = SvcEntry { first: 0, count: 1, id: 1, affinity: 0, flags: 0, table: 0 };
    let (port, udp, scope) = (NODE_PORT, proto::UDP, scope::EXTERNAL);
    match (node, backend) {
        (IpAddr::V4(node), IpAddr::V4(pod)) => {
            config.node4 = Ip4::from(node);
            d.table(map::PEERS4)?.put(&PeerKey { prefix_len: 32, data: Ip4::from(node) }, &peer(flags::HOST))?;
            d.table(map::PEERS4)?.put(&PeerKey { prefix_len: 32, data: Ip4::from(pod) }, &peer(flags::POD))?;
            d.table(map::SVC4)?.put(&SvcKey { vip: Ip4::from(node), port, proto: udp, scope }, &entry)?;
        }
        (IpAddr::V6(node), IpAddr::V6(pod)) => {
            config.node6 = Ip6::from(node);
            d.table(map::PEERS6)?.put(&PeerKey { prefix_len: 128, data: Ip6::from(node) }, &peer(flags::HOST))?;
            d.table(map::PEERS6)?.put(&PeerKey { prefix_len: 128, data: Ip6::from(pod) }, &peer(flags::POD))?;
            d.table(map::SVC6)?.put(&SvcKey { vip: Ip6::from(node), port, proto: udp, scope }, &entry)?;
        }
        _ => anyhow::bail!("two families"),
    }
    d.table(map::CONFIG)?.put(&0_u32, &config)?;
    let id = id::make(0, 1);
    let value = Backend { addr: Addr::from(backend), port: TARGET, flags: 0, id, service: 1, max_service: 0 };
    d.table(map::BACKENDS)?.put(&0_u32, &value)?;
    d.table(map::BACKEND_IDS)?.put(&0_u32, &id)
}
