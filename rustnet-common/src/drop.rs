//! Why packets are dropped: the only list of reasons, with their names and hints.

macro_rules! reasons {
    ($( $(#[doc = $doc:literal])+ $variant:ident = $code:literal, $name:literal, $hint:literal; )+) => {
        /// Why a packet was dropped (or refused). The code is the index into `rn_counters`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum DropReason {
            $( $(#[doc = $doc])+ $variant = $code, )+
        }

        impl DropReason {
            /// All reasons, in order of their codes.
            pub const ALL: &[Self] = &[ $(Self::$variant),+ ];

            /// Short name for tables and metrics.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }

            /// True if the packet went no further.
            pub const fn is_drop(self) -> bool {
                !matches!(self, Self::Forwarded | Self::PolicyAudited)
            }

            /// What a person can do about it.
            pub const fn hint(self) -> &'static str {
                match self { $(Self::$variant => $hint),+ }
            }

            /// The reason with this code, if there is one.
            pub const fn from_code(code: u8) -> Option<Self> {
                match code { $($code => Some(Self::$variant),)+ _ => None }
            }
        }
    };
}

reasons! {
    /// Not a drop: the packet was forwarded.
    Forwarded = 0, "forwarded", "";
    /// Lengths that contradict each other, headers beyond the end of the packet.
    Malformed = 1, "malformed", "the sender builds broken packets: capture at the pod and look at the IP header";
    /// More extension headers, or other ones, than the parser follows.
    InvalidExthdr = 2, "invalid_exthdr", "an IPv6 extension header chain longer than six, or one that hides the transport header";
    /// A source address or MAC that is not the pod's own.
    Spoofed = 3, "spoofed", "the sender uses an address that is not its own";
    /// A tunnel packet whose sender is not the node that owns the inner source.
    UnknownSender = 4, "unknown_sender", "the peer table does not know the sender: compare Node addresses with `rustnetctl peers`";
    /// A tunnel packet sent by a pod: to the overlay's port, or IP inside IP that would be masqueraded.
    EncapProhibited = 5, "encap_prohibited", "a pod sends to the overlay's port, or IP inside IP with the node's address";
    /// A service without endpoints, refused.
    NoBackend = 6, "no_backend", "the service has no ready endpoint: kubectl get endpointslices";
    /// A port that the VIP does not have, refused.
    NoServicePort = 7, "no_service_port", "the service has no such port: kubectl get service";
    /// Policy Local without an endpoint here.
    NoLocalBackend = 8, "no_local_backend", "internalTrafficPolicy is Local and no endpoint is on this node";
    /// A service entry that leads to no backend of that service.
    BackendLookupFailed = 9, "backend_lookup_failed", "maps disagree: restart the agent and report this";
    /// No free port or connection slot was found.
    NatNoMapping = 10, "nat_no_mapping", "too many connections to one destination: widen the masquerade port range";
    /// The connection table took no entry.
    CtCreateFailed = 11, "ct_create_failed", "raise the size of the connection table";
    /// A later fragment whose first was never seen.
    FragNotFound = 12, "frag_not_found", "a fragment to a Service, a node or the world came before its first: look for reordering or loss";
    /// Its hop limit ended here; the sender was notified.
    TtlExceeded = 13, "ttl_exceeded", "a routing loop, or a traceroute";
    /// Larger than the path; the sender was notified.
    FragNeeded = 14, "frag_needed", "the sender did not learn the path MTU: are ICMP messages filtered?";
    /// A VIP asked from outside the cluster.
    IsClusterIp = 15, "is_cluster_ip", "cluster addresses are not served to outside clients";
    /// The route look-up said no.
    NoFib = 16, "no_fib", "ip route get, in the host's network namespace";
    /// A helper refused to change the packet.
    WriteError = 17, "write_error", "report this, with a capture";
    /// The host asked a VIP whose backend is the host itself.
    HostHairpin = 18, "host_hairpin", "use the endpoint's own address from the host";
    /// An ICMP error that quotes no connection of ours.
    IcmpUnrelated = 20, "icmp_unrelated", "an ICMP error about a connection that is unknown or long over";
    /// Neighbour discovery or multicast beyond its link (RFC 4861).
    NdNotForwarded = 21, "nd_not_forwarded", "neighbour discovery and multicast are not forwarded: the sender's routes put a far address on its link";
    /// A frame with a VLAN tag from a pod or out of the tunnel.
    VlanFiltered = 22, "vlan_filtered", "pods have no VLANs: the sender builds tagged frames";
    /// A frame from a pod that is neither IPv4 nor IPv6.
    UnsupportedL2 = 23, "unsupported_l2", "only IP is forwarded; a pod's neighbours are permanent, so that it needs no ARP";
    /// An IPv4 source route option or an IPv6 type 0 routing header (RFC 5095, RFC 7126).
    SourceRoute = 24, "source_route", "source routes are refused: capture at the sender";
    /// An address that no packet on a wire may have.
    Martian = 25, "martian", "a loopback, multicast or IPv4-mapped address where none can be";
    /// A client outside the ranges that a load balancer's address is for.
    NotInSourceRange = 26, "not_in_source_range", "the client is in none of the service's loadBalancerSourceRanges: rustnetctl services";
    /// An address of a service range that no Service has.
    NoService = 27, "no_service", "no Service has this address of the service range: kubectl get services -A, and check the address";
    /// A packet that another node handed on for direct server return, and its Service does not lead to that pod of this node.
    NoDirectBackend = 28, "no_direct_backend", "the node that the client asked knows other endpoints than this one: rustnetctl services --verify on both";
    /// A flow that network policies deny, or do not allow.
    PolicyDenied = 29, "policy_denied", "a network policy denies the flow, or none allows it: rustnetctl policy why FROM TO PORT";
    /// A flow of a pod for which the agent has not applied the policies yet.
    PolicyUndecided = 30, "policy_undecided", "the pod is newer than the agent's last look at policies: is the agent ready?";
    /// Not a drop: network policies deny the flow, and its namespace is audited.
    PolicyAudited = 31, "policy_audited", "a network policy would deny the flow, or none allows it: rustnetctl policy why FROM TO PORT";
}

/// Directions that `rn_counters` tells apart; see [`counter_index`].
pub mod hook {
    /// Names by code.
    pub const NAMES: [&str; 8] =
        ["from_pod", "to_pod", "uplink_in", "uplink_out", "overlay_in", "overlay_out", "tunnel_in", "uplink_xdp"];
    /// TC ingress of a pod's host-side veth.
    pub const FROM_POD: u8 = 0;
    /// TC egress of a pod's host-side veth.
    pub const TO_POD: u8 = 1;
    /// TC ingress of the uplink.
    pub const UPLINK_IN: u8 = 2;
    /// TC egress of the uplink.
    pub const UPLINK_OUT: u8 = 3;
    /// TC ingress of the overlay device.
    pub const OVERLAY_IN: u8 = 4;
    /// TC egress of the overlay device.
    pub const OVERLAY_OUT: u8 = 5;
    /// TC ingress of the uplink, of tunnel packets that go past the overlay device.
    pub const TUNNEL_IN: u8 = 6;
    /// XDP of the uplink.
    pub const UPLINK_XDP: u8 = 7;
}

/// Hooks that one reason has room for in `rn_counters`.
pub const HOOKS: u32 = 8;
/// Elements of `rn_counters`.
pub const COUNTERS: u32 = 32 * HOOKS;

/// Element of `rn_counters` for a reason at a hook.
#[inline(always)]
pub const fn counter_index(reason: u8, hook: u8) -> u32 {
    reason as u32 * HOOKS + hook as u32
}

/// Value of `rn_counters`, per CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Counter {
    /// Packets.
    pub packets: u64,
    /// Bytes of the frames.
    pub bytes: u64,
}

crate::shared_type!(Counter, 16);
