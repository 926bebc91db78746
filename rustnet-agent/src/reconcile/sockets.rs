//! Socket load-balancing: the programs on their hooks, whose sockets they are for, and the end of sockets whose backend is gone.
//!
//! A connected socket has one backend for as long as it lives. When that stops serving, a UDP socket would send to nobody for ever: it
//! is ended, and its owner connects again. A TCP connection goes on while its endpoint is known to the API, as it does with kube-proxy:
//! an endpoint that is not ready may finish what it began. Only one to a pod is ended: another server outlives its endpoint.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use rustnet_common::endpoint::Endpoint;
use rustnet_common::files::{EndpointFile, endpoint_path};
use rustnet_common::host_port::{HostPortKey, any};
use rustnet_common::service::scope;
use rustnet_common::socket::{Asked, SocketKey, netns};
use rustnet_common::tuple::proto::{TCP, UDP};
use tokio::time::Instant;

use super::kernel::Kernel;
use super::namespaces::{self, Pods};
use super::{Datapath, Reconciler};
use crate::bpf::store::host_ports::Entries;
use crate::bpf::store::sockets::Sockets;
use crate::failure::{Failure, Scope};
use crate::index::Gate;
use crate::net::sock_diag::{Connected, SockDiag};
use crate::plan::{Maps, VipKey, Write};
use crate::source::Kind;

/// Changes that may concern sockets are waited out this long. An endpoint that moves between two slices is missing for a moment: a TCP
/// connection is ended when it is missing for longer.
const SETTLE: Duration = Duration::from_millis(500);
/// What a socket asked for is kept this long after its backend has gone: an answer may be under way, or a call of connect(2).
const LINGER: Duration = Duration::from_secs(10);
const REMEDY: &str = "sockets may be connected to backends that are gone: the kernel needs CONFIG_INET_DIAG_DESTROY and \
                      CONFIG_INET_UDP_DIAG; or give --socket-lb off";

const IN_PODS_REMEDY: &str = "the agent needs CAP_SYS_ADMIN and the directory of network namespaces at its path, as deploy/pod-sockets adds \
                              them; or give the pod the annotation rustnet.io/socket-lb=false";

/// Since when each socket is without a backend.
pub type Since = HashMap<SocketKey, Instant>;

impl Reconciler {
    /// Notes that these writes may have taken the backends of sockets, or the events before them the endpoints of those that outlive
    /// their backend.
    pub(super) fn note_backends(&mut self, writes: &[Write]) {
        let is_of_datagrams = |write: &Write| match write {
            Write::PutService { key, .. } | Write::DeleteService { key } => key.proto == UDP,
            _ => false,
        };
        if writes.iter().any(|write| matches!(write, Write::ClearBackends { .. })) {
            self.want_sockets();
        } else if self.has_outlived || writes.iter().any(is_of_datagrams) {
            self.sockets.want(SETTLE);
        }
    }

    /// Wants sockets looked after. What failed for one pod, or without a control group, does not put off the others for long.
    pub(super) fn want_sockets(&mut self) {
        self.sockets.want(if self.sockets.has_failed() { SETTLE } else { Duration::ZERO });
    }

    /// Has the programs of socket calls on their hooks, and ends the sockets whose backend is gone.
    pub(super) fn look_after_sockets(&mut self) {
        let had_failed = self.sockets.has_failed();
        let mut failures = self.attach_sockets().unwrap_or_else(|error| vec![Failure::new(Scope::Host, &error)]);
        let next = self.end_sockets(&mut failures).unwrap_or_else(|error| {
            failures.push(Failure::new(Scope::Host, &error));
            None
        });
        self.sockets.finish(failures, next.map(|after| Instant::now() + after));
        if had_failed || self.sockets.has_failed() {
            self.report.want(Duration::ZERO);
        }
    }

    /// Returns which programs are missing that the others do without.
    fn attach_sockets(&self) -> Result<Vec<Failure>> {
        // Unpinned programs may be about to be replaced.
        let Some(Datapath { kernel, .. }) = self.datapath.as_ref().filter(|it| it.kernel.is_pinned()) else {
            return Ok(Vec::new());
        };
        let mut there = kernel.sockets().map(Sockets::namespaces).transpose()?.unwrap_or_default();
        there.retain(|_, flags| *flags == netns::POD);
        let pods = match &self.records {
            Some(records) => {
                let pods = Pods::new(self.index.pods(), self.index.has_synced(Kind::Pod));
                namespaces::wanted(self.config.socket_lb, records, &pods, &there)
            }
            None => there,
        };
        let attached = kernel.attach_sockets(pods)?;
        for what in attached.done {
            tracing::info!("{what}");
        }
        Ok(attached.failures.iter().map(|error| Failure::new(Scope::Host, error)).collect())
    }

    /// Returns after which time to look again, and adds which network namespaces cannot be looked into.
    fn end_sockets(&mut self, failures: &mut Vec<Failure>) -> Result<Option<Duration>> {
        let Some(Datapath { kernel, .. }) = &self.datapath else { return Ok(None) };
        // Before the lists are complete, an endpoint may seem to be gone.
        let Some(sockets) = kernel.sockets().filter(|_| self.index.is_open(Gate::Services)) else { return Ok(None) };
        let left = left(kernel, sockets.entries()?)?;
        let now = Instant::now();
        let known: HashSet<&SocketKey> = left.iter().map(|(key, _)| key).collect();
        self.sockets_since.retain(|key, _| known.contains(key));
        let mut since = std::mem::take(&mut self.sockets_since);
        let (mut forget, mut next, mut ended) = (HashSet::new(), None, 0);
        let mut look_again = |after: Duration| next = Some(next.map_or(after, |next: Duration| next.min(after)));
        self.has_outlived = false;
        let over = self.over(kernel, &left)?;
        let records = self.records.as_deref().unwrap_or_default();
        for (bucket, left) in by_bucket(&left) {
            let mut places = places(&self.config.run_dir, records, bucket, failures)?;
            // Which pods there are may not be known yet.
            places.is_blind |= self.records.is_none() && bucket != netns::bucket(0, netns::HOST);
            for proto in [TCP, UDP] {
                let of_proto = || left.iter().filter(|(_, asked)| asked.proto == proto).map(|(key, _)| key);
                let alive = places.find(proto, &of_proto().map(peer).collect(), failures);
                let is_blind = places.is_blind;
                for key in of_proto() {
                    let age = now - *since.entry(*key).or_insert(now);
                    let Some((place, socket)) = alive.get(&peer(key)) else {
                        // Closed, without a peer, about to be connected, or where nobody can look: then the failure is tried again.
                        if !is_blind && age >= LINGER {
                            forget.insert(*key);
                        } else if !is_blind {
                            look_again(LINGER);
                        }
                        continue;
                    };
                    let is_over = proto == UDP || over.contains(key);
                    if is_over && (proto == UDP || age >= SETTLE) {
                        match places.all[*place].end(socket).context(REMEDY) {
                            Ok(is_ended) => {
                                ended += usize::from(is_ended);
                                forget.insert(*key);
                            }
                            Err(error) => failures.push(Failure::new(Scope::Host, &error)),
                        }
                    } else if is_over {
                        look_again(SETTLE);
                    } else {
                        self.has_outlived = true;
                    }
                }
            }
        }
        sockets.forget(&forget.iter().copied().collect::<Vec<_>>())?;
        since.retain(|key, _| !forget.contains(key));
        self.sockets_since = since;
        if ended > 0 {
            tracing::info!(ended, "sockets ended: their backends are gone");
        }
        Ok(next)
    }

    /// Those of the TCP connections whose pod is gone: no endpoint has its address, and it does not live here. A Service that is gone
    /// says nothing of its endpoints, and a server that is no pod may live on.
    fn over(&self, kernel: &Kernel, left: &[(SocketKey, Asked)]) -> Result<HashSet<SocketKey>> {
        let tcp = || left.iter().filter(|(_, asked)| asked.proto == TCP);
        let mut gone = self.index.without_endpoint(tcp().map(|(key, _)| IpAddr::from(key.addr)).collect());
        gone.retain(|ip| self.index.nodes().any(|node| node.pod_cidrs.iter().any(|range| range.contains(ip))));
        if !gone.is_empty() {
            let here: BTreeSet<IpAddr> = kernel.endpoints.read()?.into_iter().map(|(ip, _)| ip).collect();
            gone.retain(|ip| !here.contains(ip));
        }
        let mut over = HashSet::new();
        for (key, asked) in tcp().filter(|(key, _)| gone.contains(&IpAddr::from(key.addr))) {
            if kernel.maps.service(&vip(asked))?.is_some() {
                over.insert(*key);
            }
        }
        Ok(over)
    }
}

/// The sockets by the number that says in which network namespaces they may be.
fn by_bucket(left: &[(SocketKey, Asked)]) -> BTreeMap<u8, Vec<(SocketKey, Asked)>> {
    let mut buckets: BTreeMap<u8, Vec<_>> = BTreeMap::new();
    for (key, asked) in left {
        buckets.entry(asked.bucket).or_default().push((*key, *asked));
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
    fn find(
        &mut self,
        proto: u8,
        peers: &BTreeSet<Peer>,
        failures: &mut Vec<Failure>,
    ) -> HashMap<Peer, (usize, Connected)> {
        let mut alive = HashMap::new();
        for (place, diag) in self.all.iter_mut().enumerate().filter(|_| !peers.is_empty()) {
            match diag.find(proto, peers).context(REMEDY) {
                Ok(found) => alive.extend(found.into_iter().map(|(peer, socket)| (peer, (place, socket)))),
                Err(error) => {
                    self.is_blind = true;
                    failures.push(Failure::new(Scope::Host, &error));
                }
            }
        }
        alive
    }
}

/// Opens the namespaces in which the sockets of this number may be. Those of a pod that is listed no more
/// count, too.
fn places(run_dir: &Path, records: &[EndpointFile], bucket: u8, failures: &mut Vec<Failure>) -> Result<Places> {
    let mut places = Places { all: Vec::new(), is_blind: false };
    if bucket == netns::bucket(0, netns::HOST) {
        places.all.push(SockDiag::open()?);
        return Ok(places);
    }
    let is_meant = |cookie: &u64| netns::bucket(*cookie, netns::POD) == bucket;
    let records: BTreeMap<_, _> =
        records.iter().filter_map(|it| Some((it.netns_cookie.filter(is_meant)?, it))).collect();
    for record in records.values() {
        match SockDiag::open_in(Path::new(&record.netns)) {
            Ok(diag) => places.all.push(diag),
            // Its namespace goes after its record.
            Err(_) if !endpoint_path(run_dir, &record.container_id, &record.ifname).exists() => {}
            Err(error) => {
                places.is_blind = true;
                let EndpointFile { pod_namespace, pod_name, netns, .. } = record;
                let error = error.context(format!(
                    "sockets of pod {pod_namespace}/{pod_name} may be connected to backends that are gone: network namespace {netns}: \
                     {IN_PODS_REMEDY}"
                ));
                failures.push(Failure::new(Scope::Pod, &error));
            }
        }
    }
    Ok(places)
}

/// Those of the sockets that what they asked for does not lead any more to where they send. A TCP connection to a host port is the pod's
/// own affair.
fn left(kernel: &Kernel, mut all: Vec<(SocketKey, Asked)>) -> Result<Vec<(SocketKey, Asked)>> {
    let is_to_host_port = |asked: &Asked| asked.backend == 0;
    let (ports, pods): (Entries, HashMap<IpAddr, Endpoint>) = if all.iter().any(|(_, asked)| is_to_host_port(asked)) {
        (kernel.host_ports.read()?, kernel.endpoints.read()?.into_iter().collect())
    } else {
        Default::default()
    };
    let leads_to_pod = |key: &SocketKey, asked: &Asked| {
        let at = |addr| ports.get(&HostPortKey { addr, port: asked.port, proto: asked.proto, pad: 0 });
        let entry = at(asked.addr).or_else(|| at(any(asked.addr.is_v4())));
        let lives = |ifindex| pods.get(&IpAddr::from(key.addr)).is_some_and(|pod| pod.ifindex == ifindex);
        entry.is_some_and(|it| (it.pod, it.port) == (key.addr, key.port) && lives(it.ifindex))
    };
    // Many sockets ask for few Services.
    let mut sets: HashMap<VipKey, Option<u32>> = HashMap::new();
    let mut failed = None;
    all.retain(|(key, asked)| {
        if is_to_host_port(asked) {
            return asked.proto == UDP && !leads_to_pod(key, asked);
        }
        let Some(set) = kernel.maps.set_of(asked.backend) else { return true };
        if asked.proto != UDP {
            return false;
        }
        let asked = vip(asked);
        let led_to = sets.get(&asked).copied().unwrap_or_else(|| {
            let entry = kernel.maps.service(&asked).unwrap_or_else(|error| {
                failed = Some(error);
                None
            });
            *sets.entry(asked).or_insert(entry.map(|entry| entry.id))
        });
        led_to != Some(set)
    });
    failed.map_or(Ok(all), Err)
}

/// Number of a socket, and where it is connected to.
type Peer = (u64, SocketAddr);

fn peer(key: &SocketKey) -> Peer {
    (key.cookie, SocketAddr::new(key.addr.into(), key.port))
}

/// The entry that a socket asked for: all loopback addresses have that of the first.
fn vip(asked: &Asked) -> VipKey {
    let ip = match IpAddr::from(asked.addr) {
        IpAddr::V4(ip) if ip.is_loopback() || ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    VipKey { ip, port: asked.port, proto: asked.proto, scope: scope::CLUSTER }
}
