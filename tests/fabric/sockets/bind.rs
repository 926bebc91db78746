//! Node ports that processes of a host try to take for servers of their own.

use super::{loopback, with_node_port};
use crate::fixture::{Net, SERVICE_PORT, endpoints, in_each_routing, node_port, node_ports, observed, wait_served};
use anyhow::{Context, Result, ensure};
use nix::libc;
use rustnet_agent::bpf::load::program_path;
use rustnet_agent::bpf::sys;
use rustnet_common::names::LINKS_DIR;
use std::fs::File;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use testkit::client::ask;
use testkit::manifest::{Endpoint, Outside, Port};
use testkit::server::Server;
use testkit::{Proto, Setup, wait};

in_each_routing!(
    a_node_port_is_refused_to_servers_of_the_host,
    a_server_that_was_there_before_the_service_stays,
    the_backend_of_a_node_port_may_come,
    the_health_check_port_of_a_service_is_the_agents,
);

/// What comes of bind(2) with each protocol.
fn bind(at: SocketAddr) -> [Result<(), ErrorKind>; 2] {
    let tcp = TcpListener::bind(at).map(drop).map_err(|e| e.kind());
    [tcp, UdpSocket::bind(at).map(drop).map_err(|e| e.kind())]
}

fn a_node_port_is_refused_to_servers_of_the_host(net: &Net) -> Result<()> {
    let node = net.node(1);
    let (refused, taken) = ([Err(ErrorKind::PermissionDenied); 2], [Ok(()); 2]);
    let service = with_node_port(net, endpoints(&[&net.c]))?;
    let port = service.service.outside.node_port;
    let any: [IpAddr; 2] = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
    let mapped = |ip: Ipv4Addr| SocketAddr::new(ip.to_ipv6_mapped().into(), port);
    let mut all: Vec<_> = any.map(|ip| SocketAddr::new(ip, port)).to_vec();
    all.extend(node_ports(node, &service));
    all.extend(node_ports(node, &service).map(loopback));
    all.extend([mapped(node.v4()), mapped(Ipv4Addr::LOCALHOST), mapped(Ipv4Addr::UNSPECIFIED)]);
    for target in node_ports(node, &service).map(loopback) {
        wait_served(node.netns(), target)?;
    }
    for at in &all {
        let found = node.netns().run(|| bind(*at))?;
        ensure!(found == refused, "{at}: {found:?}");
        let other = SocketAddr::new(at.ip(), node_port());
        let found = node.netns().run(|| bind(other))?;
        ensure!(found == taken, "{other}: {found:?}");
    }
    // Each pod has ports of its own.
    for at in any.map(|ip| SocketAddr::new(ip, port)) {
        let found = net.a.run_in(|| bind(at))?;
        ensure!(found == taken, "a pod, {at}: {found:?}");
    }
    // A port that the kernel chooses.
    let found = node.netns().run(|| bind(SocketAddr::new(any[0], 0)))?;
    ensure!(found == taken, "{found:?}");
    drop(service);
    for at in &all {
        wait::until(&format!("{at} is free again"), || {
            let found = node.netns().run(|| bind(*at))?;
            ensure!(found == taken, "{found:?}");
            Ok(())
        })?;
    }
    Ok(())
}

fn a_server_that_was_there_before_the_service_stays(net: &Net) -> Result<()> {
    let (node, port) = (net.node(1), node_port());
    let at = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port);
    let server = node.netns().run(|| TcpListener::bind(at))??;
    let outside = Outside { node_port: port, ..Outside::default() };
    let service = crate::fixture::published(net, outside, endpoints(&[&net.c]))?;
    let target = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
    wait_served(node.netns(), target)?;
    let second = node.netns().run(|| TcpListener::bind(SocketAddr::new(node.v4().into(), port)).map(drop))?;
    ensure!(second.is_err(), "the port was given twice");
    drop(service);
    server.set_nonblocking(true)?;
    wait::until("the server has its clients again", || {
        let client = node.netns().run(|| TcpStream::connect(target))??;
        let (_, from) = server.accept().context("somebody else answered")?;
        ensure!(client.local_addr()? == from);
        Ok(())
    })
}

/// A server on the host's network that has the node port itself, as a DaemonSet may; on other nodes the port is refused.
fn the_backend_of_a_node_port_may_come(net: &Net) -> Result<()> {
    let (node, port) = (net.node(1), node_port());
    let mut service = net.unknown_service();
    service.service.outside = Outside { node_port: port, ..Outside::default() };
    service.service.ports = Port::both(SERVICE_PORT, port);
    service.set(node.addresses().map(|ip| Endpoint::ready(ip, Some(node.name()))).to_vec())?;
    for node in net.fabric.nodes() {
        wait::until("the node port is known", || {
            let shown = node.rustnetctl(&["services", &format!("default/{}", service.service.name)])?;
            ensure!(shown.contains(&port.to_string()), "{shown}");
            Ok(())
        })?;
    }
    let any = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port);
    let found = net.node(2).netns().run(|| bind(any))?;
    ensure!(found == [Err(ErrorKind::PermissionDenied); 2], "{found:?}");
    let _server = Server::start(node.netns(), "own", port)?;
    for target in node_ports(node, &service) {
        for from in [node.netns(), net.a.netns(), net.node(2).netns()] {
            ask(from, Proto::Tcp, target, 3)?.only_by(&["own"])?;
        }
        ask(node.netns(), Proto::Udp, loopback(target), 3)?.only_by(&["own"])?;
    }
    Ok(())
}

/// It is no port of the Service's: the agent listens there.
fn the_health_check_port_of_a_service_is_the_agents(net: &Net) -> Result<()> {
    let (node, port, check) = (net.node(1), node_port(), node_port());
    let mut service = net.unknown_service();
    let balancer = vec![Ipv4Addr::new(203, 0, 113, 77).into()];
    service.service.outside = Outside { node_port: port, balancer, is_local: true, ..Outside::default() };
    service.service.endpoints = endpoints(&[&net.a]);
    let yaml = service.service.yaml().replacen("spec:\n", &format!("spec:\n  healthCheckNodePort: {check}\n"), 1);
    net.fabric.manifests().write(&format!("{}.yaml", service.service.name), &yaml)?;
    wait::until("the agent answers", || {
        let answer = node.http_get(SocketAddr::new(node.v4().into(), check), "/")?;
        ensure!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        Ok(())
    })?;
    let found = node.netns().run(|| bind(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port)))?;
    ensure!(found == [Err(ErrorKind::PermissionDenied); 2], "{found:?}");
    Ok(())
}

/// A program that somebody attaches to a control group and that lets no other in, as long as this lives.
struct Exclusive {
    group: File,
    program: OwnedFd,
}

/// `BPF_PROG_ATTACH`, and the command that takes the program off.
const ATTACH: i32 = 8;
const DETACH: i32 = 9;
/// `BPF_CGROUP_INET4_POST_BIND`.
const BIND4: i32 = 12;

impl Exclusive {
    fn attach(group: &Path, program: OwnedFd) -> Result<Self> {
        let it = Self { group: File::open(group)?, program };
        it.call(ATTACH)?;
        Ok(it)
    }

    fn call(&self, command: i32) -> Result<()> {
        // `target_fd`, `attach_bpf_fd`, `attach_type`, `attach_flags`: without BPF_F_ALLOW_MULTI.
        let attr = [self.group.as_raw_fd(), self.program.as_raw_fd(), BIND4, 0];
        // SAFETY: the attributes of this command, with their length.
        let result = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_ptr(), size_of_val(&attr)) };
        ensure!(result == 0, "bpf command {command}: {}", std::io::Error::last_os_error());
        Ok(())
    }
}

impl Drop for Exclusive {
    fn drop(&mut self) {
        let _ = self.call(DETACH);
    }
}

/// Another tool keeps one program out: the others work, and all that look say what is missing.
#[test]
fn a_program_of_bind_that_cannot_be_attached_fails_alone() -> Result<()> {
    let net = Net::start(Setup::default())?;
    observed(&net, |net| {
        let node = net.node(1);
        let group = node.cgroup().context("no control group")?;
        let service = with_node_port(net, endpoints(&[&net.c]))?;
        let (port, targets) = (service.service.outside.node_port, node_ports(node, &service).map(loopback));
        let any = |ip: IpAddr| SocketAddr::new(ip, port);
        let servers =
            || node.netns().run(|| [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()].map(any).map(bind));
        targets.into_iter().try_for_each(|target| wait_served(node.netns(), target))?;
        let (refused, taken) = ([Err(ErrorKind::PermissionDenied); 2], [Ok(()); 2]);
        ensure!(servers()? == [refused, refused], "{:?}", servers()?);
        node.stop_agent()?;
        let links = node.bpffs_from_outside().join(LINKS_DIR);
        std::fs::remove_file(links.join("sock_bind4"))?;
        // Any program of this kind will do; that of another node refuses nothing here.
        let theirs = sys::obj_get(&program_path(&net.node(2).bpffs_from_outside(), "sock_bind4"))?;
        let exclusive = wait::until("the link is gone", || Exclusive::attach(group, theirs.try_clone()?))?;
        node.start_agent(&[])?;
        let text = "servers of this host can take node ports, where nobody reaches them";
        wait::until("the failure is reported", || {
            let (shown, log) = (node.rustnetctl(&["status"])?, node.agent_log(200));
            ensure!(shown.contains("missing sock_bind4") && shown.contains(text), "{shown}");
            ensure!(shown.contains("those of this host's processes ask for Services"), "{shown}");
            ensure!(log.contains(text) && log.contains("bpftool cgroup show"), "{log}");
            Ok(())
        })?;
        // Other findings may make it fail.
        let examined = node.rustnetctl(&["doctor"]).unwrap_or_else(|error| format!("{error:#}"));
        ensure!(examined.contains("keeps sock_bind4 out") && examined.contains("BPF_F_ALLOW_MULTI"), "{examined}");
        for target in targets {
            ask(node.netns(), Proto::Tcp, target, 5)?.only_by(&["c"])?;
        }
        ensure!(servers()? == [taken, refused], "{:?}", servers()?);
        drop(exclusive);
        wait::until("the program is back", || {
            ensure!(servers()? == [refused, refused], "{:?}", servers()?);
            let shown = node.rustnetctl(&["status"])?;
            ensure!(!shown.contains(text), "{shown}");
            Ok(())
        })
    })
}
