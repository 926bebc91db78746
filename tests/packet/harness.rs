//! One node without an agent: the programs, their maps, and a network namespace with the devices and routes that they ask
//! the kernel about. [`lab`] gives one to each test; [`Shot`] holds what became of a packet, to be compared as a whole.

use crate::frame::{Frame, L4};
use anyhow::{Context, Result, anyhow, bail, ensure};
use rustnet_common::addr::{Addr, Address, Ip4, Ip6};
use rustnet_common::backend::Backend;
use rustnet_common::config::{self, NodeConfig};
use rustnet_common::conntrack::CtEntry;
use rustnet_common::drop::{DropReason, hook};
use rustnet_common::endpoint::Endpoint;
use rustnet_common::event::Event;
use rustnet_common::frag::{FragKey, FragPorts};
use rustnet_common::names::{MARK_DONE, map};
use rustnet_common::peer::{Peer, PeerKey, flags};
use rustnet_common::service::{SvcEntry, SvcKey, scope};
use rustnet_common::tuple::Tuple;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use testkit::check;
use testkit::datapath::{Datapath, Input};
use testkit::netns::{Holder, Own};

/// Verdict: whoever comes next, then the stack.
pub const STACK: i32 = -1;
/// Verdict: dropped.
pub const SHOT: i32 = 2;
/// Verdict: where the helper said.
pub const REDIRECT: i32 = 7;

const ETHERNET: usize = 14;

pub const UPLINK: u32 = 10;
pub const OVERLAY: u32 = 11;
pub const POD_A: u32 = 21;
pub const POD_B: u32 = 22;
/// Largest packet that fits into the overlay.
pub const OVERLAY_MTU: usize = 1450;
/// MTU of pod B's interface.
pub const POD_B_MTU: usize = 1420;
/// MTU of the route to [`Net::narrow`].
pub const NARROW_MTU: usize = 1400;
/// Ticks in a second, as the programs are told. So many that no test lasts one: `seen` moves only where a test moves it.
pub const HZ: u32 = 100_000;
pub const SNAT: std::ops::RangeInclusive<u16> = 20_000..=59_999;

pub const MAC_A: [u8; 6] = [2, 0, 0, 0, 0x0a, 1];
pub const MAC_B: [u8; 6] = [2, 0, 0, 0, 0x0b, 1];
/// The host's end of each pod's veth, as pods see it.
pub const MAC_HOST: [u8; 6] = [2, 0, 0, 0, 0xff, 1];
/// Whoever is out there.
pub const MAC_OUT: [u8; 6] = [2, 0, 0, 0, 0xee, 1];

const LINKS: &str = "\
    link add eth0 index 10 type veth peer name peer0
    link add rn_vxlan index 11 type veth peer name peer1
    link add rnva index 21 type veth peer name peera
    link add rnvb index 22 mtu 1420 type veth peer name peerb
    link set eth0 up
    link set peer0 up
    link set rn_vxlan up
    link set peer1 up
    link set rnva up
    link set peera up
    link set rnvb up
    link set peerb up
    addr add 172.18.0.11/24 dev eth0
    addr add fd00:18::11/64 dev eth0 nodad
    route add default via 172.18.0.1 dev eth0
    route add default via fd00:18::1 dev eth0
    route add 10.244.3.0/24 via 172.18.0.13 dev eth0
    route add fd00:244:0:3::/64 via fd00:18::13 dev eth0
    route add 10.244.4.0/24 via 172.18.0.13 dev eth0 mtu lock 1400
    route add fd00:244:0:4::/64 via fd00:18::13 dev eth0 mtu lock 1400
    route add unreachable 203.0.113.0/24
    route add unreachable 2001:db8:dead::/48";

/// An IP family, and the addresses that all tests share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Net {
    V4,
    V6,
}

/// Both.
pub const BOTH: [Net; 2] = [Net::V4, Net::V6];

impl Net {
    pub fn ip(self, v4: [u8; 4], v6: &str) -> IpAddr {
        match self {
            Self::V4 => IpAddr::from(v4),
            Self::V6 => v6.parse().unwrap_or_else(|e| panic!("{v6}: {e}")),
        }
    }
    /// Pod A of this node.
    pub fn a(self) -> IpAddr {
        self.ip([10, 244, 1, 10], "fd00:244:0:1::10")
    }
    /// Pod B of this node.
    pub fn b(self) -> IpAddr {
        self.ip([10, 244, 1, 11], "fd00:244:0:1::11")
    }
    /// An address of this node's range that no pod has.
    pub fn nobody(self) -> IpAddr {
        self.ip([10, 244, 1, 99], "fd00:244:0:1::99")
    }
    /// A pod of node 2, behind the overlay.
    pub fn far(self) -> IpAddr {
        self.ip([10, 244, 2, 20], "fd00:244:0:2::20")
    }
    /// A pod of node 3, reached by the kernel's routes.
    pub fn routed(self) -> IpAddr {
        self.ip([10, 244, 3, 30], "fd00:244:0:3::30")
    }
    /// The same, over a narrow link.
    pub fn narrow(self) -> IpAddr {
        self.ip([10, 244, 4, 40], "fd00:244:0:4::40")
    }
    /// This node.
    pub fn node(self) -> IpAddr {
        self.ip([172, 18, 0, 11], "fd00:18::11")
    }
    /// Node 2.
    pub fn node2(self) -> IpAddr {
        self.ip([172, 18, 0, 12], "fd00:18::12")
    }
    /// A router of the world.
    pub fn router(self) -> IpAddr {
        self.ip([198, 51, 100, 1], "2001:db8:99::1")
    }
    /// A host of the world.
    pub fn world(self) -> IpAddr {
        self.ip([192, 0, 2, 10], "2001:db8:2::10")
    }
    /// An address to which the kernel knows that there is no way.
    pub fn unreachable(self) -> IpAddr {
        self.ip([203, 0, 113, 5], "2001:db8:dead::5")
    }
    /// A virtual address.
    pub fn vip(self, n: u8) -> IpAddr {
        self.ip([10, 96, 0, n], &format!("fd00:96::{n:x}"))
    }
    /// An address of the family from sixteen bytes.
    fn of(addr: IpAddr) -> Self {
        if addr.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// A flow in one direction: the connection table's key as plain values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Flow {
    pub src: IpAddr,
    pub sport: u16,
    pub dst: IpAddr,
    pub dport: u16,
    pub proto: u8,
}

impl Flow {
    pub fn of(frame: &Frame) -> Self {
        let (sport, dport) = frame.ports();
        Self { src: frame.src, sport, dst: frame.dst, dport, proto: frame.proto() }
    }
    pub fn reversed(self) -> Self {
        Self { src: self.dst, sport: self.dport, dst: self.src, dport: self.sport, proto: self.proto }
    }
    fn net(self) -> Net {
        Net::of(self.src)
    }
}

/// Half of a connection, as plain values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Half {
    pub to: Flow,
    pub flags: u16,
    pub state: u8,
    pub seen: u32,
    pub ifindex: u32,
    pub guard: [u8; 6],
    pub backend: u32,
    pub out: u32,
    pub packets: u64,
    pub bytes: u64,
}

/// Conversions between the tables' types and the tests'.
trait Plain: Address + bytemuck::Pod + Ord {
    fn from_ip(ip: IpAddr) -> Self;
    fn ip(self) -> IpAddr;
}
impl Plain for Ip4 {
    fn from_ip(ip: IpAddr) -> Self {
        Self::from_addr(Addr::from(ip))
    }
    fn ip(self) -> IpAddr {
        IpAddr::V4(self.into())
    }
}
impl Plain for Ip6 {
    fn from_ip(ip: IpAddr) -> Self {
        Addr::from(ip)
    }
    fn ip(self) -> IpAddr {
        IpAddr::V6(self.into())
    }
}

fn tuple<A: Plain>(f: &Flow) -> Tuple<A> {
    let (src, dst) = (A::from_ip(f.src), A::from_ip(f.dst));
    Tuple { src, dst, sport: f.sport, dport: f.dport, proto: f.proto, pad: 0, pad2: 0 }
}

fn flow<A: Plain>(t: &Tuple<A>) -> Flow {
    Flow { src: t.src.ip(), sport: t.sport, dst: t.dst.ip(), dport: t.dport, proto: t.proto }
}

fn half<A: Plain>(e: &CtEntry<A>) -> Half {
    let CtEntry { to, flags, state, seen, ifindex, backend, out, packets, bytes, .. } = *e;
    Half { to: flow(&to), flags, state, seen, ifindex, guard: bytemuck::cast(e.guard), backend, out, packets, bytes }
}

fn entry<A: Plain>(h: &Half) -> CtEntry<A> {
    let Half { flags, state, seen, ifindex, guard, backend, out, packets, bytes, .. } = *h;
    let (to, guard) = (tuple(&h.to), bytemuck::cast(guard));
    CtEntry { to, flags, state, pad: 0, seen, ifindex, backend, out, guard, pad2: [0; 3], packets, bytes }
}

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

/// As [`lab`], once for each family.
pub fn labs(test: impl Fn(&Lab, Net) -> Result<()> + Send + Sync) -> Result<()> {
    lab(|lab| BOTH.into_iter().try_for_each(|net| test(lab, net).with_context(|| format!("{net:?}"))))
}

impl Lab {
    fn new() -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("rn{}-packet{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let netns = Holder::new(&name, Own::default())?;
        netns.ip(LINKS)?;
        netns.sysctl("ipv4/ip_forward", "1")?;
        netns.sysctl("ipv6/conf/all/forwarding", "1")?;
        let small = [map::CT4, map::CT6, map::FRAG4, map::FRAG6, map::SVC4, map::SVC6, map::BACKENDS];
        let datapath = Datapath::load(&small.map(|name| (name, 1024)))?;
        let sums_up = datapath.sums_up()?;
        Ok(Self { datapath, netns, sums_up, backends: AtomicU32::new(0) })
    }

    /// Brings the maps to what every test begins with.
    fn reset(&self) -> Result<()> {
        let d = &self.datapath;
        self.forget()?;
        d.table::<FragKey<Ip4>, FragPorts>(map::FRAG4)?.clear()?;
        d.table::<FragKey<Ip6>, FragPorts>(map::FRAG6)?.clear()?;
        d.table::<SvcKey<Ip4>, SvcEntry>(map::SVC4)?.clear()?;
        d.table::<SvcKey<Ip6>, SvcEntry>(map::SVC6)?.clear()?;
        d.table::<PeerKey<Ip4>, Peer>(map::PEERS4)?.clear()?;
        d.table::<PeerKey<Ip6>, Peer>(map::PEERS6)?.clear()?;
        d.table::<Addr, Endpoint>(map::ENDPOINTS)?.clear()?;
        let none = Backend { addr: Addr::UNSPECIFIED, port: 0, flags: 0, id: 0 };
        for used in 0..self.backends.swap(0, Ordering::Relaxed) {
            d.table(map::BACKENDS)?.put(&used, &none)?;
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
            uplink: UPLINK,
            overlay: OVERLAY,
            uplink_mtu: 1500,
            overlay_mtu: OVERLAY_MTU as u32,
            overlay_port: 8472,
            snat_min: *SNAT.start(),
            snat_max: *SNAT.end(),
            flags: config::flags::MASQUERADE,
            vni: 1,
            hz: HZ,
            seed: 7,
        };
        change(&mut config);
        self.datapath.table(map::CONFIG)?.put(&0_u32, &config)
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

    /// Writes a service; gives the backends' ids.
    pub fn serve(&self, vip: IpAddr, port: u16, proto: u8, flags: u16, to: &[(IpAddr, u16)]) -> Result<Vec<u32>> {
        let first = self.backends.fetch_add(to.len() as u32, Ordering::Relaxed);
        let mut ids = Vec::new();
        for (i, (ip, port)) in to.iter().enumerate() {
            let index = first + i as u32;
            let value = Backend { addr: Addr::from(*ip), port: *port, flags: 0, id: 1000 + index };
            self.datapath.table(map::BACKENDS)?.put(&index, &value)?;
            ids.push(value.id);
        }
        let entry = SvcEntry { first, count: to.len() as u32, id: 1, affinity: 0, flags, pad: 0 };
        self.put_service(vip, port, proto, &entry)?;
        let wildcard =
            SvcEntry { first: 0, count: 0, id: 0, affinity: 0, flags: rustnet_common::service::flags::VIP, pad: 0 };
        self.put_service(vip, 0, 0, &wildcard)?;
        Ok(ids)
    }

    pub fn put_service(&self, vip: IpAddr, port: u16, proto: u8, entry: &SvcEntry) -> Result<()> {
        let scope = scope::CLUSTER;
        match vip {
            IpAddr::V4(_) => {
                self.datapath.table(map::SVC4)?.put(&SvcKey { vip: Ip4::from_ip(vip), port, proto, scope }, entry)
            }
            IpAddr::V6(_) => {
                self.datapath.table(map::SVC6)?.put(&SvcKey { vip: Ip6::from_ip(vip), port, proto, scope }, entry)
            }
        }
    }

    /// The connection table of a family.
    pub fn connections(&self, net: Net) -> Result<BTreeMap<Flow, Half>> {
        Ok(match net {
            Net::V4 => {
                let t = self.datapath.table::<Tuple<Ip4>, CtEntry<Ip4>>(map::CT4)?;
                t.entries()?.iter().map(|(k, v)| (flow(k), half(v))).collect()
            }
            Net::V6 => {
                let t = self.datapath.table::<Tuple<Ip6>, CtEntry<Ip6>>(map::CT6)?;
                t.entries()?.iter().map(|(k, v)| (flow(k), half(v))).collect()
            }
        })
    }

    /// One half of a connection.
    pub fn half(&self, key: Flow) -> Result<Half> {
        let found = match key.net() {
            Net::V4 => self.datapath.table(map::CT4)?.get(&tuple::<Ip4>(&key))?.map(|e| half::<Ip4>(&e)),
            Net::V6 => self.datapath.table(map::CT6)?.get(&tuple::<Ip6>(&key))?.map(|e| half::<Ip6>(&e)),
        };
        found.ok_or_else(|| anyhow!("no connection {key:?}"))
    }

    pub fn put_half(&self, key: Flow, half: &Half) -> Result<()> {
        match key.net() {
            Net::V4 => self.datapath.table(map::CT4)?.put(&tuple::<Ip4>(&key), &entry::<Ip4>(half)),
            Net::V6 => self.datapath.table(map::CT6)?.put(&tuple::<Ip6>(&key), &entry::<Ip6>(half)),
        }
    }

    /// Changes one half of a connection.
    pub fn change_half(&self, key: Flow, change: impl FnOnce(&mut Half)) -> Result<()> {
        let mut half = self.half(key)?;
        change(&mut half);
        self.put_half(key, &half)
    }

    /// Evicts one half of a connection.
    pub fn evict(&self, key: Flow) -> Result<()> {
        let was = match key.net() {
            Net::V4 => self.datapath.table::<_, CtEntry<Ip4>>(map::CT4)?.delete(&tuple::<Ip4>(&key))?,
            Net::V6 => self.datapath.table::<_, CtEntry<Ip6>>(map::CT6)?.delete(&tuple::<Ip6>(&key))?,
        };
        ensure!(was, "no connection {key:?}");
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
        self.datapath.table::<Tuple<Ip4>, CtEntry<Ip4>>(map::CT4)?.clear()?;
        self.datapath.table::<Tuple<Ip6>, CtEntry<Ip6>>(map::CT6)?.clear()
    }

    /// Connections there are, both families, both halves.
    pub fn halves(&self) -> Result<usize> {
        Ok(self.connections(Net::V4)?.len() + self.connections(Net::V6)?.len())
    }

    /// Runs a hook on raw bytes.
    pub fn raw(&self, code: u8, input: &Input<'_>) -> Result<Shot> {
        let mut before = self.datapath.counts()?;
        self.datapath.events();
        let name = hook::NAMES[code as usize];
        let mut sum_is_right = true;
        let first = self.datapath.run(name, &Input { complete: self.sums_up && input.cut == 0, ..*input })?;
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

    pub fn uplink_out(&self, frame: &Frame) -> Result<Shot> {
        self.shoot(hook::UPLINK_OUT, UPLINK, frame)
    }

    /// A frame comes out of the tunnel from `node`.
    pub fn overlay_in(&self, node: IpAddr, frame: &Frame) -> Result<Shot> {
        let bytes = frame.bytes();
        self.raw(hook::OVERLAY_IN, &Input { frame: &bytes, ifindex: OVERLAY, tunnel: Some(node), ..Input::default() })
    }

    pub fn overlay_out(&self, frame: &Frame) -> Result<Shot> {
        self.shoot(hook::OVERLAY_OUT, OVERLAY, frame)
    }
}

/// What became of a packet.
#[derive(Debug)]
pub struct Shot {
    hook: u8,
    sum_is_right: bool,
    sent: Vec<u8>,
    pub verdict: i32,
    pub mark: u32,
    pub frame: Vec<u8>,
    /// By reason and hook.
    pub counted: BTreeMap<(u8, u8), u64>,
    pub events: Vec<Event>,
}

impl Shot {
    /// Redirected into a pod, changed into `want`.
    pub fn to_the_pod(&self, want: &Frame) -> Result<()> {
        self.ended(REDIRECT, 0, Some(DropReason::Forwarded), &want.bytes(), usize::MAX)
    }

    /// Redirected to the host's end of a pod's veth, whose queue it passes, marked as done for the hook there.
    pub fn by_the_queue(&self, want: &Frame) -> Result<()> {
        self.onto_wire(want)
    }

    /// Redirected to a device, marked as done for the hook there, changed into `want`.
    pub fn onto_wire(&self, want: &Frame) -> Result<()> {
        self.ended(REDIRECT, MARK_DONE, Some(DropReason::Forwarded), &want.bytes(), usize::MAX)
    }

    /// Left to the stack as `want`, not counted, and marked as done for the hook that it meets after.
    pub fn done_to_stack(&self, want: &Frame) -> Result<()> {
        self.ended(STACK, MARK_DONE, None, &want.bytes(), usize::MAX)
    }

    /// Left to the stack as `want`, not counted.
    pub fn to_stack(&self, want: &Frame) -> Result<()> {
        self.ended(STACK, 0, None, &want.bytes(), usize::MAX)
    }

    /// Dropped unchanged, counted once.
    pub fn dropped(&self, reason: DropReason) -> Result<()> {
        self.ended(SHOT, 0, Some(reason), &self.sent, usize::MAX)
    }

    /// Refused for `reason`, and the sender told so by `want`.
    pub fn answered(&self, reason: DropReason, want: &Frame) -> Result<()> {
        let bytes = want.bytes();
        let kept = if matches!(want.l4, L4::Icmp { .. }) { ETHERNET + want.payload.len() } else { bytes.len() };
        self.ended(REDIRECT, MARK_DONE, Some(reason), &bytes, kept)
    }

    /// `kept`: how much of the frame that was sent is still in it.
    fn ended(&self, verdict: i32, mark: u32, reason: Option<DropReason>, want: &[u8], kept: usize) -> Result<()> {
        let counted: Vec<String> = self
            .counted
            .iter()
            .map(|((r, h), n)| {
                let name = DropReason::from_code(*r).map_or("?", DropReason::name);
                format!("{n} x {name} at {}", hook::NAMES.get(*h as usize).unwrap_or(&"?"))
            })
            .collect();
        let expected: BTreeMap<_, _> = reason.map(|r| ((r as u8, self.hook), 1)).into_iter().collect();
        let name = reason.map_or("nothing", DropReason::name);
        ensure!(self.verdict == verdict, "verdict {}, not {verdict}; counted {counted:?}, not {name}", self.verdict);
        ensure!(self.counted == expected, "counted {counted:?}, not {name} once");
        let told: Vec<(u8, u8, u32)> = self.events.iter().map(|e| (e.reason, e.hook, e.len)).collect();
        let drop = reason.filter(|r| *r != DropReason::Forwarded);
        let expected: Vec<_> = drop.map(|r| (r as u8, self.hook, self.sent.len() as u32)).into_iter().collect();
        ensure!(told == expected, "reported (reason, hook, length) {told:?}, not {expected:?}");
        ensure!(self.mark == mark, "mark {:#x}, not {mark:#x}", self.mark);
        if self.frame != want {
            bail!("the frame is\n{}which should be\n{}", show(&self.frame, want), show(want, &self.frame));
        }
        // A frame that was cut has lost its device's sum, and the kernel knows.
        if !self.sum_is_right && self.sent.len() <= kept {
            bail!("the device's sum of the whole packet (CHECKSUM_COMPLETE) is wrong now");
        }
        if reason != Some(DropReason::Malformed) && self.verdict == REDIRECT {
            check::checksums(&self.frame, false).context("of the frame that comes out")?;
        }
        Ok(())
    }
}

/// Hexadecimal, sixteen bytes a line, with a mark before each byte that differs from `other`.
fn show(bytes: &[u8], other: &[u8]) -> String {
    let mut text = String::new();
    for (line, chunk) in bytes.chunks(16).enumerate() {
        let _ = write!(text, "  {:4}:", line * 16);
        for (i, b) in chunk.iter().enumerate() {
            let mark = if other.get(line * 16 + i) == Some(b) { ' ' } else { '>' };
            let _ = write!(text, " {mark}{b:02x}");
        }
        text.push('\n');
    }
    text
}
