//! The multi-node fabric.
