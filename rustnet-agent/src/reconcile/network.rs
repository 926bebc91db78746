//! The look at the host's network, in a thread of its own, and what the loop repairs by it: devices, sysctls, hooks, routes and
//! neighbours, pods' entries.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use rustnet_common::endpoint::Endpoint;
use rustnet_common::files::{EndpointFile, IPAM_DIR};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::kernel::Kernel;
use super::overlay_path::Choice;
use super::{Datapath, NET_PERIOD, Reconciler, install_cni_binary, node};
use crate::bpf::store::host_ports;
use crate::cni_order;
use crate::failure::{Failure, Scope};
use crate::net::host::Host;
use crate::net::ipsec::Ipsec;
use crate::net::overlay::mac_of;
use crate::net::repair::{Overlay, Wanted};
use crate::source::Kind;

/// A function that looks at the host's network.
pub type Observe = Arc<dyn Fn() -> Result<Host> + Send + Sync>;

/// A look at the host's network that is under way, in a thread of its own: hosts with a million routes exist. The threads of the
/// runtime's pool are few, and look-ups of names can take all of them for long.
pub struct Look {
    /// When it began.
    pub began: Instant,
    before: Before,
    host: oneshot::Receiver<(Result<Host>, Duration)>,
}

/// What has to be read before the host's network is: what comes in between must not seem to be left over.
pub struct Before {
    /// All pods that are added from now on get the present programs, or are found by the look.
    is_pinned: bool,
    /// See [`Kernel::repair_endpoints`] and [`Kernel::repair_host_ports`]; `None` while there are no maps.
    pods: Option<(Vec<(IpAddr, Endpoint)>, host_ports::Entries)>,
}

/// What the look that is under way has found, and how long that took. Never ready without one.
pub async fn observed(look: &mut Option<Look>) -> (Result<Host>, Duration) {
    let Some(look) = look else { return std::future::pending().await };
    let panicked = |_| (Err(anyhow!("the look at the host's network has panicked")), look.began.elapsed());
    (&mut look.host).await.unwrap_or_else(panicked)
}

impl Reconciler {
    /// Begins to look at the host's network; [`Self::end_look`] follows.
    pub(super) fn begin_look(&mut self) {
        self.network.begin();
        match self.read_before().and_then(|before| Ok((before, self.observe()?))) {
            Ok((before, host)) => self.look = Some(Look { began: Instant::now(), before, host }),
            Err(error) => self.finish_network(vec![Failure::new(Scope::Node, &error)]),
        }
    }

    fn observe(&self) -> Result<oneshot::Receiver<(Result<Host>, Duration)>> {
        let (sender, host) = oneshot::channel();
        let observe = Arc::clone(&self.observe);
        let look = move || {
            let began = std::time::Instant::now();
            let found = observe();
            // A loop that has ended needs it no more.
            let _ = sender.send((found, began.elapsed()));
        };
        let thread = std::thread::Builder::new().name("look".to_owned()).spawn(look);
        thread.context("no thread to look at the host's network; raise the limit of tasks")?;
        Ok(host)
    }

    /// What to report of a look that takes too long. Its thread waits for the kernel.
    pub(super) fn stuck_look(&self) -> Option<String> {
        let limit = self.look_limit;
        let is_stuck = self.look.as_ref().is_some_and(|look| look.began.elapsed() >= limit);
        is_stuck.then(|| {
            format!(
                "the kernel has not listed the host's network within {limit:?}: look for tasks that wait for the RTNL lock \
                 (`echo w > /proc/sysrq-trigger`, then `dmesg`)"
            )
        })
    }

    /// Brings the host's network and the hooks to what they should be.
    pub(super) fn end_look(&mut self, host: Result<Host>, took: Duration) {
        let Some(Look { before, .. }) = self.look.take() else { return };
        let began = Instant::now();
        let repaired = host.and_then(|host| self.repair_network(host, before));
        let failures = repaired.unwrap_or_else(|error| vec![Failure::new(Scope::Node, &error)]);
        self.net_took = took + began.elapsed();
        self.finish_network(failures);
    }

    fn finish_network(&mut self, failures: Vec<Failure>) {
        // Files are looked after like devices and routes: what somebody deleted is put back.
        self.files.distrust();
        self.presence.want_unless_failed(Duration::ZERO);
        self.want_sockets();
        let is_complete = self.index.has_synced(Kind::Node);
        let is_upgrading = failures.is_empty() && is_complete && self.is_upgrading();
        let next = if is_upgrading { Duration::ZERO } else { NET_PERIOD };
        self.network.finish(failures, Some(Instant::now() + next));
        if std::mem::take(&mut self.is_net_changed) {
            self.net_changed();
        }
    }

    fn read_before(&self) -> Result<Before> {
        let kernel = self.datapath.as_ref().map(|it| &it.kernel);
        let is_pinned = kernel.is_some_and(Kernel::is_pinned);
        let read = |it: &Kernel| Ok::<_, anyhow::Error>((it.endpoints.read()?, it.host_ports.read()?));
        Ok(Before { is_pinned, pods: kernel.map(read).transpose()? })
    }

    /// Looks and repairs in one go.
    pub(super) fn repair_at_once(&mut self) -> Result<Vec<Failure>> {
        let before = self.read_before()?;
        let host = Host::observe(self.repairer.socket())?;
        self.repair_network(host, before)
    }

    /// Returns what failed and left the rest standing.
    fn repair_network(&mut self, host: Host, before: Before) -> Result<Vec<Failure>> {
        let facts = host.facts();
        let own_addresses = facts.own_addresses();
        if self.index.set_host(facts) {
            self.maps.want_unless_failed(Duration::ZERO);
        }
        self.ways_seen = self.index.ways_version();
        let ways = self.index.ways();
        let own = self.index.own_node();
        let own_pod_cidrs = self.index.settings().own_pod_cidrs(own);
        let is_complete = self.index.has_synced(Kind::Node);
        let overlay = Overlay { port: self.config.overlay_port, mac: mac_of(&self.config.node_name) };
        let wanted = Wanted {
            ways: &ways,
            overlay: self.config.routing.has_overlay().then_some(overlay),
            own_pod_cidrs,
            service_cidrs: &self.config.service_cidrs,
            is_complete,
        };
        let mut state = self.repairer.prepare(host, &wanted)?;
        let mut failures = Vec::new();
        let mut done = Vec::new();
        let mut is_overlay_verified = false;
        let local_ports = node::local_ports()?;
        // Now, not when the look began: what was heard meanwhile is done.
        let choice = Choice::new(self.config.overlay_path, Ipsec::read());
        let mut written = None;
        if let Some(Datapath { kernel, .. }) = &mut self.datapath {
            let has_external = self.index.has_external();
            let (overlay, path) = (state.overlay, choice.path());
            let mut config =
                node::config(&self.config, &ways.place, overlay, path, kernel.hz, local_ports, has_external);
            self.external_seen = has_external;
            let before_now = kernel.config.read()?;
            node::keep_external(&mut config, &before_now);
            node::keep_addresses(&mut config, &before_now, &own_addresses, own.is_some());
            match kernel.attach(self.repairer.socket(), &config, &ways.place, &state, is_complete) {
                Ok(attached) => {
                    done.extend(attached.done);
                    if !before.is_pinned {
                        install_cni_binary(&self.config);
                    }
                    // Before all devices are known, programs of before are on some of them, with the earlier maps.
                    let is_on_all = is_complete
                        && !attached.failures.iter().any(|it| !matches!(it.scope, Scope::Peer | Scope::Speed));
                    if before.is_pinned && is_on_all && kernel.is_upgrading() {
                        match kernel.go_on_upgrading() {
                            Ok(changed) => done.extend(changed),
                            Err(error) => failures.push(Failure::new(Scope::Node, &error)),
                        }
                    }
                    failures.extend(attached.failures);
                    is_overlay_verified = attached.is_overlay_verified;
                    written = Some(state.overlay.map(|_| choice.clone()));
                }
                Err(error) => failures.push(Failure::new(Scope::Node, &error)),
            }
            // The programs may have been loaded since the look began.
            if let Some((endpoints, host_ports)) = before.pods {
                let repairs =
                    [kernel.repair_endpoints(&endpoints, &state), kernel.repair_host_ports(&host_ports, &state)];
                for repaired in repairs {
                    match repaired {
                        Ok(changed) => done.extend(changed),
                        Err(error) => failures.push(Failure::new(Scope::Pod, &error)),
                    }
                }
            }
        }
        self.repairer.connect(&mut state, &wanted, is_overlay_verified);
        // While no device leads to other nodes, pods get the MTU of before.
        match state.overlay.map_or(ways.place.mtu, |device| device.mtu) {
            0 => {}
            _ if ways.place.is_nameless && self.room != 0 => {}
            room => self.room = room,
        }
        self.routed |= is_complete && state.is_connected(wanted.overlay.is_some());
        failures.append(&mut state.failures);
        if state.uplinks.is_empty() {
            // A node that never had one. Where one is away for a while, pods of this node go on.
            let why = ways.place.problems.join("; ");
            failures.push(Failure { scope: Scope::Node, message: why });
        }
        done.append(&mut state.changed);
        for what in done {
            tracing::info!("{what}");
        }
        let leased = |ip: &IpAddr| self.config.run_dir.join(IPAM_DIR).join(ip.to_string()).exists();
        state.problems.extend(node::outsiders(&self.config.node_name, &state.endpoints, own_pod_cidrs, leased));
        state.problems.extend(node::shared_ports(&self.config, local_ports));
        state.problems.extend(node::too_small(&self.config, self.room, &ways));
        state.problems.extend(state.overlay.and_then(|_| choice.problem()));
        state.problems.extend(self.config.cni_conf_dir.iter().flat_map(|dir| cni_order::instead_of_ours(dir)));
        let has_ports = |record: &&EndpointFile| !record.host_ports.is_empty();
        let holders = state.endpoints.iter().filter(has_ports).flat_map(|record| record.addresses.iter().copied());
        self.index.set_port_holders(holders.collect());
        self.host_problems = Some(state.problems);
        self.records = Some(state.endpoints);
        self.policies.job.want_unless_failed(Duration::ZERO);
        self.report.want(Duration::ZERO);
        if let Some(choice) = written {
            self.note_choice(choice);
        }
        Ok(failures)
    }

    /// The host's IPsec policies have changed, and with them, maybe, who writes the overlay's headers. A whole look may have to wait
    /// for long on a host with many routes.
    pub(super) fn policies_changed(&mut self) {
        // Before, the programs have no settings, and the first look asks.
        let (Some(Datapath { kernel, .. }), Some(_)) = (&self.datapath, &self.choice) else { return };
        let choice = Choice::new(self.config.overlay_path, Ipsec::read());
        match kernel.config.set_encapsulate(choice.is_programs()) {
            Ok(_) if choice.problem().is_none() => self.note_choice(Some(choice)),
            Ok(_) => self.net_changed(),
            Err(error) => {
                tracing::warn!("overlay path: {error:#}; the next look at the host's network tries again");
                self.net_changed();
            }
        }
    }

    /// Notes who writes the overlay's headers, as the programs' settings say; `None` if there is no overlay.
    fn note_choice(&mut self, choice: Option<Choice>) {
        let path = |choice: &Option<Choice>| choice.as_ref().map(Choice::path);
        if path(&choice) != path(&self.choice)
            && let Some(choice) = &choice
        {
            tracing::info!("overlay path: {choice}");
        }
        self.health.metrics.set_overlay_path(path(&choice));
        self.choice = choice;
    }
}
