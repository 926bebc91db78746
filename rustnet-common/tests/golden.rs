//! Pins what running pods, pinned maps and programs of other releases rely on. A failure here
//! means: existing nodes break on an upgrade, unless the change comes with a migration.

use core::mem::{offset_of, size_of};

use rustnet_common::addr::{Addr, Ip4, Ip6};
use rustnet_common::config::{self, NodeConfig};
use rustnet_common::conntrack::CtEntry;
use rustnet_common::drop::{COUNTERS, Counter, DropReason, HOOKS, counter_index, hook};
use rustnet_common::endpoint::{self, Endpoint, EndpointKey};
use rustnet_common::event::Event;
use rustnet_common::hash;
use rustnet_common::host_port::{self, HostPort, HostPortKey};
use rustnet_common::maglev;
use rustnet_common::names::{self, map};
use rustnet_common::peer::flags::{HOST, LOCAL_PODS, NO_MASQ, NODE, POD, SERVICES, TUNNEL};
use rustnet_common::peer::{Peer, PeerKey, identity};
use rustnet_common::policy::{self, Policies, PolicyCidrKey, PolicyMatch, PolicyPod, PolicyRule, PolicyRuleKey};
use rustnet_common::service::{self, SvcEntry, SvcKey};
use rustnet_common::socket::{Asked, CLIENT_HIGH, Led, SocketKey, TRAIL, Trail, netns};
use rustnet_common::source_range::{self, SourceRange, SourceRangeKey};
use rustnet_common::tuple::{Tuple, proto};
use rustnet_common::v1;

/// The bytes of a shared value.
fn bytes<T>(value: &T) -> Vec<u8> {
    // SAFETY: callers pass shared types, which have no padding, so that every byte is initialised.
    unsafe { core::slice::from_raw_parts(core::ptr::from_ref(value).cast::<u8>(), size_of::<T>()) }.to_vec()
}

/// Field offsets, by name.
macro_rules! offsets {
    ($type:ty: $($field:ident),+) => { [$((stringify!($field), offset_of!($type, $field))),+] };
}

const A4: Ip4 = Ip4 { ip: [10, 244, 1, 2] };
const B4: Ip4 = Ip4 { ip: [10, 96, 0, 10] };
const A6: Ip6 = Ip6 { ip: [0xfd, 0, 2, 0x44, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2] };
const B6: Ip6 = Ip6 { ip: [0xfd, 0, 0, 0x96, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 10] };

fn tuple<A>(src: A, dst: A) -> Tuple<A> {
    Tuple { src, dst, sport: 0x8123, dport: 80, proto: proto::TCP, pad: 0, pad2: 0 }
}

#[test]
fn places_of_pins() {
    assert_eq!(names::DEFAULT_BPFFS, "/sys/fs/bpf/rustnet");
    assert_eq!(names::DEFAULT_RUN_DIR, "/run/rustnet");
    assert_eq!((names::PROGS_DIR, names::LINKS_DIR), ("prog", "link"));
    assert_eq!(
        names::PROGRAMS,
        ["from_pod", "to_pod", "uplink_in", "uplink_out", "overlay_in", "overlay_out", "side_in"]
    );
}

#[test]
fn names_of_maps_that_all_releases_share() {
    assert_eq!(
        [map::ENDPOINTS, map::PEERS4, map::PEERS6, map::COUNTERS, map::EVENTS, map::CONFIG],
        ["rn_endpoints", "rn_peers4", "rn_peers6", "rn_counters", "rn_events", "rn_config"]
    );
    assert_eq!(v1::SHARED, [map::ENDPOINTS, map::PEERS4, map::PEERS6, map::COUNTERS, map::EVENTS, map::CONFIG]);
}

#[test]
fn devices_filters_and_the_mark() {
    assert_eq!((names::OVERLAY_DEV, names::VETH_PREFIX), ("rn_vxlan", "rnv"));
    assert_eq!((names::TC_PRIORITY, names::TC_HANDLE), (1, 1));
    assert_eq!(v1::MARK, 0x0100_0000);
    assert_eq!((config::mark::DEFAULT, config::mark::DEFAULT_MASK), (0x1052, 0x107f));
}

#[test]
fn the_gateway_that_every_running_pod_routes_through() {
    assert_eq!(names::GATEWAY4, [169, 254, 1, 1]);
    assert_eq!(names::GATEWAY6, [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
}

#[test]
fn endpoints() {
    assert_eq!((size_of::<EndpointKey>(), size_of::<Endpoint>()), (16, 24));
    assert_eq!(
        offsets!(Endpoint: ifindex, identity, mac, host_mac, flags, pad),
        [("ifindex", 0), ("identity", 4), ("mac", 8), ("host_mac", 14), ("flags", 20), ("pad", 22)]
    );
    assert_eq!(endpoint::flags::VIA_QDISC, 1);
    let mapped = Addr { ip: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 244, 1, 2] };
    assert_eq!(rustnet_common::addr::Address::to_addr(A4), mapped);
}

#[test]
fn host_ports() {
    assert_eq!(map::HOST_PORTS, "rn_host_ports");
    assert_eq!((size_of::<HostPortKey>(), size_of::<HostPort>()), (20, 24));
    assert_eq!(offsets!(HostPortKey: addr, port, proto, pad), [("addr", 0), ("port", 16), ("proto", 18), ("pad", 19)]);
    assert_eq!(offsets!(HostPort: pod, ifindex, port, pad), [("pod", 0), ("ifindex", 16), ("port", 20), ("pad", 22)]);
    let mapped = Addr { ip: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0] };
    assert_eq!((host_port::any(true), host_port::any(false)), (mapped, Addr { ip: [0; 16] }));
}

#[test]
fn peers() {
    assert_eq!((size_of::<PeerKey<Ip4>>(), size_of::<PeerKey<Ip6>>(), size_of::<Peer>()), (8, 20, 24));
    assert_eq!(offsets!(PeerKey<Ip6>: prefix_len, data), [("prefix_len", 0), ("data", 4)]);
    assert_eq!(offsets!(Peer: node, identity, flags, pad), [("node", 0), ("identity", 16), ("flags", 20), ("pad", 22)]);
    assert_eq!([HOST, NODE, POD, TUNNEL, NO_MASQ, LOCAL_PODS, SERVICES], [1, 2, 4, 8, 16, 32, 64]);
    assert_eq!([identity::HOST, identity::WORLD, identity::POD, identity::NODE], [1, 2, 3, 6]);
}

/// `tunnel_src`, `uplink` and `uplink_mtu` are left out: no program of any release has read them
/// under these names.
#[test]
fn settings() {
    assert_eq!(size_of::<NodeConfig>(), 72);
    assert_eq!(
        offsets!(NodeConfig: node4, node6, overlay, overlay_mtu, overlay_port, snat_min, snat_max, flags, vni, hz, seed),
        [
            ("node4", 0),
            ("node6", 4),
            ("overlay", 40),
            ("overlay_mtu", 48),
            ("overlay_port", 52),
            ("snat_min", 54),
            ("snat_max", 56),
            ("flags", 58),
            ("vni", 60),
            ("hz", 64),
            ("seed", 68)
        ]
    );
    assert_eq!((config::flags::MASQUERADE, config::flags::FLOW_EVENTS, config::flags::ENCAPSULATE), (1, 2, 4));
    assert_eq!((config::flags::EXTERNAL, config::flags::ANSWER_DENIED), (8, 16));
}

/// Pinned tables outlive the agent that wrote them, and nodes of two releases have to agree.
#[test]
fn maglev_tables() {
    assert_eq!(map::MAGLEV, "rn_maglev");
    assert_eq!(offsets!(SvcEntry: first, count, id, affinity, flags, table)[5], ("table", 18));
    assert_eq!((maglev::UNIT, maglev::PLACES, maglev::head(3)), (256, 4, 768));
    let words: [u64; 3] = [5, 0x0003_0002_0001_0000, 0x0004];
    let found = [0, 1 << 30, 0x7fff_ffff, 0xbfff_ffff, u32::MAX].map(|hash| {
        let (word, bits) = maglev::place(0, words[0] as u32, hash);
        maglev::ordinal(words[word as usize], bits)
    });
    assert_eq!(found, [0, 1, 2, 3, 4]);
}

#[test]
fn sockets() {
    assert_eq!([map::SOCK_NETNS, map::SOCK_FWD, map::SOCK_REV], ["rn_sock_netns", "rn_sock_fwd", "rn_sock_rev"]);
    assert_eq!((map::SOCK_LED, TRAIL), ("rn_sock_led", 8));
    assert_eq!((size_of::<SocketKey>(), size_of::<Asked>()), (32, 24));
    assert_eq!((size_of::<Led>(), size_of::<Trail>()), (40, 328));
    assert_eq!(
        offsets!(Led: asked, to, asked_port, to_port),
        [("asked", 0), ("to", 16), ("asked_port", 32), ("to_port", 34)]
    );
    assert_eq!(offsets!(Trail: next, led), [("next", 0), ("led", 8)]);
    assert_eq!(offsets!(SocketKey: cookie, addr, port), [("cookie", 0), ("addr", 8), ("port", 24)]);
    assert_eq!(
        offsets!(Asked: addr, port, proto, bucket, backend),
        [("addr", 0), ("port", 16), ("proto", 18), ("bucket", 19), ("backend", 20)]
    );
    assert_eq!((netns::HOST, netns::POD), (1, 0));
    assert_eq!(Addr::from_halves(CLIENT_HIGH, 0).octets()[..8], [0xff, 0, 0, 0, 0, 0, 0, 0]);
    // Entries of releases that knew the host's sockets alone have 0.
    assert_eq!(netns::bucket(u64::MAX, netns::HOST), 0);
    assert_eq!([0, 1, 254, 255, u64::MAX].map(|cookie| netns::bucket(cookie, netns::POD)), [1, 2, 255, 1, 1]);
}

#[test]
fn counters() {
    assert_eq!((size_of::<Counter>(), COUNTERS, HOOKS), (16, 256, 8));
    assert_eq!(offsets!(Counter: packets, bytes), [("packets", 0), ("bytes", 8)]);
    assert_eq!(counter_index(DropReason::NoBackend as u8, hook::OVERLAY_IN), 52);
    assert_eq!(hook::NAMES[..6], names::PROGRAMS[..6]);
    assert_eq!(hook::NAMES[usize::from(hook::TUNNEL_IN)], names::TUNNEL_IN);
    // Codes are indices: a reason that goes leaves a hole, a new one gets a new code.
    let codes = [
        (DropReason::Forwarded, 0),
        (DropReason::Malformed, 1),
        (DropReason::InvalidExthdr, 2),
        (DropReason::Spoofed, 3),
        (DropReason::UnknownSender, 4),
        (DropReason::EncapProhibited, 5),
        (DropReason::NoBackend, 6),
        (DropReason::NoServicePort, 7),
        (DropReason::NoLocalBackend, 8),
        (DropReason::BackendLookupFailed, 9),
        (DropReason::NatNoMapping, 10),
        (DropReason::CtCreateFailed, 11),
        (DropReason::FragNotFound, 12),
        (DropReason::TtlExceeded, 13),
        (DropReason::FragNeeded, 14),
        (DropReason::IsClusterIp, 15),
        (DropReason::NoFib, 16),
        (DropReason::WriteError, 17),
        (DropReason::HostHairpin, 18),
        (DropReason::IcmpUnrelated, 20),
        (DropReason::NdNotForwarded, 21),
        (DropReason::PolicyDenied, 29),
        (DropReason::PolicyUndecided, 30),
        (DropReason::PolicyAudited, 31),
    ];
    for (reason, code) in codes {
        assert_eq!(reason as u8, code, "{}", reason.name());
    }
}

#[test]
fn events() {
    assert_eq!(size_of::<Event>(), 56);
    assert_eq!(
        offsets!(Event: time, src, dst, sport, dport, proto, reason, hook, ifindex, len),
        [
            ("time", 0),
            ("src", 8),
            ("dst", 24),
            ("sport", 40),
            ("dport", 42),
            ("proto", 44),
            ("reason", 45),
            ("hook", 46),
            ("ifindex", 48),
            ("len", 52)
        ]
    );
}

/// All nodes, of whatever release, choose the same backend for a flow.
#[test]
fn flow_hashes() {
    let (v4, v6) = (tuple(A4, B4), tuple(A6, B6));
    let values = [
        hash::flow(&v4, 0),
        hash::flow(&v4, 0x1234_5678),
        hash::flow(&v4.reversed(), 0),
        hash::flow(&Tuple { proto: proto::UDP, ..v4 }, 0),
        hash::flow(&v6, 0),
        hash::flow(&v6, 0x1234_5678),
        hash::flow(&v6.reversed(), 0),
    ];
    assert_eq!(values, [0xd3cf_dd06, 0x6bfc_0268, 0xb808_2c6d, 0xc559_ec82, 0x38bf_0976, 0x9056_b6f2, 0x6847_005d]);
    assert_eq!([0, 1, 0x8000_0000, u32::MAX].map(|h| hash::pick(h, 3)), [0, 0, 1, 2]);
}

#[test]
fn tuples() {
    assert_eq!((size_of::<Tuple<Ip4>>(), size_of::<Tuple<Ip6>>()), (16, 40));
    assert_eq!(bytes(&tuple(A4, B4)), [10, 244, 1, 2, 10, 96, 0, 10, 0x23, 0x81, 80, 0, 6, 0, 0, 0]);
    let six = bytes(&tuple(A6, B6));
    assert_eq!((&six[..16], &six[16..32]), (&bytes(&A6)[..], &bytes(&B6)[..]));
    assert_eq!(six[32..], [0x23, 0x81, 80, 0, 6, 0, 0, 0]);
}

#[test]
fn service_keys() {
    let four = SvcKey { vip: B4, port: 0x1f90, proto: proto::UDP, scope: 1 };
    assert_eq!(bytes(&four), [10, 96, 0, 10, 0x90, 0x1f, 17, 1]);
    let six = bytes(&SvcKey { vip: B6, port: 0x1f90, proto: proto::UDP, scope: 1 });
    assert_eq!((&six[..16], &six[16..]), (&bytes(&B6)[..], &[0x90, 0x1f, 17, 1][..]));
    assert_eq!((service::flags::DROP_EMPTY, service::flags::VIP, service::scope::CLUSTER), (1, 2, 0));
    assert_eq!((service::flags::SHARED, service::flags::SOURCE_RANGES, service::scope::EXTERNAL), (4, 8, 1));
}

#[test]
fn source_ranges() {
    assert_eq!((size_of::<SourceRange>(), size_of::<SourceRangeKey>()), (36, 40));
    let of = |vip, len, client| {
        let data = SourceRange { vip, port: 0x1f90, proto: proto::UDP, pad: 0, client };
        bytes(&SourceRangeKey { prefix_len: source_range::prefix_len(vip.is_v4(), len), data })
    };
    let (vip, client) = (rustnet_common::addr::Address::to_addr(B4), rustnet_common::addr::Address::to_addr(A4));
    let four = of(vip, 24, client);
    assert_eq!(four[..4], (160_u32 + 96 + 24).to_ne_bytes());
    assert_eq!((&four[4..20], &four[24..]), (&bytes(&vip)[..], &bytes(&client)[..]));
    assert_eq!(four[20..24], [0x90, 0x1f, 17, 0]);
    let six = of(B6, 64, A6);
    assert_eq!(six[..4], (160_u32 + 64).to_ne_bytes());
    assert_eq!((&six[4..20], &six[24..]), (&bytes(&B6)[..], &bytes(&A6)[..]));
    assert_eq!((source_range::FULL, source_range::ALLOWED), (288, 1));
    for (is_v4, most) in [(true, 32), (false, 128)] {
        let len_of = |prefix| source_range::range_len(is_v4, prefix);
        assert!((0..=most).all(|len| len_of(source_range::prefix_len(is_v4, len)) == Some(len)));
        assert_eq!(len_of(source_range::prefix_len(is_v4, 0) - 1), None);
        assert_eq!(len_of(source_range::prefix_len(is_v4, most) + 1), None);
    }
}

#[test]
fn policies() {
    let names = [map::POLICY, map::POLICY_PODS, map::POLICY_CIDRS, map::POLICY_RULES];
    assert_eq!(names, ["rn_policy", "rn_policy_pods", "rn_policy_cidrs", "rn_policy_rules"]);
    assert_eq!(offsets!(Policies: generation, flags), [("generation", 0), ("flags", 4)]);
    assert_eq!(policy::flags::ENFORCED, 1);
    let after = |generation| Policies { generation, flags: 0 }.changed(1);
    assert_eq!([0, 7, u32::MAX].map(|it| after(it).generation), [1, 8, 1]);
    assert_eq!(after(7).flags, 1);
    assert_eq!(
        offsets!(PolicyPod: class, ingress, egress, ifindex),
        [("class", 0), ("ingress", 4), ("egress", 8), ("ifindex", 12)]
    );
    assert_eq!(offsets!(PolicyCidrKey: prefix_len, data), [("prefix_len", 0), ("data", 4)]);
    assert_eq!(offsets!(PolicyRuleKey: prefix_len, data), [("prefix_len", 0), ("data", 4)]);
    let key =
        PolicyMatch { set: 0x0102_0304, class: 0x1112_1314, proto: proto::UDP, pad: 0, port: 0x1f90_u16.to_be_bytes() };
    assert_eq!((&bytes(&key)[..4], &bytes(&key)[8..]), (&0x0102_0304_u32.to_ne_bytes()[..], &[17, 0, 0x1f, 0x90][..]));
    assert_eq!((policy::ANY_PROTO, policy::ANY_PORT, policy::FULL), (64, 80, 96));
    assert_eq!(offsets!(PolicyRule: flags, rule), [("flags", 0), ("rule", 4)]);
    assert_eq!((policy::ALLOW, policy::AUDIT, policy::OPEN, policy::ANY_CLASS), (1, 2, 0, 0));
    assert_eq!(
        offsets!(CtEntry<Ip6>: flags, pad, seen, generation),
        [("flags", 40), ("pad", 42), ("seen", 44), ("generation", 60)]
    );
}

#[test]
fn retired_maps() {
    let shapes: Vec<_> = v1::RETIRED.iter().map(|s| (s.name, s.kind, s.key_size, s.value_size, s.flags)).collect();
    assert_eq!(
        shapes,
        [
            ("rn_svc4", 1, 8, 20, 1),
            ("rn_svc6", 1, 20, 20, 1),
            ("rn_backends", 2, 4, 24, 1024),
            ("rn_ct4", 9, 16, 64, 0),
            ("rn_ct6", 9, 40, 88, 0),
            ("rn_frag4", 9, 16, 4, 0),
            ("rn_frag6", 9, 40, 4, 0)
        ]
    );
}

#[test]
fn retired_connections() {
    fn half<A>(to: Tuple<A>) -> v1::CtEntry<A> {
        v1::CtEntry {
            to,
            flags: 0x0102,
            state: 0x03,
            pad: 0,
            seen: 0x1112_1314,
            ifindex: 0x2122_2324,
            backend: 0x3132_3334,
            out: 0x4142_4344,
            guard: [0x5152, 0x5354, 0x5556],
            pad2: [0; 3],
            packets: 0x6162_6364_6566_6768,
            bytes: 0x7172_7374_7576_7778,
        }
    }
    let tail = [
        0x02, 0x01, 0x03, 0, 0x14, 0x13, 0x12, 0x11, 0x24, 0x23, 0x22, 0x21, 0x34, 0x33, 0x32, 0x31, 0x44, 0x43, 0x42,
        0x41, 0x52, 0x51, 0x54, 0x53, 0x56, 0x55, 0, 0, 0, 0, 0, 0, 0x68, 0x67, 0x66, 0x65, 0x64, 0x63, 0x62, 0x61,
        0x78, 0x77, 0x76, 0x75, 0x74, 0x73, 0x72, 0x71,
    ];
    let (four, six) = (bytes(&half(tuple(A4, B4))), bytes(&half(tuple(A6, B6))));
    assert_eq!((&four[..16], &four[16..]), (&bytes(&tuple(A4, B4))[..], &tail[..]));
    assert_eq!((&six[..40], &six[40..]), (&bytes(&tuple(A6, B6))[..], &tail[..]));
    let flags = [v1::flags::REPLY, v1::flags::NAT, v1::flags::HAIRPIN, v1::flags::MASQ, v1::flags::FROM_HOST];
    assert_eq!(flags, [1, 2, 4, 8, 16]);
    let states = [v1::state::ANSWERED, v1::state::FIN_ORIG, v1::state::FIN_REPLY, v1::state::RST];
    assert_eq!(states, [1, 2, 4, 8]);
}

#[test]
fn flags_and_states_of_connections() {
    use rustnet_common::conntrack::{VIA_QDISC, flags, state};
    let all = [
        flags::REPLY,
        flags::NAT,
        flags::HAIRPIN,
        flags::MASQ,
        flags::FROM_HOST,
        flags::SWAPPED,
        flags::VIA_STACK,
        flags::EXTERNAL,
        flags::SECOND_ADDRESS,
    ];
    assert_eq!(all, [1, 2, 4, 8, 16, 32, 64, 128, 256]);
    let all = [
        state::ANSWERED,
        state::FIN_ORIG,
        state::FIN_REPLY,
        state::RST_ORIG,
        state::ESTABLISHED,
        state::FIN_ACKED,
        state::RST_REPLY,
        state::SYN_AGAIN,
    ];
    assert_eq!(all, [1, 2, 4, 8, 16, 32, 64, 128]);
    assert_eq!((state::SYN_NUMBER, VIA_QDISC), (0xffff_fe00, 1 << 31));
}

#[test]
fn retired_services_and_backends() {
    let entry = v1::SvcEntry { first: 0x0102_0304, count: 5, id: 6, affinity: 7, flags: 8, pad: 0 };
    assert_eq!(bytes(&entry), [4, 3, 2, 1, 5, 0, 0, 0, 6, 0, 0, 0, 7, 0, 0, 0, 8, 0, 0, 0]);
    let backend = v1::Backend { addr: B6, port: 0x1f90, flags: 2, id: 0x0102_0304 };
    let tail = [0x90, 0x1f, 2, 0, 4, 3, 2, 1];
    let found = bytes(&backend);
    assert_eq!((&found[..16], &found[16..]), (&bytes(&B6)[..], &tail[..]));
}
