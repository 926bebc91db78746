//! Pod to pod: every protocol, both families, one node and two, and nobody's address is translated.

use crate::fixture::{Net, in_each_routing};
use anyhow::{Result, ensure};
use std::net::SocketAddr;
use testkit::client::{ask, ask_sized};
use testkit::icmp::reachable;
use testkit::pod::PORT;
use testkit::sniff::Sniffer;
use testkit::{Pod, Proto};

in_each_routing!(
    pods_of_one_node_see_each_others_addresses,
    pods_of_two_nodes_see_each_others_addresses,
    packets_are_sound_with_offloads_on,
    packets_are_sound_when_pods_finish_checksums,
    a_pod_reaches_itself,
    an_address_without_pod_is_unreachable,
);

fn talk(from: &Pod, to: &Pod) -> Result<()> {
    for address in to.addresses() {
        reachable(from.netns(), *address)?;
        for proto in Proto::ALL {
            let answers = ask(from.netns(), proto, SocketAddr::new(*address, PORT), 10)?;
            answers.only_by(&[to.name()])?;
            answers.only_as(from.address_like(*address)?)?;
        }
    }
    Ok(())
}

fn pods_of_one_node_see_each_others_addresses(net: &Net) -> Result<()> {
    talk(&net.a, &net.b)?;
    talk(&net.b, &net.a)
}

fn pods_of_two_nodes_see_each_others_addresses(net: &Net) -> Result<()> {
    talk(&net.a, &net.c)?;
    talk(&net.c, &net.b)
}

/// Everything that arrives at a pod and on the wire between the nodes has right checksums.
fn sound(net: &Net, from: &Pod) -> Result<()> {
    for to in [&net.b, &net.c] {
        let sniffers = [
            Sniffer::start(to.netns(), "eth0")?,
            Sniffer::start(from.netns(), "eth0")?,
            Sniffer::start(net.node(2).netns(), "eth0")?,
        ];
        for address in to.addresses() {
            reachable(from.netns(), *address)?;
            for proto in Proto::ALL {
                ask_sized(from.netns(), proto, SocketAddr::new(*address, PORT), 2, 1000)?.all_answered()?;
            }
        }
        for sniffer in sniffers {
            sniffer.stop().verify_checksums()?;
        }
    }
    Ok(())
}

fn packets_are_sound_with_offloads_on(net: &Net) -> Result<()> {
    sound(net, &net.a)
}

fn packets_are_sound_when_pods_finish_checksums(net: &Net) -> Result<()> {
    let from = net.node(1).add_pod("plain")?;
    from.set_tx_checksum(false)?;
    sound(net, &from)
}

fn a_pod_reaches_itself(net: &Net) -> Result<()> {
    talk(&net.a, &net.a)
}

/// An address of the pod range that no pod has must not be looked for in circles: the sender hears of it.
fn an_address_without_pod_is_unreachable(net: &Net) -> Result<()> {
    for address in ["10.244.1.250", "fd00:244:0:1::fa", "10.244.2.250", "fd00:244:0:2::fa"] {
        let answers = ask(net.a.netns(), Proto::Tcp, format_target(address)?, 1)?;
        ensure!(answers.answered() == 0, "{address}: {answers}");
        let first = answers.errors.first().map(|e| e.kind);
        ensure!(
            matches!(first, Some(std::io::ErrorKind::HostUnreachable | std::io::ErrorKind::NetworkUnreachable)),
            "{address}: {answers}"
        );
    }
    Ok(())
}

fn format_target(address: &str) -> Result<SocketAddr> {
    Ok(SocketAddr::new(address.parse()?, PORT))
}
