//! The probe's client: one question, one answer, within twelve seconds.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket, lookup_host};
use tokio::time::timeout;

use crate::cli::connectivity::wire::{Answer, Cause, Protocol, Question, Seen};
use crate::model::Family;

/// For a name, and for a connection: as long as the kernel sends its SYN once more.
const STEP: Duration = Duration::from_secs(2);
/// For all bytes there and back.
const TRANSFER: Duration = Duration::from_secs(5);
/// Datagrams may be lost; each is waited for this long.
const DATAGRAM: Duration = Duration::from_secs(1);
/// Datagrams that are sent before silence is a failure.
const ATTEMPTS: u32 = 3;

/// Why a question has no good answer.
struct Failed(Cause, String);

/// Does what is asked for.
pub async fn ask(question: &Question) -> Answer {
    let result = match question.protocol {
        Protocol::Dns => resolve(question).await.map(|addresses| Answer::Resolved { addresses }),
        _ => reach(question).await,
    };
    result.unwrap_or_else(|Failed(cause, detail)| Answer::Failed { cause, detail })
}

async fn reach(question: &Question) -> Result<Answer, Failed> {
    let address = match question.host.parse() {
        Ok(address) => address,
        Err(_) => resolve(question).await?[0],
    };
    let to = SocketAddr::new(address, question.port);
    match question.protocol {
        Protocol::Udp => ask_by_udp(to, question.bytes).await,
        Protocol::Tcp => ask_by_tcp(to, question.bytes).await,
        Protocol::Connect | Protocol::Dns => {
            let stream = connect(to).await?;
            reached(None, stream.local_addr(), 1)
        }
    }
}

/// Returns a name's addresses of the family that is asked for, at least one.
async fn resolve(question: &Question) -> Result<Vec<IpAddr>, Failed> {
    let host = &question.host;
    let found = match timeout(STEP * 2, lookup_host((host.as_str(), question.port))).await {
        Ok(found) => found.map_err(|error| Failed(Cause::NoName, format!("resolving {host}: {error}")))?,
        Err(_) => return Err(Failed(Cause::TimedOut, format!("resolving {host}: no answer within {:?}", STEP * 2))),
    };
    let is_meant = |address: &IpAddr| question.family.is_none_or(|family| Family::of(*address) == family);
    let mut addresses: Vec<_> = found.map(|it| it.ip()).filter(is_meant).collect();
    addresses.dedup();
    if addresses.is_empty() {
        let family = question.family.map(|family| format!("{family} ")).unwrap_or_default();
        return Err(Failed(Cause::NoName, format!("resolving {host}: it has no {family}address")));
    }
    Ok(addresses)
}

async fn connect(to: SocketAddr) -> Result<TcpStream, Failed> {
    let stream = within(STEP, "connecting", TcpStream::connect(to)).await?;
    // A payload's last segment would wait for an acknowledgement.
    let _ = stream.set_nodelay(true);
    Ok(stream)
}

async fn ask_by_tcp(to: SocketAddr, bytes: usize) -> Result<Answer, Failed> {
    let mut stream = connect(to).await?;
    let payload = payload(bytes);
    let length = u32::try_from(bytes).unwrap_or(u32::MAX).to_be_bytes();
    let mut received = Vec::new();
    let transfer = async {
        stream.write_all(&length).await?;
        stream.write_all(&payload).await?;
        let header = stream.read_u16().await?;
        received.extend_from_slice(&header.to_be_bytes());
        let whole = received.len() + usize::from(header) + bytes;
        let mut block = vec![0; 1 << 16];
        while received.len() < whole {
            let most = block.len().min(whole - received.len());
            match stream.read(&mut block[..most]).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                some => received.extend_from_slice(&block[..some]),
            }
        }
        Ok(())
    };
    let result = timeout(TRANSFER, transfer).await;
    let progress = || format!("sending {bytes} bytes and receiving them, of which {} came", received.len());
    match result {
        Err(_) => return Err(Failed(Cause::TimedOut, format!("{} within {TRANSFER:?}", progress()))),
        Ok(Err(error)) => return Err(failed(&progress(), &error)),
        Ok(Ok(())) => {}
    }
    let seen = compare(&received, &payload)?;
    reached(Some(seen), stream.local_addr(), 1)
}

async fn ask_by_udp(to: SocketAddr, bytes: usize) -> Result<Answer, Failed> {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await.map_err(|error| failed("opening a socket", &error))?;
    socket.connect(to).await.map_err(|error| failed("connecting", &error))?;
    // The same each time: a late echo of the first datagram is an answer to the second.
    let (payload, mut buffer) = (payload(bytes), vec![0; 1 << 16]);
    for attempt in 1..=ATTEMPTS {
        socket.send(&payload).await.map_err(|error| failed(&format!("sending {bytes} bytes"), &error))?;
        if let Ok(received) = timeout(DATAGRAM, socket.recv(&mut buffer)).await {
            let length = received.map_err(|error| failed("receiving", &error))?;
            let seen = compare(&buffer[..length], &payload)?;
            return reached(Some(seen), socket.local_addr(), attempt);
        }
    }
    Err(Failed(Cause::TimedOut, format!("no answer to {ATTEMPTS} datagrams of {bytes} bytes")))
}

/// Returns what the server saw, if the payload came back as it was sent.
fn compare(received: &[u8], payload: &[u8]) -> Result<Seen, Failed> {
    let corrupt = || Failed(Cause::Corrupt, format!("comparing {} bytes with those sent", payload.len()));
    let (seen, echoed) = Seen::decode(received).ok_or_else(corrupt)?;
    if echoed == payload { Ok(seen) } else { Err(corrupt()) }
}

fn reached(seen: Option<Seen>, local: io::Result<SocketAddr>, attempts: u32) -> Result<Answer, Failed> {
    let local = local.map_err(|error| failed("asking for the own address", &error))?.ip().to_canonical();
    let (server, source) = seen.map(|it| (it.server, it.source)).unzip();
    Ok(Answer::Reached { server, source, local, attempts })
}

async fn within<T>(limit: Duration, what: &str, work: impl Future<Output = io::Result<T>>) -> Result<T, Failed> {
    match timeout(limit, work).await {
        Ok(result) => result.map_err(|error| failed(what, &error)),
        Err(_) => Err(Failed(Cause::TimedOut, format!("{what}: no answer within {limit:?}"))),
    }
}

fn failed(what: &str, error: &io::Error) -> Failed {
    use io::ErrorKind as E;
    let cause = match error.kind() {
        E::ConnectionRefused => Cause::Refused,
        E::TimedOut => Cause::TimedOut,
        E::HostUnreachable | E::NetworkUnreachable | E::NetworkDown => Cause::Unreachable,
        E::ConnectionReset | E::ConnectionAborted | E::BrokenPipe | E::UnexpectedEof => Cause::Broken,
        _ => Cause::Other,
    };
    Failed(cause, format!("{what}: {error}"))
}

/// Returns bytes that no other payload of this process has: a late echo is not taken for this one's.
fn payload(length: usize) -> Vec<u8> {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    // Xorshift: a segment that comes twice, or at another place, differs.
    let mut state = NEXT.fetch_add(1, Ordering::Relaxed).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}
