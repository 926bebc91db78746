//! What leaves the cluster bears the node's address, but for ranges that know the pods (as ip-masq-agent has it).

use crate::fixture::{Net, observed, world};
use anyhow::{Result, ensure};
use rustnet_common::tuple::proto;
use std::net::{IpAddr, SocketAddr};
use testkit::client::ask;
use testkit::icmp::{Ping, Reply};
use testkit::netns::Holder;
use testkit::pod::PORT;
use testkit::server::Server;
use testkit::sniff::Sniffer;
use testkit::{Netns, Pod, Proto, Setup};

/// The world's.
const RANGES: &[&str] = &["--non-masquerade-cidrs", "192.0.2.0/24,2001:db8:2::/64"];

#[test]
fn ranges_that_know_the_pods_see_their_addresses() -> Result<()> {
    let net = knowing(RANGES)?;
    let stranger = Stranger::add(&net)?;
    observed(&net, |net| {
        for pod in [&net.a, &net.c] {
            for known in world() {
                seen(net.fabric.world(), "world", pod, known, pod.address_like(known)?)?;
            }
            for other in Stranger::addresses()? {
                seen(&stranger.host, "stranger", pod, other, pod.node().address_like(other))?;
            }
        }
        Ok(())
    })
}

#[test]
fn without_masquerade_all_see_the_pods_addresses() -> Result<()> {
    let net = knowing(&["--masquerade=false"])?;
    let stranger = Stranger::add(&net)?;
    observed(&net, |net| {
        for known in world() {
            seen(net.fabric.world(), "world", &net.a, known, net.a.address_like(known)?)?;
        }
        for other in Stranger::addresses()? {
            seen(&stranger.host, "stranger", &net.a, other, net.a.address_like(other)?)?;
        }
        Ok(())
    })
}

/// A host next to the nodes that is none of them.
struct Stranger {
    _server: Server,
    host: Holder,
}

impl Stranger {
    fn add(net: &Net) -> Result<Self> {
        let host = net.fabric.add_host("stranger", 99)?;
        Ok(Self { _server: Server::start(&host, "stranger", PORT)?, host })
    }

    fn addresses() -> Result<[IpAddr; 2]> {
        Ok(["172.18.0.99".parse()?, "fd00:18::99".parse()?])
    }
}

/// A fabric whose router leads answers to pods, where anybody out there knows their addresses.
fn knowing(agent: &'static [&'static str]) -> Result<Net> {
    let net = Net::start(Setup { agent, ..Setup::default() })?;
    for node in net.fabric.nodes() {
        for cidr in node.pod_cidrs() {
            net.fabric.switch().ip(&format!("route add {cidr} via {}\n", node.address_like(cidr.addr())))?;
        }
    }
    Ok(net)
}

/// A host sees a pod's packets to its address with that source: TCP, UDP, ICMP.
fn seen(host: &Netns, name: &str, pod: &Pod, to: IpAddr, source: IpAddr) -> Result<()> {
    for proto in Proto::ALL {
        let answers = ask(pod.netns(), proto, SocketAddr::new(to, PORT), 3)?;
        answers.only_by(&[name])?;
        answers.only_as(source)?;
    }
    let sniffer = Sniffer::start(host, "eth0")?;
    let reply = Ping::default().send(pod.netns(), to)?;
    ensure!(matches!(reply, Reply::Echo { .. }), "to {to}: {reply:?}");
    let icmp = [proto::ICMP, proto::ICMPV6];
    sniffer.wait_for(&format!("an echo request from {source} to {to}"), |h| {
        icmp.contains(&h.proto) && h.src == source && h.dst == to
    })?;
    Ok(())
}
