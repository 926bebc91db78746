//! `kernels`: boots kernels of Debian in QEMU; in each, all programs are loaded, attached and given packets, by the tests
//! that the host runs, too.

mod apparmor;
mod apt;
mod archive;
mod cpio;
pub mod guest;
mod guest_files;
mod protocol;
mod qemu;
mod report;
mod step;
mod tests;

use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use self::archive::{LINES, Line};
use self::protocol::Message;
use self::report::{Column, Report};
use crate::setup::{self, Need};
use crate::{ebpf, paths, ui};

/// Options of `kernels`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Only this kernel; may be given several times. All that --list names when absent
    #[arg(long, value_name = "NAME")]
    kernel: Vec<String>,
    /// Tell which kernels there are, and which have been downloaded
    #[arg(long)]
    list: bool,
    /// Look for newer packages of the kernels, too
    #[arg(long)]
    refresh: bool,
    /// Run only these tests: packet, kernel, fabric, apparmor or devices
    #[arg(long, value_name = "NAME")]
    test: Option<String>,
    /// Write the table to docs/kernels.md
    #[arg(long, conflicts_with_all = ["test", "filter", "kernel"])]
    record: bool,
    /// Run only tests whose names hold one of these
    filter: Vec<String>,
}

/// The command.
pub fn run(args: &Args) -> Result<()> {
    if args.list {
        list();
        return Ok(());
    }
    ensure!(cfg!(target_arch = "x86_64"), "kernels: the guests are x86-64, as this machine is not");
    let lines = chosen(&args.kernel)?;
    let steps = tests::steps(args.test.as_deref(), &args.filter);
    ensure!(
        !steps.is_empty(),
        "--test {}: there are packet, kernel, fabric, apparmor and devices",
        args.test.as_deref().unwrap_or_default()
    );
    setup::ensure(&[Need::Build, Need::Network, Need::PolicyOracle, Need::Kernels])?;
    let kernels = lines.iter().map(|line| line.fetch(args.refresh)).collect::<Result<Vec<_>>>()?;
    ebpf::build(&ebpf::Args::default())?;
    let tests = tests::build()?;
    let dir = paths::target().join("kernels");
    std::fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
    let files = dir.join("files.cpio");
    guest_files::write(&files, &tests, &steps, &apparmor::policy()?)?;
    let mut report = Report::default();
    for kernel in &kernels {
        let dir = dir.join(kernel.line.name);
        report.columns.push(Column::new(kernel, &dir));
        let column = report.columns.last_mut().context("a column was just added")?;
        let start = Instant::now();
        ui::step(&format!("{} ({})", kernel.release, kernel.version));
        let booted = qemu::boot(kernel, &files, &dir, |message| {
            tell(&message, start);
            column.take(message);
        });
        column.ended(booted, start.elapsed());
    }
    println!("{}", report.table());
    let failures = report.failures();
    if args.record {
        report::record(&report)?;
    }
    if failures.is_empty() { Ok(()) } else { bail!("kernels:\n{}", failures.join("\n")) }
}

fn list() {
    for line in &LINES {
        let present = line.release().map_or("not downloaded".to_owned(), |release| format!("{release} in the cache"));
        println!("{:7} {:19} {present}; {}", line.name, line.suite, line.why);
    }
}

/// The lines of these names, suites, or releases that begin like that.
fn chosen(names: &[String]) -> Result<Vec<&'static Line>> {
    if names.is_empty() {
        return Ok(LINES.iter().collect());
    }
    let find = |name: &String| {
        let is = |line: &&Line| line.name == name || line.suite == name;
        let begins =
            |line: &&'static Line| line.release().is_some_and(|release| release.starts_with(&format!("{name}.")));
        let found = LINES.iter().find(is).or_else(|| LINES.iter().find(begins));
        found.with_context(|| format!("--kernel {name}: `cargo xtask kernels --list` tells which there are"))
    };
    names.iter().map(find).collect()
}

/// What a person sees while it runs.
fn tell(message: &Message, start: Instant) {
    let time = ui::seconds(start.elapsed());
    match message {
        Message::Kernel(_) => ui::detail(&format!("booted after {time}")),
        Message::Begin(name) => ui::detail(&format!("{name}...")),
        Message::End { name, success, millis } => {
            let word = if *success { "passed" } else { "FAILED" };
            ui::detail(&format!("{name}: {word} in {} s", millis / 1000));
        }
        Message::Text(line) if line.ends_with("FAILED") => ui::detail(line),
        _ => {}
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn kernels_are_chosen_by_name_or_suite() {
        assert_eq!(chosen(&[]).unwrap().len(), LINES.len());
        let chosen_by = |name: &str| chosen(&[name.to_owned()]).map(|lines| lines[0].name);
        assert_eq!(chosen_by("6.1").unwrap(), "6.1");
        assert_eq!(chosen_by("sid").unwrap(), "newest");
        assert!(chosen_by("2.4").unwrap_err().to_string().contains("--list"));
    }
}
