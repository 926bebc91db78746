//! One run of a program with tests, with each test's result as it comes.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::events::Events;
use crate::cluster::{self, Cluster};
use crate::e2e::report::Test;
use crate::ui;

/// Runs what `complete` adds to a command that enters the outside world's network, and returns what came of each test.
pub fn run(cluster: &Cluster, dir: &Path, complete: impl FnOnce(&mut Command)) -> Result<Vec<Test>> {
    let mut log = File::create(dir.join("log"))?;
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", cluster.netns_file("sw").display()));
    complete(&mut command);
    let mut tests = command
        .current_dir(dir)
        // No proxies, no other cluster.
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", dir)
        .env("KUBECONFIG", cluster.kubeconfig("inside"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log.try_clone()?)
        .spawn()
        .context("cannot run the tests")?;
    let output = tests.stdout.take().context("the tests have an output")?;
    let mut events = Events::default();
    for line in BufReader::new(output).lines() {
        let said = events.line(&line?)?;
        log.write_all(said.output.as_bytes())?;
        if let Some(text) = said.result {
            ui::detail(&text);
        }
    }
    tests.wait()?;
    let tests = events.tests();
    let log = dir.join("log");
    ensure!(!tests.is_empty(), "no test ran; the end of {}:\n{}", log.display(), cluster::tail(&log, 20));
    Ok(tests)
}
