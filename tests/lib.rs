//! Tests that cross crates live in the folders next to this file.
