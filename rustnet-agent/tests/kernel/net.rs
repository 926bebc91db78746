//! The host's network: made, kept, repaired, and foreign things left alone.

use std::fs;
use std::path::Path;
use std::time::Instant;

use rustnet_agent::config::Routing;
use rustnet_agent::failure::Scope;
use rustnet_agent::model::{Node, ObjectName};
use rustnet_agent::net::host::Host;
use rustnet_agent::net::link;
use rustnet_agent::net::netlink::Socket;
use rustnet_agent::net::overlay::{self, Change, Ensured, Spec, mac_of};
use rustnet_agent::net::repair::{Overlay, Repairer, State, Wanted};
use rustnet_agent::ways::{Settings, Ways};

use crate::sandbox::{self, Sandbox, add_eth1, ip, uplink};

/// Where the kernel shows the settings of the reader's network namespace.
const SYSCTLS: &str = "/proc/sys/net";
const SPEC: Spec = Spec { port: 8472, mtu: 1450, mac: [2, 0, 0, 0, 0, 1] };

fn node(name: &str, addresses: &[&str], pod_cidrs: &[&str]) -> Node {
    Node {
        name: ObjectName::cluster(name),
        created: 0,
        addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
        pod_cidrs: pod_cidrs.iter().map(|c| c.parse().unwrap()).collect(),
        zone: "".into(),
        is_leaving: false,
        other_addresses: Box::default(),
        labels: rustnet_agent::model::Labels::default(),
        problems: Box::default(),
    }
}

fn own() -> Node {
    node("n1", &["192.0.2.1", "2001:db8::1"], &["10.1.1.0/24", "fd00:1::/64"])
}

fn peer() -> Node {
    node("n2", &["192.0.2.2", "2001:db8::2"], &["10.1.2.0/24", "fd00:2::/64"])
}

fn repairer(sandbox: &Sandbox) -> Repairer {
    Repairer::new(&sandbox.run_dir, Path::new(SYSCTLS)).unwrap()
}

/// Both halves, as if the programs had been attached in between.
fn run(sandbox: &Sandbox, wanted: &Wanted<'_>) -> State {
    let mut repairer = repairer(sandbox);
    let host = Host::observe(repairer.socket()).unwrap();
    let mut state = repairer.prepare(host, wanted).unwrap();
    repairer.connect(&mut state, wanted, true);
    state
}

fn is_overlay_up(state: &State) -> bool {
    state.overlay.is_some_and(|device| device.is_up)
}

fn overlay_settings() -> Overlay {
    Overlay { port: 8472, mac: mac_of("n1") }
}

/// The ways that follow from the host as it is.
fn ways(sandbox: &Sandbox, routing: Routing, nodes: &[Node]) -> Ways {
    let host = Host::observe(repairer(sandbox).socket()).unwrap();
    Ways::new(&Settings::new("n1", routing), nodes.iter(), &host.facts())
}

/// Wants the overlay and its routes, with all nodes known.
fn want_overlay<'a>(ways: &'a Ways, own: &'a Node) -> Wanted<'a> {
    let overlay = Some(overlay_settings());
    Wanted { ways, overlay, own_pod_cidrs: &own.pod_cidrs, service_cidrs: &[], is_complete: true }
}

/// Wants the host's devices alone.
fn want_no_route(ways: &Ways) -> Wanted<'_> {
    Wanted { ways, overlay: None, own_pod_cidrs: &[], service_cidrs: &[], is_complete: true }
}

fn repair(sandbox: &Sandbox, vxlan: bool, peers: &[Node], is_complete: bool) -> State {
    let own = own();
    let nodes: Vec<_> = peers.iter().chain([&own]).cloned().collect();
    let ways = ways(sandbox, if vxlan { Routing::Vxlan } else { Routing::Native }, &nodes);
    let wanted = Wanted { overlay: vxlan.then(overlay_settings), is_complete, ..want_overlay(&ways, &own) };
    let state = run(sandbox, &wanted);
    assert!(state.failures.is_empty(), "{:?}", state.failures);
    state
}

#[test]
fn the_overlay_device_is_made_kept_and_repaired() {
    sandbox::run(|_| {
        let mut socket = Socket::open().unwrap();
        let mut ensure = || overlay::ensure(&mut socket, &SPEC).unwrap();
        let Ensured { index, change, is_up } = ensure();
        assert_eq!((change, is_up), (Change::Created, false));
        assert_eq!(ensure(), Ensured { index, change: Change::None, is_up: false });
        let shown = ip("-d link show dev rn_vxlan");
        for part in
            ["external", "dstport 8472", "nolearning", "mtu 1450", "NOARP", "addrgenmode none", "02:00:00:00:00:01"]
        {
            assert!(shown.contains(part), "{part} is missing in {shown}");
        }
        for is_up in [false, true] {
            if is_up {
                ip("link set rn_vxlan up");
            }
            for mess in ["mtu 1400", "arp on", "address 02:00:00:00:00:09", "addrgenmode eui64"] {
                ip(&format!("link set rn_vxlan {mess}"));
                assert_eq!(ensure(), Ensured { index, change: Change::Configured, is_up }, "{mess}");
                assert_eq!(ensure(), Ensured { index, change: Change::None, is_up }, "{mess}");
            }
        }
        ip("link del rn_vxlan");
        assert_eq!(ensure().change, Change::Created);
        ip("link del rn_vxlan");
        ip("link add rn_vxlan type vxlan id 7 dstport 4789");
        ip("link set rn_vxlan up");
        let replaced = ensure();
        assert_eq!((replaced.change, replaced.is_up), (Change::Replaced, false));
        assert_eq!(ensure().change, Change::None);
        assert!(overlay::remove(&mut socket).unwrap());
        assert!(!overlay::remove(&mut socket).unwrap());
    });
}

/// A VXLAN device that is up takes tunnel packets of any sender. Where the programs cannot be
/// loaded, or not attached, it has to stay down.
#[test]
fn the_overlay_device_is_down_until_its_packets_are_verified() {
    sandbox::run(|sandbox| {
        uplink();
        let (own, peer) = (own(), peer());
        let ways = ways(sandbox, Routing::Vxlan, &[own.clone(), peer.clone()]);
        let wanted = want_overlay(&ways, &own);
        let is_up = || ip("link show rn_vxlan").contains(",UP");
        let mut repairer = repairer(sandbox);
        let mut look = |is_verified| {
            let host = Host::observe(repairer.socket()).unwrap();
            let mut state = repairer.prepare(host, &wanted).unwrap();
            assert!(state.overlay.is_some());
            repairer.connect(&mut state, &wanted, is_verified);
            assert!(state.failures.is_empty(), "{:?}", state.failures);
            state
        };
        for _ in 0..2 {
            assert!(!is_overlay_up(&look(false)) && !is_up());
            assert!(!ip("route show").contains("rn_vxlan"));
        }
        assert!(is_overlay_up(&look(true)) && is_up());
        assert!(ip("route show").contains("10.1.2.0/24 dev rn_vxlan"));
        // An agent that comes back and has yet to load its programs: those of the last one are
        // attached.
        assert!(is_overlay_up(&look(false)) && is_up());
        // It comes up again only with its program.
        ip("link set rn_vxlan down");
        assert!(!is_overlay_up(&look(false)) && !is_up());
        assert!(look(true).changed.contains(&"rn_vxlan: up".to_owned()) && is_up());
        // The same for a device that takes the place of another one.
        ip("link del rn_vxlan");
        ip("link add rn_vxlan type vxlan id 7 dstport 4789");
        ip("link set rn_vxlan up");
        assert!(!is_overlay_up(&look(false)) && !is_up());
    });
}

#[test]
fn a_taken_port_is_an_error_that_says_so() {
    sandbox::run(|_| {
        ip("link add other type vxlan external dstport 8472");
        ip("link set other up");
        let mut socket = Socket::open().unwrap();
        let made = overlay::ensure(&mut socket, &SPEC);
        let error = made.and_then(|made| link::raise(&mut socket, made.index, SPEC.port)).unwrap_err();
        let error = format!("{error:#}");
        assert!(error.contains("8472") && error.contains("--overlay-port"), "{error}");
    });
}

#[test]
fn routes_are_made_repaired_and_removed_and_foreign_ones_stay() {
    sandbox::run(|sandbox| {
        uplink();
        ip("route add 10.9.0.0/16 via 192.0.2.9");
        repair(sandbox, true, &[peer()], true);
        let routes = || ip("route show proto 114") + &ip("-6 route show proto 114");
        let first = routes();
        for part in [
            "10.1.2.0/24 dev rn_vxlan scope link src 192.0.2.1",
            "unreachable 10.1.1.0/24",
            "fd00:2::/64 dev rn_vxlan src 2001:db8::1",
            "unreachable fd00:1::/64",
        ] {
            assert!(first.contains(part), "{part} is missing in {first}");
        }
        assert!(repair(sandbox, true, &[peer()], true).changed.is_empty(), "a second run changes nothing");

        ip("route del 10.1.2.0/24");
        ip("-6 route del fd00:2::/64");
        ip("route del unreachable 10.1.1.0/24");
        assert_eq!(repair(sandbox, true, &[peer()], true).changed.len(), 3);
        assert_eq!(routes(), first);

        // The device goes, and the routes with it.
        ip("link del rn_vxlan");
        repair(sandbox, true, &[peer()], true);
        assert_eq!(routes(), first);

        // A node leaves; before all nodes are known nothing is removed.
        repair(sandbox, true, &[], false);
        assert_eq!(routes(), first);
        repair(sandbox, true, &[], true);
        assert!(!routes().contains("rn_vxlan"), "{}", routes());
        assert!(ip("route show").contains("10.9.0.0/16 via 192.0.2.9"));
    });
}

#[test]
fn native_routes_go_through_the_nodes() {
    sandbox::run(|sandbox| {
        uplink();
        repair(sandbox, false, &[peer(), node("n3", &["198.51.100.3"], &["10.1.3.0/24"])], true);
        assert!(ip("route show 10.1.2.0/24").contains("via 192.0.2.2 dev eth0"));
        assert!(ip("-6 route show fd00:2::/64").contains("via 2001:db8::2 dev eth0"));
        assert!(ip("route show 10.1.3.0/24").is_empty());
    });
}

#[test]
fn a_route_in_the_place_is_named_and_left() {
    sandbox::run(|sandbox| {
        uplink();
        ip("route add 10.1.2.0/24 via 192.0.2.9");
        let own = own();
        let ways = ways(sandbox, Routing::Vxlan, &[own.clone(), peer()]);
        let wanted = want_overlay(&ways, &own);
        let state = run(sandbox, &wanted);
        assert!(
            state.failures[0].message.contains("10.1.2.0/24") && state.failures[0].message.contains("another program"),
            "{:?}",
            state.failures
        );
        assert!(ip("route show 10.1.2.0/24").contains("192.0.2.9"));
        assert!(ip("-6 route show fd00:2::/64").contains("rn_vxlan"), "the rest is done");
        assert!(state.failures.iter().all(|it| it.scope == Scope::Peer), "the node and its pods work");
    });
}

#[test]
fn pods_get_back_their_route_and_neighbour() {
    sandbox::run(|sandbox| {
        uplink();
        sandbox.add_pod("rnv1", "10.1.1.5");
        repair(sandbox, true, &[], true);
        assert!(ip("route show 10.1.1.5").contains("dev rnv1 "));
        let shown = ip("neigh show 10.1.1.5 dev rnv1");
        assert!(shown.contains("lladdr 02:00:00:00:00:07") && shown.contains("PERMANENT"), "{shown}");
        ip("neigh del 10.1.1.5 dev rnv1");
        ip("route del 10.1.1.5");
        assert_eq!(repair(sandbox, true, &[], true).changed.len(), 2);
        assert!(repair(sandbox, true, &[], true).changed.is_empty());
    });
}

#[test]
fn sysctls_of_this_namespace_are_set_again() {
    sandbox::run(|sandbox| {
        uplink();
        let read = |path: &str| fs::read_to_string(format!("/proc/thread-self/root/proc/sys/net/{path}")).unwrap();
        fs::write("/proc/sys/net/ipv4/ip_forward", "0").unwrap();
        repair(sandbox, true, &[], true);
        assert_eq!(read("ipv4/ip_forward").trim(), "1");
        assert_eq!(read("ipv6/conf/all/forwarding").trim(), "1");
        assert_eq!(read("ipv4/conf/rn_vxlan/rp_filter").trim(), "0");
        assert_eq!(read("ipv4/conf/rn_vxlan/arp_ignore").trim(), "8");
        assert_eq!(read("ipv6/conf/rn_vxlan/accept_ra").trim(), "0");
        fs::write("/proc/sys/net/ipv4/conf/rn_vxlan/rp_filter", "1").unwrap();
        assert_eq!(repair(sandbox, true, &[], true).changed, ["ipv4.conf.rn_vxlan.rp_filter: 1 -> 0"]);
    });
}

/// A node whose device towards the others is away keeps its pods connected.
#[test]
fn without_an_uplink_pods_are_looked_after() {
    sandbox::run(|sandbox| {
        sandbox.add_pod("rnv1", "10.1.1.5");
        let ways = ways(sandbox, Routing::Native, &[own()]);
        assert!(ways.place.uplinks.is_empty() && !ways.place.problems.is_empty());
        let wanted = want_no_route(&ways);
        let state = run(sandbox, &wanted);
        assert!(state.problems.iter().any(|it| it.contains("no device leads to other nodes")), "{:?}", state.problems);
        assert!(ip("route show 10.1.1.5").contains("dev rnv1 "));
    });
}

/// Between two leases a device has no address, and a default route is away for a second: hooks stay.
#[test]
fn uplinks_of_before_count_while_there_are_none() {
    sandbox::run(|sandbox| {
        uplink();
        let mut repairer = repairer(sandbox);
        let mut look = || {
            let ways = ways(sandbox, Routing::Native, &[own()]);
            let wanted = want_no_route(&ways);
            let host = Host::observe(repairer.socket()).unwrap();
            let state = repairer.prepare(host, &wanted).unwrap();
            state.uplinks.iter().map(|it| it.name.clone()).collect::<Vec<_>>()
        };
        assert_eq!(look(), ["eth0"]);
        ip("addr flush dev eth0");
        ip("route flush default");
        assert_eq!(look(), ["eth0"]);
        // Nor does another device that leads into the world take its place.
        other_way_out();
        assert_eq!(look(), ["eth1", "eth0"]);
        ip("link del eth0");
        assert_eq!(look(), ["eth1"]);
        ip("link del eth1");
        assert!(look().is_empty());
    });
}

/// A device with a smaller MTU has the default route.
fn other_way_out() {
    add_eth1(1300);
    ip("route add default via 198.51.100.254");
}

/// Between two leases the host has none of the node's addresses: pods that are there need the size that they have.
#[test]
fn the_overlay_keeps_its_size_while_the_nodes_addresses_are_away() {
    sandbox::run(|sandbox| {
        uplink();
        let mtu = || repair(sandbox, true, &[peer()], true).overlay.map(|device| device.mtu);
        assert_eq!(mtu(), Some(1450));
        ip("addr flush dev eth0");
        other_way_out();
        assert_eq!(mtu(), Some(1450));
    });
}

#[test]
fn forwarding_of_single_devices_is_switched_on_again() {
    sandbox::run(|sandbox| {
        uplink();
        repair(sandbox, true, &[], true);
        let path = "/proc/sys/net/ipv4/conf/eth0/forwarding";
        fs::write(path, "0").unwrap();
        assert_eq!(repair(sandbox, true, &[], true).changed, ["ipv4.conf.eth0.forwarding: 0 -> 1"]);
    });
}

/// What a look at a host with a million routes costs: in its thread, and then in the loop.
#[test]
#[ignore = "prints figures"]
fn a_look_at_a_million_routes() {
    const NETS: u8 = 16;
    sandbox::run(|sandbox| {
        uplink();
        for net in 0..NETS {
            let line = |i: u32| format!("route add 10.{}.{}.{} via 192.0.2.254\n", 100 + net, i >> 8, i & 255);
            let lines: String = (0..62_500).map(line).collect();
            sandbox::ip_batch("-4", &lines);
        }
        let (ways, own) = (ways(sandbox, Routing::Vxlan, &[own(), peer()]), own());
        let wanted = want_overlay(&ways, &own);
        run(sandbox, &wanted);
        let mut repairer = repairer(sandbox);
        for _ in 0..3 {
            let began = Instant::now();
            let host = Host::observe(repairer.socket()).unwrap();
            let (observed, routes) = (began.elapsed(), host.routes.len());
            let began = Instant::now();
            let facts = host.facts();
            let mut state = repairer.prepare(host, &wanted).unwrap();
            repairer.connect(&mut state, &wanted, true);
            let is_idle = state.changed.is_empty() && state.failures.is_empty();
            drop(state);
            println!(
                "{routes} routes: {observed:?}, then {:?}; {} devices, idle: {is_idle}",
                began.elapsed(),
                facts.devices.len()
            );
        }
        let status = fs::read_to_string("/proc/self/status").unwrap();
        println!(
            "{}",
            status.lines().filter(|line| line.starts_with("VmHWM") || line.starts_with("VmRSS")).collect::<String>()
        );
    });
}
