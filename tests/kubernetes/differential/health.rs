//! Health check node ports: what both proxies tell load balancers about a Service's endpoints on a node.

use super::world::{Place, World};
use anyhow::{Context as _, Result};
use serde_json::Value;
use std::fmt;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Addresses of a node: one of each family.
const FAMILIES: usize = 2;
/// How long an answer may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// An answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// Nobody listens.
    Closed,
    /// The status, and how many endpoints are said to be on the node.
    Said { status: u16, endpoints: u64 },
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("closed"),
            Self::Said { status, endpoints } => write!(f, "{status} with {endpoints} endpoints"),
        }
    }
}

/// What a world says of a Service at each address of each node: IPv4 and IPv6 of the first, then of the second.
pub fn ask(world: &World, port: u16) -> Result<Vec<Health>> {
    let mut found = Vec::new();
    for node in world.nodes() {
        for address in node.addresses() {
            let target = SocketAddr::new(address, port);
            let answer = world.run(Place::Outside, || fetch(target))?;
            found.push(answer.with_context(|| format!("{}: {target}", world.name))?);
        }
    }
    Ok(found)
}

fn fetch(target: SocketAddr) -> Result<Health> {
    let mut stream = match TcpStream::connect_timeout(&target, TIMEOUT) {
        Err(e) if e.kind() == ErrorKind::ConnectionRefused => return Ok(Health::Closed),
        other => other?,
    };
    stream.set_read_timeout(Some(TIMEOUT))?;
    write!(stream, "GET / HTTP/1.1\r\nHost: {target}\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let status = text.split(' ').nth(1).and_then(|status| status.parse().ok()).context("no status")?;
    let (_, body) = text.split_once("\r\n\r\n").context("no body")?;
    let body: Value = serde_json::from_str(body).with_context(|| text.clone())?;
    let endpoints = body["localEndpoints"].as_u64().with_context(|| text.clone())?;
    Ok(Health::Said { status, endpoints })
}

/// What rustnet should say where kube-proxy said this: at the addresses of both families the larger count of both.
pub fn predict(reference: &[Health]) -> Vec<Health> {
    let larger = |of_node: &[Health]| {
        let count = |health: &Health| if let Health::Said { endpoints, .. } = health { *endpoints } else { 0 };
        let endpoints = of_node.iter().map(count).max().unwrap_or(0);
        let health = Health::Said { status: if endpoints == 0 { 503 } else { 200 }, endpoints };
        of_node.iter().map(move |_| health).collect::<Vec<_>>()
    };
    reference.chunks(FAMILIES).flat_map(larger).collect()
}
