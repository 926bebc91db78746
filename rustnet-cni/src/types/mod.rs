//! The CNI protocol's own types: versions, the error object, the network configuration, the result.

pub mod bandwidth;
pub mod conf;
pub mod error;
pub mod port_mappings;
pub mod result;
pub mod version;
