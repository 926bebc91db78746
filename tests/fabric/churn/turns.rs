//! Endpoints of Services change as fast as the maps follow, under traffic: order, not time, says who may answer.

use super::{PAUSE, nothing_lost, traffic, vips};
use crate::fixture::{Net, SERVICE_PORT, SMALL_TABLES, endpoints, figure, observed};
use anyhow::{Context, Result, anyhow, ensure};
use rustnet_agent::bpf::store::Map;
use rustnet_agent::bpf::store::backends::Backends;
use rustnet_agent::bpf::store::memory::Access;
use rustnet_common::addr::{Ip4, Ip6};
use rustnet_common::names::map;
use rustnet_common::service::{SvcEntry, SvcKey, scope};
use rustnet_common::tuple::proto;
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use testkit::client::{Proto, ask};
use testkit::load::{Kind, Load};
use testkit::manifest::{Endpoint, Service};
use testkit::pod::PORT;
use testkit::{Netns, Node, Setup, wait};

/// Pods that take turns as endpoints of a Service, two at a time, next to one that stays.
const TURNS: usize = 8;
/// Services that change together, as fast as the maps of both nodes follow.
const QUICK: u8 = 8;
/// Changes of each, unless `RUSTNET_ROUNDS` names another number.
const ROUNDS: usize = 40;
/// So many changes of a Service may be on their way to the maps.
const AHEAD: usize = 2;

/// The pods that serve after so many changes, by their numbers.
fn serving(round: usize) -> [usize; 2] {
    [round % TURNS, (round + 1) % TURNS]
}

/// IPv4 and IPv6 entries of a node with their backends, as its programs read them.
struct Entries(Map<SvcKey<Ip4>, SvcEntry>, Map<SvcKey<Ip6>, SvcEntry>, Backends);

impl Entries {
    fn of(node: &Node) -> Result<Self> {
        node.netns().run(|| {
            let bpffs = node.bpffs();
            let backends = Backends::open(&bpffs, Access::Read)?;
            Ok(Self(Map::open(&bpffs, map::SVC4)?, Map::open(&bpffs, map::SVC6)?, backends))
        })?
    }

    /// Where the port of an address leads.
    fn addresses(&self, vip: IpAddr, proto: u8) -> Result<BTreeSet<IpAddr>> {
        let (port, scope) = (SERVICE_PORT, scope::CLUSTER);
        let entry = match vip {
            IpAddr::V4(vip) => self.0.get(&SvcKey { vip: vip.into(), port, proto, scope })?,
            IpAddr::V6(vip) => self.1.get(&SvcKey { vip: vip.into(), port, proto, scope })?,
        };
        let entry = entry.context("no entry")?;
        let backends: Option<BTreeSet<_>> = self.2.of(&entry).map(|backend| Some(backend?.addr.into())).collect();
        backends.context("the range was let go of meanwhile")
    }
}

/// Waits until a Service leads to the endpoints of one of these rounds.
fn wait_for_rounds(node: &Entries, service: &Service, rounds: &[Vec<Endpoint>]) -> Result<()> {
    for vip in &service.vips {
        let like = |endpoints: &Vec<Endpoint>| -> BTreeSet<IpAddr> {
            endpoints.iter().map(|it| it.address).filter(|address| address.is_ipv4() == vip.is_ipv4()).collect()
        };
        let wanted: Vec<_> = rounds.iter().map(like).collect();
        for proto in [proto::TCP, proto::UDP] {
            wait::until(&format!("changes of {}", service.name), || {
                let held = node.addresses(*vip, proto)?;
                ensure!(wanted.contains(&held), "{vip} leads to {held:?}, not to one of {wanted:?}");
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// What a client of Services that change has seen.
#[derive(Debug, Default)]
struct Seen {
    servers: BTreeSet<String>,
    /// Requests that not every pod might answer.
    telling: usize,
}

/// Asks all Services in turn by new connections while rounds are `written`. The pods of [`AHEAD`] rounds before may answer, and
/// those of rounds that are written meanwhile, but none that left before.
fn ask_while_written(from: &Netns, services: &[Service], written: &AtomicUsize, is_over: &AtomicBool) -> Result<Seen> {
    let mut seen = Seen::default();
    while !is_over.load(Ordering::Relaxed) {
        for target in services.iter().flat_map(|it| &it.vips).map(|vip| SocketAddr::new(*vip, SERVICE_PORT)) {
            let before = written.load(Ordering::SeqCst);
            let answers = ask(from, Proto::Tcp, target, 1)?;
            let after = written.load(Ordering::SeqCst);
            answers.all_answered().with_context(|| format!("{target}, round {before} to {after}"))?;
            let rounds = before.saturating_sub(AHEAD)..=after + 1;
            let may: BTreeSet<String> = rounds.flat_map(serving).map(|n| format!("t{n}")).collect();
            for server in answers.by_server.into_keys() {
                let is_allowed = server == "c" || may.contains(&server);
                ensure!(is_allowed, "{target}, round {before} to {after}: {server} answered, not one of {may:?}");
                seen.servers.insert(server);
            }
            seen.telling += usize::from(may.len() < TURNS);
        }
    }
    Ok(seen)
}

/// Endpoints change as fast as the maps follow. A new connection never reaches one that left more than [`AHEAD`] changes before;
/// connections to endpoints that left go on; a Service that does not change loses nothing.
#[test]
fn endpoints_that_left_get_no_new_connection() -> Result<()> {
    observed(&Net::start(Setup { agent: SMALL_TABLES, ..Setup::default() })?, |net| {
        let turns = (0..TURNS).map(|n| net.node(1 + n % 2).add_pod(&format!("t{n}"))).collect::<Result<Vec<_>>>()?;
        let endpoints_of = |round: usize| {
            let [first, second] = serving(round);
            endpoints(&[&net.c, &turns[first], &turns[second]])
        };
        let nodes = net.fabric.nodes().iter().map(Entries::of).collect::<Result<Vec<_>>>()?;
        let services: Vec<Service> =
            (1..=QUICK).map(|n| Service::new(&format!("quick-{n}"), &vips(5, n), SERVICE_PORT, PORT)).collect();
        let write = |round: usize| {
            services.iter().try_for_each(|service| {
                let service = Service { endpoints: endpoints_of(round), ..service.clone() };
                net.fabric.manifests().apply(&service)
            })
        };
        let wait = |rounds: RangeInclusive<usize>| {
            let rounds: Vec<_> = rounds.map(endpoints_of).collect();
            nodes.iter().try_for_each(|node| services.iter().try_for_each(|it| wait_for_rounds(node, it, &rounds)))
        };
        write(0)?;
        wait(0..=0)?;
        let kept = net.service(endpoints(&[&net.a, &net.b, &net.c]))?;
        let mut loads = traffic(net, &kept, &Proto::ALL)?;
        for vip in services.iter().flat_map(|service| &service.vips) {
            let target = SocketAddr::new(*vip, SERVICE_PORT);
            loads.push(Load::start(net.a.netns(), Kind::Established, Proto::Tcp, target, PAUSE)?);
        }
        loads.iter().try_for_each(|load| load.wait_more(2))?;
        let (written, is_over) = (AtomicUsize::new(0), AtomicBool::new(false));
        let rounds = figure("RUSTNET_ROUNDS", ROUNDS)?;
        let seen = std::thread::scope(|scope| {
            let clients = [net.a.netns(), net.c.netns(), net.node(1).netns()];
            let clients = clients.map(|from| {
                let (services, written, is_over) = (&services, &written, &is_over);
                scope.spawn(move || ask_while_written(from, services, written, is_over))
            });
            let changed: Result<()> = (1..=rounds).try_for_each(|round| {
                wait(round.saturating_sub(AHEAD)..=round - 1)?;
                write(round)?;
                written.store(round, Ordering::SeqCst);
                Ok(())
            });
            is_over.store(true, Ordering::Relaxed);
            let seen = clients.map(std::thread::ScopedJoinHandle::join);
            changed.map(|()| seen)
        })?;
        wait(rounds..=rounds)?;
        let mut telling = 0;
        for seen in seen {
            let seen = seen.map_err(|_| anyhow!("a client panicked"))??;
            ensure!(seen.telling > 0 && seen.servers.len() > 2, "{seen:?} proves nothing");
            telling += seen.telling;
        }
        let changes = rounds * usize::from(QUICK);
        println!("{changes} changes, {telling} new connections, {} other requests", nothing_lost(loads)?);
        Ok(())
    })
}
