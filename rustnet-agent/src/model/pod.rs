//! A pod of this node: who owns an address.

use super::{ObjectName, Problem};
use std::net::IpAddr;
use std::sync::Arc;

/// A Pod on this node. The datapath knows its pods from the CNI binary; this one gives them names, and says
/// whose sockets ask for Services by themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Its name.
    pub name: ObjectName,
    /// Its UID, which tells it from an earlier pod of the same name.
    pub uid: Arc<str>,
    /// The node it runs on; empty before it has one.
    pub node: Arc<str>,
    /// Its addresses; those of the node when it uses the host's network; none once it has finished.
    pub addresses: Box<[IpAddr]>,
    /// It uses the host's network.
    pub host_network: bool,
    /// A container of it asks for a port of the host.
    pub host_ports: bool,
    /// Its annotation for socket load-balancing: whether its sockets ask for Services by themselves; `None`: as the setting says.
    pub socket_lb: Option<bool>,
    /// What is wrong with it.
    pub problems: Box<[Problem]>,
}
