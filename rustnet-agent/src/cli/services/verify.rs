//! `rustnetctl services --verify`: compares this node's maps with what the source of the agent says. Both are read, and
//! the planner of the agent decides what would have to be written.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use rustnet_common::tuple::proto;
use serde::Serialize;

use super::clients;
use crate::api;
use crate::bpf::store;
use crate::cli::Places;
use crate::cli::output::Output;
use crate::config::{Config, Source};
use crate::index::Index;
use crate::namefile::{self, SERVICES, Services, service_key};
use crate::net::host::Host;
use crate::net::netlink::Socket;
use crate::plan::{Deviation, DeviationKind, verify};
use crate::reconcile::node;
use crate::source::kube::list;
use crate::source::manifests::{Catalog, scan};
use crate::source::{Event, Kind};

/// What differs is compared once more after this: the agent may have been about to write it.
const SECOND_LOOK: Duration = Duration::from_secs(3);

/// What is printed as JSON.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    ok: bool,
    /// Front ends that the source asks for here.
    front_ends: usize,
    differences: Vec<Row>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    /// `missing`, `extra` or `differs`.
    kind: &'static str,
    /// `namespace/name`; of the whole address, any Service that has it. Null where nobody knows it any more.
    service: Option<String>,
    port_name: Option<String>,
    address: IpAddr,
    /// 0 for the whole address.
    port: u16,
    /// Null for the whole address.
    protocol: Option<&'static str>,
    clients: &'static str,
    details: Vec<String>,
}

/// What one look finds.
struct Look {
    index: Index,
    deviations: Vec<Deviation>,
}

impl Look {
    /// Reads the source, then the maps.
    fn take(config: &Config, places: &Places) -> Result<Self> {
        let mut index = Index::new(node::settings(config));
        index.set_host(Host::observe(&mut Socket::open()?)?.facts());
        read(config)?.into_iter().for_each(|event| index.handle(event));
        let (held, room) = store::snapshot(places.bpffs()?)?;
        let deviations = verify(&mut index, &held, room);
        Ok(Self { index, deviations })
    }
}

/// Compares, and prints what differs; true if nothing does.
pub fn run(places: &Places, config: &Config, out: &Output) -> Result<bool> {
    let mut look = Look::take(config, places)?;
    if !look.deviations.is_empty() {
        std::thread::sleep(SECOND_LOOK);
        let first = look.deviations;
        look = Look::take(config, places)?;
        let passed = keep_lasting(&first, &mut look.deviations);
        if passed > 0 && !out.is_json() {
            eprintln!("{passed} differences changed or went away meanwhile: the agent is catching up");
        }
    }
    let report = report(&look, &namefile::read(&places.run_dir, SERVICES)?);
    if report.ok && !out.is_json() {
        crate::cli::output::line(&format!("all {} front ends are as the source says", report.front_ends))?;
        return Ok(true);
    }
    let columns = ["DIFFERENCE", "SERVICE", "PORT", "FRONT END", "PROTOCOL", "CLIENTS", "DETAILS"];
    out.print(&report, &columns, || report.differences.iter().map(row).collect())?;
    Ok(report.ok)
}

/// Leaves what both looks found. Returns how much of the first one is gone, or otherwise.
fn keep_lasting(first: &[Deviation], second: &mut Vec<Deviation>) -> usize {
    second.retain(|it| first.contains(it));
    first.len() - second.len()
}

/// All that the source says of Services now.
fn read(config: &Config) -> Result<Vec<Event>> {
    match &config.source {
        Source::Manifests(dir) => {
            let events = scan(&mut Catalog::default(), dir).with_context(|| format!("reading {}", dir.display()))?;
            Ok(events.into_iter().chain(Kind::REQUIRED.map(Event::Synced)).collect())
        }
        Source::Kube(source) => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async { list::list(&api::connection(&api::settings(source).await?)?).await })
        }
    }
}

fn report(look: &Look, names: &Services) -> Report {
    let Look { index, deviations } = look;
    let mut of_address: BTreeMap<IpAddr, String> = BTreeMap::new();
    for (service, _) in index.services() {
        for ip in service.vips.iter().copied().chain(service.outside()) {
            of_address.entry(ip).or_insert_with(|| service.name.to_string());
        }
    }
    let row = |it: &Deviation| {
        let key = it.key;
        let owner = index.owner(&key).map(|(name, port)| (name.to_string(), port.name.to_string()));
        let known = || names.get(&service_key(key.ip, key.port, key.proto));
        let owner = owner.or_else(|| known().map(|name| (name.service.clone(), name.port.clone())));
        let (service, port) = owner.unzip();
        Row {
            kind: match it.kind {
                DeviationKind::Missing => "missing",
                DeviationKind::Extra => "extra",
                DeviationKind::Differs => "differs",
            },
            service: service.or_else(|| of_address.get(&key.ip).filter(|_| key.is_wildcard()).cloned()),
            port_name: port.filter(|port| !port.is_empty()),
            address: key.ip,
            port: key.port,
            protocol: (!key.is_wildcard()).then(|| proto::name(key.proto)),
            clients: clients(&key),
            details: it.details.clone(),
        }
    };
    let differences: Vec<_> = deviations.iter().map(row).collect();
    let wanted: BTreeSet<_> = index.service_keys().filter(|key| !key.is_wildcard()).collect();
    Report { ok: differences.is_empty(), front_ends: wanted.len(), differences }
}

fn row(it: &Row) -> Vec<String> {
    let or_dash = |text: Option<&str>| text.unwrap_or("-").to_owned();
    let front_end = match it.port {
        0 => format!("{} (whole address)", it.address),
        port => std::net::SocketAddr::new(it.address, port).to_string(),
    };
    let details = it.details.join(", ");
    vec![
        it.kind.to_owned(),
        or_dash(it.service.as_deref()),
        or_dash(it.port_name.as_deref()),
        front_end,
        or_dash(it.protocol),
        it.clients.to_owned(),
        or_dash((!details.is_empty()).then_some(&*details)),
    ]
}

#[cfg(test)]
mod tests {
    use super::{Deviation, DeviationKind, Look, keep_lasting, report, row};
    use crate::cli::golden::assert_golden;
    use crate::config::Routing;
    use crate::index::{Index, Settings};
    use crate::model::build::{ip, service};
    use crate::namefile::{ServiceName, Services};
    use crate::plan::VipKey;
    use rustnet_common::service::scope;
    use rustnet_common::tuple::proto;

    #[test]
    fn only_what_two_looks_find_is_a_difference() {
        let missing = |port, details: &str| Deviation {
            key: VipKey { ip: ip("10.96.0.10"), port, proto: proto::TCP, scope: scope::CLUSTER },
            kind: DeviationKind::Missing,
            details: vec![details.to_owned()],
        };
        let first = [missing(1, "stays"), missing(2, "goes"), missing(3, "was so")];
        let mut second = vec![missing(1, "stays"), missing(3, "is otherwise"), missing(4, "is new")];
        assert_eq!(keep_lasting(&first, &mut second), 2);
        assert_eq!(second, [missing(1, "stays")]);
    }

    #[test]
    fn differences_have_the_names_of_services() {
        let mut index = Index::new(Settings::new("n1", Routing::Vxlan));
        index.handle(service("web", &["10.96.0.10"]).port("http", 80, proto::TCP).apply());
        let key = |address: &str, port, proto, scope| VipKey { ip: ip(address), port, proto, scope };
        let deviation = |key, kind, details: &[&str]| {
            let details = details.iter().map(|it| (*it).to_owned()).collect();
            Deviation { key, kind, details }
        };
        let deviations = vec![
            deviation(VipKey::wildcard(ip("10.96.0.10")), DeviationKind::Missing, &[]),
            deviation(
                key("10.96.0.10", 80, proto::TCP, scope::CLUSTER),
                DeviationKind::Differs,
                &["lacks backend 10.244.1.2:8080", "has backend 10.244.1.3:8080"],
            ),
            deviation(key("10.96.0.11", 53, proto::UDP, scope::EXTERNAL), DeviationKind::Extra, &[]),
            deviation(key("10.96.0.12", 1, proto::SCTP, scope::CLUSTER), DeviationKind::Extra, &[]),
        ];
        let gone = ServiceName { service: "kube-system/dns".into(), port: "dns".into() };
        let names: Services = [("10.96.0.11:53/UDP".to_owned(), gone)].into();
        let report = report(&Look { index, deviations }, &names);
        let rows: Vec<_> = report.differences.iter().map(|it| row(it).join(" | ")).collect();
        assert_eq!(
            rows,
            [
                "missing | default/web | - | 10.96.0.10 (whole address) | - | cluster | -",
                "differs | default/web | http | 10.96.0.10:80 | TCP | cluster | lacks backend 10.244.1.2:8080, has backend \
                 10.244.1.3:8080",
                "extra | kube-system/dns | dns | 10.96.0.11:53 | UDP | external | -",
                "extra | - | - | 10.96.0.12:1 | SCTP | cluster | -",
            ]
        );
        assert_golden("services-verify", &report);
    }
}
