//! Which upstream tests are not run, and why: each with a reason that the table of results repeats.

use crate::cluster::{Family, Network, Settings};

/// Tests whose name holds the text.
pub struct Exclusion {
    /// A part of the full name.
    pub part: &'static str,
    /// Why they are not run, as a reader of the table wants to know it.
    pub reason: &'static str,
    /// The clusters that cannot run them.
    where_not: fn(&Settings) -> bool,
}

const fn here(part: &'static str, reason: &'static str) -> Exclusion {
    Exclusion { part, reason, where_not: |_| true }
}

const fn rustnet(part: &'static str, reason: &'static str) -> Exclusion {
    Exclusion { part, reason, where_not: |it| matches!(it.network, Network::Rustnet) }
}

const fn reference(part: &'static str, reason: &'static str) -> Exclusion {
    Exclusion { part, reason, where_not: |it| matches!(it.network, Network::Reference) }
}

/// Tests that misread addresses where IPv6 comes first.
const fn ipv6(part: &'static str, reason: &'static str) -> Exclusion {
    Exclusion { part, reason, where_not: |it| matches!(it.ip_family, Family::Ipv6) }
}

/// Tests with traffic between zones of several nodes.
const fn large(part: &'static str) -> Exclusion {
    Exclusion { part, reason: "wants three zones of two nodes each", where_not: |it| it.zones_with(2) < 3 }
}

const INTERNET: &str = "the cluster has no way to the Internet";
const KUBE_PROXY: &str = "about kube-proxy itself";
const DISRUPTIVE: &str = "breaks components by ssh";

/// All of them; the first that matches gives the reason.
static ALL: [Exclusion; 21] = [
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
    large("on multiple nodes when using"),
    large("on the same node or fall back to same zone"),
    Exclusion {
        part: "[Feature:IPv6DualStack]",
        reason: "wants both families",
        where_not: |it| !matches!(it.ip_family, Family::Dual),
    },
    ipv6(
        "should only allow access from service loadbalancer source ranges",
        "gives wget an IPv6 address without brackets",
    ),
    ipv6("[Slow] should work from pods", "takes the part of an IPv6 address before its first colon for the client's"),
    here("Forward PTR lookup", "looks up names of the Internet"),
    here("[Feature:KubeProxyNFAcct]", KUBE_PROXY),
    here("kube-proxy migration", KUBE_PROXY),
    here("[Feature:Example]", "an example"),
    reference("[Feature:NetworkPolicy]", "the reference network enforces no network policies"),
    // What rustnet does not do yet.
    rustnet("should check kube-proxy urls", KUBE_PROXY),
    rustnet("KubeProxy should set TCP CLOSE_WAIT", KUBE_PROXY),
];

/// Those that concern a cluster.
pub fn of(settings: &Settings) -> impl Iterator<Item = &'static Exclusion> {
    ALL.iter().filter(|it| (it.where_not)(settings))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_larger_cluster_can_do_is_run_there() {
        let reason = |options: &[&str], name: &str| {
            let settings = crate::cluster::settings(options).unwrap();
            of(&settings).find(|it| name.contains(it.part)).map(|it| it.reason)
        };
        let (zones, dual) = ("pods on multiple nodes when using PreferClose", "[Feature:IPv6DualStack] x");
        let large = Some("wants three zones of two nodes each");
        assert_eq!(reason(&[], zones), large);
        assert_eq!(reason(&["--nodes", "6"], zones), large);
        assert_eq!(reason(&["--nodes", "5", "--zones", "3"], zones), large);
        assert_eq!(reason(&["--nodes", "6", "--zones", "3"], zones), None);
        assert_eq!(reason(&[], dual), None);
        assert_eq!(reason(&["--ip-family", "ipv6"], dual), Some("wants both families"));
        assert_eq!(reason(&["--ip-family", "ipv4"], dual), Some("wants both families"));
    }
}
