//! `bench`, and with `--cluster` a real Kubernetes around it: one cluster for each routing, with a pod on each node. One that runs is
//! used as it is, another is started and removed.

use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};

use crate::cluster::{self, Cluster, Routing, ends};
use crate::cmd::{Cmd, need_root};
use crate::dist::Profile;
use crate::test::exit_code;
use crate::{image, play, ui};

/// The cluster's name where none is given.
const NAME: &str = "rnb";
/// The tag of the image with the programs that were built for this.
const TAG: &str = "bench";
/// How the program learns where the pods are.
const VARIABLE: &str = "RUSTNET_BENCH_CLUSTER";

/// Which clusters are asked for, as far as this command has to know it; the program reads the same options.
#[derive(Debug, PartialEq, Eq)]
struct Wanted {
    name: String,
    routing: Option<Routing>,
}

/// The command.
pub fn run(args: &play::Args) -> Result<ExitCode> {
    match wanted(&args.args)? {
        Some(wanted) if !args.asks_for_help() => in_clusters(args, &wanted),
        _ => play::bench(args),
    }
}

/// What `--cluster` and `--routing` say; none without the first.
fn wanted(args: &[String]) -> Result<Option<Wanted>> {
    let value = |option: &str| args.iter().find_map(|arg| arg.strip_prefix(option)?.strip_prefix('='));
    let name = value("--cluster").or_else(|| args.iter().any(|arg| arg == "--cluster").then_some(NAME));
    let Some(name) = name else { return Ok(None) };
    let follows = args.iter().position(|arg| arg == "--routing").and_then(|at| args.get(at + 1));
    let routing = match value("--routing").or(follows.map(String::as_str)) {
        None => None,
        Some("vxlan") => Some(Routing::Vxlan),
        Some("native") => Some(Routing::Native),
        Some(other) => bail!("--routing {other}: with --cluster, vxlan or native"),
    };
    let others = ["all", "packets", "control", "maglev", "churn", "policies", "xdp", "cni"];
    let is_alone = args.iter().any(|arg| arg == "network") && !args.iter().any(|arg| others.contains(&arg.as_str()));
    ensure!(is_alone, "--cluster measures the group network alone: cargo xtask bench network --cluster");
    Ok(Some(Wanted { name: name.to_owned(), routing }))
}

fn in_clusters(args: &play::Args, wanted: &Wanted) -> Result<ExitCode> {
    need_root("bench")?;
    let Wanted { name, routing } = wanted;
    let present = Cluster::find(name)?;
    if let Some(cluster) = &present {
        let is_other = routing.is_some_and(|routing| routing != cluster.settings.routing);
        ensure!(!is_other, "the cluster {name} runs already, with another routing: {}", cluster.settings);
    }
    let program = play::bench_program(args)?;
    if let Some(cluster) = present {
        ui::step(&format!("using the cluster {name}, which runs: {}", cluster.settings));
        return in_cluster(&program, &cluster);
    }
    // Of the same build, instead of another one that `up` would make.
    let image = image::file(TAG);
    image::write(&image, &Profile::Release.dist(), image::NAME, TAG)?;
    let image = image.display().to_string();
    outlive_interrupts()?;
    for routing in routing.map_or_else(|| vec![Routing::Vxlan, Routing::Native], |routing| vec![routing]) {
        let settings = cluster::settings(&["--routing", routing.word(), "--image", &image])?;
        let measured = cluster::up(name, &settings).and_then(|()| {
            let cluster = Cluster::find(name)?.context("the cluster vanished")?;
            in_cluster(&program, &cluster)
        });
        // What is not there was refused, and not begun.
        let removed = if Cluster::find(name)?.is_some() { cluster::down(name) } else { Ok(()) };
        let code = measured?;
        removed?;
        if code != ExitCode::SUCCESS {
            return Ok(code);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Starts the pods, measures, and removes the pods.
fn in_cluster(program: &Cmd, cluster: &Cluster) -> Result<ExitCode> {
    outlive_interrupts()?;
    let measured = ends::start(cluster).and_then(|file| program.clone().env(VARIABLE, file).status());
    let removed = ends::remove(cluster);
    let status = measured?;
    removed?;
    Ok(exit_code(status.code()))
}

/// Ctrl-C ends the programs that run; this process goes on, and removes what was made.
fn outlive_interrupts() -> Result<()> {
    use nix::sys::signal::{SigHandler, Signal, signal};
    extern "C" fn ignore(_: libc::c_int) {}
    // A handler, unlike "ignore", is nothing that the program would inherit.
    for it in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler does nothing.
        unsafe { signal(it, SigHandler::Handler(ignore)) }.context("setting a handler of signals")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(words: &str) -> Result<Option<Wanted>> {
        wanted(&words.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    fn cluster(name: &str, routing: Option<Routing>) -> Wanted {
        Wanted { name: name.to_owned(), routing }
    }

    #[test]
    fn the_cluster_is_read_from_the_options_of_the_program() {
        for (words, expected) in [
            ("network --quick", None),
            ("network --routing native", None),
            ("network --cluster", Some(cluster(NAME, None))),
            ("--cluster network --quick", Some(cluster(NAME, None))),
            ("network --cluster=mine --routing native", Some(cluster("mine", Some(Routing::Native)))),
            ("--routing=vxlan network --cluster=mine", Some(cluster("mine", Some(Routing::Vxlan)))),
        ] {
            assert_eq!(read(words).unwrap(), expected, "{words}");
        }
    }

    #[test]
    fn a_cluster_is_for_the_group_network_alone() {
        for words in ["--cluster", "packets --cluster", "network cni --cluster=a", "network --cluster --routing direct"]
        {
            assert!(read(words).is_err(), "{words}");
        }
    }
}
