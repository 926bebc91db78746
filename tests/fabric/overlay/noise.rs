//! Streams of noise both ways at once, compared byte by byte.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use anyhow::{Context, Result, anyhow, bail, ensure};
use testkit::client::TIMEOUT;
use testkit::{Netns, wait};

/// Bytes that look random, and are the same for the same seed (xorshift64).
pub struct Noise(pub u64);

impl Noise {
    pub fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            chunk.copy_from_slice(&self.0.to_le_bytes()[..chunk.len()]);
        }
    }
}

/// Bytes that a stream sends and compares at once.
pub const CHUNK: usize = 64 << 10;

/// Sends noise until enough is sent, while it reads the noise of the other end and compares it.
/// Returns the number of bytes that it received.
fn both_ways(
    stream: &TcpStream,
    (own, other): (u64, u64),
    is_enough: &(impl Fn(u64) -> bool + Sync),
    received: &AtomicU64,
) -> Result<u64> {
    stream.set_read_timeout(Some(wait::DEADLINE))?;
    stream.set_write_timeout(Some(wait::DEADLINE))?;
    thread::scope(|scope| {
        let writing = scope.spawn(move || -> Result<u64> {
            let (mut noise, mut chunk, mut sent) = (Noise(own), vec![0; CHUNK], 0);
            while !is_enough(sent) {
                noise.fill(&mut chunk);
                (&*stream).write_all(&chunk).with_context(|| format!("cannot send byte {sent} and the next ones"))?;
                sent += CHUNK as u64;
            }
            stream.shutdown(Shutdown::Write)?;
            Ok(sent)
        });
        let (mut noise, mut expected, mut chunk, mut total) = (Noise(other), vec![0; CHUNK], vec![0; CHUNK], 0);
        let reading = loop {
            match (&*stream).read_exact(&mut chunk) {
                Ok(()) => {}
                Err(e) if e.kind() == ErrorKind::UnexpectedEof => break Ok(total),
                Err(e) => break Err(e).with_context(|| format!("cannot read byte {total} and the next ones")),
            }
            noise.fill(&mut expected);
            if let Some(at) = chunk.iter().zip(&expected).position(|(got, wanted)| got != wanted) {
                break Err(anyhow!("byte {} is another one than was sent", total + at as u64));
            }
            total += CHUNK as u64;
            received.fetch_add(CHUNK as u64, Ordering::Relaxed);
        };
        // An end that failed stops the other one.
        if reading.is_err() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        let writing = writing.join().unwrap_or_else(|_| bail!("a writer panicked"));
        let total = reading?;
        writing?;
        Ok(total)
    })
}

/// A connection to `target`, which ends at `listen`: both ends send noise at once until it is enough, and compare.
pub fn exchange_until(
    client: &Netns,
    (server, listen): (&Netns, SocketAddr),
    target: SocketAddr,
    is_enough: &(impl Fn(u64) -> bool + Sync),
    received: &[AtomicU64; 2],
) -> Result<[u64; 2]> {
    let listener = server.run(|| TcpListener::bind(listen))?.with_context(|| format!("cannot listen on {listen}"))?;
    let calling = client.run(|| TcpStream::connect_timeout(&target, TIMEOUT))?;
    let calling = calling.with_context(|| format!("{} cannot connect to {target}", client.name()))?;
    let (answering, _) = listener.accept()?;
    thread::scope(|scope| {
        let answered = scope.spawn(|| both_ways(&answering, (2, 1), is_enough, &received[1]));
        let called = both_ways(&calling, (1, 2), is_enough, &received[0]).context("the calling end");
        let answered = answered.join().unwrap_or_else(|_| bail!("panicked")).context("the called end");
        Ok([called?, answered?])
    })
}

/// Segments that the connections of a namespace have sent again.
pub fn sent_again(netns: &Netns) -> Result<u64> {
    let text = netns.exec("cat", &["/proc/net/snmp"])?;
    let mut rows = text.lines().filter_map(|line| line.strip_prefix("Tcp: ")).map(str::split_whitespace);
    let (Some(names), Some(mut values)) = (rows.next(), rows.next()) else { bail!("no row of TCP: {text}") };
    let column = names.into_iter().position(|name| name == "RetransSegs").context("no column RetransSegs")?;
    Ok(values.nth(column).context("too few values")?.parse()?)
}

/// Several MiB each way at once. TCP repairs what is lost or damaged: therefore hardly any segment
/// may be sent again. If the segments of large packets were damaged, all of them would be.
pub fn exchange(client: &Netns, (server, listen): (&Netns, SocketAddr), target: SocketAddr) -> Result<()> {
    const BYTES: u64 = 3 << 20;
    const MOST: u64 = 2 * BYTES / 1400 / 10;
    let count = || -> Result<u64> { Ok(sent_again(client)? + sent_again(server)?) };
    let before = count()?;
    let received =
        exchange_until(client, (server, listen), target, &|sent| sent >= BYTES, &<[AtomicU64; 2]>::default())?;
    ensure!(received == [BYTES; 2], "to {target}: {received:?} bytes of {BYTES} arrived");
    let again = count()? - before;
    ensure!(again <= MOST, "to {target}: {again} segments were sent again, which is more than {MOST}");
    Ok(())
}
