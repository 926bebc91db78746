//! `rustnetctl policy`: what network policies mean for this node's pods, from `rn_endpoints` and the maps of policies. `pod` shows one
//! pod in full, `why` judges a flow; `view` reads what all of them print.

pub mod explain;
mod front;
mod half;
mod pod;
mod view;
mod why;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::Result;
use rustnet_common::policy::{ANY_CLASS, OPEN, PolicyPod, flags};
use serde::Serialize;

use super::Places;
use super::output::Output;
use crate::policyfile::List;
use view::{View, show_policies};

/// Options.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    /// One pod in full: namespace/name, or an address
    name: Option<String>,
    #[command(subcommand)]
    question: Option<Question>,
}

#[derive(Debug, clap::Subcommand)]
enum Question {
    /// Judge a new flow, and name the policies. Exit code: 0 this node allows it, 1 it is denied or undecided, 2 this node cannot say
    Why(why::Args),
}

/// What policies mean for one direction of a pod.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Set {
    /// Number of the set of policies.
    id: u32,
    /// How many rules of these policies have entries.
    rules: usize,
    /// The policies that select the pod.
    policies: List,
}

/// What policies mean for a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// No policy selects it, or none is enforced.
    Open,
    /// Policies select it.
    Isolated,
    /// The agent has not decided: nothing passes.
    Undecided,
}

impl State {
    const fn word(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Isolated => "isolated",
            Self::Undecided => "undecided",
        }
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    address: IpAddr,
    pod: Option<String>,
    ifindex: u32,
    state: State,
    /// What the pod is for the policies of others; none if none of this node's selects it.
    class: Option<u32>,
    /// None where all may come.
    ingress: Option<Set>,
    /// None where it may go anywhere.
    egress: Option<Set>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    is_enforced: bool,
    generation: u32,
    pods: Vec<Row>,
}

/// Prints what was asked for; false if a flow is denied.
///
/// # Errors
/// A map or file cannot be read, or nobody knows the pod.
pub fn run(places: &Places, args: &Args, out: &Output) -> Result<bool> {
    match args {
        Args { question: Some(Question::Why(args)), .. } => return why::run(places, args, out),
        Args { name: Some(name), .. } => pod::run(&View::read(places)?, name, out)?,
        Args { name: None, .. } => list(&View::read(places)?, out)?,
    }
    Ok(true)
}

/// Prints the pods.
fn list(view: &View, out: &Output) -> Result<()> {
    let report = report(view);
    out.print(&report, &["ADDRESS", "POD", "STATE", "CLASS", "INGRESS", "EGRESS"], || {
        report.pods.iter().map(line).collect()
    })
}

fn report(view: &View) -> Report {
    let policies = &view.maps;
    // A rule has an entry for each class and each prefix of ports.
    let mut counts: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
    for (key, rule) in &policies.rules {
        counts.entry(key.set).or_default().extend(Some(rule.rule).filter(|rule| *rule != 0));
    }
    let set = |id: u32| {
        let rules = counts.get(&id).map_or(0, BTreeSet::len);
        (id != OPEN).then(|| Set { id, rules, policies: view.policies(id) })
    };
    let is_enforced = policies.state.flags & flags::ENFORCED != 0;
    let row = |(address, ifindex): (&IpAddr, &u32)| {
        let pod = policies.pods.get(address).filter(|pod| is_enforced && pod.ifindex == *ifindex);
        let [ingress, egress] = pod.map_or([OPEN; 2], |pod| [pod.ingress, pod.egress]).map(set);
        Row {
            address: *address,
            pod: view.pods.get(address).cloned(),
            ifindex: *ifindex,
            state: state(is_enforced, pod),
            class: pod.map(|pod| pod.class).filter(|class| *class != ANY_CLASS),
            ingress,
            egress,
        }
    };
    let pods = view.around.endpoints.iter().map(row).collect();
    Report { is_enforced, generation: policies.state.generation, pods }
}

/// What policies mean for a pod of this node. `pod`: its entry, if that has its interface.
fn state(is_enforced: bool, pod: Option<&PolicyPod>) -> State {
    match (is_enforced, pod) {
        (true, None) => State::Undecided,
        (true, Some(pod)) if pod.ingress != OPEN || pod.egress != OPEN => State::Isolated,
        _ => State::Open,
    }
}

fn line(row: &Row) -> Vec<String> {
    let set = |set: &Option<Set>| match (row.state, set) {
        (State::Undecided, _) => "-".to_owned(),
        (_, None) => State::Open.word().to_owned(),
        (_, Some(Set { id, rules: 0, policies })) => format!("{} (nothing allowed)", show_policies(*id, policies)),
        (_, Some(Set { id, rules: 1, policies })) => format!("{} (1 rule)", show_policies(*id, policies)),
        (_, Some(Set { id, rules, policies })) => format!("{} ({rules} rules)", show_policies(*id, policies)),
    };
    vec![
        row.address.to_string(),
        row.pod.clone().unwrap_or_else(|| "-".to_owned()),
        row.state.word().to_owned(),
        row.class.map_or_else(|| "-".to_owned(), |class| format!("{class:08x}")),
        set(&row.ingress),
        set(&row.egress),
    ]
}

/// For tests: what a node with three pods reads.
#[cfg(test)]
mod build {
    use super::view::View;
    use crate::namefile::NodeName;
    use crate::plan::policies::judge::Surroundings;
    use crate::plan::policies::{PolicySnapshot, PortPrefix, RuleKey};
    use crate::policyfile::{List, Names};
    use rustnet_common::peer::{self, Peer};
    use rustnet_common::policy::{ALLOW, ANY_CLASS, Policies, PolicyPod, PolicyRule, flags};
    use rustnet_common::tuple::proto;
    use std::net::IpAddr;

    pub fn ip(n: u8) -> IpAddr {
        IpAddr::from([10, 1, 1, n])
    }

    /// Pod 1, `db-0`, is isolated: of its sets one has no name. Pod 2, `web-0`, is open, pod 3 is not decided; 10.1.2.9 is on `n2`.
    pub fn view() -> View {
        let pod = |class, ingress, egress, ifindex| PolicyPod { class, ingress, egress, ifindex };
        let far = IpAddr::from([10, 1, 2, 9]);
        let tcp = PortPrefix::of_range(proto::TCP, 5432, 5434).into_iter().map(|ports| (0x2b, ports, 1));
        let udp = (ANY_CLASS, PortPrefix::new(proto::UDP, 53, 16), 2);
        let rules = tcp
            .chain([udp])
            .map(|(class, ports, rule)| (RuleKey { set: 0x1a, class, ports }, PolicyRule { flags: ALLOW, rule }));
        let maps = PolicySnapshot {
            state: Policies { generation: 3, flags: flags::ENFORCED },
            pods: [(ip(1), pod(0x55, 0x1a, 0x1b, 11)), (ip(2), pod(0x2b, 0, 0, 12)), (far, pod(0x2b, 0, 0, 0))].into(),
            cidrs: [("10.9.0.0/16".parse().unwrap(), 0x2b)].into(),
            rules: rules.collect(),
        };
        let list = |texts: &[&str]| List { texts: texts.iter().map(|it| (*it).to_owned()).collect(), more: 0 };
        let names = Names {
            sets: [(0x1a, list(&["shop/db", "shop/base"]))].into(),
            rules: [(1, "shop/db ingress[0]".to_owned()), (2, "shop/base ingress[0]".to_owned())].into(),
            classes: [(0x55, list(&["pods of shop with app in (db)"]))].into(),
            pods: [].into(),
        };
        let n2: IpAddr = [192, 0, 2, 2].into();
        let peer = Peer { node: n2.into(), identity: 0, flags: peer::flags::POD, pad: 0 };
        let endpoints = [(ip(1), 11), (ip(2), 12), (ip(3), 13)].into();
        View {
            maps,
            around: Surroundings { endpoints, host: [IpAddr::from([192, 0, 2, 1])].into() },
            names,
            pods: [(ip(1), "shop/db-0".to_owned()), (ip(2), "shop/web-0".to_owned())].into(),
            nodes: [("n2".to_owned(), NodeName { addresses: vec![n2], pod_cidrs: Vec::new() })].into(),
            peers: [("10.1.2.0/24".parse().unwrap(), peer)].into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::build::{ip, view};
    use super::{line, report};
    use crate::cli::golden::assert_golden;
    use rustnet_common::policy::PolicyPod;

    #[test]
    fn a_pod_is_open_isolated_or_undecided() {
        let mut view = view();
        let states =
            |view: &super::View| report(view).pods.iter().map(|row| line(row)[2..].join(" ")).collect::<Vec<_>>();
        // The third has the entry of an earlier pod with its address, then none.
        view.maps.pods.insert(ip(3), PolicyPod { class: 1, ingress: 0, egress: 0, ifindex: 9 });
        let want = [
            "isolated 00000055 shop/db, shop/base (2 rules) set 0000001b (nothing allowed)",
            "open 0000002b open open",
            "undecided - - -",
        ];
        assert_eq!(states(&view), want);
        view.maps.pods.remove(&ip(3));
        assert_eq!(states(&view), want);
        view.maps.state.flags = 0;
        assert_eq!(states(&view), ["open - open open"; 3], "nothing is judged");
    }

    #[test]
    fn its_json_is_an_interface() {
        assert_golden("policy", &report(&view()));
    }
}
