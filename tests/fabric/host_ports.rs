//! Pods' ports of their node (`hostPort`), which runtimes ask the CNI binary for.

use crate::fixture::{Net, endpoints, in_each_routing, observed, world};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicU16, Ordering};
use testkit::client::{Connection, ask, ask_sized, ask_udp, connected_udp};
use testkit::manifest::Outside;
use testkit::pod::{PORT, Sandbox};
use testkit::server::Server;
use testkit::{Netns, Node, Pod, Proto, Setup, wait};

in_each_routing!(
    clients_everywhere,
    one_address_of_the_node,
    large_transfers,
    the_port_is_the_nodes_again_and_then_the_next_pods,
    a_late_deletion_leaves_the_successor_its_port,
    a_service_with_the_port_comes_first,
);

/// A port of the node that no other test has.
pub fn host_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(9_100);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Both protocols of a port of the node, as containerd asks for them.
pub fn mappings(port: u16, host_ip: &str) -> Value {
    let one = |proto: &str| json!({ "HostPort": port, "ContainerPort": PORT, "Protocol": proto, "HostIP": host_ip });
    json!({ "runtimeConfig": { "portMappings": [one("tcp"), one("udp")] } })
}

/// A pod of a node with a port at all addresses of it.
pub fn add_pod(node: &Node, name: &str, port: u16) -> Result<Pod> {
    let mut pod = node.add_pod_with(name, &mappings(port, ""))?;
    pod.serve(PORT)?;
    Ok(pod)
}

/// A port at a node's address of each family.
pub fn targets(node: &Node, port: u16) -> [SocketAddr; 2] {
    node.addresses().map(|ip| SocketAddr::new(ip, port))
}

/// A request of each protocol is answered by the server, which sees the client as `seen`.
pub fn served(from: &Netns, target: SocketAddr, by: &str, seen: IpAddr) -> Result<()> {
    for proto in Proto::ALL {
        let answers = ask(from, proto, target, 5)?;
        answers.only_by(&[by]).and_then(|()| answers.only_as(seen)).with_context(|| format!("{proto} {target}"))?;
    }
    Ok(())
}

/// Nobody has the port: the node's own stack refuses it.
pub fn refused(from: &Netns, target: SocketAddr) -> Result<()> {
    for proto in Proto::ALL {
        ask(from, proto, target, 2)?
            .all_failed(ErrorKind::ConnectionRefused)
            .with_context(|| format!("{proto} {target}"))?;
    }
    Ok(())
}

/// No wait: the port is served once the CNI binary has ended.
fn clients_everywhere(net: &Net) -> Result<()> {
    let (node, port) = (net.node(1), host_port());
    let pod = add_pod(node, "web", port)?;
    for target in targets(node, port) {
        let like = target.ip();
        served(net.fabric.world(), target, "web", world()[usize::from(like.is_ipv6())])?;
        served(net.node(2).netns(), target, "web", net.node(2).address_like(like))?;
        served(net.c.netns(), target, "web", net.c.address_like(like)?)?;
        served(net.a.netns(), target, "web", net.a.address_like(like)?)?;
        served(pod.netns(), target, "web", like)?;
        // Another port of the node is its own.
        served(net.fabric.world(), SocketAddr::new(like, PORT), "n1", world()[usize::from(like.is_ipv6())])?;
    }
    for target in targets(net.node(2), port) {
        refused(net.fabric.world(), target)?;
    }
    pod.check()?;
    let shown = node.rustnetctl(&["endpoints"])?;
    ensure!(shown.contains(&format!("{port}->{PORT}/tcp")), "{shown}");
    pod.delete()
}

fn one_address_of_the_node(net: &Net) -> Result<()> {
    let (node, port) = (net.node(1), host_port());
    let mut pod = node.add_pod_with("one", &mappings(port, &node.v4().to_string()))?;
    pod.serve(PORT)?;
    let [v4, v6] = targets(node, port);
    served(net.fabric.world(), v4, "one", world()[0])?;
    refused(net.fabric.world(), v6)?;
    refused(net.a.netns(), v6)?;
    let mut local = node.add_pod_with("local", &mappings(port + 1000, "127.0.0.1"))?;
    local.serve(PORT)?;
    targets(node, port + 1000).into_iter().try_for_each(|target| refused(net.fabric.world(), target))
}

/// Larger than one packet: segments and fragments.
fn large_transfers(net: &Net) -> Result<()> {
    let (node, port) = (net.node(1), host_port());
    let pod = add_pod(node, "large", port)?;
    for target in targets(node, port) {
        for from in [net.fabric.world(), net.a.netns(), net.c.netns()] {
            for (proto, size) in [(Proto::Tcp, 60_000), (Proto::Udp, 1400), (Proto::Udp, 8000)] {
                // A client behind IPv6 learns the path's MTU by an error first.
                wait::until(&format!("{proto} {target}, {size} bytes"), || {
                    ask_sized(from, proto, target, 5, size)?.only_by(&["large"])
                })?;
            }
        }
    }
    pod.delete()
}

/// Sockets that go on asking find whoever has the port.
fn the_port_is_the_nodes_again_and_then_the_next_pods(net: &Net) -> Result<()> {
    let (node, port) = (net.node(1), host_port());
    for target in targets(node, port) {
        let first = add_pod(node, "db-0", port)?;
        let sockets = [net.fabric.world(), net.a.netns(), net.c.netns()]
            .map(|from| from.run(|| connected_udp(target)).and_then(|socket| Ok(socket?)));
        let sockets = sockets.into_iter().collect::<Result<Vec<_>>>()?;
        for socket in &sockets {
            ensure!(ask_udp(socket, "1")?.0 == "db-0", "another server");
        }
        first.delete()?;
        for from in [net.fabric.world(), net.a.netns(), net.c.netns()] {
            refused(from, target)?;
        }
        for (i, socket) in sockets.iter().enumerate() {
            wait::until(&format!("socket {i} refused at {target}"), || {
                ensure!(ask_udp(socket, "2").is_err_and(|e| e.kind() == ErrorKind::ConnectionRefused), "not refused");
                Ok(())
            })?;
        }
        let second = add_pod(node, "db-0-again", port)?;
        for from in [net.fabric.world(), net.a.netns(), net.c.netns()] {
            ask(from, Proto::Tcp, target, 2)?.only_by(&["db-0-again"])?;
        }
        for (i, socket) in sockets.iter().enumerate() {
            wait::until(&format!("socket {i} served at {target}"), || {
                ensure!(ask_udp(socket, "3")?.0 == "db-0-again", "another server");
                Ok(())
            })?;
        }
        second.delete()?;
    }
    Ok(())
}

fn a_late_deletion_leaves_the_successor_its_port(net: &Net) -> Result<()> {
    let (node, port) = (net.node(1), host_port());
    let first = add_pod(node, "first", port)?;
    let second = add_pod(node, "second", port)?;
    let targets = targets(node, port);
    for target in targets {
        ask(net.fabric.world(), Proto::Tcp, target, 3)?.only_by(&["second"])?;
    }
    first.delete()?;
    for target in targets {
        ask(net.fabric.world(), Proto::Tcp, target, 3)?.only_by(&["second"])?;
    }
    second.check()?;
    second.delete()?;
    targets.into_iter().try_for_each(|target| refused(net.fabric.world(), target))
}

/// The Service's node port is a port that a pod has, too.
fn a_service_with_the_port_comes_first(net: &Net) -> Result<()> {
    let (node, port) = (net.node(1), 31_500 + host_port() % 100);
    let pod = add_pod(node, "web", port)?;
    let mut service = net.unknown_service();
    service.service.outside = Outside { node_port: port, ..Outside::default() };
    service.set(endpoints(&[&net.b]))?;
    service.wait_known()?;
    for target in targets(node, port) {
        for from in [net.fabric.world(), net.a.netns(), net.c.netns()] {
            wait::until(&format!("the Service at {target}"), || ask(from, Proto::Tcp, target, 5)?.only_by(&["b"]))?;
        }
    }
    drop(service);
    for target in targets(node, port) {
        for from in [net.fabric.world(), net.a.netns(), net.c.netns()] {
            wait::until(&format!("the pod at {target}"), || ask(from, Proto::Tcp, target, 5)?.only_by(&["web"]))?;
        }
    }
    pod.delete()
}

/// Nobody but the CNI binary is needed, and an agent that starts leaves what it did.
#[test]
fn without_the_agent() -> Result<()> {
    observed(&Net::start(Setup::default())?, |net| {
        let node = net.node(1);
        let [before, during, lost] = [host_port(), host_port(), host_port()];
        let first = add_pod(node, "before", before)?;
        let mut open = Vec::new();
        for target in targets(node, before) {
            open.push(Connection::open_in(net.fabric.world(), target)?);
        }
        node.kill_agent()?;
        let second = add_pod(node, "during", during)?;
        let third = add_pod(node, "lost", lost)?;
        let each = |port: u16, name: &str| {
            targets(node, port)
                .into_iter()
                .try_for_each(|target| served(net.fabric.world(), target, name, world()[usize::from(target.is_ipv6())]))
        };
        each(before, "before")?;
        each(during, "during")?;
        first.delete()?;
        targets(node, before).into_iter().try_for_each(|target| refused(net.fabric.world(), target))?;
        // Somebody else deletes the entries: an agent puts them back from the record.
        for key in dump_keys(node)? {
            let hex: Vec<_> = key.iter().map(|byte| format!("{byte:02x}")).collect();
            let path = node.bpffs().join("rn_host_ports").display().to_string();
            let mut args = vec!["map", "delete", "pinned", &path, "key", "hex"];
            args.extend(hex.iter().map(String::as_str));
            node.netns().exec("bpftool", &args)?;
        }
        targets(node, lost).into_iter().try_for_each(|target| refused(net.fabric.world(), target))?;
        node.start_agent(&[])?;
        for (port, name) in [(during, "during"), (lost, "lost")] {
            wait::until(&format!("{name} served again"), || each(port, name))?;
        }
        second.check()?;
        third.check()
    })
}

/// The keys of all entries, byte by byte.
fn dump_keys(node: &Node) -> Result<Vec<Vec<u8>>> {
    let path = node.bpffs().join("rn_host_ports").display().to_string();
    let text = node.netns().exec("bpftool", &["-j", "map", "dump", "pinned", &path])?;
    let all: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    let byte = |text: &Value| {
        let text = text.as_str().unwrap_or_default();
        u8::from_str_radix(text.trim_start_matches("0x"), 16).with_context(|| text.to_owned())
    };
    let keys = all
        .as_array()
        .into_iter()
        .flatten()
        .map(|entry| entry["key"].as_array().into_iter().flatten().map(byte).collect::<Result<Vec<_>>>());
    keys.collect()
}

/// The reference plugin behind ours in a chain: alone, and with ours asked, too. What a node asks of itself is `portmap`'s in both.
#[test]
fn with_the_plugin_portmap() -> Result<()> {
    observed(&Net::start(Setup::default())?, |net| {
        let node = net.node(1);
        let plugin = ["/usr/lib/cni/portmap", "/opt/cni/bin/portmap"].into_iter().find(|path| Path::new(path).exists());
        let plugin = plugin.context("the reference plugins are not installed: cargo xtask setup")?;
        std::fs::copy(plugin, node.cni_bin_dir().join("portmap"))?;
        for both in [true, false] {
            let port = host_port();
            let asked = mappings(port, "")["runtimeConfig"].clone();
            let mut list = node.conflist()?;
            list["plugins"][0]["runtimeConfig"] = if both { asked.clone() } else { json!({}) };
            let plugins = list["plugins"].as_array_mut().context("no plugins")?;
            plugins.push(json!({ "type": "portmap", "snat": true, "runtimeConfig": asked }));
            let sandbox = Sandbox::new(node, "web")?;
            let attachment = sandbox.attachment("web");
            let result = node.cni_add(&list, &attachment)?;
            let _server = Server::start(sandbox.netns(), "web", PORT)?;
            for target in targets(node, port) {
                for from in [net.fabric.world(), net.a.netns(), net.c.netns(), node.netns()] {
                    for proto in Proto::ALL {
                        ask(from, proto, target, 3)?
                            .only_by(&["web"])
                            .with_context(|| format!("{proto} {target}, both: {both}, from {}", from.name()))?;
                    }
                }
            }
            node.cni_del(&list, &attachment, Some(&result))?;
            for target in targets(node, port) {
                for from in [net.fabric.world(), net.a.netns(), node.netns()] {
                    refused(from, target)?;
                }
            }
        }
        Ok(())
    })
}

/// Established connections do not ask for the port again.
#[test]
fn connections_outlive_the_agent() -> Result<()> {
    observed(&Net::start(Setup::default())?, |net| {
        let (node, port) = (net.node(1), host_port());
        let pod = add_pod(node, "web", port)?;
        let mut open = Vec::new();
        for target in targets(node, port) {
            for from in [net.fabric.world(), net.a.netns(), net.c.netns()] {
                open.push(Connection::open_in(from, target)?);
            }
        }
        node.kill_agent()?;
        for connection in &mut open {
            ensure!(connection.ask("1")?.0 == "web", "another server");
        }
        node.start_agent(&[])?;
        for connection in &mut open {
            ensure!(connection.ask("2")?.0 == "web", "another server");
        }
        pod.check()
    })
}
