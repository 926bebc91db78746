//! Index in, writes out; then what the maps hold.

mod audit;
mod damage;
mod full;
mod kube_proxy;
mod service_cidrs;
mod sets;
mod source_ranges;
mod tables;

use super::{Capacity, Plan, Planner};
use crate::config::{AUDIT_PERIOD, Routing};
use crate::host::HostFacts;
use crate::index::{Index, Settings};
use crate::model::build::{endpoint, ip, node, service, slice};
use crate::model::{EndpointSlice, Family, ObjectName, Problem};
use crate::plan::{GRACE, MemoryMaps, Snapshot, Table, VipKey, Write};
use crate::source::{Event, Kind, ObjectRef, Origin};
use rustnet_common::backend::{Backend, id};
use rustnet_common::service::SvcEntry;
use rustnet_common::tuple::proto::{TCP, UDP};
use std::time::Duration;

const VIP: &str = "10.96.0.10";

/// An index, a planner and the maps, as the agent holds them.
struct Rig {
    index: Index,
    planner: Planner,
    maps: MemoryMaps,
    now: Duration,
}

impl Rig {
    fn new(capacity: u32) -> Self {
        Self::on(MemoryMaps::new(capacity))
    }

    fn with_room(services: u32, peers: u32) -> Self {
        Self::on(MemoryMaps::new(64).with_room(services, peers))
    }

    fn on(maps: MemoryMaps) -> Self {
        Self { index: synced_index(), planner: Planner::adopt(&maps).unwrap(), maps, now: Duration::ZERO }
    }

    fn handle(&mut self, events: impl IntoIterator<Item = Event>) -> &mut Self {
        for event in events {
            self.index.handle(event);
        }
        self
    }

    fn sync(&mut self) -> Plan {
        self.now += Duration::from_millis(1);
        self.maps.set_now(self.now);
        self.planner.sync(&mut self.index, &mut self.maps, self.now).unwrap()
    }

    fn wait(&mut self) -> &mut Self {
        self.now += GRACE;
        self
    }

    /// A new agent on the same maps, with the same cluster.
    fn restart(&mut self) -> &mut Self {
        self.planner = Planner::adopt(&self.maps).unwrap();
        self
    }

    fn entry(&self, vip: &str, port: u16, proto: u8) -> SvcEntry {
        self.maps.held().services[&key(vip, port, proto)]
    }

    fn backends(&self, vip: &str, port: u16, proto: u8) -> Vec<Backend> {
        self.maps.backends(&self.entry(vip, port, proto))
    }

    /// Lets the grace period pass, and the next one, until nothing waits any more.
    fn settle(&mut self) -> Vec<&'static str> {
        let mut done = Vec::new();
        for _ in 0..5 {
            done.extend(shape(&self.wait().sync()));
        }
        done
    }

    fn addresses(&self, vip: &str, port: u16, proto: u8) -> Vec<String> {
        let text = |b: &Backend| format!("{}", std::net::IpAddr::from(b.addr));
        self.backends(vip, port, proto).iter().map(text).collect()
    }
}

fn make_index() -> Index {
    let mut index = Index::new(Settings::new("n1", Routing::Vxlan));
    index.set_host(HostFacts::default());
    index
}

fn synced_index() -> Index {
    let mut index = make_index();
    for kind in Kind::REQUIRED {
        index.handle(Event::Synced(kind));
    }
    index
}

fn key(vip: &str, port: u16, proto: u8) -> VipKey {
    VipKey { ip: ip(vip), port, proto, scope: 0 }
}

fn web(addrs: &[&str]) -> [Event; 2] {
    [service("web", &[VIP]).tcp(80).apply(), slice("web-1", "web", Family::V4).tcp(8080).ready(addrs).apply()]
}

fn dns(addrs: &[&str]) -> [Event; 2] {
    [
        service("dns", &["10.96.0.53"]).port("dns", 53, UDP).apply(),
        slice("dns-1", "dns", Family::V4).port("dns", 53, UDP).ready(addrs).apply(),
    ]
}

fn gone(kind: Kind, name: &str) -> Event {
    Event::Delete(ObjectRef { kind, name: ObjectName::namespaced("default", name) })
}

/// The kinds of the writes, in order.
fn shape(plan: &Plan) -> Vec<&'static str> {
    let name = |write: &Write| match write {
        Write::Backends { .. } => "backends",
        Write::BackendIds { .. } => "ids",
        Write::ClearBackends { .. } => "clear",
        Write::RestoreBackends { .. } => "restore backends",
        Write::RestoreIds { .. } => "restore ids",
        Write::MaglevTable { .. } => "table",
        Write::RestoreTables { .. } => "restore table",
        Write::PutService { key, .. } if key.is_wildcard() => "put wildcard",
        Write::PutService { .. } => "put service",
        Write::DeleteService { key } if key.is_wildcard() => "delete wildcard",
        Write::DeleteService { .. } => "delete service",
        Write::PutPeer { .. } => "put peer",
        Write::DeletePeer { .. } => "delete peer",
        Write::PutSourceRange { .. } => "put range",
        Write::DeleteSourceRange { .. } => "delete range",
        Write::EndBackends { .. } => "end",
    };
    plan.writes.iter().map(name).collect()
}

#[test]
fn backends_then_entry_then_wildcard_and_deletion_the_other_way_round() {
    let mut rig = Rig::new(64);
    let n2 = node("n2", &["172.18.0.12"], &["10.244.2.0/24"]).apply();
    let plan = rig.handle(web(&["10.244.1.2"])).handle([n2]).sync();
    assert_eq!(shape(&plan), ["put peer", "put peer", "backends", "ids", "put service", "put wildcard"]);
    let n2 = Event::Delete(ObjectRef { kind: Kind::Node, name: ObjectName::cluster("n2") });
    let plan = rig.handle([gone(Kind::Service, "web"), n2]).sync();
    assert_eq!(shape(&plan), ["delete wildcard", "delete service", "delete peer", "delete peer"]);
    assert_eq!(rig.maps.held().services.len(), 0);
    assert_eq!(rig.settle(), ["clear"]);
}

#[test]
fn nothing_changed_nothing_written() {
    let mut rig = Rig::new(64);
    rig.handle(web(&["10.244.1.2"])).sync();
    assert_eq!(rig.sync().writes, []);
    // Not even if all objects arrive again, or if the agent restarts.
    assert_eq!(rig.handle(web(&["10.244.1.2"])).sync().writes, []);
    assert_eq!(rig.restart().sync().writes, []);
}

#[test]
fn changed_flags_are_one_write() {
    let mut rig = Rig::new(64);
    rig.handle(web(&["10.244.1.2"])).sync();
    let before = rig.entry(VIP, 80, TCP);
    let sticky = crate::model::Service { affinity: 60, ..service("web", &[VIP]).tcp(80) };
    let plan = rig.handle([sticky.apply()]).sync();
    let entry = SvcEntry { affinity: 60, ..before };
    assert_eq!(plan.writes, [Write::PutService { key: key(VIP, 80, TCP), entry }]);
}

#[test]
fn a_changed_set_gets_a_new_range_and_backends_keep_their_ids() {
    let mut rig = Rig::new(64);
    rig.handle(web(&["10.244.1.2", "10.244.1.3"])).sync();
    let (before, entry) = (rig.backends(VIP, 80, TCP), rig.entry(VIP, 80, TCP));
    let plan = rig.handle(web(&["10.244.1.3", "10.244.1.4"])).sync();
    assert_eq!(shape(&plan), ["backends", "ids", "put service"]);
    assert!(matches!(&plan.writes[0], Write::Backends { backends } if backends.len() == 1), "{plan:?}");
    let (after, now) = (rig.backends(VIP, 80, TCP), rig.entry(VIP, 80, TCP));
    assert_eq!(now.id, entry.id);
    assert!(now.first >= entry.first + entry.count);
    assert_eq!(after[0], before[1]);
    assert!(before.iter().all(|b| b.id != after[1].id));
    // A backend that comes back is a new one: what remembers the old id must not meet it by chance.
    rig.handle(web(&["10.244.1.2"])).sync();
    assert_eq!(id::slot_of(rig.backends(VIP, 80, TCP)[0].id), 3);
    // The slots of those that are gone are cleared, each with the last id it had.
    assert_eq!(rig.settle(), ["clear", "clear"]);
    let cleared = [before[0], before[1], after[1]].map(|b| b.left());
    assert_eq!(rig.maps.held().backends[..3], cleared);
}

#[test]
fn a_slot_gets_its_next_generation_also_from_another_agent() {
    let mut rig = Rig::new(2);
    rig.handle(web(&["10.244.1.2"])).sync();
    for round in 2..7 {
        rig.handle(web(&[])).sync();
        rig.settle();
        if round % 2 == 0 {
            rig.restart().settle();
        }
        rig.handle(web(&["10.244.1.2", "10.244.1.3"])).sync();
        let mut ids = [0, 1].map(|i| rig.backends(VIP, 80, TCP)[i].id);
        ids.sort_by_key(|id| id::slot_of(*id));
        assert_eq!(ids, [id::make(0, round), id::make(1, round - 1)]);
    }
}

#[test]
fn flags_change_in_place() {
    let mut rig = Rig::new(64);
    rig.handle(web(&["10.244.1.2", "10.244.1.3"])).sync();
    let (entry, before) = (rig.entry(VIP, 80, TCP), rig.backends(VIP, 80, TCP));
    let slice = slice("web-1", "web", Family::V4).tcp(8080);
    let draining = ["10.244.1.2", "10.244.1.3"].into_iter().fold(slice, |s, ip| s.endpoint(endpoint(ip).draining()));
    let plan = rig.handle([draining.apply()]).sync();
    assert_eq!(shape(&plan), ["backends"]);
    assert_eq!(rig.entry(VIP, 80, TCP), entry);
    let flags = rustnet_common::backend::flags::TERMINATING;
    let changed: Vec<_> = before.iter().map(|b| Backend { flags, ..*b }).collect();
    assert_eq!(rig.backends(VIP, 80, TCP), changed);
}

#[test]
fn a_backend_is_cleared_only_once_everything_is_known_again() {
    let mut rig = Rig::new(64);
    rig.handle(web(&["10.244.1.2", "10.244.1.3"])).sync();
    rig.handle(web(&["10.244.1.3"])).sync();
    rig.index = make_index();
    rig.restart();
    assert_eq!(rig.settle(), <[&str; 0]>::default());
    rig.handle(web(&["10.244.1.3"])).handle(Kind::REQUIRED.map(Event::Synced));
    assert_eq!(rig.settle(), ["clear"]);
}

#[test]
fn ids_survive_a_restart_and_are_not_given_again_after_it() {
    let mut rig = Rig::new(64);
    rig.handle(web(&["10.244.1.2", "10.244.1.3"])).handle(dns(&["10.244.1.9"])).sync();
    let (web_before, dns_before) = (rig.backends(VIP, 80, TCP), rig.entry("10.96.0.53", 53, UDP));
    rig.handle([gone(Kind::Service, "dns")]).handle(web(&["10.244.1.3"])).sync();
    rig.restart().handle(web(&["10.244.1.3", "10.244.1.4"])).sync();
    let after = rig.backends(VIP, 80, TCP);
    assert_eq!(after[0].id, web_before[1].id);
    assert_eq!(id::slot_of(after[1].id), 3);
    assert!(!rig.maps.take_ended().contains(&after[1].id));
    assert!(rig.handle(dns(&["10.244.1.9"])).sync().writes.len() > 1);
    assert!(rig.entry("10.96.0.53", 53, UDP).id > dns_before.id);
}

#[test]
fn the_number_of_a_deleted_service_is_not_given_again() {
    // The newest service goes, and its slot is cleared, or it has another backend by now.
    for slots in [64, 2] {
        let mut rig = Rig::new(slots);
        rig.handle(web(&["10.244.1.2"])).handle(dns(&["10.244.1.9"])).sync();
        let newest = rig.entry(VIP, 80, TCP).id.max(rig.entry("10.96.0.53", 53, UDP).id);
        rig.handle([gone(Kind::Service, "dns")]).sync();
        rig.settle();
        rig.handle(web(&["10.244.1.2", "10.244.1.3"])).sync();
        rig.handle(web(&["10.244.1.3"])).sync();
        rig.settle();
        rig.restart().handle(dns(&["10.244.1.9"])).sync();
        rig.settle();
        assert_eq!(newest, 2);
        assert_eq!(rig.entry("10.96.0.53", 53, UDP).id, 3);
    }
}

#[test]
fn before_everything_is_known_nothing_is_written_or_pruned() {
    let mut rig = Rig::new(64);
    rig.handle(web(&["10.244.1.2"])).handle(dns(&["10.244.1.3"])).sync();
    let mut index = synced_index();
    std::mem::swap(&mut rig.index, &mut index);
    rig.index = make_index();
    rig.restart().handle(web(&["10.244.1.2"])).handle([Event::Synced(Kind::Service), Event::Synced(Kind::Slice)]);
    assert_eq!(rig.sync(), Plan::default());
    let plan = rig.handle([Event::Synced(Kind::Node)]).sync();
    // What was deleted while no agent was there is pruned now, and nothing else is touched.
    assert_eq!(shape(&plan), ["delete wildcard", "delete service", "end"]);
    assert_eq!(rig.addresses(VIP, 80, TCP), ["10.244.1.2"]);
}

/// A server that refuses one kind must not keep the rest from changing, nor make it be pruned.
#[test]
fn what_follows_from_a_missing_kind_stays_and_the_rest_changes() {
    let mut rig = Rig::new(64);
    let nodes = |range: &str| node("n2", &["172.18.0.12"], &[range]).apply();
    rig.handle(web(&["10.244.2.2"])).handle([nodes("10.244.2.0/24")]).sync();
    let (peers, services) = (rig.maps.held().peers.clone(), rig.maps.held().services.clone());
    assert!(!peers.is_empty() && !services.is_empty());

    rig.index = make_index();
    rig.restart().handle([Event::Synced(Kind::Node), nodes("10.244.3.0/24")]).sync();
    assert_eq!(rig.maps.held().services, services);
    assert!(rig.maps.held().peers.contains_key(&"10.244.3.0/24".parse().unwrap()));
    assert!(!rig.maps.held().peers.contains_key(&"10.244.2.0/24".parse().unwrap()));

    let peers = rig.maps.held().peers.clone();
    rig.index = make_index();
    let problems = [Problem::new(&"watch of Node".into(), "", "forbidden")].into();
    rig.restart().handle([Event::Report { origin: Origin::Watch(Kind::Node), problems }]);
    rig.handle([Event::Synced(Kind::Service), Event::Synced(Kind::Slice)]).handle(web(&["10.244.2.9"])).sync();
    assert_eq!(rig.maps.held().peers, peers);
    assert_eq!(rig.addresses(VIP, 80, TCP), ["10.244.2.9"]);
}

#[test]
fn an_empty_service_has_an_entry_and_no_slots() {
    let mut rig = Rig::new(64);
    let plan = rig.handle(web(&[])).sync();
    assert_eq!(shape(&plan), ["put service", "put wildcard"]);
    assert_eq!(rig.entry(VIP, 80, TCP).count, 0);
    rig.handle(web(&["10.244.1.2"])).sync();
    let plan = rig.handle(web(&[])).sync();
    assert_eq!(shape(&plan), ["put service"]);
    assert_eq!((rig.entry(VIP, 80, TCP).first, rig.entry(VIP, 80, TCP).count), (0, 0));
}

#[test]
fn udp_backends_that_are_gone_end() {
    let mut rig = Rig::new(64);
    rig.handle(dns(&["10.244.1.2", "10.244.1.3"])).sync();
    let ids: Vec<u32> = rig.backends("10.96.0.53", 53, UDP).iter().map(|b| b.id).collect();
    let plan = rig.handle(dns(&["10.244.1.3"])).sync();
    assert_eq!(shape(&plan), ["ids", "put service", "end"]);
    assert_eq!(rig.maps.take_ended(), [ids[0]]);
    // None left: what was answered a moment ago is refused.
    rig.handle(dns(&[])).sync();
    assert_eq!(rig.maps.take_ended(), [ids[1]]);
    rig.handle(dns(&["10.244.1.4"])).sync();
    assert_eq!(rig.maps.take_ended(), <[u32; 0]>::default());
    // The service goes, and whatever may still lead to its backends.
    let last = rig.backends("10.96.0.53", 53, UDP)[0].id;
    let plan = rig.handle([gone(Kind::Service, "dns")]).sync();
    assert_eq!(shape(&plan), ["delete wildcard", "delete service", "end"]);
    assert_eq!(rig.maps.take_ended(), [last]);
}

#[test]
fn flows_to_udp_backends_that_terminate_go_on_until_they_serve_no_more() {
    let mut rig = Rig::new(64);
    rig.handle(dns(&["10.244.1.2", "10.244.1.3"])).sync();
    let before = rig.backends("10.96.0.53", 53, UDP);
    let with = |first: Option<crate::model::Endpoint>| {
        let slice = slice("dns-1", "dns", Family::V4).port("dns", 53, UDP).ready(&["10.244.1.3"]);
        first.into_iter().fold(slice, EndpointSlice::endpoint).apply()
    };
    let first = || endpoint("10.244.1.2");
    rig.handle([with(Some(first().draining()))]).sync();
    assert_eq!(rig.addresses("10.96.0.53", 53, UDP), ["10.244.1.3"]);
    assert_eq!(rig.maps.take_ended(), <[u32; 0]>::default());
    // Nor does an agent end them that finds it so.
    rig.restart().sync();
    assert_eq!(rig.maps.take_ended(), <[u32; 0]>::default());
    // It changed its mind: it is the one it was.
    rig.handle([with(Some(first()))]).sync();
    assert_eq!(rig.backends("10.96.0.53", 53, UDP), before);
    rig.handle([with(Some(first().draining()))]).sync();
    let plan = rig.handle([with(Some(first().unusable()))]).sync();
    assert_eq!(shape(&plan), ["end"]);
    assert_eq!(rig.maps.take_ended(), [before[0].id]);
    assert_eq!(rig.handle([with(None)]).sync().writes, []);
}

#[test]
fn an_agent_that_starts_later_still_ends_those_that_lingered() {
    let mut rig = Rig::new(5);
    rig.handle(dns(&["10.244.1.2", "10.244.1.3"])).sync();
    let ids: Vec<u32> = rig.backends("10.96.0.53", 53, UDP).iter().map(|b| b.id).collect();
    let slice = slice("dns-1", "dns", Family::V4).port("dns", 53, UDP).ready(&["10.244.1.9"]);
    let draining = ["10.244.1.2", "10.244.1.3"].into_iter().fold(slice, |s, ip| s.endpoint(endpoint(ip).draining()));
    rig.handle([draining.apply()]).sync();
    assert_eq!(rig.maps.take_ended(), <[u32; 0]>::default());
    // Others would like the slots meanwhile, and do not get them.
    for last in [4, 5, 6, 7] {
        rig.handle(web(&[&format!("10.244.1.{last}")]));
        rig.wait().sync();
        rig.wait().sync();
    }
    rig.restart().handle(dns(&["10.244.1.9"]));
    rig.sync();
    rig.wait().sync();
    let ended = rig.maps.take_ended();
    assert!(ids.iter().all(|id| ended.contains(id)), "{ended:?} without {ids:?}");
    rig.wait().sync();
    assert_eq!(rig.addresses("10.96.0.53", 53, UDP), ["10.244.1.9"]);
}

#[test]
fn tcp_backends_never_end() {
    let mut rig = Rig::new(64);
    rig.handle(web(&["10.244.1.2", "10.244.1.3"])).sync();
    rig.handle(web(&["10.244.1.3"])).sync();
    rig.handle(web(&[])).sync();
    rig.handle(web(&["10.244.1.4"])).sync();
    assert_eq!(rig.maps.take_ended(), <[u32; 0]>::default());
}

#[test]
fn a_backend_that_turns_from_ready_to_draining_is_not_gone() {
    let mut rig = Rig::new(64);
    rig.handle(dns(&["10.244.1.2"])).sync();
    let before = rig.backends("10.96.0.53", 53, UDP);
    let draining = slice("dns-1", "dns", Family::V4).port("dns", 53, UDP).endpoint(endpoint("10.244.1.2").draining());
    let plan = rig.handle([draining.apply()]).sync();
    assert_eq!(shape(&plan), ["backends"]);
    assert_eq!(rig.backends("10.96.0.53", 53, UDP)[0].id, before[0].id);
}
