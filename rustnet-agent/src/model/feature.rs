//! What objects ask for and rustnet does not serve.

/// A feature of Kubernetes that is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Feature {
    /// `type: NodePort`.
    NodePort,
    /// `type: LoadBalancer`: neither its addresses nor its node ports.
    LoadBalancer,
    /// `externalIPs`.
    ExternalIps,
    /// `sessionAffinity: ClientIP`: recorded, and not applied.
    SessionAffinity,
    /// `hostPort` of a pod that does not use the host's network.
    HostPort,
}

impl Feature {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::NodePort, Self::LoadBalancer, Self::ExternalIps, Self::SessionAffinity, Self::HostPort];

    /// The name in metrics and files.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NodePort => "node_port",
            Self::LoadBalancer => "load_balancer",
            Self::ExternalIps => "external_ips",
            Self::SessionAffinity => "session_affinity",
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
            Self::NodePort => "Service spec.type: NodePort",
            Self::LoadBalancer => "Service spec.type: LoadBalancer",
            Self::ExternalIps => "Service spec.externalIPs",
            Self::SessionAffinity => "Service spec.sessionAffinity: ClientIP",
            Self::HostPort => "Pod hostPort",
        }
    }

    /// What to do without it.
    pub const fn remedy(self) -> &'static str {
        match self {
            Self::NodePort | Self::LoadBalancer | Self::ExternalIps => {
                "let clients outside come by an ingress that uses the host's network; the cluster address is served"
            }
            Self::SessionAffinity => "do not rely on it: each connection may go to another endpoint",
            Self::HostPort => "give the pod hostNetwork: true, or a Service",
        }
    }
}
