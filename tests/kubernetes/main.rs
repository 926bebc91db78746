//! The agent's Kubernetes side against a real API server.
//!
//! Each test has an etcd and a kube-apiserver of its own in a network namespace with nothing but loopback ([`server`]), and
//! where it needs broken connections, a relay in front of it ([`relay`]). Programs are looked for where `cargo xtask setup`
//! puts them; a missing one fails the test and says so.

mod admission;
mod badinput;
mod cluster;
mod deploy;
mod differential;
mod doctor;
mod kube_source;
mod outages;
mod relay;
mod reports;
mod rig;
mod server;
