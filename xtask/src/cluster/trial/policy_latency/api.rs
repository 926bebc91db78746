//! Requests to the API server whose moments are known to the millisecond: by a `kubectl proxy` that
//! runs meanwhile, for a new process for each request would take longer than what is measured.

use std::fs;
use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Deserializer, Value};

use crate::cluster::layout::Cluster;
use crate::cluster::process::Processes;
use crate::cluster::wait;

const NAME: &str = "policy-latency-proxy";
/// For the proxy's start.
const START: Duration = Duration::from_secs(10);
/// For an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// The proxy, which ends with it.
pub struct Api {
    processes: Processes,
    socket: PathBuf,
}

/// An answer, and its moments.
pub struct Answer {
    /// Before the request was sent.
    pub asked: Instant,
    /// When all of the answer was there.
    pub answered: Instant,
}

/// An event of a watch, and when it came.
pub struct Event {
    /// When it had been read.
    pub at: Instant,
    /// `ADDED`, `MODIFIED` or `DELETED`, and the object.
    pub value: Value,
}

/// A connection that is used again for each request.
pub struct Connection(BufReader<UnixStream>);

impl Api {
    /// Starts the proxy, in the namespace of the control plane: its way to the API server is a
    /// plain connection.
    pub fn start(cluster: &Cluster) -> Result<Self> {
        let processes = Processes::of(cluster);
        let socket = cluster.dir.join(format!("{NAME}.sock"));
        processes.end(NAME)?;
        let _ = fs::remove_file(&socket); // of an earlier one
        let words = ["nsenter".into(), format!("--net={}", cluster.netns_file("cp").display())];
        let kubectl = [cluster.program("kubectl")?, format!("--kubeconfig={}", cluster.kubeconfig("inside"))];
        let proxy = ["proxy".into(), format!("--unix-socket={}", socket.display())];
        processes.start(NAME, &[words, kubectl, proxy].concat())?;
        let api = Self { processes, socket };
        let is_ready = || api.connect().and_then(|mut it| it.send("GET", "/version", None)).is_ok();
        ensure!(wait::until(START, is_ready), "kubectl proxy does not serve:\n{}", api.processes.tail(NAME));
        Ok(api)
    }

    /// Returns a connection for requests.
    pub fn connect(&self) -> Result<Connection> {
        let stream = UnixStream::connect(&self.socket).with_context(|| format!("{}", self.socket.display()))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Connection(BufReader::new(stream)))
    }

    /// Watches what this path lists, until the receiver or the proxy goes.
    pub fn watch(&self, path: &str) -> Result<Receiver<Event>> {
        let mut stream = UnixStream::connect(&self.socket)?;
        // The old version has no chunks: what comes after the head is the objects.
        write!(stream, "GET {path}?watch=1 HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
        let mut reader = BufReader::new(stream);
        let (status, _) = head(&mut reader)?;
        ensure!(status == 200, "watching {path}: HTTP {status}");
        let (events, received) = mpsc::channel();
        thread::spawn(move || {
            for value in Deserializer::from_reader(reader).into_iter::<Value>() {
                let Ok(value) = value else { return };
                if events.send(Event { at: Instant::now(), value }).is_err() {
                    return;
                }
            }
        });
        Ok(received)
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        let _ = self.processes.end(NAME); // `down` tries again
        let _ = fs::remove_file(&self.socket);
    }
}

impl Connection {
    /// Creates an object in the list of this path.
    pub fn create(&mut self, path: &str, object: &Value) -> Result<Answer> {
        self.send("POST", path, Some(("application/json", object)))
    }

    /// Merges a patch into the object of this path.
    pub fn patch(&mut self, path: &str, patch: &Value) -> Result<Answer> {
        self.send("PATCH", path, Some(("application/merge-patch+json", patch)))
    }

    /// Deletes the object of this path, a pod at once.
    pub fn delete(&mut self, path: &str) -> Result<Answer> {
        self.send("DELETE", &format!("{path}?gracePeriodSeconds=0"), None)
    }

    fn send(&mut self, method: &str, path: &str, content: Option<(&str, &Value)>) -> Result<Answer> {
        let what = || format!("{method} {path}");
        let (kind, body) = content.map_or(("application/json", String::new()), |(kind, it)| (kind, it.to_string()));
        let start = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}");
        let request = format!("{start}\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        let asked = Instant::now();
        self.0.get_mut().write_all(request.as_bytes()).with_context(what)?;
        let (status, length) = head(&mut self.0).with_context(what)?;
        let answer = match length {
            None => chunks(&mut self.0),
            Some(length) => exactly(&mut self.0, length),
        };
        let (answer, answered) = (answer.with_context(what)?, Instant::now());
        if !(200..300).contains(&status) {
            bail!("{}: HTTP {status}: {}", what(), String::from_utf8_lossy(&answer));
        }
        Ok(Answer { asked, answered })
    }
}

/// Reads the head of an answer; returns its status, and the length of its body where that is
/// announced.
fn head(reader: &mut impl BufRead) -> Result<(u16, Option<usize>)> {
    let first = line(reader)?;
    let status = first.split(' ').nth(1).and_then(|word| word.parse().ok()).context("no HTTP")?;
    let mut length = None;
    loop {
        let line = line(reader)?.to_ascii_lowercase();
        if line.is_empty() {
            return Ok((status, length));
        }
        if let Some(value) = line.strip_prefix("content-length:") {
            length = Some(value.trim().parse()?);
        }
    }
}

fn chunks(reader: &mut impl BufRead) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    loop {
        let length = usize::from_str_radix(line(reader)?.trim(), 16).context("no length of a chunk")?;
        all.extend(exactly(reader, length)?);
        line(reader)?;
        if length == 0 {
            return Ok(all);
        }
    }
}

fn exactly(reader: &mut impl BufRead, length: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    reader.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// A line without its end.
fn line(reader: &mut impl BufRead) -> Result<String> {
    let mut line = String::new();
    ensure!(reader.read_line(&mut line)? > 0, "closed before an answer");
    Ok(line.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_end_by_their_length_or_with_the_last_chunk() {
        let mut announced = &b"HTTP/1.1 201 Created\r\nContent-LENGTH: 5\r\n\r\nhellorest"[..];
        let (status, length) = head(&mut announced).unwrap();
        assert_eq!((status, length), (201, Some(5)));
        assert_eq!(exactly(&mut announced, 5).unwrap(), b"hello");
        let mut chunked =
            &b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nA\r\n, the rest\r\n0\r\n\r\nnext"[..];
        assert_eq!(head(&mut chunked).unwrap(), (200, None));
        assert_eq!(chunks(&mut chunked).unwrap(), b"hello, the rest");
        assert_eq!(chunked, b"next");
        assert!(head(&mut &b"HTTP/1.1 200 OK\r\n"[..]).is_err());
    }
}
