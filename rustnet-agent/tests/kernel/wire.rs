//! What is read from the kernel by netlink, against the kernel: whole lists, and what decides over uplinks.

use std::fmt::Write as _;
use std::fs;
use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustnet_agent::net::address::{self, Address};
use rustnet_agent::net::link::{self, Link};
use rustnet_agent::net::monitor::Monitor;
use rustnet_agent::net::netlink::Socket;
use rustnet_agent::net::route::{self, Hop, PROTOCOL, Route, Target};

use crate::sandbox::{self, add_eth1, ip, ip_batch, uplink};

/// A line for each of `count` routes of a family; `family` is `-4` or `-6`.
fn lines(op: &str, family: &str, net: u8, count: u32, protocol: &str) -> String {
    (0..count).fold(String::new(), |mut lines, i| {
        let dst =
            if family == "-4" { format!("10.{net}.{}.{}", i >> 8, i & 255) } else { format!("fd00:{net}::{i:x}") };
        writeln!(lines, "route {op} {dst} dev eth0 proto {protocol}").unwrap();
        lines
    })
}

/// The kernel's own list of IPv6 routes lacks some now and then, and does not say so.
#[test]
fn no_route_is_missing_from_a_list_while_others_come_and_go() {
    const KEPT: u32 = 2000;
    sandbox::run(|_| {
        uplink();
        for family in ["-4", "-6"] {
            ip_batch(family, &lines("add", family, 1, KEPT, "114"));
        }
        let stop = AtomicBool::new(false);
        std::thread::scope(|threads| {
            threads.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    for (op, family) in [("add", "-4"), ("del", "-4"), ("add", "-6"), ("del", "-6")] {
                        ip_batch(family, &lines(op, family, 0, 1000, "static"));
                    }
                }
            });
            let mut socket = Socket::open().unwrap();
            let short = (0..500).find_map(|round| {
                let mut kept: Vec<_> =
                    route::list(&mut socket).unwrap().into_iter().map(|route| (route.protocol, route.dst)).collect();
                kept.retain(|(protocol, _)| *protocol == PROTOCOL);
                kept.sort_unstable();
                kept.dedup();
                (kept.len() != 2 * KEPT as usize).then(|| format!("list {round} has {} of ours", kept.len()))
            });
            stop.store(true, Ordering::Relaxed);
            assert_eq!(short, None);
        });
    });
}

#[test]
fn a_default_route_over_two_devices_has_both() {
    sandbox::run(|_| {
        uplink();
        add_eth1(1500);
        ip("route del default");
        ip("route add default metric 50 nexthop via 192.0.2.254 dev eth0 nexthop via inet6 fe80::254 dev eth1");
        ip("-6 route add default nexthop via 2001:db8::254 dev eth0 nexthop via fe80::254 dev eth1");
        let mut socket = Socket::open().unwrap();
        let mut defaults = || {
            let routes = route::list(&mut socket).unwrap();
            routes.into_iter().filter(|route| route.dst.prefix_len() == 0).collect::<Vec<_>>()
        };
        let [eth0, eth1] = ["eth0", "eth1"].map(sandbox::ifindex);
        let found = defaults();
        let hops = [(eth0, "192.0.2.254"), (eth1, "fe80::254")];
        let hops = hops.map(|(oif, gateway)| Hop { oif, gateway: Some(gateway.parse().unwrap()) });
        assert_eq!((&found[0].target, found[0].metric), (&Target::Multi(hops.to_vec()), 50));
        assert_eq!((found.len(), found[1].target.devices()), (2, vec![eth0, eth1]));
        ip("route del default");
        ip("-6 route del default");
        ip("nexthop add id 1 via 192.0.2.254 dev eth0");
        ip("nexthop add id 2 via 198.51.100.254 dev eth1");
        ip("nexthop add id 3 group 1/2");
        ip("route add default nhid 3");
        assert_eq!(defaults()[0].target.devices(), [eth0, eth1]);
        ip("route replace default nhid 2");
        assert_eq!(defaults()[0].target.devices(), [eth1]);
        // The kernel then reports the object's id alone.
        fs::write("/proc/sys/net/ipv4/nexthop_compat_mode", "0").unwrap();
        let via = |oif, gateway: &str| Target::Via { oif, gateway: Some(gateway.parse().unwrap()) };
        assert_eq!(defaults()[0].target, via(eth1, "198.51.100.254"));
        ip("route replace default nhid 3");
        assert_eq!(defaults()[0].target.devices(), [eth0, eth1]);
        ip("nexthop add id 6 via fe80::254 dev eth1");
        ip("-6 route add default nhid 6");
        assert_eq!(defaults()[1].target, via(eth1, "fe80::254"));
    });
}

#[test]
fn addresses_that_may_go_are_not_usable() {
    sandbox::run(|_| {
        uplink();
        ip("addr add 192.0.2.7/24 dev eth0");
        ip("addr add 192.0.2.8/32 dev eth0 preferred_lft 0");
        ip("addr add 2001:db8::7/64 dev eth0 nodad preferred_lft 0");
        ip("addr add 2001:db8::8/64 dev eth0 nodad mngtmpaddr");
        // Its twin on the same link: the check of duplicates fails, or is still to begin.
        ip("addr add 2001:db8::9/64 dev far nodad");
        ip("addr add 2001:db8::9/64 dev eth0");
        let addresses = address::list(&mut Socket::open().unwrap()).unwrap();
        let eth0 = sandbox::ifindex("eth0");
        let usable = |wanted: &str| {
            let is_it = |a: &&Address| a.ifindex == eth0 && a.net.addr().to_string() == wanted;
            addresses.iter().find(is_it).unwrap().is_usable()
        };
        for lasting in ["192.0.2.1", "192.0.2.7", "2001:db8::1", "2001:db8::8"] {
            assert!(usable(lasting), "{lasting}");
        }
        for other in ["192.0.2.8", "2001:db8::7", "2001:db8::9"] {
            assert!(!usable(other), "{other}");
        }
    });
}

#[test]
fn links_have_kind_master_and_framing() {
    sandbox::run(|_| {
        uplink();
        ip("link add br0 type bridge");
        ip("link set far master br0");
        ip("link add down0 type veth peer name down1");
        let links = link::list(&mut Socket::open().unwrap()).unwrap();
        let find = |name: &str| links.iter().find(|link| link.name == name).unwrap();
        let shape = |link: &Link| (link.kind.clone(), link.is_ethernet(), link.master);
        assert_eq!(shape(find("eth0")), ("veth".into(), true, None));
        assert_eq!(shape(find("far")), ("veth".into(), true, Some(find("br0").index)));
        assert_eq!(shape(find("br0")), ("bridge".into(), true, None));
        assert_eq!(shape(find("lo")), (String::new(), false, None));
        assert_eq!(find("lo").hardware, libc::ARPHRD_LOOPBACK);
        // IF_OPER_UP, IF_OPER_DOWN.
        assert_eq!((find("eth0").operstate, find("down0").operstate), (6, 2));
        // The same one at a time.
        assert_eq!(
            link::by_index(&mut Socket::open().unwrap(), find("br0").index).unwrap().as_ref(),
            Some(find("br0"))
        );
        assert_eq!(link::by_name(&mut Socket::open().unwrap(), "none").unwrap(), None);
    });
}

/// As when the CNI binary adds a pod's route after a look and before the repair.
#[test]
fn a_route_that_somebody_else_was_faster_to_make_is_no_error() {
    sandbox::run(|_| {
        uplink();
        ip("link add rnv1 type veth peer name pod");
        for dev in ["rnv1", "pod"] {
            ip(&format!("link set {dev} up"));
        }
        let oif = sandbox::ifindex("rnv1");
        let mut socket = Socket::open().unwrap();
        for dst in ["10.1.1.5/32", "fd00:1::5/128"] {
            ip(&format!("route add {dst} dev rnv1 proto static"));
            let target = Target::Via { oif, gateway: None };
            let wanted = Route { dst: dst.parse().unwrap(), target, source: None, metric: 0, protocol: PROTOCOL };
            route::add(&mut socket, &wanted, false).unwrap();
            let other = Route { target: Target::Via { oif: sandbox::ifindex("eth0"), gateway: None }, ..wanted };
            // IPv6 would make it a second hop.
            if dst.starts_with("10") {
                let error = format!("{:#}", route::add(&mut socket, &other, false).unwrap_err());
                assert!(error.contains("another program's route is in its place"), "{error}");
            }
        }
    });
}

/// Waits for something that must come; the limit only ends a test that failed.
fn wait<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(20), future).await.expect("nothing was heard") })
}

#[test]
fn changes_of_sysctls_and_pods_neighbours_are_heard() {
    sandbox::run(|_| {
        uplink();
        ip("link add rnv1 type veth peer name pod");
        for dev in ["rnv1", "pod"] {
            ip(&format!("link set {dev} addrgenmode none up"));
        }
        ip("neigh add 10.1.1.5 lladdr 02:00:00:00:00:05 nud permanent dev rnv1");
        let heard_after = |change: &dyn Fn()| {
            wait(async {
                let mut monitor = Monitor::open().unwrap();
                change();
                monitor.changed().await.unwrap();
            });
        };
        heard_after(&|| fs::write("/proc/sys/net/ipv4/conf/rnv1/rp_filter", "2").unwrap());
        heard_after(&|| fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap());
        heard_after(&|| fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap());
        heard_after(&|| drop(ip("neigh del 10.1.1.5 dev rnv1")));
    });
}
