//! Ports: the agent's own, the overlay's, those of Kubernetes' components, and the node ports.
//!
//! A component's port that the component has is as it should be; free is as well, for the component may not run here or not yet.

use std::net::SocketAddr;

use anyhow::Result;
use rustnet_common::names::OVERLAY_DEV;

use super::finding::{Finding, Level};
use crate::config::{Config, NODE_PORTS};
use crate::leftovers::sockets::{self, Listener, Owner, Proto};
use crate::net::link;
use crate::net::netlink::Socket;
use crate::reconcile::{node, presence};

/// Kubernetes' components: port and program.
const COMPONENTS: [(u16, &str); 6] = [
    (6443, "kube-apiserver"),
    (2379, "etcd"),
    (2380, "etcd"),
    (10250, "kubelet"),
    (10259, "kube-scheduler"),
    (10257, "kube-controller-manager"),
];
/// Programs that are several components in one.
const ALL_IN_ONE: [&str; 6] = ["k3s", "rke2", "k0s", "microk8s", "kubelite", "hyperkube"];
/// The agent's program.
const AGENT: &str = "rustnet-agent";
/// What the agent takes the place of: it serves the same ports, one of them by default.
const KUBE_PROXY: &str = "kube-proxy";
/// The setting of that port.
const HEALTHZ: &str = "healthz-bind-address";

/// What was found.
pub struct Facts {
    /// All listeners.
    pub listeners: Result<Vec<Listener>>,
    /// An agent serves the run directory.
    pub agent_here: bool,
    /// What the agent serves: what it is for, the setting, the address.
    pub own: Vec<(&'static str, &'static str, SocketAddr)>,
    /// The overlay's port; `None` without overlay.
    pub overlay: Option<u16>,
    /// VXLAN devices: name and port.
    pub vxlans: Vec<(String, u16)>,
    /// Ports of the host's own connections, first and last.
    pub local: Result<(u16, u16)>,
    /// The agent chooses ports for masquerade.
    pub is_masquerade_chosen: bool,
}

/// Looks.
pub fn gather(config: &Config) -> Facts {
    let name = |flag| match flag {
        "health-addr" => "agent health",
        HEALTHZ => "proxy health",
        _ => "agent metrics",
    };
    let links = Socket::open().map_err(anyhow::Error::from).and_then(|mut socket| link::list(&mut socket));
    let vxlans = links.unwrap_or_default().into_iter().filter_map(|link| Some((link.name, link.vxlan?.port)));
    Facts {
        listeners: sockets::listeners(),
        agent_here: presence::is_served(&config.run_dir),
        own: config.listeners().into_iter().map(|(flag, addr)| (name(flag), flag, addr)).collect(),
        overlay: config.routing.has_overlay().then_some(config.overlay_port),
        vxlans: vxlans.collect(),
        local: node::local_ports(),
        is_masquerade_chosen: config.masquerade && config.snat_ports.is_none(),
    }
}

/// Judges.
pub fn check(facts: &Facts) -> Vec<Finding> {
    let listeners = match &facts.listeners {
        Ok(listeners) => listeners,
        Err(error) => return vec![Finding::unknown("ports", error)],
    };
    let tcp = |port| listeners.iter().find(move |it| it.proto == Proto::Tcp && it.port == port);
    let mut found = Vec::new();
    for (what, flag, addr) in &facts.own {
        let in_the_way = |it: &&Listener| {
            let same_address = it.addr == addr.ip() || it.addr.is_unspecified() || addr.ip().is_unspecified();
            it.proto == Proto::Tcp && it.port == addr.port() && same_address
        };
        found.push(own(what, flag, addr.port(), listeners.iter().find(in_the_way), facts.agent_here));
    }
    found.extend(facts.overlay.map(|port| overlay(port, listeners, &facts.vxlans)));
    for (port, component) in COMPONENTS {
        found.push(self::component(port, component, tcp(port)));
    }
    found.push(local_range(&facts.local));
    found.extend(facts.local.as_ref().ok().filter(|_| facts.is_masquerade_chosen).map(|local| masquerade(*local)));
    found.extend(inside_node_ports(listeners, facts.agent_here));
    found
}

fn name(owner: &Owner) -> String {
    match owner {
        Owner::Kernel => "the kernel".to_owned(),
        Owner::Process(name) => name.clone(),
        Owner::Hidden => "a process that cannot be seen from here".to_owned(),
    }
}

fn own(what: &'static str, flag: &str, port: u16, there: Option<&Listener>, agent_here: bool) -> Finding {
    let finding = match there.map(|it| &it.owner) {
        None => Finding::ok(what, "free"),
        Some(Owner::Process(name)) if name == AGENT => Finding::ok(what, AGENT),
        Some(Owner::Hidden) if agent_here => Finding::ok(what, "in use, and an agent runs here"),
        Some(Owner::Process(name)) if name == KUBE_PROXY && flag == HEALTHZ => {
            Finding::ok(what, "kube-proxy's; the agent takes it when that is gone")
        }
        Some(owner) => {
            // Pods need no load balancer, and the process may be kube-proxy.
            let level = if flag == HEALTHZ { Level::Warning } else { Level::Fault };
            Finding::new(level, what, format!("taken by {}", name(owner)))
                .hint(format!("free the port, or give the agent another one with --{flag}"))
        }
    };
    finding.called(format!("{what}, TCP {port}"))
}

fn overlay(port: u16, listeners: &[Listener], vxlans: &[(String, u16)]) -> Finding {
    let what = "overlay port";
    let taken = |by: &str| {
        Finding::new(Level::Fault, what, format!("taken by {by}"))
            .hint("remove it, or give all agents another --overlay-port")
    };
    let foreign = vxlans.iter().find(|(name, of)| *of == port && name != OVERLAY_DEV);
    let finding = if let Some((name, _)) = foreign {
        taken(&format!("the VXLAN device {name}"))
    } else if vxlans.iter().any(|(name, of)| name == OVERLAY_DEV && *of == port) {
        Finding::ok(what, OVERLAY_DEV)
    } else {
        match listeners.iter().find(|it| it.proto == Proto::Udp && it.port == port) {
            None => Finding::ok(what, "free"),
            Some(it) => taken(&name(&it.owner)),
        }
    };
    finding.called(format!("overlay, UDP {port}"))
}

fn component(port: u16, component: &'static str, there: Option<&Listener>) -> Finding {
    let what = component;
    let finding = match there.map(|it| &it.owner) {
        None => Finding::ok(what, "free"),
        Some(Owner::Process(name)) if name == component || ALL_IN_ONE.contains(&name.as_str()) => {
            Finding::ok(what, name)
        }
        // Containers do not see the host's processes: that something serves there is what one expects.
        Some(Owner::Hidden) => Finding::ok(what, "in use"),
        Some(owner) => Finding::new(Level::Warning, what, format!("taken by {}", name(owner)))
            .hint(format!("if {component} is to run here, stop that or give it another port")),
    };
    finding.called(format!("{component}, TCP {port}"))
}

fn local_range(local: &Result<(u16, u16)>) -> Finding {
    let (what, (first, last)) = ("node ports", NODE_PORTS);
    match local {
        Err(error) => Finding::unknown(what, error),
        Ok((from, to)) if *from <= last && first <= *to => Finding::new(
            Level::Warning,
            what,
            format!("the host's own connections use ports {from}-{to}, which overlap {first}-{last}"),
        )
        .hint(node::PORT_RANGE_REMEDY),
        Ok((from, to)) => Finding::ok(what, format!("{first}-{last} apart from the host's own {from}-{to}")),
    }
}

/// Ports that pods get out in the world.
fn masquerade(local: (u16, u16)) -> Finding {
    let (what, ports) = ("masquerade ports", node::snat_ports(local));
    let (first, last) = (ports.first, ports.last);
    if ports.shared == 0 {
        return Finding::ok(what, format!("{first}-{last}"));
    }
    let least = node::SNAT_PORTS;
    let detail = format!(
        "{} of {first}-{last} are the host's own, too: net.ipv4.ip_local_port_range {}-{} leaves fewer than {least}",
        ports.shared, local.0, local.1
    );
    Finding::new(Level::Warning, what, detail).hint(node::PORT_RANGE_REMEDY)
}

/// Servers of the host on ports that Kubernetes may give to Services. The answers to load balancers' health checks are there as they
/// should be.
fn inside_node_ports(listeners: &[Listener], agent_here: bool) -> Option<Finding> {
    let (first, last) = NODE_PORTS;
    let is_check = |it: &Listener| match &it.owner {
        Owner::Process(name) => [AGENT, KUBE_PROXY].contains(&name.as_str()),
        Owner::Hidden => agent_here,
        Owner::Kernel => false,
    };
    let inside = |it: &&Listener| {
        let is_node_port = it.proto == Proto::Tcp && (first..=last).contains(&it.port);
        is_node_port && !it.addr.is_loopback() && !is_check(it)
    };
    let mut names: Vec<_> =
        listeners.iter().filter(inside).map(|it| format!("{} ({})", it.port, name(&it.owner))).collect();
    names.dedup();
    (!names.is_empty()).then(|| {
        Finding::new(Level::Warning, "node ports in use", names.join(", "))
            .hint("move these servers: a Service with such a node port would get their clients")
    })
}

#[cfg(test)]
mod tests {
    use super::super::finding::{assert_only, assert_well};
    use super::*;
    use std::net::Ipv4Addr;

    fn listener(proto: Proto, port: u16, owner: Owner) -> Listener {
        Listener { proto, addr: Ipv4Addr::UNSPECIFIED.into(), port, owner }
    }

    fn process(port: u16, name: &str) -> Listener {
        listener(Proto::Tcp, port, Owner::Process(name.into()))
    }

    fn facts(listeners: Vec<Listener>) -> Facts {
        Facts {
            listeners: Ok(listeners),
            agent_here: false,
            own: vec![
                ("agent health", "health-addr", (Ipv4Addr::LOCALHOST, 9879).into()),
                ("proxy health", HEALTHZ, (Ipv4Addr::UNSPECIFIED, 10_256).into()),
                ("agent metrics", "metrics-addr", (Ipv4Addr::UNSPECIFIED, 9962).into()),
            ],
            overlay: Some(8472),
            vxlans: Vec::new(),
            local: Ok((32_768, 60_999)),
            is_masquerade_chosen: true,
        }
    }

    #[test]
    fn a_host_that_leaves_masquerade_too_few_ports_is_named() {
        let all = Facts { local: Ok((1024, 65_535)), ..facts(Vec::new()) };
        let findings = check(&all);
        let wrong: Vec<_> = findings.iter().filter(|it| it.level != Level::Ok).collect();
        let [node_ports, masquerade] = wrong[..] else { panic!("{wrong:#?}") };
        assert!(node_ports.detail.contains("30000-32767"), "{node_ports:?}");
        assert_eq!((masquerade.level, masquerade.what.as_str()), (Level::Warning, "masquerade ports"));
        assert!(masquerade.detail.contains("8192 of 57344-65535"), "{masquerade:?}");
        assert!(masquerade.hint.contains("ip_local_port_range"), "{masquerade:?}");
        // Ports that a setting names are as asked for.
        assert_only(&check(&Facts { is_masquerade_chosen: false, ..all }), Level::Warning, "1024-65535", "sysctl");
    }

    #[test]
    fn free_ports_and_working_nodes_are_well() {
        assert_well(&check(&facts(Vec::new())));
        let mut node: Vec<_> = COMPONENTS.iter().map(|(port, name)| process(*port, name)).collect();
        node.extend([process(9879, AGENT), process(9962, AGENT), listener(Proto::Udp, 8472, Owner::Kernel)]);
        let vxlans = vec![(OVERLAY_DEV.to_owned(), 8472)];
        assert_well(&check(&Facts { vxlans, ..facts(node) }));
        // From a container, while an agent runs.
        let hidden = [9879, 9962, 6443, 10250].map(|port| listener(Proto::Tcp, port, Owner::Hidden));
        assert_well(&check(&Facts { agent_here: true, ..facts(hidden.into()) }));
        assert_well(&check(&facts(vec![process(10250, "k3s")])));
        for name in [AGENT, KUBE_PROXY] {
            assert_well(&check(&facts(vec![process(10_256, name), process(32_001, name)])));
        }
        let elsewhere = Listener { addr: [192, 0, 2, 1].into(), ..process(9879, "nginx") };
        assert_well(&check(&facts(vec![elsewhere])));
        let local = Listener { addr: Ipv4Addr::LOCALHOST.into(), ..process(30_080, "nginx") };
        assert_well(&check(&facts(vec![local])));
    }

    #[test]
    fn one_fault_at_a_time() {
        let flannel = vec![("flannel.1".to_owned(), 8472)];
        for (facts, level, detail, hint) in [
            (facts(vec![process(9879, "nginx")]), Level::Fault, "taken by nginx", "--health-addr"),
            (facts(vec![listener(Proto::Tcp, 9962, Owner::Hidden)]), Level::Fault, "cannot be seen", "--metrics-addr"),
            (facts(vec![process(10_256, "nginx")]), Level::Warning, "taken by nginx", "--healthz-bind-address"),
            (facts(vec![process(2380, "nginx")]), Level::Warning, "taken by nginx", "etcd"),
            (facts(vec![process(10250, "etcd")]), Level::Warning, "taken by etcd", "kubelet"),
            (Facts { vxlans: flannel, ..facts(Vec::new()) }, Level::Fault, "flannel.1", "--overlay-port"),
            (
                facts(vec![listener(Proto::Udp, 8472, Owner::Process("socat".into()))]),
                Level::Fault,
                "socat",
                "--overlay-port",
            ),
            (
                Facts { local: Ok((30_000, 60_999)), ..facts(Vec::new()) },
                Level::Warning,
                "30000-60999",
                "ip_local_port_range",
            ),
            (facts(vec![process(30_080, "nginx")]), Level::Warning, "30080 (nginx)", "move"),
            (
                Facts { listeners: Err(anyhow::anyhow!("EACCES")), ..facts(Vec::new()) },
                Level::Warning,
                "not checked",
                "root",
            ),
        ] {
            assert_only(&check(&facts), level, detail, hint);
        }
    }

    #[test]
    fn native_routing_has_no_overlay() {
        let socket = listener(Proto::Udp, 8472, Owner::Process("socat".into()));
        assert_well(&check(&Facts { overlay: None, ..facts(vec![socket]) }));
    }
}
