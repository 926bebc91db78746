//! Whose sockets ask for Services by themselves, from records and Pods to `rn_sock_netns`. The control group cannot be used here, so that
//! no program is attached; the map is written before.

use std::sync::Arc;

use rustnet_agent::bpf::store::sockets::Sockets;
use rustnet_agent::model::{ObjectName, Pod, Problem};
use rustnet_agent::net::netns;
use rustnet_agent::source::{Event, Kind, Object};
use rustnet_common::socket::netns::{HOST, POD};

use crate::agent::{Agent, block_on, make_own_node, wait_until};
use crate::sandbox::{self, Sandbox, uplink};

const SETTINGS: [&str; 2] = ["--socket-lb=all", "--cgroup=/proc"];

/// The Pod of the record that [`Sandbox::record`] writes.
fn web(socket_lb: Option<bool>, problems: Box<[Problem]>) -> Event {
    Event::Apply(Object::Pod(Arc::new(Pod {
        name: ObjectName::namespaced("default", "web-0"),
        uid: "another".into(),
        node: "n1".into(),
        addresses: Box::default(),
        host_network: false,
        host_ports: false,
        socket_lb,
        problems,
    })))
}

/// The namespaces that are listed; none while there is no map.
fn listed(sandbox: &Sandbox) -> Vec<(u64, u32)> {
    let namespaces = Sockets::open(&sandbox.bpffs).and_then(|sockets| sockets.namespaces());
    namespaces.unwrap_or_default().into_iter().collect()
}

#[test]
fn a_restart_keeps_what_is_there_until_all_pods_are_known() {
    sandbox::run(|sandbox| {
        uplink();
        let own = (netns::cookie().unwrap(), HOST);
        sandbox.add_pod("rnv1", "10.1.1.5");
        sandbox.give_cookie("0123456789abcdef", 1);
        let index = sandbox::add_pod_veth("rnv2");
        sandbox.nameless_record("b", "rnv2", index, "10.1.1.6");
        sandbox.give_cookie("b", 2);
        block_on(async {
            let agent = Agent::start_ready(sandbox.config(&SETTINGS), [make_own_node()]).await;
            wait_until("the host is listed", || listed(sandbox) == [own]).await;
            agent.wait_problem(&["/proc", "--cgroup"]).await;
            agent.send([web(None, Box::default())]).await;
            wait_until("the pod is listed", || listed(sandbox) == [(1, POD), own]).await;
            agent.stop().await;
            // The object of the first pod is not there yet when the second one's is.
            let agent = Agent::start_ready(sandbox.config(&SETTINGS), [make_own_node()]).await;
            let Event::Apply(Object::Pod(pod)) = web(None, Box::default()) else { unreachable!() };
            let name = ObjectName::namespaced("default", "other");
            let other = Pod { name, addresses: ["10.1.1.6".parse().unwrap()].into(), ..(*pod).clone() };
            agent.send([Event::Apply(Object::Pod(Arc::new(other)))]).await;
            wait_until("the second pod is listed", || listed(sandbox).contains(&(2, POD))).await;
            assert_eq!(listed(sandbox), [(1, POD), (2, POD), own]);
            agent.send([Event::Synced(Kind::Pod)]).await;
            wait_until("the first pod is unknown", || listed(sandbox) == [(2, POD), own]).await;
            // A wish that is none is reported, and the setting counts.
            let problem = Problem::new(&"Pod default/web-0".into(), "metadata.annotations", "neither");
            agent.send([web(None, [problem].into())]).await;
            wait_until("the first pod is back", || listed(sandbox) == [(1, POD), (2, POD), own]).await;
            agent.wait_problem(&["Pod default/web-0", "neither"]).await;
            agent.send([web(Some(false), Box::default())]).await;
            wait_until("the first pod refuses", || listed(sandbox) == [(2, POD), own]).await;
            // Without a record, there is no namespace.
            std::fs::remove_file(sandbox.run_dir.join("endpoints/b@eth0.json")).unwrap();
            sandbox::ip("link del rnv2");
            wait_until("the second pod is gone", || listed(sandbox) == [own]).await;
            agent.stop().await;
        });
    });
}
