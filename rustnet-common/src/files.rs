//! The files by which the agent and the CNI binary talk: `node.json` and `endpoints/*.json` in the run directory.
//!
//! The agent writes [`NodeFile`] (atomically, by rename); the CNI binary only reads it, so that it works while the agent is
//! down. The CNI binary writes one [`EndpointFile`] an interface and removes it on DEL; the agent only reads those.

use serde::{Deserialize, Serialize};
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
    use super::{Bandwidth, Limit};
    use crate::endpoint::flags::VIA_QDISC;

    /// Its queue is on the host's end of the veth. What a pod sends waits in the pod.
    #[test]
    fn only_what_a_pod_receives_passes_a_queue_of_the_host() {
        let limit = Some(Limit { rate: 1, burst: 1 });
        let flags = |ingress, egress| Bandwidth { ingress, egress }.endpoint_flags();
        assert_eq!((flags(None, None), flags(None, limit)), (0, 0));
        assert_eq!((flags(limit, None), flags(limit, limit)), (VIA_QDISC, VIA_QDISC));
    }
}
