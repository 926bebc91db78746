//! The eBPF object that `cargo xtask build-ebpf` made, embedded in the agent by build.rs.

use anyhow::{Result, bail};

/// The object's bytes; empty when the agent was built without one, which `cargo check` may do.
static EMBEDDED: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/rustnet.bpf.o"));

/// The embedded object.
pub fn embedded() -> Result<&'static [u8]> {
    if EMBEDDED.is_empty() {
        bail!("built without the eBPF object: run `cargo xtask build-ebpf`, then build the agent again");
    }
    Ok(EMBEDDED)
}
