//! The agent's settings, validated: whoever holds a [`Config`] need not check it again.
//!
//! [`crate::args`] finds the text of each setting in flags, environment and file; here each becomes a value of its type, or
//! an error that names where the text was found and what would be right. All errors are reported, not only the first.

mod ranges;
mod text;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use rustnet_common::backend::id;
use rustnet_common::config::mark;
use rustnet_common::maglev;

pub use self::ranges::{Role, reserved_range};
use self::text::{
    Reader, boolean, cidr, device, directory, healthz_bind_address, listen, log_level, maglev_table_size, node_name,
    node_port_addresses, number, on_or_off, packet_mark, snat_ports, source,
};
use crate::args::Values;

/// Kubernetes' node ports, as by default.
pub const NODE_PORTS: (u16, u16) = (30_000, 32_767);

/// Which packets the programs log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum PacketLog {
    /// None.
    #[default]
    Off,
    /// All.
    All,
    /// Those that have one of the addresses, before or after translation.
    Having(Vec<std::net::IpAddr>),
}

/// Time from the end of one audit of the maps to the begin of the next.
pub const AUDIT_PERIOD: Duration = Duration::from_mins(5);

/// All settings of the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Name of this node's Node object.
    pub node_name: String,
    /// Where Services, EndpointSlices and Nodes come from.
    pub source: Source,
    /// Where maps, programs and links are pinned.
    pub bpffs: PathBuf,
    /// Where the agent and the CNI binary keep their files.
    pub run_dir: PathBuf,
    /// The cgroup v2 directory of the host's and the pods' processes.
    pub cgroup: PathBuf,
    /// A writable `/proc/sys/net` of the host's network namespace.
    pub sysctl_dir: PathBuf,
    /// Devices towards the other nodes and the world; empty: they follow from addresses and default routes.
    pub uplinks: Vec<String>,
    /// How pods of other nodes are reached.
    pub routing: Routing,
    /// Family of the overlay's outer packets.
    pub overlay_family: OverlayFamily,
    /// Who writes the overlay's headers.
    pub overlay_path: OverlayPath,
    /// UDP port of the overlay.
    pub overlay_port: u16,
    /// Network identifier of the overlay.
    pub vni: u32,
    /// MTU of the pods' interfaces; `None`: the uplink's, less the overlay's share.
    pub mtu: Option<u32>,
    /// This node's pod ranges, in place of its Node object's; empty: those of the Node object.
    pub pod_cidrs: Vec<IpNet>,
    /// The ranges that the pods of all nodes come from; may be empty.
    pub cluster_pod_cidrs: Vec<IpNet>,
    /// The ranges that service addresses come from; may be empty.
    pub service_cidrs: Vec<IpNet>,
    /// The ranges that node addresses come from; may be empty.
    pub node_cidrs: Vec<IpNet>,
    /// Ranges outside the cluster that see the pods' own addresses.
    pub non_masquerade_cidrs: Vec<IpNet>,
    /// Pods that talk to the world get this node's address.
    pub masquerade: bool,
    /// Addresses of this node that have node ports; empty: all.
    pub node_port_addresses: Vec<NodePortAddresses>,
    /// Whose sockets ask for Services by themselves.
    pub socket_lb: SocketLb,
    /// Whether uplinks get the XDP program.
    pub xdp: Xdp,
    /// How flows of Services are spread that do not say.
    pub lb_algorithm: Algorithm,
    /// Places of a Maglev table, a prime.
    pub maglev_table_size: u32,
    /// How clients outside get the answers of backends on other nodes, of Services that do not say.
    pub forwarding: Forwarding,
    /// Whether NetworkPolicies are watched and enforced.
    pub network_policy: bool,
    /// What a pod of this node gets for packets that policies deny.
    pub policy_deny_response: DenyResponse,
    /// Source ports that masquerade may use, both ends included; `None`: the agent chooses.
    pub snat_ports: Option<(u16, u16)>,
    /// Mark of packets that have passed their steps on this node.
    pub packet_mark: PacketMark,
    /// Sizes of the maps.
    pub maps: MapSizes,
    /// Where the CNI binary is installed; `None`: it is not.
    pub cni_bin_dir: Option<PathBuf>,
    /// Where the CNI configuration is installed; `None`: it is not.
    pub cni_conf_dir: Option<PathBuf>,
    /// Where `/healthz` and `/readyz` are served; `None`: nowhere.
    pub health_addr: Option<SocketAddr>,
    /// Where kube-proxy's `/healthz` and `/livez` are served; `None`: nowhere.
    pub healthz_bind_address: Option<SocketAddr>,
    /// Where `/metrics` is served; `None`: nowhere.
    pub metrics_addr: Option<SocketAddr>,
    /// Which packets the programs log.
    pub bpf_log: PacketLog,
    /// Time between two audits of the maps. No setting: tests shorten it.
    pub audit_period: Duration,
    /// Report new flows as events too.
    pub flow_events: bool,
    /// Filter directives of the log.
    pub log_level: String,
    /// Shape of the log's lines.
    pub log_format: LogFormat,
    /// Only prepare the host, and end.
    pub prepare: bool,
    /// What somebody chose, by flag: the text of each setting that is not at its default.
    pub chosen: BTreeMap<String, Vec<String>>,
}

/// Where Services, EndpointSlices and Nodes come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A directory of Kubernetes YAML.
    Manifests(PathBuf),
    /// A Kubernetes API server.
    Kube(KubeSource),
}

/// How to find and talk to an API server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KubeSource {
    /// The kubeconfig; `None`: the pod's service account.
    pub kubeconfig: Option<PathBuf>,
    /// An address in place of the kubeconfig's or the environment's: `http://` or `https://`, host, optional port.
    pub api_server: Option<String>,
}

/// Addresses of this node that have node ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// Those of its Node object.
    Primary,
    /// Those in a range.
    In(IpNet),
}

/// Declares an enum whose variants users write as words.
macro_rules! words {
    ($(#[$about:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$doc])* $variant,)+ }

        impl $name {
            /// All of them.
            pub const ALL: [Self; [$($word),+].len()] = [$(Self::$variant),+];

            /// The one with this word.
            pub fn parse(word: &str) -> Option<Self> {
                Self::ALL.into_iter().find(|it| it.word() == word)
            }

            /// Its word.
            pub const fn word(self) -> &'static str {
                match self { $(Self::$variant => $word,)+ }
            }
        }
    };
}

/// Family of the overlay's outer packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OverlayFamily {
    /// It follows from the Nodes' addresses.
    #[default]
    Auto,
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
}

words! {
    /// Who writes the overlay's headers.
    OverlayPath {
        /// The programs where they can, else the kernel's device.
        Programs = "programs",
        /// Always the kernel's device.
        Device = "device",
    }
}

words! {
    /// Whether known flows from outside to Services are forwarded by XDP.
    Xdp {
        /// By no device.
        Off = "off",
        /// By uplinks whose driver has it, veths apart.
        Native = "native",
        /// The same, and by veths.
        NativeVeth = "native-veth",
    }
}

words! {
    /// Whose sockets ask for Services by themselves, and not by packets.
    SocketLb {
        /// Those of this host's own processes, and of pods whose annotation asks for it.
        Host = "host",
        /// The same, and those of all pods of this node but the ones whose annotation refuses it.
        All = "all",
        /// Nobody's.
        Off = "off",
    }
}

words! {
    /// How pods of other nodes are reached.
    Routing {
        /// In VXLAN, between any nodes that reach each other.
        Vxlan = "vxlan",
        /// By the kernel's routes, between nodes of one network segment.
        Native = "native",
        /// By the kernel's routes to nodes of this node's segment, in VXLAN to all others.
        DirectAndVxlan = "direct-and-vxlan",
    }
}

impl Routing {
    /// Whether some nodes may be reached through the overlay.
    pub const fn has_overlay(self) -> bool {
        !matches!(self, Self::Native)
    }
}

/// Bits of packets' marks, and what they hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacketMark {
    /// The mark: not 0, and within the mask.
    pub value: u32,
    /// The bits that are compared.
    pub mask: u32,
}

impl Default for PacketMark {
    fn default() -> Self {
        Self { value: mark::DEFAULT, mask: mark::DEFAULT_MASK }
    }
}

impl fmt::Display for PacketMark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}/{:#x}", self.value, self.mask)
    }
}

/// Shape of the log's lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

words! {
    /// How the hash of a new flow leads to a backend of its Service.
    Algorithm {
        /// By the number of backends: when one comes or goes, most hashes lead elsewhere.
        Random = "random",
        /// By a Maglev table: then few do.
        Maglev = "maglev",
    }
}

words! {
    /// How clients outside get the answers of backends on other nodes.
    Forwarding {
        /// From the node that they asked, which the backend takes for its client.
        Snat = "snat",
        /// From the backend's node: direct server return.
        Dsr = "dsr",
    }
}

words! {
    /// What a pod of this node gets for packets that policies deny.
    DenyResponse {
        /// Nothing: it waits for a time-out.
        None = "none",
        /// An ICMP error: communication administratively prohibited.
        Icmp = "icmp",
    }
}

/// Entries of each map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapSizes {
    /// `rn_svc4_v2`, `rn_svc6_v2`, each.
    pub services: u32,
    /// `rn_backend_ids`, `rn_backends_v2`, each.
    pub backends: u32,
    /// `rn_maglev`, words.
    pub maglev: u32,
    /// `rn_ct4_tcp`, `rn_ct6_tcp`, each.
    pub ct_tcp: u32,
    /// `rn_ct4_any`, `rn_ct6_any`, each.
    pub ct_any: u32,
    /// `rn_frag4`, `rn_frag6`, each.
    pub frags: u32,
    /// Clients of services with session affinity.
    pub affinities: u32,
    /// `rn_sock_rev`; `rn_sock_fwd` has a quarter of it.
    pub sockets: u32,
    /// Ranges of clients of load balancers.
    pub source_ranges: u32,
    /// `rn_policy_pods`.
    pub policy_pods: u32,
    /// `rn_policy_cidrs`.
    pub policy_cidrs: u32,
    /// `rn_policy_rules`.
    pub policy_rules: u32,
    /// `rn_endpoints`.
    pub endpoints: u32,
    /// `rn_peers4`, `rn_peers6`, each.
    pub peers: u32,
}

impl Default for MapSizes {
    fn default() -> Self {
        Self {
            services: 65_536,
            backends: 262_144,
            maglev: 262_144,
            ct_tcp: 65_536,
            ct_any: 32_768,
            frags: 8192,
            affinities: 32_768,
            sockets: 65_536,
            source_ranges: 4096,
            policy_pods: 65_536,
            policy_cidrs: 16_384,
            policy_rules: 65_536,
            endpoints: 4096,
            peers: 65_536,
        }
    }
}

/// All that is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
#[error("the configuration is refused:\n  {}", .0.join("\n  "))]
pub struct Refused(pub Vec<String>);

impl Config {
    /// The settings of this process: its command line, its environment and the file they name.
    ///
    /// # Errors
    /// An unreadable file, unknown keys, or values that are refused; see [`Refused`].
    pub fn from_process() -> anyhow::Result<Self> {
        let env = |name: &str| std::env::var_os(name);
        Self::load(std::env::args_os(), &env)
    }

    /// The same from any command line and environment.
    ///
    /// # Errors
    /// See [`Self::from_process`].
    pub fn load<I, T>(args: I, env: &dyn Fn(&str) -> Option<OsString>) -> anyhow::Result<Self>
    where
        I: IntoIterator<Item = T>,
        T: Into<OsString> + Clone,
    {
        let in_pod = env("KUBERNETES_SERVICE_HOST").is_some_and(|host| !host.is_empty());
        Ok(Self::validate(&Values::gather(args, env)?, in_pod)?)
    }

    /// Gives every setting its type and checks them against each other. `in_pod`: Kubernetes set
    /// the address of its API server in this process's environment.
    ///
    /// # Errors
    /// Everything that is wrong, at once.
    pub fn validate(values: &Values, in_pod: bool) -> Result<Self, Refused> {
        let mut read = Reader { values, problems: Vec::new() };
        let config = Self {
            node_name: read.required("node-name", "give the name of this node's Node object", node_name),
            source: source(&mut read, in_pod),
            bpffs: read.required("bpffs", "give a directory", directory),
            run_dir: read.required("run-dir", "give a directory", directory),
            cgroup: read.required("cgroup", "give a directory", directory),
            sysctl_dir: read.required("sysctl-dir", "give a directory", directory),
            uplinks: read.list("uplink", device),
            routing: read.required("routing", "give a routing mode", |text| {
                Routing::parse(text).ok_or_else(|| {
                    format!("is not a routing mode; give one of {}", Routing::ALL.map(Routing::word).join(", "))
                })
            }),
            overlay_family: read.required("overlay-family", "give a family", |text| match text {
                "auto" => Ok(OverlayFamily::Auto),
                "ipv4" => Ok(OverlayFamily::Ipv4),
                "ipv6" => Ok(OverlayFamily::Ipv6),
                _ => Err("is no family; give one of auto, ipv4, ipv6".to_owned()),
            }),
            overlay_path: read.required("overlay-path", "give programs or device", |text| {
                OverlayPath::parse(text).ok_or("is no path of the overlay; give programs or device".to_owned())
            }),
            overlay_port: read.required("overlay-port", "give a UDP port", |text| number(text, 1, 65_535)),
            vni: read.required("vni", "give a number", |text| number(text, 1, (1 << 24) - 1)),
            mtu: read.required("mtu", "give auto or a number", |text| match text {
                "auto" => Ok(None),
                // Below 1280 IPv6 does not work (RFC 8200, section 5).
                _ => number(text, 1280, 65_535).map(Some).map_err(|error| format!("{error}, or auto")),
            }),
            pod_cidrs: read.list("pod-cidrs", cidr),
            cluster_pod_cidrs: read.list("cluster-pod-cidrs", cidr),
            service_cidrs: read.list("service-cidrs", cidr),
            node_cidrs: read.list("node-cidrs", cidr),
            non_masquerade_cidrs: read.list("non-masquerade-cidrs", cidr),
            socket_lb: read.required("socket-lb", "give host, all or off", |text| {
                SocketLb::parse(text).ok_or("is nobody whose sockets are balanced; give host, all or off".to_owned())
            }),
            xdp: read.required("xdp", "give off, native or native-veth", |text| {
                Xdp::parse(text).ok_or("is no mode of XDP; give off, native or native-veth".to_owned())
            }),
            masquerade: read.required("masquerade", "give true or false", boolean),
            node_port_addresses: read.list("node-port-addresses", node_port_addresses),
            lb_algorithm: read.required("lb-algorithm", "give random or maglev", |text| {
                Algorithm::parse(text).ok_or("is no algorithm; give random or maglev".to_owned())
            }),
            forwarding: read.required("forwarding-mode", "give snat or dsr", |text| {
                Forwarding::parse(text).ok_or("is no mode; give snat or dsr".to_owned())
            }),
            maglev_table_size: read.required("maglev-table-size", "give a prime", maglev_table_size),
            network_policy: read.required("network-policy", "give on or off", on_or_off),
            policy_deny_response: read.required("policy-deny-response", "give none or icmp", |text| {
                DenyResponse::parse(text).ok_or("is no response; give none or icmp".to_owned())
            }),
            snat_ports: read.required("snat-ports", "give auto or a range", snat_ports),
            packet_mark: read.required("packet-mark", "give a value and a mask", packet_mark),
            maps: MapSizes {
                services: read.entries("service-entries"),
                backends: read.entries_up_to("backend-entries", id::MAX_SLOTS),
                maglev: read.entries_up_to("maglev-entries", maglev::MAX_UNITS * maglev::UNIT),
                ct_tcp: read.entries("ct-tcp-entries"),
                ct_any: read.entries("ct-any-entries"),
                frags: read.entries("frag-entries"),
                affinities: read.entries("affinity-entries"),
                sockets: read.entries("socket-entries"),
                source_ranges: read.entries("source-range-entries"),
                policy_pods: read.entries("policy-pod-entries"),
                policy_cidrs: read.entries("policy-cidr-entries"),
                policy_rules: read.entries("policy-rule-entries"),
                endpoints: read.entries("endpoint-entries"),
                peers: read.entries("peer-entries"),
            },
            cni_bin_dir: read.optional("cni-bin-dir", directory),
            cni_conf_dir: read.optional("cni-conf-dir", directory),
            health_addr: read.required("health-addr", "give an address and port, or off", listen),
            healthz_bind_address: read.required(
                "healthz-bind-address",
                "give an address and port, or off",
                healthz_bind_address,
            ),
            metrics_addr: read.required("metrics-addr", "give an address and port, or off", listen),
            bpf_log: read.packet_log("bpf-log"),
            audit_period: AUDIT_PERIOD,
            flow_events: read.required("flow-events", "give true or false", boolean),
            log_level: read.required("log-level", "give a level", log_level),
            log_format: read.required("log-format", "give text or json", |text| match text {
                "text" => Ok(LogFormat::Text),
                "json" => Ok(LogFormat::Json),
                _ => Err("is not a log format; give text or json".to_owned()),
            }),
            prepare: values.prepare,
            chosen: values.chosen(),
        };
        config.check_ranges(&mut read);
        config.check_listeners(&mut read);
        if read.problems.is_empty() { Ok(config) } else { Err(Refused(read.problems)) }
    }

    fn check_listeners(&self, read: &mut Reader<'_>) {
        let all = self.listeners();
        for (i, (flag, addr)) in all.iter().enumerate() {
            for (other_flag, other) in &all[..i] {
                let is_same_host = addr.ip() == other.ip() || addr.ip().is_unspecified() || other.ip().is_unspecified();
                if is_same_host && addr.port() == other.port() && addr.port() != 0 {
                    read.problems.push(format!(
                        "{}: {addr} and {other} of {} cannot be had both; choose another port",
                        read.name(flag),
                        read.name(other_flag)
                    ));
                }
            }
        }
    }

    /// The addresses that the agent serves by setting, each with its flag.
    pub fn listeners(&self) -> Vec<(&'static str, SocketAddr)> {
        let all = [
            ("health-addr", self.health_addr),
            ("healthz-bind-address", self.healthz_bind_address),
            ("metrics-addr", self.metrics_addr),
        ];
        all.into_iter().filter_map(|(flag, addr)| Some((flag, addr?))).collect()
    }
}

#[cfg(test)]
mod tests;
