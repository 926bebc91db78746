//! What objects ask for and rustnet does not serve.

/// A feature of Kubernetes that is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Feature {
    /// `loadBalancerSourceRanges`: not applied, so that its load balancer's addresses are not served.
    SourceRanges,
    /// `hostPort` of a pod that does not use the host's network.
    HostPort,
}

impl Feature {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::SourceRanges, Self::HostPort];

    /// The name in metrics and files.
    pub const fn name(self) -> &'static str {
        match self {
            Self::SourceRanges => "source_ranges",
            Self::HostPort => "host_port",
        }
    }

    /// The feature of this name.
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|feature| feature.name() == name)
    }

    /// What people call it: kind and field of the objects that ask for it.
    pub const fn field(self) -> &'static str {
        match self {
            Self::SourceRanges => "Service spec.loadBalancerSourceRanges",
            Self::HostPort => "Pod hostPort",
        }
    }

    /// What to do without it.
    pub const fn remedy(self) -> &'static str {
        match self {
            Self::SourceRanges => {
                "filter before the nodes and remove the field; until then no address of its load balancer is served"
            }
            Self::HostPort => "give the pod hostNetwork: true, or a Service",
        }
    }
}
