//! The `rustnetctl` command on maps that an agent filled.

use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use bytemuck::Zeroable;

use rustnet_agent::bpf::attach::{Direction, pod_hooks};
use rustnet_agent::bpf::probe::jiffies;
use rustnet_agent::bpf::store::BpfMaps;
use rustnet_agent::bpf::store::conntrack::Conntrack;
use rustnet_agent::bpf::sys::TestRun;
use rustnet_agent::bpf::{load, sys};
use rustnet_agent::config::Config;
use rustnet_agent::model::{ObjectName, Pod};
use rustnet_agent::net::netlink::Socket;
use rustnet_agent::net::tc;
use rustnet_agent::plan::{Maps, VipKey, Write};
use rustnet_agent::source::manifests::{Catalog, scan};
use rustnet_agent::source::{Event, Kind, Object};
use rustnet_common::addr::Ip4;
use rustnet_common::conntrack::{CtEntry, flags as ct_flags};
use rustnet_common::service::SvcEntry;
use rustnet_common::tuple::{Tuple, proto};
use serde_json::Value;

use crate::agent::{Agent, block_on, make_own_node, make_two_nodes, wait_until, web};
use crate::sandbox::{self, Sandbox, add_pod_veth, ip, uplink};

fn json(sandbox: &Sandbox, args: &str) -> Value {
    let out = sandbox.rustnetctl(&format!("-o json {args}"));
    let text = String::from_utf8(out.stdout).unwrap();
    serde_json::from_str(&text)
        .unwrap_or_else(|e| panic!("{args}: {e}\n{text}\n{}", String::from_utf8_lossy(&out.stderr)))
}

fn text(sandbox: &Sandbox, args: &str) -> String {
    let out = sandbox.rustnetctl(args);
    assert!(out.status.success(), "{args}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

#[test]
fn every_command_tells_what_the_maps_hold() {
    sandbox::run(|sandbox| {
        uplink();
        sandbox.add_pod("rnv1", "10.1.1.5");
        sandbox.limit(serde_json::json!({ "ingress": { "rate": 1_500_000, "burst": 1_048_576 } }));
        block_on(async {
            let agent = Agent::start_ready(sandbox.config(&[]), make_two_nodes().into_iter().chain(web(2))).await;
            let is_named = || json(sandbox, "services")[0]["service"].is_string();
            wait_until("the names are written", is_named).await;
            let has_details = || json(sandbox, "services default/web")["policies"].is_object();
            wait_until("the details are written", has_details).await;
            tell(sandbox);
            agent.stop().await;
        });
    });
}

fn tell(sandbox: &Sandbox) {
    let services = json(sandbox, "services");
    assert_eq!(services.as_array().unwrap().len(), 1, "wildcard entries are not services");
    assert_eq!((&services[0]["vip"], &services[0]["port"]), (&"10.96.0.10".into(), &80.into()));
    assert_eq!(services[0]["backends"][1]["address"], "10.1.2.2");
    assert_eq!(services[0]["missing"], 0);
    assert_eq!(services[0]["service"], "default/web");
    let shown = text(sandbox, "services 10.96.0.10");
    assert!(shown.contains("10.96.0.10:80") && shown.contains("10.1.2.1:8080, 10.1.2.2:8080"), "{shown}");
    let unknown = sandbox.rustnetctl("services 10.96.0.11");
    assert_eq!(unknown.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("no Service has the address 10.96.0.11"));

    tell_service(sandbox);

    let endpoints = json(sandbox, "endpoints");
    assert_eq!((&endpoints[0]["address"], &endpoints[0]["pod"]), (&"10.1.1.5".into(), &"default/web-0".into()));
    assert_eq!(endpoints[0]["bandwidth"], serde_json::json!({ "ingress": { "rate": 1_500_000, "burst": 1_048_576 } }));
    let shown = text(sandbox, "endpoints");
    assert!(shown.contains("02:00:00:00:00:07") && shown.contains("1500 kbit/s"), "{shown}");

    let nodes = json(sandbox, "nodes");
    let ways = |i: usize| (nodes[i]["name"].clone(), nodes[i]["podCidrs"][0].clone(), nodes[i]["reached"].clone());
    assert_eq!(ways(0), ("n1".into(), "10.1.1.0/24".into(), serde_json::json!(["here"])));
    assert_eq!(ways(1), ("n2".into(), "10.1.2.0/24".into(), serde_json::json!(["overlay"])));
    let peers = json(sandbox, "peers");
    let row = |prefix: &str| peers.as_array().unwrap().iter().find(|n| n["prefix"] == prefix).unwrap().clone();
    assert_eq!((&row("10.1.2.0/24")["node"], &row("10.1.2.0/24")["tunnel"]), (&"192.0.2.2".into(), &true.into()));
    assert_eq!(row("192.0.2.1/32")["kind"], "this host");

    let maps = json(sandbox, "maps");
    assert_eq!((&maps[0]["name"], &maps[0]["used"]), (&"rn_svc4_v2".into(), &2.into()));
    let none = serde_json::json!({ "connections": [], "found": 0, "truncated": false });
    assert_eq!(json(sandbox, "ct list"), none);
    assert!(text(sandbox, "ct list --proto tcp --port 80").starts_with("PROTOCOL"));
    assert_eq!(json(sandbox, "drops"), Value::Array(vec![]));
    assert!(text(sandbox, "monitor --for 0").is_empty());

    let status = json(sandbox, "status");
    assert_eq!(status["ok"], true, "{status:#}");
    let hooks = if sandbox::has_tcx() { "uplink_in" } else { "uplink_in (filter on eth0)" };
    assert!(text(sandbox, "status").contains(hooks));
}

/// One Service in full, with a flow to one of its backends.
fn tell_service(sandbox: &Sandbox) {
    let service = json(sandbox, "services web -n default");
    let backend = |i: usize| service["backends"][i].clone();
    assert_eq!((&service["service"], &service["frontEnds"][0]["kind"]), (&"default/web".into(), &"clusterIP".into()));
    assert_eq!(service["policies"]["internalTrafficPolicy"], "Cluster");
    for (field, want) in [("pod", "default/web-1"), ("node", "n2"), ("address", "10.1.2.1"), ("state", "ready")] {
        assert_eq!(backend(0)[field], want, "{service:#}");
    }
    assert_eq!((&backend(0)["liveFlows"], &backend(1)["liveFlows"]), (&0.into(), &0.into()));

    let ids = backend(1)["ids"][0].as_u64().unwrap();
    let tables = Conntrack::open(&sandbox.bpffs).unwrap();
    let clock = sys::obj_get(&load::program_path(&sandbox.bpffs, load::CLOCK)).unwrap();
    let (src, dst) = (Ipv4Addr::new(10, 1, 1, 5).into(), Ipv4Addr::new(10, 96, 0, 10).into());
    let tuple: Tuple<Ip4> = Tuple { src, dst, sport: 4000, dport: 80, proto: proto::TCP, ..Tuple::zeroed() };
    let to = Tuple { dst: Ipv4Addr::new(10, 1, 2, 2).into(), dport: 8080, ..tuple };
    let swapped = if tuple.is_swapped() { ct_flags::SWAPPED } else { 0 };
    let entry = CtEntry {
        to,
        flags: ct_flags::NAT | swapped,
        seen: jiffies(clock.as_fd()).unwrap(),
        backend: ids as u32,
        ..CtEntry::zeroed()
    };
    tables.v4.tcp.put(&tuple.canonical(), &entry).unwrap();
    let shown = text(sandbox, "services default/web");
    let line = shown.lines().find(|line| line.starts_with("10.1.2.2:8080")).unwrap();
    let words: Vec<_> = line.split_whitespace().collect();
    let want = ["10.1.2.2:8080", "-", "TCP", "default/web-2", "n2", "ready", "1", "1"];
    assert_eq!(words, want, "{shown}");
    assert!(tables.v4.tcp.delete(&tuple.canonical()).unwrap());

    assert_eq!(json(sandbox, "services -n default").as_array().unwrap().len(), 1);
    assert_eq!(json(sandbox, "services -n other").as_array().unwrap().len(), 0);
    let unknown = sandbox.rustnetctl("services default/db");
    assert_eq!(unknown.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("no Service default/db here"));
}

#[test]
fn a_pods_name_comes_from_the_source_where_the_runtime_passed_none() {
    sandbox::run(|sandbox| {
        uplink();
        sandbox.add_pod("rnv1", "10.1.1.5");
        sandbox.nameless_record("fedcba9876543210", "rnv2", add_pod_veth("rnv2"), "10.1.1.6");
        block_on(async {
            let agent = Agent::start_ready(sandbox.config(&[]), [make_own_node()]).await;
            let names = || {
                let rows = json(sandbox, "endpoints");
                rows.as_array().unwrap().iter().map(|row| row["pod"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
            };
            assert_eq!(names(), ["default/web-0", "fedcba987654"]);
            agent.send([pod("db-0", "n1", "10.1.1.6"), pod("other", "n2", "10.1.1.5"), Event::Synced(Kind::Pod)]).await;
            wait_until("the pod is named", || names() == ["default/web-0", "shop/db-0"]).await;
            agent.send([pod("db-0", "n2", "10.1.1.6")]).await;
            wait_until("another node's pod is not", || names() == ["default/web-0", "fedcba987654"]).await;
            agent.stop().await;
        });
    });
}

#[test]
fn a_pod_without_its_classifiers_is_a_degraded_node() {
    sandbox::run(|sandbox| {
        uplink();
        sandbox.add_pod("rnv1", "10.1.1.5");
        block_on(async {
            // Without its probes' address the agent may be absent: a warning, and what is asked here is the kernel.
            Agent::start_ready(sandbox.config(&[]), [make_own_node()]).await.stop().await;
        });
        let check = || {
            let status = json(sandbox, "status");
            let checks = status["checks"].as_array().unwrap().iter();
            let line = checks.clone().find(|line| line["name"] == "Classifiers").unwrap();
            let [mark, detail] = ["status", "detail"].map(|field| line[field].as_str().unwrap().to_owned());
            (mark, detail, sandbox.rustnetctl("status").status.code())
        };
        assert_eq!(check(), ("ok".to_owned(), "both on each of 1 pods' interfaces".to_owned(), Some(0)));

        let mut socket = Socket::open().unwrap();
        let veth = sandbox::ifindex("rnv1");
        assert!(tc::remove_filter(&mut socket, veth, Direction::Egress).unwrap());
        let (mark, detail, code) = check();
        assert!(mark == "bad" && code == Some(1), "{mark} {code:?}");
        assert!(detail.starts_with("degraded: missing to_pod on rnv1 (pod default/web-0); "), "{detail}");

        // The qdisc with both; then an older agent's program in the place of one.
        sandbox::command("tc", "qdisc del dev rnv1 clsact");
        let (_, detail, code) = check();
        assert!(detail.contains("missing from_pod on rnv1 (pod default/web-0), to_pod on rnv1"), "{detail}");
        assert_eq!(code, Some(1));
        let [from, to] =
            ["from_pod", "to_pod"].map(|name| sys::obj_get(&load::program_path(&sandbox.bpffs, name)).unwrap());
        pod_hooks(&mut socket, veth, from.as_fd(), from.as_fd()).unwrap();
        let (mark, detail, code) = check();
        assert!(mark == "warning" && code == Some(0), "{mark} {code:?}");
        assert!(detail.starts_with("not the pinned program: to_pod on rnv1 "), "{detail}");
        pod_hooks(&mut socket, veth, from.as_fd(), to.as_fd()).unwrap();
        assert_eq!(check().0, "ok");

        // A veth that is gone is no pod without classifiers.
        ip("link del rnv1");
        assert_eq!(check().1, "both on each of 0 pods' interfaces");
        // Nor is another device that has its index.
        sandbox.nameless_record("fedcba9876543210", "rnv9", sandbox::ifindex("eth0"), "10.1.1.7");
        assert_eq!(check().1, "both on each of 0 pods' interfaces");
    });
}

#[test]
fn a_drop_is_printed_as_it_happens() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(async {
            let agent = Agent::start_ready(sandbox.config(&["--flow-events=true"]), [make_own_node()]).await;
            // An IPv4 header that promises more than there is.
            let program = sys::obj_get(&load::program_path(&sandbox.bpffs, "from_pod")).unwrap();
            let frame = [&[2; 12][..], &[8, 0, 0x45, 0, 0, 99], &[0; 16]].concat();
            sys::test_run(program.as_fd(), TestRun { packet: &frame, ..TestRun::default() }).unwrap();
            let events = text(sandbox, "-o json monitor --past --count 1 --for 20");
            let event: Value = serde_json::from_str(&events).unwrap();
            assert_eq!((&event["verdict"], &event["reason"]), (&"drop".into(), &"malformed".into()), "{events}");
            assert_eq!((&event["hook"], &event["length"]), (&"from_pod".into(), &34.into()), "{events}");
            agent.stop().await;
        });
    });
}

/// Before the lock, two of them shared the events, and each lacked those that the other had.
#[test]
fn a_second_monitor_is_refused_with_the_pid_of_the_first() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(async {
            let agent = Agent::start_ready(sandbox.config(&[]), [make_own_node()]).await;
            let mut first = sandbox.spawn_rustnetctl("monitor");
            let mut refused = || {
                // The second one may have been faster once, and the first one was refused.
                if first.try_wait().unwrap().is_some() {
                    first = sandbox.spawn_rustnetctl("monitor");
                }
                let who = format!("process {} reads the events", first.id());
                let second = sandbox.rustnetctl("monitor --for 0");
                second.status.code() == Some(1) && String::from_utf8_lossy(&second.stderr).contains(&who)
            };
            wait_until("the first one reads", &mut refused).await;
            first.kill().unwrap();
            first.wait().unwrap();
            assert!(text(sandbox, "monitor --for 0").is_empty(), "the lock ends with its holder");
            agent.stop().await;
        });
    });
}

fn pod(name: &str, node: &str, address: &str) -> Event {
    Event::Apply(Object::Pod(Arc::new(Pod {
        name: ObjectName::namespaced("shop", name),
        uid: "u".into(),
        node: node.into(),
        addresses: [address.parse().unwrap()].into(),
        host_network: false,
        host_ports: false,
        socket_lb: None,
        labels: rustnet_agent::model::Labels::default(),
        ports: Box::default(),
        problems: Box::default(),
    })))
}

#[test]
fn exit_codes_tell_wrong_usage_from_trouble() {
    sandbox::run(|sandbox| {
        for wrong in
            ["bogus", "nodes extra", "services web", "services 10.96.0.10 extra", "maps --all", "drops --brief"]
        {
            assert_eq!(sandbox.rustnetctl(wrong).status.code(), Some(2), "{wrong}");
        }
        assert_eq!(sandbox.rustnetctl("ct list --proto http").status.code(), Some(2));
        assert_eq!(sandbox.rustnetctl("--version").status.code(), Some(0));
        assert_eq!(sandbox.rustnetctl("completions bash").status.code(), Some(0));
        let out = sandbox.rustnetctl("status");
        assert_eq!(out.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&out.stdout).contains("no agent has run"));
        // Never another agent's pins.
        let out = sandbox.rustnetctl("services");
        let error = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(2));
        assert!(error.contains("--bpffs"), "{error}");
        let out = sandbox.rustnetctl(&format!("--bpffs {} services", sandbox.bpffs.display()));
        let error = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(1));
        assert!(error.contains("rn_backend_ids"), "{error}");
    });
}

/// Two nodes, and a Service with an endpoint and a node port, as a source delivers them.
const MANIFESTS: &str = r#"
{"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"},
 "spec": {"podCIDR": "10.1.1.0/24"}, "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]}}
---
{"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n2"},
 "spec": {"podCIDR": "10.1.2.0/24"}, "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.2"}]}}
---
{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "shop"},
 "spec": {"type": "NodePort", "clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10"], "ipFamilies": ["IPv4"],
          "ports": [{"name": "http", "port": 80, "nodePort": 30080}]}}
---
{"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
 "metadata": {"name": "web-1", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
 "ports": [{"name": "http", "port": 8080}],
 "endpoints": [{"addresses": ["10.1.2.1"], "nodeName": "n2", "targetRef": {"kind": "Pod", "name": "web-0"}},
               {"addresses": ["10.1.2.2"], "nodeName": "n2"}]}
"#;

#[test]
fn maps_are_compared_with_what_the_source_says() {
    sandbox::run(|sandbox| {
        uplink();
        let dir = sandbox.dir.join("manifests");
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("all.yaml"), MANIFESTS).unwrap();
        let events = scan(&mut Catalog::default(), &dir).unwrap();
        let verify = || {
            let out = sandbox.rustnetctl("services --verify");
            (out.status.code(), String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap())
        };
        block_on(async {
            // It audits only when it is asked to: at its start.
            let agent = Agent::start_ready(sandbox.config(&[]), events.clone()).await;
            let (code, shown, errors) = verify();
            assert_eq!((code, shown.as_str()), (Some(0), "all 3 front ends are as the source says\n"), "{errors}");
            agent.stop().await;

            let mut maps = BpfMaps::open(&sandbox.bpffs).unwrap();
            let key = VipKey { ip: "10.96.0.10".parse().unwrap(), port: 80, proto: proto::TCP, scope: 0 };
            let entry = maps.service(&key).unwrap().unwrap();
            let other = VipKey { ip: "10.96.0.77".parse().unwrap(), ..key };
            let writes = [
                Write::DeleteService { key: VipKey::wildcard(key.ip) },
                Write::PutService { key, entry: SvcEntry { count: 1, ..entry } },
                Write::PutService { key: other, entry: SvcEntry { first: 0, count: 0, id: 900, ..entry } },
            ];
            maps.apply(&writes).unwrap();
            let (code, shown, errors) = verify();
            assert_eq!(code, Some(1), "{shown}{errors}");
            let lines: Vec<_> =
                shown.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
            for line in [
                "missing shop/web - 10.96.0.10 (whole address) - cluster -",
                "differs shop/web http 10.96.0.10:80 TCP cluster lacks backend 10.1.2.2:8080",
                "extra - - 10.96.0.77:80 TCP cluster -",
            ] {
                assert!(lines.iter().any(|it| it == line), "{line}\n{shown}");
            }
            // The two entries of the node port share the set of backends of the one that was changed.
            let report = json(sandbox, "services --verify");
            assert_eq!((&report["ok"], &report["differences"].as_array().unwrap().len()), (&false.into(), &5));

            // Of another node the maps are not.
            let out = sandbox.rustnetctl("services --verify --manifests /nonexistent");
            assert_eq!(out.status.code(), Some(1));
            assert!(String::from_utf8_lossy(&out.stderr).contains("reading /nonexistent"));

            let config = Config { audit_period: Duration::from_millis(50), ..sandbox.config(&[]) };
            // An agent puts right what it finds; what is changed behind its back, its audit.
            let agent = Agent::start_ready(config, events).await;
            assert_eq!(verify().0, Some(0));
            maps.apply(&[Write::DeleteService { key }]).unwrap();
            wait_until("the audit has put it back", || maps.service(&key).unwrap().is_some()).await;
            assert_eq!(verify().0, Some(0));
            agent.stop().await;
        });
    });
}
