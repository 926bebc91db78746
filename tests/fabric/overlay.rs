//! The overlay without its device: the programs write and strip the outer headers, and the device
//! takes the rest. Inner packets of both families, between nodes that know each other by IPv4 and
//! by IPv6 addresses.

mod ipsec;
mod noise;
mod offload;
mod routes;
mod tracked;

use crate::fixture::{Net, endpoints, observed};
use anyhow::{Context, Result, ensure};
use ipsec::{ipsec_policies_that_forbid_the_tunnel_are_obeyed, while_there_are_ipsec_policies_packets_take_the_device};
use nix::cmsg_space;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt};
use noise::{Noise, exchange};
use offload::{all_offloads, set_offloads};
use routes::{flows_spread_over_equal_routes, streams_survive_routes_that_change};
use rustnet_common::names;
use std::collections::BTreeSet;
use std::io::IoSliceMut;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::thread;
use std::time::Duration;
use testkit::check::VXLAN_PORT;
use testkit::client::{TIMEOUT, ask, ask_sized, connected_udp};
use testkit::icmp::{Ping, Reply};
use testkit::netns::{Holder, Own};
use testkit::pod::PORT;
use testkit::server::Server;
use testkit::sniff::{Frame, Sniffer};
use testkit::stream::Stream;
use testkit::{Netns, Node, Pod, Proto, Setup, wait};
use tracked::connections_between_pods_leave_no_tunnels_in_nf_conntrack;

/// One test of each function with outer packets of each family, on a fabric of its own.
macro_rules! over_each_family {
    ($($name:ident),+ $(,)?) => {
        mod over_ipv4 {
            $(#[test]
            fn $name() -> anyhow::Result<()> {
                super::over(false, super::PROGRAMS, super::$name)
            })+
        }
        mod over_ipv6 {
            $(#[test]
            fn $name() -> anyhow::Result<()> {
                super::over(true, super::PROGRAMS, super::$name)
            })+
        }
    };
}
over_each_family!(
    datagrams_that_leave_as_one_packet_arrive_one_by_one,
    datagrams_that_stay_one_packet_can_be_taken_apart,
    datagrams_around_the_mtu_arrive_with_sound_checksums,
    congestion_bits_arrive_as_they_were_sent,
    congestion_between_the_nodes_is_reported_inside,
    streams_arrive_under_all_offload_settings,
    connections_between_pods_leave_no_tunnels_in_nf_conntrack,
    traffic_between_pods_takes_no_device,
    segments_that_may_be_fragmented_take_no_device,
    a_pod_forwards_what_it_receives,
    a_pod_puts_what_it_receives_into_its_own_tunnel,
    streams_between_cpus_stay_in_order,
    streams_survive_routes_that_change,
    while_there_are_ipsec_policies_packets_take_the_device,
    ipsec_policies_that_forbid_the_tunnel_are_obeyed,
    flows_spread_over_equal_routes,
    an_emptied_map_of_jumps_loses_nothing,
);

/// Said aloud, because the environment may say something else.
const PROGRAMS: &[&str] = &["--overlay-path", "programs"];
const DEVICE: &[&str] = &["--overlay-path", "device"];

/// Runs a test on a fabric whose outer packets are of one family.
fn over(ipv6_first: bool, agent: &'static [&'static str], test: impl FnOnce(&Net) -> Result<()>) -> Result<()> {
    observed(&Net::start(Setup { ipv6_first, agent, ..Setup::default() })?, test)
}

/// The port of streams that the test itself answers.
const STREAM: u16 = 9000;

/// The same between two pods, in both families.
fn pods_exchange(from: &Pod, to: &Pod) -> Result<()> {
    for address in to.addresses() {
        let target = SocketAddr::new(*address, STREAM);
        exchange(from.netns(), (to.netns(), target), target)?;
    }
    Ok(())
}

/// `UDP_SEGMENT`: the kernel carries many datagrams as one packet. A tunnel's segments are the device's to take.
fn datagrams_that_leave_as_one_packet_arrive_one_by_one(net: &Net) -> Result<()> {
    for (from, to) in [(&net.a, &net.c), (&net.c, &net.a)] {
        let service = net.service(endpoints(&[to]))?;
        for is_summed in [false, true] {
            from.set_tx_checksum(!is_summed)?;
            for address in to.addresses() {
                for target in [SocketAddr::new(*address, PORT), service.target_like(*address)] {
                    segments_are_echoed(from.netns(), target)
                        .with_context(|| format!("to {target}, finished checksums: {is_summed}"))?;
                }
            }
        }
    }
    Ok(())
}

/// The same for a receiver that takes many datagrams at once (`UDP_GRO`): the kernel tells where one ends.
fn datagrams_that_stay_one_packet_can_be_taken_apart(net: &Net) -> Result<()> {
    const SEGMENTS: usize = 20;
    const SIZE: usize = 1000;
    for (from, to) in [(&net.a, &net.c), (&net.c, &net.a)] {
        for address in to.addresses() {
            let target = SocketAddr::new(*address, STREAM);
            let server = to.run_in(|| UdpSocket::bind(target))??;
            server.set_read_timeout(Some(TIMEOUT))?;
            setsockopt(&server, sockopt::UdpGroSegment, &true)?;
            let client = from.run_in(|| connected_udp(target))??;
            setsockopt(&client, sockopt::UdpGsoSegment, &SIZE.try_into()?)?;
            let mut bytes = vec![0; SEGMENTS * SIZE];
            Noise(5).fill(&mut bytes);
            ensure!(client.send(&bytes)? == bytes.len(), "not all was sent");
            let mut missing: BTreeSet<&[u8]> = bytes.chunks(SIZE).collect();
            while !missing.is_empty() {
                let (mut buffer, mut space) = (vec![0; 1 << 16], cmsg_space!(i32));
                let mut parts = [IoSliceMut::new(&mut buffer)];
                let message =
                    recvmsg::<SockaddrStorage>(server.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty())
                        .with_context(|| format!("to {target}: {} datagrams are missing", missing.len()))?;
                let size = message.cmsgs()?.find_map(|message| match message {
                    ControlMessageOwned::UdpGroSegments(size) => usize::try_from(size).ok(),
                    _ => None,
                });
                let len = message.bytes;
                for datagram in buffer[..len].chunks(size.unwrap_or(len).max(1)) {
                    ensure!(missing.remove(datagram), "to {target}: {} bytes that were not sent", datagram.len());
                }
            }
        }
    }
    Ok(())
}

/// Sends several datagrams as one packet, and waits for the echo of each.
pub fn segments_are_echoed(from: &Netns, target: SocketAddr) -> Result<()> {
    const SENDS: usize = 3;
    const SEGMENTS: usize = 20;
    const SIZE: usize = 1000;
    let socket = from.run(|| connected_udp(target))??;
    setsockopt(&socket, sockopt::RcvBufForce, &(4 << 20))?;
    setsockopt(&socket, sockopt::UdpGsoSegment, &SIZE.try_into()?)?;
    let mut bytes = vec![0; SENDS * SEGMENTS * SIZE];
    Noise(3).fill(&mut bytes);
    for send in bytes.chunks(SEGMENTS * SIZE) {
        ensure!(socket.send(send)? == send.len(), "not all was sent");
    }
    let mut missing: BTreeSet<&[u8]> = bytes.chunks(SIZE).collect();
    let mut buffer = [0; 2048];
    while !missing.is_empty() {
        let len = socket.recv(&mut buffer).with_context(|| format!("{} datagrams are missing", missing.len()))?;
        // The server echoes a datagram behind a heading.
        let echo = buffer[..len].get(len.saturating_sub(SIZE)..).unwrap_or_default();
        ensure!(missing.remove(echo), "an answer of {len} bytes to no datagram, or the second one");
    }
    Ok(())
}

/// The largest datagrams that the programs take, and the smallest ones that they leave to the device.
fn datagrams_around_the_mtu_arrive_with_sound_checksums(net: &Net) -> Result<()> {
    let wires = net.fabric.nodes().iter().map(|node| Sniffer::start(node.netns(), "eth0"));
    let wires = wires.collect::<Result<Vec<_>>>()?;
    for is_summed in [false, true] {
        for pod in [&net.a, &net.c] {
            pod.set_tx_checksum(!is_summed)?;
        }
        for address in net.c.addresses() {
            let target = SocketAddr::new(*address, PORT);
            for size in 1340..1440 {
                let answers = ask_sized(net.a.netns(), Proto::Udp, target, 1, size)?;
                answers.only_by(&[net.c.name()]).with_context(|| format!("{size} bytes to {target}"))?;
            }
        }
    }
    wires.into_iter().try_for_each(|wire| wire.stop().verify_checksums())
}

/// Not-ECT, ECT(1), ECT(0), CE (RFC 3168, 5), each with a class of service (expedited forwarding) in front.
const CLASSES: [u8; 4] = [0xb8, 0xb9, 0xba, 0xbb];
const CE: u8 = 3;

/// Sends a datagram of each class and returns the classes that arrive.
fn classes_that_arrive(from: &Pod, to: IpAddr, receiver: &Netns, classes: &[u8]) -> Result<Vec<u8>> {
    let target = SocketAddr::new(to, STREAM);
    let server = receiver.run(|| UdpSocket::bind(target))??;
    server.set_read_timeout(Some(TIMEOUT))?;
    if to.is_ipv4() {
        setsockopt(&server, sockopt::IpRecvTos, &true)?;
    } else {
        setsockopt(&server, sockopt::Ipv6RecvTClass, &true)?;
    }
    let client = from.run_in(|| connected_udp(target))??;
    let send_and_receive = |class: &u8| {
        if to.is_ipv4() {
            setsockopt(&client, sockopt::Ipv4Tos, &i32::from(*class))?;
        } else {
            setsockopt(&client, sockopt::Ipv6TClass, &i32::from(*class))?;
        }
        client.send(&[*class])?;
        let (mut byte, mut space) = ([0], cmsg_space!(i32));
        let mut parts = [IoSliceMut::new(&mut byte)];
        let message = recvmsg::<SockaddrStorage>(server.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty())
            .with_context(|| format!("nothing arrives of class {class:#x}"))?;
        let arrived = message.cmsgs()?.find_map(|message| match message {
            ControlMessageOwned::Ipv4Tos(tos) => Some(tos),
            ControlMessageOwned::Ipv6TClass(class) => u8::try_from(class).ok(),
            _ => None,
        });
        let arrived = arrived.context("the kernel does not tell the class")?;
        ensure!(byte == [*class], "another datagram arrives: {byte:?}");
        Ok(arrived)
    };
    classes.iter().map(send_and_receive).collect()
}

fn congestion_bits_arrive_as_they_were_sent(net: &Net) -> Result<()> {
    for (from, to) in [(&net.a, &net.c), (&net.c, &net.a)] {
        for address in to.addresses() {
            let arrived = classes_that_arrive(from, *address, to.netns(), &CLASSES)?;
            ensure!(arrived == CLASSES, "to {address}: {arrived:#x?} instead of {CLASSES:#x?}");
        }
    }
    Ok(())
}

/// RFC 6040, 4.2: a router that marks the outer packet means the inner one.
fn congestion_between_the_nodes_is_reported_inside(net: &Net) -> Result<()> {
    let switch = net.fabric.switch();
    switch.exec("nft", &["add table netdev congestion"])?;
    switch.exec("nft", &["add chain netdev congestion road { type filter hook ingress device n1 priority 0; }"])?;
    for family in ["ip", "ip6"] {
        let rule =
            format!("add rule netdev congestion road udp dport 8472 {family} ecn != not-ect {family} ecn set ce");
        switch.exec("nft", &[&rule])?;
    }
    for address in net.c.addresses() {
        let arrived = classes_that_arrive(&net.a, *address, net.c.netns(), &CLASSES)?;
        let expected = CLASSES.map(|class| if class & CE == 0 { class } else { class | CE });
        ensure!(arrived == expected, "to {address}: {arrived:#x?} instead of {expected:#x?}");
    }
    // Connections whose every segment of data says that it can be marked, and is.
    for pod in [&net.a, &net.c] {
        pod.netns().sysctl("ipv4/tcp_ecn", "1")?;
    }
    pods_exchange(&net.a, &net.c)?;
    switch.exec("nft", &["delete table netdev congestion"])?;
    pods_exchange(&net.a, &net.c)
}

/// The settings of the links between the nodes alone, then of those of the pods as well.
fn streams_arrive_under_all_offload_settings(net: &Net) -> Result<()> {
    for has_pods in [false, true] {
        for on in all_offloads() {
            let context = || format!("tx, tso, gso, gro: {on:?}, pods too: {has_pods}");
            for (node, port) in net.fabric.nodes().iter().zip(["n1", "n2"]) {
                set_offloads(node.netns(), "eth0", on)?;
                set_offloads(net.fabric.switch(), port, on)?;
            }
            for pod in [&net.a, &net.c].into_iter().filter(|_| has_pods) {
                set_offloads(pod.netns(), "eth0", on)?;
            }
            pods_exchange(&net.a, &net.c).with_context(context)?;
            for address in net.c.addresses() {
                segments_are_echoed(net.a.netns(), SocketAddr::new(*address, PORT)).with_context(context)?;
            }
        }
    }
    Ok(())
}

/// Packets that the overlay's device of a node has sent and received.
fn device_packets(node: &Node) -> Result<u64> {
    let count = |name: &str| -> Result<u64> {
        let path = format!("/sys/class/net/{}/statistics/{name}_packets", names::OVERLAY_DEV);
        let text = node.netns().run(|| std::fs::read_to_string(&path))?.with_context(|| path.clone())?;
        text.trim().parse().with_context(|| text.clone())
    };
    Ok(count("tx")? + count("rx")?)
}

/// The same of all nodes.
fn all_device_packets(net: &Net) -> Result<u64> {
    net.fabric.nodes().iter().map(device_packets).sum()
}

/// Requests of each kind between the pods of two nodes.
const REQUESTS: usize = 100;

fn requests(net: &Net, proto: Proto) -> Result<()> {
    for (from, to) in [(&net.a, &net.c), (&net.c, &net.a)] {
        for address in to.addresses() {
            ask(from.netns(), proto, SocketAddr::new(*address, PORT), REQUESTS)?.only_by(&[to.name()])?;
        }
    }
    Ok(())
}

/// Makes the nodes know each other's MACs. Without them, the first packets take the device: each
/// CPU remembers for an eighth of a second that there was no way.
fn introduce_nodes(net: &Net) -> Result<()> {
    for (node, other) in [(1, 2), (2, 1)] {
        for address in net.node(other).addresses() {
            let reply = Ping::default().send(net.node(node).netns(), address)?;
            ensure!(matches!(reply, Reply::Echo { .. }), "to {address}: {reply:?}");
        }
    }
    Ok(())
}

/// The hop limit of tunnel packets: as any packet of a node's own, for there may be many routers between nodes.
const HOP_LIMIT: u8 = 64;

/// Pings, requests, and a large transfer each way, in tunnel packets that reach far.
fn all_traffic(net: &Net) -> Result<()> {
    let wire = Sniffer::start_short(net.node(2).netns(), "eth0")?;
    pings_requests_and_transfers(net)?;
    let capture = wire.stop();
    let headers = capture.frames().iter().filter_map(Frame::headers);
    let limits: BTreeSet<u8> = headers.filter(|h| h.dport == VXLAN_PORT).map(|h| h.ttl).collect();
    ensure!(limits == [HOP_LIMIT].into(), "hop limits of tunnel packets: {limits:?}");
    Ok(())
}

fn pings_requests_and_transfers(net: &Net) -> Result<()> {
    for address in net.c.addresses() {
        for _ in 0..REQUESTS {
            let reply = Ping::default().send(net.a.netns(), *address)?;
            ensure!(matches!(reply, Reply::Echo { .. }), "to {address}: {reply:?}");
        }
    }
    Proto::ALL.into_iter().try_for_each(|proto| requests(net, proto))?;
    pods_exchange(&net.a, &net.c)
}

/// A packet now and then may: a node whose MAC is asked for again, what is to be answered with an error.
const FEW: u64 = REQUESTS as u64 / 10;

fn traffic_between_pods_takes_no_device(net: &Net) -> Result<()> {
    introduce_nodes(net)?;
    let before = all_device_packets(net)?;
    all_traffic(net)?;
    let moved = all_device_packets(net)? - before;
    ensure!(moved <= FEW, "{moved} packets took the device");
    Ok(())
}

/// TCP that asks for no "don't fragment", as pods can choose it: large frames are measured by their segments, so that no connection is
/// parted between the device and the programs.
fn segments_that_may_be_fragmented_take_no_device(net: &Net) -> Result<()> {
    for pod in [&net.a, &net.c] {
        pod.netns().sysctl("ipv4/ip_no_pmtu_disc", "1")?;
    }
    introduce_nodes(net)?;
    let before = all_device_packets(net)?;
    (0..4).try_for_each(|_| pods_exchange(&net.a, &net.c))?;
    let moved = all_device_packets(net)? - before;
    ensure!(moved <= FEW, "{moved} packets took the device");
    Ok(())
}

/// What the tests above rely on: the device counts.
fn all_traffic_takes_the_device(net: &Net) -> Result<()> {
    let before = all_device_packets(net)?;
    all_traffic(net)?;
    let moved = all_device_packets(net)? - before;
    // There and back, sent and received: four times a request.
    let least = 4 * REQUESTS as u64 * 2 * 5;
    ensure!(moved >= least, "{moved} packets took the device, less than {least}");
    Ok(())
}

#[test]
fn traffic_between_pods_takes_the_device_when_asked_to() -> Result<()> {
    over(false, DEVICE, all_traffic_takes_the_device)?;
    over(true, DEVICE, all_traffic_takes_the_device)
}

/// Makes a pod a router that gives streams and datagrams for ports of its own to somebody else.
fn forward(pod: &Pod, to: [IpAddr; 2]) -> Result<()> {
    pod.netns().sysctl("ipv4/ip_forward", "1")?;
    pod.netns().sysctl("ipv6/conf/all/forwarding", "1")?;
    pod.exec("nft", &["add table inet forward"])?;
    pod.exec("nft", &["add chain inet forward to { type nat hook prerouting priority -100; }"])?;
    for ip in to {
        let family = if ip.is_ipv4() { "ip" } else { "ip6" };
        for (proto, port) in [("tcp", STREAM), ("udp", PORT)] {
            pod.exec("nft", &[&format!("add rule inet forward to {proto} dport {port} dnat {family} to {ip}")])?;
        }
    }
    Ok(())
}

/// Streams and large datagrams to ports of a pod that forwards them, to where it forwards them, both families.
fn exchange_through(from: &Pod, pod: &Pod, server: &Netns, ends: [IpAddr; 2]) -> Result<()> {
    for end in ends {
        let target = SocketAddr::new(pod.address_like(end)?, STREAM);
        exchange(from.netns(), (server, SocketAddr::new(end, STREAM)), target).with_context(|| format!("to {end}"))?;
        segments_are_echoed(from.netns(), SocketAddr::new(target.ip(), PORT))
            .with_context(|| format!("datagrams to {end}"))?;
    }
    Ok(())
}

/// Nested containers and machines in pods: what a pod received leaves it by a device that may have to segment it.
fn a_pod_forwards_what_it_receives(net: &Net) -> Result<()> {
    let inner = Holder::new(&format!("{}-inner", net.c.netns().name()), Own::default())?;
    net.c.netns().ip(&format!(
        "link add inner type veth peer name eth0 netns {}\n\
         addr add 10.66.0.1/24 dev inner\naddr add fd00:66::1/64 dev inner nodad\nlink set inner up\n",
        inner.pid()
    ))?;
    inner.ip("addr add 10.66.0.2/24 dev eth0\naddr add fd00:66::2/64 dev eth0 nodad\nlink set eth0 up\n\
         route add default via 10.66.0.1\nroute add default via fd00:66::1\n")?;
    let _server = Server::start(&inner, "inner", PORT)?;
    let ends = ["10.66.0.2".parse()?, "fd00:66::2".parse()?];
    forward(&net.c, ends)?;
    for on in all_offloads() {
        set_offloads(net.c.netns(), "inner", on)?;
        set_offloads(&inner, "eth0", on)?;
        exchange_through(&net.a, &net.c, &inner, ends).with_context(|| format!("tx, tso, gso, gro: {on:?}"))?;
    }
    Ok(())
}

/// MTU of a tunnel between pods, small enough for two tunnels over IPv6.
const NESTED_MTU: u32 = 1500 - 2 * 70;

/// A cluster within pods: its own overlay is inside ours. Our port is open only between pods of one
/// node (docs/security.md).
fn a_pod_puts_what_it_receives_into_its_own_tunnel(net: &Net) -> Result<()> {
    let ends: [IpAddr; 2] = ["10.67.0.2".parse()?, "fd00:67::2".parse()?];
    forward(&net.c, ends)?;
    let neighbour = net.node(2).add_pod("neighbour")?;
    for (end, port) in [(&net.b, 4789), (&neighbour, 4789), (&neighbour, 8472)] {
        for (local, remote) in net.c.addresses().iter().zip(end.addresses()) {
            let tunnel = |pod: &Pod, local: &IpAddr, remote: &IpAddr, last: u8| {
                pod.netns().ip(&format!(
                    "link add vx mtu {NESTED_MTU} type vxlan id 77 dstport {port} local {local} remote {remote}\n\
                     addr add 10.67.0.{last}/24 dev vx\naddr add fd00:67::{last}/64 dev vx nodad\nlink set vx up\n"
                ))
            };
            tunnel(&net.c, local, remote, 1)?;
            tunnel(end, remote, local, 2)?;
            let (v4, v6) = (net.a.v4()?, net.a.v6()?);
            end.netns().ip(&format!("route add {v4}/32 via 10.67.0.1\nroute add {v6}/128 via fd00:67::1\n"))?;
            exchange_through(&net.a, &net.c, end.netns(), ends)
                .with_context(|| format!("{} by {remote}, port {port}", end.name()))?;
            for pod in [&net.c, end] {
                pod.netns().ip("link del vx\n")?;
            }
        }
    }
    Ok(())
}

/// One CPU sends a packet, another one delivers it. A stream that took both the device's way and
/// the programs' way would overtake itself, and TCP would send again what seems to be lost.
fn streams_between_cpus_stay_in_order(net: &Net) -> Result<()> {
    let cpus = thread::available_parallelism()?.get();
    ensure!(cpus > 1, "this test needs two CPUs");
    for cpu in [0, 1] {
        for node in net.fabric.nodes() {
            let path = "/sys/class/net/eth0/queues/rx-0/rps_cpus";
            node.netns().run(|| std::fs::write(path, format!("{:x}", 1 << cpu)))?.context(path)?;
        }
        for _ in 0..4 {
            pods_exchange(&net.a, &net.c).with_context(|| format!("delivered by CPU {cpu}"))?;
        }
    }
    Ok(())
}

/// The kernel empties the map once nobody holds it, as a release does that does not know it. Then the device takes all.
fn an_emptied_map_of_jumps_loses_nothing(net: &Net) -> Result<()> {
    const MORE: usize = 1000;
    introduce_nodes(net)?;
    let streams: Vec<_> = net
        .c
        .addresses()
        .iter()
        .map(|ip| Stream::start(net.a.netns(), SocketAddr::new(*ip, PORT), 4, Duration::from_millis(1)))
        .collect::<Result<_>>()?;
    let go_on = || {
        let before: Vec<_> = streams.iter().map(Stream::answered).collect();
        wait::until("all streams go on", || {
            let now: Vec<_> = streams.iter().map(Stream::answered).collect();
            ensure!(now.iter().zip(&before).all(|(now, before)| *now >= before + MORE), "{before:?}, then {now:?}");
            Ok(())
        })
    };
    let before = all_device_packets(net)?;
    go_on()?;
    let moved = all_device_packets(net)? - before;
    ensure!(moved <= FEW, "{moved} packets took the device before");
    for node in net.fabric.nodes() {
        let before = device_packets(node)?;
        let path = node.bpffs().join("prog").join(names::TAILS_MAP).to_string_lossy().into_owned();
        // In the kernel's order. Between the two, nothing may need the second one.
        for index in 0..names::TAILS.len() {
            let key = index.to_string();
            node.netns().exec("bpftool", &["map", "delete", "pinned", &path, "key", &key, "0", "0", "0"])?;
        }
        go_on()?;
        let moved = device_packets(node)? - before;
        ensure!(moved >= MORE as u64, "{moved} packets took the device of {} after", node.name());
    }
    streams.into_iter().try_for_each(|stream| stream.stop()?.no_loss())
}

/// Which of a node's counters of the device move with its tunnel's packets.
fn takes_the_device(node: &Node, is_device: bool) -> Result<()> {
    const LOOK: usize = 100;
    let is_of_tunnel = |f: &Frame| f.headers().is_some_and(|h| h.dport == VXLAN_PORT);
    wait::until(if is_device { "packets take the device" } else { "packets go past the device" }, || {
        let wire = Sniffer::start_short(node.netns(), "eth0")?;
        let before = device_packets(node)?;
        wait::until("packets of the tunnel", || {
            let seen = wire.matching(LOOK, is_of_tunnel).len();
            ensure!(seen == LOOK, "{seen} of {LOOK}");
            Ok(())
        })?;
        let moved = device_packets(node)? - before;
        // Seen first on one side, and counted first on the other.
        let is_moved = moved >= LOOK as u64 * 9 / 10;
        ensure!(is_moved == is_device && (is_moved || moved == 0), "{moved} of {LOOK} or more");
        Ok(())
    })
}
