//! `policy.networking.k8s.io/ClusterNetworkPolicy`: what the pods of many namespaces may open and get, before or behind NetworkPolicies.
//!
//! A rule that is not understood fails closed, as the API says: one that accepts matches nothing, any other denies everything. A policy
//! whose tier or pods are not understood is for no pod.

use super::network_policy::policy_range;
use super::{BadName, Converter, Findings, port, reference};
use crate::model::{
    Action, ClusterNetworkPolicy, ClusterRule, PolicyPeer, PolicyPort, PolicyRule, Ports, Selector, Subject, Tier,
};
use crate::source::policy_api::{
    ClusterNetworkPolicy as KubeClusterNetworkPolicy, NamespacedPods, Peer, Port, Ports as KubePorts, Protocol, Rule,
    Spec,
};
use crate::source::{Event, Kind, Object};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use rustnet_common::tuple::proto;
use std::sync::Arc;

/// Characters of a rule's name at most (the API's bound).
const NAME: usize = 100;

/// What a rule is worth that is not understood.
const CLOSED: [(Action, &str); 3] = [
    (Action::Accept, "the rule accepts nothing"),
    (Action::Deny, "the rule denies everything"),
    (Action::Pass, "the rule denies everything"),
];

/// Where a finding is, and what is wrong there with its remedy, after a semicolon.
type Wrong = (String, String);

impl Converter {
    /// What an added or changed ClusterNetworkPolicy means.
    pub fn cluster_network_policy(&mut self, policy: &KubeClusterNetworkPolicy) -> Result<Event, BadName> {
        let object = reference(Kind::ClusterNetworkPolicy, &policy.metadata)?;
        let mut findings = Findings::new(&object);
        let Spec { tier, priority, subject, ingress, egress } = &policy.spec;
        let known_tier = match tier.as_str() {
            "Admin" => Some(Tier::Admin),
            "Baseline" => Some(Tier::Baseline),
            other => {
                findings.add(
                    "spec.tier",
                    format!("{other:?} is not a tier, the policy is for no pod; use Admin or Baseline"),
                );
                None
            }
        };
        let one_subject = self.pods_of(subject.namespaces.as_ref(), subject.pods.as_ref());
        let one_subject = one_subject.map_err(|(place, wrong)| {
            findings.add(format!("spec.subject{place}"), with_consequence(&wrong, "the policy is for no pod"));
        });
        let subject = known_tier.and(one_subject.ok());
        let mut rules = |given: &[Rule], direction: &str| -> Box<[ClusterRule]> {
            let rules = given.iter().enumerate();
            rules
                .map(|(i, rule)| self.cluster_rule(rule, direction, &format!("spec.{direction}[{i}]"), &mut findings))
                .collect()
        };
        let (ingress, egress) = (rules(ingress, "ingress"), rules(egress, "egress"));
        let policy = ClusterNetworkPolicy {
            name: object.name,
            tier: known_tier.unwrap_or(Tier::Baseline),
            priority: *priority,
            subject,
            ingress,
            egress,
            problems: findings.done(),
        };
        Ok(Event::Apply(Object::ClusterNetworkPolicy(Arc::new(policy))))
    }

    fn cluster_rule(&mut self, rule: &Rule, direction: &str, at: &str, findings: &mut Findings) -> ClusterRule {
        let action = match rule.action.as_str() {
            "Accept" => Action::Accept,
            "Deny" => Action::Deny,
            "Pass" => Action::Pass,
            other => {
                findings.add(
                    format!("{at}.action"),
                    format!("{other:?} is not an action, the rule denies; use Accept, Deny or Pass"),
                );
                Action::Deny
            }
        };
        let name = rule.name.as_deref().filter(|name| !name.is_empty());
        let name = name.map(|name| name.chars().take(NAME).collect::<String>().into());
        match self.matches(rule, direction) {
            Ok(matches) => ClusterRule { name, action, matches },
            Err((field, wrong)) => {
                let consequence = CLOSED.iter().find(|(it, _)| *it == action).map_or("", |(_, text)| text);
                findings.add(format!("{at}.{field}"), with_consequence(&wrong, consequence));
                let nothing = PolicyRule { peers: Some(Box::default()), ports: None };
                let everything = PolicyRule { peers: None, ports: None };
                match action {
                    Action::Accept => ClusterRule { name, action, matches: nothing },
                    Action::Deny | Action::Pass => ClusterRule { name, action: Action::Deny, matches: everything },
                }
            }
        }
    }

    fn matches(&mut self, rule: &Rule, direction: &str) -> Result<PolicyRule, Wrong> {
        let (field, given) = if direction == "ingress" { ("from", &rule.from) } else { ("to", &rule.to) };
        let given = given.as_deref().unwrap_or_default();
        if given.is_empty() {
            return Err((field.to_owned(), "names nobody; give at least one peer".to_owned()));
        }
        let mut peers = Vec::new();
        for (i, peer) in given.iter().enumerate() {
            let found = self.cluster_peer(peer, direction == "egress");
            peers.append(&mut found.map_err(|(inner, wrong)| (format!("{field}[{i}]{inner}"), wrong))?);
        }
        let Some(given) = &rule.protocols else { return Ok(PolicyRule { peers: Some(peers.into()), ports: None }) };
        if given.is_empty() {
            return Err(("protocols".to_owned(), "is empty; leave it out for all protocols".to_owned()));
        }
        let has_pods_alone = peers.iter().all(|peer| matches!(peer, PolicyPeer::Pods { .. }));
        let mut ports = Vec::new();
        for (i, protocol) in given.iter().enumerate() {
            let at = |(inner, wrong): Wrong| (format!("protocols[{i}]{inner}"), wrong);
            if protocol.destination_named_port.is_some() && !has_pods_alone {
                return Err(at((
                    ".destinationNamedPort".to_owned(),
                    "nodes and networks have no named ports; give a number".to_owned(),
                )));
            }
            self.cluster_ports(protocol, &mut ports).map_err(at)?;
        }
        Ok(PolicyRule { peers: Some(peers.into()), ports: Some(ports.into()) })
    }

    /// What a peer stands for; the error has the place within it.
    fn cluster_peer(&mut self, peer: &Peer, is_egress: bool) -> Result<Vec<PolicyPeer>, Wrong> {
        let Peer { namespaces, pods, nodes, networks, domain_names } = peer;
        match (namespaces, pods, nodes, networks, domain_names) {
            (Some(_), None, None, None, None) | (None, Some(_), None, None, None) => {
                let Subject { namespaces, pods } = self.pods_of(namespaces.as_ref(), pods.as_ref())?;
                Ok(vec![PolicyPeer::Pods { namespaces: Some(namespaces), pods }])
            }
            (None, None, Some(nodes), None, None) if is_egress => {
                Ok(vec![PolicyPeer::Nodes(self.strict(nodes, ".nodes")?)])
            }
            (None, None, None, Some(networks), None) if is_egress && !networks.is_empty() => {
                let networks = networks.iter().enumerate().map(|(i, text)| {
                    let cidr = policy_range(text).map_err(|wrong| {
                        (format!(".networks[{i}]"), wrong.replace(", the peer matches nothing", ""))
                    })?;
                    Ok(PolicyPeer::Block { cidr, except: Box::default() })
                });
                networks.collect()
            }
            (None, None, None, None, Some(_)) if is_egress => {
                Err((".domainNames".to_owned(), "is not served; give networks".to_owned()))
            }
            _ => {
                let fields = if is_egress { "namespaces, pods, nodes and networks" } else { "namespaces and pods" };
                Err((String::new(), format!("is not one of {fields}; give exactly one")))
            }
        }
    }

    /// Adds the ports that a protocol stands for; the error has the place within it.
    fn cluster_ports(&mut self, given: &Protocol, ports: &mut Vec<PolicyPort>) -> Result<(), Wrong> {
        let Protocol { tcp, udp, sctp, destination_named_port } = given;
        let numbers = |name: &str, proto: u8, of: &KubePorts| {
            let Some(port) = &of.destination_port else {
                return Err((format!(".{name}"), "has no destinationPort; give a number or a range".to_owned()));
            };
            let which = numbers(port).map_err(|(inner, wrong)| (format!(".{name}.destinationPort{inner}"), wrong))?;
            Ok::<_, Wrong>(PolicyPort { proto, ports: which })
        };
        match (tcp, udp, sctp, destination_named_port) {
            (Some(of), None, None, None) => ports.push(numbers("tcp", proto::TCP, of)?),
            (None, Some(of), None, None) => ports.push(numbers("udp", proto::UDP, of)?),
            (None, None, Some(of), None) => ports.push(numbers("sctp", proto::SCTP, of)?),
            (None, None, None, Some(name)) if !name.is_empty() => {
                let name = self.strings.intern(name);
                let of = |proto| PolicyPort { proto, ports: Ports::Named(Arc::clone(&name)) };
                ports.extend([proto::TCP, proto::UDP, proto::SCTP].map(of));
            }
            _ => {
                let wrong = "is not one of tcp, udp, sctp and destinationNamedPort; give exactly one";
                return Err((String::new(), wrong.to_owned()));
            }
        }
        Ok(())
    }

    /// All pods of namespaces, or some of them; the error has the place.
    fn pods_of(&mut self, namespaces: Option<&LabelSelector>, pods: Option<&NamespacedPods>) -> Result<Subject, Wrong> {
        match (namespaces, pods) {
            (Some(namespaces), None) => {
                let namespaces = self.strict(namespaces, ".namespaces")?;
                Ok(Subject { namespaces, pods: Selector::default() })
            }
            (None, Some(pods)) => {
                let namespaces = self.strict(&pods.namespace_selector, ".pods.namespaceSelector")?;
                let pods = self.strict(&pods.pod_selector, ".pods.podSelector")?;
                Ok(Subject { namespaces, pods })
            }
            _ => Err((String::new(), "is not one of namespaces and pods; give exactly one".to_owned())),
        }
    }

    /// A selector that is understood as a whole.
    fn strict(&mut self, given: &LabelSelector, at: &str) -> Result<Selector, Wrong> {
        let selector = self.whole_selector(given);
        selector.map_err(|(place, (cause, remedy))| (format!("{at}{place}"), format!("{cause}; {remedy}")))
    }
}

/// What is wrong, with what follows from it before the remedy.
fn with_consequence(wrong: &str, consequence: &str) -> String {
    let (cause, remedy) = wrong.split_once("; ").unwrap_or((wrong, "remove it"));
    format!("{cause}, {consequence}; {remedy}")
}

/// Ports of a protocol; the error has the place.
fn numbers(given: &Port) -> Result<Ports, Wrong> {
    let number =
        |at: &str, number: i32| port(number).map_err(|wrong| (at.to_owned(), wrong.replace(", it is left out", "")));
    match (given.number, &given.range) {
        (Some(one), None) => {
            let one = number(".number", one)?;
            Ok(Ports::Range(one, one))
        }
        (None, Some(range)) => {
            let (first, last) = (number(".range.start", range.start)?, number(".range.end", range.end)?);
            if last < first {
                return Err((".range.end".to_owned(), format!("{last} is below start {first}; give the last port")));
            }
            Ok(Ports::Range(first, last))
        }
        _ => Err((String::new(), "is not one of number and range; give exactly one".to_owned())),
    }
}

#[cfg(test)]
mod tests;
