//! What objects ask for and rustnet does not serve.

/// A feature of Kubernetes that is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Feature {
    /// `hostPort` of a pod that was connected without it: before this node's CNI configuration asked for such ports.
    HostPort,
}

impl Feature {
    /// All of them.
    pub const ALL: [Self; 1] = [Self::HostPort];

    /// The name in metrics and files.
    pub const fn name(self) -> &'static str {
        match self {
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
            Self::HostPort => "Pod hostPort",
        }
    }

    /// What to do without it.
    pub const fn remedy(self) -> &'static str {
        match self {
            Self::HostPort => {
                "delete the pod: the next one is connected with its ports; or declare the capability portMappings in your CNI configuration"
            }
        }
    }
}
