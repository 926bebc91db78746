//! `rustnetctl endpoints`: this node's pods, from `rn_endpoints`, with the names that the CNI binary's records or the
//! agent know.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::Result;
use rustnet_common::files::{Bandwidth, EndpointFile, Limit, PortMapping};
use serde::Serialize;

use super::Places;
use super::output::Output;
use crate::bpf::store::endpoints::Endpoints;
use crate::bpf::store::host_ports::{Entries, HostPorts};
use crate::net::endpoints as records;
use crate::podfile;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    address: IpAddr,
    pod: Option<String>,
    container_id: Option<String>,
    interface: Option<String>,
    ifindex: u32,
    mac: String,
    identity: u32,
    /// In bits, for what the pod receives and what it sends.
    bandwidth: Bandwidth,
    /// The ports of this node that it asked for.
    host_ports: Vec<PortMapping>,
    /// False where the programs know another pod, or none, for one of these ports.
    has_host_ports: bool,
    /// False where only the record has it: the programs do not know the pod.
    in_map: bool,
}

/// What people call the pods, by address: as the runtime named them, else as the agent's source does, else by container.
pub fn names(places: &Places, records: &BTreeMap<IpAddr, EndpointFile>) -> Result<podfile::Names> {
    let mut names = podfile::read(&places.run_dir)?;
    for (ip, record) in records {
        if !record.pod_name.is_empty() {
            names.insert(*ip, format!("{}/{}", record.pod_namespace, record.pod_name));
        } else if !names.contains_key(ip) {
            names.insert(*ip, record.container_id.chars().take(12).collect());
        }
    }
    Ok(names)
}

/// The records by address.
pub fn by_address(places: &Places) -> Result<BTreeMap<IpAddr, EndpointFile>> {
    let records = records::read(&places.run_dir)?.endpoints;
    Ok(records.into_iter().flat_map(|r| r.addresses.clone().into_iter().map(move |ip| (ip, r.clone()))).collect())
}

/// Prints the pods.
pub fn run(places: &Places, out: &Output) -> Result<()> {
    let mut records = by_address(places)?;
    let names = names(places, &records)?;
    let mut rows = Vec::new();
    let bpffs = places.bpffs()?;
    let ports = HostPorts::open(bpffs)?.read()?;
    for (address, endpoint) in Endpoints::open(bpffs)?.read()? {
        let record = records.remove(&address);
        rows.push(Row {
            address,
            pod: names.get(&address).cloned(),
            container_id: record.as_ref().map(|r| r.container_id.clone()),
            bandwidth: record.as_ref().map(|r| r.bandwidth).unwrap_or_default(),
            host_ports: record.as_ref().map_or_else(Vec::new, |r| ports_of(r, address)),
            has_host_ports: record.as_ref().is_none_or(|r| has_ports(&ports, r)),
            interface: record.map(|r| r.host_ifname),
            ifindex: endpoint.ifindex,
            mac: mac(endpoint.mac),
            identity: endpoint.identity,
            in_map: true,
        });
    }
    rows.extend(records.into_iter().map(|(address, record)| Row {
        address,
        pod: names.get(&address).cloned(),
        ifindex: record.ifindex,
        mac: record.mac.clone(),
        identity: 0,
        in_map: false,
        bandwidth: record.bandwidth,
        host_ports: ports_of(&record, address),
        has_host_ports: has_ports(&ports, &record),
        container_id: Some(record.container_id),
        interface: Some(record.host_ifname),
    }));
    rows.sort_by_key(|row| row.address);
    out.print(
        &rows,
        &["ADDRESS", "POD", "INTERFACE", "IFINDEX", "MAC", "INGRESS", "EGRESS", "HOST PORTS", "STATE"],
        || rows.iter().map(line).collect(),
    )
}

fn line(row: &Row) -> Vec<String> {
    let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
    let state = match (row.in_map, row.container_id.is_some()) {
        (true, true) if !row.has_host_ports => "host ports not in the map",
        (true, true) => "ok",
        (true, false) => "no record",
        (false, _) => "not in the map",
    };
    let ports: Vec<_> = row.host_ports.iter().map(ToString::to_string).collect();
    vec![
        row.address.to_string(),
        or_dash(&row.pod),
        or_dash(&row.interface),
        row.ifindex.to_string(),
        row.mac.clone(),
        rate(row.bandwidth.ingress),
        rate(row.bandwidth.egress),
        if row.host_ports.is_empty() { "-".to_owned() } else { ports.join(", ") },
        state.to_owned(),
    ]
}

/// The ports of the node by which an address of a pod is reached.
fn ports_of(record: &EndpointFile, address: IpAddr) -> Vec<PortMapping> {
    record.host_ports.iter().filter(|mapping| mapping.is_of_family(&address)).copied().collect()
}

/// True if all ports of a record are in the map.
fn has_ports(known: &Entries, record: &EndpointFile) -> bool {
    record.host_port_entries().iter().all(|(key, value)| known.get(key) == Some(value))
}

/// A limit with the largest unit that holds it exactly, as in the pods' annotations.
fn rate(limit: Option<Limit>) -> String {
    let Some(Limit { rate, .. }) = limit else { return "-".to_owned() };
    let fits = |(unit, _): &(u64, &str)| rate.is_multiple_of(*unit);
    let units = [(1_000_000_000, "Gbit/s"), (1_000_000, "Mbit/s"), (1_000, "kbit/s")];
    let (unit, name) = units.into_iter().find(fits).unwrap_or((1, "bit/s"));
    format!("{} {name}", rate / unit)
}

fn mac(mac: [u8; 6]) -> String {
    mac.map(|octet| format!("{octet:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::{Bandwidth, Limit, PortMapping, Row};
    use crate::cli::golden::assert_golden;
    use rustnet_common::files::Protocol;

    #[test]
    fn its_json_is_an_interface() {
        let limit = Some(Limit { rate: 1_500_000, burst: 1_048_576 });
        let row = Row {
            address: "10.1.1.5".parse().unwrap(),
            pod: Some("shop/web-0".into()),
            container_id: Some("0123456789abcdef".into()),
            interface: Some("rnv1".into()),
            ifindex: 7,
            mac: "02:00:00:00:00:07".into(),
            identity: 0,
            bandwidth: Bandwidth { ingress: limit, egress: limit },
            host_ports: vec![PortMapping {
                host_ip: Some("127.0.0.1".parse().unwrap()),
                host_port: 8080,
                container_port: 80,
                protocol: Protocol::Tcp,
            }],
            has_host_ports: true,
            in_map: true,
        };
        assert_golden("endpoints", &[row]);
    }
}
