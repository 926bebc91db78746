//! The `rustnetctl` command: a thin caller of [`rustnet_agent::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    rustnet_agent::cli::main()
}
