//! `rustnetctl policy NAME`: the policies that select one pod, and each entry of the maps that allows it something.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::RangeInclusive;

use anyhow::{Result, bail};
use rustnet_common::policy::{ALLOW, ANY_CLASS, AUDIT, OPEN, flags};
use serde::Serialize;

use super::view::{View, show_list, show_policies, show_proto};
use super::{State, state};
use crate::cli::output::{Output, json, line, table};
use crate::plan::policies::PolicySnapshot;
use crate::policyfile::List;

/// Pods and ranges of one class that are listed.
const LISTED: usize = 8;

/// What policies mean for one address of a pod.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    address: IpAddr,
    pod: Option<String>,
    /// False for a pod of another node, of which only the class is known here.
    is_here: bool,
    /// False if no policy is enforced on this node.
    is_enforced: bool,
    state: Option<State>,
    /// What the pod is for the policies of others; none if none of this node's selects it.
    class: Option<Class>,
    /// None where all may come, or nothing is decided.
    ingress: Option<Direction>,
    /// None where it may go anywhere, or nothing is decided.
    egress: Option<Direction>,
}

/// What policies say of one direction.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Direction {
    set: u32,
    /// The policies that select the pod.
    policies: List,
    entries: Vec<Entry>,
}

/// An entry of the maps, or several with adjacent ports.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    /// The other side; none for any address.
    class: Option<Class>,
    /// None for all protocols.
    protocol: Option<String>,
    first_port: u16,
    last_port: u16,
    is_allowed: bool,
    /// The flow would be denied, but the namespace is audited.
    is_audited: bool,
    /// Name of the rule, or its number.
    rule: Option<String>,
}

/// A class, and who has it as far as this node knows.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Class {
    id: u32,
    /// Selectors, named ports and blocks that hold for it, as the agent's file says.
    selectors: List,
    /// Pods, by name or address.
    pods: List,
    /// Ranges of addresses that no pod has.
    ranges: List,
}

/// Prints the pod with this name or address.
///
/// # Errors
/// Nobody knows it.
pub fn run(view: &View, name: &str, out: &Output) -> Result<()> {
    let reports = reports(view, name)?;
    if out.is_json() {
        return json(&reports);
    }
    let texts: Vec<String> = reports.iter().map(text).collect();
    line(&texts.join("\n\n"))
}

fn reports(view: &View, name: &str) -> Result<Vec<Report>> {
    let addresses = match name.parse::<IpAddr>() {
        Ok(ip) => vec![ip],
        Err(_) => view.addresses(name),
    };
    let is_known = |ip: &&IpAddr| view.around.endpoints.contains_key(*ip) || view.maps.pods.contains_key(*ip);
    let known: Vec<&IpAddr> = addresses.iter().filter(is_known).collect();
    if known.is_empty() {
        bail!(
            "no pod {name} of this node, nor one that its policies are about: write namespace/name or an address; `rustnetctl \
             policy` lists the pods of this node"
        );
    }
    let members = Members::of(view);
    Ok(known.into_iter().map(|ip| report(view, &members, *ip)).collect())
}

fn report(view: &View, members: &Members, address: IpAddr) -> Report {
    let View { maps, around, .. } = view;
    let ifindex = around.endpoints.get(&address).copied();
    let is_enforced = maps.state.flags & flags::ENFORCED != 0;
    let pod = maps.pods.get(&address).filter(|pod| is_enforced && pod.ifindex == ifindex.unwrap_or_default());
    let direction = |set: u32| {
        let is_selected = set != OPEN && ifindex.is_some();
        is_selected.then(|| Direction { set, policies: view.policies(set), entries: entries(view, members, set) })
    };
    Report {
        address,
        pod: view.pods.get(&address).cloned(),
        is_here: ifindex.is_some(),
        is_enforced,
        state: ifindex.map(|_| state(is_enforced, pod)),
        class: pod.and_then(|pod| members.class(view, pod.class)),
        ingress: pod.and_then(|pod| direction(pod.ingress)),
        egress: pod.and_then(|pod| direction(pod.egress)),
    }
}

/// What two entries that become one have in common: class, protocol, flags and rule.
type Common = (u32, Option<u8>, u32, u32);

/// The entries of a set, with adjacent ports together.
fn entries(view: &View, members: &Members, set: u32) -> Vec<Entry> {
    let mut found: BTreeMap<Common, Vec<RangeInclusive<u16>>> = BTreeMap::new();
    for (key, rule) in view.maps.rules.iter().filter(|(key, _)| key.set == set) {
        let common = (key.class, key.ports.proto(), rule.flags, rule.rule);
        found.entry(common).or_default().push(key.ports.bounds());
    }
    let entry = |(class, proto, flags, rule): Common, ports: RangeInclusive<u16>| Entry {
        class: members.class(view, class),
        protocol: proto.map(show_proto),
        first_port: *ports.start(),
        last_port: *ports.end(),
        is_allowed: flags & ALLOW != 0,
        is_audited: flags & AUDIT != 0,
        rule: view.rule(rule),
    };
    found.into_iter().flat_map(|(common, ports)| merge(ports).into_iter().map(move |it| entry(common, it))).collect()
}

/// The fewest ranges with the same ports, in order.
fn merge(mut ranges: Vec<RangeInclusive<u16>>) -> Vec<RangeInclusive<u16>> {
    ranges.sort_unstable_by_key(|range| *range.start());
    let mut merged: Vec<RangeInclusive<u16>> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if u32::from(*range.start()) <= u32::from(*last.end()) + 1 => {
                *last = *last.start()..=*last.end().max(range.end());
            }
            _ => merged.push(range),
        }
    }
    merged
}

/// Who has each class, by the maps. A pod with two addresses is there once.
struct Members {
    pods: BTreeMap<u32, BTreeSet<String>>,
    ranges: BTreeMap<u32, BTreeSet<String>>,
}

impl Members {
    fn of(view: &View) -> Self {
        let PolicySnapshot { pods, cidrs, .. } = &view.maps;
        let mut it = Self { pods: BTreeMap::new(), ranges: BTreeMap::new() };
        for (ip, pod) in pods {
            let name = view.pods.get(ip).cloned().unwrap_or_else(|| ip.to_string());
            it.pods.entry(pod.class).or_default().insert(name);
        }
        for (range, class) in cidrs {
            it.ranges.entry(*class).or_default().insert(range.to_string());
        }
        it
    }

    /// What is known of a class; none for that of all addresses.
    fn class(&self, view: &View, id: u32) -> Option<Class> {
        let of = |members: &BTreeMap<u32, BTreeSet<String>>| {
            let all = members.get(&id);
            let texts = all.into_iter().flatten().take(LISTED).cloned().collect();
            List { texts, more: all.map_or(0, BTreeSet::len).saturating_sub(LISTED) }
        };
        (id != ANY_CLASS).then(|| Class {
            id,
            selectors: view.names.classes.get(&id).cloned().unwrap_or_default(),
            pods: of(&self.pods),
            ranges: of(&self.ranges),
        })
    }
}

fn text(report: &Report) -> String {
    let name = report.pod.as_ref().map_or_else(String::new, |pod| format!("{pod} "));
    let state = report.state.map_or("a pod of another node", State::word);
    let mut lines = vec![format!("{name}({}): {state}", report.address)];
    if let Some(class) = &report.class {
        lines.push(format!("class {:08x}: {}", class.id, show_selectors(class)));
    }
    for (name, direction) in [("ingress", &report.ingress), ("egress", &report.egress)] {
        match (direction, report.state) {
            (Some(it), _) => lines.push(show_direction(name, it)),
            (None, Some(State::Undecided)) => lines.push(format!("{name}: nothing passes until the agent has decided")),
            (None, Some(_)) if !report.is_enforced => {
                lines.push(format!("{name}: open, no policy is enforced on this node"));
            }
            (None, Some(_)) => lines.push(format!("{name}: open, no policy selects the pod")),
            (None, None) => {}
        }
    }
    lines.join("\n")
}

fn show_direction(name: &str, it: &Direction) -> String {
    let head = format!("{name}: isolated by {}", show_policies(it.set, &it.policies));
    if it.entries.is_empty() {
        return format!("{head}: nothing is allowed");
    }
    let header = match name {
        "ingress" => ["FROM", "WHO", "PROTOCOL", "PORTS", "RULE"],
        _ => ["TO", "WHO", "PROTOCOL", "PORTS", "RULE"],
    };
    let table = table(&header, it.entries.iter().map(row).collect());
    let table: Vec<String> = table.lines().map(|line| format!("  {line}")).collect();
    format!("{head}\n{}", table.join("\n"))
}

fn row(it: &Entry) -> Vec<String> {
    let ports = match (it.first_port, it.last_port) {
        (0, u16::MAX) => "all".to_owned(),
        (first, last) if first == last => first.to_string(),
        (first, last) => format!("{first}-{last}"),
    };
    let rule = it.rule.clone().unwrap_or_else(|| "-".to_owned());
    vec![
        it.class.as_ref().map_or_else(|| "any".to_owned(), |class| format!("{:08x}", class.id)),
        it.class.as_ref().map_or_else(|| "any address".to_owned(), show_members),
        it.protocol.clone().unwrap_or_else(|| "all".to_owned()),
        ports,
        match (it.is_allowed, it.is_audited) {
            (_, true) => format!("{rule} (denies; audited)"),
            (true, _) => rule,
            _ => format!("{rule} (denies)"),
        },
    ]
}

fn show_selectors(class: &Class) -> String {
    let texts = class.selectors.texts.join("; ");
    match class.selectors.more {
        _ if texts.is_empty() => "its selectors are not known".to_owned(),
        0 => texts,
        more => format!("{texts} and {more} more"),
    }
}

fn show_members(class: &Class) -> String {
    let lists = [&class.pods, &class.ranges];
    let found: Vec<String> = lists.into_iter().filter(|list| !list.texts.is_empty()).map(show_list).collect();
    if found.is_empty() { "nobody now".to_owned() } else { found.join("; ") }
}

#[cfg(test)]
mod tests {
    use super::{Members, Output, merge, reports, run, text};
    use crate::cli::golden::assert_golden;
    use crate::cli::output::Format;
    use crate::cli::policy::build::{ip, view};
    use rustnet_common::policy::PolicyPod;

    #[test]
    fn ports_are_merged() {
        assert_eq!(merge(vec![81..=81, 80..=80, 90..=99]), [80..=81, 90..=99]);
        assert_eq!(merge(vec![0..=u16::MAX, 80..=80]), [0..=u16::MAX]);
        assert_eq!(merge(vec![8..=15, 16..=19, 65535..=65535]), [8..=19, 65535..=65535]);
    }

    #[test]
    fn its_json_is_an_interface() {
        assert_golden("policy_pod", &reports(&view(), "shop/db-0").unwrap());
    }

    #[test]
    fn its_text_names_policies_and_who_they_allow() {
        let shown: Vec<String> = reports(&view(), "shop/db-0").unwrap().iter().map(text).collect();
        let want = "shop/db-0 (10.1.1.1): isolated\n\
                    class 00000055: pods of shop with app in (db)\n\
                    ingress: isolated by shop/db, shop/base\n\
                    \x20 FROM      WHO                                PROTOCOL  PORTS      RULE\n\
                    \x20 any       any address                        UDP       53         shop/base ingress[0]\n\
                    \x20 0000002b  10.1.2.9, shop/web-0; 10.9.0.0/16  TCP       5432-5434  shop/db ingress[0]\n\
                    egress: isolated by set 0000001b: nothing is allowed";
        assert_eq!(shown, [want]);
        let shown = |name: &str| text(&reports(&view(), name).unwrap()[0]);
        assert!(
            shown("10.1.1.2").ends_with(
                "(10.1.1.2): open\nclass 0000002b: its selectors are not known\n\
             ingress: open, no policy selects the pod\negress: open, no policy selects the pod"
            ),
            "{}",
            shown("10.1.1.2")
        );
        assert!(shown("10.1.1.3").contains("undecided\ningress: nothing passes"), "{}", shown("10.1.1.3"));
        assert!(shown("10.1.2.9").starts_with("(10.1.2.9): a pod of another node"), "{}", shown("10.1.2.9"));
    }

    #[test]
    fn who_has_a_class_is_counted_by_pods() {
        let mut view = view();
        for n in 100..110 {
            let far = PolicyPod { class: 0x2b, ..PolicyPod::default() };
            for ip in [ip(n), format!("fd00::{n}").parse().unwrap()] {
                view.maps.pods.insert(ip, far);
                view.pods.insert(ip, format!("shop/far-{n}"));
            }
        }
        let class = Members::of(&view).class(&view, 0x2b).unwrap();
        // Ten of two addresses, one of this node, and one without a name.
        assert_eq!((class.pods.texts.len(), class.pods.more), (8, 4), "{:?}", class.pods);
    }

    #[test]
    fn where_nothing_is_enforced_no_selector_is_blamed() {
        let mut view = view();
        view.maps.state.flags = 0;
        let text = text(&reports(&view, "shop/db-0").unwrap()[0]);
        assert!(text.contains("ingress: open, no policy is enforced on this node"), "{text}");
    }

    #[test]
    fn a_pod_that_nobody_knows_is_an_error() {
        let error = run(&view(), "shop/none", &Output::stdout(Format::Json)).unwrap_err().to_string();
        assert!(error.contains("no pod shop/none"), "{error}");
        assert!(reports(&view(), &ip(77).to_string()).is_err());
    }
}
