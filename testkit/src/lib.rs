//! The multi-node fabric: nodes, pods, an outside world and the links between them, all in network namespaces of one
//! machine, and the tools to prove what goes through them.
//!
//! | Room | Job |
//! |---|---|
//! | [`janitor`] | starts processes so that they die with this one; removes what a run leaves |
//! | [`netns`] | a namespace: run closures and commands inside |
//! | [`fabric`] | nodes, routers, the world, wired together |
//! | [`node`], [`agent`], [`pod`], [`cni`] | a node, its agent, its pods, the CNI protocol |
//! | [`manifest`], [`apiserver`] | Kubernetes YAML for services, endpoint slices and nodes; a real control plane |
//! | [`server`], [`client`], [`load`], [`stream`], [`icmp`] | real sockets: who answers, from where, how fast, what was lost |
//! | [`sniff`], [`packet`], [`check`] | captures, hand-made packets, and an independent check of every checksum |
//! | [`datapath`] | the eBPF programs alone, run on single packets |
//! | [`dist`] | where the built programs are |
//!
//! Everything needs root. Namespaces are anonymous (held by a process called `rn<pid>-<name>`), so that even a killed
//! test leaves none behind.

pub mod agent;
pub mod apiserver;
pub mod check;
pub mod client;
pub mod cni;
pub mod datapath;
pub mod dist;
pub mod fabric;
pub mod icmp;
pub mod janitor;
pub mod load;
pub mod manifest;
pub mod netns;
pub mod node;
pub mod packet;
pub mod pod;
mod raw;
pub mod server;
pub mod sniff;
pub mod stream;
pub mod wait;

pub use client::{Answers, Proto};
pub use fabric::{Fabric, Setup, Topology};
pub use netns::Netns;
pub use node::Node;
pub use pod::Pod;
pub use rustnet_agent::config::Routing;
