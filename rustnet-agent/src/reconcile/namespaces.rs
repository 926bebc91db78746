//! Whose sockets ask for Services by themselves: the network namespaces of the pods that want it. Pure.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use rustnet_common::files::EndpointFile;
use rustnet_common::socket::netns;

use crate::config::SocketLb;
use crate::model::Pod;

/// Flags of network namespaces, by the kernel's number: see [`netns`].
pub type Namespaces = BTreeMap<u64, u32>;

/// What is known of the pods of this node.
pub struct Pods<'a> {
    by_name: HashMap<&'a str, &'a Pod>,
    by_address: HashMap<IpAddr, &'a Pod>,
    /// All of them have been listed.
    is_complete: bool,
}

impl<'a> Pods<'a> {
    /// From the objects.
    pub fn new(pods: impl Iterator<Item = &'a Pod>, is_complete: bool) -> Self {
        let (mut by_name, mut by_address) = (HashMap::new(), HashMap::new());
        for pod in pods.filter(|pod| !pod.host_network) {
            by_name.insert(pod.name.as_str(), pod);
            by_address.extend(pod.addresses.iter().map(|ip| (*ip, pod)));
        }
        Self { by_name, by_address, is_complete }
    }

    /// The object of a record: by its name, for a static pod's UID is another one in the API; by its address where the runtime gave no
    /// name.
    fn of(&self, record: &EndpointFile) -> Option<&'a Pod> {
        if record.pod_name.is_empty() {
            return record.addresses.iter().find_map(|ip| self.by_address.get(ip)).copied();
        }
        self.by_name.get(format!("{}/{}", record.pod_namespace, record.pod_name).as_str()).copied()
    }
}

/// The namespaces of pods whose sockets ask for Services by themselves. A pod without an object is none, for its annotation is not
/// known; but before all pods are listed, one that is `there` stays.
pub fn wanted(setting: SocketLb, records: &[EndpointFile], pods: &Pods<'_>, there: &Namespaces) -> Namespaces {
    let is_wanted = |record: &EndpointFile, cookie: u64| match (setting, pods.of(record)) {
        (SocketLb::Off, _) => false,
        (_, Some(pod)) => pod.socket_lb.unwrap_or(setting == SocketLb::All),
        (_, None) => !pods.is_complete && there.get(&cookie) == Some(&netns::POD),
    };
    let cookies = records.iter().filter_map(|record| Some((record, record.netns_cookie?)));
    cookies.filter(|(record, cookie)| is_wanted(record, *cookie)).map(|(_, cookie)| (cookie, netns::POD)).collect()
}

#[cfg(test)]
mod tests {
    use super::{Namespaces, Pods, netns, wanted};
    use crate::config::SocketLb;
    use crate::model::{ObjectName, Pod};
    use rustnet_common::files::{Bandwidth, EndpointFile};

    fn record(name: &str, address: &str, cookie: Option<u64>) -> EndpointFile {
        EndpointFile {
            container_id: name.into(),
            ifname: "eth0".into(),
            netns: "/n".into(),
            netns_cookie: cookie,
            network: "rustnet".into(),
            host_ifname: "rnv1".into(),
            ifindex: 7,
            mac: String::new(),
            addresses: vec![address.parse().unwrap()],
            pod_namespace: "shop".into(),
            pod_name: name.into(),
            pod_uid: String::new(),
            bandwidth: Bandwidth::default(),
            host_ports: Vec::new(),
            has_routes: false,
        }
    }

    fn pod(name: &str, address: &str, socket_lb: Option<bool>) -> Pod {
        Pod {
            name: ObjectName::namespaced("shop", name),
            uid: "u".into(),
            node: "n1".into(),
            addresses: [address.parse().unwrap()].into(),
            host_network: false,
            host_ports: false,
            socket_lb,
            labels: crate::model::Labels::default(),
            ports: Box::default(),
            problems: Box::default(),
        }
    }

    fn cookies(of: &Namespaces) -> Vec<u64> {
        assert!(of.values().all(|flags| *flags == netns::POD));
        of.keys().copied().collect()
    }

    #[test]
    fn the_annotation_overrides_the_setting_both_ways_and_off_is_off() {
        let records = [
            record("plain", "10.0.0.1", Some(1)),
            record("yes", "10.0.0.2", Some(2)),
            record("no", "10.0.0.3", Some(3)),
            record("earlier", "10.0.0.4", None),
        ];
        let pods = [
            pod("plain", "10.0.0.1", None),
            pod("yes", "10.0.0.2", Some(true)),
            pod("no", "10.0.0.3", Some(false)),
            pod("earlier", "10.0.0.4", Some(true)),
        ];
        for is_complete in [false, true] {
            let pods = Pods::new(pods.iter(), is_complete);
            for (setting, want) in [(SocketLb::Off, &[][..]), (SocketLb::Host, &[2]), (SocketLb::All, &[1, 2])] {
                // What is known of a pod counts at once.
                let there = [(1, netns::POD), (2, netns::POD), (3, netns::POD)].into();
                assert_eq!(cookies(&wanted(setting, &records, &pods, &there)), want, "{setting:?}");
            }
        }
    }

    #[test]
    fn what_is_there_stays_until_all_pods_are_listed() {
        let records = [record("a", "10.0.0.1", Some(1)), record("b", "10.0.0.2", Some(2))];
        // A pod that is gone has no record; the host is none of them.
        let there = [(1, netns::POD), (7, netns::POD), (9, netns::HOST)].into();
        for (is_complete, want) in [(false, &[1][..]), (true, &[])] {
            let pods = Pods::new([].iter(), is_complete);
            assert_eq!(cookies(&wanted(SocketLb::All, &records, &pods, &there)), want, "{is_complete}");
        }
    }

    #[test]
    fn records_without_a_name_are_found_by_address() {
        let unnamed = EndpointFile { pod_name: String::new(), ..record("", "10.0.0.2", Some(2)) };
        let pods = [pod("a", "10.0.0.2", Some(true)), Pod { host_network: true, ..pod("b", "10.0.0.3", Some(true)) }];
        let of = |record| cookies(&wanted(SocketLb::Host, &[record], &Pods::new(pods.iter(), true), &[].into()));
        assert_eq!(of(unnamed.clone()), [2]);
        assert_eq!(of(EndpointFile { addresses: vec!["10.0.0.3".parse().unwrap()], ..unnamed }), [0; 0]);
    }
}
