//! IPsec policies of the host: while there are any, the overlay's packets take its device.

use rustnet_agent::bpf::store::node_config::NodeConfigStore;
use rustnet_agent::config::{Config, Routing};
use rustnet_agent::net::ipsec::{Ipsec, Policies};
use rustnet_agent::net::monitor::{Changed, Monitor};
use rustnet_common::config::flags;
use serde_json::Value;

use crate::agent::{Agent, block_on, make_two_nodes, wait_until};
use crate::look::make_held;
use crate::sandbox::{self, Sandbox, ip, uplink};

/// The programs write and take off the overlay's headers.
fn is_past(sandbox: &Sandbox) -> bool {
    NodeConfigStore::open(&sandbox.bpffs).unwrap().read().unwrap().flags & flags::ENCAPSULATE != 0
}

/// Adds or deletes a policy that lets packets pass unencrypted: it needs no keys.
fn policy(op: &str, direction: &str) {
    let action = if op == "add" { " action allow" } else { "" };
    ip(&format!("xfrm policy {op} src 192.0.2.0/24 dst 192.0.2.0/24 dir {direction}{action}"));
}

/// Mark and detail of the status line.
fn status(sandbox: &Sandbox) -> (String, String) {
    let out = sandbox.rustnetctl("-o json status");
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    let checks = report["checks"].as_array().unwrap();
    let line = checks.iter().find(|it| it["name"] == "Overlay path").unwrap_or_else(|| panic!("{report:#}"));
    let text = |key: &str| line[key].as_str().unwrap().to_owned();
    (text("status"), text("detail"))
}

fn is_counted(agent: &Agent, path: &str, is_used: bool) -> bool {
    let line = format!("rustnet_overlay_path{{path=\"{path}\"}} {}", u8::from(is_used));
    agent.health.metrics.encode().unwrap().lines().any(|it| it == line)
}

#[test]
fn policies_of_the_host_are_counted() {
    sandbox::run(|_| {
        let some = |incoming, outgoing| Ipsec::Policies(Policies { incoming, outgoing, refuses_others: false });
        assert_eq!(Ipsec::read(), Ipsec::None);
        policy("add", "fwd");
        assert_eq!(Ipsec::read(), Ipsec::None, "of forwarded packets alone");
        policy("add", "out");
        assert_eq!(Ipsec::read(), some(0, 1));
        policy("add", "in");
        ip("xfrm policy add src 2001:db8::/64 dst 2001:db8::/64 dir in action block");
        assert_eq!(Ipsec::read(), some(2, 1));
        ip("xfrm policy flush");
        assert_eq!(Ipsec::read(), Ipsec::None);
        ip("xfrm policy setdefault fwd block");
        assert_eq!(Ipsec::read(), Ipsec::None);
        ip("xfrm policy setdefault in block");
        let refuses = Policies { refuses_others: true, ..Policies::default() };
        assert_eq!(Ipsec::read(), Ipsec::Policies(refuses));
    });
}

#[test]
fn changes_of_policies_are_heard() {
    sandbox::run(|_| {
        uplink();
        block_on(async {
            let mut monitor = Monitor::open().unwrap();
            let changes: [(&str, fn()); 5] = [
                ("add", || policy("add", "out")),
                ("delete", || policy("del", "out")),
                ("add again", || policy("add", "out")),
                ("flush", || drop(ip("xfrm policy flush"))),
                ("default", || drop(ip("xfrm policy setdefault in block"))),
            ];
            for (name, change) in changes {
                change();
                let heard = tokio::time::timeout(sandbox::deadline(), monitor.changed()).await;
                assert_eq!(heard.unwrap_or_else(|_| panic!("{name}: not heard")).unwrap(), Changed::Policies, "{name}");
            }
        });
    });
}

/// Without waiting for a look, which does not end here.
#[test]
fn while_there_are_policies_the_overlay_takes_its_device() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(async {
            let (surroundings, lock) = make_held(sandbox::deadline());
            let agent = Agent::start_in(surroundings, sandbox.config(&["--overlay-path=programs"]));
            agent.make_ready(make_two_nodes()).await;
            let past = ("ok".to_owned(), "programs".to_owned());
            assert!(is_past(sandbox) && is_counted(&agent, "programs", true), "as the setting says");
            assert_eq!(status(sandbox), past);

            let held = lock.lock().await;
            for (direction, words) in [("out", "0 in, 1 out"), ("in", "1 in, 0 out")] {
                policy("add", direction);
                wait_until("the device is used", || !is_past(sandbox)).await;
                let ipsec = ("ok".to_owned(), format!("device (IPsec policies on this host: {words})"));
                assert_eq!(status(sandbox), ipsec);
                wait_until("it is counted", || is_counted(&agent, "device", true)).await;
                assert!(is_counted(&agent, "programs", false));
                policy("del", direction);
                wait_until("the programs are used", || is_past(sandbox)).await;
                wait_until("it is counted", || is_counted(&agent, "programs", true)).await;
            }
            assert_eq!(status(sandbox), past);
            drop(held);

            // And a look leaves it so.
            policy("add", "out");
            wait_until("the device is used", || !is_past(sandbox)).await;
            ip("route del 10.1.2.0/24");
            wait_until("the route is back", || ip("route show 10.1.2.0/24").contains("rn_vxlan")).await;
            assert!(!is_past(sandbox));
            agent.stop().await;
            // Nobody is there to hear of it.
            policy("del", "out");
            let (mark, detail) = status(sandbox);
            assert!(mark == "warning" && detail.starts_with("device, but it should be programs"), "{mark} {detail}");
        });
    });
}

#[test]
fn an_agent_that_starts_with_policies_begins_with_the_device() {
    sandbox::run(|sandbox| {
        uplink();
        policy("add", "in");
        block_on(async {
            let config = || sandbox.config(&["--overlay-path=programs"]);
            let agent = Agent::start_ready(config(), make_two_nodes()).await;
            assert!(!is_past(sandbox));
            assert_eq!(agent.health.complaints().len(), 0, "that is no problem: {:?}", agent.health.complaints());
            agent.stop().await;
            policy("del", "in");
            let agent = Agent::start_ready(config(), make_two_nodes()).await;
            assert!(is_past(sandbox));
            agent.stop().await;
        });
    });
}

#[test]
fn without_an_overlay_there_is_no_path() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(async {
            let config = Config { routing: Routing::Native, ..sandbox.config(&[]) };
            let agent = Agent::start_ready(config, make_two_nodes()).await;
            assert!(!agent.health.metrics.encode().unwrap().contains("rustnet_overlay_path{"));
            let status = String::from_utf8(sandbox.rustnetctl("status").stdout).unwrap();
            assert!(!status.contains("Overlay path"), "{status}");
            agent.stop().await;
        });
    });
}
