//! IPsec policies of the host: while there are any, the device takes the tunnel, and they are obeyed.

use super::{introduce_nodes, pods_exchange, takes_the_device};
use crate::fixture::Net;
use anyhow::{Context, Result, ensure};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use testkit::check::VXLAN_PORT;
use testkit::icmp::Ping;
use testkit::pod::PORT;
use testkit::stream::Stream;
use testkit::{Node, wait};

/// A selector of all packets of the tunnel, whose nodes know each other by addresses of one family.
fn tunnel_selector(net: &Net) -> String {
    let all = if net.fabric.setup().ipv6_first { "::/0" } else { "0.0.0.0/0" };
    format!("src {all} dst {all} proto udp dport {VXLAN_PORT}")
}

/// Policies for each direction come and go under traffic.
pub fn while_there_are_ipsec_policies_packets_take_the_device(net: &Net) -> Result<()> {
    introduce_nodes(net)?;
    let (node, other) = (net.node(1), net.node(2));
    let start = |ip: &IpAddr| Stream::start(net.a.netns(), SocketAddr::new(*ip, PORT), 4, Duration::from_millis(1));
    let streams = net.c.addresses().iter().map(start).collect::<Result<Vec<_>>>()?;
    takes_the_device(node, false)?;
    let selector = tunnel_selector(net);
    for direction in ["out", "in"] {
        node.netns().ip(&format!("xfrm policy add {selector} dir {direction} action allow\n"))?;
        takes_the_device(node, true).with_context(|| format!("a policy for {direction}"))?;
        takes_the_device(other, false).context("no policy of its own")?;
        node.netns().ip(&format!("xfrm policy del {selector} dir {direction}\n"))?;
        takes_the_device(node, false).with_context(|| format!("no policy for {direction} any more"))?;
    }
    streams.into_iter().try_for_each(|stream| stream.stop()?.no_loss())
}

/// One of a node's counters in `/proc/net/xfrm_stat`.
fn ipsec_counter(node: &Node, name: &str) -> Result<u64> {
    // Of the namespace of this thread, and not that of its process.
    let text = node.netns().run(|| std::fs::read_to_string("/proc/thread-self/net/xfrm_stat"))?;
    let text = text.context("no counters of IPsec: is CONFIG_XFRM_STATISTICS in the kernel?")?;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.with_context(|| format!("no {name} in {text}"))?.trim().parse().context("a counter of IPsec")
}

/// What policies are for: packets that the programs sent or took would pass unseen.
pub fn ipsec_policies_that_forbid_the_tunnel_are_obeyed(net: &Net) -> Result<()> {
    introduce_nodes(net)?;
    let node = net.node(1);
    let selector = tunnel_selector(net);
    let to = net.c.addresses()[0];
    for (direction, counter) in [("out", "XfrmOutPolBlock"), ("in", "XfrmInPolBlock")] {
        let stream = Stream::start(net.a.netns(), SocketAddr::new(to, PORT), 4, Duration::from_millis(1))?;
        takes_the_device(node, false)?;
        let before = ipsec_counter(node, counter)?;
        node.netns().ip(&format!("xfrm policy add {selector} dir {direction} action block\n"))?;
        wait::until("the policy is obeyed", || {
            let now = ipsec_counter(node, counter)?;
            ensure!(now > before, "{counter} is still {now}");
            Ok(())
        })?;
        let reply = Ping::default().send(net.a.netns(), to);
        ensure!(reply.is_err(), "a policy for {direction} forbids it: {reply:?}");
        node.netns().ip(&format!("xfrm policy del {selector} dir {direction}\n"))?;
        takes_the_device(node, false)?;
        pods_exchange(&net.a, &net.c)?;
        stream.stop()?;
    }
    Ok(())
}
