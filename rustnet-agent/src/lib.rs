//! The node agent as a library; the `rustnet-agent` and `rustnetctl` binaries are thin callers of it.

pub mod api;
pub mod args;
pub mod bpf;
pub mod cli;
pub mod cni_order;
pub mod config;
pub mod ct_gc;
pub mod doctor;
pub mod failure;
pub mod health;
pub mod host;
pub mod http;
pub mod index;
pub mod install;
pub mod leftovers;
pub mod metrics;
pub mod model;
pub mod namefile;
pub mod net;
pub mod nodefile;
pub mod plan;
pub mod podfile;
pub mod reconcile;
pub mod source;
pub mod v1file;
pub mod ways;
