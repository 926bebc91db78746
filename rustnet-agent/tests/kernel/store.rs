//! The plan's maps on real ones.

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd;
use std::sync::Arc;

use bytemuck::Zeroable as _;
use ipnet::IpNet;
use rustnet_agent::bpf::load::{CLOCK, program_path};
use rustnet_agent::bpf::store::node_config::NodeConfigStore;
use rustnet_agent::bpf::store::{BpfMaps, Map};
use rustnet_agent::bpf::{probe, sys};
use rustnet_agent::ct_gc::Collector;
use rustnet_agent::metrics::{HookCount, KernelStats, MapFill, Metrics};
use rustnet_agent::plan::{Maps, VipKey, Write};
use rustnet_common::addr::{Addr, Ip4};
use rustnet_common::backend::{Backend, id};
use rustnet_common::config::{NodeConfig, flags, meaning};
use rustnet_common::conntrack::CtEntry;
use rustnet_common::names::map;
use rustnet_common::peer::Peer;
use rustnet_common::service::SvcEntry;
use rustnet_common::tuple::{Tuple, proto};

use crate::load::load;
use crate::sandbox::{self, wait_until};

fn vip(ip: &str, port: u16) -> VipKey {
    VipKey { ip: ip.parse().unwrap(), port, proto: 6, scope: 0 }
}

fn entry(first: u32, count: u32) -> SvcEntry {
    SvcEntry { first, count, id: 1 + first, affinity: 0, flags: 0, table: 0 }
}

/// The first backend of a slot.
fn backend(slot: u32, service: u32) -> Backend {
    Backend {
        addr: IpAddr::from([10, 1, 0, 1]).into(),
        port: 8080,
        flags: 0,
        id: id::make(slot, 1),
        service,
        max_service: 0,
    }
}

fn ids(backends: &[Backend]) -> Vec<u32> {
    backends.iter().map(|b| b.id).collect()
}

fn peer(node: &str) -> Peer {
    Peer { node: Addr::from(node.parse::<IpAddr>().unwrap()), identity: 3, flags: 4, pad: 0 }
}

#[test]
fn writes_of_both_families_are_read_back_and_deleted() {
    sandbox::run(|sandbox| {
        load(sandbox).run().unwrap().pin(&sandbox.bpffs).unwrap();
        let mut maps = BpfMaps::open(&sandbox.bpffs).unwrap();
        let (four, six) = (vip("10.96.0.1", 80), vip("fd00:96::1", 80));
        let (net4, net6): (IpNet, IpNet) = ("10.1.2.0/24".parse().unwrap(), "fd00:2::/64".parse().unwrap());
        let (two, one) = (vec![backend(20, 11), backend(0, 11)], vec![backend(3, 13)]);
        let writes = [
            Write::PutPeer { prefix: net4, peer: peer("192.0.2.2") },
            Write::PutPeer { prefix: net6, peer: peer("2001:db8::2") },
            Write::Backends { backends: two.clone() },
            Write::BackendIds { first: 10, ids: ids(&two) },
            Write::PutService { key: four, entry: entry(10, 2) },
            Write::Backends { backends: one.clone() },
            Write::BackendIds { first: 12, ids: ids(&one) },
            Write::PutService { key: six, entry: entry(12, 1) },
            Write::PutService { key: VipKey::wildcard(four.ip), entry: SvcEntry { flags: 2, ..entry(0, 0) } },
        ];
        maps.apply(&writes).unwrap();
        let snapshot = BpfMaps::open(&sandbox.bpffs).unwrap().snapshot().unwrap();
        assert_eq!(snapshot.services.len(), 3);
        assert_eq!(snapshot.services[&four], entry(10, 2));
        assert_eq!(snapshot.services[&six], entry(12, 1));
        assert_eq!((snapshot.ids.len(), snapshot.backends.len()), (13, 21));
        assert_eq!(snapshot.backends_of(&entry(10, 2)).flatten().copied().collect::<Vec<_>>(), two);
        assert_eq!(snapshot.backends_of(&entry(12, 1)).flatten().copied().collect::<Vec<_>>(), one);
        assert_eq!(snapshot.peers.len(), 2);
        assert_eq!((snapshot.peers[&net4], snapshot.peers[&net6]), (peer("192.0.2.2"), peer("2001:db8::2")));

        maps.apply(&[
            Write::DeleteService { key: four },
            Write::DeleteService { key: vip("10.96.0.9", 1) },
            Write::ClearBackends { ids: ids(&two) },
            Write::DeletePeer { prefix: net6 },
        ])
        .unwrap();
        let snapshot = maps.snapshot().unwrap();
        assert_eq!((snapshot.backends[0], snapshot.backends[3]), (two[1].left(), one[0]));
        assert_eq!(snapshot.services.len(), 2);
        assert_eq!(snapshot.peers.keys().collect::<Vec<_>>(), [&net4]);
        assert_eq!((maps.backend_capacity(), maps.service_capacity(), maps.peer_capacity()), (4096, 4096, 4096));
    });
}

#[test]
fn backends_beyond_the_array_are_refused_before_their_service_is_written() {
    sandbox::run(|sandbox| {
        load(sandbox).run().unwrap().pin(&sandbox.bpffs).unwrap();
        let mut maps = BpfMaps::open(&sandbox.bpffs).unwrap();
        let key = vip("10.96.0.1", 80);
        let backends = vec![backend(4094, 4096), backend(4095, 4096)];
        let put = Write::PutService { key, entry: entry(4095, 2) };
        for writes in [
            vec![Write::Backends { backends: vec![backend(4096, 1)] }, put.clone()],
            vec![
                Write::Backends { backends: backends.clone() },
                Write::BackendIds { first: 4095, ids: ids(&backends) },
                put,
            ],
        ] {
            assert!(maps.apply(&writes).unwrap_err().to_string().contains("4096 slots"));
            assert!(maps.snapshot().unwrap().services.is_empty());
        }
    });
}

#[test]
fn maps_that_a_later_release_has_written_are_refused() {
    sandbox::run(|sandbox| {
        load(sandbox).run().unwrap().pin(&sandbox.bpffs).unwrap();
        let store = NodeConfigStore::open(&sandbox.bpffs).unwrap();
        let config = NodeConfig { vni: 7, flags: flags::MASQUERADE, ..store.read().unwrap() };
        store.write(&config).unwrap();
        assert_eq!(store.read().unwrap(), config);
        let later = config.with_meaning(meaning::PRESENT + 1);
        Map::<u32, NodeConfig>::open(&sandbox.bpffs, map::CONFIG).unwrap().put(&0, &later).unwrap();
        let error = NodeConfigStore::open(&sandbox.bpffs).err().unwrap().to_string();
        assert!(error.contains("rn_config") && error.contains("later release") && error.contains("cleanup"), "{error}");
    });
}

/// `cargo test -p rustnet-agent --test kernel -- --ignored --nocapture hundred_thousand`
#[test]
#[ignore = "prints a figure"]
fn a_hundred_thousand_services() {
    sandbox::run(|sandbox| {
        let mut load = load(sandbox);
        load.sizes.extend([
            (map::SVC4.to_owned(), 131_072),
            (map::BACKEND_IDS.to_owned(), 524_288),
            (map::BACKENDS.to_owned(), 524_288),
        ]);
        load.run().unwrap().pin(&sandbox.bpffs).unwrap();
        let mut maps = BpfMaps::open(&sandbox.bpffs).unwrap();
        let writes: Vec<Write> = (0..100_000_u32)
            .flat_map(|i| {
                let ip = IpAddr::from([10, 96 + (i >> 16) as u8, (i >> 8) as u8, i as u8]);
                let key = VipKey { ip, port: 80, proto: 6, scope: 0 };
                let backends: Vec<_> = (0..3).map(|b| backend(i * 3 + b, 1 + i * 3)).collect();
                let ids = Write::BackendIds { first: i * 3, ids: ids(&backends) };
                [Write::Backends { backends }, ids, Write::PutService { key, entry: entry(i * 3, 3) }]
            })
            .collect();
        let start = std::time::Instant::now();
        maps.apply(&writes).unwrap();
        println!("100,000 services x 3 backends written in {:?}", start.elapsed());
        let start = std::time::Instant::now();
        assert_eq!(maps.snapshot().unwrap().services.len(), 100_000);
        println!("read back in {:?}", start.elapsed());
    });
}

/// Knows of one map.
struct OneMap;

impl KernelStats for OneMap {
    fn counters(&self) -> Vec<HookCount> {
        Vec::new()
    }

    fn maps(&self) -> Vec<MapFill> {
        vec![MapFill { name: map::CT4_ANY, used: 7, max: 8 }]
    }
}

/// Before, sweeps waited for a thread of the pool that scrapes and look-ups of names share.
#[test]
fn old_connections_are_collected_while_the_pool_of_threads_is_taken() {
    sandbox::run(|sandbox| {
        load(sandbox).run().unwrap().pin(&sandbox.bpffs).unwrap();
        let clock = sys::obj_get(&program_path(&sandbox.bpffs, CLOCK)).unwrap();
        let (now, hz) = (probe::jiffies(clock.as_fd()).unwrap(), probe::hz().unwrap());
        let table = Map::<Tuple<Ip4>, CtEntry<Ip4>>::open(&sandbox.bpffs, map::CT4_ANY).unwrap();
        let src = Ipv4Addr::new(10, 0, 0, 2).into();
        let key = Tuple { src, proto: proto::UDP, ..Tuple::zeroed() };
        table.put(&key, &CtEntry { seen: now.wrapping_sub(hz * 3600) & 0x7fff_ffff, ..CtEntry::zeroed() }).unwrap();

        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(1).max_blocking_threads(1).enable_all().build().unwrap();
        let (free, taken) = std::sync::mpsc::channel::<()>();
        runtime.spawn_blocking(move || taken.recv());
        let (stop, shutdown) = tokio::sync::watch::channel(false);
        let metrics = Metrics::default();
        metrics.set_kernel_stats(Arc::new(OneMap));
        let collector = Collector::open(&sandbox.bpffs, clock, hz).unwrap();
        let running = runtime.spawn(collector.run(metrics.clone(), shutdown));
        wait_until("the old entry is gone", || table.get(&key).unwrap().is_none());
        let counted = || metrics.encode().unwrap().contains("rustnet_map_entries{map=\"rn_ct4_any\"} 7");
        wait_until("the entries are counted", counted);
        stop.send(true).unwrap();
        runtime.block_on(running).unwrap();
        free.send(()).unwrap();
    });
}
