//! One file a verb; `loopback` has all of another plugin's.

pub mod add;
pub mod check;
pub mod del;
pub mod detach;
pub mod gc;
pub mod loopback;
pub mod status;
pub mod version;
