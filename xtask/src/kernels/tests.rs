//! The tests that run in the guest: built as `cargo xtask test` builds them, so that nothing is compiled twice.

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::Value;

use super::step::{OBJECT, POLICY_ORACLE, Step};
use crate::cmd::Cmd;
use crate::dist::{self, Profile};
use crate::paths;

/// A test program, and which of its tests run.
struct Suite {
    name: &'static str,
    /// The test program.
    program: &'static str,
    /// Whose: several packages may have one of that name.
    package: &'static str,
    filters: &'static [&'static str],
    /// Emulation is slow: tests of whole networks disturb each other when they run side by side.
    threads: &'static str,
    /// Tests that are ignored elsewhere, for want of what this kernel has.
    is_ignored: bool,
}

const SUITES: [Suite; 5] = [
    Suite {
        name: "packet",
        program: "packet",
        package: "rustnet-tests",
        filters: &[],
        threads: "2",
        is_ignored: false,
    },
    // Without those that are about the rules of kube-proxy, and need its tools.
    Suite {
        name: "kernel",
        program: "kernel",
        package: "rustnet-agent",
        filters: &[
            "attach::",
            "cleanup::",
            "cli::",
            "host::",
            "load::",
            "look::",
            "net::",
            "reconcile::",
            "repair::",
            "store::",
        ],
        threads: "1",
        is_ignored: false,
    },
    Suite {
        name: "fabric",
        program: "fabric",
        package: "rustnet-tests",
        filters: &["pods::", "services::vxlan::", "path::vxlan::"],
        threads: "1",
        is_ignored: false,
    },
    Suite {
        name: "apparmor",
        program: "kernel",
        package: "rustnet-agent",
        filters: &["apparmor::"],
        threads: "1",
        is_ignored: true,
    },
    Suite {
        name: "devices",
        program: "fabric",
        package: "rustnet-tests",
        filters: &["stacked::"],
        threads: "1",
        is_ignored: true,
    },
];

/// A compiled one.
pub struct Program {
    name: String,
    /// Where cargo left it.
    pub path: PathBuf,
}

/// All of them.
pub struct Tests {
    /// In the order in which they run.
    pub programs: Vec<Program>,
}

impl Program {
    /// Its path in the guest.
    pub fn in_guest(&self) -> String {
        format!("/tests/{}", self.name)
    }
}

/// Builds them, and the programs they start.
pub fn build() -> Result<Tests> {
    dist::build(Profile::Dev, &[])?;
    let mut cargo = Cmd::cargo().args(["test", "--no-run", "--quiet", "--workspace", "--exclude", "rustnet-ebpf"]);
    for suite in programs() {
        cargo = cargo.args(["--test", suite.program]);
    }
    let cargo = dist::environment(cargo.args(["--message-format", "json"]), Profile::Dev)?;
    let messages = cargo.dir(paths::root()).capture()?;
    let find = |suite: &Suite| {
        let path = messages.lines().find_map(|line| executable(line, suite));
        let path = path.with_context(|| format!("cargo built no test program {}", suite.program))?;
        Ok(Program { name: suite.program.into(), path })
    };
    Ok(Tests { programs: programs().map(find).collect::<Result<_>>()? })
}

/// One suite of each test program.
fn programs() -> impl Iterator<Item = &'static Suite> {
    SUITES.iter().filter(|suite| suite.name == suite.program)
}

/// The test program of a suite, if this message of cargo is about it.
fn executable(message: &str, suite: &Suite) -> Option<PathBuf> {
    let message: Value = serde_json::from_str(message).ok()?;
    // `path+file:///src/rustnet-agent#0.1.0`, or `path+file:///src/tests#rustnet-tests@0.1.0` where the directory has another name.
    let id = message["package_id"].as_str()?;
    let is_its = [format!("/{}#", suite.package), format!("#{}@", suite.package)].iter().any(|part| id.contains(part));
    let is_test = is_its && message["target"]["name"] == suite.program && message["profile"]["test"] == true;
    message["executable"].as_str().filter(|_| is_test).map(PathBuf::from)
}

/// What the guest runs: all, or those of one name with one filter.
pub fn steps(only: Option<&str>, filter: &[String]) -> Vec<Step> {
    let wanted = SUITES.iter().filter(|suite| only.is_none_or(|only| only == suite.name));
    wanted.map(|suite| suite.step(filter)).collect()
}

impl Suite {
    fn step(&self, filter: &[String]) -> Step {
        let filters = self.filters.iter().map(|f| (*f).to_owned());
        let mut args: Vec<String> = if filter.is_empty() { filters.collect() } else { filter.to_vec() };
        args.extend(["--test-threads".to_owned(), self.threads.to_owned()]);
        if self.is_ignored {
            args.push("--ignored".to_owned());
        }
        let env = [
            ("RUSTNET_BPF_OBJECT", OBJECT),
            ("RUSTNET_DEADLINE", "300"),
            ("RUSTNET_DIST", "/dist"),
            ("RUSTNET_POLICY_ORACLE", POLICY_ORACLE),
            ("RUSTNET_WORLDS", "10"),
            ("RUSTNET_ARTIFACTS", "/tmp/artifacts"),
            ("RUST_BACKTRACE", "0"),
            ("HOME", "/root"),
        ];
        Step {
            name: self.name.into(),
            program: format!("/tests/{}", self.program),
            args,
            env: env.map(|(k, v)| (k.into(), v.into())).into(),
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_program_is_found_in_cargos_messages() {
        let of = |package: &str, target: &str, test: bool| {
            format!(
                r#"{{"reason":"compiler-artifact","package_id":"path+file:///w/{package}","target":{{"name":"{target}"}},"profile":{{"test":{test}}},"executable":"/t/x-1"}}"#
            )
        };
        let [packet, kernel, ..] = &SUITES;
        let (tests, agent, testkit) = ("tests#rustnet-tests@0.1.0", "rustnet-agent#0.1.0", "testkit#0.1.0");
        assert_eq!(executable(&of(tests, "packet", true), packet), Some("/t/x-1".into()));
        assert_eq!(executable(&of(tests, "packet", false), packet), None);
        assert_eq!(executable(&of(tests, "fabric", true), packet), None);
        assert_eq!(executable(&of(agent, "kernel", true), kernel), Some("/t/x-1".into()));
        assert_eq!(executable(&of(testkit, "kernel", true), kernel), None, "another package's of the same name");
    }

    #[test]
    fn a_filter_replaces_the_usual_ones() {
        let all = steps(None, &[]);
        assert_eq!(all.len(), SUITES.len());
        let one = steps(Some("fabric"), &["hosts".to_owned()]);
        assert_eq!(one.len(), 1);
        assert_eq!(one[0].args, ["hosts", "--test-threads", "1"]);
        let ignored = steps(Some("devices"), &[]);
        assert_eq!(ignored[0].program, "/tests/fabric");
        assert_eq!(ignored[0].args, ["stacked::", "--test-threads", "1", "--ignored"]);
    }
}
