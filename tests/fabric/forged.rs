//! Attackers. Each one sends packets with an address, a tag or a tunnel header that it must not
//! use. None of them may arrive anywhere. Each attempt has a control: a legitimate packet of the
//! same kind, which must arrive.
//!
//! `docs/security.md` names the test for each of its claims.

mod discovery;
mod limits;
mod pods;
mod segment;
mod stage;
mod tunnel;
