//! `loadBalancerSourceRanges`: which clients the maps let through, after each write.

use super::{AUDIT_PERIOD, Planner, Rig, TCP, gone, key, shape};
use crate::model::build::{ip, service, slice};
use crate::model::{Family, Service};
use crate::plan::memory::passes;
use crate::plan::{MemoryMaps, SourceRange, VipKey};
use crate::source::{Event, Kind};
use proptest::prelude::*;
use rustnet_common::service::{flags, scope};
use std::collections::BTreeMap;

const BALANCER: &str = "203.0.113.7";
const OFFICE: &str = "192.0.2.0/24";
const DESK: &str = "192.0.2.9/32";
const HOME: &str = "198.51.100.0/24";

fn at() -> VipKey {
    VipKey { scope: scope::EXTERNAL, ..key(BALANCER, 80, TCP) }
}

/// A Service with a load balancer, and a backend.
fn balanced(name: &str) -> [Event; 2] {
    [open(name).apply(), backend(name)]
}

fn open(name: &str) -> Service {
    service(name, &[if name == "web" { "10.96.0.10" } else { "10.96.0.11" }]).tcp(80).balanced(&[BALANCER])
}

fn backend(name: &str) -> Event {
    let at = if name == "web" { "10.244.1.2" } else { "10.244.1.3" };
    slice(&format!("{name}-1"), name, Family::V4).tcp(8080).ready(&[at]).apply()
}

fn judged(name: &str, ranges: &[&str]) -> Event {
    open(name).source_ranges(ranges).apply()
}

impl Rig {
    /// True if a client gets through.
    fn lets(&self, client: &str) -> bool {
        passes(self.maps.held(), &at(), ip(client)).is_some()
    }

    fn ranges(&self) -> Vec<String> {
        self.maps.held().source_ranges.keys().map(|range| range.clients.to_string()).collect()
    }
}

#[test]
fn ranges_come_before_their_entry_and_go_after_it() {
    let mut rig = Rig::new(64);
    rig.handle(balanced("web")).sync();
    assert!(rig.lets("192.0.2.9") && rig.lets("198.51.100.9"));
    assert_eq!(shape(&rig.handle([judged("web", &[OFFICE])]).sync()), ["put range", "put service", "put service"]);
    assert!(rig.lets("192.0.2.9") && !rig.lets("198.51.100.9"));
    // So does the cluster's entry.
    assert_eq!(rig.entry(BALANCER, 80, TCP).flags & flags::SOURCE_RANGES, flags::SOURCE_RANGES);
    assert_eq!(shape(&rig.handle([judged("web", &[DESK, HOME])]).sync()), ["put range", "put range", "delete range"]);
    assert_eq!(rig.ranges(), [DESK, HOME]);
    assert_eq!(rig.restart().sync().writes, []);
    assert_eq!(
        shape(&rig.handle([open("web").apply()]).sync()),
        ["put service", "put service", "delete range", "delete range"]
    );
    assert!(rig.lets("203.0.113.99"));
    rig.handle([judged("web", &[OFFICE])]).sync();
    let plan = rig.handle([gone(Kind::Service, "web")]).sync();
    assert_eq!(shape(&plan).last(), Some(&"delete range"));
    assert!(rig.maps.held().services.is_empty() && rig.ranges().is_empty());
}

/// Of one family, or all invalid: closed.
#[test]
fn no_range_is_nobody() {
    let mut rig = Rig::new(64);
    rig.handle(balanced("web")).sync();
    for ranges in [&[][..], &["2001:db8::/32"]] {
        rig.handle([judged("web", ranges)]).sync();
        assert_eq!((rig.ranges().len(), rig.lets("192.0.2.9")), (0, false), "{ranges:?}");
    }
}

/// While no agent was there.
#[test]
fn what_has_changed_meanwhile() {
    let mut rig = Rig::new(64);
    rig.handle(balanced("web")).handle([judged("web", &[OFFICE, HOME])]).sync();
    rig.handle([judged("web", &[HOME])]).restart().sync();
    assert_eq!(rig.ranges(), [HOME]);
    rig.handle([gone(Kind::Service, "web")]).restart().sync();
    assert!(rig.ranges().is_empty());
}

/// An older Service takes the address: its clients never get the other's backends.
#[test]
fn an_entry_that_passes_to_another_service() {
    for (mine, theirs) in [
        (&[OFFICE][..], &[HOME][..]),
        (&[OFFICE], &[DESK]),
        (&[DESK], &[OFFICE]),
        (&[OFFICE, HOME], &[DESK, HOME]),
        (&[OFFICE], &[]),
        (&[], &[OFFICE]),
    ] {
        let mut rig = Rig::new(64);
        let newer = open("web").created(2).source_ranges(mine).apply();
        let older = open("other").created(1).source_ranges(theirs).apply();
        rig.handle([newer, backend("web"), backend("other")]).sync();
        rig.handle([older]).sync();
        assert_eq!(rig.ranges(), theirs, "{mine:?} to {theirs:?}");
        rig.handle([gone(Kind::Service, "other")]).sync();
        assert_eq!(rig.ranges(), mine, "{theirs:?} to {mine:?}");
    }
}

#[test]
fn a_service_whose_ranges_do_not_fit_is_closed() {
    let mut rig = Rig::on(MemoryMaps::new(64).with_range_room(3));
    rig.handle(balanced("web")).sync();
    rig.handle([judged("web", &[OFFICE, DESK, HOME])]).sync();
    let problems = rig.planner.problems(&rig.index);
    assert_eq!(problems.len(), 1);
    let text = problems[0].to_string();
    assert!(text.starts_with("Service default/web: spec.loadBalancerSourceRanges: its 3 ranges"), "{text}");
    assert!(text.ends_with("; raise source-range-entries"), "{text}");
    assert!(!rig.lets("192.0.2.9"));
    // The older one has its own.
    let elsewhere = service("old", &["10.96.0.12"]).tcp(80).balanced(&["203.0.113.8"]).created(-1);
    rig.handle([elsewhere.source_ranges(&[HOME]).apply(), judged("web", &[OFFICE, HOME])]).sync();
    assert_eq!((rig.ranges(), rig.lets("192.0.2.9")), (vec![HOME.to_owned()], false));
    rig.handle([judged("web", &[OFFICE])]).sync();
    assert_eq!((rig.planner.problems(&rig.index), rig.lets("192.0.2.9")), (vec![], true));
}

/// With `externalTrafficPolicy: Local` and no endpoint here, the entry for clients outside needs no room. The one for the cluster, which
/// asks for the same clients, has none.
#[test]
fn an_entry_for_the_cluster_without_room_keeps_the_clients_of_both() {
    let local = |ranges: &[&str]| Service { external_local: true, ..open("web").source_ranges(ranges) }.apply();
    let mut rig = Rig::new(1);
    rig.handle([local(&[OFFICE]), backend("web")]).sync();
    let two = slice("web-1", "web", Family::V4).tcp(8080).ready(&["10.244.1.2", "10.244.1.3"]).apply();
    rig.handle([two]).sync();
    assert_ne!(rig.planner.problems(&rig.index), []);
    rig.handle([local(&[DESK, HOME])]).sync();
    assert_eq!(rig.ranges(), [DESK]);
    rig.handle([backend("web")]).sync();
    assert_eq!(rig.ranges(), [DESK, HOME]);
}

/// What does not fit next to the ranges that go comes after them.
#[test]
fn a_full_map_takes_the_new_ranges_at_last() {
    let mut rig = Rig::on(MemoryMaps::new(64).with_range_room(3));
    rig.handle(balanced("web")).handle([judged("web", &[OFFICE, DESK])]).sync();
    let plan = rig.handle([judged("web", &[HOME, "203.0.113.0/25"])]).sync();
    assert_eq!(shape(&plan), ["delete range", "delete range", "put range", "put range"]);
    assert_eq!(rig.sync().writes, []);
}

/// No room for its new backends: the entry leads to the old ones, and asks for the clients all the same.
#[test]
fn an_entry_without_room_asks_for_its_clients() {
    let mut rig = Rig::new(1);
    rig.handle(balanced("web")).sync();
    let two = slice("web-1", "web", Family::V4).tcp(8080).ready(&["10.244.1.2", "10.244.1.3"]).apply();
    rig.handle([two, judged("web", &[OFFICE])]).sync();
    assert_ne!(rig.planner.problems(&rig.index), []);
    assert!(rig.lets("192.0.2.9") && !rig.lets("198.51.100.9"));
    // Fewer clients at once, others once the entry changes.
    rig.handle([judged("web", &[DESK, HOME])]).sync();
    assert_eq!(rig.ranges(), [DESK]);
    // Everybody: as soon as the entry changes.
    rig.handle([open("web").apply()]).sync();
    assert_eq!(rig.ranges(), [DESK]);
    rig.handle([backend("web")]).sync();
    assert!(rig.lets("198.51.100.9") && rig.ranges().is_empty());
}

/// What the map holds.
type Held = BTreeMap<SourceRange, u32>;

#[test]
fn somebody_else_changes_the_ranges() {
    let mut rig = Rig::new(64);
    rig.handle(balanced("web")).handle([judged("web", &[OFFICE, HOME])]).sync();
    let range = |clients: &str| SourceRange { key: at(), clients: clients.parse().unwrap() };
    let should = rig.maps.held().source_ranges.clone();
    let changes: [&dyn Fn(&mut Held); 3] = [
        &|held| {
            held.remove(&range(OFFICE));
        },
        &|held| {
            held.insert(range("0.0.0.0/0"), 1);
        },
        &|held| {
            held.insert(range(HOME), 7);
        },
    ];
    for (n, change) in (1..).zip(changes) {
        change(&mut rig.maps.meddle().source_ranges);
        let mut found = Vec::new();
        while let Some(due) = rig.planner.audit_at().filter(|due| *due <= n * AUDIT_PERIOD) {
            found.extend(rig.planner.audit(&mut rig.maps, due).unwrap());
        }
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].map, "rn_source_ranges");
        assert_eq!(rig.maps.held().source_ranges, should);
    }
}

/// Ranges that have one another, and others.
fn ranges() -> impl Strategy<Value = Option<Vec<&'static str>>> {
    let all = ["0.0.0.0/0", OFFICE, "192.0.2.0/28", DESK, HOME, "198.51.100.9/32"];
    prop::option::weighted(0.8, prop::sample::subsequence(all.to_vec(), 0..4))
}

/// A Service, its age, and the ranges that it gets; `None`: it goes.
type Change = (&'static str, Option<(i64, Option<Vec<&'static str>>)>);

fn change() -> impl Strategy<Value = Change> {
    (prop::sample::select(vec!["web", "other"]), prop::option::weighted(0.8, (0..3_i64, ranges())))
}

proptest! {
    /// The maps of the tests refuse each write that lets a client through, or refuses one, only for a moment; here also from what
    /// a crash leaves.
    #[test]
    fn nobody_gets_through_for_a_moment(
        changes in prop::collection::vec((change(), 0..12_usize), 1..8),
        room in prop::sample::select(vec![u32::MAX, 4]),
    ) {
        let mut rig = Rig::on(MemoryMaps::new(64).with_range_room(room));
        rig.handle(["web", "other"].map(backend)).sync();
        for ((name, change), steps) in changes {
            let event = match change {
                None => gone(Kind::Service, name),
                Some((age, None)) => open(name).created(age).apply(),
                Some((age, Some(ranges))) => open(name).created(age).source_ranges(&ranges).apply(),
            };
            rig.handle([event]);
            rig.maps.crash_after(steps);
            let first = rig.planner.sync(&mut rig.index, &mut rig.maps, rig.now);
            if let Err(error) = first {
                prop_assert!(error.to_string().contains("crash"), "{error:#}");
            }
            rig.maps.repair();
            if steps % 2 == 0 {
                rig.restart();
            }
            rig.sync();
            rig.settle();
            let wanted: Vec<_> = rig.index.desired_ranges().into_iter().flat_map(|it| it.entries).collect();
            let is_closed = rig.planner.problems(&rig.index).len();
            for client in ["192.0.2.1", "192.0.2.9", "192.0.2.200", "198.51.100.9", "198.51.100.1", "203.0.113.99"] {
                let ranges = wanted.iter().find(|(key, _)| *key == at()).map(|(_, ranges)| ranges);
                let is_served = rig.index.is_desired(&at());
                let should = is_served && ranges.is_none_or(|all| all.iter().any(|range| range.contains(&ip(client))));
                let is = rig.lets(client);
                prop_assert!(is == should || (!is && is_closed > 0), "{client}: {is}, not {should}");
            }
            let planner = Planner::adopt(&rig.maps).unwrap();
            prop_assert!(planner.problems(&rig.index).is_empty());
        }
    }
}
