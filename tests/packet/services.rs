//! Services: the way to a backend and back.

mod affinity;
mod checksums;
mod ended;
mod maglev;
mod ports;
mod refusals;

use crate::errors::refusal;
use crate::flows::{
    PORT, Proto, SERVED, TARGET, VIP_PORT, answer_of_b, as_from_a, at_backend, at_client, from_a, from_b, from_host,
    later,
};
use crate::frame::Frame;
use crate::harness::{Flow, Lab, MAC_B, Net, POD_A, POD_B, each, lab, labs};
use anyhow::{Context, Result, ensure};
use rustnet_common::conntrack::flags;
use rustnet_common::drop::DropReason;
use rustnet_common::peer;
use std::net::IpAddr;

/// A service with one backend; gives the backend's id.
fn serve(lab: &Lab, net: Net, proto: Proto, vip: IpAddr, to: (IpAddr, u16)) -> Result<u32> {
    Ok(lab.serve(vip, VIP_PORT, proto.number(net), 0, &[to])?[0])
}

/// Pod A asks the first service, whose backend is pod B, and pod B answers; gives the answer as it
/// was sent.
pub fn exchange(lab: &Lab, net: Net, ask: &Frame) -> Result<Frame> {
    let arrives = at_backend(net, ask, net.b());
    lab.pod_sends(ask)?.to_the_pod(&arrives)?;
    let answer = answer_of_b(&arrives);
    lab.pod_sends(&answer)?.to_the_pod(&at_client(net, &answer, 1))?;
    Ok(answer)
}

#[test]
fn a_backend_on_this_node() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            let id = serve(lab, net, proto, net.vip(1), (net.b(), TARGET))?;
            let ask = from_a(net, proto, (net.vip(1), VIP_PORT));
            let answer = exchange(lab, net, &ask)?;
            let more = later(&ask);
            lab.pod_sends(&more)?.to_the_pod(&at_backend(net, &more, net.b()))?;

            let (there, back) = (lab.half(Flow::of(&ask))?, lab.half(Flow::of(&answer))?);
            ensure!(
                (there.to, back.to) == (Flow::of(&answer).reversed(), Flow::of(&ask).reversed()),
                "{there:?} {back:?}"
            );
            ensure!((there.flags, back.flags) == (flags::NAT, flags::NAT | flags::REPLY), "{there:?} {back:?}");
            ensure!((there.backend, back.backend) == (id, id), "{there:?} {back:?}");
            ensure!((there.packets, back.packets) == (2, 1), "{there:?} {back:?}");
            Ok(())
        })?;
        ensure!(lab.connections(net)?.len() == 2 * SERVED.len());
        Ok(())
    })
}

/// Addresses of one sum leave a checksum as it is, so that it does not tell whether a device will
/// finish it.
#[test]
fn a_backend_whose_address_sums_up_to_the_services() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            let to = net.ip([10, 95, 0, 2], "fd00:95::2");
            lab.put_peer(to, None, peer::flags::POD, None)?;
            serve(lab, net, proto, net.vip(1), (to, TARGET))?;
            let ask = from_a(net, proto, (net.vip(1), VIP_PORT));
            let arrives = at_backend(net, &ask, to);
            lab.pod_sends(&ask)?.onto_wire(&arrives)?;
            let answer = arrives.reply();
            lab.uplink_in(&answer)?.to_the_pod(&at_client(net, &answer, 1))
        })
    })
}

/// 240.0.0.0/4 is no martian, neither as a VIP nor as a pod's source.
#[test]
fn class_e_addresses_are_served() -> Result<()> {
    lab(|lab| {
        let (net, vip, pod) = (Net::V4, IpAddr::from([240, 10, 0, 1]), IpAddr::from([255, 255, 255, 254]));
        lab.put_endpoint(pod, POD_B, MAC_B)?;
        each(&SERVED, |proto| {
            serve(lab, net, proto, vip, (pod, TARGET))?;
            let ask = from_a(net, proto, (vip, VIP_PORT));
            let arrives = at_backend(net, &ask, pod);
            lab.pod_sends(&ask)?.to_the_pod(&arrives)?;
            let answer = answer_of_b(&arrives);
            lab.pod_sends(&answer)?.to_the_pod(&answer.hop().between((vip, VIP_PORT), (net.a(), PORT)))
        })
    })
}

#[test]
fn a_backend_elsewhere() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            for (n, to) in [(1, net.far()), (2, net.routed())] {
                serve(lab, net, proto, net.vip(n), (to, TARGET))?;
                let ask = from_a(net, proto, (net.vip(n), VIP_PORT));
                let arrives = at_backend(net, &ask, to);
                lab.pod_sends(&ask)?.onto_wire(&arrives)?;
                let answer = arrives.reply();
                let shot = if n == 1 { lab.overlay_in(net.node2(), &answer) } else { lab.uplink_in(&answer) };
                shot?.to_the_pod(&at_client(net, &answer, n))?;
            }
            Ok(())
        })
    })
}

/// An API server, say: masqueraded, for it knows nothing of pods.
#[test]
fn a_backend_in_the_world() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            serve(lab, net, proto, net.vip(1), (net.world(), 6443))?;
            let ask = from_a(net, proto, (net.vip(1), VIP_PORT));
            let leaves = ask.hop().between((net.node(), PORT), (net.world(), 6443));
            lab.pod_sends(&ask)?.onto_wire(&leaves)?;
            let answer = leaves.reply();
            lab.uplink_in(&answer)?.to_the_pod(&at_client(net, &answer, 1))?;
            let half = lab.half(Flow::of(&ask))?;
            ensure!(half.flags == flags::NAT | flags::MASQ, "{half:?}");
            Ok(())
        })
    })
}

/// The kubelet's own API, say. The answer leaves by the host's stack and is turned back at the
/// pod's door.
#[test]
fn a_backend_that_is_this_nodes_own_address() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            serve(lab, net, proto, net.vip(1), (net.node(), 10250))?;
            let ask = from_a(net, proto, (net.vip(1), VIP_PORT));
            let arrives = ask.between((net.a(), PORT), (net.node(), 10250));
            lab.pod_sends(&ask)?.to_stack(&arrives)?;
            let answer = arrives.reply();
            let restored = answer.between((net.vip(1), VIP_PORT), (net.a(), PORT));
            lab.to_pod(POD_A, &answer)?.to_stack(&restored)
        })
    })
}

#[test]
fn the_host_asks_a_service() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            for (n, to) in [(1, net.b()), (2, net.far()), (3, net.routed()), (4, net.world())] {
                serve(lab, net, proto, net.vip(n), (to, TARGET))?;
                let ask = from_host(net, proto, (net.vip(n), VIP_PORT));
                // The host is the sender, not a router: its hop limit stays.
                let leaves = ask.between((net.node(), PORT), (to, TARGET));
                lab.uplink_out(&ask)?.onto_wire(&leaves).with_context(|| format!("to {to}"))?;
                ensure!(lab.half(Flow::of(&ask))?.flags & flags::FROM_HOST != 0, "not known as the host's");
                let answer = leaves.reply();
                let (as_asked, shot) = (
                    answer.between((net.vip(n), VIP_PORT), (net.node(), PORT)),
                    match n {
                        1 => lab.pod_sends(&answer.map(|f| f.smac = MAC_B)),
                        2 => lab.overlay_in(net.node2(), &answer),
                        _ => lab.uplink_in(&answer),
                    },
                );
                let as_asked = if n == 1 { as_asked.map(|f| f.smac = MAC_B) } else { as_asked };
                shot?.to_stack(&as_asked).with_context(|| format!("from {to}"))?;
            }
            // A backend that is the host itself: the stack would route it back to here for ever.
            serve(lab, net, proto, net.vip(5), (net.node(), TARGET))?;
            lab.uplink_out(&from_host(net, proto, (net.vip(5), VIP_PORT)))?.dropped(DropReason::HostHairpin)
        })
    })
}

#[test]
fn a_pod_reaches_itself_through_its_own_service() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            serve(lab, net, proto, net.vip(1), (net.a(), TARGET))?;
            let ask = from_a(net, proto, (net.vip(1), VIP_PORT));
            let arrives = ask.hop().between((net.node(), PORT), (net.a(), TARGET));
            lab.pod_sends(&ask)?.to_the_pod(&arrives)?;
            let answer = as_from_a(&arrives.reply()).map(|f| f.ttl = 64);
            lab.pod_sends(&answer)?.to_the_pod(&at_client(net, &answer, 1))?;
            let (there, back) = (lab.half(Flow::of(&ask))?, lab.half(Flow::of(&answer))?);
            ensure!(there.flags & back.flags & flags::HAIRPIN != 0, "{there:?} {back:?}");
            Ok(())
        })
    })
}

/// A flow that is older than the service at its destination, and was answered, goes on as it was.
#[test]
fn an_answered_flow_older_than_its_service() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            let ask = from_a(net, proto, (net.routed(), VIP_PORT));
            lab.pod_sends(&ask)?.onto_wire(&ask.hop())?;
            let answer = ask.reply();
            lab.uplink_in(&answer)?.to_the_pod(&answer.hop())?;
            serve(lab, net, proto, net.routed(), (net.b(), TARGET))?;
            lab.age(Flow::of(&ask), 1)?;
            let more = later(&ask);
            lab.pod_sends(&more)?.onto_wire(&more.hop())?;
            lab.forget()?;
            lab.drop_service(net.routed(), VIP_PORT, proto.number(net))
        })
    })
}

/// A service empties: what is established goes on, what is new is refused.
#[test]
fn established_flows_outlive_their_backend() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            serve(lab, net, proto, net.vip(1), (net.b(), TARGET))?;
            let ask = from_a(net, proto, (net.vip(1), VIP_PORT));
            let arrives = at_backend(net, &ask, net.b());
            lab.pod_sends(&ask)?.to_the_pod(&arrives)?;
            lab.serve(net.vip(1), VIP_PORT, proto.number(net), 0, &[])?;
            let more = later(&ask);
            lab.pod_sends(&more)?.to_the_pod(&at_backend(net, &more, net.b()))?;
            let answer = answer_of_b(&arrives);
            lab.pod_sends(&answer)?.to_the_pod(&at_client(net, &answer, 1))?;
            let new = ask.map(|f| f.set_ports(PORT + 1, VIP_PORT));
            lab.pod_sends(&new)?.answered(DropReason::NoBackend, &refusal(&new))
        })
    })
}

/// The same client and port always meet the same backend, and many clients meet all.
#[test]
fn the_choice_depends_on_the_flow_alone() -> Result<()> {
    labs(|lab, net| {
        let backends = [net.a(), net.b(), net.far(), net.routed()].map(|ip| (ip, TARGET));
        lab.serve(net.vip(1), VIP_PORT, 17, 0, &backends)?;
        let mut met = std::collections::BTreeMap::<IpAddr, u32>::new();
        for port in 30_000..30_200 {
            let ask = from_b(net, Proto::Udp, (net.vip(1), VIP_PORT)).map(|f| f.set_ports(port, VIP_PORT));
            lab.pod_sends(&ask)?;
            let first = lab.half(Flow::of(&ask))?.to.dst;
            lab.forget()?;
            lab.pod_sends(&ask)?;
            ensure!(lab.half(Flow::of(&ask))?.to.dst == first, "port {port} went to another backend");
            lab.forget()?;
            *met.entry(first).or_default() += 1;
        }
        ensure!(met.len() == 4 && met.values().all(|n| *n > 25), "{met:?}");
        Ok(())
    })
}
