//! Brings the host's network to what rustnet needs: looks, compares, changes what is ours, and says what it did.
//!
//! Each step is tried even when another failed; a host with one broken corner keeps the rest.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use ipnet::IpNet;
use rustnet_common::files::EndpointFile;
use rustnet_common::names::{OVERLAY_DEV, VETH_PREFIX};

use super::link::{self, Link};
use super::netlink::Socket;
use super::overlay::{self, Change, Ensured, Spec};
use super::plan::Facts;
use super::route::Target;
use super::uplink::{Host, Uplink};
use super::{endpoints, neighbour, route, sysctl};
use crate::config::Routing;
use crate::model::{Family, Node};

/// What there should be, from configuration and cluster.
pub struct Wanted<'a> {
    /// Names of the uplinks; empty for the default route's.
    pub uplinks: &'a [String],
    /// How pods of other nodes are reached.
    pub routing: Routing,
    /// Port and MAC of the overlay; `None` in native routing.
    pub overlay: Option<(u16, [u8; 6])>,
    /// This node's own object, once known.
    pub own: Option<&'a Node>,
    /// Ranges that this node's pods come from.
    pub own_pod_cidrs: &'a [IpNet],
    /// The other nodes.
    pub peers: Vec<&'a Node>,
    /// False until all nodes are known: then nothing is deleted.
    pub complete: bool,
}

/// The host as it is after a repair.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// All interfaces, addresses and routes, as found.
    pub host: Host,
    /// The devices towards the other nodes.
    pub uplinks: Vec<Uplink>,
    /// Index and MTU of the overlay device.
    pub overlay: Option<(u32, u32)>,
    /// True while the overlay device is down, because nothing verifies yet what comes out of it.
    pub overlay_down: bool,
    /// The pods' records.
    pub endpoints: Vec<EndpointFile>,
    /// What was changed, for the log.
    pub changed: Vec<String>,
    /// What is wrong and was worked around.
    pub problems: Vec<String>,
    /// What failed.
    pub errors: Vec<String>,
}

/// The side of the host's network that is ours.
pub struct Repairer {
    socket: Socket,
    sysctl_dir: PathBuf,
    run_dir: PathBuf,
}

/// The family of the addresses that nodes reach each other by: IPv4 where the uplinks have it.
pub fn underlay(uplinks: &[Uplink]) -> Family {
    let mut all = uplinks.iter().flat_map(|u| &u.addresses);
    if all.clone().next().is_some() && !all.any(|net| net.addr().is_ipv4()) { Family::V6 } else { Family::V4 }
}

impl Repairer {
    /// Works in the network namespace of the calling thread; `sysctl_dir` is that namespace's `/proc/sys/net`, writable.
    pub fn new(run_dir: &Path, sysctl_dir: &Path) -> Result<Self> {
        let socket = Socket::open().context("opening a netlink socket")?;
        Ok(Self { socket, sysctl_dir: sysctl_dir.to_owned(), run_dir: run_dir.to_owned() })
    }

    /// The socket, for other requests.
    pub fn socket(&mut self) -> &mut Socket {
        &mut self.socket
    }

    /// Observes the host, prepares the overlay device and the sysctls. Fails only when it cannot
    /// observe, or finds no uplink.
    pub fn prepare(&mut self, wanted: &Wanted<'_>) -> Result<State> {
        let host = Host::observe(&mut self.socket)?;
        let uplinks = host.uplinks(wanted.uplinks)?;
        let mut state = State { host, uplinks, ..State::default() };
        let records = endpoints::read(&self.run_dir)?;
        state.endpoints = records.endpoints;
        state.problems = records.problems;
        if let Some((port, mac)) = wanted.overlay {
            self.overlay(&mut state, port, mac);
        }
        let veths = veth_names(&state.host.links, &state.endpoints);
        let overlay_name = state.overlay.map(|_| OVERLAY_DEV);
        let names: Vec<_> = state.uplinks.iter().map(|u| u.name.clone()).collect();
        let wanted_sysctls = sysctl::wanted(&names, overlay_name, &veths);
        for done in [sysctl::relax(&self.sysctl_dir), sysctl::apply(&self.sysctl_dir, &wanted_sysctls)] {
            match done {
                Ok(changed) => state.changed.extend(changed),
                Err(e) => state.errors.push(format!("{e:#}")),
            }
        }
        Ok(state)
    }

    /// Sets the overlay device up if it is down and `is_verified`, then routes and neighbours.
    /// `is_verified`: `overlay_in` is attached, so that no tunnel packet gets past it. Until then
    /// there are no routes through a device that is down.
    pub fn connect(&mut self, state: &mut State, wanted: &Wanted<'_>, is_verified: bool) {
        if let (Some((index, _)), Some((port, _)), true, true) =
            (state.overlay, wanted.overlay, state.overlay_down, is_verified)
        {
            let done = link::raise(&mut self.socket, index, port);
            state.overlay_down = done.is_err();
            state.note(done.map(|()| true), || format!("{OVERLAY_DEV}: up"));
        }
        if wanted.overlay.is_none() || (state.overlay.is_some() && !state.overlay_down) {
            self.routes(state, wanted);
        }
    }

    fn overlay(&mut self, state: &mut State, port: u16, mac: [u8; 6]) {
        let Some(uplink_mtu) = state.uplinks.iter().map(|u| u.mtu).min() else { return };
        let mtu = uplink_mtu.saturating_sub(overlay::overhead(underlay(&state.uplinks)));
        match overlay::ensure(&mut self.socket, &Spec { port, mtu, mac }) {
            Ok(Ensured { index, change, is_up }) => {
                state.overlay = Some((index, mtu));
                state.overlay_down = !is_up;
                if change != Change::None {
                    state.changed.push(format!("{OVERLAY_DEV}: {}", word(change)));
                }
            }
            Err(e) => state.errors.push(format!("{e:#}")),
        }
    }

    fn routes(&mut self, state: &mut State, wanted: &Wanted<'_>) {
        let facts = Facts {
            own: wanted.own,
            own_pod_cidrs: wanted.own_pod_cidrs,
            peers: wanted.peers.clone(),
            routing: wanted.routing,
            overlay: state.overlay.map(|(index, _)| index),
            uplinks: &state.uplinks,
            endpoints: &state.endpoints,
        };
        let desired = facts.desired(&state.host.links);
        state.problems.extend(desired.problems.iter().cloned());
        // A new overlay device takes its predecessor's routes along: look again.
        let routes = route::list(&mut self.socket);
        let neighbours = neighbour::list(&mut self.socket);
        let (routes, neighbours) = match (routes, neighbours) {
            (Ok(routes), Ok(neighbours)) => (routes, neighbours),
            (Err(e), _) | (_, Err(e)) => return state.errors.push(format!("{e:#}")),
        };
        state.host.routes = routes;
        let changes = desired.changes(&state.host, &neighbours);
        for neighbour in &changes.neighbours {
            let done = neighbour::put(&mut self.socket, neighbour).map(|()| true);
            let done = link::unless_gone(&mut self.socket, neighbour.ifindex, done, false);
            state.note(done, || format!("neighbour {} added", neighbour.ip));
        }
        for (route, replace) in &changes.add {
            let mut done = route::add(&mut self.socket, route, *replace).map(|()| true);
            if let Target::Via { oif, .. } = route.target {
                done = link::unless_gone(&mut self.socket, oif, done, false);
            }
            state.note(done, || format!("route to {} {}", route.dst, if *replace { "repaired" } else { "added" }));
        }
        for route in changes.delete.iter().filter(|_| wanted.complete) {
            let done = route::delete(&mut self.socket, route);
            state.note(done, || format!("route to {} removed", route.dst));
        }
    }
}

impl State {
    fn note(&mut self, done: Result<bool>, what: impl FnOnce() -> String) {
        match done {
            Ok(true) => self.changed.push(what()),
            Ok(false) => {}
            Err(e) => self.errors.push(format!("{e:#}")),
        }
    }

    /// The smallest MTU of the uplinks.
    pub fn uplink_mtu(&self) -> u32 {
        self.uplinks.iter().map(|u| u.mtu).min().unwrap_or(0)
    }

    /// Indexes of the pods' veths that exist, with their names.
    pub fn pod_veths(&self) -> BTreeMap<u32, &str> {
        let ours = self.host.links.iter().filter(|link| link.name.starts_with(VETH_PREFIX));
        ours.map(|link| (link.index, link.name.as_str())).collect()
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
