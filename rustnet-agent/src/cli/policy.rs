//! `rustnetctl policy`: what network policies mean for this node's pods, from `rn_endpoints` and the maps of policies.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::Result;
use rustnet_common::endpoint::Endpoint;
use rustnet_common::policy::{ANY_CLASS, OPEN, flags};
use serde::Serialize;

use super::output::Output;
use super::{Places, endpoints};
use crate::bpf::store::endpoints::Endpoints;
use crate::bpf::store::policy::read;
use crate::plan::policies::PolicySnapshot;
use crate::podfile::Names;

/// What policies mean for one direction of a pod.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Set {
    /// Number of the set of policies.
    id: u32,
    /// How many entries allow something, over all classes.
    rules: usize,
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

/// Prints the pods.
pub fn run(places: &Places, out: &Output) -> Result<()> {
    let names = endpoints::names(places, &endpoints::by_address(places)?)?;
    let bpffs = places.bpffs()?;
    let report = report(&Endpoints::open(bpffs)?.read()?, &read(bpffs)?, &names);
    out.print(&report, &["ADDRESS", "POD", "STATE", "CLASS", "INGRESS", "EGRESS"], || {
        report.pods.iter().map(line).collect()
    })
}

fn report(endpoints: &[(IpAddr, Endpoint)], policies: &PolicySnapshot, names: &Names) -> Report {
    let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
    for key in policies.rules.keys() {
        *counts.entry(key.set).or_default() += 1;
    }
    let set = |id: u32| (id != OPEN).then(|| Set { id, rules: counts.get(&id).copied().unwrap_or_default() });
    let is_enforced = policies.state.flags & flags::ENFORCED != 0;
    let row = |(address, endpoint): &(IpAddr, Endpoint)| {
        let pod = policies.pods.get(address).filter(|pod| is_enforced && pod.ifindex == endpoint.ifindex);
        let [ingress, egress] = pod.map_or([OPEN; 2], |pod| [pod.ingress, pod.egress]).map(set);
        let state = match (is_enforced, pod) {
            (true, None) => State::Undecided,
            (true, Some(_)) if ingress.is_some() || egress.is_some() => State::Isolated,
            _ => State::Open,
        };
        Row {
            address: *address,
            pod: names.get(address).cloned(),
            ifindex: endpoint.ifindex,
            state,
            class: pod.map(|pod| pod.class).filter(|class| *class != ANY_CLASS),
            ingress,
            egress,
        }
    };
    Report { is_enforced, generation: policies.state.generation, pods: endpoints.iter().map(row).collect() }
}

fn line(row: &Row) -> Vec<String> {
    let set = |set: &Option<Set>| match (row.state, set) {
        (State::Undecided, _) => "-".to_owned(),
        (_, None) => State::Open.word().to_owned(),
        (_, Some(Set { id, rules: 0 })) => format!("{id:08x} (nothing allowed)"),
        (_, Some(Set { id, rules: 1 })) => format!("{id:08x} (1 rule)"),
        (_, Some(Set { id, rules })) => format!("{id:08x} ({rules} rules)"),
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

#[cfg(test)]
mod tests {
    use super::{Endpoint, IpAddr, PolicySnapshot, flags, line, report};
    use crate::cli::golden::assert_golden;
    use crate::index::policy::{PortPrefix, RuleKey};
    use rustnet_common::policy::{ALLOW, Policies, PolicyPod, PolicyRule};

    fn ip(n: u8) -> IpAddr {
        IpAddr::from([10, 1, 1, n])
    }

    fn endpoint(ifindex: u32) -> Endpoint {
        Endpoint { ifindex, identity: 0, mac: [0; 6], host_mac: [0; 6], flags: 0, pad: 0 }
    }

    fn policies(flags: u32) -> PolicySnapshot {
        let key = RuleKey { set: 0x1a, class: 0x2b, ports: PortPrefix::ANY };
        let rule = PolicyRule { order: ALLOW, rule: 1 };
        let pod = |ifindex, ingress, egress| PolicyPod { class: 0x2b, ingress, egress, ifindex };
        PolicySnapshot {
            state: Policies { generation: 3, flags },
            pods: [(ip(1), pod(1, 0x1a, 0x1b)), (ip(2), pod(2, 0, 0)), (ip(3), pod(9, 0, 0))].into(),
            rules: [(key, rule)].into(),
            ..PolicySnapshot::default()
        }
    }

    fn states(flags: u32) -> Vec<String> {
        let endpoints = [1, 2, 3, 4].map(|n| (ip(n), endpoint(u32::from(n))));
        let report = report(&endpoints, &policies(flags), &[].into());
        report.pods.iter().map(|row| line(row)[2..].join(" ")).collect()
    }

    #[test]
    fn a_pod_is_open_isolated_or_undecided() {
        // The third has the entry of an earlier pod with its address, the fourth has none.
        let want = ["isolated 0000002b 0000001a (1 rule) 0000001b (nothing allowed)", "open 0000002b open open"];
        assert_eq!(states(flags::ENFORCED), [want[0], want[1], "undecided - - -", "undecided - - -"]);
        assert_eq!(states(0), ["open - open open"; 4], "nothing is judged");
    }

    #[test]
    fn its_json_is_an_interface() {
        let names = [(ip(1), "shop/web-0".to_owned())].into();
        assert_golden(
            "policy",
            &report(&[(ip(1), endpoint(1)), (ip(4), endpoint(4))], &policies(flags::ENFORCED), &names),
        );
    }
}
