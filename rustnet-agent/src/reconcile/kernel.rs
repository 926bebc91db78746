//! Everything of the kernel that the loop holds once the programs are loaded: programs, stores, hooks.

mod express;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use rustnet_common::config::NodeConfig;
use rustnet_common::drop::hook;
use rustnet_common::endpoint::Endpoint;
use rustnet_common::files::EndpointFile;
use rustnet_common::host_port::HostPortKey;
use rustnet_common::names::{self, LINKS_DIR, OVERLAY_DEV, PROGRAMS, VETH_PREFIX};
use rustnet_common::socket;
use rustnet_common::tuple::proto;
use tokio::task::JoinSet;

use super::namespaces::Namespaces;
use crate::bpf::attach::{self, Device, Direction, Outcome};
use crate::bpf::load::{CLOCK, Load, Programs};
use crate::bpf::log::Packets;
use crate::bpf::store::conntrack::Conntrack;
use crate::bpf::store::counters::Counters;
use crate::bpf::store::devices::Devices;
use crate::bpf::store::endpoints::{self, Endpoints};
use crate::bpf::store::host_ports::{self, HostPorts};
use crate::bpf::store::node_config::NodeConfigStore;
use crate::bpf::store::policy::PolicyStore;
use crate::bpf::store::sockets::Sockets;
use crate::bpf::store::{BpfMaps, fill};
use crate::bpf::upgrade::Bridge;
use crate::bpf::{cgroup, load, object, pin, probe, xdp};
use crate::config::{Config, MapSizes, PacketLog, SocketLb, Xdp};
use crate::failure::{Failure, Scope};
use crate::metrics::{HookCount, KernelStats, MapFill};
use crate::net::endpoints::parse_mac;
use crate::net::netlink::Socket;
use crate::net::repair::{OverlayDevice, State};
use crate::net::{link, netns, tc};
use crate::v1file;
use crate::ways::{Place, Uplink};

/// Programs and stores.
pub struct Kernel {
    bpffs: PathBuf,
    run_dir: PathBuf,
    sizes: MapSizes,
    packet_log: PacketLog,
    xdp: Xdp,
    programs: Programs,
    pinned: bool,
    /// The programs are those of the second load of an upgrade.
    has_upgraded: bool,
    /// Prints the packet log of `programs`.
    printer: JoinSet<()>,
    /// The plan's maps.
    pub maps: BpfMaps,
    /// The maps of network policies.
    pub policies: PolicyStore,
    /// The programs' settings.
    pub config: NodeConfigStore,
    /// The pods of this node.
    pub endpoints: Endpoints,
    /// The ports of this node that pods have.
    pub host_ports: HostPorts,
    devices: Devices,
    /// The control group whose sockets ask for Services, and the maps of these; `None` without socket load-balancing.
    sockets: Option<(PathBuf, Arc<Sockets>)>,
    /// Timer ticks in a second.
    pub hz: u32,
}

/// The result of [`Kernel::attach`].
pub struct Attached {
    /// What was changed, for the log.
    pub done: Vec<String>,
    /// What failed.
    pub failures: Vec<Failure>,
    /// `overlay_in` is on the overlay device, which may be up from now on.
    pub is_overlay_verified: bool,
}

impl Kernel {
    /// Loads the programs while the earlier ones run, and opens their maps.
    pub fn load(config: &Config) -> Result<Self> {
        let has_sockets = config.socket_lb != SocketLb::Off;
        let has_xdp = config.xdp != Xdp::Off;
        let mut programs = load(&config.bpffs, &config.maps, &config.bpf_log, has_sockets, has_xdp)?.run()?;
        let printer = print_log(&mut programs);
        let maps = programs.maps_dir(&config.bpffs);
        let policies = PolicyStore::open(maps)?;
        if programs.has_stale_policies() {
            // Before these programs are on a hook: they would close each pod that has come since.
            policies.switch_off()?;
        }
        Ok(Self {
            bpffs: config.bpffs.clone(),
            run_dir: config.run_dir.clone(),
            sizes: config.maps,
            packet_log: config.bpf_log.clone(),
            xdp: config.xdp,
            pinned: false,
            has_upgraded: false,
            printer,
            maps: BpfMaps::open(maps)?,
            policies,
            config: NodeConfigStore::open(maps)?,
            endpoints: Endpoints::open(maps)?,
            host_ports: HostPorts::open(maps)?,
            devices: Devices::open(maps)?,
            sockets: has_sockets
                .then(|| Ok::<_, anyhow::Error>((config.cgroup.clone(), Arc::new(Sockets::open(maps)?))))
                .transpose()?,
            hz: probe::hz()?,
            programs,
        })
    }

    /// Where the maps are pinned at this moment.
    pub fn maps_dir(&self) -> &Path {
        self.programs.maps_dir(&self.bpffs)
    }

    /// True once the programs are pinned: pods that are added from now on get these.
    pub fn is_pinned(&self) -> bool {
        self.pinned
    }

    /// True while programs of an earlier agent, or those of a bridge, may be on hooks besides the present ones.
    pub fn is_upgrading(&self) -> bool {
        !self.pinned || self.has_earlier_tables()
    }

    /// True once an upgrade has come to its second load, which may not be on the hooks yet.
    pub fn has_upgraded(&self) -> bool {
        self.has_upgraded
    }

    /// True while the programs use the tables of an earlier agent, too.
    pub fn has_earlier_tables(&self) -> bool {
        let is_bridge = self.programs.bridge() != Bridge::None && !self.programs.is_export();
        self.programs.has_leftovers() || is_bridge
    }

    /// Loads programs with which an agent of v1 can start. They come onto the hooks like any others.
    /// False if there are none.
    pub fn begin_export(&mut self) -> Result<bool> {
        let sizes = v1file::read(&self.run_dir, &self.sizes);
        let Some(programs) = self.reload()?.run_for_v1(&sizes)? else { return Ok(false) };
        self.use_programs(programs);
        Ok(true)
    }

    fn reload(&self) -> Result<Load<'_>> {
        load(&self.bpffs, &self.sizes, &self.packet_log, self.sockets.is_some(), self.xdp != Xdp::Off)
    }

    /// Takes programs in the place of the present ones; they are not pinned yet.
    fn use_programs(&mut self, mut programs: Programs) {
        self.printer = print_log(&mut programs);
        self.programs = programs;
        self.pinned = false;
    }

    /// Pins the maps of v1, once the programs are on all hooks.
    pub fn finish_export(&self) -> Result<usize> {
        self.programs.finish_export(&self.bpffs)
    }

    /// Goes on with an upgrade from other maps, see [`crate::bpf::upgrade`]. To be called after a look at the host that began
    /// when the programs were pinned, and found them on all hooks. Returns what was done.
    pub fn go_on_upgrading(&mut self) -> Result<Vec<String>> {
        let mut done = Vec::new();
        if self.programs.has_leftovers() {
            let copied = self.programs.catch_up()?;
            if self.programs.bridge() == Bridge::V1 {
                v1file::write(&self.run_dir, &self.programs.earlier_sizes()?)?;
            }
            let removed = self.programs.clear_leftovers(&self.bpffs)?;
            done.push(format!("earlier maps removed: {}; {copied} connections copied at the end", removed.join(", ")));
        }
        if self.programs.bridge() != Bridge::None {
            let programs = self.reload()?.run_without_bridge()?;
            self.use_programs(programs);
            self.has_upgraded = true;
            done.push("programs loaded that use the new maps alone".to_owned());
        }
        Ok(done)
    }

    /// The program that tells the time.
    pub fn clock(&self) -> Result<OwnedFd> {
        self.programs.get(CLOCK)?.try_clone_to_owned().context("the clock program")
    }

    /// Writes the programs' settings, pins the programs and has them on all hooks. Nothing is removed from devices unless
    /// `is_complete`: before this node's own object is known, an uplink may not seem to be one.
    pub fn attach(
        &mut self,
        socket: &mut Socket,
        config: &NodeConfig,
        place: &Place,
        state: &State,
        is_complete: bool,
    ) -> Result<Attached> {
        // Settings first: a program must not run without them.
        let mut done = Vec::new();
        if self.config.write(config)? {
            done.push("settings of the programs written".to_owned());
        }
        // A device without an entry masquerades with the node's address: no reason to leave pods without programs.
        let mut failures = Vec::new();
        take(self.write_devices(place, state, is_complete), &mut done, &mut failures);
        if !self.may_have_xdp() {
            // An earlier program goes on with the earlier tables alone. A failure lets no upgrade go on to programs that do not have them.
            take(xdp::detach_others(&self.bpffs, &[]), &mut done, &mut failures);
        }
        if !self.pinned {
            self.programs.pin(&self.bpffs)?;
            self.pinned = true;
        }
        let first = self.first_uplink(state, is_complete);
        let hooks = device_hooks(state, place.side_devices.iter().filter(|_| is_complete), first);
        let mut is_overlay_verified = false;
        for hook in &hooks {
            let outcome = self.device_hook(socket, hook);
            match link::unless_gone(socket, hook.ifindex, outcome, Outcome::Unchanged) {
                Ok(outcome) => {
                    is_overlay_verified |= hook.program == hook::NAMES[usize::from(hook::OVERLAY_IN)];
                    if outcome != Outcome::Unchanged {
                        done.push(format!("{} on {}: {}", hook.program, hook.device, word(outcome)));
                    }
                }
                // Where answers to masqueraded packets are missed on a bridge of machines, all else works.
                Err(e) if hook.program == names::SIDE_IN => failures.push(Failure::new(Scope::Peer, &e)),
                Err(e) => failures.push(Failure::new(Scope::Node, &e)),
            }
        }
        if failures.is_empty() && is_complete {
            take(self.drop_other_links(&hooks), &mut done, &mut failures);
            take(self.drop_other_filters(socket, &hooks, state), &mut done, &mut failures);
        }
        // Only now is no earlier program on an uplink, which could be about to jump.
        let has_uplinks = failures.iter().all(|failure| failure.scope == Scope::Peer);
        if has_uplinks
            && is_complete
            && let Err(e) = self.programs.pin_tails(&self.bpffs)
        {
            failures.push(Failure::new(Scope::Node, &e));
        }
        take(self.drop_strays(&hooks), &mut done, &mut failures);
        for record in &state.endpoints {
            let hooks = self.pod_hooks(socket, record, state);
            match link::unless_gone(socket, record.ifindex, hooks, None) {
                Ok(None | Some(Outcome::Unchanged)) => {}
                Ok(Some(outcome)) => done.push(format!("{}: {}", record.host_ifname, word(outcome))),
                Err(e) => failures.push(Failure::new(Scope::Pod, &e)),
            }
        }
        // Last: the program takes for granted that all others use its tables.
        if self.may_have_xdp() {
            self.attach_xdp(socket, state, is_complete, &mut done, &mut failures);
        }
        Ok(Attached { done, failures, is_overlay_verified })
    }

    /// Writes the addresses of devices, and ends the masquerade of those that the host has no more. Before
    /// this node's own object is known, a device may seem to have another address: what is there stays.
    fn write_devices(&self, place: &Place, state: &State, is_complete: bool) -> Result<Option<String>> {
        let mut gone = self.devices.write(&place.sources, is_complete)?;
        let own = state.host.facts().own_addresses();
        gone.retain(|ip| !own.contains(ip));
        if gone.is_empty() {
            return Ok(None);
        }
        let forgotten = Conntrack::open(self.maps_dir())?.forget_sources(&gone)?;
        let gone: Vec<_> = gone.iter().map(ToString::to_string).collect();
        Ok(Some(format!("{}: not this host's any more; {forgotten} masqueraded flows forgotten", gone.join(", "))))
    }

    /// The uplink whose links are pinned without its index: the one that has them already, so that no uplink is without programs
    /// while their order changes.
    fn first_uplink(&self, state: &State, is_complete: bool) -> Option<u32> {
        let name = hook::NAMES[usize::from(hook::UPLINK_IN)];
        match attach::device_of(&attach::link_path(&self.bpffs, name, None)) {
            Some(device) if state.uplinks.iter().any(|it| it.ifindex == device) => Some(device),
            // It may turn out to be an uplink.
            Some(_) if !is_complete => None,
            // Nor does a device take a program twice: one with links of its own keeps them.
            _ => {
                state.uplinks.iter().find(|it| !self.has_link(name, Some(it.ifindex), it.ifindex)).map(|it| it.ifindex)
            }
        }
    }

    fn device_hook(&self, socket: &mut Socket, hook: &Hook<'_>) -> Result<Outcome> {
        let path = attach::link_path(&self.bpffs, hook.program, hook.further);
        let device = Device { name: hook.device, ifindex: hook.ifindex };
        if !self.has_link(hook.program, hook.further, hook.ifindex) {
            attach::adopt_other(&self.link_paths()?, &path, &device, hook.direction)?;
        }
        attach::device_hook(socket, &path, &device, hook.direction, self.programs.get(hook.program)?)
    }

    /// Takes programs off devices that an agent with other pins has left there.
    fn drop_strays(&self, hooks: &[Hook<'_>]) -> Result<Vec<String>> {
        // A link of our own that cannot be opened must not be taken for one of theirs.
        let kept = self.link_paths()?.iter().map(|path| attach::link_id_of(path)).collect::<Result<BTreeSet<_>>>()?;
        let mut done = Vec::new();
        for hook in hooks {
            let device = Device { name: hook.device, ifindex: hook.ifindex };
            let dropped = attach::drop_strays(&device, hook.direction, &kept)?;
            if dropped > 0 {
                done.push(format!(
                    "{dropped} programs taken off {}, whose pins are not in {}: was a BPF file system mounted over another?",
                    hook.device,
                    self.bpffs.display()
                ));
            }
        }
        Ok(done)
    }

    /// Removes the links of devices that are uplinks no more.
    fn drop_other_links(&self, hooks: &[Hook<'_>]) -> Result<Vec<String>> {
        let wanted: BTreeSet<_> = hooks.iter().map(|h| attach::link_path(&self.bpffs, h.program, h.further)).collect();
        let mut done = Vec::new();
        for path in self.link_paths()? {
            if !wanted.contains(&path) && pin::remove(&path)? {
                done.push(format!("{} removed: its device needs no program any more", path.display()));
            }
        }
        Ok(done)
    }

    /// The pins of links to devices that there are.
    fn link_paths(&self) -> Result<Vec<PathBuf>> {
        let dir = self.bpffs.join(LINKS_DIR);
        let entries = fs::read_dir(&dir).and_then(|entries| entries.map(|it| Ok(it?.path())).collect());
        let mut paths: Vec<_> = entries.with_context(|| format!("reading {}", dir.display()))?;
        paths.retain(|path| !cgroup::is_link(path) && !xdp::is_link(path));
        Ok(paths)
    }

    /// Has the programs of socket calls on the control group of all processes, and the sockets of this host and of these `pods` ask for
    /// Services; or nobody's. To be called once the programs are pinned.
    pub fn attach_sockets(&self, pods: Namespaces) -> Result<cgroup::Attached> {
        let Some((cgroup, sockets)) = &self.sockets else {
            let done = cgroup::detach(&self.bpffs)?.into_iter().collect();
            return Ok(cgroup::Attached { done, failures: Vec::new() });
        };
        let attach = || {
            let mut wanted = pods;
            // Last: no record of a pod makes the host's namespace another one.
            wanted.insert(netns::cookie()?, socket::netns::HOST);
            sockets.set_namespaces(&wanted)?;
            cgroup::attach(&self.bpffs, cgroup, |name| self.programs.optional(name))
        };
        attach().inspect_err(|_| {
            // Programs of before may be left with maps that nobody writes. The packet path works.
            if let Err(error) = cgroup::detach(&self.bpffs) {
                tracing::warn!("{error:#}");
            }
        })
    }

    /// The sockets that talk to backends; `None` without socket load-balancing.
    pub fn sockets(&self) -> Option<&Arc<Sockets>> {
        self.sockets.as_ref().map(|(_, sockets)| sockets)
    }

    /// Removes our filters from devices that need none. Where there is TCX, no device but the pods' needs one.
    fn drop_other_filters(&self, socket: &mut Socket, hooks: &[Hook<'_>], state: &State) -> Result<Vec<String>> {
        let mut done = Vec::new();
        for device in state.host.links.iter().filter(|link| !link.name.starts_with(VETH_PREFIX)) {
            for direction in Direction::BOTH {
                let is_here = |hook: &&Hook<'_>| hook.ifindex == device.index && hook.direction == direction;
                let wanted =
                    hooks.iter().filter(is_here).any(|hook| !self.has_link(hook.program, hook.further, hook.ifindex));
                if !wanted && tc::remove_filter(socket, device.index, direction)? {
                    done.push(format!("classifier removed from {}: it needs none any more", device.name));
                }
            }
        }
        Ok(done)
    }

    fn has_link(&self, program: &str, further: Option<u32>, ifindex: u32) -> bool {
        attach::device_of(&attach::link_path(&self.bpffs, program, further)) == Some(ifindex)
    }

    /// The programs of one pod; `None` if its veth is gone.
    fn pod_hooks(&self, socket: &mut Socket, record: &EndpointFile, state: &State) -> Result<Option<Outcome>> {
        if state.pod_veths().get(&record.ifindex) != Some(&record.host_ifname.as_str()) {
            return Ok(None);
        }
        let (from, to) = (self.programs.get(PROGRAMS[0])?, self.programs.get(PROGRAMS[1])?);
        attach::pod_hooks(socket, record.ifindex, from, to)
            .map(Some)
            .with_context(|| format!("pod interface {}", record.host_ifname))
    }

    /// Removes leftovers from `rn_endpoints` and puts back what got lost. `before`: its entries as read before `state` was
    /// observed, so that a pod that was added in between is not taken for a leftover.
    pub fn repair_endpoints(&self, before: &[(IpAddr, Endpoint)], state: &State) -> Result<Vec<String>> {
        let interfaces: BTreeSet<u32> = state.host.links.iter().map(|link| link.index).collect();
        let recorded: BTreeSet<IpAddr> = state.endpoints.iter().flat_map(|e| e.addresses.iter().copied()).collect();
        let mut done = Vec::new();
        for (ip, ifindex) in endpoints::stale(before, &interfaces, &recorded) {
            if self.endpoints.delete(ip, ifindex)? {
                done.push(format!("endpoint {ip} removed: it has neither interface nor record"));
            }
        }
        for (ip, endpoint) in lost(before, state) {
            let read = before.iter().find(|(there, _)| *there == ip).map(|(_, endpoint)| endpoint);
            if self.endpoints.put_back(ip, read, &endpoint)? {
                done.push(format!("endpoint {ip} put back"));
            }
        }
        Ok(done)
    }

    /// The same for `rn_host_ports`.
    pub fn repair_host_ports(&self, before: &host_ports::Entries, state: &State) -> Result<Vec<String>> {
        let interfaces = state.host.links.iter().map(|link| (link.index, link.name.as_str())).collect();
        let mut done = Vec::new();
        for change in host_ports::repair(before, &interfaces, &state.endpoints) {
            if self.host_ports.carry_out(&change)? {
                done.push(port_word(&change));
            }
        }
        Ok(done)
    }
}

/// What a change of a port's entry means, for the log.
fn port_word(change: &host_ports::Change) -> String {
    let HostPortKey { addr, port, proto, .. } = change.key;
    let at = format!("port {} {}", SocketAddr::new(addr.into(), port), proto::name(proto));
    match change.after {
        Some(value) => format!("{at} given to pod {}", IpAddr::from(value.pod)),
        None => format!("{at} given back: its pod has gone"),
    }
}

/// Adds what a step did to `done`, or its error to `failures`: the steps behind it do not depend on it.
fn take(step: Result<impl IntoIterator<Item = String>>, done: &mut Vec<String>, failures: &mut Vec<Failure>) {
    match step {
        Ok(changes) => done.extend(changes),
        Err(e) => failures.push(Failure::new(Scope::Node, &e)),
    }
}

fn load<'a>(bpffs: &'a Path, sizes: &MapSizes, log: &PacketLog, has_sockets: bool, has_xdp: bool) -> Result<Load<'a>> {
    Ok(Load { object: object::embedded()?, bpffs, sizes: load::sizes(sizes), log: log.clone(), has_sockets, has_xdp })
}

/// Prints the packet log of these programs, if it is on, until the result is dropped.
fn print_log(programs: &mut Programs) -> JoinSet<()> {
    programs.log.take().map(Packets::print).into_iter().collect()
}

/// Entries that should be there by record and interface.
fn lost(before: &[(IpAddr, Endpoint)], state: &State) -> Vec<(IpAddr, Endpoint)> {
    let known: BTreeMap<IpAddr, u32> = before.iter().map(|(ip, endpoint)| (*ip, endpoint.ifindex)).collect();
    let mut out = Vec::new();
    for record in &state.endpoints {
        let link = state.host.links.iter().find(|l| l.index == record.ifindex && l.name == record.host_ifname);
        let macs =
            link.and_then(|link| Some((parse_mac(&record.mac)?, <[u8; 6]>::try_from(link.mac.as_slice()).ok()?)));
        let Some((mac, host_mac)) = macs else { continue };
        // An entry that leads to another living interface is newer than the record.
        let lives = |index: &u32| state.host.links.iter().any(|l| l.index == *index);
        for ip in record.addresses.iter().filter(|ip| !known.get(ip).is_some_and(lives)) {
            let flags = record.bandwidth.endpoint_flags();
            out.push((*ip, Endpoint { ifindex: record.ifindex, identity: 0, mac, host_mac, flags, pad: 0 }));
        }
    }
    out
}

/// A program on a device.
struct Hook<'a> {
    program: &'static str,
    device: &'a str,
    /// The device's index once more, unless it is the first uplink or the overlay device.
    further: Option<u32>,
    ifindex: u32,
    direction: Direction,
}

/// All hooks but the pods'.
fn device_hooks<'a>(
    state: &'a State,
    side_devices: impl Iterator<Item = &'a Uplink>,
    first: Option<u32>,
) -> Vec<Hook<'a>> {
    fn pair(device: &str, ifindex: u32, codes: [u8; 2], further: Option<u32>) -> [Hook<'_>; 2] {
        let hook = |code: u8, direction| {
            let program = hook::NAMES[usize::from(code)];
            Hook { program, device, further, ifindex, direction }
        };
        [hook(codes[0], Direction::Ingress), hook(codes[1], Direction::Egress)]
    }
    let mut hooks = Vec::new();
    for uplink in &state.uplinks {
        let name = uplink.name.as_str();
        let further = (Some(uplink.ifindex) != first).then_some(uplink.ifindex);
        hooks.extend(pair(name, uplink.ifindex, [hook::UPLINK_IN, hook::UPLINK_OUT], further));
    }
    let is_uplink = |index| state.uplinks.iter().any(|it| it.ifindex == index);
    for device in side_devices.filter(|it| !is_uplink(it.ifindex)) {
        let name = device.name.as_str();
        let (program, direction) = (names::SIDE_IN, Direction::Ingress);
        hooks.push(Hook { program, device: name, further: Some(device.ifindex), ifindex: device.ifindex, direction });
    }
    if let Some(OverlayDevice { index, .. }) = state.overlay {
        hooks.extend(pair(OVERLAY_DEV, index, [hook::OVERLAY_IN, hook::OVERLAY_OUT], None));
    }
    hooks
}

fn word(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Unchanged => "unchanged",
        Outcome::Swapped => "program swapped",
        Outcome::Attached => "program attached",
    }
}

/// What `/metrics` asks of the maps.
pub struct Stats {
    counters: Counters,
    bpffs: PathBuf,
}

impl Stats {
    /// Reads the counters that are pinned in `maps` now, and how full the maps are from the pins in `bpffs`.
    pub fn open(maps: &Path, bpffs: PathBuf) -> Result<Self> {
        Ok(Self { counters: Counters::open(maps)?, bpffs })
    }
}

impl KernelStats for Stats {
    fn counters(&self) -> Vec<HookCount> {
        let rows = or_nothing(self.counters.read());
        rows.into_iter().map(|row| HookCount { reason: row.reason, hook: row.hook, count: row.count }).collect()
    }

    fn maps(&self) -> Vec<MapFill> {
        let fills = or_nothing(fill::read(&self.bpffs));
        fills.into_iter().map(|fill| MapFill { name: fill.name, used: fill.used, max: fill.max }).collect()
    }
}

fn or_nothing<T>(read: Result<Vec<T>>) -> Vec<T> {
    read.unwrap_or_else(|error| {
        tracing::warn!("metrics: {error:#}");
        Vec::new()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uplink(ifindex: u32, name: &str) -> Uplink {
        Uplink { name: name.into(), ifindex, mtu: 1500, prefixes: Vec::new() }
    }

    /// An uplink of before may seem to be another device while it has lost its route: packets would pass two programs.
    #[test]
    fn no_device_is_an_uplink_and_a_side_device() {
        let state = State { uplinks: vec![uplink(2, "eth0")], ..State::default() };
        let sides = [uplink(2, "eth0"), uplink(3, "br0")];
        let hooks = device_hooks(&state, sides.iter(), Some(2));
        let hooks: Vec<_> = hooks.iter().map(|hook| (hook.program, hook.device, hook.further)).collect();
        assert_eq!(hooks, [("uplink_in", "eth0", None), ("uplink_out", "eth0", None), ("side_in", "br0", Some(3))]);
    }
}
