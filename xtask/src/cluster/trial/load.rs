//! Steady requests from inside a network namespace, each one counted: to an agnhost, by HTTP or UDP, on one connection for
//! all or on a new one for each.

use std::collections::BTreeSet;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use crate::cluster::wires;

/// How long an answer may take: on a busy machine long, so that what is late is not taken for lost. A lost datagram does
/// not come later, and a connection that lost its state does not recover.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two requests.
const PAUSE: Duration = Duration::from_millis(5);

/// What kind of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// HTTP, each on a connection of its own.
    NewTcp,
    /// HTTP, all on one connection.
    EstablishedTcp,
    /// UDP, each from a port of its own.
    NewUdp,
    /// UDP, all from one port.
    EstablishedUdp,
}

/// Requests of one kind, from one place to one target.
#[derive(Clone, Debug)]
pub struct Stream {
    /// The client and its target, for people.
    pub name: String,
    /// The namespace.
    pub from: PathBuf,
    /// What kind.
    pub kind: Kind,
    /// The target.
    pub to: SocketAddr,
}

/// What came of a stream so far.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Requests.
    pub sent: u64,
    /// Those without an answer.
    pub lost: u64,
    /// The longest time between two answers.
    pub gap: Duration,
    /// Who answered.
    pub servers: BTreeSet<String>,
    /// The first that went wrong.
    pub error: Option<String>,
}

/// A stream under way.
pub struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    thread: JoinHandle<Result<Tally>>,
}

impl Load {
    /// Starts it.
    pub fn start(stream: &Stream) -> Self {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counter, stream) = (Arc::clone(&stop), Arc::clone(&done), stream.clone());
        let thread = thread::spawn(move || wires::inside(&stream.from, || run(&stream, &stopped, &counter)));
        Self { stop, done, thread }
    }

    /// Requests so far, answered or not.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Ends it.
    pub fn finish(self) -> Result<Tally> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("a stream panicked"))?
    }
}

/// One request on a connection of its own.
pub fn once(stream: &Stream) -> Result<String> {
    wires::inside(&stream.from, || ask(stream, &mut None))?
}

fn run(stream: &Stream, stop: &AtomicBool, done: &AtomicU64) -> Tally {
    let mut tally = Tally::default();
    let mut open = None;
    let mut last = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        tally.sent += 1;
        match ask(stream, &mut open) {
            Ok(server) => {
                tally.servers.insert(server);
                tally.gap = tally.gap.max(last.elapsed());
                last = Instant::now();
            }
            Err(error) => {
                tally.lost += 1;
                let at = tally.sent;
                tally.error.get_or_insert_with(|| format!("request {at}: {error:#}"));
                open = None;
            }
        }
        done.fetch_add(1, Ordering::Relaxed);
        thread::sleep(PAUSE);
    }
    tally
}

/// What is kept between requests.
enum Open {
    Tcp(BufReader<TcpStream>),
    Udp(UdpSocket),
}

fn ask(stream: &Stream, open: &mut Option<Open>) -> Result<String> {
    if matches!(stream.kind, Kind::NewTcp | Kind::NewUdp) {
        *open = None;
    }
    if open.is_none() {
        *open = Some(connect(stream)?);
    }
    match open.as_mut().context("a connection")? {
        Open::Tcp(connection) => http(connection, stream.kind == Kind::EstablishedTcp).context("HTTP"),
        Open::Udp(socket) => udp(socket).context("UDP"),
    }
}

fn connect(stream: &Stream) -> Result<Open> {
    match stream.kind {
        Kind::NewTcp | Kind::EstablishedTcp => {
            let connection = TcpStream::connect_timeout(&stream.to, PATIENCE).context("connecting")?;
            connection.set_read_timeout(Some(PATIENCE))?;
            connection.set_nodelay(true)?;
            Ok(Open::Tcp(BufReader::new(connection)))
        }
        Kind::NewUdp | Kind::EstablishedUdp => {
            let socket = match stream.to {
                SocketAddr::V4(_) => UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)),
                SocketAddr::V6(_) => UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)),
            }?;
            socket.connect(stream.to)?;
            socket.set_read_timeout(Some(PATIENCE))?;
            Ok(Open::Udp(socket))
        }
    }
}

/// Asks for the host name; the answer's length is announced.
fn http(connection: &mut BufReader<TcpStream>, keep: bool) -> io::Result<String> {
    let keep = if keep { "keep-alive" } else { "close" };
    let request = format!("GET /hostname HTTP/1.1\r\nHost: trial\r\nConnection: {keep}\r\n\r\n");
    connection.get_mut().write_all(request.as_bytes())?;
    let mut length = None;
    loop {
        let mut line = String::new();
        if connection.read_line(&mut line)? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "closed before an answer"));
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().ok();
        }
        if line == "\r\n" {
            break;
        }
    }
    let mut body = vec![0; length.ok_or_else(|| io::Error::other("an answer without a length"))?];
    connection.read_exact(&mut body)?;
    Ok(String::from_utf8_lossy(&body).into_owned())
}

fn udp(socket: &UdpSocket) -> io::Result<String> {
    socket.send(b"hostname\n")?;
    let mut buffer = [0; 256];
    let length = socket.recv(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer[..length]).trim().to_owned())
}
