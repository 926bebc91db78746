//! Index in, writes out; then what the maps hold.

use super::{Capacity, Plan, Planner};
use crate::config::{AUDIT_PERIOD, Routing};
use crate::index::{Index, Settings};
use crate::model::build::{endpoint, ip, node, service, slice};
use crate::model::{EndpointSlice, Family, ObjectName};
use crate::plan::{GRACE, MemoryMaps, Snapshot, Table, VipKey, Write};
use crate::source::{Event, Kind, ObjectRef};
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

fn synced_index() -> Index {
    let mut index = Index::new(Settings::new("n1", Routing::Vxlan));
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
        Write::PutService { key, .. } if key.is_wildcard() => "put wildcard",
        Write::PutService { .. } => "put service",
        Write::DeleteService { key } if key.is_wildcard() => "delete wildcard",
        Write::DeleteService { .. } => "delete service",
        Write::PutPeer { .. } => "put peer",
        Write::DeletePeer { .. } => "delete peer",
        Write::ForgetFlows { .. } => "forget",
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
    rig.index = Index::new(Settings::new("n1", Routing::Vxlan));
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
    assert!(rig.maps.take_forgotten().iter().all(|(_, ids)| !ids.contains(&after[1].id)));
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
    rig.index = Index::new(Settings::new("n1", Routing::Vxlan));
    rig.restart().handle(web(&["10.244.1.2"])).handle([Event::Synced(Kind::Service), Event::Synced(Kind::Slice)]);
    assert_eq!(rig.sync(), Plan::default());
    let plan = rig.handle([Event::Synced(Kind::Node)]).sync();
    // What was deleted while no agent was there is pruned now, and nothing else is touched.
    assert_eq!(shape(&plan), ["delete wildcard", "delete service", "forget"]);
    assert_eq!(rig.addresses(VIP, 80, TCP), ["10.244.1.2"]);
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
fn flows_of_udp_backends_that_are_gone_are_forgotten() {
    let mut rig = Rig::new(64);
    rig.handle(dns(&["10.244.1.2", "10.244.1.3"])).sync();
    let ids: Vec<u32> = rig.backends("10.96.0.53", 53, UDP).iter().map(|b| b.id).collect();
    let plan = rig.handle(dns(&["10.244.1.3"])).sync();
    assert_eq!(shape(&plan), ["ids", "put service", "forget"]);
    assert_eq!(rig.maps.take_forgotten(), [(UDP, vec![ids[0]])]);
    // None left: what was answered a moment ago is refused.
    rig.handle(dns(&[])).sync();
    assert_eq!(rig.maps.take_forgotten(), [(UDP, vec![ids[1]])]);
    rig.handle(dns(&["10.244.1.4"])).sync();
    assert_eq!(rig.maps.take_forgotten(), []);
    // The service goes, and whatever may still lead to its backends.
    let last = rig.backends("10.96.0.53", 53, UDP)[0].id;
    let plan = rig.handle([gone(Kind::Service, "dns")]).sync();
    assert_eq!(shape(&plan), ["delete wildcard", "delete service", "forget"]);
    assert_eq!(rig.maps.take_forgotten(), [(UDP, vec![last])]);
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
    assert_eq!(rig.maps.take_forgotten(), []);
    // Nor are they forgotten by an agent that finds it so.
    rig.restart().sync();
    assert_eq!(rig.maps.take_forgotten(), []);
    // It changed its mind: it is the one it was.
    rig.handle([with(Some(first()))]).sync();
    assert_eq!(rig.backends("10.96.0.53", 53, UDP), before);
    rig.handle([with(Some(first().draining()))]).sync();
    let plan = rig.handle([with(Some(first().unusable()))]).sync();
    assert_eq!(shape(&plan), ["forget"]);
    assert_eq!(rig.maps.take_forgotten(), [(UDP, vec![before[0].id])]);
    assert_eq!(rig.handle([with(None)]).sync().writes, []);
}

#[test]
fn an_agent_that_starts_later_still_knows_whose_flows_to_forget() {
    let mut rig = Rig::new(5);
    rig.handle(dns(&["10.244.1.2", "10.244.1.3"])).sync();
    let ids: Vec<u32> = rig.backends("10.96.0.53", 53, UDP).iter().map(|b| b.id).collect();
    let slice = slice("dns-1", "dns", Family::V4).port("dns", 53, UDP).ready(&["10.244.1.9"]);
    let draining = ["10.244.1.2", "10.244.1.3"].into_iter().fold(slice, |s, ip| s.endpoint(endpoint(ip).draining()));
    rig.handle([draining.apply()]).sync();
    assert_eq!(rig.maps.take_forgotten(), []);
    // Others would like the slots meanwhile, and do not get them.
    for last in [4, 5, 6, 7] {
        rig.handle(web(&[&format!("10.244.1.{last}")]));
        rig.wait().sync();
        rig.wait().sync();
    }
    rig.restart().handle(dns(&["10.244.1.9"]));
    rig.sync();
    rig.wait().sync();
    let forgotten = rig.maps.take_forgotten();
    assert!(ids.iter().all(|id| forgotten[0].1.contains(id)), "{forgotten:?} without {ids:?}");
    rig.wait().sync();
    assert_eq!(rig.addresses("10.96.0.53", 53, UDP), ["10.244.1.9"]);
}

#[test]
fn tcp_flows_are_never_forgotten() {
    let mut rig = Rig::new(64);
    rig.handle(web(&["10.244.1.2", "10.244.1.3"])).sync();
    rig.handle(web(&["10.244.1.3"])).sync();
    rig.handle(web(&[])).sync();
    rig.handle(web(&["10.244.1.4"])).sync();
    assert_eq!(rig.maps.take_forgotten(), []);
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

#[test]
fn a_crash_before_flows_were_forgotten_is_made_good_at_the_next_start() {
    let mut rig = Rig::new(64);
    rig.handle(dns(&["10.244.1.2", "10.244.1.3"])).sync();
    let ids: Vec<u32> = rig.backends("10.96.0.53", 53, UDP).iter().map(|b| b.id).collect();
    rig.maps.crash_after(2);
    rig.handle(dns(&["10.244.1.3"]));
    rig.now += Duration::from_millis(1);
    rig.planner.sync(&mut rig.index, &mut rig.maps, rig.now).unwrap_err();
    rig.maps.repair();
    let plan = rig.restart().sync();
    assert_eq!(shape(&plan), ["forget"]);
    // The one that stayed is no stray.
    assert_eq!(rig.maps.take_forgotten(), [(UDP, vec![ids[0]])]);
}

#[test]
fn after_refused_writes_the_next_sync_begins_with_what_is_there() {
    let mut rig = Rig::new(64);
    rig.handle(web(&["10.244.1.2"])).sync();
    rig.maps.crash_after(1);
    rig.handle(web(&["10.244.1.3", "10.244.1.4"]));
    rig.planner.sync(&mut rig.index, &mut rig.maps, rig.now).unwrap_err();
    assert_eq!(rig.addresses(VIP, 80, TCP), ["10.244.1.2"]);
    rig.maps.repair();
    rig.sync();
    assert_eq!(rig.addresses(VIP, 80, TCP), ["10.244.1.3", "10.244.1.4"]);
}

#[test]
fn a_full_array_keeps_the_last_good_state_of_that_service_only() {
    let mut rig = Rig::new(6);
    rig.handle(web(&["10.244.1.2", "10.244.1.3", "10.244.1.4"])).sync();
    let many = ["10.244.1.2", "10.244.1.3", "10.244.1.4", "10.244.1.5"];
    let plan = rig.handle(web(&many)).handle(dns(&["10.244.1.9"])).sync();
    assert_eq!(rig.addresses(VIP, 80, TCP), many[..3]);
    assert_eq!(rig.addresses("10.96.0.53", 53, UDP), ["10.244.1.9"]);
    assert_eq!(plan.retry_at, None, "nothing is about to become free");
    let problems = rig.planner.problems(&rig.index);
    assert_eq!(
        problems[0].to_string(),
        "Service default/web: 10.96.0.10:80/TCP needs 4 slots next to each other in rn_backend_ids, of 6 there are 3 free (longest \
         run 3) and 0 about to be: its last good backends stay; raise backend-entries"
    );
    // It shrinks: it fits again, and the complaint is gone.
    rig.handle(web(&many[..2])).sync();
    assert_eq!(rig.addresses(VIP, 80, TCP), many[..2]);
    assert_eq!(rig.planner.problems(&rig.index), []);
}

#[test]
fn what_waits_for_slots_gets_them_without_another_event() {
    let mut rig = Rig::new(4);
    rig.handle(web(&["10.244.1.2", "10.244.1.3"])).sync();
    rig.handle(web(&["10.244.1.4", "10.244.1.5"])).sync();
    let plan = rig.handle(web(&["10.244.1.6", "10.244.1.7"])).sync();
    assert_eq!(plan.writes, []);
    assert!(plan.retry_at.is_some());
    assert_eq!(rig.addresses(VIP, 80, TCP), ["10.244.1.4", "10.244.1.5"]);
    // The ids are free before the backends are: those are cleared first.
    let plan = rig.wait().sync();
    assert_eq!(shape(&plan), ["clear"]);
    let problem = rig.planner.problems(&rig.index)[0].to_string();
    assert!(problem.ends_with(
        "needs 2 slots in rn_backends_v2, of 4 there are 0 free and 2 about to be: its last good backends stay; raise \
         backend-entries"
    ), "{problem}");
    // By the times that the plans give, and no event.
    let (mut next, mut done) = (plan.retry_at, Vec::new());
    while let Some(at) = next {
        rig.now = at;
        let plan = rig.sync();
        next = plan.retry_at;
        done.extend(shape(&plan));
    }
    assert_eq!(done, ["backends", "ids", "put service", "clear"]);
    assert_eq!(rig.addresses(VIP, 80, TCP), ["10.244.1.6", "10.244.1.7"]);
    assert_eq!(rig.planner.problems(&rig.index), []);
}

#[test]
fn slots_of_deleted_services_are_used_again() {
    let mut rig = Rig::new(3);
    for round in 0..10 {
        rig.handle(web(&["10.244.1.2", "10.244.1.3", "10.244.1.4"])).sync();
        assert_eq!(rig.entry(VIP, 80, TCP).count, 3, "round {round}");
        rig.handle([gone(Kind::Service, "web")]).sync();
        assert_eq!(rig.settle(), ["clear"]);
    }
}

#[test]
fn a_full_service_map_leaves_out_what_does_not_fit_until_it_does() {
    let mut rig = Rig::with_room(2, u32::MAX);
    rig.handle(web(&["10.244.1.2"])).handle(dns(&["10.244.1.3"])).sync();
    let problems = rig.planner.problems(&rig.index);
    assert_eq!(problems.len(), 2);
    assert!(problems[0].to_string().contains("all 2 entries of the service map are taken"), "{problems:?}");
    // What goes makes room at once, and no write comes before its room is there.
    rig.handle([gone(Kind::Service, "web")]).sync();
    assert_eq!(rig.planner.problems(&rig.index), []);
    let keys: Vec<VipKey> = rig.maps.held().services.keys().copied().collect();
    assert_eq!(keys, [VipKey::wildcard(ip("10.96.0.53")), key("10.96.0.53", 53, UDP)]);
}

#[test]
fn one_service_takes_the_place_of_another_in_a_full_map() {
    let mut rig = Rig::with_room(2, u32::MAX);
    rig.handle(web(&["10.244.1.2"])).sync();
    // The one that goes stands before the new one in the order of keys.
    let plan = rig.handle([gone(Kind::Service, "web")]).handle(dns(&["10.244.1.3"])).sync();
    assert_eq!(shape(&plan), ["delete wildcard", "delete service", "backends", "ids", "put service", "put wildcard"]);
    assert_eq!(rig.addresses("10.96.0.53", 53, UDP), ["10.244.1.3"]);
    assert_eq!(rig.planner.problems(&rig.index), []);
    assert_eq!(rig.settle(), ["clear"]);
}

#[test]
fn no_wildcard_comes_before_a_port_that_waits_for_room() {
    let rig = || {
        let mut rig = Rig::with_room(3, u32::MAX);
        rig.handle(web(&["10.244.1.2"])).sync();
        rig
    };
    // Two ports and a wildcard, and room for one of them until web is gone.
    let two = service("dns", &["10.96.0.53"]).port("dns", 53, UDP).port("dns-tcp", 53, TCP);
    let ports = [key("10.96.0.53", 53, UDP), key("10.96.0.53", 53, TCP)];
    for after in 0.. {
        let mut rig = rig();
        rig.maps.crash_after(after);
        rig.handle([gone(Kind::Service, "web"), two.clone().apply()]);
        let done = rig.planner.sync(&mut rig.index, &mut rig.maps, rig.now);
        let has = |key: &VipKey| rig.maps.held().services.contains_key(key);
        assert!(!has(&VipKey::wildcard(ports[0].ip)) || ports.iter().all(has), "after {after}");
        if done.is_ok() {
            assert!(rig.maps.held().services.len() == 3 && after > 4, "after {after}");
            return;
        }
    }
}

#[test]
fn a_full_peers_map_keeps_what_fits() {
    let mut rig = Rig::with_room(u32::MAX, 3);
    rig.handle([node("n2", &["172.18.0.12", "172.18.0.13", "172.18.0.14"], &[]).apply()]).sync();
    // One stays free: a kernel before 6.13 changes no value of a full trie.
    assert_eq!(rig.maps.held().peers.len(), 2);
    assert!(rig.planner.problems(&rig.index)[0].to_string().contains("3 prefixes do not fit into the 2 entries"));
}

#[test]
fn prefixes_are_replaced_in_a_full_peers_map() {
    let peers = |rig: &Rig| rig.maps.held().peers.keys().map(ToString::to_string).collect::<Vec<_>>();
    let mut rig = Rig::with_room(u32::MAX, 4);
    let before = node("n2", &["172.18.0.12"], &["10.244.2.0/24", "10.244.3.0/24"]);
    rig.handle([before.apply()]).sync();
    assert_eq!(peers(&rig), ["10.244.2.0/24", "10.244.3.0/24", "172.18.0.12/32"]);
    let after = node("n2", &["172.18.0.22"], &["10.245.2.0/24", "10.245.3.0/24"]);
    rig.handle([after.apply()]).sync();
    assert_eq!(peers(&rig), ["10.245.2.0/24", "10.245.3.0/24", "172.18.0.22/32"]);
    assert_eq!(rig.planner.problems(&rig.index), []);
    // A map that an earlier release filled to the last entry.
    let mut held = rig.maps.held().clone();
    held.peers.insert("10.9.0.0/16".parse().unwrap(), held.peers.values().copied().next().unwrap());
    rig.maps = MemoryMaps::with(held, 64).with_room(u32::MAX, 4);
    rig.restart().handle([node("n2", &["172.18.0.22"], &["10.245.2.0/24"]).apply()]).sync();
    assert_eq!(peers(&rig), ["10.245.2.0/24", "172.18.0.22/32"]);
}

#[test]
fn damaged_maps_are_repaired() {
    let backend = |slot, service| Backend {
        addr: ip("10.244.1.2").into(),
        port: 8080,
        flags: 0,
        id: id::make(slot, 3),
        service,
        max_service: 0,
    };
    let entry = |first, count, id| SvcEntry { first, count, id, affinity: 0, flags: 0, pad: 0 };
    for (what, web_entry, dns_entry) in [
        ("beyond what was written", entry(2, 5, 1), entry(0, 1, 2)),
        ("beyond everything", entry(u32::MAX, 2, 1), entry(u32::MAX, u32::MAX, 2)),
        ("never written", entry(1, 1, 1), entry(0, 0, 2)),
        ("shared", entry(0, 1, 1), entry(0, 1, 2)),
        ("without an id", entry(0, 1, 0), entry(9, 0, 0)),
        ("another service's backend", entry(0, 1, 2), entry(5, 0, 1)),
        ("an id of an earlier backend", entry(3, 1, 1), entry(0, 0, 2)),
        ("one backend twice", entry(5, 2, 1), entry(0, 0, 2)),
        ("two services of one id", entry(0, 1, 1), entry(5, 1, 1)),
        ("a slot with the id of another", entry(7, 1, 1), entry(0, 0, 2)),
    ] {
        let (good, other) = (backend(0, 1), backend(4, 1));
        let mut held = Snapshot {
            ids: vec![good.id, 0, good.id, id::make(0, 2), 0, other.id, other.id, id::make(2, 1)],
            backends: vec![good, Backend::cleared(0), backend(9, 1), Backend::cleared(id::make(3, 7)), other],
            ..Snapshot::default()
        };
        held.services.insert(key(VIP, 80, TCP), web_entry);
        held.services.insert(key("10.96.0.53", 53, UDP), dns_entry);
        held.services.insert(VipKey::wildcard(ip(VIP)), entry(1, 1, 9));
        let mut rig = Rig::new(64);
        rig.maps = MemoryMaps::with(held, 64);
        rig.restart().handle(web(&["10.244.1.2"])).handle(dns(&["10.244.1.3"]));
        rig.wait().sync();
        rig.settle();
        assert_eq!(rig.addresses(VIP, 80, TCP), ["10.244.1.2"], "{what}");
        assert_eq!(rig.addresses("10.96.0.53", 53, UDP), ["10.244.1.3"], "{what}");
        assert_eq!(rig.maps.held().services[&VipKey::wildcard(ip(VIP))].count, 0, "{what}");
        assert_eq!(rig.sync().writes, [], "{what}");
        // What no entry has is cleared.
        let left = rig.maps.held().backends.iter().filter(|b| b.id != 0).count();
        assert_eq!(left, 2, "{what}: {:?}", rig.maps.held());
    }
}

#[test]
fn two_services_of_one_id_get_different_ones() {
    let mut rig = Rig::new(64);
    rig.handle(web(&["10.244.1.2"])).handle(dns(&["10.244.1.3"])).sync();
    let mut held = rig.maps.held().clone();
    let id = held.services[&key(VIP, 80, TCP)].id;
    held.services.get_mut(&key("10.96.0.53", 53, UDP)).unwrap().id = id;
    rig.maps = MemoryMaps::with(held, 64);
    rig.restart().sync();
    rig.settle();
    assert_ne!(rig.entry(VIP, 80, TCP).id, rig.entry("10.96.0.53", 53, UDP).id);
    assert_eq!(rig.addresses(VIP, 80, TCP), ["10.244.1.2"]);
    assert_eq!(rig.addresses("10.96.0.53", 53, UDP), ["10.244.1.3"]);
}

#[test]
fn a_smaller_array_than_the_one_read_back() {
    let backend = |slot| Backend {
        addr: ip("10.244.1.2").into(),
        port: 8080,
        flags: 0,
        id: id::make(slot, 1),
        service: 1,
        max_service: 0,
    };
    let backends: Vec<Backend> = (0..8).map(backend).collect();
    let mut held = Snapshot { ids: backends.iter().map(|b| b.id).collect(), backends, ..Snapshot::default() };
    held.services.insert(key(VIP, 80, TCP), SvcEntry { first: 6, count: 1, id: 1, affinity: 0, flags: 0, pad: 0 });
    let room = Capacity { services: 8, backends: 4, peers: 8 };
    let mut planner = Planner::from_snapshot(held, room);
    let mut index = synced_index();
    for event in web(&["10.244.1.2"]) {
        index.handle(event);
    }
    // What lies in the part that is left may have been let go of just now.
    let mut plan = planner.plan(&mut index, Duration::ZERO);
    let mut writes = std::mem::take(&mut plan.writes);
    while let Some(wait) = plan.retry_at {
        plan = planner.plan(&mut index, wait);
        writes.append(&mut plan.writes);
    }
    assert!(writes.contains(&Write::BackendIds { first: 0, ids: vec![id::make(0, 2)] }), "{writes:?}");
}

/// What an audit of all tables finds.
fn audit(rig: &mut Rig) -> Vec<String> {
    rig.now = rig.planner.audit_at().unwrap();
    let mut found = Vec::new();
    while rig.planner.audit_at() == Some(rig.now) {
        found.extend(rig.planner.audit(&mut rig.maps, rig.now).unwrap());
    }
    found.iter().map(|it| format!("{}: {}", it.map, it.what)).collect()
}

#[test]
fn an_audit_finds_nothing_in_maps_that_nobody_else_writes() {
    let mut rig = Rig::new(64);
    assert_eq!(rig.planner.audit_at(), None, "not before the maps are what they should be");
    rig.handle(web(&["10.244.1.2"])).handle(dns(&["10.244.1.3", "10.244.1.4"])).sync();
    rig.handle(web(&["10.244.1.3"])).handle(dns(&["10.244.1.4"])).sync();
    assert_eq!(rig.planner.audit_at(), Some(AUDIT_PERIOD));
    assert_eq!(audit(&mut rig), <[&str; 0]>::default());
    assert_eq!(rig.planner.audit_at(), Some(2 * AUDIT_PERIOD));
    rig.settle();
    assert_eq!(audit(&mut rig), <[&str; 0]>::default());
    rig.restart();
    assert_eq!(rig.planner.audit_at(), None);
    rig.sync();
    assert_eq!(audit(&mut rig), <[&str; 0]>::default());
}

/// Somebody changes a map.
type Meddling = fn(&mut Snapshot);

#[test]
fn an_audit_puts_back_what_somebody_else_changed() {
    let meddlings: [(Meddling, &str); 12] = [
        (
            |held| {
                let entry = held.services.remove(&key(VIP, 80, TCP)).unwrap();
                held.services.insert(key(VIP, 81, TCP), entry);
            },
            "10.96.0.10:80/TCP was missing",
        ),
        (|held| _ = held.services.remove(&key(VIP, 80, TCP)), "rn_svc4_v2: 10.96.0.10:80/TCP was missing"),
        (|held| _ = held.services.remove(&VipKey::wildcard(ip(VIP))), "rn_svc4_v2: 10.96.0.10 (whole address) was"),
        (
            |held| held.services.get_mut(&key(VIP, 80, TCP)).unwrap().count = 1,
            "10.96.0.10:80/TCP was changed to SvcEntry",
        ),
        (
            |held| {
                let empty = SvcEntry { count: 0, ..held.services[&key(VIP, 80, TCP)] };
                held.services.insert(key("fd00::1", 1, TCP), empty);
            },
            "rn_svc6_v2: [fd00::1]:1/TCP does not belong there",
        ),
        (|held| held.ids[1] = held.ids[0], "rn_backend_ids: element 1 was changed to"),
        (|held| held.ids.push(7), "rn_backend_ids: element 2 was changed to 7"),
        (|held| held.backends[0].port = 81, "rn_backends_v2: element 0 was changed to Backend"),
        (|held| held.backends.clear(), "rn_backends_v2: element 1 was changed to Backend"),
        (|held| held.peers.clear(), "rn_peers4: 10.244.2.0/24 was missing"),
        (
            |held| held.peers.values_mut().for_each(|peer| peer.flags = 0),
            "rn_peers4: 10.244.2.0/24 was changed to Peer",
        ),
        (
            |held| {
                let peer = *held.peers.values().next().unwrap();
                held.peers.insert("fd00::/8".parse().unwrap(), peer);
            },
            "rn_peers6: fd00::/8 does not belong there",
        ),
    ];
    for (meddle, expected) in meddlings {
        let mut rig = Rig::on(MemoryMaps::new(64).with_room(2, 3));
        let n2 = node("n2", &["172.18.0.12"], &["10.244.2.0/24"]).apply();
        rig.handle(web(&["10.244.1.2", "10.244.1.3"])).handle([n2]).sync();
        let before = rig.maps.held().clone();
        meddle(rig.maps.meddle());
        assert_ne!(rig.maps.held(), &before);
        let found = audit(&mut rig);
        assert!(found.iter().any(|it| it.contains(expected)), "{found:?} without {expected}");
        let mut held = rig.maps.held().clone();
        held.ids.truncate(before.ids.len());
        assert_eq!(held, before);
        assert_eq!(audit(&mut rig), <[&str; 0]>::default(), "{expected}");
        assert_eq!(rig.sync().writes, []);
    }
}

#[test]
fn an_audit_that_cannot_write_is_followed_by_a_look_at_everything() {
    let mut rig = Rig::new(64);
    rig.handle(web(&["10.244.1.2"])).sync();
    rig.maps.meddle().services.clear();
    rig.maps.crash_after(0);
    rig.now = rig.planner.audit_at().unwrap();
    let failed = Table::ALL.iter().any(|_| rig.planner.audit(&mut rig.maps, rig.now).is_err());
    assert!(failed && rig.planner.audit_at().is_none());
    rig.maps.repair();
    rig.wait().sync();
    assert_eq!(rig.addresses(VIP, 80, TCP), ["10.244.1.2"]);
    assert!(rig.planner.audit_at().is_some());
}

/// Whatever the write after which the agent dies: the next one finds each backend and each slot.
#[test]
fn a_crash_between_any_two_writes() {
    for after in 0.. {
        let mut rig = Rig::new(8);
        rig.handle(web(&["10.244.1.2", "10.244.1.3"])).handle(dns(&["10.244.1.4", "10.244.1.5"])).sync();
        let (web_before, dns_before) = (rig.backends(VIP, 80, TCP), rig.backends("10.96.0.53", 53, UDP));
        rig.handle(web(&["10.244.1.3", "10.244.1.6"])).handle(dns(&["10.244.1.5", "10.244.1.7"]));
        rig.maps.crash_after(after);
        let mut crashed = false;
        for _ in 0..3 {
            rig.now += GRACE;
            rig.maps.set_now(rig.now);
            crashed |= rig.planner.sync(&mut rig.index, &mut rig.maps, rig.now).is_err();
            if crashed {
                break;
            }
        }
        rig.maps.repair();
        rig.restart().sync();
        rig.settle();
        assert_eq!(rig.addresses(VIP, 80, TCP), ["10.244.1.3", "10.244.1.6"], "after {after}");
        assert_eq!(rig.addresses("10.96.0.53", 53, UDP), ["10.244.1.5", "10.244.1.7"], "after {after}");
        // Those that stay keep their ids, flows of the one that goes are forgotten.
        assert_eq!(rig.backends(VIP, 80, TCP)[0], web_before[1], "after {after}");
        assert_eq!(rig.backends("10.96.0.53", 53, UDP)[0], dns_before[1], "after {after}");
        let forgotten: Vec<u32> = rig.maps.take_forgotten().into_iter().flat_map(|(_, ids)| ids).collect();
        assert!(forgotten.contains(&dns_before[0].id), "after {after}: {forgotten:?}");
        // Four slots are in use, and of the others none is lost.
        assert_eq!(rig.maps.held().backends.iter().filter(|b| b.id != 0).count(), 4, "after {after}");
        rig.handle([gone(Kind::Service, "dns")]).handle(web(&[])).sync();
        rig.settle();
        let many: Vec<String> = (10..18).map(|n| format!("10.244.1.{n}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        rig.handle(web(&many)).sync();
        assert_eq!(rig.addresses(VIP, 80, TCP), many, "after {after}: {:?}", rig.planner.problems(&rig.index));
        if !crashed {
            assert!(after > 10, "{after} writes");
            return;
        }
    }
}
