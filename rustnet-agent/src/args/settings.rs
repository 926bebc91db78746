//! The settings: one row for each, with all its names. Its flag, variable and file key cannot drift apart, and the help text is
//! made of the same row.

/// How many values a setting takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arity {
    /// One value.
    One,
    /// Any number: the flag repeated or separated by commas, a sequence in the file.
    Many,
    /// `true` or `false`; the flag alone means `true`.
    Switch,
}

/// One setting, by all its names.
#[derive(Debug)]
pub struct Setting {
    /// The flag, without the dashes.
    pub flag: &'static str,
    /// The key in the file.
    pub key: &'static str,
    /// How many values.
    pub arity: Arity,
    /// What stands for the value in the help text.
    pub value: &'static str,
    /// One sentence.
    pub help: &'static str,
    /// The value when no source gives one.
    pub default: Option<&'static str>,
}

impl Setting {
    /// The environment variable.
    pub fn env(&self) -> String {
        format!("RUSTNET_{}", self.flag.replace('-', "_").to_uppercase())
    }
}

/// Settings that stand together in the help text.
#[derive(Debug)]
pub struct Group {
    /// Their heading.
    pub heading: &'static str,
    /// In the order of the help text.
    pub settings: &'static [Setting],
}

/// A setting with one value.
const ONE: Setting = Setting { flag: "", key: "", arity: Arity::One, value: "", help: "", default: None };
/// A setting with any number of values.
const MANY: Setting = Setting { arity: Arity::Many, ..ONE };
/// A setting that is on or off.
const SWITCH: Setting = Setting { arity: Arity::Switch, value: "BOOL", ..ONE };

/// All settings, in the order of the help text.
pub fn all() -> impl Iterator<Item = &'static Setting> {
    GROUPS.iter().flat_map(|group| group.settings)
}

/// All settings by their groups.
pub static GROUPS: &[Group] = &[
    Group {
        heading: "Source",
        settings: &[
            Setting {
                flag: "manifests",
                key: "manifests",
                value: "DIR",
                help: "Watch a directory of Kubernetes YAML instead of an API server",
                ..ONE
            },
            Setting {
                flag: "kubeconfig",
                key: "kubeconfig",
                value: "FILE",
                help: "Watch the API server that this kubeconfig names (its current context)",
                ..ONE
            },
            Setting {
                flag: "api-server",
                key: "apiServer",
                value: "URL",
                help: "Address of the API server, in place of the one in the kubeconfig or in the pod's environment; \
         needed without kube-proxy, where the service address leads nowhere before the agent runs",
                ..ONE
            },
        ],
    },
    Group {
        heading: "Node",
        settings: &[
            Setting {
                flag: "node-name",
                key: "nodeName",
                value: "NAME",
                help: "Name of this node's Node object",
                ..ONE
            },
            Setting {
                flag: "bpffs",
                key: "bpffs",
                value: "DIR",
                default: Some("/sys/fs/bpf/rustnet"),
                help: "Where maps, programs and links are pinned; on a bpf file system",
                ..ONE
            },
            Setting {
                flag: "run-dir",
                key: "runDir",
                value: "DIR",
                default: Some("/run/rustnet"),
                help: "Where the agent and the CNI binary keep their files",
                ..ONE
            },
            Setting {
                flag: "cgroup",
                key: "cgroup",
                value: "DIR",
                default: Some("/sys/fs/cgroup"),
                help: "The cgroup v2 directory that holds the host's and the pods' processes",
                ..ONE
            },
            Setting {
                flag: "sysctl-dir",
                key: "sysctlDir",
                value: "DIR",
                default: Some("/proc/sys/net"),
                help: "A writable /proc/sys/net of the host's network namespace; containers see the usual one read-only",
                ..ONE
            },
            Setting {
                flag: "uplink",
                key: "uplink",
                value: "DEV",
                help: "Network devices towards the other nodes and the world; when absent, those with the Node's InternalIPs and those of the \
         default routes",
                ..MANY
            },
            Setting {
                flag: "cni-bin-dir",
                key: "cniBinDir",
                value: "DIR",
                help: "Install the CNI binary here, from the agent's own directory",
                ..ONE
            },
            Setting {
                flag: "cni-conf-dir",
                key: "cniConfDir",
                value: "DIR",
                help: "Install the CNI configuration here once the agent is ready",
                ..ONE
            },
        ],
    },
    Group {
        heading: "Network",
        settings: &[
            Setting {
                flag: "routing",
                key: "routing",
                value: "MODE",
                default: Some("vxlan"),
                help: "Reach pods of other nodes by vxlan, native or direct-and-vxlan",
                ..ONE
            },
            Setting {
                flag: "overlay-family",
                key: "overlayFamily",
                value: "auto|ipv4|ipv6",
                default: Some("auto"),
                help: "Family of the overlay's outer packets; auto takes that of the Nodes' first InternalIPs; the same on all nodes",
                ..ONE
            },
            Setting {
                flag: "overlay-path",
                key: "overlayPath",
                value: "programs|device",
                default: Some("programs"),
                help: "Who writes and takes off the overlay's headers: the kernel's device, or the programs where they can (faster; past the host's firewall; not while the host has IPsec policies)",
                ..ONE
            },
            Setting {
                flag: "overlay-port",
                key: "overlayPort",
                value: "PORT",
                default: Some("8472"),
                help: "UDP port of the overlay; the same on all nodes",
                ..ONE
            },
            Setting {
                flag: "vni",
                key: "vni",
                value: "NUMBER",
                default: Some("1"),
                help: "Network identifier of the overlay; the same on all nodes",
                ..ONE
            },
            Setting {
                flag: "mtu",
                key: "mtu",
                value: "auto|BYTES",
                default: Some("auto"),
                help: "MTU of the pods' interfaces; auto takes the uplink's, less the overlay's share",
                ..ONE
            },
            Setting {
                flag: "pod-cidrs",
                key: "podCIDRs",
                value: "CIDR",
                help: "This node's pod ranges, in place of those of its Node object; at most one a family",
                ..MANY
            },
            Setting {
                flag: "cluster-pod-cidrs",
                key: "clusterPodCIDRs",
                value: "CIDR",
                help: "The ranges that the pods of all nodes come from",
                ..MANY
            },
            Setting {
                flag: "service-cidrs",
                key: "serviceCIDRs",
                value: "CIDR",
                help: "The ranges that service addresses come from, beyond those of ServiceCIDR objects",
                ..MANY
            },
            Setting {
                flag: "node-cidrs",
                key: "nodeCIDRs",
                value: "CIDR",
                help: "The ranges that node addresses come from",
                ..MANY
            },
            Setting {
                flag: "masquerade",
                key: "masquerade",
                default: Some("true"),
                help: "Pods that talk to the world get this node's address",
                ..SWITCH
            },
            Setting {
                flag: "non-masquerade-cidrs",
                key: "nonMasqueradeCIDRs",
                value: "CIDR",
                help: "Ranges outside the cluster that see the pods' own addresses",
                ..MANY
            },
            Setting {
                flag: "node-port-addresses",
                key: "nodePortAddresses",
                value: "primary|CIDR",
                help: "Addresses of this node that have node ports: those of its Node object (primary), those in these ranges; \
         without any, all but loopback and link-local ones",
                ..MANY
            },
            Setting {
                flag: "socket-lb",
                key: "socketLb",
                value: "host|all|off",
                default: Some("host"),
                help: "Whose sockets get a Service's backend when they connect, and not by their packets: the host's own processes, which then reach node ports of this host, too (host); all pods of this node as well (all); needs --cgroup. A pod's annotation rustnet.io/socket-lb, true or false, overrides it",
                ..ONE
            },
            Setting {
                flag: "xdp",
                key: "xdp",
                value: "off|native|native-veth",
                default: Some("off"),
                help: "Forward known flows from outside to Services, between a client and a backend that are both reached by the uplink that they come in by, in the driver of that uplink (native), where it has XDP; all other packets go on as with off. A veth loses what XDP sends, unless its other end has an XDP program, too: native-veth says that it has",
                ..ONE
            },
            Setting {
                flag: "lb-algorithm",
                key: "lbAlgorithm",
                value: "random|maglev",
                default: Some("random"),
                help: "How new flows are spread over the backends of a Service whose annotation rustnet.io/lb-algorithm does not say: \
         by their hash alone (random), or by a table with which few flows move when a backend comes or goes (maglev)",
                ..ONE
            },
            Setting {
                flag: "maglev-table-size",
                key: "maglevTableSize",
                value: "NUMBER",
                default: Some("16381"),
                help: "Places of a Maglev table, a prime: at least a hundred for each backend of the largest Service; the same on all nodes",
                ..ONE
            },
            Setting {
                flag: "forwarding-mode",
                key: "forwardingMode",
                value: "snat|dsr",
                default: Some("snat"),
                help: "How clients outside get the answers of backends on other nodes, of a Service whose annotation \
                       rustnet.io/forwarding-mode does not say: from the node that they asked, in whose name it asks the backend (snat), \
                       or from the backend's node, where the backend sees the client (dsr). Each packet to such a backend is then 20 bytes \
                       longer with IPv4, 40 with IPv6, and the network has to let nodes send with each other's addresses",
                ..ONE
            },
            Setting {
                flag: "network-policy",
                key: "networkPolicy",
                value: "on|off",
                default: Some("on"),
                help: "Enforce NetworkPolicies: the agent then watches them, Namespaces, and the pods of the whole cluster. With off, all flows \
                       are allowed",
                ..ONE
            },
            Setting {
                flag: "policy-deny-response",
                key: "policyDenyResponse",
                value: "none|icmp",
                default: Some("none"),
                help: "What a pod gets for packets that the policies of its own node deny: nothing (none), or at once an ICMP error, so \
                       that its connect fails and does not wait for a time-out (icmp)",
                ..ONE
            },
            Setting {
                flag: "snat-ports",
                key: "snatPorts",
                value: "auto|FIRST-LAST",
                default: Some("auto"),
                help: "Source ports that masquerade may use",
                ..ONE
            },
            Setting {
                flag: "packet-mark",
                key: "packetMark",
                value: "VALUE/MASK",
                default: Some("0x1052/0x107f"),
                help: "Mark of packets between two of rustnet's programs on a node: the bits in MASK are its own and hold VALUE",
                ..ONE
            },
        ],
    },
    Group {
        heading: "Tables",
        settings: &[
            Setting {
                flag: "service-entries",
                key: "serviceEntries",
                value: "NUMBER",
                default: Some("65536"),
                help: "Size of each service table",
                ..ONE
            },
            Setting {
                flag: "backend-entries",
                key: "backendEntries",
                value: "NUMBER",
                default: Some("262144"),
                help: "Size of the tables of backends and of their ids, at most 1048576",
                ..ONE
            },
            Setting {
                flag: "maglev-entries",
                key: "maglevEntries",
                value: "NUMBER",
                default: Some("262144"),
                help: "Room for Maglev tables, in words of 4 places: a table of 16381 places takes 4352",
                ..ONE
            },
            Setting {
                flag: "ct-tcp-entries",
                key: "ctTcpEntries",
                value: "NUMBER",
                default: Some("65536"),
                help: "Size of the TCP connection table of each family",
                ..ONE
            },
            Setting {
                flag: "ct-any-entries",
                key: "ctAnyEntries",
                value: "NUMBER",
                default: Some("32768"),
                help: "Size of the connection table of all other protocols, of each family",
                ..ONE
            },
            Setting {
                flag: "frag-entries",
                key: "fragEntries",
                value: "NUMBER",
                default: Some("8192"),
                help: "Size of each table of first fragments",
                ..ONE
            },
            Setting {
                flag: "affinity-entries",
                key: "affinityEntries",
                value: "NUMBER",
                default: Some("32768"),
                help: "Size of the table of clients of Services with session affinity",
                ..ONE
            },
            Setting {
                flag: "socket-entries",
                key: "socketEntries",
                value: "NUMBER",
                default: Some("65536"),
                help: "Size of the table of open sockets that socket-lb has given a backend; that of sockets without a peer has a quarter of it",
                ..ONE
            },
            Setting {
                flag: "source-range-entries",
                key: "sourceRangeEntries",
                value: "NUMBER",
                default: Some("4096"),
                help: "Size of the table of loadBalancerSourceRanges: ranges times ports times addresses",
                ..ONE
            },
            Setting {
                flag: "policy-pod-entries",
                key: "policyPodEntries",
                value: "NUMBER",
                default: Some("65536"),
                help: "Size of the table of pods' addresses that NetworkPolicies of this node select or name: this node's and other nodes'",
                ..ONE
            },
            Setting {
                flag: "policy-cidr-entries",
                key: "policyCidrEntries",
                value: "NUMBER",
                default: Some("16384"),
                help: "Size of the table of the ipBlocks, with their excepts, of NetworkPolicies that select pods of this node",
                ..ONE
            },
            Setting {
                flag: "policy-rule-entries",
                key: "policyRuleEntries",
                value: "NUMBER",
                default: Some("65536"),
                help: "Size of the table of what NetworkPolicies allow to the pods of this node: sets of policies times classes of addresses times ports",
                ..ONE
            },
            Setting {
                flag: "endpoint-entries",
                key: "endpointEntries",
                value: "NUMBER",
                default: Some("4096"),
                help: "Size of the table of this node's pods",
                ..ONE
            },
            Setting {
                flag: "peer-entries",
                key: "peerEntries",
                value: "NUMBER",
                default: Some("65536"),
                help: "Size of each table of other nodes and their ranges",
                ..ONE
            },
        ],
    },
    Group {
        heading: "Observation",
        settings: &[
            Setting {
                flag: "health-addr",
                key: "healthAddr",
                value: "ADDR:PORT|off",
                default: Some("127.0.0.1:9879"),
                help: "Where /healthz and /readyz are served",
                ..ONE
            },
            Setting {
                flag: "healthz-bind-address",
                key: "healthzBindAddress",
                value: "ADDR:PORT|off",
                default: Some("0.0.0.0:10256"),
                help: "Where /healthz and /livez are served for load balancers, as kube-proxy does; 0.0.0.0 is both families, off or an \
         empty value none",
                ..ONE
            },
            Setting {
                flag: "metrics-addr",
                key: "metricsAddr",
                value: "ADDR:PORT|off",
                default: Some("[::]:9962"),
                help: "Where /metrics is served; [::] is both families",
                ..ONE
            },
            Setting {
                flag: "bpf-log",
                key: "bpfLog",
                value: "off|on|ADDR",
                default: Some("off"),
                help: "Log each packet that the programs judge, or those with one of up to four addresses, on level info; for debugging, slow",
                ..MANY
            },
            Setting {
                flag: "flow-events",
                key: "flowEvents",
                default: Some("false"),
                help: "Report new flows as events too, not only drops",
                ..SWITCH
            },
            Setting {
                flag: "log-level",
                key: "logLevel",
                value: "LEVEL",
                default: Some("info"),
                help: "error, warn, info, debug, trace, or filters such as info,rustnet_agent::net=debug",
                ..ONE
            },
            Setting {
                flag: "log-format",
                key: "logFormat",
                value: "FORMAT",
                default: Some("text"),
                help: "text or json",
                ..ONE
            },
        ],
    },
];

#[cfg(test)]
mod tests {
    use super::all;

    #[test]
    fn names_are_unique_and_follow_their_conventions() {
        let settings: Vec<_> = all().collect();
        for (i, setting) in settings.iter().enumerate() {
            assert!(
                setting.flag.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-'),
                "{setting:?}"
            );
            assert_eq!(setting.key.to_lowercase(), setting.flag.replace('-', ""), "flag and key are the same words");
            assert!(settings[..i].iter().all(|other| other.flag != setting.flag && other.key != setting.key));
        }
    }
}
