//! Puts the programs of socket calls on a control group of version 2, or swaps those that are there.
//!
//! Their links are pinned, so that they outlive the agent. A call runs the programs of its process's group and of all above it.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Error, Result, bail};
use aya_obj::generated::bpf_attach_type;
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, fstatfs};
use rustnet_common::names::SOCKET_PROGRAMS;

use super::attach::{Outcome, link_path};
use super::load::program_path;
use super::{pin, remedy, sys};

/// The hooks, in the order of [`SOCKET_PROGRAMS`].
const HOOKS: [bpf_attach_type; SOCKET_PROGRAMS.len()] = [
    bpf_attach_type::BPF_CGROUP_INET4_CONNECT,
    bpf_attach_type::BPF_CGROUP_INET6_CONNECT,
    bpf_attach_type::BPF_CGROUP_UDP4_SENDMSG,
    bpf_attach_type::BPF_CGROUP_UDP6_SENDMSG,
    bpf_attach_type::BPF_CGROUP_UDP4_RECVMSG,
    bpf_attach_type::BPF_CGROUP_UDP6_RECVMSG,
    bpf_attach_type::BPF_CGROUP_INET4_GETPEERNAME,
    bpf_attach_type::BPF_CGROUP_INET6_GETPEERNAME,
    bpf_attach_type::BPF_CGROUP_INET4_POST_BIND,
    bpf_attach_type::BPF_CGROUP_INET6_POST_BIND,
    bpf_attach_type::BPF_CGROUP_INET_SOCK_RELEASE,
];

/// True for the pin of a link to a control group.
pub fn is_link(path: &Path) -> bool {
    path.file_name().and_then(|name| name.to_str()).is_some_and(|name| SOCKET_PROGRAMS.contains(&name))
}

/// What is lost without a program that the others do without; `None` for one that they need.
pub fn loss_without(name: &str) -> Option<&'static str> {
    match name {
        "sock_bind4" | "sock_bind6" => Some("servers of this host can take node ports, where nobody reaches them"),
        "sock_release" => Some("closed sockets fill rn_sock_rev, and living ones may stay when their backend goes"),
        _ => None,
    }
}

/// The result of [`attach`].
#[derive(Default)]
pub struct Attached {
    /// What was changed, for the log.
    pub done: Vec<String>,
    /// Which programs are missing that the others do without, and why.
    pub failures: Vec<Error>,
}

/// Has all programs on the group in `dir`. Those that show a socket the Service's address come first: a socket that is led elsewhere
/// must not see where.
///
/// # Errors
/// It is no control group of version 2, or the kernel refuses a program that the others need.
pub fn attach<'a>(bpffs: &Path, dir: &Path, program: impl Fn(&str) -> Result<BorrowedFd<'a>>) -> Result<Attached> {
    let group = open(dir)?;
    let mut attached = Attached::default();
    SOCKET_PROGRAMS.iter().filter(|name| loss_without(name).is_none()).try_for_each(|name| program(name).map(drop))?;
    for (name, hook) in SOCKET_PROGRAMS.into_iter().zip(HOOKS).rev() {
        let path = link_path(bpffs, name, None);
        let shown = dir.display();
        let refused = || {
            format!(
                "attaching {name} to the control group {shown}: `bpftool cgroup show {shown}` lists the programs there; one without the \
                 flag multi lets no other in: detach it, or give --socket-lb off"
            )
        };
        let on = program(name).and_then(|program| hook_on(&path, &group, hook as u32, program).with_context(refused));
        match (on, loss_without(name)) {
            (Ok(Outcome::Unchanged), _) => {}
            (Ok(Outcome::Swapped), _) => attached.done.push(format!("{name}: program swapped")),
            (Ok(Outcome::Attached), _) => attached.done.push(format!("{name} attached to {shown}")),
            (Err(error), Some(loss)) => {
                // A program of before may be left there with maps that nobody writes.
                pin::remove(&path)?;
                attached.failures.push(error.context(loss));
            }
            (Err(error), None) => return Err(error),
        }
    }
    Ok(attached)
}

/// A program of somebody else on a hook of ours, which lets no other program in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exclusive {
    /// The program of ours that it keeps out.
    pub keeps_out: &'static str,
    /// Its name.
    pub name: String,
    /// The kernel's number of it.
    pub id: u32,
}

/// The programs on the group in `dir` that keep ours out.
///
/// # Errors
/// It is no control group of version 2, or the kernel does not list its programs for us.
pub fn exclusive(dir: &Path) -> Result<Vec<Exclusive>> {
    let group = open(dir)?;
    let mut found = Vec::new();
    for (keeps_out, hook) in SOCKET_PROGRAMS.into_iter().zip(HOOKS) {
        let there = sys::cgroup_programs(group.dir.as_fd(), hook as u32);
        let there = there.with_context(|| format!("listing the programs of {}", dir.display()))?;
        for id in there.ids.into_iter().filter(|_| !there.lets_others_in) {
            let name = sys::prog_name(id).unwrap_or_default();
            found.push(Exclusive { keeps_out, name, id });
        }
    }
    Ok(found)
}

/// Takes the programs off, those that lead sockets elsewhere first. Returns what was done.
///
/// # Errors
/// A pin cannot be removed.
pub fn detach(bpffs: &Path) -> Result<Option<String>> {
    let mut is_any_removed = false;
    for name in SOCKET_PROGRAMS {
        is_any_removed |= pin::remove(&link_path(bpffs, name, None))?;
    }
    Ok(is_any_removed.then(|| "programs of socket calls taken off".to_owned()))
}

/// Which of the pinned programs are not attached to a control group that lives.
///
/// # Errors
/// A pin cannot be read.
pub fn missing(bpffs: &Path) -> Result<Vec<&'static str>> {
    let mut missing = Vec::new();
    for name in SOCKET_PROGRAMS {
        let path = link_path(bpffs, name, None);
        let pinned = sys::obj_get(&program_path(bpffs, name)).and_then(|program| sys::prog_id(program.as_fd())).ok();
        match sys::obj_get(&path).and_then(|link| sys::cgroup_link_info(link.as_fd())) {
            Ok(info) if info.cgroup_id != 0 && pinned == Some(info.prog_id) => {}
            Ok(_) => missing.push(name),
            Err(e) if e.kind() == io::ErrorKind::NotFound => missing.push(name),
            Err(e) => bail!("opening {}: {e}: {}", path.display(), remedy(&e)),
        }
    }
    Ok(missing)
}

/// A control group.
struct Group {
    dir: File,
    /// The kernel's number of it.
    id: u64,
}

fn open(path: &Path) -> Result<Group> {
    let remedy = "mount cgroup2 there, or name the directory where it is with --cgroup, or give --socket-lb off";
    let open = || -> Result<Group> {
        let dir = File::open(path)?;
        if fstatfs(&dir)?.filesystem_type() != CGROUP2_SUPER_MAGIC {
            bail!("it is no control group of version 2");
        }
        let id = dir.metadata()?.ino();
        Ok(Group { dir, id })
    };
    open().with_context(|| format!("the control group {} of all processes cannot be used: {remedy}", path.display()))
}

fn hook_on(path: &Path, group: &Group, hook: u32, prog: BorrowedFd<'_>) -> Result<Outcome> {
    match sys::obj_get(path) {
        Ok(link) => {
            let info = sys::cgroup_link_info(link.as_fd()).with_context(|| format!("{} is no link", path.display()))?;
            if (info.cgroup_id, info.attach_type) == (group.id, hook) {
                if info.prog_id == sys::prog_id(prog).context("asking for a program's id")? {
                    return Ok(Outcome::Unchanged);
                }
                sys::link_update(link.as_fd(), prog)?;
                return Ok(Outcome::Swapped);
            }
            // Its group is gone, or it was for another one.
            fs::remove_file(path).with_context(|| format!("removing {}", path.display()))?;
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => bail!("opening {}: {e}: {}", path.display(), remedy(&e)),
    }
    let link = sys::link_create_cgroup(prog, group.dir.as_fd(), hook)?;
    pin::replace(path, link.as_fd())?;
    Ok(Outcome::Attached)
}
