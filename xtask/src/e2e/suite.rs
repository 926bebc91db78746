//! One run of ginkgo, with each test's result as it comes.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::cluster::{self, Cluster};
use crate::ui;

/// What ginkgo writes in addition to its log.
pub const REPORT: &str = "report.json";
/// And this, for others to read.
const JUNIT: &str = "junit.xml";

/// Runs the tests; whether they pass is in the report.
pub fn run(cluster: &Cluster, focus: &str, skip: &str, procs: u8, dir: &Path) -> Result<()> {
    let mut log = File::create(dir.join("log"))?;
    let _ = std::fs::remove_file(dir.join(REPORT)); // of an earlier run
    // The tests leave things behind there.
    let scratch = dir.join("tmp");
    std::fs::create_dir_all(&scratch)?;
    let kubectl = cluster.program("kubectl")?;
    let path = Path::new(&kubectl).parent().context("kubectl has a directory")?.display().to_string();
    let mut ginkgo = Command::new("nsenter")
        .arg(format!("--net={}", cluster.netns_file("sw").display()))
        .arg(cluster.program("ginkgo")?)
        .args(["-v", "--no-color", "--timeout=4h", &format!("--procs={procs}")])
        .args([&format!("--focus={focus}"), &format!("--skip={skip}")])
        .args([&format!("--json-report={REPORT}"), &format!("--junit-report={JUNIT}")])
        .arg(format!("--output-dir={}", dir.display()))
        .arg(cluster.program("e2e.test")?)
        .arg("--")
        .arg(format!("--kubeconfig={}", cluster.kubeconfig("inside")))
        .arg(format!("--kubectl-path={kubectl}"))
        .arg(format!("--num-nodes={}", cluster.settings.nodes))
        .arg(format!("--cluster-ip-range={}", cluster::SERVICES.of(cluster.settings.ip_family)[0]))
        .arg(format!("--report-dir={}", dir.display()))
        .args(["--provider=skeleton", "--node-os-distro=custom", "--dns-domain=cluster.local"])
        .args(["--allowed-not-ready-nodes=0", "--system-pods-startup-timeout=2m", "--node-schedulable-timeout=1m"])
        .args(["--delete-namespace-on-failure=true", "--dump-logs-on-failure=false"])
        .current_dir(dir)
        // No proxies, no other cluster.
        .env_clear()
        .env("PATH", format!("{path}:/usr/sbin:/usr/bin:/sbin:/bin"))
        .env("HOME", dir)
        .env("TMPDIR", &scratch)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log.try_clone()?)
        .spawn()
        .context("cannot run ginkgo")?;
    let output = ginkgo.stdout.take().context("ginkgo has an output")?;
    let mut live = Live::default();
    for line in BufReader::new(output).split(b'\n') {
        let line = line?;
        log.write_all(&line)?;
        log.write_all(b"\n")?;
        if let Some(text) = live.line(&String::from_utf8_lossy(&line)) {
            ui::detail(&text);
        }
    }
    ginkgo.wait()?;
    std::fs::remove_dir_all(&scratch)?;
    if !dir.join(REPORT).is_file() {
        let tail = cluster::tail(&dir.join("log"), 20);
        anyhow::bail!("ginkgo left no report; the end of {}:\n{tail}", dir.join("log").display());
    }
    Ok(())
}

/// Finds results in ginkgo's output: a line with a bullet, and the test's name in the next.
#[derive(Default)]
struct Live {
    result: Option<&'static str>,
    time: String,
    done: usize,
    all: String,
}

impl Live {
    /// What to tell a person about this line.
    fn line(&mut self, line: &str) -> Option<String> {
        if let Some(rest) = line.strip_prefix("Will run ") {
            rest.split(' ').next().unwrap_or_default().clone_into(&mut self.all);
            return Some(line.to_owned());
        }
        if let Some(result) = self.result.take() {
            self.done += 1;
            let name = line.replacen("[It] ", "", 1);
            return Some(format!("{:>3}/{} {result} {name} ({})", self.done, self.all, self.time));
        }
        self.result = match line {
            text if text.starts_with("• [FAILED]") => Some("FAILED "),
            text if text.starts_with("• [") => Some("passed "),
            text if text.starts_with("S [SKIPPED]") => Some("skipped"),
            _ => None,
        };
        line.rsplit_once('[').map_or("", |(_, rest)| rest.trim_end_matches(']')).clone_into(&mut self.time);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_found_in_the_output() {
        let output = "Will run 2 of 7144 specs\nSSS\n------------------------------\n• [5.1 seconds]\n[sig-network] X [It] a\n\
                      /path:1\n  STEP: x\n------------------------------\nSS\n------------------------------\n\
                      • [FAILED] [7.2 seconds]\n[sig-network] X [It] b\n/path:2\n";
        let mut live = Live::default();
        let shown: Vec<_> = output.lines().filter_map(|line| live.line(line)).collect();
        let results =
            ["  1/2 passed  [sig-network] X a (5.1 seconds)", "  2/2 FAILED  [sig-network] X b (7.2 seconds)"];
        assert_eq!(shown[1..], results);
    }
}
