//! Where the cluster's state comes from. Every source gives the same stream of [`Event`]s.

pub mod convert;
pub mod kube;
pub mod manifests;
pub mod policy_api;

use crate::model::{
    ClusterNetworkPolicy, EndpointSlice, Namespace, NetworkPolicy, Node, ObjectName, Pod, Problem, Service, ServiceCidr,
};
use std::fmt;
use std::sync::Arc;

/// What sources tell. Events of one kind keep their order.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// An object is there, or is other than before.
    Apply(Object),
    /// An object is gone, or is not for us any more.
    Delete(ObjectRef),
    /// An object cannot be used at all. It counts as gone, and its problems are reported until its next event.
    Reject(ObjectRef, Box<[Problem]>),
    /// An object is there that cannot be read. What was known of it stays, and its problems are reported until its next event.
    Unreadable(ObjectRef, Box<[Problem]>),
    /// A fresh full list of a kind begins: what is not applied between here and [`Event::Synced`] is gone.
    Restart(Kind),
    /// A kind's full list has been delivered. What follows from it waits for this ([`crate::index::Gate`]).
    Synced(Kind),
    /// What is wrong with an origin of objects (a file, a watch) as a whole. It replaces what was said of that origin
    /// before; an empty list says that all is well again.
    Report {
        /// Which.
        origin: Origin,
        /// Its problems at present.
        problems: Box<[Problem]>,
    },
}

impl Event {
    /// The kind of the one object that it is about.
    pub fn object_kind(&self) -> Option<Kind> {
        match self {
            Self::Apply(object) => Some(object.kind()),
            Self::Delete(object) | Self::Reject(object, _) | Self::Unreadable(object, _) => Some(object.kind),
            Self::Restart(_) | Self::Synced(_) | Self::Report { .. } => None,
        }
    }
}

/// Where objects come from.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Origin {
    /// The watch of a kind on the API server.
    Watch(Kind),
    /// The API server's refusal to show a kind of [`Kind::OF_POLICIES`], or to have it.
    Refusal(Kind),
    /// Anything else: a file, a directory, the server itself.
    Named(Arc<str>),
}

impl From<&str> for Origin {
    fn from(name: &str) -> Self {
        Self::Named(name.into())
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Watch(kind) => write!(f, "watch of {kind}"),
            Self::Refusal(kind) => write!(f, "refusal of {kind}"),
            Self::Named(name) => f.write_str(name),
        }
    }
}

/// Kinds of objects that sources deliver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// `v1/Service`.
    Service,
    /// `discovery.k8s.io/v1/EndpointSlice`.
    Slice,
    /// `v1/Node`.
    Node,
    /// `v1/Pod`, of all nodes. Policies wait for this kind, nothing else does.
    Pod,
    /// `v1/Namespace`. Policies wait for this kind, nothing else does.
    Namespace,
    /// `networking.k8s.io/v1/NetworkPolicy`. Policies wait for this kind, nothing else does.
    NetworkPolicy,
    /// `networking.k8s.io/v1/ServiceCIDR`. Servers before Kubernetes 1.33 have none, and nothing waits for this kind.
    ServiceCidr,
    /// `policy.networking.k8s.io/ClusterNetworkPolicy`, a custom resource that a server may not have. Policies wait for this kind,
    /// nothing else does.
    ClusterNetworkPolicy,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 8] = [
        Self::Service,
        Self::Slice,
        Self::Node,
        Self::Pod,
        Self::Namespace,
        Self::NetworkPolicy,
        Self::ServiceCidr,
        Self::ClusterNetworkPolicy,
    ];
    /// The kinds that must have synced before the node is ready.
    pub const REQUIRED: [Self; 3] = [Self::Service, Self::Slice, Self::Node];
    /// The kinds that network policies follow from, and nothing else does but for pods of this node.
    pub const OF_POLICIES: [Self; 4] = [Self::Pod, Self::Namespace, Self::NetworkPolicy, Self::ClusterNetworkPolicy];
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Service => "Service",
            Self::Slice => "EndpointSlice",
            Self::Node => "Node",
            Self::Pod => "Pod",
            Self::Namespace => "Namespace",
            Self::NetworkPolicy => "NetworkPolicy",
            Self::ServiceCidr => "ServiceCIDR",
            Self::ClusterNetworkPolicy => "ClusterNetworkPolicy",
        })
    }
}

/// An object. Shared, so that a source may remember what it delivered at no cost.
#[derive(Clone, Debug, PartialEq)]
pub enum Object {
    /// A Service with virtual addresses.
    Service(Arc<Service>),
    /// Some endpoints of a Service.
    Slice(Arc<EndpointSlice>),
    /// A node.
    Node(Arc<Node>),
    /// A pod.
    Pod(Arc<Pod>),
    /// A namespace.
    Namespace(Arc<Namespace>),
    /// A network policy.
    NetworkPolicy(Arc<NetworkPolicy>),
    /// Ranges of Services.
    ServiceCidr(Arc<ServiceCidr>),
    /// A network policy of the cluster.
    ClusterNetworkPolicy(Arc<ClusterNetworkPolicy>),
}

impl Object {
    /// What identifies it.
    pub fn reference(&self) -> ObjectRef {
        let name = match self {
            Self::Service(it) => &it.name,
            Self::Slice(it) => &it.name,
            Self::Node(it) => &it.name,
            Self::Pod(it) => &it.name,
            Self::Namespace(it) => &it.name,
            Self::NetworkPolicy(it) => &it.name,
            Self::ServiceCidr(it) => &it.name,
            Self::ClusterNetworkPolicy(it) => &it.name,
        };
        ObjectRef { kind: self.kind(), name: name.clone() }
    }

    /// What it is.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Service(_) => Kind::Service,
            Self::Slice(_) => Kind::Slice,
            Self::Node(_) => Kind::Node,
            Self::Pod(_) => Kind::Pod,
            Self::Namespace(_) => Kind::Namespace,
            Self::NetworkPolicy(_) => Kind::NetworkPolicy,
            Self::ServiceCidr(_) => Kind::ServiceCidr,
            Self::ClusterNetworkPolicy(_) => Kind::ClusterNetworkPolicy,
        }
    }
}

/// What identifies an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectRef {
    /// Its kind.
    pub kind: Kind,
    /// Its name.
    pub name: ObjectName,
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.name)
    }
}
