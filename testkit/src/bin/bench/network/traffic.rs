//! One turn of traffic between two namespaces: netperf's TCP_RR, TCP_CRR and TCP_STREAM, reduced to blocking sockets in two
//! threads on one CPU. Both ends share the CPU, so that a turn counts the work of the whole path and no waiting in parallel.

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::socket::{self, Shutdown, sockopt};
use nix::unistd::Pid;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use testkit::Netns;

/// The port that servers listen on.
pub const PORT: u16 = 7000;
/// The same behind services. Another one: to the server, connections to both would differ in nothing, and a new one would
/// meet what its kernel remembers of an old one, with timestamps that started elsewhere.
pub const SERVICE_TARGET: u16 = 7001;
/// Transactions before the clock runs: addresses are resolved, the flow is known.
const WARM_UP: u32 = 32;
/// Bytes of one write of a stream.
const CHUNK: usize = 128 << 10;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Test {
    /// One byte there and one back, on one connection.
    Rr,
    /// The same, on a new connection each time; the server closes first.
    Crr,
    /// Bytes in one direction.
    Stream,
}

impl Test {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Rr, Self::Crr, Self::Stream];

    /// netperf's name for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rr => "TCP_RR",
            Self::Crr => "TCP_CRR",
            Self::Stream => "TCP_STREAM",
        }
    }
}

/// Two namespaces, and the address by which the first reaches a server in the second.
pub struct Ends<'a> {
    /// Where the client is.
    pub client: &'a Netns,
    /// Where the server is.
    pub server: &'a Netns,
    /// What the client connects to.
    pub target: SocketAddr,
    /// The port that the server listens on.
    pub port: u16,
}

/// What a turn brought.
pub enum Turn {
    /// Nanoseconds of each transaction, sorted.
    Transactions(Vec<u32>),
    /// Bytes per second.
    Stream(f64),
}

impl Turn {
    /// What a turn counts for: transactions per second at the pace of the median one, which neighbours on the machine disturb
    /// least; or bytes per second.
    pub fn pace(&self) -> f64 {
        match self {
            Self::Transactions(each) => 1e9 / each.get(each.len() / 2).copied().map_or(f64::NAN, f64::from),
            Self::Stream(rate) => *rate,
        }
    }

    /// Nanoseconds of each transaction.
    pub fn each(&self) -> &[u32] {
        if let Self::Transactions(each) = self { each } else { &[] }
    }
}

/// Runs one turn on a CPU.
pub fn turn(test: Test, ends: &Ends<'_>, cpu: usize, time: Duration) -> Result<Turn> {
    let any: IpAddr = match ends.target {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let listener = ends
        .server
        .run(|| TcpListener::bind((any, ends.port)))?
        .with_context(|| format!("{} cannot listen on port {}", ends.server.name(), ends.port))?;
    let stop = AtomicBool::new(false);
    let (asked, answered) = thread::scope(|scope| {
        let server = scope.spawn(|| {
            pin(cpu)?;
            serve(test, &listener, &stop)
        });
        let asked = ends.client.run(|| {
            pin(cpu)?;
            ask(test, ends.target, time)
        });
        stop.store(true, Ordering::Relaxed);
        // Wakes an accept that nobody will answer any more; without one it fails, and that is well.
        let _ = socket::shutdown(listener.as_raw_fd(), Shutdown::Both);
        (asked, server.join())
    });
    let what = || format!("{} from {} to {}", test.name(), ends.client.name(), ends.target);
    let turn = asked.and_then(|t| t).with_context(what)?;
    let bytes = answered.map_err(|_| anyhow::anyhow!("the server panicked"))?.with_context(what)?;
    Ok(bytes.map_or(turn, Turn::Stream))
}

/// Binds the calling thread to a CPU, and puts it before whatever else would run there.
fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("cannot run on CPU {cpu}"))?;
    // SAFETY: a plain system call; 0 is the calling thread.
    let rc = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -20) };
    if rc == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()).context("cannot raise the priority") }
}

/// No per-packet timer, but an end to waiting for a path that is dead.
fn guard(stream: &TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    socket::setsockopt(stream, sockopt::KeepAlive, &true)?;
    socket::setsockopt(stream, sockopt::TcpKeepIdle, &3)?;
    socket::setsockopt(stream, sockopt::TcpKeepInterval, &1)?;
    socket::setsockopt(stream, sockopt::TcpKeepCount, &3)?;
    Ok(())
}

/// The server's side; bytes per second of a stream.
fn serve(test: Test, listener: &TcpListener, stop: &AtomicBool) -> Result<Option<f64>> {
    let mut byte = [0];
    while !stop.load(Ordering::Relaxed) {
        let mut stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(_) if stop.load(Ordering::Relaxed) => break,
            Err(e) => return Err(e).context("cannot accept"),
        };
        match test {
            Test::Crr => {
                stream.read_exact(&mut byte)?;
                stream.write_all(&byte)?;
            }
            Test::Rr => {
                guard(&stream)?;
                while stream.read(&mut byte)? == 1 {
                    stream.write_all(&byte)?;
                }
            }
            Test::Stream => {
                guard(&stream)?;
                return drain(&mut stream).map(Some);
            }
        }
    }
    Ok(None)
}

/// Reads to the end; bytes per second.
#[expect(clippy::cast_precision_loss, reason = "a turn moves far fewer than 2^52 bytes")]
fn drain(stream: &mut TcpStream) -> Result<f64> {
    let start = Instant::now();
    let mut buffer = vec![0; CHUNK];
    let mut bytes = 0;
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(bytes as f64 / start.elapsed().as_secs_f64()),
            n => bytes += n,
        }
    }
}

fn connect(target: SocketAddr) -> std::io::Result<TcpStream> {
    let mut tries = 0;
    loop {
        match TcpStream::connect(target) {
            // Every port of this client waits for the end of an earlier connection: the oldest is free in a moment.
            Err(e) if e.kind() == ErrorKind::AddrNotAvailable && tries < 100 => {
                tries += 1;
                thread::sleep(Duration::from_millis(10));
            }
            other => return other,
        }
    }
}

/// The client's side.
fn ask(test: Test, target: SocketAddr, time: Duration) -> Result<Turn> {
    // Without a path this attempt fails, within its time.
    let mut stream = TcpStream::connect_timeout(&target, Duration::from_secs(3)).context("no connection")?;
    guard(&stream)?;
    let mut byte = [7];
    let mut rr = |stream: &mut TcpStream| -> std::io::Result<()> {
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)
    };
    match test {
        Test::Rr => {
            for _ in 0..WARM_UP {
                rr(&mut stream)?;
            }
            timed(time, || rr(&mut stream))
        }
        Test::Crr => {
            let mut crr = || -> std::io::Result<()> {
                let mut stream = connect(target)?;
                rr(&mut stream)?;
                // The server closes first, so that its side, not ours, remembers the connection.
                let end = stream.read(&mut [0])?;
                if end == 0 { Ok(()) } else { Err(ErrorKind::InvalidData.into()) }
            };
            // The attempt above waits for its answer.
            stream.write_all(&[0])?;
            let _ = stream.read(&mut [0, 0])?;
            drop(stream);
            for _ in 0..WARM_UP {
                crr()?;
            }
            timed(time, crr)
        }
        Test::Stream => {
            let data = vec![7; CHUNK];
            let start = Instant::now();
            while start.elapsed() < time {
                stream.write_all(&data)?;
            }
            stream.shutdown(std::net::Shutdown::Write)?;
            // The server closes when it has read all.
            let _ = stream.read(&mut [0])?;
            Ok(Turn::Stream(f64::NAN))
        }
    }
}

/// Repeats a transaction for a time.
fn timed(time: Duration, mut transaction: impl FnMut() -> std::io::Result<()>) -> Result<Turn> {
    let mut each = Vec::with_capacity(1 << 16);
    let start = Instant::now();
    let mut last = start;
    loop {
        transaction()?;
        let now = Instant::now();
        each.push(u32::try_from((now - last).as_nanos()).unwrap_or(u32::MAX));
        last = now;
        if now - start >= time {
            each.sort_unstable();
            return Ok(Turn::Transactions(each));
        }
    }
}
