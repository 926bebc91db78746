use crate::model::{NetworkPolicy, PolicyPeer, PolicyRule, Ports};
use crate::source::convert::Converter;
use crate::source::{Event, Object};
use serde_json::{Value, json};
use std::sync::Arc;

fn policy(spec: &Value) -> Arc<NetworkPolicy> {
    let object = json!({"metadata": {"name": "p", "namespace": "shop"}, "spec": spec});
    match Converter::new().network_policy(&serde_json::from_value(object).unwrap()) {
        Ok(Event::Apply(Object::NetworkPolicy(policy))) => policy,
        other => panic!("{other:?}"),
    }
}

fn peer(peer: &PolicyPeer) -> String {
    match peer {
        PolicyPeer::Pods { namespaces: None, pods } => format!("pods[{pods}]"),
        PolicyPeer::Pods { namespaces: Some(namespaces), pods } => format!("namespaces[{namespaces}] pods[{pods}]"),
        PolicyPeer::Block { cidr, except } => {
            let except: Vec<String> = except.iter().map(ToString::to_string).collect();
            format!("{cidr}-[{}]", except.join(","))
        }
        PolicyPeer::Nodes(selector) => format!("nodes[{selector}]"),
    }
}

fn rules(rules: Option<&[PolicyRule]>) -> String {
    let Some(rules) = rules else { return "-".to_owned() };
    let rule = |rule: &PolicyRule| {
        let peers = rule.peers.as_ref().map(|all| all.iter().map(peer).collect::<Vec<_>>().join(" | "));
        let ports = rule.ports.as_ref().map(|all| {
            let port = |it: &crate::model::PolicyPort| match &it.ports {
                Ports::Any => format!("{}:*", it.proto),
                Ports::Range(first, last) => format!("{}:{first}-{last}", it.proto),
                Ports::Named(name) => format!("{}:{name}", it.proto),
            };
            all.iter().map(port).collect::<Vec<_>>().join(" | ")
        });
        format!("{}; {}", peers.as_deref().unwrap_or("any"), ports.as_deref().unwrap_or("any"))
    };
    rules.iter().map(rule).collect::<Vec<_>>().join(" || ")
}

#[test]
fn directions_and_defaults() {
    for (spec, ingress, egress) in [
        (json!({}), "", "-"),
        (json!({"podSelector": {}, "ingress": [], "egress": []}), "", "-"),
        (json!({"podSelector": {}, "ingress": [{}]}), "any; any", "-"),
        (json!({"podSelector": {}, "egress": [{}]}), "", "any; any"),
        (json!({"podSelector": {}, "policyTypes": ["Egress"]}), "-", ""),
        (json!({"podSelector": {}, "policyTypes": ["Egress"], "ingress": [{}]}), "-", ""),
        (json!({"podSelector": {}, "policyTypes": ["Ingress"], "egress": [{}]}), "", "-"),
        (json!({"podSelector": {}, "policyTypes": ["Egress", "Ingress"]}), "", ""),
    ] {
        let it = policy(&spec);
        assert_eq!(
            (rules(it.ingress.as_deref()).as_str(), rules(it.egress.as_deref()).as_str()),
            (ingress, egress),
            "{spec}"
        );
        assert!(it.problems.is_empty(), "{spec}");
        assert_eq!((it.name.as_str(), it.selector.to_string().as_str()), ("shop/p", ""));
    }
}

#[test]
fn peers_and_ports() {
    for (rule, want) in [
        (json!({"from": [], "ports": []}), "any; any"),
        (json!({"from": [{"podSelector": {}}]}), "pods[]; any"),
        (json!({"from": [{"podSelector": {"matchLabels": {"b": "2", "a": "1"}}}]}), "pods[a in (1),b in (2)]; any"),
        (
            json!({"from": [{"namespaceSelector": {}}, {"ipBlock": {"cidr": "10.1.2.3/8"}}]}),
            "namespaces[] pods[] | 10.0.0.0/8-[]; any",
        ),
        (
            json!({"from": [{"namespaceSelector": {"matchExpressions": [{"key": "k", "operator": "NotIn", "values": ["y", "x"]}]},
                             "podSelector": {"matchExpressions": [{"key": "a", "operator": "Exists"},
                                                                  {"key": "b", "operator": "DoesNotExist"}]}}]}),
            "namespaces[k notin (x,y)] pods[a,!b]; any",
        ),
        (
            json!({"from": [{"ipBlock": {"cidr": "2001:db8::/32", "except": ["2001:db8:2::/48", "2001:db8:1::/48"]}}]}),
            "2001:db8::/32-[2001:db8:1::/48,2001:db8:2::/48]; any",
        ),
        (json!({"ports": [{}, {"protocol": "UDP"}]}), "any; 6:* | 17:*"),
        (json!({"ports": [{"port": 80}, {"port": "web", "protocol": "SCTP"}]}), "any; 6:80-80 | 132:web"),
        (json!({"ports": [{"port": 80, "endPort": 80}, {"port": 1, "endPort": 65535}]}), "any; 6:80-80 | 6:1-65535"),
    ] {
        let ingress = policy(&json!({"ingress": [&rule]}));
        assert_eq!(rules(ingress.ingress.as_deref()), want, "{rule}");
        let to = serde_json::from_str::<Value>(&rule.to_string().replace("\"from\"", "\"to\"")).unwrap();
        let egress = policy(&json!({"policyTypes": ["Egress"], "egress": [to]}));
        assert_eq!(rules(egress.egress.as_deref()), want, "{rule}");
        assert!(ingress.problems.is_empty() && egress.problems.is_empty());
    }
}

#[test]
fn a_bad_peer_or_port_matches_nothing() {
    let except =
        |except: &str| json!({"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16", except]}}]});
    let operator = |operator: &str, values: &Value| json!({"from": [{"podSelector": {"matchExpressions": [{"key": "a", "operator": operator, "values": values}]}}]});
    for (rule, want, at, remedy) in [
        (json!({"from": [{}]}), "; any", "from[0]: ", "write podSelector"),
        (json!({"from": [{}, {"podSelector": {}}]}), "pods[]; any", "from[0]: ", "write podSelector"),
        (json!({"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}, "podSelector": {}}]}), "; any", "from[0]: ", "two peers"),
        (json!({"from": [{"ipBlock": {"cidr": "10.0.0.0/33"}}]}), "; any", "from[0].ipBlock.cidr: ", "write it like"),
        (
            json!({"from": [{"ipBlock": {"cidr": "::ffff:10.0.0.0/104"}}]}),
            "; any",
            "from[0].ipBlock.cidr: ",
            "write the IPv4 range",
        ),
        (except("11.0.0.0/16"), "; any", "from[0].ipBlock.except[1]: ", "a smaller range inside"),
        (except("10.0.0.0/8"), "; any", "from[0].ipBlock.except[1]: ", "a smaller range inside"),
        (except("fd00::/16"), "; any", "from[0].ipBlock.except[1]: ", "a smaller range inside"),
        (except("x"), "; any", "from[0].ipBlock.except[1]: ", "write it like"),
        (operator("in", &json!(["x"])), "; any", "from[0].podSelector.matchExpressions[0].operator: ", "use In"),
        (operator("In", &json!([])), "; any", "from[0].podSelector.matchExpressions[0].values: ", "at least one"),
        (operator("NotIn", &json!(null)), "; any", "from[0].podSelector.matchExpressions[0].values: ", "at least one"),
        (operator("Exists", &json!(["x"])), "; any", "from[0].podSelector.matchExpressions[0].values: ", "remove"),
        (json!({"ports": [{"port": 80, "endPort": 79}]}), "any; ", "ports[0].endPort: ", "give the last port"),
        (json!({"ports": [{"endPort": 79}]}), "any; ", "ports[0].endPort: ", "write the first port"),
        (json!({"ports": [{"port": "web", "endPort": 79}]}), "any; ", "ports[0].endPort: ", "as a number"),
        (json!({"ports": [{"port": 0}, {"port": 1}]}), "any; 6:1-1", "ports[0].port: ", "use 1-65535"),
        (json!({"ports": [{"port": ""}]}), "any; ", "ports[0].port: ", "a number or a name"),
        (json!({"ports": [{"protocol": "ICMP"}]}), "any; ", "ports[0].protocol: ", "use TCP, UDP or SCTP"),
    ] {
        let it = policy(&json!({"ingress": [&rule]}));
        assert_eq!(rules(it.ingress.as_deref()), want, "{rule}");
        assert_eq!(it.problems.len(), 1, "{rule}: {:?}", it.problems);
        let problem = it.problems[0].to_string();
        assert!(problem.starts_with(&format!("NetworkPolicy shop/p: spec.ingress[0].{at}")), "{problem}");
        assert!(problem.contains(remedy), "{problem}");
    }
}

/// Pods that it may have meant are closed rather than open.
#[test]
fn a_policy_whose_selector_is_bad_allows_nothing() {
    let it = policy(&json!({
        "podSelector": {"matchLabels": {"app": "db"}, "matchExpressions": [{"key": "a", "operator": "Is"}]},
        "ingress": [{}], "egress": [{}],
    }));
    assert_eq!(it.selector.to_string(), "app in (db)");
    assert_eq!((it.ingress.as_deref(), it.egress.as_deref()), (Some(&[][..]), Some(&[][..])));
    assert!(it.problems[0].message.contains("the policy allows nothing"), "{:?}", it.problems);
    let it = policy(&json!({"policyTypes": ["Exgress"], "ingress": [{}]}));
    assert_eq!(rules(it.ingress.as_deref()), "any; any");
    assert!(it.problems[0].message.contains("use Ingress and Egress"), "{:?}", it.problems);
}
