//! The rows without disturbance: pods, hosts, services, refusals.

use crate::addresses::{family, vips};
use crate::cluster::{Client, Cluster, SERVICE_PORT};
use crate::table::{self, Row, Table};
use anyhow::{Result, bail};
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use testkit::client::ask;
use testkit::icmp::reachable;
use testkit::manifest::Service;
use testkit::pod::PORT;
use testkit::{Netns, Proto};

/// Refusals have to come faster than this, because clients that wait for a time-out are stuck.
const QUICK: Duration = Duration::from_millis(500);

/// All rows of a healthy cluster.
pub fn all(cluster: &Cluster<'_>, requests: usize, table: &mut Table) -> Result<()> {
    table::step("pods to pods, each sees the other's own address");
    table::columns();
    for from in &cluster.pods {
        for to in cluster.pods.iter().filter(|p| p.name() != from.name()) {
            for address in to.addresses() {
                let what = format!("{} > {}", from.name(), to.name());
                let target = SocketAddr::new(*address, PORT);
                let seen_as = from.address_like(*address)?;
                echo_row(from.netns(), &what, *address, requests, table);
                for proto in Proto::ALL {
                    let answers = ask(from.netns(), proto, target, requests)?;
                    let verdict = answers.only_by(&[to.name()]).and_then(|()| answers.only_as(seen_as));
                    table.answers(&what, family(*address), &proto.to_string(), &answers, verdict);
                }
            }
        }
    }
    hosts(cluster, requests, table)?;
    table::step("services");
    table::columns();
    for client in cluster.clients() {
        for service in cluster.services() {
            for vip in &service.vips {
                service_rows(cluster, &client, service, *vip, requests, table)?;
            }
        }
    }
    Ok(())
}

/// Hosts to pods (as the kubelet probes) and pods to hosts and to the outside.
fn hosts(cluster: &Cluster<'_>, requests: usize, table: &mut Table) -> Result<()> {
    table::step("hosts and pods; the outside sees a node's address");
    table::columns();
    for node in cluster.fabric.nodes() {
        for pod in &cluster.pods {
            for address in pod.addresses() {
                let what = format!("{}'s host > {}", node.name(), pod.name());
                let answers = ask(node.netns(), Proto::Tcp, SocketAddr::new(*address, PORT), requests)?;
                table.answers(&what, family(*address), "TCP", &answers, answers.only_by(&[pod.name()]));
                echo_row(
                    pod.netns(),
                    &format!("{} > {}'s host", pod.name(), node.name()),
                    node.address_like(*address),
                    requests,
                    table,
                );
            }
        }
    }
    let (world4, world6) = testkit::fabric::WORLD;
    for pod in &cluster.pods {
        for world in [IpAddr::from(world4), world6.into()] {
            for proto in Proto::ALL {
                let answers = ask(pod.netns(), proto, SocketAddr::new(world, PORT), requests)?;
                let verdict =
                    answers.only_by(&["outside"]).and_then(|()| answers.only_as(pod.node().address_like(world)));
                let what = format!("{} > outside", pod.name());
                table.answers(&what, family(world), &proto.to_string(), &answers, verdict);
            }
        }
    }
    Ok(())
}

fn echo_row(from: &Netns, what: &str, to: IpAddr, requests: usize, table: &mut Table) {
    let replies: Result<Vec<Duration>> = (0..requests).map(|_| reachable(from, to)).collect();
    let mut times = replies.as_ref().map_or_else(|_| Vec::new(), Clone::clone);
    times.sort_unstable();
    let median = times.get(times.len() / 2).copied();
    let answers = format!("echo {}", times.len());
    let row = Row { what, family: family(to), proto: "ICMP", sent: requests, answers: &answers, median };
    table.row(&row, replies.map(|_| ()));
}

/// Requests with which each of so many backends takes part, but for one run in a billion. Which one a request gets is a matter
/// of its source port: chance, in effect.
pub fn enough(requests: usize, backends: usize) -> usize {
    let n = backends.max(1);
    // Each is left out with a probability of (1 - 1/n)^k < e^(-k/n), any of them with at most n times that: 21 is ln 10^9.
    let least = if n == 1 { 1 } else { n * (22 + n.ilog2() as usize) };
    (requests * n * 2).max(least)
}

/// Requests to one VIP by both protocols; all backends have to take part.
fn service_rows(
    cluster: &Cluster<'_>,
    client: &Client<'_>,
    service: &Service,
    vip: IpAddr,
    requests: usize,
    table: &mut Table,
) -> Result<()> {
    let names = backends(cluster, service, vip);
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    for proto in Proto::ALL {
        // The host cannot ask itself by packets: its own address never leaves the stack.
        if !cluster.has_sockets()
            && service.name == "host"
            && client.netns.name() == cluster.fabric.node(1).netns().name()
        {
            continue;
        }
        let count = enough(requests, names.len());
        let answers = ask(client.netns, proto, SocketAddr::new(vip, SERVICE_PORT), count)?;
        let what = format!("{} > service {}", client.name, service.name);
        let verdict = answers.only_by(&names).and_then(|()| seen_as(cluster, client, service, vip, &answers));
        table.answers(&what, family(vip), &proto.to_string(), &answers, verdict);
    }
    Ok(())
}

/// Pods keep their address towards backends in the cluster, except towards themselves.
fn seen_as(
    cluster: &Cluster<'_>,
    client: &Client<'_>,
    service: &Service,
    vip: IpAddr,
    answers: &testkit::Answers,
) -> Result<()> {
    if service.name == "outside" {
        let node = cluster.fabric.nodes().iter().find(|n| client.netns.name().starts_with(n.netns().name()));
        return node.map_or(Ok(()), |node| answers.only_as(node.address_like(vip)));
    }
    let is_backend = service.endpoints.iter().any(|e| client.addresses.contains(&e.address));
    let own = client.addresses.iter().find(|a| a.is_ipv4() == vip.is_ipv4());
    let is_host = cluster.fabric.nodes().iter().any(|n| n.netns().name() == client.netns.name());
    match own {
        Some(own) if !is_backend && !is_host => answers.only_as(*own),
        _ => Ok(()),
    }
}

/// The names that backends of one family answer with.
fn backends(cluster: &Cluster<'_>, service: &Service, vip: IpAddr) -> Vec<String> {
    let of_family = service.endpoints.iter().filter(|e| e.address.is_ipv4() == vip.is_ipv4());
    of_family
        .map(|e| {
            let pod = cluster.pods.iter().find(|p| p.addresses().contains(&e.address));
            let node = cluster.fabric.nodes().iter().find(|n| n.addresses().contains(&e.address));
            pod.map(|p| p.name().to_owned()).or(node.map(|n| n.name().to_owned())).unwrap_or("outside".into())
        })
        .collect()
}

/// A service without endpoints and an unknown port are refused; endpoints that come back are found.
pub fn refusals(cluster: &Cluster<'_>, requests: usize, table: &mut Table) -> Result<()> {
    table::step("nobody there: refused at once, not timed out");
    table::columns();
    let mut empty = cluster.unasked.clone();
    empty.endpoints.clear();
    cluster.apply(&empty)?;
    for client in cluster.clients() {
        for vip in &empty.vips {
            let target = SocketAddr::new(*vip, SERVICE_PORT);
            for proto in Proto::ALL {
                let what = format!("{} > service unasked, emptied", client.name);
                refused_row(&client, &what, proto, target, requests, table)?;
                let what = format!("{} > service mixed, port 81", client.name);
                refused_row(
                    &client,
                    &what,
                    proto,
                    SocketAddr::new(vips(1)[usize::from(vip.is_ipv6())], 81),
                    requests,
                    table,
                )?;
            }
        }
    }
    cluster.apply(&cluster.unasked)?;
    for client in cluster.clients() {
        for vip in &cluster.unasked.vips {
            let answers = ask(client.netns, Proto::Tcp, SocketAddr::new(*vip, SERVICE_PORT), requests)?;
            let what = format!("{} > service unasked, filled again", client.name);
            table.answers(&what, family(*vip), "TCP", &answers, answers.all_answered());
        }
    }
    Ok(())
}

fn refused_row(
    client: &Client<'_>,
    what: &str,
    proto: Proto,
    target: SocketAddr,
    requests: usize,
    table: &mut Table,
) -> Result<()> {
    let answers = ask(client.netns, proto, target, requests)?;
    let mut times: Vec<Duration> = answers.errors.iter().map(|e| e.after).collect();
    times.sort_unstable();
    let median = times.get(times.len() / 2).copied();
    let verdict = answers.all_failed(ErrorKind::ConnectionRefused).and_then(|()| match median {
        Some(t) if t > QUICK => bail!("refused only after {} ms", t.as_millis()),
        _ => Ok(()),
    });
    let said = if verdict.is_ok() { "refused" } else { "not refused" };
    let row =
        Row { what, family: family(target.ip()), proto: &proto.to_string(), sent: answers.sent, answers: said, median };
    table.row(&row, verdict);
    Ok(())
}
