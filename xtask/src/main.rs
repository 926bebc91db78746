//! Every developer command of rustnet: `cargo xtask --help`.

mod cache;
mod cmd;
mod ebpf;
mod elf;
mod paths;
mod toolchain;
mod ui;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Developer commands of rustnet
///
/// A fresh machine needs Rust (rustup's stable) and root; `setup` installs the rest, and the other commands call it.
#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    arg_required_else_help = true,
    after_help = "Exit status: 0 success, 1 failure (said on standard error), 2 wrong usage; test, demo and bench return their program's own."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build the kernel side, check it and list its programs with their sizes
    BuildEbpf(ebpf::Args),
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::BuildEbpf(args) => ebpf::build(&args)?,
    }
    Ok(ExitCode::SUCCESS)
}
