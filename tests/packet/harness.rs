//! One node without an agent: the programs, their maps, and a network namespace with the devices and routes that they ask
//! the kernel about. [`lab`] gives one to each test.

mod addresses;
mod bridge;
mod connections;
mod policies;
mod services;
mod shot;

pub use addresses::*;
pub use bridge::labs_of_bridge;
pub use connections::{Flow, Half, source_of_mac};
use connections::{Plain, change, flow, half, tuple};
pub use policies::To;
pub use shot::{REDIRECT, SHOT, STACK, Shot};

use crate::frame::Frame;
use anyhow::{Context, Result, anyhow, ensure};
use bytemuck::Pod;
use rustnet_common::addr::{Addr, Address, Ip4, Ip6};
use rustnet_common::affinity::{Affinity, AffinityKey};
use rustnet_common::backend::Backend;
use rustnet_common::config::{self, NodeConfig};
use rustnet_common::conntrack::{CtEntry, SLOT_CONTESTED};
use rustnet_common::device::Device;
use rustnet_common::drop::hook;
use rustnet_common::endpoint::Endpoint;
use rustnet_common::frag::{FragKey, FragPorts};
use rustnet_common::host_port::{HostPort, HostPortKey};
use rustnet_common::names::{SIDE_IN, map};
use rustnet_common::peer::{Peer, PeerKey, flags};
use rustnet_common::service::{SvcEntry, SvcKey};
use rustnet_common::source_range::SourceRangeKey;
use rustnet_common::tuple::{Tuple, proto};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use testkit::check;
use testkit::datapath::{Datapath, Input, Table};
use testkit::netns::{Holder, Own};

/// The node.
pub struct Lab {
    datapath: Datapath,
    netns: Holder,
    /// Whether packets come as from a device that sums up all of them.
    sums_up: bool,
    backends: AtomicU32,
}

/// Nodes that no test uses right now. Loading the programs takes longer than most tests.
static IDLE: Mutex<Vec<Lab>> = Mutex::new(Vec::new());

/// Runs a test on a node of its own, in a network namespace.
pub fn lab(test: impl FnOnce(&Lab) -> Result<()> + Send) -> Result<()> {
    let idle = || IDLE.lock().unwrap_or_else(PoisonError::into_inner);
    let waiting = idle().pop();
    let lab = waiting.map_or_else(Lab::new, Ok)?;
    lab.reset()?;
    // After a failure the node goes on as well: all that tests change is reset above.
    let result = lab.netns.run(|| test(&lab));
    idle().push(lab);
    result?
}

/// As [`lab`], on a new node that no other test gets afterwards: for what a reset of the maps does not undo.
pub fn lab_apart(test: impl FnOnce(&Lab) -> Result<()> + Send) -> Result<()> {
    let lab = Lab::new()?;
    lab.reset()?;
    lab.netns.run(|| test(&lab))?
}

/// As [`lab`], once for each family.
pub fn labs(test: impl Fn(&Lab, Net) -> Result<()> + Send + Sync) -> Result<()> {
    lab(|lab| {
        BOTH.into_iter().try_for_each(|net| {
            lab.forget()?;
            lab.configure(|_| {})?;
            test(lab, net).with_context(|| format!("{net:?}"))
        })
    })
}

/// Runs a check for each of several things, and names the one that fails.
pub fn each<T: std::fmt::Debug + Copy>(list: &[T], mut check: impl FnMut(T) -> Result<()>) -> Result<()> {
    list.iter().try_for_each(|item| check(*item).with_context(|| format!("{item:?}")))
}

/// The connection tables of a family: TCP, then all other protocols.
fn tables<A: Address>() -> [&'static str; 2] {
    if A::IS_V6 { [map::CT6_TCP, map::CT6_ANY] } else { [map::CT4_TCP, map::CT4_ANY] }
}

/// An entry with its key, and its table.
type Found<A> = (Table<Tuple<A>, CtEntry<A>>, Tuple<A>, CtEntry<A>);

impl Lab {
    fn new() -> Result<Self> {
        Self::with(Datapath::load)
    }

    /// A node with programs that `load` loads, given sizes of maps.
    fn with(load: impl FnOnce(&[(&str, u32)]) -> Result<Datapath>) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("rn{}-packet{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let netns = Holder::new(&name, Own::default())?;
        netns.ip(LINKS)?;
        netns.sysctl("ipv4/ip_forward", "1")?;
        netns.sysctl("ipv6/conf/all/forwarding", "1")?;
        let flows = [map::CT4_TCP, map::CT4_ANY, map::CT6_TCP, map::CT6_ANY, map::FRAG4, map::FRAG6];
        let services = [map::SVC4, map::SVC6, map::BACKEND_IDS, map::BACKENDS];
        let small: Vec<_> = flows.into_iter().chain(services).map(|name| (name, 1024)).collect();
        let datapath = load(&small)?;
        let sums_up = datapath.sums_up()?;
        Ok(Self { datapath, netns, sums_up, backends: AtomicU32::new(0) })
    }

    /// Brings the maps to what every test begins with.
    pub fn reset(&self) -> Result<()> {
        let d = &self.datapath;
        self.forget()?;
        d.table::<FragKey<Ip4>, FragPorts>(map::FRAG4)?.clear()?;
        d.table::<FragKey<Ip6>, FragPorts>(map::FRAG6)?.clear()?;
        d.table::<SvcKey<Ip4>, SvcEntry>(map::SVC4)?.clear()?;
        d.table::<SvcKey<Ip6>, SvcEntry>(map::SVC6)?.clear()?;
        d.table::<PeerKey<Ip4>, Peer>(map::PEERS4)?.clear()?;
        d.table::<PeerKey<Ip6>, Peer>(map::PEERS6)?.clear()?;
        d.table::<Addr, Endpoint>(map::ENDPOINTS)?.clear()?;
        d.table::<u32, Device>(map::DEVICES)?.clear()?;
        d.table::<AffinityKey, Affinity>(map::AFFINITY)?.clear()?;
        d.table::<SourceRangeKey, u32>(map::SOURCE_RANGES)?.clear()?;
        d.table::<HostPortKey, HostPort>(map::HOST_PORTS)?.clear()?;
        self.forget_policies()?;
        let none = Backend::cleared(0);
        for used in 0..self.backends.swap(0, Ordering::Relaxed) {
            d.table(map::BACKENDS)?.put(&used, &none)?;
            d.table(map::BACKEND_IDS)?.put(&used, &0_u32)?;
        }
        for slot in 0..256_u32 {
            d.table::<u32, u64>("rn_nat_full")?.put(&slot, &0)?;
        }
        self.configure(|_| {})?;
        for net in BOTH {
            self.put_endpoint(net.a(), POD_A, MAC_A)?;
            self.put_endpoint(net.b(), POD_B, MAC_B)?;
            self.put_peer(net.node(), None, flags::HOST, None)?;
            self.put_peer(net.nobody(), Some((24, 64)), flags::LOCAL_PODS, None)?;
            self.put_peer(net.node2(), None, flags::NODE | flags::TUNNEL, Some(net.node2()))?;
            self.put_peer(net.far(), Some((24, 64)), flags::POD | flags::TUNNEL, Some(net.node2()))?;
            self.put_peer(net.routed(), Some((24, 64)), flags::POD, None)?;
            self.put_peer(net.narrow(), Some((24, 64)), flags::POD, None)?;
        }
        Ok(())
    }

    /// Makes the programs ask for the ways to other nodes again.
    pub fn forget_next_hops(&self) -> Result<()> {
        self.datapath.clear_percpu("rn_next_hops")
    }

    /// Makes XDP ask for the ways of flows again, and leave no packet to TC for the sake of a neighbour.
    pub fn forget_turns(&self) -> Result<()> {
        self.datapath.fill_all_percpu("rn_probed", &[self.datapath.jiffies()?])?;
        self.datapath.clear_percpu("rn_turns")
    }

    /// Changes the node's devices and routes by a batch of `ip`. No reset takes that back.
    pub fn ip(&self, batch: &str) -> Result<()> {
        self.netns.ip(batch)
    }

    /// Writes a sysctl of the node. No reset takes that back.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        self.netns.sysctl(key, value)
    }

    /// The programs.
    pub fn datapath(&self) -> &Datapath {
        &self.datapath
    }

    /// Writes the node's settings, changed.
    pub fn configure(&self, change: impl FnOnce(&mut NodeConfig)) -> Result<()> {
        let mut config = NodeConfig {
            node4: Ip4::from_ip(Net::V4.node()),
            node6: Ip6::from_ip(Net::V6.node()),
            tunnel_src: Addr::UNSPECIFIED,
            mark_mask: config::mark::DEFAULT_MASK,
            overlay: OVERLAY,
            mark: config::mark::DEFAULT,
            overlay_mtu: OVERLAY_MTU as u32,
            overlay_port: 8472,
            snat_min: *SNAT.start(),
            snat_max: *SNAT.end(),
            flags: config::flags::MASQUERADE | config::flags::EXTERNAL,
            vni: VNI,
            hz: HZ,
            seed: SEED,
        };
        change(&mut config);
        self.datapath.table(map::CONFIG)?.put(&0_u32, &config)
    }

    /// Gives a device its address of a family, or takes both away.
    pub fn put_device(&self, ifindex: u32, address: Option<IpAddr>) -> Result<()> {
        let table = self.datapath.table::<u32, Device>(map::DEVICES)?;
        let Some(address) = address else { return table.delete(&ifindex).map(drop) };
        let mut device = table.get(&ifindex)?.unwrap_or(Device { ip4: Ip4::UNSPECIFIED, ip6: Ip6::UNSPECIFIED });
        match address {
            IpAddr::V4(_) => device.ip4 = Ip4::from_ip(address),
            IpAddr::V6(_) => device.ip6 = Ip6::from_ip(address),
        }
        table.put(&ifindex, &device)
    }

    pub fn put_endpoint(&self, ip: IpAddr, ifindex: u32, mac: [u8; 6]) -> Result<()> {
        self.put_endpoint_with(ip, ifindex, mac, 0)
    }

    /// The same with flags.
    pub fn put_endpoint_with(&self, ip: IpAddr, ifindex: u32, mac: [u8; 6], flags: u16) -> Result<()> {
        let value = Endpoint { ifindex, identity: 0, mac, host_mac: MAC_HOST, flags, pad: 0 };
        self.datapath.table(map::ENDPOINTS)?.put(&Addr::from(ip), &value)
    }

    /// Takes a pod away.
    pub fn drop_endpoint(&self, ip: IpAddr) -> Result<()> {
        ensure!(self.datapath.table::<Addr, Endpoint>(map::ENDPOINTS)?.delete(&Addr::from(ip))?, "no endpoint {ip}");
        Ok(())
    }

    /// Writes a peer: one address, or the prefix of the given lengths around it.
    pub fn put_peer(&self, ip: IpAddr, prefix: Option<(u32, u32)>, flags: u16, node: Option<IpAddr>) -> Result<()> {
        let value = Peer { node: node.map_or(Addr::UNSPECIFIED, Addr::from), identity: 0, flags, pad: 0 };
        match ip {
            IpAddr::V4(_) => {
                let key = PeerKey { prefix_len: prefix.map_or(32, |p| p.0), data: Ip4::from_ip(ip) };
                self.datapath.table(map::PEERS4)?.put(&key, &value)
            }
            IpAddr::V6(_) => {
                let key = PeerKey { prefix_len: prefix.map_or(128, |p| p.1), data: Ip6::from_ip(ip) };
                self.datapath.table(map::PEERS6)?.put(&key, &value)
            }
        }
    }

    /// Takes a prefix of the given lengths away, if it is there.
    pub fn drop_peer(&self, ip: IpAddr, prefix: (u32, u32)) -> Result<()> {
        match ip {
            IpAddr::V4(_) => {
                let key = PeerKey { prefix_len: prefix.0, data: Ip4::from_ip(ip) };
                self.datapath.table::<_, Peer>(map::PEERS4)?.delete(&key)?;
            }
            IpAddr::V6(_) => {
                let key = PeerKey { prefix_len: prefix.1, data: Ip6::from_ip(ip) };
                self.datapath.table::<_, Peer>(map::PEERS6)?.delete(&key)?;
            }
        }
        Ok(())
    }

    /// The connection tables of a family: each entry by the direction that it was made for.
    pub fn connections(&self, net: Net) -> Result<BTreeMap<Flow, Half>> {
        match net {
            Net::V4 => self.rows::<Ip4>(),
            Net::V6 => self.rows::<Ip6>(),
        }
    }

    fn rows<A: Plain>(&self) -> Result<BTreeMap<Flow, Half>>
    where
        Tuple<A>: Pod,
        CtEntry<A>: Pod,
    {
        let mut rows = BTreeMap::new();
        for name in tables::<A>() {
            for (key, entry) in self.datapath.table::<Tuple<A>, CtEntry<A>>(name)?.entries()? {
                let tuple = entry.tuple(&key);
                rows.insert(flow(&tuple), half(&entry, &tuple));
            }
        }
        Ok(rows)
    }

    /// The entry that serves a direction, with its key.
    fn find<A: Plain>(&self, f: &Flow) -> Result<Found<A>>
    where
        Tuple<A>: Pod,
        CtEntry<A>: Pod,
    {
        let wanted = tuple::<A>(f);
        let table = self.datapath.table(tables::<A>()[usize::from(f.proto != proto::TCP)])?;
        for pad in [0, SLOT_CONTESTED] {
            let key = Tuple { pad, ..wanted.canonical() };
            if let Some(entry) = table.get(&key)?.filter(|entry: &CtEntry<A>| entry.serves(&wanted)) {
                return Ok((table, key, entry));
            }
        }
        Err(anyhow!("no connection {f:?}"))
    }

    /// One direction of a connection.
    pub fn half(&self, f: Flow) -> Result<Half> {
        Ok(match f.net() {
            Net::V4 => half(&self.find::<Ip4>(&f)?.2, &tuple(&f)),
            Net::V6 => half(&self.find::<Ip6>(&f)?.2, &tuple(&f)),
        })
    }

    /// Changes one direction of a connection.
    pub fn change_half(&self, f: Flow, edit: impl FnOnce(&mut Half)) -> Result<()> {
        let mut changed = self.half(f)?;
        edit(&mut changed);
        match f.net() {
            Net::V4 => self.write::<Ip4>(&f, &changed),
            Net::V6 => self.write::<Ip6>(&f, &changed),
        }
    }

    fn write<A: Plain>(&self, f: &Flow, changed: &Half) -> Result<()>
    where
        Tuple<A>: Pod,
        CtEntry<A>: Pod,
    {
        let (table, key, mut entry) = self.find::<A>(f)?;
        change(&mut entry, &tuple(f), changed);
        table.put(&key, &entry)
    }

    /// Evicts the entry that serves a direction.
    pub fn evict(&self, f: Flow) -> Result<()> {
        let was = match f.net() {
            Net::V4 => self.find::<Ip4>(&f).and_then(|(table, key, _)| table.delete(&key))?,
            Net::V6 => self.find::<Ip6>(&f).and_then(|(table, key, _)| table.delete(&key))?,
        };
        ensure!(was, "no connection {f:?}");
        Ok(())
    }

    /// Makes a half look as if it was last seen a second (as the programs count) ago, and gives what it says now.
    pub fn age(&self, key: Flow, seconds: u32) -> Result<u32> {
        let mut seen = 0;
        self.change_half(key, |h| {
            h.seen = h.seen.wrapping_sub(seconds * HZ);
            seen = h.seen;
        })?;
        Ok(seen)
    }

    /// Forgets all connections.
    pub fn forget(&self) -> Result<()> {
        for name in tables::<Ip4>() {
            self.datapath.table::<Tuple<Ip4>, CtEntry<Ip4>>(name)?.clear()?;
        }
        for name in tables::<Ip6>() {
            self.datapath.table::<Tuple<Ip6>, CtEntry<Ip6>>(name)?.clear()?;
        }
        Ok(())
    }

    /// Entries of both families.
    pub fn halves(&self) -> Result<usize> {
        Ok(self.connections(Net::V4)?.len() + self.connections(Net::V6)?.len())
    }

    /// Runs a hook on raw bytes.
    pub fn raw(&self, code: u8, input: &Input<'_>) -> Result<Shot> {
        self.run(hook::NAMES[code as usize], code, input)
    }

    /// Runs a program, which counts at a hook, on raw bytes.
    pub fn run(&self, name: &str, code: u8, input: &Input<'_>) -> Result<Shot> {
        self.run_summed(name, code, input, self.sums_up)
    }

    /// Pod A sends a frame, of which no device has delivered a sum.
    pub fn pod_sends_unsummed(&self, frame: &[u8]) -> Result<Shot> {
        let input = Input { frame, ifindex: POD_A, ..Input::default() };
        self.run_summed(hook::NAMES[hook::FROM_POD as usize], hook::FROM_POD, &input, false)
    }

    /// The same of pod B.
    pub fn pod_b_sends_unsummed(&self, frame: &[u8]) -> Result<Shot> {
        let input = Input { frame, ifindex: POD_B, ..Input::default() };
        self.run_summed(hook::NAMES[hook::FROM_POD as usize], hook::FROM_POD, &input, false)
    }

    /// As [`Lab::pod_sends_unsummed`], of a frame that stands for several segments with so much payload each.
    pub fn pod_sends_segments(&self, frame: &[u8], gso_size: u32) -> Result<Shot> {
        let input = Input { frame, ifindex: POD_A, gso_size, ..Input::default() };
        self.run_summed(hook::NAMES[hook::FROM_POD as usize], hook::FROM_POD, &input, false)
    }

    /// True if the kernel can deliver sums of the whole packet.
    pub fn has_sums(&self) -> bool {
        self.sums_up
    }

    fn run_summed(&self, name: &str, code: u8, input: &Input<'_>, is_summed: bool) -> Result<Shot> {
        // A second of this clock is longer than a test: the limits of errors and records would be used up.
        self.datapath.clear_percpu("rn_limits")?;
        let mut before = self.datapath.counts()?;
        self.datapath.events();
        let mut sum_is_right = true;
        let first = self.datapath.run(name, &Input { complete: is_summed && input.cut == 0, ..*input })?;
        let output = if let Some(output) = first {
            output
        } else {
            sum_is_right = false;
            before = self.datapath.counts()?;
            self.datapath.events();
            self.datapath.run(name, input)?.context("no sum was asked for")?
        };
        let mut counted = self.datapath.counts()?;
        counted.retain(|k, n| {
            *n -= before.get(k).copied().unwrap_or(0);
            *n != 0
        });
        let len = if input.cut == 0 { input.frame.len() } else { input.cut as usize };
        Ok(Shot {
            hook: code,
            sum_is_right,
            sent: input.frame[..len].to_vec(),
            verdict: output.verdict,
            mark: output.mark,
            frame: output.frame,
            counted,
            events: self.datapath.events(),
        })
    }

    fn shoot(&self, code: u8, ifindex: u32, frame: &Frame) -> Result<Shot> {
        let bytes = frame.bytes();
        check::checksums(&bytes, false).context("the test's own packet")?;
        self.raw(code, &Input { frame: &bytes, ifindex, ..Input::default() })
    }

    /// A pod sends; which one, its MAC tells.
    pub fn pod_sends(&self, frame: &Frame) -> Result<Shot> {
        let ifindex = if frame.smac == MAC_B { POD_B } else { POD_A };
        self.shoot(hook::FROM_POD, ifindex, frame)
    }

    /// The host's stack sends to a pod.
    pub fn to_pod(&self, ifindex: u32, frame: &Frame) -> Result<Shot> {
        self.shoot(hook::TO_POD, ifindex, frame)
    }

    pub fn uplink_in(&self, frame: &Frame) -> Result<Shot> {
        self.shoot(hook::UPLINK_IN, UPLINK, frame)
    }

    /// A frame comes in by a device that is no uplink.
    pub fn side_in(&self, frame: &Frame) -> Result<Shot> {
        self.side_in_tagged(None, frame)
    }

    /// The same, with the VLAN tag that the device took off.
    pub fn side_in_tagged(&self, vlan: Option<u16>, frame: &Frame) -> Result<Shot> {
        let bytes = frame.bytes();
        check::checksums(&bytes, false).context("the test's own packet")?;
        self.run(SIDE_IN, hook::UPLINK_IN, &Input { frame: &bytes, ifindex: SIDE, vlan, ..Input::default() })
    }

    /// A tunnel packet comes in by the uplink, of which no device has delivered a sum.
    pub fn tunnel_in(&self, frame: &[u8]) -> Result<Shot> {
        let input = Input { frame, ifindex: UPLINK, ..Input::default() };
        self.run_summed(hook::NAMES[hook::UPLINK_IN as usize], hook::TUNNEL_IN, &input, false)
    }

    pub fn uplink_out(&self, frame: &Frame) -> Result<Shot> {
        self.shoot(hook::UPLINK_OUT, UPLINK, frame)
    }

    /// A frame comes out of the tunnel from `node`.
    pub fn overlay_in(&self, node: IpAddr, frame: &Frame) -> Result<Shot> {
        let bytes = frame.bytes();
        let input = Input { frame: &bytes, ifindex: OVERLAY, tunnel: Some(node), vni: VNI, ..Input::default() };
        self.raw(hook::OVERLAY_IN, &input)
    }

    pub fn overlay_out(&self, frame: &Frame) -> Result<Shot> {
        self.shoot(hook::OVERLAY_OUT, OVERLAY, frame)
    }
}
