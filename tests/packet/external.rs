//! Services for clients outside: node ports, load balancers' addresses, external IPs.

mod abuse;
mod direct;
mod source_ranges;

use crate::errors::{error, refusal, translated};
use crate::flows::{PORT, Proto, SERVED, TARGET, VIP_PORT, answer_of_b, as_from_b, from_a, from_outside, later};
use crate::frame::{ACK, Frame, SYN};
use crate::harness::{Flow, Lab, Net, OVERLAY_MTU, REDIRECT, SNAT, UPLINK, each, labs};
use crate::icmp::kinds;
use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, socket};
use rustnet_common::config;
use rustnet_common::conntrack::flags;
use rustnet_common::drop::DropReason;
use rustnet_common::service;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;

/// A port of the usual range.
pub const NODE_PORT: u16 = 30_080;

/// A client outside asks the node port.
fn ask(net: Net, proto: Proto) -> Frame {
    from_outside(proto, (net.world(), PORT), (net.node(), NODE_PORT))
}

fn publish(lab: &Lab, net: Net, proto: Proto, to: (IpAddr, u16)) -> Result<u32> {
    Ok(lab.publish(net.node(), NODE_PORT, proto.number(net), 0, &[to])?[0])
}

/// The answers pass here anyhow, so that the pod sees its client.
#[test]
fn a_backend_here_sees_the_client() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            let id = publish(lab, net, proto, (net.b(), TARGET))?;
            let ask = ask(net, proto);
            let arrives = ask.hop().between((net.world(), PORT), (net.b(), TARGET));
            lab.uplink_in(&ask)?.to_the_pod(&arrives)?;
            let answer = answer_of_b(&arrives);
            let leaves = answer.hop().between((net.node(), NODE_PORT), (net.world(), PORT));
            lab.pod_sends(&answer)?.onto_wire(&leaves)?;
            let more = later(&ask);
            lab.uplink_in(&more)?.to_the_pod(&more.hop().between((net.world(), PORT), (net.b(), TARGET)))?;

            let (there, back) = (lab.half(Flow::of(&ask))?, lab.half(Flow::of(&answer))?);
            let want = flags::NAT | flags::EXTERNAL;
            ensure!((there.flags, back.flags) == (want, want | flags::REPLY), "{there:?} {back:?}");
            ensure!((there.backend, back.backend) == (id, id), "{there:?} {back:?}");
            ensure!((there.packets, back.packets) == (2, 1), "{there:?} {back:?}");
            Ok(())
        })
    })
}

/// Pods of other nodes answer to this node, by the overlay and by the kernel's routes.
#[test]
fn a_backend_elsewhere_sees_this_node() -> Result<()> {
    labs(|lab, net| {
        // Whatever address the device has: other nodes know that of the node.
        lab.put_device(UPLINK, Some(net.ip([172, 18, 0, 99], "fd00:18::99")))?;
        for to in [net.far(), net.routed()] {
            lab.forget()?;
            each(&SERVED, |proto| {
                publish(lab, net, proto, (to, TARGET))?;
                let ask = ask(net, proto);
                let shot = lab.uplink_in(&ask)?;
                let source = lab.half(Flow::of(&ask))?.to.sport;
                ensure!(SNAT.contains(&source), "port {source}");
                let arrives = ask.hop().between((net.node(), source), (to, TARGET));
                shot.onto_wire(&arrives)?;

                let answer = arrives.reply();
                let back = answer.hop().between((net.node(), NODE_PORT), (net.world(), PORT));
                let shot = if to == net.far() { lab.overlay_in(net.node2(), &answer) } else { lab.uplink_in(&answer) };
                shot?.onto_wire(&back)?;
                let more = later(&ask);
                lab.uplink_in(&more)?.onto_wire(&more.hop().between((net.node(), source), (to, TARGET)))
            })?;
        }
        Ok(())
    })
}

/// Pods and hosts of other nodes come through the overlay.
#[test]
fn clients_of_other_nodes() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            publish(lab, net, proto, (net.b(), TARGET))?;
            let ask = from_outside(proto, (net.far(), PORT), (net.node(), NODE_PORT));
            let arrives = ask.hop().between((net.far(), PORT), (net.b(), TARGET));
            lab.overlay_in(net.node2(), &ask)?.to_the_pod(&arrives)?;
            let answer = answer_of_b(&arrives);
            lab.pod_sends(&answer)?.onto_wire(&answer.hop().between((net.node(), NODE_PORT), (net.far(), PORT)))?;

            publish(lab, net, proto, (net.routed(), TARGET))?;
            let ask = from_outside(proto, (net.far(), PORT + 1), (net.node(), NODE_PORT));
            let shot = lab.overlay_in(net.node2(), &ask)?;
            let source = lab.half(Flow::of(&ask))?.to.sport;
            shot.onto_wire(&ask.hop().between((net.node(), source), (net.routed(), TARGET)))
        })
    })
}

/// A source that is not the sender's own opens nothing.
#[test]
fn forged_clients() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            publish(lab, net, proto, (net.b(), TARGET))?;
            for (src, reason) in [
                (net.a(), DropReason::Spoofed),
                (net.node(), DropReason::Spoofed),
                (net.far(), DropReason::Spoofed),
                (net.ip([127, 0, 0, 1], "::1"), DropReason::Martian),
            ] {
                let forged = from_outside(proto, (src, PORT), (net.node(), NODE_PORT));
                lab.uplink_in(&forged)?.dropped(reason)?;
            }
            let forged = from_outside(proto, (net.routed(), PORT), (net.node(), NODE_PORT));
            lab.overlay_in(net.node2(), &forged)?.dropped(DropReason::UnknownSender)?;
            ensure!(lab.halves()? == 0, "a forged packet opened a flow");
            Ok(())
        })
    })
}

#[test]
fn no_backend() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            lab.publish(net.node(), NODE_PORT, proto.number(net), 0, &[])?;
            let ask = ask(net, proto);
            lab.uplink_in(&ask)?.answered(DropReason::NoBackend, &refusal(&ask))?;
            lab.publish(net.node(), NODE_PORT, proto.number(net), service::flags::DROP_EMPTY, &[])?;
            lab.uplink_in(&ask)?.dropped(DropReason::NoLocalBackend)
        })
    })
}

/// A load balancer's address is this node's as far as its ports go, and no other port is the host's.
#[test]
fn ports_of_a_load_balancers_address() -> Result<()> {
    labs(|lab, net| {
        let vip = net.ip([203, 0, 114, 7], "2001:db8:7::7");
        lab.share(vip)?;
        each(&SERVED, |proto| {
            lab.publish(vip, VIP_PORT, proto.number(net), 0, &[(net.b(), TARGET)])?;
            let ask = from_outside(proto, (net.world(), PORT), (vip, VIP_PORT));
            lab.uplink_in(&ask)?.to_the_pod(&ask.hop().between((net.world(), PORT), (net.b(), TARGET)))?;
            let other = from_outside(proto, (net.world(), PORT), (vip, VIP_PORT + 1));
            lab.uplink_in(&other)?.answered(DropReason::NoServicePort, &refusal(&other))?;
            // To pods, the balancer may serve other ports.
            let inside = from_a(net, proto, (vip, VIP_PORT + 1));
            lab.pod_sends(&inside)?.onto_wire(&inside.hop().between((net.node(), PORT), (vip, VIP_PORT + 1)))?;
            // Machines outside may have that address, too: a balancer that probes.
            let probe = from_outside(proto, (vip, PORT), (net.node(), NODE_PORT));
            lab.uplink_in(&probe)?.to_stack(&probe)
        })
    })
}

/// Ports without a Service, and the node's other addresses, are the stack's.
#[test]
fn other_ports_are_the_hosts() -> Result<()> {
    labs(|lab, net| {
        publish(lab, net, Proto::Tcp, (net.b(), TARGET))?;
        let ssh = from_outside(Proto::Tcp, (net.world(), PORT), (net.node(), 22));
        lab.uplink_in(&ssh)?.to_stack(&ssh)?;
        let udp = ask(net, Proto::Udp);
        lab.uplink_in(&udp)?.to_stack(&udp)?;
        let by_side = from_outside(Proto::Tcp, (net.machine(), PORT), (net.side(), NODE_PORT));
        lab.side_in(&by_side)?.to_stack(&by_side)
    })
}

/// By a device that is no uplink.
#[test]
fn clients_on_a_bridge_of_machines() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            lab.publish(net.side(), NODE_PORT, proto.number(net), 0, &[(net.b(), TARGET)])?;
            lab.put_peer(net.side(), None, rustnet_common::peer::flags::HOST, None)?;
            let ask = from_outside(proto, (net.machine(), PORT), (net.side(), NODE_PORT));
            let arrives = ask.hop().between((net.machine(), PORT), (net.b(), TARGET));
            lab.side_in(&ask)?.to_the_pod(&arrives)?;
            let answer = answer_of_b(&arrives);
            let leaves = answer.hop().between((net.side(), NODE_PORT), (net.machine(), PORT));
            lab.pod_sends(&answer)?.onto_wire(&leaves)?;
            lab.side_in(&later(&ask))?.to_the_pod(&later(&arrives))?;

            lab.publish(net.side(), NODE_PORT, proto.number(net), 0, &[(net.far(), TARGET)])?;
            let ask = from_outside(proto, (net.machine(), PORT + 1), (net.side(), NODE_PORT));
            for f in [ask.clone(), later(&ask)] {
                let shot = lab.side_in(&f)?;
                let source = lab.half(Flow::of(&ask))?.to.sport;
                shot.onto_wire(&f.hop().between((net.node(), source), (net.far(), TARGET)))?;
            }
            Ok(())
        })
    })
}

#[test]
fn a_load_balancers_address_on_a_bridge_of_machines() -> Result<()> {
    labs(|lab, net| {
        let vip = net.ip([203, 0, 114, 7], "2001:db8:7::7");
        lab.share(vip)?;
        each(&SERVED, |proto| {
            lab.publish(vip, VIP_PORT, proto.number(net), 0, &[(net.b(), TARGET)])?;
            let ask = from_outside(proto, (net.machine(), PORT), (vip, VIP_PORT));
            lab.side_in(&ask)?.to_the_pod(&ask.hop().between((net.machine(), PORT), (net.b(), TARGET)))?;
            // An error about no flow is no request.
            let e = error(&ask.reply().map(|f| f.set_ports(VIP_PORT, 1)), net.machine(), kinds(net)[0], 1000);
            lab.side_in(&e)?.to_stack(&e)
        })
    })
}

/// A backend that uses this node's network: the packet is the stack's, and its answer gets the node port back.
#[test]
fn a_backend_that_is_this_host() -> Result<()> {
    labs(|lab, net| {
        lab.configure(|c| c.flags |= config::flags::EXTERNAL)?;
        each(&SERVED, |proto| {
            publish(lab, net, proto, (net.node(), TARGET))?;
            let ask = ask(net, proto);
            let arrives = ask.between((net.world(), PORT), (net.node(), TARGET));
            lab.uplink_in(&ask)?.to_stack(&arrives)?;
            let answer = arrives.reply();
            let leaves = answer.between((net.node(), NODE_PORT), (net.world(), PORT));
            lab.uplink_out(&answer)?.to_stack(&leaves)
        })
    })
}

/// A client that asks such a backend itself, too, from the same port: its flow has another one, so that the answers differ.
/// By a device whose egress no program sees, nothing becomes of it.
#[test]
fn a_backend_that_is_this_host_asked_itself() -> Result<()> {
    labs(|lab, net| {
        lab.configure(|c| c.flags |= config::flags::EXTERNAL)?;
        each(&SERVED, |proto| {
            publish(lab, net, proto, (net.node(), TARGET))?;
            lab.uplink_in(&ask(net, proto))?;
            let itself = from_outside(proto, (net.world(), PORT), (net.node(), TARGET));
            let shot = lab.uplink_in(&itself)?;
            let source = lab.half(Flow::of(&itself))?.to.sport;
            ensure!(source != PORT && SNAT.contains(&source), "port {source}");
            let arrives = itself.between((net.world(), source), (net.node(), TARGET));
            shot.to_stack(&arrives)?;
            let answer = arrives.reply();
            let leaves = answer.between((net.node(), TARGET), (net.world(), PORT));
            lab.uplink_out(&answer)?.to_stack(&leaves)?;

            lab.forget()?;
            let at_side = from_outside(proto, (net.machine(), PORT), (net.node(), NODE_PORT));
            lab.side_in(&at_side)?;
            let itself = from_outside(proto, (net.machine(), PORT), (net.node(), TARGET));
            lab.side_in(&itself)?.to_stack(&itself)
        })
    })
}

/// An answer that is too large for the client's path, and a router of it that says so.
#[test]
fn errors_from_the_clients_side_reach_the_backend() -> Result<()> {
    labs(|lab, net| {
        for to in [net.b(), net.far()] {
            lab.forget()?;
            publish(lab, net, Proto::Udp, (to, TARGET))?;
            let ask = ask(net, Proto::Udp);
            lab.uplink_in(&ask)?;
            let opened = lab.half(Flow::of(&ask))?.to;
            let answer = ask.hop().between((opened.src, opened.sport), (to, TARGET)).reply();
            let left = answer.hop().between((net.node(), NODE_PORT), (net.world(), PORT));
            for kind in kinds(net) {
                let e = error(&left, net.router(), kind, 1000);
                let want = translated(&e, &left, &answer.hop(), net.router()).hop();
                let shot = lab.uplink_in(&e)?;
                if to == net.b() { shot.to_the_pod(&want)? } else { shot.onto_wire(&want)? }
            }
        }
        Ok(())
    })
}

/// Too large for the backend's device: the client hears it from this node.
#[test]
fn too_big_for_the_backend() -> Result<()> {
    labs(|lab, net| {
        publish(lab, net, Proto::Udp, (net.far(), TARGET))?;
        let big = ask(net, Proto::Udp).map(|f| f.payload = vec![7; OVERLAY_MTU]);
        let shot = lab.uplink_in(&big)?;
        ensure!(shot.counted.keys().any(|(reason, _)| *reason == DropReason::FragNeeded as u8), "{:?}", shot.counted);
        ensure!(lab.halves()? == 0, "a refused packet opened a flow");
        Ok(())
    })
}

/// A pod of this node asks a node port of this node: the entries for the cluster serve it.
#[test]
fn a_pod_here_asks() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            lab.serve_at_node(net.node(), NODE_PORT, proto.number(net), &[(net.b(), TARGET)])?;
            let ask = from_a(net, proto, (net.node(), NODE_PORT));
            let arrives = ask.hop().between((net.a(), PORT), (net.b(), TARGET));
            lab.pod_sends(&ask)?.to_the_pod(&arrives)?;
            let answer = answer_of_b(&arrives);
            lab.pod_sends(&answer)?.to_the_pod(&answer.hop().between((net.node(), NODE_PORT), (net.a(), PORT)))
        })
    })
}

/// The host's own connections may have ports that are node ports: their answers are the host's. What opens a connection is no answer.
#[test]
fn answers_to_the_host_at_a_node_port() -> Result<()> {
    labs(|lab, net| {
        let at = SocketAddr::new(net.node(), NODE_PORT);
        for proto in [Proto::Tcp, Proto::Udp] {
            publish(lab, net, proto, (net.b(), TARGET))?;
        }
        let datagram = ask(net, Proto::Udp);
        let unconnected = UdpSocket::bind(at)?;
        ensure!(
            lab.uplink_in(&datagram)?.verdict == REDIRECT,
            "a socket without a peer does not take a Service's port"
        );
        lab.forget()?;
        unconnected.connect((net.world(), PORT))?;
        lab.uplink_in(&datagram)?.to_stack(&datagram)?;
        // Another client's datagram is the Service's.
        let other = datagram.map(|f| f.set_ports(PORT + 1, NODE_PORT));
        lab.uplink_in(&other)?.to_the_pod(&other.hop().between((net.world(), PORT + 1), (net.b(), TARGET)))?;

        // A connection that waits for its answer: nobody is there.
        let family = if net == Net::V4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let waiting = socket(family, SockType::Stream, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, None)?;
        bind(waiting.as_raw_fd(), &SockaddrStorage::from(at))?;
        let connecting = connect(waiting.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(net.world(), PORT)));
        ensure!(connecting == Err(Errno::EINPROGRESS), "{connecting:?}");
        let answer = ask(net, Proto::Tcp).with_flags(SYN | ACK);
        lab.uplink_in(&answer)?.to_stack(&answer)?;
        let opening = ask(net, Proto::Tcp);
        lab.uplink_in(&opening)?.to_the_pod(&opening.hop().between((net.world(), PORT), (net.b(), TARGET)))
    })
}

/// From the pod itself, a router on the way to it, and a pod behind the tunnel, whose addresses no client knows.
#[test]
fn errors_from_the_backends_side_reach_the_client() -> Result<()> {
    labs(|lab, net| {
        for (to, reporter, seen) in [
            (net.b(), net.b(), net.node()),
            (net.routed(), net.router(), net.router()),
            (net.routed(), net.routed(), net.node()),
            (net.far(), net.far(), net.node()),
        ] {
            lab.forget()?;
            publish(lab, net, Proto::Udp, (to, TARGET))?;
            let ask = ask(net, Proto::Udp);
            lab.uplink_in(&ask)?;
            let opened = lab.half(Flow::of(&ask))?.to;
            let arrives = ask.hop().between((opened.src, opened.sport), (to, TARGET));
            for kind in kinds(net) {
                let e = error(&arrives, reporter, kind, 1000);
                let want = translated(&e, &arrives, &ask.hop(), seen).hop();
                let shot = match to {
                    _ if to == net.b() => lab.pod_sends(&as_from_b(&e))?,
                    _ if to == net.far() => lab.overlay_in(net.node2(), &e)?,
                    _ => lab.uplink_in(&e)?,
                };
                let want = if to == net.b() { as_from_b(&want) } else { want };
                shot.onto_wire(&want).with_context(|| format!("{kind:?} of {reporter} about {to}"))?;
            }
        }
        Ok(())
    })
}

/// A packet that may not go on is answered by this node, by whichever device it came.
#[test]
fn a_hop_limit_that_runs_out() -> Result<()> {
    labs(|lab, net| {
        for to in [net.b(), net.far(), net.routed()] {
            publish(lab, net, Proto::Udp, (to, TARGET))?;
            let last = ask(net, Proto::Udp).map(|f| f.ttl = 1);
            let shot = lab.uplink_in(&last)?;
            let refused = shot.counted.keys().any(|(reason, _)| *reason == DropReason::TtlExceeded as u8);
            ensure!(refused && shot.verdict == REDIRECT, "to {to}: {shot:?}");
        }
        // This node itself is no hop.
        publish(lab, net, Proto::Udp, (net.node(), TARGET))?;
        let last = ask(net, Proto::Udp).map(|f| f.ttl = 1);
        lab.uplink_in(&last)?.to_stack(&last.between((net.world(), PORT), (net.node(), TARGET)))
    })
}
