//! Sockets of pods that ask for Services by themselves, by their annotation or the setting, and what becomes of them.

use super::{exchange, loopback, open_udp, wait_ended, with_node_port};
use crate::fixture::{Net, SERVICE_PORT, endpoints, in_each_routing, node_ports, observed, wait_served};
use crate::host_ports::{add_pod, host_port, refused, served, targets};
use anyhow::{Context, Result, ensure};
use rustnet_agent::bpf::store::sockets::Sockets;
use rustnet_common::files::{EndpointFile, endpoint_path};
use rustnet_common::socket::netns;
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use testkit::client::{Connection, ask, ask_udp, connected_udp};
use testkit::manifest::{Endpoint, pod_yaml};
use testkit::pod::PORT;
use testkit::sniff::{Frame, Sniffer};
use testkit::{Node, Pod, Proto, Setup, wait};

in_each_routing!(
    a_pod_sees_the_service_and_its_packets_go_to_the_backend,
    without_the_annotation_packets_ask,
    loopback_of_a_listed_pod_is_its_own,
    node_ports_and_host_ports_of_its_own_node,
    a_pod_is_its_own_backend,
    affinity_of_a_pod,
    datagrams_to_a_service_without_a_peer,
    connected_udp_sockets_of_pods_end_with_their_backend,
    tcp_connections_of_pods_end_with_their_endpoint,
    a_namespace_that_cannot_be_entered,
    a_pod_that_is_gone_is_listed_no_more,
);

const ANNOTATION: &str = "rustnet.io/socket-lb";

/// A pod with an object that a node knows. Removed when dropped.
pub struct Known<'a> {
    net: &'a Net,
    pub pod: Pod,
}

impl<'a> Known<'a> {
    fn new(net: &'a Net, node: &Node, name: &str) -> Result<Self> {
        Ok(Self { net, pod: node.add_pod(name)? })
    }

    /// Writes its object, with this annotation if there is one.
    fn annotate(&self, wish: Option<&str>) -> Result<()> {
        let annotations: Vec<_> = wish.map(|wish| (ANNOTATION, wish)).into_iter().collect();
        let (name, node) = (self.pod.name(), self.pod.node().name());
        let yaml = pod_yaml(name, node, self.pod.addresses(), &annotations);
        self.net.fabric.manifests().write(&self.file(), &yaml)
    }

    fn file(&self) -> String {
        format!("pod-{}.yaml", self.pod.name())
    }

    fn wait_listed(&self) -> Result<()> {
        wait_listed(&self.pod, true)
    }
}

impl Drop for Known<'_> {
    fn drop(&mut self) {
        // The fabric may be on its way out as well.
        let _ = self.net.fabric.manifests().remove(&self.file());
    }
}

/// A pod whose sockets ask for Services by themselves.
pub fn listed<'a>(net: &'a Net, node: &Node, name: &str) -> Result<Known<'a>> {
    let known = Known::new(net, node, name)?;
    known.annotate(Some("true"))?;
    known.wait_listed()?;
    Ok(known)
}

fn record(pod: &Pod) -> Result<EndpointFile> {
    let attachment = pod.attachment();
    let path = endpoint_path(&pod.node().run_dir(), &attachment.container_id, &attachment.ifname);
    serde_json::from_slice(&std::fs::read(path)?).context("a record")
}

fn cookie(pod: &Pod) -> Result<u64> {
    record(pod)?.netns_cookie.context("a record without a number")
}

fn namespaces(node: &Node) -> Result<BTreeMap<u64, u32>> {
    Sockets::open(&node.bpffs_from_outside())?.namespaces()
}

fn wait_listed(pod: &Pod, is_listed: bool) -> Result<()> {
    let cookie = cookie(pod)?;
    wait::until(&format!("{} listed: {is_listed}", pod.name()), || {
        let there = namespaces(pod.node())?;
        ensure!(there.get(&cookie) == is_listed.then_some(&netns::POD), "{there:?}");
        Ok(())
    })
}

/// What the sockets of a pod see of their peer, TCP and UDP.
fn peers(pod: &Pod, target: SocketAddr) -> Result<(SocketAddr, SocketAddr)> {
    pod.run_in(|| Ok((TcpStream::connect(target)?.peer_addr()?, connected_udp(target)?.peer_addr()?)))?
}

/// By a look at what leaves the pod: true if its packets have the Service's address, false if the backend's.
fn asks_by_packets(pod: &Pod, target: SocketAddr, backend: IpAddr) -> Result<bool> {
    let sniffer = Sniffer::start(pod.netns(), "eth0")?;
    for proto in Proto::ALL {
        ask(pod.netns(), proto, target, 3)?.all_answered()?;
    }
    Sniffer::catch_up([&sniffer])?;
    let seen: Vec<_> = sniffer.frames().iter().filter_map(Frame::headers).map(|it| (it.src, it.dst)).collect();
    let to = |ip: IpAddr| seen.iter().filter(|(_, dst)| *dst == ip).count();
    let (service, direct) = (to(target.ip()), to(backend));
    ensure!((service == 0) != (direct == 0), "{service} packets to the Service, {direct} to the backend: {seen:?}");
    Ok(direct == 0)
}

fn a_pod_sees_the_service_and_its_packets_go_to_the_backend(net: &Net) -> Result<()> {
    let known = listed(net, net.node(1), "asker")?;
    for backend in [&net.a, &net.c] {
        let service = net.service(endpoints(&[backend]))?;
        for target in service.targets() {
            let address = backend.address_like(target.ip())?;
            ensure!(!asks_by_packets(&known.pod, target, address)?, "{target}: by packets");
            ensure!(peers(&known.pod, target)? == (target, target), "{target}: {:?}", peers(&known.pod, target)?);
            for proto in Proto::ALL {
                let answers = ask(known.pod.netns(), proto, target, 5)?;
                answers.only_by(&[backend.name()])?;
                answers.only_as(known.pod.address_like(target.ip())?)?;
            }
        }
    }
    wait::until("the pod counts", || {
        let shown = net.node(1).rustnetctl(&["status"])?;
        let line =
            shown.lines().find(|line| line.contains("those of this host's processes ask for Services, and those of"));
        ensure!(line.is_some_and(|line| !line.contains("of 0 pods")), "{shown}");
        Ok(())
    })
}

/// The setting is `host`; and what is no wish changes nothing, and is reported.
fn without_the_annotation_packets_ask(net: &Net) -> Result<()> {
    let known = Known::new(net, net.node(1), "plain")?;
    let service = net.service(endpoints(&[&net.c]))?;
    let target = service.targets()[0];
    let backend = net.c.address_like(target.ip())?;
    for wish in [None, Some("false"), Some("yes")] {
        known.annotate(Some("true"))?;
        known.wait_listed()?;
        ensure!(!asks_by_packets(&known.pod, target, backend)?, "by packets");
        known.annotate(wish)?;
        wait_listed(&known.pod, false)?;
        ensure!(asks_by_packets(&known.pod, target, backend)?, "{wish:?}: not by packets");
    }
    wait::until("the problem is reported", || {
        let shown = net.node(1).rustnetctl(&["status"])?;
        let log = net.node(1).agent_log(200);
        let problem = format!("Pod default/plain: metadata.annotations[{ANNOTATION}]: \"yes\" is neither");
        ensure!(log.contains(&problem), "{shown}");
        Ok(())
    })
}

fn loopback_of_a_listed_pod_is_its_own(net: &Net) -> Result<()> {
    let known = listed(net, net.node(1), "own")?;
    let service = with_node_port(net, endpoints(&[&net.c]))?;
    for target in node_ports(net.node(1), &service) {
        wait_served(net.node(1).netns(), loopback(target))?;
        for target in [loopback(target), SocketAddr::new(loopback(target).ip(), SERVICE_PORT)] {
            ask(known.pod.netns(), Proto::Tcp, target, 2)?.all_failed(ErrorKind::ConnectionRefused)?;
        }
        // Its own server.
        ask(known.pod.netns(), Proto::Tcp, SocketAddr::new(loopback(target).ip(), PORT), 2)?.only_by(&["own"])?;
    }
    Ok(())
}

fn node_ports_and_host_ports_of_its_own_node(net: &Net) -> Result<()> {
    let (node, port) = (net.node(1), host_port());
    let known = listed(net, node, "np-client")?;
    let service = with_node_port(net, endpoints(&[&net.a, &net.c]))?;
    for target in net.fabric.nodes().iter().flat_map(|node| node_ports(node, &service)) {
        wait_served(known.pod.netns(), target)?;
        for proto in Proto::ALL {
            let answers = ask(known.pod.netns(), proto, target, 30)?;
            answers.only_by(&["a", "c"])?;
        }
    }
    let target = node_ports(node, &service)[0];
    ensure!(peers(&known.pod, target)? == (target, target));
    // Its own ports are none of the node's.
    let own = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), target.port());
    known.pod.run_in(|| TcpListener::bind(own).map(drop))?.context("a pod's own port")?;
    let holder = add_pod(node, "holder", port)?;
    for target in targets(node, port) {
        served(known.pod.netns(), target, "holder", known.pod.address_like(target.ip())?)?;
        refused(known.pod.netns(), loopback(target))?;
    }
    holder.delete()
}

fn a_pod_is_its_own_backend(net: &Net) -> Result<()> {
    let known = listed(net, net.node(1), "self")?;
    let service = net.service(endpoints(&[&known.pod]))?;
    for target in service.targets() {
        for proto in Proto::ALL {
            ask(known.pod.netns(), proto, target, 10)?.only_by(&["self"])?;
        }
        ensure!(peers(&known.pod, target)? == (target, target), "{target}");
    }
    Ok(())
}

/// All sockets of a pod are one client, and the next pod is another one.
fn affinity_of_a_pod(net: &Net) -> Result<()> {
    let mut service = net.unknown_service();
    service.service.affinity = true;
    service.set(endpoints(&[&net.a, &net.b, &net.c]))?;
    service.wait_known()?;
    let mut servers = std::collections::BTreeSet::new();
    // Of three backends and twelve clients, no chance is left that all get the same one.
    for n in 0..12 {
        let known = listed(net, net.node(1), &format!("affine-{n}"))?;
        let target = service.targets()[n % 2];
        let answers = ask(known.pod.netns(), Proto::Tcp, target, 10)?;
        answers.all_answered()?;
        ensure!(answers.by_server.len() == 1, "{target}: {answers}");
        servers.extend(answers.by_server.into_keys());
    }
    ensure!(servers.len() > 1, "twelve pods are one client");
    Ok(())
}

/// Unconnected sockets keep their backend and see the Service.
fn datagrams_to_a_service_without_a_peer(net: &Net) -> Result<()> {
    let known = listed(net, net.node(1), "talker")?;
    let service = net.service(endpoints(&[&net.a, &net.b, &net.c]))?;
    for target in service.targets() {
        known.pod.run_in(|| -> Result<()> {
            let socket = open_udp(target)?;
            let first = exchange(&socket, target, "first")?;
            for n in 0..10 {
                let next = exchange(&socket, target, &format!("n{n}"))?;
                ensure!(next == first && next.1 == target, "{next:?} after {first:?}");
            }
            Ok(())
        })??;
    }
    Ok(())
}

/// In two pods, one of which is listed no more; unconnected sockets, and those that asked for no Service, stay.
fn connected_udp_sockets_of_pods_end_with_their_backend(net: &Net) -> Result<()> {
    let (one, two) = (listed(net, net.node(1), "udp-one")?, listed(net, net.node(1), "udp-two")?);
    let mut service = net.service(endpoints(&[&net.a]))?;
    for target in service.targets() {
        service.set(endpoints(&[&net.a]))?;
        service.wait_known()?;
        wait::until("the old endpoint again", || ask(one.pod.netns(), Proto::Udp, target, 1)?.only_by(&["a"]))?;
        let direct = SocketAddr::new(net.a.address_like(target.ip())?, PORT);
        two.annotate(Some("true"))?;
        two.wait_listed()?;
        let mut watched = Vec::new();
        for known in [&one, &two] {
            let open = known.pod.run_in(|| -> Result<_> {
                let open = open_udp(target)?;
                exchange(&open, target, "before")?;
                Ok((connected_udp(target)?, open, connected_udp(direct)?))
            })??;
            ensure!(ask_udp(&open.0, "before")?.0 == "a");
            watched.push((known, open));
        }
        two.annotate(None)?;
        wait_listed(&two.pod, false)?;
        service.set(endpoints(&[&net.c]))?;
        for (known, (connected, open, to_pod)) in &watched {
            wait_ended(connected)?;
            let _ = connected.take_error()?;
            ensure!(ask_udp(to_pod, "direct")?.0 == "a");
            let after = known.pod.run_in(|| exchange(open, target, "after"))??;
            ensure!(after.0 == "c", "{after:?}");
            known.pod.run_in(|| connected.connect(target))??;
            ensure!(ask_udp(connected, "again")?.0 == "c");
        }
    }
    Ok(())
}

/// Of another node, as the host's do; not while the endpoint is known.
fn tcp_connections_of_pods_end_with_their_endpoint(net: &Net) -> Result<()> {
    let known = listed(net, net.node(1), "keeper")?;
    let leaver = net.node(2).add_pod("leaver")?;
    let mut service = net.service(endpoints(&[&leaver]))?;
    for target in service.targets() {
        service.set(endpoints(&[&leaver]))?;
        service.wait_known()?;
        wait::until("the old endpoint again", || ask(known.pod.netns(), Proto::Tcp, target, 1)?.only_by(&["leaver"]))?;
        let mut connection = Connection::open_in(known.pod.netns(), target)?;
        connection.ask("before")?;
        let socket = known.pod.run_in(|| connected_udp(target))??;
        let mut unready: Vec<Endpoint> = endpoints(&[&net.a, &leaver]);
        for endpoint in unready.iter_mut().filter(|it| it.node.as_deref() == Some("n2")) {
            (endpoint.ready, endpoint.serving) = (false, false);
        }
        service.set(unready)?;
        wait_ended(&socket)?;
        ensure!(connection.ask("unready")?.0 == "leaver");
        service.set(endpoints(&[&net.a]))?;
        wait::until("the connection ended", || match connection.ask("gone") {
            Err(e) if [ErrorKind::ConnectionAborted, ErrorKind::BrokenPipe].contains(&e.kind()) => Ok(()),
            other => anyhow::bail!("{other:?}"),
        })?;
    }
    leaver.delete()
}

/// It is reported, with the pod's name, until the pod is gone; the sockets of others end.
fn a_namespace_that_cannot_be_entered(net: &Net) -> Result<()> {
    let (hidden, other) = (listed(net, net.node(1), "hidden")?, listed(net, net.node(1), "other")?);
    let mut service = net.service(endpoints(&[&net.a]))?;
    let target = service.targets()[0];
    let open = |known: &Known<'_>| -> Result<_> {
        let socket = known.pod.run_in(|| connected_udp(target))??;
        ask_udp(&socket, "before")?;
        Ok(socket)
    };
    let (in_hidden, in_other) = (open(&hidden)?, open(&other)?);
    let file = std::path::PathBuf::from(&hidden.pod.attachment().netns);
    net.node(1).netns().unbind_netns(&file)?;
    service.set(endpoints(&[&net.c]))?;
    wait_ended(&in_other)?;
    let text = "sockets of pod default/hidden may be connected to backends that are gone";
    wait::until("the failure is reported", || {
        let log = net.node(1).agent_log(200);
        ensure!(log.contains(text) && log.contains("CAP_SYS_ADMIN"), "{log}");
        Ok(())
    })?;
    ensure!(ask_udp(&in_hidden, "still")?.0 == "a");
    // Once it can be entered again, nothing is left to say.
    net.node(1).netns().bind_netns(hidden.pod.netns(), &file)?;
    wait_ended(&in_hidden)?;
    wait::until("the failure is resolved", || {
        let log = net.node(1).agent_log(200);
        ensure!(log.lines().any(|line| line.contains("resolved") && line.contains(text)), "{log}");
        Ok(())
    })
}

fn a_pod_that_is_gone_is_listed_no_more(net: &Net) -> Result<()> {
    let node = net.node(1);
    let known = listed(net, node, "leaving")?;
    let cookie = cookie(&known.pod)?;
    let attachment = known.pod.attachment().clone();
    // Its object outlives it, as a kubelet's does.
    node.cni_del(&node.conflist()?, &attachment, Some(known.pod.result()))?;
    wait::until("it is listed no more", || {
        ensure!(!namespaces(node)?.contains_key(&cookie));
        Ok(())
    })
}

/// A record without the number of the namespace: packets ask.
fn as_of_an_earlier_release(pod: &Pod) -> Result<()> {
    let (node, attachment) = (pod.node(), pod.attachment());
    let cookie = cookie(pod)?;
    let path = endpoint_path(&node.run_dir(), &attachment.container_id, &attachment.ifname);
    let text = std::fs::read_to_string(&path)?;
    let earlier = EndpointFile { netns_cookie: None, ..record(pod)? };
    std::fs::write(&path, serde_json::to_string(&earlier)?)?;
    // The agent looks at records when the network changes.
    node.netns().ip("link add earlier type veth peer name earlier-peer")?;
    wait::until("the pod is listed no more", || {
        ensure!(!namespaces(node)?.contains_key(&cookie));
        Ok(())
    })?;
    let shown = node.rustnetctl(&["status"])?;
    ensure!(shown.contains("1 pods were connected by an earlier release"), "{shown}");
    std::fs::write(&path, text)?;
    node.netns().ip("link del earlier")?;
    wait_listed(pod, true)
}

/// With the setting `all`, pods are listed but for those that refuse; and the entries outlive the agent.
#[test]
fn all_pods_but_those_that_refuse() -> Result<()> {
    let net = Net::start(Setup::default())?;
    observed(&net, |net| {
        let node = net.node(1);
        node.stop_agent()?;
        node.start_agent(&["--socket-lb", "all"])?;
        let all = ["plain", "asks", "refuses", "unknown"].map(|name| Known::new(net, node, name));
        let [plain, asks, refuses, unknown] = all;
        let (plain, asks, refuses, unknown) = (plain?, asks?, refuses?, unknown?);
        for (known, wish) in [(&plain, None), (&asks, Some("true")), (&refuses, Some("false"))] {
            known.annotate(wish)?;
        }
        plain.wait_listed()?;
        asks.wait_listed()?;
        wait_listed(&refuses.pod, false)?;
        // The source has no object of it.
        wait_listed(&unknown.pod, false)?;
        let service = net.service(endpoints(&[&net.c]))?;
        let target = service.targets()[0];
        let backend = net.c.address_like(target.ip())?;
        for (known, by_packets) in [(&plain, false), (&asks, false), (&refuses, true), (&unknown, true)] {
            let found = asks_by_packets(&known.pod, target, backend)?;
            ensure!(found == by_packets, "{}: {found}", known.pod.name());
        }
        let listed = namespaces(node)?;
        ensure!(listed.len() == 3, "{listed:?}");
        let mut connection = Connection::open_in(plain.pod.netns(), target)?;
        node.kill_agent()?;
        ensure!(namespaces(node)? == listed);
        ensure!(!asks_by_packets(&plain.pod, target, backend)?, "by packets while no agent runs");
        node.start_agent(&["--socket-lb", "all"])?;
        ensure!(namespaces(node)? == listed, "{:?}", namespaces(node)?);
        connection.ask("again")?;
        ensure!(peers(&plain.pod, target)? == (target, target));
        as_of_an_earlier_release(&plain.pod)?;
        node.stop_agent()?;
        node.start_agent(&["--socket-lb", "host"])?;
        wait_listed(&plain.pod, false)?;
        asks.wait_listed()?;
        node.stop_agent()?;
        node.start_agent(&["--socket-lb", "off"])?;
        for known in [&plain, &asks] {
            ensure!(asks_by_packets(&known.pod, target, backend)?, "{}: not by packets", known.pod.name());
        }
        Ok(())
    })
}
