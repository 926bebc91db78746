use super::{Backend, CtEntry, Export, Maps, Upgrade, map, present};
use crate::bpf::convert::GONE;
use crate::bpf::sys::{Layout, map_create};
use bytemuck::{Pod, Zeroable};
use rustnet_common::addr::{Addr, Ip4, Ip6};
use rustnet_common::backend::id;
use rustnet_common::conntrack::{SLOT_CONTESTED, flags};
use rustnet_common::endpoint::{Endpoint, EndpointKey};
use rustnet_common::service::SvcKey;
use rustnet_common::tuple::{Tuple, proto};
use rustnet_common::v1;
use std::collections::BTreeMap;
use std::net::IpAddr;

const SIZE: u32 = 1024;

fn maps(shapes: &[(&str, u32, usize, usize, u32)]) -> Maps {
    let make = |&(name, kind, key, value, flags): &(&str, u32, usize, usize, u32)| {
        let (key_size, value_size) = (key as u32, value as u32);
        let layout = Layout { kind, key_size, value_size, max_entries: SIZE, flags };
        (name.to_owned(), map_create(name, layout).unwrap())
    };
    shapes.iter().map(make).collect()
}

fn retired() -> Maps {
    let shapes = v1::RETIRED.map(|s| (s.name, s.kind, s.key_size as usize, s.value_size as usize, s.flags));
    maps(&shapes)
}

fn fresh() -> Maps {
    let maps = maps(&[
        (map::SVC4, 1, 8, 20, 1),
        (map::SVC6, 1, 20, 20, 1),
        (map::BACKEND_IDS, 2, 4, 4, 1024),
        (map::BACKENDS, 2, 4, 32, 1024),
        (map::CT4_TCP, 9, 16, 120, 0),
        (map::CT4_ANY, 9, 16, 120, 0),
        (map::CT6_TCP, 9, 40, 144, 0),
        (map::CT6_ANY, 9, 40, 144, 0),
        (map::CT_CONTESTED, 2, 4, 4, 0),
        (map::ENDPOINTS, 1, size_of::<EndpointKey>(), size_of::<Endpoint>(), 1),
    ]);
    // Those that open translated flows.
    for pod in [1, 2] {
        put(&maps, map::ENDPOINTS, EndpointKey::from(IpAddr::from([10, 0, 0, pod])), Endpoint::zeroed());
    }
    maps
}

fn put<K: Pod, V: Pod>(maps: &Maps, name: &str, key: K, value: V) {
    present(maps, name).unwrap().put(&key, &value).unwrap();
}

fn sorted<K: Pod, V: Pod>(maps: &Maps, name: &str) -> Vec<(Vec<u8>, V)> {
    let entries = present::<K, V>(maps, name).unwrap().entries().unwrap();
    let mut all: Vec<_> = entries.into_iter().map(|(k, v)| (bytemuck::bytes_of(&k).to_vec(), v)).collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

fn ip(n: u8) -> Ip4 {
    Ip4 { ip: [10, 0, 0, n] }
}

fn ip6(n: u8) -> Ip6 {
    Ip6 { ip: [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, n] }
}

fn tuple<A>(src: A, dst: A, sport: u16, proto: u8) -> Tuple<A> {
    Tuple { src, dst, sport, dport: 80, proto, pad: 0, pad2: 0 }
}

/// A connection of v1; translated if `to` differs.
fn connect<A>(maps: &Maps, name: &str, asks: Tuple<A>, to: Tuple<A>, seen: u32, backend: u32)
where
    A: rustnet_common::addr::Address,
    Tuple<A>: Pod,
    v1::CtEntry<A>: Pod,
{
    let nat = if asks == to { 0 } else { v1::flags::NAT };
    let half = |to, flags| v1::CtEntry { to, flags: flags | nat, seen, backend, state: 1, ..v1::CtEntry::zeroed() };
    put(maps, name, asks, half(to, 0));
    put(maps, name, to.reversed(), half(asks.reversed(), v1::flags::REPLY));
}

fn backend(n: u8, id: u32) -> v1::Backend {
    v1::Backend { addr: Addr::from(IpAddr::from([10, 0, 1, n])), port: 8080, flags: 1, id }
}

fn service(first: u32, count: u32, id: u32) -> v1::SvcEntry {
    v1::SvcEntry { first, count, id, affinity: 0, flags: 0, pad: 0 }
}

fn key<A>(vip: A, port: u16) -> SvcKey<A> {
    SvcKey { vip, port, proto: proto::TCP, scope: 0 }
}

/// A node of v1 with services and connections of both families.
fn node() -> Maps {
    let old = retired();
    for (slot, (n, id)) in [(3, (1, 41)), (4, (2, 42)), (5, (3, 43))] {
        put(&old, v1::map::BACKENDS, slot, backend(n, id));
    }
    put(&old, v1::map::SVC4, key(ip(96), 80), service(3, 2, 7));
    put(&old, v1::map::SVC6, key(ip6(96), 80), service(5, 1, 8));
    put(&old, v1::map::SVC4, key(ip(97), 80), service(0, 0, 9));
    let becomes = |asks: Tuple<Ip4>| Tuple { dst: Ip4 { ip: [10, 0, 1, 2] }, dport: 8080, ..asks };
    for (sport, proto, seen) in [(1, proto::TCP, 10), (2, proto::UDP, 20)] {
        let asks = tuple(ip(1), ip(96), sport, proto);
        connect(&old, v1::map::CT4, asks, becomes(asks), seen, 42);
    }
    let plain = tuple(ip6(2), ip6(1), 3, proto::TCP);
    connect(&old, v1::map::CT6, plain, plain, 30, 0);
    old
}

#[test]
fn a_node_of_v1_is_upgraded() {
    let (old, new) = (node(), fresh());
    Upgrade::run(&old, &new, false).unwrap();
    assert_eq!(sorted::<SvcKey<Ip4>, v1::SvcEntry>(&new, map::SVC4), sorted::<SvcKey<Ip4>, _>(&old, v1::map::SVC4));
    let ids = present::<u32, u32>(&new, map::BACKEND_IDS).unwrap();
    let ids = [3, 4, 5].map(|index| ids.get(&index).unwrap().unwrap());
    assert_eq!(ids, [3, 4, 5].map(|slot| id::make(slot, 1)));
    let slot: Backend = present(&new, map::BACKENDS).unwrap().get(&4).unwrap().unwrap();
    assert_eq!((slot.addr, slot.port, slot.flags, slot.service), (backend(2, 0).addr, 8080, 1, 7));
    for name in [map::CT4_TCP, map::CT4_ANY] {
        let flows = sorted::<Tuple<Ip4>, CtEntry<Ip4>>(&new, name);
        assert_eq!(flows.len(), 2, "{name}");
        assert!(flows.iter().all(|(_, flow)| flow.backend == id::make(4, 1)));
    }
    let flows = sorted::<Tuple<Ip6>, CtEntry<Ip6>>(&new, map::CT6_TCP);
    assert_eq!((flows.len(), flows[0].1.flags), (1, flags::SWAPPED));
}

/// Whose flow a translated one is, `rn_endpoints` says: earlier releases exported those of clients outside.
#[test]
fn a_translated_flow_that_no_pod_opened_is_left_out() {
    let (old, new) = (retired(), fresh());
    for opener in [1, 9] {
        let asks = tuple(ip(opener), ip(96), 1, proto::UDP);
        connect(&old, v1::map::CT4, asks, Tuple { dst: ip(97), ..asks }, 5, 0);
    }
    let upgrade = Upgrade::run(&old, &new, false).unwrap();
    let openers = || -> Vec<Ip4> {
        let entries = present::<Tuple<Ip4>, CtEntry<Ip4>>(&new, map::CT4_ANY).unwrap().entries().unwrap();
        let original = entries.into_iter().filter(|(_, entry)| entry.flags & flags::REPLY == 0);
        original.map(|(_, entry)| entry.to.src).collect()
    };
    assert_eq!(openers(), [ip(1)]);
    let late = tuple(ip(8), ip(96), 2, proto::UDP);
    connect(&old, v1::map::CT4, late, Tuple { dst: ip(97), ..late }, 6, 0);
    assert_eq!(upgrade.catch_up(&old, &new).unwrap(), 0);
    assert_eq!(openers(), [ip(1)]);
}

#[test]
fn what_the_old_programs_open_meanwhile_is_added_and_nothing_comes_back() {
    let (old, new) = (node(), fresh());
    let upgrade = Upgrade::run(&old, &new, false).unwrap();
    let tcp = present::<Tuple<Ip4>, CtEntry<Ip4>>(&new, map::CT4_TCP).unwrap();
    tcp.clear().unwrap();
    let late = tuple(ip(5), ip(6), 9, proto::TCP);
    connect(&old, v1::map::CT4, late, late, 21, 0);
    // In the tick of the newest that was copied, after the copy.
    let same_tick = tuple(ip(5), ip(6), 9, proto::UDP);
    connect(&old, v1::map::CT4, same_tick, same_tick, 20, 0);
    assert_eq!(upgrade.catch_up(&old, &new).unwrap(), 2);
    assert_eq!(tcp.entries().unwrap()[0].1.to, late, "the one that was deleted meanwhile is older than the copy");
    assert_eq!(upgrade.catch_up(&old, &new).unwrap(), 0);
}

/// A service's connection is over, and old programs give its tuple to one of its backend itself, after the copy. And back.
#[test]
fn what_supersedes_an_expired_connection_is_copied() {
    let (old, new) = (retired(), fresh());
    let direct = tuple(ip(1), ip(3), 7, proto::TCP);
    let asks = Tuple { dst: ip(96), ..direct };
    connect(&old, v1::map::CT4, asks, direct, 5, 0);
    let another = tuple(ip(1), ip(3), 8, proto::TCP);
    connect(&old, v1::map::CT4, another, another, 6, 0);
    let upgrade = Upgrade::run(&old, &new, false).unwrap();
    let table = present::<Tuple<Ip4>, CtEntry<Ip4>>(&new, map::CT4_TCP).unwrap();
    let nat = || table.get(&direct.canonical()).unwrap().unwrap().flags & flags::NAT;
    assert_eq!(nat(), flags::NAT);
    connect(&old, v1::map::CT4, direct, direct, 7, 0);
    assert_eq!(upgrade.catch_up(&old, &new).unwrap(), 1);
    assert_eq!(nat(), 0);

    let sizes: BTreeMap<String, u32> = v1::RETIRED.iter().map(|shape| (shape.name.to_owned(), 512)).collect();
    let export = Export::new(&new, &sizes).unwrap();
    let later = CtEntry { flags: flags::NAT, seen: 8, to: asks, ..CtEntry::zeroed() };
    put(&new, map::CT4_TCP, direct.canonical(), later);
    export.catch_up(&new).unwrap();
    let half = present::<Tuple<Ip4>, v1::CtEntry<Ip4>>(export.maps(), v1::map::CT4).unwrap();
    assert_eq!(half.get(&direct.canonical()).unwrap().unwrap().to, asks);
    assert_eq!(export.catch_up(&new).unwrap(), 0);
}

#[test]
fn a_connection_that_a_program_took_over_gets_the_present_id_of_its_backend() {
    let (old, new) = (node(), fresh());
    let upgrade = Upgrade::run(&old, &new, false).unwrap();
    let flow = |backend| CtEntry::<Ip4> { backend, ..Zeroable::zeroed() };
    for (sport, backend) in [(70, 42), (71, id::make(4, 1)), (72, 9999)] {
        put(&new, map::CT4_ANY, tuple(ip(1), ip(2), sport, proto::UDP), flow(backend));
    }
    upgrade.catch_up(&old, &new).unwrap();
    let table = present::<Tuple<Ip4>, CtEntry<Ip4>>(&new, map::CT4_ANY).unwrap();
    let backend = |sport| table.get(&tuple(ip(1), ip(2), sport, proto::UDP)).unwrap().unwrap().backend;
    assert_eq!([70, 71, 72].map(backend), [id::make(4, 1), id::make(4, 1), 9999]);
}

#[test]
fn flows_of_opposite_directions_get_the_two_slots_of_their_key() {
    let (old, new) = (retired(), fresh());
    let one = tuple(ip(1), ip(2), 80, proto::UDP);
    connect(&old, v1::map::CT4, one, Tuple { dst: ip(3), ..one }, 5, 0);
    let upgrade = Upgrade::run(&old, &new, false).unwrap();
    let contested = || present::<u32, u32>(&new, map::CT_CONTESTED).unwrap().get(&0).unwrap();
    assert_eq!(contested(), Some(0));
    let other = one.reversed();
    connect(&old, v1::map::CT4, other, Tuple { dst: ip(4), ..other }, 6, 0);
    assert_eq!(upgrade.catch_up(&old, &new).unwrap(), 2);
    let entries = present::<Tuple<Ip4>, CtEntry<Ip4>>(&new, map::CT4_ANY).unwrap().entries().unwrap();
    assert_eq!(entries.len(), 4);
    assert_eq!(entries.iter().filter(|(key, _)| key.pad == SLOT_CONTESTED).count(), 1);
    assert_eq!(contested(), Some(1), "no program would look for it");
}

#[test]
fn a_bridge_that_is_built_again_leaves_live_services_alone() {
    let (old, new) = (node(), fresh());
    Upgrade::run(&old, &new, false).unwrap();
    // The agent went on: another service, and another generation of a backend.
    put(&new, map::SVC4, key(ip(98), 80), service(0, 0, 10));
    let backends = present::<u32, Backend>(&new, map::BACKENDS).unwrap();
    let slot = backends.get(&4).unwrap().unwrap();
    backends.put(&4, &Backend { addr: backend(9, 0).addr, id: id::make(4, 2), ..slot }).unwrap();
    let before = sorted::<SvcKey<Ip4>, v1::SvcEntry>(&new, map::SVC4);
    present::<Tuple<Ip4>, CtEntry<Ip4>>(&new, map::CT4_TCP).unwrap().clear().unwrap();
    Upgrade::run(&old, &new, true).unwrap();
    assert_eq!(sorted::<SvcKey<Ip4>, v1::SvcEntry>(&new, map::SVC4), before);
    let flows = sorted::<Tuple<Ip4>, CtEntry<Ip4>>(&new, map::CT4_TCP);
    assert_eq!(flows.iter().map(|(_, flow)| flow.backend).collect::<Vec<_>>(), [GONE; 2]);
}

#[test]
fn an_export_is_what_v1_would_hold() {
    let (old, new) = (node(), fresh());
    Upgrade::run(&old, &new, false).unwrap();
    let sizes: BTreeMap<String, u32> = v1::RETIRED.iter().map(|shape| (shape.name.to_owned(), 512)).collect();
    let export = Export::new(&new, &sizes).unwrap();
    let back = export.maps();
    assert_eq!(sorted::<SvcKey<Ip4>, v1::SvcEntry>(back, v1::map::SVC4), sorted::<SvcKey<Ip4>, _>(&old, v1::map::SVC4));
    assert_eq!(sorted::<SvcKey<Ip6>, v1::SvcEntry>(back, v1::map::SVC6), sorted::<SvcKey<Ip6>, _>(&old, v1::map::SVC6));
    let array = present::<u32, v1::Backend>(back, v1::map::BACKENDS).unwrap();
    assert_eq!(array.get(&4).unwrap(), Some(backend(2, id::make(4, 1))));
    let strip = |flows: Vec<(Vec<u8>, v1::CtEntry<Ip4>)>| -> Vec<_> {
        flows.into_iter().map(|(key, half)| (key, half.to, half.flags, half.seen, half.backend != 0)).collect()
    };
    assert_eq!(strip(sorted::<Tuple<Ip4>, _>(back, v1::map::CT4)), strip(sorted::<Tuple<Ip4>, _>(&old, v1::map::CT4)));
    assert_eq!(sorted::<Tuple<Ip6>, v1::CtEntry<Ip6>>(back, v1::map::CT6).len(), 2);
    // What was opened while the hooks were swapped.
    let late = tuple(ip(5), ip(6), 9, proto::TCP);
    let flow = CtEntry { to: late, ..CtEntry::zeroed() };
    put(&new, map::CT4_TCP, late, flow);
    assert_eq!(export.catch_up(&new).unwrap(), 2);
    assert_eq!(export.catch_up(&new).unwrap(), 0);
}

#[test]
fn an_export_into_a_smaller_table_of_backends_is_refused() {
    let (old, new) = (node(), fresh());
    Upgrade::run(&old, &new, false).unwrap();
    let sizes: BTreeMap<String, u32> = v1::RETIRED.iter().map(|shape| (shape.name.to_owned(), 4)).collect();
    assert!(Export::new(&new, &sizes).is_err());
}
