//! Odd hosts: devices with odd names and settings, and what becomes of the whole loop there.

use std::time::Duration;

use rustnet_agent::bpf::attach::Direction;
use rustnet_agent::bpf::sys::{self, TCX_INGRESS};
use rustnet_agent::config::{Config, Routing};
use rustnet_agent::net::netlink::Socket;
use rustnet_agent::net::tc;
use rustnet_agent::source::{Event, Kind};
use rustnet_common::names::LINKS_DIR;

use crate::agent::{Agent, block_on, make_own_node, make_two_dual_stack_nodes, make_two_nodes, node, wait_until};
use crate::sandbox::{self, Sandbox, command, has_tcx, ip, run_program, uplink};

/// An agent that finds its uplinks by itself.
fn config(sandbox: &Sandbox) -> Config {
    let config = sandbox.config(&[]);
    Config { uplinks: Vec::new(), audit_period: Duration::from_millis(50), ..config }
}

/// A device with an address.
fn device(name: &str, address: &str) {
    ip(&format!("link add {name} type veth peer name p-{}", &name[name.len() - 3..]));
    ip(&format!("link set {name} up"));
    ip(&format!("addr add {address} dev {name}"));
}

/// Starts an agent that knows this node and another one.
async fn ready(sandbox: &Sandbox) -> Agent {
    Agent::start_ready(config(sandbox), make_two_nodes()).await
}

/// Waits for a whole look at the network that begins after this call.
async fn looked() {
    for _ in 0..2 {
        ip("route del 10.1.2.0/24");
        wait_until("the route is back", || ip("route show 10.1.2.0/24").contains("rn_vxlan")).await;
    }
}

/// Numbers of the links that are attached to a device's ingress.
fn links(name: &str) -> Vec<u32> {
    let links = sys::tcx_links(sandbox::ifindex(name), TCX_INGRESS).unwrap();
    links.iter().map(|link| link.link_id).collect()
}

fn assert_well(agent: &Agent) {
    assert!(agent.health.readiness().is_ok(), "{:?}", agent.health.readiness());
    assert!(agent.health.complaints().is_empty(), "{:?}", agent.health.complaints());
}

/// A VLAN device and another one whose names differ in one letter.
#[test]
fn devices_whose_names_differ_by_a_dot_have_a_program_each() {
    if !has_tcx() {
        // Without TCX a program is no pin.
        return;
    }
    sandbox::run(|sandbox| {
        uplink();
        device("eth1.10", "198.51.100.1/25");
        device("eth1-10", "198.51.100.129/25");
        block_on(async {
            let agent = ready(sandbox).await;
            looked().await;
            let both = || ["eth1.10", "eth1-10"].map(links);
            let before = both();
            assert!(before.iter().all(|it| it.len() == 1), "{before:?}");
            looked().await;
            assert_eq!(both(), before, "the links stay");
            assert_well(&agent);
            agent.stop().await;
        });
    });
}

/// `ip link set eth1 name lan1`, as udev does late, and administrators.
#[test]
fn a_device_with_another_name_keeps_its_program() {
    if !has_tcx() {
        // A filter has no name of its device.
        return;
    }
    sandbox::run(|sandbox| {
        uplink();
        device("eth1", "198.51.100.1/24");
        // A further uplink, too.
        device("eth2", "203.0.113.1/24");
        ip("route add default via 203.0.113.2 metric 7");
        block_on(async {
            let agent = ready(sandbox).await;
            let before = ["eth0", "eth1", "eth2"].map(links);
            for (old, new) in [("eth0", "wan"), ("eth1", "lan1"), ("eth2", "lan2")] {
                ip(&format!("link set {old} name {new}"));
            }
            looked().await;
            assert_well(&agent);
            assert_eq!(["wan", "lan1", "lan2"].map(links), before);
            agent.stop().await;

            // Two change their names while no agent runs.
            for (old, new) in [("lan1", "x"), ("lan2", "lan1"), ("x", "lan2")] {
                ip(&format!("link set {old} name {new}"));
            }
            let agent = ready(sandbox).await;
            looked().await;
            assert_well(&agent);
            assert_eq!(["wan", "lan2", "lan1"].map(links), before);
            agent.stop().await;

            // An earlier release has pinned links under the names of their devices.
            let dir = sandbox.bpffs.join(LINKS_DIR);
            for program in ["side_in", "uplink_in", "uplink_out"] {
                for name in ["lan1", "lan2"] {
                    let pin = dir.join(format!("{program}_{}", sandbox::ifindex(name)));
                    if pin.exists() {
                        std::fs::rename(pin, dir.join(format!("{program}_{name}"))).unwrap();
                    }
                }
            }
            let agent = ready(sandbox).await;
            looked().await;
            assert_well(&agent);
            assert_eq!(["wan", "lan2", "lan1"].map(links), before);
            assert!(sandbox::names(&dir).iter().all(|name| !name.contains("lan")), "{:?}", sandbox::names(&dir));
            agent.stop().await;
        });
    });
}

/// Hardened: only named devices have IPv6.
#[test]
fn ipv6_that_is_off_for_new_devices_is_on_for_the_overlay() {
    sandbox::run(|sandbox| {
        uplink();
        std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
        block_on(async {
            let agent = Agent::start_ready(config(sandbox), make_two_dual_stack_nodes()).await;
            looked().await;
            assert_well(&agent);
            assert!(ip("-6 route show fd00:1:2::/64").contains("rn_vxlan"));
            agent.stop().await;
        });
    });
}

/// A full disk, or whatever keeps a file from being written: the names come when it can be.
#[test]
fn names_that_could_not_be_written_are_written_later() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(async {
            let files = ["pods.json", "services.json"].map(|name| sandbox.run_dir.join(name));
            for file in &files {
                std::fs::create_dir_all(file).unwrap();
            }
            let agent = ready(sandbox).await;
            agent.send([Event::Synced(Kind::Pod)]).await;
            for file in &files {
                agent.wait_problem(&[&file.display().to_string()]).await;
            }
            assert!(agent.health.readiness().is_ok(), "no packet depends on it");
            for file in &files {
                std::fs::remove_dir(file).unwrap();
            }
            wait_until("the files are there", || files.iter().all(|file| file.is_file())).await;
            agent.wait_no_problem().await;
            agent.stop().await;
        });
    });
}

/// What the command reads is no condition of anything.
#[test]
fn an_agent_file_that_cannot_be_written_ends_no_agent() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(async {
            let file = sandbox.run_dir.join("agent.json");
            std::fs::create_dir_all(&file).unwrap();
            let agent = ready(sandbox).await;
            agent.wait_problem(&["agent.json"]).await;
            std::fs::remove_dir(&file).unwrap();
            wait_until("the file is there", || file.is_file()).await;
            agent.wait_no_problem().await;
            agent.stop().await;
        });
    });
}

/// Nothing in the run directory can be written: the agent says so, and goes on when there is room.
#[test]
fn a_full_run_directory_is_reported_and_waited_for() {
    sandbox::run(|sandbox| {
        uplink();
        std::fs::create_dir_all(&sandbox.run_dir).unwrap();
        let mount = format!("-t tmpfs -o size=64k tmpfs {}", sandbox.run_dir.display());
        run_program("mount", &mount);
        let filler = sandbox.run_dir.join("filler");
        assert!(std::fs::write(&filler, vec![1; 1 << 20]).is_err(), "it is full");
        block_on(async {
            let agent = Agent::start(config(sandbox));
            agent.send_all(make_two_nodes()).await;
            agent.wait_unready(&["No space left"]).await;
            std::fs::remove_file(&filler).unwrap();
            agent.ready().await;
            agent.wait_no_problem().await;
            agent.stop().await;
        });
    });
}

/// Somebody empties the run directory: two agents would give the same slots to different Services.
#[test]
fn an_agent_whose_locks_were_deleted_keeps_others_away() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(async {
            let agent = ready(sandbox).await;
            let locks = ["agent.lock", "writer.lock"].map(|name| sandbox.run_dir.join(name));
            for lock in &locks {
                std::fs::remove_file(lock).unwrap();
            }
            looked().await;
            let second = Agent::start(config(sandbox));
            second.send_all([make_own_node()]).await;
            wait_until("the second one waits, or works", || {
                second.health.readiness().map_or_else(|why| why.contains("another agent"), |()| true)
            })
            .await;
            assert!(second.health.readiness().is_err(), "both work");
            agent.stop().await;
            second.ready().await;
            second.stop().await;
        });
    });
}

/// A link of ours that cannot be opened is not taken for one that an agent with other pins has left.
#[test]
fn a_link_that_cannot_be_opened_stays_on_its_device() {
    if !has_tcx() {
        // Without TCX there are no links.
        return;
    }
    sandbox::run(|sandbox| {
        uplink();
        block_on(async {
            let agent = ready(sandbox).await;
            let before = links("eth0");
            let pin = sandbox.bpffs.join(LINKS_DIR).join("uplink_in").display().to_string();
            run_program("mount", &format!("--bind /dev/null {pin}"));
            ip("link set eth0 alias odd");
            agent.wait_unready(&["link/uplink_in"]).await;
            looked().await;
            assert_eq!(links("eth0"), before);
            run_program("umount", &pin);
            agent.ready().await;
            assert_eq!(links("eth0"), before);
            agent.stop().await;
        });
    });
}

/// A hook that somebody took off, while no agent runs, is missing and not well.
#[test]
fn the_status_names_a_hook_that_is_missing() {
    if !has_tcx() {
        return;
    }
    sandbox::run(|sandbox| {
        uplink();
        device("eth2", "203.0.113.1/24");
        ip("route add default via 203.0.113.2 metric 7");
        block_on(async { ready(sandbox).await.stop().await });
        let hooks = || {
            let out = sandbox.rustnetctl("status -o json");
            let report: serde_json::Value = serde_json::from_slice(&out.stdout).expect("JSON");
            let line = report["checks"].as_array().unwrap().iter().find(|it| it["name"] == "Hooks").unwrap().clone();
            (line["status"].as_str().unwrap().to_owned(), line["detail"].as_str().unwrap().to_owned())
        };
        assert_eq!(hooks().0, "ok", "{:?}", hooks());
        let dir = sandbox.bpffs.join(LINKS_DIR);
        let pins = sandbox::names(&dir);
        for name in pins.iter().rev() {
            let (path, aside) = (dir.join(name), sandbox.bpffs.join("aside"));
            std::fs::rename(&path, &aside).unwrap();
            let (status, detail) = hooks();
            assert_eq!(status, "bad", "{name}: {detail}");
            std::fs::rename(&aside, &path).unwrap();
        }
    });
}

/// Another VXLAN device has the port, for a while.
#[test]
fn a_vxlan_device_on_the_same_port_is_reported_and_waited_for() {
    sandbox::run(|sandbox| {
        uplink();
        ip("link add flannel.1 type vxlan id 7 dstport 8472");
        ip("link set flannel.1 up");
        block_on(async {
            let agent = Agent::start(config(sandbox));
            agent.send_all(make_two_nodes()).await;
            agent.wait_unready(&["UDP port 8472"]).await;
            ip("link del flannel.1");
            agent.ready().await;
            assert_well(&agent);
            agent.stop().await;
        });
    });
}

/// Hosts that make devices all day have large indexes.
#[test]
fn an_interface_index_beyond_16_bits() {
    sandbox::run(|sandbox| {
        ip("link add dev eth0 index 70000 type veth peer name far index 70001");
        for dev in ["eth0", "far"] {
            ip(&format!("link set {dev} up"));
        }
        ip("addr add 192.0.2.1/24 dev eth0");
        block_on(async {
            let agent = ready(sandbox).await;
            assert_well(&agent);
            assert!(links("eth0").len() == 1 || !has_tcx());
            agent.stop().await;
        });
    });
}

/// The uplink is down at the start, and comes; it goes and comes with another index.
#[test]
fn an_uplink_that_goes_and_comes() {
    sandbox::run(|sandbox| {
        uplink();
        ip("link set eth0 down");
        block_on(async {
            let agent = ready(sandbox).await;
            ip("link set eth0 up");
            looked().await;
            assert_well(&agent);
            ip("link del eth0");
            wait_until("it is missed", || agent.health.readiness().is_err()).await;
            ip("link add dummy0 type veth peer name dummy1");
            uplink();
            agent.ready().await;
            looked().await;
            assert_well(&agent);
            assert!(links("eth0").len() == 1 || !has_tcx());
            for mtu in [1400, 9000] {
                for dev in ["far", "eth0"] {
                    ip(&format!("link set {dev} mtu {mtu}"));
                }
                wait_until("the overlay follows", || ip("link show rn_vxlan").contains(&format!("mtu {} ", mtu - 50)))
                    .await;
            }
            agent.stop().await;
        });
    });
}

/// Virtual machines get a bridge while pods run, and it goes again.
#[test]
fn an_uplink_that_becomes_a_port_of_a_bridge() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(async {
            let agent = ready(sandbox).await;
            let moved = |from: &str, to: &str| {
                ip(&format!("addr flush dev {from}"));
                ip(&format!("addr add 192.0.2.1/24 dev {to}"));
                ip(&format!("addr add 2001:db8::1/64 dev {to} nodad"));
                ip("route replace default via 192.0.2.254");
            };
            ip("link add br0 type bridge");
            ip("link set br0 addrgenmode none up");
            ip("link set eth0 master br0");
            moved("eth0", "br0");
            let is_on = |device: &str, other: &str| !has_tcx() || (links(device).len() == 1 && links(other).is_empty());
            let is_well = || agent.health.readiness().is_ok() && agent.health.complaints().is_empty();
            wait_until("the bridge is the uplink", || is_on("br0", "eth0") && is_well()).await;
            ip("link set eth0 nomaster");
            moved("br0", "eth0");
            ip("link del br0");
            wait_until("the port is the uplink again", || (!has_tcx() || links("eth0").len() == 1) && is_well()).await;
            agent.stop().await;
        });
    });
}

/// Of the two places for filters, a shaper has taken the one.
#[test]
fn another_programs_qdisc_on_a_pods_interface_is_named() {
    sandbox::run(|sandbox| {
        uplink();
        let pod = sandbox.add_pod("rnv1", "10.1.1.2");
        run_program("tc", "qdisc add dev rnv1 ingress");
        block_on(async {
            let agent = ready(sandbox).await;
            agent.wait_problem(&["rnv1", "ingress"]).await;
            let mut socket = Socket::open().unwrap();
            let there = tc::filter(&mut socket, pod, Direction::Ingress).unwrap();
            assert_eq!(there.unwrap().name, "from_pod", "what the pod sends is looked at all the same");
            run_program("tc", "qdisc del dev rnv1 ingress");
            agent.wait_no_problem().await;
            agent.stop().await;
        });
    });
}

/// DHCPv6 gives an address alone; that others are on the link, a router advertises.
#[test]
fn neighbours_that_a_route_alone_tells_of() {
    sandbox::run(|sandbox| {
        uplink();
        ip("addr del 2001:db8::1/64 dev eth0");
        ip("addr add 2001:db8::1/128 dev eth0 nodad");
        ip("route add 2001:db8::/64 dev eth0 proto ra metric 100");
        block_on(async {
            let config = Config { routing: Routing::Native, ..config(sandbox) };
            let nodes = [node("n1", "2001:db8::1", &["fd00:1:1::/64"]), node("n2", "2001:db8::2", &["fd00:1:2::/64"])];
            let agent = Agent::start_ready(config, nodes).await;
            wait_until("the route is there", || ip("-6 route show fd00:1:2::/64").contains("via 2001:db8::2 dev eth0"))
                .await;
            assert_well(&agent);
            agent.stop().await;
        });
    });
}

/// A hardening guide, at run time: what the host's own devices have is the administrator's, and pods go on.
#[test]
fn ipv6_that_is_turned_off_at_run_time_is_on_again_for_pods() {
    sandbox::run(|sandbox| {
        uplink();
        ip("link add rnv1 type veth peer name pod");
        for device in ["rnv1", "pod"] {
            ip(&format!("link set {device} addrgenmode none up"));
        }
        sandbox.record("rnv1", sandbox::ifindex("rnv1"), "fd00:1:1::2");
        block_on(async {
            let agent = Agent::start_ready(config(sandbox), make_two_dual_stack_nodes()).await;
            let is_reached = || {
                command("ip", "-6 route show fd00:1:1::2").stdout.starts_with(b"fd00:1:1::2 dev rnv1")
                    && ip("-6 neigh show dev rnv1").contains("fd00:1:1::2")
                    && ip("-6 route show fd00:1:2::/64").contains("rn_vxlan")
            };
            wait_until("the pod is reached", is_reached).await;
            std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap();
            wait_until("the pod is reached again", is_reached).await;
            let eth0 = std::fs::read_to_string("/proc/sys/net/ipv6/conf/eth0/disable_ipv6").unwrap();
            assert_eq!(eth0.trim(), "1");
            assert_well(&agent);
            agent.stop().await;
        });
    });
}

/// Below 1280 octets the kernel has no IPv6 on a device.
#[test]
fn an_mtu_that_is_too_small_for_ipv6_and_grows_again() {
    sandbox::run(|sandbox| {
        uplink();
        block_on(async {
            let agent = Agent::start_ready(config(sandbox), make_two_dual_stack_nodes()).await;
            let has_route = || ip("-6 route show fd00:1:2::/64").contains("rn_vxlan");
            wait_until("the route is there", has_route).await;
            ip("link set eth0 mtu 1300");
            agent.wait_problem(&["1250", "IPv6", "1280"]).await;
            assert!(agent.health.readiness().is_ok(), "IPv4 goes on");
            ip("link set eth0 mtu 1500");
            wait_until("the route is back", has_route).await;
            agent.wait_no_problem().await;
            agent.stop().await;
        });
    });
}
