//! Socket load-balancing: the programs on their hooks, whose sockets they are for, and which sockets have lost their backend.
//!
//! A connected socket has one backend for as long as it lives. When that stops serving, a UDP socket would send to nobody for ever: it
//! is ended, and its owner connects again. A TCP connection goes on while its endpoint is known to the API, as it does with kube-proxy:
//! an endpoint that is not ready may finish what it began. Only one to a pod is ended: another server outlives its endpoint.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, anyhow};
use rustnet_common::endpoint::Endpoint;
use rustnet_common::host_port::{HostPort, HostPortKey, any};
use rustnet_common::service::scope;
use rustnet_common::socket::{Asked, SocketKey, netns};
use rustnet_common::tuple::proto::{TCP, UDP};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::endings::{Left, Outcome, SETTLE, Search};
use super::kernel::Kernel;
use super::namespaces::{self, Pods};
use super::{Datapath, Reconciler};
use crate::bpf::store::host_ports::Entries;
use crate::bpf::store::sockets::Sockets;
use crate::failure::{Failure, Scope};
use crate::index::Gate;
use crate::plan::{Maps, VipKey, Write};
use crate::source::Kind;

/// Share of the time that comparing sockets with backends may take, as 1 in so many.
const COMPARE_SHARE: u32 = 20;

/// A search for sockets whose backend is gone that is under way, in a thread of its own.
pub struct Searching {
    /// When it began.
    pub began: Instant,
    outcome: oneshot::Receiver<Outcome>,
}

/// The outcome of the search that is under way. Never ready without one.
pub async fn searched(searching: &mut Option<Searching>) -> Outcome {
    let Some(Searching { outcome, .. }) = searching else { return std::future::pending().await };
    outcome.await.unwrap_or_else(|_| {
        let error = anyhow!("the search for sockets whose backend is gone has panicked");
        Outcome { failures: vec![Failure::new(Scope::Host, &error)], ..Outcome::default() }
    })
}

impl Reconciler {
    /// Notes that these writes may have taken the backends of sockets, or the events before them the endpoints of those that outlive
    /// their backend.
    pub(super) fn note_backends(&mut self, writes: &[Write]) {
        let is_of_datagrams = |write: &Write| match write {
            Write::PutService { key, .. } | Write::DeleteService { key } => key.proto == UDP,
            _ => false,
        };
        if writes.iter().any(|write| matches!(write, Write::ClearBackends { .. })) {
            self.want_endings_at_once();
        } else if self.has_outlived || writes.iter().any(is_of_datagrams) {
            self.want_endings(SETTLE);
        }
    }

    /// Wants sockets looked after. What failed for one pod, or without a control group, does not put off the others for long.
    pub(super) fn want_sockets(&mut self) {
        self.sockets.want(if self.sockets.has_failed() { SETTLE } else { Duration::ZERO });
        self.want_endings_at_once();
    }

    fn want_endings_at_once(&mut self) {
        self.want_endings(if self.endings.has_failed() { SETTLE } else { Duration::ZERO });
    }

    /// Wants a search after `gap`, but not all the time: to compare a full table takes some milliseconds.
    fn want_endings(&mut self, gap: Duration) {
        self.endings.want(gap.max(self.compare_took * COMPARE_SHARE));
    }

    /// Has the programs of socket calls on their hooks.
    pub(super) fn look_after_sockets(&mut self) {
        let had_failed = self.sockets.has_failed();
        let failures = self.attach_sockets().unwrap_or_else(|error| vec![Failure::new(Scope::Host, &error)]);
        self.sockets.finish(failures, None);
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
        let mut there = kernel.sockets().map(|sockets| sockets.namespaces()).transpose()?.unwrap_or_default();
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

    /// Begins to search for sockets whose backend is gone; [`Self::finish_endings`] follows.
    pub(super) fn begin_endings(&mut self) {
        self.endings.begin();
        let began = Instant::now();
        let without_backend = self.without_backend();
        self.compare_took = began.elapsed();
        tracing::debug!(took = ?self.compare_took, "sockets compared with the backends that there are");
        match without_backend {
            Ok(Some((left, sockets))) if !left.is_empty() => {
                let search = Search {
                    left,
                    judged: began.into_std(),
                    progress: std::mem::take(&mut self.search_progress),
                    records: self.records.clone(),
                    run_dir: self.config.run_dir.clone(),
                    enter: Arc::clone(&self.enter),
                    sockets,
                };
                match search.begin() {
                    Ok(outcome) => self.searching = Some(Searching { began: Instant::now(), outcome }),
                    Err(error) => self.fail_endings(&error),
                }
            }
            Ok(_) => self.finish_endings(Outcome::default()),
            Err(error) => self.fail_endings(&error),
        }
    }

    fn fail_endings(&mut self, error: &anyhow::Error) {
        let progress = std::mem::take(&mut self.search_progress);
        let (failures, has_outlived) = (vec![Failure::new(Scope::Host, error)], self.has_outlived);
        self.finish_endings(Outcome { progress, has_outlived, failures, ..Outcome::default() });
    }

    /// Notes the outcome of a search.
    pub(super) fn finish_endings(&mut self, outcome: Outcome) {
        let had_failed = self.endings.has_failed();
        if let Some(Searching { began, .. }) = self.searching {
            tracing::debug!(took = ?began.elapsed(), ended = outcome.ended, "network namespaces searched for sockets");
        }
        (self.searching, self.search_progress, self.has_outlived) = (None, outcome.progress, outcome.has_outlived);
        if outcome.ended > 0 {
            tracing::info!(ended = outcome.ended, "sockets ended: their backends are gone");
        }
        self.endings.finish(outcome.failures, outcome.next.map(|after| Instant::now() + after));
        if had_failed || self.endings.has_failed() {
            self.report.want(Duration::ZERO);
        }
    }

    /// Reports a search that takes too long. Its thread waits for the kernel.
    pub(super) fn report_stuck_search(&mut self) {
        let limit = self.look_limit;
        if self.searching.as_ref().is_none_or(|it| it.began.elapsed() < limit) {
            return;
        }
        let message = format!(
            "sockets may be connected to backends that are gone: the kernel has not listed the sockets of all network namespaces within \
             {limit:?}: look for tasks that wait (`echo w > /proc/sysrq-trigger`, then `dmesg`)"
        );
        if self.endings.add_failure(Failure { scope: Scope::Host, message }) {
            self.report.want(Duration::ZERO);
        }
    }

    /// The sockets whose backend is gone, and the tables; `None` while that is not known.
    fn without_backend(&self) -> Result<Option<(Vec<Left>, Arc<Sockets>)>> {
        let Some(Datapath { kernel, .. }) = &self.datapath else { return Ok(None) };
        // Before the lists are complete, an endpoint may seem to be gone.
        let Some(sockets) = kernel.sockets().filter(|_| self.index.is_open(Gate::Services)) else { return Ok(None) };
        let left = left(kernel, sockets.entries()?)?;
        let over = self.over(kernel, &left)?;
        let is_over = |key: &SocketKey, asked: &Asked| asked.proto == UDP || over.contains(key);
        let left = left.into_iter().map(|(key, asked)| Left { key, asked, is_over: is_over(&key, &asked) }).collect();
        Ok(Some((left, Arc::clone(sockets))))
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

/// Those of the sockets that what they asked for does not lead any more to where they send. A TCP connection to a host port is the pod's
/// own affair.
fn left(kernel: &Kernel, mut all: Vec<(SocketKey, Asked)>) -> Result<Vec<(SocketKey, Asked)>> {
    let is_to_host_port = |asked: &Asked| asked.backend == 0;
    let (ports, pods): (Entries, HashMap<IpAddr, Endpoint>) = if all.iter().any(|(_, asked)| is_to_host_port(asked)) {
        (kernel.host_ports.read()?, kernel.endpoints.read()?.into_iter().collect())
    } else {
        Default::default()
    };
    // Many sockets ask for few Services.
    let mut sets: HashMap<VipKey, Option<u32>> = HashMap::new();
    let mut failed = None;
    all.retain(|(key, asked)| {
        if is_to_host_port(asked) {
            return asked.proto == UDP && !leads_to_pod(&ports, &pods, key, asked);
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

/// True if the host port that a socket asked for leads to the pod that it sends to. As the programs look, also behind an entry that a
/// pod has left at this address.
fn leads_to_pod(ports: &Entries, pods: &HashMap<IpAddr, Endpoint>, key: &SocketKey, asked: &Asked) -> bool {
    let at = |addr| ports.get(&HostPortKey { addr, port: asked.port, proto: asked.proto, pad: 0 });
    let lives = |it: &&HostPort| pods.get(&IpAddr::from(it.pod)).is_some_and(|pod| pod.ifindex == it.ifindex);
    let entry = [asked.addr, any(asked.addr.is_v4())].into_iter().filter_map(at).find(lives);
    entry.is_some_and(|it| (it.pod, it.port) == (key.addr, key.port))
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

#[cfg(test)]
mod tests {
    use super::{Asked, Endpoint, Entries, HostPort, HostPortKey, IpAddr, SocketKey, UDP, any, leads_to_pod};
    use bytemuck::Zeroable;
    use rustnet_common::addr::Addr;
    use std::collections::HashMap;

    #[test]
    fn a_host_port_leads_to_the_first_pod_that_lives() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let (node, left, living) = (ip("192.0.2.1"), ip("10.1.1.5"), ip("10.1.1.6"));
        let pods: HashMap<_, _> = [(living, Endpoint { ifindex: 6, ..Endpoint::zeroed() })].into();
        let entry = |addr, pod: IpAddr, ifindex| {
            let key = HostPortKey { addr, port: 53, proto: UDP, pad: 0 };
            (key, HostPort { pod: pod.into(), ifindex, port: 5353, pad: 0 })
        };
        let leads_to = |ports: &Entries, pod: IpAddr, port| {
            let key = SocketKey { addr: pod.into(), port, ..SocketKey::zeroed() };
            leads_to_pod(ports, &pods, &key, &Asked { addr: node.into(), port: 53, proto: UDP, ..Asked::zeroed() })
        };
        let (at_node, at_all) = (Addr::from(node), any(true));
        let ports: Entries = [entry(at_node, left, 5), entry(at_all, living, 6)].into();
        assert!(leads_to(&ports, living, 5353) && !leads_to(&ports, living, 53) && !leads_to(&ports, left, 5353));
        // The address was given to another pod since.
        let ports: Entries = [entry(at_node, living, 7)].into();
        assert!(!leads_to(&ports, living, 5353));
        // One that lives at the address itself comes first.
        let ports: Entries = [entry(at_node, living, 6), entry(at_all, left, 5)].into();
        assert!(leads_to(&ports, living, 5353));
    }
}
