//! The attackers, the places where their packets could arrive, and the trial of one attempt.

use crate::fixture::{Net, TestService, endpoints, observed, shared};
use anyhow::{Context, Result, anyhow, bail, ensure};
use rustnet_common::drop::DropReason;
use rustnet_common::names::GATEWAY4;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use testkit::check::VXLAN_PORT;
use testkit::fabric::{Outsider, WORLD};
use testkit::netns::Holder;
use testkit::packet::{self, Macs, Probe, RawPort, Unsummed, mac_of, neighbour_mac, probe, vxlan};
use testkit::sniff::{Frame, Sniffer};
use testkit::{Netns, Node, Pod, Routing, Setup, Topology, wait};

/// The last number of the addresses of the attacker on the segment, and of the router of the one
/// behind it.
const ATTACKER: u8 = 66;
const OUTSIDER: u8 = 67;
/// The network identifier that all agents use by default.
pub const VNI: u32 = 1;

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// One of two values.
    pub fn pick<T>(self, v4: T, v6: T) -> T {
        match self {
            Self::V4 => v4,
            Self::V6 => v6,
        }
    }

    /// A constant address.
    pub fn ip(self, v4: &str, v6: &str) -> Result<IpAddr> {
        let text = self.pick(v4, v6);
        text.parse().with_context(|| format!("{text} is not an address"))
    }

    pub fn of(self, pod: &Pod) -> Result<IpAddr> {
        Ok(match self {
            Self::V4 => pod.v4()?.into(),
            Self::V6 => pod.v6()?.into(),
        })
    }

    pub fn of_node(self, node: &Node) -> IpAddr {
        self.pick(node.v4().into(), node.v6().into())
    }

    pub fn attacker(self) -> Result<IpAddr> {
        self.ip(&format!("172.18.0.{ATTACKER}"), &format!("fd00:18::{ATTACKER}"))
    }

    pub fn outsider(self) -> Result<IpAddr> {
        self.ip(&format!("198.51.100.{OUTSIDER}"), &format!("2001:db8:66::{OUTSIDER}"))
    }

    pub fn world(self) -> IpAddr {
        self.pick(WORLD.0.into(), WORLD.1.into())
    }

    /// An address of node 1's pod range that no pod has.
    pub fn unleased(self) -> Result<IpAddr> {
        self.ip("10.244.1.250", "fd00:244:0:1::fa0")
    }

    /// Addresses that no packet on a wire may have as its source.
    pub fn martians(self) -> Result<Vec<IpAddr>> {
        let v4 = ["127.0.0.1", "0.0.0.0", "0.1.2.3", "224.0.0.9", "239.1.2.3", "255.255.255.255"];
        let v6 = ["::", "::1", "ff02::1", "ff0e::1:2", "::ffff:172.18.0.12", "::ffff:10.244.1.2"];
        self.pick(v4, v6).iter().map(|text| Ok(text.parse()?)).collect()
    }
}

/// A fabric with attackers.
pub struct Stage<'n> {
    pub net: &'n Net,
    pub routing: Routing,
    /// A service of pod `b`.
    pub local: TestService<'n>,
    /// A service of pod `c`.
    pub remote: TestService<'n>,
    /// A pod of node 3, where there is one.
    far: Option<Pod>,
    /// A machine on the nodes' segment.
    attacker: Holder,
    /// A machine behind a router.
    outsider: Outsider,
}

/// The fabrics of all three routing modes; those of vxlan and native are the other tests' as well.
pub fn staged(routing: Routing) -> Result<&'static Stage<'static>> {
    type Slot = OnceLock<Result<Stage<'static>, String>>;
    static VXLAN: Slot = OnceLock::new();
    static NATIVE: Slot = OnceLock::new();
    static MIXED: Slot = OnceLock::new();
    static MIXED_NET: OnceLock<Result<Net, String>> = OnceLock::new();
    let (slot, net): (&Slot, fn() -> Result<&'static Net>) = match routing {
        Routing::Vxlan => (&VXLAN, || shared(Routing::Vxlan)),
        Routing::Native => (&NATIVE, || shared(Routing::Native)),
        Routing::DirectAndVxlan => (&MIXED, || {
            let topology = Topology::Mixed { core_mtu: 1500 };
            let setup = Setup { nodes: 3, routing: Routing::DirectAndVxlan, topology, ..Setup::default() };
            let net = MIXED_NET.get_or_init(|| Net::start(setup).map_err(|e| format!("{e:#}")));
            net.as_ref().map_err(|e| anyhow!("{e}"))
        }),
    };
    let start = || -> Result<Stage<'static>> {
        let stage = Stage::on(net()?)?;
        stage.local.wait_known()?;
        stage.remote.wait_known()?;
        Ok(stage)
    };
    let stage = slot.get_or_init(|| start().map_err(|e| format!("{e:#}")));
    stage.as_ref().map_err(|e| anyhow!("the attackers' fabric did not start: {e}"))
}

/// Runs one test on a stage.
pub fn tried(routing: Routing, test: impl FnOnce(&Stage<'_>) -> Result<()>) -> Result<()> {
    let stage = staged(routing)?;
    observed(stage.net, |_| test(stage))
}

/// Makes one test of each function in each of the routing modes that are named.
macro_rules! in_routings {
    ($($mode:ident = $routing:ident),+; $names:tt) => {
        $(crate::forged::stage::in_routings!(@ $mode $routing $names);)+
    };
    (@ $mode:ident $routing:ident ($($name:ident),+ $(,)?)) => {
        mod $mode {
            $(#[test]
            fn $name() -> anyhow::Result<()> {
                crate::forged::stage::tried(testkit::Routing::$routing, super::$name)
            })+
        }
    };
}
pub(crate) use in_routings;

impl<'n> Stage<'n> {
    /// Puts attackers and services into a fabric; the services may not be known yet.
    pub fn on(net: &'n Net) -> Result<Self> {
        let fabric = &net.fabric;
        let routing = fabric.setup().routing;
        let far = fabric.nodes().get(2).map(|node| node.add_pod("far")).transpose()?;
        let (local, remote) =
            (net.unawaited_service(endpoints(&[&net.b]))?, net.unawaited_service(endpoints(&[&net.c]))?);
        let attacker = fabric.add_host("attacker", ATTACKER)?;
        let outsider = fabric.add_outsider("outsider", OUTSIDER)?;
        Ok(Self { net, routing, local, remote, far, attacker, outsider })
    }

    pub fn node(&self, n: usize) -> &Node {
        self.net.node(n)
    }

    /// A pod that node 1 reaches through the tunnel.
    pub fn tunnelled(&self) -> Option<&Pod> {
        match self.routing {
            Routing::Vxlan => Some(&self.net.c),
            Routing::Native => None,
            Routing::DirectAndVxlan => self.far.as_ref(),
        }
    }

    /// The same where the mode has one.
    pub fn tunnel_peer(&self) -> Result<&Pod> {
        self.tunnelled().context("no tunnel in this routing mode")
    }

    /// A pod that node 1 reaches by plain routes.
    pub fn routed(&self) -> Option<&Pod> {
        (self.routing != Routing::Vxlan).then_some(&self.net.c)
    }

    /// All pods.
    pub fn pods(&self) -> Vec<&Pod> {
        [&self.net.a, &self.net.b, &self.net.c].into_iter().chain(&self.far).collect()
    }

    /// Raw frames of the machine on the segment, to node 1.
    pub fn attacker(&self) -> Result<Sender<'_>> {
        self.on_segment(&self.attacker, None)
    }

    fn on_segment<'a>(&self, netns: &'a Netns, wire: Option<Place>) -> Result<Sender<'a>> {
        Sender::new(netns, mac_of(self.node(1).netns(), "eth0")?, wire)
    }

    /// Raw frames of the machine behind a router.
    pub fn outsider(&self) -> Result<Sender<'_>> {
        Sender::new(&self.outsider.host, mac_of(&self.outsider.router, "out")?, None)
    }

    /// Raw frames of the node at the far end of node 1's tunnel.
    pub fn far_end(&self) -> Result<Sender<'_>> {
        let node = self.tunnel_peer()?.node();
        if self.far.is_none() {
            return self.on_segment(node.netns(), Some(Place::Wire(2)));
        }
        let to = mac_of(self.net.fabric.router(1), "node")?;
        Sender::new(node.netns(), to, Some(Place::Wire(3)))
    }
}

/// A sender of packets.
pub struct Sender<'a> {
    pub netns: &'a Netns,
    pub macs: Macs,
    port: RawPort,
    /// Its own wire, if it is watched.
    wire: Option<Place>,
}

/// One packet to send.
pub enum Shot {
    /// A raw frame, out of `eth0`.
    Frame(Vec<u8>),
    /// A raw frame whose checksum a device has to make.
    Unsummed(Unsummed),
    /// A datagram by a plain socket of a process without any privilege.
    Datagram(SocketAddr, Vec<u8>),
}

impl<'a> Sender<'a> {
    fn new(netns: &'a Netns, to: [u8; 6], wire: Option<Place>) -> Result<Self> {
        let macs = Macs { from: mac_of(netns, "eth0")?, to };
        Ok(Self { netns, macs, port: RawPort::open(netns, "eth0")?, wire })
    }

    /// A pod.
    pub fn of(pod: &'a Pod) -> Result<Self> {
        let gateway = neighbour_mac(pod.netns(), "eth0", IpAddr::from(GATEWAY4))?;
        Self::new(pod.netns(), gateway, None)
    }

    fn send(&self, shots: &[Shot]) -> Result<()> {
        let frame = |shot: &'_ Shot| if let Shot::Frame(frame) = shot { Some(frame.clone()) } else { None };
        let frames: Vec<_> = shots.iter().filter_map(frame).collect();
        self.port.send(frames.iter().map(Vec::as_slice))?;
        for shot in shots {
            if let Shot::Unsummed(frame) = shot {
                self.port.send_unsummed(frame)?;
            }
            let Shot::Datagram(to, payload) = shot else { continue };
            self.netns.run_unprivileged(|| {
                packet::stay_on_one_cpu()?;
                let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
                socket.send_to(payload, to).with_context(|| format!("cannot send to {to}")).map(drop)
            })?;
        }
        Ok(())
    }

    /// A tunnel packet to a node.
    pub fn tunnel(&self, from: IpAddr, to: IpAddr, vni: u32, inner: &[u8]) -> Result<Shot> {
        let (from, to) = (SocketAddr::new(from, 50_000), SocketAddr::new(to, VXLAN_PORT));
        Ok(Shot::Frame(packet::udp(self.macs, from, to, &vxlan(vni, inner))?))
    }
}

/// The MAC addresses of frames in a tunnel. No receiver checks them.
pub const INNER: Macs = Macs { from: [2, 0, 0, 0, 0, 1], to: [2, 0, 0, 0, 0, 2] };

/// Identifies the packets of one attempt: by a text in their payload, and by the port of the
/// sender, for answers to a delivered packet.
pub struct Mark {
    pub text: String,
    pub port: u16,
}

impl Mark {
    fn new() -> Self {
        static NUMBER: AtomicU16 = AtomicU16::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Self { text: format!("<attempt {number}>"), port: 11_000 + number % 9000 }
    }

    pub fn bytes(&self) -> &[u8] {
        self.text.as_bytes()
    }

    /// A frame of any kind.
    pub fn frame(&self, kind: Probe, macs: Macs, from: IpAddr, to: SocketAddr) -> Result<Vec<u8>> {
        probe(kind, macs, SocketAddr::new(from, self.port), to, self.bytes())
    }

    /// The same, to be sent.
    pub fn shot(&self, kind: Probe, macs: Macs, from: IpAddr, to: SocketAddr) -> Result<Shot> {
        self.frame(kind, macs, from, to).map(Shot::Frame)
    }

    /// Frames of all kinds.
    pub fn shots(&self, macs: Macs, from: IpAddr, to: SocketAddr) -> Result<Vec<Shot>> {
        Probe::ALL.iter().map(|kind| self.shot(*kind, macs, from, to)).collect()
    }

    fn is_in(&self, frame: &Frame) -> bool {
        const TCP: u8 = 6;
        !frame.outgoing
            && (self.is_part_of(&frame.bytes)
                || frame.headers().is_some_and(|h| h.proto == TCP && h.dport == self.port && h.sport != self.port))
    }

    fn is_part_of(&self, bytes: &[u8]) -> bool {
        bytes.windows(self.text.len()).any(|window| window == self.bytes())
    }
}

/// A place where packets may arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A pod, by its name.
    Pod(&'static str),
    /// The wire of a node, by its number: what the node sends.
    Wire(usize),
    /// The stack of a node, by its number.
    Host(usize),
}

/// The socket of a node.
struct Host {
    place: Place,
    socket: UdpSocket,
    seen: Mutex<Vec<(SocketAddr, Vec<u8>)>>,
}

/// A packet that arrived.
#[derive(Debug)]
pub struct Arrived {
    pub from: SocketAddr,
    vlan: Option<u16>,
    what: String,
}

impl Host {
    fn start(n: usize, node: &Node, port: u16) -> Result<Self> {
        let socket = node.netns().run(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)))??;
        socket.set_nonblocking(true)?;
        Ok(Self { place: Place::Host(n), socket, seen: Mutex::default() })
    }

    fn find(&self, mark: &Mark) -> Result<Vec<Arrived>> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffer = [0; 2048];
        loop {
            match self.socket.recv_from(&mut buffer) {
                Ok((len, from)) => seen.push((from, buffer[..len].to_vec())),
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) => return Err(e).context("a receiver"),
            }
        }
        let found = seen.iter().filter(|(_, bytes)| mark.is_part_of(bytes));
        Ok(found
            .map(|(from, _)| Arrived {
                from: SocketAddr::new(from.ip().to_canonical(), from.port()),
                vlan: None,
                what: format!("a datagram from {from}"),
            })
            .collect())
    }
}

/// All places, under observation.
pub struct Watch {
    sniffers: Vec<(Place, Sniffer)>,
    hosts: Vec<Host>,
    /// The port that each node listens on.
    pub port: u16,
}

impl Watch {
    fn start(stage: &Stage<'_>) -> Result<Self> {
        static PORT: AtomicU16 = AtomicU16::new(7000);
        let port = PORT.fetch_add(1, Ordering::Relaxed);
        let mut sniffers = Vec::new();
        for (name, pod) in ["a", "b", "c", "far"].into_iter().zip(stage.pods()) {
            sniffers.push((Place::Pod(name), Sniffer::start_short(pod.netns(), "eth0")?));
        }
        let (fabric, mut hosts) = (&stage.net.fabric, Vec::new());
        for (n, node) in (1..).zip(fabric.nodes()) {
            let (netns, interface) = if n > 2 { (fabric.router(1), "node") } else { (fabric.switch(), node.name()) };
            sniffers.push((Place::Wire(n), Sniffer::start_short(netns, interface)?));
            hosts.push(Host::start(n, node, port)?);
        }
        Ok(Self { sniffers, hosts, port })
    }

    fn at(&self, place: Place, mark: &Mark) -> Result<Vec<Arrived>> {
        const MOST: usize = 40;
        if let Some(host) = self.hosts.iter().find(|host| host.place == place) {
            return host.find(mark);
        }
        let found = self.sniffers.iter().find(|(there, _)| *there == place);
        let (_, sniffer) = found.with_context(|| format!("{place:?} is not watched"))?;
        Ok(sniffer.matching(MOST, |frame| mark.is_in(frame)).iter().map(arrived).collect())
    }

    /// Where packets of a mark have arrived, but on the sender's own wire.
    fn everywhere(&self, mark: &Mark, own: Option<Place>) -> Result<Vec<String>> {
        Sniffer::catch_up(self.sniffers.iter().map(|(_, sniffer)| sniffer))?;
        let places = self.sniffers.iter().map(|(place, _)| *place).chain(self.hosts.iter().map(|host| host.place));
        let mut found = Vec::new();
        for place in places.filter(|place| Some(*place) != own) {
            found.extend(self.at(place, mark)?.iter().map(|arrived| format!("{place:?}: {}", arrived.what)));
        }
        Ok(found)
    }
}

fn arrived(frame: &Frame) -> Arrived {
    let headers = frame.headers();
    let from = headers.map_or((Ipv4Addr::UNSPECIFIED, 0).into(), |h| SocketAddr::new(h.src, h.sport));
    let what = match frame.inner() {
        Some(inner) => format!("{frame:?} (in it: {inner:?})"),
        None => format!("{frame:?}"),
    };
    Arrived { from, vlan: frame.vlan, what }
}

/// Makes the packets of an attempt.
type Make<'a> = &'a dyn Fn(&Mark) -> Result<Vec<Shot>>;

/// The legitimate counterpart of an attempt.
pub struct Control<'a> {
    pub sender: &'a Sender<'a>,
    /// Makes it.
    pub make: Make<'a>,
    /// Where it has to arrive.
    pub place: Place,
    /// Its source there, if it matters.
    pub source: Option<IpAddr>,
}

/// Attempts, and those that failed.
pub struct Trial<'a> {
    stage: &'a Stage<'a>,
    pub watch: Watch,
    failures: Vec<String>,
    rows: usize,
}

impl<'a> Trial<'a> {
    pub fn new(stage: &'a Stage<'a>) -> Result<Self> {
        Ok(Self { stage, watch: Watch::start(stage)?, failures: Vec::new(), rows: 0 })
    }

    /// Sends the legitimate packet and waits until it arrives.
    pub fn legitimate(&self, what: &str, control: &Control<'_>) -> Result<Arrived> {
        let mark = Mark::new();
        control.sender.send(&(control.make)(&mark)?)?;
        self.arrives(what, control, &mark)
    }

    fn arrives(&self, what: &str, control: &Control<'_>, mark: &Mark) -> Result<Arrived> {
        let found = wait::until(&format!("{what}: the legitimate packet arrives"), || {
            let found = self.watch.at(control.place, mark)?;
            found.into_iter().next().with_context(|| format!("nothing at {:?}", control.place))
        })?;
        ensure!(found.vlan.is_none(), "{what}: the legitimate packet arrives with a VLAN tag: {found:?}");
        match control.source {
            Some(source) if source != found.from.ip() => {
                bail!("{what}: the legitimate packet should arrive from {source}: {found:?}")
            }
            _ => Ok(found),
        }
    }

    /// An attempt: nothing of `forged` arrives anywhere, the control does, and node 1 counts each
    /// packet under one of `reasons` (none: the kernel, or another node, may be the one that
    /// drops).
    pub fn refused(
        &mut self,
        what: &str,
        sender: &Sender<'_>,
        reasons: &[DropReason],
        forged: Make<'_>,
        control: &Control<'_>,
    ) -> Result<()> {
        // This also resolves all neighbours, so that no packet waits for one and arrives out of
        // order.
        if let Err(e) = self.legitimate(what, control) {
            self.holds(what, Err(e));
            return Ok(());
        }
        let before = self.stage.node(1).counters(reasons)?;
        let (bad, good) = (Mark::new(), Mark::new());
        let shots = forged(&bad)?;
        ensure!(!shots.is_empty(), "{what}: nothing to send");
        sender.send(&shots)?;
        control.sender.send(&(control.make)(&good)?)?;
        // It took the same path, behind the forged packets.
        self.arrives(what, control, &good)?;
        self.rows += 1;
        for place in self.watch.everywhere(&bad, sender.wire)? {
            self.failures.push(format!("{what}: arrived at {place}"));
        }
        let counted = self.stage.node(1).counters(reasons)? - before;
        if !reasons.is_empty() && counted < shots.len() as u64 {
            let names: Vec<_> = reasons.iter().map(|reason| reason.name()).collect();
            let sent = shots.len();
            self.failures.push(format!("{what}: {counted} of {sent} packets counted as {}", names.join(", ")));
        }
        Ok(())
    }

    /// Something else that must hold.
    pub fn holds(&mut self, what: &str, result: Result<()>) {
        self.rows += 1;
        if let Err(e) = result {
            self.failures.push(format!("{what}: {e:#}"));
        }
    }

    /// The verdict.
    pub fn finish(self) -> Result<()> {
        ensure!(self.rows > 0, "nothing was tried");
        ensure!(
            self.failures.is_empty(),
            "{} of {} attempts:\n{}",
            self.failures.len(),
            self.rows,
            self.failures.join("\n")
        );
        Ok(())
    }
}
