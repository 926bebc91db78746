//! Random packets of all kinds, honest and hostile, through the three doors by which strangers come in; a plain model judges
//! what came out. 20,000 frames, or as many as `RUSTNET_FUZZ` says; the seed is printed, and `RUSTNET_FUZZ_SEED` sets it.

mod model;
mod packet;
mod tunnel;

use crate::encap::NEIGHBOURS;
use crate::flows::{ALL, PORT, Proto, SERVED, as_from_a, as_from_b, from_a, from_b, from_outside};
use crate::frame::{ACK, FIN, Frame, L4, RST, SYN};
use crate::harness::{
    BOTH, Lab, MAC_A, MAC_B, MAC_HOST, MAC_OUT, Net, OVERLAY, POD_A, POD_B, REDIRECT, UPLINK, VNI, lab, lab_apart,
    parse_addresses,
};
use crate::malformed::{Random, mutate};
use anyhow::{Context, Result, ensure};
use model::{Broken, Case, Model, Service};
use rustnet_common::config;
use rustnet_common::drop::hook;
use rustnet_common::peer;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::ops::Range;
use testkit::datapath::Input;
use tunnel::{Ran, run_past};

/// Frames of a run where nothing else is said.
const FRAMES: u64 = 20_000;
/// Frames on one set of tables. Fewer connections than the tables of a test's node hold, so that the model needs no eviction.
const EPISODE: u64 = 300;

const PORTS: [u16; 12] = [PORT, PORT + 1, 80, 443, 53, 8080, 8443, 8472, 1, 20_000, 60_000, 0];

/// What all episodes ask for.
fn services(net: Net) -> Vec<Service> {
    let backends = [
        vec![(net.b(), 8080)],
        vec![(net.far(), 8080)],
        vec![(net.world(), 8443)],
        vec![(net.a(), 8080), (net.b(), 8080), (net.routed(), 8080), (net.far(), 8080)],
        vec![],
        vec![(net.node(), 10_250)],
        vec![(net.b(), 8080)],
        vec![(net.world(), 8472), (net.far(), 8472)],
    ];
    let mut all = Vec::new();
    for (n, to) in (1..).zip(backends) {
        for proto in [6, 17, 132] {
            all.push(Service { vip: net.vip(n), port: 80, proto, to: to.clone() });
        }
    }
    all
}

/// Makes frames.
struct Maker {
    random: Random,
    /// Frames that were sent on, as they left: material for answers, repetitions and errors.
    history: Vec<(Case, Frame)>,
    /// The rest of a datagram in pieces.
    queue: Vec<(Case, Frame)>,
    id: u32,
    /// The other node, as the far end of tunnels.
    far_end: IpAddr,
}

impl Maker {
    fn one_in(&mut self, n: usize) -> bool {
        self.random.below(n) == 0
    }

    fn pick<T: Clone>(&mut self, list: &[T]) -> T {
        list[self.random.below(list.len())].clone()
    }

    fn port(&mut self) -> u16 {
        if self.one_in(10) { self.random.next() as u16 } else { self.pick(&PORTS) }
    }

    /// Any address there is a reason to try.
    fn address(&mut self, net: Net) -> IpAddr {
        let n = 1 + self.random.below(9) as u8;
        let honest = [
            net.a(),
            net.b(),
            net.far(),
            net.routed(),
            net.narrow(),
            net.node(),
            net.node2(),
            net.world(),
            net.router(),
            net.nobody(),
            net.unreachable(),
            net.vip(n),
            net.vip(n),
            net.ip([172, 18, 0, 13], "fd00:18::13"),
            net.ip([10, 244, 2, 21], "fd00:244:0:2::21"),
            net.ip([10, 244, 3, 31], "fd00:244:0:3::31"),
        ];
        let strange = parse_addresses(match net {
            Net::V4 => &[
                "127.0.0.1",
                "0.0.0.0",
                "0.1.2.3",
                "224.0.0.1",
                "239.1.1.1",
                "255.255.255.255",
                "240.1.2.3",
                "169.254.1.1",
                "172.18.0.255",
                "10.99.99.99",
            ],
            Net::V6 => &[
                "::",
                "::1",
                "ff02::1",
                "ff0e::1",
                "fe80::1",
                "fe80::a",
                "::ffff:10.244.1.10",
                "::ffff:10.244.1.11",
                "::ffff:192.0.2.10",
                "fd00:99::99",
                "::ac12:c",
            ],
        });
        if self.one_in(5) { self.pick(&strange) } else { self.pick(&honest) }
    }

    fn case(&self, at: u8, f: &Frame) -> Case {
        let ifindex = match at {
            hook::FROM_POD if f.smac == MAC_B => POD_B,
            hook::FROM_POD => POD_A,
            hook::UPLINK_IN => UPLINK,
            _ => OVERLAY,
        };
        let tunnelled = at == hook::OVERLAY_IN;
        let vni = if tunnelled { VNI } else { 0 };
        Case { hook: at, ifindex, remote: tunnelled.then_some(self.far_end), vni, vlan: None, bytes: Vec::new() }
    }

    /// By which door a packet with this source would come, and with which MACs.
    fn door(net: Net, f: &Frame) -> (u8, Frame) {
        let near =
            |ip: IpAddr| ip == net.far() || ip == net.node2() || ip == net.ip([10, 244, 2, 21], "fd00:244:0:2::21");
        match f.src {
            src if src == net.a() => (hook::FROM_POD, as_from_a(f)),
            src if src == net.b() => (hook::FROM_POD, as_from_b(f)),
            src if near(src) => (hook::OVERLAY_IN, f.map(|f| (f.smac, f.dmac) = (MAC_OUT, MAC_HOST))),
            _ => (hook::UPLINK_IN, f.map(|f| (f.smac, f.dmac) = (MAC_OUT, MAC_HOST))),
        }
    }

    /// An honest packet, or one of the kinds that are hostile by nature.
    fn frame(&mut self, net: Net) -> (Case, Frame) {
        if let Some(next) = self.queue.pop() {
            return next;
        }
        let proto = self.pick(&ALL);
        let (at, f) = match self.random.below(12) {
            0..=3 => {
                let to = (self.address(net), self.port());
                let f = if self.one_in(2) { from_a(net, proto, to) } else { from_b(net, proto, to) };
                let port = self.port();
                (hook::FROM_POD, f.map(|f| f.set_ports(port, to.1)))
            }
            4 => {
                let proto = self.pick(&SERVED);
                let n = 1 + self.random.below(8) as u8;
                (hook::FROM_POD, from_a(net, proto, (net.vip(n), 80)))
            }
            5 => {
                let src = self.pick(&[net.world(), net.router(), net.routed(), net.node2()]);
                let dst = self.pick(&[net.a(), net.b(), net.node()]);
                let (sport, dport) = (self.port(), self.port());
                (hook::UPLINK_IN, from_outside(proto, (src, sport), (dst, dport)))
            }
            6 => {
                let src = self.pick(&[net.far(), net.node2()]);
                let dst = self.pick(&[net.a(), net.b(), net.node(), net.nobody()]);
                let (sport, dport) = (self.port(), self.port());
                (hook::OVERLAY_IN, from_outside(proto, (src, sport), (dst, dport)))
            }
            7 | 8 if !self.history.is_empty() => {
                let (_, f) = self.pick_history();
                let f = f.reply().map(|f| f.ttl = 64);
                Self::door(net, &f)
            }
            9 if !self.history.is_empty() => {
                let (case, _) = self.pick_history();
                return (case.clone(), Self::again(case));
            }
            10 if !self.history.is_empty() => {
                let (_, about) = self.pick_history();
                self.error(net, &about)
            }
            _ => return self.pieces(net),
        };
        (self.case(at, &f), f)
    }

    fn pick_history(&mut self) -> (Case, Frame) {
        let n = self.history.len();
        let at = if self.one_in(2) { n - 1 - self.random.below(n.min(8)) } else { self.random.below(n) };
        self.history[at].clone()
    }

    /// The packet as it came in before: its bytes say so, and no more can be changed of it.
    fn again(case: Case) -> Frame {
        let mut f = from_a(Net::V4, Proto::Udp, (Net::V4.b(), 1));
        // A frame without an IP packet of its own, see `finish`.
        f.payload = case.bytes;
        f.l4 = L4::Other(RAW);
        f
    }

    fn error(&mut self, net: Net, about: &Frame) -> (u8, Frame) {
        let kinds = match net {
            Net::V4 => [(3, 1), (3, 4), (11, 0), (5, 0), (12, 0)],
            Net::V6 => [(1, 4), (2, 0), (3, 0), (4, 1), (1, 0)],
        };
        let (kind, code) = self.pick(&kinds);
        let mut quoted = about.ip_bytes();
        let least = if net == Net::V4 { 28 } else { 48 };
        if self.one_in(2) {
            quoted.truncate(least + self.random.below(40));
        }
        let src = match self.random.below(4) {
            0 | 1 => about.dst,
            2 => self.pick(&[net.router(), net.node2(), net.a(), net.b()]),
            _ => self.address(net),
        };
        let dst = if self.one_in(4) { self.address(net) } else { about.src };
        let f = about.map(|f| {
            (f.src, f.dst, f.ttl, f.piece) = (src, dst, 60, None);
            f.options.clear();
            f.extensions.clear();
            f.l4 = L4::Icmp { kind, code, rest: 1400 };
            f.payload = quoted;
        });
        Self::door(net, &f)
    }

    /// A datagram in pieces, now and then with a forged first among them.
    fn pieces(&mut self, net: Net) -> (Case, Frame) {
        self.id += 1;
        let id = if self.one_in(3) { 7 } else { 0x1000 + self.id };
        let to = (self.pick(&[net.b(), net.far(), net.world(), net.vip(1), net.vip(2), net.routed()]), 80);
        let f = match self.random.below(4) {
            0 => from_outside(Proto::Udp, (net.far(), PORT), (net.b(), 80)),
            1 => from_outside(Proto::Udp, (net.world(), PORT), (net.b(), 80)),
            _ => from_a(net, self.pick(&[Proto::Udp, Proto::Sctp, Proto::Echo]), to),
        };
        let (at, f) = Self::door(net, &f.map(|f| f.payload = vec![0x5a; 1500]));
        let mut pieces = f.pieces(id, &[800, 1200]);
        if self.one_in(3) {
            let port = self.port();
            let forged = pieces[0].map(|f| f.set_ports(port, 81));
            pieces.insert(1, if self.one_in(2) { forged.map(|f| f.smac = MAC_B) } else { forged });
        }
        if self.one_in(4) {
            pieces.swap(0, 1);
        }
        for piece in pieces.into_iter().rev() {
            let case = self.case(at, &piece);
            self.queue.push((case, piece));
        }
        self.queue.pop().unwrap_or_else(|| (self.case(at, &f), f))
    }

    /// Changes what a hostile sender can change.
    fn twist(&mut self, net: Net, case: &mut Case, f: &mut Frame) {
        match self.random.below(18) {
            0 => f.src = self.address(net),
            1 => f.dst = self.address(net),
            2 => (f.src, f.dst) = (self.address(net), self.address(net)),
            3 => {
                let (sport, dport) = (self.port(), self.port());
                f.set_ports(sport, dport);
            }
            4 => f.smac = self.pick(&[MAC_A, MAC_B, MAC_OUT, [2, 0, 0, 0, 9, 9]]),
            5 => f.vlan = Some(self.random.next() as u16),
            6 => case.vlan = Some(self.pick(&[0, 1, 100, 0xe000])),
            7 if net == Net::V4 => {
                f.options = self.pick(&[
                    vec![1, 1, 1, 1],
                    vec![131, 7, 4, 192, 0, 2, 1, 0],
                    vec![1, 137, 7, 4, 192, 0, 2, 1],
                    vec![7, 7, 4, 0, 0, 0, 0, 1],
                    vec![148, 4, 0, 0],
                    vec![1, 131, 3, 4],
                    vec![68, 0, 0, 0],
                    vec![131, 1, 1, 1],
                ]);
            }
            7 => {
                let pad = |kind| (kind, vec![0, 0, 1, 4, 0, 0, 0, 0]);
                let mut route = vec![0, 2, 0, 1, 0, 0, 0, 0];
                route.extend([0xfd; 16]);
                f.extensions = self.pick(&[
                    vec![pad(0)],
                    vec![pad(60)],
                    vec![pad(0), pad(60)],
                    vec![(43, route.clone())],
                    vec![pad(60), (43, route)],
                    vec![pad(60); 6],
                    vec![pad(60); 7],
                    vec![(51, vec![0; 16])],
                ]);
            }
            8 => f.ttl = self.pick(&[0, 1, 2, 255]),
            9 => {
                let flags = self.pick(&[SYN, ACK, FIN | ACK, RST, RST | ACK, SYN | ACK, 0, 0xff]);
                *f = f.with_flags(flags);
            }
            10 => f.l4 = L4::Other(self.pick(&[0, 2, 4, 33, 41, 47, 50, 51, 89, 115, 136, 1, 58, 255])),
            11 => {
                let kind = self.pick(&[3, 5, 9, 11, 13, 128, 130, 133, 134, 135, 136, 137, 143, 1, 2]);
                f.l4 = L4::Icmp { kind, code: 0, rest: 0 };
            }
            12 => f.payload = vec![0xa5; self.pick(&[0, 1, 7, 8, 100, 1372, 1400, 1452, 1473, 2500])],
            13 => f.may_be_cut = !f.may_be_cut,
            14 => f.padding = self.random.below(40),
            15 => case.ifindex = self.pick(&[POD_A, POD_B, UPLINK, OVERLAY]),
            16 if case.remote.is_some() => {
                case.vni = self.pick(&[0, 1, 2, 0x0001_0001, 0x00ff_ffff]);
            }
            16 => case.hook = self.pick(&[hook::FROM_POD, hook::UPLINK_IN]),
            _ if case.remote.is_some() => {
                let more = [
                    "172.18.0.13",
                    "fd00:18::13",
                    "::ffff:172.18.0.12",
                    "2001:db8:bad::12",
                    "2001:db8:bad::ffff:ac12:c",
                ];
                let more = more.iter().flat_map(|text| text.parse()).chain(BOTH.map(Net::node2)).collect::<Vec<_>>();
                case.remote = Some(self.pick(&more));
            }
            _ => f.l4 = L4::Udp { sport: PORT, dport: 8472, checksum: self.one_in(2) },
        }
        if f.src.is_ipv4() != f.dst.is_ipv4() {
            f.dst = f.src;
        }
        // An ICMP error that quotes a packet of the other family is made of bytes, below.
        if let L4::Udp { checksum, .. } = &mut f.l4 {
            *checksum |= f.src.is_ipv6();
        }
    }

    /// A packet, and whether it is a plain one that answers can be made of.
    fn next(&mut self, net: Net) -> (Case, Frame, bool) {
        let (mut case, mut f) = self.frame(net);
        if matches!(f.l4, L4::Other(RAW)) {
            case.bytes =
                if self.one_in(4) { mutate(&mut self.random, &f.payload) } else { std::mem::take(&mut f.payload) };
            return (apart(case), f, false);
        }
        if self.one_in(2) {
            let before = f.clone();
            for _ in 0..=self.random.below(3) {
                self.twist(net, &mut case, &mut f);
            }
            if f.payload.len() != before.payload.len()
                || std::mem::discriminant(&f.l4) != std::mem::discriminant(&before.l4)
            {
                // Another datagram: the pieces of this one do not fit.
                f.piece = None;
            }
        }
        if case.hook != hook::OVERLAY_IN {
            (case.remote, case.vni) = (None, 0);
        }
        case.bytes = f.bytes();
        let plain = if self.one_in(6) {
            case.bytes = mutate(&mut self.random, &case.bytes);
            false
        } else {
            if self.one_in(40) {
                let kind = self.pick(&[0x0806_u16, 0x88cc, 0x8847, 0x8864, 0x0026, 0x88a8, 0x9100]);
                case.bytes.splice(12..14, kind.to_be_bytes());
            }
            true
        };
        (apart(case), f, plain)
    }
}

/// With equal MACs, an answer looks like a packet that was sent on.
fn apart(mut case: Case) -> Case {
    if case.bytes[..6] == case.bytes[6..12] {
        case.bytes[0] ^= 4;
    }
    case
}

/// Marks a frame that is given by its bytes alone.
const RAW: u8 = 254;

fn run(lab: &Lab, case: &Case) -> Result<testkit::datapath::Output> {
    // The kernel wants an IP header to begin with.
    let (len, mut whole) = (case.bytes.len(), case.bytes.clone());
    whole.resize(len.max(64), 0);
    let cut = if whole.len() == len { 0 } else { len as u32 };
    let Case { ifindex, vni, vlan, remote: tunnel, .. } = *case;
    let input = Input { frame: &whole, ifindex, tunnel, vni, vlan, cut, ..Input::default() };
    let name = hook::NAMES[case.hook as usize];
    lab.datapath().run(name, &input)?.context("no sum was asked for")
}

/// One broken rule, how often it was broken, and the first packet that broke it.
struct Offence {
    times: u64,
    example: String,
}

/// Of the frames on one set of tables: all the rules that were broken.
fn episode(lab: &Lab, path: Path, maker: &mut Maker, numbers: Range<u64>, tally: &mut Tally) -> Result<()> {
    let net = BOTH[(numbers.start / EPISODE % 2) as usize];
    lab.reset()?;
    let masquerade = !maker.one_in(8);
    let encapsulate = if path == Path::Programs { config::flags::ENCAPSULATE } else { 0 };
    lab.configure(|c| c.flags = encapsulate | if masquerade { config::flags::MASQUERADE } else { 0 })?;
    // With the programs, tunnels of the other family, too.
    let is_other = path == Path::Programs && numbers.start / EPISODE / 2 % 2 == 1;
    maker.far_end = BOTH[usize::from((net == Net::V6) != is_other)].node2();
    lab.put_peer(net.node2(), None, peer::flags::NODE | peer::flags::TUNNEL, Some(maker.far_end))?;
    lab.put_peer(net.far(), Some((24, 64)), peer::flags::POD | peer::flags::TUNNEL, Some(maker.far_end))?;
    let mut model = Model::new(services(net), masquerade, maker.far_end);
    for s in &model.services {
        lab.serve(s.vip, s.port, s.proto, 0, &s.to)?;
    }
    maker.history.clear();
    maker.queue.clear();
    for number in numbers {
        let (case, f, plain) = maker.next(net);
        let ran = match path {
            Path::Device => run(lab, &case).map(Ran::by_device),
            Path::Programs => run_past(lab, &case),
        };
        let Ran { out, is_past, broken } = ran.with_context(|| format!("frame {number}"))?;
        *tally.verdicts.entry((case.hook, out.verdict)).or_default() += 1;
        let past = if case.hook == hook::FROM_POD { PAST[0] } else { PAST[1] };
        *tally.reached.entry(past).or_default() += u64::from(is_past);
        if let Err(broken) = broken.map_or_else(|| model.judge(&case, &out), Err) {
            let offence = tally
                .broken
                .entry((broken, case.hook))
                .or_insert_with(|| Offence { times: 0, example: example(number, &case, &out) });
            offence.times += 1;
            // The tables and the model differ from here on: the next episode begins with new ones.
            break;
        }
        let answered = out.frame[..6] == case.bytes[6..12];
        if plain && out.verdict == REDIRECT && !answered && f.vlan.is_none() && f.padding == 0 {
            // As the packet left, by the addresses and ports that are in it now.
            let left = as_it_left(&f, &out.frame);
            maker.history.extend(left.map(|f| (case, f)));
        }
    }
    for (what, times) in model.reached {
        *tally.reached.entry(what).or_default() += times;
    }
    Ok(())
}

/// The frame with what the programs changed.
fn as_it_left(f: &Frame, bytes: &[u8]) -> Option<Frame> {
    let packet::L2::Ip(seen) = packet::read(bytes) else { return None };
    let seen = (*seen)?;
    if !matches!(seen.kind, packet::Kind::Flow) || f.piece.is_some() || seen.tuple.src.is_ipv4() != f.src.is_ipv4() {
        return None;
    }
    let t = seen.tuple;
    Some(f.map(|f| {
        (f.src, f.dst, f.ttl) = (t.src, t.dst, 64);
        f.set_ports(t.sport, t.dport);
    }))
}

/// The headers, and what else there is room for.
fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    let mut text = String::new();
    for b in &bytes[..bytes.len().min(160)] {
        let _ = write!(text, "{b:02x}");
    }
    if bytes.len() > 160 {
        let _ = write!(text, "... {} bytes", bytes.len());
    }
    text
}

fn example(number: u64, case: &Case, out: &testkit::datapath::Output) -> String {
    format!(
        "frame {number} at {} of device {}, out of {:?} vni {}, tag {:?}: verdict {}, mark {:#x}\n   in {:?}\n      {}\n  out {:?}\n      {}",
        hook::NAMES[case.hook as usize],
        case.ifindex,
        case.remote,
        case.vni,
        case.vlan,
        out.verdict,
        out.mark,
        packet::read(&case.bytes),
        hex(&case.bytes),
        packet::read(&out.frame),
        hex(&out.frame)
    )
}

/// What has to be among the packets of each run.
const REACHED: [&str; 9] = [
    "a plain packet",
    "a packet to a service",
    "a masqueraded packet",
    "an answer of a service here",
    "an answer of a service behind the tunnel",
    "an answer of the world",
    "a translated error",
    "a later fragment",
    "a refusal",
];

/// The same with the overlay past its device.
const PAST: [&str; 2] = ["a packet into the tunnel past the device", "a packet out of the tunnel past the device"];

#[derive(Default)]
struct Tally {
    verdicts: BTreeMap<(u8, i32), u64>,
    broken: BTreeMap<(Broken, u8), Offence>,
    reached: BTreeMap<&'static str, u64>,
}

/// A number from the environment, also as `0x...`.
pub fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    text.strip_prefix("0x").map_or_else(|| text.parse().ok(), |hex| u64::from_str_radix(hex, 16).ok())
}

/// Where the overlay's headers are written and taken off.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Path {
    Device,
    Programs,
}

#[test]
fn random_packets() -> Result<()> {
    lab(|lab| judge_all(lab, Path::Device))
}

/// The same frames have the same outcome, or one that the model cannot tell from it.
#[test]
fn random_packets_past_the_device() -> Result<()> {
    lab_apart(|lab| {
        // What is for another MAC is not for this host. A link that changes its address forgets its neighbours.
        lab.ip("link set eth0 address 02:00:00:00:ff:01")?;
        lab.ip(NEIGHBOURS)?;
        judge_all(lab, Path::Programs)
    })
}

fn judge_all(lab: &Lab, path: Path) -> Result<()> {
    let frames = number("RUSTNET_FUZZ").unwrap_or(FRAMES);
    let seed = number("RUSTNET_FUZZ_SEED").unwrap_or(0x5eed_0000_0002);
    eprintln!("{frames} frames, seed {seed:#x}");
    let mut tally = Tally::default();
    let mut first = 0;
    while first < frames {
        // Each episode has a seed of its own, so that one alone can be run again.
        let random = Random(seed.wrapping_add(first.wrapping_mul(0x9e37_79b9_7f4a_7c15)) | 1);
        let mut maker = Maker { random, history: Vec::new(), queue: Vec::new(), id: 0, far_end: Net::V4.node2() };
        let next = first + EPISODE.min(frames - first);
        episode(lab, path, &mut maker, first..next, &mut tally)?;
        first = next;
    }
    eprintln!("verdicts {:?}, passed {:?}", tally.verdicts, tally.reached);
    let broken: Vec<String> =
        tally.broken.iter().map(|((rule, _), o)| format!("{} x {rule}, first by\n{}", o.times, o.example)).collect();
    ensure!(broken.is_empty(), "seed {seed:#x}: {} rules are broken:\n{}", broken.len(), broken.join("\n"));
    // Frames that all die at the first check would prove nothing.
    let further: &[&str] = if path == Path::Programs { &PAST } else { &[] };
    for what in REACHED.iter().chain(further) {
        let times = tally.reached.get(what).copied().unwrap_or(0);
        ensure!(times >= frames / 2000, "{what} has passed {times} times of {frames}: {:?}", tally.reached);
    }
    Ok(())
}
