//! Ports of the node that pods have.

use crate::errors::{error, translated};
use crate::flows::{PORT, Proto, SERVED, TARGET, answer_of_b, as_from_b, from_a, from_outside, later};
use crate::frame::{ACK, Frame, SYN};
use crate::harness::{Flow, Lab, MAC_B, Net, POD_A, POD_B, REDIRECT, each, labs};
use crate::icmp::kinds;
use anyhow::{Result, ensure};
use rustnet_common::conntrack::flags;
use rustnet_common::drop::DropReason;
use rustnet_common::endpoint;
use rustnet_common::peer;
use std::net::{IpAddr, SocketAddr, UdpSocket};

/// A port that pods like to have.
const HOST_PORT: u16 = 8081;

/// A client outside asks the port at an address.
fn ask_at(net: Net, proto: Proto, at: IpAddr) -> Frame {
    from_outside(proto, (net.world(), PORT), (at, HOST_PORT))
}

fn ask(net: Net, proto: Proto) -> Frame {
    ask_at(net, proto, net.node())
}

/// Pod B gets the port at all addresses of the node.
fn give(lab: &Lab, net: Net, proto: Proto) -> Result<()> {
    lab.put_port_of_all(HOST_PORT, proto.number(net), (net.b(), TARGET), POD_B)
}

fn arrives_at_b(net: Net, ask: &Frame) -> Frame {
    ask.hop().between((net.world(), PORT), (net.b(), TARGET))
}

#[test]
fn clients_outside_keep_their_address() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            give(lab, net, proto)?;
            let ask = ask(net, proto);
            let arrives = arrives_at_b(net, &ask);
            lab.uplink_in(&ask)?.to_the_pod(&arrives)?;
            let answer = answer_of_b(&arrives);
            let leaves = answer.hop().between((net.node(), HOST_PORT), (net.world(), PORT));
            lab.pod_sends(&answer)?.onto_wire(&leaves)?;
            lab.uplink_in(&later(&ask))?.to_the_pod(&later(&arrives))?;
            let (there, back) = (lab.half(Flow::of(&ask))?, lab.half(Flow::of(&answer))?);
            let want = flags::NAT | flags::EXTERNAL;
            ensure!((there.flags, back.flags) == (want, want | flags::REPLY), "{there:?} {back:?}");
            ensure!((there.backend, back.backend) == (0, 0), "{there:?} {back:?}");
            Ok(())
        })
    })
}

/// No agent has to live: a node without Services for clients outside has no setting that says so.
#[test]
fn without_services_for_clients_outside() -> Result<()> {
    labs(|lab, net| {
        lab.configure(|c| c.flags &= !rustnet_common::config::flags::EXTERNAL)?;
        give(lab, net, Proto::Udp)?;
        let ask = ask(net, Proto::Udp);
        lab.uplink_in(&ask)?.to_the_pod(&arrives_at_b(net, &ask))
    })
}

/// Each address of the node, and no other; or the one that the pod names, before those that name none.
#[test]
fn at_all_addresses_or_one() -> Result<()> {
    labs(|lab, net| {
        let second = net.ip([172, 18, 0, 200], "fd00:18::c8");
        lab.put_peer(second, None, peer::flags::HOST, None)?;
        each(&SERVED, |proto| {
            give(lab, net, proto)?;
            for at in [net.node(), second] {
                // One client's port leads to one pod once.
                lab.forget()?;
                let ask = ask_at(net, proto, at);
                lab.uplink_in(&ask)?.to_the_pod(&arrives_at_b(net, &ask))?;
            }
            // Another host's, and one of this node's pod range that nobody has.
            for at in [net.world(), net.nobody()] {
                let ask = ask_at(net, proto, at);
                ensure!(lab.uplink_in(&ask)?.verdict != REDIRECT, "{at}");
            }
            lab.forget()?;
            lab.put_host_port((second, HOST_PORT), proto.number(net), (net.a(), TARGET), POD_A)?;
            let own = ask_at(net, proto, second);
            let shot = lab.uplink_in(&own)?;
            ensure!(shot.verdict == REDIRECT, "{shot:?}");
            let to = lab.half(Flow::of(&own))?.to;
            ensure!((to.dst, to.dport) == (net.a(), TARGET), "{to:?}");
            let other = ask(net, proto);
            lab.uplink_in(&other)?.to_the_pod(&arrives_at_b(net, &other))?;
            // An address that is not the node's is none of a pod's either.
            lab.put_host_port((net.world(), HOST_PORT), proto.number(net), (net.b(), TARGET), POD_B)?;
            let stray = from_a(net, proto, (net.world(), HOST_PORT));
            lab.pod_sends(&stray)?.onto_wire(&stray.hop().between((net.node(), PORT), (net.world(), HOST_PORT)))
        })
    })
}

/// Another port, protocol or family is the host's.
#[test]
fn other_ports_are_the_hosts() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            lab.drop_host_ports()?;
            give(lab, net, proto)?;
            let other_port = from_outside(proto, (net.world(), PORT), (net.node(), HOST_PORT + 1));
            lab.uplink_in(&other_port)?.to_stack(&other_port)?;
            for other in SERVED.into_iter().filter(|other| *other != proto) {
                let f = ask(net, other);
                lab.uplink_in(&f)?.to_stack(&f)?;
            }
            let family = if net == Net::V4 { Net::V6 } else { Net::V4 };
            let f = ask(family, proto);
            lab.uplink_in(&f)?.to_stack(&f)
        })
    })
}

#[test]
fn clients_of_other_nodes() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            give(lab, net, proto)?;
            let ask = from_outside(proto, (net.far(), PORT), (net.node(), HOST_PORT));
            let arrives = ask.hop().between((net.far(), PORT), (net.b(), TARGET));
            lab.overlay_in(net.node2(), &ask)?.to_the_pod(&arrives)?;
            let answer = answer_of_b(&arrives);
            lab.pod_sends(&answer)?.onto_wire(&answer.hop().between((net.node(), HOST_PORT), (net.far(), PORT)))
        })
    })
}

#[test]
fn clients_on_a_bridge_of_machines() -> Result<()> {
    labs(|lab, net| {
        lab.put_peer(net.side(), None, peer::flags::HOST, None)?;
        each(&SERVED, |proto| {
            give(lab, net, proto)?;
            let ask = from_outside(proto, (net.machine(), PORT), (net.side(), HOST_PORT));
            let arrives = ask.hop().between((net.machine(), PORT), (net.b(), TARGET));
            lab.side_in(&ask)?.to_the_pod(&arrives)?;
            let answer = answer_of_b(&arrives);
            lab.pod_sends(&answer)?.onto_wire(&answer.hop().between((net.side(), HOST_PORT), (net.machine(), PORT)))?;
            lab.side_in(&later(&ask))?.to_the_pod(&later(&arrives))
        })
    })
}

#[test]
fn pods_of_this_node() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            give(lab, net, proto)?;
            let ask = from_a(net, proto, (net.node(), HOST_PORT));
            let arrives = ask.hop().between((net.a(), PORT), (net.b(), TARGET));
            lab.pod_sends(&ask)?.to_the_pod(&arrives)?;
            let answer = answer_of_b(&arrives);
            lab.pod_sends(&answer)?.to_the_pod(&answer.hop().between((net.node(), HOST_PORT), (net.a(), PORT)))
        })
    })
}

/// It sees the node's address, as with a Service of its own.
#[test]
fn the_pod_itself() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            lab.put_port_of_all(HOST_PORT, proto.number(net), (net.a(), TARGET), POD_A)?;
            let ask = from_a(net, proto, (net.node(), HOST_PORT));
            lab.pod_sends(&ask)?.to_the_pod(&ask.hop().between((net.node(), PORT), (net.a(), TARGET)))
        })
    })
}

/// What a Service has at an address of the node is the Service's.
#[test]
fn services_come_first() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            give(lab, net, proto)?;
            lab.publish(net.node(), HOST_PORT, proto.number(net), 0, &[(net.a(), TARGET)])?;
            lab.serve_at_node(net.node(), HOST_PORT, proto.number(net), &[(net.a(), TARGET)])?;
            for ask in [ask(net, proto), from_a(net, proto, (net.node(), HOST_PORT))] {
                let shot = if ask.smac == crate::harness::MAC_A { lab.pod_sends(&ask)? } else { lab.uplink_in(&ask)? };
                ensure!(shot.verdict == REDIRECT, "{shot:?}");
                let to = lab.half(Flow::of(&ask))?.to;
                ensure!((to.dst, to.dport) == (net.a(), TARGET), "{to:?}");
            }
            lab.publish(net.node(), HOST_PORT, proto.number(net), 0, &[])?;
            let refused = lab.uplink_in(&ask(net, proto).map(|f| f.set_ports(PORT + 1, HOST_PORT)))?;
            ensure!(refused.counted.keys().any(|(reason, _)| *reason == DropReason::NoBackend as u8), "{refused:?}");
            Ok(())
        })
    })
}

/// An entry that a pod has left behind leads nowhere: not to whoever has its address now, and not out of the node.
#[test]
fn a_pod_that_has_gone() -> Result<()> {
    labs(|lab, net| {
        give(lab, net, Proto::Udp)?;
        let ask = ask(net, Proto::Udp);
        lab.uplink_in(&ask)?.to_the_pod(&arrives_at_b(net, &ask))?;
        lab.put_endpoint(net.b(), POD_B + 1, MAC_B)?;
        // A second at most, and its flow is forgotten, too.
        lab.age(Flow::of(&ask), 1)?;
        lab.uplink_in(&ask)?.to_stack(&ask)?;
        lab.drop_endpoint(net.b())?;
        lab.uplink_in(&ask)?.to_stack(&ask)?;
        let inside = from_a(net, Proto::Udp, (net.node(), HOST_PORT));
        lab.pod_sends(&inside)?.to_stack(&inside)?;
        lab.put_endpoint(net.b(), POD_B, MAC_B)
    })
}

/// What a pod has left behind at one address does not hide a port that another pod has at all of them.
#[test]
fn a_pod_that_had_the_port_at_one_address() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            give(lab, net, proto)?;
            lab.put_host_port((net.node(), HOST_PORT), proto.number(net), (net.a(), TARGET), POD_A + 100)?;
            let outside = ask(net, proto);
            lab.uplink_in(&outside)?.to_the_pod(&arrives_at_b(net, &outside))?;
            let inside = from_a(net, proto, (net.node(), HOST_PORT));
            lab.pod_sends(&inside)?.to_the_pod(&inside.hop().between((net.a(), PORT), (net.b(), TARGET)))
        })
    })
}

/// The same datagrams, from the same socket, find the pod that gets the port next.
#[test]
fn the_next_pod_gets_the_flows() -> Result<()> {
    labs(|lab, net| {
        give(lab, net, Proto::Udp)?;
        let outside = ask(net, Proto::Udp);
        let inside = from_a(net, Proto::Udp, (net.node(), HOST_PORT));
        lab.uplink_in(&outside)?.to_the_pod(&arrives_at_b(net, &outside))?;
        let arrives = inside.hop().between((net.a(), PORT), (net.b(), TARGET));
        lab.pod_sends(&inside)?.to_the_pod(&arrives)?;
        lab.drop_host_ports()?;
        lab.drop_endpoint(net.b())?;
        for f in [&outside, &inside] {
            lab.age(Flow::of(f), 1)?;
        }
        lab.uplink_in(&outside)?.to_stack(&outside)?;
        lab.pod_sends(&inside)?.to_stack(&inside)?;
        // The node has nobody there: the pod's flow stays as one to the host.
        lab.pod_sends(&inside)?.to_stack(&inside)?;
        lab.put_endpoint(net.b(), POD_B, MAC_B)?;
        give(lab, net, Proto::Udp)?;
        lab.age(Flow::of(&inside), 1)?;
        lab.uplink_in(&outside)?.to_the_pod(&arrives_at_b(net, &outside))?;
        lab.pod_sends(&inside)?.to_the_pod(&arrives)
    })
}

/// A flow between a pod and a server of the host goes on, whoever gets the port.
#[test]
fn flows_with_the_host_stay() -> Result<()> {
    labs(|lab, net| {
        let ask = from_a(net, Proto::Udp, (net.node(), HOST_PORT));
        lab.pod_sends(&ask)?.to_stack(&ask)?;
        let answer = ask.reply();
        lab.to_pod(POD_A, &answer)?.to_stack(&answer)?;
        give(lab, net, Proto::Udp)?;
        lab.age(Flow::of(&ask), 1)?;
        lab.pod_sends(&ask)?.to_stack(&ask)?;

        // The host asks from that very port.
        lab.drop_host_ports()?;
        lab.forget()?;
        lab.to_pod(POD_A, &answer)?.to_stack(&answer)?;
        give(lab, net, Proto::Udp)?;
        lab.age(Flow::of(&answer), 1)?;
        lab.pod_sends(&ask)?.to_stack(&ask)
    })
}

/// The host's own connections may have such a port.
#[test]
fn answers_to_the_host() -> Result<()> {
    labs(|lab, net| {
        give(lab, net, Proto::Udp)?;
        let socket = UdpSocket::bind(SocketAddr::new(net.node(), HOST_PORT))?;
        socket.connect((net.world(), PORT))?;
        let answer = ask(net, Proto::Udp);
        lab.uplink_in(&answer)?.to_stack(&answer)?;
        let other = answer.map(|f| f.set_ports(PORT + 1, HOST_PORT));
        lab.uplink_in(&other)?.to_the_pod(&other.hop().between((net.world(), PORT + 1), (net.b(), TARGET)))
    })
}

#[test]
fn forged_clients() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            give(lab, net, proto)?;
            for (src, reason) in [
                (net.a(), DropReason::Spoofed),
                (net.node(), DropReason::Spoofed),
                (net.far(), DropReason::Spoofed),
                (net.ip([127, 0, 0, 1], "::1"), DropReason::Martian),
            ] {
                let forged = from_outside(proto, (src, PORT), (net.node(), HOST_PORT));
                lab.uplink_in(&forged)?.dropped(reason)?;
            }
            let forged = from_outside(proto, (net.routed(), PORT), (net.node(), HOST_PORT));
            lab.overlay_in(net.node2(), &forged)?.dropped(DropReason::UnknownSender)?;
            ensure!(lab.halves()? == 0, "a forged packet opened a flow");
            Ok(())
        })
    })
}

/// Through the queue of a pod whose bandwidth is limited.
#[test]
fn a_limited_pod() -> Result<()> {
    labs(|lab, net| {
        lab.put_endpoint_with(net.b(), POD_B, MAC_B, endpoint::flags::VIA_QDISC)?;
        each(&SERVED, |proto| {
            give(lab, net, proto)?;
            let ask = ask(net, proto);
            lab.uplink_in(&ask)?.by_the_queue(&arrives_at_b(net, &ask))
        })?;
        lab.put_endpoint(net.b(), POD_B, MAC_B)
    })
}

/// Whatever pods ask for, tunnel packets of other nodes are the overlay's.
#[test]
fn the_overlays_port_stays_the_overlays() -> Result<()> {
    labs(|lab, net| {
        let port = 8472;
        lab.put_port_of_all(port, Proto::Udp.number(net), (net.b(), TARGET), POD_B)?;
        let of_node = from_outside(Proto::Udp, (net.node2(), PORT), (net.node(), port));
        lab.uplink_in(&of_node)?.to_stack(&of_node)?;
        let of_client = from_outside(Proto::Udp, (net.world(), PORT), (net.node(), port));
        lab.uplink_in(&of_client)?.to_the_pod(&arrives_at_b(net, &of_client))
    })
}

/// The loopback addresses of an entry are for sockets of the node alone.
#[test]
fn loopback_is_not_on_the_wire() -> Result<()> {
    labs(|lab, net| {
        let loopback = net.ip([127, 0, 0, 1], "::1");
        lab.put_host_port((loopback, HOST_PORT), Proto::Udp.number(net), (net.b(), TARGET), POD_B)?;
        let at_node = ask(net, Proto::Udp);
        lab.uplink_in(&at_node)?.to_stack(&at_node)?;
        let shot = lab.uplink_in(&ask_at(net, Proto::Udp, loopback))?;
        ensure!(shot.verdict != REDIRECT && lab.halves()? == 0, "{shot:?}");
        lab.pod_sends(&from_a(net, Proto::Udp, (loopback, HOST_PORT)))?.dropped(DropReason::Martian)
    })
}

/// Only a socket of the host's makes an answer the host's.
#[test]
fn an_answer_that_no_socket_waits_for() -> Result<()> {
    labs(|lab, net| {
        give(lab, net, Proto::Tcp)?;
        let answer = ask(net, Proto::Tcp).with_flags(SYN | ACK);
        lab.uplink_in(&answer)?.to_the_pod(&arrives_at_b(net, &answer))
    })
}

#[test]
fn errors_from_the_pod_reach_the_client() -> Result<()> {
    labs(|lab, net| {
        give(lab, net, Proto::Udp)?;
        let ask = ask(net, Proto::Udp);
        lab.uplink_in(&ask)?;
        let arrives = arrives_at_b(net, &ask);
        for kind in kinds(net) {
            let e = error(&arrives, net.b(), kind, 1000);
            let want = translated(&e, &arrives, &ask.hop(), net.node()).hop();
            lab.pod_sends(&as_from_b(&e))?.onto_wire(&as_from_b(&want))?;
        }
        Ok(())
    })
}

#[test]
fn errors_from_the_clients_side_reach_the_pod() -> Result<()> {
    labs(|lab, net| {
        give(lab, net, Proto::Udp)?;
        let ask = ask(net, Proto::Udp);
        lab.uplink_in(&ask)?;
        let answer = arrives_at_b(net, &ask).reply();
        let left = answer.hop().between((net.node(), HOST_PORT), (net.world(), PORT));
        for kind in kinds(net) {
            let e = error(&left, net.router(), kind, 1000);
            let want = translated(&e, &left, &answer.hop(), net.router()).hop();
            lab.uplink_in(&e)?.to_the_pod(&want)?;
        }
        Ok(())
    })
}
