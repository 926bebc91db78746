//! `services.json`, `nodes.json` and `unserved.json` in the run directory: names of objects for the `rustnetctl` command, because
//! the maps hold numbers alone. The agent writes them from its index.

use crate::index::{Index, unserved};
use crate::install::write_atomic;
use anyhow::Context;
use ipnet::IpNet;
use rustnet_common::tuple::proto;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

/// Name of the file of Services.
pub const SERVICES: &str = "services.json";
/// Name of the file of Nodes.
pub const NODES: &str = "nodes.json";

/// Name of the file of what objects ask for and do not get.
pub const UNSERVED: &str = "unserved.json";

/// Services by [`service_key`].
pub type Services = BTreeMap<String, ServiceName>;
/// Nodes by name.
pub type Nodes = BTreeMap<String, NodeName>;

/// Who asks for a feature, by its name.
pub type Unserved = BTreeMap<String, Askers>;

/// The objects that ask for one feature.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Askers {
    /// How many.
    pub count: usize,
    /// A few of them.
    pub examples: Vec<String>,
}

/// Whose an entry is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceName {
    /// `namespace/name`.
    pub service: String,
    /// Name of the port; empty when it has none.
    pub port: String,
}

/// What is known of a Node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeName {
    /// Its internal addresses, in the order of its object.
    pub addresses: Vec<IpAddr>,
    /// The ranges of its pods.
    pub pod_cidrs: Vec<IpNet>,
}

/// How a service entry is called: `10.96.0.10:53/UDP`.
pub fn service_key(ip: IpAddr, port: u16, protocol: u8) -> String {
    format!("{}/{}", SocketAddr::new(ip, port), proto::name(protocol))
}

/// The address in a [`service_key`].
pub fn address_of(key: &str) -> Option<IpAddr> {
    key.split('/').next()?.parse::<SocketAddr>().ok().map(|it| it.ip())
}

/// Writes both files as the index has it; unchanged content is not written again.
///
/// # Errors
/// The run directory cannot be written.
pub fn write_all(run_dir: &Path, index: &Index) -> anyhow::Result<()> {
    let named = index.service_keys().filter_map(|key| {
        let (service, port) = index.owner(&key)?;
        let name = ServiceName { service: service.to_string(), port: port.name.to_string() };
        Some((service_key(key.ip, key.port, key.proto), name))
    });
    write(run_dir, SERVICES, &named.collect::<Services>())?;
    let nodes = index.nodes().map(|node| {
        let known = NodeName { addresses: node.addresses.to_vec(), pod_cidrs: node.pod_cidrs.to_vec() };
        (node.name.to_string(), known)
    });
    write(run_dir, NODES, &nodes.collect::<Nodes>())?;
    Ok(())
}

/// Writes what objects ask for and do not get; unchanged content is not written again.
///
/// # Errors
/// The run directory cannot be written.
pub fn write_unserved(run_dir: &Path, unserved: &unserved::Unserved) -> anyhow::Result<bool> {
    let shown = |askers: &unserved::Askers| {
        let examples = askers.examples.iter().map(ToString::to_string).collect();
        Askers { count: askers.count, examples }
    };
    let shown: Unserved = unserved.iter().map(|(it, askers)| (it.name().to_owned(), shown(askers))).collect();
    write(run_dir, UNSERVED, &shown)
}

/// Makes a file say this; unchanged content is not written again.
///
/// # Errors
/// The run directory cannot be written.
pub fn write<T: Serialize>(run_dir: &Path, name: &'static str, content: &T) -> anyhow::Result<bool> {
    let mut text = serde_json::to_string_pretty(content).context(name)?;
    text.push('\n');
    write_atomic(&run_dir.join(name), text.as_bytes(), 0o644)
}

/// What a file says; nothing where there is none.
///
/// # Errors
/// The file cannot be read.
pub fn read<T: DeserializeOwned + Default>(run_dir: &Path, name: &'static str) -> anyhow::Result<T> {
    let path = run_dir.join(name);
    match std::fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text)
            .with_context(|| format!("{}: no table of names; remove it, the agent writes it again", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(T::default()),
        Err(error) => Err(error).with_context(|| format!("{}: cannot read", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::{NODES, Nodes, SERVICES, Services, read, service_key, write_all};
    use crate::config::Routing;
    use crate::index::{Index, Settings};
    use crate::model::{Node, ObjectName, Service, ServicePort};
    use crate::source::{Event, Object};
    use rustnet_common::tuple::proto;
    use std::sync::Arc;

    #[test]
    fn names_are_those_of_the_index() {
        let run = tempfile::tempdir().unwrap();
        assert!(read::<Services>(run.path(), SERVICES).unwrap().is_empty());
        let mut index = Index::new(Settings::new("n1", Routing::Vxlan));
        index.handle(Event::Apply(Object::Service(Arc::new(Service {
            name: ObjectName::namespaced("kube-system", "kube-dns"),
            created: 0,
            vips: ["10.96.0.10".parse().unwrap()].into(),
            ports: [ServicePort { name: "dns".into(), port: 53, proto: proto::UDP, node_port: 0 }].into(),
            affinity: 0,
            algorithm: None,
            forwarding: None,
            internal_local: false,
            external: Box::default(),
            balanced: Box::default(),
            source_ranges: None,
            external_local: false,
            health_check_port: 0,
            problems: [].into(),
        }))));
        index.handle(Event::Apply(Object::Node(Arc::new(Node {
            name: ObjectName::cluster("n2"),
            created: 0,
            addresses: ["192.0.2.2".parse().unwrap()].into(),
            pod_cidrs: ["10.1.2.0/24".parse().unwrap()].into(),
            zone: "".into(),
            is_leaving: false,
            other_addresses: Box::default(),
            labels: crate::model::Labels::default(),
            problems: [].into(),
        }))));
        write_all(run.path(), &index).unwrap();
        let services: Services = read(run.path(), SERVICES).unwrap();
        let key = service_key("10.96.0.10".parse().unwrap(), 53, proto::UDP);
        assert_eq!(key, "10.96.0.10:53/UDP");
        assert_eq!((services[&key].service.as_str(), services[&key].port.as_str()), ("kube-system/kube-dns", "dns"));
        assert_eq!(services.len(), 1, "the wildcard of the address has no port");
        let nodes: Nodes = read(run.path(), NODES).unwrap();
        assert_eq!(nodes["n2"].pod_cidrs, ["10.1.2.0/24".parse().unwrap()]);
        std::fs::write(run.path().join(NODES), "[").unwrap();
        assert!(read::<Nodes>(run.path(), NODES).unwrap_err().to_string().contains(NODES));
    }
}
