//! From the retired shapes to the present ones and back. Pure: entries come in and go out as
//! values.

mod connections;
mod services;

pub use connections::{downgrade, upgrade};
pub use services::{GONE, Range, Retired, Tables};
