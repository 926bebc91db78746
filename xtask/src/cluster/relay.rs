//! The API server's address lies inside a namespace: this passes connections to a port of this machine's loopback on to
//! it, so that kubectl works from any shell.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};

use super::layout::Cluster;
use super::process::Processes;
use super::settings::{CONTROL_PLANE, address};
use super::wait;

const NAME: &str = "relay";
/// Where users of Kubernetes expect it; another is taken when it is not free.
const PORT: u16 = 6443;

/// Starts the relay unless it runs; returns the URL.
pub fn start(cluster: &Cluster) -> Result<String> {
    let processes = Processes::of(cluster);
    if processes.find(NAME).is_none() {
        let _ = fs::remove_file(port_file(cluster)); // of an earlier one
        let this = std::env::current_exe().context("cannot tell where this program is")?.display().to_string();
        let argv = [&this, "cluster", "--name", &cluster.name, "relay"].map(ToString::to_string);
        processes.start(NAME, &argv)?;
    }
    let port = || fs::read_to_string(port_file(cluster)).ok().filter(|port| !port.is_empty());
    if !wait::until(Duration::from_secs(5), || port().is_some()) {
        bail!("the relay to the API server did not start; the last it said:\n{}", processes.tail(NAME));
    }
    Ok(format!("https://127.0.0.1:{}", port().unwrap_or_default()))
}

/// The relay itself; does not return.
pub fn run(cluster: &Cluster) -> Result<()> {
    let loopback = |port| TcpListener::bind((Ipv4Addr::LOCALHOST, port));
    let listener = loopback(PORT).or_else(|_| loopback(0))?;
    let port = listener.local_addr()?.port();
    // The listener stays where it was made.
    setns(fs::File::open(cluster.netns_file("cp"))?, CloneFlags::CLONE_NEWNET)?;
    let unfinished = port_file(cluster).with_extension("tmp");
    fs::write(&unfinished, port.to_string())?;
    fs::rename(unfinished, port_file(cluster))?;
    let server = address(CONTROL_PLANE).of(cluster.settings.ip_family).swap_remove(0);
    loop {
        let (client, _) = listener.accept()?;
        let server = server.clone();
        thread::spawn(move || serve(client, &server));
    }
}

fn serve(client: TcpStream, server: &str) -> io::Result<()> {
    let server = TcpStream::connect((server, PORT))?;
    let (mut from, mut to) = (server.try_clone()?, client.try_clone()?);
    let back = thread::spawn(move || copy(&mut from, &mut to));
    copy(&mut { client }, &mut { server });
    let _ = back.join(); // it cannot panic
    Ok(())
}

/// Until one end closes; then the other end learns of it. A broken connection ends like a closed one.
fn copy(from: &mut TcpStream, to: &mut TcpStream) {
    let _ = io::copy(from, to);
    let _ = to.shutdown(Shutdown::Write);
}

fn port_file(cluster: &Cluster) -> PathBuf {
    cluster.dir.join("relay.port")
}
