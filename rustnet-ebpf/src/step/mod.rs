//! The steps of the packet path; each states its contract at its top. Hooks call them in order. Steps never write packet
//! bytes; `rewrite` does.
//!
//! *Classify*: `conntrack::lookup` and `icmp` say how a packet relates to known connections, `source` whether its source is
//! genuine. *Decide*: `plan` says what becomes of it. *Execute*: `exec` asks the kernel for the way there and sends it.

pub mod admit;
pub mod conntrack;
pub mod direct;
pub mod exec;
pub mod fib;
pub mod host_port;
pub mod icmp;
pub mod lb;
pub mod mark;
pub mod migrate;
pub mod nat;
pub mod nexthop;
pub mod plan;
pub mod policy;
pub mod reject;
pub mod route;
pub mod source;
pub mod table;
pub mod tcp;
pub mod tunnel;
pub mod turn;
