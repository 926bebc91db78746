//! What the loop repairs and removes, and what it reports until somebody else repairs it.

use std::os::fd::AsFd;
use std::time::Duration;

use rustnet_agent::bpf::attach::Direction;
use rustnet_agent::bpf::load::program_path;
use rustnet_agent::bpf::store::{Map, services};
use rustnet_agent::bpf::sys::{self, TCX_EGRESS, TCX_INGRESS};
use rustnet_agent::config::Config;
use rustnet_agent::net::netlink::Socket;
use rustnet_agent::net::tc;
use rustnet_common::addr::Ip4;
use rustnet_common::names::{LINKS_DIR, TAILS, TAILS_MAP, map};
use rustnet_common::service::{SvcEntry, SvcKey};

use crate::agent::{Agent, block_on, make_own_node, make_two_nodes, node, wait_until, web};
use crate::load::prog_id;
use crate::sandbox::{self, add_pod_veth, has_tcx, ip, link_ids, run_program, uplink};

/// Its pins are out of sight, and its programs would handle each packet a second time.
#[test]
fn programs_of_a_bpf_file_system_that_another_one_hides_are_taken_off() {
    if !has_tcx() {
        // Without TCX there are filters alone, which are replaced.
        return;
    }
    sandbox::run(|sandbox| {
        uplink();
        let run = || {
            block_on(async {
                Agent::start_ready(sandbox.config(&["--uplink=eth0"]), [make_own_node()]).await.stop().await;
            });
        };
        let attached = |device: &str| {
            let index = sandbox::ifindex(device);
            [TCX_INGRESS, TCX_EGRESS].map(|kind| sys::tcx_links(index, kind).unwrap())
        };
        run();
        let before = ["eth0", "rn_vxlan"].map(attached);
        let above = sandbox.bpffs.parent().unwrap().display().to_string();
        run_program("mount", &format!("-t bpf bpf {above}"));
        run();
        for (device, before) in ["eth0", "rn_vxlan"].into_iter().zip(before) {
            for (now, before) in attached(device).iter().zip(before) {
                assert_eq!((now.len(), before.len()), (1, 1), "{device}");
                assert_ne!(now[0].link_id, before[0].link_id, "{device}");
            }
        }
        run_program("umount", &above);
    });
}

/// Without a pin, the kernel empties such a map with the agent's end.
#[test]
fn programs_jump_on_when_the_agent_has_ended() {
    sandbox::run(|sandbox| {
        uplink();
        let run = || {
            block_on(async {
                Agent::start_ready(sandbox.config(&["--uplink=eth0"]), [make_own_node()]).await.stop().await;
            });
            let map = sys::obj_get(&program_path(&sandbox.bpffs, TAILS_MAP)).unwrap();
            let target = |index: u32| {
                let mut id = [0; 4];
                assert!(sys::map_lookup(map.as_fd(), &index.to_ne_bytes(), &mut id).unwrap(), "no program at {index}");
                u32::from_ne_bytes(id)
            };
            let targets: [u32; TAILS.len()] = std::array::from_fn(|index| target(index as u32));
            assert_eq!(targets, TAILS.map(|name| prog_id(sandbox, name)));
            targets
        };
        let before = run();
        assert_ne!(run(), before, "the map belongs to the programs of the last agent");
    });
}

/// One peer of which the route is disputed is not reached; the node and its pods work all the same.
#[test]
fn a_disputed_route_is_a_problem_of_that_peer_alone() {
    sandbox::run(|sandbox| {
        uplink();
        ip("route add 10.1.2.0/24 via 192.0.2.9");
        block_on(async {
            let third = node("n3", "192.0.2.3", &["10.1.3.0/24"]);
            let agent = Agent::start_ready(sandbox.config(&[]), make_two_nodes().into_iter().chain([third])).await;
            assert!(ip("route show 10.1.3.0/24").contains("rn_vxlan"));
            agent.wait_problem(&["10.1.2.0/24", "another program"]).await;
            assert!(agent.health.readiness().is_ok());
            ip("route del 10.1.2.0/24");
            agent.wait_no_problem().await;
            assert!(ip("route show 10.1.2.0/24").contains("rn_vxlan"));
            agent.stop().await;
        });
    });
}

#[test]
fn leftover_endpoints_are_removed_and_lost_ones_put_back() {
    use rustnet_agent::bpf::store::endpoints::Endpoints;
    use rustnet_common::endpoint::{Endpoint as Entry, flags};
    sandbox::run(|sandbox| {
        uplink();
        let ifindex = sandbox.add_pod("rnv1", "10.1.1.5");
        ip("link add other0 type veth peer name other1");
        ip("link set other0 up");
        let other = sandbox::ifindex("other0");
        sandbox.nameless_record("fedcba9876543210", "rnv9", other, "10.1.1.7");
        sandbox.limit(serde_json::json!({ "ingress": { "rate": 1_000_000, "burst": 1_000_000 } }));
        block_on(async {
            let agent = Agent::start_ready(sandbox.config(&[]), [make_own_node()]).await;
            let endpoints = Endpoints::open(&sandbox.bpffs).unwrap();
            let limited = endpoints.read().unwrap().iter().all(|(_, entry)| entry.flags == flags::VIA_QDISC);
            assert!(limited, "the limit is forgotten: {:?}", endpoints.read().unwrap());
            let addresses = || {
                let all = endpoints.read().unwrap().into_iter();
                all.map(|(ip, entry)| (ip.to_string(), entry.ifindex)).collect::<Vec<_>>()
            };
            assert_eq!(addresses(), [("10.1.1.5".to_owned(), ifindex)], "put back from its record");
            let is_deleted = endpoints.delete("10.1.1.5".parse().unwrap(), ifindex + 1).unwrap();
            assert!(!is_deleted && addresses().len() == 1, "the address is another interface's by now");

            // A DEL that was cut short: neither interface nor record. And an ADD that is under way:
            // an interface.
            let entry = |ifindex| Entry { ifindex, identity: 0, mac: [0; 6], host_mac: [0; 6], flags: 0, pad: 0 };
            endpoints.put("10.1.1.8".parse().unwrap(), &entry(99_999)).unwrap();
            endpoints.put("10.1.1.9".parse().unwrap(), &entry(ifindex)).unwrap();
            // And an entry of before, whose interface is gone and whose address another pod has.
            endpoints.put("10.1.1.5".parse().unwrap(), &entry(99_998)).unwrap();
            ip("link set rnv1 mtu 1400");
            wait_until("the leftover is gone", || addresses().len() == 2).await;
            assert_eq!(addresses()[1].0, "10.1.1.9");
            wait_until("the record's interface has the address", || addresses()[0].1 == ifindex).await;
            // A record whose index another device has by now.
            let mut socket = Socket::open().unwrap();
            for direction in Direction::BOTH {
                assert_eq!(tc::filter(&mut socket, other, direction).unwrap(), None, "a program of pods on it");
            }
            agent.stop().await;
        });
    });
}

/// What nobody can open among the pins is a problem of the node; pods get their programs, and no
/// program is taken off.
#[test]
fn an_odd_pin_keeps_no_program_off_a_pod() {
    sandbox::run(|sandbox| {
        uplink();
        let pod = add_pod_veth("rnv1");
        block_on(async {
            let config = Config { audit_period: Duration::from_millis(50), ..sandbox.config(&[]) };
            let agent = Agent::start_ready(config, [make_own_node()]).await;

            let before = link_ids(sandbox);
            // The second one has a name like those of XDP.
            let odd = ["odd", "uplink_xdp_odd"].map(|name| sandbox.bpffs.join(LINKS_DIR).join(name));
            for odd in &odd {
                std::fs::create_dir(odd).unwrap();
            }
            sandbox.record("rnv1", pod, "10.1.1.2");
            wait_until("the pod has its programs", || {
                let mut socket = Socket::open().unwrap();
                Direction::BOTH.iter().all(|it| tc::filter(&mut socket, pod, *it).unwrap().is_some())
            })
            .await;
            agent.wait_problem(&["link/odd"]).await;
            agent.wait_problem(&["link/uplink_xdp_odd"]).await;
            for odd in &odd {
                std::fs::remove_dir(odd).unwrap();
            }
            agent.wait_no_problem().await;
            assert_eq!(link_ids(sandbox), before);
            agent.stop().await;
        });
    });
}

#[test]
fn the_loop_puts_back_an_entry_that_somebody_deleted() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(async {
            let config = Config { audit_period: Duration::from_millis(50), ..sandbox.config(&[]) };
            let agent = Agent::start_ready(config, [make_own_node()].into_iter().chain(web(2))).await;
            let before = services(&sandbox.bpffs).unwrap();
            let map = Map::<SvcKey<Ip4>, SvcEntry>::open(&sandbox.bpffs, map::SVC4).unwrap();
            map.clear().unwrap();
            wait_until("the service is back", || services(&sandbox.bpffs).unwrap() == before).await;
            let metrics = agent.health.metrics.encode().unwrap();
            assert!(metrics.contains("rustnet_map_repairs_total{map=\"rn_svc4_v2\"} 2"), "{metrics}");
            agent.stop().await;
        });
    });
}
