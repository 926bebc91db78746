//! Link protocols from a pod: ARP, neighbour and router discovery, and other protocols than IP. The
//! host answers none of them and stores no entry.

use crate::forged::stage::{Control, Family, INNER, Mark, Place, Sender, Shot, Stage, Trial, in_routings};
use anyhow::{Result, anyhow, ensure};
use rustnet_common::drop::DropReason;
use std::net::{Ipv4Addr, Ipv6Addr};
use testkit::packet::{Macs, Probe, arp, discovery, other};
use testkit::sniff::Sniffer;
use testkit::{Netns, Pod};

in_routings!(
    vxlan = Vxlan, native = Native, direct_and_vxlan = DirectAndVxlan;
    (arp_and_other_protocols, neighbour_and_router_discovery)
);

/// Entries of a host for a pod's link, and its default routes.
#[derive(Debug, PartialEq, Eq)]
struct Known {
    neighbours: String,
    addresses: String,
    routes: String,
}

impl Known {
    fn of(host: &Netns, interface: &str) -> Result<Self> {
        let ip = |args: &str| -> Result<String> {
            let args: Vec<_> = args.split(' ').collect();
            let mut lines: Vec<String> = host.exec("ip", &args)?.lines().map(ToOwned::to_owned).collect();
            lines.sort();
            Ok(lines.join("\n"))
        };
        Ok(Self {
            neighbours: ip(&format!("-6 neigh show dev {interface}"))?
                + &ip(&format!("-4 neigh show dev {interface}"))?,
            addresses: ip(&format!("-o addr show dev {interface} scope global"))?,
            routes: ip("-6 route show default")? + &ip(&format!("-6 route show dev {interface}"))?,
        })
    }
}

/// A new pod on node 1, whose host takes router advertisements and ARP announcements by default.
fn pod_of_an_open_host(stage: &Stage<'_>, name: &str) -> Result<Pod> {
    let host = stage.node(1).netns();
    let defaults = [("ipv6/conf/default/accept_ra", "2", "0"), ("ipv4/conf/default/arp_accept", "1", "0")];
    for (key, open, _) in defaults {
        host.sysctl(key, open)?;
    }
    let pod = stage.node(1).add_pod(name);
    for (key, _, closed) in defaults {
        host.sysctl(key, closed)?;
    }
    let pod = pod?;
    let veth = pod.host_interface()?;
    for (key, wanted) in [
        (format!("ipv6/conf/{veth}/accept_ra"), "0"),
        (format!("ipv4/conf/{veth}/arp_accept"), "0"),
        (format!("ipv4/conf/{veth}/arp_ignore"), "8"),
    ] {
        let value = host.read_sysctl(&key)?;
        ensure!(value == wanted, "{key} is {value}, not {wanted}");
    }
    Ok(pod)
}

/// A kind of frames: its name, the reasons to drop it, and how to make it for a pod.
type Row<'a> = (&'a str, &'a [DropReason], &'a dyn Fn(&Mark, Macs, &Pod) -> Result<Vec<Shot>>);

/// Sends frames. Afterwards the host has no new entry, and the pod has received no answer.
fn leaves_nothing(stage: &Stage<'_>, name: &str, rows: &[Row<'_>]) -> Result<()> {
    let pod = pod_of_an_open_host(stage, name)?;
    let (host, veth) = (stage.node(1).netns(), pod.host_interface()?);
    let sender = Sender::of(&pod)?;
    let mut trial = Trial::new(stage)?;
    for family in Family::ALL {
        let (own, to) = (family.of(&pod)?, (family.of(&stage.net.b)?, trial.watch.port).into());
        let control = Control {
            sender: &sender,
            make: &|mark| Ok(vec![mark.shot(Probe::Udp, sender.macs, own, to)?]),
            place: Place::Pod("b"),
            source: Some(own),
        };
        for (what, reasons, forged) in rows {
            trial.legitimate(what, &control)?;
            let before = Known::of(host, veth)?;
            let heard = Sniffer::start_short(pod.netns(), "eth0")?;
            trial.refused(what, &sender, reasons, &|mark| forged(mark, sender.macs, &pod), &control)?;
            Sniffer::catch_up([&heard])?;
            let after = Known::of(host, veth)?;
            trial.holds(what, same(&before, &after));
            let answers = heard.matching(3, |frame| !frame.outgoing && is_of_the_link(&frame.bytes));
            let bytes: Vec<_> = answers.iter().map(|frame| &frame.bytes).collect();
            trial.holds(what, if bytes.is_empty() { Ok(()) } else { Err(anyhow!("answered by {bytes:02x?}")) });
        }
    }
    trial.finish()
}

fn same(before: &Known, after: &Known) -> Result<()> {
    ensure!(before == after, "the host has new entries: before {before:#?}, after {after:#?}");
    Ok(())
}

/// ARP, and ICMPv6 133 to 137 without extension headers.
fn is_of_the_link(frame: &[u8]) -> bool {
    match frame.get(12..14) {
        Some([0x08, 0x06]) => true,
        Some([0x86, 0xdd]) => frame.get(20) == Some(&58) && matches!(frame.get(54), Some(133..=137)),
        _ => false,
    }
}

fn arp_and_other_protocols(stage: &Stage<'_>) -> Result<()> {
    leaves_nothing(
        stage,
        "arping",
        &[
            ("ARP", &[DropReason::UnsupportedL2], &|_, macs, pod| {
                let own = pod.v4()?;
                let mut senders: Vec<Ipv4Addr> = (1..=20).map(|n| Ipv4Addr::new(10, 244, 1, 200 + n)).collect();
                senders.extend([own, stage.net.b.v4()?, stage.node(1).v4(), stage.node(2).v4(), Ipv4Addr::UNSPECIFIED]);
                senders.push(Ipv4Addr::from(rustnet_common::names::GATEWAY4));
                let targets = [stage.node(1).v4(), stage.net.b.v4()?, stage.net.c.v4()?, own];
                let gateway = Ipv4Addr::from(rustnet_common::names::GATEWAY4);
                let mut shots = Vec::new();
                for sender in senders {
                    for target in targets.into_iter().chain([gateway, sender]) {
                        for operation in [1, 2] {
                            for to in [macs.to, [0xff; 6]] {
                                shots.push(Shot::Frame(arp(Macs { to, ..macs }, operation, sender, target)));
                            }
                        }
                    }
                }
                Ok(shots)
            }),
            ("other protocols", &[DropReason::UnsupportedL2], &|mark, macs, _| {
                // RARP, Wake-on-LAN, MPLS, PPPoE, 802.1X, LLDP, MACsec, PTP, TRILL, 802.3 with LLC
                // (a spanning tree's frame).
                let kinds = [0x8035, 0x0842, 0x8847, 0x8863, 0x8864, 0x888e, 0x88cc, 0x88e5, 0x88f7, 0x22f3, 0x0026];
                let mut shots = Vec::new();
                for kind in kinds {
                    for to in [macs.to, [0xff; 6], [1, 0x80, 0xc2, 0, 0, 0]] {
                        let payload = [&[0x42, 0x42, 3][..], mark.bytes(), &[0; 40]].concat();
                        shots.push(Shot::Frame(other(Macs { to, ..macs }, kind, &payload)));
                    }
                }
                Ok(shots)
            }),
            ("an EtherType that is not the packet's", &[DropReason::Malformed], &|mark, macs, pod| {
                let mut shots = Vec::new();
                for (family, wrong) in [(Family::V4, 0x86dd), (Family::V6, 0x0800)] {
                    let to = (family.of(&stage.net.b)?, 53).into();
                    let frame = mark.frame(Probe::Udp, INNER, family.of(pod)?, to)?;
                    shots.push(Shot::Frame(other(macs, wrong, &frame[14..])));
                }
                Ok(shots)
            }),
        ],
    )
}

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
const GATEWAY: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// The option that holds a link-layer address: 1 of the source, 2 of the target (RFC 4861, 4.6.1).
fn link_layer(kind: u8, mac: [u8; 6]) -> Vec<u8> {
    [&[kind, 1][..], &mac].concat()
}

/// A router of high preference, with a prefix for addresses, a route, and a name server (RFC 4861,
/// 4191, 8106).
fn advertisement(macs: Macs) -> Vec<u8> {
    let lifetime = 1800_u32.to_be_bytes();
    let prefix = "2001:db8:bad::".parse().unwrap_or(Ipv6Addr::UNSPECIFIED).octets();
    let mut body = vec![0; 8];
    body.extend(link_layer(1, macs.from));
    body.extend([&[3, 4, 64, 0xc0][..], &lifetime, &lifetime, &[0; 4], &prefix].concat());
    body.extend([&[24, 2, 48, 0x08][..], &lifetime, &prefix[..8]].concat());
    body.extend([&[25, 3, 0, 0][..], &lifetime, &prefix].concat());
    body
}

fn neighbour_and_router_discovery(stage: &Stage<'_>) -> Result<()> {
    let node1 = stage.node(1).v6();
    let reasons = [DropReason::NdNotForwarded, DropReason::Spoofed, DropReason::Martian];
    let senders = |pod: &Pod| -> Result<Vec<Ipv6Addr>> {
        let link_local = (1..=20).map(|n| Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0xa0 + n));
        Ok(link_local.chain([pod.v6()?, stage.net.b.v6()?, node1, GATEWAY, Ipv6Addr::UNSPECIFIED]).collect())
    };
    let to_all = |macs: Macs| Macs { to: [0x33, 0x33, 0, 0, 0, 1], ..macs };
    let each = |pod: &Pod, make: &dyn Fn(Ipv6Addr) -> Result<Vec<Vec<u8>>>| -> Result<Vec<Shot>> {
        let mut shots = Vec::new();
        for sender in senders(pod)? {
            shots.extend(make(sender)?.into_iter().map(Shot::Frame));
        }
        Ok(shots)
    };
    leaves_nothing(
        stage,
        "advertiser",
        &[
            ("router advertisements", &reasons, &|_, macs, pod| {
                each(pod, &|from| {
                    // Hop limit 64, preference high, lifetime 1800 s.
                    let rest = u32::from_be_bytes([64, 0x08, 0x07, 0x08]);
                    let body = advertisement(macs);
                    let to = [(to_all(macs), ALL_NODES), (macs, GATEWAY), (macs, node1)];
                    to.iter().map(|(macs, to)| discovery(*macs, from, *to, 134, rest, &body)).collect()
                })
            }),
            ("router solicitations", &reasons, &|_, macs, pod| {
                each(pod, &|from| {
                    let body = link_layer(1, macs.from);
                    let to = [(to_all(macs), ALL_ROUTERS), (macs, GATEWAY), (macs, node1)];
                    to.iter().map(|(macs, to)| discovery(*macs, from, *to, 133, 0, &body)).collect()
                })
            }),
            ("neighbour solicitations", &reasons, &|_, macs, pod| {
                each(pod, &|from| {
                    let mut frames = Vec::new();
                    for target in [GATEWAY, node1, stage.net.b.v6()?, pod.v6()?] {
                        let o = target.octets();
                        let solicited = Ipv6Addr::new(
                            0xff02,
                            0,
                            0,
                            0,
                            0,
                            1,
                            0xff00 | u16::from(o[13]),
                            u16::from_be_bytes([o[14], o[15]]),
                        );
                        let body = [&o[..], &link_layer(1, macs.from)].concat();
                        for to in [solicited, target] {
                            frames.push(discovery(macs, from, to, 135, 0, &body)?);
                        }
                    }
                    Ok(frames)
                })
            }),
            ("neighbour advertisements", &reasons, &|_, macs, pod| {
                each(pod, &|from| {
                    let body = |target: Ipv6Addr| [&target.octets()[..], &link_layer(2, macs.from)].concat();
                    let targets = [GATEWAY, node1, stage.net.b.v6()?, from];
                    let to = [ALL_NODES, GATEWAY];
                    let all = targets.iter().flat_map(|target| to.map(|to| (*target, to)));
                    // Router, solicited, override.
                    all.map(|(target, to)| discovery(macs, from, to, 136, 0xe000_0000, &body(target))).collect()
                })
            }),
            ("redirects", &reasons, &|_, macs, pod| {
                each(pod, &|from| {
                    let body = [pod.v6()?.octets(), stage.net.c.v6()?.octets()].concat();
                    [GATEWAY, node1].iter().map(|to| discovery(macs, from, *to, 137, 0, &body)).collect()
                })
            }),
            ("multicast of other kinds", &reasons, &|mark, macs, pod| {
                let mut shots = Vec::new();
                for (family, groups) in [
                    (Family::V4, ["224.0.0.1", "224.0.0.251", "239.1.2.3", "255.255.255.255"]),
                    (Family::V6, ["ff02::1", "ff02::fb", "ff0e::1:2", "fe80::1"]),
                ] {
                    for group in groups {
                        shots.push(mark.shot(
                            Probe::Udp,
                            macs,
                            family.of(pod)?,
                            (family.ip(group, group)?, 5353).into(),
                        )?);
                    }
                }
                Ok(shots)
            }),
        ],
    )
}
