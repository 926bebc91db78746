//! ClusterIP: every kind of backend, every kind of client.

use crate::fixture::{Net, endpoints, in_each_routing, world};
use anyhow::{Result, ensure};
use testkit::client::{Connection, ask, ask_sized};
use testkit::manifest::Endpoint;
use testkit::sniff::Sniffer;
use testkit::{Pod, Proto};

in_each_routing!(
    a_backend_on_the_same_node,
    a_backend_on_another_node,
    a_pod_is_its_own_backend,
    all_backends_take_part,
    a_host_is_served,
    a_backend_outside_sees_the_nodes_address,
    a_backend_that_is_a_node,
    packets_are_sound,
    a_connection_stays_with_its_backend,
    ports_of_one_service_have_targets_of_their_own,
    an_edit_of_the_slice_moves_new_connections,
);

/// Requests by both families and protocols; only these servers answer.
fn served(net: &Net, from: &Pod, backends: &[&Pod]) -> Result<()> {
    let service = net.service(endpoints(backends))?;
    let names: Vec<&str> = backends.iter().map(|p| p.name()).collect();
    for target in service.targets() {
        for proto in Proto::ALL {
            let answers = ask(from.netns(), proto, target, 20 * names.len())?;
            answers.only_by(&names)?;
            // A pod that reaches itself cannot see its own address as the source; anybody else's is kept.
            if !names.contains(&from.name()) {
                answers.only_as(from.address_like(target.ip())?)?;
            }
        }
    }
    Ok(())
}

fn a_backend_on_the_same_node(net: &Net) -> Result<()> {
    served(net, &net.a, &[&net.b])
}

fn a_backend_on_another_node(net: &Net) -> Result<()> {
    served(net, &net.a, &[&net.c])?;
    served(net, &net.c, &[&net.a])
}

fn a_pod_is_its_own_backend(net: &Net) -> Result<()> {
    served(net, &net.a, &[&net.a])
}

fn all_backends_take_part(net: &Net) -> Result<()> {
    served(net, &net.a, &[&net.a, &net.b, &net.c])
}

fn a_host_is_served(net: &Net) -> Result<()> {
    let service = net.service(endpoints(&[&net.a, &net.c]))?;
    for node in net.fabric.nodes() {
        for target in service.targets() {
            for proto in Proto::ALL {
                ask(node.netns(), proto, target, 30)?.only_by(&["a", "c"])?;
            }
        }
    }
    Ok(())
}

fn a_backend_outside_sees_the_nodes_address(net: &Net) -> Result<()> {
    let service = net.service(world().map(|a| Endpoint::ready(a, None)).to_vec())?;
    for pod in [&net.a, &net.c] {
        for target in service.targets() {
            for proto in Proto::ALL {
                let answers = ask(pod.netns(), proto, target, 10)?;
                answers.only_by(&["world"])?;
                answers.only_as(pod.node().address_like(target.ip()))?;
            }
        }
    }
    for target in service.targets() {
        ask(net.node(1).netns(), Proto::Tcp, target, 10)?.only_by(&["world"])?;
    }
    Ok(())
}

/// As the API server is on a control plane node.
fn a_backend_that_is_a_node(net: &Net) -> Result<()> {
    let node = net.node(1);
    let service = net.service(node.addresses().map(|a| Endpoint::ready(a, Some(node.name()))).to_vec())?;
    for pod in [&net.a, &net.c] {
        for target in service.targets() {
            for proto in Proto::ALL {
                let answers = ask(pod.netns(), proto, target, 10)?;
                answers.only_by(&["n1"])?;
                answers.only_as(pod.address_like(target.ip())?)?;
            }
        }
    }
    for target in service.targets() {
        ask(net.node(2).netns(), Proto::Tcp, target, 10)?.only_by(&["n1"])?;
    }
    Ok(())
}

fn packets_are_sound(net: &Net) -> Result<()> {
    let from = net.node(1).add_pod("plain")?;
    from.set_tx_checksum(false)?;
    for offload in [false, true] {
        from.set_tx_checksum(offload)?;
        for backend in [&net.b, &net.c, &from] {
            let service = net.service(endpoints(&[backend]))?;
            let sniffers = [
                Sniffer::start(from.netns(), "eth0")?,
                Sniffer::start(backend.netns(), "eth0")?,
                Sniffer::start(net.node(2).netns(), "eth0")?,
            ];
            for target in service.targets() {
                for proto in Proto::ALL {
                    ask_sized(from.netns(), proto, target, 2, 1000)?.all_answered()?;
                }
            }
            for sniffer in sniffers {
                sniffer.stop().verify_checksums()?;
            }
        }
    }
    Ok(())
}

fn a_connection_stays_with_its_backend(net: &Net) -> Result<()> {
    let service = net.service(endpoints(&[&net.a, &net.b, &net.c]))?;
    for target in service.targets() {
        for _ in 0..5 {
            let mut connection = Connection::open_in(net.a.netns(), target)?;
            let (first, _) = connection.ask("first")?;
            for i in 0..20 {
                let (again, _) = connection.ask(&i.to_string())?;
                ensure!(again == first, "{again} after {first}");
            }
        }
    }
    Ok(())
}

fn ports_of_one_service_have_targets_of_their_own(net: &Net) -> Result<()> {
    let mut other = net.node(2).add_silent_pod("other")?;
    other.serve(9090)?;
    let mut service = net.unawaited_service(endpoints(&[&other]))?;
    service.service.ports = testkit::manifest::Port::both(80, 9090);
    let second = testkit::manifest::Port { name: "tcp-81".into(), proto: Proto::Tcp, port: 81, target: 9090 };
    service.service.ports.push(second);
    service.set(endpoints(&[&other]))?;
    service.wait_known()?;
    for mut target in service.targets() {
        for port in [80, 81] {
            target.set_port(port);
            ask(net.a.netns(), Proto::Tcp, target, 5)?.only_by(&["other"])?;
        }
    }
    Ok(())
}

fn an_edit_of_the_slice_moves_new_connections(net: &Net) -> Result<()> {
    let mut service = net.service(endpoints(&[&net.b]))?;
    for backends in [vec![&net.c], vec![&net.b, &net.c], vec![&net.b]] {
        service.set(endpoints(&backends))?;
        let names: Vec<&str> = backends.iter().map(|p| p.name()).collect();
        for target in service.targets() {
            for proto in Proto::ALL {
                testkit::wait::until("the edit to be seen", || ask(net.a.netns(), proto, target, 20)?.only_by(&names))?;
            }
        }
    }
    Ok(())
}
