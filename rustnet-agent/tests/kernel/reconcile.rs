//! The loop from start to ready to restart: from events to maps, hooks and routes.

use std::os::fd::AsFd;
use std::path::Path;

use rustnet_agent::bpf::attach::Direction;
use rustnet_agent::bpf::store::node_config::NodeConfigStore;
use rustnet_agent::bpf::store::{peers, services};
use rustnet_agent::bpf::sys;
use rustnet_agent::model::ObjectName;
use rustnet_agent::nodefile;
use rustnet_agent::source::{Event, Kind, ObjectRef};
use rustnet_common::names::map;

use crate::agent::{Agent, block_on, make_own_node, make_two_nodes, node, wait_until, web};
use crate::sandbox::{self, Sandbox, command, ip, link_ids, on_hook, uplink};

#[test]
fn from_start_to_ready_to_restart() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(from_start_to_ready_to_restart_in(sandbox));
    });
}

async fn from_start_to_ready_to_restart_in(sandbox: &Sandbox) {
    let config = sandbox.config(&[&format!("--cni-conf-dir={}", sandbox.dir.join("net.d").display())]);
    let agent = Agent::start(config.clone());
    agent.send(make_two_nodes()).await;
    assert!(nodefile::read(&sandbox.run_dir).unwrap().is_none(), "not before everything is known");
    agent.send_all([]).await;
    agent.ready().await;
    let file = nodefile::read(&sandbox.run_dir).unwrap().unwrap();
    assert_eq!((file.mtu, file.not_ready), (1450, None));
    assert!(sandbox.dir.join("net.d/05-rustnet.conflist").exists());
    assert!(ip("route show 10.1.2.0/24").contains("rn_vxlan"), "whoever is ready has its routes");
    assert!(peers(&sandbox.bpffs).unwrap().contains_key(&"10.1.2.0/24".parse().unwrap()));
    let links = link_ids(sandbox);

    // Somebody meddles: noticed without waiting for the period. Whatever wakes the agent, it looks
    // after the files, too.
    let files = [sandbox.run_dir.join("node.json"), sandbox.dir.join("net.d/05-rustnet.conflist")];
    for file in &files {
        std::fs::remove_file(file).unwrap();
    }
    ip("route del 10.1.2.0/24");
    wait_until("the route is back", || ip("route show 10.1.2.0/24").contains("rn_vxlan")).await;
    wait_until("the files are back", || files.iter().all(|file| file.exists())).await;
    ip("link del rn_vxlan");
    let hooks_back = || {
        on_hook(&sandbox.bpffs, "overlay_in", "rn_vxlan", Direction::Ingress).is_some()
            && on_hook(&sandbox.bpffs, "overlay_out", "rn_vxlan", Direction::Egress).is_some()
    };
    wait_until("the device is back", || command("ip", "link show rn_vxlan").status.success() && hooks_back()).await;
    wait_until("its route is back", || ip("route show 10.1.2.0/24").contains("rn_vxlan")).await;
    let after = link_ids(sandbox);
    assert_eq!(after[..2], links[..2], "the uplink's hooks were not touched");
    agent.stop().await;

    // Without an agent everything stays; the next one adopts, and swaps the programs.
    assert!(ip("route show 10.1.2.0/24").contains("rn_vxlan"));
    let links = |all: &[(u32, u32)]| all.iter().map(|link| link.0).collect::<Vec<_>>();
    assert_eq!(links(&link_ids(sandbox)), links(&after));
    let after = link_ids(sandbox);
    let next = Agent::start(config);
    wait_until("the programs are swapped", || {
        let now = link_ids(sandbox);
        assert_eq!(now.iter().map(|l| l.0).collect::<Vec<_>>(), after.iter().map(|l| l.0).collect::<Vec<_>>());
        now.iter().zip(&after).all(|(new, old)| new.1 != old.1)
    })
    .await;
    assert!(next.health.readiness().is_err());
    assert!(
        peers(&sandbox.bpffs).unwrap().contains_key(&"10.1.2.0/24".parse().unwrap()),
        "nothing is pruned before sync"
    );
    // n2 left while nobody watched.
    next.make_ready([make_own_node()]).await;
    assert!(!peers(&sandbox.bpffs).unwrap().contains_key(&"10.1.2.0/24".parse().unwrap()));
    wait_until("the route is gone", || ip("route show 10.1.2.0/24").is_empty()).await;
    next.stop().await;
}

/// Until this node's object is known again, the programs keep the address that it named: the
/// device's first one is another.
#[test]
fn a_restart_leaves_the_nodes_address_to_the_programs() {
    sandbox::run(|sandbox| {
        uplink();
        ip("addr add 192.0.2.99/24 dev eth0");
        block_on(async {
            let address = || NodeConfigStore::open(&sandbox.bpffs).unwrap().read().unwrap().node4.octets();
            let agent = Agent::start_ready(sandbox.config(&[]), [node("n1", "192.0.2.99", &["10.1.1.0/24"])]).await;
            assert_eq!(address(), [192, 0, 2, 99]);
            agent.stop().await;
            let before = link_ids(sandbox);
            let next = Agent::start(sandbox.config(&[]));
            let is_swapped = || link_ids(sandbox).iter().zip(&before).all(|(new, old)| new.1 != old.1);
            wait_until("the programs are swapped", is_swapped).await;
            assert_eq!(address(), [192, 0, 2, 99]);
            next.stop().await;
        });
    });
}

#[test]
fn services_follow_their_events_and_survive_an_outage() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(services_follow_their_events_in(sandbox));
    });
}

async fn services_follow_their_events_in(sandbox: &Sandbox) {
    let count = || {
        let services = services(&sandbox.bpffs).unwrap();
        services.iter().find(|(key, _)| key.port == 80).map(|(_, entry)| entry.count)
    };
    let agent = Agent::start_ready(sandbox.config(&[]), [make_own_node()].into_iter().chain(web(3))).await;
    assert_eq!(count(), Some(3));
    agent.send(web(5)).await;
    wait_until("the service has five backends", || count() == Some(5)).await;
    agent.stop().await;

    // The next agent hears of fewer, and of no deletion: only the full list tells.
    let agent = Agent::start_ready(sandbox.config(&[]), [make_own_node()].into_iter().chain(web(1))).await;
    assert_eq!(count(), Some(1));
    let name = ObjectName::namespaced("default", "web");
    agent.send([Event::Delete(ObjectRef { kind: Kind::Service, name })]).await;
    wait_until("the service is gone", || services(&sandbox.bpffs).unwrap().is_empty()).await;
    agent.stop().await;
}

#[test]
fn whoever_is_ready_has_its_routes() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(async {
            let agent = Agent::start(sandbox.config(&[]));
            // The network has been looked after, but the nodes come only now.
            wait_until("the device is there", || command("ip", "link show rn_vxlan").status.success()).await;
            agent.make_ready(make_two_nodes()).await;
            assert!(ip("route show 10.1.2.0/24").contains("rn_vxlan"));
            agent.stop().await;
        });
    });
}

#[test]
fn settings_are_written_where_the_configuration_says() {
    sandbox::run(|sandbox| {
        uplink();
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "0").unwrap();
        let elsewhere = sandbox.dir.join("sysctl");
        std::fs::create_dir_all(elsewhere.join("ipv4/conf")).unwrap();
        let forward = elsewhere.join("ipv4/ip_forward");
        std::fs::write(&forward, "0\n").unwrap();
        let read = |path: &Path| std::fs::read_to_string(path).unwrap().trim().to_owned();
        block_on(async {
            let config = sandbox.config(&[&format!("--sysctl-dir={}", elsewhere.display())]);
            let agent = Agent::start_ready(config, [make_own_node()]).await;
            assert_eq!(read(&forward), "1");
            assert_eq!(read("/proc/sys/net/ipv4/ip_forward".as_ref()), "0", "the usual place is left alone");
            agent.stop().await;
        });
    });
}

#[test]
fn pinned_maps_of_another_shape_keep_the_agent_from_getting_ready() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(async {
            Agent::start_ready(sandbox.config(&[]), [make_own_node()]).await.stop().await;
            let links = link_ids(sandbox);
            let pin = sandbox.bpffs.join(map::PEERS4);
            std::fs::remove_file(&pin).unwrap();
            let other = sys::Layout { kind: 1, key_size: 8, value_size: 77, max_entries: 16, flags: 0 };
            let other = sys::map_create(map::PEERS4, other).unwrap();
            sys::obj_pin(&pin, other.as_fd()).unwrap();

            let agent = Agent::start(sandbox.config(&[]));
            agent.send_all([]).await;
            agent.wait_unready(&[map::PEERS4, "77 B"]).await;
            agent.stop().await;
            let id = |fd: std::os::fd::BorrowedFd<'_>| sys::map_info(fd).unwrap().id;
            assert_eq!(id(sys::obj_get(&pin).unwrap().as_fd()), id(other.as_fd()));
            assert_eq!(link_ids(sandbox), links);
        });
    });
}

#[test]
fn a_node_without_a_pod_range_is_reported_to_the_cni_binary() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(async {
            let agent = Agent::start(sandbox.config(&[]));
            agent.send_all([node("n1", "192.0.2.1", &[])]).await;
            let not_ready = || {
                let file = nodefile::read(&sandbox.run_dir).unwrap();
                file.and_then(|file| file.not_ready).is_some_and(|why| why.contains("no pod range"))
            };
            wait_until("node.json says so", not_ready).await;
            agent.send([make_own_node()]).await;
            agent.ready().await;
            // Losing the range again must not take it from the CNI binary.
            agent.send([node("n1", "192.0.2.1", &[])]).await;
            wait_until("the agent is not ready", || agent.health.readiness().is_err()).await;
            assert!(!not_ready());
            agent.stop().await;
        });
    });
}
