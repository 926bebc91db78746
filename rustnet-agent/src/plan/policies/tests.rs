use super::{
    DesiredPolicies, MemoryPolicyMaps, PolicyCapacities, PolicyMaps, PolicyPlanner, PolicySnapshot, PolicyWrite,
};
use crate::index::policy::world::{Flow, NODE, Random, World, passes, without_audit};
use crate::source::convert::POLICY_AUDIT;
use rustnet_common::policy::flags::ENFORCED;
use serde_json::json;
use std::collections::BTreeMap;
use std::net::IpAddr;

const PLENTY: PolicyCapacities = PolicyCapacities { pods: 10_000, cidrs: 10_000, rules: 100_000 };

fn maps(held: &PolicySnapshot) -> DesiredPolicies {
    let PolicySnapshot { state, pods, cidrs, rules } = held.clone();
    DesiredPolicies { pods, cidrs, rules, is_enforced: state.flags & ENFORCED != 0, ..DesiredPolicies::default() }
}

/// What the maps hold after some change from nothing.
fn applied(desired: DesiredPolicies, capacities: PolicyCapacities) -> (PolicyPlanner, MemoryPolicyMaps) {
    let mut planner = PolicyPlanner::adopt(PolicySnapshot::default(), capacities);
    let mut maps = MemoryPolicyMaps::new(PolicySnapshot::default(), capacities);
    maps.apply(&planner.plan(desired)).unwrap();
    (planner, maps)
}

/// What goes wrong on the way between two worlds, whose pods are those of the second.
fn wrong(from: &World, to: &World, flows: &[Flow], capacities: PolicyCapacities) -> Option<String> {
    let (mut planner, mut memory) = applied(from.desired(), capacities);
    let interfaces: BTreeMap<IpAddr, u32> = to.interfaces.clone();
    let verdicts = |held: &PolicySnapshot, interfaces: &BTreeMap<IpAddr, u32>| {
        let maps = maps(held);
        flows.iter().map(|flow| passes(&maps, interfaces, flow)).collect::<Vec<bool>>()
    };
    // What passes by audit alone is to be reported when that changes.
    let silent = |held: &PolicySnapshot, interfaces: &BTreeMap<IpAddr, u32>| {
        let maps = without_audit(&maps(held));
        flows.iter().map(|flow| passes(&maps, interfaces, flow)).collect::<Vec<bool>>()
    };
    let (old, generation) = (verdicts(memory.held(), &interfaces), memory.held().state.generation);
    // Flows are known from before pods came to their addresses. Of pods that are not decided the plan says nothing.
    let decided = to.desired().pods;
    let mut before = to.interfaces.clone();
    before.retain(|ip, ifindex| {
        from.interfaces.contains_key(ip) || decided.get(ip).is_none_or(|pod| pod.ifindex != *ifindex)
    });
    let (known, known_silent) = (verdicts(memory.held(), &before), silent(memory.held(), &before));
    let writes = planner.plan(to.desired());
    let mut states = Vec::new();
    for write in &writes {
        if let Err(error) = memory.apply(std::slice::from_ref(write)) {
            return Some(format!("{error} by {write:?} of {writes:#?}"));
        }
        states.push(verdicts(memory.held(), &interfaces));
    }
    if memory.held() != planner.held() {
        return Some("the maps are not as planned".to_owned());
    }
    let new = verdicts(memory.held(), &interfaces);
    let new_silent = silent(memory.held(), &interfaces);
    let known = known.iter().chain(&known_silent).zip(new.iter().chain(&new_silent));
    let has_lost = known.into_iter().any(|(known, new)| *known && !*new);
    if has_lost && memory.held().state.generation == generation {
        return Some(format!("known flows go on: {writes:#?}"));
    }
    let raised = writes.iter().rposition(|write| matches!(write, PolicyWrite::PutState { .. })).unwrap_or(writes.len());
    for state in &states[raised.min(states.len())..] {
        if let Some(i) = (0..flows.len()).find(|i| state[*i] && !new[*i]) {
            return Some(format!("{:?} is judged again too early: {writes:#?}", flows[i]));
        }
    }
    for (number, state) in states.iter().enumerate() {
        for (i, passes) in state.iter().enumerate() {
            let is_wrong = if capacities == PLENTY {
                old[i] == new[i] && *passes != old[i]
            } else {
                *passes && !old[i] && !new[i]
            };
            if is_wrong {
                let now = format!("{:#?}", &writes[..=number]);
                return Some(format!(
                    "{:?} passes: {passes}, before and after: {}, after\n{now}of\n{writes:#?}",
                    flows[i], old[i]
                ));
            }
        }
    }
    None
}

fn some_flows(random: &mut Random, from: &World, to: &World) -> Vec<Flow> {
    let flows = from.flows(to);
    flows.into_iter().filter(|_| random.once_in(3)).collect()
}

#[test]
fn no_flow_is_judged_otherwise_than_before_or_after() {
    for seed in 0..250 {
        let mut random = Random::new(seed);
        let from = random.whole_world();
        let to = if random.once_in(5) { random.whole_world() } else { random.change(&from) };
        let flows = some_flows(&mut random, &from, &to);
        if wrong(&from, &to, &flows, PLENTY).is_none() {
            continue;
        }
        let to = to.shrink(|to| wrong(&from, to, &flows, PLENTY).is_some());
        let from = from.shrink(|from| wrong(from, &to, &flows, PLENTY).is_some());
        let what = wrong(&from, &to, &flows, PLENTY).unwrap();
        panic!("seed {seed}: {what}\nfrom {:#?}\nto {:#?}", from.desired(), to.desired());
    }
}

/// With little room pods may be closed for the moment, but never open.
#[test]
fn little_room_opens_nothing() {
    for seed in 0..120 {
        let mut random = Random::new(seed);
        let from = random.whole_world();
        let to = random.change(&from);
        let size = |world: &World| {
            let DesiredPolicies { pods, cidrs, rules, .. } = world.desired();
            [pods.len() as u32, cidrs.len() as u32, rules.len() as u32]
        };
        let (a, b) = (size(&from), size(&to));
        // Room for either state and a little more: a full trie takes nothing.
        let [pods, cidrs, rules] = [0, 1, 2].map(|i| a[i].max(b[i]) + 1 + random.below(3) as u32);
        let capacities = PolicyCapacities { pods, cidrs, rules };
        let flows = some_flows(&mut random, &from, &to);
        let what = wrong(&from, &to, &flows, capacities);
        assert_eq!(what, None, "seed {seed}");
    }
}

/// The next agent finds what a crash left, and goes on.
#[test]
fn a_crash_after_any_write() {
    for seed in 0..60 {
        let mut random = Random::new(seed);
        let worlds = [random.whole_world(), random.whole_world(), random.whole_world()];
        let (mut planner, mut memory) = applied(worlds[0].desired(), PLENTY);
        for world in &worlds[1..] {
            let writes = planner.plan(world.desired());
            memory.crash_after(random.below(writes.len() + 1));
            let has_crashed = memory.apply(&writes).is_err();
            let held = memory.snapshot().unwrap();
            memory = MemoryPolicyMaps::new(held.clone(), PLENTY);
            let mut same = PolicyPlanner::read_back(held.clone(), PLENTY);
            let generation = held.state.generation;
            assert!(has_crashed || same.plan(world.desired()).is_empty(), "seed {seed}: the same again is nothing");
            planner = PolicyPlanner::adopt(held, PLENTY);
            memory.apply(&planner.plan(world.desired())).unwrap();
            let DesiredPolicies { pods, cidrs, rules, is_enforced, .. } = world.desired();
            let held = memory.held();
            // The write that has known flows judged again may be the one that was lost.
            assert!(
                !is_enforced || held.state.generation != generation,
                "seed {seed}: known flows are not judged again"
            );
            assert_eq!((&held.pods, &held.cidrs, &held.rules), (&pods, &cidrs, &rules), "seed {seed}");
            assert_eq!(held.state.flags & ENFORCED != 0, is_enforced);
        }
    }
}

fn object<T: serde::de::DeserializeOwned>(value: serde_json::Value) -> T {
    serde_json::from_value(value).unwrap()
}

fn pod(namespace: &str, name: &str, node: &str, ip: &str) -> k8s_openapi::api::core::v1::Pod {
    object(json!({
        "metadata": {"name": name, "namespace": namespace}, "spec": {"nodeName": node, "containers": []},
        "status": {"phase": "Running", "podIPs": [{"ip": ip}]},
    }))
}

/// Egress of one pod opens while ingress of the other, whose set stays, closes by the labels of a namespace.
#[test]
fn two_halves_of_two_states_do_not_make_a_way() {
    let world = |team: &str, to: serde_json::Value| World {
        namespaces: vec![
            object(json!({"metadata": {"name": "a", "labels": {"team": team}}})),
            object(json!({"metadata": {"name": "b"}})),
        ],
        pods: vec![
            pod("a", "p", NODE, "10.0.0.1"),
            pod("a", "elsewhere", "n2", "10.0.1.1"),
            pod("b", "q", NODE, "10.0.0.2"),
        ],
        policies: vec![
            object(json!({"metadata": {"name": "egress", "namespace": "a"}, "spec": {
                "podSelector": {}, "policyTypes": ["Egress"], "egress": to,
            }})),
            object(json!({"metadata": {"name": "ingress", "namespace": "b"}, "spec": {"podSelector": {}, "ingress": [
                {"from": [{"namespaceSelector": {"matchLabels": {"team": "x"}}}]},
            ]}})),
        ],
        interfaces: [("10.0.0.1".parse().unwrap(), 11), ("10.0.0.2".parse().unwrap(), 12)].into(),
        ..World::default()
    };
    let (closed, open) = (world("x", json!([])), world("y", json!([{}])));
    for (from, to) in [(&closed, &open), (&open, &closed)] {
        assert_eq!(wrong(from, to, &from.flows(to), PLENTY), None);
    }
}

/// What holds goes on, a pod that would get a set without room is closed or keeps its own, and the policy is named.
#[test]
fn a_set_without_room_fails_closed() {
    let world = |ports: u16| {
        let ports: Vec<_> = (0..ports).map(|port| json!({"port": 2 * port + 1})).collect();
        World {
            namespaces: vec![object(json!({"metadata": {"name": "a"}})), object(json!({"metadata": {"name": "b"}}))],
            pods: vec![pod("a", "p", NODE, "10.0.0.1"), pod("b", "q", NODE, "10.0.0.2")],
            policies: vec![
                object(
                    json!({"metadata": {"name": "few", "namespace": "b"}, "spec": {"podSelector": {}, "ingress": [{}]}}),
                ),
                object(json!({"metadata": {"name": "many", "namespace": "a"},
                              "spec": {"podSelector": {}, "ingress": [{"ports": ports}]}})),
            ],
            interfaces: [("10.0.0.1".parse().unwrap(), 11), ("10.0.0.2".parse().unwrap(), 12)].into(),
            ..World::default()
        }
    };
    let room = PolicyCapacities { pods: 10, cidrs: 10, rules: 10 };
    let flow = |server: &str, port| Flow {
        client: "192.0.2.1".parse().unwrap(),
        server: server.parse().unwrap(),
        proto: 6,
        port,
    };
    let (mut planner, mut memory) = applied(world(3).desired(), room);
    assert_eq!(planner.problems(), []);
    memory.apply(&planner.plan(world(30).desired())).unwrap();
    let problems: Vec<String> = planner.problems().iter().map(ToString::to_string).collect();
    assert!(
        matches!(&problems[..], [it] if it.starts_with("NetworkPolicy a/many: ") && it.contains("raise policy-rule-entries"))
    );
    let judge = |memory: &MemoryPolicyMaps, server, port| {
        passes(&maps(memory.held()), &world(1).interfaces, &flow(server, port))
    };
    assert!(judge(&memory, "10.0.0.1", 5) && !judge(&memory, "10.0.0.1", 7), "it keeps what it was allowed");
    assert!(judge(&memory, "10.0.0.2", 80));
    memory.apply(&planner.plan(world(4).desired())).unwrap();
    assert!(judge(&memory, "10.0.0.1", 7));
    assert!(matches!(planner.problems(), [it] if it.message.contains("more than half")), "{:?}", planner.problems());
    memory.apply(&planner.plan(world(3).desired())).unwrap();
    assert_eq!(planner.problems(), []);

    let (_, memory) = applied(world(30).desired(), room);
    assert!(!judge(&memory, "10.0.0.1", 5), "closed: it was allowed nothing before");
    assert!(judge(&memory, "10.0.0.2", 80));

    // What was audited allowed all, and is kept by what is audited alone.
    let audited = |ports| {
        let mut world = world(ports);
        world.namespaces[0].metadata.annotations = Some([(POLICY_AUDIT.to_owned(), "true".to_owned())].into());
        world
    };
    let (mut planner, mut memory) = applied(audited(3).desired(), room);
    memory.apply(&planner.plan(audited(30).desired())).unwrap();
    assert!(judge(&memory, "10.0.0.1", 6), "audited as before");
    memory.apply(&planner.plan(world(30).desired())).unwrap();
    assert!(!judge(&memory, "10.0.0.1", 6) && !judge(&memory, "10.0.0.1", 5), "closed");
    memory.apply(&planner.plan(world(3).desired())).unwrap();
    assert!(!judge(&memory, "10.0.0.1", 6) && judge(&memory, "10.0.0.1", 5));
}

/// A range that a policy denies must not become one that nothing denies.
#[test]
fn what_denies_without_room_closes_its_pods() {
    let world = |ranges: u8| {
        let networks: Vec<_> = (0..ranges).map(|i| format!("192.0.2.{}/32", 2 * i)).collect();
        let rule = |networks: &[String]| json!({"action": "Deny", "to": [{"networks": networks}]});
        let rules: Vec<_> = networks.chunks(25).map(rule).collect();
        World {
            namespaces: vec![object(json!({"metadata": {"name": "a"}})), object(json!({"metadata": {"name": "b"}}))],
            pods: vec![pod("a", "p", NODE, "10.0.0.1"), pod("b", "q", NODE, "10.0.0.2")],
            policies: vec![object(
                json!({"metadata": {"name": "few", "namespace": "b"}, "spec": {"podSelector": {}, "ingress": [{}]}}),
            )],
            cluster: vec![object(json!({"metadata": {"name": "no-world"}, "spec": {
                "tier": "Admin", "subject": {"pods": {"namespaceSelector": {}, "podSelector": {
                    "matchExpressions": [{"key": "free", "operator": "DoesNotExist"}]}}}, "egress": rules,
            }}))],
            interfaces: [("10.0.0.1".parse().unwrap(), 11), ("10.0.0.2".parse().unwrap(), 12)].into(),
            ..World::default()
        }
    };
    let room = PolicyCapacities { pods: 10, cidrs: 10, rules: 100 };
    let free = |mut world: World| {
        world.pods[1].metadata.labels = Some([("free".to_owned(), String::new())].into());
        world
    };
    let flow = |client: &str, server: &str| Flow {
        client: client.parse().unwrap(),
        server: server.parse().unwrap(),
        proto: 6,
        port: 443,
    };
    let judge = |memory: &MemoryPolicyMaps, client: &str, server: &str| {
        passes(&maps(memory.held()), &world(1).interfaces, &flow(client, server))
    };
    let (mut planner, mut memory) = applied(free(world(3)).desired(), room);
    assert_eq!(planner.problems(), []);
    assert!(!judge(&memory, "10.0.0.1", "192.0.2.4") && judge(&memory, "10.0.0.1", "192.0.2.5"));
    memory.apply(&planner.plan(free(world(30)).desired())).unwrap();
    for i in 0..30 {
        assert!(!judge(&memory, "10.0.0.1", &format!("192.0.2.{}", 2 * i)), "{i}");
    }
    assert!(judge(&memory, "10.0.0.2", "192.0.2.4"), "a pod that the policy does not select");
    let problems: Vec<String> = planner.problems().iter().map(ToString::to_string).collect();
    let is_named =
        |it: &&String| it.starts_with("ClusterNetworkPolicy no-world: ") && it.contains("its pods are closed");
    assert_eq!(problems.iter().filter(is_named).count(), 1, "{problems:?}");
    memory.apply(&planner.plan(free(world(3)).desired())).unwrap();
    assert!(judge(&memory, "10.0.0.1", "192.0.2.5"), "open again");
}

/// A policy of the cluster for the pods of a namespace that denies some ingress.
fn denying(rules: &serde_json::Value) -> World {
    World {
        namespaces: vec![object(json!({"metadata": {"name": "a"}}))],
        pods: vec![pod("a", "w", NODE, "10.0.0.1"), pod("a", "bad", "n2", "10.9.0.1")],
        cluster: vec![object(json!({"metadata": {"name": "c"}, "spec": {
            "tier": "Admin", "subject": {"namespaces": {}}, "ingress": rules,
        }}))],
        interfaces: [("10.0.0.1".parse().unwrap(), 11)].into(),
        ..World::default()
    }
}

fn from_pods(labels: &serde_json::Value) -> serde_json::Value {
    json!([{"pods": {"namespaceSelector": {}, "podSelector": {"matchLabels": labels}}}])
}

/// Rules that do not fit leave those of before, which have nothing for the classes that selectors of the new ones make.
#[test]
fn rules_that_stay_do_not_open_to_other_classes() {
    let labelled = |mut world: World| {
        world.pods[1].metadata.labels =
            Some([("role", "bad"), ("tier", "x")].map(|(k, v)| (k.to_owned(), v.to_owned())).into());
        world
    };
    let deny_bad = json!({"action": "Deny", "from": from_pods(&json!({"role": "bad"}))});
    let ports: Vec<_> = (0..25).map(|i| json!({"tcp": {"destinationPort": {"number": 2 * i + 1}}})).collect();
    let many = json!({"action": "Deny", "from": from_pods(&json!({"tier": "x"})), "protocols": ports});
    let (few, more) = (labelled(denying(&json!([deny_bad]))), labelled(denying(&json!([many, deny_bad]))));
    let room = PolicyCapacities { pods: 10, cidrs: 10, rules: 10 };
    let flow = Flow { client: "10.9.0.1".parse().unwrap(), server: "10.0.0.1".parse().unwrap(), proto: 6, port: 80 };
    let (mut planner, mut memory) = applied(few.desired(), room);
    let judge = |memory: &MemoryPolicyMaps| passes(&maps(memory.held()), &few.interfaces, &flow);
    assert!(!judge(&memory) && planner.problems().is_empty());
    memory.apply(&planner.plan(more.desired())).unwrap();
    assert!(!judge(&memory), "{:?}", planner.problems());
}

/// What a pod opened before its labels were known is judged again once they are.
#[test]
fn a_pod_that_comes_has_its_flows_judged_again_where_it_is_denied() {
    let rules = json!([{"action": "Deny", "from": from_pods(&json!({"role": "bad"}))}]);
    for (role, is_denied) in [("bad", true), ("good", false)] {
        let mut all = denying(&rules);
        all.pods[1].metadata.labels = Some([("role".to_owned(), role.to_owned())].into());
        let mut before = all.clone();
        before.pods.pop();
        // No Node has its address in a range.
        let flow =
            Flow { client: "10.9.0.1".parse().unwrap(), server: "10.0.0.1".parse().unwrap(), proto: 6, port: 80 };
        assert_eq!(wrong(&before, &all, &[flow], PLENTY), None, "{role}");
        let (mut planner, mut memory) = applied(before.desired(), PLENTY);
        let generation = memory.held().state.generation;
        memory.apply(&planner.plan(all.desired())).unwrap();
        assert_eq!(memory.held().state.generation != generation, is_denied, "{role}");
    }
}

/// What a policy of the cluster denies does not wait for room, whatever a NetworkPolicy allowed before.
#[test]
fn denials_without_room_close_their_pods() {
    let allow =
        || object(json!({"metadata": {"name": "all", "namespace": "a"}, "spec": {"podSelector": {}, "ingress": [{}]}}));
    let ports: Vec<_> = (0..25).map(|i| json!({"tcp": {"destinationPort": {"number": 2 * i + 1}}})).collect();
    let deny = json!({"action": "Deny", "from": from_pods(&json!({"role": "bad"}))});
    let many = json!({"action": "Deny", "from": from_pods(&json!({"tier": "x"})), "protocols": ports});
    let labels = [("role", "bad"), ("tier", "x")].map(|(key, value)| (key.to_owned(), value.to_owned()));
    let with_labels = |mut world: World| {
        world.pods[1].metadata.labels = Some(labels.clone().into());
        World { policies: vec![allow()], ..world }
    };
    let few = World { cluster: Vec::new(), ..with_labels(denying(&json!([]))) };
    let more = with_labels(denying(&json!([many, deny])));
    let room = PolicyCapacities { pods: 10, cidrs: 10, rules: 10 };
    let flow = Flow { client: "10.9.0.1".parse().unwrap(), server: "10.0.0.1".parse().unwrap(), proto: 6, port: 80 };
    let (mut planner, mut memory) = applied(few.desired(), room);
    let judge = |memory: &MemoryPolicyMaps| passes(&maps(memory.held()), &few.interfaces, &flow);
    assert!(judge(&memory));
    memory.apply(&planner.plan(more.desired())).unwrap();
    let problems: Vec<String> = planner.problems().iter().map(ToString::to_string).collect();
    assert!(!judge(&memory), "{problems:?}");
    assert!(
        problems.iter().any(|it| it.starts_with("ClusterNetworkPolicy c: ") && it.contains("closed")),
        "{problems:?}"
    );
}
