//! kube-proxy's health of a node: `/healthz` follows this node's Node, and a change that waits is noticed.

use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::sync::Arc;

use rustnet_agent::bpf::sys;
use rustnet_agent::http;
use rustnet_agent::model::Node;
use rustnet_agent::source::{Event, Object};
use rustnet_common::names::map;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::watch;

use crate::agent::{Agent, block_on, make_own_node, wait_until};
use crate::sandbox::{self, Sandbox, uplink};

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

fn in_sandbox<F: Future<Output = ()>>(test: impl FnOnce(Sandbox) -> F + Send + 'static) {
    sandbox::run(|sandbox| {
        uplink();
        let Sandbox { bpffs, run_dir, dir } = sandbox;
        block_on(test(Sandbox { bpffs: bpffs.clone(), run_dir: run_dir.clone(), dir: dir.clone() }));
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
        let agent = Agent::start_ready(sandbox.config(&[]), [own_node(false)]).await;
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
        agent.send([make_own_node()]).await;
        agent.wait_unready(&[map::PEERS4]).await;
        assert_eq!(agent.health.proxy().waiting, None, "nothing is late while the lists are incomplete");
        agent.send_all([]).await;
        wait_until("the change waits", || agent.health.proxy().waiting.is_some()).await;
        assert!(agent.health.proxy().is_healthy, "it is not late yet");
        std::fs::remove_file(&pin).unwrap();
        agent.ready().await;
        wait_until("all is applied", || agent.health.proxy().waiting.is_none()).await;
        agent.stop().await;
    });
}
