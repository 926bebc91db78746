//! Network namespaces and the links between them: one switch, and on it the control plane and the nodes.

use std::fs::{self, File};
use std::path::Path;
use std::thread;

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns};

use super::layout::Cluster;
use super::settings::{Both, CONTROL_PLANE, Family, SWITCH, address};
use crate::cmd::Cmd;

/// Makes what is missing.
pub fn make(cluster: &Cluster) -> Result<()> {
    if !cluster.netns_file("sw").exists() {
        switch(cluster)?;
    }
    plug(cluster, "cp", address(CONTROL_PLANE))?;
    for node in cluster.nodes() {
        if plug(cluster, &node.name, node.address())? {
            // Nodes forward: kubelet does not see to it. What a bridge carries goes by the rules of kube-proxy.
            sysctls(cluster, &node.name, &[("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")])?;
            optional(
                cluster,
                &node.name,
                &[("bridge/bridge-nf-call-iptables", "1"), ("bridge/bridge-nf-call-ip6tables", "1")],
            )?;
            sysctls(cluster, &node.name, &[("ipv4/conf/all/rp_filter", "0"), ("ipv4/conf/default/rp_filter", "0")])?;
        }
    }
    Ok(())
}

/// Removes all of them.
pub fn remove(cluster: &Cluster) -> Result<()> {
    for name in all(&cluster.name) {
        ip(&["netns", "del", &name])?;
    }
    Ok(())
}

/// Removes one, and the switch's end of its link, which would go some time later by itself.
pub fn unplug(cluster: &Cluster, name: &str) -> Result<()> {
    ip(&["-n", &cluster.netns("sw"), "link", "del", &port(name)])?;
    ip(&["netns", "del", &cluster.netns(name)])
}

/// The switch's end of a link.
fn port(name: &str) -> String {
    format!("p-{name}")
}

/// The names of the network namespaces that are there.
pub fn all(cluster: &str) -> Vec<String> {
    let entries = fs::read_dir("/run/netns").into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| name.starts_with(&format!("{cluster}-"))).collect();
    names.sort();
    names
}

/// Runs something inside a network namespace.
pub fn inside<T: Send>(netns: &Path, job: impl FnOnce() -> T + Send) -> Result<T> {
    let file = File::open(netns).with_context(|| format!("opening the namespace {}", netns.display()))?;
    // A thread of its own: it never comes back to ours.
    let result = thread::scope(|scope| {
        let thread = scope.spawn(move || setns(&file, CloneFlags::CLONE_NEWNET).map(|()| job()));
        thread.join()
    });
    let result = result.map_err(|_| anyhow!("a thread in {} panicked", netns.display()))?;
    result.with_context(|| format!("entering the namespace {}", netns.display()))
}

fn switch(cluster: &Cluster) -> Result<()> {
    add(cluster, "sw")?;
    let netns = cluster.netns("sw");
    ip(&["-n", &netns, "link", "add", "br0", "type", "bridge"])?;
    addresses(cluster, "sw", "br0", address(SWITCH))?;
    ip(&["-n", &netns, "link", "set", "br0", "up"])?;
    // A switch, and neither a router nor a firewall.
    sysctls(cluster, "sw", &[("ipv4/ip_forward", "0")])?;
    optional(cluster, "sw", &[("bridge/bridge-nf-call-iptables", "0"), ("bridge/bridge-nf-call-ip6tables", "0")])
}

/// A namespace with `eth0` on the switch. Returns whether it was made.
fn plug(cluster: &Cluster, name: &str, own: Both<String>) -> Result<bool> {
    if cluster.netns_file(name).exists() {
        return Ok(false);
    }
    add(cluster, name)?;
    let (netns, switch, port) = (cluster.netns(name), cluster.netns("sw"), port(name));
    ip(&["-n", &netns, "link", "add", "eth0", "type", "veth", "peer", "name", &port, "netns", &switch])?;
    sysctls(cluster, name, &[("ipv6/conf/all/accept_ra", "0"), ("ipv6/conf/default/accept_ra", "0")])?;
    // A machine that stands still for seconds loses none of its neighbours, nor what waits for them.
    let patient = [("ipv4/neigh/eth0/ucast_solicit", "20"), ("ipv6/neigh/eth0/ucast_solicit", "20")];
    sysctls(cluster, name, &patient)?;
    addresses(cluster, name, "eth0", own)?;
    ip(&["-n", &netns, "link", "set", "eth0", "up"])?;
    ip(&["-n", &switch, "link", "set", &port, "master", "br0", "up"])?;
    for gateway in address(SWITCH).of(cluster.settings.ip_family) {
        let family = if gateway.contains(':') { "-6" } else { "-4" };
        ip(&["-n", &netns, family, "route", "add", "default", "via", &gateway])?;
    }
    Ok(true)
}

fn add(cluster: &Cluster, name: &str) -> Result<()> {
    let netns = cluster.netns(name);
    ip(&["netns", "add", &netns])?;
    ip(&["-n", &netns, "link", "set", "lo", "up"])?;
    // Nobody else is there to have an address twice.
    sysctls(cluster, name, &[("ipv6/conf/all/accept_dad", "0"), ("ipv6/conf/default/accept_dad", "0")])
}

fn addresses(cluster: &Cluster, name: &str, device: &str, own: Both<String>) -> Result<()> {
    let netns = cluster.netns(name);
    let Both { v4, v6 } = own;
    if cluster.settings.ip_family != Family::Ipv6 {
        ip(&["-n", &netns, "addr", "add", &format!("{v4}/24"), "dev", device])?;
    }
    if cluster.settings.ip_family != Family::Ipv4 {
        ip(&["-n", &netns, "addr", "add", &format!("{v6}/64"), "dev", device, "nodad"])?;
    }
    Ok(())
}

/// Settings below `/proc/sys/net` of a namespace.
pub fn sysctls(cluster: &Cluster, name: &str, values: &[(&str, &str)]) -> Result<()> {
    inside(&cluster.netns_file(name), || {
        values.iter().try_for_each(|(key, value)| {
            let file = Path::new("/proc/sys/net").join(key);
            fs::write(&file, value).with_context(|| format!("writing {}", file.display()))
        })
    })?
}

/// The same for settings that not every kernel has.
fn optional(cluster: &Cluster, name: &str, values: &[(&str, &str)]) -> Result<()> {
    inside(&cluster.netns_file(name), || {
        for (key, value) in values {
            let _ = fs::write(Path::new("/proc/sys/net").join(key), value); // without br_netfilter there is no such file
        }
    })
}

/// `ip` with these arguments.
pub fn ip(args: &[&str]) -> Result<()> {
    Cmd::new("ip").args(args).capture().map(drop)
}
