//! Ranges of Services: after the entries of Services, and not given up by an agent that does not know them yet.

use super::{Event, Kind, Planner, Rig, VIP, gone, make_index, node, shape, synced_index, web};
use crate::model::ObjectName;
use crate::model::build::service_cidr;
use crate::plan::{MemoryMaps, Write};
use crate::source::ObjectRef;
use ipnet::IpNet;
use std::time::Duration;

fn range() -> IpNet {
    "10.96.0.0/16".parse().unwrap()
}

fn kubernetes() -> Event {
    service_cidr("kubernetes", &["10.96.0.0/16"]).apply()
}

fn has_range(rig: &Rig) -> bool {
    rig.maps.held().peers.contains_key(&range())
}

/// From the moment that the range is there, an address without an entry is refused.
#[test]
fn entries_of_services_come_before_their_range() {
    let n2 = || node("n2", &["172.18.0.12"], &["10.244.2.0/24"]).apply();
    let mut rig = Rig::new(64);
    let plan = rig.handle(web(&["10.244.1.2"])).handle([n2(), kubernetes(), Event::Synced(Kind::ServiceCidr)]).sync();
    let want = ["put peer", "put peer", "backends", "ids", "put service", "put wildcard", "put peer"];
    assert_eq!(shape(&plan), want);
    assert!(matches!(plan.writes.last(), Some(Write::PutPeer { prefix, .. }) if *prefix == range()));
    // A Service that goes is deleted as ever, and so is the range.
    assert_eq!(shape(&rig.handle([gone(Kind::Service, "web")]).sync()), ["delete wildcard", "delete service"]);
    let reference = ObjectRef { kind: Kind::ServiceCidr, name: ObjectName::cluster("kubernetes") };
    assert_eq!(shape(&rig.handle([Event::Delete(reference)]).sync()), ["delete peer"]);
}

/// Nodes are known first, as they often are.
#[test]
fn no_range_is_written_before_services_are_known() {
    let maps = MemoryMaps::new(64);
    let mut rig = Rig { index: make_index(), planner: Planner::adopt(&maps).unwrap(), maps, now: Duration::ZERO };
    rig.handle(web(&["10.244.1.2"])).handle([
        kubernetes(),
        Event::Synced(Kind::Node),
        Event::Synced(Kind::ServiceCidr),
    ]);
    rig.sync();
    assert!(!has_range(&rig));
    rig.handle([Event::Synced(Kind::Service)]).sync();
    assert!(!has_range(&rig));
    let plan = rig.handle([Event::Synced(Kind::Slice)]).sync();
    assert_eq!(shape(&plan), ["backends", "ids", "put service", "put wildcard", "put peer"]);
    assert_eq!(rig.addresses(VIP, 80, super::TCP), ["10.244.1.2"]);
}

/// Each kind may be the last to be known again.
#[test]
fn a_range_stays_until_a_later_agent_knows_better() {
    for last in Kind::ALL {
        let mut rig = Rig::new(64);
        rig.handle(web(&["10.244.1.2"])).handle([kubernetes(), Event::Synced(Kind::ServiceCidr)]).sync();
        assert!(has_range(&rig));
        rig.index = make_index();
        rig.restart();
        for kind in Kind::ALL.into_iter().filter(|kind| *kind != last) {
            let objects = match kind {
                Kind::Service => web(&["10.244.1.2"]).into_iter().take(1).collect(),
                Kind::Slice => web(&["10.244.1.2"]).into_iter().skip(1).collect(),
                Kind::ServiceCidr => vec![kubernetes()],
                _ => vec![],
            };
            let plan = rig.handle(objects).handle([Event::Synced(kind)]).sync();
            assert_eq!(plan.writes, [], "{kind} before {last}");
        }
        // It was deleted meanwhile.
        if last == Kind::ServiceCidr {
            assert_eq!(shape(&rig.handle([Event::Synced(last)]).sync()), ["delete peer"]);
        }
    }
}

#[test]
fn a_damaged_range_is_restored() {
    let mut rig = Rig::new(64);
    rig.handle([kubernetes(), Event::Synced(Kind::ServiceCidr)]).sync();
    rig.index = synced_index();
    rig.handle([kubernetes(), Event::Synced(Kind::ServiceCidr)]);
    assert_eq!(rig.restart().sync().writes, []);
    assert!(has_range(&rig));
}
