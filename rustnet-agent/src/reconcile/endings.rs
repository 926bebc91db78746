//! Ends connected sockets whose backend is gone: finds them in their network namespaces, in a thread of its own. A node has hundreds of
//! namespaces, and a process can have many thousands of sockets.
//!
//! The loop says which sockets are left without a backend ([`super::sockets`]). Meanwhile they may close, or connect again: what
//! is not in the table as the loop read it stays.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustnet_common::files::{EndpointFile, endpoint_path};
use rustnet_common::socket::{Asked, SocketKey, netns};
use rustnet_common::tuple::proto::{TCP, UDP};
use tokio::sync::oneshot;

use crate::bpf::store::sockets::Sockets;
use crate::failure::{Failure, Scope};
use crate::net::sock_diag::{Connected, SockDiag};

/// Changes that may concern sockets are waited out this long. An endpoint that moves between two slices is missing for a moment: a TCP
/// connection is ended when it is missing for longer.
pub const SETTLE: Duration = Duration::from_millis(500);
/// What a socket asked for is kept this long after its backend has gone: an answer may be under way, or a call of connect(2).
const LINGER: Duration = Duration::from_secs(10);
/// An endpoint that is missing counts as gone this long. Later in a search it may be back, and TCP connections wait for the next one.
const VALID: Duration = Duration::from_secs(10);
const REMEDY: &str = "sockets may be connected to backends that are gone: the kernel needs CONFIG_INET_DIAG_DESTROY and \
                      CONFIG_INET_UDP_DIAG; or give --socket-lb off";

const IN_PODS_REMEDY: &str = "the agent needs CAP_SYS_ADMIN and the directory of network namespaces at its path, as deploy/pod-sockets adds \
                              them; or give the pod the annotation rustnet.io/socket-lb=false";

/// Since when each socket is without a backend.
pub type Since = HashMap<SocketKey, Instant>;

/// What one search leaves to the next.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// Since when sockets are without a backend.
    pub since: Since,
    /// The bucket to begin with: the first one whose turn came so late that no TCP connection was ended there, so that none is always
    /// late. 0 if none was.
    pub first: u8,
}

/// A function that opens the sockets of the network namespace at a path.
pub type Enter = Arc<dyn Fn(&Path) -> Result<SockDiag> + Send + Sync>;

/// A socket whose backend is gone.
#[derive(Clone, Copy, Debug)]
pub struct Left {
    /// The socket, and where it sends.
    pub key: SocketKey,
    /// What it asked for.
    pub asked: Asked,
    /// It is to be ended. A TCP connection to a server that may live goes on.
    pub is_over: bool,
}

/// What a search needs.
pub struct Search {
    /// The sockets that it is for.
    pub left: Vec<Left>,
    /// When they were compared with the backends.
    pub judged: Instant,
    /// What the search before has left.
    pub progress: Progress,
    /// The CNI binary's records of pods; `None` while they are not known.
    pub records: Option<Vec<EndpointFile>>,
    /// Where these are.
    pub run_dir: PathBuf,
    /// See [`Enter`].
    pub enter: Enter,
    /// The tables.
    pub sockets: Arc<Sockets>,
}

/// The result of a search.
#[derive(Debug, Default)]
pub struct Outcome {
    /// For the next search.
    pub progress: Progress,
    /// After which time to search again.
    pub next: Option<Duration>,
    /// How many sockets were ended.
    pub ended: usize,
    /// There are TCP connections whose backend serves no more, and that go on.
    pub has_outlived: bool,
    /// What failed: namespaces that cannot be looked into, sockets that the kernel does not end.
    pub failures: Vec<Failure>,
}

impl Outcome {
    fn look_again(&mut self, after: Duration) {
        self.next = Some(self.next.map_or(after, |next| next.min(after)));
    }

    fn fail(&mut self, scope: Scope, error: &anyhow::Error) {
        self.failures.push(Failure::new(scope, error));
    }
}

impl Search {
    /// Searches in a thread of its own.
    ///
    /// # Errors
    /// There is no thread.
    pub fn begin(self) -> Result<oneshot::Receiver<Outcome>> {
        let (sender, result) = oneshot::channel();
        let search = move || {
            // A loop that has ended needs it no more.
            let _ = sender.send(self.run());
        };
        let thread = std::thread::Builder::new().name("sockets".to_owned()).spawn(search);
        thread.context("no thread to look for sockets whose backend is gone; raise the limit of tasks")?;
        Ok(result)
    }

    /// Looks into one namespace after the other, and ends what is to be ended there.
    pub fn run(mut self) -> Outcome {
        let known: HashSet<SocketKey> = self.left.iter().map(|it| it.key).collect();
        let Progress { since, first } = std::mem::take(&mut self.progress);
        let mut outcome = Outcome { progress: Progress { since, first: 0 }, ..Outcome::default() };
        outcome.progress.since.retain(|key, _| known.contains(key));
        let mut forget = Vec::new();
        let mut late = None;
        let (before, from_first): (Vec<_>, Vec<_>) = by_bucket(&self.left).into_iter().partition(|(it, _)| *it < first);
        for (bucket, left) in from_first.into_iter().chain(before) {
            if self.judged.elapsed() >= VALID {
                late.get_or_insert(bucket);
            }
            let mut places = self.places(bucket, &mut outcome);
            for proto in [TCP, UDP] {
                let of_proto = left.iter().filter(|it| it.asked.proto == proto);
                self.end(&of_proto.collect::<Vec<_>>(), proto, &mut places, &mut forget, &mut outcome);
            }
        }
        if let Err(error) = self.sockets.forget(&forget) {
            outcome.fail(Scope::Host, &error);
        }
        for (key, _) in &forget {
            outcome.progress.since.remove(key);
        }
        outcome.progress.first = late.unwrap_or(0);
        outcome
    }

    /// Ends the sockets of one protocol, and notes which of them are to be forgotten.
    fn end(
        &self,
        left: &[&Left],
        proto: u8,
        places: &mut Places,
        forget: &mut Vec<(SocketKey, Asked)>,
        outcome: &mut Outcome,
    ) {
        let alive = places.find(proto, &left.iter().map(|it| peer(&it.key)).collect(), outcome);
        let now = Instant::now();
        for Left { key, asked, is_over } in left {
            let age = now - *outcome.progress.since.entry(*key).or_insert(now);
            let Some((place, socket)) = alive.get(&peer(key)) else {
                // Closed, without a peer, about to be connected, or where nobody can look: then the failure is tried again.
                if !places.is_blind && age >= LINGER {
                    forget.push((*key, *asked));
                } else if !places.is_blind {
                    outcome.look_again(LINGER);
                }
                continue;
            };
            let is_certain = proto == UDP || age >= SETTLE && self.judged.elapsed() < VALID;
            if *is_over && is_certain {
                let ended = self
                    .sockets
                    .has(key, asked)
                    .and_then(|is_same| Ok(is_same && places.all[*place].end(socket).context(REMEDY)?));
                match ended {
                    Ok(is_ended) => {
                        outcome.ended += usize::from(is_ended);
                        forget.push((*key, *asked));
                    }
                    Err(error) => outcome.fail(Scope::Host, &error),
                }
            } else if *is_over {
                outcome.look_again(SETTLE);
            } else {
                outcome.has_outlived = true;
            }
        }
    }

    /// Opens the namespaces in which the sockets of this number may be. Those of a pod that is listed no more
    /// count, too.
    fn places(&self, bucket: u8, outcome: &mut Outcome) -> Places {
        if bucket == netns::bucket(0, netns::HOST) {
            let host = SockDiag::open();
            if let Err(error) = &host {
                outcome.fail(Scope::Host, &anyhow::anyhow!("{REMEDY}: {error}"));
            }
            return Places { is_blind: host.is_err(), all: host.into_iter().collect() };
        }
        // Which pods there are may not be known yet.
        let mut places = Places { all: Vec::new(), is_blind: self.records.is_none() };
        let is_meant = |cookie: &u64| netns::bucket(*cookie, netns::POD) == bucket;
        let records = self.records.iter().flatten();
        let records: BTreeMap<_, _> = records.filter_map(|it| Some((it.netns_cookie.filter(is_meant)?, it))).collect();
        for record in records.values() {
            match (self.enter)(Path::new(&record.netns)) {
                Ok(diag) => places.all.push(diag),
                // Its namespace goes after its record.
                Err(_) if !endpoint_path(&self.run_dir, &record.container_id, &record.ifname).exists() => {}
                Err(error) => {
                    places.is_blind = true;
                    let EndpointFile { pod_namespace, pod_name, netns, .. } = record;
                    let error = error.context(format!(
                        "sockets of pod {pod_namespace}/{pod_name} may be connected to backends that are gone: network namespace {netns}: \
                         {IN_PODS_REMEDY}"
                    ));
                    outcome.fail(Scope::Pod, &error);
                }
            }
        }
        places
    }
}

/// The sockets by the number that says in which network namespaces they may be.
fn by_bucket(left: &[Left]) -> BTreeMap<u8, Vec<Left>> {
    let mut buckets: BTreeMap<u8, Vec<_>> = BTreeMap::new();
    for it in left {
        buckets.entry(it.asked.bucket).or_default().push(*it);
    }
    buckets
}

/// Network namespaces to look for sockets in.
struct Places {
    all: Vec<SockDiag>,
    /// There are more, which cannot be entered.
    is_blind: bool,
}

impl Places {
    /// The sockets that are connected there, and which of the places each is in.
    ///
    /// A namespace that cannot be looked into does not hold up the others.
    fn find(&mut self, proto: u8, peers: &BTreeSet<Peer>, outcome: &mut Outcome) -> HashMap<Peer, (usize, Connected)> {
        let mut alive = HashMap::new();
        for (place, diag) in self.all.iter_mut().enumerate().filter(|_| !peers.is_empty()) {
            match diag.find(proto, peers).context(REMEDY) {
                Ok(found) => alive.extend(found.into_iter().map(|(peer, socket)| (peer, (place, socket)))),
                Err(error) => {
                    self.is_blind = true;
                    outcome.fail(Scope::Host, &error);
                }
            }
        }
        alive
    }
}

/// Number of a socket, and where it is connected to.
type Peer = (u64, SocketAddr);

fn peer(key: &SocketKey) -> Peer {
    (key.cookie, SocketAddr::new(key.addr.into(), key.port))
}
