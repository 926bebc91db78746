//! A real Ingress controller (skipper) behind node ports and addresses of a load balancer: requests by host name from outside of the
//! cluster reach the application, and the controller sees the client's address wherever the traffic policy keeps it.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::cluster::layout::{Cluster, Node};
use crate::cluster::{balancer, images, up, wait, wires};
use crate::setup::{self, Need};

const HOST: &str = "shop.example";
const NAMESPACE: &str = "--namespace=trial";
/// For a connection, and for an answer.
const PATIENCE: Duration = Duration::from_secs(3);
/// Until addresses are there and lead somewhere, and the controller has read the Ingress.
const START: Duration = Duration::from_mins(1);

/// Returns what to tell of it.
pub fn run(cluster: &Cluster) -> Result<String> {
    setup::ensure(&[Need::Ingress])?;
    let nodes = cluster.nodes();
    let (near, far) = (nodes.first().context("no node")?, nodes.last().context("no node")?);
    ensure!(near.name != far.name, "it takes two nodes\n  remedy: cargo xtask cluster scale 2");
    let image = images::ingress()?;
    nodes.iter().try_for_each(|node| up::load(cluster, node, &image))?;
    balancer::start(cluster)?;
    let file = cluster.dir.join("ingress.yaml");
    fs::write(&file, include_str!("ingress.yaml").replace("@NODE@", &far.name).replace("@IMAGE@", images::INGRESS))?;
    let path = file.display().to_string();
    cluster.ask(&["apply", "-f", &path])?;
    cluster.ask(&[NAMESPACE, "rollout", "status", "deployment/ingress", "--timeout=120s"])?;
    let mut lines = Vec::new();
    for policy in ["cluster", "local"] {
        let service = Service::read(cluster, policy)?;
        for address in &service.addresses {
            lines.push(ask_all_ways(cluster, &service, *address, near, far)?);
        }
    }
    cluster.ask(&["delete", "-f", &path, "--wait=false"])?;
    Ok(lines.join("\n   "))
}

/// One of the Services in front of the controller.
struct Service {
    name: String,
    is_local: bool,
    node_port: u16,
    /// Addresses of the load balancer.
    addresses: Vec<IpAddr>,
}

impl Service {
    fn read(cluster: &Cluster, policy: &str) -> Result<Self> {
        let name = format!("ingress-{policy}");
        let get =
            |path: &str| cluster.ask(&[NAMESPACE, "get", "service", &name, "-o", &format!("jsonpath={{{path}}}")]);
        let families = get(".spec.ipFamilies[*]")?.split_whitespace().count();
        let addresses = || -> Result<Vec<IpAddr>> {
            let text = get(".status.loadBalancer.ingress[*].ip")?;
            text.split_whitespace().map(str::parse).collect::<Result<_, _>>().map_err(Into::into)
        };
        let is_there = || addresses().is_ok_and(|all| all.len() == families);
        ensure!(wait::until(START, is_there), "{name} gets no address of a load balancer");
        let node_port = get(".spec.ports[0].nodePort")?.parse().context("no node port")?;
        Ok(Self { is_local: policy == "local", node_port, addresses: addresses()?, name })
    }
}

/// Asks by the load balancer's address, and by the node port of both nodes, in the family of that address.
fn ask_all_ways(cluster: &Cluster, service: &Service, address: IpAddr, near: &Node, far: &Node) -> Result<String> {
    let own = |node: &Node| -> Result<IpAddr> {
        let all = node.address().of(cluster.settings.ip_family);
        let all: Vec<IpAddr> = all.iter().map(|it| it.parse()).collect::<Result<_, _>>()?;
        all.into_iter().find(|it| it.is_ipv4() == address.is_ipv4()).context("no address of the node in this family")
    };
    let (near_ip, far_ip) = (own(near)?, own(far)?);
    let balanced = SocketAddr::new(address, 80);
    let answer = first_answer(cluster, balanced)?;
    // Without a policy that keeps it, whichever node took the request may ask in its own name.
    let may_be = |seen: IpAddr, client: IpAddr, node: IpAddr| seen == client || (!service.is_local && seen == node);
    let is_well = [near_ip, far_ip].iter().any(|node| may_be(answer.seen, answer.client, *node));
    ensure!(
        is_well,
        "{} at {balanced}: the controller saw {}, the client is {}",
        service.name,
        answer.seen,
        answer.client
    );
    let mut seen = vec![format!("{balanced} saw {} of {}", answer.seen, answer.client)];
    for (node, ip) in [(near, near_ip), (far, far_ip)] {
        let to = SocketAddr::new(ip, service.node_port);
        let result = ask(cluster, to, HOST);
        if service.is_local && node.name == near.name {
            ensure!(result.is_err(), "{} at {to}: answered by a node without an endpoint", service.name);
            seen.push(format!("{to} without an endpoint does not answer"));
            continue;
        }
        let answer = result.with_context(|| format!("{} at {to}", service.name))?;
        let is_well = may_be(answer.seen, answer.client, ip);
        ensure!(
            is_well,
            "{} at {to}: the controller saw {}, the client is {}",
            service.name,
            answer.seen,
            answer.client
        );
        seen.push(format!("{to} saw {} of {}", answer.seen, answer.client));
    }
    let other = ask(cluster, balanced, "other.example");
    ensure!(
        other.is_err_and(|error| error.to_string().contains("404")),
        "{balanced}: another host name is served, too"
    );
    Ok(format!("{}: {}", service.name, seen.join(", ")))
}

/// The first answer: routes to a new address, and the controller's look at the Ingress, take a moment.
fn first_answer(cluster: &Cluster, to: SocketAddr) -> Result<Answer> {
    let mut result = ask(cluster, to, HOST);
    wait::until(START, || {
        if result.is_err() {
            result = ask(cluster, to, HOST);
        }
        result.is_ok()
    });
    result.with_context(|| format!("asking {to}"))
}

/// What came back.
struct Answer {
    /// The address that the client has.
    client: IpAddr,
    /// The client's address as the controller passes it on to the application.
    seen: IpAddr,
}

/// One request from outside. The application returns the header in which the controller says who asked.
fn ask(cluster: &Cluster, to: SocketAddr, host: &str) -> Result<Answer> {
    let request = format!("GET /header?key=X-Forwarded-For HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    let (client, text) = wires::inside(&cluster.netns_file("sw"), || -> Result<(IpAddr, String)> {
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(request.as_bytes())?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok((stream.local_addr()?.ip(), text))
    })??;
    let (head, body) = text.split_once("\r\n\r\n").context("no HTTP")?;
    if !head.starts_with("HTTP/1.1 200") {
        bail!("{}", head.lines().next().unwrap_or_default());
    }
    // Chunks have their length in a line of its own.
    let seen = body.split_whitespace().find_map(|word| word.parse().ok());
    Ok(Answer { client, seen: seen.with_context(|| format!("the controller names no client: {body:?}"))? })
}
