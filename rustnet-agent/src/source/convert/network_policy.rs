//! `networking.k8s.io/v1/NetworkPolicy`: what the pods that it selects may open and get.
//!
//! What cannot be understood allows nothing: a peer or a port of a rule is left out, and a rule without any is kept, empty. A
//! selector of the policy's own pods keeps the requirements that are understood, and the policy allows nothing then.

use super::{BadName, Converter, Findings, protocol, range, reference};
use crate::model::{NetworkPolicy, PolicyPeer, PolicyPort, PolicyRule, Ports, Requirement, Selector, Wanted};
use crate::source::{Event, Kind, Object};
use ipnet::IpNet;
use k8s_openapi::api::networking::v1::{
    IPBlock, NetworkPolicy as KubeNetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use std::sync::Arc;

/// The place of what is not understood within its field, the cause, and a remedy.
pub(super) type Misunderstood = (String, (String, &'static str));

/// The IPv4 addresses as IPv6 sockets show them.
const MAPPED: &str = "::ffff:0:0/96";

impl Converter {
    /// What an added or changed NetworkPolicy means.
    pub fn network_policy(&mut self, policy: &KubeNetworkPolicy) -> Result<Event, BadName> {
        let object = reference(Kind::NetworkPolicy, &policy.metadata)?;
        let mut findings = Findings::new(&object);
        let empty = NetworkPolicySpec::default();
        let spec = policy.spec.as_ref().unwrap_or(&empty);
        let given = spec.pod_selector.as_ref();
        let (selector, is_understood) = given.map_or((Selector::default(), true), |given| {
            self.selector(given, "spec.podSelector", "the policy allows nothing", &mut findings)
        });
        let (has_ingress, has_egress) = directions(spec, &mut findings);

        let ingress = has_ingress.then(|| {
            let rules = spec.ingress.iter().flatten().enumerate().filter(|_| is_understood);
            let rules = rules.map(|(i, rule)| {
                self.rule(
                    rule.from.as_deref(),
                    rule.ports.as_deref(),
                    &format!("spec.ingress[{i}]"),
                    "from",
                    &mut findings,
                )
            });
            rules.collect()
        });
        let egress = has_egress.then(|| {
            let rules = spec.egress.iter().flatten().enumerate().filter(|_| is_understood);
            let rules = rules.map(|(i, rule)| {
                self.rule(rule.to.as_deref(), rule.ports.as_deref(), &format!("spec.egress[{i}]"), "to", &mut findings)
            });
            rules.collect()
        });
        let policy = NetworkPolicy { name: object.name, selector, ingress, egress, problems: findings.done() };
        Ok(Event::Apply(Object::NetworkPolicy(Arc::new(policy))))
    }

    /// A rule whose field `peers_field` has its peers. Lists that are absent or empty stand for anything.
    fn rule(
        &mut self,
        peers: Option<&[NetworkPolicyPeer]>,
        ports: Option<&[NetworkPolicyPort]>,
        at: &str,
        peers_field: &str,
        findings: &mut Findings,
    ) -> PolicyRule {
        let peers = peers.filter(|peers| !peers.is_empty()).map(|peers| {
            let peers = peers.iter().enumerate();
            peers.filter_map(|(i, peer)| self.peer(peer, &format!("{at}.{peers_field}[{i}]"), findings)).collect()
        });
        let ports = ports.filter(|ports| !ports.is_empty()).map(|ports| {
            let mut kept = Vec::new();
            for (i, port) in ports.iter().enumerate() {
                match self.policy_port(port) {
                    Ok(port) => kept.push(port),
                    Err((field, wrong)) => findings.add(format!("{at}.ports[{i}].{field}"), wrong),
                }
            }
            kept.into()
        });
        PolicyRule { peers, ports }
    }

    fn peer(&mut self, given: &NetworkPolicyPeer, at: &str, findings: &mut Findings) -> Option<PolicyPeer> {
        if let Some(block) = &given.ip_block {
            if given.pod_selector.is_some() || given.namespace_selector.is_some() {
                findings.add(at, "ipBlock with a selector matches nothing; make them two peers");
                return None;
            }
            return self::block(block)
                .map_err(|(field, wrong)| findings.add(format!("{at}.ipBlock.{field}"), wrong))
                .ok();
        }
        if given.pod_selector.is_none() && given.namespace_selector.is_none() {
            findings.add(at, "empty, it matches nothing; write podSelector, namespaceSelector or ipBlock");
            return None;
        }
        let mut is_understood = true;
        let mut selector = |given: Option<&LabelSelector>, field: &str| {
            given.map(|given| {
                let (selector, is_well) =
                    self.selector(given, &format!("{at}.{field}"), "it matches nothing", findings);
                is_understood &= is_well;
                selector
            })
        };
        let namespaces = selector(given.namespace_selector.as_ref(), "namespaceSelector");
        let pods = selector(given.pod_selector.as_ref(), "podSelector").unwrap_or_default();
        is_understood.then_some(PolicyPeer::Pods { namespaces, pods })
    }

    /// A selector of the requirements that are understood, and whether these are all.
    fn selector(
        &mut self,
        given: &LabelSelector,
        at: &str,
        consequence: &str,
        findings: &mut Findings,
    ) -> (Selector, bool) {
        let mut requirements = Vec::new();
        let mut is_understood = true;
        for requirement in self.requirements(given) {
            match requirement {
                Ok(requirement) => requirements.push(requirement),
                Err((place, (cause, remedy))) => {
                    is_understood = false;
                    findings.add(format!("{at}{place}"), format!("{cause}, {consequence}; {remedy}"));
                }
            }
        }
        (Selector::new(requirements), is_understood)
    }

    /// A selector that is understood as a whole; the error has the place of what is not, what is wrong with it, and a remedy.
    pub(super) fn whole_selector(&mut self, given: &LabelSelector) -> Result<Selector, Misunderstood> {
        Ok(Selector::new(self.requirements(given).into_iter().collect::<Result<_, _>>()?))
    }

    /// The requirements of a selector, or what is wrong with them.
    fn requirements(&mut self, given: &LabelSelector) -> Vec<Result<Requirement, Misunderstood>> {
        let mut all = Vec::new();
        for (key, value) in given.match_labels.iter().flatten() {
            let wanted = Wanted::In([self.strings.intern(value)].into());
            all.push(Ok(Requirement::new(self.strings.intern(key), wanted)));
        }
        for (i, expression) in given.match_expressions.iter().flatten().enumerate() {
            let requirement = self.requirement(expression);
            all.push(requirement.map_err(|(field, wrong)| (format!(".matchExpressions[{i}].{field}"), wrong)));
        }
        all
    }

    /// A requirement; the error has the field, what is wrong with it, and a remedy.
    fn requirement(
        &mut self,
        given: &LabelSelectorRequirement,
    ) -> Result<Requirement, (&'static str, (String, &'static str))> {
        let values: Box<[Arc<str>]> = given.values.iter().flatten().map(|value| self.strings.intern(value)).collect();
        let has_values = !values.is_empty();
        let wanted = match (given.operator.as_str(), has_values) {
            ("In", true) => Wanted::In(values),
            ("NotIn", true) => Wanted::NotIn(values),
            ("Exists", false) => Wanted::Exists,
            ("DoesNotExist", false) => Wanted::DoesNotExist,
            ("In" | "NotIn", false) => {
                return Err(("values", (format!("{} has no values", given.operator), "write at least one value")));
            }
            ("Exists" | "DoesNotExist", true) => {
                return Err(("values", (format!("{} has values", given.operator), "remove the values")));
            }
            (other, _) => {
                let cause = format!("{other:?} is not an operator");
                return Err(("operator", (cause, "use In, NotIn, Exists or DoesNotExist")));
            }
        };
        Ok(Requirement::new(self.strings.intern(&given.key), wanted))
    }

    /// Ports of a rule; the error has the field, and what is wrong with it.
    fn policy_port(&mut self, given: &NetworkPolicyPort) -> Result<PolicyPort, (&'static str, String)> {
        let proto = protocol(given.protocol.as_deref()).map_err(|wrong| ("protocol", wrong))?;
        let number = |field, number| super::port(number).map_err(|wrong| (field, wrong));
        let ports = match (&given.port, given.end_port) {
            (None, None) => Ports::Any,
            (Some(IntOrString::Int(first)), None) => {
                let first = number("port", *first)?;
                Ports::Range(first, first)
            }
            (Some(IntOrString::Int(first)), Some(last)) => {
                let (first, last) = (number("port", *first)?, number("endPort", last)?);
                if last < first {
                    return Err((
                        "endPort",
                        format!("{last} is below port {first}, it matches nothing; give the last port"),
                    ));
                }
                Ports::Range(first, last)
            }
            (Some(IntOrString::String(name)), None) if !name.is_empty() => Ports::Named(self.strings.intern(name)),
            (Some(IntOrString::String(_)), None) => {
                return Err(("port", "the name is empty, it matches nothing; write a number or a name".to_owned()));
            }
            (None, Some(_)) => {
                return Err(("endPort", "without port it matches nothing; write the first port".to_owned()));
            }
            (Some(IntOrString::String(_)), Some(_)) => {
                return Err((
                    "endPort",
                    "with a named port it matches nothing; write the first port as a number".to_owned(),
                ));
            }
        };
        Ok(PolicyPort { proto, ports })
    }
}

/// Whether the policy is for ingress and for egress (the API server's defaults).
fn directions(spec: &NetworkPolicySpec, findings: &mut Findings) -> (bool, bool) {
    let mut known = (false, false);
    for (i, given) in spec.policy_types.iter().flatten().enumerate() {
        match given.as_str() {
            "Ingress" => known.0 = true,
            "Egress" => known.1 = true,
            other => {
                let message = format!("{other:?} is not a type, it is left out; use Ingress and Egress");
                findings.add(format!("spec.policyTypes[{i}]"), message);
            }
        }
    }
    if known == (false, false) {
        known = (true, spec.egress.as_ref().is_some_and(|rules| !rules.is_empty()));
    }
    known
}

/// A block of addresses; the error has the field, and what is wrong with it.
fn block(given: &IPBlock) -> Result<PolicyPeer, (String, String)> {
    let cidr = policy_range(&given.cidr).map_err(|wrong| ("cidr".to_owned(), wrong))?;
    let mut except = Vec::new();
    for (i, text) in given.except.iter().flatten().enumerate() {
        let at = || format!("except[{i}]");
        let inner = policy_range(text).map_err(|wrong| (at(), wrong))?;
        if !cidr.contains(&inner) || inner == cidr {
            return Err((
                at(),
                format!("{inner} is not a part of {cidr}, the peer matches nothing; give a smaller range inside"),
            ));
        }
        except.push(inner);
    }
    except.sort_unstable();
    except.dedup();
    Ok(PolicyPeer::Block { cidr, except: except.into() })
}

/// A range of addresses; the error says what is wrong with it.
pub(super) fn policy_range(text: &str) -> Result<IpNet, String> {
    let cidr = range(text).ok_or_else(|| {
        format!("{text:?} is not a range, the peer matches nothing; write it like 192.0.2.0/24 or 2001:db8::/32")
    })?;
    let is_mapped =
        matches!((cidr, MAPPED.parse()), (IpNet::V6(cidr), Ok(IpNet::V6(mapped))) if mapped.contains(&cidr));
    if is_mapped {
        return Err(format!("{cidr} is IPv4-mapped, the peer matches nothing; write the IPv4 range"));
    }
    Ok(cidr.trunc())
}

#[cfg(test)]
mod tests;
