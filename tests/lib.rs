//! Tests that cross crates live in the folders beside this file.
