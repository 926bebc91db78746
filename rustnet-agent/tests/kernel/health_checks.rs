//! Load balancers' health checks on a node: the ports of Services come and go with them, and answer by the endpoints that are
//! here; kube-proxy's `/healthz` follows this node's Node.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsFd as _;
use std::sync::Arc;

use rustnet_agent::bpf::sys;
use rustnet_agent::http;
use rustnet_agent::model::{
    Condition, Endpoint, EndpointSlice, Family, Node, ObjectName, Service, ServicePort, TargetPort,
};
use rustnet_agent::source::{Event, Kind, Object, ObjectRef};
use rustnet_common::names::map;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::watch;

use crate::agent::{Agent, block_on, make_own_node, make_two_nodes, wait_until};
use crate::sandbox::{self, Sandbox, uplink};

/// All addresses by which the node can be asked.
const ADDRESSES: [&str; 3] = ["127.0.0.1", "192.0.2.1", "[2001:db8::1]"];

/// A Service with a load balancer and policy Local.
fn balanced(name: &str, last: u8, check: u16) -> Event {
    let node_port = 30_080 + u16::from(last);
    Event::Apply(Object::Service(Arc::new(Service {
        name: ObjectName::namespaced("shop", name),
        created: 0,
        vips: [[10, 96, 0, last].into()].into(),
        ports: [ServicePort { name: "".into(), port: 80, proto: 6, node_port }].into(),
        affinity: 0,
        algorithm: None,
        forwarding: None,
        internal_local: false,
        balanced: [].into(),
        source_ranges: None,
        external: [[203, 0, 113, last].into()].into(),
        external_local: true,
        health_check_port: check,
        problems: Box::default(),
    })))
}

/// The endpoints of a Service: last byte of the address, condition, node.
fn endpoints(service: &str, all: &[(u8, Condition, &str)]) -> Event {
    let endpoint = |(last, condition, node): &(u8, Condition, &str)| Endpoint {
        addr: [10, 1, 1, *last].into(),
        condition: *condition,
        node: (*node).into(),
        pod: Box::default(),
        hints: None,
    };
    Event::Apply(Object::Slice(Arc::new(EndpointSlice {
        name: ObjectName::namespaced("shop", &format!("{service}-1")),
        service: ObjectName::namespaced("shop", service),
        family: Family::V4,
        ports: [TargetPort { name: "".into(), port: 8080, proto: 6 }].into(),
        endpoints: all.iter().map(endpoint).collect(),
        triggered: None,
        problems: Box::default(),
    })))
}

fn gone(name: &str) -> Event {
    Event::Delete(ObjectRef { kind: Kind::Service, name: ObjectName::namespaced("shop", name) })
}

/// Asks once; `None` where nobody listens.
async fn ask(address: &str, port: u16, path: &str) -> Option<String> {
    let address: SocketAddr = format!("{address}:{port}").parse().unwrap();
    let mut stream = TcpStream::connect(address).await.ok()?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: n1\r\n\r\n").as_bytes()).await.ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.ok()?;
    Some(answer)
}

/// Asks on until the answer is as expected.
async fn wait_answer(port: u16, path: &str, is_it: impl Fn(Option<&str>) -> bool) {
    let asking = async {
        loop {
            let answer = ask("127.0.0.1", port, path).await;
            if is_it(answer.as_deref()) {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    let is_answered = tokio::time::timeout(sandbox::deadline(), asking).await.is_ok();
    assert!(is_answered, "port {port}{path} answers {:?}", ask("127.0.0.1", port, path).await);
}

/// Waits until a port has an answer with this status, name and count.
async fn wait_check(port: u16, status: u16, name: &str, count: usize) {
    let status = format!("HTTP/1.1 {status} ");
    let service = format!(r#""service":{{"namespace":"shop","name":"{name}"}},"localEndpoints":{count},"#);
    wait_answer(port, "/", |answer| answer.is_some_and(|it| it.starts_with(&status) && it.contains(&service))).await;
}

async fn wait_closed(port: u16) {
    wait_answer(port, "/", |answer| answer.is_none()).await;
}

fn in_sandbox<F: Future<Output = ()>>(test: impl FnOnce(Sandbox) -> F + Send + 'static) {
    sandbox::run(|sandbox| {
        uplink();
        let Sandbox { bpffs, run_dir, dir } = sandbox;
        block_on(test(Sandbox { bpffs: bpffs.clone(), run_dir: run_dir.clone(), dir: dir.clone() }));
    });
}

#[test]
fn the_port_answers_by_the_endpoints_that_are_here() {
    in_sandbox(async |sandbox| {
        use Condition::{Draining, Ready, Unusable};
        let ready = endpoints("web", &[(5, Ready, "n1"), (6, Ready, "n1"), (7, Draining, "n1"), (8, Ready, "n2")]);
        let events = make_two_nodes().into_iter().chain([balanced("web", 1, 32_001), ready]);
        let agent = Agent::start_ready(sandbox.config(&[]), events).await;
        wait_check(32_001, 200, "web", 2).await;
        for address in ADDRESSES {
            let answer = ask(address, 32_001, "/any/path").await.unwrap_or_default();
            assert!(answer.starts_with("HTTP/1.1 200 "), "{address}: {answer}");
            assert!(answer.contains("x-load-balancing-endpoint-weight: 2\r\n"), "{answer}");
            assert!(answer.ends_with(r#""localEndpoints":2,"serviceProxyHealthy":true}"#), "{answer}");
        }
        for nothing_new in [vec![(5, Draining, "n1")], vec![(5, Unusable, "n1"), (8, Ready, "n2")], vec![]] {
            agent.send([endpoints("web", &nothing_new)]).await;
            wait_check(32_001, 503, "web", 0).await;
            agent.send([endpoints("web", &[(5, Ready, "n1")])]).await;
            wait_check(32_001, 200, "web", 1).await;
        }
        agent.stop().await;
        wait_closed(32_001).await;
    });
}

#[test]
fn each_service_has_its_port_until_it_is_gone() {
    in_sandbox(async |sandbox| {
        let ready = endpoints("web", &[(5, Condition::Ready, "n1")]);
        let events = [make_own_node(), balanced("web", 1, 32_001), balanced("shop", 2, 32_002), ready];
        let agent = Agent::start_ready(sandbox.config(&[]), events).await;
        wait_check(32_001, 200, "web", 1).await;
        wait_check(32_002, 503, "shop", 0).await;
        // Its number changes, to and fro.
        for (to, from) in [(32_003, 32_001), (32_001, 32_003)] {
            agent.send([balanced("web", 1, to)]).await;
            wait_check(to, 200, "web", 1).await;
            wait_closed(from).await;
        }
        // Two Services exchange their ports.
        agent.send([balanced("web", 1, 32_002), balanced("shop", 2, 32_001)]).await;
        wait_check(32_001, 503, "shop", 0).await;
        wait_check(32_002, 200, "web", 1).await;
        agent.wait_no_problem().await;
        agent.send([balanced("web", 1, 32_001), balanced("shop", 2, 32_002)]).await;
        wait_check(32_001, 200, "web", 1).await;
        // Policy Cluster has no such port.
        agent.send([balanced("web", 1, 0)]).await;
        wait_closed(32_001).await;
        agent.send([gone("shop")]).await;
        wait_closed(32_002).await;
        // Another Service gets the number.
        agent.send([balanced("web", 1, 32_002)]).await;
        wait_check(32_002, 200, "web", 1).await;
        agent.wait_no_problem().await;
        agent.stop().await;
    });
}

#[test]
fn a_taken_port_is_a_problem_of_its_service_until_it_is_free() {
    in_sandbox(async |sandbox| {
        let holder = TcpListener::bind("0.0.0.0:32001").unwrap();
        let ready = endpoints("web", &[(5, Condition::Ready, "n1")]);
        let events = [make_own_node(), balanced("web", 1, 32_001), balanced("shop", 2, 32_002), ready];
        let agent = Agent::start_ready(sandbox.config(&[]), events).await;
        agent.wait_problem(&["Service shop/web: spec.healthCheckNodePort:", "32001", "in use", "free the port"]).await;
        wait_check(32_002, 503, "shop", 0).await;
        drop(holder);
        wait_check(32_001, 200, "web", 1).await;
        agent.wait_no_problem().await;

        // Who does not want the port any more has no problem with it.
        agent.send([balanced("web", 1, 0)]).await;
        wait_closed(32_001).await;
        let holder = TcpListener::bind("0.0.0.0:32001").unwrap();
        agent.send([balanced("web", 1, 32_001)]).await;
        agent.wait_problem(&["shop/web", "32001"]).await;
        agent.send([gone("web")]).await;
        agent.wait_no_problem().await;
        drop(holder);
        agent.stop().await;
    });
}

/// A node without load balancers' traffic is alive: the agent is not to be restarted for that.
#[test]
fn healthz_follows_the_node_and_livez_does_not() {
    in_sandbox(async |sandbox| {
        let own_node = |is_leaving| {
            let Event::Apply(Object::Node(node)) = make_own_node() else { unreachable!() };
            Event::Apply(Object::Node(Arc::new(Node { is_leaving, ..(*node).clone() })))
        };
        let web = [balanced("web", 1, 32_001), endpoints("web", &[(5, Condition::Ready, "n1")])];
        let agent = Agent::start_ready(sandbox.config(&[]), [own_node(false)].into_iter().chain(web)).await;
        let (stop, stopped) = watch::channel(false);
        let (router, address) = (http::kube_proxy(Arc::clone(&agent.health)), "[::]:10256".parse().unwrap());
        let server = tokio::spawn(http::serve(router, address, "healthz-bind-address", stopped));
        for (is_leaving, status) in [(false, "200"), (true, "503"), (false, "200")] {
            agent.send([own_node(is_leaving)]).await;
            let eligible = format!(r#""nodeEligible":{}}}"#, !is_leaving);
            let start = format!("HTTP/1.1 {status} ");
            let is_it = |it: &str| it.starts_with(&start) && it.ends_with(&eligible);
            wait_answer(10_256, "/healthz", |answer| answer.is_some_and(is_it)).await;
            let alive = ask("[::1]", 10_256, "/livez").await.unwrap_or_default();
            assert!(alive.starts_with("HTTP/1.1 200 "), "{alive}");
            wait_check(32_001, 200, "web", 1).await;
        }
        stop.send(true).unwrap();
        server.await.unwrap();
        agent.stop().await;
    });
}

/// After a minute of that the proxy is unhealthy; the unit tests have the clock.
#[test]
fn a_change_waits_until_it_can_be_applied() {
    in_sandbox(async |sandbox| {
        let agent = Agent::start_ready(sandbox.config(&[]), [make_own_node()]).await;
        wait_until("all is applied", || agent.health.proxy().waiting.is_none()).await;
        agent.stop().await;
        let pin = sandbox.bpffs.join(map::PEERS4);
        std::fs::remove_file(&pin).unwrap();
        let other = sys::Layout { kind: 1, key_size: 8, value_size: 77, max_entries: 16, flags: 0 };
        sys::obj_pin(&pin, sys::map_create(map::PEERS4, other).unwrap().as_fd()).unwrap();

        let agent = Agent::start(sandbox.config(&[]));
        agent.send([make_own_node(), balanced("web", 1, 32_001)]).await;
        agent.wait_unready(&[map::PEERS4]).await;
        assert_eq!(agent.health.proxy().waiting, None, "nothing is late while the lists are incomplete");
        agent.send_all([]).await;
        wait_until("the change waits", || agent.health.proxy().waiting.is_some()).await;
        assert!(agent.health.proxy().is_healthy, "it is not late yet");
        wait_closed(32_001).await;
        std::fs::remove_file(&pin).unwrap();
        agent.ready().await;
        wait_until("all is applied", || agent.health.proxy().waiting.is_none()).await;
        wait_check(32_001, 503, "web", 0).await;
        agent.stop().await;
    });
}
