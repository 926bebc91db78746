//! `rustnetctl services`: what the programs will do with a virtual address, from the maps of services
//! and backends.

use std::net::{IpAddr, SocketAddr};

use anyhow::Result;
use rustnet_common::backend::{Backend, flags as backend_flags};
use rustnet_common::service::{SvcEntry, flags};
use rustnet_common::tuple::proto;
use serde::Serialize;

use super::Places;
use super::output::Output;
use crate::bpf::store;
use crate::bpf::store::backends::{Access, Backends};
use crate::plan::VipKey;

/// Options.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this virtual address
    vip: Option<IpAddr>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Service {
    vip: IpAddr,
    port: u16,
    protocol: &'static str,
    id: u32,
    affinity_seconds: u32,
    drop_when_empty: bool,
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

/// Prints the services.
pub fn run(places: &Places, args: &Args, out: &Output) -> Result<()> {
    let backends = Backends::open(places.bpffs()?, Access::Read)?;
    let all = store::services(places.bpffs()?)?;
    let wanted =
        all.iter().filter(|(key, entry)| entry.flags & flags::VIP == 0 && args.vip.is_none_or(|vip| vip == key.ip));
    let services: Vec<_> = wanted.map(|(key, entry)| read(key, entry, &backends)).collect();
    out.print(&services, &["VIP", "PROTOCOL", "ID", "AFFINITY", "BACKENDS"], || services.iter().map(row).collect())
}

fn read(key: &VipKey, entry: &SvcEntry, all: &Backends) -> Service {
    let backends: Vec<_> = all.of(entry).flatten().map(|b| backend(&b)).collect();
    Service {
        vip: key.ip,
        port: key.port,
        protocol: proto::name(key.proto),
        id: entry.id,
        affinity_seconds: entry.affinity,
        drop_when_empty: entry.flags & flags::DROP_EMPTY != 0,
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

fn row(service: &Service) -> Vec<String> {
    let affinity = match service.affinity_seconds {
        0 => "-".to_owned(),
        seconds => format!("{seconds}s"),
    };
    let mut backends: Vec<String> = service.backends.iter().map(show).collect();
    if service.missing > 0 {
        backends.push(format!("({} missing: restart the agent and report this)", service.missing));
    }
    if backends.is_empty() {
        backends.push(if service.drop_when_empty { "none (dropped)" } else { "none (refused)" }.to_owned());
    }
    let vip = SocketAddr::new(service.vip, service.port).to_string();
    vec![vip, service.protocol.to_owned(), service.id.to_string(), affinity, backends.join(", ")]
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
