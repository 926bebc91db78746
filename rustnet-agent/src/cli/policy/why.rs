//! `rustnetctl policy why`: what becomes of a new flow by the live maps of this node, and by which policies.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, bail};
use rustnet_common::tuple::proto;
use serde::Serialize;

use super::front::{Front, Fronts};
use super::half::{Half, Word, halves, show_port};
use super::view::View;
use crate::cli::Places;
use crate::cli::output::{CannotRun, Output, json, line};
use crate::plan::policies::judge::{Flow, Verdict, judge};

/// Flows that are listed: a Service may have thousands of backends.
const LISTED: usize = 32;

/// A flow.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Who opens the flow: namespace/name of a pod, or an address
    from: String,
    /// Who gets it: namespace/name of a pod, or an address, also that of a Service
    to: String,
    /// Port of the server, or of the Service; 0 for a protocol without ports
    port: u16,
    /// tcp, udp, sctp, icmp, icmpv6, or a number
    #[arg(default_value = "tcp", value_parser = parse_proto)]
    proto: u8,
}

fn parse_proto(text: &str) -> Result<u8, String> {
    Ok(match text.to_ascii_lowercase().as_str() {
        "tcp" => proto::TCP,
        "udp" => proto::UDP,
        "sctp" => proto::SCTP,
        "icmp" => proto::ICMP,
        "icmpv6" => proto::ICMPV6,
        number => number.parse().map_err(|_| "give tcp, udp, sctp, icmp, icmpv6 or a number up to 255")?,
    })
}

/// What is printed as JSON.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    protocol: String,
    #[serde(skip)]
    number: u8,
    port: u16,
    /// The Service whose address was asked for; policies judge its backends.
    service: Option<String>,
    /// That of the worst flow.
    verdict: Outcome,
    /// False where another node has to allow a flow, too.
    is_complete: bool,
    /// A few flows: of each backend, and of each pair of addresses.
    flows: Vec<Row>,
    /// How many more flows were judged.
    more_flows: usize,
    /// How many of all this node allows; another node may deny them.
    allowed: usize,
}

/// What this node's programs do with a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
enum Outcome {
    Allowed,
    /// Policies deny it in a namespace that is audited.
    Audited,
    /// Other nodes decide alone.
    Elsewhere,
    Undecided,
    Denied,
}

impl Outcome {
    const fn show(self, is_complete: bool) -> &'static str {
        match self {
            Self::Allowed if is_complete => "allowed",
            Self::Allowed => "allowed by this node",
            Self::Audited => "denied, and allowed by audit",
            Self::Elsewhere => "not decided by this node",
            Self::Undecided => "undecided",
            Self::Denied => "denied",
        }
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    client: IpAddr,
    client_pod: Option<String>,
    server: IpAddr,
    server_pod: Option<String>,
    port: u16,
    verdict: Outcome,
    is_complete: bool,
    halves: [Half; 2],
}

/// Prints what becomes of a flow; true if this node allows it.
///
/// # Errors
/// [`CannotRun`]: the flow is unknown, the maps cannot be read, or only other nodes decide.
pub fn run(places: &Places, args: &Args, out: &Output) -> Result<bool> {
    let report = read(places, args).map_err(|error| CannotRun(format!("{error:#}")))?;
    if out.is_json() {
        json(&report)?;
    } else {
        line(&text(&report))?;
    }
    if report.verdict == Outcome::Elsewhere {
        return Err(CannotRun("no pod of this node is at either end: ask on the nodes of the pods".into()).into());
    }
    Ok(matches!(report.verdict, Outcome::Allowed | Outcome::Audited))
}

fn read(places: &Places, args: &Args) -> Result<Report> {
    let (view, fronts) = (View::read(places)?, Fronts::read(places)?);
    report(&view, &|to, proto, is_outside| fronts.find(to, proto, is_outside), args)
}

fn report(view: &View, front: &dyn Fn(SocketAddr, u8, bool) -> Front, args: &Args) -> Result<Report> {
    let clients = addresses(view, &args.from)?;
    let is_outside = clients.iter().all(|ip| view.is_outside(*ip));
    let mut servers = Vec::new();
    let mut service = None;
    for ip in addresses(view, &args.to)? {
        let to = SocketAddr::new(ip, args.port);
        match front(to, args.proto, is_outside) {
            Front::None if view.is_of_services(ip) => {
                bail!(
                    "{ip} is in a range of Services, and no Service has it: the flow is refused before policies count"
                )
            }
            Front::None => servers.push(to),
            Front::NoPort => {
                let ports = show_port(args.proto, args.port);
                bail!(
                    "{ip} is the address of a Service that has no port {ports}: the flow is refused before policies count"
                )
            }
            Front::Service { name, backends } if backends.is_empty() => {
                let name = name.unwrap_or_else(|| to.to_string());
                bail!("Service {name} has no backends: the flow is refused before policies count")
            }
            Front::Service { name, backends } => {
                service = Some(name.unwrap_or_else(|| to.to_string()));
                servers.extend(backends);
            }
        }
    }
    let pairs = clients.iter().flat_map(|client| servers.iter().map(move |server| (*client, *server)));
    let pairs = pairs.filter(|(client, server)| client.is_ipv4() == server.is_ipv4());
    let mut flows: Vec<Row> = pairs.map(|(client, server)| row(view, client, server, args.proto)).collect();
    if flows.is_empty() {
        bail!("{} and {} have no addresses of one family", args.from, args.to)
    }
    // What other nodes decide says nothing of what this one does.
    let here = flows.iter().map(|flow| flow.verdict).filter(|verdict| *verdict != Outcome::Elsewhere);
    let verdict = here.max().unwrap_or(Outcome::Elsewhere);
    // The worst come first, so that they are among those that are listed.
    flows.sort_by_key(|flow| std::cmp::Reverse(flow.verdict));
    let is_complete = flows.iter().all(|flow| flow.is_complete);
    let allowed = flows.iter().filter(|flow| flow.verdict == Outcome::Allowed).count();
    let more_flows = flows.len().saturating_sub(LISTED);
    flows.truncate(LISTED);
    let protocol = super::view::show_proto(args.proto);
    Ok(Report {
        protocol,
        number: args.proto,
        port: args.port,
        service,
        verdict,
        is_complete,
        flows,
        more_flows,
        allowed,
    })
}

/// The addresses of one end.
fn addresses(view: &View, name: &str) -> Result<Vec<IpAddr>> {
    if let Ok(ip) = name.parse() {
        return Ok(vec![ip]);
    }
    let found = view.addresses(name);
    if found.is_empty() {
        bail!(
            "{name}: neither an address nor a pod that this node knows by namespace/name; of pods of other nodes it knows those that \
             its policies are about: give the address"
        );
    }
    Ok(found)
}

fn row(view: &View, client: IpAddr, server: SocketAddr, proto: u8) -> Row {
    let flow = Flow { client, server: server.ip(), proto, port: server.port() };
    let judgement = judge(&view.maps, &view.around, &flow);
    let halves = halves(view, &flow, &judgement);
    let is_complete = halves.iter().all(|half| half.verdict != Word::OtherNode);
    let is_here = [client, server.ip()].iter().any(|ip| view.around.endpoints.contains_key(ip));
    let verdict = match judgement.verdict() {
        Verdict::Denied => Outcome::Denied,
        Verdict::Undecided => Outcome::Undecided,
        Verdict::Audited => Outcome::Audited,
        Verdict::Allowed if is_here || is_complete => Outcome::Allowed,
        Verdict::Allowed => Outcome::Elsewhere,
    };
    Row {
        client,
        client_pod: view.pods.get(&client).cloned(),
        server: server.ip(),
        server_pod: view.pods.get(&server.ip()).cloned(),
        port: server.port(),
        verdict,
        is_complete,
        halves,
    }
}

fn text(report: &Report) -> String {
    let mut lines = Vec::new();
    if let Some(service) = &report.service {
        let all = report.flows.len() + report.more_flows;
        lines.push(format!(
            "Service {service}: policies judge the backend, after the translation; {} of {all} flows allowed{}",
            report.allowed,
            if report.is_complete { "" } else { " by this node" }
        ));
    }
    for flow in &report.flows {
        let end = |ip: IpAddr, pod: &Option<String>| pod.as_ref().map_or(ip.to_string(), |pod| format!("{pod} ({ip})"));
        let (client, server) = (end(flow.client, &flow.client_pod), end(flow.server, &flow.server_pod));
        let verdict = flow.verdict.show(flow.is_complete);
        lines.push(format!("{client} -> {server} {}: {verdict}", show_port(report.number, flow.port)));
        for Half { direction, verdict, text, .. } in &flow.halves {
            lines.push(format!("  {direction:<8} {:<10} {text}", verdict.show()));
        }
    }
    if report.more_flows > 0 {
        lines.push(format!("and {} more flows", report.more_flows));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::{Args, Front, Outcome, Report, SocketAddr, parse_proto, report, text};
    use crate::cli::golden::assert_golden;
    use crate::cli::policy::build::{ip, view};
    use crate::plan::policies::{PortPrefix, RuleKey};
    use rustnet_common::addr::{Addr, Address as _};
    use rustnet_common::peer::{Peer, flags};
    use rustnet_common::policy::{ALLOW, ANY_CLASS, AUDIT, PolicyRule};
    use rustnet_common::tuple::proto;

    const VIP: [u8; 4] = [10, 96, 0, 1];

    fn front(to: SocketAddr, _: u8, _: bool) -> Front {
        let backends = vec![SocketAddr::new(ip(1), 5432), "10.1.2.9:5432".parse().unwrap()];
        match to.port() {
            _ if to.ip() != std::net::IpAddr::from(VIP) => Front::None,
            80 => Front::Service { name: Some("shop/db".to_owned()), backends },
            81 => Front::Service { name: None, backends: Vec::new() },
            _ => Front::NoPort,
        }
    }

    fn ask(from: &str, to: &str, port: u16, proto: u8) -> anyhow::Result<Report> {
        report(&view(), &front, &Args { from: from.to_owned(), to: to.to_owned(), port, proto })
    }

    fn shown(from: &str, to: &str, port: u16, proto: u8) -> String {
        text(&ask(from, to, port, proto).unwrap())
    }

    #[test]
    fn each_end_says_who_decides_and_by_what() {
        assert_eq!(
            shown("shop/web-0", "shop/db-0", 5433, proto::TCP),
            "shop/web-0 (10.1.1.2) -> shop/db-0 (10.1.1.1) TCP/5433: allowed\n\
             \x20 egress   open       no policy selects shop/web-0 (10.1.1.2) for egress\n\
             \x20 ingress  allowed    shop/db-0 (10.1.1.1) is isolated for ingress by shop/db, shop/base; shop/db ingress[0] allows \
             shop/web-0 (10.1.1.2) of class 0000002b at TCP/5433"
        );
        assert_eq!(
            shown("shop/db-0", "203.0.113.7", 0, proto::ICMP),
            "shop/db-0 (10.1.1.1) -> 203.0.113.7 ICMP: denied\n\
             \x20 egress   denied     shop/db-0 (10.1.1.1) is isolated for egress by set 0000001b; no rule of them allows 203.0.113.7, \
             which no selector has, at ICMP\n\
             \x20 ingress  no pod     203.0.113.7 is no pod: no policy selects it"
        );
        assert_eq!(
            shown("10.1.2.9", "shop/web-0", 80, proto::UDP),
            "10.1.2.9 -> shop/web-0 (10.1.1.2) UDP/80: allowed by this node\n\
             \x20 egress   elsewhere  node n2 decides for 10.1.2.9: ask there\n\
             \x20 ingress  open       no policy selects shop/web-0 (10.1.1.2) for ingress"
        );
        for (from, to, port, verdict, words) in [
            ("shop/web-0", "shop/db-0", 80, Outcome::Denied, "no rule of them allows"),
            ("shop/web-0", "10.1.1.3", 80, Outcome::Undecided, "the agent has not decided 10.1.1.3"),
            ("192.0.2.1", "shop/db-0", 80, Outcome::Allowed, "what a node sends to its own pods"),
            ("shop/db-0", "shop/db-0", 80, Outcome::Allowed, "what a pod sends to itself"),
            ("192.0.2.1", "10.1.2.9", 80, Outcome::Elsewhere, "not decided by this node"),
            ("10.1.2.8", "10.1.2.9", 80, Outcome::Elsewhere, "node n2 decides"),
            ("203.0.113.7", "192.0.2.1", 80, Outcome::Allowed, "is no pod"),
        ] {
            let found = ask(from, to, port, proto::TCP).unwrap();
            assert_eq!(found.verdict, verdict, "{from} {to}");
            assert!(text(&found).contains(words), "{}", text(&found));
        }
    }

    #[test]
    fn an_audited_end_is_not_one_that_allows() {
        let mut view = view();
        let key = RuleKey { set: 0x1a, class: ANY_CLASS, ports: PortPrefix::ANY };
        view.maps.rules.insert(key, PolicyRule { flags: ALLOW | AUDIT, rule: 0 });
        let args = Args { from: "shop/web-0".to_owned(), to: "shop/db-0".to_owned(), port: 80, proto: proto::TCP };
        let found = report(&view, &front, &args).unwrap();
        assert_eq!(found.verdict, Outcome::Audited);
        let shown = text(&found);
        for words in [
            "TCP/80: denied, and allowed by audit",
            "ingress  audited",
            "no rule of them allows",
            "audited: the flow passes",
        ] {
            assert!(shown.contains(words), "{words}: {shown}");
        }
    }

    /// Where addresses do not follow from nodes, only the map knows the pod.
    #[test]
    fn a_pod_whose_node_is_unknown_is_decided_there() {
        let mut view = view();
        view.peers.clear();
        let args = Args { from: "10.1.2.9".to_owned(), to: "shop/db-0".to_owned(), port: 5432, proto: proto::TCP };
        let found = report(&view, &front, &args).unwrap();
        assert_eq!((found.verdict, found.is_complete), (Outcome::Allowed, false));
        assert!(text(&found).contains("its node decides for 10.1.2.9"), "{}", text(&found));
    }

    #[test]
    fn of_a_service_each_backend_is_judged() {
        let found = ask("shop/web-0", "10.96.0.1", 80, proto::TCP).unwrap();
        assert_eq!((found.verdict, found.allowed, found.is_complete), (Outcome::Allowed, 2, false));
        assert!(text(&found).starts_with(
            "Service shop/db: policies judge the backend, after the translation; 2 of 2 flows allowed by this node\n"
        ));
        let found = ask("shop/web-0", "10.96.0.1", 80, proto::UDP).unwrap();
        assert_eq!((found.verdict, found.allowed), (Outcome::Denied, 1), "the worst counts");
        assert_eq!(found.flows[0].verdict, Outcome::Denied);
        for (port, words) in [(81, "has no backends"), (82, "has no port TCP/82")] {
            let error = ask("shop/web-0", "10.96.0.1", port, proto::TCP).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    /// The node itself asks: one backend is a pod of this node, and the other one's node decides alone.
    #[test]
    fn what_other_nodes_decide_hides_nothing() {
        let found = ask("192.0.2.1", "10.96.0.1", 80, proto::TCP).unwrap();
        assert_eq!((found.verdict, found.is_complete, found.allowed), (Outcome::Allowed, false, 1));
    }

    #[test]
    fn a_free_address_of_a_service_range_is_refused() {
        let mut view = view();
        let services = Peer { node: Addr::UNSPECIFIED, identity: 0, flags: flags::SERVICES, pad: 0 };
        view.peers.insert("10.96.0.0/16".parse().unwrap(), services);
        let args = Args { from: "shop/web-0".to_owned(), to: "10.96.0.77".to_owned(), port: 80, proto: proto::TCP };
        let error = report(&view, &|_, _, _| Front::None, &args).unwrap_err().to_string();
        assert!(error.contains("no Service has it"), "{error}");
    }

    #[test]
    fn what_is_listed_is_bounded() {
        let many = |_: SocketAddr, _: u8, _: bool| Front::Service {
            name: None,
            backends: (0..100).map(|n| SocketAddr::new(ip(n), 5432)).collect(),
        };
        let args = Args { from: "shop/web-0".to_owned(), to: "10.96.0.1".to_owned(), port: 80, proto: proto::TCP };
        let found = report(&view(), &many, &args).unwrap();
        assert_eq!((found.flows.len(), found.more_flows, found.verdict), (32, 68, Outcome::Undecided));
        assert_eq!(found.flows[0].verdict, Outcome::Undecided, "the worst is among them");
    }

    #[test]
    fn ends_that_are_unknown_are_errors() {
        for (from, to, words) in [
            ("shop/none", "shop/db-0", "shop/none: neither"),
            ("shop/db-0", "none", "none: neither"),
            ("fd00::1", "shop/db-0", "no addresses of one family"),
        ] {
            let error = ask(from, to, 80, proto::TCP).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn protocols_have_names_or_numbers() {
        for (text, want) in [("tcp", Some(6)), ("UDP", Some(17)), ("sctp", Some(132)), ("47", Some(47)), ("256", None)]
        {
            assert_eq!(parse_proto(text).ok(), want, "{text}");
        }
    }

    #[test]
    fn its_json_is_an_interface() {
        assert_golden("policy_why", &ask("shop/web-0", "10.96.0.1", 80, proto::UDP).unwrap());
    }
}
