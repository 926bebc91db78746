//! `cargo xtask bench`: measures, and prints tables as docs/performance.md holds them. Figures are compared with a peer of
//! the same run, never with a bound: a benchmark is no test.

mod packets;

use anyhow::Result;
use clap::Parser;
use std::process::Command;

/// Measures rustnet and prints tables.
#[derive(Parser)]
#[command(name = "cargo xtask bench")]
struct Args {
    /// What to measure
    #[arg(value_enum, default_values_t = [What::Packets])]
    what: Vec<What>,
    /// Runs of each measurement; the least of them counts
    #[arg(long, default_value_t = 40)]
    runs: u32,
    /// Packets in a run
    #[arg(long, default_value_t = 200_000)]
    repeat: u32,
}

/// Groups of measurements.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum What {
    /// Nanoseconds that each program takes for a packet, and what loading it costs
    Packets,
}

fn main() -> Result<()> {
    let args = Args::parse();
    println!("{}\n", machine());
    for what in &args.what {
        match what {
            What::Packets => packets::run(args.runs, args.repeat)?,
        }
    }
    Ok(())
}

/// The machine, in a line.
fn machine() -> String {
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel =
        Command::new("uname").args(["-srm"]).output().map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned());
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find_map(|l| l.strip_prefix("model name")).unwrap_or(": unknown");
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or_default();
    format!(
        "Machine: {cpus} CPUs ({}), {}, load {load} at the start.",
        model.trim_start_matches([' ', '\t', ':']),
        kernel.unwrap_or_else(|_| "unknown kernel".into())
    )
}
