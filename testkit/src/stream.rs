//! Sequenced datagrams in bursts: many of them, and every one that is lost is known by its number.

use crate::client::{TIMEOUT, connected_udp};
use crate::netns::Netns;
use anyhow::{Result, anyhow, bail};
use nix::sys::socket::{setsockopt, sockopt};
use std::collections::BTreeMap;
use std::fmt;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long to wait for an answer before looking at what is missing.
const TICK: Duration = Duration::from_millis(100);
/// Room for datagrams in a socket; more than all windows together, so that no loss is the test's own.
pub(crate) const ROOM: usize = 16 << 20;
/// Things that a tally keeps in words.
const KEPT: usize = 8;

/// What a stream brought.
#[derive(Clone, Debug, Default)]
pub struct Sequence {
    /// Whose stream it was.
    pub about: String,
    /// Datagrams sent, numbered from 1.
    pub sent: u64,
    /// Datagrams answered, each counted once.
    pub answered: u64,
    /// Answers by server.
    pub by_server: BTreeMap<String, u64>,
    /// Numbers that were not answered in time.
    pub lost: Vec<u64>,
    /// Answers to what had been answered, or given up, already.
    pub surplus: u64,
    /// The first few errors of the socket.
    pub errors: Vec<String>,
    /// The longest time without an answer.
    pub longest_gap: Duration,
}

impl Sequence {
    /// An error unless there was traffic, all of it was answered, and nothing was answered twice.
    pub fn no_loss(&self) -> Result<()> {
        let whole = self.sent > 0 && self.answered == self.sent && self.lost.is_empty() && self.surplus == 0;
        if whole && self.errors.is_empty() { Ok(()) } else { bail!("{}: {self}", self.about) }
    }
}

impl fmt::Display for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} answered by {:?}", self.answered, self.sent, self.by_server)?;
        write!(f, ", {} lost", self.lost.len())?;
        if !self.lost.is_empty() {
            write!(f, " ({:?}...)", &self.lost[..self.lost.len().min(KEPT)])?;
        }
        write!(f, ", {} twice, longest gap {} ms", self.surplus, self.longest_gap.as_millis())?;
        self.errors.iter().try_for_each(|error| write!(f, "; {error}"))
    }
}

/// A stream under way, from one socket; stops when dropped.
#[derive(Debug)]
pub struct Stream {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
    thread: Option<JoinHandle<Result<Result<Sequence>>>>,
}

impl Stream {
    /// Starts to ask a [`crate::server::Server`] from inside a namespace: bursts of `window` datagrams, with `pause` between
    /// the last answer to one burst and the next.
    pub fn start(from: &Netns, target: SocketAddr, window: usize, pause: Duration) -> Result<Self> {
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (stopped, counter) = (stop.clone(), answered.clone());
        let about = format!("stream of {} to {target}", from.name());
        let thread = from.thread(move || Ok(Sequence { about, ..run(target, window, pause, &stopped, &counter)? }))?;
        Ok(Self { stop, answered, thread: Some(thread) })
    }

    /// Datagrams answered so far.
    pub fn answered(&self) -> usize {
        self.answered.load(Ordering::Relaxed)
    }

    /// Ends the stream, waits for what is under way, and counts.
    pub fn stop(mut self) -> Result<Sequence> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().ok_or_else(|| anyhow!("already stopped"))?;
        thread.join().map_err(|_| anyhow!("the stream's thread panicked"))??
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The number at the end of an answer, and who gave it.
fn parse(answer: &[u8]) -> Option<(&str, u64)> {
    let text = std::str::from_utf8(answer).ok()?;
    let (server, rest) = text.split_once(' ')?;
    Some((server, rest.rsplit(' ').next()?.parse().ok()?))
}

fn run(
    target: SocketAddr,
    window: usize,
    pause: Duration,
    stop: &AtomicBool,
    counter: &AtomicUsize,
) -> Result<Sequence> {
    let socket = connected_udp(target)?;
    socket.set_read_timeout(Some(TICK))?;
    setsockopt(&socket, sockopt::RcvBufForce, &ROOM)?;
    let mut tally = Sequence::default();
    let mut under_way: BTreeMap<u64, Instant> = BTreeMap::new();
    let mut buffer = [0; 256];
    let mut last = Instant::now();
    loop {
        if under_way.is_empty() {
            if stop.load(Ordering::Relaxed) {
                return Ok(tally);
            }
            std::thread::sleep(pause);
            last = Instant::now();
            for _ in 0..window {
                tally.sent += 1;
                under_way.insert(tally.sent, Instant::now());
                let sent = socket.send(tally.sent.to_string().as_bytes());
                note(&mut tally, sent.map(drop));
            }
        }
        match socket.recv(&mut buffer) {
            Ok(len) => {
                let Some((server, number)) = parse(&buffer[..len]) else {
                    bail!("not an answer: {:?}", &buffer[..len])
                };
                if under_way.remove(&number).is_some() {
                    tally.answered += 1;
                    counter.fetch_add(1, Ordering::Relaxed);
                    if let Some(count) = tally.by_server.get_mut(server) {
                        *count += 1;
                    } else {
                        tally.by_server.insert(server.to_owned(), 1);
                    }
                } else {
                    tally.surplus += 1;
                }
                tally.longest_gap = tally.longest_gap.max(last.elapsed());
                last = Instant::now();
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(e) => note(&mut tally, Err(e)),
        }
        // Later ones are younger: the first tells whether anything is overdue.
        while let Some(oldest) = under_way.first_entry().filter(|e| e.get().elapsed() > TIMEOUT) {
            tally.lost.push(*oldest.key());
            oldest.remove();
        }
    }
}

fn note(tally: &mut Sequence, result: std::io::Result<()>) {
    if let Err(e) = result
        && tally.errors.len() < KEPT
    {
        tally.errors.push(format!("datagram {}: {e}", tally.sent));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_answers_apart() {
        assert_eq!(parse(b"web-1 10.0.0.1 80 7"), Some(("web-1", 7)));
        assert_eq!(parse(b"web-1 10.0.0.1 80 x"), None);
    }

    #[test]
    fn judges_streams() {
        let whole = Sequence { sent: 2, answered: 2, ..Sequence::default() };
        assert!(whole.no_loss().is_ok());
        for broken in [
            Sequence { lost: vec![1], ..whole.clone() },
            Sequence { answered: 1, ..whole.clone() },
            Sequence { surplus: 1, ..whole.clone() },
            Sequence::default(),
        ] {
            assert!(broken.no_loss().is_err(), "{broken}");
        }
    }
}
