//! What kube-proxy left, or still does.

use anyhow::Result;

use super::finding::{Finding, Level};
use crate::leftovers::kube_proxy::{HEALTH_PORT, Leftovers, METRICS_PORT};
use crate::leftovers::sockets::{self, Listener, Owner, Proto};

/// How many names a finding lists; the finding names the command that lists them all.
const SHOWN: usize = 4;

/// What was found.
pub struct Facts {
    /// What it made.
    pub leftovers: Result<Leftovers>,
    /// Who serves its ports.
    pub listeners: Vec<Listener>,
}

/// Looks.
pub fn gather() -> Facts {
    let mut listeners = sockets::listeners().unwrap_or_default();
    listeners.retain(|it| it.proto == Proto::Tcp && [METRICS_PORT, HEALTH_PORT].contains(&it.port));
    Facts { leftovers: Leftovers::find(), listeners }
}

/// Judges.
pub fn check(facts: &Facts) -> Vec<Finding> {
    let left = match &facts.leftovers {
        Ok(left) => left,
        Err(error) => return vec![Finding::unknown("its rules", error)],
    };
    // Its health port is served by other proxies, too; its metrics port is not.
    let its = |it: &&Listener| match &it.owner {
        Owner::Process(name) => name == "kube-proxy",
        Owner::Hidden => it.port == METRICS_PORT,
        Owner::Kernel => false,
    };
    if let Some(listener) = facts.listeners.iter().find(its) {
        let detail =
            format!("serves port {}: it translates what hosts ask of Services before rustnet does", listener.port);
        let hint = "delete its DaemonSet and ConfigMap, then `rustnetctl cleanup --kube-proxy` on each node; or keep it, for \
                    processes alone";
        return vec![Finding::new(Level::Warning, "running", detail).hint(hint)];
    }
    let mut found = Vec::new();
    let names = left.names();
    if !names.is_empty() {
        let more = if names.len() > SHOWN { format!(" and {} more", names.len() - SHOWN) } else { String::new() };
        let detail =
            format!("{}{more}: hosts are led to endpoints of the past", names[..names.len().min(SHOWN)].join(", "));
        found.push(
            Finding::new(Level::Warning, "leftovers", detail)
                .hint("`rustnetctl cleanup --kube-proxy` removes them and nothing else (--dry-run lists them)"),
        );
    }
    if !left.legacy.is_empty() {
        let detail = format!("{} chains in iptables-legacy, such as {}", left.legacy.len(), left.legacy[0]);
        found.push(
            Finding::new(Level::Warning, "iptables-legacy", detail)
                .hint("run `kube-proxy --cleanup` from kube-proxy's own image, which brings iptables-legacy"),
        );
    }
    if let Some(first) = left.other_servers.first() {
        let detail =
            format!("{} virtual servers that are not certainly its, such as the {first}", left.other_servers.len());
        found.push(
            Finding::new(Level::Warning, "IPVS", detail)
                .hint("if nobody else uses IPVS here, `ipvsadm --clear` removes them"),
        );
    }
    if found.is_empty() {
        found.push(Finding::ok("leftovers", "none"));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::finding::{assert_only, assert_well};
    use super::*;
    use crate::leftovers::ipvs::{Takes, VirtualServer};
    use crate::leftovers::nftables::{Chain, Family, Table};
    use std::net::Ipv4Addr;

    fn facts(leftovers: Leftovers) -> Facts {
        Facts { leftovers: Ok(leftovers), listeners: Vec::new() }
    }

    fn listener(port: u16, owner: Owner) -> Listener {
        Listener { proto: Proto::Tcp, addr: Ipv4Addr::LOCALHOST.into(), port, owner }
    }

    #[test]
    fn nothing_is_well_and_another_proxys_health_port_is_its_own() {
        assert_well(&check(&facts(Leftovers::default())));
        let listeners = vec![listener(HEALTH_PORT, Owner::Hidden), listener(METRICS_PORT, Owner::Process("x".into()))];
        assert_well(&check(&Facts { listeners, ..facts(Leftovers::default()) }));
    }

    #[test]
    fn one_fault_at_a_time() {
        let table = |name: &str| Table { family: Family::Ip, name: name.into() };
        let chains = (0..9).map(|i| Chain { table: table("nat"), name: format!("KUBE-{i}") }).collect();
        let legacy = vec!["ip nat KUBE-SERVICES".to_owned()];
        let server = VirtualServer { takes: Takes::Mark(7), real: Vec::new() };
        for (leftovers, detail, hint) in [
            (
                Leftovers { tables: vec![table("kube-proxy")], ..Leftovers::default() },
                "table ip kube-proxy",
                "cleanup --kube-proxy",
            ),
            (Leftovers { chains, ..Leftovers::default() }, "and 5 more", "--dry-run"),
            (Leftovers { legacy, ..Leftovers::default() }, "1 chains", "kube-proxy --cleanup"),
            (Leftovers { other_servers: vec![server], ..Leftovers::default() }, "1 virtual servers", "ipvsadm"),
        ] {
            assert_only(&check(&facts(leftovers)), Level::Warning, detail, hint);
        }
        let unreadable = Facts { leftovers: Err(anyhow::anyhow!("EPERM")), listeners: Vec::new() };
        assert_only(&check(&unreadable), Level::Warning, "not checked: EPERM", "root");
    }

    #[test]
    fn while_it_runs_its_rules_are_no_leftovers() {
        let tables = vec![Table { family: Family::Ip6, name: "kube-proxy".into() }];
        for owner in [Owner::Hidden, Owner::Process("kube-proxy".into())] {
            let left = Leftovers { tables: tables.clone(), ..Leftovers::default() };
            let running = Facts { listeners: vec![listener(METRICS_PORT, owner)], ..facts(left) };
            assert_only(&check(&running), Level::Warning, "serves port 10249", "DaemonSet");
        }
    }
}
