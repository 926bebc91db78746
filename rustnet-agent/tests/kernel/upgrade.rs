//! Maps of another size or of v1: their content passes to new ones, and a load that fails or an
//! agent that dies changes nothing.

use std::os::fd::AsFd;
use std::path::Path;

use bytemuck::Zeroable;
use rustnet_agent::bpf::load::{Load, Programs, program_path};
use rustnet_agent::bpf::store::node_config::NodeConfigStore;
use rustnet_agent::bpf::store::{BpfMaps, Map, services};
use rustnet_agent::bpf::sys::{self, Layout, TestRun};
use rustnet_agent::bpf::upgrade::Bridge;
use rustnet_agent::plan::{Maps, VipKey, Write};
use rustnet_common::addr::Ip4;
use rustnet_common::config::{NodeConfig, mark};
use rustnet_common::conntrack::{CtEntry, flags};
use rustnet_common::endpoint::{Endpoint, EndpointKey};
use rustnet_common::names::{LINKS_DIR, PROGRAMS, SIDE_IN, map};
use rustnet_common::service::{SvcEntry, SvcKey};
use rustnet_common::socket::{Asked, SocketKey};
use rustnet_common::tuple::{Tuple, proto};
use rustnet_common::v1;

use crate::agent::{Agent, block_on, make_own_node, wait_until, web};
use crate::load::{load, map_id, prog_id, spoilt};
use crate::sandbox::{self, Sandbox, names, uplink};

type Connections = Map<Tuple<Ip4>, CtEntry<Ip4>>;

/// A table of connections.
const TABLE: &str = map::CT4_TCP;

fn sized<'a>(sandbox: &'a Sandbox, sizes: &[(&str, u32)]) -> Load<'a> {
    let mut load = load(sandbox);
    load.sizes.extend(sizes.iter().map(|(name, size)| ((*name).to_owned(), *size)));
    load
}

fn max_entries(sandbox: &Sandbox, name: &str) -> u32 {
    layout(&sandbox.bpffs.join(name)).max_entries
}

fn layout(path: &Path) -> Layout {
    sys::map_info(sys::obj_get(path).unwrap().as_fd()).unwrap().layout()
}

fn connections(dir: &Path) -> Connections {
    Map::open(dir, TABLE).unwrap()
}

fn tuple(sport: u16) -> Tuple<Ip4> {
    Tuple { sport, dport: 80, proto: proto::TCP, ..Tuple::zeroed() }
}

fn seen_at(seen: u32) -> CtEntry<Ip4> {
    CtEntry { seen, ..CtEntry::zeroed() }
}

fn key(port: u16) -> VipKey {
    VipKey { ip: "10.96.0.1".parse().unwrap(), port, proto: proto::TCP, scope: 0 }
}

fn put_services(dir: &Path, ports: std::ops::Range<u16>) {
    let entry = |port: u16| SvcEntry { first: 0, count: 0, id: port.into(), affinity: 0, flags: 0, table: 0 };
    let writes: Vec<_> = ports.map(|port| Write::PutService { key: key(port), entry: entry(port) }).collect();
    BpfMaps::open(dir).unwrap().apply(&writes).unwrap();
}

/// All pins that an agent leaves when it is done, and nothing else.
fn assert_tidy(sandbox: &Sandbox) {
    let mut wanted: Vec<String> = map::ALL.iter().chain(&["link", "prog"]).map(|name| (*name).to_owned()).collect();
    wanted.sort();
    assert_eq!(names(&sandbox.bpffs), wanted);
}

#[test]
fn another_size_is_a_new_map_with_the_old_content() {
    sandbox::run(|sandbox| {
        load(sandbox).run().unwrap().pin(&sandbox.bpffs).unwrap();
        put_services(&sandbox.bpffs, 1..3001);
        let table = connections(&sandbox.bpffs);
        (0..3000).for_each(|port| table.put(&tuple(port), &seen_at(port.into())).unwrap());
        let ids = [map::SVC4, TABLE, map::PEERS4].map(|name| map_id(sandbox, name));

        let mut next = sized(sandbox, &[(map::SVC4, 8192), (TABLE, 16384)]).run().unwrap();
        let unchanged = [map::SVC4, TABLE, map::PEERS4].map(|name| map_id(sandbox, name));
        assert_eq!(unchanged, ids, "a load replaces no pin");
        assert_eq!(connections(next.maps_dir(&sandbox.bpffs)).len().unwrap(), 3000);

        next.pin(&sandbox.bpffs).unwrap();
        assert!(next.has_leftovers());
        assert_eq!((max_entries(sandbox, map::SVC4), max_entries(sandbox, TABLE)), (8192, 16384));
        assert_eq!(map_id(sandbox, map::PEERS4), ids[2]);
        assert_eq!(services(&sandbox.bpffs).unwrap().len(), 3000);
        assert_eq!(connections(&sandbox.bpffs).len().unwrap(), 3000);
        assert_eq!(names(&sandbox.bpffs.join("old")), [TABLE, map::SVC4], "kept until no program uses them");

        next.catch_up().unwrap();
        next.clear_leftovers(&sandbox.bpffs).unwrap();
        assert!(!next.has_leftovers());
        assert_tidy(sandbox);
    });
}

#[test]
fn connections_of_the_old_programs_are_copied_when_the_last_of_them_is_gone() {
    sandbox::run(|sandbox| {
        load(sandbox).run().unwrap().pin(&sandbox.bpffs).unwrap();
        let old = connections(&sandbox.bpffs);
        (0..100).for_each(|port| old.put(&tuple(port), &seen_at(1000 + u32::from(port))).unwrap());
        let mut next = sized(sandbox, &[(TABLE, 16384)]).run().unwrap();
        next.pin(&sandbox.bpffs).unwrap();
        let new = connections(&sandbox.bpffs);
        // One that an old program opens, and one that a new program refreshes and an old one does
        // not.
        old.put(&tuple(200), &seen_at(1100)).unwrap();
        new.put(&tuple(7), &seen_at(1100)).unwrap();
        // One that the collector took meanwhile stays away.
        new.delete(&tuple(3)).unwrap();
        // One that is over, and whose tuple an old program gives to another flow.
        let translated = CtEntry { flags: flags::NAT, ..seen_at(1101) };
        old.put(&tuple(8), &translated).unwrap();
        // One that a new program opened there, too, later.
        old.put(&tuple(9), &translated).unwrap();
        new.put(&tuple(9), &seen_at(1102)).unwrap();
        assert_eq!(next.catch_up().unwrap(), 2);
        assert_eq!(new.get(&tuple(8)).unwrap(), Some(translated));
        assert_eq!(new.get(&tuple(9)).unwrap(), Some(seen_at(1102)));
        assert_eq!(new.get(&tuple(200)).unwrap(), Some(seen_at(1100)));
        assert_eq!(new.get(&tuple(7)).unwrap(), Some(seen_at(1100)));
        assert_eq!(new.get(&tuple(3)).unwrap(), None);
    });
}

#[test]
fn a_smaller_table_keeps_the_newest_connections() {
    sandbox::run(|sandbox| {
        load(sandbox).run().unwrap().pin(&sandbox.bpffs).unwrap();
        let old = connections(&sandbox.bpffs);
        // The clock wraps among them.
        let seen = |port: u16| (u32::MAX - 2000).wrapping_add(port.into());
        (0..4000).rev().for_each(|port| old.put(&tuple(port), &seen_at(seen(port))).unwrap());
        let next = sized(sandbox, &[(TABLE, 1024)]).run().unwrap();
        let new = connections(next.maps_dir(&sandbox.bpffs));
        (3600..4000).for_each(|port| assert!(new.get(&tuple(port)).unwrap().is_some(), "{port}"));
        assert!(new.len().unwrap() <= 1024);
    });
}

#[test]
fn what_does_not_fit_is_refused_with_both_sizes_and_nothing_changes() {
    sandbox::run(|sandbox| {
        load(sandbox).run().unwrap().pin(&sandbox.bpffs).unwrap();
        put_services(&sandbox.bpffs, 1..1001);
        let ids = map::ALL.map(|name| map_id(sandbox, name));
        let error = format!("{:#}", sized(sandbox, &[(map::SVC4, 512), (TABLE, 64)]).run().err().unwrap());
        assert!(error.contains(map::SVC4) && error.contains("4096") && error.contains("512"), "{error}");
        assert!(error.contains("set its size in the configuration back"), "{error}");
        assert_eq!(map::ALL.map(|name| map_id(sandbox, name)), ids);
        assert_tidy(sandbox);
    });
}

#[test]
fn maglev_tables_that_a_smaller_map_has_no_room_for_are_left_out() {
    sandbox::run(|sandbox| {
        let words = || Map::<u32, u64>::open(&sandbox.bpffs, map::MAGLEV).unwrap();
        sized(sandbox, &[(map::MAGLEV, 1024)]).run().unwrap().pin(&sandbox.bpffs).unwrap();
        for (index, word) in [(256, 251), (511, 3), (512, 251), (1023, 5)] {
            words().put(&index, &word).unwrap();
        }
        let mut next = sized(sandbox, &[(map::MAGLEV, 512)]).run().unwrap();
        next.pin(&sandbox.bpffs).unwrap();
        assert_eq!(max_entries(sandbox, map::MAGLEV), 512);
        assert_eq!([256, 511].map(|index| words().get(&index).unwrap()), [Some(251), Some(3)]);
        next.catch_up().unwrap();
        next.clear_leftovers(&sandbox.bpffs).unwrap();
        assert_tidy(sandbox);
    });
}

#[test]
fn a_program_that_the_verifier_rejects_leaves_the_maps_of_the_old_size() {
    sandbox::run(|sandbox| {
        load(sandbox).run().unwrap().pin(&sandbox.bpffs).unwrap();
        let ids = map::ALL.map(|name| map_id(sandbox, name));
        let programs = PROGRAMS.map(|name| prog_id(sandbox, name));
        let bad = spoilt();
        let load = Load { object: bytemuck::cast_slice(&bad), ..sized(sandbox, &[(TABLE, 8192)]) };
        assert!(load.run().is_err());
        assert_eq!(map::ALL.map(|name| map_id(sandbox, name)), ids);
        assert_eq!(PROGRAMS.map(|name| prog_id(sandbox, name)), programs);
        assert_tidy(sandbox);
    });
}

#[test]
fn pods_that_come_while_the_map_of_endpoints_is_replaced_are_in_the_new_one() {
    sandbox::run(|sandbox| {
        let endpoints = || Map::<EndpointKey, Endpoint>::open(&sandbox.bpffs, map::ENDPOINTS).unwrap();
        let ip = |n: u8| EndpointKey::from(std::net::IpAddr::from([10, 1, 1, n]));
        let endpoint = |ifindex| Endpoint { ifindex, ..Endpoint::zeroed() };
        load(sandbox).run().unwrap().pin(&sandbox.bpffs).unwrap();
        endpoints().put(&ip(1), &endpoint(1)).unwrap();
        endpoints().put(&ip(2), &endpoint(2)).unwrap();
        let mut next = sized(sandbox, &[(map::ENDPOINTS, 512)]).run().unwrap();
        // The CNI binary at work between the copy and the new pin.
        endpoints().put(&ip(3), &endpoint(3)).unwrap();
        endpoints().put(&ip(2), &endpoint(22)).unwrap();
        endpoints().delete(&ip(1)).unwrap();
        next.pin(&sandbox.bpffs).unwrap();
        let mut found: Vec<_> = endpoints().entries().unwrap().into_iter().map(|(_, e)| e.ifindex).collect();
        found.sort_unstable();
        assert_eq!(found, [3, 22]);
        assert_eq!(max_entries(sandbox, map::ENDPOINTS), 512);
    });
}

#[test]
fn an_agent_that_died_before_it_pinned_its_programs_has_changed_nothing() {
    sandbox::run(|sandbox| {
        load(sandbox).run().unwrap().pin(&sandbox.bpffs).unwrap();
        let (id, old) = (map_id(sandbox, TABLE), connections(&sandbox.bpffs));
        old.put(&tuple(1), &seen_at(1)).unwrap();
        // As after step 2 and half of step 3: the earlier map is in `old`, and another one has its
        // pin.
        let dir = sandbox.bpffs.join("old");
        std::fs::create_dir(&dir).unwrap();
        std::fs::rename(sandbox.bpffs.join(TABLE), dir.join(TABLE)).unwrap();
        let other = Layout { max_entries: 8192, ..layout(&dir.join(TABLE)) };
        sys::obj_pin(&sandbox.bpffs.join(TABLE), sys::map_create(TABLE, other).unwrap().as_fd()).unwrap();
        std::fs::create_dir(sandbox.bpffs.join("next")).unwrap();

        let mut next = load(sandbox).run().unwrap();
        next.pin(&sandbox.bpffs).unwrap();
        assert_eq!(map_id(sandbox, TABLE), id);
        assert_eq!(connections(&sandbox.bpffs).get(&tuple(1)).unwrap(), Some(seen_at(1)));
        next.clear_leftovers(&sandbox.bpffs).unwrap();
        assert_tidy(sandbox);
    });
}

#[test]
fn an_agent_that_died_while_it_swapped_the_hooks_is_followed_by_one_that_goes_on() {
    sandbox::run(|sandbox| {
        load(sandbox).run().unwrap().pin(&sandbox.bpffs).unwrap();
        let old = connections(&sandbox.bpffs);
        old.put(&tuple(1), &seen_at(1)).unwrap();
        old.put(&tuple(2), &seen_at(2)).unwrap();
        sized(sandbox, &[(TABLE, 8192)]).run().unwrap().pin(&sandbox.bpffs).unwrap();
        let new = connections(&sandbox.bpffs);
        new.put(&tuple(2), &seen_at(22)).unwrap();
        // On the hooks that were not swapped yet, old programs go on.
        old.put(&tuple(3), &seen_at(3)).unwrap();

        // The size that was configured meanwhile has to wait.
        let mut next = sized(sandbox, &[(TABLE, 16384)]).run().unwrap();
        next.pin(&sandbox.bpffs).unwrap();
        assert_eq!(max_entries(sandbox, TABLE), 8192);
        next.catch_up().unwrap();
        for (port, seen) in [(1, 1), (2, 22), (3, 3)] {
            assert_eq!(connections(&sandbox.bpffs).get(&tuple(port)).unwrap(), Some(seen_at(seen)));
        }
        next.clear_leftovers(&sandbox.bpffs).unwrap();
        assert_tidy(sandbox);
    });
}

/// A socket that connects between the copy and the swap has its entry in the earlier table.
#[test]
fn sockets_of_the_old_programs_are_copied_when_the_last_of_them_is_gone() {
    sandbox::run(|sandbox| {
        load(sandbox).run().unwrap().pin(&sandbox.bpffs).unwrap();
        let open = || Map::<SocketKey, Asked>::open(&sandbox.bpffs, map::SOCK_REV).unwrap();
        let socket = |cookie| SocketKey { cookie, ..SocketKey::zeroed() };
        let asked = |port| Asked { port, ..Asked::zeroed() };
        let old = open();
        (1..100).for_each(|cookie| old.put(&socket(cookie), &asked(1)).unwrap());
        let mut next = sized(sandbox, &[(map::SOCK_REV, 2048)]).run().unwrap();
        next.pin(&sandbox.bpffs).unwrap();
        let new = open();
        assert_eq!((new.max_entries(), new.len().unwrap()), (2048, 99));
        old.put(&socket(100), &asked(2)).unwrap();
        // One that has connected again.
        new.put(&socket(7), &asked(3)).unwrap();
        assert_eq!(next.catch_up().unwrap(), 0, "no connections");
        let found = [7, 8, 100].map(|cookie| new.get(&socket(cookie)).unwrap());
        assert_eq!(found, [3, 1, 2].map(|port| Some(asked(port))));
        next.clear_leftovers(&sandbox.bpffs).unwrap();
        assert_tidy(sandbox);
    });
}

#[test]
fn agents_with_other_sizes_follow_each_other() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(agents_with_other_sizes(sandbox));
    });
}

async fn agents_with_other_sizes(sandbox: &Sandbox) {
    let sizes = [["512", "2048"], ["1024", "4096"], ["256", "1024"], ["256", "2048"]];
    for [services_size, backends] in sizes {
        let args = [&*format!("--service-entries={services_size}"), &format!("--backend-entries={backends}")];
        let agent = Agent::start_ready(sandbox.config(&args), [make_own_node()].into_iter().chain(web(3))).await;
        assert_eq!(max_entries(sandbox, map::SVC4).to_string(), services_size);
        assert_eq!(max_entries(sandbox, map::BACKENDS).to_string(), backends);
        assert_eq!(services(&sandbox.bpffs).unwrap().len(), 2, "the port and the wildcard");
        assert_tidy(sandbox);
        agent.stop().await;
    }
}

/// An upgrade that a broken hook holds up holds up no services.
#[test]
fn services_follow_their_events_while_an_upgrade_is_held_up() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(async {
            Agent::start_ready(sandbox.config(&["--service-entries=512"]), [make_own_node()]).await.stop().await;
            let odd = sandbox.bpffs.join(LINKS_DIR).join("odd");
            std::fs::create_dir(&odd).unwrap();
            let next = Agent::start(sandbox.config(&["--service-entries=1024"]));
            next.send_all([make_own_node()].into_iter().chain(web(3))).await;
            let is_served = || services(&sandbox.bpffs).is_ok_and(|all| all.len() == 2);
            wait_until("the service is there", is_served).await;
            assert!(next.health.readiness().is_err(), "the upgrade is not over");
            std::fs::remove_dir(&odd).unwrap();
            next.ready().await;
            assert_tidy(sandbox);
            next.stop().await;
        });
    });
}

/// Maps that agents of v1 do not know.
fn own() -> impl Iterator<Item = &'static str> {
    map::ALL.into_iter().filter(|name| !v1::SHARED.contains(name))
}

/// A table of connections of v1.
type V1Connections = Map<Tuple<Ip4>, v1::CtEntry<Ip4>>;

fn v1_half(to: Tuple<Ip4>, flags: u16, seen: u32) -> v1::CtEntry<Ip4> {
    v1::CtEntry { to, flags, seen, ..v1::CtEntry::zeroed() }
}

/// A connection that nothing translates.
fn v1_connect(table: &V1Connections, asks: Tuple<Ip4>, seen: u32) {
    table.put(&asks, &v1_half(asks, 0, seen)).unwrap();
    table.put(&asks.reversed(), &v1_half(asks.reversed(), v1::flags::REPLY, seen)).unwrap();
}

/// Leaves what an agent of v1 leaves: pinned programs that use none of this release's maps, and the
/// maps of v1. One service with a backend, and one connection.
fn v1_node(sandbox: &Sandbox) -> V1Connections {
    load(sandbox).run().unwrap().pin(&sandbox.bpffs).unwrap();
    own().for_each(|name| std::fs::remove_file(sandbox.bpffs.join(name)).unwrap());
    for v1::Shape { name, kind, key_size, value_size, flags } in v1::RETIRED {
        let layout = Layout { kind, key_size, value_size, max_entries: 512, flags };
        sys::obj_pin(&sandbox.bpffs.join(name), sys::map_create(name, layout).unwrap().as_fd()).unwrap();
    }
    let backends: Map<u32, v1::Backend> = Map::open(&sandbox.bpffs, v1::map::BACKENDS).unwrap();
    let backend = v1::Backend { addr: std::net::IpAddr::from([10, 1, 2, 1]).into(), port: 8080, flags: 0, id: 99 };
    backends.put(&5, &backend).unwrap();
    let services: Map<SvcKey<Ip4>, v1::SvcEntry> = Map::open(&sandbox.bpffs, v1::map::SVC4).unwrap();
    let vip = SvcKey { vip: Ip4 { ip: [10, 96, 0, 10] }, port: 80, proto: proto::TCP, scope: 0 };
    services.put(&vip, &v1::SvcEntry { first: 5, count: 1, id: 3, affinity: 0, flags: 0, pad: 0 }).unwrap();
    let table = Map::open(&sandbox.bpffs, v1::map::CT4).unwrap();
    v1_connect(&table, tuple(1), 100);
    table
}

#[test]
fn maps_of_v1_pass_to_the_present_ones_and_back() {
    sandbox::run(|sandbox| {
        let old = v1_node(sandbox);
        let mut bridge = load(sandbox).run().unwrap();
        assert_eq!(bridge.bridge(), Bridge::V1);
        assert!(!sandbox.bpffs.join(TABLE).exists(), "a load pins nothing");
        bridge.pin(&sandbox.bpffs).unwrap();
        assert_eq!(names(&sandbox.bpffs.join("old")).len(), v1::RETIRED.len());
        let snapshot = BpfMaps::open(&sandbox.bpffs).unwrap().snapshot().unwrap();
        let entry = snapshot.services.values().next().unwrap();
        let backends: Vec<_> = snapshot.backends_of(entry).flatten().map(|b| (b.addr, b.port, b.service)).collect();
        assert_eq!(backends, [(std::net::IpAddr::from([10, 1, 2, 1]).into(), 8080, 3)]);
        assert_eq!(connections(&sandbox.bpffs).len().unwrap(), 1);

        v1_connect(&old, tuple(2), 101);
        assert_eq!(bridge.catch_up().unwrap(), 1);
        bridge.clear_leftovers(&sandbox.bpffs).unwrap();
        load(sandbox).run_without_bridge().unwrap().pin(&sandbox.bpffs).unwrap();
        assert_tidy(sandbox);

        let sizes = v1::RETIRED.map(|shape| (shape.name.to_owned(), 256)).into();
        let mut export = load(sandbox).run_for_v1(&sizes).unwrap().unwrap();
        export.pin(&sandbox.bpffs).unwrap();
        assert_tidy(sandbox);
        export.finish_export(&sandbox.bpffs).unwrap();
        let table: V1Connections = Map::open(&sandbox.bpffs, v1::map::CT4).unwrap();
        assert_eq!((table.len().unwrap(), max_entries(sandbox, v1::map::CT4)), (4, 256));

        // No agent of v1 came.
        let mut next = load(sandbox).run().unwrap();
        assert_eq!((next.bridge(), next.has_leftovers()), (Bridge::None, true));
        next.pin(&sandbox.bpffs).unwrap();
        assert_eq!(next.catch_up().unwrap(), 0);
        next.clear_leftovers(&sandbox.bpffs).unwrap();
        assert_tidy(sandbox);
    });
}

/// The mark with which a packet leaves a program that it reaches with this one. Of what is not IP a hook looks at nothing else.
fn mark_behind(programs: &Programs, name: &str, mark: u32) -> u32 {
    // `struct __sk_buff`, of which the mark is the third word.
    let mut context = [0; 48];
    context[2] = mark;
    let run = TestRun { packet: &[0; 64], context: &mut context, repeat: 1, ..TestRun::default() };
    sys::test_run(programs.get(name).unwrap(), run).unwrap();
    context[2]
}

#[test]
fn a_bridge_knows_the_mark_of_either_side() {
    sandbox::run(|sandbox| {
        v1_node(sandbox);
        let bridge = load(sandbox).run().unwrap();
        assert_eq!(bridge.bridge(), Bridge::V1);
        let store = NodeConfigStore::open(bridge.maps_dir(&sandbox.bpffs)).unwrap();
        let ours = NodeConfig { mark: mark::DEFAULT, mark_mask: mark::DEFAULT_MASK, ..NodeConfig::zeroed() };
        // An agent of v1 writes the uplink's index and its MTU there.
        let theirs = NodeConfig { mark: 1500, mark_mask: 2, ..NodeConfig::zeroed() };
        for (config, marks) in [(ours, &[v1::MARK, mark::DEFAULT, v1::MARK | mark::DEFAULT][..]), (theirs, &[v1::MARK])]
        {
            store.write(&config).unwrap();
            for program in ["to_pod", "uplink_in", "uplink_out"] {
                for mark in marks {
                    assert_eq!(
                        mark_behind(&bridge, program, mark | 1 << 30),
                        1 << 30,
                        "{program} {mark:#x} {config:?}"
                    );
                }
            }
        }
        let present = load(sandbox).run_without_bridge().unwrap();
        let store = NodeConfigStore::open(present.maps_dir(&sandbox.bpffs)).unwrap();
        store.write(&ours).unwrap();
        assert_eq!(mark_behind(&present, "to_pod", v1::MARK), v1::MARK, "it is another's without a bridge");
    });
}

/// An agent of v1 replaces the pins of its own programs alone: `side_in` stays pinned, with the maps of this release.
#[test]
fn a_program_that_v1_lacks_does_not_make_our_maps_live() {
    sandbox::run(|sandbox| {
        load(sandbox).run().unwrap().pin(&sandbox.bpffs).unwrap();
        connections(&sandbox.bpffs).put(&tuple(7), &seen_at(7)).unwrap();
        let kept = sandbox.bpffs.join("kept");
        std::fs::create_dir(&kept).unwrap();
        let pins = [program_path(&sandbox.bpffs, SIDE_IN), sandbox.bpffs.join(TABLE)];
        let aside = ["program", "table"].map(|name| kept.join(name));
        pins.iter().zip(&aside).for_each(|(pin, aside)| std::fs::rename(pin, aside).unwrap());
        v1_node(sandbox);
        pins.iter().zip(&aside).for_each(|(pin, aside)| std::fs::rename(aside, pin).unwrap());

        let bridge = load(sandbox).run().unwrap();
        assert_eq!(bridge.bridge(), Bridge::V1);
        let table = connections(bridge.maps_dir(&sandbox.bpffs));
        let keys: Vec<u16> = table.entries().unwrap().iter().map(|(key, _)| key.sport.min(key.dport)).collect();
        assert_eq!(keys, [1], "the connection of v1, and none of before");
    });
}

#[test]
fn our_maps_are_stale_when_an_agent_of_v1_has_run() {
    sandbox::run(|sandbox| {
        v1_node(sandbox);
        let (key_size, value_size) = (size_of::<Tuple<Ip4>>() as u32, size_of::<CtEntry<Ip4>>() as u32);
        let layout = Layout { kind: 9, key_size, value_size, max_entries: 4096, flags: 0 };
        sys::obj_pin(&sandbox.bpffs.join(TABLE), sys::map_create(TABLE, layout).unwrap().as_fd()).unwrap();
        connections(&sandbox.bpffs).put(&tuple(7), &seen_at(7)).unwrap();
        load(sandbox).run().unwrap().pin(&sandbox.bpffs).unwrap();
        let keys: Vec<u16> =
            connections(&sandbox.bpffs).entries().unwrap().iter().map(|(k, _)| k.sport.min(k.dport)).collect();
        assert_eq!(keys, [1], "only what v1 had");
    });
}

#[test]
fn an_agent_follows_one_of_v1_and_leaves_the_node_to_one() {
    sandbox::run(|sandbox| {
        uplink();
        v1_node(sandbox);
        block_on(async {
            for _ in 0..2 {
                let agent = Agent::start_ready(sandbox.config(&[]), [make_own_node()].into_iter().chain(web(1))).await;
                assert_tidy(sandbox);
                agent.stop().await;
                let services: Map<SvcKey<Ip4>, v1::SvcEntry> = Map::open(&sandbox.bpffs, v1::map::SVC4).unwrap();
                assert_eq!(services.len().unwrap(), 2);
                assert_eq!(max_entries(sandbox, v1::map::CT4), 512, "what v1 was configured for");
            }
        });
    });
}
