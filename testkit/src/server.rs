//! Real servers: they answer with their name and the source address that they see.
//!
//! The protocol is lines of text, the same over TCP and UDP. To any line `TEXT` the server answers
//! `NAME CLIENT-ADDRESS CLIENT-PORT TEXT`. Two lines are special, over TCP: `give N` is answered by N bytes, and
//! `take N` followed by N bytes by `NAME took N`. A request of HTTP (`GET ...`) gets an HTTP answer with the same text,
//! so that `curl` can be used by hand. A UDP datagram is echoed behind the same heading, whatever its size.

use crate::netns::Netns;
use crate::stream::ROOM;
use crate::wait;
use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// How often a server looks whether it should end.
const TICK: u16 = 20;
/// A connection that says nothing for this long is closed.
const IDLE: Duration = Duration::from_mins(2);
/// The largest datagram.
const DATAGRAM: usize = 65_535;

/// TCP and UDP on one port; ends when dropped, and closes its connections.
#[derive(Debug)]
pub struct Server {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Server {
    /// Starts on all addresses of a namespace, both families.
    pub fn start(netns: &Netns, name: &str, port: u16) -> Result<Self> {
        Self::bind(netns, name, SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port))
    }

    /// Starts on one address.
    pub fn bind(netns: &Netns, name: &str, address: SocketAddr) -> Result<Self> {
        let (tcp, udp) = netns
            .run(|| std::io::Result::Ok((TcpListener::bind(address)?, UdpSocket::bind(address)?)))?
            .with_context(|| format!("{} cannot listen on {address}", netns.name()))?;
        tcp.set_nonblocking(true)?;
        udp.set_read_timeout(Some(Duration::from_millis(TICK.into())))?;
        setsockopt(&udp, sockopt::RcvBufForce, &ROOM)?;
        let stop = Arc::new(AtomicBool::new(false));
        let (tcp_stop, udp_stop) = (stop.clone(), stop.clone());
        let (tcp_name, udp_name) = (name.to_owned(), name.to_owned());
        let threads = vec![
            netns.thread(move || accept(&tcp, &tcp_name, &tcp_stop))?,
            netns.thread(move || answer_datagrams(&udp, &udp_name, &udp_stop))?,
        ];
        Ok(Self { stop, threads })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Waits until a descriptor can be read; false when a tick passed without.
fn readable(fd: BorrowedFd<'_>) -> bool {
    poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::from(TICK)).is_ok_and(|n| n > 0)
}

fn heading(name: &str, client: SocketAddr) -> String {
    format!("{name} {} {} ", client.ip().to_canonical(), client.port())
}

fn accept(listener: &TcpListener, name: &str, stop: &AtomicBool) {
    thread::scope(|scope| {
        while !stop.load(Ordering::Relaxed) {
            if !readable(listener.as_fd()) {
                continue;
            }
            if let Ok((stream, client)) = listener.accept() {
                scope.spawn(move || {
                    // A client that goes away ends its connection; that is its business.
                    let _ = converse(stream, &heading(name, client), name, stop);
                });
            }
        }
    });
}

/// Reads lines until the client or the server ends.
fn converse(stream: TcpStream, heading: &str, name: &str, stop: &AtomicBool) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(IDLE))?;
    // A client that is gone must not keep a test from its end: TCP alone gives up after a quarter of an hour.
    stream.set_write_timeout(Some(wait::DEADLINE))?;
    let mut writer = stream.try_clone()?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    loop {
        loop {
            if stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            if !reader.buffer().is_empty() || readable(reader.get_ref().as_fd()) {
                break;
            }
        }
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let text = line.trim_end();
        if let Some(n) = text.strip_prefix("give ").and_then(|n| n.parse::<u64>().ok()) {
            std::io::copy(&mut std::io::repeat(b'x').take(n), &mut writer)?;
        } else if let Some(n) = text.strip_prefix("take ").and_then(|n| n.parse::<u64>().ok()) {
            let took = std::io::copy(&mut (&mut reader).take(n), &mut std::io::sink())?;
            writer.write_all(format!("{name} took {took}\n").as_bytes())?;
        } else if text.starts_with("GET ") {
            // The rest of the request has to be read: closing with data unread resets the connection.
            let mut header = String::new();
            while reader.read_line(&mut header)? > 0 && !header.trim_end().is_empty() {
                header.clear();
            }
            let body = format!("{}\n", heading.trim_end());
            let answer =
                format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len());
            return writer.write_all(answer.as_bytes());
        } else {
            writer.write_all(format!("{heading}{text}\n").as_bytes())?;
        }
    }
}

fn answer_datagrams(socket: &UdpSocket, name: &str, stop: &AtomicBool) {
    let mut buffer = vec![0; DATAGRAM];
    while !stop.load(Ordering::Relaxed) {
        // Errors of earlier answers (a client that is gone) are reported here and are not ours.
        if let Ok((len, client)) = socket.recv_from(&mut buffer) {
            let mut answer = heading(name, client).into_bytes();
            let room = 65_507 - answer.len();
            answer.extend_from_slice(&buffer[..len.min(room)]);
            let _ = socket.send_to(&answer, client);
        }
    }
}
