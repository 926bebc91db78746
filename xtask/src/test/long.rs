//! The long tier: campaigns that take from minutes to hours. Each runs the code of a normal test, or of another command, with
//! the figures that a claim needs. A failed one does not keep the others from running.

use std::io::stdout;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, ensure};

use super::table::{Row, Table};
use super::{counted, prepare, this_program};
use crate::cmd::Cmd;
use crate::dist::Profile;
use crate::setup::{self, Need};
use crate::{paths, ui, v1};

/// One campaign.
struct Campaign {
    name: &'static str,
    work: Work,
}

/// What a campaign runs.
enum Work {
    /// Tests of one program whose names hold the filter, the ignored ones, too.
    Tests { program: &'static str, filter: &'static str, env: &'static [(&'static str, &'static str)] },
    /// A command of xtask.
    Command(&'static [&'static str]),
    /// An upgrade from the image of v1 and back, in a cluster with this routing.
    ClusterV1(&'static str),
    /// Trials in a cluster of their own.
    Trials(&'static [&'static str]),
}

/// The tests that need programs of Kubernetes.
const KUBERNETES: &str = "kubernetes";
/// The campaign that needs the programs of v1.
const VERSIONS: &str = "versions";

/// All of them, the shortest first.
const CAMPAIGNS: [Campaign; 21] = [
    Campaign {
        name: VERSIONS,
        work: Work::Tests { program: "fabric", filter: "upgrades_from_v1_and_back_lose_nothing", env: &[] },
    },
    Campaign { name: "silence", work: Work::Tests { program: KUBERNETES, filter: "a_stopped_api_server", env: &[] } },
    Campaign {
        name: "pods",
        work: Work::Tests {
            program: "fabric",
            filter: "pods_come_and_go_and_leave_nothing",
            env: &[("RUSTNET_CYCLES", "2000")],
        },
    },
    Campaign {
        name: "kills",
        work: Work::Tests {
            program: "fabric",
            filter: "kills_lose_no_packet",
            env: &[("RUSTNET_KILLS", "30"), ("RUSTNET_PACKETS", "1000000"), ("RUSTNET_FLOWS", "50000")],
        },
    },
    Campaign {
        name: "policy-changes",
        work: Work::Tests {
            program: "fabric",
            filter: "changes_of_policies_leave_no_window",
            env: &[("RUSTNET_POLICY_CHANGES", "1000")],
        },
    },
    Campaign {
        name: "crashes",
        work: Work::Tests {
            program: "fabric",
            filter: "an_agent_that_dies_between_two_writes_leaves_a_working_state",
            env: &[("RUSTNET_CRASHES", "8")],
        },
    },
    Campaign {
        name: "policies",
        work: Work::Tests {
            program: "packet",
            filter: "the_programs_do_what_cyclonus_reads",
            env: &[("RUSTNET_WORLDS", "20000")],
        },
    },
    Campaign {
        name: "differential",
        work: Work::Tests {
            program: KUBERNETES,
            filter: "random_services_are_served_as_kube_proxy_serves_them",
            env: &[("RUSTNET_SERVICES", "500")],
        },
    },
    Campaign {
        name: "services",
        work: Work::Tests {
            program: "fabric",
            filter: "changes_of_services_disturb_no_other_and_leave_nothing",
            env: &[("RUSTNET_CHANGES", "10000")],
        },
    },
    Campaign {
        name: "fuzz",
        work: Work::Tests {
            program: "packet",
            filter: "random_",
            env: &[("RUSTNET_FUZZ", "10000000"), ("RUSTNET_MUTANTS", "10000000")],
        },
    },
    Campaign { name: "cluster-v1-vxlan", work: Work::ClusterV1("vxlan") },
    Campaign { name: "cluster-v1-native", work: Work::ClusterV1("native") },
    Campaign { name: "ingress", work: Work::Trials(&["ingress"]) },
    Campaign { name: "policy-latency", work: Work::Trials(&["policy-latency"]) },
    Campaign {
        name: "policy-conformance",
        work: Work::Command(&["policy-conformance", "--report", "target/policy-conformance"]),
    },
    Campaign {
        name: "cyclonus",
        work: Work::Command(&["policy-conformance", "--suite", "cyclonus", "--report", "target/cyclonus"]),
    },
    Campaign { name: "kernels", work: Work::Command(&["kernels"]) },
    Campaign {
        name: "e2e-zones",
        work: Work::Command(&[
            "e2e",
            "--nodes",
            "6",
            "--zones",
            "3",
            "--focus",
            "Traffic Distribution|Topology Hints|NodePort and HealthCheckNodePort",
            "--report",
            "target/e2e/zones",
        ]),
    },
    Campaign { name: "e2e-vxlan", work: Work::Command(&["e2e", "--routing", "vxlan", "--report", "target/e2e/vxlan"]) },
    Campaign {
        name: "e2e-native",
        work: Work::Command(&["e2e", "--routing", "native", "--report", "target/e2e/native"]),
    },
    Campaign {
        name: "e2e-ipv6",
        work: Work::Command(&["e2e", "--ip-family", "ipv6", "--routing", "native", "--report", "target/e2e/ipv6"]),
    },
];

/// Runs those whose names hold the filter, and prints the table; failure if one of them failed.
#[expect(clippy::print_stdout, reason = "the table is the command's result")]
pub fn run(filter: Option<&str>, profile: Profile) -> Result<ExitCode> {
    let wanted: Vec<&Campaign> =
        CAMPAIGNS.iter().filter(|it| filter.is_none_or(|part| it.name.contains(part))).collect();
    let names = CAMPAIGNS.map(|it| it.name).join(", ");
    ensure!(!wanted.is_empty(), "no campaign's name holds {}\n  remedy: one of {names}", filter.unwrap_or_default());
    let mut table = Table::default();
    for campaign in wanted {
        ui::step(&format!("campaign {}", campaign.name));
        let start = Instant::now();
        let mut row = campaign.run(profile)?;
        row.time = start.elapsed();
        table.rows.push(row);
    }
    print!("\n{table}");
    Ok(if table.sum("").failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Campaign {
    fn run(&self, profile: Profile) -> Result<Row> {
        let mut row = Row { name: self.name.to_owned(), ..Row::default() };
        if self.name == VERSIONS {
            v1::run()?;
        }
        match self.work {
            Work::Tests { program, filter, env } => {
                if program == KUBERNETES {
                    setup::ensure(&[Need::ApiServer, Need::KubeProxy])?;
                }
                let command = tests(program, filter, env, profile);
                let (status, table) = counted(&prepare(command, profile)?, stdout())?;
                row = Row { name: row.name, ..table.sum("") };
                // A filter that matches nothing has shown nothing; nor has a program that did not build.
                if (!status.success() && row.failed == 0) || row.passed + row.failed == 0 {
                    row.failed += 1;
                }
            }
            Work::Command(args) => count(&mut row, xtask(args)?.status()?.success()),
            Work::ClusterV1(routing) => count_result(&mut row, &cluster_v1(routing)),
            Work::Trials(trials) => count_result(&mut row, &in_cluster("vxlan", |trial| trial.args(trials))),
        }
        Ok(row)
    }
}

/// The command that runs tests of a campaign.
fn tests(program: &str, filter: &str, env: &[(&str, &str)], profile: Profile) -> Cmd {
    let mut cargo = Cmd::cargo().args(["test", "--package", "rustnet-tests", "--test", program]);
    if profile == Profile::Release {
        cargo = cargo.arg("--release");
    }
    let mut cargo = cargo.args(["--", filter, "--include-ignored", "--nocapture"]);
    if program == "fabric" {
        // What is lost while another campaign runs says nothing about this one.
        cargo = cargo.arg("--test-threads=1");
    }
    env.iter().fold(cargo, |cargo, (key, value)| cargo.env(key, value))
}

fn xtask(args: &[&str]) -> Result<Cmd> {
    Ok(Cmd::new(this_program()?).args(args).dir(paths::root()))
}

fn count(row: &mut Row, is_success: bool) {
    if is_success {
        row.passed += 1;
    } else {
        row.failed += 1;
    }
}

fn count_result(row: &mut Row, result: &Result<()>) {
    if let Err(error) = result {
        ui::detail(&format!("{error:#}"));
    }
    count(row, result.is_ok());
}

/// Name of the clusters of [`Work::ClusterV1`] and [`Work::Trials`].
const CLUSTER: &str = "rnv1";

/// Goes from the present image to that of v1 and back under load, each with its own manifests.
fn cluster_v1(routing: &str) -> Result<()> {
    v1::run()?;
    let image = paths::target().join("v1/image.tar");
    xtask(&["image", "--tag", "v1"])?.arg("--dist").arg(v1::dist()).arg("--output").arg(&image).run()?;
    in_cluster(routing, |trial| {
        trial.args(["upgrade", "--other"]).arg(&image).arg("--other-deploy").arg(v1::source().join("deploy"))
    })
}

/// Runs `cluster trial`, with what `complete` adds, in a cluster that is removed afterwards.
fn in_cluster(routing: &str, complete: impl FnOnce(Cmd) -> Cmd) -> Result<()> {
    let cluster = |args: &[&str]| Ok::<_, anyhow::Error>(xtask(&["cluster", "--name", CLUSTER])?.args(args));
    let up = cluster(&["up", "--routing", routing])?.run();
    let trial = up.and_then(|()| complete(cluster(&["trial"])?).run());
    let down = cluster(&["down"])?.run();
    trial.and(down)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_every_test_of_a_campaign_exists() {
        let mut names = CAMPAIGNS.map(|it| it.name);
        names.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "{names:?}");
        for campaign in &CAMPAIGNS {
            let Work::Tests { program, filter, env } = campaign.work else { continue };
            let dir = paths::root().join("tests").join(program);
            let files = std::fs::read_dir(dir).unwrap().map(|entry| std::fs::read_to_string(entry.unwrap().path()));
            let sources: String = files.filter_map(Result::ok).collect();
            let is_test = sources.split("fn ").any(|text| text.split('(').next().unwrap_or_default().contains(filter));
            assert!(is_test, "{}: no test of {program} holds {filter}", campaign.name);
            let used = env.iter().filter(|(key, _)| sources.contains(key)).count();
            assert!(used > 0 || env.is_empty(), "{}: {program} reads none of {env:?}", campaign.name);
        }
    }
}
