//! Pods among themselves: every protocol, every way there is, both directions.

use crate::flows::{ALL, Proto, as_from_b, from_a, from_b, from_outside, later};
use crate::harness::{Flow, Half, MAC_A, MAC_B, Net, POD_A, POD_B, each, labs, source_of_mac};
use anyhow::{Result, ensure};
use rustnet_common::conntrack::{SOURCE_NONE, flags, state};
use rustnet_common::drop::DropReason;

#[test]
fn same_node() -> Result<()> {
    labs(|lab, net| {
        each(&ALL, |proto| {
            let ask = from_a(net, proto, (net.b(), 80));
            let key = Flow::of(&ask);
            lab.pod_sends(&ask)?.to_the_pod(&ask.hop())?;
            let len = ask.bytes().len() as u64;
            let seen = lab.half(key)?.seen;
            let mut there = Half {
                to: key,
                flags: 0,
                state: 0,
                seen,
                ifindex: POD_A,
                source: source_of_mac(MAC_A),
                backend: 0,
                out: POD_B,
                packets: 1,
                bytes: len,
            };
            let mut back = Half {
                to: key.reversed(),
                flags: flags::REPLY,
                ifindex: POD_B,
                source: SOURCE_NONE,
                out: POD_A,
                packets: 0,
                bytes: 0,
                ..there.clone()
            };
            ensure!(lab.half(key)? == there, "{:?}", lab.half(key)?);
            ensure!(lab.half(key.reversed())? == back, "{:?}", lab.half(key.reversed())?);

            let answer = as_from_b(&ask.reply());
            lab.pod_sends(&answer)?.to_the_pod(&answer.hop())?;
            there.state = state::ANSWERED;
            (back.state, back.source) = (state::ANSWERED, source_of_mac(MAC_B));
            (back.packets, back.bytes) = (1, answer.bytes().len() as u64);
            let (now_there, now_back) = (lab.half(key)?, lab.half(key.reversed())?);
            (there.seen, back.seen) = (now_back.seen, now_back.seen);
            ensure!(now_there == there, "{now_there:?} is not {there:?}");
            ensure!(now_back == back, "{now_back:?} is not {back:?}");

            let more = later(&ask);
            lab.pod_sends(&more)?.to_the_pod(&more.hop())?;
            there.seen = lab.half(key)?.seen;
            there.packets += 1;
            if proto == Proto::Tcp {
                there.state |= state::ESTABLISHED;
            }
            there.bytes += more.bytes().len() as u64;
            ensure!(lab.half(key)? == there, "{:?} is not {there:?}", lab.half(key)?);
            Ok(())
        })?;
        ensure!(lab.connections(net)?.len() == ALL.len(), "{:?}", lab.connections(net)?);
        Ok(())
    })
}

#[test]
fn through_the_overlay() -> Result<()> {
    labs(|lab, net| {
        each(&ALL, |proto| {
            let ask = from_a(net, proto, (net.far(), 80));
            lab.pod_sends(&ask)?.onto_wire(&ask.hop())?;
            let answer = ask.reply();
            lab.overlay_in(net.node2(), &answer)?.to_the_pod(&answer.hop())?;
            let more = later(&ask);
            lab.pod_sends(&more)?.onto_wire(&more.hop())
        })
    })
}

#[test]
fn by_the_kernels_routes() -> Result<()> {
    labs(|lab, net| {
        each(&ALL, |proto| {
            let ask = from_a(net, proto, (net.routed(), 80));
            lab.pod_sends(&ask)?.onto_wire(&ask.hop())?;
            let answer = ask.reply();
            lab.uplink_in(&answer)?.to_the_pod(&answer.hop())?;
            let more = later(&ask);
            lab.pod_sends(&more)?.onto_wire(&more.hop())
        })
    })
}

#[test]
fn another_nodes_pod_asks() -> Result<()> {
    labs(|lab, net| {
        each(&ALL, |proto| {
            let ask = from_outside(proto, (net.far(), 1234), (net.b(), 80));
            lab.overlay_in(net.node2(), &ask)?.to_the_pod(&ask.hop())?;
            let answer = as_from_b(&ask.reply());
            lab.pod_sends(&answer)?.onto_wire(&answer.hop())?;

            let ask = from_outside(proto, (net.routed(), 1234), (net.b(), 80));
            lab.uplink_in(&ask)?.to_the_pod(&ask.hop())?;
            let answer = as_from_b(&ask.reply());
            lab.pod_sends(&answer)?.onto_wire(&answer.hop())
        })
    })
}

#[test]
fn to_the_host_and_back() -> Result<()> {
    labs(|lab, net| {
        each(&ALL, |proto| {
            // The stack takes the packet: its hop limit stays.
            let ask = from_a(net, proto, (net.node(), 80));
            lab.pod_sends(&ask)?.to_stack(&ask)?;
            let answer = ask.reply();
            lab.to_pod(POD_A, &answer)?.to_stack(&answer)?;
            let more = later(&ask);
            lab.pod_sends(&more)?.to_stack(&more)?;

            // A probe.
            let probe = crate::flows::from_host(net, proto, (net.b(), 8080));
            lab.to_pod(POD_B, &probe)?.to_stack(&probe)?;
            ensure!(lab.half(Flow::of(&probe))?.flags & flags::FROM_HOST != 0, "not known as the host's");
            let answer = as_from_b(&probe.reply());
            lab.pod_sends(&answer)?.to_stack(&answer)
        })
    })
}

#[test]
fn an_address_of_this_node_that_no_pod_has_is_the_stacks() -> Result<()> {
    labs(|lab, net| {
        let ask = from_a(net, Proto::Udp, (net.nobody(), 80));
        lab.pod_sends(&ask)?.to_stack(&ask)
    })
}

#[test]
fn no_way_leads_to_the_stack_untouched() -> Result<()> {
    labs(|lab, net| {
        lab.configure(|c| c.flags = 0)?;
        let ask = from_a(net, Proto::Udp, (net.unreachable(), 80));
        lab.pod_sends(&ask)?.to_stack(&ask)
    })
}

/// An element of an array is always there: what the programs see then is a node without settings.
#[test]
fn pods_reach_each_other_before_the_agent_has_written_its_settings() -> Result<()> {
    labs(|lab, net| {
        lab.configure(|c| *c = bytemuck::Zeroable::zeroed())?;
        let ask = from_b(net, Proto::Tcp, (net.a(), 80));
        lab.pod_sends(&ask)?.to_the_pod(&ask.hop())?;
        lab.pod_sends(&later(&ask))?.to_the_pod(&later(&ask).hop())
    })
}

#[test]
fn link_local_and_multicast_go_nowhere() -> Result<()> {
    labs(|lab, net| {
        for dst in match net {
            Net::V4 => vec![net.ip([224, 0, 0, 251], ""), net.ip([255, 255, 255, 255], "")],
            Net::V6 => vec![net.ip([0; 4], "ff02::fb"), net.ip([0; 4], "fe80::1")],
        } {
            let f = from_a(net, Proto::Udp, (dst, 5353));
            lab.pod_sends(&f)?.dropped(DropReason::NdNotForwarded)?;
            lab.overlay_in(net.node2(), &f)?.dropped(DropReason::UnknownSender)?;
            lab.overlay_out(&f)?.to_stack(&f)?;
            lab.to_pod(POD_A, &f)?.to_stack(&f)?;
        }
        ensure!(lab.halves()? == 0, "a connection was opened");
        Ok(())
    })
}
