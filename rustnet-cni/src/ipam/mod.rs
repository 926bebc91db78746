//! Addresses for pods: our own pool, or another plugin's.

pub mod delegate;
pub mod local;
