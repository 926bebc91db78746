//! The whole loop: from events to maps, hooks and routes; restarts; repair; readiness.

use std::future::Future;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytemuck::Zeroable as _;
use rustnet_agent::bpf::attach::Direction;
use rustnet_agent::bpf::load::{CLOCK, program_path};
use rustnet_agent::bpf::probe;
use rustnet_agent::bpf::store::node_config::NodeConfigStore;
use rustnet_agent::bpf::store::{Map, peers, services};
use rustnet_agent::bpf::sys::{self, TCX_EGRESS, TCX_INGRESS};
use rustnet_agent::config::{Config, Routing};
use rustnet_agent::health::Health;
use rustnet_agent::model::{
    Condition, Endpoint, EndpointSlice, Family, Node, ObjectName, Service, ServicePort, TargetPort,
};
use rustnet_agent::net::netlink::Socket;
use rustnet_agent::net::{link, tc};
use rustnet_agent::source::{Event, Kind, Object, ObjectRef};
use rustnet_agent::{nodefile, reconcile};
use rustnet_common::addr::{Address, Ip4, Ip6};
use rustnet_common::conntrack::{CtEntry, flags};
use rustnet_common::device::Device;
use rustnet_common::names::{LINKS_DIR, map};
use rustnet_common::service::{SvcEntry, SvcKey};
use rustnet_common::tuple::Tuple;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::sandbox::{self, Sandbox, command, has_tcx, ip, on_hook, uplink};

/// An agent without its source and its HTTP endpoints.
pub struct Agent {
    pub events: mpsc::Sender<Event>,
    pub health: Arc<Health>,
    stop: watch::Sender<bool>,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Agent {
    pub fn start(config: Config) -> Self {
        let (events, receiver) = mpsc::channel(1024);
        let (stop, stopped) = watch::channel(false);
        let health = Arc::new(Health::default());
        let (config, shared) = (Arc::new(config), Arc::clone(&health));
        let task = tokio::spawn(reconcile::run_within(sandbox::deadline(), config, receiver, shared, stopped));
        Self { events, health, stop, task }
    }

    pub async fn send(&self, events: impl IntoIterator<Item = Event>) {
        for event in events {
            self.events.send(event).await.unwrap();
        }
    }

    pub async fn ready(&self) {
        let wait = tokio::time::timeout(sandbox::deadline(), self.health.wait_ready());
        assert!(wait.await.is_ok(), "not ready: {:?}", self.health.readiness());
    }

    pub async fn stop(self) {
        self.stop.send(true).unwrap();
        self.task.await.unwrap().unwrap();
    }
}

/// A runtime whose threads are in this sandbox.
pub fn block_on(future: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future);
}

/// Lets the loop turn until `done`.
pub async fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let end = tokio::time::Instant::now() + sandbox::deadline();
    while !done() {
        assert!(tokio::time::Instant::now() < end, "timed out waiting until {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub fn node(name: &str, address: &str, pod_cidrs: &[&str]) -> Event {
    Event::Apply(Object::Node(Arc::new(Node {
        name: ObjectName::cluster(name),
        created: 0,
        addresses: [address.parse().unwrap()].into(),
        pod_cidrs: pod_cidrs.iter().map(|c| c.parse().unwrap()).collect(),
        zone: "".into(),
        problems: Box::default(),
    })))
}

pub fn synced() -> [Event; 3] {
    Kind::REQUIRED.map(Event::Synced)
}

#[test]
fn from_start_to_ready_to_restart() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(from_start_to_ready_to_restart_in(sandbox));
    });
}

#[test]
fn a_host_that_uses_all_ports_is_a_problem_of_the_node_and_masquerade_works() {
    sandbox::run(|sandbox| {
        uplink();
        std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "1024 65535").unwrap();
        block_on(async {
            let agent = Agent::start(sandbox.config(&["--packet-mark=0x2a000000/0xff000000"]));
            agent.send([node("n1", "192.0.2.1", &["10.1.1.0/24"])]).await;
            agent.send(synced()).await;
            agent.ready().await;
            let is_named = |it: &String| it.contains("ip_local_port_range is 1024-65535") && it.contains("sysctl -w");
            wait_until("the ports are a problem", || agent.health.complaints().iter().any(is_named)).await;
            let config = NodeConfigStore::open(&sandbox.bpffs).unwrap().read().unwrap();
            assert_eq!((config.snat_min, config.snat_max), (57_344, 65_535));
            assert_eq!((config.mark, config.mark_mask), (0x2a00_0000, 0xff00_0000));
            agent.stop().await;
        });
    });
}

fn link_ids(sandbox: &Sandbox) -> Vec<(u32, u32)> {
    use Direction::{Egress, Ingress};
    let hooks = [
        ("uplink_in", "eth0", Ingress),
        ("uplink_out", "eth0", Egress),
        ("overlay_in", "rn_vxlan", Ingress),
        ("overlay_out", "rn_vxlan", Egress),
    ];
    let there = |(program, device, direction): (&str, &str, Direction)| {
        on_hook(&sandbox.bpffs, program, device, direction).unwrap_or_else(|| panic!("{program} hangs on nothing"))
    };
    hooks.map(there).to_vec()
}

async fn from_start_to_ready_to_restart_in(sandbox: &Sandbox) {
    let config = sandbox.config(&[&format!("--cni-conf-dir={}", sandbox.dir.join("net.d").display())]);
    let agent = Agent::start(config.clone());
    agent.send([node("n1", "192.0.2.1", &["10.1.1.0/24"]), node("n2", "192.0.2.2", &["10.1.2.0/24"])]).await;
    assert!(nodefile::read(&sandbox.run_dir).unwrap().is_none(), "not before everything is known");
    agent.send(synced()).await;
    agent.ready().await;
    let file = nodefile::read(&sandbox.run_dir).unwrap().unwrap();
    assert_eq!((file.mtu, file.not_ready), (1450, None));
    assert!(sandbox.dir.join("net.d/05-rustnet.conflist").exists());
    assert!(ip("route show 10.1.2.0/24").contains("rn_vxlan"), "whoever is ready has its routes");
    assert!(peers(&sandbox.bpffs).unwrap().contains_key(&"10.1.2.0/24".parse().unwrap()));
    let links = link_ids(sandbox);

    // Somebody meddles: noticed without waiting for the period. Whatever wakes the agent, it looks after the files, too.
    let files = [sandbox.run_dir.join("node.json"), sandbox.dir.join("net.d/05-rustnet.conflist")];
    for file in &files {
        std::fs::remove_file(file).unwrap();
    }
    ip("route del 10.1.2.0/24");
    wait_until("the route is back", || ip("route show 10.1.2.0/24").contains("rn_vxlan")).await;
    wait_until("the files are back", || files.iter().all(|file| file.exists())).await;
    ip("link del rn_vxlan");
    let hooks_back = || {
        on_hook(&sandbox.bpffs, "overlay_in", "rn_vxlan", Direction::Ingress).is_some()
            && on_hook(&sandbox.bpffs, "overlay_out", "rn_vxlan", Direction::Egress).is_some()
    };
    wait_until("the device is back", || command("ip", "link show rn_vxlan").status.success() && hooks_back()).await;
    wait_until("its route is back", || ip("route show 10.1.2.0/24").contains("rn_vxlan")).await;
    let after = link_ids(sandbox);
    assert_eq!(after[..2], links[..2], "the uplink's hooks were not touched");
    agent.stop().await;

    // Without an agent everything stays; the next one adopts, and swaps the programs.
    assert!(ip("route show 10.1.2.0/24").contains("rn_vxlan"));
    let links = |all: &[(u32, u32)]| all.iter().map(|link| link.0).collect::<Vec<_>>();
    assert_eq!(links(&link_ids(sandbox)), links(&after));
    let after = link_ids(sandbox);
    let next = Agent::start(config);
    wait_until("the programs are swapped", || {
        let now = link_ids(sandbox);
        assert_eq!(now.iter().map(|l| l.0).collect::<Vec<_>>(), after.iter().map(|l| l.0).collect::<Vec<_>>());
        now.iter().zip(&after).all(|(new, old)| new.1 != old.1)
    })
    .await;
    assert!(next.health.readiness().is_err());
    assert!(
        peers(&sandbox.bpffs).unwrap().contains_key(&"10.1.2.0/24".parse().unwrap()),
        "nothing is pruned before sync"
    );
    // n2 left while nobody watched.
    next.send([node("n1", "192.0.2.1", &["10.1.1.0/24"])]).await;
    next.send(synced()).await;
    next.ready().await;
    assert!(!peers(&sandbox.bpffs).unwrap().contains_key(&"10.1.2.0/24".parse().unwrap()));
    wait_until("the route is gone", || ip("route show 10.1.2.0/24").is_empty()).await;
    next.stop().await;
}

/// Until this node's object is known again, the programs keep the address that it named: the device's first one is another.
#[test]
fn a_restart_leaves_the_nodes_address_to_the_programs() {
    sandbox::run(|sandbox| {
        uplink();
        ip("addr add 192.0.2.99/24 dev eth0");
        block_on(async {
            let address = || NodeConfigStore::open(&sandbox.bpffs).unwrap().read().unwrap().node4.octets();
            let agent = Agent::start(sandbox.config(&[]));
            agent.send([node("n1", "192.0.2.99", &["10.1.1.0/24"])]).await;
            agent.send(synced()).await;
            agent.ready().await;
            assert_eq!(address(), [192, 0, 2, 99]);
            agent.stop().await;
            let before = link_ids(sandbox);
            let next = Agent::start(sandbox.config(&[]));
            let is_swapped = || link_ids(sandbox).iter().zip(&before).all(|(new, old)| new.1 != old.1);
            wait_until("the programs are swapped", is_swapped).await;
            assert_eq!(address(), [192, 0, 2, 99]);
            next.stop().await;
        });
    });
}

/// Until this node's object is known again, the device with its address may not seem to be an uplink. It keeps its programs, though
/// another one has got the default route since.
#[test]
fn a_new_default_route_takes_no_program_off_the_nodes_device() {
    if !has_tcx() {
        return;
    }
    sandbox::run(|sandbox| {
        uplink();
        ip("link add eth1 type veth peer name far1");
        for device in ["eth1", "far1"] {
            ip(&format!("link set {device} up"));
        }
        ip("addr add 198.51.100.1/24 dev eth1");
        ip("route del default");
        let config = || Config { uplinks: Vec::new(), ..sandbox.config(&[]) };
        let hook = |device| on_hook(&sandbox.bpffs, "uplink_in", device, Direction::Ingress);
        block_on(async {
            let agent = Agent::start(config());
            agent.send([node("n1", "198.51.100.1", &["10.1.1.0/24"])]).await;
            agent.send(synced()).await;
            agent.ready().await;
            agent.stop().await;
            let before = hook("eth1");
            assert!(before.is_some() && hook("eth0").is_none());
            ip("route add default via 192.0.2.254");
            let next = Agent::start(config());
            wait_until("the programs are on the other device, too", || hook("eth0").is_some()).await;
            assert_eq!(hook("eth1"), before);
            next.send([node("n1", "198.51.100.1", &["10.1.1.0/24"])]).await;
            next.send(synced()).await;
            next.ready().await;
            assert_eq!(hook("eth1").map(|link| link.0), before.map(|link| link.0), "the same link");
            next.stop().await;
        });
    });
}

/// Between two leases the host has none of the node's addresses, and another device the default route: new pods get the MTU that
/// the others have.
#[test]
fn the_mtu_of_pods_stays_while_the_nodes_addresses_are_away() {
    sandbox::run(|sandbox| {
        uplink();
        let mtu = || nodefile::read(&sandbox.run_dir).unwrap().unwrap().mtu;
        block_on(async {
            let config = Config { uplinks: Vec::new(), routing: Routing::Native, ..sandbox.config(&[]) };
            let agent = Agent::start(config);
            agent.send([node("n1", "192.0.2.1", &["10.1.1.0/24"])]).await;
            agent.send(synced()).await;
            agent.ready().await;
            assert_eq!(mtu(), 1500);
            ip("link add eth1 mtu 1300 type veth peer name far1");
            for device in ["eth1", "far1"] {
                ip(&format!("link set {device} up"));
            }
            ip("addr add 198.51.100.1/24 dev eth1");
            ip("addr flush dev eth0");
            ip("route add default via 198.51.100.254");
            let is_known = |it: &String| it.contains("no usable 192.0.2.1");
            wait_until("the address is missed", || agent.health.complaints().iter().any(is_known)).await;
            wait_until("the other device is an uplink", || {
                on_hook(&sandbox.bpffs, "uplink_in", "eth1", Direction::Ingress).is_some()
            })
            .await;
            assert_eq!(mtu(), 1500);
            agent.stop().await;
        });
    });
}

/// A device gets another address for masquerade, and the host keeps the one of before: flows that have it go on.
#[test]
fn masqueraded_flows_go_on_while_the_host_has_their_address() {
    type Connections = Map<Tuple<Ip4>, CtEntry<Ip4>>;
    sandbox::run(|sandbox| {
        uplink();
        ip("addr add 192.0.2.99/24 dev eth0");
        block_on(async {
            let agent = Agent::start(sandbox.config(&[]));
            agent.send([node("n1", "192.0.2.1", &["10.1.1.0/24"])]).await;
            agent.send(synced()).await;
            agent.ready().await;
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

/// Its pins are out of sight, and its programs would handle each packet a second time.
#[test]
fn programs_of_a_bpf_file_system_that_another_one_hides_are_taken_off() {
    if !has_tcx() {
        // Without TCX there are filters alone, which are replaced.
        return;
    }
    sandbox::run(|sandbox| {
        uplink();
        let run = || {
            block_on(async {
                let agent = Agent::start(sandbox.config(&["--uplink=eth0"]));
                agent.send([node("n1", "192.0.2.1", &["10.1.1.0/24"])]).await;
                agent.send(synced()).await;
                agent.ready().await;
                agent.stop().await;
            });
        };
        let attached = |device: &str| {
            let index = sandbox::ifindex(device);
            [TCX_INGRESS, TCX_EGRESS].map(|kind| sys::tcx_links(index, kind).unwrap())
        };
        run();
        let before = ["eth0", "rn_vxlan"].map(attached);
        let above = sandbox.bpffs.parent().unwrap().display().to_string();
        assert!(command("mount", &format!("-t bpf bpf {above}")).status.success());
        run();
        for (device, before) in ["eth0", "rn_vxlan"].into_iter().zip(before) {
            for (now, before) in attached(device).iter().zip(before) {
                assert_eq!((now.len(), before.len()), (1, 1), "{device}");
                assert_ne!(now[0].link_id, before[0].link_id, "{device}");
            }
        }
        assert!(command("umount", &above).status.success());
    });
}

/// One peer of which the route is disputed is not reached; the node and its pods work all the same.
#[test]
fn a_disputed_route_is_a_problem_of_that_peer_alone() {
    sandbox::run(|sandbox| {
        uplink();
        ip("route add 10.1.2.0/24 via 192.0.2.9");
        block_on(async {
            let agent = Agent::start(sandbox.config(&[]));
            let peers = [node("n2", "192.0.2.2", &["10.1.2.0/24"]), node("n3", "192.0.2.3", &["10.1.3.0/24"])];
            agent.send([node("n1", "192.0.2.1", &["10.1.1.0/24"])].into_iter().chain(peers)).await;
            agent.send(synced()).await;
            agent.ready().await;
            assert!(ip("route show 10.1.3.0/24").contains("rn_vxlan"));
            wait_until("the dispute is reported", || {
                agent.health.complaints().iter().any(|it| it.contains("10.1.2.0/24") && it.contains("another program"))
            })
            .await;
            assert!(agent.health.readiness().is_ok());
            ip("route del 10.1.2.0/24");
            wait_until("it is resolved", || agent.health.complaints().is_empty()).await;
            assert!(ip("route show 10.1.2.0/24").contains("rn_vxlan"));
            agent.stop().await;
        });
    });
}

#[test]
fn a_device_that_is_no_uplink_any_more_is_let_go() {
    sandbox::run(|sandbox| {
        uplink();
        ip("link add eth1 type veth peer name far1");
        ip("link set eth1 up");
        ip("link set far1 up");
        ip("addr add 198.51.100.1/24 dev eth1");
        let run = |uplinks: &'static [&'static str]| {
            block_on(async move {
                let agent = Agent::start(sandbox.config(uplinks));
                agent.send([node("n1", "192.0.2.1", &["10.1.1.0/24"])]).await;
                agent.send(synced()).await;
                agent.ready().await;
                agent.stop().await;
            });
        };
        run(&["--uplink=eth0"]);
        // The other way round, and one of them twice.
        run(&["--uplink=eth1", "--uplink=eth0", "--uplink=eth1"]);
        let mut socket = Socket::open().unwrap();
        let index = |socket: &mut Socket, name| link::by_name(socket, name).unwrap().unwrap().index;
        let (eth0, far1) = (index(&mut socket, "eth0"), index(&mut socket, "far1"));
        // Filters of ours, as a kernel without TCX has them; on a kernel with it they are as good as any.
        let program = sys::obj_get(&program_path(&sandbox.bpffs, "uplink_in")).unwrap();
        for direction in Direction::BOTH {
            tc::set_filter(&mut socket, eth0, direction, program.as_fd(), "uplink_in", false).unwrap();
            tc::set_filter(&mut socket, far1, direction, program.as_fd(), "not_ours", false).unwrap();
        }
        let link = |device| on_hook(&sandbox.bpffs, "uplink_in", device, Direction::Ingress).map(|link| link.0);
        let before = link("eth1");
        run(&["--uplink=eth1"]);
        assert_eq!(link("eth1"), before, "it has its own link, and takes no second program");
        for direction in Direction::BOTH {
            assert_eq!(tc::filter(&mut socket, eth0, direction).unwrap(), None);
        }
        let others = command("tc", "filter show dev far1 ingress");
        assert!(String::from_utf8_lossy(&others.stdout).contains("not_ours"), "{others:?}");
        assert!(on_hook(&sandbox.bpffs, "uplink_in", "eth1", Direction::Ingress).is_some());
        // It has an address: answers to masqueraded packets may come in by it.
        assert!(on_hook(&sandbox.bpffs, "uplink_in", "eth0", Direction::Ingress).is_none());
        assert!(on_hook(&sandbox.bpffs, "side_in", "eth0", Direction::Ingress).is_some() || !has_tcx());
    });
}

/// Service default/web, 10.96.0.10:80, with so many ready endpoints.
pub fn web(backends: u8) -> [Event; 2] {
    let name = ObjectName::namespaced("default", "web");
    let service = Service {
        name: name.clone(),
        created: 0,
        vips: ["10.96.0.10".parse().unwrap()].into(),
        ports: [ServicePort { name: "".into(), port: 80, proto: 6 }].into(),
        affinity: 0,
        internal_local: false,
        unserved: Box::default(),
        problems: Box::default(),
    };
    let endpoint =
        |i| Endpoint { addr: [10, 1, 2, i].into(), condition: Condition::Ready, node: "n2".into(), hints: None };
    let slice = EndpointSlice {
        name: ObjectName::namespaced("default", "web-1"),
        service: name,
        family: Family::V4,
        ports: [TargetPort { name: "".into(), port: 8080, proto: 6 }].into(),
        endpoints: (1..=backends).map(endpoint).collect(),
        triggered: None,
        problems: Box::default(),
    };
    [Event::Apply(Object::Service(Arc::new(service))), Event::Apply(Object::Slice(Arc::new(slice)))]
}

#[test]
fn services_follow_their_events_and_survive_an_outage() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(services_follow_their_events_in(sandbox));
    });
}

async fn services_follow_their_events_in(sandbox: &Sandbox) {
    let count = || {
        let services = services(&sandbox.bpffs).unwrap();
        services.iter().find(|(key, _)| key.port == 80).map(|(_, entry)| entry.count)
    };
    let agent = Agent::start(sandbox.config(&[]));
    agent.send([node("n1", "192.0.2.1", &["10.1.1.0/24"])]).await;
    agent.send(web(3)).await;
    agent.send(synced()).await;
    agent.ready().await;
    assert_eq!(count(), Some(3));
    agent.send(web(5)).await;
    wait_until("the service has five backends", || count() == Some(5)).await;
    agent.stop().await;

    // The next agent hears of fewer, and of no deletion: only the full list tells.
    let agent = Agent::start(sandbox.config(&[]));
    agent.send([node("n1", "192.0.2.1", &["10.1.1.0/24"])]).await;
    agent.send(web(1)).await;
    agent.send(synced()).await;
    agent.ready().await;
    assert_eq!(count(), Some(1));
    let name = ObjectName::namespaced("default", "web");
    agent.send([Event::Delete(ObjectRef { kind: Kind::Service, name })]).await;
    wait_until("the service is gone", || services(&sandbox.bpffs).unwrap().is_empty()).await;
    agent.stop().await;
}

#[test]
fn whoever_is_ready_has_its_routes() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(async {
            let agent = Agent::start(sandbox.config(&[]));
            // The network has been looked after, but the nodes come only now.
            wait_until("the device is there", || command("ip", "link show rn_vxlan").status.success()).await;
            agent.send([node("n1", "192.0.2.1", &["10.1.1.0/24"]), node("n2", "192.0.2.2", &["10.1.2.0/24"])]).await;
            agent.send(synced()).await;
            agent.ready().await;
            assert!(ip("route show 10.1.2.0/24").contains("rn_vxlan"));
            agent.stop().await;
        });
    });
}

#[test]
fn settings_are_written_where_the_configuration_says() {
    sandbox::run(|sandbox| {
        uplink();
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "0").unwrap();
        let elsewhere = sandbox.dir.join("sysctl");
        std::fs::create_dir_all(elsewhere.join("ipv4/conf")).unwrap();
        let forward = elsewhere.join("ipv4/ip_forward");
        std::fs::write(&forward, "0\n").unwrap();
        let read = |path: &Path| std::fs::read_to_string(path).unwrap().trim().to_owned();
        block_on(async {
            let agent = Agent::start(sandbox.config(&[&format!("--sysctl-dir={}", elsewhere.display())]));
            agent.send([node("n1", "192.0.2.1", &["10.1.1.0/24"])]).await;
            agent.send(synced()).await;
            agent.ready().await;
            assert_eq!(read(&forward), "1");
            assert_eq!(read("/proc/sys/net/ipv4/ip_forward".as_ref()), "0", "the usual place is left alone");
            agent.stop().await;
        });
    });
}

#[test]
fn pinned_maps_of_another_shape_keep_the_agent_from_getting_ready() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(async {
            let agent = Agent::start(sandbox.config(&[]));
            agent.send([node("n1", "192.0.2.1", &["10.1.1.0/24"])]).await;
            agent.send(synced()).await;
            agent.ready().await;
            agent.stop().await;
            let links = link_ids(sandbox);
            let pin = sandbox.bpffs.join(map::PEERS4);
            std::fs::remove_file(&pin).unwrap();
            let other = sys::Layout { kind: 1, key_size: 8, value_size: 77, max_entries: 16, flags: 0 };
            let other = sys::map_create(map::PEERS4, other).unwrap();
            sys::obj_pin(&pin, other.as_fd()).unwrap();

            let agent = Agent::start(sandbox.config(&[]));
            agent.send(synced()).await;
            wait_until("the refusal is known", || {
                agent.health.readiness().is_err_and(|why| why.contains(map::PEERS4) && why.contains("77 B"))
            })
            .await;
            agent.stop().await;
            let id = |fd: std::os::fd::BorrowedFd<'_>| sys::map_info(fd).unwrap().id;
            assert_eq!(id(sys::obj_get(&pin).unwrap().as_fd()), id(other.as_fd()));
            assert_eq!(link_ids(sandbox), links);
        });
    });
}

#[test]
fn a_node_without_a_pod_range_is_reported_to_the_cni_binary() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(async {
            let agent = Agent::start(sandbox.config(&[]));
            agent.send([node("n1", "192.0.2.1", &[])]).await;
            agent.send(synced()).await;
            let not_ready = || {
                let file = nodefile::read(&sandbox.run_dir).unwrap();
                file.and_then(|file| file.not_ready).is_some_and(|why| why.contains("no pod range"))
            };
            wait_until("node.json says so", not_ready).await;
            agent.send([node("n1", "192.0.2.1", &["10.1.1.0/24"])]).await;
            agent.ready().await;
            // Losing the range again must not take it from the CNI binary.
            agent.send([node("n1", "192.0.2.1", &[])]).await;
            wait_until("the agent is not ready", || agent.health.readiness().is_err()).await;
            assert!(!not_ready());
            agent.stop().await;
        });
    });
}

#[test]
fn leftover_endpoints_are_removed_and_lost_ones_put_back() {
    use rustnet_agent::bpf::store::endpoints::Endpoints;
    use rustnet_common::endpoint::{Endpoint as Entry, flags};
    sandbox::run(|sandbox| {
        uplink();
        ip("link add rnv1 type veth peer name pod");
        ip("link set rnv1 up");
        let ifindex = sandbox::ifindex("rnv1");
        ip("link add other0 type veth peer name other1");
        ip("link set other0 up");
        let other = sandbox::ifindex("other0");
        sandbox.nameless_record("fedcba9876543210", "rnv9", other, "10.1.1.7");
        sandbox.record("rnv1", ifindex, "10.1.1.5");
        sandbox.limit(serde_json::json!({ "ingress": { "rate": 1_000_000, "burst": 1_000_000 } }));
        block_on(async {
            let agent = Agent::start(sandbox.config(&[]));
            agent.send([node("n1", "192.0.2.1", &["10.1.1.0/24"])]).await;
            agent.send(synced()).await;
            agent.ready().await;
            let endpoints = Endpoints::open(&sandbox.bpffs).unwrap();
            let limited = endpoints.read().unwrap().iter().all(|(_, entry)| entry.flags == flags::VIA_QDISC);
            assert!(limited, "the limit is forgotten: {:?}", endpoints.read().unwrap());
            let addresses = || {
                let all = endpoints.read().unwrap().into_iter();
                all.map(|(ip, entry)| (ip.to_string(), entry.ifindex)).collect::<Vec<_>>()
            };
            assert_eq!(addresses(), [("10.1.1.5".to_owned(), ifindex)], "put back from its record");
            let is_deleted = endpoints.delete("10.1.1.5".parse().unwrap(), ifindex + 1).unwrap();
            assert!(!is_deleted && addresses().len() == 1, "the address is another interface's by now");

            // A DEL that was cut short: neither interface nor record. And an ADD that is under way: an interface.
            let entry = |ifindex| Entry { ifindex, identity: 0, mac: [0; 6], host_mac: [0; 6], flags: 0, pad: 0 };
            endpoints.put("10.1.1.8".parse().unwrap(), &entry(99_999)).unwrap();
            endpoints.put("10.1.1.9".parse().unwrap(), &entry(ifindex)).unwrap();
            // And an entry of before, whose interface is gone and whose address another pod has.
            endpoints.put("10.1.1.5".parse().unwrap(), &entry(99_998)).unwrap();
            ip("link set rnv1 mtu 1400");
            wait_until("the leftover is gone", || addresses().len() == 2).await;
            assert_eq!(addresses()[1].0, "10.1.1.9");
            wait_until("the record's interface has the address", || addresses()[0].1 == ifindex).await;
            // A record whose index another device has by now.
            let mut socket = Socket::open().unwrap();
            for direction in Direction::BOTH {
                assert_eq!(tc::filter(&mut socket, other, direction).unwrap(), None, "a program of pods on it");
            }
            agent.stop().await;
        });
    });
}

#[test]
fn every_address_of_the_host_is_the_hosts_own_as_long_as_it_is_there() {
    use rustnet_common::peer::flags::HOST;
    sandbox::run(|sandbox| {
        uplink();
        ip("link add rnv1 type veth peer name pod");
        ip("link set rnv1 up");
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
            let agent = Agent::start(sandbox.config(&[]));
            agent.send([node("n1", "192.0.2.1", &["10.1.1.0/24"])]).await;
            agent.send(synced()).await;
            agent.ready().await;
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
            let agent = Agent::start(sandbox.config(&[]));
            agent.send([node("n1", "192.0.2.1", &["10.1.1.0/24"])]).await;
            agent.send(synced()).await;
            agent.ready().await;
            assert_eq!(own(), with(&["10.8.0.1/32"]));
            agent.stop().await;
        });
    });
}

/// Addresses of devices that find no room are a problem of the node; programs go on its devices all the same.
#[test]
fn a_full_map_of_devices_keeps_no_program_off_an_uplink() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(async {
            let agent = Agent::start(sandbox.config(&["--uplink=eth0"]));
            agent.send([node("n1", "192.0.2.1", &["10.1.1.0/24"])]).await;
            agent.send(synced()).await;
            agent.ready().await;
            agent.stop().await;

            let map = Map::<u32, Device>::open(&sandbox.bpffs, map::DEVICES).unwrap();
            let nobody = Device { ip4: Ip4::UNSPECIFIED, ip6: Ip6::UNSPECIFIED };
            let full = (1_000_000..).find_map(|index| map.put(&index, &nobody).err()).unwrap();
            assert!(format!("{full:#}").contains("rn_devices"), "{full:#}");
            ip("link add eth1 type veth peer name far1");
            ip("link set eth1 up");
            ip("link set far1 up");
            ip("addr add 198.51.100.1/24 dev eth1");
            // Without the node's own object no entry is removed, so there is no room.
            let agent = Agent::start(sandbox.config(&["--uplink=eth0", "--uplink=eth1"]));
            wait_until("the full map is a problem", || {
                agent.health.complaints().iter().any(|it| it.contains("rn_devices"))
            })
            .await;
            assert!(on_hook(&sandbox.bpffs, "uplink_in", "eth1", Direction::Ingress).is_some() || !has_tcx());

            // With it the map has those of this host alone.
            agent.send([node("n1", "192.0.2.1", &["10.1.1.0/24"])]).await;
            agent.send(synced()).await;
            agent.ready().await;
            wait_until("it is resolved", || agent.health.complaints().is_empty()).await;
            assert!(map.get(&sandbox::ifindex("eth1")).unwrap().is_some());
            agent.stop().await;
        });
    });
}

/// What nobody can open among the pins is a problem of the node; pods get their programs, and no program is taken off.
#[test]
fn an_odd_pin_keeps_no_program_off_a_pod() {
    sandbox::run(|sandbox| {
        uplink();
        ip("link add rnv1 type veth peer name pod");
        ip("link set rnv1 up");
        let pod = sandbox::ifindex("rnv1");
        block_on(async {
            let agent = Agent::start(Config { audit_period: Duration::from_millis(50), ..sandbox.config(&[]) });
            agent.send([node("n1", "192.0.2.1", &["10.1.1.0/24"])]).await;
            agent.send(synced()).await;
            agent.ready().await;

            let before = link_ids(sandbox);
            let odd = sandbox.bpffs.join(LINKS_DIR).join("odd");
            std::fs::create_dir(&odd).unwrap();
            sandbox.record("rnv1", pod, "10.1.1.2");
            wait_until("the pod has its programs", || {
                let mut socket = Socket::open().unwrap();
                Direction::BOTH.iter().all(|it| tc::filter(&mut socket, pod, *it).unwrap().is_some())
            })
            .await;
            wait_until("the odd pin is a problem", || {
                agent.health.complaints().iter().any(|it| it.contains("link/odd"))
            })
            .await;
            std::fs::remove_dir(&odd).unwrap();
            wait_until("it is resolved", || agent.health.complaints().is_empty()).await;
            assert_eq!(link_ids(sandbox), before);
            agent.stop().await;
        });
    });
}

#[test]
fn the_loop_puts_back_an_entry_that_somebody_deleted() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(async {
            let config = Config { audit_period: Duration::from_millis(50), ..sandbox.config(&[]) };
            let agent = Agent::start(config);
            agent.send([node("n1", "192.0.2.1", &["10.1.1.0/24"])]).await;
            agent.send(web(2)).await;
            agent.send(synced()).await;
            agent.ready().await;
            let before = services(&sandbox.bpffs).unwrap();
            let map = Map::<SvcKey<Ip4>, SvcEntry>::open(&sandbox.bpffs, map::SVC4).unwrap();
            map.clear().unwrap();
            wait_until("the service is back", || services(&sandbox.bpffs).unwrap() == before).await;
            let metrics = agent.health.metrics.encode().unwrap();
            assert!(metrics.contains("rustnet_map_repairs_total{map=\"rn_svc4_v2\"} 2"), "{metrics}");
            agent.stop().await;
        });
    });
}
