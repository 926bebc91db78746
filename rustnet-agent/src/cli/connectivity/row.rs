//! What a run deals with: nodes with their probes, scenarios, and rows. Data alone.

use std::net::{IpAddr, SocketAddr};

use serde::Serialize;

use super::wire::Question;
use crate::model::Family;

/// What is tried. Names are the same in all releases, in JSON and for `--scenario`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Scenario {
    /// The probe starts, and the API server reaches it. In each run, whatever `--scenario` names.
    #[value(skip)]
    ProbeStart,
    /// A pod asks a pod of its node.
    PodToLocalPod,
    /// A pod asks a pod of another node.
    PodToRemotePod,
    /// A transfer and a large datagram within a node.
    LargePacketsLocal,
    /// The same between nodes.
    LargePacketsRemote,
    /// A pod asks its node.
    PodToLocalHost,
    /// A pod asks another node.
    PodToRemoteHost,
    /// A node asks a pod of its own.
    HostToLocalPod,
    /// A node asks a pod of another node.
    HostToRemotePod,
    /// A pod asks a ClusterIP whose endpoint is on its node.
    PodToLocalService,
    /// A pod asks a ClusterIP whose endpoint is on another node.
    PodToRemoteService,
    /// A node asks a ClusterIP whose endpoint is on another node.
    HostToRemoteService,
    /// A pod asks the ClusterIP whose endpoint it is itself.
    PodToItself,
    /// A pod asks a node port of its node, whose endpoint is on another one.
    PodToLocalNodePort,
    /// A pod asks a node port of another node, whose endpoint is there.
    PodToRemoteNodePort,
    /// A pod asks the Service of the API server.
    PodToApiServer,
    /// A pod asks a Service by its name.
    PodToServiceName,
    /// A pod resolves the name of a headless Service.
    HeadlessServiceName,
    /// A pod asks a server outside.
    PodToWorld,
}

impl Scenario {
    /// Those between two nodes.
    pub const REMOTE: [Self; 8] = [
        Self::PodToRemotePod,
        Self::LargePacketsRemote,
        Self::PodToRemoteHost,
        Self::HostToRemotePod,
        Self::PodToRemoteService,
        Self::HostToRemoteService,
        Self::PodToLocalNodePort,
        Self::PodToRemoteNodePort,
    ];
    /// Those that need a probe in the network of a node.
    pub const OF_HOSTS: [Self; 5] = [
        Self::PodToLocalHost,
        Self::PodToRemoteHost,
        Self::HostToLocalPod,
        Self::HostToRemotePod,
        Self::HostToRemoteService,
    ];

    /// Returns its name, as JSON has it.
    pub fn name(self) -> String {
        serde_json::to_value(self).ok().and_then(|name| name.as_str().map(str::to_owned)).unwrap_or_default()
    }

    /// True if it is between two nodes.
    pub fn is_remote(self) -> bool {
        Self::REMOTE.contains(&self)
    }
}

/// A probe that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Name of its pod, by which it answers.
    pub name: String,
    /// Its node.
    pub node: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

/// A node with its probes, and the Service that leads to its pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its addresses, by its Node object.
    pub addresses: Vec<IpAddr>,
    /// The probe in a pod network.
    pub pod: Probe,
    /// The probe in the network of the node, unless there is none in the whole run.
    pub host: Option<Probe>,
    /// Addresses of the Service.
    pub cluster_ips: Vec<IpAddr>,
    /// Its node ports, TCP and UDP.
    pub ports_of_nodes: Option<[u16; 2]>,
    /// Name of the Service.
    pub service: String,
}

/// What a cluster has.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Nodes whose probe runs, in order.
    pub nodes: Vec<Node>,
    /// The second pod of the first node.
    pub peer: Option<Probe>,
    /// The namespace, for names of Services.
    pub namespace: String,
    /// Port of echoes at probes.
    pub echo_port: u16,
    /// The headless Service.
    pub headless: String,
    /// Why nodes have no probes in their networks.
    pub without_hosts: Option<String>,
    /// Why names cannot be resolved.
    pub without_dns: Option<String>,
    /// Where the Service of the API server is.
    pub api_server: Vec<SocketAddr>,
    /// Why that is not known.
    pub without_api_server: Option<String>,
    /// A server outside.
    pub world: Option<(String, u16)>,
}

/// A server's name and the sources that it may see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Name of the probe that has to answer; none: anybody.
    pub server: Option<String>,
    /// Sources.
    pub source: Source,
}

/// Which source a server has to see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Whichever.
    Any,
    /// One of these.
    OneOf(Vec<IpAddr>),
    /// The address that the client's socket has, or one of these: a node with several devices asks from any of them.
    OwnOr(Vec<IpAddr>),
}

/// One request of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// What the client is asked.
    pub question: Question,
    /// What the answer has to be.
    pub expected: Expected,
    /// For [`Protocol::Dns`](super::wire::Protocol): all addresses of the name.
    pub addresses: Vec<IpAddr>,
}

/// One end of a row, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct End {
    /// What it is.
    pub name: String,
    /// Its address; empty: the name stands for it.
    pub address: String,
    /// Its node; empty: it has none.
    pub node: String,
}

/// Something to try.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// What.
    pub scenario: Scenario,
    /// The family; none: both, or whichever a name has.
    pub family: Option<Family>,
    /// Name of the probe that asks.
    pub client: String,
    /// Who asks.
    pub from: End,
    /// Who is asked.
    pub to: End,
    /// The requests, in order.
    pub checks: Vec<Check>,
}

/// Something that is not tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// What.
    pub scenario: Scenario,
    /// In which family; none: in both.
    pub family: Option<Family>,
    /// Why.
    pub reason: String,
}

/// A row, or why there is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// To try.
    Run(Row),
    /// Not to try.
    Skip(Skipped),
}

impl Step {
    /// Returns what it tries, or would try.
    pub const fn scenario(&self) -> Scenario {
        match self {
            Self::Run(row) => row.scenario,
            Self::Skip(skipped) => skipped.scenario,
        }
    }
}
