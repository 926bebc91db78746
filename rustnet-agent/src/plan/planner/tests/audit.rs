//! What somebody else changed is found and put back.

use super::*;
use crate::plan::audit::AUDIT_WORDS;
use rustnet_common::maglev::UNIT;

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
    let meddlings: [(Meddling, &str); 14] = [
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
        (|held| held.tables[257] ^= 7, "rn_maglev: element 257 was changed to"),
        (|held| held.tables.clear(), "rn_maglev: element 256 was changed to 0"),
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
        let mut rig = Rig::on(MemoryMaps::new(64).with_room(2, 3).with_tables(8 * UNIT));
        let n2 = node("n2", &["172.18.0.12"], &["10.244.2.0/24"]).apply();
        rig.handle(web(&["10.244.1.2", "10.244.1.3"]))
            .handle([n2, service("web", &[VIP]).tcp(80).maglev().apply()])
            .sync();
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
    let period = Duration::from_secs(7);
    rig.planner = Planner::adopt(&rig.maps).unwrap().with_audit_period(period);
    rig.handle(web(&["10.244.1.2"])).sync();
    rig.maps.meddle().services.clear();
    rig.maps.crash_after(0);
    rig.now = rig.planner.audit_at().unwrap();
    let failed = Table::ALL.iter().any(|_| rig.planner.audit(&mut rig.maps, rig.now).is_err());
    assert!(failed && rig.planner.audit_at().is_none());
    rig.maps.repair();
    rig.wait().sync();
    assert_eq!(rig.addresses(VIP, 80, TCP), ["10.244.1.2"]);
    // Everything has just been read: the next audit has a whole period, as it was set.
    assert_eq!(rig.planner.audit_at(), Some(rig.now + period));
}

/// A step reads no more than a piece of the Maglev tables, however much room there is.
#[test]
fn maglev_tables_are_audited_piece_by_piece() {
    let mut rig = Rig::on(MemoryMaps::new(64).with_tables(2 * AUDIT_WORDS + UNIT));
    let maglev = service("web", &[VIP]).tcp(80).maglev().apply();
    rig.handle(web(&["10.244.1.2", "10.244.1.3"])).handle([maglev]).sync();
    let before = rig.maps.held().tables.clone();
    let wrong = [UNIT + 1, AUDIT_WORDS - 1, AUDIT_WORDS, 2 * AUDIT_WORDS - 1, 2 * AUDIT_WORDS + UNIT - 1];
    let tables = &mut rig.maps.meddle().tables;
    tables.resize((2 * AUDIT_WORDS + UNIT) as usize, 0);
    for index in wrong {
        tables[index as usize] ^= 1;
    }
    rig.now = rig.planner.audit_at().unwrap();
    let mut steps = Vec::new();
    while rig.planner.audit_at() == Some(rig.now) {
        let found = rig.planner.audit(&mut rig.maps, rig.now).unwrap();
        steps.push(found.iter().map(|it| it.what.split(' ').nth(1).unwrap().parse().unwrap()).collect::<Vec<u32>>());
    }
    assert_eq!(steps.len(), Table::ALL.len() + 2);
    steps.retain(|found| !found.is_empty());
    assert_eq!(steps, [&wrong[..2], &wrong[2..4], &wrong[4..]]);
    let held = &rig.maps.held().tables;
    assert_eq!(held[..before.len()], before);
    assert!(held[before.len()..].iter().all(|word| *word == 0));
    assert_eq!(audit(&mut rig), <[&str; 0]>::default());
    // Each audit begins with the first piece.
    rig.maps.meddle().tables[UNIT as usize + 2] ^= 1;
    assert_eq!(audit(&mut rig).len(), 1);
}
