//! The planner on real maps: what fits, and what is repaired.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustnet_agent::bpf::store::{BpfMaps, Map};
use rustnet_agent::config::Routing;
use rustnet_agent::host::HostFacts;
use rustnet_agent::index::{Index, Settings};
use rustnet_agent::model::{
    Condition, Endpoint, EndpointSlice, Family, Node, ObjectName, Service, ServicePort, TargetPort,
};
use rustnet_agent::plan::{Maps, Planner, Write};
use rustnet_agent::source::{Event, Kind, Object, ObjectRef};
use rustnet_common::addr::{Addr, Ip4};
use rustnet_common::backend::Backend;
use rustnet_common::maglev::{MAX_UNITS, UNIT};
use rustnet_common::names::map;
use rustnet_common::peer::{Peer, PeerKey};
use rustnet_common::service::{SvcEntry, SvcKey};
use rustnet_common::source_range::{self, SourceRange, SourceRangeKey};

use crate::load::load;
use crate::sandbox::{self, Sandbox};

/// An index and a planner on the maps of a sandbox.
struct Rig {
    index: Index,
    planner: Planner,
    maps: BpfMaps,
    now: Duration,
}

impl Rig {
    fn new(sandbox: &Sandbox, sizes: &[(&str, u32)]) -> Self {
        let mut load = load(sandbox);
        load.sizes.extend(sizes.iter().map(|(name, entries)| ((*name).to_owned(), *entries)));
        load.run().unwrap().pin(&sandbox.bpffs).unwrap();
        let maps = BpfMaps::open(&sandbox.bpffs).unwrap();
        let mut index = Index::new(Settings::new("n1", Routing::Vxlan));
        index.set_host(HostFacts::default());
        for kind in Kind::REQUIRED {
            index.handle(Event::Synced(kind));
        }
        Self { index, planner: Planner::adopt(&maps).unwrap(), maps, now: Duration::ZERO }
    }

    fn sync(&mut self, events: impl IntoIterator<Item = Event>) {
        for event in events {
            self.index.handle(event);
        }
        self.now += Duration::from_millis(1);
        self.planner.sync(&mut self.index, &mut self.maps, self.now).unwrap();
    }

    /// The maps in which an audit finds something.
    fn audit(&mut self) -> Vec<&'static str> {
        self.now = self.planner.audit_at().unwrap();
        let mut found = Vec::new();
        while self.planner.audit_at() == Some(self.now) {
            found.extend(self.planner.audit(&mut self.maps, self.now).unwrap());
        }
        found.iter().map(|it| it.map).collect()
    }

    /// The last octets of the addresses that have a service.
    fn services(&self) -> BTreeSet<u8> {
        let last = |ip: IpAddr| if let IpAddr::V4(ip) = ip { ip.octets()[3] } else { 0 };
        let held = self.maps.snapshot().unwrap().services;
        held.keys().filter(|key| key.port == 80).map(|key| last(key.ip)).collect()
    }
}

/// Service default/sN, 10.96.0.N:80, with one backend.
fn service(n: u8) -> [Event; 2] {
    service_of(n.into(), 1)
}

/// Service default/sN, 10.96.0.0 + N, port 80.
fn service_of(n: u32, backends: u8) -> [Event; 2] {
    let [_, high, middle, low] = n.to_be_bytes();
    let name = ObjectName::namespaced("default", &format!("s{n}"));
    let service = Service {
        name: name.clone(),
        created: 0,
        vips: [[10, 96 + high, middle, low].into()].into(),
        ports: [ServicePort { name: "".into(), port: 80, proto: 6, node_port: 0 }].into(),
        affinity: 0,
        algorithm: None,
        forwarding: None,
        internal_local: false,
        external: Box::default(),
        balanced: Box::default(),
        source_ranges: None,
        external_local: false,
        health_check_port: 0,
        problems: Box::default(),
    };
    let endpoint = |i: u8| {
        let addr = [10 + 10 * i, 1 + high, middle, low].into();
        Endpoint { addr, condition: Condition::Ready, node: "n2".into(), pod: Box::default(), hints: None }
    };
    let slice = EndpointSlice {
        name: ObjectName::namespaced("default", &format!("s{n}-1")),
        service: name,
        family: Family::V4,
        ports: [TargetPort { name: "".into(), port: 8080, proto: 6 }].into(),
        endpoints: (0..backends).map(endpoint).collect(),
        triggered: None,
        problems: Box::default(),
    };
    [Event::Apply(Object::Service(Arc::new(service))), Event::Apply(Object::Slice(Arc::new(slice)))]
}

fn node(address: &str, pod_cidrs: impl Iterator<Item = String>) -> Event {
    Event::Apply(Object::Node(Arc::new(Node {
        name: ObjectName::cluster("n2"),
        created: 0,
        addresses: [address.parse().unwrap()].into(),
        pod_cidrs: pod_cidrs.map(|cidr| cidr.parse().unwrap()).collect(),
        zone: "".into(),
        is_leaving: false,
        other_addresses: Box::default(),
        labels: rustnet_agent::model::Labels::default(),
        problems: Box::default(),
    })))
}

fn delete(kind: Kind, name: &str) -> Event {
    Event::Delete(ObjectRef { kind, name: ObjectName::namespaced("default", name) })
}

#[test]
fn one_service_goes_and_another_takes_its_place_in_a_full_map() {
    sandbox::run(|sandbox| {
        let mut rig = Rig::new(sandbox, &[(map::SVC4, 16), (map::SVC6, 16)]);
        rig.sync((1..=20).flat_map(service));
        assert_eq!(rig.services().len(), 16);
        assert!(!rig.planner.problems(&rig.index).is_empty());
        rig.sync((2..=9).map(|n| delete(Kind::Service, &format!("s{n}"))));
        assert_eq!(rig.services(), (10..=20).chain([1]).collect());
        rig.sync((11..=20).map(|n| delete(Kind::Service, &format!("s{n}"))).chain((30..36).flat_map(service)));
        assert_eq!(rig.services(), (30..36).chain([1, 10]).collect());
        assert_eq!(rig.planner.problems(&rig.index), []);
    });
}

#[test]
fn all_prefixes_are_replaced_in_a_full_map() {
    sandbox::run(|sandbox| {
        let mut rig = Rig::new(sandbox, &[(map::PEERS4, 16), (map::PEERS6, 16)]);
        let ranges = |second: u8| (0..20).map(move |n| format!("10.{second}.{n}.0/24"));
        for (address, second) in [("192.0.2.2", 1), ("192.0.2.3", 2), ("192.0.2.4", 2)] {
            rig.sync([node(address, ranges(second))]);
            let peers = rig.maps.snapshot().unwrap().peers;
            let of_range = |ip: IpAddr| matches!(ip, IpAddr::V4(ip) if ip.octets()[..2] == [10, second]);
            assert_eq!(peers.len(), 15, "{address}: {peers:?}");
            assert!(peers.keys().all(|it| of_range(it.addr()) || it.addr() == address.parse::<IpAddr>().unwrap()));
        }
    });
}

#[test]
fn an_audit_puts_back_what_bpftool_changed() {
    sandbox::run(|sandbox| {
        let mut rig = Rig::new(sandbox, &[]);
        rig.sync(
            [node("192.0.2.2", std::iter::once("10.1.2.0/24".to_owned()))].into_iter().chain((1..4).flat_map(service)),
        );
        let before = rig.maps.snapshot().unwrap();
        assert_eq!(rig.audit(), <[&str; 0]>::default());
        let services = Map::<SvcKey<Ip4>, SvcEntry>::open(&sandbox.bpffs, map::SVC4).unwrap();
        let ids = Map::<u32, u32>::open(&sandbox.bpffs, map::BACKEND_IDS).unwrap();
        let backends = Map::<u32, Backend>::open(&sandbox.bpffs, map::BACKENDS).unwrap();
        let peers = Map::<PeerKey<Ip4>, Peer>::open(&sandbox.bpffs, map::PEERS4).unwrap();
        let vip = |n: u8| SvcKey { vip: Ipv4Addr::new(10, 96, 0, n).into(), port: 80, proto: 6, scope: 0 };

        // As `bpftool map delete name rn_svc4_v2 key ...` and `bpftool map update` do.
        assert!(services.delete(&vip(1)).unwrap());
        let changed = SvcEntry { first: 2, count: 1, ..services.get(&vip(2)).unwrap().unwrap() };
        services.put(&vip(2), &changed).unwrap();
        services.put(&vip(9), &changed).unwrap();
        ids.put(&2, &77).unwrap();
        let there = backends.get(&0).unwrap().unwrap();
        backends.put(&0, &Backend { addr: Addr::from(IpAddr::from([192, 0, 2, 99])), ..there }).unwrap();
        assert!(peers.delete(&PeerKey { prefix_len: 24, data: Ipv4Addr::new(10, 1, 2, 0).into() }).unwrap());
        assert_eq!(rig.audit(), [map::BACKENDS, map::BACKEND_IDS, map::SVC4, map::SVC4, map::SVC4, map::PEERS4]);
        assert_eq!(rig.maps.snapshot().unwrap(), before);
        assert_eq!(rig.audit(), <[&str; 0]>::default());
    });
}

/// Service default/s1 with a load balancer of both families for these clients.
fn judged(ranges: &[&str]) -> Event {
    let [Event::Apply(Object::Service(service)), _] = service(1) else { panic!("no Service") };
    let balanced = ["203.0.113.7", "2001:db8:7::7"].map(|ip| ip.parse().unwrap()).into();
    let source_ranges = Some(ranges.iter().map(|range| range.parse().unwrap()).collect());
    let vips = [service.vips[0], "fd00:96::1".parse().unwrap()].into();
    Event::Apply(Object::Service(Arc::new(Service { vips, balanced, source_ranges, ..(*service).clone() })))
}

#[test]
fn source_ranges_of_both_families() {
    sandbox::run(|sandbox| {
        let mut rig = Rig::new(sandbox, &[(map::SOURCE_RANGES, 8)]);
        let ranges = |rig: &Rig| {
            let held = rig.maps.snapshot().unwrap().source_ranges;
            held.iter().map(|(range, value)| format!("{range} {value}")).collect::<Vec<_>>()
        };
        let four = |range: &str| format!("{range} at 203.0.113.7:80/TCP from outside 1");
        let six = |range: &str| format!("{range} at [2001:db8:7::7]:80/TCP from outside 1");
        rig.sync([judged(&["0.0.0.0/0", "192.0.2.0/24", "::/0", "2001:db8::1/128"])]);
        let want = [four("0.0.0.0/0"), four("192.0.2.0/24"), six("::/0"), six("2001:db8::1/128")];
        assert_eq!(ranges(&rig), want);
        // Another agent adopts them.
        rig.planner = Planner::adopt(&rig.maps).unwrap();
        rig.sync([]);
        assert_eq!(ranges(&rig), want);

        let map = Map::<SourceRangeKey, u32>::open(&sandbox.bpffs, map::SOURCE_RANGES).unwrap();
        let vip = Addr::from("203.0.113.7".parse::<IpAddr>().unwrap());
        let key = |client: [u8; 4], len| SourceRangeKey {
            prefix_len: source_range::prefix_len(true, len),
            data: SourceRange { vip, port: 80, proto: 6, pad: 0, client: IpAddr::from(client).into() },
        };
        assert!(map.delete(&key([192, 0, 2, 0], 24)).unwrap());
        map.put(&key([198, 51, 100, 0], 24), &1).unwrap();
        map.put(&key([0, 0, 0, 0], 0), &9).unwrap();
        assert_eq!(rig.audit(), [map::SOURCE_RANGES; 3]);
        assert_eq!(ranges(&rig), want);

        rig.sync([judged(&["192.0.2.0/25", "192.0.2.128/25", "192.0.2.0/26", "2001:db8::1/128", "2001:db8::/32"])]);
        let four = ["192.0.2.0/25", "192.0.2.0/26", "192.0.2.128/25"].map(four);
        assert_eq!(ranges(&rig), [&four[..], &["2001:db8::/32", "2001:db8::1/128"].map(six)].concat());
        rig.sync([delete(Kind::Service, "s1")]);
        assert_eq!(ranges(&rig), [""; 0]);
    });
}

/// `cargo test --release -p rustnet-agent --test kernel -- --ignored --nocapture audit_of_a_hundred_thousand`
#[test]
#[ignore = "prints figures"]
fn an_audit_of_a_hundred_thousand_services() {
    sandbox::run(|sandbox| {
        let sizes = [
            (map::SVC4, 262_144),
            (map::SVC6, 262_144),
            (map::BACKEND_IDS, 524_288),
            (map::BACKENDS, 524_288),
            (map::PEERS4, 65_536),
            (map::PEERS6, 65_536),
        ];
        let mut rig = Rig::new(sandbox, &sizes);
        rig.sync((0..100_000).flat_map(|n| service_of(n, 3)));
        rig.sync([node("192.0.2.2", (0..10_000).map(|n| format!("10.{}.{}.0/24", n >> 8, n & 255)))]);
        assert_eq!((rig.planner.service_count(), rig.planner.problems(&rig.index).len()), (200_000, 0));
        rig.now += Duration::from_mins(10);
        while rig.planner.audit_at().unwrap() <= rig.now {
            let began = Instant::now();
            assert_eq!(rig.planner.audit(&mut rig.maps, rig.now).unwrap(), []);
            println!("one piece compared in {:?}", began.elapsed());
        }
    });
}

/// What the steps of an audit of `rn_maglev` cost: of the default size, and of the largest.
#[test]
#[ignore = "prints figures"]
fn an_audit_of_full_maglev_tables() {
    for units in [1024, MAX_UNITS] {
        sandbox::run(move |sandbox| {
            let mut rig = Rig::new(sandbox, &[(map::MAGLEV, units * UNIT)]);
            let mut unit = 1;
            while unit + 16 <= units {
                // Such words as a table of 16,381 places has.
                let words = (0..4097_u64).map(|n| if n == 0 { 16_381 } else { n * 0x0001_0001_0001_0001 }).collect();
                rig.maps.apply(&[Write::MaglevTable { unit: unit as u16, words }]).unwrap();
                unit += 17;
            }
            rig.planner = Planner::adopt(&rig.maps).unwrap();
            rig.sync([]);
            for _ in 0..3 {
                rig.now = rig.planner.audit_at().unwrap();
                let (mut steps, mut found) = (Vec::new(), 0);
                while rig.planner.audit_at() == Some(rig.now) {
                    let began = Instant::now();
                    found += rig.planner.audit(&mut rig.maps, rig.now).unwrap().len();
                    steps.push(began.elapsed());
                }
                let words = steps.len() as u32 - 5;
                let (all, most) = (steps.iter().sum::<Duration>(), steps.iter().max().unwrap());
                println!(
                    "{} KiB in {words} pieces: {all:?}, the longest step {most:?}; {found} differences",
                    units * UNIT / 128
                );
            }
        });
    }
}
