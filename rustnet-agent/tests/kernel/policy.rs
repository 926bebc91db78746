//! Network policies: their maps as the agent writes them, and the loop from objects and records to them.

use std::net::IpAddr;
use std::os::fd::AsFd;
use std::time::Duration;

use ipnet::IpNet;
use rustnet_agent::bpf::store::Map;
use rustnet_agent::bpf::store::policy::{PolicyStore, read};
use rustnet_agent::bpf::sys;
use rustnet_agent::config::Config;
use rustnet_agent::model::Problem;
use rustnet_agent::plan::policies::{PolicyCapacities, PolicyMaps, PolicySnapshot, PolicyWrite, PortPrefix, RuleKey};
use rustnet_agent::policyfile;
use rustnet_agent::source::manifests::Catalog;
use rustnet_agent::source::{Event, Kind, Origin};
use rustnet_common::addr::Addr;
use rustnet_common::names::map;
use rustnet_common::policy::{ALLOW, OPEN, Policies, PolicyPod, PolicyRule, flags};
use rustnet_common::tuple::proto::TCP;

use crate::agent::{Agent, block_on, make_own_node, wait_until};
use crate::load::load;
use crate::look::make_held;
use crate::sandbox::{self, Sandbox, uplink};

const MAPS: [&str; 3] = [map::POLICY_PODS, map::POLICY_CIDRS, map::POLICY_RULES];

/// Something in each map.
fn content() -> PolicySnapshot {
    let pod = |n: u32| PolicyPod { class: n, ingress: 7, egress: 0, ifindex: n };
    let range = |text: &str| text.parse::<IpNet>().unwrap();
    let ports =
        [PortPrefix::ANY, PortPrefix::new(TCP, 0, 0), PortPrefix::new(TCP, 0x5000, 4), PortPrefix::new(TCP, 80, 16)];
    PolicySnapshot {
        state: Policies { generation: 3, flags: flags::ENFORCED },
        pods: (1..5_u32)
            .map(|n| (IpAddr::from([10, 1, 0, n as u8]), pod(n)))
            .chain([("fd00::1".parse().unwrap(), pod(9))])
            .collect(),
        cidrs: [("0.0.0.0/0", 1), ("10.0.0.0/8", 2), ("fd00::/16", 3)].map(|(text, class)| (range(text), class)).into(),
        rules: ports.map(|ports| (RuleKey { set: 1, class: 2, ports }, PolicyRule { flags: ALLOW, rule: 5 })).into(),
    }
}

/// The writes that put all of it into empty maps.
fn puts(content: &PolicySnapshot) -> Vec<PolicyWrite> {
    let rules = content.rules.iter().map(|(key, rule)| PolicyWrite::PutRule { key: *key, rule: *rule });
    let cidrs = content.cidrs.iter().map(|(prefix, class)| PolicyWrite::PutCidr { prefix: *prefix, class: *class });
    let pods = content.pods.iter().map(|(ip, pod)| PolicyWrite::PutPod { ip: *ip, pod: *pod });
    rules.chain(cidrs).chain(pods).chain([PolicyWrite::PutState { state: content.state }]).collect()
}

fn there(sandbox: &Sandbox) -> PolicySnapshot {
    read(&sandbox.bpffs).unwrap()
}

#[test]
fn what_is_written_is_read_back_and_deleted() {
    sandbox::run(|sandbox| {
        load(sandbox).run().unwrap().pin(&sandbox.bpffs).unwrap();
        assert_eq!(there(sandbox), PolicySnapshot::default());
        let (content, mut store) = (content(), PolicyStore::open(&sandbox.bpffs).unwrap());
        store.apply(&puts(&content)).unwrap();
        assert_eq!(there(sandbox), content);
        // One of each is not there: the others go all the same.
        let state = Policies { generation: 4, flags: 0 };
        let mut writes =
            vec![PolicyWrite::PutState { state }, PolicyWrite::DeletePod { ip: IpAddr::from([10, 9, 9, 9]) }];
        writes.extend(content.pods.keys().map(|ip| PolicyWrite::DeletePod { ip: *ip }));
        writes.push(PolicyWrite::DeleteCidr { prefix: "192.0.2.0/24".parse().unwrap() });
        writes.extend(content.cidrs.keys().map(|prefix| PolicyWrite::DeleteCidr { prefix: *prefix }));
        writes.push(PolicyWrite::DeleteRule { key: RuleKey { set: 9, class: 9, ports: PortPrefix::ANY } });
        writes.extend(content.rules.keys().map(|key| PolicyWrite::DeleteRule { key: *key }));
        store.apply(&writes).unwrap();
        assert_eq!(there(sandbox), PolicySnapshot { state, ..PolicySnapshot::default() });
    });
}

#[test]
fn a_full_map_names_itself() {
    sandbox::run(|sandbox| {
        let mut load = load(sandbox);
        load.sizes.extend(MAPS.map(|name| (name.to_owned(), 2)));
        load.run().unwrap().pin(&sandbox.bpffs).unwrap();
        let (writes, mut store) = (puts(&content()), PolicyStore::open(&sandbox.bpffs).unwrap());
        assert_eq!(store.capacities(), PolicyCapacities { pods: 2, cidrs: 2, rules: 2 });
        let is_of = |write: &PolicyWrite, map: &str| match write {
            PolicyWrite::PutPod { .. } => map == map::POLICY_PODS,
            PolicyWrite::PutCidr { .. } => map == map::POLICY_CIDRS,
            _ => map == map::POLICY_RULES && matches!(write, PolicyWrite::PutRule { .. }),
        };
        for map in MAPS {
            let run: Vec<_> = writes.iter().filter(|write| is_of(write, map)).cloned().collect();
            let error = format!("{:#}", store.apply(&run).unwrap_err());
            assert!(error.contains(map) && error.contains("full (2 entries)"), "{error}");
        }
    });
}

#[test]
fn maps_of_another_size_are_copied() {
    sandbox::run(|sandbox| {
        load(sandbox).run().unwrap().pin(&sandbox.bpffs).unwrap();
        PolicyStore::open(&sandbox.bpffs).unwrap().apply(&puts(&content())).unwrap();
        let mut resized = load(sandbox);
        resized.sizes.extend(MAPS.map(|name| (name.to_owned(), 1024)));
        resized.run().unwrap().pin(&sandbox.bpffs).unwrap();
        assert_eq!(there(sandbox), content());
    });
}

#[test]
fn maps_that_an_earlier_release_has_not_pinned_are_made() {
    sandbox::run(|sandbox| {
        load(sandbox).run().unwrap().pin(&sandbox.bpffs).unwrap();
        for name in MAPS.into_iter().chain([map::POLICY]) {
            std::fs::remove_file(sandbox.bpffs.join(name)).unwrap();
        }
        load(sandbox).run().unwrap().pin(&sandbox.bpffs).unwrap();
        assert_eq!(there(sandbox), PolicySnapshot::default());
    });
}

/// A namespace and a pod in it, as the API server has it before the kubelet has reported an address.
const POD: &str = "apiVersion: v1\nkind: Namespace\nmetadata: {name: default}\n---\n\
                   apiVersion: v1\nkind: Pod\nmetadata: {name: web-0, labels: {app: web}, uid: u}\n\
                   spec: {nodeName: n1, containers: [{name: c}]}\nstatus: {phase: Pending}\n";
const POLICY: &str = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: web}\n\
                      spec: {podSelector: {matchLabels: {app: web}}, ingress: [{ports: [{port: 80}]}]}\n";
const ADDRESS: &str = "10.1.1.7";

/// The events of a manifest.
fn events(text: &str) -> Vec<Event> {
    Catalog::default().update("x.yaml", text)
}

/// The entry of the pod.
fn entry(sandbox: &Sandbox) -> Option<PolicyPod> {
    there(sandbox).pods.get(&ADDRESS.parse::<IpAddr>().unwrap()).copied()
}

fn is_enforced(sandbox: &Sandbox) -> bool {
    there(sandbox).state.flags & flags::ENFORCED != 0
}

async fn start_with_policy(config: Config) -> Agent {
    let objects = events(POD).into_iter().chain(events(POLICY)).chain([make_own_node()]);
    Agent::start_ready(config, objects).await
}

/// An agent that has enforced policies, and has ended.
async fn leave_enforced(sandbox: &Sandbox) {
    let agent = start_with_policy(sandbox.config(&[])).await;
    wait_until("policies are enforced", || is_enforced(sandbox)).await;
    agent.stop().await;
}

#[test]
fn a_pod_is_decided_by_its_record_and_policies_come_and_go() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(async {
            let agent = Agent::start_ready(sandbox.config(&[]), events(POD).into_iter().chain([make_own_node()])).await;
            assert_eq!(there(sandbox), PolicySnapshot::default());
            agent.send(events(POLICY)).await;
            wait_until("policies are enforced", || is_enforced(sandbox)).await;
            assert_eq!(entry(sandbox), None, "a pod without an interface is not there");
            let ifindex = sandbox.add_pod("rnv1", ADDRESS);
            wait_until("the pod is decided", || entry(sandbox).is_some_and(|pod| pod.ifindex == ifindex)).await;
            let pod = entry(sandbox).unwrap();
            assert!(pod.ingress != OPEN && pod.egress == OPEN, "{pod:?}");
            assert!(there(sandbox).rules.keys().all(|key| key.set == pod.ingress) && !there(sandbox).rules.is_empty());
            agent.stop().await;

            // The next one computes the same numbers. What the last write was is not known: known flows are judged again.
            let mut before = there(sandbox);
            let agent = start_with_policy(sandbox.config(&[])).await;
            before.state.generation += 1;
            assert_eq!(there(sandbox), before);
            let gone = events(POLICY).into_iter().filter_map(|event| match event {
                Event::Apply(object) => Some(Event::Delete(object.reference())),
                _ => None,
            });
            agent.send(gone).await;
            wait_until("nothing is enforced", || there(sandbox).pods.is_empty()).await;
            let generation = before.state.generation + 1;
            let state = Policies { generation, flags: 0 };
            wait_until("the maps are empty", || {
                there(sandbox) == PolicySnapshot { state, ..PolicySnapshot::default() }
            })
            .await;
            agent.stop().await;
        });
    });
}

/// Numbers are all that the maps have.
#[test]
fn names_of_sets_and_rules_are_written() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(async {
            let agent = start_with_policy(sandbox.config(&[])).await;
            sandbox.add_pod("rnv1", ADDRESS);
            let names = || policyfile::read(&sandbox.run_dir).unwrap();
            wait_until("the set has a name", || {
                entry(sandbox)
                    .is_some_and(|pod| names().sets.get(&pod.ingress).is_some_and(|it| it.texts == ["default/web"]))
            })
            .await;
            let rules = there(sandbox).rules;
            assert!(
                rules.values().all(|rule| names().rules[&rule.rule] == "default/web ingress[0]") && !rules.is_empty()
            );
            ask_the_command(sandbox);
            let metrics = agent.health.metrics.encode().unwrap();
            let generation = format!("rustnet_policy_generation {}", there(sandbox).state.generation);
            for want in ["rustnet_policy_sets 1", "rustnet_policy_entries{map=\"rn_policy_rules\"} 1", &generation] {
                assert!(metrics.lines().any(|line| line == want), "{want}: {metrics}");
            }
            let gone = events(POLICY).into_iter().filter_map(|event| match event {
                Event::Apply(object) => Some(Event::Delete(object.reference())),
                _ => None,
            });
            agent.send(gone).await;
            wait_until("the names are gone", || names() == policyfile::Names::default()).await;
            agent.stop().await;
        });
    });
}

/// What `rustnetctl policy` makes of the pod, its policy and flows to it.
fn ask_the_command(sandbox: &Sandbox) {
    let shown = |args: &str| {
        let out = sandbox.rustnetctl(args);
        let text = [out.stdout, out.stderr].map(|text| String::from_utf8(text).unwrap()).concat();
        (out.status.code(), text)
    };
    let open = "no policy selects default/web-0 (10.1.1.7) for egress";
    for (args, code, words) in [
        ("policy", 0, "default/web (1 rule)"),
        ("policy default/web-0", 0, "ingress: isolated by default/web\n"),
        ("policy 10.1.1.7", 0, "default/web ingress[0]"),
        ("policy default/none", 1, "no pod default/none"),
        ("policy why 203.0.113.1 default/web-0 80", 0, "default/web ingress[0] allows 203.0.113.1"),
        ("policy why 203.0.113.1 10.1.1.7 81", 1, "denied"),
        ("policy why 203.0.113.1 10.1.1.7 80 udp", 1, "isolated for ingress by default/web; no rule of them allows"),
        ("policy why default/web-0 203.0.113.1 80", 0, open),
        ("policy why default/none 10.1.1.7 80", 2, "default/none: neither an address"),
        ("policy why 203.0.113.1 10.1.1.7", 2, "<PORT>"),
    ] {
        let (found, text) = shown(args);
        assert!(found == Some(code) && text.contains(words), "{args}: {found:?} {text}");
    }
}

/// A look at the host's network takes long on some hosts, and waits for what is heard to settle.
#[test]
fn a_new_pod_does_not_wait_for_a_look() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(async {
            let (surroundings, lock) = make_held(sandbox::deadline());
            let agent = Agent::start_in(surroundings, sandbox.config(&[]));
            agent.make_ready(events(POD).into_iter().chain(events(POLICY)).chain([make_own_node()])).await;
            let held = lock.lock().await;
            let ifindex = sandbox.add_pod("rnv1", ADDRESS);
            wait_until("the pod is decided", || entry(sandbox).is_some_and(|pod| pod.ifindex == ifindex)).await;
            drop(held);
            agent.stop().await;
        });
    });
}

#[test]
fn switched_off_policies_are_removed() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(async {
            let agent = start_with_policy(sandbox.config(&[])).await;
            sandbox.add_pod("rnv1", ADDRESS);
            wait_until("the pod is decided", || entry(sandbox).is_some()).await;
            agent.stop().await;
            let agent = start_with_policy(sandbox.config(&["--network-policy=off"])).await;
            wait_until("nothing is enforced", || !is_enforced(sandbox) && there(sandbox).rules.is_empty()).await;
            assert_eq!(entry(sandbox), None);
            agent.stop().await;
        });
    });
}

#[test]
fn a_node_waits_for_policies_unless_the_server_refuses_them() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(async {
            let agent = Agent::start(sandbox.config(&[]));
            agent.send([make_own_node()].into_iter().chain(Kind::REQUIRED.map(Event::Synced))).await;
            agent.wait_unready(&["network policies are not applied"]).await;
            let report = |problems| Event::Report { origin: Origin::Refusal(Kind::NetworkPolicy), problems };
            agent.send([report([Problem::new(&"NetworkPolicy".into(), "", "refused")].into())]).await;
            agent.ready().await;
            // Once they are known, they count.
            agent.send([report(Box::default())]).await;
            agent.send(events(POD).into_iter().chain(events(POLICY))).await;
            agent.send(Kind::ALL.map(Event::Synced)).await;
            wait_until("policies are enforced", || is_enforced(sandbox)).await;
            agent.ready().await;
            agent.stop().await;
        });
    });
}

/// A role that was reverted: what was enforced stays, and would close each new pod.
#[test]
fn a_node_whose_enforced_policies_cannot_be_followed_is_not_ready() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(async {
            leave_enforced(sandbox).await;
            let agent = Agent::start(sandbox.config(&[]));
            let problems = [Problem::new(&"NetworkPolicy".into(), "", "refused")].into();
            let report = Event::Report { origin: Origin::Refusal(Kind::NetworkPolicy), problems };
            agent.send([make_own_node(), report].into_iter().chain(Kind::REQUIRED.map(Event::Synced))).await;
            agent.wait_unready(&["network policies are enforced", "deploy/rbac.yaml"]).await;
            assert!(is_enforced(sandbox), "what was enforced stays");
            agent.stop().await;
        });
    });
}

/// A release without policies has run since: its programs use other maps than the pinned ones.
#[test]
fn maps_that_the_running_programs_do_not_use_enforce_nothing() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(async {
            leave_enforced(sandbox).await;
            let pin = sandbox.bpffs.join(map::POLICY);
            let layout = sys::map_info(sys::obj_get(&pin).unwrap().as_fd()).unwrap().layout();
            let earlier = sys::map_create(map::POLICY, layout).unwrap();
            std::fs::remove_file(&pin).unwrap();
            sys::obj_pin(&pin, earlier.as_fd()).unwrap();
            let stale = Policies { generation: 41, flags: flags::ENFORCED };
            Map::<u32, Policies>::open(&sandbox.bpffs, map::POLICY).unwrap().put(&0, &stale).unwrap();
            // Nothing of the objects is known yet.
            let agent = Agent::start(sandbox.config(&[]));
            wait_until("nothing is enforced", || there(sandbox).state == Policies { generation: 42, flags: 0 }).await;
            agent.stop().await;
        });
    });
}

#[test]
fn what_somebody_else_changes_comes_back() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(async {
            let config = Config { audit_period: Duration::from_millis(50), ..sandbox.config(&[]) };
            let agent = start_with_policy(config).await;
            sandbox.add_pod("rnv1", ADDRESS);
            wait_until("the pod is decided", || entry(sandbox).is_some()).await;
            let before = there(sandbox);
            let pods = Map::<Addr, PolicyPod>::open(&sandbox.bpffs, map::POLICY_PODS).unwrap();
            pods.delete(&ADDRESS.parse::<IpAddr>().unwrap().into()).unwrap();
            wait_until("the entry is back", || there(sandbox).pods == before.pods).await;
            let repaired = format!("map=\"{}\"}} 1", map::POLICY_PODS);
            wait_until("it is counted", || agent.health.metrics.encode().unwrap().contains(&repaired)).await;
            agent.stop().await;
        });
    });
}
