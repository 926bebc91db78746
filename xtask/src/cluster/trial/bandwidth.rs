//! Limits by annotations, as users write them: the runtime reads them, and hands them on because
//! rustnet's configuration says that it takes them. A limited pod's transfers keep to its limits,
//! and those of another pod are far above.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use super::{Pod, pod};
use crate::cluster::layout::{Cluster, Node};
use crate::cluster::wires;

/// Bits a second that the limited pod may receive, and send: two figures, so that one is not taken for the other.
const INGRESS: u32 = 8_000_000;
const EGRESS: u32 = 20_000_000;
/// Of a limited transfer: many times what passes at once after a pause.
const SECONDS: u32 = 2;
/// How long nothing may come before a transfer has failed.
const PATIENCE: Duration = Duration::from_secs(30);

/// Returns what to tell of it.
pub fn run(cluster: &Cluster) -> Result<String> {
    let nodes = cluster.nodes();
    let (near, far) = (nodes.first().context("no node")?, nodes.last().context("no node")?);
    let file = cluster.dir.join("bandwidth.yaml");
    fs::write(&file, manifest("limited", far, &annotations()) + &manifest("unlimited", far, "{}"))?;
    cluster.ask(&["apply", "-f", &file.display().to_string()])?;
    let pods = ["pod/limited", "pod/unlimited"];
    let ready = ["--namespace=trial", "wait", "--for=condition=Ready", "--timeout=120s"];
    cluster.ask(&[&ready[..], &pods].concat())?;
    let client = pod(cluster, "client", near)?;
    let (limited, unlimited) = (pod(cluster, "limited", far)?, pod(cluster, "unlimited", far)?);
    let mut lines = Vec::new();
    for address in limited.addresses.iter().chain(&unlimited.addresses) {
        let is_limited = limited.addresses.contains(address);
        let pod = if is_limited { &limited } else { &unlimited };
        let own = client.addresses.iter().find(|own| own.is_ipv4() == address.is_ipv4());
        let own = *own.with_context(|| format!("no address of the client like {address}"))?;
        for (way, limit, rate) in [
            ("receives", INGRESS, rate(&client, (pod, *address), INGRESS)?),
            ("sends", EGRESS, rate(pod, (&client, own), EGRESS)?),
        ] {
            let line = format!("{}, {address} {way} {:.1} Mbit/s", pod.name, rate / 1e6);
            let share = rate / f64::from(limit);
            // A busy machine makes transfers slower, never faster; nor so much slower.
            let held = if is_limited { (1.0 / 3.0..1.5).contains(&share) } else { share > 3.0 };
            ensure!(held, "{line}; the limit of the limited pod is {:.1}", f64::from(limit) / 1e6);
            lines.push(line);
        }
    }
    cluster.ask(&[&["--namespace=trial", "delete", "--wait=false"][..], &pods].concat())?;
    Ok(lines.join("\n   "))
}

/// Bits a second of a transfer of as much as a limit lets through in [`SECONDS`].
fn rate(from: &Pod, (to, address): (&Pod, IpAddr), limit: u32) -> Result<f64> {
    let bytes = limit / 8 * SECONDS;
    let seconds = transfer(&from.netns, &to.netns, address, bytes)
        .with_context(|| format!("{bytes} bytes from {} to {address}", from.name))?;
    Ok(f64::from(bytes) * 8.0 / seconds)
}

/// Sends so many bytes to this address; seconds until the receiver has all of them.
fn transfer(from: &Path, to: &Path, address: IpAddr, bytes: u32) -> Result<f64> {
    let listener = wires::inside(to, || TcpListener::bind((address, 0)))??;
    let target: SocketAddr = listener.local_addr()?;
    let receiver = thread::spawn(move || receive(&listener, bytes));
    let start = Instant::now();
    wires::inside(from, || send(target, bytes))??;
    let end = receiver.join().map_err(|_| anyhow!("the receiver panicked"))??;
    Ok((end - start).as_secs_f64())
}

fn send(target: SocketAddr, bytes: u32) -> Result<()> {
    let mut connection = TcpStream::connect_timeout(&target, PATIENCE).context("connecting")?;
    connection.set_write_timeout(Some(PATIENCE))?;
    let (block, mut left) = (vec![0; 1 << 14], bytes as usize);
    while left > 0 {
        left -= connection.write(&block[..left.min(block.len())])?;
    }
    connection.shutdown(Shutdown::Write)?;
    Ok(())
}

/// When the last byte had come.
fn receive(listener: &TcpListener, bytes: u32) -> Result<Instant> {
    let (mut connection, _) = listener.accept()?;
    connection.set_read_timeout(Some(PATIENCE))?;
    let (mut block, mut came) = (vec![0; 1 << 16], 0);
    loop {
        match connection.read(&mut block)? {
            0 => break,
            some => came += some,
        }
    }
    ensure!(came == bytes as usize, "{came} bytes came");
    Ok(Instant::now())
}

fn annotations() -> String {
    format!(
        "{{kubernetes.io/ingress-bandwidth: {}M, kubernetes.io/egress-bandwidth: {}M}}",
        INGRESS / 1_000_000,
        EGRESS / 1_000_000
    )
}

fn manifest(name: &str, node: &Node, annotations: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\n\
         metadata: {{name: {name}, namespace: trial, labels: {{app: {name}}}, annotations: {annotations}}}\n\
         spec:\n  nodeName: {}\n  terminationGracePeriodSeconds: 0\n  \
           containers: [{{name: pause, image: \"registry.k8s.io/pause:3.10\"}}]\n---\n",
        node.name
    )
}
