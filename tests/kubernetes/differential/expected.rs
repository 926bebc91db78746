//! The differences that docs/kube-proxy-differences.md lists, each as a rule that says what rustnet does in the place of what
//! kube-proxy did. What no rule says is a defect of rustnet, or a missing row.

use super::compare::{Observed, Source};
use super::model::{Case, Family};
use super::probe::Failure;
use super::question::{Front, Question};
use super::world::Place;

/// What a rule judges by.
pub struct Context<'a> {
    pub case: &'a Case,
    pub question: Question,
    /// What kube-proxy did with the question that is like this one (`question::siblings`).
    pub sibling: Option<&'a Observed>,
}

/// A listed difference.
pub struct Rule {
    /// The row of the document: the first words of its subject.
    pub name: &'static str,
    /// Turns what kube-proxy did into what rustnet should do.
    predict: fn(&Context<'_>, &mut Observed),
}

impl Context<'_> {
    /// True if the address is for clients outside.
    fn is_external(&self) -> bool {
        use Front::{Balancer, External, ExternalBalancer, Loopback, NodePort, SecondAddress};
        matches!(
            self.question.front,
            Balancer(true) | External | ExternalBalancer | Loopback | NodePort(_) | SecondAddress(_)
        )
    }
}

impl Context<'_> {
    /// True if the address is a load balancer's, and served: the Service has its family.
    fn is_for_balancer(&self) -> bool {
        let has_family = self.case.vip(self.question.family()).is_some();
        has_family && matches!(self.question.front, Front::Balancer(true) | Front::ExternalBalancer)
    }

    /// True if the load balancer is only for some clients of the question's family.
    fn has_ranges(&self) -> bool {
        let is_v6 = self.question.family() == Family::V6;
        self.case.source_ranges.iter().any(|range| range.contains(':') == is_v6)
    }
}

/// The node of a server, by its name.
pub fn node_of(server: &str) -> Option<&'static str> {
    match server.as_bytes() {
        [b'a', ..] | [b'n', b'1', ..] => Some("n1"),
        [b'b', ..] | [b'n', b'2', ..] => Some("n2"),
        _ => None,
    }
}

/// All of them, in the order in which they apply.
pub const RULES: [Rule; 7] = [
    Rule { name: "Cluster addresses from outside", predict: cluster_addresses_are_closed },
    Rule {
        name: "Ports of a load balancer's address that no Service has, from outside",
        predict: other_ports_are_refused,
    },
    Rule { name: "`loadBalancerSourceRanges` of one family", predict: the_other_family_is_closed },
    Rule { name: "Node ports: addresses", predict: second_addresses_have_node_ports },
    Rule { name: "Node ports at `localhost`", predict: loopback_addresses_have_node_ports },
    Rule {
        name: "`externalTrafficPolicy: Local`, a pod that asks another node",
        predict: pods_of_other_nodes_get_local_endpoints,
    },
    Rule { name: "Client's address, `externalTrafficPolicy: Cluster`", predict: the_client_keeps_its_address },
];

fn cluster_addresses_are_closed(context: &Context<'_>, it: &mut Observed) {
    let is_cluster = matches!(context.question.front, Front::Cluster | Front::ClusterOther);
    if is_cluster && context.question.from == Place::Outside {
        *it = Observed::only(Failure::Dropped);
    }
}

fn other_ports_are_refused(context: &Context<'_>, it: &mut Observed) {
    if context.question.front == Front::OutsideOther && context.question.from == Place::Outside {
        *it = Observed::only(Failure::Refused);
    }
}

fn the_other_family_is_closed(context: &Context<'_>, it: &mut Observed) {
    if context.is_for_balancer() && !context.case.source_ranges.is_empty() && !context.has_ranges() {
        *it = Observed::only(Failure::Dropped);
    }
}

fn second_addresses_have_node_ports(context: &Context<'_>, it: &mut Observed) {
    if let (Front::SecondAddress(_), Some(sibling)) = (context.question.front, context.sibling) {
        it.clone_from(sibling);
    }
}

fn loopback_addresses_have_node_ports(context: &Context<'_>, it: &mut Observed) {
    if let (Front::Loopback, Some(sibling)) = (context.question.front, context.sibling) {
        it.clone_from(sibling);
    }
}

/// Answers of a backend on the node that is asked pass this node anyhow; so do all of a client's own node.
fn the_client_keeps_its_address(context: &Context<'_>, it: &mut Observed) {
    let question = context.question;
    if !context.is_external() || context.case.external_local {
        return;
    }
    for (server, seen) in &mut it.answers {
        let Some(node) = node_of(server) else { continue };
        let is_itself = question.from.name().is_some_and(|name| server.starts_with(name));
        if !is_itself && (node == question.entry() || question.is_asked_at_home()) {
            *seen = [Source::Client].into();
        }
    }
}

/// As clients outside do.
fn pods_of_other_nodes_get_local_endpoints(context: &Context<'_>, it: &mut Observed) {
    let is_pod = matches!(context.question.from, Place::PodA | Place::PodB);
    let is_elsewhere = matches!(context.question.front, Front::NodePort(_)) && !context.question.is_asked_at_home();
    if let Some(sibling) = context.sibling.filter(|_| is_pod && is_elsewhere && context.case.external_local) {
        it.clone_from(sibling);
    }
}

/// The rows about health check node ports, which `health` judges: of Services with one family, and with two.
pub const HEALTH: [&str; 2] =
    ["`healthCheckNodePort` of a single-stack Service", "`healthCheckNodePort` of a dual-stack Service"];

/// The names of all rows.
pub fn names() -> impl Iterator<Item = &'static str> {
    RULES.iter().map(|rule| rule.name).chain(HEALTH)
}

/// What rustnet should do where kube-proxy did this, and the rules that say so.
pub fn predict(context: &Context<'_>, reference: &Observed) -> (Observed, Vec<&'static str>) {
    let mut predicted = reference.clone();
    let mut applied = Vec::new();
    for rule in &RULES {
        let before = predicted.clone();
        (rule.predict)(context, &mut predicted);
        if predicted != before {
            applied.push(rule.name);
        }
    }
    (predicted, applied)
}

/// True if rustnet did what was predicted. With session affinity a client has one backend, any of them.
pub fn agrees(context: &Context<'_>, predicted: &Observed, ours: &Observed) -> bool {
    if predicted.failures != ours.failures {
        return false;
    }
    if context.case.affinity {
        return predicted.answers.len() == ours.answers.len() && ours.answers.len() <= 1;
    }
    predicted.answers == ours.answers
}
