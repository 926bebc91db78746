//! The host's side of the network: links, routes, neighbours, sysctls of the network namespace the agent runs in.
//!
//! Observe, compare with what is wanted (pure), change only what is ours. Ours are: the overlay device, routes with
//! [`route::PROTOCOL`], the permanent neighbours of pods, the classifiers with our priority and handle on pods' veths.

pub mod address;
pub mod arrivals;
pub mod endpoints;
pub mod host;
pub mod ipsec;
pub mod journal;
pub mod link;
pub mod monitor;
pub mod neighbour;
pub mod netlink;
pub mod netns;
pub mod nexthop;
pub mod overlay;
pub mod plan;
pub mod repair;
pub mod route;
pub mod rule;
pub mod sock_diag;
pub mod sysctl;
pub mod tc;
