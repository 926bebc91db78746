//! A Service with its EndpointSlices, drawn at random, and the Kubernetes objects that say so.

use super::random::Random;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use testkit::Proto;

/// Ports that every server listens on.
pub const TARGETS: [u16; 2] = [8080, 8081];
/// Ranges of clients: some hold the client outside, others do not.
const RANGES: [&str; 6] =
    ["192.0.2.0/24", " 192.0.2.10/32 ", "2001:db8:2::/64", "203.0.113.0/28", "2001:db8:ffff::/48", "0.0.0.0/0"];
/// Ports that Services have.
const PORTS: [u16; 6] = [80, 443, 1, 65535, 8080, 53];
/// The node port of the first Service; each has some of its own.
const NODE_PORTS: u16 = 30_000;
/// How many a Service has.
const PORTS_EACH: u16 = 3;
/// The health check node port of the first Service.
const HEALTH_CHECKS: u16 = 32_000;

/// Where a backend can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Backend {
    /// Its name, by which its server answers.
    pub name: &'static str,
    /// The node that it is on.
    pub node: Option<&'static str>,
    /// Its addresses.
    pub v4: Ipv4Addr,
    /// The same in IPv6.
    pub v6: Ipv6Addr,
}

impl Backend {
    /// Its address of a family.
    pub fn address(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        }
    }
}

/// A family of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// That of an address.
    pub const fn of(ip: IpAddr) -> Self {
        if ip.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }
}

/// The type of a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    ClusterIp,
    NodePort,
    LoadBalancer,
}

/// One port of a Service.
#[derive(Clone, Debug)]
pub struct ServicePort {
    /// Its name.
    pub name: &'static str,
    /// Its protocol.
    pub proto: Proto,
    /// Its number.
    pub number: u16,
    /// Its number at nodes.
    pub node_port: u16,
}

/// One endpoint as a slice names it.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Which it is.
    pub backend: Backend,
    /// Whether the slice tells its node.
    pub has_node: bool,
    /// `ready`, `serving` and `terminating`, as far as the slice tells them.
    pub conditions: [Option<bool>; 3],
    /// The zones that it is meant for.
    pub zones: Vec<&'static str>,
    /// The nodes that it is meant for.
    pub nodes: Vec<&'static str>,
}

/// One slice.
#[derive(Clone, Debug)]
pub struct Slice {
    /// Its family.
    pub family: Family,
    /// Number of each port of the Service there, in their order; `None` where the slice lacks the port.
    pub targets: Vec<Option<u16>>,
    /// Its endpoints.
    pub endpoints: Vec<Endpoint>,
}

/// An address of a load balancer.
#[derive(Clone, Copy, Debug)]
pub struct Ingress {
    /// The address.
    pub ip: IpAddr,
    /// `ipMode`.
    pub mode: Option<&'static str>,
}

/// A Service and its slices.
#[derive(Clone, Debug)]
pub struct Case {
    /// Its number, of which name, addresses and node ports follow.
    pub number: u16,
    pub type_: Type,
    /// Its families, the first one first.
    pub families: Vec<Family>,
    pub ports: Vec<ServicePort>,
    pub external_local: bool,
    pub internal_local: bool,
    /// Session affinity by the client's address.
    pub affinity: bool,
    pub external_ips: Vec<IpAddr>,
    pub ingress: Vec<Ingress>,
    pub source_ranges: Vec<&'static str>,
    pub slices: Vec<Slice>,
}

/// The `n`th address for load balancers: an even one is led to the first node, an odd one to the second.
fn balancer(n: u16, family: Family) -> IpAddr {
    // 126 of them for each node, two for each Service.
    let last = (n % 2) * 128 + (n / 2) % 125 + 1;
    match family {
        Family::V4 => Ipv4Addr::new(203, 0, 113, last.to_be_bytes()[1]).into(),
        Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0x113, 0, 0, 0, 0, last).into(),
    }
}

/// The same for external IPs.
fn external(n: u16, family: Family) -> IpAddr {
    match balancer(n, family) {
        IpAddr::V4(ip) => Ipv4Addr::new(198, 18, 113, ip.octets()[3]).into(),
        IpAddr::V6(ip) => Ipv6Addr::new(0x2001, 0xdb8, 0x118, 0, 0, 0, 0, ip.segments()[7]).into(),
    }
}

impl Case {
    /// Draws one. `round` changes what a Service of the same number may change in its life.
    pub fn draw(number: u16, families_of: u64, random: &mut Random, backends: &[Backend]) -> Self {
        // The first family cannot change, so the number alone decides.
        let families = match Random::new(families_of ^ u64::from(number)).below(4) {
            0 => vec![Family::V4],
            1 => vec![Family::V6],
            2 => vec![Family::V6, Family::V4],
            _ => vec![Family::V4, Family::V6],
        };
        let type_ = random.one_of(&[Type::ClusterIp, Type::NodePort, Type::LoadBalancer, Type::LoadBalancer]);
        let ports = draw_ports(number, random);
        let mut case = Self {
            number,
            type_,
            ports,
            external_local: false,
            internal_local: random.percent(20),
            affinity: random.percent(15),
            external_ips: Vec::new(),
            ingress: Vec::new(),
            source_ranges: Vec::new(),
            slices: Vec::new(),
            families,
        };
        if random.percent(25) {
            case.external_ips = random.some_of(&Family::BOTH.map(|family| external(number, family)));
        }
        if type_ == Type::LoadBalancer {
            let modes = [None, Some("VIP"), None, Some("VIP"), Some("Proxy")];
            for family in Family::BOTH.into_iter().filter(|_| random.percent(80)).collect::<Vec<_>>() {
                case.ingress.push(Ingress { ip: balancer(number, family), mode: random.one_of(&modes) });
            }
            if random.percent(40) {
                case.source_ranges = random.some_of(&RANGES);
            }
            if random.percent(30) {
                case.external_ips.extend(case.ingress.iter().map(|ingress| ingress.ip));
            }
        }
        case.external_local = case.is_external() && random.percent(40);
        case.slices = draw_slices(&case, random, backends);
        case
    }

    /// Its name.
    pub fn name(&self) -> String {
        format!("svc-{}", self.number)
    }

    /// Its cluster address of a family, if it has that.
    pub fn vip(&self, family: Family) -> Option<IpAddr> {
        self.families.contains(&family).then(|| vip(self.number, family))
    }

    /// True if clients outside have an address of it.
    pub fn is_external(&self) -> bool {
        self.type_ != Type::ClusterIp || !self.external_ips.is_empty()
    }

    /// The port at which load balancers ask for its endpoints, if it has one.
    pub fn health_check(&self) -> Option<u16> {
        (self.type_ == Type::LoadBalancer && self.external_local).then(|| HEALTH_CHECKS + self.number % 700)
    }

    /// Its addresses for clients outside, each once, served or not.
    pub fn outside(&self) -> BTreeSet<IpAddr> {
        self.external_ips.iter().copied().chain(self.ingress.iter().map(|it| it.ip)).collect()
    }

    /// True if proxies have to serve an address for clients outside.
    pub fn is_served_at(&self, ip: IpAddr) -> bool {
        self.external_ips.contains(&ip) || self.is_balanced_at(ip)
    }

    /// True if an address is a load balancer's that delivers packets as they are.
    pub fn is_balanced_at(&self, ip: IpAddr) -> bool {
        self.ingress.iter().any(|it| it.ip == ip && it.mode != Some("Proxy"))
    }

    /// How many backends there can be.
    pub fn count_endpoints(&self) -> usize {
        self.slices.iter().map(|slice| slice.endpoints.len()).max().unwrap_or(0) * 2
    }

    /// Its objects: the Service, and then its slices.
    pub fn objects(&self) -> Vec<Value> {
        let mut objects = vec![self.service()];
        objects.extend(self.slices.iter().enumerate().map(|(n, slice)| self.slice(n, slice)));
        objects
    }

    /// The status of its load balancer.
    pub fn status(&self) -> Value {
        let ingress = |it: &Ingress| match it.mode {
            Some(mode) => json!({"ip": it.ip, "ipMode": mode}),
            None => json!({"ip": it.ip}),
        };
        json!({"loadBalancer": {"ingress": self.ingress.iter().map(ingress).collect::<Vec<_>>()}})
    }

    fn service(&self) -> Value {
        let vips: Vec<IpAddr> = self.families.iter().map(|family| vip(self.number, *family)).collect();
        let families: Vec<_> = self.families.iter().map(|family| family.name()).collect();
        let port = |port: &ServicePort| {
            let mut it = json!({"name": port.name, "protocol": port.proto.to_string(), "port": port.number});
            if self.type_ != Type::ClusterIp {
                it["nodePort"] = port.node_port.into();
            }
            it
        };
        let mut spec = json!({
            "type": match self.type_ {
                Type::ClusterIp => "ClusterIP",
                Type::NodePort => "NodePort",
                Type::LoadBalancer => "LoadBalancer",
            },
            "clusterIP": vips[0],
            "clusterIPs": vips,
            "ipFamilies": families,
            "ipFamilyPolicy": if vips.len() == 1 { "SingleStack" } else { "RequireDualStack" },
            "ports": self.ports.iter().map(port).collect::<Vec<_>>(),
            "internalTrafficPolicy": if self.internal_local { "Local" } else { "Cluster" },
            "sessionAffinity": if self.affinity { "ClientIP" } else { "None" },
        });
        if self.is_external() {
            spec["externalTrafficPolicy"] = if self.external_local { "Local" } else { "Cluster" }.into();
        }
        if !self.external_ips.is_empty() {
            spec["externalIPs"] = json!(self.external_ips);
        }
        if !self.source_ranges.is_empty() {
            spec["loadBalancerSourceRanges"] = json!(self.source_ranges);
        }
        if let Some(port) = self.health_check() {
            spec["healthCheckNodePort"] = port.into();
        }
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": self.name()}, "spec": spec})
    }

    fn slice(&self, n: usize, slice: &Slice) -> Value {
        let ports: Vec<Value> = self
            .ports
            .iter()
            .zip(&slice.targets)
            .filter_map(|(port, target)| {
                Some(json!({"name": port.name, "protocol": port.proto.to_string(), "port": (*target)?}))
            })
            .collect();
        let endpoint = |endpoint: &Endpoint| {
            let mut it = json!({"addresses": [endpoint.backend.address(slice.family)]});
            for (key, value) in ["ready", "serving", "terminating"].into_iter().zip(endpoint.conditions) {
                if let Some(value) = value {
                    it["conditions"][key] = value.into();
                }
            }
            if let Some(node) = endpoint.backend.node.filter(|_| endpoint.has_node) {
                it["nodeName"] = node.into();
            }
            let hints = |names: &[&str]| names.iter().map(|name| json!({"name": name})).collect::<Vec<_>>();
            if !endpoint.zones.is_empty() {
                it["hints"]["forZones"] = hints(&endpoint.zones).into();
            }
            if !endpoint.nodes.is_empty() {
                it["hints"]["forNodes"] = hints(&endpoint.nodes).into();
            }
            it
        };
        json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": self.slice_name(n), "labels": {"kubernetes.io/service-name": self.name()}},
            "addressType": slice.family.name(),
            "ports": ports,
            "endpoints": slice.endpoints.iter().map(endpoint).collect::<Vec<_>>(),
        })
    }

    /// The name of its `n`th slice. A slice's family cannot change: the name has it.
    pub fn slice_name(&self, n: usize) -> String {
        format!("{}-{}-{n}", self.name(), self.slices[n].family.name().to_lowercase())
    }
}

/// Lets some load balancers have an address in common with the one before, where no port of one is the other's.
pub fn share_addresses(cases: &mut [Case], random: &mut Random) {
    for pair in cases.chunks_exact_mut(2) {
        let [first, second] = pair else { continue };
        let is_taken =
            |port: &ServicePort| first.ports.iter().any(|it| (it.proto, it.number) == (port.proto, port.number));
        let have_both = |ip: IpAddr| [first, &*second].iter().all(|it| it.vip(Family::of(ip)).is_some());
        let common: Vec<Ingress> =
            first.ingress.iter().copied().filter(|it| it.mode != Some("Proxy") && have_both(it.ip)).collect();
        let is_possible = second.type_ == Type::LoadBalancer && !second.ports.iter().any(is_taken);
        if is_possible && !common.is_empty() && random.percent(60) {
            second.ingress = common;
        }
    }
}

/// The cluster address of a Service.
pub fn vip(number: u16, family: Family) -> IpAddr {
    let [high, low] = number.to_be_bytes();
    match family {
        Family::V4 => Ipv4Addr::new(10, 96, high + 1, low).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, number + 0x100).into(),
    }
}

fn draw_ports(number: u16, random: &mut Random) -> Vec<ServicePort> {
    let at = random.below(PORTS.len());
    let node_port = NODE_PORTS + (number % 600) * PORTS_EACH;
    let first = random.one_of(&Proto::ALL);
    let mut ports = vec![ServicePort { name: "one", proto: first, number: PORTS[at], node_port }];
    if random.percent(40) {
        // The other protocol at the same number, also at nodes.
        let other = if first == Proto::Tcp { Proto::Udp } else { Proto::Tcp };
        ports.push(ServicePort { name: "two", proto: other, number: PORTS[at], node_port });
    }
    if random.percent(30) {
        let number = PORTS[(at + 1) % PORTS.len()];
        ports.push(ServicePort { name: "three", proto: random.one_of(&Proto::ALL), number, node_port: node_port + 1 });
    }
    ports
}

fn draw_slices(case: &Case, random: &mut Random, backends: &[Backend]) -> Vec<Slice> {
    // What all endpoints of a Service have in common, so that fall-backs are drawn often.
    let all = random.below(100);
    let only_on = random.percent(30).then(|| random.one_of(&["n1", "n2"]));
    let (zones, nodes) = (random.percent(12), random.percent(8));
    let mut slices = Vec::new();
    for family in &case.families {
        let mut left: Vec<Backend> = backends.to_vec();
        left.retain(|backend| only_on.is_none_or(|node| backend.node == Some(node)));
        let count = random.one_of(&[0, 1, 1, 2, 2, 3, 3, 4]);
        let mut chosen = Vec::new();
        while chosen.len() < count && !left.is_empty() {
            let backend = left.remove(random.below(left.len()));
            chosen.push(draw_endpoint(backend, all, random));
        }
        for endpoint in &mut chosen {
            let node = endpoint.backend.node;
            if zones {
                endpoint.zones = node.map_or(vec!["a", "b"], |node| vec![if node == "n1" { "a" } else { "b" }]);
            }
            if nodes {
                endpoint.nodes = node.map_or(vec!["n1", "n2"], |node| vec![node]);
            }
            if random.percent(3) {
                (endpoint.zones, endpoint.nodes) = (Vec::new(), Vec::new());
            }
        }
        let second = chosen.split_off(if random.percent(30) { chosen.len() / 2 } else { chosen.len() });
        for endpoints in [chosen, second] {
            let target = |_: &ServicePort| (!random.percent(4)).then(|| random.one_of(&TARGETS));
            let targets = case.ports.iter().map(target).collect();
            if !endpoints.is_empty() || random.percent(50) {
                slices.push(Slice { family: *family, targets, endpoints });
            }
        }
    }
    slices
}

/// `all`: what the endpoints of its Service have in common, below 100.
fn draw_endpoint(backend: Backend, all: usize, random: &mut Random) -> Endpoint {
    const READY: [Option<bool>; 3] = [Some(true), Some(true), Some(false)];
    const UNREADY: [Option<bool>; 3] = [Some(false), Some(false), Some(false)];
    const DRAINING: [Option<bool>; 3] = [Some(false), Some(true), Some(true)];
    const ENDED: [Option<bool>; 3] = [Some(false), Some(false), Some(true)];
    const SERVING: [Option<bool>; 3] = [Some(false), Some(true), Some(false)];
    let conditions = match all {
        0..12 => random.one_of(&[DRAINING, ENDED, UNREADY]),
        12..17 => random.one_of(&[UNREADY, ENDED]),
        _ => random.one_of(&[
            READY,
            READY,
            READY,
            READY,
            [None, None, None],
            [Some(true), None, None],
            UNREADY,
            DRAINING,
            DRAINING,
            ENDED,
            SERVING,
            [Some(true), Some(true), Some(true)],
        ]),
    };
    let has_node = !random.percent(6);
    Endpoint { backend, has_node, conditions, zones: Vec::new(), nodes: Vec::new() }
}
