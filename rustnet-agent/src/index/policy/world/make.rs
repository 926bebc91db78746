//! Random worlds, changes of them, and smaller ones that still fail.

use super::{Flow, KubeNamespace, NODE, World};
use crate::source::convert::POLICY_AUDIT;
use ipnet::IpNet;
use k8s_openapi::serde::Serialize;
use k8s_openapi::serde::de::DeserializeOwned;
use rustnet_common::policy::OPEN;
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::net::IpAddr;

/// A generator that repeats itself by its seed (xorshift64*).
pub struct Random(u64);

const NAMESPACES: [&str; 3] = ["a", "b", "c"];
/// Keys of all labels.
pub(super) const KEYS: [&str; 3] = ["k", "l", "m"];
const VALUES: [&str; 3] = ["", "x", "y"];
const PROTOCOLS: [&str; 3] = ["TCP", "UDP", "SCTP"];
const PORT_NAMES: [&str; 2] = ["web", "dns"];
const PORTS: [u16; 6] = [1, 53, 80, 81, 8080, 65535];
const RANGES: [&str; 14] = [
    "0.0.0.0/0",
    "10.0.0.0/8",
    "10.0.0.0/24",
    "10.0.0.0/29",
    "10.0.0.2/31",
    "10.0.0.2/32",
    "10.0.1.0/24",
    "198.51.100.0/24",
    "0.0.0.0/1",
    "::/0",
    "fd00::/64",
    "fd00::/125",
    "fd00::2/128",
    "2000::/3",
];
/// Interface of the first pod.
const FIRST: u32 = 30;
/// Interface of a pod that the API server does not show with its address yet.
const UNKNOWN: u32 = 77;
/// Lists of policies of the cluster that have to have an element.
const NEED_ONE: [&str; 4] = ["from", "to", "networks", "protocols"];
const ELSEWHERE: [&str; 5] = ["192.0.2.1", "198.51.100.7", "203.0.113.9", "2001:db8::1", "fd00::7"];

impl Random {
    /// A generator with this seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
    }

    /// True once in `n`.
    pub fn once_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }

    fn some(&mut self, most: usize, mut make: impl FnMut(&mut Self) -> Value) -> Vec<Value> {
        (0..self.below(most + 1)).map(|_| make(self)).collect()
    }

    /// Up to so many flows of [`World::flows_of_pods`]: some of all, of those to pods that name ports of the protocol, of those that some
    /// policy decides, and of those for which both holds.
    pub fn flows(&mut self, world: &World, count: usize) -> Vec<Flow> {
        let (_, pods, _) = world.objects();
        let names = pods.iter().flat_map(|pod| pod.ports.iter().map(move |port| (pod, port.proto)));
        let names = names.flat_map(|(pod, proto)| pod.addresses.iter().map(move |ip| (*ip, proto)));
        let names: BTreeSet<(IpAddr, u8)> = names.collect();
        let has_name = |flow: &&Flow| names.contains(&(flow.server, flow.proto));
        let maps = world.desired();
        let is_decided = |flow: &&Flow| {
            maps.pods.get(&flow.server).is_some_and(|pod| pod.ingress != OPEN)
                || maps.pods.get(&flow.client).is_some_and(|pod| pod.egress != OPEN)
        };
        let all = world.flows_of_pods();
        let named: Vec<Flow> = all.iter().filter(has_name).copied().collect();
        let decided: Vec<Flow> = all.iter().filter(is_decided).copied().collect();
        let both: Vec<Flow> = decided.iter().filter(has_name).copied().collect();
        let lists = [all, named, decided, both].into_iter().filter(|list| !list.is_empty());
        lists.flat_map(|list| (0..count / 4).map(|_| self.one(&list)).collect::<Vec<Flow>>()).collect()
    }

    /// A world.
    pub fn world(&mut self) -> World {
        let namespaces = NAMESPACES.iter().map(|name| serde_json::from_value(self.namespace(name)).unwrap());
        let mut world = World { namespaces: namespaces.collect(), ..World::default() };
        for number in 0..=self.below(6) {
            let pod = self.pod(number);
            world.pods.push(serde_json::from_value(pod).unwrap());
        }
        for number in 0..self.below(5) {
            let policy = self.policy(number);
            world.policies.push(serde_json::from_value(policy).unwrap());
        }
        world.connect();
        if self.once_in(4) {
            world.interfaces.entry("10.0.0.7".parse().unwrap()).or_insert(UNKNOWN);
        }
        world
    }

    /// A world with policies of the cluster, too, in most cases.
    pub fn whole_world(&mut self) -> World {
        let mut world = self.world();
        if self.once_in(4) {
            return world;
        }
        for namespace in &mut world.namespaces {
            self.audit(namespace);
        }
        for name in [NODE, "n2"] {
            let node = self.node(name);
            world.nodes.push(serde_json::from_value(node).unwrap());
        }
        for number in 0..=self.below(4) {
            let policy = self.cluster_policy(number);
            world.cluster.push(serde_json::from_value(policy).unwrap());
        }
        world
    }

    fn audit(&mut self, namespace: &mut KubeNamespace) {
        if self.once_in(4) {
            namespace.metadata.annotations = Some([(POLICY_AUDIT.to_owned(), "true".to_owned())].into());
        }
    }

    /// The world after something has happened in it.
    pub fn change(&mut self, world: &World) -> World {
        let mut next = world.clone();
        for _ in 0..=self.below(3) {
            match self.below(6) {
                0 => {
                    let place = self.below(next.namespaces.len());
                    let namespace = self.namespace(NAMESPACES[place]);
                    next.namespaces[place] = serde_json::from_value(namespace).unwrap();
                    if !world.nodes.is_empty() {
                        self.audit(&mut next.namespaces[place]);
                    }
                }
                1 | 2 => {
                    let number = self.below(7);
                    let name = format!("p{number}");
                    next.pods.retain(|pod| pod.metadata.name.as_ref() != Some(&name));
                    if !self.once_in(4) {
                        let pod = self.pod(number);
                        next.pods.push(serde_json::from_value(pod).unwrap());
                    }
                }
                3 | 4 if !world.nodes.is_empty() => self.change_cluster(&mut next),
                _ => {
                    let number = self.below(5);
                    let name = format!("q{number}");
                    next.policies.retain(|policy| policy.metadata.name.as_ref() != Some(&name));
                    if !self.once_in(3) {
                        let policy = self.policy(number);
                        next.policies.push(serde_json::from_value(policy).unwrap());
                    }
                }
            }
        }
        next.connect();
        for (ip, ifindex) in &world.interfaces {
            // A pod may be deleted before its interface is, and a pod that is not known stays so.
            if self.once_in(3) || *ifindex == UNKNOWN {
                next.interfaces.entry(*ip).or_insert(*ifindex);
            }
        }
        next
    }

    fn change_cluster(&mut self, next: &mut World) {
        if self.once_in(5) {
            let place = self.below(next.nodes.len());
            let node = self.node(&next.nodes[place].metadata.name.clone().unwrap());
            next.nodes[place] = serde_json::from_value(node).unwrap();
            return;
        }
        let number = self.below(5);
        let name = format!("c{number}");
        next.cluster.retain(|policy| policy.metadata.name.as_ref() != Some(&name));
        if !self.once_in(4) {
            let policy = self.cluster_policy(number);
            next.cluster.push(serde_json::from_value(policy).unwrap());
        }
    }

    /// Addresses of pods are in the ranges of nodes, but not always of their own.
    fn node(&mut self, name: &str) -> Value {
        let number = if name == NODE { 1 } else { 2 };
        let mut addresses = vec![json!({"type": "InternalIP", "address": format!("192.0.2.{number}")})];
        if self.once_in(2) {
            let address = self.one(&["203.0.113.9", "2001:db8::1", "n1.example"]);
            addresses.push(json!({"type": "ExternalIP", "address": address}));
        }
        let cidrs = if number == 1 { json!(["10.0.0.0/24", "fd00::/64"]) } else { json!(["10.0.1.0/24"]) };
        json!({"metadata": {"name": name, "labels": self.labels()}, "spec": {"podCIDRs": cidrs},
               "status": {"addresses": addresses}})
    }

    fn cluster_policy(&mut self, number: usize) -> Value {
        let subject = if self.once_in(2) {
            json!({"namespaces": self.selector()})
        } else {
            json!({"pods": {"namespaceSelector": self.selector(), "podSelector": self.selector()}})
        };
        json!({
            "metadata": {"name": format!("c{number}")},
            "spec": {
                "tier": self.one(&["Admin", "Baseline"]),
                "priority": self.below(3),
                "subject": subject,
                "ingress": self.some(3, |random| random.cluster_rule("from")),
                "egress": self.some(3, |random| random.cluster_rule("to")),
            },
        })
    }

    fn cluster_rule(&mut self, side: &str) -> Value {
        let mut peers = vec![self.cluster_peer(side)];
        peers.extend(self.some(1, |random| random.cluster_peer(side)));
        let is_of_pods = peers.iter().all(|peer| peer.get("networks").or(peer.get("nodes")).is_none());
        let mut rule = json!({"action": self.one(&["Accept", "Deny", "Pass"]), side: peers});
        if self.once_in(2) {
            let mut protocols = vec![self.protocol(is_of_pods)];
            protocols.extend(self.some(1, |random| random.protocol(is_of_pods)));
            rule["protocols"] = protocols.into();
        }
        if self.once_in(3) {
            rule["name"] = "r".into();
        }
        rule
    }

    fn cluster_peer(&mut self, side: &str) -> Value {
        match self.below(if side == "to" { 5 } else { 3 }) {
            0 => json!({"namespaces": self.selector()}),
            1 | 2 => json!({"pods": {"namespaceSelector": self.selector(), "podSelector": self.selector()}}),
            3 => json!({"nodes": self.selector()}),
            _ => json!({"networks": [self.one(&RANGES), self.one(&RANGES)]}),
        }
    }

    fn protocol(&mut self, has_names: bool) -> Value {
        if has_names && self.once_in(3) {
            return json!({"destinationNamedPort": self.one(&PORT_NAMES)});
        }
        let (a, b) = (self.one(&PORTS), self.one(&PORTS));
        let ports = match self.below(3) {
            0 => json!({"destinationPort": {"range": {"start": 1, "end": 65535}}}),
            1 => json!({"destinationPort": {"number": a}}),
            _ => json!({"destinationPort": {"range": {"start": a.min(b), "end": a.max(b)}}}),
        };
        json!({self.one(&["tcp", "udp", "sctp"]): ports})
    }

    fn labels(&mut self) -> Value {
        let mut labels = Map::new();
        for key in KEYS {
            if self.once_in(2) {
                labels.insert(key.to_owned(), self.one(&VALUES).into());
            }
        }
        if labels.is_empty() && self.once_in(2) { Value::Null } else { labels.into() }
    }

    fn selector(&mut self) -> Value {
        if self.once_in(4) {
            return json!({});
        }
        let match_labels = if self.once_in(2) { json!({self.one(&KEYS): self.one(&VALUES)}) } else { json!(null) };
        let expressions = self.some(2, |random| {
            let operator = random.one(&["In", "NotIn", "Exists", "DoesNotExist"]);
            let mut values: Vec<Value> = Vec::new();
            if operator.ends_with("In") {
                values = random.some(1, |random| random.one(&VALUES).into());
                values.push(random.one(&VALUES).into());
            }
            json!({"key": random.one(&KEYS), "operator": operator, "values": values})
        });
        json!({"matchLabels": match_labels, "matchExpressions": expressions})
    }

    fn namespace(&mut self, name: &str) -> Value {
        json!({"metadata": {"name": name, "labels": self.labels()}})
    }

    /// Each number has its own addresses, so that no two pods claim one; all but one of a finished pod.
    fn pod(&mut self, number: usize) -> Value {
        let mut ips = vec![json!({"ip": format!("10.0.{}.{}", self.below(2), number + 1)})];
        match self.below(4) {
            0 => ips.push(json!({"ip": format!("fd00::{}", number + 1)})),
            1 => ips = vec![json!({"ip": format!("fd00::{}", number + 1)})],
            2 => ips = vec![json!({"ip": format!("10.0.0.{}", number + 1)})],
            _ => {}
        }
        if self.once_in(12) {
            ips.clear();
        }
        let containers: Vec<Value> = ["c", "d"].iter().map(|name| self.container(name)).collect();
        let is_hosts = self.once_in(12);
        if is_hosts {
            ips = vec![json!({"ip": "192.0.2.1"})];
        }
        let mut phase = "Running";
        if self.once_in(12) {
            phase = "Succeeded";
            ips = vec![json!({"ip": "10.0.0.1"})];
        }
        json!({
            "metadata": {"name": format!("p{number}"), "namespace": self.one(&NAMESPACES), "labels": self.labels()},
            "spec": {"nodeName": if self.once_in(2) { NODE } else { "n2" }, "hostNetwork": is_hosts,
                     "containers": containers},
            "status": {"phase": phase, "podIPs": ips},
        })
    }

    /// Two containers may have ports of one name, with one protocol or with several. A port may have no name.
    fn container(&mut self, name: &str) -> Value {
        let ports = self.some(2, |random| {
            let name = if random.once_in(6) { Value::Null } else { random.one(&PORT_NAMES).into() };
            json!({"name": name, "containerPort": random.one(&PORTS), "protocol": random.one(&PROTOCOLS)})
        });
        json!({"name": name, "ports": ports})
    }

    fn policy(&mut self, number: usize) -> Value {
        let rules = |random: &mut Self, side: &str| match random.below(5) {
            0 => Value::Null,
            _ => random.some(3, |random| random.rule(side)).into(),
        };
        let mut spec =
            json!({"podSelector": self.selector(), "ingress": rules(self, "from"), "egress": rules(self, "to")});
        spec["policyTypes"] = match self.below(5) {
            0 => Value::Null,
            1 => json!([]),
            2 => json!(["Ingress"]),
            3 => json!(["Egress"]),
            _ => json!(["Ingress", "Egress"]),
        };
        json!({"metadata": {"name": format!("q{number}"), "namespace": self.one(&NAMESPACES)}, "spec": spec})
    }

    fn rule(&mut self, side: &str) -> Value {
        let mut rule = Map::new();
        if !self.once_in(4) {
            rule.insert(side.to_owned(), self.some(3, Self::peer).into());
        }
        if !self.once_in(3) {
            rule.insert("ports".to_owned(), self.some(2, Self::port).into());
        }
        rule.into()
    }

    fn peer(&mut self) -> Value {
        match self.below(6) {
            0 | 1 => {
                let cidr = self.one(&RANGES);
                let outer: IpNet = cidr.parse().unwrap();
                let inner = |it: &&&str| outer.contains(&it.parse::<IpNet>().unwrap()) && ***it != *cidr;
                let inside: Vec<&str> = RANGES.iter().filter(inner).copied().collect();
                let except =
                    if inside.is_empty() { Vec::new() } else { self.some(2, |random| random.one(&inside).into()) };
                json!({"ipBlock": {"cidr": cidr, "except": except}})
            }
            2 | 3 => json!({"podSelector": self.selector()}),
            4 => json!({"namespaceSelector": self.selector()}),
            _ => json!({"namespaceSelector": self.selector(), "podSelector": self.selector()}),
        }
    }

    fn port(&mut self) -> Value {
        let mut port = Map::new();
        if self.once_in(2) {
            port.insert("protocol".to_owned(), self.one(&PROTOCOLS).into());
        }
        match self.below(5) {
            0 => {}
            1 | 2 => drop(port.insert("port".to_owned(), self.one(&PORT_NAMES).into())),
            kind => {
                let (a, b) = (self.one(&PORTS), self.one(&PORTS));
                port.insert("port".to_owned(), a.min(b).into());
                if kind == 3 {
                    port.insert("endPort".to_owned(), a.max(b).into());
                }
            }
        }
        port.into()
    }
}

impl World {
    /// Gives each address of a pod of the node an interface, which follows from pod and address.
    fn connect(&mut self) {
        self.interfaces.clear();
        let (_, pods, _) = self.objects();
        for pod in pods.iter().filter(|pod| &*pod.node == NODE && !pod.host_network) {
            let number: u32 = pod.name.as_str().bytes().last().map_or(0, |digit| u32::from(digit - b'0'));
            self.interfaces.extend(pod.addresses.iter().map(|ip| (*ip, number + FIRST)));
        }
    }

    /// All flows of interest between addresses of this world and of another, and of neither.
    pub fn flows(&self, other: &Self) -> Vec<Flow> {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let mut addresses: BTreeSet<IpAddr> = ELSEWHERE.iter().map(|text| ip(text)).collect();
        for world in [self, other] {
            addresses.extend(world.objects().1.iter().flat_map(|pod| pod.addresses.to_vec()));
            addresses.extend(world.interfaces.keys());
        }
        let is_local = |ip: &IpAddr| self.interfaces.contains_key(ip) || other.interfaces.contains_key(ip);
        let mut flows = Vec::new();
        for client in &addresses {
            for server in &addresses {
                let is_judged = client != server && client.is_ipv4() == server.is_ipv4();
                if !is_judged || !(is_local(client) || is_local(server)) {
                    continue;
                }
                for proto in [6, 17, 132, 1] {
                    let ports: &[u16] = if proto == 1 { &[0] } else { &[1, 2, 53, 80, 81, 8080, 9000, 65535] };
                    flows.extend(ports.iter().map(|port| Flow {
                        client: *client,
                        server: *server,
                        proto,
                        port: *port,
                    }));
                }
            }
        }
        flows
    }

    /// As [`World::flows`] within this world, without those of an interface of which no pod is known: no policy says anything of it.
    pub fn flows_of_pods(&self) -> Vec<Flow> {
        let unknown: BTreeSet<IpAddr> = self.interfaces.keys().filter(|ip| self.pod(**ip).is_none()).copied().collect();
        let is_known = |flow: &Flow| ![flow.client, flow.server].iter().any(|ip| unknown.contains(ip));
        self.flows(self).into_iter().filter(is_known).collect()
    }

    /// A world with fewer objects that fails, too.
    #[must_use]
    pub fn shrink(mut self, fails: impl Fn(&Self) -> bool) -> Self {
        loop {
            let mut smaller: Vec<Self> = Vec::new();
            for i in 0..self.pods.len() {
                let mut it = self.clone();
                it.pods.remove(i);
                it.connect();
                smaller.push(it);
            }
            for i in 0..self.cluster.len() {
                let mut it = self.clone();
                it.cluster.remove(i);
                smaller.push(it);
                smaller.extend(smaller_policies(&self.cluster[i], &NEED_ONE).into_iter().map(|policy| {
                    let mut it = self.clone();
                    it.cluster[i] = policy;
                    it
                }));
            }
            for i in 0..self.policies.len() {
                let mut it = self.clone();
                it.policies.remove(i);
                smaller.push(it);
                smaller.extend(smaller_policies(&self.policies[i], &[]).into_iter().map(|policy| {
                    let mut it = self.clone();
                    it.policies[i] = policy;
                    it
                }));
            }
            match smaller.into_iter().find(|it| fails(it)) {
                Some(it) => self = it,
                None => return self,
            }
        }
    }
}

/// A policy without one element of one of its lists: a rule, a peer, a port, an exception, a requirement. `needs_one`: lists that have to
/// have an element.
fn smaller_policies<T: Serialize + DeserializeOwned>(policy: &T, needs_one: &[&str]) -> Vec<T> {
    let whole = serde_json::to_value(policy).unwrap();
    let mut lists = Vec::new();
    find_lists(&whole["spec"], "/spec", &mut lists);
    lists.retain(|(path, length)| *length > usize::from(needs_one.iter().any(|it| path.ends_with(it))));
    let elements = lists.iter().flat_map(|(path, length)| (0..*length).map(move |i| (path, i)));
    let without = elements.map(|(path, i)| {
        let mut policy = whole.clone();
        policy.pointer_mut(path).unwrap().as_array_mut().unwrap().remove(i);
        serde_json::from_value(policy).unwrap()
    });
    without.collect()
}

/// The paths of all lists with their lengths. Requirements without values are not valid.
fn find_lists(value: &Value, path: &str, lists: &mut Vec<(String, usize)>) {
    let inner: Vec<(String, &Value)> = match value {
        Value::Array(all) => {
            lists.push((path.to_owned(), all.len()));
            all.iter().enumerate().map(|(i, it)| (i.to_string(), it)).collect()
        }
        Value::Object(fields) => {
            fields.iter().filter(|(name, _)| *name != "values").map(|(name, it)| (name.clone(), it)).collect()
        }
        _ => Vec::new(),
    };
    for (name, it) in inner {
        find_lists(it, &format!("{path}/{name}"), lists);
    }
}
