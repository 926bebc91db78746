//! A small cluster in which everything collides: few names, few addresses, all kinds of mistakes. Objects are made as
//! Kubernetes JSON, so that the conversion is part of what is tested.

use proptest::prelude::*;
use rustnet_agent::model::ObjectName;
use rustnet_agent::source::convert::Converter;
use rustnet_agent::source::{Event, Kind, ObjectRef};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

/// Everything there is, by what identifies it.
pub type Cluster = BTreeMap<Ref, Object>;

/// Kind and name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ref(pub Kind, pub String);

impl Ref {
    /// The event of its deletion.
    pub fn deleted(&self) -> Event {
        let name = match self.0 {
            Kind::Node => ObjectName::cluster(&self.1),
            _ => ObjectName::namespaced("default", &self.1),
        };
        Event::Delete(ObjectRef { kind: self.0, name })
    }

    /// A number that orders references differently for each seed.
    pub fn scrambled(&self, seed: u64) -> u64 {
        let mut hasher = DefaultHasher::new();
        (seed, self).hash(&mut hasher);
        hasher.finish()
    }
}

#[derive(Clone, Debug)]
pub enum Object {
    Service(Service),
    Slice(Slice),
    Node(Node),
}

#[derive(Clone, Debug)]
pub struct Service {
    pub name: String,
    pub created: u8,
    /// At most one a family, as in `clusterIPs`.
    pub vips: Vec<String>,
    /// Name, port, protocol.
    pub ports: Vec<(String, u16, &'static str)>,
    pub affinity: Option<u32>,
    /// The annotation.
    pub algorithm: Option<&'static str>,
    pub forwarding: Option<&'static str>,
    pub local: bool,
    /// Each port has a node port, see [`node_port`].
    pub has_node_ports: bool,
    /// `externalIPs`.
    pub external: Vec<String>,
    pub external_local: bool,
    pub sort: Sort,
}

/// The node port of a port.
pub fn node_port(port: u16) -> u16 {
    if port == 0 { 0 } else { 30_000 + port }
}

/// What a service is apart from its addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sort {
    Plain,
    ExternalName,
    Foreign,
    Headless,
}

#[derive(Clone, Debug)]
pub struct Slice {
    pub name: String,
    pub service: String,
    pub v6: bool,
    pub ports: Vec<(String, u16, &'static str)>,
    pub endpoints: Vec<Endpoint>,
}

#[derive(Clone, Debug)]
pub struct Endpoint {
    pub addr: String,
    pub ready: Option<bool>,
    pub serving: Option<bool>,
    pub terminating: Option<bool>,
    pub node: Option<&'static str>,
    pub node_hints: Vec<&'static str>,
    pub zone_hints: Vec<&'static str>,
}

#[derive(Clone, Debug)]
pub struct Node {
    pub name: String,
    pub created: u8,
    pub addresses: Vec<&'static str>,
    pub cidrs: Vec<&'static str>,
    pub zone: Option<&'static str>,
}

impl Object {
    pub fn reference(&self) -> Ref {
        match self {
            Self::Service(it) => Ref(Kind::Service, it.name.clone()),
            Self::Slice(it) => Ref(Kind::Slice, it.name.clone()),
            Self::Node(it) => Ref(Kind::Node, it.name.clone()),
        }
    }

    /// The event that delivers it.
    pub fn event(&self, converter: &mut Converter) -> Event {
        match self {
            Self::Service(it) => converter.service(&serde_json::from_value(it.json()).unwrap()),
            Self::Slice(it) => converter.slice(&serde_json::from_value(it.json()).unwrap()),
            Self::Node(it) => converter.node(&serde_json::from_value(it.json()).unwrap()),
        }
        .unwrap()
    }
}

fn time(created: u8) -> String {
    format!("2026-01-01T00:00:{created:02}Z")
}

fn ports(ports: &[(String, u16, &'static str)]) -> Value {
    ports.iter().map(|(name, port, protocol)| json!({"name": name, "port": port, "protocol": protocol})).collect()
}

impl Service {
    fn json(&self) -> Value {
        let mut spec = json!({"clusterIPs": self.vips, "ports": ports(&self.ports)});
        if let Some(seconds) = self.affinity {
            spec["sessionAffinity"] = json!("ClientIP");
            spec["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": seconds}});
        }
        if self.local {
            spec["internalTrafficPolicy"] = json!("Local");
        }
        if self.has_node_ports {
            spec["type"] = json!("NodePort");
            for (port, (_, number, _)) in spec["ports"].as_array_mut().into_iter().flatten().zip(&self.ports) {
                port["nodePort"] = json!(node_port(*number));
            }
        }
        spec["externalIPs"] = json!(self.external);
        if self.external_local {
            spec["externalTrafficPolicy"] = json!("Local");
        }
        let annotations =
            [("rustnet.io/lb-algorithm", self.algorithm), ("rustnet.io/forwarding-mode", self.forwarding)];
        let annotations: Value =
            annotations.into_iter().filter_map(|(key, value)| Some((key.to_owned(), json!(value?)))).collect();
        let mut labels = json!({});
        match self.sort {
            Sort::Plain => {}
            Sort::ExternalName => spec["type"] = json!("ExternalName"),
            Sort::Foreign => labels["service.kubernetes.io/service-proxy-name"] = json!("other"),
            Sort::Headless => spec["clusterIPs"] = json!(["None"]),
        }
        json!({
            "apiVersion": "v1", "kind": "Service", "spec": spec,
            "metadata": {"name": self.name, "namespace": "default", "labels": labels, "annotations": annotations,
                         "creationTimestamp": time(self.created)},
        })
    }
}

impl Slice {
    fn json(&self) -> Value {
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "addressType": if self.v6 { "IPv6" } else { "IPv4" },
            "metadata": {"name": self.name, "namespace": "default", "labels": {"kubernetes.io/service-name": self.service}},
            "ports": ports(&self.ports),
            "endpoints": self.endpoints.iter().map(Endpoint::json).collect::<Vec<_>>(),
        })
    }
}

impl Endpoint {
    fn json(&self) -> Value {
        let names = |names: &[&str]| names.iter().map(|name| json!({"name": name})).collect::<Vec<_>>();
        json!({
            "addresses": [self.addr, "203.0.113.99"],
            "conditions": {"ready": self.ready, "serving": self.serving, "terminating": self.terminating},
            "nodeName": self.node,
            "hints": {"forNodes": names(&self.node_hints), "forZones": names(&self.zone_hints)},
        })
    }
}

impl Node {
    fn json(&self) -> Value {
        let addresses: Vec<_> =
            self.addresses.iter().map(|addr| json!({"type": "InternalIP", "address": addr})).collect();
        let labels = self.zone.map_or(json!({}), |zone| json!({"topology.kubernetes.io/zone": zone}));
        json!({
            "apiVersion": "v1", "kind": "Node", "spec": {"podCIDRs": self.cidrs}, "status": {"addresses": addresses},
            "metadata": {"name": self.name, "labels": labels, "creationTimestamp": time(self.created)},
        })
    }
}

fn sometimes<T: Clone + std::fmt::Debug + 'static>(values: Vec<T>) -> impl Strategy<Value = Option<T>> {
    prop::option::weighted(0.8, prop::sample::select(values))
}

/// Three names that slices and services share, of which some do not fit together.
fn port_list() -> impl Strategy<Value = Vec<(String, u16, &'static str)>> {
    // Most of them fit, so that changes of endpoints have something to change.
    let usual = prop::sample::select(vec![("http", 80, "TCP"), ("dns", 53, "UDP")]);
    let one = prop_oneof![3 => usual, 1 => prop::sample::select(vec![
        ("http", 8080, "TCP"),
        ("dns", 53, "TCP"),
        ("alt", 8080, "TCP"),
        ("sig", 99, "SCTP"),
        ("bad", 0, "TCP"),
    ])];
    prop::collection::vec(one, 1..4)
        .prop_map(|list| list.into_iter().map(|(name, port, protocol)| (name.to_owned(), port, protocol)).collect())
}

fn service() -> impl Strategy<Value = Service> {
    let sort = prop_oneof![
        8 => Just(Sort::Plain), 1 => Just(Sort::ExternalName), 1 => Just(Sort::Foreign), 1 => Just(Sort::Headless)
    ];
    // The third is an address of a node, the fourth none at all.
    let v4 = sometimes(vec!["10.96.0.1", "10.96.0.2", "172.18.0.11", "127.0.0.1"]);
    let v6 = sometimes(vec!["fd00:96::1", "fd00:96::2"]);
    let affinity = prop::option::weighted(0.2, prop::sample::select(vec![60, 10_800]));
    let algorithm = prop::option::weighted(0.5, prop::sample::select(vec!["maglev", "random", "maglev"]));
    let forwarding = prop::option::weighted(0.5, prop::sample::select(vec!["dsr", "snat"]));
    // A balancer's, an address of this node, a cluster address.
    let external = prop::sample::subsequence(vec!["203.0.113.7", "172.18.0.15", "10.96.0.1", "2001:db8:7::7"], 0..3);
    let external = prop_oneof![2 => Just(Vec::new()), 1 => external];
    let outside = (prop::bool::weighted(0.3), external, prop::bool::weighted(0.3));
    (0..3u8, 0..3u8, (v4, v6), port_list(), (affinity, algorithm, forwarding), prop::bool::weighted(0.3), outside, sort)
        .prop_map(
            |(
                name,
                created,
                (v4, v6),
                ports,
                (affinity, algorithm, forwarding),
                local,
                (has_node_ports, external, external_local),
                sort,
            )| Service {
                name: format!("s{name}"),
                created,
                vips: v4.into_iter().chain(v6).map(str::to_owned).collect(),
                ports,
                affinity,
                algorithm,
                forwarding,
                local,
                has_node_ports,
                external: external.into_iter().map(str::to_owned).collect(),
                external_local,
                sort,
            },
        )
}

fn endpoint(v6: bool) -> impl Strategy<Value = Endpoint> {
    let condition = || prop::option::weighted(0.5, any::<bool>());
    let nodes = || prop::collection::vec(prop::sample::select(vec!["n1", "n2"]), 0..2);
    let zones = || prop::collection::vec(prop::sample::select(vec!["z1", "z2"]), 0..2);
    let hints = prop_oneof![2 => Just((vec![], vec![])), 1 => (nodes(), zones())];
    // Now and then one of the other family, or one that is no address.
    let addr = (0..50u8).prop_map(move |n| match (n, v6) {
        (0, _) => "nonsense".to_owned(),
        (1, false) | (2.., true) => format!("fd00:244::{}", n % 5 + 2),
        (1, true) | (2.., false) => format!("10.244.1.{}", n % 5 + 2),
    });
    (addr, condition(), condition(), condition(), sometimes(vec!["n1", "n2"]), hints).prop_map(
        |(addr, ready, serving, terminating, node, (node_hints, zone_hints))| Endpoint {
            addr,
            ready,
            serving,
            terminating,
            node,
            node_hints,
            zone_hints,
        },
    )
}

fn slice() -> impl Strategy<Value = Slice> {
    any::<bool>().prop_flat_map(|v6| {
        (0..6u8, 0..3u8, port_list(), prop::collection::vec(endpoint(v6), 0..5)).prop_map(
            move |(name, service, ports, endpoints)| Slice {
                name: format!("e{name}"),
                service: format!("s{service}"),
                v6,
                ports,
                endpoints,
            },
        )
    })
}

fn node() -> impl Strategy<Value = Node> {
    let addresses = prop::sample::subsequence(
        vec!["172.18.0.11", "172.18.0.12", "172.19.0.13", "fd00:18::11", "fd00:18::12"],
        0..4,
    );
    let v4 = sometimes(vec!["10.244.1.0/24", "10.244.2.0/24", "10.244.2.128/25", "10.244.0.0/16", "172.18.0.12/32"]);
    let v6 = sometimes(vec!["fd00:244:0:1::/64", "fd00:244:0:2::/64"]);
    (1..5u8, 0..3u8, addresses, v4, v6, sometimes(vec!["z1", "z2"])).prop_map(
        |(name, created, addresses, v4, v6, zone)| Node {
            name: format!("n{name}"),
            created,
            addresses,
            cidrs: v4.into_iter().chain(v6).collect(),
            zone,
        },
    )
}

/// Any object.
pub fn object() -> impl Strategy<Value = Object> {
    prop_oneof![
        4 => service().prop_map(Object::Service),
        6 => slice().prop_map(Object::Slice),
        2 => node().prop_map(Object::Node),
    ]
}

/// A service with as many backends as there are slots.
pub fn of_every_slot(slots: u32) -> Vec<Event> {
    let ports = || vec![("http".to_owned(), 80, "TCP")];
    let service = Service {
        name: "all".to_owned(),
        created: 0,
        vips: vec!["10.96.9.9".to_owned()],
        ports: ports(),
        affinity: None,
        // More backends than a table has places.
        algorithm: Some("random"),
        forwarding: None,
        local: false,
        has_node_ports: false,
        external: Vec::new(),
        external_local: false,
        sort: Sort::Plain,
    };
    let endpoint = |n: u32| Endpoint {
        addr: std::net::Ipv4Addr::from(0x0a00_0001 + n).to_string(),
        ready: None,
        serving: None,
        terminating: None,
        node: None,
        node_hints: Vec::new(),
        zone_hints: Vec::new(),
    };
    let slice = Slice {
        name: "all".to_owned(),
        service: "all".to_owned(),
        v6: false,
        ports: ports(),
        endpoints: (0..slots).map(endpoint).collect(),
    };
    let mut converter = Converter::new();
    vec![Object::Service(service).event(&mut converter), Object::Slice(slice).event(&mut converter)]
}
