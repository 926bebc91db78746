//! The overlay without its device: the headers that programs put in front of a pod's packet, and which packets take the device.

use anyhow::{Context, Result, ensure};
use rustnet_agent::net::overlay::SOURCE_PORTS;
use rustnet_common::addr::{Address, Ip4, Ip6};
use rustnet_common::config;
use rustnet_common::drop::{DropReason, hook};
use rustnet_common::peer::flags;
use testkit::datapath::Input;

use crate::errors::{error, icmp_error};
use crate::flows::{PORT, Proto, TARGET, answer_of_b, as_from_b, from_a, from_host, from_outside};
use crate::frame::{ACK, Frame, L4};
use crate::harness::{BOTH, Lab, Net, OVERLAY, OVERLAY_MTU, VNI, lab_apart};
use crate::icmp::kinds;

/// The other node as a neighbour with a MAC. What is tried on the way there, the kernel does not ask for.
pub const NEIGHBOURS: &str = "\
    neigh add 172.18.0.12 lladdr 02:00:00:00:0c:02 dev eth0
    neigh add fd00:18::12 lladdr 02:00:00:00:0c:02 dev eth0";

/// Runs a test on a node that knows its neighbours, for each family of pods in each of nodes.
fn encapsulating(test: impl Fn(&Lab, Net, Net) -> Result<()> + Send + Sync) -> Result<()> {
    lab_apart(|lab| {
        lab.ip(NEIGHBOURS)?;
        for (inner, outer) in BOTH.into_iter().flat_map(|inner| BOTH.map(|outer| (inner, outer))) {
            lab.forget()?;
            lab.configure(|c| c.flags |= config::flags::ENCAPSULATE)?;
            lab.put_peer(inner.far(), Some((24, 64)), flags::POD | flags::TUNNEL, Some(outer.node2()))?;
            test(lab, inner, outer).with_context(|| format!("{inner:?} in {outer:?}"))?;
        }
        Ok(())
    })
}

/// What has left for the other node: `inner` behind the headers of RFC 7348, with this source port and identification.
fn outer(net: Net, inner: &Frame, sport: u16, id: u16) -> Frame {
    let mut payload = vec![8, 0, 0, 0];
    payload.extend((VNI << 8).to_be_bytes());
    payload.extend(inner.bytes());
    let l4 = L4::Udp { sport, dport: 8472, checksum: false };
    let (src, dst) = (net.node(), net.node2());
    Frame { src, dst, ttl: 64, id, flow: 0, l4, payload, may_be_cut: true, ..inner.clone() }
}

/// The EtherType of the frame, which a redirect to a neighbour replaces together with the MACs.
const ETHERTYPE: std::ops::Range<usize> = 12..14;

#[test]
fn a_packet_gets_its_headers() -> Result<()> {
    encapsulating(|lab, inner, net| {
        for proto in [Proto::Tcp, Proto::Udp, Proto::Sctp, Proto::Echo] {
            let ask = from_a(inner, proto, (inner.far(), TARGET));
            let mut shot = lab.pod_sends_unsummed(&ask.bytes())?;
            let ip = if net == Net::V4 { 20 } else { 40 };
            let word = |at: usize| u16::from_be_bytes([shot.frame[at], shot.frame[at + 1]]);
            let (id, sport) = (word(18), word(14 + ip));
            ensure!(sport >= 0xc000, "source port {sport}");
            let want = outer(net, &ask.hop(), sport, id);
            shot.frame[ETHERTYPE].copy_from_slice(&want.bytes()[ETHERTYPE]);
            shot.onto_wire(&want).with_context(|| format!("{proto:?}"))?;
        }
        Ok(())
    })
}

/// Another node that asks a node port gets its answers through the tunnel, from one of the few ports for nodes, at the address by which
/// it knows this node; and past it at a second one, which it would refuse inside. Errors likewise.
#[test]
fn answers_to_another_node() -> Result<()> {
    encapsulating(|lab, inner, net| {
        let second = inner.ip([172, 18, 0, 77], "fd00:18::77");
        lab.put_peer(second, None, flags::HOST, None)?;
        lab.put_peer(inner.node2(), None, flags::NODE | flags::TUNNEL, Some(net.node2()))?;
        for (at, sport, is_tunnelled) in [(inner.node(), PORT, true), (second, PORT + 1, false)] {
            lab.publish(at, TARGET, Proto::Udp.number(inner), 0, &[(inner.b(), TARGET)])?;
            let ask = from_outside(Proto::Udp, (inner.node2(), sport), (at, TARGET));
            let arrives = ask.hop().between((inner.node2(), sport), (inner.b(), TARGET));
            lab.uplink_in(&ask)?.to_the_pod(&arrives)?;
            let answer = answer_of_b(&arrives);
            let refused = as_from_b(&error(&arrives, inner.b(), kinds(inner)[0], 1000));
            for frame in [answer, refused] {
                let shot = lab.pod_b_sends_unsummed(&frame.bytes())?;
                let has_headers = shot.frame.len() > frame.bytes().len();
                ensure!(has_headers == is_tunnelled, "to {at}: {} bytes come out", shot.frame.len());
                let place = if net == Net::V4 { 34 } else { 54 };
                let port = u16::from_be_bytes([shot.frame[place], shot.frame[place + 1]]);
                ensure!(!has_headers || SOURCE_PORTS.contains(&port), "source port {port}");
            }
        }
        Ok(())
    })
}

/// Flows of one pair of pods spread over the paths between their nodes, and each keeps its own.
#[test]
fn source_ports_are_those_of_flows() -> Result<()> {
    encapsulating(|lab, inner, net| {
        let at = if net == Net::V4 { 34 } else { 54 };
        let port = |shot: crate::harness::Shot| u16::from_be_bytes([shot.frame[at], shot.frame[at + 1]]);
        let mut seen = std::collections::BTreeSet::new();
        for dport in TARGET..TARGET + 16 {
            // A flow label stands for the flow, where there is one.
            let ask = from_a(inner, Proto::Udp, (inner.far(), dport)).map(|f| f.flow = 0);
            let first = port(lab.pod_sends_unsummed(&ask.bytes())?);
            ensure!(first == port(lab.pod_sends_unsummed(&ask.bytes())?), "another port");
            seen.insert(first);
        }
        ensure!(seen.len() > 8, "ports {seen:?}");
        Ok(())
    })
}

/// Fragments of two packets to one node must not meet.
#[test]
fn identifications_follow_one_another() -> Result<()> {
    encapsulating(|lab, inner, net| {
        let ask = from_a(inner, Proto::Udp, (inner.far(), TARGET));
        let id = || {
            let frame = lab.pod_sends_unsummed(&ask.bytes())?.frame;
            Ok::<_, anyhow::Error>(u16::from_be_bytes([frame[18], frame[19]]))
        };
        let (first, second) = (id()?, id()?);
        ensure!(net == Net::V6 || second == first.wrapping_add(1), "{first}, then {second}");
        Ok(())
    })
}

/// As the device does (RFC 6040): the inner packet's bits, and "congestion experienced" as "capable".
#[test]
fn congestion_bits_are_shown_outside() -> Result<()> {
    encapsulating(|lab, inner, net| {
        for (tos, want) in [(0, 0), (1, 1), (2, 2), (3, 2), (0xb8, 0), (0xb9, 1)] {
            let mut bytes = from_a(inner, Proto::Udp, (inner.far(), TARGET)).bytes();
            if inner == Net::V4 {
                bytes[15] = tos;
                let sum = u16::from_be_bytes([bytes[24], bytes[25]]) - u16::from(tos);
                bytes[24..26].copy_from_slice(&sum.to_be_bytes());
            } else {
                bytes[14] |= tos >> 4;
                bytes[15] |= tos << 4;
            }
            let shot = lab.pod_sends_unsummed(&bytes)?;
            let found = if net == Net::V4 { shot.frame[15] } else { shot.frame[14] << 4 | shot.frame[15] >> 4 };
            ensure!(found == want, "inner {tos:#x}: outer {found:#x}, not {want:#x}");
        }
        Ok(())
    })
}

/// The device gets what nobody can send past it.
#[test]
fn the_device_takes_the_rest() -> Result<()> {
    encapsulating(|lab, inner, net| {
        let ask = from_a(inner, Proto::Udp, (inner.far(), TARGET));
        let by_device = || lab.pod_sends_unsummed(&ask.bytes())?.onto_wire(&ask.hop());
        // Switched off.
        lab.configure(|_| {})?;
        by_device().context("switched off")?;
        let encapsulate = |c: &mut config::NodeConfig| c.flags |= config::flags::ENCAPSULATE;
        // Without a near end.
        lab.configure(|c| {
            encapsulate(c);
            match net {
                Net::V4 => c.node4 = Ip4::UNSPECIFIED,
                Net::V6 => c.node6 = Ip6::UNSPECIFIED,
            }
        })?;
        lab.forget_next_hops()?;
        by_device().context("no address of the node's")?;
        lab.configure(encapsulate)?;
        // A sum of the whole packet, which the device drops.
        if lab.has_sums() {
            lab.pod_sends(&ask)?.onto_wire(&ask.hop()).context("with a sum")?;
        }
        // A node that no route leads to, and one whose MAC is not known.
        for node in [net.unreachable(), net.router()] {
            lab.put_peer(inner.far(), Some((24, 64)), flags::POD | flags::TUNNEL, Some(node))?;
            by_device().with_context(|| format!("node {node}"))?;
        }
        // A node behind a device without MACs, to which a redirect to a neighbour would give Ethernet headers.
        let (node, len) = (net.node2(), if net == Net::V4 { 32 } else { 128 });
        lab.ip(&format!(
            "tuntap add dev tun0 mode tun\nlink set tun0 up\n\
             route replace {node}/{len} dev tun0\nneigh add {node} dev tun0 nud noarp"
        ))?;
        lab.put_peer(inner.far(), Some((24, 64)), flags::POD | flags::TUNNEL, Some(node))?;
        lab.forget_next_hops()?;
        by_device().context("a device without MACs")?;
        lab.ip("link del tun0")?;
        lab.forget_next_hops()?;
        // A group of MACs.
        lab.put_peer(inner.far(), Some((24, 64)), flags::POD | flags::TUNNEL, Some(net.node2()))?;
        let group = ask.map(|f| f.dmac = [3, 0, 0, 0, 0, 1]);
        lab.pod_sends_unsummed(&group.bytes())?.onto_wire(&group.hop()).context("a group of MACs")?;
        // Larger than the overlay's MTU, and no reason to refuse it, unless nobody can fragment the outer packet.
        if inner == Net::V4 {
            let large = ask.with_length(OVERLAY_MTU + 1).map(|f| f.may_be_cut = true);
            let shot = lab.pod_sends_unsummed(&large.bytes())?;
            match net {
                Net::V4 => shot.onto_wire(&large.hop()).context("to be fragmented")?,
                Net::V6 => shot.answered(DropReason::FragNeeded, &too_big(inner, &large, 1500 - 70))?,
            }
        }
        Ok(())
    })
}

/// What a pod hears of a packet that fits nowhere.
fn too_big(inner: Net, f: &Frame, mtu: usize) -> Frame {
    let (kind, code) = if inner == Net::V4 { (3, 4) } else { (2, 0) };
    icmp_error(f, inner.node(), kind, code, mtu as u32).map(|f| f.may_be_cut = false)
}

/// A path that is narrower than the devices at its ends. Over IPv4 the device fragments. Over IPv6 nobody does: the pod learns what
/// fits, by either way.
#[test]
fn a_narrow_path_is_the_devices_or_reported() -> Result<()> {
    encapsulating(|lab, inner, net| {
        const FITS: usize = 1400;
        let node = net.node2();
        let (len, overhead) = if net == Net::V4 { (32, 50) } else { (128, 70) };
        let large = from_a(inner, Proto::Udp, (inner.far(), TARGET)).with_length(FITS);
        let narrow = |mtu: usize| -> Result<()> {
            lab.ip(&format!("route replace {node}/{len} dev eth0 mtu lock {mtu}"))?;
            lab.forget_next_hops()
        };
        narrow(FITS + overhead)?;
        let frame = lab.pod_sends_unsummed(&large.bytes())?.frame;
        ensure!(frame.len() > large.bytes().len(), "not encapsulated");
        narrow(FITS + overhead - 1)?;
        for flags in [config::flags::ENCAPSULATE, 0] {
            lab.configure(|c| c.flags |= flags)?;
            for may_be_cut in [false, true] {
                let large = large.map(|f| f.may_be_cut = may_be_cut);
                let shot = lab.pod_sends_unsummed(&large.bytes())?;
                if net == Net::V4 {
                    shot.onto_wire(&large.hop())?;
                    continue;
                }
                shot.answered(DropReason::FragNeeded, &too_big(inner, &large, FITS - 1))
                    .with_context(|| format!("flags {flags}, may be cut: {may_be_cut}"))?;
            }
        }
        // Without a MAC the kernel says nothing of the path.
        lab.ip(&format!("neigh del {node} dev eth0"))?;
        lab.forget_next_hops()?;
        lab.pod_sends_unsummed(&large.bytes())?.onto_wire(&large.hop()).context("no MAC")?;
        lab.ip(&format!("neigh replace {node} lladdr 02:00:00:00:0c:02 dev eth0"))?;
        lab.ip(&format!("route del {node}/{len} dev eth0"))
    })
}

/// A packet of this host has no route any more whose MTU the device could lower: the host learns the same, by the overlay's device.
#[test]
fn the_host_hears_of_a_narrow_path() -> Result<()> {
    encapsulating(|lab, inner, net| {
        let node = net.node2();
        let (len, overhead) = if net == Net::V4 { (32, 50) } else { (128, 70) };
        let large = from_host(inner, Proto::Udp, (inner.far(), TARGET)).with_length(1400);
        for (mtu, fits) in [(1400 + overhead, true), (1400 + overhead - 1, net == Net::V4)] {
            lab.ip(&format!("route replace {node}/{len} dev eth0 mtu lock {mtu}"))?;
            lab.forget_next_hops()?;
            let shot = lab.overlay_out(&large)?;
            if fits {
                shot.done_to_stack(&large)?;
                continue;
            }
            // In its own name it would be a martian.
            let report = too_big(inner, &large, 1399).map(|f| f.src = inner.far());
            shot.answered(DropReason::FragNeeded, &report)?;
            let input = Input { frame: &shot.frame, ifindex: OVERLAY, mark: shot.mark, ..Input::default() };
            lab.raw(hook::OVERLAY_IN, &input)?.to_stack(&report).context("on its way back")?;
        }
        lab.ip(&format!("route del {node}/{len} dev eth0"))
    })
}

/// The segments of a frame are measured one by one, also where they may be fragmented. That the frame gets its headers here, only real
/// devices show (`tests/fabric`, `segments_that_may_be_fragmented_take_no_device`): the test run makes frames whose kind the kernel's
/// helper does not know.
#[test]
fn segments_are_measured_against_the_path() -> Result<()> {
    encapsulating(|lab, inner, net| {
        let (node, len) = (net.node2(), if net == Net::V4 { 32 } else { 128 });
        lab.ip(&format!("route replace {node}/{len} dev eth0 mtu lock 1400"))?;
        lab.forget_next_hops()?;
        let headers = if inner == Net::V4 { 40 } else { 60 };
        let payloads = [1330 - headers, 1331 - headers];
        for (payload, may_be_cut) in payloads.into_iter().flat_map(|payload| [(payload, false), (payload, true)]) {
            let many = from_a(inner, Proto::Tcp, (inner.far(), TARGET)).with_flags(ACK).with_length(headers + 3000);
            let many = many.map(|f| f.may_be_cut = may_be_cut).bytes();
            let shot = lab.pod_sends_segments(&many, payload as u32)?;
            let is_refused = net == Net::V6 && payload + headers > 1330;
            let reason = if is_refused { DropReason::FragNeeded } else { DropReason::Forwarded };
            let counted = shot.counted;
            ensure!(counted.keys().eq([&(reason as u8, hook::FROM_POD)]), "{payload}, {may_be_cut}: {counted:?}");
        }
        lab.ip(&format!("route del {node}/{len} dev eth0"))
    })
}

/// A MAC that becomes known is used at once.
#[test]
fn a_neighbour_is_waited_for() -> Result<()> {
    encapsulating(|lab, inner, net| {
        lab.ip(&format!("neigh del {} dev eth0", net.node2()))?;
        lab.forget_next_hops()?;
        let ask = from_a(inner, Proto::Udp, (inner.far(), TARGET));
        lab.pod_sends_unsummed(&ask.bytes())?.onto_wire(&ask.hop()).context("no MAC yet")?;
        lab.ip(&format!("neigh replace {} lladdr 02:00:00:00:0c:02 dev eth0", net.node2()))?;
        let frame = lab.pod_sends_unsummed(&ask.bytes())?.frame;
        ensure!(frame.len() > ask.bytes().len(), "not encapsulated");
        Ok(())
    })
}

/// A route that changes is followed without anybody's word.
#[test]
fn a_change_of_route_is_noticed() -> Result<()> {
    encapsulating(|lab, inner, net| {
        let ask = from_a(inner, Proto::Udp, (inner.far(), TARGET));
        let wait = |what: &str, want: bool| {
            testkit::wait::until(what, || {
                let is_encapsulated = lab.pod_sends_unsummed(&ask.bytes())?.frame.len() > ask.bytes().len();
                ensure!(is_encapsulated == want, "encapsulated: {is_encapsulated}");
                Ok(())
            })
        };
        wait("the way is found", true)?;
        let len = if net == Net::V4 { 32 } else { 128 };
        lab.ip(&format!("route add unreachable {}/{len}", net.node2()))?;
        wait("the way is lost", false)?;
        lab.ip(&format!("route del unreachable {}/{len}", net.node2()))?;
        wait("the way is found again", true)
    })
}
