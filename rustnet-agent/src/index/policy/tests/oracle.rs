//! The maps against cyclonus' reading of the objects.

use super::super::world::{DIFFERENCES, Difference, Flow, NODE, Oracle, Random, World, passes};
use super::ip;
use serde_json::{Value, from_value, json};

/// Most flows per world.
const FLOWS: usize = 128;

/// The flows of which the maps say something else than cyclonus, with its verdict.
fn wrong(world: &World, flows: &[Flow], verdicts: &[bool]) -> Vec<(Flow, bool)> {
    let maps = world.desired();
    let all = flows.iter().copied().zip(verdicts.iter().copied());
    all.filter(|(flow, want)| passes(&maps, &world.interfaces, flow) != *want).collect()
}

#[test]
fn the_maps_say_what_cyclonus_reads() {
    let oracle = Oracle::start();
    let (mut all, mut allowed) = (0, 0);
    for seed in 10_000..11_000 {
        let mut random = Random::new(seed);
        let world = random.world();
        let flows = random.flows(&world, FLOWS);
        let verdicts = oracle.allows(&world, &flows);
        all += flows.len();
        allowed += verdicts.iter().filter(|it| **it).count();
        if wrong(&world, &flows, &verdicts).is_empty() {
            continue;
        }
        let all_wrong = |it: &World| {
            let flows = it.flows_of_pods();
            wrong(it, &flows, &oracle.allows(it, &flows))
        };
        let world = world.shrink(|it| !all_wrong(it).is_empty());
        let (flow, want) = all_wrong(&world)[0];
        let objects = json!([&world.namespaces, &world.pods, &world.policies]);
        panic!("seed {seed}: {flow:?} should pass: {want}\n{objects:#}\n{:#?}", world.desired());
    }
    assert!((all / 10..all * 9 / 10).contains(&allowed), "of {all} flows {allowed} may be opened");
}

/// One pod here with a policy, one elsewhere, and the flow from there.
fn pair(rule: &Value, labels: &Value, ports: &Value) -> (World, Flow) {
    let pod = |name: &str, node: &str, address: &str| {
        from_value(json!({
            "metadata": {"name": name, "namespace": "a", "labels": labels},
            "spec": {"nodeName": node, "containers": [{"name": "c", "ports": ports}]},
            "status": {"phase": "Running", "podIPs": [{"ip": address}]},
        }))
        .unwrap()
    };
    let policy = json!({"metadata": {"name": "q", "namespace": "a"}, "spec": {"podSelector": {}, "ingress": [rule]}});
    let world = World {
        namespaces: vec![from_value(json!({"metadata": {"name": "a"}})).unwrap()],
        pods: vec![pod("p0", NODE, "10.0.0.1"), pod("p1", "n2", "10.0.1.1")],
        policies: vec![from_value(policy).unwrap()],
        interfaces: [(ip("10.0.0.1"), 30)].into(),
        ..World::default()
    };
    (world, Flow { client: ip("10.0.1.1"), server: ip("10.0.0.1"), proto: 6, port: 80 })
}

/// Each exclusion is for something that cyclonus does, and for nothing else: a version that does it no more fails here.
#[test]
fn cyclonus_still_differs_where_it_is_asked_in_other_words() {
    let oracle = Oracle::start();
    let not_in = json!({"matchExpressions": [{"key": "k", "operator": "NotIn", "values": ["x"]}]});
    let both_names = json!([
        {"name": "web", "containerPort": 80, "protocol": "TCP"}, {"name": "dns", "containerPort": 80, "protocol": "TCP"},
    ]);
    for (difference, rule, ports, want) in [
        (Difference::NotInWithoutKey, json!({"from": [{"podSelector": not_in}]}), json!([]), true),
        (Difference::EmptyValue, json!({"from": [{"podSelector": {"matchLabels": {"k": ""}}}]}), json!([]), false),
        (Difference::SeveralNames, json!({"ports": [{"port": "dns"}]}), both_names, true),
    ] {
        let (world, flow) = pair(&rule, &json!({"l": "y"}), &ports);
        let others: Vec<Difference> = DIFFERENCES.into_iter().filter(|it| *it != difference).collect();
        assert_eq!(passes(&world.desired(), &world.interfaces, &flow), want, "{difference:?}");
        assert_eq!(oracle.allows(&world, &[flow]), [want], "{difference:?}");
        assert_eq!(oracle.allows_reworded(&world, &[flow], &others), [!want], "{difference:?}");
    }
}
