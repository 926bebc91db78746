//! Uplinks on top of NICs, of kinds that many kernels for development lack: VLAN devices and bonds. `cargo xtask kernels` runs these.

use crate::odd_hosts::{hosts_are_served, meet, move_addresses, on, seen_as, with_agents};
use anyhow::Result;
use testkit::Fabric;

macro_rules! in_each_mode {
    ($($name:ident),+ $(,)?) => {
        mod vxlan {
            $(#[test]
            #[ignore = "needs 8021q and bonding: cargo xtask kernels --test devices"]
            fn $name() -> anyhow::Result<()> {
                super::on(testkit::Routing::Vxlan, super::$name)
            })+
        }
        mod native {
            $(#[test]
            #[ignore = "needs 8021q and bonding: cargo xtask kernels --test devices"]
            fn $name() -> anyhow::Result<()> {
                super::on(testkit::Routing::Native, super::$name)
            })+
        }
    };
}
in_each_mode!(a_vlan_device_as_the_uplink, a_bond_as_the_uplink, a_vlan_device_on_a_bond_as_the_uplink);

/// All that an uplink has to carry: pods, hosts and services in both directions, and masqueraded flows.
fn carries_all(fabric: Fabric) -> Result<()> {
    with_agents(fabric, |net| {
        meet(net)?;
        hosts_are_served(net)?;
        seen_as(&net.a, &net.node(1).addresses())
    })
}

/// The switch's own address goes into the VLAN; its ports carry tags as they are.
fn tag_the_switch(fabric: &Fabric) -> Result<()> {
    fabric
        .switch()
        .ip("link add link br0 name br0.10 type vlan id 10\naddr flush dev br0\naddr add 172.18.0.1/24 dev br0.10\n\
         addr add fd00:18::1/64 dev br0.10 nodad\nlink set br0.10 up\n")
}

/// A bond of one NIC, as machines have whose second port waits for a cable.
const BOND: &str = "link add bond0 type bond mode active-backup miimon 100\nlink set eth0 down\nlink set eth0 master bond0\n\
                    link set bond0 up\n";

fn a_vlan_device_as_the_uplink(fabric: Fabric) -> Result<()> {
    tag_the_switch(&fabric)?;
    for node in fabric.nodes() {
        node.netns().ip("link add link eth0 name eth0.10 type vlan id 10\n")?;
        move_addresses(node, "eth0.10")?;
    }
    carries_all(fabric)
}

fn a_bond_as_the_uplink(fabric: Fabric) -> Result<()> {
    for node in fabric.nodes() {
        node.netns().ip(BOND)?;
        move_addresses(node, "bond0")?;
    }
    carries_all(fabric)
}

fn a_vlan_device_on_a_bond_as_the_uplink(fabric: Fabric) -> Result<()> {
    tag_the_switch(&fabric)?;
    for node in fabric.nodes() {
        node.netns().ip(&format!("{BOND}link add link bond0 name bond0.10 type vlan id 10\n"))?;
        move_addresses(node, "bond0.10")?;
    }
    carries_all(fabric)
}
