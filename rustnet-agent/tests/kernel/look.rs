//! The loop while a look at the host's network takes its time, or fails.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::ensure;
use rustnet_agent::bpf::store::{peers, services};
use rustnet_agent::config::{Config, Routing};
use rustnet_agent::net::host::Host;
use rustnet_agent::net::netlink::Socket;
use rustnet_agent::reconcile::Surroundings;
use tokio::sync::Mutex;

use crate::agent::{Agent, block_on, make_two_nodes, wait_until, web};
use crate::sandbox::{self, Sandbox, ip, uplink};

/// Backends that the service of [`web`] gets, one after the other. To write them all takes longer than the loop waits before a look.
const CHANGES: u8 = 100;

/// Surroundings in which a look ends only while nobody holds the lock.
pub fn make_held(look_limit: Duration) -> (Surroundings, Arc<Mutex<()>>) {
    let lock = Arc::new(Mutex::new(()));
    let held = Arc::clone(&lock);
    let observe = Arc::new(move || {
        drop(held.blocking_lock());
        Host::observe(&mut Socket::open()?)
    });
    (Surroundings { export_limit: sandbox::deadline(), look_limit, observe, ..Surroundings::default() }, lock)
}

fn count_backends(sandbox: &Sandbox) -> Option<u32> {
    services(&sandbox.bpffs).unwrap().values().map(|entry| entry.count).max()
}

/// On a host with a million routes a look takes a second.
#[test]
fn events_are_applied_while_a_look_is_under_way() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(async {
            let (surroundings, lock) = make_held(sandbox::deadline());
            let agent = Agent::start_in(surroundings, sandbox.config(&[]));
            agent.make_ready(make_two_nodes()).await;

            let held = lock.lock().await;
            ip("route del 10.1.2.0/24");
            for backends in 1..=CHANGES {
                agent.send(web(backends)).await;
                wait_until("the change is in the map", || count_backends(sandbox) == Some(backends.into())).await;
            }
            assert_eq!(ip("route show 10.1.2.0/24"), "", "the look has not ended");
            assert!(agent.health.readiness().is_ok(), "{:?}", agent.health.readiness());
            drop(held);
            wait_until("the route is back", || ip("route show 10.1.2.0/24").contains("rn_vxlan")).await;
            agent.stop().await;
        });
    });
}

#[test]
fn a_look_that_does_not_end_is_a_failure_of_the_node() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(async {
            let (surroundings, lock) = make_held(Duration::from_millis(100));
            let agent = Agent::start_in(surroundings, sandbox.config(&[]));
            agent.make_ready(make_two_nodes()).await;
            let held = lock.lock().await;
            ip("link set eth0 alias changed");
            agent.wait_unready(&["RTNL"]).await;
            drop(held);
            agent.ready().await;
            agent.stop().await;
        });
    });
}

/// What the kernel listed before, this look does not see.
#[test]
fn what_changes_during_a_look_leads_to_another() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(async {
            let (lock, has_list) = (Arc::new(Mutex::new(())), Arc::new(AtomicBool::new(false)));
            let (held, has_listed) = (Arc::clone(&lock), Arc::clone(&has_list));
            let observe = Arc::new(move || {
                let host = Host::observe(&mut Socket::open()?);
                has_listed.store(true, Ordering::Relaxed);
                drop(held.blocking_lock());
                has_listed.store(false, Ordering::Relaxed);
                host
            });
            let agent = Agent::start_in(Surroundings { observe, ..Surroundings::default() }, sandbox.config(&[]));
            agent.make_ready(make_two_nodes()).await;
            let held = lock.lock().await;
            ip("link set eth0 alias changed");
            wait_until("the network is listed", || has_list.load(Ordering::Relaxed)).await;
            ip("route del 10.1.2.0/24");
            // The loop hears of it before the look ends.
            for backends in 1..=3 {
                agent.send(web(backends)).await;
                wait_until("the change is in the map", || count_backends(sandbox) == Some(backends.into())).await;
            }
            drop(held);
            wait_until("the route is back", || ip("route show 10.1.2.0/24").contains("rn_vxlan")).await;
            agent.stop().await;
        });
    });
}

/// Without the host's devices each node would seem to be reached by the kernel's routes.
#[test]
fn peers_stay_as_they_are_until_the_host_is_known() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(async {
            let config = || Config { routing: Routing::Native, ..sandbox.config(&[]) };
            let agent = Agent::start_ready(config(), make_two_nodes()).await;
            agent.stop().await;
            let before = peers(&sandbox.bpffs).unwrap();
            assert!(!before.is_empty());

            let is_blind = Arc::new(AtomicBool::new(true));
            let blind = Arc::clone(&is_blind);
            let observe = Arc::new(move || {
                ensure!(!blind.load(Ordering::Relaxed), "no list");
                Host::observe(&mut Socket::open()?)
            });
            let surroundings = Surroundings { observe, ..Surroundings::default() };
            let agent = Agent::start_in(surroundings, config());
            agent.send_all(make_two_nodes().into_iter().chain(web(3))).await;
            agent.wait_unready(&["no list"]).await;
            wait_until("the service is in the map", || count_backends(sandbox) == Some(3)).await;
            assert_eq!(peers(&sandbox.bpffs).unwrap(), before);
            is_blind.store(false, Ordering::Relaxed);
            agent.ready().await;
            assert_eq!(peers(&sandbox.bpffs).unwrap(), before);
            agent.stop().await;
        });
    });
}
