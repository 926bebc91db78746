//! Nodes, pods and services over real kernels' networking: the whole datapath, with real agents and the real CNI binary.
//!
//! Tests share one running fabric for each routing mode and bring what else they need (services with addresses of their
//! own); those that break things (kill agents, change links) build their own. Needs root and `cargo xtask dist`.

mod abuse;
mod agent;
mod bandwidth;
mod churn;
mod cleanup;
mod cycles;
mod delegated;
mod direct;
mod emptied;
mod external;
mod fixture;
mod flows;
mod forged;
mod fragments;
mod host_ports;
mod hosts;
mod kills;
mod limits;
mod maglev;
mod masquerade;
mod mixed;
mod no_window;
mod nodes;
mod odd_hosts;
mod overlay;
mod path;
mod pods;
mod policies;
mod refusal;
mod services;
mod sockets;
mod stacked;
mod state;
mod upgrade;
mod xdp;
