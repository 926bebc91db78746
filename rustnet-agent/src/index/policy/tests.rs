mod oracle;

use super::world::{Flow, NODE, Random, World, passes};
use super::{DesiredPolicies, LocalInterface, Policies};
use crate::model::ObjectName;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use rustnet_common::policy::OPEN;
use serde_json::{Value, from_value, json};
use std::net::IpAddr;

/// The flows of which the maps say something else than the objects mean.
fn wrong(world: &World) -> Vec<Flow> {
    let maps = world.desired();
    let is_wrong = |flow: &Flow| passes(&maps, &world.interfaces, flow) != world.allows(flow);
    world.flows(world).into_iter().filter(is_wrong).collect()
}

#[test]
fn the_maps_say_what_the_objects_mean() {
    for seed in 0..1000 {
        let world = Random::new(seed).world();
        if wrong(&world).is_empty() {
            continue;
        }
        let world = world.shrink(|it| !wrong(it).is_empty());
        let flow = wrong(&world)[0];
        let (want, maps) = (world.allows(&flow), world.desired());
        let objects = json!([&world.namespaces, &world.pods, &world.policies]);
        panic!("seed {seed}: {flow:?} should pass: {want}\n{objects:#}\n{maps:#?}");
    }
}

/// What is remembered between two states changes nothing, nor does the order of events. So the next start computes the same.
#[test]
fn the_way_to_a_state_does_not_matter() {
    for seed in 0..300 {
        let mut random = Random::new(seed);
        let mut it = Policies::new(NODE.into());
        let mut world = random.world();
        for step in 0..6 {
            world.lead(&mut it);
            assert_eq!(it.desired(), world.desired(), "seed {seed}, step {step}");
            world = random.change(&world);
        }
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn policy(name: &str, spec: &Value) -> NetworkPolicy {
    from_value(json!({"metadata": {"name": name, "namespace": "a"}, "spec": spec})).unwrap()
}

/// `a/NAME` with labels `app=NAME`.
fn pod(name: &str, node: &str, ips: &[&str]) -> k8s_openapi::api::core::v1::Pod {
    let ips: Vec<Value> = ips.iter().map(|ip| json!({"ip": ip})).collect();
    from_value(json!({
        "metadata": {"name": name, "namespace": "a", "uid": format!("uid-{name}"), "labels": {"app": name}},
        "spec": {"nodeName": node, "containers": []}, "status": {"phase": "Running", "podIPs": ips},
    }))
    .unwrap()
}

/// Pods `db` here, `web` and `cache` elsewhere; `db` is for `web` only.
fn shop() -> World {
    let only_web = json!({
        "podSelector": {"matchLabels": {"app": "db"}},
        "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "web"}}}], "ports": [{"port": 5432}]}],
    });
    World {
        namespaces: vec![from_value(json!({"metadata": {"name": "a"}})).unwrap()],
        pods: vec![pod("db", NODE, &["10.0.0.1"]), pod("web", "n2", &["10.0.1.1"]), pod("cache", "n2", &["10.0.1.2"])],
        policies: vec![policy("db", &only_web)],
        interfaces: [(ip("10.0.0.1"), 11)].into(),
    }
}

#[test]
fn only_what_is_asked_for_is_in_the_maps() {
    let maps = shop().desired();
    assert_eq!(maps.pods.keys().copied().collect::<Vec<_>>(), [ip("10.0.0.1"), ip("10.0.1.1")]);
    let (db, web) = (maps.pods[&ip("10.0.0.1")], maps.pods[&ip("10.0.1.1")]);
    assert_eq!((db.class, db.egress, db.ifindex), (0, OPEN, 11));
    assert_eq!((web.ingress, web.egress, web.ifindex), (OPEN, OPEN, 0));
    let [(key, rule)] = maps.rules.iter().collect::<Vec<_>>()[..] else { panic!("{:?}", maps.rules) };
    assert_eq!((key.set, key.class), (db.ingress, web.class));
    assert_eq!(&*maps.rule_names[&rule.rule], "a/db ingress[0]");
    assert_eq!(maps.sets[&db.ingress], [ObjectName::namespaced("a", "db")].into());

    let mut elsewhere = shop();
    elsewhere.pods[0] = pod("db", "n2", &["10.0.1.9"]);
    elsewhere.interfaces.clear();
    let maps = elsewhere.desired();
    assert!(maps.is_enforced && maps.pods.is_empty() && maps.rules.is_empty(), "no policy selects a pod of this node");
    let nothing = World { policies: Vec::new(), ..shop() }.desired();
    assert_eq!(nothing, DesiredPolicies::default());
}

/// Pods of one workload are one set, whatever their number; allow-all is one entry.
#[test]
fn replicas_share_a_set() {
    let mut world = shop();
    for i in 0..30 {
        let address = format!("10.0.0.{}", i + 2);
        let mut replica = pod("db", NODE, &[&address]);
        replica.metadata.name = Some(format!("db-{i}"));
        world.pods.push(replica);
        world.interfaces.insert(ip(&address), i + 100);
    }
    assert_eq!((world.desired().pods.len(), world.desired().rules.len()), (32, 1));
    world.policies = vec![policy("all", &json!({"podSelector": {}, "ingress": [{}, {"from": [{"podSelector": {}}]}]}))];
    assert_eq!(world.desired().rules.len(), 1);
}

/// The kubelet writes a pod's addresses only after the pod is connected; its record names it before.
#[test]
fn a_record_of_an_interface_names_its_pod() {
    let mut world = shop();
    world.pods[0] = pod("db", NODE, &[]);
    let mut it = Policies::new(NODE.into());
    let decided = |it: &mut Policies, pod: Option<&str>, uid: &str| {
        let pod = pod.map(|name| ObjectName::namespaced("a", name));
        let interface = LocalInterface { ifindex: 11, pod, uid: uid.into() };
        it.set_interfaces([(ip("10.0.0.1"), interface)].into());
        it.desired().pods.get(&ip("10.0.0.1")).is_some_and(|pod| pod.ingress != OPEN && pod.ifindex == 11)
    };
    world.lead(&mut it);
    for (name, uid, want) in [
        (Some("db"), "uid-db", true),
        (Some("db"), "", true),
        (Some("db"), "an earlier one", false),
        (Some("web"), "", false),
        (Some("nobody"), "", false),
        (None, "", false),
    ] {
        assert_eq!(decided(&mut it, name, uid), want, "{name:?} {uid}");
    }
    // A manifest need not have a UID.
    let mut world = shop();
    world.pods[0] = pod("db", NODE, &[]);
    world.pods[0].metadata.uid = None;
    let mut it = Policies::new(NODE.into());
    world.lead(&mut it);
    assert!(decided(&mut it, Some("db"), "any"));
}

/// Until the news is complete nothing is allowed that only one of the pods is allowed.
#[test]
fn an_address_of_two_pods() {
    let mut world = shop();
    world.pods.push(pod("other", NODE, &["10.0.0.1"]));
    assert!(!world.desired().pods.contains_key(&ip("10.0.0.1")), "two pods here: closed");
    let mut world = shop();
    world.pods.push(pod("other", "n3", &["10.0.1.1"]));
    assert!(!world.desired().pods.contains_key(&ip("10.0.1.1")), "what holds for both is nothing");
    world.pods[3].metadata.labels = world.pods[1].metadata.labels.clone();
    assert!(world.desired().pods.contains_key(&ip("10.0.1.1")));
}

/// Its labels may be any.
#[test]
fn of_a_namespace_that_has_not_come_only_the_name_is_known() {
    for (selector, want) in [
        (json!({}), true),
        (json!({"matchLabels": {"kubernetes.io/metadata.name": "a"}}), true),
        (json!({"matchLabels": {"kubernetes.io/metadata.name": "b"}}), false),
        (json!({"matchExpressions": [{"key": "secret", "operator": "DoesNotExist"}]}), false),
    ] {
        let mut world = shop();
        world.namespaces.clear();
        let spec = json!({"podSelector": {}, "ingress": [{"from": [{"namespaceSelector": selector}]}]});
        world.policies = vec![policy("db", &spec)];
        let flow = Flow { client: ip("10.0.1.1"), server: ip("10.0.0.1"), proto: 6, port: 80 };
        assert_eq!(passes(&world.desired(), &world.interfaces, &flow), want, "{selector}");
    }
}

#[test]
fn only_news_makes_dirty() {
    let mut it = Policies::new(NODE.into());
    assert!(it.take_dirty(), "what the maps hold is not known");
    let nothing = World { policies: Vec::new(), ..shop() };
    nothing.lead(&mut it);
    assert!(!it.take_dirty(), "without a policy nothing follows from pods");
    shop().lead(&mut it);
    assert!(it.take_dirty() && !it.take_dirty());
    let (namespaces, pods, policies) = shop().objects();
    for policy in &policies {
        it.apply_policy(policy);
    }
    for pod in &pods {
        it.apply_pod(pod);
    }
    for namespace in &namespaces {
        it.apply_namespace(namespace);
    }
    assert!(!it.take_dirty());
    it.delete_pod(&pods[1].name);
    assert!(it.take_dirty());
}

#[test]
fn classes_have_texts() {
    let mut world = shop();
    let ingress = json!([
        {"from": [{"podSelector": {"matchLabels": {"app": "web"}}}, {"namespaceSelector": {}}]},
        {"from": [{"ipBlock": {"cidr": "10.0.1.0/24", "except": ["10.0.1.128/25"]}}]},
        {"from": (1..9).map(|i| json!({"ipBlock": {"cidr": format!("192.0.{i}.0/24")}})).collect::<Vec<_>>()},
    ]);
    world.policies = vec![policy("db", &json!({"podSelector": {"matchLabels": {"app": "db"}}, "ingress": ingress}))];
    let maps = world.desired();
    let texts = |ip: &str| maps.class_names[&maps.pods[&self::ip(ip)].class].texts.join("; ");
    assert_eq!(
        texts("10.0.1.1"),
        "pods of a with app in (web); pods of all namespaces; 10.0.1.0/24 except 10.0.1.128/25"
    );
    assert_eq!(texts("10.0.1.2"), "pods of all namespaces; 10.0.1.0/24 except 10.0.1.128/25");
    assert!(maps.class_names.values().all(|name| name.more == 0));
    let all: Vec<Value> = (8..24).map(|bits| json!({"ipBlock": {"cidr": format!("10.0.0.0/{bits}")}})).collect();
    world.policies = vec![policy("db", &json!({"podSelector": {}, "ingress": [{"from": all}]}))];
    let maps = world.desired();
    let name = &maps.class_names[&maps.pods[&ip("10.0.0.1")].class];
    assert_eq!((name.texts.len(), name.more), (8, 8));
}
