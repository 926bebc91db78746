//! What comes also goes: nothing of a deleted pod or service stays.

use crate::fixture::{Net, endpoints, in_each_routing, observed};
use anyhow::{Result, ensure};
use nix::mount::{MsFlags, mount};
use rustnet_common::names;
use std::path::Path;
use testkit::{Node, Setup, wait};

in_each_routing!(deleted_pods_leave_nothing, deleted_services_leave_nothing);

/// What pods leave on a node: veths, host routes, neighbours, leases, endpoint files, map entries.
fn traces(node: &Node) -> Result<Vec<String>> {
    let list = |program: &str, args: &[&str]| node.netns().exec(program, args);
    let files = |folder: &str| -> Vec<String> {
        let entries = std::fs::read_dir(node.run_dir().join(folder)).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    };
    let map = node.bpffs().join(names::map::ENDPOINTS).display().to_string();
    let dump = list("bpftool", &["-j", "map", "dump", "pinned", &map])?;
    let veths = list("ip", &["-o", "link", "show", "type", "veth"])?;
    let ours: Vec<&str> = veths.lines().filter(|l| l.contains(names::VETH_PREFIX)).collect();
    let routes = list("ip", &["route"])? + &list("ip", &["-6", "route"])?;
    let routes: Vec<&str> = routes.lines().filter(|l| l.contains(names::VETH_PREFIX)).collect();
    Ok(vec![
        format!("veths {}", ours.len()),
        format!("routes {}", routes.len()),
        format!("map entries {}", dump.matches("\"formatted\"").count()),
        format!("endpoints {}", files("endpoints").len()),
        format!("leases {:?}", leases(node)),
    ])
}

fn leases(node: &Node) -> usize {
    fn count(dir: &Path) -> usize {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|e| if e.path().is_dir() { count(&e.path()) } else { 1 }).sum()
    }
    count(&node.run_dir().join("ipam"))
}

/// On a node of its own fabric nothing else changes meanwhile; here others add pods too, so this
/// compares names, not counts.
fn deleted_pods_leave_nothing(net: &Net) -> Result<()> {
    let node = net.node(2);
    let pod = node.add_pod("short-lived")?;
    let (addresses, interface) = (pod.addresses().to_vec(), pod.host_interface()?.to_owned());
    pod.check()?;
    pod.delete()?;
    let links = node.netns().exec("ip", &["-o", "link"])?;
    ensure!(!links.contains(&interface), "{interface} is left: {links}");
    for address in addresses {
        let family = if address.is_ipv4() { "-4" } else { "-6" };
        let routes = node.netns().exec("ip", &[family, "route", "show", &address.to_string()])?;
        ensure!(routes.is_empty(), "{routes}");
    }
    Ok(())
}

fn deleted_services_leave_nothing(net: &Net) -> Result<()> {
    let service = net.service(endpoints(&[&net.b, &net.c]))?;
    let vips = service.service.vips.clone();
    let known = net.node(1).rustnetctl(&["services", "-o", "json"])?;
    ensure!(known.contains(&vips[0].to_string()), "{known}");
    drop(service);
    for node in net.fabric.nodes() {
        wait::until("the service is gone", || {
            let known = node.rustnetctl(&["services", "-o", "json"])?;
            ensure!(vips.iter().all(|vip| !known.contains(&vip.to_string())), "{known}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_hundred_pods_leave_nothing() -> Result<()> {
    observed(&Net::start(Setup::default())?, |net| {
        let node = net.node(1);
        let before = traces(node)?;
        for round in 0..10 {
            let pods: Vec<_> = (0..10).map(|i| node.add_silent_pod(&format!("p{round}-{i}"))).collect::<Result<_>>()?;
            let mut addresses: Vec<_> = pods.iter().flat_map(|p| p.addresses().to_vec()).collect();
            let all = addresses.len();
            addresses.sort();
            addresses.dedup();
            ensure!(addresses.len() == all && all == 20, "addresses given twice: {addresses:?}");
            for pod in pods {
                pod.delete()?;
            }
        }
        let after = traces(node)?;
        ensure!(before == after, "before {before:?}\nafter  {after:?}");
        Ok(())
    })
}

/// Mounts the directories that are written, and makes all around them read-only.
fn mount_as_in_a_container(node: &Node) -> Result<()> {
    let bind = |dir: &Path, flags| mount(Some(dir), dir, None::<&str>, MsFlags::MS_BIND | flags, None::<&str>);
    for dir in [node.run_dir(), node.cni_bin_dir(), node.cni_conf_dir()] {
        bind(&dir, MsFlags::empty())?;
    }
    bind(node.dir(), MsFlags::MS_REC)?;
    bind(node.dir(), MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY)?;
    Ok(())
}

/// `rustnetctl cleanup` removes everything of ours and nothing else. The run directory is mounted, as `deploy/uninstall` has
/// it: it stays, and nothing is in it.
#[test]
fn cleanup_removes_everything_of_ours() -> Result<()> {
    observed(&Net::start(Setup::default())?, |net| {
        let node = net.node(1);
        let foreign = node.netns();
        foreign.ip("link add keepme type bridge\nroute add 203.0.113.0/24 via 172.18.0.1\n")?;
        node.stop_agent()?;
        let run_dir = node.run_dir();
        node.netns().run(|| mount_as_in_a_container(node))??;
        node.rustnetctl(&["cleanup", "--yes"])?;
        let left: Vec<_> = std::fs::read_dir(&run_dir)?.collect();
        ensure!(left.is_empty(), "{left:?}");
        let links = foreign.exec("ip", &["-o", "link"])?;
        ensure!(!links.contains(names::VETH_PREFIX) && !links.contains(names::OVERLAY_DEV), "{links}");
        ensure!(links.contains("keepme"), "a foreign bridge is gone: {links}");
        let routes = foreign.exec("ip", &["route"])? + &foreign.exec("ip", &["-6", "route"])?;
        ensure!(routes.contains("203.0.113.0/24"), "a foreign route is gone: {routes}");
        ensure!(!routes.contains("244"), "{routes}");
        ensure!(!node.bpffs_from_outside().exists(), "{} is left", node.bpffs().display());
        let attached = foreign.exec("bpftool", &["net", "show", "dev", "eth0"])?;
        ensure!(!attached.contains("uplink_"), "{attached}");
        Ok(())
    })
}
