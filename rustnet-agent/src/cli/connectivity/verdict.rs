//! Whether an answer is the one that a check wants; if not, what failed and what to do. Pure.

use std::net::IpAddr;

use super::row::{Check, Row, Scenario, Source};
use super::wire::{Answer, Cause, Protocol};

/// A check that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// How.
    pub cause: Cause,
    /// What was tried and what came of it.
    pub detail: String,
}

impl Failure {
    /// Returns a failure with what was tried before its detail.
    pub fn new(cause: Cause, check: &Check, detail: &str) -> Self {
        Self { cause, detail: format!("{}: {detail}", title(check)) }
    }
}

/// Judges an answer; returns what to remark of one that is good.
///
/// # Errors
/// What is wrong with it.
pub fn judge(check: &Check, answer: &Answer) -> Result<Option<String>, Failure> {
    let failed = |cause, detail: String| Err(Failure::new(cause, check, &detail));
    match answer {
        Answer::Failed { cause, detail } => failed(*cause, detail.clone()),
        Answer::Resolved { addresses } => {
            let (found, wanted) = (sorted(addresses), sorted(&check.addresses));
            if found == wanted {
                return Ok(None);
            }
            failed(Cause::WrongServer, format!("the addresses are {}, not {}", list(&found), list(&wanted)))
        }
        Answer::Reached { server, source, local, attempts } => {
            if let Some(wanted) = check.expected.server.as_ref().filter(|wanted| Some(*wanted) != server.as_ref()) {
                let other = server.as_deref().unwrap_or("nobody");
                return failed(Cause::WrongServer, format!("{other} answered in place of {wanted}"));
            }
            let allowed = match &check.expected.source {
                Source::Any => None,
                Source::OneOf(allowed) => Some(allowed.clone()),
                Source::OwnOr(allowed) => Some([&[*local][..], allowed].concat()),
            };
            if let (Some(allowed), Some(source)) = (allowed, source)
                && !allowed.contains(source)
            {
                return failed(Cause::WrongSource, format!("the server saw {source}, not {}", list(&sorted(&allowed))));
            }
            let lost = attempts.saturating_sub(1);
            Ok((lost > 0).then(|| format!("{}: answered after {lost} lost", title(check))))
        }
    }
}

/// Returns what a check does, for people.
pub fn title(check: &Check) -> String {
    let bytes = check.question.bytes;
    match check.question.protocol {
        Protocol::Connect => "TCP connection".to_owned(),
        Protocol::Dns => "DNS".to_owned(),
        Protocol::Tcp if bytes > 1 << 16 => format!("TCP of {bytes} bytes"),
        Protocol::Udp if bytes > 1024 => format!("UDP of {bytes} bytes"),
        Protocol::Tcp => "TCP".to_owned(),
        Protocol::Udp => "UDP".to_owned(),
    }
}

/// Returns what to do about a row that failed for this cause.
pub fn remedy(row: &Row, cause: Cause) -> String {
    use Scenario as S;
    let (near, far) = (&row.from.node, if row.to.node.is_empty() { &row.from.node } else { &row.to.node });
    let both = if near == far { format!("on {near}") } else { format!("on {near} and {far}") };
    let by_service = matches!(
        row.scenario,
        S::PodToLocalService
            | S::PodToRemoteService
            | S::HostToRemoteService
            | S::PodToItself
            | S::PodToLocalNodePort
            | S::PodToRemoteNodePort
            | S::PodToServiceName
            | S::PodToApiServer
    );
    match cause {
        Cause::Refused if by_service => {
            format!("look for the Service with an endpoint: `rustnetctl services --verify` and `rustnetctl services` on {near}")
        }
        Cause::Refused => format!("look for a firewall that rejects: `rustnetctl doctor` {both}, group Firewall"),
        Cause::TimedOut | Cause::Broken
            if matches!(row.scenario, S::LargePacketsLocal | S::LargePacketsRemote) =>
        {
            format!("if small packets of the same way pass, compare the MTUs: `rustnetctl doctor` {both}, group MTU")
        }
        Cause::TimedOut | Cause::Broken if row.scenario == S::PodToWorld => {
            format!("ask the server from node {near} itself; if it answers there: `rustnetctl monitor --drops` on {near}")
        }
        Cause::TimedOut | Cause::Broken if near == far => {
            format!("leave `rustnetctl monitor --drops` running on {near} and ask again; `rustnetctl ct list` shows how far it got")
        }
        Cause::TimedOut | Cause::Broken => format!(
            "leave `rustnetctl monitor --drops` running {both} and ask again; then look for a firewall between the nodes, which has to let \
             the overlay's UDP port through: `rustnetctl doctor` {both}"
        ),
        Cause::Unreachable => format!("compare `rustnetctl peers` and `ip route` {both}"),
        Cause::Corrupt => format!("capture at both ends; a device with a broken checksum offload is likely: `ethtool -K DEV tx off` {both}"),
        Cause::NoName | Cause::WrongServer if row.checks.iter().any(|check| check.question.protocol == Protocol::Dns) => {
            names(near)
        }
        Cause::NoName => names(near),
        Cause::WrongServer => format!("compare the maps with the API server: `rustnetctl services --verify` on {near}"),
        Cause::WrongSource => format!(
            "another program translates addresses: `rustnetctl doctor` {both}, groups Firewall and kube-proxy; compare masquerade and \
             nonMasqueradeCIDRs of the agents"
        ),
        Cause::NotAsked => {
            "see that the API server reaches pods: `kubectl get pods -o wide` in the namespace of the run (--keep), and its own route to them"
                .to_owned()
        }
        Cause::NotStarted => {
            format!("`kubectl describe pod {}` in the namespace of the run (--keep); --port chooses other ports of nodes", row.client)
        }
        Cause::Other => format!("`kubectl logs {}` in the namespace of the run (--keep)", row.client),
    }
}

fn names(node: &str) -> String {
    format!(
        "see whether DNS runs: `kubectl get pods -n kube-system -l k8s-app=kube-dns`; and `rustnetctl services kube-system/kube-dns` on {node}"
    )
}

fn sorted(addresses: &[IpAddr]) -> Vec<IpAddr> {
    let mut sorted = addresses.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    sorted
}

fn list(addresses: &[IpAddr]) -> String {
    if addresses.is_empty() {
        return "none".to_owned();
    }
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ")
}

#[cfg(test)]
mod tests {
    use super::super::row::{End, Expected};
    use super::super::wire::Question;
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn check(protocol: Protocol, source: Source) -> Check {
        Check {
            question: Question { protocol, host: "10.0.0.2".into(), port: 1, bytes: 64, family: None },
            expected: Expected { server: Some("pod-1".into()), source },
            addresses: vec![ip("10.0.0.2"), ip("10.0.0.3")],
        }
    }

    fn reached(server: &str, source: &str, attempts: u32) -> Answer {
        Answer::Reached { server: Some(server.into()), source: Some(ip(source)), local: ip("10.0.0.1"), attempts }
    }

    #[test]
    fn answers_are_judged() {
        let one = |address| Source::OneOf(vec![ip(address)]);
        let own = || Source::OwnOr(vec![ip("172.18.0.11")]);
        for (source, answer, want) in [
            (one("10.0.0.1"), reached("pod-1", "10.0.0.1", 1), Ok(None)),
            (one("10.0.0.1"), reached("pod-1", "10.0.0.1", 2), Ok(Some("UDP: answered after 1 lost"))),
            (own(), reached("pod-1", "10.0.0.1", 1), Ok(None)),
            (own(), reached("pod-1", "172.18.0.11", 1), Ok(None)),
            (Source::Any, reached("pod-1", "192.0.2.1", 1), Ok(None)),
            (one("10.0.0.1"), reached("pod-2", "10.0.0.1", 1), Err(Cause::WrongServer)),
            (one("10.0.0.1"), reached("pod-1", "172.18.0.11", 1), Err(Cause::WrongSource)),
            (own(), reached("pod-1", "192.0.2.1", 1), Err(Cause::WrongSource)),
            (Source::Any, Answer::Failed { cause: Cause::Refused, detail: "connecting".into() }, Err(Cause::Refused)),
        ] {
            let found = judge(&check(Protocol::Udp, source), &answer);
            let found = found.as_ref().map(|it| it.as_deref()).map_err(|failure| failure.cause);
            assert_eq!(found, want, "{answer:?}");
        }
    }

    #[test]
    fn a_name_has_all_addresses_in_whichever_order() {
        let check = check(Protocol::Dns, Source::Any);
        let answer = |addresses: &[&str]| Answer::Resolved { addresses: addresses.iter().map(|it| ip(it)).collect() };
        assert_eq!(judge(&check, &answer(&["10.0.0.3", "10.0.0.2"])), Ok(None));
        let failure = judge(&check, &answer(&["10.0.0.3"])).expect_err("one is missing");
        assert_eq!(failure.detail, "DNS: the addresses are 10.0.0.3, not 10.0.0.2 or 10.0.0.3");
    }

    #[test]
    fn each_cause_has_a_remedy_that_names_the_nodes() {
        let end = |node: &str| End { name: String::new(), address: String::new(), node: node.into() };
        let row = |scenario| Row {
            scenario,
            family: None,
            client: "pod-0".into(),
            from: end("n1"),
            to: end("n2"),
            checks: Vec::new(),
        };
        assert!(remedy(&row(Scenario::PodToRemotePod), Cause::TimedOut).contains("on n1 and n2"));
        assert!(remedy(&row(Scenario::LargePacketsRemote), Cause::TimedOut).contains("MTU"));
        assert!(remedy(&row(Scenario::PodToRemoteService), Cause::Refused).contains("services --verify"));
        assert!(remedy(&row(Scenario::PodToServiceName), Cause::NoName).contains("kube-dns"));
        assert!(remedy(&row(Scenario::ProbeStart), Cause::NotStarted).contains("pod-0"));
    }
}
