//! Which objects ask for what is not served: how many, and a few names.

use crate::model::{Feature, ObjectName, Pod, Problem};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// Names that are given of each feature.
const EXAMPLES: usize = 3;

/// The objects that ask for one feature.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Askers {
    /// How many.
    pub count: usize,
    /// The first few by name.
    pub examples: BTreeSet<ObjectName>,
}

impl Askers {
    fn add(&mut self, name: &ObjectName) {
        self.count += 1;
        self.examples.insert(name.clone());
        if self.examples.len() > EXAMPLES {
            self.examples.pop_last();
        }
    }

    /// The names, and whether there are more.
    pub fn names(&self) -> String {
        let names: Vec<_> = self.examples.iter().map(ToString::to_string).collect();
        // Not how many: the text of a problem changes no more often than it must.
        names.join(", ") + if self.count > EXAMPLES { " and others" } else { "" }
    }
}

/// Askers by feature; features that nobody asks for are left out.
pub type Unserved = BTreeMap<Feature, Askers>;

/// Looks through all objects. `port_holders`: addresses of pods that were connected with ports of this node. One without an address is
/// not connected yet.
pub fn find<'a>(pods: impl Iterator<Item = &'a Pod>, port_holders: &BTreeSet<IpAddr>) -> Unserved {
    let mut found = Unserved::new();
    let is_without =
        |pod: &&Pod| !pod.addresses.is_empty() && pod.addresses.iter().all(|ip| !port_holders.contains(ip));
    for pod in pods.filter(|pod| pod.host_ports && !pod.host_network).filter(is_without) {
        found.entry(Feature::HostPort).or_default().add(&pod.name);
    }
    found
}

/// One problem a feature.
pub fn problems(unserved: &Unserved) -> impl Iterator<Item = Problem> + '_ {
    unserved.iter().map(|(feature, askers)| {
        let message = format!("not served, but asked for by {}; {}", askers.names(), feature.remedy());
        Problem::new(&feature.field().into(), "", message)
    })
}

#[cfg(test)]
mod tests {
    use super::{find, problems};
    use crate::model::{Feature, ObjectName, Pod};

    fn pod(name: &str, host_ports: bool, host_network: bool) -> Pod {
        let name = ObjectName::namespaced("default", name);
        let addresses = ["10.0.0.2".parse().unwrap()].into();
        Pod {
            name,
            uid: "u".into(),
            node: "n1".into(),
            addresses,
            host_network,
            host_ports,
            socket_lb: None,
            labels: crate::model::Labels::default(),
            ports: Box::default(),
            problems: Box::default(),
        }
    }

    #[test]
    fn a_pod_that_was_connected_with_its_ports_is_served() {
        let pods = [pod("a", true, false)];
        assert_eq!(find(pods.iter(), &["10.0.0.3".parse().unwrap()].into()).len(), 1);
        assert_eq!(find(pods.iter(), &["10.0.0.2".parse().unwrap()].into()).len(), 0);
        let waiting = [Pod { addresses: [].into(), ..pod("b", true, false) }];
        assert_eq!(find(waiting.iter(), &[].into()).len(), 0);
    }

    #[test]
    fn each_feature_is_one_problem_with_three_names() {
        let mut pods: Vec<_> = ["d", "c", "b", "a"].into_iter().map(|name| pod(name, true, false)).collect();
        pods.extend([pod("proxy", true, true), pod("web", false, false)]);
        let found = find(pods.iter(), &[].into());
        let counts: Vec<_> = found.iter().map(|(feature, askers)| (feature.name(), askers.count)).collect();
        assert_eq!(counts, [("host_port", 4)]);
        let problems: Vec<_> = problems(&found).map(|problem| problem.to_string()).collect();
        assert_eq!(
            problems,
            [
                "Pod hostPort: not served, but asked for by default/a, default/b, default/c and others; delete the pod: the next one is \
                 connected with its ports; or declare the capability portMappings in your CNI configuration"
            ]
        );
        assert!(Feature::ALL.into_iter().all(|feature| Feature::of_name(feature.name()) == Some(feature)));
    }
}
