//! Addresses for pods: our own pool, or another plugin's.

pub mod delegate;
pub mod kernel;
pub mod local;
