//! Where the kernel sends the host's packets to pods of other nodes and to Services. Rules of the routing policy, and other
//! programs' routes to a part of a range, come before the agent's routes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use rustnet_common::names::OVERLAY_DEV;

use super::finding::{Finding, Level};
use crate::config::Config;
use crate::namefile;
use crate::net::host::Host;
use crate::net::netlink::Socket;
use crate::net::route;
use crate::ways::{Owner, Way, Ways};

/// Services that are asked for: routes to them seldom differ.
const MOST_SERVICES: usize = 256;
/// Destinations that a finding names.
const SHOWN: usize = 3;

/// Where packets to one destination leave.
pub struct Exit {
    /// Whose it is.
    pub name: String,
    /// The destination.
    pub to: IpAddr,
    /// Devices by which they have to leave.
    pub wanted: Vec<String>,
    /// The device by which they do; `None`: they go nowhere.
    pub device: Option<String>,
}

/// What was found.
#[derive(Default)]
pub struct Facts {
    /// Pods of other nodes.
    pub pods: Vec<Exit>,
    /// Services.
    pub services: Vec<Exit>,
}

/// Looks. What cannot be asked for is left out.
pub fn gather(config: &Config, host: &Host, ways: &Ways) -> Facts {
    let Ok(mut socket) = Socket::open() else { return Facts::default() };
    let name = |index: u32| host.links.iter().find(|link| link.index == index).map(|link| link.name.clone());
    let overlay = host.links.iter().find(|link| link.name == OVERLAY_DEV).map(|link| link.index);
    let mut exit = |of: String, to: IpAddr, wanted: Vec<String>| {
        let device = route::device_to(&mut socket, to).ok()?;
        Some(Exit { name: of, to, wanted, device: device.map(|index| name(index).unwrap_or_default()) })
    };
    let nodes: namefile::Nodes = namefile::read(&config.run_dir, namefile::NODES).unwrap_or_default();
    let owner = |prefix: &IpNet| {
        let of = nodes.iter().find(|(_, node)| node.pod_cidrs.iter().any(|cidr| cidr.trunc() == prefix.trunc()));
        of.map_or_else(|| prefix.to_string(), |(name, _)| name.clone())
    };
    let mut facts = Facts::default();
    for (prefix, entry) in ways.entries.iter().filter(|(_, entry)| entry.owner == Owner::Pods) {
        let device = match entry.way {
            Way::Tunnel { .. } => overlay,
            Way::Direct { device, .. } => Some(device),
            Way::Here | Way::Routed { .. } => None,
        };
        let first = prefix.hosts().next().unwrap_or(prefix.addr());
        let wanted = device.and_then(name);
        facts.pods.extend(wanted.and_then(|wanted| exit(owner(prefix), first, vec![wanted])));
    }
    let services: namefile::Services = namefile::read(&config.run_dir, namefile::SERVICES).unwrap_or_default();
    let vips: BTreeMap<IpAddr, String> =
        services.into_iter().filter_map(|(key, it)| Some((namefile::address_of(&key)?, it.service))).collect();
    let uplinks: Vec<_> = ways.place.uplinks.iter().map(|it| it.name.clone()).collect();
    // An address of this host is here, whatever the routes.
    let own = host.facts().own_addresses();
    for (ip, service) in vips.into_iter().filter(|(ip, _)| !own.contains(ip)).take(MOST_SERVICES) {
        facts.services.extend(exit(service, ip, uplinks.clone()));
    }
    facts
}

/// Judges.
pub fn check(facts: &Facts) -> Vec<Finding> {
    let pods = finding("pods of other nodes", &facts.pods, |to| {
        format!("see `ip route get {to}` and `ip rule`: remove the rule or route that comes before the agent's")
    });
    let services = finding("Services", &facts.services, |to| {
        format!(
            "hosts are served by uplinks alone: give the agents --service-cidrs, so that they make a route; if they have one, \
             `ip route get {to}` and `ip rule` show what comes before it"
        )
    });
    pods.into_iter().chain(services).collect()
}

fn finding(name: &'static str, exits: &[Exit], hint: impl Fn(IpAddr) -> String) -> Option<Finding> {
    let is_wrong = |it: &&Exit| it.device.as_ref().is_none_or(|device| !it.wanted.contains(device));
    let wrong: Vec<_> = exits.iter().filter(is_wrong).collect();
    let first = wrong.first()?;
    let by: BTreeSet<_> = wrong.iter().map(|it| it.device.as_deref().unwrap_or("nowhere")).collect();
    let mut shown: Vec<_> = wrong.iter().take(SHOWN).map(|it| format!("{} ({})", it.name, it.to)).collect();
    if wrong.len() > SHOWN {
        shown.push(format!("{} more", wrong.len() - SHOWN));
    }
    let by: Vec<_> = by.into_iter().collect();
    let detail = format!(
        "the host's packets to {} leave by {}, not by {}",
        shown.join(", "),
        by.join(", "),
        first.wanted.join(" or ")
    );
    Some(Finding::new(Level::Warning, name, detail).hint(hint(first.to)))
}

#[cfg(test)]
mod tests {
    use super::super::finding::{assert_only, assert_well};
    use super::*;

    fn exit(name: &str, to: &str, wanted: &str, device: Option<&str>) -> Exit {
        let to = to.parse().expect("an address");
        Exit { name: name.into(), to, wanted: vec![wanted.into()], device: device.map(str::to_owned) }
    }

    fn facts(pods: Option<&str>, services: Option<&str>) -> Facts {
        Facts {
            pods: (1..=5).map(|i| exit(&format!("n{i}"), &format!("10.244.{i}.1"), OVERLAY_DEV, pods)).collect(),
            services: vec![exit("default/web", "10.96.0.10", "eth0", services)],
        }
    }

    #[test]
    fn packets_that_leave_as_they_should_are_well() {
        assert_well(&check(&facts(Some(OVERLAY_DEV), Some("eth0"))));
        assert_well(&check(&Facts::default()));
    }

    #[test]
    fn one_fault_at_a_time() {
        for (facts, detail, hint) in [
            (facts(Some("tun0"), Some("eth0")), "n3 (10.244.3.1), 2 more leave by tun0, not by rn_vxlan", "ip rule"),
            (facts(None, Some("eth0")), "leave by nowhere", "ip route get 10.244.1.1"),
            (facts(Some(OVERLAY_DEV), Some("docker0")), "default/web (10.96.0.10) leave by docker0", "--service-cidrs"),
        ] {
            assert_only(&check(&facts), Level::Warning, detail, hint);
        }
    }
}
