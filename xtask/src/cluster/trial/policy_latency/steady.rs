//! Probes that never pause: each client sends two datagrams a millisecond to each address of each
//! server. One is of a new flow, which policies judge when it opens; one is of a flow that is open,
//! which they judge again after a change.
//!
//! Client and server are threads of this process in the namespaces of pods: they share a clock and
//! the record of what arrived.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::socket::{setsockopt, sockopt};
use nix::unistd::Pid;

use super::judge::Probe;
use crate::cluster::pods::Pod;
use crate::cluster::wires;

/// Between two probes of a flow.
pub const PERIOD: Duration = Duration::from_millis(1);
/// Bytes that a server's socket holds: what comes while its thread does not run must not be lost.
const BUFFER: usize = 64 << 20;
/// How often threads without work look whether they are to end.
const TICK: Duration = Duration::from_millis(100);

/// The two flows of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// A new one for each probe; it has passed when the server has it.
    New = 0,
    /// One for all; a probe has passed when the server's answer is back.
    Open = 1,
}

/// Probes of one kind from one client to one address.
pub struct Sequence {
    /// Client, target and kind, for people.
    pub name: String,
    probes: Mutex<Vec<Probe>>,
}

/// All probes under way.
pub struct Probes {
    /// What is known of them; two in turn belong to a path.
    pub sequences: Arc<Vec<Sequence>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Sequence {
    /// The probes so far.
    pub fn probes(&self) -> MutexGuard<'_, Vec<Probe>> {
        // A thread that panicked is reported when all end.
        self.probes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_arrived(&self, number: u32) {
        if let Some(probe) = self.probes().get_mut(number as usize) {
            probe.has_passed = true;
        }
    }
}

impl Probes {
    /// Starts servers at all addresses of these pods, and a client in each of those for each of the
    /// addresses.
    pub fn start(clients: &[Pod], servers: &[Pod]) -> Result<Self> {
        let targets = || servers.iter().flat_map(|pod| pod.addresses.iter().map(move |ip| (pod, *ip)));
        let mut sockets = Vec::new();
        for (pod, ip) in targets() {
            let socket = wires::inside(&pod.netns, || listen(ip))?.with_context(|| format!("a server at {ip}"))?;
            sockets.push((pod, socket.local_addr()?, socket));
        }
        let (mut sequences, mut paths) = (Vec::new(), Vec::new());
        for client in clients {
            for (server, to, _) in &sockets {
                for kind in ["new flows", "open flow"] {
                    let name = format!("{} to {} at {}, {kind}", client.name, server.name, to.ip());
                    sequences.push(Sequence { name, probes: Mutex::default() });
                }
                paths.push((client.netns.clone(), *to));
            }
        }
        let (sequences, stop) = (Arc::new(sequences), Arc::new(AtomicBool::new(false)));
        let mut threads = Vec::new();
        for (_, _, socket) in sockets {
            let (sequences, stop) = (Arc::clone(&sequences), Arc::clone(&stop));
            threads.push(thread::spawn(move || serve(&socket, &sequences, &stop)));
        }
        for (number, (netns, to)) in paths.into_iter().enumerate() {
            let path = Path { number, to, sequences: Arc::clone(&sequences) };
            threads.push(spawn(netns, path, Arc::clone(&stop)));
        }
        Ok(Self { sequences, stop, threads })
    }

    /// Ends them; returns what is known of them.
    pub fn finish(self) -> Result<Arc<Vec<Sequence>>> {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().map_err(|_| anyhow!("a probe panicked"))??;
        }
        Ok(self.sequences)
    }
}

/// The way from a client to an address.
struct Path {
    number: usize,
    to: SocketAddr,
    sequences: Arc<Vec<Sequence>>,
}

/// Which probe a datagram is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Label {
    sequence: u32,
    number: u32,
}

impl Label {
    fn bytes(self) -> [u8; 8] {
        (u64::from(self.sequence) << 32 | u64::from(self.number)).to_be_bytes()
    }

    fn read(bytes: &[u8]) -> Option<Self> {
        let both = u64::from_be_bytes(bytes.try_into().ok()?);
        Some(Self { sequence: (both >> 32) as u32, number: both as u32 })
    }
}

fn spawn(netns: PathBuf, path: Path, stop: Arc<AtomicBool>) -> JoinHandle<Result<()>> {
    let number = path.number;
    let send = move || -> Result<()> {
        stay(number)?;
        path.send(&stop).with_context(|| format!("probing {}", path.to))
    };
    thread::spawn(move || wires::inside(&netns, send)?)
}

/// Keeps this thread on one of the processors that it may use. What a path sends is then judged in
/// the order in which it was sent.
fn stay(number: usize) -> Result<()> {
    let this = Pid::from_raw(0);
    let allowed = sched_getaffinity(this)?;
    let all: Vec<usize> = (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap_or(false)).collect();
    let mut own = CpuSet::new();
    own.set(*all.get(number % all.len().max(1)).context("no processor")?)?;
    Ok(sched_setaffinity(this, &own)?)
}

impl Path {
    fn send(&self, stop: &AtomicBool) -> Result<()> {
        let any: IpAddr = if self.to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let open = UdpSocket::bind((any, 0))?;
        open.connect(self.to)?;
        open.set_nonblocking(true)?;
        let mut next = Instant::now();
        while !stop.load(Ordering::Relaxed) {
            let label = self.label(Flow::New);
            UdpSocket::bind((any, 0))?.send_to(&label.bytes(), self.to)?;
            let label = self.label(Flow::Open);
            open.send(&label.bytes())?;
            self.receive(&open)?;
            // Probes that a busy machine has missed are not made up for.
            next = (next + PERIOD).max(Instant::now());
            thread::sleep(next.saturating_duration_since(Instant::now()));
        }
        let end = Instant::now() + TICK * 5;
        while Instant::now() < end {
            self.receive(&open)?;
            thread::sleep(PERIOD);
        }
        Ok(())
    }

    /// Records the next probe of a flow, which is about to be sent.
    fn label(&self, flow: Flow) -> Label {
        let sequence = self.number * 2 + flow as usize;
        let mut probes = self.sequences[sequence].probes();
        probes.push(Probe { sent: Instant::now(), has_passed: false });
        Label { sequence: sequence as u32, number: probes.len() as u32 - 1 }
    }

    /// Takes the answers that have come.
    fn receive(&self, open: &UdpSocket) -> io::Result<()> {
        let mut bytes = [0; 16];
        loop {
            match open.recv(&mut bytes) {
                Ok(length) => arrived(&self.sequences, &bytes[..length]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}

/// A socket that holds what comes until its thread runs again.
pub fn listen(ip: IpAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind((ip, 0))?;
    setsockopt(&socket, sockopt::RcvBufForce, &BUFFER)?;
    socket.set_read_timeout(Some(TICK))?;
    Ok(socket)
}

/// Records what comes, and answers what is of an open flow.
fn serve(socket: &UdpSocket, sequences: &[Sequence], stop: &AtomicBool) -> Result<()> {
    let (mut bytes, mut last) = ([0; 16], Instant::now());
    // Clients end first: their last probes are still under way.
    while !stop.load(Ordering::Relaxed) || last.elapsed() < TICK * 3 {
        let (length, client) = match socket.recv_from(&mut bytes) {
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error.into()),
        };
        last = Instant::now();
        let Some(label) = Label::read(&bytes[..length]) else { continue };
        if label.sequence % 2 == Flow::Open as u32 {
            socket.send_to(&bytes[..length], client)?;
        } else {
            arrived(sequences, &bytes[..length]);
        }
    }
    Ok(())
}

fn arrived(sequences: &[Sequence], bytes: &[u8]) {
    let label = Label::read(bytes);
    if let Some((label, sequence)) = label.and_then(|it| Some((it, sequences.get(it.sequence as usize)?))) {
        sequence.has_arrived(label.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_datagram_says_which_probe_it_is() {
        let label = Label { sequence: 15, number: 4_000_000_000 };
        assert_eq!(Label::read(&label.bytes()), Some(label));
        assert_eq!(Label::read(b"short"), None);
    }

    #[test]
    fn probes_of_both_flows_arrive() {
        let here = || Pod {
            name: "here".into(),
            netns: "/proc/self/ns/net".into(),
            addresses: vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()],
        };
        let start = Instant::now();
        let probes = Probes::start(&[here()], &[here()]).unwrap();
        let all_arrive =
            || probes.sequences.iter().all(|it| it.probes().iter().filter(|it| it.has_passed).count() > 20);
        assert!(crate::cluster::wait::until(Duration::from_secs(20), all_arrive));
        let sequences = probes.finish().unwrap();
        assert_eq!(sequences.len(), 4);
        for sequence in sequences.iter() {
            let probes = sequence.probes();
            assert!(probes.iter().all(|it| it.has_passed && it.sent >= start), "{}", sequence.name);
        }
    }
}
