//! The files by which the agent and the CNI binary talk: `node.json` and `endpoints/*.json` in the run directory.
//!
//! The agent writes [`NodeFile`] (atomically, by rename); the CNI binary only reads it, so that it works while the agent is
//! down. The CNI binary writes one [`EndpointFile`] an interface and removes it on DEL; the agent only reads those.

use crate::addr::Addr;
use crate::host_port::{HostPort, HostPortKey, any};
use crate::tuple::proto;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// Name of the agent's file in the run directory.
pub const NODE_FILE: &str = "node.json";
/// Name of the folder of endpoint files in the run directory.
pub const ENDPOINTS_DIR: &str = "endpoints";
/// Name of the folder of address leases in the run directory.
pub const IPAM_DIR: &str = "ipam";

/// What the CNI binary must know of its node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeFile {
    /// Version of this file's shape.
    pub version: u32,
    /// The node's name.
    pub node_name: String,
    /// The ranges pods get addresses from, at most one a family.
    #[serde(rename = "podCIDRs")]
    pub pod_cidrs: Vec<ipnet::IpNet>,
    /// MTU of the pods' interfaces.
    pub mtu: u32,
    /// Why pods cannot be connected right now; absent when they can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_ready: Option<String>,
}

impl NodeFile {
    /// The version that this code writes and understands.
    pub const VERSION: u32 = 1;
}

/// One attached interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointFile {
    /// The runtime's container id.
    pub container_id: String,
    /// Interface name inside the pod.
    pub ifname: String,
    /// Path of the pod's network namespace.
    pub netns: String,
    /// The kernel's number of that namespace, as `SO_NETNS_COOKIE` returns it; absent in records of earlier releases, and where the
    /// kernel has no such numbers (before 5.14).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netns_cookie: Option<u64>,
    /// Name of the CNI network.
    pub network: String,
    /// Name of the host-side veth.
    pub host_ifname: String,
    /// Its interface index.
    pub ifindex: u32,
    /// MAC of the pod's interface.
    pub mac: String,
    /// The pod's addresses.
    pub addresses: Vec<IpAddr>,
    /// Kubernetes namespace of the pod, when the runtime said so.
    #[serde(default)]
    pub pod_namespace: String,
    /// Name of the pod.
    #[serde(default)]
    pub pod_name: String,
    /// UID of the pod.
    #[serde(default)]
    pub pod_uid: String,
    /// The limits of its bandwidth.
    #[serde(default, skip_serializing_if = "Bandwidth::is_unlimited")]
    pub bandwidth: Bandwidth,
    /// The ports of the node that it has.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub host_ports: Vec<PortMapping>,
    /// True if ADD installed the routes of its result; false in records of earlier releases, which installed default routes alone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub has_routes: bool,
}

impl EndpointFile {
    /// The entries of `rn_host_ports` that the interface should have. A port that it asks for twice is that of the first mapping.
    pub fn host_port_entries(&self) -> Vec<(HostPortKey, HostPort)> {
        let mut entries: Vec<(HostPortKey, HostPort)> = Vec::new();
        for mapping in &self.host_ports {
            for pod in first_of_each_family(&self.addresses).filter(|pod| mapping.is_of_family(pod)) {
                let addr = mapping.host_ip.map_or_else(|| any(pod.is_ipv4()), Addr::from);
                let key = HostPortKey { addr, port: mapping.host_port, proto: mapping.protocol.number(), pad: 0 };
                let value = HostPort { pod: pod.into(), ifindex: self.ifindex, port: mapping.container_port, pad: 0 };
                if entries.iter().all(|(known, _)| *known != key) {
                    entries.push((key, value));
                }
            }
        }
        entries
    }
}

/// Traffic to a port goes to one address, whatever else the pod has.
fn first_of_each_family(addresses: &[IpAddr]) -> impl Iterator<Item = IpAddr> {
    let first = |is_v4: bool| addresses.iter().copied().find(move |ip| ip.is_ipv4() == is_v4);
    [first(true), first(false)].into_iter().flatten()
}

/// A port of the node that a pod has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    /// The node's address; absent: each one. The unspecified address: each one of its family.
    #[serde(rename = "hostIP", default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
    /// The node's port.
    pub host_port: u16,
    /// The pod's port.
    pub container_port: u16,
    /// See [`Protocol`].
    pub protocol: Protocol,
}

impl PortMapping {
    /// True if the mapping is for an address of the pod's of this family.
    pub fn is_of_family(&self, pod: &IpAddr) -> bool {
        self.host_ip.is_none_or(|ip| ip.is_ipv4() == pod.is_ipv4())
    }
}

impl fmt::Display for PortMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(ip) = self.host_ip {
            write!(f, "{}", std::net::SocketAddr::new(ip, self.host_port))?;
        } else {
            write!(f, "{}", self.host_port)?;
        }
        write!(f, "->{}/{}", self.container_port, self.protocol.name())
    }
}

/// A protocol with ports that a pod can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    /// IP protocol number.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => proto::TCP,
            Self::Udp => proto::UDP,
            Self::Sctp => proto::SCTP,
        }
    }

    /// The name that the CNI specification uses.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }
}

/// The limits of an interface's bandwidth, as the pod sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Bandwidth {
    /// For what the pod receives.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ingress: Option<Limit>,
    /// For what it sends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub egress: Option<Limit>,
}

impl Bandwidth {
    /// True if there are none.
    pub fn is_unlimited(&self) -> bool {
        *self == Self::default()
    }

    /// What the programs must know of it: [`crate::endpoint::Endpoint::flags`].
    pub fn endpoint_flags(&self) -> u16 {
        if self.ingress.is_some() { crate::endpoint::flags::VIA_QDISC } else { 0 }
    }
}

/// A limit of bandwidth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// Bits a second.
    pub rate: u64,
    /// Bits that may pass at once after a pause.
    pub burst: u64,
}

/// Path of the file of one interface. Container ids and interface names are validated by the CNI binary: no slashes.
pub fn endpoint_path(run_dir: &Path, container_id: &str, ifname: &str) -> PathBuf {
    run_dir.join(ENDPOINTS_DIR).join(format!("{container_id}@{ifname}.json"))
}

#[cfg(test)]
mod tests {
    use super::{Bandwidth, EndpointFile, Limit, PortMapping, Protocol};
    use crate::endpoint::flags::VIA_QDISC;
    use std::net::IpAddr;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// Address, port and protocol of each entry, and where it leads.
    fn entries(addresses: &[&str], host_ports: &[(Option<&str>, u16, u16)]) -> Vec<(IpAddr, u16, IpAddr, u16)> {
        let mapping = |(host_ip, host_port, container_port): &(Option<&str>, u16, u16)| PortMapping {
            host_ip: host_ip.map(ip),
            host_port: *host_port,
            container_port: *container_port,
            protocol: Protocol::Udp,
        };
        let record = EndpointFile {
            container_id: "c".into(),
            ifname: "eth0".into(),
            netns: "/n".into(),
            netns_cookie: None,
            network: "rustnet".into(),
            host_ifname: "rnv1".into(),
            ifindex: 9,
            mac: String::new(),
            addresses: addresses.iter().map(|text| ip(text)).collect(),
            pod_namespace: String::new(),
            pod_name: String::new(),
            pod_uid: String::new(),
            bandwidth: Bandwidth::default(),
            host_ports: host_ports.iter().map(mapping).collect(),
            has_routes: false,
        };
        let entries = record.host_port_entries();
        assert!(entries.iter().all(|(key, value)| (key.proto, value.ifindex) == (17, 9)));
        entries.into_iter().map(|(key, value)| (key.addr.into(), key.port, value.pod.into(), value.port)).collect()
    }

    #[test]
    fn a_port_of_all_addresses_has_an_entry_of_each_family() {
        let both = ["10.0.0.2", "fd00::2", "10.0.0.3"];
        let (v4, v6) = ((ip("0.0.0.0"), 53, ip("10.0.0.2"), 5353), (ip("::"), 53, ip("fd00::2"), 5353));
        assert_eq!(entries(&both, &[(None, 53, 5353)]), [v4, v6]);
        assert_eq!(entries(&both, &[(Some("0.0.0.0"), 53, 5353)]), [v4]);
        assert_eq!(entries(&both, &[(Some("::"), 53, 5353)]), [v6]);
        assert_eq!(entries(&both[..1], &[(None, 53, 5353)]), [v4]);
        // The first mapping of a port counts.
        assert_eq!(entries(&both, &[(None, 53, 5353), (Some("::"), 53, 1)]), [v4, v6]);
        let own = (ip("192.0.2.1"), 53, ip("10.0.0.2"), 1);
        assert_eq!(entries(&both, &[(None, 53, 5353), (Some("192.0.2.1"), 53, 1)]), [v4, v6, own]);
    }

    #[test]
    fn ports_are_shown_as_people_write_them() {
        let mapping = |host_ip: Option<&str>| PortMapping {
            host_ip: host_ip.map(ip),
            host_port: 80,
            container_port: 8080,
            protocol: Protocol::Tcp,
        };
        assert_eq!(mapping(None).to_string(), "80->8080/tcp");
        assert_eq!(mapping(Some("127.0.0.1")).to_string(), "127.0.0.1:80->8080/tcp");
        assert_eq!(mapping(Some("::1")).to_string(), "[::1]:80->8080/tcp");
    }

    /// Its queue is on the host's end of the veth. What a pod sends waits in the pod.
    #[test]
    fn only_what_a_pod_receives_passes_a_queue_of_the_host() {
        let limit = Some(Limit { rate: 1, burst: 1 });
        let flags = |ingress, egress| Bandwidth { ingress, egress }.endpoint_flags();
        assert_eq!((flags(None, None), flags(None, limit)), (0, 0));
        assert_eq!((flags(limit, None), flags(limit, limit)), (VIA_QDISC, VIA_QDISC));
    }
}
