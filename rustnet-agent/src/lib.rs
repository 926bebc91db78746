//! The node agent as a library; the `rustnet-agent` and `rustnet` binaries are thin callers of it.
