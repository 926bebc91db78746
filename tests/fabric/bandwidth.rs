//! Limited pods: what they receive and what they send keeps to the limit, whoever is at the other
//! end; and other pods have no queue at all.
//!
//! Times are checked in one direction only: a busy machine makes transfers slower, never faster.

use crate::fixture::{Net, endpoints, in_each_routing, observed, world};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::time::Instant;
use testkit::client::{Connection, Proto, ask, ask_sized};
use testkit::pod::PORT;
use testkit::{Netns, Pod, Setup};

in_each_routing!(
    a_limited_pod_receives_and_sends_no_faster,
    a_pod_next_to_a_limited_one_is_not,
    refusals_and_large_datagrams_reach_a_limited_pod,
);

/// Bits a second, and in a burst.
const RATE: u32 = 40_000_000;
const BURST: u32 = 1_000_000;
/// Bytes of one transfer.
const SIZE: u32 = 1 << 20;

fn limited(net: &Net, name: &str) -> Result<Pod> {
    let bandwidth = json!({ "ingressRate": RATE, "ingressBurst": BURST, "egressRate": RATE, "egressBurst": BURST });
    let mut pod = net.node(1).add_pod_with(name, &json!({ "runtimeConfig": { "bandwidth": bandwidth } }))?;
    pod.serve(PORT)?;
    Ok(pod)
}

/// Bytes that passed a device's token bucket; `None` if it has none.
fn passed(netns: &Netns, device: &str) -> Result<Option<u64>> {
    let text = netns.exec("tc", &["-s", "-j", "qdisc", "show", "dev", device])?;
    let all: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    let queue = all.as_array().into_iter().flatten().find(|q| q["kind"] == "tbf");
    queue.map(|q| q["bytes"].as_u64().with_context(|| q.to_string())).transpose()
}

/// Where the limit of one direction is: the host's end for what a pod receives, its own for what it sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    In,
    Out,
}

impl Way {
    fn passed(self, pod: &Pod) -> Result<u64> {
        let bytes = match self {
            Self::In => passed(pod.node().netns(), pod.host_interface()?)?,
            Self::Out => passed(pod.netns(), "eth0")?,
        };
        bytes.with_context(|| format!("no queue for {self:?} on {}", pod.name()))
    }

    /// A transfer all of which has to go through the pod's queue, in its time.
    fn transfer(self, pod: &Pod, transfer: impl FnOnce() -> Result<()>) -> Result<()> {
        let before = self.passed(pod)?;
        let start = Instant::now();
        transfer()?;
        let took = start.elapsed().as_secs_f64();
        let went = self.passed(pod)? - before;
        ensure!(went >= SIZE.into(), "{went} of {SIZE} bytes went through the queue");
        let most = 1.2 * (f64::from(RATE) * took + f64::from(BURST)) / 8.0;
        ensure!(f64::from(SIZE) <= most, "{SIZE} bytes in {took} s, which is time for {most}");
        Ok(())
    }
}

/// To and from the pod, over one connection from somewhere else.
fn both_ways(from: &Netns, pod: &Pod, target: SocketAddr) -> Result<()> {
    let both = || {
        let mut connection = Connection::open_in(from, target)?;
        Way::In.transfer(pod, || Ok(connection.upload(SIZE.into())?)).context("to the pod")?;
        Way::Out.transfer(pod, || Ok(connection.download(SIZE.into())?)).context("from the pod")
    };
    both().with_context(|| format!("{} to {target}", from.name()))
}

fn a_limited_pod_receives_and_sends_no_faster(net: &Net) -> Result<()> {
    let pod = limited(net, "limited")?;
    pod.check()?;
    let service = net.service(endpoints(&[&pod]))?;
    for address in pod.addresses() {
        let (direct, vip) = (SocketAddr::new(*address, PORT), service.target_like(*address));
        for from in [net.a.netns(), net.c.netns(), net.node(1).netns()] {
            both_ways(from, &pod, direct)?;
            both_ways(from, &pod, vip)?;
        }
        // The pod asks: another node's pod, the world (under the node's address), itself by its service.
        let elsewhere = [net.c.address_like(*address)?, world()[usize::from(address.is_ipv6())]];
        for target in elsewhere.map(|ip| SocketAddr::new(ip, PORT)).into_iter().chain([vip]) {
            let mut connection = Connection::open_in(pod.netns(), target)?;
            let to = || format!("the limited pod to {target}");
            Way::Out.transfer(&pod, || Ok(connection.upload(SIZE.into())?)).with_context(to)?;
            Way::In.transfer(&pod, || Ok(connection.download(SIZE.into())?)).with_context(to)?;
        }
    }
    pod.check()
}

fn a_pod_next_to_a_limited_one_is_not(net: &Net) -> Result<()> {
    let (limited, unlimited) = (limited(net, "limited-too")?, net.node(1).add_pod("unlimited")?);
    ensure!(passed(net.node(1).netns(), unlimited.host_interface()?)?.is_none(), "a queue on the host's end");
    ensure!(passed(unlimited.netns(), "eth0")?.is_none(), "a queue on the pod's end");
    let sent = |pod: &Pod| -> Result<u64> {
        let text = net.node(1).netns().exec("ip", &["-s", "-j", "link", "show", pod.host_interface()?])?;
        let link: Value = serde_json::from_str(&text)?;
        link[0]["stats64"]["tx"]["bytes"].as_u64().context(text)
    };
    // Nothing for it takes the way by the host's end of the veth, where queues are.
    let before = sent(&unlimited)?;
    for address in unlimited.addresses() {
        for from in [&net.a, &net.c] {
            Connection::open_in(from.netns(), SocketAddr::new(*address, PORT))?.upload(SIZE.into())?;
        }
    }
    let by_the_veth = sent(&unlimited)? - before;
    ensure!(by_the_veth < SIZE.into(), "{by_the_veth} bytes went by the host's end");
    let rows: Value = serde_json::from_str(&net.node(1).rustnetctl(&["-o", "json", "endpoints"])?)?;
    let limits = |pod: &Pod| -> Vec<Value> {
        let own = rows
            .as_array()
            .into_iter()
            .flatten()
            .filter(|row| pod.addresses().iter().any(|a| row["address"] == json!(a)));
        own.map(|row| row["bandwidth"].clone()).collect()
    };
    let limit = json!({ "rate": RATE, "burst": BURST });
    ensure!(limits(&limited) == vec![json!({ "ingress": limit, "egress": limit }); 2], "{rows}");
    ensure!(limits(&unlimited) == vec![json!({}); 2], "{rows}");
    Ok(())
}

/// Answers that the programs make themselves; and datagrams in pieces that are larger than the pod's link, which the stack
/// cuts again.
fn refusals_and_large_datagrams_reach_a_limited_pod(net: &Net) -> Result<()> {
    let pod = limited(net, "refused")?;
    let nobody = net.service(vec![])?;
    for target in nobody.targets() {
        for proto in Proto::ALL {
            ask(pod.netns(), proto, target, 5)?.all_failed(std::io::ErrorKind::ConnectionRefused)?;
        }
    }
    for address in world() {
        let target = SocketAddr::new(address, PORT);
        // Of IPv6 only the sender cuts: the error for a datagram comes too late for that datagram.
        let _ = ask_sized(pod.netns(), Proto::Udp, target, 1, 8000)?;
        ask_sized(pod.netns(), Proto::Udp, target, 5, 8000)?.only_by(&["world"])?;
    }
    for other in [&net.a, &net.c] {
        for address in pod.addresses() {
            let target = SocketAddr::new(*address, PORT);
            ask_sized(other.netns(), Proto::Udp, target, 5, 8000)?.only_by(&[pod.name()])?;
        }
    }
    Ok(())
}

/// The agent writes what is missing from the map of endpoints by the pods' records.
#[test]
fn a_pod_stays_limited_when_the_agent_starts_again() -> Result<()> {
    observed(&Net::start(Setup::default())?, restarted)
}

fn restarted(net: &Net) -> Result<()> {
    let pod = limited(net, "remembered")?;
    net.node(1).kill_agent()?;
    for address in pod.addresses() {
        let key = rustnet_common::addr::Addr::from(*address);
        let hex: Vec<String> = bytemuck::bytes_of(&key).iter().map(|b| format!("{b:02x}")).collect();
        let path = net.node(1).bpffs().join(rustnet_common::names::map::ENDPOINTS).display().to_string();
        let hex: Vec<&str> = hex.iter().map(String::as_str).collect();
        net.node(1).netns().exec("bpftool", &[&["map", "delete", "pinned", &path, "key", "hex"][..], &hex].concat())?;
    }
    net.node(1).spawn_agent(&[])?;
    net.node(1).wait_ready()?;
    pod.check()?;
    for address in pod.addresses() {
        both_ways(net.a.netns(), &pod, SocketAddr::new(*address, PORT))?;
    }
    Ok(())
}
