//! STATUS: would ADD work now? Asked every few seconds, so it looks at files and pins only.

use super::add::{read_mtu, require_pool};
use crate::attach::Pins;
use crate::call::Call;
use crate::ipam::delegate::Delegate;
use crate::state;
use crate::types::error::{Error, code};

/// Fails with "unavailable" when ADD would.
pub fn run(call: &Call) -> Result<(), Error> {
    let unavailable = |e: Error| e.with_code(code::UNAVAILABLE);
    let conf = &call.conf;
    let node = state::load_node(&conf.run_dir).map_err(unavailable)?;
    let mtu = read_mtu(conf, &node).map_err(unavailable)?;
    Pins::open(&conf.bpffs).map_err(unavailable)?;
    let Some(kind) = &conf.ipam else {
        // A full pool is no reason to say no: Kubernetes would take the whole node, running pods included, for broken.
        return require_pool(&node, mtu).map_err(unavailable);
    };
    Delegate::find(conf, kind, &call.env.path).and_then(|ipam| ipam.optional("STATUS")).map_err(|e| match e.code {
        code::LIMITED => e,
        _ => unavailable(e),
    })
}
