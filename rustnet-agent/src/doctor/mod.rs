//! The preflight: what on this node keeps rustnet, or the pods, from working, and the remedy of each.
//!
//! One file a group of checks. Each gathers its facts (the only part that looks at the host) and judges them (pure, and tested
//! with one fault at a time). Nothing is changed (a map that is pinned as a trial is removed), and no packet is sent but to the API server.

pub mod api;
pub mod cgroup;
pub mod cni;
pub mod conntrack;
pub mod filesystem;
pub mod finding;
pub mod firewall;
pub mod kernel;
pub mod kube_proxy;
pub mod manager;
pub mod mark;
pub mod mtu;
pub mod neighbours;
pub mod network;
pub mod nodes;
pub mod overlay;
pub mod ports;
pub mod proxy_config;
pub mod ranges;
pub mod reach;
pub mod sysctls;
pub mod unserved;
pub mod xdp;

use crate::config::{Config, Refused};
use crate::net::host::Host;
use crate::net::netlink::Socket;
use crate::reconcile::node::settings;
use crate::ways::Ways;
use finding::{Finding, Group, Level, split_remedy};
use std::path::Path;

/// When the checks are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Before the agent starts: only what can be known without it.
    Before,
    /// While the agent runs.
    Running,
}

/// All groups that need a configuration, in the order in which they are printed.
///
/// `proxy_config`: a file with kube-proxy's own configuration; without one, the API server is asked.
pub fn examine(config: &Config, stage: Stage, proxy_config: Option<&Path>) -> Vec<Group> {
    let host = Socket::open().map_err(anyhow::Error::from).and_then(|mut socket| Host::observe(&mut socket));
    let host = match host {
        Ok(host) => host,
        Err(error) => return vec![Group::new("Host", vec![Finding::unknown("network", &error)])],
    };
    let cluster = api::gather(config, stage);
    let nodes = cluster.nodes.as_deref().unwrap_or_default();
    let ways = Ways::new(&settings(config), nodes.iter().map(|known| &*known.node), &host.facts());
    let mut groups = vec![
        Group::new("Configuration", vec![Finding::ok("settings", format!("node {}", config.node_name))]),
        Group::new("Kernel", kernel_findings(config)),
        Group::new("File system", filesystem::gather(config).iter().flat_map(filesystem::check).collect()),
        Group::new("Host settings", host_settings(config, &host, &ways, stage, nodes.len())),
        Group::new("Ports", ports::check(&ports::gather(config))),
        Group::new("Firewall", firewall::check(&firewall::gather(config, &ways))),
        Group::new("Overlay", overlay::gather(config, &ways, stage).iter().flat_map(overlay::check).collect()),
        Group::new("XDP", xdp::gather(config, &host, &ways, stage).iter().flat_map(xdp::check).collect()),
        Group::new("Packet mark", mark::check(&mark::gather(config))),
        Group::new("CNI", cni::check(&cni::gather(config), stage)),
        Group::new("kube-proxy", kube_proxy::check(&kube_proxy::gather())),
        Group::new(
            "kube-proxy's configuration",
            proxy_config::check(&proxy_config::gather(config, stage, proxy_config)),
        ),
        Group::new("API server", api::check(&cluster.api)),
        Group::new("Nodes", nodes::check(&nodes::gather(config, &host, cluster.nodes.as_ref()))),
        Group::new("Host network", host_network(config, &host, &ways, stage)),
        Group::new("Address ranges", ranges::check(config, &host, nodes)),
        Group::new("MTU", mtu::check(&mtu::gather(config, &host, &ways, nodes))),
    ];
    if stage == Stage::Running {
        groups.push(Group::new("Features", unserved::check(&unserved::gather(config))));
    }
    groups.retain(|group| !group.findings.is_empty());
    groups
}

/// What the kernel is, and what else is attached to it.
fn kernel_findings(config: &Config) -> Vec<Finding> {
    let others = cgroup::gather(config).iter().flat_map(cgroup::check).collect();
    [kernel::check(&kernel::gather(Some(config))), others].concat()
}

/// What the kernel and its administration are set to.
fn host_settings(config: &Config, host: &Host, ways: &Ways, stage: Stage, nodes: usize) -> Vec<Finding> {
    let sysctls = sysctls::check(&sysctls::gather(config, host, ways), stage);
    let neighbours = neighbours::gather(config, nodes).iter().flat_map(neighbours::check).collect::<Vec<_>>();
    let manager = manager::gather(host).map(|managed| manager::check(&managed)).unwrap_or_default();
    let connections = conntrack::gather(&config.sysctl_dir).iter().flat_map(conntrack::check).collect::<Vec<_>>();
    [sysctls, neighbours, connections, manager].concat()
}

/// Where packets leave this host: as it should be, and as it is once an agent has made its routes.
fn host_network(config: &Config, host: &Host, ways: &Ways, stage: Stage) -> Vec<Finding> {
    let reached = if stage == Stage::Running { reach::check(&reach::gather(config, host, ways)) } else { Vec::new() };
    [network::check(ways), reached].concat()
}

/// The findings when the settings are refused: the reasons, and all that does not depend on
/// settings.
pub fn without_config(refused: &Refused) -> Vec<Group> {
    let problem = |text: &String| {
        let (detail, hint) = split_remedy(text);
        Finding::new(Level::Fatal, "settings", detail).hint(hint)
    };
    let unchecked = "the rest was not checked for want of settings";
    let rest = Finding::new(Level::Warning, "not checked", unchecked).hint("fix these first, then run this again");
    let problems = refused.0.iter().map(problem).chain([rest]).collect();
    vec![
        Group::new("Configuration", problems),
        Group::new("Kernel", kernel::check(&kernel::gather(None))),
        Group::new("kube-proxy", kube_proxy::check(&kube_proxy::gather())),
    ]
}
