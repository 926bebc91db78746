//! The probe's servers: each payload comes back, behind the server's name and the client's address as the server saw it.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::cli::connectivity::wire::{MAX_BYTES, MIN_BYTES, Seen};

/// Connections at a time; more wait in the kernel's queue.
const CONNECTIONS: usize = 16;
/// From the first to the last byte of a connection.
const PATIENCE: Duration = Duration::from_secs(10);
/// After an error of accept(2) or recvfrom(2), which is about descriptors or memory.
const PAUSE: Duration = Duration::from_millis(100);

/// Starts both servers at an address; returns it with the port that they have.
///
/// # Errors
/// An address or port that cannot be had.
pub async fn start(name: &str, at: SocketAddr, servers: &mut JoinSet<()>) -> Result<SocketAddr> {
    let cannot = || format!("{at}: cannot listen; choose another --port");
    let listener = TcpListener::bind(at).await.with_context(cannot)?;
    let at = listener.local_addr().with_context(cannot)?;
    let socket = UdpSocket::bind(at).await.with_context(cannot)?;
    let name: Arc<str> = name.into();
    servers.spawn(serve_tcp(listener, Arc::clone(&name)));
    servers.spawn(serve_udp(socket, name));
    Ok(at)
}

async fn serve_tcp(listener: TcpListener, name: Arc<str>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let mut open = JoinSet::new();
    loop {
        while open.try_join_next().is_some() {}
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, from)) => {
                let name = Arc::clone(&name);
                open.spawn(async move {
                    // Who hangs up, or is too slow, gets nothing.
                    let _ = tokio::time::timeout(PATIENCE, echo(stream, from, &name)).await;
                    drop(place);
                });
            }
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}

/// The length of the payload in four bytes, in network order, then the payload; the whole comes back behind [`Seen`].
async fn echo(mut stream: TcpStream, from: SocketAddr, name: &str) -> io::Result<()> {
    let length = stream.read_u32().await? as usize;
    if !(MIN_BYTES..=MAX_BYTES).contains(&length) {
        return Ok(());
    }
    let mut payload = vec![0; length];
    stream.read_exact(&mut payload).await?;
    stream.write_all(&seen(name, from).encode()).await?;
    stream.write_all(&payload).await?;
    stream.shutdown().await
}

async fn serve_udp(socket: UdpSocket, name: Arc<str>) {
    let mut buffer = vec![0; 1 << 16];
    loop {
        match socket.recv_from(&mut buffer).await {
            Ok((length, from)) if length >= MIN_BYTES => {
                // A client that is gone is its own matter.
                let _ = socket.send_to(&[&seen(&name, from).encode()[..], &buffer[..length]].concat(), from).await;
            }
            Ok(_) => {}
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}

fn seen(name: &str, from: SocketAddr) -> Seen {
    Seen { server: name.to_owned(), source: from.ip().to_canonical() }
}
