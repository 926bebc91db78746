//! The planner on real maps: what fits, and what is repaired.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use rustnet_agent::bpf::store::BpfMaps;
use rustnet_agent::config::Routing;
use rustnet_agent::index::{Index, Settings};
use rustnet_agent::model::{
    Condition, Endpoint, EndpointSlice, Family, Node, ObjectName, Service, ServicePort, TargetPort,
};
use rustnet_agent::plan::{Maps, Planner};
use rustnet_agent::source::{Event, Kind, Object, ObjectRef};
use rustnet_common::names::map;

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

    /// The last octets of the addresses that have a service.
    fn services(&self) -> BTreeSet<u8> {
        let last = |ip: IpAddr| if let IpAddr::V4(ip) = ip { ip.octets()[3] } else { 0 };
        let held = self.maps.snapshot().unwrap().services;
        held.keys().filter(|key| key.port == 80).map(|key| last(key.ip)).collect()
    }
}

/// Service default/sN, 10.96.0.N:80, with one backend.
fn service(n: u8) -> [Event; 2] {
    let name = ObjectName::namespaced("default", &format!("s{n}"));
    let service = Service {
        name: name.clone(),
        created: 0,
        vips: [[10, 96, 0, n].into()].into(),
        ports: [ServicePort { name: "".into(), port: 80, proto: 6 }].into(),
        affinity: 0,
        internal_local: false,
        problems: Box::default(),
    };
    let endpoint = Endpoint { addr: [10, 1, 2, n].into(), condition: Condition::Ready, node: "n2".into(), hints: None };
    let slice = EndpointSlice {
        name: ObjectName::namespaced("default", &format!("s{n}-1")),
        service: name,
        family: Family::V4,
        ports: [TargetPort { name: "".into(), port: 8080, proto: 6 }].into(),
        endpoints: [endpoint].into(),
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
