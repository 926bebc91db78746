//! The model: which source may appear at which destination, which translation is legitimate, what
//! may pass at all. It judges each packet by what went in and what came out, and remembers which
//! connections there are by that alone.

use super::packet::{Kind, L2, Quoted, Seen, Tuple, read, same, sums_are_right, write};
use crate::harness::{MAC_A, MAC_B, NARROW_MTU, Net, POD_A, POD_B, REDIRECT, SHOT, SNAT, STACK, VNI};
use rustnet_common::config::mark::DEFAULT as MARK_PROCESSED;
use rustnet_common::drop::hook;
use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use testkit::datapath::Output;

/// A packet and where it comes in.
#[derive(Clone, Debug)]
pub struct Case {
    pub hook: u8,
    pub ifindex: u32,
    pub remote: Option<IpAddr>,
    pub vni: u32,
    pub vlan: Option<u16>,
    pub bytes: Vec<u8>,
}

/// A rule that a packet broke.
pub type Broken = &'static str;

/// A service: address, port, protocol, backends.
pub struct Service {
    pub vip: IpAddr,
    pub port: u16,
    pub proto: u8,
    pub to: Vec<(IpAddr, u16)>,
}

/// Where an address lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// A pod of this node: interface and MAC.
    Pod(u32, [u8; 6]),
    Vip,
    Host,
    /// This node's range, but no pod.
    Nobody,
    /// Behind the tunnel, of the node with this address; true for the node itself.
    Tunnel(IpAddr, bool),
    Routed,
    /// Loopback, unspecified, IPv4-mapped.
    Martian,
    /// Multicast, broadcast, IPv6 link-local.
    Link,
    World,
}

/// All that has been seen of a run.
pub struct Model {
    pub services: Vec<Service>,
    masquerade: bool,
    /// The other node, as the far end of tunnels.
    far_end: IpAddr,
    /// What each direction of each connection becomes.
    table: HashMap<Tuple, Tuple>,
    /// Flows of first fragments, by interface, addresses, identification and (IPv4) protocol; none where only the
    /// connection, but not the packet, may have passed.
    fragments: HashMap<(u32, IpAddr, IpAddr, u32, u8), Option<Tuple>>,
    /// Flows that may have a connection, though none of their packets has passed.
    maybe: Vec<Tuple>,
    /// What has passed, by its kind.
    pub reached: BTreeMap<&'static str, u64>,
}

fn prefix(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(a) => {
            let [a, b, c, _] = a.octets();
            IpAddr::from([a, b, c, 0])
        }
        IpAddr::V6(a) => IpAddr::V6(Ipv6Addr::from(u128::from(a) >> 64 << 64)),
    }
}

fn martian(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(a) => matches!(a.octets()[0], 0 | 127),
        IpAddr::V6(a) => a.is_loopback() || a.is_unspecified() || a.to_ipv4_mapped().is_some(),
    }
}

fn is_mapped(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(a) if a.to_ipv4_mapped().is_some())
}

fn link(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(a) => a.is_multicast() || a == Ipv4Addr::BROADCAST,
        IpAddr::V6(a) => a.is_multicast() || a.is_unicast_link_local(),
    }
}

fn net_of(ip: IpAddr) -> Net {
    if ip.is_ipv4() { Net::V4 } else { Net::V6 }
}

impl Model {
    pub fn new(services: Vec<Service>, masquerade: bool, far_end: IpAddr) -> Self {
        Self {
            services,
            masquerade,
            far_end,
            table: HashMap::new(),
            fragments: HashMap::new(),
            maybe: Vec::new(),
            reached: BTreeMap::new(),
        }
    }

    fn place(&self, ip: IpAddr) -> Place {
        let net = net_of(ip);
        let near = |other: IpAddr| prefix(ip) == prefix(other);
        match ip {
            _ if martian(ip) => Place::Martian,
            _ if link(ip) => Place::Link,
            _ if ip == net.a() => Place::Pod(POD_A, MAC_A),
            _ if ip == net.b() => Place::Pod(POD_B, MAC_B),
            _ if ip == net.node() => Place::Host,
            _ if ip == net.node2() => Place::Tunnel(self.far_end, true),
            _ if self.services.iter().any(|s| s.vip == ip) => Place::Vip,
            _ if near(net.nobody()) => Place::Nobody,
            _ if near(net.far()) => Place::Tunnel(self.far_end, false),
            _ if near(net.routed()) || near(net.narrow()) => Place::Routed,
            _ => Place::World,
        }
    }

    /// Judges a packet, and learns from it what connections there are.
    pub fn judge(&mut self, case: &Case, out: &Output) -> Result<(), Broken> {
        match out.verdict {
            SHOT => {
                self.stopped(case);
                return Ok(());
            }
            STACK | REDIRECT => {}
            _ => return Err("a verdict that means nothing"),
        }
        if sums_are_right(&case.bytes) && !sums_are_right(&out.frame) {
            return Err("a right checksum became wrong");
        }
        let unchanged = out.verdict == STACK && out.frame == case.bytes;
        let seen = match read(&case.bytes) {
            _ if case.hook != hook::UPLINK_IN && case.vlan.is_some() => {
                return Err("a frame with a tag outside of it passes");
            }
            _ if case.vlan.is_some_and(|tci| tci & 0xfff != 0) => {
                return if unchanged { Ok(()) } else { Err("another VLAN's frame at the uplink is touched") };
            }
            L2::Tagged if case.hook != hook::UPLINK_IN => return Err("a tagged frame passes"),
            L2::Other if case.hook == hook::FROM_POD => return Err("a pod's frame that is not IP passes"),
            L2::Tagged | L2::Other => return if unchanged { Ok(()) } else { Err("a frame of no concern is touched") },
            L2::Ip(seen) => *seen,
        };
        let Some(seen) = seen else {
            return match case.hook {
                hook::UPLINK_IN if unchanged => Ok(()),
                hook::UPLINK_IN => Err("a malformed packet at the uplink is touched"),
                _ => Err("a malformed packet passes"),
            };
        };
        match case.hook {
            hook::FROM_POD => self.at_pod(case, &seen, out),
            hook::UPLINK_IN => self.at_uplink(case, &seen, out, unchanged),
            _ => self.at_overlay(case, &seen, out),
        }
    }

    /// Its last hop and its size end a packet late: its connection may be open, and its fragments known.
    fn stopped(&mut self, case: &Case) {
        let L2::Ip(seen) = read(&case.bytes) else { return };
        let Some(seen) = *seen else { return };
        if matches!(seen.kind, Kind::Flow) && (seen.ttl < 2 || too_long(&seen)) {
            self.maybe.push(seen.tuple);
            if seen.more {
                self.fragments.insert(key(case, &seen), None);
            }
        }
    }

    fn at_pod(&mut self, case: &Case, seen: &Seen, out: &Output) -> Result<(), Broken> {
        let t = seen.tuple;
        match self.place(t.src) {
            Place::Pod(ifindex, mac) if ifindex == case.ifindex && case.bytes[6..12] == mac => {}
            _ => return Err("a pod's packet with a source that is not its own passes"),
        }
        if matches!(seen.kind, Kind::Link) || seen.listener {
            return Err("a pod's neighbour discovery or listener report passes");
        }
        match self.place(t.dst) {
            Place::Martian => return Err("a pod's packet to a martian address passes"),
            // To the gateway's own address the stack may answer.
            Place::Link if out.verdict == STACK && !t.dst.is_multicast() && t.dst.is_ipv6() => return Ok(()),
            Place::Link => return Err("a pod's packet to a group passes"),
            _ => {}
        }
        if seen.source_route {
            return Err("a pod's source route passes");
        }
        if is_answer(case, out) {
            return self.answer(case, seen, out);
        }
        let Some(to) = self.passed(case, seen, out)? else { return Ok(()) };
        if to.proto == 17
            && to.dport == 8472
            && !matches!(self.place(to.dst), Place::Pod(..))
            && !matches!(seen.kind, Kind::Later)
        {
            return Err("a pod reaches the overlay's port");
        }
        match (self.place(to.dst), out.verdict) {
            (Place::Pod(..), REDIRECT) if out.mark == 0 => Ok(()),
            (Place::Pod(..), _) => Err("a packet for a pod goes elsewhere"),
            (Place::Host | Place::Nobody, STACK) => Ok(()),
            (Place::Host | Place::Nobody, _) => Err("a packet for the host goes elsewhere"),
            (Place::Tunnel(..) | Place::Routed | Place::World, REDIRECT) if out.mark == MARK_PROCESSED => Ok(()),
            // The kernel knows no way: its stack says so, of the packet as it was sent. Or it has to cut the packet first.
            (Place::Routed | Place::World, STACK) if to == t || out.mark == MARK_PROCESSED => Ok(()),
            (Place::Vip, _) => Err("a packet for a service leaves untranslated"),
            _ => Err("a packet of a pod goes where it should not"),
        }
    }

    fn at_uplink(&mut self, case: &Case, seen: &Seen, out: &Output, unchanged: bool) -> Result<(), Broken> {
        let t = seen.tuple;
        let (from, to) = (self.place(t.src), self.place(t.dst));
        if unchanged {
            let to_overlay = t.proto == 17 && t.dport == 8472 && matches!(seen.kind, Kind::Flow);
            return match (from, to) {
                // Without ports there may be no first, which only the stack can say.
                _ if matches!(seen.kind, Kind::Later) || seen.deep || seen.listener => Ok(()),
                // These the stack drops before it asks for a way.
                _ if seen.source_route || is_mapped(t.src) || is_mapped(t.dst) => Ok(()),
                (_, Place::Pod(..)) => Err("a packet for a pod goes past the checks"),
                (_, Place::Vip) if matches!(seen.kind, Kind::Flow | Kind::Error(_)) => {
                    Err("a packet for a service goes past the checks")
                }
                (Place::Tunnel(_, true), Place::Host) => Ok(()),
                (_, Place::Host) if to_overlay => Err("a stranger reaches the overlay's port"),
                (Place::Tunnel(_, false), Place::Host) => Err("a remote pod speaks to the host without the tunnel"),
                _ => Ok(()),
            };
        }
        if to == Place::Vip && matches!(seen.kind, Kind::Error(_)) {
            return Err("an error to a service gets in");
        }
        if out.verdict == STACK && matches!(seen.kind, Kind::Error(_)) && !matches!(to, Place::Pod(..)) {
            // About a flow of this node, but for another machine: the stack forwards it.
            return self.passed(case, seen, out).map(drop);
        }
        if out.verdict == STACK {
            return Err("a packet for the host is changed");
        }
        match from {
            Place::World | Place::Routed => {}
            // A node may complain to this one without the tunnel.
            Place::Tunnel(_, true) if to == Place::Host && matches!(seen.kind, Kind::Error(_)) => {}
            _ => return Err("a forged source at the uplink gets in"),
        }
        if matches!(seen.kind, Kind::Link) {
            return Err("neighbour discovery is forwarded");
        }
        if seen.source_route {
            return Err("a source route from outside gets in");
        }
        if is_answer(case, out) {
            return self.answer(case, seen, out);
        }
        let Some(to) = self.passed(case, seen, out)? else { return Ok(()) };
        match self.place(to.dst) {
            Place::Pod(..) if out.mark == 0 => Ok(()),
            Place::World | Place::Routed if matches!(seen.kind, Kind::Error(_)) => Ok(()),
            _ => Err("the uplink's packet leaves again"),
        }
    }

    fn at_overlay(&mut self, case: &Case, seen: &Seen, out: &Output) -> Result<(), Broken> {
        if case.vni != VNI {
            return Err("another network's packet gets in");
        }
        match self.place(seen.tuple.src) {
            Place::Tunnel(node, _) if case.remote == Some(node) => {}
            _ => return Err("a tunnel's packet with a source that is not its far end's gets in"),
        }
        if matches!(seen.kind, Kind::Link) {
            return Err("neighbour discovery comes out of the tunnel");
        }
        if self.place(seen.tuple.dst) == Place::Vip && matches!(seen.kind, Kind::Error(_)) {
            return Err("an error to a service comes out of the tunnel");
        }
        if seen.source_route && out.verdict == REDIRECT {
            return Err("a source route out of the tunnel gets in");
        }
        if is_answer(case, out) {
            return self.answer(case, seen, out);
        }
        let Some(to) = self.passed(case, seen, out)? else { return Ok(()) };
        match (self.place(to.dst), out.verdict) {
            (Place::Pod(..), REDIRECT) if out.mark == 0 => Ok(()),
            (Place::Host | Place::Nobody, STACK) => Ok(()),
            _ => Err("a tunnel's packet goes where it should not"),
        }
    }

    /// What a packet became; checks that it was allowed to, and that nothing else in it changed. Nothing for a frame that
    /// went past all tables to the stack.
    fn passed(&mut self, case: &Case, seen: &Seen, out: &Output) -> Result<Option<Tuple>, Broken> {
        if case.bytes[..12] != out.frame[..12] {
            return Err("the MACs changed");
        }
        let L2::Ip(after) = read(&out.frame) else { return Err("what comes out is no IP packet") };
        let Some(after) = *after else { return Err("what comes out is malformed") };
        let ttl = if out.verdict == REDIRECT { seen.ttl.wrapping_sub(1) } else { seen.ttl };
        if seen.ttl < 2 && out.verdict == REDIRECT {
            return Err("a packet goes on after its last hop");
        }
        let (to, becomes) = match seen.kind {
            Kind::Flow => (self.flow(case, seen, after.tuple, out)?, None),
            Kind::Later => (self.later(case, seen, after.tuple, out.verdict)?, None),
            Kind::Error(quoted) => self.error(case, seen, quoted, out.verdict)?,
            Kind::Link => return Err("a packet of the link is forwarded"),
        };
        let want = write(&case.bytes, seen, &to, ttl, becomes.as_ref());
        if !same(&out.frame, &want, seen) {
            return Err(match (seen.kind, becomes) {
                (Kind::Error(_), None) => "an error that concerns nothing known is translated",
                (Kind::Error(_), Some(_)) => "an error is not translated like the flow that it quotes",
                _ => "a packet changed in more than its connection says",
            });
        }
        let reached = match (seen.kind, case.hook) {
            (Kind::Later, _) if out.verdict == REDIRECT => "a later fragment",
            (Kind::Error(_), _) if becomes.is_some_and(|b| b.src != seen.tuple.dst) => "a translated error",
            (Kind::Flow, hook::FROM_POD) if to.src == net_of(to.src).node() => "a masqueraded packet",
            (Kind::Flow, hook::FROM_POD) if to.dst != seen.tuple.dst => "a packet to a service",
            (Kind::Flow, hook::FROM_POD) if to.src != seen.tuple.src => "an answer of a service here",
            (Kind::Flow, hook::UPLINK_IN) if to != seen.tuple => "an answer of the world",
            (Kind::Flow, hook::OVERLAY_IN) if to != seen.tuple => "an answer of a service behind the tunnel",
            _ => "a plain packet",
        };
        *self.reached.entry(reached).or_default() += 1;
        Ok(Some(to))
    }

    fn flow(&mut self, case: &Case, seen: &Seen, to: Tuple, out: &Output) -> Result<Tuple, Broken> {
        let from = seen.tuple;
        let sent = out.verdict == REDIRECT || out.mark == MARK_PROCESSED;
        let known = self.table.get(&from) == Some(&to)
            || self.maybe.iter().any(|m| to == m.reversed() && self.may_become(*m, from.reversed(), true).is_ok());
        if !known {
            if case.hook == hook::FROM_POD {
                self.may_become(from, to, sent)?;
            } else if to != from && !self.is_set_apart(from, to) {
                return Err("a packet is translated without a connection that says so");
            }
        }
        // The host's own flows leave no trace, and neither does what the kernel has no way for.
        let tracked = sent || matches!(self.place(to.dst), Place::Host | Place::Nobody);
        if tracked && (case.hook == hook::FROM_POD || sent) {
            if self.table.get(&to.reversed()).is_some_and(|owner| *owner != from.reversed()) && !known {
                return Err("two connections would share their answers");
            }
            self.table.insert(from, to);
            self.table.insert(to.reversed(), from.reversed());
        }
        if seen.more {
            self.fragments.insert(key(case, seen), Some(from));
        }
        Ok(to)
    }

    /// A flow from outside whose answers would go the way of another flow that a pod has opened gets another source port.
    fn is_set_apart(&self, from: Tuple, to: Tuple) -> bool {
        let back = from.reversed();
        let other = self.table.get(&back).is_some_and(|t| *t != back) || self.maybe.contains(&back);
        other && SNAT.contains(&to.sport) && to == Tuple { sport: to.sport, ..from }
    }

    /// The rules of a new flow of a pod: a service's backend, and the node's address where one is lent.
    fn may_become(&self, from: Tuple, to: Tuple, sent: bool) -> Result<(), Broken> {
        let node = net_of(from.src).node();
        let service = self.services.iter().find(|s| (s.vip, s.port, s.proto) == (from.dst, from.dport, from.proto));
        match service {
            Some(s) if s.to.contains(&(to.dst, to.dport)) => {}
            Some(_) => return Err("a service's packet goes to none of its backends"),
            None if (to.dst, to.dport) == (from.dst, from.dport) => {}
            None => return Err("a packet gets another destination without a service"),
        }
        let itself = service.is_some() && to.dst == from.src;
        let lent = itself || (self.masquerade && self.place(to.dst) == Place::World && sent);
        let has_ports = matches!(from.proto, 6 | 17 | 132) || (matches!(from.proto, 1 | 58) && from.dport == 0);
        if to.src != if lent { node } else { from.src } {
            return Err("a packet leaves with another source than the rules say");
        }
        if to.sport != from.sport && !(has_ports && SNAT.contains(&to.sport)) {
            return Err("a packet leaves from a port that is not set aside");
        }
        if lent
            && !itself
            && has_ports
            && from.sport != 0
            && (!SNAT.contains(&to.sport) || (to.proto == 17 && to.sport == 8472))
        {
            return Err("a masqueraded packet leaves from a port that is not set aside");
        }
        Ok(())
    }

    fn later(&self, case: &Case, seen: &Seen, to: Tuple, verdict: i32) -> Result<Tuple, Broken> {
        let Some(first) = self.fragments.get(&key(case, seen)) else {
            // Between pods addresses suffice; the callers judge the source.
            let is_for_pod = match self.place(to.dst) {
                Place::Pod(..) => verdict == REDIRECT,
                Place::Tunnel(_, false) | Place::Routed => case.hook == hook::FROM_POD,
                _ => false,
            };
            return if is_for_pod || (verdict == STACK && case.hook == hook::UPLINK_IN) {
                Ok(seen.tuple)
            } else {
                Err("a later fragment passes whose first did not")
            };
        };
        let Some(first) = first else {
            let node = net_of(to.src).node();
            let served = self.services.iter().any(|s| s.vip == seen.tuple.dst && s.to.iter().any(|b| b.0 == to.dst));
            let right = [seen.tuple.src, node].contains(&to.src) && (to.dst == seen.tuple.dst || served);
            let becomes = Tuple { src: to.src, dst: to.dst, ..seen.tuple };
            return if right { Ok(becomes) } else { Err("a later fragment becomes what its first could not") };
        };
        let Some(becomes) = self.table.get(first) else {
            // What the stack got untracked is the stack's; the caller knows for which destinations that may be.
            return if verdict == STACK && (to.src, to.dst) == (seen.tuple.src, seen.tuple.dst) {
                Ok(seen.tuple)
            } else {
                Err("a later fragment passes without a connection")
            };
        };
        if (to.src, to.dst) != (becomes.src, becomes.dst) {
            return Err("a later fragment becomes another than its first");
        }
        Ok(Tuple { src: becomes.src, dst: becomes.dst, ..seen.tuple })
    }

    /// What an error becomes, and what it quotes then.
    fn error(
        &self,
        case: &Case,
        seen: &Seen,
        quoted: Option<Quoted>,
        verdict: i32,
    ) -> Result<(Tuple, Option<Tuple>), Broken> {
        let t = seen.tuple;
        let related = quoted.filter(|q| q.tuple.src == t.dst).and_then(|q| {
            let answer = self.table.get(&q.tuple.reversed())?;
            Some((q.tuple, answer.reversed()))
        });
        if let Some((quoted, becomes)) = related {
            let src = if t.src == quoted.dst { becomes.dst } else { t.src };
            let src = if becomes == quoted { t.src } else { src };
            return Ok((Tuple { src, dst: becomes.src, ..t }, Some(becomes)));
        }
        match (case.hook, self.place(t.dst), verdict) {
            (_, Place::Pod(..), _) => Err("an error about nothing known reaches a pod"),
            (hook::FROM_POD, Place::World, _) => Err("an error about nothing known leaves for the world"),
            _ => Ok((t, None)),
        }
    }

    /// An answer of this node goes to who has asked, in the name of who was asked, or of the node; and quotes what was sent.
    fn answer(&mut self, case: &Case, seen: &Seen, out: &Output) -> Result<(), Broken> {
        *self.reached.entry("a refusal").or_default() += 1;
        self.stopped(case);
        if !matches!(seen.kind, Kind::Flow) || seen.tcp_flags & 4 != 0 {
            return Err("an error, a later fragment or a reset is answered");
        }
        let L2::Ip(answer) = read(&out.frame) else { return Err("an answer is no IP packet") };
        let Some(answer) = *answer else { return Err("an answer is malformed") };
        let (t, a) = (seen.tuple, answer.tuple);
        let node = net_of(t.src).node();
        if out.mark != MARK_PROCESSED || a.dst != t.src {
            return Err("an answer goes to another than who has asked");
        }
        let vip = self.place(t.dst) == Place::Vip;
        match answer.kind {
            Kind::Flow if a.proto == 6 && vip && t.proto == 6 && answer.tcp_flags & 4 != 0 => {
                if a == t.reversed() {
                    Ok(())
                } else {
                    Err("a reset of another connection")
                }
            }
            Kind::Error(_) if a.src == node || (vip && a.src == t.dst) => {
                if a.src == node && seen.ttl > 1 && !too_long(seen) {
                    return Err("an error without a reason");
                }
                let quote = &out.frame[answer.l4 + 8..];
                if case.bytes[14..].starts_with(quote) { Ok(()) } else { Err("an answer quotes something else") }
            }
            _ => Err("an answer that is not due"),
        }
    }
}

/// Longer than the narrowest way.
fn too_long(seen: &Seen) -> bool {
    seen.end - 14 > NARROW_MTU
}

fn key(case: &Case, seen: &Seen) -> (u32, IpAddr, IpAddr, u32, u8) {
    let t = seen.tuple;
    (case.ifindex, t.src, t.dst, seen.id, if t.src.is_ipv4() { t.proto } else { 0 })
}

/// Answers of this node bear the question's MACs, turned round; nothing else that is sent on has other MACs than before.
fn is_answer(case: &Case, out: &Output) -> bool {
    out.verdict == REDIRECT && out.frame[..6] == case.bytes[6..12] && out.frame[6..12] == case.bytes[..6]
}
