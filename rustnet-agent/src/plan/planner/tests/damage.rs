//! Maps that are damaged, and agents that die between two writes.

use super::*;

#[test]
fn a_crash_before_backends_end_is_made_good_at_the_next_start() {
    let mut rig = Rig::new(64);
    rig.handle(dns(&["10.244.1.2", "10.244.1.3"])).sync();
    let ids: Vec<u32> = rig.backends("10.96.0.53", 53, UDP).iter().map(|b| b.id).collect();
    rig.maps.crash_after(2);
    rig.handle(dns(&["10.244.1.3"]));
    rig.now += Duration::from_millis(1);
    rig.planner.sync(&mut rig.index, &mut rig.maps, rig.now).unwrap_err();
    rig.maps.repair();
    let plan = rig.restart().sync();
    assert_eq!(shape(&plan), ["end"]);
    // The one that stayed is no stray.
    assert_eq!(rig.maps.take_ended(), [ids[0]]);
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
fn damaged_maps_are_repaired() {
    let backend = |slot, service| Backend {
        addr: ip("10.244.1.2").into(),
        port: 8080,
        flags: 0,
        id: id::make(slot, 3),
        service,
        max_service: 0,
    };
    let entry = |first, count, id| SvcEntry { first, count, id, affinity: 0, flags: 0, table: 0 };
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
    held.services.insert(key(VIP, 80, TCP), SvcEntry { first: 6, count: 1, id: 1, affinity: 0, flags: 0, table: 0 });
    let room = Capacity { services: 8, backends: 4, table_words: 0, peers: 8, source_ranges: 8 };
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
        // Those that stay keep their ids, the one that goes has ended.
        assert_eq!(rig.backends(VIP, 80, TCP)[0], web_before[1], "after {after}");
        assert_eq!(rig.backends("10.96.0.53", 53, UDP)[0], dns_before[1], "after {after}");
        let ended = rig.maps.take_ended();
        assert!(ended.contains(&dns_before[0].id), "after {after}: {ended:?}");
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
