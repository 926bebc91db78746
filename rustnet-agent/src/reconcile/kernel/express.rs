//! The XDP program: which uplinks have it, and when.

use anyhow::bail;
use rustnet_common::names;

use super::{Kernel, word};
use crate::bpf::attach::{Device, Outcome};
use crate::bpf::xdp;
use crate::config::Xdp;
use crate::failure::{Failure, Scope};
use crate::net::link;
use crate::net::netlink::Socket;
use crate::net::repair::State;

impl Kernel {
    /// True if uplinks are to have the XDP program. During an upgrade none has it: no other program has to wait for it.
    pub(super) fn may_have_xdp(&self) -> bool {
        self.xdp != Xdp::Off && !self.has_earlier_tables() && !self.programs.is_export()
    }

    /// Has the XDP program on all uplinks that can have it, and on no other device.
    pub(super) fn attach_xdp(
        &self,
        socket: &mut Socket,
        state: &State,
        is_complete: bool,
        done: &mut Vec<String>,
        failures: &mut Vec<Failure>,
    ) {
        let mut kept = Vec::new();
        for uplink in &state.uplinks {
            let device = Device { name: &uplink.name, ifindex: uplink.ifindex };
            let attach = |socket: &mut Socket| {
                if let Some(why) = xdp::unfit(self.xdp, &state.host.links, uplink.ifindex) {
                    bail!("XDP on {}: {why}", uplink.name);
                }
                xdp::attach(socket, &self.bpffs, &device, self.programs.optional(names::UPLINK_XDP)?)
            };
            let outcome = attach(socket);
            match link::unless_gone(socket, uplink.ifindex, outcome, Outcome::Unchanged) {
                Ok(outcome) => {
                    kept.push(uplink.ifindex);
                    if outcome != Outcome::Unchanged {
                        done.push(format!("{} on {}: {}", names::UPLINK_XDP, uplink.name, word(outcome)));
                    }
                }
                Err(e) => failures.push(Failure::new(Scope::Speed, &e)),
            }
        }
        if is_complete {
            match xdp::detach_others(&self.bpffs, &kept) {
                Ok(changes) => done.extend(changes),
                Err(e) => failures.push(Failure::new(Scope::Speed, &e)),
            }
        }
    }
}
