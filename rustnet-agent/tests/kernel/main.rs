//! The agent's kernel side on a real kernel: loading, adoption, hooks, repair, the whole loop, and cleanup.
//!
//! Needs root and the eBPF object (`cargo xtask build-ebpf`). Each test has network and mount namespaces of its own.

mod agent;
mod apparmor;
mod attach;
mod cleanup;
mod cli;
mod doctor;
mod health_checks;
mod host;
mod ipsec;
mod kube_proxy;
mod load;
mod log;
mod look;
mod net;
mod odd_hosts;
mod plan;
mod pod_sockets;
mod policy;
mod reconcile;
mod repair;
mod sandbox;
mod store;
mod takeover;
mod upgrade;
mod wire;
