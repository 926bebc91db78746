//! Maps that are too small for everything.

use super::*;

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

/// A backend that lingers has its slot already, and needs none when it gets new flows again.
#[test]
fn a_backend_that_lingers_comes_back_in_a_full_array() {
    let mut rig = Rig::new(4);
    let dns = |first: crate::model::Endpoint, second| {
        slice("dns-1", "dns", Family::V4).port("dns", 53, UDP).endpoint(first).endpoint(second).apply()
    };
    let (first, second) = (|| endpoint("10.244.1.2"), || endpoint("10.244.1.3"));
    rig.handle(super::dns(&["10.244.1.2"])).sync();
    let before = rig.backends("10.96.0.53", 53, UDP);
    rig.handle([dns(first().draining(), second())]).sync();
    rig.handle(web(&["10.244.1.4", "10.244.1.5"])).sync();
    rig.settle();
    assert_eq!(rig.planner.problems(&rig.index), []);
    rig.handle([dns(first(), second().draining())]).sync();
    assert_eq!(rig.planner.problems(&rig.index), []);
    assert_eq!(rig.backends("10.96.0.53", 53, UDP), before);
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
