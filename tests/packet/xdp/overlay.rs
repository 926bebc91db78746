//! Backends behind the overlay: XDP writes and takes off its headers.

use super::{MORE, NODE_PORT, PASS, PROTOS, TX, answer, ask, count_of, establish, open, passes, run};
use crate::encap::NEIGHBOURS;
use crate::flows::{PORT, Proto, TARGET, from_outside, later};
use crate::frame::{Frame, L4};
use crate::harness::{BOTH, Flow, Lab, MAC_HOST, MAC_OUT, Net, OVERLAY_MTU, UPLINK, VNI, each, lab_apart};
use anyhow::{Context, Result, ensure};
use rustnet_common::config;
use rustnet_common::peer::flags;
use testkit::check;

/// The MAC of node 2, see [`NEIGHBOURS`].
const MAC_NODE2: [u8; 6] = [2, 0, 0, 0, 0x0c, 2];

/// Runs a test for each family of pods in each of nodes, on a node that has all MACs.
fn labs(test: impl Fn(&Lab, Net, Net) -> Result<()> + Send + Sync) -> Result<()> {
    lab_apart(|lab| {
        lab.ip(MORE)?;
        lab.ip(NEIGHBOURS)?;
        for (inner, outer) in BOTH.into_iter().flat_map(|inner| BOTH.map(|outer| (inner, outer))) {
            lab.reset()?;
            lab.forget_turns()?;
            lab.configure(|c| c.flags |= config::flags::ENCAPSULATE)?;
            lab.put_peer(inner.far(), Some((24, 64)), flags::POD | flags::TUNNEL, Some(outer.node2()))?;
            test(lab, inner, outer).with_context(|| format!("{inner:?} in {outer:?}"))?;
        }
        Ok(())
    })
}

/// `inner` behind the headers of RFC 7348.
fn tunneled(net: Net, inner: &Frame, is_from_here: bool, sport: u16, id: u16) -> Frame {
    let mut payload = vec![8, 0, 0, 0];
    payload.extend((VNI << 8).to_be_bytes());
    payload.extend(inner.bytes());
    let l4 = L4::Udp { sport, dport: 8472, checksum: false };
    let (src, dst) = if is_from_here { (net.node(), net.node2()) } else { (net.node2(), net.node()) };
    let (smac, dmac) = if is_from_here { (MAC_HOST, MAC_NODE2) } else { (MAC_NODE2, MAC_HOST) };
    Frame { smac, dmac, src, dst, ttl: 64, id, flow: 0, l4, payload, may_be_cut: true, padding: 0, ..inner.clone() }
}

/// A tunnel packet of node 2.
fn from_node2(net: Net, inner: &Frame) -> Frame {
    tunneled(net, inner, false, 50_000, 7)
}

#[test]
fn requests_get_headers_and_answers_lose_them() -> Result<()> {
    labs(|lab, inner, net| {
        each(&PROTOS, |proto| {
            lab.forget()?;
            let (ask, arrives) = open(lab, inner, proto, inner.far())?;
            let more = later(&ask);
            let (verdict, out, sent) = run(lab, &more)?;
            ensure!((verdict, sent) == (TX, 1), "verdict {verdict}, counted {sent} times");
            let ip = if net == Net::V4 { 20 } else { 40 };
            let word = |at: usize| u16::from_be_bytes([out[at], out[at + 1]]);
            let (id, sport) = (word(18), word(14 + ip));
            ensure!(sport >= 0xc000, "source port {sport}");
            let leaves = more.hop().between((inner.node(), arrives.ports().0), (inner.far(), TARGET));
            let want = tunneled(net, &leaves, true, sport, id).bytes();
            ensure!(out == want, "{out:02x?} instead of {want:02x?}");
            check::checksums(&out, false)?;

            let answer = answer(&arrives);
            let (verdict, out, sent) = run(lab, &from_node2(net, &answer))?;
            ensure!((verdict, sent) == (TX, 1), "answer: verdict {verdict}, counted {sent} times");
            let want = answer.hop().between((inner.node(), NODE_PORT), (inner.world(), PORT));
            let want = want.map(|f| (f.smac, f.dmac) = (MAC_HOST, MAC_OUT)).bytes();
            ensure!(out == want, "{out:02x?} instead of {want:02x?}");
            // The outer headers do not count.
            ensure!(
                lab.half(Flow::of(&answer))?.bytes == answer.bytes().len() as u64,
                "{:?}",
                lab.half(Flow::of(&answer))?
            );
            Ok(())
        })
    })
}

/// Flows of one client spread over the paths between nodes, and each keeps its own.
#[test]
fn source_ports_are_those_of_flows() -> Result<()> {
    labs(|lab, inner, net| {
        let (ask, _) = open(lab, inner, Proto::Udp, inner.far())?;
        let at = if net == Net::V4 { 34 } else { 54 };
        let mut seen = std::collections::BTreeSet::new();
        for port in PORT..PORT + 16 {
            let ask = ask.between((inner.world(), port), (inner.node(), NODE_PORT));
            lab.uplink_in(&ask)?;
            let port = || Ok::<_, anyhow::Error>(run(lab, &ask)?.1[at..at + 2].to_vec());
            let first = port()?;
            ensure!(first == port()?, "another port");
            seen.insert(first);
        }
        ensure!(seen.len() > 8, "ports {seen:?}");
        Ok(())
    })
}

#[test]
fn what_the_device_has_to_take_passes() -> Result<()> {
    labs(|lab, inner, net| {
        each(&PROTOS, |proto| {
            lab.forget()?;
            let (ask, arrives) = establish(lab, inner, proto, inner.far())?;
            let (more, answer) = (later(&ask), answer(&arrives));
            passes(lab, &more.with_length(OVERLAY_MTU + 1)).context("too long")?;
            passes(lab, &more.with_length(OVERLAY_MTU + 1).map(|f| f.may_be_cut = true))
                .context("too long, may be cut")?;
            let tunnel = from_node2(net, &answer);
            let long = answer.with_length(1501).map(|f| f.may_be_cut = true);
            for (what, frame) in [
                ("another network", tunnel.map(|f| f.payload[6] += 1)),
                ("reserved bits", tunnel.map(|f| f.payload[3] = 1)),
                ("a checksum", tunnel.map(|f| f.l4 = L4::Udp { sport: 50_000, dport: 8472, checksum: true })),
                ("another MAC", tunnel.map(|f| f.dmac = [2, 0, 0, 0, 0xaa, 1])),
                ("another sender", tunnel.map(|f| f.src = net.world())),
                ("another node's address", tunnel.map(|f| f.dst = net.world())),
                ("its last hop", from_node2(net, &answer.map(|f| f.ttl = 1))),
                ("no room on the wire", from_node2(net, &long)),
                ("no tunnel", answer.clone()),
            ] {
                passes(lab, &frame).context(what)?;
            }
            // Another node may not speak for the one that has the backend.
            lab.put_peer(net.router(), None, flags::NODE | flags::TUNNEL, Some(net.router()))?;
            lab.age(Flow::of(&answer), 1)?;
            passes(lab, &tunnel.map(|f| f.src = net.router())).context("another node")?;
            // As the settings say.
            lab.configure(|_| {})?;
            passes(lab, &more).context("--overlay-path device")?;
            passes(lab, &tunnel).context("--overlay-path device, an answer")?;
            lab.configure(|c| c.flags |= config::flags::ENCAPSULATE)
        })
    })
}

/// Bytes behind the packet go into the tunnel with it, as long as the wire takes all of them.
#[test]
fn trailers_count() -> Result<()> {
    labs(|lab, inner, net| {
        each(&PROTOS, |proto| {
            lab.forget()?;
            let (ask, arrives) = establish(lab, inner, proto, inner.far())?;
            let more = later(&ask);
            let padded = more.map(|f| f.padding = 6);
            let (verdict, out, sent) = run(lab, &padded)?;
            ensure!((verdict, sent) == (TX, 1), "verdict {verdict}, counted {sent} times");
            let ip = if net == Net::V4 { 20 } else { 40 };
            let word = |at: usize| u16::from_be_bytes([out[at], out[at + 1]]);
            let leaves = padded.hop().between((inner.node(), arrives.ports().0), (inner.far(), TARGET));
            let want = tunneled(net, &leaves, true, word(14 + ip), word(18)).bytes();
            ensure!(out == want, "{out:02x?} instead of {want:02x?}");

            let headers = if net == Net::V4 { 50 } else { 70 };
            let room = 1500 - headers - (more.bytes().len() - 14);
            let (verdict, ..) = run(lab, &more.map(|f| f.padding = room))?;
            ensure!(verdict == TX, "verdict {verdict} on what fits");
            passes(lab, &more.map(|f| f.padding = room + 1)).context("no room on the wire")
        })
    })
}

/// The device hands marks of congestion on to the packet inside.
#[test]
fn congestion_passes() -> Result<()> {
    labs(|lab, inner, net| {
        each(&PROTOS, |proto| {
            lab.forget()?;
            let (_, arrives) = open(lab, inner, proto, inner.far())?;
            let mut bytes = from_node2(net, &answer(&arrives)).bytes();
            if net == Net::V4 {
                bytes[15] = 3;
                // One's complement: three more in a word without a carry.
                let sum = u16::from_be_bytes([bytes[24], bytes[25]]);
                bytes[24..26].copy_from_slice(&(sum - 3).to_be_bytes());
            } else {
                bytes[15] = 3 << 4;
            }
            let (verdict, out) = lab.datapath().run_xdp(&bytes, UPLINK)?;
            ensure!(verdict == PASS && out == bytes, "verdict {verdict}, {out:02x?}");
            Ok(())
        })
    })
}

/// What leads to the far end by another device is for the kernel to send, and to judge.
#[test]
fn a_far_end_behind_another_device_passes() -> Result<()> {
    labs(|lab, inner, net| {
        each(&PROTOS, |proto| {
            lab.forget()?;
            let (ask, arrives) = establish(lab, inner, proto, inner.far())?;
            lab.ip(&format!("route replace {} dev virbr0", net.node2()))?;
            lab.ip(&format!("neigh replace {} lladdr 02:00:00:00:0c:02 dev virbr0 nud permanent", net.node2()))?;
            lab.forget_next_hops()?;
            let tried = passes(lab, &later(&ask)).context("a request");
            let tried = tried.and_then(|()| passes(lab, &from_node2(net, &answer(&arrives))).context("an answer"));
            lab.ip(&format!("route del {} dev virbr0", net.node2()))?;
            lab.ip(&format!("neigh del {} dev virbr0", net.node2()))?;
            lab.forget_next_hops()?;
            tried
        })
    })
}

/// A backend that is a node, and a client behind the overlay.
#[test]
fn nodes_and_pods_at_the_far_end_pass() -> Result<()> {
    labs(|lab, inner, net| {
        each(&PROTOS, |proto| {
            lab.forget()?;
            lab.put_peer(inner.node2(), None, flags::NODE | flags::TUNNEL, Some(net.node2()))?;
            let (more, _) = establish(lab, inner, proto, inner.node2())?;
            passes(lab, &later(&more)).context("a node")?;
            lab.forget()?;
            lab.publish(inner.node(), NODE_PORT, proto.number(inner), 0, &[(inner.routed(), TARGET)])?;
            let ask = from_outside(proto, (inner.far(), PORT), (inner.node(), NODE_PORT));
            lab.overlay_in(net.node2(), &ask)?;
            let arrives =
                ask.hop().between((inner.node(), lab.half(Flow::of(&ask))?.to.sport), (inner.routed(), TARGET));
            lab.uplink_in(&answer(&arrives))?;
            let sent = count_of(lab)?;
            let (verdict, ..) = run(lab, &from_node2(net, &later(&ask)))?;
            ensure!(verdict == TX && count_of(lab)? == sent + 1, "a client behind the overlay: verdict {verdict}");
            Ok(())
        })
    })
}

/// The connection of a tunnel packet is not that of the same packet without.
#[test]
fn forged_answers_without_a_tunnel_pass() -> Result<()> {
    labs(|lab, inner, _| {
        each(&PROTOS, |proto| {
            lab.forget()?;
            let (_, arrives) = establish(lab, inner, proto, inner.far())?;
            passes(lab, &answer(&arrives))?;
            passes(lab, &later(&ask(inner, proto)).map(|f| f.src = inner.far()))
        })
    })
}
