//! Maglev tables: who has one, and what becomes of entries for which there is no room.

use super::*;
use rustnet_common::maglev::UNIT;

/// A Service that asks for Maglev, with these backends.
fn web(addrs: &[&str]) -> [Event; 2] {
    [service("web", &[VIP]).tcp(80).maglev().apply(), slice("web-1", "web", Family::V4).tcp(8080).ready(addrs).apply()]
}

fn rig(units: u32) -> Rig {
    Rig::on(MemoryMaps::new(64).with_tables(units * UNIT))
}

fn problems(rig: &Rig) -> Vec<String> {
    rig.planner.problems(&rig.index).iter().map(ToString::to_string).collect()
}

#[test]
fn a_table_is_written_before_the_entry_that_leads_to_it() {
    let mut rig = rig(8);
    let plan = rig.handle(web(&["10.244.1.2", "10.244.1.3"])).sync();
    assert_eq!(shape(&plan), ["backends", "ids", "table", "put service", "put wildcard"]);
    let plan = rig.handle(web(&["10.244.1.2", "10.244.1.4"])).sync();
    assert_eq!(shape(&plan), ["backends", "ids", "table", "put service"]);
    assert_eq!(rig.entry(VIP, 80, TCP).table, 2);
    // The next agent finds both, and the older one's place is free again after a while.
    assert_eq!(shape(&rig.restart().sync()), [""; 0]);
    let plan = rig.wait().handle(web(&["10.244.1.2", "10.244.1.5"])).sync();
    assert!(shape(&plan).contains(&"table"));
    assert_eq!(rig.entry(VIP, 80, TCP).table, 1);
}

#[test]
fn the_algorithm_changes_with_one_write() {
    let mut rig = rig(8);
    rig.handle(web(&["10.244.1.2", "10.244.1.3"])).sync();
    assert_eq!(shape(&rig.handle([service("web", &[VIP]).tcp(80).apply()]).sync()), ["put service"]);
    assert_eq!(rig.entry(VIP, 80, TCP).table, 0);
    let plan = rig.handle([service("web", &[VIP]).tcp(80).maglev().apply()]).sync();
    assert_eq!(shape(&plan), ["table", "put service"]);
}

/// Backends count more than how flows are spread over them.
#[test]
fn without_room_for_a_table_flows_are_spread_at_random() {
    // One table at a time: the other unit is that of no table.
    let mut rig = rig(2);
    rig.handle(web(&["10.244.1.2", "10.244.1.3"])).sync();
    assert_eq!((rig.entry(VIP, 80, TCP).table, problems(&rig)), (1, vec![]));
    let plan = rig.handle(web(&["10.244.1.2", "10.244.1.4"])).sync();
    assert_eq!(rig.entry(VIP, 80, TCP).table, 0);
    assert_eq!(rig.addresses(VIP, 80, TCP), ["10.244.1.2", "10.244.1.4"]);
    let problem = "10.96.0.10:80/TCP has no room for its Maglev table of 251 places; raise maglev-entries; until then its flows are \
                   spread at random";
    assert_eq!(problems(&rig), [format!("Service default/web: {problem}")]);
    assert_eq!(rig.planner.failed().map(|(_, why)| why).collect::<Vec<_>>(), [problem]);
    // It is tried again once the earlier table's place is free.
    assert!(plan.retry_at.is_some());
    rig.wait().sync();
    rig.wait().sync();
    assert_eq!((rig.entry(VIP, 80, TCP).table, problems(&rig)), (1, vec![]));
}

#[test]
fn a_service_that_goes_no_longer_waits_for_a_table() {
    let mut rig = rig(1);
    rig.handle(web(&["10.244.1.2", "10.244.1.3"])).sync();
    assert_eq!(problems(&rig).len(), 1);
    rig.handle([gone(Kind::Service, "web")]).sync();
    assert_eq!(problems(&rig), [""; 0]);
}

#[test]
fn more_backends_than_places_get_no_table() {
    let mut rig = Rig::on(MemoryMaps::new(1024).with_tables(8 * UNIT));
    let addrs: Vec<String> = (0..252).map(|n| format!("10.244.1.{n}")).collect();
    rig.handle(web(&addrs.iter().map(String::as_str).collect::<Vec<_>>())).sync();
    assert_eq!(rig.entry(VIP, 80, TCP).table, 0);
    assert!(
        problems(&rig)[0].contains("has 252 backends, too many for a Maglev table of 251 places"),
        "{:?}",
        problems(&rig)
    );
}

/// Entries of an earlier agent that lead to no table, or to one that somebody has changed.
#[test]
fn damaged_tables_are_replaced() {
    type Damage = fn(&mut Snapshot);
    let damages: [Damage; 4] = [
        |held| held.services.values_mut().for_each(|entry| entry.table = if entry.count > 0 { 3 } else { 0 }),
        |held| held.tables[UNIT as usize] = 0,
        |held| held.tables[UNIT as usize + 1] ^= 1,
        |held| held.tables.truncate(UNIT as usize + 9),
    ];
    for (i, damage) in damages.into_iter().enumerate() {
        let mut rig = rig(8);
        rig.handle(web(&["10.244.1.2", "10.244.1.3"])).sync();
        damage(rig.maps.meddle());
        rig.restart().sync();
        let places = rig.maps.held().ordinals(rig.entry(VIP, 80, TCP).table).map(Iterator::count);
        assert_eq!(places, Some(251), "damage {i}");
        assert_eq!(rig.addresses(VIP, 80, TCP), ["10.244.1.2", "10.244.1.3"], "damage {i}");
    }
}

/// An agent that died between the entries of a set left one with the table before. Nobody gets the place of that while it leads there.
#[test]
fn a_table_that_one_entry_still_has_is_not_written_over() {
    let mut rig = rig(8);
    let both = || service("web", &[VIP]).tcp(80).maglev().external(&["198.51.100.7"]).apply();
    rig.handle(web(&["10.244.1.2", "10.244.1.3"])).handle([both()]).sync();
    rig.handle(web(&["10.244.1.2", "10.244.1.4"])).handle([both()]).sync();
    assert_eq!((rig.entry(VIP, 80, TCP).table, rig.entry("198.51.100.7", 80, TCP).table), (2, 2));
    rig.maps.meddle().services.get_mut(&key("198.51.100.7", 80, TCP)).unwrap().table = 1;
    // The next one waits for the lists, and then has a table to write for an address that comes before both.
    rig.index = make_index();
    rig.restart().handle(web(&["10.244.1.2", "10.244.1.4"])).handle([both()]).sync();
    rig.wait().sync();
    rig.wait().handle([service("first", &["10.96.0.1"]).tcp(80).maglev().apply()]);
    rig.handle([slice("first-1", "first", Family::V4).tcp(80).ready(&["10.244.1.8", "10.244.1.9"]).apply()]);
    rig.handle(Kind::REQUIRED.map(Event::Synced)).sync();
    assert_eq!(rig.entry("198.51.100.7", 80, TCP).table, 2);
    assert_ne!(rig.entry("10.96.0.1", 80, TCP).table, 1);
    // Then the place is free, after a while.
    rig.wait().sync();
    rig.wait().handle(web(&["10.244.1.2", "10.244.1.5"])).sync();
    assert_eq!(rig.entry(VIP, 80, TCP).table, 1);
}
