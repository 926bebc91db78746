mod oracle;

use super::world::{Flow, NODE, Random, World, passes, without_audit};
use super::{DesiredPolicies, LocalInterface, Policies};
use crate::model::ObjectName;
use crate::source::convert::POLICY_AUDIT;
use crate::source::policy_api::ClusterNetworkPolicy as KubeClusterPolicy;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use rustnet_common::policy::OPEN;
use serde_json::{Value, from_value, json};
use std::net::IpAddr;

/// The flows of which the maps say something else than the objects mean.
fn wrong(world: &World) -> Vec<Flow> {
    let maps = world.desired();
    let enforcing = without_audit(&maps);
    let is_wrong = |flow: &Flow| {
        let of = |maps: &DesiredPolicies| passes(maps, &world.interfaces, flow);
        of(&maps) != world.allows(flow) || (of(&maps) && !of(&enforcing)) != world.is_audited(flow)
    };
    world.flows(world).into_iter().filter(is_wrong).collect()
}

#[test]
fn the_maps_say_what_the_objects_mean() {
    for seed in 0..1000 {
        let world = Random::new(seed).whole_world();
        if wrong(&world).is_empty() {
            continue;
        }
        let world = world.shrink(|it| !wrong(it).is_empty());
        let flow = wrong(&world)[0];
        let (want, maps) = (world.allows(&flow), world.desired());
        let objects = json!([&world.namespaces, &world.pods, &world.policies, &world.cluster, &world.nodes]);
        panic!("seed {seed}: {flow:?} should pass: {want}\n{objects:#}\n{maps:#?}");
    }
}

/// Audited are the pods of the namespace alone, and only flows that policies deny are reported.
#[test]
fn an_audited_namespace_denies_nothing() {
    let mut world = World { interfaces: [(ip("10.0.1.1"), 11), (ip("10.0.1.2"), 12)].into(), ..World::default() };
    world.namespaces = vec![from_value(json!({"metadata": {"name": "a"}})).unwrap()];
    world.pods = vec![pod("db", NODE, &["10.0.1.1"]), pod("web", NODE, &["10.0.1.2"])];
    let ports = json!([{"port": 80}]);
    let spec = json!({"podSelector": {"matchLabels": {"app": "db"}}, "ingress": [{"ports": ports}]});
    world.policies = vec![policy("db", &spec)];
    let find = |world: &World, port| {
        let maps = world.desired();
        let flow = Flow { client: ip("10.0.1.2"), server: ip("10.0.1.1"), proto: 6, port };
        [passes(&maps, &world.interfaces, &flow), passes(&without_audit(&maps), &world.interfaces, &flow)]
    };
    let enforced = world.desired();
    assert_eq!((find(&world, 80), find(&world, 81)), ([true, true], [false, false]));
    world.namespaces[0].metadata.annotations = Some([(POLICY_AUDIT.to_owned(), "true".to_owned())].into());
    assert_eq!((find(&world, 80), find(&world, 81)), ([true, true], [true, false]));
    assert!(enforced.sets.keys().all(|set| !world.desired().sets.contains_key(set)), "one set would be both");
    let mut it = Policies::new(NODE.into());
    world.lead(&mut it);
    assert!(it.take_dirty() && !it.take_dirty());
    world.namespaces[0].metadata.annotations = None;
    world.lead(&mut it);
    assert!(it.take_dirty(), "the annotation alone has changed");
    assert_eq!(it.desired(), enforced);
}

/// What is remembered between two states changes nothing, nor does the order of events. So the next start computes the same.
#[test]
fn the_way_to_a_state_does_not_matter() {
    for seed in 0..300 {
        let mut random = Random::new(seed);
        let mut it = Policies::new(NODE.into());
        let mut world = random.whole_world();
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
        ..World::default()
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

/// A policy of the cluster for all pods of namespace `a`.
fn cluster_policy(name: &str, tier: &str, priority: i32, ingress: &Value) -> KubeClusterPolicy {
    let subject = json!({"namespaces": {"matchLabels": {"kubernetes.io/metadata.name": "a"}}});
    let spec = json!({"tier": tier, "priority": priority, "subject": subject, "ingress": ingress});
    from_value(json!({"metadata": {"name": name}, "spec": spec})).unwrap()
}

/// [`shop`] on two nodes, without its policy.
fn cluster_shop(cluster: Vec<KubeClusterPolicy>) -> World {
    let node = |name: &str, cidr: &str| {
        let object = json!({"metadata": {"name": name}, "spec": {"podCIDRs": [cidr]},
                            "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]}});
        from_value(object).unwrap()
    };
    let nodes = vec![node(NODE, "10.0.0.0/24"), node("n2", "10.0.1.0/24")];
    let labels = json!({"metadata": {"name": "a", "labels": {"kubernetes.io/metadata.name": "a"}}});
    World { policies: Vec::new(), cluster, nodes, namespaces: vec![from_value(labels).unwrap()], ..shop() }
}

fn to_db(client: &str, port: u16) -> Flow {
    Flow { client: ip(client), server: ip("10.0.0.1"), proto: 6, port }
}

fn deny_web() -> Value {
    json!([{"name": "no web", "action": "Deny", "from": [{"pods": {
        "namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "web"}}}}]}])
}

/// What is denied by its labels must not pass before they are known: an address of pods may be any pod's.
#[test]
fn who_is_not_known_yet_is_denied_what_any_pod_is() {
    let world = cluster_shop(vec![cluster_policy("c", "Admin", 1, &deny_web())]);
    let maps = world.desired();
    let may = |client| passes(&maps, &world.interfaces, &to_db(client, 80));
    assert_eq!([may("10.0.1.1"), may("10.0.1.2")], [false, true], "web is denied, cache is not");
    assert!(!may("10.0.1.77"), "an address of the pod ranges that no pod has");
    assert!(may("198.51.100.1"), "an address outside is no pod");
    assert_eq!(maps.rule_names.values().next().map(|name| &**name), Some("ClusterNetworkPolicy/c ingress[0] no web"));

    // A rule that accepts counts only for known pods.
    let accept =
        json!([{"action": "Accept", "from": [{"namespaces": {}}]}, {"action": "Deny", "from": [{"namespaces": {}}]}]);
    let world = cluster_shop(vec![cluster_policy("c", "Admin", 1, &accept)]);
    let maps = world.desired();
    let may = |client| passes(&maps, &world.interfaces, &to_db(client, 80));
    assert_eq!([may("10.0.1.1"), may("10.0.1.77")], [true, false]);

    // A pass before what accepts: the API's own advice for rules about networks. The NetworkPolicy behind it denies.
    let pass = json!([{"action": "Pass", "to": [{"namespaces": {}}]}, {"action": "Accept", "to": [{"networks": ["0.0.0.0/0"]}]}]);
    let spec = json!({"tier": "Admin", "subject": {"namespaces": {}}, "egress": pass});
    let mut world = cluster_shop(vec![from_value(json!({"metadata": {"name": "c"}, "spec": spec})).unwrap()]);
    let closing = json!({"podSelector": {"matchLabels": {"app": "db"}}, "policyTypes": ["Egress"]});
    world.policies = vec![policy("db", &closing)];
    let maps = world.desired();
    let may = |server: &str| {
        let flow = Flow { client: ip("10.0.0.1"), server: ip(server), proto: 6, port: 80 };
        passes(&maps, &world.interfaces, &flow)
    };
    assert_eq!([may("10.0.1.1"), may("10.0.1.77"), may("198.51.100.1")], [false, false, true]);

    // Where no rule denies pods, nobody is in doubt, and pods that no selector has need no entry.
    let networks = json!([{"action": "Accept", "from": [{"namespaces": {}}]}]);
    let world = cluster_shop(vec![cluster_policy("c", "Admin", 1, &networks)]);
    let maps = world.desired();
    assert!(passes(&maps, &world.interfaces, &to_db("10.0.1.77", 80)) && maps.cidrs.is_empty());
}

/// The labels of a namespace decide which policies of the cluster select its pods.
#[test]
fn pods_wait_for_their_namespace_while_there_are_policies_of_the_cluster() {
    let mut world = cluster_shop(vec![cluster_policy("c", "Baseline", 1, &deny_web())]);
    let decided = |world: &World| world.desired().pods.contains_key(&ip("10.0.0.1"));
    assert!(decided(&world));
    world.namespaces.clear();
    assert!(!decided(&world), "closed until it comes");
    world.cluster.clear();
    world.policies = shop().policies;
    assert!(decided(&world), "NetworkPolicies are of a namespace by its name");
}

/// A pod of another node whose namespace is not known may be of the denied ones.
#[test]
fn a_pod_whose_namespace_is_not_known_may_be_any_of_its_labels() {
    let of_team = |labels: Value| {
        json!([{"action": "Deny", "from": [{"pods": {
            "namespaceSelector": {"matchLabels": {"team": "x"}}, "podSelector": {"matchLabels": labels}}}]}])
    };
    for (labels, is_denied) in [(json!({}), true), (json!({"app": "web"}), true), (json!({"app": "db"}), false)] {
        let mut world = cluster_shop(vec![cluster_policy("c", "Admin", 1, &of_team(labels))]);
        assert!(passes(&world.desired(), &world.interfaces, &to_db("10.0.1.1", 80)), "its namespace is of no team");
        world.pods[1].metadata.namespace = Some("b".to_owned());
        let passes = passes(&world.desired(), &world.interfaces, &to_db("10.0.1.1", 80));
        assert_eq!(passes, !is_denied, "its namespace has not come");
    }
}

/// While two pods claim an address, either may be the denied one.
#[test]
fn an_address_of_two_pods_has_what_either_is_denied() {
    let mut world = cluster_shop(vec![cluster_policy("c", "Admin", 1, &deny_web())]);
    world.pods.push(pod("other", "n3", &["10.0.1.1"]));
    assert!(!passes(&world.desired(), &world.interfaces, &to_db("10.0.1.1", 80)));
    world.pods.remove(1);
    assert!(passes(&world.desired(), &world.interfaces, &to_db("10.0.1.1", 80)));

    // Of one selector that holds for both, the number of a named port is either's.
    let named = json!([{"action": "Deny", "to": [{"namespaces": {}}], "protocols": [{"destinationNamedPort": "web"}]}]);
    let spec = json!({"tier": "Admin", "subject": {"namespaces": {}}, "egress": named});
    let mut world = cluster_shop(vec![from_value(json!({"metadata": {"name": "c"}, "spec": spec})).unwrap()]);
    world.pods.push(pod("other", "n3", &["10.0.1.1"]));
    for (place, port) in [(1, 80), (3, 8080)] {
        let containers = json!([{"name": "c", "ports": [{"name": "web", "containerPort": port}]}]);
        world.pods[place].spec.as_mut().unwrap().containers = from_value(containers).unwrap();
    }
    let maps = world.desired();
    for (port, want) in [(80, false), (8080, false)] {
        let flow = Flow { client: ip("10.0.0.1"), server: ip("10.0.1.1"), proto: 6, port };
        assert_eq!(passes(&maps, &world.interfaces, &flow), want, "{port}");
    }
}

/// The order of tiers and priorities, and what a pass does.
#[test]
fn precedence() {
    let rule = |action: &str| json!([{"action": action, "from": [{"namespaces": {}}]}]);
    let closing = || policy("db", &json!({"podSelector": {"matchLabels": {"app": "db"}}}));
    let opening = || policy("db", &json!({"podSelector": {"matchLabels": {"app": "db"}}, "ingress": [{}]}));
    for (cluster, namespaced, want, decides) in [
        (vec![("a", "Admin", 2, "Deny"), ("b", "Admin", 1, "Accept")], None, true, "b"),
        (vec![("a", "Admin", 1, "Deny"), ("b", "Admin", 1, "Accept")], None, false, "a"),
        (vec![("a", "Admin", 1, "Accept")], Some(closing()), true, "a"),
        (vec![("a", "Admin", 1, "Deny")], Some(opening()), false, "a"),
        (vec![("a", "Admin", 1, "Pass"), ("b", "Admin", 2, "Deny")], None, true, ""),
        (vec![("a", "Admin", 1, "Pass"), ("b", "Admin", 2, "Accept")], Some(closing()), false, ""),
        (vec![("a", "Admin", 1, "Pass"), ("b", "Baseline", 0, "Deny")], None, false, "b"),
        (vec![("a", "Baseline", 1, "Deny")], Some(opening()), true, "db"),
        (vec![("a", "Baseline", 1, "Accept")], Some(closing()), false, ""),
        (vec![("a", "Baseline", 1, "Pass"), ("b", "Baseline", 2, "Deny")], None, true, ""),
    ] {
        let objects =
            cluster.iter().map(|(name, tier, priority, action)| cluster_policy(name, tier, *priority, &rule(action)));
        let world = World { policies: namespaced.into_iter().collect(), ..cluster_shop(objects.collect()) };
        let maps = world.desired();
        assert_eq!(passes(&maps, &world.interfaces, &to_db("10.0.1.1", 80)), want, "{cluster:?}");
        assert_eq!(world.allows(&to_db("10.0.1.1", 80)), want, "{cluster:?}: the plain reading");
        let db = maps.pods[&ip("10.0.0.1")];
        let class = maps.pods[&ip("10.0.1.1")].class;
        let of_class = |class| maps.rules.iter().find(|(key, _)| (key.set, key.class) == (db.ingress, class));
        let rule = of_class(class).or_else(|| of_class(0)).map_or(0, |(_, rule)| rule.rule);
        let name = maps.rule_names.get(&rule).map_or("", |name| name.as_ref());
        assert!(
            if decides.is_empty() { rule == 0 } else { name.contains(&format!("/{decides} ")) },
            "{cluster:?}: {name}"
        );
        // Audit opens what the tiers behind that of Admin deny.
        let mut audited = world.clone();
        for namespace in &mut audited.namespaces {
            namespace.metadata.annotations = Some([(POLICY_AUDIT.to_owned(), "true".to_owned())].into());
        }
        let by_admin = |it: &(&str, &str, i32, &str)| (it.0, it.1, it.3) == (decides, "Admin", "Deny");
        let passes = passes(&audited.desired(), &world.interfaces, &to_db("10.0.1.1", 80));
        assert_eq!(passes, !cluster.iter().any(by_admin), "{cluster:?}, audited");
    }
}

/// Nodes come and go, and change their labels.
#[test]
fn nodes_as_peers() {
    let egress = json!([{"action": "Deny", "to": [{"nodes": {"matchLabels": {"zone": "b"}}}]}]);
    let mut world = cluster_shop(Vec::new());
    let spec = json!({"tier": "Admin", "subject": {"namespaces": {}}, "egress": egress});
    world.cluster = vec![from_value(json!({"metadata": {"name": "c"}, "spec": spec})).unwrap()];
    let to_node = Flow { client: ip("10.0.0.1"), server: ip("192.0.2.1"), proto: 6, port: 443 };
    let mut it = Policies::new(NODE.into());
    world.lead(&mut it);
    assert!(passes(&it.desired(), &world.interfaces, &to_node));
    assert!(it.take_dirty());
    world.nodes[0].metadata.labels = Some([("zone".to_owned(), "b".to_owned())].into());
    world.lead(&mut it);
    assert!(it.take_dirty() && !passes(&it.desired(), &world.interfaces, &to_node));
    world.lead(&mut it);
    assert!(!it.take_dirty(), "the same again");
    it.delete_node(&ObjectName::cluster(NODE));
    assert!(it.take_dirty() && passes(&it.desired(), &world.interfaces, &to_node));
}
