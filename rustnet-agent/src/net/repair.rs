//! Brings the host's network to what rustnet needs: looks, compares, changes what is ours, and says what it did.
//!
//! Each step is tried even when another failed; a host with one broken corner keeps the rest.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use ipnet::IpNet;
use rustnet_common::files::EndpointFile;
use rustnet_common::names::{OVERLAY_DEV, VETH_PREFIX};

use super::host::Host;
use super::link::{self, Link};
use super::netlink::Socket;
use super::overlay::{self, Change, Ensured, Spec};
use super::plan::Facts;
use super::route::Target;
use super::{endpoints, journal, neighbour, route, sysctl};
use crate::failure::{Failure, Scope};
use crate::host::{Device, DeviceKind};
use crate::model::Family;
use crate::ways::{Uplink, Ways};

/// Settings of the overlay device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overlay {
    /// UDP port.
    pub port: u16,
    /// MAC.
    pub mac: [u8; 6],
}

/// What there should be, from configuration and cluster.
pub struct Wanted<'a> {
    /// This node's place and the ways to all others.
    pub ways: &'a Ways,
    /// `None` in native routing.
    pub overlay: Option<Overlay>,
    /// Ranges that this node's pods come from.
    pub own_pod_cidrs: &'a [IpNet],
    /// The ranges that Services' addresses come from, as far as they are configured.
    pub service_cidrs: &'a [IpNet],
    /// False until all nodes are known: then nothing is deleted.
    pub is_complete: bool,
}

/// The overlay device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OverlayDevice {
    /// Its index.
    pub index: u32,
    /// Its MTU.
    pub mtu: u32,
    /// False while nothing verifies yet what comes out of it.
    pub is_up: bool,
}

/// The host as it is after a repair.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// All interfaces, addresses and routes, as found.
    pub host: Host,
    /// The devices towards the other nodes and the world.
    pub uplinks: Vec<Uplink>,
    /// The overlay device, where there is one.
    pub overlay: Option<OverlayDevice>,
    /// The pods' records.
    pub endpoints: Vec<EndpointFile>,
    /// What was changed, for the log.
    pub changed: Vec<String>,
    /// What is wrong and was worked around.
    pub problems: Vec<String>,
    /// What failed.
    pub failures: Vec<Failure>,
}

/// The side of the host's network that is ours.
pub struct Repairer {
    socket: Socket,
    sysctl_dir: PathBuf,
    run_dir: PathBuf,
    /// The uplinks of the last look that found any.
    uplinks: Vec<Uplink>,
}

impl Repairer {
    /// Works in the network namespace of the calling thread; `sysctl_dir` is that namespace's `/proc/sys/net`, writable.
    pub fn new(run_dir: &Path, sysctl_dir: &Path) -> Result<Self> {
        let socket = Socket::open().context("opening a netlink socket")?;
        let (sysctl_dir, run_dir) = (sysctl_dir.to_owned(), run_dir.to_owned());
        Ok(Self { socket, sysctl_dir, run_dir, uplinks: Vec::new() })
    }

    /// The socket, for other requests.
    pub fn socket(&mut self) -> &mut Socket {
        &mut self.socket
    }

    /// Prepares the overlay device and the sysctls of this host.
    pub fn prepare(&mut self, host: Host, wanted: &Wanted<'_>) -> Result<State> {
        let uplinks = self.uplinks(&host, wanted);
        let mut state = State { host, uplinks, ..State::default() };
        let records = endpoints::read(&self.run_dir)?;
        state.endpoints = records.endpoints;
        state.problems = records.problems;
        state.problems.extend(wanted.ways.place.problems.iter().cloned());
        if let Some(overlay) = wanted.overlay {
            self.overlay(&mut state, overlay, wanted);
        }
        let veths = veth_names(&state.host.links, &state.endpoints);
        let has_overlay = state.overlay.is_some();
        let wanted_sysctls = sysctl::wanted(&devices(&state.host, &state.uplinks, wanted.ways, has_overlay, veths));
        let mut changed = Vec::new();
        for done in [
            sysctl::relax(&self.sysctl_dir, &mut changed),
            sysctl::apply(&self.sysctl_dir, &wanted_sysctls, &mut changed),
        ] {
            state.failures.extend(done.err().map(|e| Failure::new(Scope::Node, &e)));
        }
        // Without the record the settings stay at the removal; nothing else depends on it.
        if let Err(e) = journal::record(&self.run_dir, &changed) {
            state.problems.push(format!("{e:#}"));
        }
        state.changed.extend(changed.iter().map(ToString::to_string));
        Ok(state)
    }

    /// The uplinks. Those of before that have no address at the moment, as between two leases, keep their programs: when the
    /// address comes back, packets must not come in unverified. A port of a bridge gets none back: its packets are the bridge's.
    fn uplinks(&mut self, host: &Host, wanted: &Wanted<'_>) -> Vec<Uplink> {
        let found = &wanted.ways.place.uplinks;
        let facts = host.facts();
        let is_found = |uplink: &Uplink| found.iter().any(|it| it.ifindex == uplink.ifindex);
        let may_return = |it: &Device| it.kind == DeviceKind::Ethernet && it.networks().is_empty();
        let is_bare = |uplink: &Uplink| facts.device(uplink.ifindex).is_some_and(may_return);
        let kept = self.uplinks.iter().filter(|it| !is_found(it) && (found.is_empty() || is_bare(it)));
        let kept = kept.filter(|it| host.links.iter().any(|link| link.index == it.ifindex)).cloned();
        self.uplinks = found.iter().cloned().chain(kept).collect();
        self.uplinks.clone()
    }

    /// Sets the overlay device up if it is down and `is_verified`, then routes and neighbours.
    /// `is_verified`: `overlay_in` is attached, so that no tunnel packet gets past it. Until then
    /// there are no routes through a device that is down.
    pub fn connect(&mut self, state: &mut State, wanted: &Wanted<'_>, is_verified: bool) {
        if let (Some(device), Some(overlay)) = (state.overlay, &wanted.overlay)
            && !device.is_up
            && is_verified
        {
            let done = link::raise(&mut self.socket, device.index, overlay.port);
            state.overlay = Some(OverlayDevice { is_up: done.is_ok(), ..device });
            state.note(Scope::Node, done.map(|()| true), || format!("{OVERLAY_DEV}: up"));
        }
        if state.is_connected(wanted.overlay.is_some()) {
            self.routes(state, wanted);
        }
    }

    fn overlay(&mut self, state: &mut State, overlay: Overlay, wanted: &Wanted<'_>) {
        let ways = wanted.ways;
        let there = state.host.links.iter().find(|link| link.name == OVERLAY_DEV && link.vxlan.is_some());
        // Before this node's own object is known, and while the host has none of its addresses, the MTU could become another one
        // for a moment; and without any device towards other nodes there is none.
        let is_unsettled = ways.place.mtu == 0 || ways.place.is_nameless || !wanted.is_complete;
        if let Some(link) = there.filter(|_| is_unsettled) {
            state.overlay = Some(OverlayDevice { index: link.index, mtu: link.mtu, is_up: link.is_up() });
            return;
        }
        if ways.place.mtu == 0 {
            return;
        }
        let mtu = ways.place.mtu.saturating_sub(overlay::overhead(ways.overlay_family()));
        match overlay::ensure(&mut self.socket, &Spec { port: overlay.port, mtu, mac: overlay.mac }) {
            Ok(Ensured { index, change, is_up }) => {
                state.overlay = Some(OverlayDevice { index, mtu, is_up });
                if change != Change::None {
                    state.changed.push(format!("{OVERLAY_DEV}: {}", word(change)));
                }
            }
            Err(e) => state.failures.push(Failure::new(Scope::Node, &e)),
        }
    }

    fn routes(&mut self, state: &mut State, wanted: &Wanted<'_>) {
        let facts = Facts {
            ways: wanted.ways,
            own_pod_cidrs: wanted.own_pod_cidrs,
            is_complete: wanted.is_complete,
            overlay: state.overlay.map(|device| device.index),
            service_cidrs: wanted.service_cidrs,
            endpoints: &state.endpoints,
        };
        let desired = facts.desired(&state.host.links);
        state.problems.extend(desired.problems.iter().cloned());
        // A new overlay device takes its predecessor's routes along. A sysctl that turns IPv6 off takes its routes along. List them
        // again after a change.
        let is_as_observed = state.changed.is_empty() && state.failures.is_empty();
        let observed = is_as_observed.then(|| Ok(std::mem::take(&mut state.host.routes)));
        let routes = observed.unwrap_or_else(|| route::list(&mut self.socket));
        let neighbours = neighbour::list(&mut self.socket);
        let (routes, neighbours) = match (routes, neighbours) {
            (Ok(routes), Ok(neighbours)) => (routes, neighbours),
            (Err(e), _) | (_, Err(e)) => return state.failures.push(Failure::new(Scope::Node, &e)),
        };
        state.host.routes = routes;
        let changes = desired.changes(&state.host, &neighbours);
        for neighbour in &changes.neighbours {
            let done = neighbour::put(&mut self.socket, neighbour).map(|()| true);
            let done = link::unless_gone(&mut self.socket, neighbour.ifindex, done, false);
            state.note(Scope::Pod, done, || format!("neighbour {} added", neighbour.ip));
        }
        for (route, replace) in &changes.add {
            let mut done = route::add(&mut self.socket, route, *replace).map(|()| true);
            if let Target::Via { oif, .. } = route.target {
                done = link::unless_gone(&mut self.socket, oif, done, false);
            }
            let scope = if route.target == Target::Unreachable { Scope::Node } else { Scope::Peer };
            state.note(scope, done, || {
                format!("route to {} {}", route.dst, if *replace { "repaired" } else { "added" })
            });
        }
        for route in changes.delete.iter().filter(|_| wanted.is_complete) {
            let done = route::delete(&mut self.socket, route);
            state.note(Scope::Peer, done, || format!("route to {} removed", route.dst));
        }
    }
}

impl State {
    fn note(&mut self, scope: Scope, done: Result<bool>, what: impl FnOnce() -> String) {
        match done {
            Ok(true) => self.changed.push(what()),
            Ok(false) => {}
            Err(e) => self.failures.push(Failure::new(scope, &e)),
        }
    }

    /// True if packets can be sent to other nodes: by routes, or by an overlay device that is up.
    pub fn is_connected(&self, has_overlay: bool) -> bool {
        !has_overlay || self.overlay.is_some_and(|device| device.is_up)
    }

    /// Indexes of the pods' veths that exist, with their names.
    pub fn pod_veths(&self) -> BTreeMap<u32, &str> {
        let ours = self.host.links.iter().filter(|link| link.name.starts_with(VETH_PREFIX));
        ours.map(|link| (link.index, link.name.as_str())).collect()
    }
}

/// The devices that sysctls depend on. Others with an IPv6 default route count: forwarding makes the kernel ignore the router
/// advertisements that it may come from.
pub fn devices(host: &Host, uplinks: &[Uplink], ways: &Ways, has_overlay: bool, veths: Vec<String>) -> sysctl::Devices {
    let facts = host.facts();
    let is_router = |index| facts.defaults.iter().any(|it| it.family == Family::V6 && it.device == index);
    let is_other = |index| !uplinks.iter().any(|it| it.ifindex == index);
    let others = facts.devices.iter().filter(|it| it.kind != DeviceKind::Internal);
    let others = others.filter(|it| is_router(it.index) && is_other(it.index));
    sysctl::Devices {
        uplinks: uplinks.iter().map(|it| it.name.clone()).collect(),
        others: others.map(|it| it.name.clone()).collect(),
        overlay: has_overlay.then(|| OVERLAY_DEV.to_owned()),
        veths,
        is_multi_homed: uplinks.len() > 1,
        has_ipv6_pods: ways.has_pods(Family::V6),
    }
}

fn veth_names(links: &[Link], endpoints: &[EndpointFile]) -> Vec<String> {
    let exists = |e: &&EndpointFile| links.iter().any(|l| l.index == e.ifindex && l.name == e.host_ifname);
    endpoints.iter().filter(exists).map(|e| e.host_ifname.clone()).collect()
}

fn word(change: Change) -> &'static str {
    match change {
        Change::None => "unchanged",
        Change::Configured => "set up as it should be",
        Change::Created => "created",
        Change::Replaced => "replaced, its kind or port was another",
    }
}
