//! Whatever the order of events, with duplicates, outages, relists, restarts and crashes between them: the maps end up as a
//! plain model of the final objects says, and at no time does a service have anything but its old or its new backends.

mod cluster;
mod oracle;

use cluster::{Cluster, Object, Ref};
use oracle::{Key, Table, expected, serving};
use proptest::prelude::*;
use proptest::sample::{Index as Pick, select};
use rustnet_agent::config::{Algorithm, Forwarding, Routing};
use rustnet_agent::host::{DefaultRoute, Device, DeviceAddress, DeviceKind, HostFacts};
use rustnet_agent::index::{Gate, Index, Settings};
use rustnet_agent::model::Family;
use rustnet_agent::plan::{Capacity, GRACE, MemoryMaps, Planner, VipKey, Write, verify};
use rustnet_agent::source::convert::Converter;
use rustnet_agent::source::{Event, Kind};
use rustnet_common::backend::id;
use rustnet_common::maglev::UNIT;
use rustnet_common::tuple::proto::UDP;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

/// Enough for every set of backends that the small cluster can have, several times over.
const SLOTS: u32 = 1024;
/// Words of Maglev tables: some hundred tables, of which most wait to be written again.
const TABLE_WORDS: u32 = 128 * UNIT;

/// One thing that happens.
#[derive(Clone, Debug)]
enum Step {
    /// An object is made or changed, and the watch says so, perhaps more than once.
    Apply(Object, u8),
    /// An object is deleted, and the watch says so.
    Delete(Pick),
    /// The watch of everything is interrupted, objects change meanwhile, and fresh lists follow in some order.
    Outage(Vec<Change>, u64),
    /// A late copy of an object as it is now.
    Again(Pick),
    /// The maps are brought up to date, after some milliseconds.
    Sync(u8),
    /// The same, but it is cut short after some steps; then it is done again, by this agent or by a new one.
    Crash { after: u8, restart: bool, seed: u64 },
    /// A new agent on the same maps. Objects may have changed while there was none.
    Restart(Vec<Change>, u64),
}

/// A change that no event reported.
#[derive(Clone, Debug)]
enum Change {
    Apply(Object),
    Delete(Pick),
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![3 => cluster::object().prop_map(Change::Apply), 1 => any::<Pick>().prop_map(Change::Delete)]
}

fn step() -> impl Strategy<Value = Step> {
    let changes = || prop::collection::vec(change(), 0..6);
    prop_oneof![
        12 => (cluster::object(), 1..3u8).prop_map(|(object, times)| Step::Apply(object, times)),
        3 => any::<Pick>().prop_map(Step::Delete),
        1 => (changes(), any::<u64>()).prop_map(|(changes, seed)| Step::Outage(changes, seed)),
        1 => any::<Pick>().prop_map(Step::Again),
        5 => any::<u8>().prop_map(Step::Sync),
        2 => (0..12u8, any::<bool>(), any::<u64>()).prop_map(|(after, restart, seed)| Step::Crash { after, restart, seed }),
        1 => (changes(), any::<u64>()).prop_map(|(changes, seed)| Step::Restart(changes, seed)),
    ]
}

/// The agent and the world around it.
struct World {
    settings: Settings,
    cluster: Cluster,
    index: Index,
    planner: Planner,
    maps: MemoryMaps,
    now: Duration,
    converter: Converter,
    /// UDP flows that clients may have, by backend id and by what they asked for: where they were led.
    flows: BTreeMap<(u32, Key), (IpAddr, u16)>,
    /// Numbers that ports with backends have had: none is given to another port of another Service.
    numbers: BTreeMap<u32, (BTreeSet<Key>, BTreeSet<String>)>,
    /// Numbers and entries that an agent has found at its start.
    adopted: BTreeSet<(u32, Key)>,
}

impl World {
    fn new(settings: Settings) -> Self {
        let maps = MemoryMaps::new(SLOTS).with_tables(TABLE_WORDS);
        let mut world = Self {
            index: index(settings.clone()),
            settings,
            cluster: Cluster::default(),
            planner: Planner::adopt(&maps).unwrap(),
            maps,
            now: Duration::ZERO,
            converter: Converter::new(),
            flows: BTreeMap::new(),
            numbers: BTreeMap::new(),
            adopted: BTreeSet::new(),
        };
        for kind in Kind::ALL {
            world.index.handle(Event::Synced(kind));
        }
        world
    }

    fn tell(&mut self, reference: &Ref) {
        let event = match self.cluster.get(reference) {
            Some(object) => object.event(&mut self.converter),
            None => reference.deleted(),
        };
        self.index.handle(event);
    }

    fn pick(&self, pick: Pick) -> Option<Ref> {
        let all: Vec<&Ref> = self.cluster.keys().collect();
        (!all.is_empty()).then(|| pick.get(&all).to_owned().clone())
    }

    fn change(&mut self, changes: Vec<Change>) {
        for change in changes {
            match change {
                Change::Apply(object) => {
                    self.cluster.insert(object.reference(), object);
                }
                Change::Delete(pick) => {
                    if let Some(reference) = self.pick(pick) {
                        self.cluster.remove(&reference);
                    }
                }
            }
        }
    }

    /// Fresh lists of all kinds, in an order that the seed decides.
    fn relist(&mut self, seed: u64, announce: bool) {
        let mut refs: Vec<Ref> = self.cluster.keys().cloned().collect();
        refs.sort_by_cached_key(|reference| reference.scrambled(seed));
        if announce {
            for kind in Kind::REQUIRED {
                self.index.handle(Event::Restart(kind));
            }
        }
        for reference in &refs {
            self.tell(reference);
        }
        let mut kinds = Kind::REQUIRED;
        kinds.rotate_left((seed % 3) as usize);
        for kind in kinds {
            // What waits for a kind that is not complete is not written, let alone pruned.
            if !self.index.synced() {
                let before = self.maps.held().clone();
                self.sync().unwrap();
                let held = self.maps.held();
                assert!(self.index.is_open(Gate::Services) || held.services == before.services);
                assert!(self.index.is_open(Gate::Peers) || held.peers == before.peers);
            }
            self.index.handle(Event::Synced(kind));
        }
        self.index.handle(Event::Synced(Kind::ServiceCidr));
    }

    /// A new agent finds the maps as they are.
    fn restart(&mut self, seed: u64) {
        self.index = index(self.settings.clone());
        // What an entry without backends was called, its next ones may be called.
        for (key, entry) in &self.maps.held().services {
            let key = (key.ip, key.port, key.proto, key.scope);
            self.adopted.insert((entry.id, key));
        }
        self.planner = Planner::adopt(&self.maps).unwrap();
        self.relist(seed, false);
    }

    fn sync(&mut self) -> anyhow::Result<()> {
        self.now += Duration::from_millis(1);
        self.maps.set_now(self.now);
        let done = self.planner.sync(&mut self.index, &mut self.maps, self.now);
        // As the programs do.
        let held = self.maps.held();
        self.flows.retain(|(id, key), _| {
            let vip = VipKey { ip: key.0, port: key.1, proto: key.2, scope: key.3 };
            let backend = held.backends.get(id::slot_of(*id) as usize).filter(|backend| backend.serves(*id));
            held.services.get(&vip).is_some_and(|entry| backend.is_some_and(|it| it.service == entry.id))
        });
        for (key, entry) in self.maps.held().services.iter().filter(|(key, _)| key.proto == UDP) {
            for b in self.maps.backends(entry) {
                self.flows.insert((b.id, (key.ip, key.port, key.proto, key.scope)), (b.addr.into(), b.port));
            }
        }
        for (key, entry) in self.maps.held().services.iter().filter(|(_, entry)| entry.count > 0) {
            let key = (key.ip, key.port, key.proto, key.scope);
            let vip = VipKey { ip: key.0, port: key.1, proto: key.2, scope: key.3 };
            let owner = self.index.owner(&vip).map(|(name, port)| format!("{name} {}/{}", port.port, port.proto));
            let (keys, owners) = self.numbers.entry(entry.id).or_default();
            let is_known = self.adopted.contains(&(entry.id, key))
                || keys.is_empty()
                || keys.contains(&key)
                || owner.as_ref().is_some_and(|it| owners.contains(it));
            assert!(is_known, "number {} of {key:?}, {owner:?} was of {keys:?}, {owners:?}", entry.id);
            keys.insert(key);
            owners.extend(owner);
        }
        done.map(|_| ())
    }

    /// No client is led to a backend that serves no more, unless there is none at all that does.
    fn flows_are_alive(&self) {
        for ((_, key), target) in &self.flows {
            let alive = serving(&self.cluster, &self.settings, *key);
            let known = self.table().has(*key);
            assert!(known && (alive.is_empty() || alive.contains(target)), "{key:?} still leads to {target:?}");
        }
    }

    /// What packets meet.
    fn table(&self) -> Table {
        Table::of(&self.maps)
    }

    fn step(&mut self, step: Step) -> anyhow::Result<()> {
        match step {
            Step::Apply(object, times) => {
                let reference = object.reference();
                self.cluster.insert(reference.clone(), object);
                for _ in 0..times {
                    self.tell(&reference);
                }
            }
            Step::Delete(pick) => {
                if let Some(reference) = self.pick(pick) {
                    self.cluster.remove(&reference);
                    self.tell(&reference);
                }
            }
            Step::Again(pick) => {
                if let Some(reference) = self.pick(pick) {
                    self.tell(&reference);
                }
            }
            Step::Outage(changes, seed) => {
                self.change(changes);
                self.relist(seed, true);
            }
            Step::Sync(later) => {
                self.now += Duration::from_millis(later.into());
                self.sync()?;
            }
            Step::Crash { after, restart, seed } => {
                let before = self.table();
                self.maps.crash_after(after.into());
                let crashed = self.sync().is_err();
                let between = self.table();
                self.maps.repair();
                if restart {
                    self.restart(seed);
                }
                self.now += GRACE;
                self.sync()?;
                let after = self.table();
                if crashed {
                    between.is_old_or_new(&before, &after);
                } else {
                    assert_eq!(between, after);
                }
            }
            Step::Restart(changes, seed) => {
                self.change(changes);
                self.restart(seed);
            }
        }
        Ok(())
    }
}

const FAMILIES: [Option<Family>; 3] = [None, Some(Family::V4), Some(Family::V6)];

fn settings() -> impl Strategy<Value = Settings> {
    let algorithm = select(vec![Algorithm::Random, Algorithm::Maglev]);
    let forwarding = select(&Forwarding::ALL[..]);
    let how = (algorithm, forwarding);
    (select(&Routing::ALL[..]), select(&FAMILIES[..]), any::<bool>(), any::<bool>(), how).prop_map(
        |(routing, overlay_family, no_masquerade, has_host_sockets, (lb_algorithm, forwarding))| Settings {
            node_name: "n1".into(),
            routing,
            uplinks: Vec::new(),
            overlay_family,
            pod_cidrs: Vec::new(),
            no_masquerade: if no_masquerade { vec!["172.18.0.0/24".parse().unwrap()] } else { Vec::new() },
            has_host_sockets,
            service_cidrs: vec!["10.96.0.0/16".parse().unwrap()],
            node_ports: Vec::new(),
            lb_algorithm,
            maglev_table_size: 251,
            forwarding,
        },
    )
}

fn index(settings: Settings) -> Index {
    let mut index = Index::new(settings);
    index.set_host(host());
    index
}

/// Networks of this node's uplink, with its addresses there.
pub const LINKS: [&str; 3] = ["192.0.2.1/32", "172.18.0.15/30", "fd00:18::f/124"];

/// A host with one device.
fn host() -> HostFacts {
    let address = |net: &str| DeviceAddress { net: net.parse().unwrap(), is_usable: true, is_preferred: true };
    let eth0 = Device {
        index: 2,
        name: "eth0".into(),
        mtu: 1500,
        kind: DeviceKind::Ethernet,
        addresses: LINKS.map(address).into(),
        on_link: Vec::new(),
    };
    let defaults = vec![DefaultRoute { family: Family::V4, metric: 0, device: 2 }];
    HostFacts { devices: vec![eth0], defaults }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, max_shrink_iters: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn any_history_ends_in_the_plain_models_maps(settings in settings(), steps in prop::collection::vec(step(), 1..60)) {
        let mut world = World::new(settings);
        for step in steps {
            world.step(step).unwrap();
        }
        world.now += GRACE;
        world.sync().unwrap();
        prop_assert_eq!(world.table(), expected(&world.cluster, &world.settings));
        prop_assert_eq!(world.planner.problems(&world.index), []);
        world.flows_are_alive();
        Table::check_tables(&world.maps);
        // Nothing is left to do, for this agent and for the next one, and a comparison finds nothing.
        world.restart(2);
        let room = Capacity { services: u32::MAX, backends: SLOTS, table_words: TABLE_WORDS, peers: u32::MAX, source_ranges: u32::MAX };
        prop_assert_eq!(verify(&mut world.index, world.maps.held(), room), []);
        world.restart(1);
        let plan = world.planner.plan(&mut world.index, world.now);
        let harmless = |write: &_| matches!(write, Write::EndBackends { .. } | Write::ClearBackends { .. });
        prop_assert!(plan.writes.iter().all(harmless), "{:?}", plan.writes);
    }

    /// An emptied cluster leaves no entry, and every slot is free again.
    #[test]
    fn nothing_is_left_behind(settings in settings(), steps in prop::collection::vec(step(), 1..40)) {
        let mut world = World::new(settings);
        for step in steps {
            world.step(step).unwrap();
        }
        let all: BTreeSet<Ref> = world.cluster.keys().cloned().collect();
        for reference in all {
            world.cluster.remove(&reference);
            world.tell(&reference);
        }
        world.sync().unwrap();
        prop_assert_eq!(world.maps.held().services.len(), 0);
        prop_assert_eq!(world.table(), expected(&world.cluster, &world.settings));
        // Each backend is cleared in the end.
        for _ in 0..3 {
            world.now += GRACE;
            world.sync().unwrap();
        }
        prop_assert!(world.maps.held().backends.iter().all(|b| b.id == 0), "{:?}", world.maps.held().backends);
        // One service that needs the whole array gets it, once every slot has had its time.
        for object in cluster::of_every_slot(SLOTS) {
            world.index.handle(object);
        }
        for _ in 0..5 {
            world.now += GRACE;
            world.sync().unwrap();
        }
        prop_assert_eq!(world.planner.problems(&world.index), []);
    }
}
