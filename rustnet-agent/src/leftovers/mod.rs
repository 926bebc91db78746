//! What other programs have on this host: rules of another proxy, firewalls, sockets that listen. Doctor and the command look at these;
//! the loop does not depend on any of it.

pub mod firewall;
pub mod ipset;
pub mod iptables;
pub mod ipvs;
pub mod kube_proxy;
pub mod nftables;
pub mod sockets;
