//! The list of entries: what the programs will do with each virtual address, from the maps of services, backends and source
//! ranges.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, bail};
use ipnet::IpNet;
use rustnet_common::backend::{Backend, flags as backend_flags};
use rustnet_common::service::{SvcEntry, flags};
use rustnet_common::tuple::proto;
use serde::Serialize;

use super::{Maps, clients};
use crate::bpf::store::backends::Backends;
use crate::cli::Places;
use crate::cli::output::Output;
use crate::namefile::{Services, service_key};
use crate::plan::{SourceRange, VipKey};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    /// `namespace/name`, and the name of the port; null where the agent's file has none.
    service: Option<String>,
    port_name: Option<String>,
    vip: IpAddr,
    port: u16,
    protocol: &'static str,
    /// `cluster`: pods and the host of this node; `external`: whoever comes in by a device.
    clients: &'static str,
    id: u32,
    affinity_seconds: u32,
    drop_when_empty: bool,
    /// The clients that may come by it; null for all, an empty list for nobody.
    source_ranges: Option<Vec<IpNet>>,
    backends: Vec<ServiceBackend>,
    /// Ids that the entry points to and that are of no backend of it: the maps disagree.
    missing: u32,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ServiceBackend {
    address: IpAddr,
    port: u16,
    id: u32,
    local: bool,
    terminating: bool,
}

/// Prints the entries of an address, of a namespace, or all.
pub fn run(places: &Places, vip: Option<IpAddr>, namespace: Option<&str>, out: &Output) -> Result<()> {
    let Maps { services: all, backends, ranges, names } = Maps::read(places)?;
    let is_in = |key: &VipKey| {
        let name = names.get(&service_key(key.ip, key.port, key.proto));
        name.is_some_and(|name| name.service.split_once('/').map(|(namespace, _)| namespace) == namespace)
    };
    let is_wanted = |key: &VipKey| vip.is_none_or(|vip| vip == key.ip) && (namespace.is_none() || is_in(key));
    let wanted = all.iter().filter(|(key, entry)| entry.flags & flags::VIP == 0 && is_wanted(key));
    let services: Vec<_> = wanted.map(|(key, entry)| read(key, entry, &backends, &ranges, &names)).collect();
    if let Some(vip) = vip.filter(|_| services.is_empty()) {
        bail!("no Service has the address {vip} here: `rustnetctl services` lists all");
    }
    let columns = ["SERVICE", "PORT", "ADDRESS", "PROTOCOL", "CLIENTS", "SOURCE RANGES", "ID", "AFFINITY", "BACKENDS"];
    out.print(&services, &columns, || services.iter().map(row).collect())
}

fn read(key: &VipKey, entry: &SvcEntry, all: &Backends, ranges: &BTreeSet<SourceRange>, names: &Services) -> Row {
    let name = names.get(&service_key(key.ip, key.port, key.proto));
    let backends: Vec<_> = all.of(entry).flatten().map(|b| backend(&b)).collect();
    Row {
        service: name.map(|name| name.service.clone()),
        port_name: name.map(|name| name.port.clone()).filter(|port| !port.is_empty()),
        vip: key.ip,
        port: key.port,
        protocol: proto::name(key.proto),
        clients: clients(key),
        id: entry.id,
        affinity_seconds: entry.affinity,
        drop_when_empty: entry.flags & flags::DROP_EMPTY != 0,
        source_ranges: super::ranges_of(key, entry, ranges),
        missing: entry.count - backends.len() as u32,
        backends,
    }
}

fn backend(backend: &Backend) -> ServiceBackend {
    ServiceBackend {
        address: backend.addr.into(),
        port: backend.port,
        id: backend.id,
        local: backend.flags & backend_flags::LOCAL != 0,
        terminating: backend.flags & backend_flags::TERMINATING != 0,
    }
}

fn row(service: &Row) -> Vec<String> {
    let affinity = match service.affinity_seconds {
        0 => "-".to_owned(),
        seconds => format!("{seconds}s"),
    };
    let ranges = super::show_ranges(service.source_ranges.as_deref());
    let mut backends: Vec<String> = service.backends.iter().map(show).collect();
    if service.missing > 0 {
        backends.push(format!("({} missing: restart the agent and report this)", service.missing));
    }
    if backends.is_empty() {
        backends.push(super::no_backends(service.drop_when_empty).to_owned());
    }
    let vip = SocketAddr::new(service.vip, service.port).to_string();
    let or_dash = |name: &Option<String>| name.clone().unwrap_or_else(|| "-".to_owned());
    let (name, port) = (or_dash(&service.service), or_dash(&service.port_name));
    vec![
        name,
        port,
        vip,
        service.protocol.to_owned(),
        service.clients.to_owned(),
        ranges,
        service.id.to_string(),
        affinity,
        backends.join(", "),
    ]
}

fn show(backend: &ServiceBackend) -> String {
    let marks = match (backend.local, backend.terminating) {
        (false, false) => "",
        (true, false) => " (here)",
        (false, true) => " (terminating)",
        (true, true) => " (here, terminating)",
    };
    format!("{}{marks}", SocketAddr::new(backend.address, backend.port))
}

#[cfg(test)]
mod tests {
    use super::{Row, ServiceBackend, row};
    use crate::cli::golden::assert_golden;

    #[test]
    fn a_service_is_called_by_its_name() {
        let backend = ServiceBackend {
            address: "10.1.1.5".parse().unwrap(),
            port: 5353,
            id: 1_048_577,
            local: true,
            terminating: false,
        };
        let named = Row {
            service: Some("kube-system/kube-dns".into()),
            port_name: Some("dns".into()),
            vip: "10.96.0.10".parse().unwrap(),
            port: 53,
            protocol: "UDP",
            clients: "cluster",
            id: 7,
            affinity_seconds: 0,
            drop_when_empty: false,
            source_ranges: None,
            backends: vec![backend],
            missing: 0,
        };
        let want =
            ["kube-system/kube-dns", "dns", "10.96.0.10:53", "UDP", "cluster", "-", "7", "-", "10.1.1.5:5353 (here)"]
                .map(str::to_owned);
        assert_eq!(row(&named), want);
        let closed = Row { source_ranges: Some(Vec::new()), ..named };
        assert_eq!(row(&closed)[5], "none (dropped)");
        let ranges = ["192.0.2.0/24", "198.51.100.0/24"].map(|range| range.parse().unwrap());
        let judged = Row { source_ranges: Some(ranges.to_vec()), ..closed };
        assert_eq!(row(&judged)[5], "192.0.2.0/24, 198.51.100.0/24");
        let nameless = Row { service: None, port_name: None, backends: Vec::new(), ..judged };
        assert_eq!(row(&nameless)[..2], ["-", "-"]);
        assert_golden("services", &[nameless]);
    }
}
