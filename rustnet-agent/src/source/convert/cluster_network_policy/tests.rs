use crate::model::{ClusterNetworkPolicy, ClusterRule, PolicyPeer, Ports, Tier};
use crate::source::convert::Converter;
use crate::source::{Event, Object};
use serde_json::{Value, json};
use std::sync::Arc;

fn policy(spec: &Value) -> Arc<ClusterNetworkPolicy> {
    let object = serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": spec})).unwrap();
    match Converter::new().cluster_network_policy(&object) {
        Ok(Event::Apply(Object::ClusterNetworkPolicy(policy))) => policy,
        other => panic!("{other:?}"),
    }
}

fn text(rule: &ClusterRule) -> String {
    let peer = |peer: &PolicyPeer| match peer {
        PolicyPeer::Pods { namespaces, pods } => format!("{}/{pods}", namespaces.as_ref().unwrap()),
        PolicyPeer::Block { cidr, except } if except.is_empty() => cidr.to_string(),
        PolicyPeer::Nodes(selector) => format!("nodes {selector}"),
        PolicyPeer::Block { .. } => panic!("{peer:?}"),
    };
    let peers = rule.matches.peers.as_ref().map(|all| all.iter().map(peer).collect::<Vec<_>>().join(" | "));
    let ports = rule.matches.ports.as_ref().map(|all| {
        let port = |it: &crate::model::PolicyPort| match &it.ports {
            Ports::Any => format!("{}:*", it.proto),
            Ports::Range(first, last) => format!("{}:{first}-{last}", it.proto),
            Ports::Named(name) => format!("{}:{name}", it.proto),
        };
        all.iter().map(port).collect::<Vec<_>>().join(" ")
    });
    let name = rule.name.as_deref().unwrap_or("-");
    let (peers, ports) = (peers.as_deref().unwrap_or("any"), ports.as_deref().unwrap_or("any"));
    format!("{name} {:?} {peers}; {ports}", rule.action)
}

/// An egress rule of a policy, and what was wrong with the policy.
fn egress(rule: &Value) -> (String, Vec<String>) {
    let it = policy(&json!({"tier": "Admin", "subject": {"namespaces": {}}, "egress": [rule]}));
    (text(&it.egress[0]), it.problems.iter().map(ToString::to_string).collect())
}

#[test]
fn all_fields() {
    let it = policy(&json!({
        "tier": "Baseline", "priority": 7,
        "subject": {"pods": {"namespaceSelector": {"matchLabels": {"n": "1"}}, "podSelector": {"matchLabels": {"p": "2"}}}},
        "ingress": [{"name": "first", "action": "Pass", "from": [{"namespaces": {}}]}],
        "egress": [
            {"action": "Accept", "to": [{"pods": {"namespaceSelector": {}, "podSelector": {"matchLabels": {"a": "b"}}}}],
             "protocols": [{"tcp": {"destinationPort": {"range": {"start": 1, "end": 65535}}}}, {"udp": {"destinationPort": {"number": 53}}}, {"destinationNamedPort": "web"}]},
            {"action": "Deny", "to": [{"nodes": {"matchLabels": {"z": "1"}}}, {"networks": ["10.0.0.0/8", "fd00::/8"]}],
             "protocols": [{"sctp": {"destinationPort": {"range": {"start": 1, "end": 9}}}}]},
        ],
    }));
    let subject = it.subject.as_ref().unwrap();
    assert_eq!((it.tier, it.priority, it.name.as_str()), (Tier::Baseline, 7, "p"));
    assert_eq!((subject.namespaces.to_string(), subject.pods.to_string()), ("n in (1)".into(), "p in (2)".into()));
    assert_eq!(text(&it.ingress[0]), "first Pass /; any");
    assert_eq!(text(&it.egress[0]), "- Accept /a in (b); 6:1-65535 17:53-53 6:web 17:web 132:web");
    assert_eq!(text(&it.egress[1]), "- Deny nodes z in (1) | 10.0.0.0/8 | fd00::/8; 132:1-9");
    assert!(it.problems.is_empty());
}

/// "For Accept rules: treat the rule as matching no traffic. For Deny and Pass rules: treat the rule as a Deny all rule."
#[test]
fn a_rule_that_is_not_understood_fails_closed() {
    let pods = json!([{"namespaces": {}}]);
    let operator = json!([{"namespaces": {"matchExpressions": [{"key": "k", "operator": "Is"}]}}]);
    for (to, protocols, place) in [
        (json!([]), Value::Null, "egress[0].to: names nobody"),
        (json!([{"namespaces": {}}, {}]), Value::Null, "egress[0].to[1]: is not one of"),
        (json!([{"somethingNew": {}}]), Value::Null, "egress[0].to[0]: is not one of"),
        (json!([{"namespaces": {}, "nodes": {}}]), Value::Null, "egress[0].to[0]: is not one of"),
        (json!([{"domainNames": ["example.org"]}]), Value::Null, "egress[0].to[0].domainNames: is not served"),
        (json!([{"networks": ["10.0.0.0/8", "10.0.0.0"]}]), Value::Null, "egress[0].to[0].networks[1]: "),
        (json!([{"networks": ["::ffff:10.0.0.0/104"]}]), Value::Null, "egress[0].to[0].networks[0]: "),
        (json!([{"networks": []}]), Value::Null, "egress[0].to[0]: is not one of"),
        (operator, Value::Null, "egress[0].to[0].namespaces.matchExpressions[0].operator: \"Is\" is not an operator"),
        (pods.clone(), json!([]), "egress[0].protocols: is empty"),
        (pods.clone(), json!([{}]), "egress[0].protocols[0]: is not one of"),
        (pods.clone(), json!([{"tcp": {}, "udp": {}}]), "egress[0].protocols[0]: is not one of"),
        (pods.clone(), json!([{"tcp": {}}]), "egress[0].protocols[0].tcp: has no destinationPort"),
        (pods.clone(), json!([{"tcp": {"destinationPort": {}}}]), "egress[0].protocols[0].tcp.destinationPort: is not"),
        (
            pods.clone(),
            json!([{"tcp": {"destinationPort": {"number": 0}}}]),
            "protocols[0].tcp.destinationPort.number: ",
        ),
        (
            pods.clone(),
            json!([{"udp": {"destinationPort": {"range": {"start": 9, "end": 1}}}}]),
            "protocols[0].udp.destinationPort.range.end: 1 is below start 9",
        ),
        (
            json!([{"networks": ["10.0.0.0/8"]}]),
            json!([{"destinationNamedPort": "web"}]),
            "protocols[0].destinationNamedPort: nodes and networks have no named ports",
        ),
    ] {
        for (action, want, consequence) in [
            ("Accept", "- Accept ; any", "the rule accepts nothing"),
            ("Deny", "- Deny any; any", "the rule denies everything"),
            ("Pass", "- Deny any; any", "the rule denies everything"),
        ] {
            let mut rule = json!({"action": action, "to": to});
            if !protocols.is_null() {
                rule["protocols"] = protocols.clone();
            }
            let (text, problems) = egress(&rule);
            let [problem] = &problems[..] else { panic!("{rule}: {problems:?}") };
            assert_eq!(text, want, "{rule}");
            let is_named = problem.starts_with("ClusterNetworkPolicy p: spec.") && problem.contains(place);
            assert!(is_named && problem.contains(consequence) && problem.contains("; "), "{rule}: {problem}");
        }
    }
    let (text, problems) = egress(&json!({"action": "Allow", "to": [{"namespaces": {}}]}));
    assert_eq!((text.as_str(), problems.len()), ("- Deny /; any", 1), "an action that is not known");
}

/// Whose pods they are is not known then: closing them all would close the cluster for a slip.
#[test]
fn a_policy_whose_pods_or_tier_are_not_understood_is_for_no_pod() {
    let wrong = json!({"namespaces": {"matchExpressions": [{"key": "k", "operator": "Is", "values": ["v"]}]}});
    let both = json!({"namespaces": {}, "pods": {"namespaceSelector": {}, "podSelector": {}}});
    for (tier, subject, place) in [
        ("Admin", json!({}), "spec.subject: is not one of"),
        ("Admin", both, "spec.subject: is not one of"),
        ("Admin", wrong, "spec.subject.namespaces.matchExpressions[0].operator: "),
        ("Edge", json!({"namespaces": {}}), "spec.tier: \"Edge\" is not a tier"),
    ] {
        let it = policy(
            &json!({"tier": tier, "subject": subject, "ingress": [{"action": "Deny", "from": [{"namespaces": {}}]}]}),
        );
        let [problem] = &it.problems[..] else { panic!("{:?}", it.problems) };
        assert!(it.subject.is_none() && problem.to_string().contains(place), "{problem}");
        assert!(problem.message.contains("the policy is for no pod"), "{problem}");
    }
}

/// Peers of ingress are pods alone.
#[test]
fn ingress_has_no_nodes_and_no_networks() {
    for peer in [json!({"nodes": {}}), json!({"networks": ["10.0.0.0/8"]}), json!({"domainNames": ["a.example"]})] {
        let it = policy(&json!({
            "tier": "Admin", "subject": {"namespaces": {}}, "ingress": [{"action": "Deny", "from": [peer]}],
        }));
        assert_eq!((text(&it.ingress[0]).as_str(), it.problems.len()), ("- Deny any; any", 1), "{peer}");
    }
}
