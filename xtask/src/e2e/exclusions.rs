//! Which upstream tests are not run, and why: each with a reason that the table of results repeats.

use crate::cluster::Network;

/// Tests whose name holds the text.
pub struct Exclusion {
    /// A part of the full name.
    pub part: &'static str,
    /// Why they are not run, as a reader of the table wants to know it.
    pub reason: &'static str,
    /// Whether only for this network: the other one can do it.
    network: Option<Network>,
}

const fn here(part: &'static str, reason: &'static str) -> Exclusion {
    Exclusion { part, reason, network: None }
}

const fn rustnet(part: &'static str, reason: &'static str) -> Exclusion {
    Exclusion { part, reason, network: Some(Network::Rustnet) }
}

const fn reference(part: &'static str, reason: &'static str) -> Exclusion {
    Exclusion { part, reason, network: Some(Network::Reference) }
}

const INTERNET: &str = "the cluster has no way to the Internet";
const KUBE_PROXY: &str = "about kube-proxy itself";
const MORE_NODES: &str = "wants more nodes in more zones";
const DISRUPTIVE: &str = "breaks components by ssh";

/// All of them; the first that matches gives the reason.
static ALL: [Exclusion; 18] = [
    // What this cluster, machine or kernel cannot do, whatever the network.
    here("[Feature:SCTPConnectivity]", "SCTP sockets, which not every kernel has"),
    here("[Feature:Networking-IPv4]", INTERNET),
    here("[Feature:Networking-IPv6]", INTERNET),
    here("[Feature:Networking-DNS]", INTERNET),
    here("[Feature:Networking-Performance]", "measures, and proves nothing"),
    here("[Feature:PerformanceDNS]", "takes hours: it creates 10,000 services"),
    here("[Disruptive]", DISRUPTIVE),
    here("[Provider:GCE]", "asks for Google's cloud"),
    here("[Feature:OffByDefault]", "an alpha feature that is off"),
    here("on multiple nodes when using", MORE_NODES),
    here("on the same node or fall back to same zone", MORE_NODES),
    here("Forward PTR lookup", "looks up names of the Internet"),
    here("[Feature:KubeProxyNFAcct]", KUBE_PROXY),
    here("kube-proxy migration", KUBE_PROXY),
    here("[Feature:Example]", "an example"),
    reference("[Feature:NetworkPolicy]", "the reference network enforces no network policies"),
    // What rustnet does not do yet.
    rustnet("should check kube-proxy urls", KUBE_PROXY),
    rustnet("KubeProxy should set TCP CLOSE_WAIT", KUBE_PROXY),
];

/// Those that concern a network.
pub fn of(network: Network) -> impl Iterator<Item = &'static Exclusion> {
    ALL.iter().filter(move |it| it.network.is_none_or(|only| only == network))
}
