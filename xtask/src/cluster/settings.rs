//! What kind of cluster is asked for, and the addresses that follow from it.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::setup::Kubernetes;

/// Address families of pods, services and nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// Both, IPv4 first
    Dual,
    /// IPv4 alone
    Ipv4,
    /// IPv6 alone
    Ipv6,
}

/// How rustnet carries packets between nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Routing {
    /// In a tunnel
    Vxlan,
    /// By plain routes
    Native,
    /// By plain routes where no router is between, else in a tunnel
    DirectAndVxlan,
}

impl Routing {
    /// As rustnet's configuration has it.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Vxlan => "vxlan",
            Self::Native => "native",
            Self::DirectAndVxlan => "direct-and-vxlan",
        }
    }
}

/// Which network the pods get.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// This work tree's, installed as users install it
    Rustnet,
    /// bridge, host-local, portmap and kube-proxy: the yardstick
    Reference,
    /// None: nodes stay not ready until somebody installs one
    None,
}

/// How rustnet gets into the cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Install {
    /// `kubectl apply -k` of an overlay over deploy/
    #[default]
    Kustomize,
    /// `helm install` of deploy/helm/rustnet
    Helm,
}

/// What `up` takes, and stores with the cluster.
#[derive(Clone, Debug, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
pub struct Settings {
    /// How many nodes
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=9))]
    pub nodes: u8,
    /// Into how many zones the nodes go, in turn; each is a zone of its own when absent
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=9))]
    #[serde(default)]
    pub zones: Option<u8>,
    /// The version of Kubernetes
    #[arg(long, value_enum, default_value_t)]
    pub version: Kubernetes,
    /// Address families of pods, services and nodes
    #[arg(long, value_enum, default_value_t = Family::Dual)]
    pub ip_family: Family,
    /// The network's routing (rustnet)
    #[arg(long, value_enum, default_value_t = Routing::Vxlan)]
    pub routing: Routing,
    /// Which network the pods get
    #[arg(long, value_enum, default_value_t = Network::Rustnet)]
    pub network: Network,
    /// An image of `cargo xtask image` to install, instead of one made of this work tree (rustnet)
    #[arg(long, value_name = "FILE")]
    pub image: Option<PathBuf>,
    /// What installs rustnet
    #[arg(long, value_enum, default_value_t = Install::Kustomize)]
    #[serde(default)]
    pub install: Install,
}

impl fmt::Display for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { nodes, zones, version, ip_family, routing, network, image, install } = self;
        let zones = zones.map(|zones| format!(" in {zones} zones")).unwrap_or_default();
        let family = format!("{ip_family:?}").to_lowercase();
        let kind = match network {
            Network::Rustnet => {
                let from = image.as_ref().map(|file| format!(" from {}", file.display())).unwrap_or_default();
                let install = if *install == Install::Helm { " by Helm" } else { "" };
                format!("rustnet{from}{install}, routing {}", routing.word())
            }
            Network::Reference => "the reference network".to_owned(),
            Network::None => "no network".to_owned(),
        };
        write!(f, "Kubernetes {}, {nodes} nodes{zones}, {family}, {kind}", version.word())
    }
}

/// One thing in both families.
#[derive(Clone, Copy, Debug)]
pub struct Both<T> {
    /// In IPv4.
    pub v4: T,
    /// In IPv6.
    pub v6: T,
}

impl<T> Both<T> {
    /// Those of a family setting, in the cluster's order.
    pub fn of(self, family: Family) -> Vec<T> {
        match family {
            Family::Dual => vec![self.v4, self.v6],
            Family::Ipv4 => vec![self.v4],
            Family::Ipv6 => vec![self.v6],
        }
    }
}

/// Ranges of all pods.
pub const PODS: Both<&str> = Both { v4: "10.244.0.0/16", v6: "fd00:244::/56" };
/// Ranges of services.
pub const SERVICES: Both<&str> = Both { v4: "10.96.0.0/16", v6: "fd00:96::/112" };
/// Service address of the API server: the first of the range.
pub const KUBERNETES: Both<&str> = Both { v4: "10.96.0.1", v6: "fd00:96::1" };
/// Service address of DNS.
pub const DNS: Both<&str> = Both { v4: "10.96.0.10", v6: "fd00:96::a" };
/// Ranges of nodes.
pub const NODES: Both<&str> = Both { v4: "172.18.0.0/24", v6: "fd00:18::/64" };
/// The switch, which is the world to the cluster: clients from outside live there.
pub const SWITCH: u8 = 1;
/// The control plane, which is not a node.
pub const CONTROL_PLANE: u8 = 2;

/// Address number `last` on the segment of the nodes.
pub fn address(last: u8) -> Both<String> {
    Both { v4: format!("172.18.0.{last}"), v6: format!("fd00:18::{last}") }
}

impl Settings {
    /// The URL of the API server on the nodes' segment.
    pub fn api_server(&self) -> String {
        let address = address(CONTROL_PLANE);
        match self.ip_family {
            Family::Ipv6 => format!("https://[{}]:6443", address.v6),
            Family::Dual | Family::Ipv4 => format!("https://{}:6443", address.v4),
        }
    }

    /// The zone of the node with this number, from 1 on.
    pub fn zone(&self, number: u8) -> String {
        match self.zones {
            Some(zones) => format!("zone-{}", (number - 1) % zones + 1),
            None => format!("zone-n{number}"),
        }
    }

    /// How many zones have at least this many nodes.
    pub fn zones_with(&self, nodes: usize) -> usize {
        let mut zones: BTreeMap<String, usize> = BTreeMap::new();
        for number in 1..=self.nodes {
            *zones.entry(self.zone(number)).or_default() += 1;
        }
        zones.into_values().filter(|count| *count >= nodes).count()
    }

    /// A pair joined as Kubernetes' flags want it.
    pub fn joined<T: AsRef<str>>(&self, both: Both<T>) -> String {
        both.of(self.ip_family).iter().map(AsRef::as_ref).collect::<Vec<_>>().join(",")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_choose_what_is_named() {
        assert_eq!(PODS.of(Family::Dual), ["10.244.0.0/16", "fd00:244::/56"]);
        assert_eq!(PODS.of(Family::Ipv6), ["fd00:244::/56"]);
        assert_eq!(address(12).of(Family::Ipv4), ["172.18.0.12"]);
    }
}
