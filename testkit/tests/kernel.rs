//! The fabric proven over the kernel's own networking: no agent, no eBPF. What fails here is the testkit's fault.

use anyhow::{Result, ensure};
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use testkit::client::{Connection, ask, ask_sized};
use testkit::icmp::{Ping, Reply, TIME_EXCEEDED, reachable};
use testkit::load::{Kind, Load};
use testkit::packet::{Macs, mac_of, neighbour_mac, send, udp};
use testkit::server::Server;
use testkit::sniff::Sniffer;
use testkit::{Fabric, Proto, Setup, Topology};

const PORT: u16 = 8080;

fn routed() -> Result<Fabric> {
    Fabric::build(Setup { topology: Topology::Routed { core_mtu: 1400 }, ..Setup::default() })
}

#[test]
fn nodes_and_the_world_reach_each_other_in_both_families() -> Result<()> {
    for fabric in [Fabric::build(Setup::default())?, routed()?] {
        let (one, two) = (fabric.node(1), fabric.node(2));
        let _server = Server::start(two.netns(), "two", PORT)?;
        for address in two.addresses() {
            reachable(one.netns(), address)?;
            for proto in Proto::ALL {
                let target = SocketAddr::new(address, PORT);
                let answers = ask(one.netns(), proto, target, 5)?;
                answers.only_by(&["two"])?;
                answers.only_as(one.address_like(address))?;
                ask(fabric.world(), proto, target, 2)?.only_by(&["two"])?;
            }
        }
    }
    Ok(())
}

#[test]
fn a_closed_port_is_refused_and_a_lost_packet_is_not_an_answer() -> Result<()> {
    let fabric = Fabric::build(Setup::default())?;
    let target = SocketAddr::new(fabric.node(2).v4().into(), 9);
    for proto in Proto::ALL {
        ask(fabric.node(1).netns(), proto, target, 2)?.all_failed(ErrorKind::ConnectionRefused)?;
    }
    let nobody: SocketAddr = "192.0.2.99:9".parse()?;
    let answers = ask(fabric.world(), Proto::Udp, nobody, 1)?;
    ensure!(answers.answered() == 0 && answers.errors.len() == 1, "{answers}");
    Ok(())
}

#[test]
fn a_traceroute_finds_the_routers() -> Result<()> {
    let fabric = routed()?;
    let (one, two) = (fabric.node(1), fabric.node(2));
    for to in two.addresses() {
        let first: IpAddr = if to.is_ipv4() { "172.18.1.1".parse()? } else { "fd00:18:0:1::1".parse()? };
        let reply = Ping { ttl: 1, ..Ping::default() }.send(one.netns(), to)?;
        let Reply::Error { from, kind, .. } = reply else { anyhow::bail!("expected an error: {reply:?}") };
        ensure!(from == first && TIME_EXCEEDED.contains(&kind), "{reply:?}");
        let reply = Ping { ttl: 3, ..Ping::default() }.send(one.netns(), to)?;
        ensure!(matches!(reply, Reply::Echo { from, .. } if from == to), "{reply:?}");
    }
    Ok(())
}

#[test]
fn a_narrow_core_is_reported_to_senders() -> Result<()> {
    let fabric = routed()?;
    let (one, two) = (fabric.node(1), fabric.node(2));
    let big = Ping { size: 1450, dont_fragment: true, ..Ping::default() };
    let reply = big.send(one.netns(), two.v4().into())?;
    let Reply::Error { kind: 3, code: 4, rest, .. } = reply else { anyhow::bail!("no MTU reported: {reply:?}") };
    ensure!(rest & 0xffff == 1400, "MTU {rest}");
    let _server = Server::start(two.netns(), "two", PORT)?;
    for address in two.addresses() {
        let mut connection = Connection::open_in(one.netns(), SocketAddr::new(address, PORT))?;
        connection.upload(300_000)?;
        connection.download(300_000)?;
    }
    Ok(())
}

#[test]
fn captures_see_everything_and_checksums_are_verified() -> Result<()> {
    let fabric = Fabric::build(Setup::default())?;
    let (one, two) = (fabric.node(1), fabric.node(2));
    let _server = Server::start(two.netns(), "two", PORT)?;
    let sniffer = Sniffer::start(two.netns(), "eth0")?;
    for address in two.addresses() {
        for proto in Proto::ALL {
            ask_sized(one.netns(), proto, SocketAddr::new(address, PORT), 2, 3000)?.all_answered()?;
        }
        reachable(one.netns(), address)?;
    }
    sniffer.wait_for("fragments of 3000 bytes", |h| h.fragment)?;
    let capture = sniffer.stop();
    ensure!(capture.frames().len() > 30, "only {} frames", capture.frames().len());
    capture.verify_checksums()?;
    Ok(())
}

#[test]
fn a_wrong_checksum_is_found_and_a_hand_made_packet_arrives() -> Result<()> {
    let fabric = Fabric::build(Setup::default())?;
    let (one, two) = (fabric.node(1), fabric.node(2));
    reachable(one.netns(), two.v4().into())?;
    let macs = Macs { from: mac_of(one.netns(), "eth0")?, to: neighbour_mac(one.netns(), "eth0", two.v4().into())? };
    let from: SocketAddr = "198.51.100.7:4000".parse()?;
    let mut frame = udp(macs, from, SocketAddr::new(two.v4().into(), 5000), b"hello")?;
    let sniffer = Sniffer::start(two.netns(), "eth0")?;
    send(one.netns(), "eth0", [frame.as_slice()])?;
    let seen = sniffer.wait_for("the packet", |h| h.sport == 4000)?;
    ensure!(seen.bytes == frame && seen.payload() == b"hello");
    sniffer.none("nothing else from there", |h| h.src == from.ip() && h.dport != 5000)?;
    sniffer.stop().verify_checksums()?;
    // The same with one bit of the payload changed.
    let sniffer = Sniffer::start(two.netns(), "eth0")?;
    if let Some(last) = frame.last_mut() {
        *last ^= 1;
    }
    send(one.netns(), "eth0", [frame.as_slice()])?;
    sniffer.wait_for("the broken packet", |h| h.sport == 4000)?;
    let verdict = sniffer.stop().verify_checksums();
    ensure!(verdict.is_err(), "a broken checksum passed");
    Ok(())
}

#[test]
fn steady_traffic_is_counted_and_its_loss_noticed() -> Result<()> {
    let fabric = Fabric::build(Setup::default())?;
    let (one, two) = (fabric.node(1), fabric.node(2));
    let server = Server::start(two.netns(), "two", PORT)?;
    let target = SocketAddr::new(two.v4().into(), PORT);
    let start = |kind, proto| Load::start(one.netns(), kind, proto, target, Duration::from_millis(1));
    let mut loads = Vec::new();
    for kind in [Kind::Established, Kind::New] {
        for proto in Proto::ALL {
            loads.push(start(kind, proto)?);
        }
    }
    for load in loads {
        load.wait_more(50)?;
        load.stop()?.no_loss()?;
    }
    let load = start(Kind::Established, Proto::Tcp)?;
    load.wait_more(10)?;
    drop(server);
    load.wait_more(10)?;
    let tally = load.stop()?;
    ensure!(tally.no_loss().is_err(), "the server was gone: {tally}");
    Ok(())
}

#[test]
fn nothing_is_left_behind() -> Result<()> {
    let fabric = Fabric::build(Setup { nodes: 3, ..Setup::default() })?;
    let dir = fabric.manifests().dir().to_owned();
    let cgroup = fabric.node(1).cgroup().map(ToOwned::to_owned);
    let pids: Vec<u32> = fabric.nodes().iter().map(|n| n.netns().pid()).collect();
    ensure!(dir.exists());
    drop(fabric);
    ensure!(!dir.exists(), "{} is left", dir.display());
    ensure!(cgroup.is_none_or(|c| !c.exists()), "a control group is left");
    for pid in pids {
        ensure!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "a holder is left");
    }
    Ok(())
}

#[test]
fn a_node_sees_its_own_devices_and_its_own_bpf_file_system() -> Result<()> {
    let fabric = Fabric::build(Setup::default())?;
    let one = fabric.node(1);
    let devices = one.netns().exec("ls", &["/sys/class/net"])?;
    ensure!(devices.split_whitespace().collect::<Vec<_>>() == ["eth0", "lo"], "{devices}");
    one.netns().exec("mkdir", &[&one.bpffs().display().to_string()])?;
    ensure!(one.bpffs_from_outside().is_dir() && !one.bpffs().exists(), "bpffs is not private");
    let other = fabric.node(2);
    ensure!(!other.bpffs_from_outside().exists());
    Ok(())
}
