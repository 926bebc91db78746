//! XDP of the uplink: known flows that go back by their device leave there, and nobody but the sender of a packet can say which program
//! has sent it. All other packets pass as they came.

mod overlay;

use crate::errors::error;
use crate::flows::{PORT, Proto, TARGET, from_outside, later};
use crate::frame::{ACK, FIN, Frame, L4, RST, SYN};
use crate::harness::{BOTH, Flow, HZ, Half, Lab, MAC_HOST, MAC_OUT, NARROW_MTU, Net, UPLINK, each, lab_apart};
use crate::icmp::kinds;
use anyhow::{Context, Result, ensure};
use rustnet_common::conntrack::flags;
use rustnet_common::drop::{DropReason, hook};
use rustnet_common::{peer, service};
use std::collections::BTreeMap;
use std::net::IpAddr;
use testkit::check;

/// `XDP_PASS` and `XDP_TX`: linux/bpf.h.
const PASS: u32 = 2;
const TX: u32 = 3;
const NODE_PORT: u16 = 30_080;
/// What XDP sends; it leaves the others to `uplink_in`.
const PROTOS: [Proto; 2] = [Proto::Tcp, Proto::Udp];
/// The next hops of the node's routes, and the MAC of its uplink.
const MORE: &str = "\
    link set eth0 address 02:00:00:00:ff:01
    neigh replace 172.18.0.1 lladdr 02:00:00:00:ee:01 dev eth0 nud permanent
    neigh replace 172.18.0.13 lladdr 02:00:00:00:ee:01 dev eth0 nud permanent
    neigh replace fd00:18::1 lladdr 02:00:00:00:ee:01 dev eth0 nud permanent
    neigh replace fd00:18::13 lladdr 02:00:00:00:ee:01 dev eth0 nud permanent";

/// Runs a test for both families, on a node that has all MACs.
fn labs(test: impl Fn(&Lab, Net) -> Result<()> + Send + Sync) -> Result<()> {
    lab_apart(|lab| {
        lab.ip(MORE)?;
        BOTH.into_iter().try_for_each(|net| {
            lab.reset()?;
            lab.forget_turns()?;
            test(lab, net).with_context(|| format!("{net:?}"))
        })
    })
}

/// The verdict on a frame that comes in by the uplink, what became of it, and how often it was counted as sent.
fn run(lab: &Lab, frame: &Frame) -> Result<(u32, Vec<u8>, u64)> {
    let bytes = frame.bytes();
    let before = lab.datapath().counts()?;
    let (verdict, out) = lab.datapath().run_xdp(&bytes, UPLINK)?;
    let after = lab.datapath().counts()?;
    let key = (DropReason::Forwarded as u8, hook::UPLINK_XDP);
    let count = |counts: &BTreeMap<(u8, u8), u64>| counts.get(&key).copied().unwrap_or(0);
    let sent = count(&after) - count(&before);
    ensure!(after.values().sum::<u64>() - before.values().sum::<u64>() == sent, "counted elsewhere, too: {after:?}");
    Ok((verdict, out, sent))
}

/// How often a frame was counted as sent.
fn count_of(lab: &Lab) -> Result<u64> {
    Ok(lab.datapath().counts()?.get(&(DropReason::Forwarded as u8, hook::UPLINK_XDP)).copied().unwrap_or(0))
}

/// The frame leaves by the device that it came in by, changed into `want`.
fn sends(lab: &Lab, frame: &Frame, want: &Frame) -> Result<()> {
    let want = want.map(|f| (f.smac, f.dmac) = (MAC_HOST, MAC_OUT)).bytes();
    let (verdict, out, sent) = run(lab, frame)?;
    ensure!((verdict, sent) == (TX, 1), "verdict {verdict}, counted {sent} times");
    check::checksums(&out, false)?;
    ensure!(out == want, "{out:02x?} instead of {want:02x?}");
    Ok(())
}

/// The frame passes as it came, and no table has changed.
fn passes(lab: &Lab, frame: &Frame) -> Result<()> {
    let before = (lab.connections(Net::V4)?, lab.connections(Net::V6)?);
    let (verdict, out, sent) = run(lab, frame)?;
    ensure!((verdict, sent) == (PASS, 0), "verdict {verdict}, counted {sent} times");
    ensure!(out == frame.bytes(), "the frame has changed: {out:02x?}");
    ensure!(before == (lab.connections(Net::V4)?, lab.connections(Net::V6)?), "a connection has changed");
    Ok(())
}

fn ask(net: Net, proto: Proto) -> Frame {
    from_outside(proto, (net.world(), PORT), (net.node(), NODE_PORT))
}

/// The backend's answer to what arrives there.
fn answer(arrives: &Frame) -> Frame {
    arrives.reply().map(|f| (f.smac, f.dmac) = (MAC_OUT, MAC_HOST))
}

/// Has a client outside open a flow to a backend of another node that the kernel's routes lead to. Returns the frame that asked, and what
/// arrives at the backend.
fn open(lab: &Lab, net: Net, proto: Proto, backend: IpAddr) -> Result<(Frame, Frame)> {
    lab.publish(net.node(), NODE_PORT, proto.number(net), 0, &[(backend, TARGET)])?;
    let ask = ask(net, proto);
    lab.uplink_in(&ask)?;
    let source = lab.half(Flow::of(&ask))?.to.sport;
    Ok((ask.clone(), ask.hop().between((net.node(), source), (backend, TARGET))))
}

/// The same, with the backend's answer, so that the flow is an established one.
fn establish(lab: &Lab, net: Net, proto: Proto, backend: IpAddr) -> Result<(Frame, Frame)> {
    let (ask, arrives) = open(lab, net, proto, backend)?;
    lab.uplink_in(&answer(&arrives))?;
    Ok((ask, arrives))
}

#[test]
fn known_flows_go_back_by_their_device() -> Result<()> {
    labs(|lab, net| {
        each(&PROTOS, |proto| {
            let (ask, arrives) = open(lab, net, proto, net.routed())?;
            let answer = answer(&arrives);
            sends(lab, &answer, &answer.hop().between((net.node(), NODE_PORT), (net.world(), PORT)))
                .context("its answer")?;
            let more = later(&ask);
            let (there, back) = (arrives.ports().0, lab.half(Flow::of(&answer))?);
            sends(lab, &more, &more.hop().between((net.node(), there), (net.routed(), TARGET)))?;
            let asked = lab.half(Flow::of(&ask))?;
            let bytes = (ask.bytes().len() + more.bytes().len()) as u64;
            ensure!((asked.packets, asked.bytes, back.packets) == (2, bytes, 1), "{asked:?} {back:?}");
            Ok(())
        })
    })
}

/// A load balancer's address, with a port that differs from the backend's.
#[test]
fn a_load_balancers_address() -> Result<()> {
    labs(|lab, net| {
        each(&PROTOS, |proto| {
            let vip = net.unreachable();
            lab.publish(vip, 443, proto.number(net), 0, &[(net.routed(), TARGET)])?;
            let ask = from_outside(proto, (net.world(), PORT), (vip, 443));
            lab.uplink_in(&ask)?;
            let source = lab.half(Flow::of(&ask))?.to.sport;
            let more = later(&ask);
            let arrives = more.hop().between((net.node(), source), (net.routed(), TARGET));
            sends(lab, &more, &arrives)?;
            let answer = answer(&arrives);
            sends(lab, &answer, &answer.hop().between((vip, 443), (net.world(), PORT)))
        })
    })
}

/// No checksum of UDP over IPv4 is none afterwards.
#[test]
fn udp_without_a_checksum() -> Result<()> {
    labs(|lab, net| {
        if net == Net::V6 {
            return Ok(());
        }
        let (ask, arrives) = open(lab, net, Proto::Udp, net.routed())?;
        let without = |f: &Frame| {
            f.map(|f| {
                if let L4::Udp { checksum, .. } = &mut f.l4 {
                    *checksum = false;
                }
            })
        };
        sends(lab, &without(&ask), &without(&arrives))
    })
}

/// A copy whose checksum comes out as 0, which UDP writes as all ones.
fn summing_to_zero(frame: &Frame, net: Net, proto: Proto) -> Frame {
    let zeroed = frame.map(|f| f.payload = vec![0; 4]);
    let at = if net == Net::V4 { 34 } else { 54 } + if proto == Proto::Tcp { 16 } else { 6 };
    let sum = zeroed.bytes()[at..at + 2].to_vec();
    zeroed.map(|f| f.payload[..2].copy_from_slice(&sum))
}

/// A checksum of 0, before the translation and behind it.
#[test]
fn checksums_at_their_ends() -> Result<()> {
    labs(|lab, net| {
        each(&PROTOS, |proto| {
            lab.forget()?;
            let (ask, arrives) = open(lab, net, proto, net.routed())?;
            let (more, there) = (later(&ask), arrives.ports().0);
            let leaves = |frame: &Frame| frame.hop().between((net.node(), there), (net.routed(), TARGET));
            let before = summing_to_zero(&more, net, proto);
            sends(lab, &before, &leaves(&before)).context("before")?;
            let payload = summing_to_zero(&leaves(&more), net, proto).payload;
            let behind = more.map(|f| f.payload = payload);
            let (verdict, out, _) = run(lab, &behind)?;
            ensure!(verdict == TX, "verdict {verdict}");
            check::checksums(&out, false)?;
            let at = if net == Net::V4 { 40 } else { 60 };
            ensure!(proto == Proto::Tcp || out[at..at + 2] == [0xff; 2], "UDP checksum {:02x?}", &out[at..at + 2]);
            Ok(())
        })
    })
}

/// Headers between the IP header and the ports stay.
#[test]
fn options_and_extension_headers() -> Result<()> {
    labs(|lab, net| {
        each(&PROTOS, |proto| {
            lab.forget()?;
            let (ask, arrives) = open(lab, net, proto, net.routed())?;
            let more = later(&ask).map(|f| match net {
                Net::V4 => f.options = vec![1; 40],
                // Options of the destination (60): padding.
                Net::V6 => f.extensions = vec![(60, vec![0, 0, 1, 4, 0, 0, 0, 0])],
            });
            sends(lab, &more, &more.hop().between((net.node(), arrives.ports().0), (net.routed(), TARGET)))
        })
    })
}

#[test]
fn new_flows_and_those_of_this_node_pass() -> Result<()> {
    labs(|lab, net| {
        each(&PROTOS, |proto| {
            lab.forget()?;
            lab.publish(net.node(), NODE_PORT, proto.number(net), 0, &[(net.routed(), TARGET)])?;
            passes(lab, &ask(net, proto))?;
            // A backend here, one on the host's network, one behind the overlay.
            for backend in [net.b(), net.node(), net.far()] {
                lab.forget()?;
                let (ask, arrives) = establish(lab, net, proto, backend)?;
                passes(lab, &later(&ask)).with_context(|| format!("backend {backend}"))?;
                passes(lab, &answer(&arrives)).with_context(|| format!("answer of {backend}"))?;
            }
            // Flows that are no Service's.
            lab.forget()?;
            let to_pod = from_outside(proto, (net.routed(), PORT), (net.a(), 80));
            lab.uplink_in(&to_pod)?;
            passes(lab, &later(&to_pod))?;
            passes(lab, &from_outside(proto, (net.world(), PORT), (net.node(), 22)))
        })
    })
}

/// What the kernel or `uplink_in` has to judge passes, of known flows, too.
#[test]
fn odd_packets_of_known_flows_pass() -> Result<()> {
    labs(|lab, net| {
        each(&PROTOS, |proto| {
            lab.forget()?;
            let (ask, arrives) = establish(lab, net, proto, net.routed())?;
            let more = later(&ask);
            let long = more.map(|f| f.payload = vec![0x5a; 64]);
            let [first, second] = &long.pieces(7, &[32])[..] else { anyhow::bail!("two pieces") };
            let mut odd = vec![
                ("its last hop", more.map(|f| f.ttl = 1)),
                ("another device's VLAN", more.map(|f| f.vlan = Some(5))),
                ("another host's MAC", more.map(|f| f.dmac = [2, 0, 0, 0, 0xaa, 1])),
                ("all hosts' MAC", more.map(|f| f.dmac = [0xff; 6])),
                ("a first fragment", first.clone()),
                ("a later fragment", second.clone()),
                ("an error about it", error(&arrives, net.router(), kinds(net)[0], 1000)),
            ];
            if net == Net::V4 {
                odd.push(("a source route", more.map(|f| f.options = vec![131, 3, 4, 0])));
            }
            for (what, frame) in odd {
                passes(lab, &frame).context(what)?;
            }
            Ok(())
        })?;
        // SCTP needs another checksum.
        let (ask, _) = establish(lab, net, Proto::Sctp, net.routed())?;
        passes(lab, &ask)
    })
}

/// "Fragmentation needed" is `uplink_in`'s to send. What may be fragmented is so by the kernel.
#[test]
fn what_does_not_fit_passes() -> Result<()> {
    labs(|lab, net| {
        each(&PROTOS, |proto| {
            lab.forget()?;
            let (ask, arrives) = establish(lab, net, proto, net.narrow())?;
            let more = later(&ask);
            passes(lab, &more.with_length(NARROW_MTU + 1))?;
            passes(lab, &more.with_length(NARROW_MTU + 1).map(|f| f.may_be_cut = true))?;
            let fits = more.with_length(NARROW_MTU);
            sends(lab, &fits, &fits.hop().between((net.node(), arrives.ports().0), (net.narrow(), TARGET)))
        })
    })
}

/// A source that was valid when the flow began is looked at again each second, and refused by `uplink_in`.
#[test]
fn a_source_that_became_forged_passes() -> Result<()> {
    labs(|lab, net| {
        each(&PROTOS, |proto| {
            lab.reset()?;
            let (ask, _) = establish(lab, net, proto, net.routed())?;
            let far = peer::flags::POD | peer::flags::TUNNEL;
            lab.put_peer(net.world(), None, far, Some(net.node2()))?;
            lab.age(Flow::of(&ask), 1)?;
            passes(lab, &later(&ask))?;
            lab.uplink_in(&later(&ask))?.dropped(DropReason::Spoofed)
        })
    })
}

/// While a next hop's MAC is not known, the kernel asks for it.
#[test]
fn a_next_hop_without_a_mac_passes() -> Result<()> {
    labs(|lab, net| {
        let hop = net.ip([172, 18, 0, 13], "fd00:18::13");
        each(&PROTOS, |proto| {
            lab.forget()?;
            let (ask, arrives) = establish(lab, net, proto, net.routed())?;
            let more = later(&ask);
            lab.ip(&format!("neigh del {hop} dev eth0"))?;
            lab.forget_turns()?;
            passes(lab, &more)?;
            lab.ip(MORE)?;
            lab.forget_turns()?;
            sends(lab, &more, &more.hop().between((net.node(), arrives.ports().0), (net.routed(), TARGET)))?;
            // The route leads out by another device.
            lab.ip(&format!("route replace {} dev virbr0", net.routed()))?;
            lab.forget_turns()?;
            passes(lab, &more)?;
            lab.ip(&format!("route del {} dev virbr0", net.routed()))
        })
    })
}

/// What the kernel said of a flow a moment ago counts for that flow on that device, and no longer than an eighth of a second.
#[test]
fn the_way_of_a_flow_is_its_own() -> Result<()> {
    /// The words of an element of `rn_turns` from the first address on: ports, protocol, time, device, MTU, MACs, node.
    const PORTS: usize = 8;
    const SINCE: usize = 10;
    labs(|lab, net| {
        let (ask, arrives) = open(lab, net, Proto::Udp, net.routed())?;
        let sport = arrives.ports().0;
        let word = |bytes: &[u8]| u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let address = |ip: IpAddr| {
            let bytes = match ip {
                IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                IpAddr::V6(ip) => ip.octets(),
            };
            bytes.chunks(4).map(word).collect::<Vec<_>>()
        };
        let macs = [MAC_HOST, [2, 0, 0, 0, 0x99, 1]].concat();
        let numbers = [u32::from(sport) << 16 | u32::from(TARGET), 17, lab.datapath().jiffies()?, UPLINK, 1500];
        let macs = macs.chunks(4).map(word);
        let addresses = address(net.node()).into_iter().chain(address(net.routed()));
        let own: Vec<u32> = addresses.chain(numbers).chain(macs).chain([0; 4]).collect();
        let is_used = |words: &[u32]| -> Result<bool> {
            lab.datapath().fill_all_percpu("rn_turns", words)?;
            let (verdict, out, _) = run(lab, &ask)?;
            ensure!(verdict == TX, "verdict {verdict}");
            Ok(out[..6] == [2, 0, 0, 0, 0x99, 1])
        };
        ensure!(is_used(&own)?, "the kernel is asked for each packet");
        // Of each address one word, the ports, the protocol, the device.
        for n in [3, 7, PORTS, 9, 11] {
            let other: Vec<u32> = own.iter().enumerate().map(|(i, word)| word ^ u32::from(i == n)).collect();
            ensure!(!is_used(&other)?, "word {n} is not compared");
        }
        let old: Vec<u32> =
            own.iter().enumerate().map(|(i, word)| if i == SINCE { word - HZ / 8 } else { *word }).collect();
        ensure!(!is_used(&old)?, "what is old counts");
        Ok(())
    })
}

/// The kernel asks a neighbour that it has not heard of for a while only where it sends something itself.
#[test]
fn one_packet_a_second_is_the_kernels_to_send() -> Result<()> {
    labs(|lab, net| {
        let (ask, arrives) = open(lab, net, Proto::Udp, net.routed())?;
        let leaves = ask.hop().between((net.node(), arrives.ports().0), (net.routed(), TARGET));
        sends(lab, &ask, &leaves)?;
        lab.forget_turns()?;
        let long_ago = lab.datapath().jiffies()?.wrapping_sub(HZ);
        lab.datapath().fill_all_percpu("rn_probed", &[long_ago])?;
        passes(lab, &ask)?;
        sends(lab, &ask, &leaves)?;
        sends(lab, &ask, &leaves)
    })
}

/// Without Services for clients outside, nobody looks.
#[test]
fn without_services_for_clients_outside_all_passes() -> Result<()> {
    labs(|lab, net| {
        let (ask, _) = establish(lab, net, Proto::Tcp, net.routed())?;
        lab.configure(|config| config.flags &= !rustnet_common::config::flags::EXTERNAL)?;
        passes(lab, &later(&ask))
    })
}

/// A flow opened, used, closed, and opened again: each frame with its direction.
fn life(ask: &Frame, arrives: &Frame) -> Vec<Frame> {
    let numbered = |f: &Frame, flags: u8, seq: u32, ack: u32, len: usize| {
        f.with_flags(flags).map(|f| {
            f.payload = vec![7; len];
            if let L4::Tcp { seq: s, ack: a, .. } = &mut f.l4 {
                (*s, *a) = (seq, if flags & ACK == 0 { 0 } else { ack });
            }
        })
    };
    let there = |flags, seq, ack, len| numbered(ask, flags, seq, ack, len);
    let back = |flags, seq, ack, len| numbered(&answer(arrives), flags, seq, ack, len);
    vec![
        there(SYN, 1000, 0, 0),
        back(SYN | ACK, 9000, 1001, 0),
        there(ACK, 1001, 9001, 0),
        there(ACK, 1001, 9001, 100),
        back(ACK, 9001, 1101, 300),
        // Far outside the window: counts for nothing.
        there(RST, 99_000_000, 0, 0),
        there(ACK | FIN, 1101, 9301, 0),
        back(ACK, 9301, 1102, 0),
        back(ACK | FIN, 9301, 1102, 0),
        there(ACK, 1102, 9302, 0),
        back(RST, 9302, 0, 0),
    ]
}

/// With XDP in front, connections have the states, times and counters that they have without.
#[test]
fn connections_are_followed_as_by_the_hook() -> Result<()> {
    labs(|lab, net| {
        let (ask, arrives) = open(lab, net, Proto::Tcp, net.routed())?;
        let run = |has_xdp: bool| -> Result<(Vec<[Half; 2]>, usize)> {
            lab.forget()?;
            let (mut sent, mut history) = (0, Vec::new());
            for frame in life(&ask, &arrives) {
                if has_xdp && run(lab, &frame)?.0 == TX {
                    sent += 1;
                } else {
                    lab.uplink_in(&frame)?;
                }
                let halves = [lab.half(Flow::of(&ask))?, lab.half(Flow::of(&arrives.reply()))?];
                history.push(halves.map(|half| Half { seen: 0, ..half }));
            }
            Ok((history, sent))
        };
        let (without, _) = run(false)?;
        let (with, sent) = run(true)?;
        ensure!(sent == without.len() - 1, "XDP has sent {sent} of them");
        for (n, (with, without)) in with.iter().zip(&without).enumerate() {
            ensure!(with == without, "after frame {n}: {with:?} instead of {without:?}");
        }
        Ok(())
    })
}

/// A SYN that opens another connection on the same ports is `uplink_in`'s, which chooses a backend.
#[test]
fn a_port_pair_that_is_used_again() -> Result<()> {
    labs(|lab, net| {
        let (ask, arrives) = open(lab, net, Proto::Tcp, net.routed())?;
        for frame in life(&ask, &arrives) {
            lab.uplink_in(&frame)?;
        }
        let (verdict, _, sent) = run(lab, &ask)?;
        ensure!((verdict, sent) == (PASS, 0), "verdict {verdict}");
        // The entry of the one before is gone.
        ensure!(lab.connections(net)?.is_empty(), "{:?}", lab.connections(net)?);
        lab.uplink_in(&ask)?;
        ensure!(lab.half(Flow::of(&ask))?.packets == 1);
        Ok(())
    })
}

/// A tunnel packet is never a flow's to this node.
#[test]
fn a_tunnel_packet_passes() -> Result<()> {
    labs(|lab, net| {
        let outer = from_outside(Proto::Udp, (net.node2(), PORT), (net.node(), 8472));
        passes(lab, &outer)
    })
}

/// Flows whose backend answers directly, on the node that the client asks and on the backend's.
#[test]
fn direct_server_return_passes() -> Result<()> {
    labs(|lab, net| {
        each(&PROTOS, |proto| {
            lab.publish(net.node(), NODE_PORT, proto.number(net), service::flags::DIRECT, &[(net.routed(), TARGET)])?;
            let ask = ask(net, proto);
            for f in [ask.clone(), later(&ask), later(&ask)] {
                passes(lab, &f)?;
                lab.uplink_in(&f)?;
            }
            ensure!(lab.half(Flow::of(&ask))?.flags & flags::DIRECT != 0, "{:?}", lab.half(Flow::of(&ask))?);
            passes(lab, &later(&ask))
        })
    })
}
