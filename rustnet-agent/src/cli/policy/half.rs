//! One end of a flow for people: which policies isolate its pod, which rule allows the flow or that none does, or who decides instead.

use std::net::IpAddr;

use rustnet_common::policy::ANY_CLASS;
use rustnet_common::tuple::proto;
use serde::Serialize;

use super::view::{View, show_policies, show_proto};
use crate::plan::policies::judge::{self, Exemption, Flow, Judgement};
use crate::policyfile::List;

/// One end of a flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Half {
    /// `egress` of the client, or `ingress` of the server.
    pub direction: &'static str,
    /// The address that is judged.
    pub address: IpAddr,
    /// Its pod, if that is known.
    pub pod: Option<String>,
    /// What it means for the flow.
    pub verdict: Word,
    /// The node that decides, if another one does.
    pub node: Option<String>,
    /// Number of the set of policies that isolate the pod.
    pub set: Option<u32>,
    /// These policies.
    pub policies: List,
    /// Class of the other end; none if nothing in use holds for it.
    pub class: Option<u32>,
    /// The rule that counts.
    pub rule: Option<String>,
    /// All of it in a sentence.
    pub text: String,
}

/// What one end means for a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Word {
    /// A rule allows the flow.
    Allowed,
    /// The flow passes, though a rule denies it or none allows it: the namespace of the pod is audited.
    Audited,
    /// A rule denies it, or none allows it.
    Denied,
    /// The agent has not decided.
    Undecided,
    /// No policy selects the pod.
    Open,
    /// No policy judges such a flow.
    Exempt,
    /// Another node decides.
    OtherNode,
    /// No pod of this cluster is at this end, as far as this node knows.
    NoPod,
}

impl Word {
    /// What people read.
    pub const fn show(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::Audited => "audited",
            Self::Denied => "denied",
            Self::Undecided => "undecided",
            Self::Open => "open",
            Self::Exempt => "not judged",
            Self::OtherNode => "elsewhere",
            Self::NoPod => "no pod",
        }
    }

    /// True if the flow is dropped at this end.
    pub const fn is_drop(self) -> bool {
        matches!(self, Self::Denied | Self::Undecided)
    }
}

/// Both ends of a flow: that of the client first.
pub fn halves(view: &View, flow: &Flow, judgement: &Judgement) -> [Half; 2] {
    let Judgement { exemption, egress, ingress } = *judgement;
    [
        half(view, flow, "egress", (flow.client, flow.server), egress, exemption),
        half(view, flow, "ingress", (flow.server, flow.client), ingress, exemption),
    ]
}

/// The protocol with its port. Of ICMP, the identifier stands there in a packet.
pub fn show_port(number: u8, port: u16) -> String {
    let has_port = port != 0 && !matches!(number, proto::ICMP | proto::ICMPV6);
    if has_port { format!("{}/{port}", show_proto(number)) } else { show_proto(number) }
}

fn half(
    view: &View,
    flow: &Flow,
    direction: &'static str,
    (own, other): (IpAddr, IpAddr),
    judged: judge::Half,
    exemption: Option<Exemption>,
) -> Half {
    let who = view.show(own);
    let half = |verdict, text| Half {
        direction,
        address: own,
        pod: view.pods.get(&own).cloned(),
        verdict,
        node: None,
        set: None,
        policies: List::default(),
        class: None,
        rule: None,
        text,
    };
    if judged == judge::Half::NotHere && exemption != Some(Exemption::ToItself) {
        let node = view.other_node(own);
        if node.is_some() || view.maps.pods.get(&own).is_some_and(|pod| pod.ifindex == 0) {
            let decider = node.as_ref().map_or_else(|| "its node".to_owned(), |node| format!("node {node}"));
            return Half { node, ..half(Word::OtherNode, format!("{decider} decides for {who}: ask there")) };
        }
    }
    let text = match exemption {
        Some(Exemption::NotEnforced) => Some("no policy is enforced on this node"),
        Some(Exemption::FromNode) => Some("no policy judges what a node sends to its own pods"),
        Some(Exemption::ToItself) => Some("no policy judges what a pod sends to itself"),
        None => None,
    };
    if let Some(text) = text {
        return half(Word::Exempt, text.to_owned());
    }
    match judged {
        judge::Half::NotHere => half(Word::NoPod, format!("{who} is no pod: no policy selects it")),
        judge::Half::Undecided => half(Word::Undecided, format!("the agent has not decided {who}: nothing passes")),
        judge::Half::Open => half(Word::Open, format!("no policy selects {who} for {direction}")),
        judge::Half::Judged { set, class, hit } => {
            let policies = view.policies(set);
            let rule = hit.and_then(|hit| view.rule(hit.rule.rule));
            let named = rule.clone().unwrap_or_else(|| "a rule".to_owned());
            let (ports, other) = (show_port(flow.proto, flow.port), show_other(view, other, class));
            let verdict = match judged {
                _ if judged.is_denied() => Word::Denied,
                _ if judged.is_audited() => Word::Audited,
                _ => Word::Allowed,
            };
            let why = match (verdict, &rule) {
                (Word::Allowed, Some(_)) => format!("{named} allows {other} at {ports}"),
                (Word::Allowed, None) => format!("no rule of them denies {other} at {ports}"),
                (_, Some(_)) => format!("{named} denies {other} at {ports}"),
                (_, None) => format!("no rule of them allows {other} at {ports}"),
            };
            let audit = if verdict == Word::Audited { "; its namespace is audited: the flow passes" } else { "" };
            let text = format!("{who} is isolated for {direction} by {}; {why}{audit}", show_policies(set, &policies));
            let class = (class != ANY_CLASS).then_some(class);
            Half { set: Some(set), policies, class, rule, ..half(verdict, text) }
        }
    }
}

/// The other end with its class, by which rules know it.
fn show_other(view: &View, other: IpAddr, class: u32) -> String {
    let shown = view.show(other);
    if class == ANY_CLASS {
        format!("{shown}, which no selector has,")
    } else {
        format!("{shown} of class {class:08x}")
    }
}
