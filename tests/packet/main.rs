//! Tables of packets: each program by `BPF_PROG_TEST_RUN`, a packet in, and the verdict, the whole packet that comes out,
//! the counters and the connection table compared with what the test builds on its own.
//!
//! Needs root and `cargo xtask build-ebpf`.

mod answers;
mod bandwidth;
mod bridge;
mod decap;
mod devices;
mod encap;
mod errors;
mod external;
mod flows;
mod forged;
mod frame;
mod fuzz;
mod harness;
mod headers;
mod host_ports;
mod icmp;
mod malformed;
mod masquerade;
mod oracle;
mod pods;
mod policies;
mod rare;
mod refusals;
mod review;
mod service_ranges;
mod services;
mod states;
mod tracking;
mod ways;
mod windows;
mod xdp;

// What the agent's random worlds of network policies import: `oracle` has them as a module of its own.
use rustnet_agent::{index, model, source};
