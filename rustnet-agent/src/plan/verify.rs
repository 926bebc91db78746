//! The comparison of maps with what the sources say, for `rustnetctl services --verify`: what a new planner on these maps would
//! write, by front end. Pure; nothing is written.

use super::planner::{Capacity, Planner};
use super::{GRACE, Snapshot, SourceRange, VipKey, Write};
use crate::index::{Choice, DesiredBackend, Index};
use rustnet_common::backend::{Backend, flags as backend_flags};
use rustnet_common::service::{SvcEntry, flags};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

/// How an entry of the maps differs from what the sources say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// The maps do not have it.
    Missing,
    /// Nothing asks for it.
    Extra,
    /// It leads elsewhere, or to others.
    Differs,
}

/// A front end that is not as the sources say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deviation {
    /// The entry.
    pub key: VipKey,
    /// How it differs.
    pub kind: Kind,
    /// In what, for people.
    pub details: Vec<String>,
}

/// Compares the services of a snapshot, with its backends and ranges of clients, with what an index wants. `room` is what the maps can
/// hold. By entry, in order.
pub fn verify(index: &mut Index, held: &Snapshot, room: Capacity) -> Vec<Deviation> {
    let mut planner = Planner::from_snapshot(held.clone(), room);
    let mut writes = Vec::new();
    // What is free only after a grace period, or after others have gone, has room in a later plan.
    for round in 0..3 {
        writes.extend(planner.plan(index, GRACE * 10 * round).writes);
    }
    let mut found = BTreeMap::new();
    for write in &writes {
        for (key, kind) in concerned(write, held) {
            found.entry(key).or_insert(kind);
        }
    }
    let failed: BTreeMap<VipKey, String> = planner.failed().map(|(key, why)| (key, why.to_owned())).collect();
    for key in failed.keys() {
        found.entry(*key).or_insert(if held.services.contains_key(key) { Kind::Differs } else { Kind::Missing });
    }
    let ranges: BTreeMap<VipKey, BTreeSet<SourceRange>> = desired_ranges(index);
    let mut choice = Choice::default();
    let deviation = |(key, kind)| {
        let mut details: Vec<String> = failed.get(&key).cloned().into_iter().collect();
        if kind == Kind::Differs {
            details.extend(compare(&key, index, held, ranges.get(&key), &mut choice));
        }
        Deviation { key, kind, details }
    };
    found.into_iter().map(deviation).collect()
}

/// The entries that a write is about. Places and numbers of what no entry leads to are nobody's business.
fn concerned(write: &Write, held: &Snapshot) -> Vec<(VipKey, Kind)> {
    match write {
        Write::PutService { key, .. } if held.services.contains_key(key) => vec![(*key, Kind::Differs)],
        Write::PutService { key, .. } => vec![(*key, Kind::Missing)],
        Write::DeleteService { key } => vec![(*key, Kind::Extra)],
        Write::PutSourceRange { range } | Write::DeleteSourceRange { range } => {
            let is_there = held.services.contains_key(&range.key);
            vec![(range.key, if is_there { Kind::Differs } else { Kind::Missing })]
        }
        // Flags of backends that entries lead to; new backends come with their entries.
        Write::Backends { backends } => {
            let is_led_to = |entry: &SvcEntry| backends.iter().any(|backend| leads_to(entry, backend, held));
            let entries = held.services.iter().filter(|(_, entry)| is_led_to(entry));
            entries.map(|(key, _)| (*key, Kind::Differs)).collect()
        }
        _ => Vec::new(),
    }
}

fn leads_to(entry: &SvcEntry, backend: &Backend, held: &Snapshot) -> bool {
    entry.id == backend.service && held.backends_of(entry).flatten().any(|it| it.id == backend.id)
}

fn desired_ranges(index: &Index) -> BTreeMap<VipKey, BTreeSet<SourceRange>> {
    let all = index.desired_ranges().into_iter().flat_map(|of| of.entries);
    all.map(|(key, ranges)| (key, ranges.into_iter().map(|clients| SourceRange { key, clients }).collect())).collect()
}

/// In what an entry that is there differs from what it should be.
fn compare(
    key: &VipKey,
    index: &Index,
    held: &Snapshot,
    ranges: Option<&BTreeSet<SourceRange>>,
    choice: &mut Choice,
) -> Vec<String> {
    let (Some(is), Some(should)) = (held.services.get(key), index.desired_service(key, choice)) else {
        return Vec::new();
    };
    let mut details = Vec::new();
    if is.affinity != should.affinity {
        details.push(format!("affinity of {}s, should be {}s", is.affinity, should.affinity));
    }
    let names = [
        (flags::DROP_EMPTY, "drops clients if it has no backend"),
        (flags::SOURCE_RANGES, "is only for some clients"),
        (flags::SHARED, "is an address that others may have"),
        (flags::DIRECT, "has backends of other nodes answer clients outside directly"),
    ];
    for (flag, means) in names {
        match (is.flags & flag != 0, should.flags & flag != 0) {
            (true, false) => details.push(format!("{means}, should not be so")),
            (false, true) => details.push(format!("should be one that {means}")),
            _ => {}
        }
    }
    match (is.table != 0, choice.table_size != 0 && choice.backends.len() > 1) {
        (true, false) => details.push("spreads flows by a Maglev table, should do so at random".to_owned()),
        (false, true) => details.push("spreads flows at random, should do so by a Maglev table".to_owned()),
        _ => {}
    }
    details.extend(backends(is, held, &choice.backends));
    details.extend(clients(key, held, ranges));
    if details.is_empty() {
        details.push("leads there by a range, a number or a Maglev table that the agent would replace".to_owned());
    }
    details
}

fn backends(entry: &SvcEntry, held: &Snapshot, should: &[DesiredBackend]) -> Vec<String> {
    // An entry that was damaged may claim any number.
    let count = entry.count.min(held.ids.len() as u32);
    let found: Vec<Option<&Backend>> = held.backends_of(&SvcEntry { count, ..*entry }).collect();
    let lost = entry.count as usize - found.iter().flatten().count();
    let at = |backend: &Backend| (IpAddr::from(backend.addr), backend.port);
    let is: BTreeMap<_, _> = found.iter().flatten().map(|backend| (at(backend), backend.flags)).collect();
    let should: BTreeMap<_, _> = should.iter().map(|it| ((it.addr, it.port), it.flags)).collect();
    let show = |(ip, port): &(IpAddr, u16)| SocketAddr::new(*ip, *port);
    let absent = should.keys().filter(|at| !is.contains_key(at)).map(|at| format!("lacks backend {}", show(at)));
    let extra = is.keys().filter(|at| !should.contains_key(at)).map(|at| format!("has backend {}", show(at)));
    let changed = should.iter().filter_map(|(at, flags)| {
        let other = is.get(at)? ^ flags;
        let means = [(backend_flags::LOCAL, "here"), (backend_flags::TERMINATING, "terminating")];
        let means = means.iter().filter(|(flag, _)| other & flag != 0).map(|(flag, word)| {
            format!("backend {} should {}be {word}", show(at), if flags & flag != 0 { "" } else { "not " })
        });
        Some(means.collect::<Vec<_>>())
    });
    let mut details: Vec<String> = absent.chain(extra).chain(changed.flatten()).collect();
    if lost > 0 {
        details.push(format!("leads to {lost} backends that are not its own"));
    }
    details
}

fn clients(key: &VipKey, held: &Snapshot, should: Option<&BTreeSet<SourceRange>>) -> Vec<String> {
    let is: BTreeSet<&SourceRange> = held.source_ranges.keys().filter(|range| range.key == *key).collect();
    let should: BTreeSet<&SourceRange> = should.into_iter().flatten().collect();
    let lacks = should.difference(&is).map(|range| format!("lacks source range {}", range.clients));
    lacks.chain(is.difference(&should).map(|range| format!("has source range {}", range.clients))).collect()
}

#[cfg(test)]
mod tests {
    use super::{Deviation, Kind, verify};
    use crate::config::Routing;
    use crate::host::HostFacts;
    use crate::index::{Index, Settings};
    use crate::model::Family;
    use crate::model::build::{endpoint, ip, node, service, slice};
    use crate::plan::{Capacity, Maps, MemoryMaps, Planner, Snapshot, VipKey};
    use crate::source::{Event, Kind as Kinds};
    use rustnet_common::addr::Addr;
    use rustnet_common::service::{SvcEntry, scope};
    use rustnet_common::tuple::proto::TCP;
    use std::time::Duration;

    const ROOM: Capacity = Capacity { services: 64, backends: 64, table_words: 1024, peers: 64, source_ranges: 64 };

    fn index() -> Index {
        let mut index = Index::new(Settings::new("n1", Routing::Vxlan));
        index.set_host(HostFacts::default());
        let web = service("web", &["10.96.0.10"]).tcp(80).balanced(&["203.0.113.7"]);
        index.handle(web.source_ranges(&["192.0.2.0/24"]).apply());
        let endpoints = slice("web-1", "web", Family::V4).tcp(8080).ready(&["10.244.1.2"]);
        index.handle(endpoints.endpoint(endpoint("10.244.2.3").on("n1")).apply());
        index.handle(service("dns", &["10.96.0.11"]).tcp(53).apply());
        index.handle(service("api", &["10.96.0.12"]).tcp(80).maglev().apply());
        index.handle(slice("api-1", "api", Family::V4).tcp(8080).ready(&["10.244.1.2", "10.244.1.3"]).apply());
        index.handle(node("n1", &["192.0.2.1"], &["10.244.1.0/24"]).apply());
        for kind in Kinds::REQUIRED {
            index.handle(Event::Synced(kind));
        }
        index
    }

    /// Maps as an agent leaves them.
    fn maps() -> Snapshot {
        let mut maps = MemoryMaps::new(64).with_tables(ROOM.table_words);
        let mut planner = Planner::adopt(&maps).unwrap();
        planner.sync(&mut index(), &mut maps, Duration::ZERO).unwrap();
        maps.snapshot().unwrap()
    }

    fn key(address: &str, port: u16, scope: u8) -> VipKey {
        VipKey { ip: ip(address), port, proto: TCP, scope }
    }

    fn found(held: &Snapshot) -> Vec<String> {
        let show = |Deviation { key, kind, details }: Deviation| format!("{kind:?} {key}: {}", details.join(", "));
        verify(&mut index(), held, ROOM).into_iter().map(show).collect()
    }

    #[test]
    fn maps_that_an_agent_has_written_are_as_they_should_be() {
        assert_eq!(found(&maps()), [""; 0]);
    }

    #[test]
    fn what_was_changed_is_named() {
        type Change = fn(&mut Snapshot);
        let changes: [(Change, &str); 12] = [
            (|held| _ = held.services.remove(&key("10.96.0.10", 80, scope::CLUSTER)), "Missing 10.96.0.10:80/TCP: "),
            (
                |held| {
                    let entry = held.services[&key("10.96.0.11", 53, scope::CLUSTER)];
                    held.services.insert(key("10.96.0.99", 1, scope::CLUSTER), SvcEntry { id: 99, ..entry });
                },
                "Extra 10.96.0.99:1/TCP: ",
            ),
            (
                |held| held.services.get_mut(&key("10.96.0.11", 53, scope::CLUSTER)).unwrap().affinity = 9,
                "Differs 10.96.0.11:53/TCP: affinity of 9s, should be 0s",
            ),
            (
                |held| held.services.get_mut(&key("203.0.113.7", 80, scope::EXTERNAL)).unwrap().flags = 0,
                "Differs 203.0.113.7:80/TCP from outside: should be one that is only for some clients",
            ),
            (
                |held| held.source_ranges.clear(),
                "Differs 203.0.113.7:80/TCP from outside: lacks source range 192.0.2.0/24",
            ),
            (
                |held| held.services.get_mut(&key("10.96.0.10", 80, scope::CLUSTER)).unwrap().count = 1,
                "Differs 10.96.0.10:80/TCP: lacks backend 10.244.2.3:8080",
            ),
            (
                |held| held.services.get_mut(&key("10.96.0.10", 80, scope::CLUSTER)).unwrap().count = u32::MAX,
                "leads to 4294967293 backends that are not its own",
            ),
            (
                |held| held.backends[0].addr = Addr::from(ip("10.9.9.9")),
                "Differs 10.96.0.10:80/TCP: lacks backend 10.244.1.2:8080, has backend 10.9.9.9:8080",
            ),
            (
                |held| held.services.get_mut(&key("10.96.0.12", 80, scope::CLUSTER)).unwrap().table = 0,
                "Differs 10.96.0.12:80/TCP: spreads flows at random, should do so by a Maglev table",
            ),
            (
                |held| held.services.get_mut(&key("10.96.0.10", 80, scope::CLUSTER)).unwrap().table = 1,
                "Differs 10.96.0.10:80/TCP: spreads flows by a Maglev table, should do so at random",
            ),
            (
                |held| held.tables[260] ^= 1,
                "Differs 10.96.0.12:80/TCP: leads there by a range, a number or a Maglev table that",
            ),
            (
                |held| held.backends.iter_mut().for_each(|it| it.flags = 0),
                "Differs 10.96.0.10:80/TCP: backend 10.244.2.3:8080 should be here",
            ),
        ];
        for (change, want) in changes {
            let mut held = maps();
            change(&mut held);
            let found = found(&held);
            assert!(found.iter().any(|it| it.contains(want)), "{want}: {found:#?}");
        }
    }

    #[test]
    fn maps_without_room_lack_what_does_not_fit() {
        let found = verify(&mut index(), &Snapshot::default(), Capacity { services: 1, ..ROOM });
        let missing: Vec<_> = found.iter().filter(|it| !it.details.is_empty()).collect();
        assert!(!missing.is_empty(), "{found:#?}");
        assert!(missing.iter().all(|it| it.kind == Kind::Missing && it.details[0].contains("raise service-entries")));
    }
}
