//! Steady traffic in the background, counted: what was sent, what was answered, what was lost.

use crate::client::{Connection, Proto, ask_udp, connected_udp};
use crate::netns::Netns;
use anyhow::{Result, anyhow, bail};
use std::collections::BTreeMap;
use std::fmt;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Which traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One connection (or one UDP socket) that asks again and again.
    Established,
    /// A new connection (or a new UDP socket) for each request.
    New,
    /// The same for what must not get through: each request waits for [`ATTEMPT`] alone.
    Attempt,
}

/// How long an attempt waits for its answer.
const ATTEMPT: Duration = Duration::from_millis(30);

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Established => "established",
            Self::New => "new",
            Self::Attempt => "attempted",
        })
    }
}

/// What the traffic brought.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// What traffic it was.
    pub about: String,
    /// Requests sent, numbered one by one.
    pub sent: usize,
    /// Answers by server.
    pub by_server: BTreeMap<String, usize>,
    /// Requests without the right answer.
    pub lost: usize,
    /// The first few errors.
    pub errors: Vec<String>,
    /// The longest time between two answers.
    pub longest_gap: Duration,
}

impl Tally {
    /// An error unless there was traffic and nothing was lost.
    pub fn no_loss(&self) -> Result<()> {
        if self.sent > 0 && self.lost == 0 { Ok(()) } else { bail!("{}: {self}", self.about) }
    }

    /// An error unless there was traffic and nothing of it was answered.
    pub fn no_answer(&self) -> Result<()> {
        if self.sent > 0 && self.lost == self.sent { Ok(()) } else { bail!("{}: {self}", self.about) }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} lost, answers {:?}", self.lost, self.sent, self.by_server)?;
        write!(f, ", longest gap {} ms", self.longest_gap.as_millis())?;
        for error in &self.errors {
            write!(f, "; {error}")?;
        }
        Ok(())
    }
}

/// Traffic under way; stops when dropped.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
    thread: Option<JoinHandle<Result<Tally>>>,
}

/// Errors that a tally keeps in words.
const KEPT: usize = 5;

impl Load {
    /// Starts traffic from inside a namespace, with `pause` between two requests.
    pub fn start(from: &Netns, kind: Kind, proto: Proto, target: SocketAddr, pause: Duration) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let done = Arc::new(AtomicUsize::new(0));
        let (stopped, counter) = (stop.clone(), done.clone());
        let about = format!("{kind} {proto} of {} to {target}", from.name());
        let thread = from.thread(move || {
            let tally = run(kind, proto, target, pause, &stopped, &counter);
            Tally { about, ..tally }
        })?;
        Ok(Self { stop, done, thread: Some(thread) })
    }

    /// Requests done so far, lost or not.
    pub fn done(&self) -> usize {
        self.done.load(Ordering::Relaxed)
    }

    /// Waits until `n` more requests have been done from now on.
    pub fn wait_more(&self, n: usize) -> Result<()> {
        let goal = self.done() + n;
        crate::wait::until("traffic", || {
            let done = self.done();
            if done >= goal { Ok(()) } else { Err(anyhow!("{done} of {goal} requests done")) }
        })
    }

    /// Ends the traffic and counts.
    pub fn stop(mut self) -> Result<Tally> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().ok_or_else(|| anyhow!("already stopped"))?;
        thread.join().map_err(|_| anyhow!("the traffic's thread panicked"))?
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What asks: a connection kept open, or nothing.
enum Open {
    Tcp(Connection),
    Udp(UdpSocket),
}

impl Open {
    fn new(proto: Proto, target: SocketAddr) -> std::io::Result<Self> {
        Ok(match proto {
            Proto::Tcp => Self::Tcp(Connection::open(target)?),
            Proto::Udp => Self::Udp(connected_udp(target)?),
        })
    }

    fn ask(&mut self, text: &str) -> std::io::Result<String> {
        match self {
            Self::Tcp(connection) => connection.ask(text),
            Self::Udp(socket) => ask_udp(socket, text),
        }
        .map(|(server, _)| server)
    }
}

/// One attempt; it returns who answered.
fn attempt(proto: Proto, target: SocketAddr) -> std::io::Result<String> {
    match proto {
        Proto::Tcp => TcpStream::connect_timeout(&target, ATTEMPT).map(|_| target.to_string()),
        Proto::Udp => {
            let socket = connected_udp(target)?;
            socket.set_read_timeout(Some(ATTEMPT))?;
            ask_udp(&socket, "attempt").map(|(server, _)| server)
        }
    }
}

fn run(kind: Kind, proto: Proto, target: SocketAddr, pause: Duration, stop: &AtomicBool, done: &AtomicUsize) -> Tally {
    let mut tally = Tally::default();
    let mut open: Option<Open> = None;
    let mut last = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        tally.sent += 1;
        let text = tally.sent.to_string();
        let answer = if kind == Kind::Attempt {
            attempt(proto, target)
        } else {
            let connection = open.take().map_or_else(|| Open::new(proto, target), Ok);
            connection.and_then(|mut connection| {
                let server = connection.ask(&text)?;
                open = (kind == Kind::Established).then_some(connection);
                Ok(server)
            })
        };
        match answer {
            Ok(server) => {
                *tally.by_server.entry(server).or_default() += 1;
                tally.longest_gap = tally.longest_gap.max(last.elapsed());
                last = Instant::now();
            }
            // The next request opens a new connection, so that one broken connection counts once.
            Err(e) => {
                tally.lost += 1;
                if tally.errors.len() < KEPT {
                    tally.errors.push(format!("request {text}: {e}"));
                }
            }
        }
        done.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(pause);
    }
    tally
}
