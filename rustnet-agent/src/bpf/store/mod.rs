//! Typed stores: the only code that writes the maps. [`BpfMaps`] is the plan's view of the real maps; connections, endpoints,
//! counters and settings have their own.

pub mod affinity;
pub mod backends;
pub mod conntrack;
pub mod counters;
pub mod devices;
pub mod endpoints;
pub mod fill;
pub mod host_ports;
pub mod maglev;
pub mod map;
pub mod memory;
pub mod node_config;
mod plan;
pub mod policy;
mod runs;
pub mod sockets;

pub use map::Map;
pub use plan::{BpfMaps, peers, services, snapshot, source_ranges};
