//! Hosts with several devices: masquerade takes the address of the device that a packet leaves by, and its answers find back.

use crate::errors::error;
use crate::flows::{ALL, PORT, Proto, as_from_a, from_a, from_outside};
use crate::frame::{Frame, L4};
use crate::harness::{
    BOTH, Flow, Lab, MAC_A, Net, OVERLAY, POD_A, POD_B, REDIRECT, SIDE, SNAT, STACK, UPLINK, each, lab, lab_apart, labs,
};
use anyhow::{Context, Result, ensure};
use rustnet_common::conntrack::flags;
use rustnet_common::drop::{DropReason, hook};
use rustnet_common::peer;
use std::net::IpAddr;
use testkit::datapath::Input;
use testkit::wait;

/// The uplink has an address other than the node's, as where the node's is on another device.
fn outside(net: Net) -> IpAddr {
    net.ip([172, 18, 0, 99], "fd00:18::99")
}

fn put_devices(lab: &Lab, net: Net) -> Result<()> {
    lab.put_device(UPLINK, Some(outside(net)))?;
    lab.put_device(SIDE, Some(net.side()))?;
    lab.put_peer(net.side(), None, peer::flags::HOST, None)?;
    lab.put_peer(outside(net), None, peer::flags::HOST, None)
}

#[test]
fn packets_to_the_world_get_the_address_of_their_device() -> Result<()> {
    labs(|lab, net| {
        put_devices(lab, net)?;
        each(&ALL, |proto| {
            let to = (net.world(), proto.port(443));
            let ask = from_a(net, proto, to);
            let leaves = ask.hop().between((outside(net), PORT), to);
            lab.pod_sends(&ask)?.onto_wire(&leaves)?;
            let answer = leaves.reply();
            lab.uplink_in(&answer)?.to_the_pod(&answer.hop().map(|f| f.dst = net.a()))?;
            // The flow keeps its address, whatever the device gets.
            lab.put_device(UPLINK, Some(net.ip([172, 18, 0, 77], "fd00:18::77")))?;
            lab.pod_sends(&ask)?.onto_wire(&leaves)?;
            put_devices(lab, net)
        })
    })
}

#[test]
fn a_device_without_addresses_leaves_the_nodes() -> Result<()> {
    labs(|lab, net| {
        put_devices(lab, net)?;
        lab.put_device(UPLINK, None)?;
        let to = (net.world(), 443);
        let ask = from_a(net, Proto::Tcp, to);
        lab.pod_sends(&ask)?.onto_wire(&ask.hop().between((net.node(), PORT), to))
    })
}

#[test]
fn a_machine_on_a_bridge_answers() -> Result<()> {
    labs(|lab, net| {
        put_devices(lab, net)?;
        each(&ALL, |proto| {
            let to = (net.machine(), proto.port(8000));
            let ask = from_a(net, proto, to);
            let leaves = ask.hop().between((net.side(), PORT), to);
            lab.pod_sends(&ask)?.onto_wire(&leaves)?;
            let half = lab.half(Flow::of(&ask))?;
            ensure!(half.flags == flags::NAT | flags::MASQ, "{half:?}");
            let answer = leaves.reply();
            lab.side_in(&answer)?.to_the_pod(&answer.hop().map(|f| f.dst = net.a()))
        })
    })
}

/// A frame with a tag is another device's, on top of this one: its network may have the same addresses.
#[test]
fn a_tagged_answer_is_another_devices() -> Result<()> {
    labs(|lab, net| {
        put_devices(lab, net)?;
        let to = (net.machine(), 8000);
        let ask = from_a(net, Proto::Tcp, to);
        lab.pod_sends(&ask)?;
        let answer = ask.hop().between((net.side(), PORT), to).reply();
        lab.side_in_tagged(Some(5), &answer)?.to_stack(&answer)?;
        lab.side_in(&answer)?.to_the_pod(&answer.hop().map(|f| f.dst = net.a()))
    })
}

/// An error about a masqueraded packet reaches the pod, by that device too.
#[test]
fn an_error_about_a_packet_to_a_machine() -> Result<()> {
    labs(|lab, net| {
        put_devices(lab, net)?;
        let ask = from_a(net, Proto::Udp, (net.machine(), 8000));
        let leaves = ask.hop().between((net.side(), PORT), (net.machine(), 8000));
        lab.pod_sends(&ask)?.onto_wire(&leaves)?;
        let kind = if net == Net::V4 { (3, 3, 0) } else { (1, 4, 0) };
        let shot = lab.side_in(&error(&leaves, net.machine(), kind, 64))?;
        ensure!(shot.verdict == REDIRECT, "{shot:?}");
        Ok(())
    })
}

/// What is no answer is the stack's, as on a device without programs: bridges are not ours to filter.
#[test]
fn all_else_by_such_a_device_is_the_stacks() -> Result<()> {
    labs(|lab, net| {
        put_devices(lab, net)?;
        lab.serve(net.vip(1), 80, 6, 0, &[(net.b(), 8080)])?;
        let ask = from_a(net, Proto::Tcp, (net.machine(), 8000));
        lab.pod_sends(&ask)?;
        let answer = ask.hop().between((net.side(), PORT), (net.machine(), 8000)).reply();
        for (what, frame) in [
            ("to a pod", answer.between((net.machine(), 8000), (net.a(), PORT))),
            ("to a service", answer.between((net.machine(), 8000), (net.vip(1), 80))),
            ("to this host", answer.between((net.machine(), 8000), (net.side(), 22))),
            ("to the world", answer.between((net.machine(), 8000), (net.world(), 443))),
            ("from another network's address", answer.between((net.nobody(), 8000), (net.side(), PORT))),
        ] {
            lab.side_in(&frame)?.to_stack(&frame).context(what)?;
        }
        for (what, source) in [
            ("a pod", net.b()),
            ("a service", net.vip(1)),
            ("a remote pod", net.far()),
            ("this node", net.node()),
            ("this host", net.side()),
        ] {
            for target in [(net.side(), PORT), (net.a(), 8080), (net.world(), 443)] {
                let frame = answer.between((source, 8000), target);
                lab.side_in(&frame)?.dropped(DropReason::Spoofed).with_context(|| format!("{what} to {target:?}"))?;
            }
        }
        Ok(())
    })
}

/// A flow that keeps the pod's address is no masqueraded one: its answers go by the routes of the stack.
#[test]
fn answers_to_a_flow_that_nothing_translates_are_the_stacks() -> Result<()> {
    labs(|lab, net| {
        put_devices(lab, net)?;
        lab.put_peer(net.machine(), None, peer::flags::NO_MASQ, None)?;
        each(&ALL, |proto| {
            let ask = from_a(net, proto, (net.machine(), proto.port(8000)));
            lab.pod_sends(&ask)?.onto_wire(&ask.hop())?;
            let answer = ask.hop().reply();
            lab.side_in(&answer)?.to_stack(&answer)
        })
    })
}

/// The host has to hear that another one on the link has its address (RFC 4862, 5.4).
#[test]
fn discovery_by_such_a_device_is_the_stacks() -> Result<()> {
    lab(|lab| {
        let net = Net::V6;
        put_devices(lab, net)?;
        for kind in [135, 136] {
            for (source, target) in [(net.side(), net.node()), (net.node(), net.side()), (net.machine(), net.side())] {
                let frame = from_outside(Proto::Udp, (source, 0), (target, 0)).map(|f| {
                    f.l4 = L4::Icmp { kind, code: 0, rest: 0 };
                    f.payload = vec![0; 24];
                    f.ttl = 255;
                });
                lab.side_in(&frame)?.to_stack(&frame).with_context(|| format!("type {kind} from {source}"))?;
            }
        }
        Ok(())
    })
}

/// Other nodes know the host by the node's address, whatever device its packets to their pods leave by.
#[test]
fn the_host_speaks_to_other_nodes_as_the_node() -> Result<()> {
    labs(|lab, net| {
        put_devices(lab, net)?;
        for (backend, source) in [(net.routed(), net.node()), (net.world(), outside(net))] {
            lab.forget()?;
            lab.serve(net.vip(2), 80, 6, 0, &[(backend, 8080)])?;
            let ask = from_a(net, Proto::Tcp, (net.vip(2), 80)).map(|f| f.src = net.node());
            let shot = lab.uplink_out(&ask)?;
            let sport = lab.half(Flow::of(&ask))?.to.sport;
            shot.onto_wire(&ask.between((source, sport), (backend, 8080)))?;
        }
        Ok(())
    })
}

/// What netfilter forwards to a pod, as a published port does, is answered through netfilter: it alone can translate the answer.
#[test]
fn answers_to_what_the_stack_forwarded_go_to_the_stack() -> Result<()> {
    labs(|lab, net| {
        put_devices(lab, net)?;
        for client in [net.world(), net.machine(), net.node2()] {
            let comes = from_a(net, Proto::Tcp, (net.b(), 8080)).map(|f| {
                f.src = client;
                f.smac = crate::harness::MAC_HOST;
                f.dmac = MAC_A;
            });
            let comes = comes.between((client, PORT), (net.a(), 8080));
            lab.to_pod(POD_A, &comes)?.to_stack(&comes)?;
            let answer = comes.reply().map(|f| (f.smac, f.dmac) = (MAC_A, crate::harness::MAC_HOST));
            lab.pod_sends(&answer)?.to_stack(&answer).with_context(|| format!("to {client}"))?;
            let half = lab.half(Flow::of(&comes))?;
            ensure!(half.flags & flags::VIA_STACK != 0, "{half:?}");
        }
        // What the pod opens towards the same client takes the short way.
        let ask = from_a(net, Proto::Tcp, (net.machine(), 8000));
        lab.pod_sends(&ask)?.onto_wire(&ask.hop().between((net.side(), PORT), (net.machine(), 8000)))
    })
}

/// The pod refuses what netfilter forwarded to it: netfilter alone can translate the error, and what it quotes.
#[test]
fn errors_about_what_the_stack_forwarded_go_to_the_stack() -> Result<()> {
    labs(|lab, net| {
        put_devices(lab, net)?;
        let kind = if net == Net::V4 { (3, 3, 0) } else { (1, 4, 0) };
        for client in [net.world(), net.machine(), net.node2()] {
            let comes = from_a(net, Proto::Udp, (net.a(), 8080)).map(|f| {
                (f.smac, f.dmac) = (crate::harness::MAC_HOST, MAC_A);
            });
            let comes = comes.between((client, PORT), (net.a(), 8080));
            lab.to_pod(POD_A, &comes)?.to_stack(&comes)?;
            let error = as_from_a(&error(&comes, net.a(), kind, 64));
            lab.pod_sends(&error)?.to_stack(&error).with_context(|| format!("to {client}"))?;
        }
        Ok(())
    })
}

/// Of two next hops, the kernel chooses by addresses, and with some settings by ports. What masquerade makes of them is no
/// reason to take the other one from the second packet on, with the address of the first one's device.
#[test]
fn a_flow_over_two_next_hops_stays_on_its_device() -> Result<()> {
    const WAYS: &str = "\
        link set virbr0 mtu 1400
        nexthop add id 1 via 172.18.0.1 dev eth0
        nexthop add id 2 via 192.168.122.10 dev virbr0
        nexthop add id 3 group 1/2
        nexthop add id 4 via fd00:18::1 dev eth0
        nexthop add id 5 via fd00:7::10 dev virbr0
        nexthop add id 6 group 4/5
        route add 198.18.0.0/15 nhid 3
        route add 2001:db8:18::/48 nhid 6";
    lab_apart(|lab| {
        lab.ip(WAYS)?;
        for net in BOTH {
            put_devices(lab, net)?;
            for policy in ["0", "1"] {
                let sysctl = if net == Net::V4 { "ipv4" } else { "ipv6" };
                lab.sysctl(&format!("{sysctl}/fib_multipath_hash_policy"), policy)?;
                lab.forget()?;
                let mut by_side = 0;
                for host in 1..=64_u8 {
                    let to = net.ip([198, 18, 0, host], &format!("2001:db8:18::{host:x}"));
                    let place = || format!("{net:?}, policy {policy}, to {to}");
                    let ask = from_a(net, Proto::Udp, (to, 53)).map(|f| f.set_ports(1000, 53));
                    lab.pod_sends(&ask)?;
                    let source = lab.half(Flow::of(&ask))?.to.src;
                    // No packet of this length fits into the narrow one.
                    let long = ask.map(|f| f.payload = vec![7; 1400]);
                    let counted = lab.pod_sends(&long)?.counted;
                    let is_by_side = counted.contains_key(&(DropReason::FragNeeded as u8, 0));
                    ensure!((source == net.side()) == is_by_side, "{}: {source}, {counted:?}", place());
                    by_side += usize::from(is_by_side);
                }
                ensure!((1..64).contains(&by_side), "{net:?}, policy {policy}: {by_side} of 64 flows by one device");
            }
        }
        Ok(())
    })
}

/// The host has a socket at the port that a pod would keep: answers for one would be taken for the other's.
#[test]
fn a_port_that_a_socket_of_the_host_has_is_not_kept() -> Result<()> {
    labs(|lab, net| {
        put_devices(lab, net)?;
        let any: IpAddr = if net == Net::V4 { IpAddr::from([0; 4]) } else { IpAddr::from([0_u16; 8]) };
        for port in [*SNAT.start(), *SNAT.start() + 301, *SNAT.end()] {
            let ask = |proto| from_a(net, proto, (net.world(), 123)).map(|f| f.set_ports(port, 123));
            let chosen = |proto| -> Result<u16> {
                lab.forget()?;
                lab.pod_sends(&ask(proto))?;
                Ok(lab.half(Flow::of(&ask(proto)))?.to.sport)
            };
            ensure!(chosen(Proto::Udp)? == port && chosen(Proto::Tcp)? == port, "a free port is kept");
            let datagrams = std::net::UdpSocket::bind((any, port))?;
            let other = chosen(Proto::Udp)?;
            ensure!(other != port && SNAT.contains(&other), "{other}");
            // One that listens takes no answers.
            let listener = std::net::TcpListener::bind((any, port))?;
            ensure!(chosen(Proto::Tcp)? == port, "a listening socket is no rival");
            drop((datagrams, listener));
            // Another test may be between fork and exec, with a copy of each descriptor.
            wait::until("the port is free again", || {
                let again = chosen(Proto::Udp)?;
                ensure!(again == port, "{again}");
                Ok(())
            })?;
        }
        Ok(())
    })
}

/// Nobody gets tunnel packets through a pod, not by beginning from the overlay's port either.
#[test]
fn an_answer_to_the_overlays_port_does_not_go_to_the_stack() -> Result<()> {
    labs(|lab, net| {
        let comes = from_a(net, Proto::Udp, (net.b(), 8080)).map(|f| {
            f.smac = crate::harness::MAC_HOST;
            f.dmac = MAC_A;
        });
        let comes = comes.between((net.node2(), 8472), (net.a(), 8080));
        lab.to_pod(POD_A, &comes)?.to_stack(&comes)?;
        let answer = comes.reply().map(|f| (f.smac, f.dmac) = (MAC_A, crate::harness::MAC_HOST));
        lab.pod_sends(&answer)?.dropped(DropReason::EncapProhibited)
    })
}

/// No pod gets an error about what it has not sent, by a side device and the stack either.
#[test]
fn an_error_of_a_machine_about_no_flow() -> Result<()> {
    labs(|lab, net| {
        put_devices(lab, net)?;
        let kind = if net == Net::V4 { (3, 3, 0) } else { (1, 4, 0) };
        let forwarded = |f: &Frame| {
            let f = f.map(|f| (f.smac, f.dmac) = (crate::harness::MAC_HOST, MAC_A));
            lab.raw(hook::TO_POD, &Input { frame: &f.bytes(), ifindex: POD_A, came_by: SIDE, ..Input::default() })
        };
        for about in [net.machine(), net.b(), net.world()] {
            let never_sent = from_a(net, Proto::Udp, (about, 8000));
            forwarded(&error(&never_sent, net.machine(), kind, 64))?
                .dropped(DropReason::IcmpUnrelated)
                .with_context(|| format!("about a packet to {about}"))?;
        }
        // One about what the pod answered, and the host's own about whatever the host saw.
        let comes = from_outside(Proto::Udp, (net.machine(), 8000), (net.a(), PORT));
        lab.to_pod(POD_A, &comes.map(|f| (f.smac, f.dmac) = (crate::harness::MAC_HOST, MAC_A)))?;
        let f = error(&comes.reply(), net.machine(), kind, 64);
        ensure!(forwarded(&f)?.verdict == STACK, "an error about an answer");
        let never_tracked = from_a(net, Proto::Udp, (net.unreachable(), 8000));
        let f = error(&never_tracked, net.node(), kind, 64);
        let f = f.map(|f| (f.smac, f.dmac) = (crate::harness::MAC_HOST, MAC_A));
        lab.to_pod(POD_A, &f)?.to_stack(&f)
    })
}

/// Devices without programs of ours, of layer 3 say, bring any source, and the stack forwards it: a pod's address comes from that pod
/// all the same, and a remote pod's out of the tunnel.
#[test]
fn a_pods_address_is_not_forwarded_from_elsewhere() -> Result<()> {
    labs(|lab, net| {
        put_devices(lab, net)?;
        let comes = |proto, src: IpAddr| {
            from_outside(proto, (src, proto.port(8000)), (net.a(), PORT))
                .map(|f| (f.smac, f.dmac) = (crate::harness::MAC_HOST, MAC_A))
        };
        let forwarded = |came_by, f: &Frame| {
            lab.raw(hook::TO_POD, &Input { frame: &f.bytes(), ifindex: POD_A, came_by, ..Input::default() })
        };
        each(&ALL, |proto| {
            for (src, own) in [(net.b(), POD_B), (net.far(), OVERLAY)] {
                let f = comes(proto, src);
                for elsewhere in [SIDE, UPLINK, POD_A] {
                    let shot = forwarded(elsewhere, &f)?;
                    shot.dropped(DropReason::Spoofed).with_context(|| format!("{src} by {elsewhere}"))?;
                }
                ensure!(lab.halves()? == 0, "a trace of {src}");
                // What netfilter redirects, and a proxy of the host that keeps its client's address.
                for at_home in [own, 0] {
                    forwarded(at_home, &f)?.to_stack(&f).with_context(|| format!("{src} by {at_home}"))?;
                }
                // A known flow is no way around.
                forwarded(SIDE, &f)?.dropped(DropReason::Spoofed)?;
                lab.forget()?;
            }
            for src in [net.machine(), net.world(), net.node2(), net.nobody(), net.node(), net.routed()] {
                let f = comes(proto, src);
                forwarded(SIDE, &f)?.to_stack(&f).with_context(|| format!("{src}"))?;
            }
            lab.forget()
        })
    })
}
