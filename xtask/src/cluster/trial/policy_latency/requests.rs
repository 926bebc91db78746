//! Requests to a server that may not be there yet, each on a socket of its own, and what comes of
//! each.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use super::judge::{Outcome, Request};
use crate::cluster::wires;

/// Between two requests until one is answered.
const EAGER: Duration = Duration::from_millis(1);
/// Between two requests afterwards: the server is a plain one, and must not lose what comes while
/// it does not run.
const CALM: Duration = Duration::from_millis(5);
/// How long an answer may take once there was one.
const PATIENCE: Duration = Duration::from_secs(2);
/// And before: a socket for each of the requests is open so long.
const IMPATIENCE: Duration = Duration::from_millis(200);

/// Requests under way from one place to one address.
pub struct Requests {
    /// Client and target, for people.
    pub name: String,
    has_answer: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Vec<Request>>>,
}

/// How many are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// One a millisecond until one is answered.
    Fast,
    /// Few: none is to be answered.
    Slow,
}

impl Requests {
    /// Starts them in this namespace.
    pub fn start(name: String, netns: &Path, to: SocketAddr, pace: Pace) -> Self {
        let (has_answer, stop) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (flags, netns) = ((Arc::clone(&has_answer), Arc::clone(&stop)), netns.to_owned());
        let eager = if pace == Pace::Fast { EAGER } else { CALM * 4 };
        let ask = move || ask(to, eager, &flags.0, &flags.1).with_context(|| format!("asking {to}"));
        let thread = thread::spawn(move || wires::inside(&netns, ask)?);
        Self { name, has_answer, stop, thread }
    }

    /// True once one was answered.
    pub fn has_answer(&self) -> bool {
        self.has_answer.load(Ordering::Relaxed)
    }

    /// Makes them end; what is under way may still be answered.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Returns them once they have ended.
    pub fn finish(self) -> Result<Vec<Request>> {
        self.stop();
        self.thread.join().map_err(|_| anyhow!("a client panicked"))?
    }
}

fn ask(to: SocketAddr, eager: Duration, has_answer: &AtomicBool, stop: &AtomicBool) -> Result<Vec<Request>> {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let mut requests: Vec<Request> = Vec::new();
    let mut open: Vec<(usize, UdpSocket)> = Vec::new();
    let mut next = Instant::now();
    loop {
        let is_over = stop.load(Ordering::Relaxed);
        if is_over && open.is_empty() {
            return Ok(requests);
        }
        if !is_over {
            let socket = UdpSocket::bind((any, 0))?;
            socket.connect(to)?;
            socket.set_nonblocking(true)?;
            let number = requests.len();
            requests.push(Request { sent: Instant::now(), outcome: Outcome::Silent });
            match socket.send(b"hostname\n") {
                Ok(_) => open.push((number, socket)),
                // The stack knows of no way: as good as silence.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied || is_unreachable(&error) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let mut is_answered = has_answer.load(Ordering::Relaxed);
        let patience = if is_answered { PATIENCE } else { IMPATIENCE };
        open.retain(|(number, socket)| {
            let request = &mut requests[*number];
            request.outcome = outcome(socket);
            is_answered |= request.outcome == Outcome::Answered;
            request.outcome == Outcome::Silent && request.sent.elapsed() < patience
        });
        has_answer.store(is_answered, Ordering::Relaxed);
        let pause = if is_answered { eager.max(CALM) } else { eager };
        next = (next + pause).max(Instant::now());
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}

/// What is known of a request by now.
fn outcome(socket: &UdpSocket) -> Outcome {
    match socket.recv(&mut [0; 256]) {
        Ok(_) => Outcome::Answered,
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Outcome::Refused,
        Err(_) => Outcome::Silent,
    }
}

fn is_unreachable(error: &io::Error) -> bool {
    [io::ErrorKind::HostUnreachable, io::ErrorKind::NetworkUnreachable].contains(&error.kind())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::wait;

    #[test]
    fn refusals_come_before_the_server_and_answers_after() {
        let here = Path::new("/proc/self/ns/net");
        let reserved = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let to = reserved.local_addr().unwrap();
        drop(reserved);
        let requests = Requests::start("here".into(), here, to, Pace::Fast);
        thread::sleep(EAGER * 20);
        let server = UdpSocket::bind(to).unwrap();
        let answers = thread::spawn(move || {
            for _ in 0..20 {
                let (_, client) = server.recv_from(&mut [0; 16]).unwrap();
                server.send_to(b"here", client).unwrap();
            }
            server
        });
        assert!(wait::until(Duration::from_secs(10), || requests.has_answer()));
        requests.stop();
        let all = requests.finish().unwrap();
        assert_eq!(all[0].outcome, Outcome::Refused);
        assert!(all.iter().any(|it| it.outcome == Outcome::Answered));
        // As many as it still waits for.
        let one = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        while !answers.is_finished() {
            one.send_to(b"x", to).unwrap();
        }
    }
}
