//! Entries that share a set of backends.

use super::*;
use crate::config::NodePortAddresses;
use proptest::prelude::*;

/// Another address of the same service.
const VIP2: &str = "10.96.0.11";

/// A service with two addresses of one family, as other frontends than cluster IPs will be.
fn both(vips: &[&str], proto: u8, addrs: &[&str]) -> [Event; 2] {
    [
        service("both", vips).port("p", 80, proto).apply(),
        slice("both-1", "both", Family::V4).port("p", 80, proto).ready(addrs).apply(),
    ]
}

#[test]
fn frontends_of_one_port_share_what_is_written() {
    let mut rig = Rig::new(64);
    let plan = rig.handle(both(&[VIP, VIP2], TCP, &["10.244.1.2", "10.244.1.3"])).sync();
    assert_eq!(shape(&plan), ["backends", "ids", "put service", "put service", "put wildcard", "put wildcard"]);
    let entry = rig.entry(VIP, 80, TCP);
    assert_eq!(rig.entry(VIP2, 80, TCP), entry);
    // Both flip to the new range.
    let plan = rig.handle(both(&[VIP, VIP2], TCP, &["10.244.1.3", "10.244.1.4"])).sync();
    assert_eq!(shape(&plan), ["backends", "ids", "put service", "put service"]);
    assert_eq!(rig.entry(VIP2, 80, TCP), rig.entry(VIP, 80, TCP));
    assert_eq!(
        (rig.entry(VIP, 80, TCP).id, rig.maps.held().backends.iter().filter(|b| b.id != 0).count()),
        (entry.id, 3)
    );
    assert_eq!(rig.settle(), ["clear"]);
    // Another agent finds it so, and the set stays until its last frontend has gone.
    assert_eq!(rig.restart().sync().writes, []);
    let plan = rig.handle(both(&[VIP2], TCP, &["10.244.1.3", "10.244.1.4"])).sync();
    assert_eq!(shape(&plan), ["delete wildcard", "delete service"]);
    assert_eq!(rig.settle(), <[&str; 0]>::default());
    assert_eq!(rig.addresses(VIP2, 80, TCP), ["10.244.1.3", "10.244.1.4"]);
    rig.handle([gone(Kind::Service, "both")]).sync();
    assert_eq!(rig.settle(), ["clear"]);
}

/// Its flows end in the programs, which ask once per second whether an entry leads to a flow's backend.
#[test]
fn a_frontend_that_goes_leaves_the_backends_to_the_others() {
    let mut rig = Rig::new(64);
    rig.handle(both(&[VIP, VIP2], UDP, &["10.244.1.2"])).sync();
    let id = rig.backends(VIP, 80, UDP)[0].id;
    let plan = rig.handle(both(&[VIP2], UDP, &["10.244.1.2"])).sync();
    assert_eq!(shape(&plan), ["delete wildcard", "delete service"]);
    assert_eq!(rig.maps.take_ended(), <[u32; 0]>::default());
    assert_eq!(rig.backends(VIP2, 80, UDP)[0].id, id);
    assert_eq!(rig.settle(), <[&str; 0]>::default());
}

/// One of two addresses that share a set passes to another Service: the set stays with the other one.
#[test]
fn a_frontend_that_changes_its_service_leaves_the_set_to_the_others() {
    let mut rig = Rig::new(64);
    rig.handle(both(&[VIP, VIP2], TCP, &["10.244.1.2"])).sync();
    let id = rig.backends(VIP2, 80, TCP)[0].id;
    let other = [
        service("other", &[VIP]).port("p", 80, TCP).apply(),
        slice("other-1", "other", Family::V4).port("p", 80, TCP).ready(&["10.244.1.9"]).apply(),
    ];
    rig.handle(both(&[VIP2], TCP, &["10.244.1.2"])).handle(other).sync();
    assert_eq!(rig.addresses(VIP, 80, TCP), ["10.244.1.9"]);
    assert_eq!(rig.addresses(VIP2, 80, TCP), ["10.244.1.2"]);
    assert_eq!(rig.backends(VIP2, 80, TCP)[0].id, id, "flows to it go on");
}

#[test]
fn entries_that_an_earlier_release_wrote_one_by_one_come_to_share() {
    let mut rig = Rig::new(64);
    let one = |name: &str, vip| {
        let slice = slice(&format!("{name}-1"), name, Family::V4).port("p", 80, TCP).ready(&["10.244.1.2"]);
        [service(name, &[vip]).port("p", 80, TCP).apply(), slice.apply()]
    };
    rig.handle(one("x", VIP)).handle(one("y", VIP2)).sync();
    let first = rig.entry(VIP, 80, TCP);
    assert_ne!(rig.entry(VIP2, 80, TCP).id, first.id);
    rig.index = synced_index();
    let plan = rig.restart().handle(both(&[VIP, VIP2], TCP, &["10.244.1.2"])).sync();
    assert_eq!(shape(&plan), ["put service"]);
    assert_eq!((rig.entry(VIP, 80, TCP), rig.entry(VIP2, 80, TCP)), (first, first));
    assert_eq!(rig.settle(), ["clear"]);
}

/// Whatever the write after which the agent dies, each frontend has its old or its new backends.
#[test]
fn a_crash_while_frontends_flip() {
    for after in 0.. {
        let mut rig = Rig::new(16);
        rig.handle(both(&[VIP, VIP2], TCP, &["10.244.1.2", "10.244.1.3"])).sync();
        rig.handle(both(&[VIP, VIP2], TCP, &["10.244.1.3", "10.244.1.4"]));
        rig.maps.crash_after(after);
        let done = rig.planner.sync(&mut rig.index, &mut rig.maps, rig.now).is_ok();
        for vip in [VIP, VIP2] {
            let found = rig.addresses(vip, 80, TCP);
            let is_old_or_new = found == ["10.244.1.2", "10.244.1.3"] || found == ["10.244.1.3", "10.244.1.4"];
            assert!(is_old_or_new, "after {after}: {found:?}");
        }
        rig.maps.repair();
        rig.wait().restart().sync();
        rig.settle();
        for vip in [VIP, VIP2] {
            assert_eq!(rig.addresses(vip, 80, TCP), ["10.244.1.3", "10.244.1.4"], "after {after}");
        }
        assert_eq!(rig.entry(VIP, 80, TCP), rig.entry(VIP2, 80, TCP), "after {after}");
        assert_eq!(rig.maps.held().backends.iter().filter(|b| b.id != 0).count(), 2, "after {after}");
        if done {
            assert!(after > 4, "{after} writes");
            return;
        }
    }
}

/// Which frontends and backends there are, writes until a crash, whether another agent follows.
type Step = (Vec<&'static str>, Vec<&'static str>, Option<usize>, bool);

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let vips = prop::sample::subsequence(vec![VIP, VIP2, "10.96.0.12"], 0..=3);
    let addrs = prop::sample::subsequence(vec!["10.244.1.2", "10.244.1.3", "10.244.1.4"], 0..=3);
    prop::collection::vec((vips, addrs, prop::option::of(0..10usize), any::<bool>()), 1..20)
}

proptest! {
    /// Whatever comes and goes, and wherever agents die: each frontend has its old or its new backends, all have the same in the
    /// end, and nothing is left of those that went.
    #[test]
    fn frontends_have_the_backends_of_their_port(is_udp in any::<bool>(), steps in steps()) {
        let proto = if is_udp { UDP } else { TCP };
        let mut rig = Rig::new(64);
        let found = |rig: &Rig, vip: &&str| {
            rig.maps.held().services.contains_key(&key(vip, 80, proto)).then(|| rig.addresses(vip, 80, proto))
        };
        let all = [VIP, VIP2, "10.96.0.12"];
        for (vips, addrs, crash, restart) in steps {
            let before = all.map(|vip| found(&rig, &vip));
            let after = all.map(|vip| vips.contains(&vip).then(|| addrs.iter().map(ToString::to_string).collect::<Vec<_>>()));
            if vips.is_empty() {
                rig.handle([gone(Kind::Service, "both")]);
            } else {
                rig.handle(both(&vips, proto, &addrs));
            }
            if let Some(crash) = crash {
                rig.maps.crash_after(crash);
                rig.wait();
                rig.maps.set_now(rig.now);
                let _ = rig.planner.sync(&mut rig.index, &mut rig.maps, rig.now);
                rig.maps.repair();
                for (vip, (before, after)) in all.iter().zip(before.iter().zip(&after)) {
                    let is = found(&rig, vip);
                    prop_assert!(is == *before || is == *after, "{vip}: {is:?} is neither {before:?} nor {after:?}");
                }
            }
            if restart {
                rig.restart();
            }
            rig.wait().sync();
            prop_assert_eq!(all.map(|vip| found(&rig, &vip)), after);
            let entries: Vec<_> = vips.iter().map(|vip| rig.entry(vip, 80, proto)).collect();
            prop_assert!(entries.windows(2).all(|two| two[0] == two[1]), "{entries:?}");
            prop_assert_eq!(rig.sync().writes, []);
        }
        rig.handle([gone(Kind::Service, "both")]).sync();
        rig.settle();
        prop_assert_eq!(rig.maps.held().services.len(), 0);
        prop_assert!(rig.maps.held().backends.iter().all(|b| b.id == 0), "{:?}", rig.maps.held().backends);
    }
}

/// Elements of arrays and entries that a plan writes.
fn written(plan: &Plan) -> (usize, usize, Vec<VipKey>) {
    let (mut backends, mut ids, mut entries) = (0, 0, Vec::new());
    for write in &plan.writes {
        match write {
            Write::Backends { backends: some } => backends += some.len(),
            Write::BackendIds { ids: some, .. } => ids += some.len(),
            Write::PutService { key, .. } => entries.push(*key),
            other => panic!("{other:?}"),
        }
    }
    (backends, ids, entries)
}

#[test]
fn a_change_of_one_endpoint_touches_only_the_entries_of_its_services() {
    let vip = |n: usize| format!("10.96.1.{n}");
    let endpoints = |n: usize, addrs: &[&str]| {
        let name = format!("s{n}");
        let slice = slice(&format!("{name}-1"), &name, Family::V4).tcp(8080);
        [service(&name, &[&vip(n)]).tcp(80).apply(), slice.ready(addrs).apply()]
    };
    let mut rig = Rig::new(2048);
    rig.handle((0..200).flat_map(|n| endpoints(n, &["10.244.1.2", "10.244.1.3", "10.244.1.4"]))).sync();
    let before = rig.maps.held().clone();
    // One endpoint of one Service.
    let plan = rig.handle(endpoints(7, &["10.244.1.3", "10.244.1.4", "10.244.1.5"])).sync();
    assert_eq!(written(&plan), (1, 3, vec![key(&vip(7), 80, TCP)]));
    // A pod goes that three of the Services lead to.
    let plan = rig.handle([20, 30, 40].into_iter().flat_map(|n| endpoints(n, &["10.244.1.3", "10.244.1.4"]))).sync();
    let (backends, ids, mut entries) = written(&plan);
    entries.sort_unstable();
    assert_eq!((backends, ids, entries), (0, 6, [20, 30, 40].map(|n| key(&vip(n), 80, TCP)).to_vec()));
    // The other entries, and all that they lead to, are as they were.
    let changed = [7, 20, 30, 40].map(|n| key(&vip(n), 80, TCP));
    let now = rig.maps.held();
    for (key, entry) in before.services.iter().filter(|(key, _)| !changed.contains(key)) {
        assert_eq!(now.services.get(key), Some(entry), "{key}");
        assert!(before.backends_of(entry).eq(now.backends_of(entry)), "{key}");
    }
}

/// Node ports have one entry per address and scope, and one set per protocol and family.
#[test]
fn node_ports_at_many_addresses_share_one_set() {
    let address = |n: u8| (format!("172.18.{n}.11"), format!("fd00:18::{n}:11"));
    for count in [1, 8] {
        let mut rig = Rig::new(64);
        rig.index = Index::new(Settings {
            node_ports: ["0.0.0.0/0", "::/0"].map(|range| NodePortAddresses::In(range.parse().unwrap())).to_vec(),
            ..Settings::new("n1", Routing::Vxlan)
        });
        rig.index.set_host(HostFacts::default());
        let addresses: Vec<(String, String)> = (0..count).map(address).collect();
        let all: Vec<&str> = addresses.iter().flat_map(|(v4, v6)| [v4.as_str(), v6.as_str()]).collect();
        rig.handle(Kind::REQUIRED.map(Event::Synced)).handle([
            node("n1", &all, &["10.244.1.0/24"]).apply(),
            service("web", &[VIP, "fd00:96::10"]).tcp(80).node_port(30_080).apply(),
            slice("web-4", "web", Family::V4).tcp(8080).ready(&["10.244.1.2", "10.244.2.2", "10.244.2.3"]).apply(),
            slice("web-6", "web", Family::V6).tcp(8080).ready(&["fd00:244:1::2", "fd00:244:2::2"]).apply(),
        ]);
        rig.sync();
        let held = rig.maps.held();
        assert_eq!((held.backends.len(), held.ids.len()), (5, 5), "{count} addresses");
        let entries: Vec<_> = held.services.iter().filter(|(key, _)| key.port == 30_080).collect();
        assert_eq!(entries.len(), 4 * usize::from(count), "one per address, family and scope");
        for (key, entry) in entries {
            let cluster = rig.entry(if key.ip.is_ipv4() { VIP } else { "fd00:96::10" }, 80, TCP);
            assert_eq!((entry.first, entry.count, entry.id), (cluster.first, cluster.count, cluster.id), "{key}");
        }
        // So a change is written once, and flips one entry more per address.
        let other = slice("web-4", "web", Family::V4).tcp(8080).ready(&["10.244.1.2", "10.244.2.2", "10.244.2.4"]);
        let (backends, ids, entries) = written(&rig.handle([other.apply()]).sync());
        assert_eq!((backends, ids, entries.len()), (1, 3, 1 + 2 * usize::from(count)), "{count} addresses");
    }
}
