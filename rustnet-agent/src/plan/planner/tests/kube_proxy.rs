//! The packets that kube-proxy's own tests follow through its rules, as facts: who asks where, which endpoints may answer, and
//! which source they see. The planned maps are read as the programs read them. `docs/coverage/kube-proxy.md` lists each row.

use super::*;
use crate::config::NodePortAddresses;
use crate::model::{Condition, Endpoint, Service};
use rustnet_common::backend::flags as backend_flags;
use rustnet_common::service::{flags, scope};
use rustnet_common::tuple::proto::SCTP;
use std::net::{IpAddr, SocketAddr};

/// Who asks.
#[derive(Clone, Copy, Debug)]
enum Client {
    /// A pod of this node.
    Pod(&'static str),
    /// A process of this node.
    Node,
    /// A machine outside.
    Outside(&'static str),
}

const POD: Client = Client::Pod("10.0.0.2");
const WORLD: Client = Client::Outside("203.0.113.2");
/// It is in no range of clients.
const BLOCKED: Client = Client::Outside("203.0.113.130");
const NODE: Client = Client::Node;

/// Addresses of this node, the first of which its Node object names first.
const NODE_IPS: [&str; 4] = ["192.168.0.2", "192.168.1.2", "2001:db8::1", "2001:db8:1::2"];
const NODE_IP: &str = NODE_IPS[0];

/// What is asked, who asks, where, and what becomes of it: the endpoints, of which those with a star see this node's address
/// instead of the client's; or `refused`, `dropped`, `passes` (left alone, as any other packet).
type Row = (&'static str, Client, &'static str, u16, u8, &'static str);

fn rig(settings: Settings, events: impl IntoIterator<Item = Event>) -> Rig {
    let mut rig = Rig::new(64);
    rig.index = Index::new(settings);
    rig.index.set_host(HostFacts::default());
    rig.handle(Kind::REQUIRED.map(Event::Synced));
    rig.handle([node("n1", &NODE_IPS, &["10.0.0.0/24"]).apply()]).handle(events).sync();
    rig
}

/// A node like those of kube-proxy's tests: node ports at two of its addresses.
fn settings() -> Settings {
    let ranges = ["192.168.0.2/32", "2001:db8::1/128"].map(|range| NodePortAddresses::In(range.parse().unwrap()));
    Settings { node_ports: ranges.to_vec(), ..Settings::new("n1", Routing::Vxlan) }
}

fn follow(rig: &Rig, rows: &[Row]) {
    for &(name, client, to, port, proto, want) in rows {
        let key = |scope| VipKey { ip: ip(to), port, proto, scope };
        assert_eq!(answer(rig.maps.held(), client, key), want, "{name}");
    }
}

fn answer(held: &Snapshot, client: Client, key: impl Fn(u8) -> VipKey) -> String {
    let key = key(if matches!(client, Client::Outside(_)) { scope::EXTERNAL } else { scope::CLUSTER });
    if matches!(client, Client::Node) && NODE_IPS.map(ip).contains(&key.ip) {
        // Its packets to itself pass no hook.
        return "passes".to_owned();
    }
    let Some(entry) = held.services.get(&key) else { return without_entry(held, client, key.ip).to_owned() };
    let from = match client {
        Client::Outside(from) | Client::Pod(from) => from,
        Client::Node => NODE_IP,
    };
    // Both entries of an address ask for the same clients.
    let asked = VipKey { scope: scope::EXTERNAL, ..key };
    let mut ranges = held.source_ranges.keys().filter(|range| range.key == asked);
    if entry.flags & flags::SOURCE_RANGES != 0 && !ranges.any(|range| range.clients.contains(&ip(from))) {
        return "dropped".to_owned();
    }
    let backends: Vec<Backend> = held.backends_of(entry).flatten().copied().collect();
    if backends.is_empty() {
        return if entry.flags & flags::DROP_EMPTY != 0 { "dropped" } else { "refused" }.to_owned();
    }
    backends.iter().map(|backend| seen_by(client, backend)).collect::<Vec<_>>().join(" ")
}

/// What becomes of a port that has no entry.
fn without_entry(held: &Snapshot, client: Client, at: IpAddr) -> &'static str {
    let cluster = held.services.get(&VipKey::wildcard(at)).map(|entry| entry.flags & flags::SHARED != 0);
    match (client, cluster) {
        (Client::Outside(_), _) if held.services.contains_key(&VipKey::external_wildcard(at)) => "refused",
        (Client::Outside(_), Some(false)) => "dropped",
        (Client::Pod(_) | Client::Node, Some(false)) => "refused",
        _ => "passes",
    }
}

/// Answers of backends of this node, and those of pods to pods, come by here anyhow.
fn seen_by(client: Client, backend: &Backend) -> String {
    let at = SocketAddr::new(IpAddr::from(backend.addr), backend.port);
    let is_masqueraded = match client {
        Client::Pod(own) => at.ip() == ip(own),
        Client::Node => false,
        Client::Outside(_) => backend.flags & backend_flags::LOCAL == 0,
    };
    format!("{at}{}", if is_masqueraded { "*" } else { "" })
}

/// Endpoints on port 80: address, and the node.
fn endpoints(service: &str, all: &[(&str, &str)]) -> Event {
    let slice = slice(&format!("{service}-1"), service, Family::V4).tcp(80);
    all.iter().fold(slice, |slice, (address, node)| slice.endpoint(endpoint(address).on(node))).apply()
}

/// A load balancer's Service with all kinds of addresses.
fn published() -> Service {
    let web = service("web", &["172.30.0.41"]).tcp(80).node_port(3001);
    web.external(&["192.168.99.11"]).balanced(&["1.2.3.4"])
}

#[test]
fn without_endpoints() {
    let rig = rig(settings(), [published().apply()]);
    follow(
        &rig,
        &[
            ("a pod, the cluster address", POD, "172.30.0.41", 80, TCP, "refused"),
            ("outside, the external IP", WORLD, "192.168.99.11", 80, TCP, "refused"),
            ("a pod, the node port", POD, NODE_IP, 3001, TCP, "refused"),
            ("outside, the node port", WORLD, NODE_IP, 3001, TCP, "refused"),
            ("a pod, the load balancer", POD, "1.2.3.4", 80, TCP, "refused"),
            ("outside, the load balancer", WORLD, "1.2.3.4", 80, TCP, "refused"),
        ],
    );
}

#[test]
fn cluster_addresses() {
    let ports = service("two", &["172.30.0.42"]).port("http", 80, TCP).port("https", 443, TCP);
    let ports = ports.port("dns-udp", 53, UDP).port("dns-tcp", 53, TCP).port("dns-sctp", 53, SCTP);
    let targets = slice("two-1", "two", Family::V4).port("http", 80, TCP).port("https", 8443, TCP);
    let targets = targets.port("dns-udp", 53, UDP).port("dns-tcp", 5353, TCP).port("dns-sctp", 53, SCTP);
    let targets = targets.endpoint(endpoint("10.180.0.1").on("n1")).endpoint(endpoint("10.180.2.1").on("n2"));
    let one = [service("one", &["172.30.0.41"]).tcp(80).apply(), endpoints("one", &[("10.180.0.1", "n1")])];
    let rig = rig(settings(), one.into_iter().chain([ports.apply(), targets.apply()]));
    let (first, second) = ("172.30.0.41", "172.30.0.42");
    follow(
        &rig,
        &[
            ("one endpoint", Client::Pod("10.180.0.2"), first, 80, TCP, "10.180.0.1:80"),
            ("a pod that is the endpoint itself", Client::Pod("10.180.0.1"), first, 80, TCP, "10.180.0.1:80*"),
            ("two endpoints", POD, second, 80, TCP, "10.180.0.1:80 10.180.2.1:80"),
            ("another target port", POD, second, 443, TCP, "10.180.0.1:8443 10.180.2.1:8443"),
            ("one number for three protocols, TCP", POD, second, 53, TCP, "10.180.0.1:5353 10.180.2.1:5353"),
            ("one number for three protocols, UDP", POD, second, 53, UDP, "10.180.0.1:53 10.180.2.1:53"),
            ("one number for three protocols, SCTP", POD, second, 53, SCTP, "10.180.0.1:53 10.180.2.1:53"),
            ("a port of TCP, asked by UDP", POD, second, 80, UDP, "refused"),
            ("a port of another Service", POD, first, 443, TCP, "refused"),
            // Differs: kube-proxy drops it, for it knows the range of Services.
            ("an address that no Service has", POD, "172.30.0.50", 80, TCP, "passes"),
        ],
    );
}

#[test]
fn load_balancers_for_some() {
    let web = service("web", &["172.30.0.41"]).tcp(80).node_port(3001).balanced(&["1.2.3.4", "5.6.7.8"]);
    let web = web.source_ranges(&["192.168.0.0/24", "203.0.113.0/25"]);
    let rig = rig(settings(), [web.apply(), endpoints("web", &[("10.180.0.1", "")])]);
    let (all, node) = ("10.180.0.1:80", "10.180.0.1:80*");
    follow(
        &rig,
        &[
            ("a pod, the cluster address", POD, "172.30.0.41", 80, TCP, all),
            ("outside, the node port", WORLD, NODE_IP, 3001, TCP, node),
            ("outside, not in the ranges, the node port", BLOCKED, NODE_IP, 3001, TCP, node),
            ("outside, in the ranges, the first address", WORLD, "1.2.3.4", 80, TCP, node),
            ("outside, in the ranges, the second address", WORLD, "5.6.7.8", 80, TCP, node),
            ("outside, not in the ranges, the first address", BLOCKED, "1.2.3.4", 80, TCP, "dropped"),
            ("outside, not in the ranges, the second address", BLOCKED, "5.6.7.8", 80, TCP, "dropped"),
            ("a pod, the first address", POD, "1.2.3.4", 80, TCP, "dropped"),
            ("a pod, the second address", POD, "5.6.7.8", 80, TCP, "dropped"),
            ("the node, the first address", NODE, "1.2.3.4", 80, TCP, all),
            ("the node, the second address", NODE, "5.6.7.8", 80, TCP, all),
        ],
    );
}

#[test]
fn node_ports() {
    let of_family = |vip: &str, first: &str, second: &str, family| {
        let slice = slice("web-1", "web", family).tcp(80);
        let slice = slice.endpoint(endpoint(first)).endpoint(endpoint(second).on("n1"));
        [service("web", &[vip]).tcp(80).node_port(3001).apply(), slice.apply()]
    };
    let v4 = || of_family("172.30.0.41", "10.180.0.1", "10.180.2.1", Family::V4);
    let v6 = || of_family("fd00:172:30::41", "fd00:10:180::1", "fd00:10:180::2:1", Family::V6);
    let (pods4, world4) = ("10.180.0.1:80 10.180.2.1:80", "10.180.0.1:80* 10.180.2.1:80");
    let (pods6, world6) = ("[fd00:10:180::1]:80 [fd00:10:180::2:1]:80", "[fd00:10:180::1]:80* [fd00:10:180::2:1]:80");
    let v6_world = Client::Outside("2600:5200::1");
    let rows4: [Row; 4] = [
        ("a pod, the cluster address", POD, "172.30.0.41", 80, TCP, pods4),
        ("a pod, the node port", POD, NODE_IP, 3001, TCP, pods4),
        ("outside, the node port", WORLD, NODE_IP, 3001, TCP, world4),
        // Differs: it needs the socket programs.
        ("the node, its own node port", NODE, NODE_IP, 3001, TCP, "passes"),
    ];
    let rows6: [Row; 3] = [
        ("a pod, the cluster address, IPv6", Client::Pod("fd00:10::2"), "fd00:172:30::41", 80, TCP, pods6),
        ("outside, the node port, IPv6", v6_world, NODE_IPS[2], 3001, TCP, world6),
        ("the node, its own node port, IPv6", NODE, NODE_IPS[2], 3001, TCP, "passes"),
    ];
    let ranges = ["192.168.0.0/24", "192.168.1.0/24", "2001:db8::/64", "2001:db8:1::2/128"];
    let both = ranges.map(|range| NodePortAddresses::In(range.parse().unwrap()));
    let wide = Settings { node_ports: both.to_vec(), ..settings() };
    for (settings, four, six) in [(settings(), "passes", "passes"), (wide, world4, world6)] {
        let v4 = rig(settings.clone(), v4());
        follow(&v4, &rows4);
        follow(&v4, &[("outside, the node port at the second address", WORLD, NODE_IPS[1], 3001, TCP, four)]);
        let v6 = rig(settings, v6());
        follow(&v6, &rows6);
        follow(&v6, &[("outside, the node port at the second address, IPv6", v6_world, NODE_IPS[3], 3001, TCP, six)]);
    }
}

#[test]
fn external_policies() {
    let ends = || endpoints("web", &[("10.180.0.1", ""), ("10.180.2.1", "n1")]);
    let all = "10.180.0.1:80 10.180.2.1:80";
    // The client keeps its address at the endpoint here, also with policy Cluster.
    for (is_local, outside) in [(false, "10.180.0.1:80* 10.180.2.1:80"), (true, "10.180.2.1:80")] {
        let rig = rig(settings(), [Service { external_local: is_local, ..published() }.apply(), ends()]);
        follow(
            &rig,
            &[
                ("a pod, the cluster address", POD, "172.30.0.41", 80, TCP, all),
                ("a pod, the external IP", POD, "192.168.99.11", 80, TCP, all),
                ("outside, the external IP", WORLD, "192.168.99.11", 80, TCP, outside),
                ("a pod, the load balancer", POD, "1.2.3.4", 80, TCP, all),
                ("outside, the load balancer", WORLD, "1.2.3.4", 80, TCP, outside),
                ("a pod, the node port", POD, NODE_IP, 3001, TCP, all),
                ("outside, the node port", WORLD, NODE_IP, 3001, TCP, outside),
            ],
        );
    }
}

#[test]
fn internal_policies() {
    let nodes: [(bool, [&str; 3], &str); 4] = [
        (false, ["n1", "n2", "n3"], "10.0.1.1:80 10.0.1.2:80 10.0.1.3:80"),
        (true, ["n1", "n2", "n3"], "10.0.1.1:80"),
        (true, ["n1", "n1", "n3"], "10.0.1.1:80 10.0.1.2:80"),
        (true, ["n0", "n2", "n3"], "dropped"),
    ];
    for (internal_local, [a, b, c], want) in nodes {
        let web = Service { internal_local, ..service("web", &["172.30.1.1"]).tcp(80) };
        let ends = endpoints("web", &[("10.0.1.1", a), ("10.0.1.2", b), ("10.0.1.3", c)]);
        let mut rig = rig(settings(), [web.apply(), ends]);
        follow(&rig, &[("a pod, the cluster address", POD, "172.30.1.1", 80, TCP, want)]);
        rig.handle([gone(Kind::Slice, "web-1")]).sync();
        follow(&rig, &[("once the endpoints are gone", POD, "172.30.1.1", 80, TCP, "refused")]);
    }
}

/// An endpoint: last byte of its address, condition, node.
type Ending = (u8, Condition, &'static str);

fn ending(external_local: bool, all: &[Ending], pod: &'static str, outside: &'static str) {
    let web = service("web", &["172.30.1.1"]).tcp(80).balanced(&["1.2.3.4"]);
    let make = |(last, condition, node): &Ending| Endpoint {
        condition: *condition,
        ..endpoint(&format!("10.0.1.{last}")).on(node)
    };
    let slice = slice("web-1", "web", Family::V4).tcp(80);
    let slice = all.iter().fold(slice, |slice, it| slice.endpoint(make(it)));
    let mut rig = rig(settings(), [Service { external_local, ..web }.apply(), slice.apply()]);
    follow(
        &rig,
        &[
            ("a pod, the cluster address", POD, "172.30.1.1", 80, TCP, pod),
            ("outside, the load balancer", WORLD, "1.2.3.4", 80, TCP, outside),
        ],
    );
    rig.handle([gone(Kind::Slice, "web-1")]).sync();
    follow(
        &rig,
        &[
            ("a pod, once the endpoints are gone", POD, "172.30.1.1", 80, TCP, "refused"),
            ("outside, once the endpoints are gone", WORLD, "1.2.3.4", 80, TCP, "refused"),
        ],
    );
}

#[test]
fn endpoints_that_terminate_with_policy_local() {
    use Condition::{Draining, Ready, Unusable};
    let ready = [(1, Ready, "n1"), (2, Ready, "n1"), (3, Draining, "n1"), (4, Unusable, "n1"), (5, Ready, "n2")];
    ending(true, &ready, "10.0.1.1:80 10.0.1.2:80 10.0.1.5:80", "10.0.1.1:80 10.0.1.2:80");
    let only = [(2, Draining, "n1"), (3, Draining, "n1"), (4, Unusable, "n1"), (5, Ready, "n2")];
    ending(true, &only, "10.0.1.5:80", "10.0.1.2:80 10.0.1.3:80");
    ending(true, &[(5, Draining, "n2")], "10.0.1.5:80", "dropped");
    ending(true, &[(5, Unusable, "n1"), (5, Unusable, "n2")], "refused", "refused");
}

#[test]
fn endpoints_that_terminate_with_policy_cluster() {
    use Condition::{Draining, Ready, Unusable};
    let ready = [(1, Ready, "n1"), (2, Ready, "n1"), (3, Draining, "n2"), (4, Unusable, "n2"), (5, Ready, "n2")];
    ending(false, &ready, "10.0.1.1:80 10.0.1.2:80 10.0.1.5:80", "10.0.1.1:80 10.0.1.2:80 10.0.1.5:80*");
    let only = [(2, Draining, "n1"), (3, Draining, "n1"), (4, Unusable, "n2"), (5, Draining, "n2")];
    ending(false, &only, "10.0.1.2:80 10.0.1.3:80 10.0.1.5:80", "10.0.1.2:80 10.0.1.3:80 10.0.1.5:80*");
    ending(false, &[(5, Draining, "n2")], "10.0.1.5:80", "10.0.1.5:80*");
    ending(false, &[(5, Unusable, "n1"), (5, Unusable, "n2")], "refused", "refused");
}

#[test]
fn three_services_with_other_policies() {
    let of = |n: u8, port: u16, balancer: &str| {
        let web = service(&format!("s{n}"), &[&format!("172.30.0.4{n}")]).tcp(80).node_port(port);
        web.balanced(&[balancer])
    };
    let services = [
        of(1, 3001, "1.2.3.4"),
        Service { external_local: true, ..of(2, 3002, "5.6.7.8") },
        Service { internal_local: true, ..of(3, 3003, "9.10.11.12") },
    ];
    let (local, remote) = (["10.180.0.1", "10.180.0.2", "10.180.0.3"], ["10.180.1.1", "10.180.1.2", "10.180.1.3"]);
    let ends = (0..3).map(|i| endpoints(&format!("s{}", i + 1), &[(local[i], "n1"), (remote[i], "n2")]));
    let rig = rig(settings(), services.map(Service::apply).into_iter().chain(ends));
    let [one, two, three] =
        ["10.180.0.1:80 10.180.1.1:80", "10.180.0.2:80 10.180.1.2:80", "10.180.0.3:80 10.180.1.3:80"];
    follow(
        &rig,
        &[
            ("policies Cluster: a pod, the cluster address", POD, "172.30.0.41", 80, TCP, one),
            ("policies Cluster: a pod, the node port", POD, NODE_IP, 3001, TCP, one),
            ("policies Cluster: a pod, the load balancer", POD, "1.2.3.4", 80, TCP, one),
            ("policies Cluster: the node, the cluster address", NODE, "172.30.0.41", 80, TCP, one),
            ("policies Cluster: the node, its node port", NODE, NODE_IP, 3001, TCP, "passes"),
            ("policies Cluster: the node, the load balancer", NODE, "1.2.3.4", 80, TCP, one),
            ("policies Cluster: outside, the cluster address", WORLD, "172.30.0.41", 80, TCP, "dropped"),
            ("policies Cluster: outside, the node port", WORLD, NODE_IP, 3001, TCP, "10.180.0.1:80 10.180.1.1:80*"),
            ("policies Cluster: outside, the load balancer", WORLD, "1.2.3.4", 80, TCP, "10.180.0.1:80 10.180.1.1:80*"),
            ("external Local: a pod, the cluster address", POD, "172.30.0.42", 80, TCP, two),
            ("external Local: a pod, the node port", POD, NODE_IP, 3002, TCP, two),
            ("external Local: a pod, the load balancer", POD, "5.6.7.8", 80, TCP, two),
            ("external Local: the node, the cluster address", NODE, "172.30.0.42", 80, TCP, two),
            ("external Local: the node, its node port", NODE, NODE_IP, 3002, TCP, "passes"),
            ("external Local: the node, the load balancer", NODE, "5.6.7.8", 80, TCP, two),
            ("external Local: outside, the cluster address", WORLD, "172.30.0.42", 80, TCP, "dropped"),
            ("external Local: outside, the node port", WORLD, NODE_IP, 3002, TCP, "10.180.0.2:80"),
            ("external Local: outside, the load balancer", WORLD, "5.6.7.8", 80, TCP, "10.180.0.2:80"),
            ("internal Local: a pod, the cluster address", POD, "172.30.0.43", 80, TCP, "10.180.0.3:80"),
            ("internal Local: a pod, the node port", POD, NODE_IP, 3003, TCP, three),
            ("internal Local: a pod, the load balancer", POD, "9.10.11.12", 80, TCP, three),
            ("internal Local: the node, the cluster address", NODE, "172.30.0.43", 80, TCP, "10.180.0.3:80"),
            ("internal Local: the node, its node port", NODE, NODE_IP, 3003, TCP, "passes"),
            ("internal Local: the node, the load balancer", NODE, "9.10.11.12", 80, TCP, three),
            ("internal Local: outside, the cluster address", WORLD, "172.30.0.43", 80, TCP, "dropped"),
            ("internal Local: outside, the node port", WORLD, NODE_IP, 3003, TCP, "10.180.0.3:80 10.180.1.3:80*"),
            (
                "internal Local: outside, the load balancer",
                WORLD,
                "9.10.11.12",
                80,
                TCP,
                "10.180.0.3:80 10.180.1.3:80*",
            ),
        ],
    );
}

/// Rows of `pkg/proxy/iptables/proxier_test.go` that the nftables mode's tests do not have.
#[test]
fn rows_of_the_iptables_mode() {
    let web = Service { external_local: true, health_check_port: 30_000, ..published() };
    let rig = rig(settings(), [web.apply(), endpoints("web", &[("10.180.0.2", "n2")])]);
    follow(
        &rig,
        &[
            ("a pod, another pod", POD, "10.0.0.3", 80, TCP, "passes"),
            // Differs: it needs the socket programs.
            ("the node, its node port at localhost", NODE, "127.0.0.1", 3001, TCP, "passes"),
            // The agent listens there.
            ("outside, the port of health checks", WORLD, NODE_IP, 30_000, TCP, "passes"),
            ("the node, the port of health checks", NODE, NODE_IP, 30_000, TCP, "passes"),
            ("the node, an external IP with policy Local", NODE, "192.168.99.11", 80, TCP, "10.180.0.2:80"),
            ("outside, policy Local and no endpoint here", WORLD, "192.168.99.11", 80, TCP, "dropped"),
            // Differs from that mode alone, which leaves such packets to the node's routes.
            ("a pod, a port that a cluster address does not have", POD, "172.30.0.41", 443, TCP, "refused"),
        ],
    );
}
