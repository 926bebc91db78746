//! The plain model: from all objects at once to what packets should meet, with no state, no order and no cleverness.

use super::cluster::{Cluster, Endpoint, Node, Object, Service, Slice, Sort, node_port};
use ipnet::IpNet;
use rustnet_agent::config::{Algorithm, Forwarding, Routing};
use rustnet_agent::index::Settings;
use rustnet_agent::model::Family;
use rustnet_agent::plan::MemoryMaps;
use rustnet_common::service::scope;
use rustnet_common::{backend, peer, service};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// Address, port, protocol, scope.
pub type Key = (IpAddr, u16, u8, u8);
/// Address, port, flags.
type Backend = (IpAddr, u16, u16);
/// Flags, affinity, whether a Maglev table spreads the flows, backends in order.
type Entry = (u16, u32, bool, Vec<Backend>);
/// Far end, identity, flags.
type Peer = (Option<IpAddr>, u32, u16);

/// What packets meet, without the numbers that the plan is free to choose.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Table {
    services: BTreeMap<Key, Entry>,
    peers: BTreeMap<IpNet, Peer>,
}

impl Table {
    /// What the maps hold.
    pub fn of(maps: &MemoryMaps) -> Self {
        let services = maps.held().services.iter().map(|(key, entry)| {
            let backends = maps.backends(entry).iter().map(|b| (b.addr.into(), b.port, b.flags)).collect();
            ((key.ip, key.port, key.proto, key.scope), (entry.flags, entry.affinity, entry.table != 0, backends))
        });
        let peers = maps.held().peers.iter().map(|(prefix, peer)| {
            let node: IpAddr = peer.node.into();
            (*prefix, ((!node.is_unspecified()).then_some(node), peer.identity, peer.flags))
        });
        Self { services: services.collect(), peers: peers.collect() }
    }

    /// Entries whose backends have the same addresses share a table, and no others do. Each backend has as many places as the others,
    /// give or take one.
    pub fn check_tables(maps: &MemoryMaps) {
        let mut tables: BTreeMap<Vec<IpAddr>, u16> = BTreeMap::new();
        for entry in maps.held().services.values().filter(|entry| entry.table != 0) {
            let addresses = maps.backends(entry).iter().map(|b| b.addr.into()).collect();
            assert_eq!(*tables.entry(addresses).or_insert(entry.table), entry.table);
            let mut shares = vec![0_u32; entry.count as usize];
            let places = maps.held().ordinals(entry.table).unwrap();
            places.for_each(|ordinal| shares[ordinal as usize] += 1);
            let (least, most) = (shares.iter().min().unwrap(), shares.iter().max().unwrap());
            assert!(most - least <= 1, "{shares:?}");
        }
        let used: BTreeSet<u16> = tables.values().copied().collect();
        assert_eq!(used.len(), tables.len(), "{tables:?}");
    }

    /// True if there is an entry for this.
    pub fn has(&self, key: Key) -> bool {
        self.services.contains_key(&key)
    }

    /// Each entry is as it was before or as it is after. The flags of a backend may be the new ones
    /// before its service's entry is: they change in place.
    pub fn is_old_or_new(&self, old: &Self, new: &Self) {
        let keys: BTreeSet<_> = [self, old, new].into_iter().flat_map(|table| table.services.keys()).collect();
        for key in keys {
            let (is, was, will) = (self.services.get(key), old.services.get(key), new.services.get(key));
            assert!(alike(is, was) || alike(is, will), "{key:?}: {is:?} is neither {was:?} nor {will:?}");
            // A set that other entries have, too, changes its flags for all.
            let has = |backend| was.into_iter().chain(new.services.values()).any(|(.., all)| all.contains(backend));
            assert!(
                is.is_none_or(|(.., all)| all.iter().all(has)),
                "{key:?}: flags of {is:?} are not of {was:?} or {will:?}"
            );
            // A wildcard refuses what has no entry: it must not come before the ports do.
            let wildcard = (key.0, 0, 0, key.3);
            let new = self.services.contains_key(&wildcard) && !old.services.contains_key(&wildcard);
            assert!(!new || will.is_none() || alike(is, will), "{key:?} is refused for a moment");
        }
        let prefixes: BTreeSet<_> = [self, old, new].into_iter().flat_map(|table| table.peers.keys()).collect();
        for prefix in prefixes {
            let (is, was, will) = (self.peers.get(prefix), old.peers.get(prefix), new.peers.get(prefix));
            assert!(is == was || is == will, "{prefix}: {is:?} is neither {was:?} nor {will:?}");
        }
    }
}

/// True if two entries are alike but for the flags of their backends.
fn alike(a: Option<&Entry>, b: Option<&Entry>) -> bool {
    let (Some(a), Some(b)) = (a, b) else { return a == b };
    let targets = |entry: &Entry| entry.3.iter().map(|(ip, port, _)| (*ip, *port)).collect::<Vec<_>>();
    (a.0, a.1, a.2) == (b.0, b.1, b.2) && targets(a) == targets(b)
}

/// What the maps should hold.
pub fn expected(cluster: &Cluster, settings: &Settings) -> Table {
    Table { services: services(cluster, settings), peers: peers(cluster, settings) }
}

fn proto(name: &str) -> u8 {
    match name {
        "TCP" => 6,
        "UDP" => 17,
        "SCTP" => 132,
        other => panic!("{other}"),
    }
}

/// The ports that survive validation: no port 0, each number and each name once for a protocol, the first counts.
fn valid(ports: &[(String, u16, &'static str)], numbers_once: bool) -> Vec<(String, u16, u8)> {
    let mut kept: Vec<(String, u16, u8)> = Vec::new();
    for (name, port, protocol) in ports {
        let protocol = proto(protocol);
        let taken = kept.iter().any(|(n, p, pr)| *pr == protocol && (n == name || (numbers_once && p == port)));
        if *port != 0 && !taken {
            kept.push((name.clone(), *port, protocol));
        }
    }
    kept
}

fn own_node<'a>(cluster: &'a Cluster, settings: &Settings) -> Option<&'a Node> {
    nodes(cluster).into_iter().find(|node| *node.name == *settings.node_name)
}

/// Nodes in order of age, then name.
fn nodes(cluster: &Cluster) -> Vec<&Node> {
    let mut nodes: Vec<&Node> =
        cluster.values().filter_map(|o| if let Object::Node(n) = o { Some(n) } else { None }).collect();
    nodes.sort_by_key(|node| (node.created, node.name.clone()));
    nodes
}

fn links() -> [IpNet; 3] {
    crate::LINKS.map(|net| net.parse().unwrap())
}

fn own_addresses(cluster: &Cluster, settings: &Settings) -> BTreeSet<IpAddr> {
    let named =
        own_node(cluster, settings).into_iter().flat_map(|node| node.addresses.iter().map(|a| a.parse().unwrap()));
    links().iter().map(IpNet::addr).chain(named).collect()
}

/// A way to a port of a Service.
struct Frontend<'a> {
    service: &'a Service,
    /// Name of the port.
    name: String,
    is_local: bool,
}

/// Services that are served, the oldest first.
fn plain(cluster: &Cluster) -> Vec<&Service> {
    let mut all: Vec<&Service> =
        cluster.values().filter_map(|o| if let Object::Service(s) = o { Some(s) } else { None }).collect();
    all.retain(|service| service.sort == Sort::Plain);
    all.sort_by_key(|service| (service.created, service.name.clone()));
    all
}

fn parsed(addresses: &[String]) -> Vec<IpAddr> {
    addresses.iter().map(|it| it.parse::<IpAddr>().unwrap()).filter(|ip| !ip.is_loopback()).collect()
}

/// Who has each entry, and how it gets there: the oldest Service that names it, unless it is an address of this node that a Service
/// has for its own.
fn frontends<'a>(cluster: &'a Cluster, settings: &Settings) -> BTreeMap<Key, Frontend<'a>> {
    let own = own_addresses(cluster, settings);
    let mut owners: BTreeMap<Key, Vec<(&Service, Option<Frontend<'a>>)>> = BTreeMap::new();
    for service in plain(cluster) {
        let vips = parsed(&service.vips);
        let of_family = |ip: &IpAddr| vips.iter().any(|vip| vip.is_ipv6() == ip.is_ipv6());
        let external: Vec<IpAddr> = parsed(&service.external).into_iter().filter(of_family).collect();
        let nodes: Vec<IpAddr> = own.iter().copied().filter(of_family).collect();
        // Sockets of the host ask there, and no packet does.
        let loopback = ["127.0.0.1", "::1"].map(|ip| ip.parse::<IpAddr>().unwrap());
        let loopback = loopback.into_iter().filter(|ip| settings.has_host_sockets && of_family(ip));
        let loopback: Vec<IpAddr> = loopback.collect();
        for (name, port, protocol) in valid(&service.ports, true) {
            let mut add = |addresses: &[IpAddr], port: u16, scope: u8, is_local: bool, is_external: bool| {
                for ip in addresses {
                    let frontend = Frontend { service, name: name.clone(), is_local };
                    let allowed = is_external || !own.contains(ip);
                    owners
                        .entry((*ip, port, protocol, scope))
                        .or_default()
                        .push((service, allowed.then_some(frontend)));
                }
            };
            add(&vips, port, scope::CLUSTER, service.local, false);
            add(&external, port, scope::CLUSTER, false, true);
            add(&external, port, scope::EXTERNAL, service.external_local, true);
            if service.has_node_ports {
                add(&loopback, node_port(port), scope::CLUSTER, false, true);
                add(&nodes, node_port(port), scope::CLUSTER, false, true);
                add(&nodes, node_port(port), scope::EXTERNAL, service.external_local, true);
            }
        }
    }
    let first = |all: Vec<(&Service, Option<Frontend<'a>>)>| {
        let winner = all.first()?.0.name.clone();
        all.into_iter().filter(|(service, _)| service.name == winner).find_map(|(_, frontend)| frontend)
    };
    owners.into_iter().filter_map(|(key, all)| Some((key, first(all)?))).collect()
}

fn services(cluster: &Cluster, settings: &Settings) -> BTreeMap<Key, Entry> {
    let own = own_addresses(cluster, settings);
    let mut table: BTreeMap<Key, Entry> = BTreeMap::new();
    for ((ip, port, protocol, scope), Frontend { service, name, is_local }) in frontends(cluster, settings) {
        let (flags, is_hinted, backends) =
            backends(cluster, settings, service, is_local, &name, protocol, ip.is_ipv6());
        let algorithm = match service.algorithm {
            Some("maglev") => Algorithm::Maglev,
            Some("random") => Algorithm::Random,
            _ => settings.lb_algorithm,
        };
        let is_direct = match service.forwarding {
            Some(mode) => mode == "dsr",
            None => settings.forwarding == Forwarding::Dsr,
        };
        let is_of_family = |it: &&'static str| it.parse::<IpAddr>().is_ok_and(|it| it.is_ipv6() == ip.is_ipv6());
        let is_named = own_node(cluster, settings).is_none_or(|node| node.addresses.iter().any(is_of_family));
        let is_direct = is_direct && is_named && scope == scope::EXTERNAL && !is_local && !is_hinted;
        let flags = flags | if is_direct { service::flags::DIRECT } else { 0 };
        // One backend gets all flows without a table.
        let has_table = algorithm == Algorithm::Maglev && backends.len() > 1;
        table.insert((ip, port, protocol, scope), (flags, service.affinity.unwrap_or(0), has_table, backends));
    }
    let of_nodes: BTreeSet<IpAddr> =
        nodes(cluster).iter().flat_map(|node| node.addresses.iter().map(|it| it.parse().unwrap())).collect();
    for service in plain(cluster) {
        let vips = parsed(&service.vips);
        let external = parsed(&service.external).into_iter();
        let external = external.filter(|ip| vips.iter().any(|vip| vip.is_ipv6() == ip.is_ipv6()));
        for (ip, is_external) in vips.iter().map(|ip| (*ip, false)).chain(external.map(|ip| (ip, true))) {
            // Its other ports are a node's.
            if own.contains(&ip) || of_nodes.contains(&ip) {
                continue;
            }
            // What one Service has for its own, no machine outside has.
            let flags = if is_external { service::flags::VIP | service::flags::SHARED } else { service::flags::VIP };
            let cluster = table.entry((ip, 0, 0, scope::CLUSTER)).or_insert((flags, 0, false, Vec::new()));
            cluster.0 &= flags;
            if is_external {
                table.insert((ip, 0, 0, scope::EXTERNAL), (service::flags::VIP, 0, false, Vec::new()));
            }
        }
    }
    table
}

fn backends(
    cluster: &Cluster,
    settings: &Settings,
    service: &Service,
    is_local: bool,
    name: &str,
    protocol: u8,
    v6: bool,
) -> (u16, bool, Vec<Backend>) {
    let all = endpoints(cluster, service, name, protocol, v6);
    let me = &*settings.node_name;
    let zone = own_node(cluster, settings).and_then(|node| node.zone);
    let ready = |e: &Endpoint| e.ready != Some(false);
    let draining = |e: &Endpoint| !ready(e) && e.serving != Some(false) && e.terminating == Some(true);
    // One for each address and port: the first in the best condition; local if any copy says so.
    let targets: BTreeSet<(IpAddr, u16)> = all.iter().map(|(addr, port, _)| (*addr, *port)).collect();
    let mut usable: Vec<(IpAddr, u16, &Endpoint, bool)> = Vec::new();
    for (addr, port) in targets {
        let copies: Vec<&Endpoint> =
            all.iter().filter(|(a, p, _)| (*a, *p) == (addr, port)).map(|(_, _, e)| *e).collect();
        let best = copies.iter().find(|e| ready(e)).or_else(|| copies.iter().find(|e| draining(e)));
        if let Some(best) = best {
            let local = copies.iter().any(|e| serves(e) && e.node == Some(me));
            usable.push((addr, port, best, local));
        }
    }
    let entry = |(addr, port, e, local): &(IpAddr, u16, &Endpoint, bool)| {
        let mut flags = 0;
        if *local {
            flags |= backend::flags::LOCAL;
        }
        if !ready(e) {
            flags |= backend::flags::TERMINATING;
        }
        (*addr, *port, flags)
    };
    let of = |keep: &dyn Fn(&Endpoint, bool) -> bool| -> Vec<Backend> {
        usable.iter().filter(|(_, _, e, local)| keep(e, *local)).map(entry).collect()
    };
    if is_local {
        let chosen = of(&|e, local| ready(e) && local);
        let chosen = if chosen.is_empty() { of(&|_, local| local) } else { chosen };
        let elsewhere = chosen.is_empty() && !usable.is_empty();
        return (if elsewhere { service::flags::DROP_EMPTY } else { 0 }, false, chosen);
    }
    let readies: Vec<&Endpoint> = usable.iter().map(|(_, _, e, _)| *e).filter(|e| ready(e)).collect();
    let by_node =
        readies.iter().all(|e| !e.node_hints.is_empty()) && readies.iter().any(|e| e.node_hints.contains(&me));
    let by_zone = readies.iter().all(|e| !e.zone_hints.is_empty())
        && zone.is_some_and(|zone| readies.iter().any(|e| e.zone_hints.contains(&zone)));
    let chosen = of(&|e, _| {
        ready(e)
            && if by_node {
                e.node_hints.contains(&me)
            } else if by_zone {
                zone.is_some_and(|zone| e.zone_hints.contains(&zone))
            } else {
                true
            }
    });
    let is_hinted = readies.iter().any(|e| !e.node_hints.is_empty() || !e.zone_hints.is_empty());
    (0, is_hinted, if chosen.is_empty() { of(&|_, _| true) } else { chosen })
}

/// An endpoint that serves what it has, whether or not it gets more.
fn serves(endpoint: &Endpoint) -> bool {
    endpoint.ready != Some(false) || endpoint.serving != Some(false)
}

/// Every endpoint of every slice of a service, with the number that this port has there.
fn endpoints<'a>(
    cluster: &'a Cluster,
    service: &Service,
    name: &str,
    protocol: u8,
    v6: bool,
) -> Vec<(IpAddr, u16, &'a Endpoint)> {
    let mut all: Vec<(IpAddr, u16, &Endpoint)> = Vec::new();
    for object in cluster.values() {
        let Object::Slice(slice @ Slice { .. }) = object else { continue };
        if slice.service != service.name || slice.v6 != v6 {
            continue;
        }
        for (_, number, _) in valid(&slice.ports, false).iter().filter(|(n, _, p)| n == name && *p == protocol) {
            for endpoint in &slice.endpoints {
                if let Ok(addr) = endpoint.addr.parse::<IpAddr>()
                    && addr.is_ipv6() == v6
                {
                    all.push((addr, *number, endpoint));
                }
            }
        }
    }
    all
}

/// The targets that serve a UDP port, whether or not they get new flows.
pub fn serving(cluster: &Cluster, settings: &Settings, key: Key) -> BTreeSet<(IpAddr, u16)> {
    let frontends = frontends(cluster, settings);
    let all = frontends.get(&key).map(|it| endpoints(cluster, it.service, &it.name, key.2, key.0.is_ipv6()));
    let all = all.into_iter().flatten().filter(|(_, _, e)| serves(e));
    all.map(|(addr, port, _)| (addr, port)).collect()
}

fn peers(cluster: &Cluster, settings: &Settings) -> BTreeMap<IpNet, Peer> {
    let mut table: BTreeMap<IpNet, Peer> = BTreeMap::new();
    let mut ranges: Vec<IpNet> = Vec::new();
    let is_own = |node: &Node| *node.name == *settings.node_name;
    let first = |node: &Node, v6: bool| {
        node.addresses.iter().map(|addr| addr.parse::<IpAddr>().unwrap()).find(|addr| addr.is_ipv6() == v6)
    };
    let own = own_node(cluster, settings).filter(|own| !own.addresses.is_empty());
    // The overlay's family is a matter of two nodes: the one that both name first, else IPv4 if both have it, else IPv6.
    let tunnel = |node: &Node| {
        let named_first = |node: &Node| node.addresses.first().map(|it| it.contains(':'));
        let family = match (settings.overlay_family, own) {
            (Some(family), None) => Some(family == Family::V6),
            (Some(family), Some(own)) => {
                Some(family == Family::V6).filter(|v6| first(own, *v6).is_some() && first(node, *v6).is_some())
            }
            (None, None) => named_first(node),
            (None, Some(own)) if named_first(own) == named_first(node) => named_first(own),
            (None, Some(own)) => {
                [false, true].into_iter().find(|v6| first(own, *v6).is_some() && first(node, *v6).is_some())
            }
        };
        family.and_then(|v6| first(node, v6)).filter(|_| settings.routing != Routing::Native)
    };
    let on_link = |node: &Node, v6: bool| {
        let mut addresses = node.addresses.iter().map(|addr| addr.parse::<IpAddr>().unwrap());
        addresses.find(|ip| ip.is_ipv6() == v6 && links().iter().any(|net| net.contains(ip)))
    };
    let direct = |node: &Node, v6: bool| match settings.routing {
        Routing::Vxlan => None,
        Routing::Native => on_link(node, v6).or_else(|| first(node, v6)),
        Routing::DirectAndVxlan => on_link(node, v6),
    };
    for ip in links().iter().map(IpNet::addr) {
        table.insert(ip.into(), (None, peer::identity::HOST, peer::flags::HOST));
    }
    // An address of a node is that, even if somebody has it as a pod range.
    for node in nodes(cluster) {
        for ip in node.addresses.iter().map(|addr| addr.parse::<IpAddr>().unwrap()) {
            let no_masq = settings.no_masquerade.iter().any(|range| range.contains(&ip));
            let far_end = if direct(node, ip.is_ipv6()).is_some() { None } else { tunnel(node) };
            let flags = peer::flags::NODE
                | if far_end.is_some() { peer::flags::TUNNEL } else { 0 }
                | if no_masq { peer::flags::NO_MASQ } else { 0 };
            let other = (Some(far_end.unwrap_or(ip)), peer::identity::NODE, flags);
            let value = if is_own(node) { (None, peer::identity::HOST, peer::flags::HOST) } else { other };
            table.entry(ip.into()).or_insert(value);
        }
    }
    for node in nodes(cluster) {
        for cidr in node.cidrs.iter().map(|cidr| cidr.parse::<IpNet>().unwrap()) {
            let direct = direct(node, cidr.addr().is_ipv6());
            let far_end = direct.or_else(|| tunnel(node));
            let overlaps = ranges.iter().any(|other| other.contains(&cidr) || cidr.contains(other));
            if overlaps || (!is_own(node) && far_end.is_none()) {
                continue;
            }
            ranges.push(cidr);
            let flags = peer::flags::POD | if direct.is_none() { peer::flags::TUNNEL } else { 0 };
            let value = if is_own(node) {
                (None, peer::identity::POD, peer::flags::LOCAL_PODS)
            } else {
                (far_end, peer::identity::POD, flags)
            };
            table.entry(cidr).or_insert(value);
        }
    }
    for range in &settings.no_masquerade {
        if !ranges.iter().any(|other| other.contains(range)) {
            table.entry(*range).or_insert((None, peer::identity::WORLD, peer::flags::NO_MASQ));
        }
    }
    for range in &settings.service_cidrs {
        assert!(!ranges.iter().chain(&links()).any(|other| other.contains(range) || range.contains(other)));
        table.insert(*range, (None, peer::identity::WORLD, peer::flags::SERVICES));
    }
    table
}
