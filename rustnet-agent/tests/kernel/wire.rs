//! What is read from the kernel by netlink, against the kernel: whole lists, and what decides over uplinks.

use std::fs;
use std::future::Future;
use std::time::Duration;

use rustnet_agent::net::address::{self, Address};
use rustnet_agent::net::link::{self, Link};
use rustnet_agent::net::monitor::Monitor;
use rustnet_agent::net::netlink::Socket;
use rustnet_agent::net::route::{self, Hop, Target};

use crate::sandbox::{self, ip, uplink};

#[test]
fn a_default_route_over_two_devices_has_both() {
    sandbox::run(|_| {
        uplink();
        ip("link add eth1 type veth peer name far1");
        for dev in ["eth1", "far1"] {
            ip(&format!("link set {dev} up"));
        }
        ip("addr add 198.51.100.1/24 dev eth1");
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
