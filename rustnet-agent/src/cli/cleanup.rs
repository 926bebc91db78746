//! `rustnetctl cleanup`: removes everything of rustnet's from this host and network namespace, and nothing else.
//!
//! Each step is tried even if another failed, and a second run finds nothing to do. Order: what calls us (the runtime's
//! configuration), what runs (hooks), what they use (pins), what is left over (devices, routes, files).

use std::fs;
use std::io::{IsTerminal, Write};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use nix::sys::statvfs::{FsFlags, statvfs};
use rustnet_common::files::{ENDPOINTS_DIR, IPAM_DIR, NODE_FILE};
use rustnet_common::names::{LINKS_DIR, OVERLAY_DEV, PROGS_DIR, VETH_PREFIX, map, v1};
use serde::Serialize;

use super::output::{Output, Usage, json, line};
use super::{Places, kube_proxy};
use crate::bpf::attach::Direction;
use crate::bpf::upgrade::{self, NEXT_DIR, OLD_DIR};
use crate::install::{BINARY, CONFLIST, LOOPBACK, loopback_is_ours};
use crate::net::netlink::Socket;
use crate::net::{journal, link, neighbour, route, tc};
use crate::reconcile::presence::{self, Presence};
use crate::{namefile, podfile, policyfile, servicefile, v1file};

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
    /// Remove what kube-proxy left instead: tables, chains, the rules that lead to them, sets of ipset, virtual servers, device
    #[arg(long, conflicts_with_all = ["cni_bin_dir", "cni_conf_dir"])]
    kube_proxy: bool,
    /// Only list what would go; exit code 1 if there is something
    #[arg(long)]
    dry_run: bool,
}

/// What was done.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    /// True if it is only listed.
    dry_run: bool,
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
    let mut report = Report { dry_run: args.dry_run, ..Report::default() };
    if args.dry_run {
        // Nothing is removed, so that a living agent is no reason to refuse.
        clean(places, args, &mut report);
    } else {
        unless_sure(&format!(
            "This removes rustnet's programs, maps, devices, routes and files ({}, {}) and disconnects all its pods \
             (--dry-run lists them).",
            places.bpffs.as_deref().unwrap_or(Path::new("pins unknown")).display(),
            places.run_dir.display()
        ))?;
        let alone = if places.run_dir.exists() { Some(exclude(places)?) } else { None };
        clean(places, args, &mut report);
        drop(alone);
    }
    // The lock itself, and with it the directory if nothing foreign is in it.
    let hand = Hand { dry_run: args.dry_run };
    let lock = places.run_dir.join(presence::LOCK);
    let removed = hand.file(&lock);
    if removed.is_err() || args.dry_run {
        report.note(&lock.display().to_string(), removed);
    }
    let empty = hand.empty_dir(&places.run_dir, &report.removed);
    report.note(&places.run_dir.display().to_string(), empty);
    print(&report, out)?;
    Ok(report.failed.is_empty() && (!args.dry_run || report.removed.is_empty()))
}

fn print(report: &Report, out: &Output) -> Result<()> {
    if out.is_json() {
        return json(report);
    }
    let verb = if report.dry_run { "would remove" } else { "removed" };
    report.removed.iter().try_for_each(|what| line(&format!("{verb} {what}")))?;
    if report.removed.is_empty() && report.failed.is_empty() {
        line("nothing of rustnet's is left here")?;
    }
    report.failed.iter().for_each(|what| eprintln!("failed: {what}"));
    Ok(())
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

fn clean(places: &Places, args: &Args, report: &mut Report) {
    let hand = Hand { dry_run: args.dry_run };
    let agent = places.agent.as_ref();
    let conf_dir = args.cni_conf_dir.as_ref().or_else(|| agent?.cni_conf_dir.as_ref());
    let bin_dir = args.cni_bin_dir.as_ref().or_else(|| agent?.cni_bin_dir.as_ref());
    let loopback = bin_dir.filter(|dir| loopback_is_ours(dir)).map(|dir| dir.join(LOOPBACK));
    // The binary comes last: it identifies the loopback plugin as ours.
    let installed = [conf_dir.map(|dir| dir.join(CONFLIST)), loopback, bin_dir.map(|dir| dir.join(BINARY))];
    for path in installed.into_iter().flatten() {
        report.note(&path.display().to_string(), hand.file(&path));
    }
    // Where no agent is known, devices and routes may be another's.
    if let Some(bpffs) = &places.bpffs {
        report.note_all("pins", hand.pins(bpffs));
        network(hand, report);
        let chosen = agent.and_then(|agent| agent.settings.get("sysctl-dir")?.first());
        let sysctl_dir = Path::new(chosen.map_or("/proc/sys/net", String::as_str));
        report.note_all("sysctls", journal::restore(&places.run_dir, sysctl_dir, hand.dry_run));
    }
    let files = [
        NODE_FILE,
        podfile::FILE,
        policyfile::FILE,
        namefile::SERVICES,
        namefile::NODES,
        namefile::UNSERVED,
        servicefile::FILE,
        presence::FILE,
        presence::WRITER_LOCK,
        v1file::FILE,
        journal::FILE,
    ];
    for path in files.map(|name| places.run_dir.join(name)) {
        report.note(&path.display().to_string(), hand.file(&path));
    }
    for path in [ENDPOINTS_DIR, IPAM_DIR].map(|name| places.run_dir.join(name)) {
        report.note(&path.display().to_string(), hand.tree(&path));
    }
}

fn network(hand: Hand, report: &mut Report) {
    match Socket::open() {
        Ok(mut socket) => {
            report.note_all("devices", hand.devices(&mut socket));
            report.note_all("routes", hand.routes(&mut socket));
        }
        Err(error) => report.failed.push(format!("netlink: {error}")),
    }
}

/// What removes, or only says what it would remove.
#[derive(Clone, Copy)]
struct Hand {
    dry_run: bool,
}

impl Hand {
    /// Links first, so that no hook runs a program whose maps are going; then programs, maps, the folders.
    fn pins(self, bpffs: &Path) -> Result<Vec<String>> {
        let mut removed = Vec::new();
        for dir in [LINKS_DIR, PROGS_DIR].map(|name| bpffs.join(name)) {
            for path in entries(&dir)? {
                removed.extend(self.file(&path)?.then(|| path.display().to_string()));
            }
            self.empty_dir(&dir, &removed)?;
        }
        for dir in [NEXT_DIR, OLD_DIR].map(|name| bpffs.join(name)) {
            if dir.exists() {
                if !self.dry_run {
                    upgrade::remove_dir(&dir)?;
                }
                removed.push(dir.display().to_string());
            }
        }
        for path in map::ALL.into_iter().chain(v1::ALL).map(|name| bpffs.join(name)) {
            removed.extend(self.file(&path)?.then(|| path.display().to_string()));
        }
        removed.extend(self.empty_dir(bpffs, &removed)?.then(|| bpffs.display().to_string()));
        Ok(removed)
    }

    /// The overlay device and the pods' veths; from other devices, our classifiers.
    fn devices(self, socket: &mut Socket) -> Result<Vec<String>> {
        let mut removed = Vec::new();
        for device in link::list(socket)? {
            if device.name == OVERLAY_DEV || (device.name.starts_with(VETH_PREFIX) && device.kind == "veth") {
                let gone = self.dry_run || link::delete(socket, device.index)?;
                removed.extend(gone.then(|| format!("device {}", device.name)));
                continue;
            }
            for direction in Direction::BOTH {
                let gone = if self.dry_run {
                    tc::filter(socket, device.index, direction)?.is_some()
                } else {
                    tc::remove_filter(socket, device.index, direction)?
                };
                removed.extend(gone.then(|| format!("classifier on {}", device.name)));
            }
        }
        Ok(removed)
    }

    fn routes(self, socket: &mut Socket) -> Result<Vec<String>> {
        let mut removed = Vec::new();
        for route in route::list(socket)?.iter().filter(|route| route.protocol == route::PROTOCOL) {
            let gone = self.dry_run || route::delete(socket, route)?;
            removed.extend(gone.then(|| format!("route to {}", route.dst)));
        }
        for hop in neighbour::list(socket)?.iter().filter(|it| route::is_service_hop(it.ip)) {
            let gone = self.dry_run || neighbour::delete(socket, hop)?;
            removed.extend(gone.then(|| format!("neighbour {}", hop.ip)));
        }
        Ok(removed)
    }

    /// True if there was a file.
    fn file(self, path: &Path) -> Result<bool> {
        if self.dry_run { is_there(path) } else { gone(fs::remove_file(path), path) }
    }

    /// True if there was a directory.
    fn tree(self, path: &Path) -> Result<bool> {
        if self.dry_run { is_there(path) } else { gone(fs::remove_dir_all(path), path) }
    }

    /// Somebody else's files, or a file system mounted there, keep a directory. `removed`: what has gone, or would have.
    fn empty_dir(self, path: &Path, removed: &[String]) -> Result<bool> {
        use std::io::ErrorKind::{DirectoryNotEmpty, ReadOnlyFilesystem, ResourceBusy};
        if self.dry_run {
            let is_ours = |entry: &PathBuf| {
                let shown = entry.display().to_string();
                // What is in these two directories is listed by itself.
                let is_listed = [LINKS_DIR, PROGS_DIR].iter().any(|name| *entry == path.join(name));
                is_listed || removed.contains(&shown)
            };
            return Ok(is_there(path)? && !is_mount_point(path)? && entries(path)?.iter().all(is_ours));
        }
        match fs::remove_dir(path) {
            Err(e) if matches!(e.kind(), DirectoryNotEmpty | ResourceBusy) => Ok(false),
            // In a container: a file system that can be written, mounted in one that cannot.
            Err(e) if e.kind() == ReadOnlyFilesystem && is_writable(path) => Ok(false),
            result => gone(result, path),
        }
    }
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    match fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e).with_context(|| format!("reading {}", dir.display())),
    }
}

/// True if a file system is mounted there: the kernel does not remove the directory.
fn is_mount_point(path: &Path) -> Result<bool> {
    let device = |path: &Path| {
        let found = fs::metadata(path).with_context(|| format!("looking at {}", path.display()))?;
        Ok::<_, anyhow::Error>(found.dev())
    };
    Ok(device(path)? != device(&path.join(".."))?)
}

/// True if files below it can be made and removed, as far as its file system is concerned.
fn is_writable(path: &Path) -> bool {
    statvfs(path).is_ok_and(|found| !found.flags().contains(FsFlags::ST_RDONLY))
}

fn is_there(path: &Path) -> Result<bool> {
    let there = fs::symlink_metadata(path).map(drop);
    match there {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        result => result.map(|()| true).with_context(|| format!("looking at {}", path.display())),
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

#[cfg(test)]
mod tests {
    use super::Report;
    use crate::cli::golden::assert_golden;

    #[test]
    fn its_json_is_an_interface() {
        let list = |what: &str| vec![what.to_owned()];
        let failed = list("pins: removing /sys/fs/bpf/rustnet/rn_svc4_v2: EBUSY");
        assert_golden("cleanup", &Report { dry_run: true, removed: list("device rn_vxlan"), failed });
    }
}
