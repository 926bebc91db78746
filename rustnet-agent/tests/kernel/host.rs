//! The loop and the host's own devices: their addresses, ports, routes and which are uplinks.

use std::os::fd::AsFd;

use bytemuck::Zeroable as _;
use rustnet_agent::bpf::attach::Direction;
use rustnet_agent::bpf::load::{CLOCK, program_path};
use rustnet_agent::bpf::probe;
use rustnet_agent::bpf::store::node_config::NodeConfigStore;
use rustnet_agent::bpf::store::{Map, peers};
use rustnet_agent::bpf::sys;
use rustnet_agent::config::{Config, Routing};
use rustnet_agent::net::netlink::Socket;
use rustnet_agent::net::{link, tc};
use rustnet_agent::nodefile;
use rustnet_common::addr::{Address, Ip4, Ip6};
use rustnet_common::conntrack::{CtEntry, flags};
use rustnet_common::device::Device;
use rustnet_common::names::map;
use rustnet_common::tuple::Tuple;

use crate::agent::{Agent, block_on, make_own_node, node, wait_until};
use crate::sandbox::{self, Sandbox, add_eth1, add_pod_veth, command, has_tcx, ip, on_hook, uplink};

/// The link and the program, as [`on_hook`] returns them, at which packets from an uplink arrive.
fn find_uplink_hook(sandbox: &Sandbox, device: &str) -> Option<(u32, u32)> {
    on_hook(&sandbox.bpffs, "uplink_in", device, Direction::Ingress)
}

#[test]
fn a_host_that_uses_all_ports_is_a_problem_of_the_node_and_masquerade_works() {
    sandbox::run(|sandbox| {
        uplink();
        std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "1024 65535").unwrap();
        block_on(async {
            let config = sandbox.config(&["--packet-mark=0x2a000000/0xff000000"]);
            let agent = Agent::start_ready(config, [make_own_node()]).await;
            agent.wait_problem(&["ip_local_port_range is 1024-65535", "sysctl -w"]).await;
            let config = NodeConfigStore::open(&sandbox.bpffs).unwrap().read().unwrap();
            assert_eq!((config.snat_min, config.snat_max), (57_344, 65_535));
            assert_eq!((config.mark, config.mark_mask), (0x2a00_0000, 0xff00_0000));
            agent.stop().await;
        });
    });
}

/// Until this node's object is known again, the device with its address may not seem to be an
/// uplink. It keeps its programs, though another one has got the default route since.
#[test]
fn a_new_default_route_takes_no_program_off_the_nodes_device() {
    if !has_tcx() {
        return;
    }
    sandbox::run(|sandbox| {
        uplink();
        add_eth1(1500);
        ip("route del default");
        let config = || Config { uplinks: Vec::new(), ..sandbox.config(&[]) };
        let hook = |device| find_uplink_hook(sandbox, device);
        block_on(async {
            Agent::start_ready(config(), [node("n1", "198.51.100.1", &["10.1.1.0/24"])]).await.stop().await;
            let before = hook("eth1");
            assert!(before.is_some() && hook("eth0").is_none());
            ip("route add default via 192.0.2.254");
            let next = Agent::start(config());
            wait_until("the programs are on the other device, too", || hook("eth0").is_some()).await;
            assert_eq!(hook("eth1"), before);
            next.make_ready([node("n1", "198.51.100.1", &["10.1.1.0/24"])]).await;
            assert_eq!(hook("eth1").map(|link| link.0), before.map(|link| link.0), "the same link");
            next.stop().await;
        });
    });
}

/// Between two leases the host has none of the node's addresses, and another device the default
/// route: new pods get the MTU that the others have.
#[test]
fn the_mtu_of_pods_stays_while_the_nodes_addresses_are_away() {
    sandbox::run(|sandbox| {
        uplink();
        let mtu = || nodefile::read(&sandbox.run_dir).unwrap().unwrap().mtu;
        block_on(async {
            let config = Config { uplinks: Vec::new(), routing: Routing::Native, ..sandbox.config(&[]) };
            let agent = Agent::start_ready(config, [make_own_node()]).await;
            assert_eq!(mtu(), 1500);
            add_eth1(1300);
            ip("addr flush dev eth0");
            ip("route add default via 198.51.100.254");
            agent.wait_problem(&["no usable 192.0.2.1"]).await;
            wait_until("the other device is an uplink", || find_uplink_hook(sandbox, "eth1").is_some()).await;
            assert_eq!(mtu(), 1500);
            agent.stop().await;
        });
    });
}

/// A device gets another address for masquerade, and the host keeps the one of before: flows that
/// have it go on.
#[test]
fn masqueraded_flows_go_on_while_the_host_has_their_address() {
    type Connections = Map<Tuple<Ip4>, CtEntry<Ip4>>;
    sandbox::run(|sandbox| {
        uplink();
        ip("addr add 192.0.2.99/24 dev eth0");
        block_on(async {
            let agent = Agent::start_ready(sandbox.config(&[]), [make_own_node()]).await;
            let table = Connections::open(&sandbox.bpffs, map::CT4_ANY).unwrap();
            let address = |text: &str| Ip4 { ip: text.parse::<std::net::Ipv4Addr>().unwrap().octets() };
            let asks = Tuple {
                src: address("10.1.1.5"),
                dst: address("198.51.100.7"),
                sport: 5000,
                dport: 53,
                proto: 17,
                pad: 0,
                pad2: 0,
            };
            let to = Tuple { src: address("192.0.2.1"), ..asks };
            let swapped = if asks.is_swapped() { flags::SWAPPED } else { 0 };
            let clock = sys::obj_get(&program_path(&sandbox.bpffs, CLOCK)).unwrap();
            let seen = probe::jiffies(clock.as_fd()).unwrap();
            let flow = CtEntry { to, flags: flags::NAT | flags::MASQ | swapped, seen, ..CtEntry::zeroed() };
            table.put(&asks.canonical(), &flow).unwrap();
            let devices = Map::<u32, Device>::open(&sandbox.bpffs, map::DEVICES).unwrap();
            let of_eth0 = || devices.get(&sandbox::ifindex("eth0")).unwrap().map(|device| device.ip4.octets());
            assert_eq!(of_eth0(), Some([192, 0, 2, 1]));
            agent.send([node("n1", "192.0.2.99", &["10.1.1.0/24"])]).await;
            wait_until("the device has the other address", || of_eth0() == Some([192, 0, 2, 99])).await;
            agent.stop().await;
            assert!(table.get(&asks.canonical()).unwrap().is_some());
        });
    });
}

#[test]
fn a_device_that_is_no_uplink_any_more_is_let_go() {
    sandbox::run(|sandbox| {
        uplink();
        add_eth1(1500);
        let run = |uplinks: &'static [&'static str]| {
            block_on(async move {
                Agent::start_ready(sandbox.config(uplinks), [make_own_node()]).await.stop().await;
            });
        };
        run(&["--uplink=eth0"]);
        // The other way round, and one of them twice.
        run(&["--uplink=eth1", "--uplink=eth0", "--uplink=eth1"]);
        let mut socket = Socket::open().unwrap();
        let index = |socket: &mut Socket, name| link::by_name(socket, name).unwrap().unwrap().index;
        let (eth0, far1) = (index(&mut socket, "eth0"), index(&mut socket, "far1"));
        // Filters of ours, as a kernel without TCX has them already; on a kernel with it they are as
        // good as any.
        let program = sys::obj_get(&program_path(&sandbox.bpffs, "uplink_in")).unwrap();
        for direction in Direction::BOTH {
            tc::set_filter(&mut socket, eth0, direction, program.as_fd(), "uplink_in", !has_tcx()).unwrap();
            tc::set_filter(&mut socket, far1, direction, program.as_fd(), "not_ours", false).unwrap();
        }
        let link = |device| find_uplink_hook(sandbox, device).map(|link| link.0);
        let before = link("eth1");
        run(&["--uplink=eth1"]);
        assert_eq!(link("eth1"), before, "it has its own link, and takes no second program");
        for direction in Direction::BOTH {
            let left = tc::filter(&mut socket, eth0, direction).unwrap();
            // Without TCX the program of side devices is a filter, too.
            assert!(left.as_ref().is_none_or(|it| !has_tcx() && it.name.starts_with("side_in")), "{left:?}");
        }
        let others = command("tc", "filter show dev far1 ingress");
        assert!(String::from_utf8_lossy(&others.stdout).contains("not_ours"), "{others:?}");
        assert!(find_uplink_hook(sandbox, "eth1").is_some());
        // It has an address: answers to masqueraded packets may come in by it.
        assert!(find_uplink_hook(sandbox, "eth0").is_none() || !has_tcx());
        assert!(on_hook(&sandbox.bpffs, "side_in", "eth0", Direction::Ingress).is_some() || !has_tcx());
    });
}

#[test]
fn every_address_of_the_host_is_the_hosts_own_as_long_as_it_is_there() {
    use rustnet_common::peer::flags::HOST;
    sandbox::run(|sandbox| {
        uplink();
        add_pod_veth("rnv1");
        let own = || {
            let peers = peers(&sandbox.bpffs).unwrap();
            let own = peers.iter().filter(|(_, peer)| peer.flags == HOST);
            own.map(|(prefix, _)| prefix.to_string()).collect::<Vec<_>>()
        };
        let always = ["192.0.2.1/32", "2001:db8::1/128"];
        let with = |extra: &[&str]| {
            let mut all: Vec<_> = always.iter().chain(extra).map(ToString::to_string).collect();
            all.sort_by_key(|prefix| prefix.parse::<ipnet::IpNet>().unwrap());
            all
        };
        block_on(async {
            let agent = Agent::start_ready(sandbox.config(&[]), [make_own_node()]).await;
            assert_eq!(own(), with(&[]), "neither loopback nor link-local addresses");

            // A delegated IPAM's gateways, on pods' veths; and one on loopback.
            ip("addr add 10.7.0.1/32 dev rnv1");
            ip("addr add fd00:7::1/128 dev rnv1 nodad");
            ip("addr add 10.9.9.9/32 dev lo");
            let all = with(&["10.7.0.1/32", "10.9.9.9/32", "fd00:7::1/128"]);
            wait_until("the gateways are known", || own() == all).await;
            // A second pod of the network has the same gateway: it goes with the last of them.
            ip("link add rnv2 type veth peer name pod2");
            ip("addr add 10.7.0.1/32 dev rnv2");
            ip("link del rnv1");
            wait_until("the first pod's are forgotten", || own() == with(&["10.7.0.1/32", "10.9.9.9/32"])).await;
            ip("addr del 10.9.9.9/32 dev lo");
            wait_until("an address that went is forgotten", || own() == with(&["10.7.0.1/32"])).await;
            agent.stop().await;

            // While nobody watches, one goes and another comes.
            ip("link del rnv2");
            ip("addr add 10.8.0.1/32 dev far");
            let agent = Agent::start_ready(sandbox.config(&[]), [make_own_node()]).await;
            assert_eq!(own(), with(&["10.8.0.1/32"]));
            agent.stop().await;
        });
    });
}

/// Addresses of devices that find no room are a problem of the node; programs go on its devices all
/// the same.
#[test]
fn a_full_map_of_devices_keeps_no_program_off_an_uplink() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(async {
            Agent::start_ready(sandbox.config(&["--uplink=eth0"]), [make_own_node()]).await.stop().await;

            let map = Map::<u32, Device>::open(&sandbox.bpffs, map::DEVICES).unwrap();
            let nobody = Device { ip4: Ip4::UNSPECIFIED, ip6: Ip6::UNSPECIFIED };
            let full = (1_000_000..).find_map(|index| map.put(&index, &nobody).err()).unwrap();
            assert!(format!("{full:#}").contains("rn_devices"), "{full:#}");
            add_eth1(1500);
            // Without the node's own object no entry is removed, so there is no room.
            let agent = Agent::start(sandbox.config(&["--uplink=eth0", "--uplink=eth1"]));
            agent.wait_problem(&["rn_devices"]).await;
            assert!(find_uplink_hook(sandbox, "eth1").is_some() || !has_tcx());

            // With it the map has those of this host alone.
            agent.make_ready([make_own_node()]).await;
            agent.wait_no_problem().await;
            assert!(map.get(&sandbox::ifindex("eth1")).unwrap().is_some());
            agent.stop().await;
        });
    });
}
