//! The loop while a look at the host's network takes its time.

use std::sync::mpsc;

use rustnet_agent::bpf::store::services;

use crate::agent::{Agent, make_two_nodes, wait_until, web};
use crate::sandbox::{self, ip, uplink};

/// Backends that the service of [`web`] gets, one after the other. To write them all takes longer than the loop waits before a look.
const CHANGES: u8 = 100;

/// On a host with a million routes a look takes seconds.
#[test]
fn events_are_applied_while_a_look_is_under_way() {
    sandbox::run(|sandbox| {
        uplink();
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().max_blocking_threads(1).build().unwrap();
        runtime.block_on(async {
            let agent = Agent::start_ready(sandbox.config(&[]), make_two_nodes()).await;

            // The only thread for looks is taken.
            let (release, held) = mpsc::channel::<()>();
            let (began, is_taken) = tokio::sync::oneshot::channel();
            let other = tokio::task::spawn_blocking(move || {
                began.send(()).unwrap();
                held.recv().unwrap();
            });
            is_taken.await.unwrap();
            ip("route del 10.1.2.0/24");
            let count = || services(&sandbox.bpffs).unwrap().values().map(|entry| entry.count).max();
            for backends in 1..=CHANGES {
                agent.send(web(backends)).await;
                wait_until("the change is in the map", || count() == Some(backends.into())).await;
            }
            assert_eq!(ip("route show 10.1.2.0/24"), "", "the look has not ended");
            assert!(agent.health.readiness().is_ok(), "{:?}", agent.health.readiness());

            release.send(()).unwrap();
            other.await.unwrap();
            wait_until("the route is back", || ip("route show 10.1.2.0/24").contains("rn_vxlan")).await;
            agent.stop().await;
        });
    });
}
