//! Whose sockets ask for Services by themselves, from records and Pods to `rn_sock_netns`. The control group cannot be used here, so that
//! no program is attached; the map is written before.

use std::io::ErrorKind;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytemuck::Zeroable;
use nix::sched::{CloneFlags, setns, unshare};
use rustnet_agent::bpf::store::sockets::Sockets;
use rustnet_agent::bpf::store::{Map, services};
use rustnet_agent::model::{ObjectName, Pod, Problem};
use rustnet_agent::net::netns;
use rustnet_agent::net::sock_diag::SockDiag;
use rustnet_agent::reconcile::Surroundings;
use rustnet_agent::reconcile::endings::{Left, Outcome, Progress, Search};
use rustnet_agent::source::{Event, Kind, Object};
use rustnet_common::files::EndpointFile;
use rustnet_common::names::map;
use rustnet_common::socket::netns::{HOST, POD, bucket};
use rustnet_common::socket::{Asked, SocketKey};
use rustnet_common::tuple::proto::{TCP, UDP};
use tokio::sync::Mutex;

use crate::agent::{Agent, block_on, make_own_node, make_two_nodes, wait_until, web as service};
use crate::load::load;
use crate::sandbox::{self, Sandbox, uplink};

const SETTINGS: [&str; 2] = ["--socket-lb=all", "--cgroup=/proc"];

/// The Pod of the record that [`Sandbox::record`] writes.
fn web(socket_lb: Option<bool>, problems: Box<[Problem]>) -> Event {
    Event::Apply(Object::Pod(Arc::new(Pod {
        name: ObjectName::namespaced("default", "web-0"),
        uid: "another".into(),
        node: "n1".into(),
        addresses: Box::default(),
        host_network: false,
        host_ports: false,
        socket_lb,
        labels: rustnet_agent::model::Labels::default(),
        ports: Box::default(),
        problems,
    })))
}

/// The namespaces that are listed; none while there is no map.
fn listed(sandbox: &Sandbox) -> Vec<(u64, u32)> {
    let namespaces = Sockets::open(&sandbox.bpffs).and_then(|sockets| sockets.namespaces());
    namespaces.unwrap_or_default().into_iter().collect()
}

#[test]
fn a_restart_keeps_what_is_there_until_all_pods_are_known() {
    sandbox::run(|sandbox| {
        uplink();
        let own = (netns::cookie().unwrap(), HOST);
        sandbox.add_pod("rnv1", "10.1.1.5");
        sandbox.give_cookie("0123456789abcdef", 1);
        let index = sandbox::add_pod_veth("rnv2");
        sandbox.nameless_record("b", "rnv2", index, "10.1.1.6");
        sandbox.give_cookie("b", 2);
        block_on(async {
            let agent = Agent::start_ready(sandbox.config(&SETTINGS), [make_own_node()]).await;
            wait_until("the host is listed", || listed(sandbox) == [own]).await;
            agent.wait_problem(&["/proc", "--cgroup"]).await;
            agent.send([web(None, Box::default())]).await;
            wait_until("the pod is listed", || listed(sandbox) == [(1, POD), own]).await;
            agent.stop().await;
            // The object of the first pod is not there yet when the second one's is.
            let without_policies = [&SETTINGS[..], &["--network-policy=off"]].concat();
            let agent = Agent::start(sandbox.config(&without_policies));
            agent.send([make_own_node()].into_iter().chain(Kind::REQUIRED.map(Event::Synced))).await;
            agent.ready().await;
            let Event::Apply(Object::Pod(pod)) = web(None, Box::default()) else { unreachable!() };
            let name = ObjectName::namespaced("default", "other");
            let other = Pod { name, addresses: ["10.1.1.6".parse().unwrap()].into(), ..(*pod).clone() };
            agent.send([Event::Apply(Object::Pod(Arc::new(other)))]).await;
            wait_until("the second pod is listed", || listed(sandbox).contains(&(2, POD))).await;
            assert_eq!(listed(sandbox), [(1, POD), (2, POD), own]);
            agent.send([Event::Synced(Kind::Pod)]).await;
            wait_until("the first pod is unknown", || listed(sandbox) == [(2, POD), own]).await;
            // A wish that is none is reported, and the setting counts.
            let problem = Problem::new(&"Pod default/web-0".into(), "metadata.annotations", "neither");
            agent.send([web(None, [problem].into())]).await;
            wait_until("the first pod is back", || listed(sandbox) == [(1, POD), (2, POD), own]).await;
            agent.wait_problem(&["Pod default/web-0", "neither"]).await;
            agent.send([web(Some(false), Box::default())]).await;
            wait_until("the first pod refuses", || listed(sandbox) == [(2, POD), own]).await;
            // Without a record, there is no namespace.
            std::fs::remove_file(sandbox.run_dir.join("endpoints/b@eth0.json")).unwrap();
            sandbox::ip("link del rnv2");
            wait_until("the second pod is gone", || listed(sandbox) == [own]).await;
            agent.stop().await;
        });
    });
}

/// The kernel's number of a socket.
fn cookie_of(socket: &impl AsRawFd) -> u64 {
    let (mut cookie, mut len) = (0_u64, size_of::<u64>() as libc::socklen_t);
    let (level, option) = (libc::SOL_SOCKET, libc::SO_COOKIE);
    // SAFETY: value and length are ours, and the length is that of the value.
    let result = unsafe { libc::getsockopt(socket.as_raw_fd(), level, option, (&raw mut cookie).cast(), &raw mut len) };
    assert_eq!(result, 0);
    cookie
}

/// A socket that is connected to a backend, and its entry as the programs write it.
struct Connected {
    socket: UdpSocket,
    key: SocketKey,
}

impl Connected {
    fn new() -> Self {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect("10.1.2.9:8080").unwrap();
        let (cookie, addr) = (cookie_of(&socket), std::net::IpAddr::from([10, 1, 2, 9]).into());
        Self { socket, key: SocketKey { cookie, addr, port: 8080, pad: 0, pad2: 0 } }
    }

    fn led(&self, table: &Map<SocketKey, Asked>, netns_cookie: u64) {
        lead(table, &self.key, netns_cookie);
    }

    fn has_peer(&self) -> bool {
        self.socket.peer_addr().is_ok()
    }
}

/// Writes that a socket asked for a Service, in the pod's namespace of this number, and got a backend that there is not.
fn lead(table: &Map<SocketKey, Asked>, key: &SocketKey, netns_cookie: u64) {
    let addr = std::net::IpAddr::from([10, 96, 0, 10]).into();
    let asked = Asked { addr, port: 80, proto: UDP, bucket: bucket(netns_cookie, POD), backend: (1 << 20) | 0x77 };
    table.put(key, &asked).unwrap();
}

fn socket_table(sandbox: &Sandbox) -> Map<SocketKey, Asked> {
    Map::open(&sandbox.bpffs, map::SOCK_REV).unwrap()
}

/// A pod's namespace may take long to look into, or for ever.
#[test]
fn events_are_applied_while_a_search_for_sockets_is_under_way() {
    sandbox::run(|sandbox| {
        uplink();
        sandbox.add_pod("rnv1", "10.1.1.5");
        sandbox.give_cookie("0123456789abcdef", 1);
        let (lock, entered) = (Arc::new(Mutex::new(())), Arc::new(AtomicUsize::new(0)));
        let (held, count) = (Arc::clone(&lock), Arc::clone(&entered));
        let enter = Arc::new(move |_: &std::path::Path| {
            count.fetch_add(1, Ordering::Relaxed);
            drop(held.blocking_lock());
            // The test's own namespace stands for the pod's.
            Ok(SockDiag::open()?)
        });
        block_on(async {
            let limit = Duration::from_millis(100);
            let surroundings = Surroundings { enter, look_limit: limit, ..Surroundings::default() };
            let agent = Agent::start_in(surroundings, sandbox.config(&SETTINGS));
            agent.make_ready(make_two_nodes()).await;
            let table = socket_table(sandbox);
            let hold = lock.lock().await;
            let (stays, goes) = (Connected::new(), Connected::new());
            for it in [&stays, &goes] {
                it.led(&table, 1);
            }
            sandbox::ip("link set eth0 alias changed");
            wait_until("the search is in the namespace", || entered.load(Ordering::Relaxed) > 0).await;
            // Services, and whose sockets ask, follow their events.
            for backends in 1..=3 {
                agent.send(service(backends)).await;
                let count = || services(&sandbox.bpffs).unwrap().values().map(|entry| entry.count).max();
                wait_until("the change is in the map", || count() == Some(backends.into())).await;
            }
            agent.send([web(None, Box::default())]).await;
            wait_until("the pod is listed", || listed(sandbox).contains(&(1, POD))).await;
            let late = ["has not listed the sockets", "100ms"];
            agent.wait_problem(&late).await;
            assert!(agent.health.readiness().is_ok(), "{:?}", agent.health.readiness());
            assert!(stays.has_peer() && goes.has_peer(), "ended before the namespace was entered");
            assert_eq!(entered.load(Ordering::Relaxed), 1, "one search at a time");
            // It has connected again, to something that nobody takes for lost.
            let again = Asked { proto: TCP, backend: 0, ..table.get(&stays.key).unwrap().unwrap() };
            table.put(&stays.key, &again).unwrap();
            // The next search, which the events have asked for, waits for this.
            drop(hold);
            wait_until("the socket is ended", || !goes.has_peer()).await;
            wait_until("its entry is gone", || table.get(&goes.key).unwrap().is_none()).await;
            wait_until("nothing is late", || !agent.health.complaints().iter().any(|it| it.contains(late[0]))).await;
            assert!(stays.has_peer());
            assert_eq!(table.get(&stays.key).unwrap(), Some(again));
            agent.stop().await;
        });
    });
}

#[test]
fn a_search_for_sockets_that_panics_is_reported_and_tried_again() {
    sandbox::run(|sandbox| {
        uplink();
        sandbox.add_pod("rnv1", "10.1.1.5");
        sandbox.give_cookie("0123456789abcdef", 1);
        let is_broken = Arc::new(AtomicBool::new(true));
        let broken = Arc::clone(&is_broken);
        let enter = Arc::new(move |_: &std::path::Path| {
            assert!(!broken.load(Ordering::Relaxed), "the test wants it");
            Ok(SockDiag::open()?)
        });
        block_on(async {
            let agent = Agent::start_in(Surroundings { enter, ..Surroundings::default() }, sandbox.config(&SETTINGS));
            agent.make_ready([make_own_node()]).await;
            let socket = Connected::new();
            socket.led(&socket_table(sandbox), 1);
            sandbox::ip("link set eth0 alias changed");
            agent.wait_problem(&["backend is gone", "panicked"]).await;
            assert!(socket.has_peer());
            is_broken.store(false, Ordering::Relaxed);
            wait_until("the socket is ended", || !socket.has_peer()).await;
            agent.stop().await;
        });
    });
}

/// A search may take so long that an endpoint is back which was missing when it began.
#[test]
fn a_tcp_connection_is_ended_by_what_was_found_a_moment_ago_alone() {
    sandbox::run(|sandbox| {
        load(sandbox).run().unwrap().pin(&sandbox.bpffs).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let peer = client.peer_addr().unwrap();
        let key = SocketKey { cookie: cookie_of(&client), addr: peer.ip().into(), port: peer.port(), pad: 0, pad2: 0 };
        let asked = Asked { proto: TCP, bucket: bucket(0, HOST), ..Asked::zeroed() };
        socket_table(sandbox).put(&key, &asked).unwrap();
        let ago = |seconds| Instant::now().checked_sub(Duration::from_secs(seconds)).unwrap();
        let search = |judged| {
            let search = Search {
                left: vec![Left { key, asked, is_over: true }],
                judged,
                progress: Progress { since: [(key, ago(30))].into(), first: 0 },
                records: Some(Vec::new()),
                run_dir: sandbox.run_dir.clone(),
                enter: Arc::new(|_| unreachable!()),
                sockets: Arc::new(Sockets::open(&sandbox.bpffs).unwrap()),
            };
            let Outcome { ended, next, failures, .. } = search.run();
            assert_eq!(failures, []);
            (ended, next.is_some())
        };
        assert_eq!(search(ago(11)), (0, true), "an old list");
        assert_eq!(client.take_error().unwrap().map(|e| e.kind()), None);
        assert_eq!(search(ago(0)), (1, false));
        assert_eq!(client.take_error().unwrap().map(|e| e.kind()), Some(ErrorKind::ConnectionAborted));
    });
}

/// Namespaces that a search reaches too late to end TCP connections come first in the next one.
#[test]
fn the_next_search_begins_with_the_namespaces_that_were_late() {
    sandbox::run(|sandbox| {
        load(sandbox).run().unwrap().pin(&sandbox.bpffs).unwrap();
        let record = |n: u64| -> EndpointFile {
            serde_json::from_value(serde_json::json!({
                "containerId": format!("c{n}"), "ifname": "eth0", "netns": format!("/{n}"), "netnsCookie": n, "network": "rustnet",
                "hostIfname": format!("rnv{n}"), "ifindex": n, "mac": "02:00:00:00:00:07", "addresses": [],
            }))
            .unwrap()
        };
        let left = |n: u64| {
            let key = SocketKey { cookie: n, ..SocketKey::zeroed() };
            Left { key, asked: Asked { proto: TCP, bucket: bucket(n, POD), ..Asked::zeroed() }, is_over: true }
        };
        let search = |first, age| {
            let (sender, entered) = std::sync::mpsc::channel();
            let search = Search {
                left: (1..=3).map(left).collect(),
                judged: Instant::now().checked_sub(age).unwrap(),
                progress: Progress { first, ..Progress::default() },
                records: Some((1..=3).map(record).collect()),
                run_dir: sandbox.run_dir.clone(),
                enter: Arc::new(move |path| {
                    sender.send(path.display().to_string()).unwrap();
                    anyhow::bail!("nobody is there")
                }),
                sockets: Arc::new(Sockets::open(&sandbox.bpffs).unwrap()),
            };
            let first = search.run().progress.first;
            (entered.iter().collect::<String>(), first)
        };
        let (in_time, late) = (Duration::ZERO, Duration::from_secs(11));
        assert_eq!(search(0, in_time), ("/1/2/3".to_owned(), 0));
        assert_eq!(search(bucket(2, POD), in_time), ("/2/3/1".to_owned(), 0));
        assert_eq!(search(bucket(3, POD), late), ("/3/1/2".to_owned(), bucket(3, POD)));
    });
}

/// What a search costs on a node with 200 pods and a full table: none of whose sockets has a backend, a quarter of which live; then, of
/// a single socket. And what the loop does before either.
#[test]
#[ignore = "prints figures"]
fn a_search_in_200_namespaces() {
    const PODS: u64 = 200;
    const LIVING: u64 = 80;
    const ENTRIES: u64 = 65_536;
    sandbox::run(|sandbox| {
        uplink();
        let _ = tracing_subscriber::fmt().with_max_level(tracing::Level::DEBUG).with_ansi(false).try_init();
        let pods: Vec<_> = (0..PODS).map(|_| Namespace::with_sockets(LIVING)).collect();
        for (n, pod) in pods.iter().enumerate() {
            let (container, veth) = (format!("c{n}"), format!("rnv{n}"));
            sandbox.nameless_record(&container, &veth, sandbox::add_pod_veth(&veth), &format!("10.1.1.{}", n + 1));
            sandbox.give(&container, "netnsCookie", pod.cookie.into());
            sandbox.give(&container, "netns", format!("/proc/self/fd/{}", pod.file.as_raw_fd()).into());
        }
        block_on(async {
            let agent = Agent::start_ready(sandbox.config(&SETTINGS), make_two_nodes()).await;
            let table = socket_table(sandbox);
            for pod in &pods {
                pod.sockets.iter().for_each(|it| it.led(&table, pod.cookie));
                // Of sockets that have closed unseen.
                for n in 0..ENTRIES / PODS - LIVING {
                    lead(&table, &SocketKey { cookie: pod.cookie << 32 | n, ..pod.sockets[0].key }, pod.cookie);
                }
            }
            println!("-- a full table: {} entries of {}", table.len().unwrap(), table.max_entries());
            sandbox::ip("link set eth0 alias all");
            wait_until("all are ended", || pods.iter().all(|pod| pod.sockets.iter().all(|it| !it.has_peer()))).await;
            wait_until("all are forgotten", || table.is_empty().unwrap()).await;
            let kept = Asked { proto: TCP, ..Asked::zeroed() };
            for n in 1..ENTRIES {
                table.put(&SocketKey { cookie: u64::MAX - n, ..SocketKey::zeroed() }, &kept).unwrap();
            }
            println!("-- one socket, and {} entries that have nothing to fear", table.len().unwrap());
            let one = pods[0].connected();
            one.led(&table, pods[0].cookie);
            sandbox::ip("link set eth0 alias one");
            wait_until("it is ended", || !one.has_peer()).await;
            agent.stop().await;
        });
    });
}

/// A network namespace with sockets that are connected.
struct Namespace {
    file: std::fs::File,
    cookie: u64,
    sockets: Vec<Connected>,
}

impl Namespace {
    fn with_sockets(count: u64) -> Self {
        let make = move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            sandbox::ip("link set lo up");
            sandbox::ip("route add default dev lo");
            let sockets = (0..count).map(|_| Connected::new()).collect();
            let file = std::fs::File::open("/proc/thread-self/ns/net").unwrap();
            Self { file, cookie: netns::cookie().unwrap(), sockets }
        };
        std::thread::spawn(make).join().unwrap()
    }

    /// One socket more.
    fn connected(&self) -> Connected {
        std::thread::scope(|scope| {
            let make = || {
                setns(&self.file, CloneFlags::CLONE_NEWNET).unwrap();
                Connected::new()
            };
            scope.spawn(make).join().unwrap()
        })
    }
}
