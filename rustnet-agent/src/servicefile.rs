//! `service-details.json` in the run directory: what the objects say of each Service and its endpoints, for the `rustnetctl`
//! command, because the maps hold only what the programs need. The agent writes it from its index.

use crate::index::Index;
use crate::install::write_atomic;
use crate::model::{self, Condition};
use crate::namefile;
use anyhow::Context;
use ipnet::IpNet;
use serde::{Deserialize, Serialize, Serializer};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

/// Name of the file.
pub const FILE: &str = "service-details.json";

/// Services by `namespace/name`.
pub type Details<'a> = BTreeMap<Cow<'a, str>, Service<'a>>;

/// What a Service and its slices say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Service<'a> {
    /// Its virtual addresses.
    pub cluster_ips: Cow<'a, [IpAddr]>,
    /// Its external IPs.
    #[serde(default)]
    pub external_ips: Cow<'a, [IpAddr]>,
    /// Addresses of its load balancers.
    #[serde(default)]
    pub load_balancer_ips: Cow<'a, [IpAddr]>,
    /// Its ports.
    pub ports: Vec<Port<'a>>,
    /// Seconds of session affinity, 0 for none.
    #[serde(default)]
    pub affinity_seconds: u32,
    /// `internalTrafficPolicy: Local`.
    #[serde(default)]
    pub internal_local: bool,
    /// `externalTrafficPolicy: Local`.
    #[serde(default)]
    pub external_local: bool,
    /// Clients outside that its load balancer is for; null for all.
    #[serde(default)]
    pub source_ranges: Option<Cow<'a, [IpNet]>>,
    /// Port at which load balancers ask for ready endpoints here; 0 for none.
    #[serde(default)]
    pub health_check_port: u16,
    /// Its slices.
    pub slices: Vec<Slice<'a>>,
}

/// A port of a Service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Port<'a> {
    /// Its name; empty when it has none.
    pub name: Cow<'a, str>,
    /// Number at its own addresses.
    pub port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Number at the addresses of nodes; 0 for none.
    #[serde(default)]
    pub node_port: u16,
}

/// Endpoints that listen on the same ports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Slice<'a> {
    /// Where the Service's ports lead to; without node ports.
    pub ports: Vec<Port<'a>>,
    /// The endpoints.
    pub endpoints: Vec<Endpoint<'a>>,
}

/// An endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint<'a> {
    /// Its address.
    pub address: IpAddr,
    /// Its node; empty when unknown.
    pub node: Cow<'a, str>,
    /// Its pod, in the Service's namespace; empty when it is none.
    pub pod: Cow<'a, str>,
    /// It is on this node.
    #[serde(default)]
    pub here: bool,
    /// Whether it may be used.
    pub state: State,
}

/// What an endpoint's conditions mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum State {
    /// It gets new flows.
    Ready,
    /// It terminates: it gets new flows only if no endpoint is ready.
    Draining,
    /// It is not ready, and still serves the flows that it has.
    Serving,
    /// It is not to be used.
    NotReady,
}

impl From<Condition> for State {
    fn from(condition: Condition) -> Self {
        match condition {
            Condition::Ready => Self::Ready,
            Condition::Draining => Self::Draining,
            Condition::Holding => Self::Serving,
            Condition::Unusable => Self::NotReady,
        }
    }
}

/// The objects that the file is made of, as the index has them now: quickly taken, to be written by a thread of its own.
pub struct Objects {
    here: Arc<str>,
    services: Vec<(Arc<model::Service>, Vec<Arc<model::EndpointSlice>>)>,
}

impl Objects {
    /// Those of an index.
    pub fn of(index: &Index) -> Self {
        let services = index.services().map(|(service, slices)| (Arc::clone(service), slices.to_vec()));
        Self { here: Arc::clone(&index.settings().node_name), services: services.collect() }
    }
}

/// One Service after the other: all at once would be megabytes more.
impl Serialize for Objects {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let services = self.services.iter();
        serializer
            .collect_map(services.map(|(service, slices)| (service.name.as_str(), of(service, slices, &self.here))))
    }
}

fn of<'a>(service: &'a model::Service, slices: &'a [Arc<model::EndpointSlice>], here: &str) -> Service<'a> {
    let ports = service.ports.iter().map(|it| Port {
        name: (&*it.name).into(),
        port: it.port,
        protocol: it.proto,
        node_port: it.node_port,
    });
    Service {
        cluster_ips: (&*service.vips).into(),
        external_ips: (&*service.external).into(),
        load_balancer_ips: (&*service.balanced).into(),
        ports: ports.collect(),
        affinity_seconds: service.affinity,
        internal_local: service.internal_local,
        external_local: service.external_local,
        source_ranges: service.source_ranges.as_deref().map(Cow::from),
        health_check_port: service.health_check_port,
        slices: slices.iter().map(|slice| of_slice(slice, here)).collect(),
    }
}

fn of_slice<'a>(slice: &'a model::EndpointSlice, here: &str) -> Slice<'a> {
    let ports =
        slice.ports.iter().map(|it| Port { name: (&*it.name).into(), port: it.port, protocol: it.proto, node_port: 0 });
    let endpoints = slice.endpoints.iter().map(|it| Endpoint {
        address: it.addr,
        node: (&*it.node).into(),
        pod: (&*it.pod).into(),
        here: &*it.node == here,
        state: it.condition.into(),
    });
    Slice { ports: ports.collect(), endpoints: endpoints.collect() }
}

/// Writes what the objects say; unchanged content is not written again.
///
/// # Errors
/// The run directory cannot be written.
pub fn write(run_dir: &Path, objects: &Objects) -> anyhow::Result<()> {
    // Without spaces: of a large cluster it is megabytes.
    let text = serde_json::to_vec(objects).context(FILE)?;
    write_atomic(&run_dir.join(FILE), &text, 0o644).map(drop)
}

/// What the file says; nothing where there is none, as with agents of earlier releases.
///
/// # Errors
/// The file cannot be read.
pub fn read(run_dir: &Path) -> anyhow::Result<Details<'static>> {
    namefile::read(run_dir, FILE)
}

#[cfg(test)]
mod tests {
    use super::{FILE, Objects, State, read, write};
    use crate::config::Routing;
    use crate::index::{Index, Settings};
    use crate::model::Family;
    use crate::model::build::{endpoint, service, slice};

    #[test]
    fn it_says_what_the_objects_say() {
        let run = tempfile::tempdir().unwrap();
        assert!(read(run.path()).unwrap().is_empty());
        let mut index = Index::new(Settings::new("n1", Routing::Vxlan));
        let web = service("web", &["10.96.0.1"]).tcp(80).node_port(30_080).balanced(&["203.0.113.7"]);
        index.handle(web.source_ranges(&["192.0.2.0/24"]).apply());
        let ready = endpoint("10.244.1.2").on("n1").pod("web-0");
        let endpoints = slice("web-1", "web", Family::V4).tcp(8080).endpoint(ready);
        index.handle(endpoints.endpoint(endpoint("10.244.1.3").draining()).apply());
        // Slices of nothing that is served.
        index.handle(slice("db-1", "db", Family::V4).tcp(1).ready(&["10.244.1.4"]).apply());
        write(run.path(), &Objects::of(&index)).unwrap();
        let details = read(run.path()).unwrap();
        assert_eq!(details.keys().collect::<Vec<_>>(), ["default/web"]);
        let web = &details["default/web"];
        assert_eq!((web.ports[0].port, web.ports[0].node_port, web.slices[0].ports[0].port), (80, 30_080, 8080));
        assert_eq!(*web.load_balancer_ips, ["203.0.113.7".parse::<std::net::IpAddr>().unwrap()]);
        assert_eq!(web.source_ranges.as_ref().map(|ranges| ranges[0].to_string()).as_deref(), Some("192.0.2.0/24"));
        let [first, second] = &web.slices[0].endpoints[..] else { panic!("{web:?}") };
        assert_eq!((&*first.pod, &*first.node, first.here, first.state), ("web-0", "n1", true, State::Ready));
        assert_eq!((&*second.pod, &*second.node, second.here, second.state), ("", "", false, State::Draining));
        std::fs::write(run.path().join(FILE), "[").unwrap();
        assert!(read(run.path()).unwrap_err().to_string().contains(FILE));
    }
}
