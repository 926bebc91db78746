//! `rustnetctl cleanup`: removes everything of rustnet's from this host and network namespace, and nothing else.
//!
//! Each step is tried even if another failed, and a second run finds nothing to do. Order: what calls us (the runtime's
//! configuration), what runs (hooks), what they use (pins), what is left over (devices, routes, files).

use std::fs;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use rustnet_common::files::{ENDPOINTS_DIR, IPAM_DIR, NODE_FILE};
use rustnet_common::names::{LINKS_DIR, PROGS_DIR, VETH_PREFIX, map, v1};
use serde::Serialize;

use super::output::{Output, Usage, json, line};
use super::{Places, kube_proxy};
use crate::bpf::attach::Direction;
use crate::bpf::upgrade::{self, NEXT_DIR, OLD_DIR};
use crate::install::{BINARY, CONFLIST, LOOPBACK, loopback_is_ours};
use crate::net::netlink::Socket;
use crate::net::{link, overlay, route, tc};
use crate::reconcile::presence::{self, Presence};
use crate::{podfile, v1file};

/// Options.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
    /// Where the CNI binary is installed [default: where the agent installed it]
    #[arg(long, value_name = "DIR")]
    cni_bin_dir: Option<PathBuf>,
    /// Where the CNI configuration is installed [default: where the agent installed it]
    #[arg(long, value_name = "DIR")]
    cni_conf_dir: Option<PathBuf>,
    /// Remove what kube-proxy left instead: its tables, its chains, the rules that lead to them, its device
    #[arg(long, conflicts_with_all = ["cni_bin_dir", "cni_conf_dir"])]
    kube_proxy: bool,
    /// Only list what would go; exit code 1 if there is something
    #[arg(long, requires = "kube_proxy")]
    dry_run: bool,
}

/// What was done.
#[derive(Debug, Default, Serialize)]
struct Report {
    removed: Vec<String>,
    failed: Vec<String>,
}

impl Report {
    /// Notes that `what` went, unless it was not there.
    fn note(&mut self, what: &str, result: Result<bool>) {
        match result {
            Ok(true) => self.removed.push(what.to_owned()),
            Ok(false) => {}
            Err(error) => self.failed.push(format!("{what}: {error:#}")),
        }
    }

    /// Notes each of a list.
    fn note_all(&mut self, what: &str, result: Result<Vec<String>>) {
        match result {
            Ok(removed) => self.removed.extend(removed),
            Err(error) => self.failed.push(format!("{what}: {error:#}")),
        }
    }
}

/// Removes; true if nothing failed.
pub fn run(find: impl Fn() -> Result<Places>, args: &Args, out: &Output) -> Result<bool> {
    let unless_sure = |question: &str| if args.yes { Ok(()) } else { confirm(question) };
    if args.kube_proxy {
        return kube_proxy::run(args.dry_run, unless_sure, out);
    }
    let places = &find()?;
    unless_sure(&format!(
        "This removes rustnet's programs, maps, devices, routes and files ({}, {}) and disconnects all its pods.",
        places.bpffs.as_deref().unwrap_or(Path::new("pins unknown")).display(),
        places.run_dir.display()
    ))?;
    let alone = if places.run_dir.exists() { Some(exclude(places)?) } else { None };
    let mut report = clean(places, args);
    drop(alone);
    // The lock itself, and with it the directory if nothing foreign is in it.
    let lock = places.run_dir.join(presence::LOCK);
    let removed = remove_file(&lock);
    if removed.is_err() {
        report.note(&lock.display().to_string(), removed);
    }
    report.note(&places.run_dir.display().to_string(), remove_empty_dir(&places.run_dir));
    if out.is_json() {
        json(&report)?;
    } else {
        report.removed.iter().try_for_each(|what| line(&format!("removed {what}")))?;
        if report.removed.is_empty() && report.failed.is_empty() {
            line("nothing of rustnet's is left here")?;
        }
        report.failed.iter().for_each(|what| eprintln!("failed: {what}"));
    }
    Ok(report.failed.is_empty())
}

fn exclude(places: &Places) -> Result<Presence> {
    Presence::exclude(&places.run_dir)?.ok_or_else(|| {
        anyhow!("an agent serves {}: stop it first, it would put everything back", places.run_dir.display())
    })
}

fn confirm(question: &str) -> Result<()> {
    if !std::io::stdin().is_terminal() {
        return Err(Usage(format!("{question} Say --yes to do it.")).into());
    }
    eprint!("{question}\nGo on? [y/N] ");
    std::io::stderr().flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).context("reading the answer")?;
    if matches!(answer.trim(), "y" | "Y" | "yes") { Ok(()) } else { Err(Usage("nothing was removed".into()).into()) }
}

fn clean(places: &Places, args: &Args) -> Report {
    let mut report = Report::default();
    let agent = places.agent.as_ref();
    let conf_dir = args.cni_conf_dir.as_ref().or_else(|| agent?.cni_conf_dir.as_ref());
    let bin_dir = args.cni_bin_dir.as_ref().or_else(|| agent?.cni_bin_dir.as_ref());
    let loopback = bin_dir.filter(|dir| loopback_is_ours(dir)).map(|dir| dir.join(LOOPBACK));
    // The binary comes last: it identifies the loopback plugin as ours.
    let installed = [conf_dir.map(|dir| dir.join(CONFLIST)), loopback, bin_dir.map(|dir| dir.join(BINARY))];
    for path in installed.into_iter().flatten() {
        report.note(&path.display().to_string(), remove_file(&path));
    }
    // Where no agent is known, devices and routes may be another's.
    if let Some(bpffs) = &places.bpffs {
        report.note_all("pins", pins(bpffs));
        network(&mut report);
    }
    for name in [NODE_FILE, podfile::FILE, presence::FILE, presence::WRITER_LOCK, v1file::FILE] {
        let path = places.run_dir.join(name);
        report.note(&path.display().to_string(), remove_file(&path));
    }
    for name in [ENDPOINTS_DIR, IPAM_DIR] {
        let path = places.run_dir.join(name);
        report.note(&path.display().to_string(), remove_tree(&path));
    }
    report
}

fn network(report: &mut Report) {
    match Socket::open() {
        Ok(mut socket) => {
            report.note_all("devices", devices(&mut socket));
            report.note_all("routes", routes(&mut socket));
        }
        Err(error) => report.failed.push(format!("netlink: {error}")),
    }
}

/// Links first, so that no hook runs a program whose maps are going; then programs, maps, the folders.
fn pins(bpffs: &Path) -> Result<Vec<String>> {
    let mut removed = Vec::new();
    for dir in [LINKS_DIR, PROGS_DIR] {
        let dir = bpffs.join(dir);
        for path in entries(&dir)? {
            removed.extend(remove_file(&path)?.then(|| path.display().to_string()));
        }
        remove_empty_dir(&dir)?;
    }
    for dir in [NEXT_DIR, OLD_DIR].map(|name| bpffs.join(name)) {
        if dir.exists() {
            upgrade::remove_dir(&dir)?;
            removed.push(dir.display().to_string());
        }
    }
    for name in map::ALL.into_iter().chain(v1::ALL) {
        let path = bpffs.join(name);
        removed.extend(remove_file(&path)?.then(|| path.display().to_string()));
    }
    removed.extend(remove_empty_dir(bpffs)?.then(|| bpffs.display().to_string()));
    Ok(removed)
}

/// The overlay device and the pods' veths; from other devices, our classifiers.
fn devices(socket: &mut Socket) -> Result<Vec<String>> {
    let mut removed = Vec::new();
    if overlay::remove(socket)? {
        removed.push(format!("device {}", rustnet_common::names::OVERLAY_DEV));
    }
    for device in link::list(socket)? {
        if device.name.starts_with(VETH_PREFIX) && device.kind == "veth" {
            removed.extend(link::delete(socket, device.index)?.then(|| format!("device {}", device.name)));
            continue;
        }
        for direction in Direction::BOTH {
            if tc::remove_filter(socket, device.index, direction)? {
                removed.push(format!("classifier on {}", device.name));
            }
        }
    }
    Ok(removed)
}

fn routes(socket: &mut Socket) -> Result<Vec<String>> {
    let mut removed = Vec::new();
    for route in route::list(socket)?.iter().filter(|route| route.protocol == route::PROTOCOL) {
        removed.extend(route::delete(socket, route)?.then(|| format!("route to {}", route.dst)));
    }
    Ok(removed)
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    match fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e).with_context(|| format!("reading {}", dir.display())),
    }
}

/// True if there was something.
fn gone(result: std::io::Result<()>, path: &Path) -> Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e).with_context(|| format!("removing {}", path.display())),
    }
}

fn remove_file(path: &Path) -> Result<bool> {
    gone(fs::remove_file(path), path)
}

fn remove_tree(path: &Path) -> Result<bool> {
    gone(fs::remove_dir_all(path), path)
}

/// Somebody else's files, or a file system mounted there, keep a directory.
fn remove_empty_dir(path: &Path) -> Result<bool> {
    use std::io::ErrorKind::{DirectoryNotEmpty, ResourceBusy};
    match fs::remove_dir(path) {
        Err(e) if matches!(e.kind(), DirectoryNotEmpty | ResourceBusy) => Ok(false),
        result => gone(result, path),
    }
}
