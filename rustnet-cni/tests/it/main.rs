//! The real binary on a real kernel: each test has a mount and a network namespace of its own, which vanish with it.

mod addresses;
mod bad_input;
mod bandwidth;
mod chain;
mod cnitool;
mod common;
mod crash;
mod delegate;
mod gc;
mod host_ports;
mod load;
mod loopback;
mod policies;
mod removal;
mod verbs;
