//! Fixed names: what people type after `bpftool map dump name`, and where things are pinned.

/// Where the agent pins by default.
pub const DEFAULT_BPFFS: &str = "/sys/fs/bpf/rustnet";
/// Where the agent and the CNI binary keep their files by default.
pub const DEFAULT_RUN_DIR: &str = "/run/rustnet";
/// Below the bpffs directory: the programs.
pub const PROGS_DIR: &str = "prog";
/// Below the bpffs directory: the TCX links, one file a hook.
pub const LINKS_DIR: &str = "link";

/// The host-side gateway that every pod routes through; never on a wire.
pub const GATEWAY4: [u8; 4] = [169, 254, 1, 1];
/// The same for IPv6: fe80::1.
pub const GATEWAY6: [u8; 16] = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
/// Next hop of the host's routes to Services, on an uplink; never on a wire.
pub const SERVICE_HOP4: [u8; 4] = [169, 254, 1, 2];
/// The same for IPv6: fe80::726e.
pub const SERVICE_HOP6: [u8; 16] = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x72, 0x6e];
/// Name of the overlay device.
pub const OVERLAY_DEV: &str = "rn_vxlan";
/// First letters of host-side veths.
pub const VETH_PREFIX: &str = "rnv";

/// Priority of our classifiers on a pod's clsact qdisc: the first there is.
pub const TC_PRIORITY: u16 = 1;
/// Handle of our classifiers; with it, a replace swaps the program atomically.
pub const TC_HANDLE: u32 = 1;

/// Programs that another one jumps to, by their index in [`TAILS_MAP`].
pub const TAILS: [&str; 6] = [TUNNEL_IN, UPLINK_IN, EXTERNAL_IN, DIRECT_OUT, DIRECT_IN, FRAGMENT_IN];
/// Those of [`TAILS`] that are on no hook.
pub const UNATTACHED: [&str; 5] = [TUNNEL_IN, EXTERNAL_IN, DIRECT_OUT, DIRECT_IN, FRAGMENT_IN];
/// The program of tunnel packets that come in by an uplink.
pub const TUNNEL_IN: &str = "tunnel_in";
/// The program of flows from outside to Services.
pub const EXTERNAL_IN: &str = "external_in";
/// The program of flows from outside whose backend on another node answers directly.
pub const DIRECT_OUT: &str = "direct_out";
/// The program of packets that another node's `direct_out` has sent.
pub const DIRECT_IN: &str = "direct_in";
/// The program of later fragments whose first has not come before them.
pub const FRAGMENT_IN: &str = "fragment_in";
/// The program of an uplink's ingress hook.
pub const UPLINK_IN: &str = "uplink_in";
/// The map of [`TAILS`]. It belongs to one load of the programs, and is pinned with them: without a pin, the kernel would empty it
/// when the agent ends.
pub const TAILS_MAP: &str = "rn_tails";

/// Program names.
pub const PROGRAMS: [&str; 7] = ["from_pod", "to_pod", "uplink_in", "uplink_out", "overlay_in", "overlay_out", SIDE_IN];
/// The program of devices with addresses that are no uplinks. It counts as `uplink_in`.
pub const SIDE_IN: &str = "side_in";

/// The XDP program of uplinks.
pub const UPLINK_XDP: &str = "uplink_xdp";
/// The map of ways that it remembers, of each load; not pinned.
pub const TURNS_MAP: &str = "rn_turns";

/// Programs of socket calls, attached to the control group of all processes.
pub const SOCKET_PROGRAMS: [&str; 11] = [
    "sock_connect4",
    "sock_connect6",
    "sock_sendmsg4",
    "sock_sendmsg6",
    "sock_recvmsg4",
    "sock_recvmsg6",
    "sock_getpeer4",
    "sock_getpeer6",
    "sock_bind4",
    "sock_bind6",
    "sock_release",
];

/// Map names; each is pinned as a file of its own name. A map whose shape changes gets a new name.
pub mod map {
    /// Services, IPv4.
    pub const SVC4: &str = "rn_svc4_v2";
    /// Services, IPv6.
    pub const SVC6: &str = "rn_svc6_v2";
    /// Ids of the backends of all services: a range for each service.
    pub const BACKEND_IDS: &str = "rn_backend_ids";
    /// Backends of all services, by slot.
    pub const BACKENDS: &str = "rn_backends_v2";
    /// Tables of services that ask for Maglev.
    pub const MAGLEV: &str = "rn_maglev";
    /// TCP connections, IPv4.
    pub const CT4_TCP: &str = "rn_ct4_tcp";
    /// Flows of all other protocols, IPv4.
    pub const CT4_ANY: &str = "rn_ct4_any";
    /// TCP connections, IPv6.
    pub const CT6_TCP: &str = "rn_ct6_tcp";
    /// Flows of all other protocols, IPv6.
    pub const CT6_ANY: &str = "rn_ct6_any";
    /// Whether an entry of a connection table ever stood in the second slot of its key.
    pub const CT_CONTESTED: &str = "rn_ct_contested";
    /// First fragments, IPv4.
    pub const FRAG4: &str = "rn_frag4_v2";
    /// First fragments, IPv6.
    pub const FRAG6: &str = "rn_frag6_v2";
    /// Backends of clients, of services with session affinity.
    pub const AFFINITY: &str = "rn_affinity";
    /// Clients outside that may use load balancers' addresses.
    pub const SOURCE_RANGES: &str = "rn_source_ranges";
    /// Ports of this node that pods have.
    pub const HOST_PORTS: &str = "rn_host_ports";
    /// Pods of this node.
    pub const ENDPOINTS: &str = "rn_endpoints";
    /// Everything else, IPv4.
    pub const PEERS4: &str = "rn_peers4";
    /// Everything else, IPv6.
    pub const PEERS6: &str = "rn_peers6";
    /// Counters by reason and hook.
    pub const COUNTERS: &str = "rn_counters";
    /// Drops as they happen.
    pub const EVENTS: &str = "rn_events";
    /// The node's settings.
    pub const CONFIG: &str = "rn_config";
    /// Addresses of this host's devices.
    pub const DEVICES: &str = "rn_devices";
    /// Network namespaces whose sockets ask for Services.
    pub const SOCK_NETNS: &str = "rn_sock_netns";
    /// Backends of sockets that are not connected.
    pub const SOCK_FWD: &str = "rn_sock_fwd";
    /// What a socket asked for that talks to a backend.
    pub const SOCK_REV: &str = "rn_sock_rev";
    /// Which entries of both a socket has.
    pub const SOCK_LED: &str = "rn_sock_led";
    /// Whether policies exist, and how often they changed.
    pub const POLICY: &str = "rn_policy";
    /// What policies say of pods.
    pub const POLICY_PODS: &str = "rn_policy_pods";
    /// What policies say of other addresses.
    pub const POLICY_CIDRS: &str = "rn_policy_cidrs";
    /// What the sets of policies allow.
    pub const POLICY_RULES: &str = "rn_policy_rules";
    /// All of them.
    pub const ALL: [&str; 30] = [
        SVC4,
        SVC6,
        BACKEND_IDS,
        BACKENDS,
        CT4_TCP,
        CT4_ANY,
        CT6_TCP,
        CT6_ANY,
        FRAG4,
        FRAG6,
        ENDPOINTS,
        PEERS4,
        PEERS6,
        COUNTERS,
        EVENTS,
        CONFIG,
        CT_CONTESTED,
        DEVICES,
        AFFINITY,
        SOURCE_RANGES,
        SOCK_NETNS,
        SOCK_FWD,
        SOCK_REV,
        HOST_PORTS,
        MAGLEV,
        SOCK_LED,
        POLICY,
        POLICY_PODS,
        POLICY_CIDRS,
        POLICY_RULES,
    ];
}

/// Names of maps of an earlier shape. No map of another shape ever gets one of these.
pub mod v1 {
    /// Services, IPv4.
    pub const SVC4: &str = "rn_svc4";
    /// Services, IPv6.
    pub const SVC6: &str = "rn_svc6";
    /// Backends of all services, side by side.
    pub const BACKENDS: &str = "rn_backends";
    /// Connections, IPv4.
    pub const CT4: &str = "rn_ct4";
    /// Connections, IPv6.
    pub const CT6: &str = "rn_ct6";
    /// First fragments, IPv4.
    pub const FRAG4: &str = "rn_frag4";
    /// First fragments, IPv6.
    pub const FRAG6: &str = "rn_frag6";
    /// All of them.
    pub const ALL: [&str; 7] = [SVC4, SVC6, BACKENDS, CT4, CT6, FRAG4, FRAG6];
}
