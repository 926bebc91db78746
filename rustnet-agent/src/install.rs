//! Installs the CNI binary and the CNI configuration, so that a runtime never sees half of either.
//!
//! The binary first, once this agent's maps and programs are pinned: it works without the agent, on what is pinned. An agent
//! that cannot load leaves the earlier binary, which fits what the earlier agent pinned. The configuration last, once the
//! agent is ready, because its presence makes the runtime call the node's network ready. Both stay when the agent stops;
//! `rustnetctl cleanup` removes them.

use crate::config::Config;
use anyhow::Context;
use serde_json::json;
use std::fs::{File, Metadata, Permissions};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

/// Name of the CNI binary, next to the agent's executable and where it is installed; the
/// configuration's `type`.
pub const BINARY: &str = "rustnet-cni";
/// The same binary under the name of a plugin that containerd runs before any network's: without it no pod starts. Installed
/// only where no other package brings one.
pub const LOOPBACK: &str = "loopback";
/// Name of the configuration. Runtimes take the lexicographically first: low, with room below.
pub const CONFLIST: &str = "05-rustnet.conflist";
/// Name of the network in it.
pub const NETWORK: &str = "rustnet";

/// Installs the CNI binary from the directory of this process's executable, if the settings say
/// where, and [`LOOPBACK`] unless it is another's. Returns the paths that were written.
///
/// # Errors
/// No CNI binary next to the agent's executable; a directory that cannot be written.
pub fn binary(config: &Config) -> anyhow::Result<Vec<PathBuf>> {
    let Some(dir) = &config.cni_bin_dir else { return Ok(Vec::new()) };
    let agent = std::env::current_exe().context("cannot tell where the agent's executable is: is /proc mounted?")?;
    let source = agent.with_file_name(BINARY);
    binary_from(&source, dir)
}

/// What the file system says of the CNI binary and of its copies: device, inode, size, time of the last change. While it says the
/// same, nobody has touched them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stamp(Vec<Option<[u64; 5]>>);

/// Looks at the files of [`binary`] without reading them.
pub fn stamp(config: &Config) -> Stamp {
    let source = std::env::current_exe().ok().map(|agent| agent.with_file_name(BINARY));
    let copies = config.cni_bin_dir.iter().flat_map(|dir| [dir.join(BINARY), dir.join(LOOPBACK)]);
    let state = |path: PathBuf| {
        let meta = std::fs::symlink_metadata(path).ok()?;
        let changed = [meta.ctime(), meta.ctime_nsec()].map(i64::cast_unsigned);
        Some([meta.dev(), meta.ino(), meta.size(), changed[0], changed[1]])
    };
    Stamp(source.into_iter().chain(copies).map(state).collect())
}

fn binary_from(source: &Path, dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut content = Vec::new();
    File::open(source).and_then(|mut file| file.read_to_end(&mut content)).with_context(|| {
        format!("{}: cannot read the CNI binary; it must be next to the agent's executable", source.display())
    })?;
    make_dir(dir, "--cni-bin-dir")?;
    let loopback = dir.join(LOOPBACK);
    let vacant = std::fs::symlink_metadata(&loopback).is_err_and(|error| error.kind() == ErrorKind::NotFound);
    let ours = vacant || holds(&loopback, &content) || loopback_is_ours(dir);
    // The binary comes last: an older one identifies an older loopback plugin as ours.
    let targets = ours.then_some(loopback).into_iter().chain([dir.join(BINARY)]);
    let mut written = Vec::new();
    for target in targets {
        if write_atomic(&target, &content, 0o755)? {
            written.push(target);
        }
    }
    Ok(written)
}

/// Whether the plugin [`LOOPBACK`] in the CNI binary directory is our binary: the same bytes as
/// [`BINARY`] next to it.
pub fn loopback_is_ours(dir: &Path) -> bool {
    let is_file = |name| std::fs::symlink_metadata(dir.join(name)).is_ok_and(|meta| meta.is_file());
    is_file(BINARY) && std::fs::read(dir.join(BINARY)).is_ok_and(|binary| holds(&dir.join(LOOPBACK), &binary))
}

/// Installs the CNI configuration, if the settings say where. To be called once the agent is ready. Returns its path if it
/// was written.
///
/// # Errors
/// A directory that cannot be written.
pub fn conflist(config: &Config) -> anyhow::Result<Option<PathBuf>> {
    let Some(dir) = &config.cni_conf_dir else { return Ok(None) };
    make_dir(dir, "--cni-conf-dir")?;
    let target = dir.join(CONFLIST);
    let written = write_atomic(&target, conflist_text(config).as_bytes(), 0o644)?;
    Ok(written.then_some(target))
}

/// The configuration's content.
pub fn conflist_text(config: &Config) -> String {
    let value = json!({
        // The newest that every runtime in use reads; those that know better take the best of the list.
        "cniVersion": "1.0.0",
        "cniVersions": ["0.4.0", "1.0.0", "1.1.0"],
        "name": NETWORK,
        "plugins": [{
            "type": BINARY,
            // Runtimes hand over what pods' annotations say of bandwidth, and their host ports, only to those who ask.
            "capabilities": { "bandwidth": true, "portMappings": true },
            "bpffs": config.bpffs,
            "runDir": config.run_dir,
        }],
    });
    format!("{value:#}\n")
}

/// Makes a file have this content and mode, unless it has. A unique temporary file in the same directory is written,
/// synced and renamed, and the directory is synced: readers see the old or the new content, a crash leaves one of them,
/// and runtimes that watch the directory notice (they miss files renamed in from elsewhere). The temporary name begins with
/// a dot and has no suffix that a runtime reads. Returns whether anything was written.
///
/// # Errors
/// The directory cannot be written; the message names the file.
pub fn write_atomic(target: &Path, content: &[u8], mode: u32) -> anyhow::Result<bool> {
    let shown = target.display();
    if is_current(target, content, mode) {
        return Ok(false);
    }
    let dir = target.parent().with_context(|| format!("{shown}: has no directory"))?;
    let write = || -> std::io::Result<()> {
        let mut file = tempfile::Builder::new()
            .prefix(".rustnet-")
            .suffix(".tmp")
            .permissions(Permissions::from_mode(0o600))
            .tempfile_in(dir)?;
        file.write_all(content)?;
        // Set on the open file: the mode asked for at creation is subject to the umask.
        file.as_file().set_permissions(Permissions::from_mode(mode))?;
        file.as_file().sync_all()?;
        file.persist(target).map_err(|error| error.error)?;
        File::open(dir)?.sync_all()
    };
    write().with_context(|| format!("{shown}: cannot write; check that the directory exists and is writable"))?;
    Ok(true)
}

fn is_current(target: &Path, content: &[u8], mode: u32) -> bool {
    let has_mode = |meta: Metadata| meta.permissions().mode() & 0o7777 == mode;
    holds(target, content) && std::fs::symlink_metadata(target).is_ok_and(has_mode)
}

/// Whether it is a file with this content; a symbolic link is none, for its target is somebody else's.
fn holds(path: &Path, content: &[u8]) -> bool {
    let Ok(meta) = std::fs::symlink_metadata(path) else { return false };
    meta.is_file() && meta.len() == content.len() as u64 && std::fs::read(path).is_ok_and(|old| old == content)
}

fn make_dir(dir: &Path, flag: &str) -> anyhow::Result<()> {
    std::fs::create_dir_all(dir)
        .with_context(|| format!("{}: cannot make the directory; check {flag} and the mount behind it", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(dir: &Path) -> Config {
        let args = [
            "rustnet-agent".to_owned(),
            "--node-name=n1".to_owned(),
            "--manifests=/m".to_owned(),
            "--bpffs=/sys/fs/bpf/one".to_owned(),
            "--run-dir=/run/one".to_owned(),
            format!("--cni-conf-dir={}", dir.join("net.d").display()),
        ];
        Config::load(args, &|_| None).expect("good")
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(dir)
            .expect("dir")
            .map(|entry| entry.expect("entry").file_name().into_string().expect("name"))
            .collect();
        names.sort();
        names
    }

    #[test]
    fn the_conflist_is_what_runtimes_want() {
        let dir = tempfile::tempdir().expect("dir");
        let config = config(dir.path());
        let path = conflist(&config).expect("installed").expect("written");
        assert_eq!(path, dir.path().join("net.d/05-rustnet.conflist"));
        let value: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).expect("read")).expect("JSON");
        assert_eq!(value["cniVersion"], "1.0.0");
        assert_eq!(value["cniVersions"], json!(["0.4.0", "1.0.0", "1.1.0"]));
        assert_eq!(value["name"], "rustnet");
        let plugin = &value["plugins"][0];
        assert_eq!(plugin["type"], "rustnet-cni");
        assert_eq!(plugin["bpffs"], "/sys/fs/bpf/one");
        assert_eq!(plugin["runDir"], "/run/one");
        let capabilities = json!({ "bandwidth": true, "portMappings": true });
        assert_eq!(plugin["capabilities"], capabilities, "nothing more is promised than is kept");
        assert_eq!(std::fs::metadata(&path).expect("meta").mode() & 0o777, 0o644);
        assert_eq!(names(&dir.path().join("net.d")), [CONFLIST], "nothing temporary is left");
    }

    #[test]
    fn unchanged_content_is_not_rewritten_and_changed_content_is() {
        let dir = tempfile::tempdir().expect("dir");
        let mut config = config(dir.path());
        let path = conflist(&config).expect("installed").expect("written");
        let inode = std::fs::metadata(&path).expect("meta").ino();
        assert_eq!(conflist(&config).expect("again"), None);
        assert_eq!(std::fs::metadata(&path).expect("meta").ino(), inode);
        config.run_dir = "/run/two".into();
        assert_eq!(conflist(&config).expect("changed"), Some(path.clone()));
        assert!(std::fs::read_to_string(&path).expect("read").contains("/run/two"));
        std::fs::write(&path, "{}").expect("somebody edits it");
        assert!(conflist(&config).expect("repaired").is_some());
    }

    /// Another test's fork may hold the descriptor that wrote the program until it execs: the kernel says "busy" till then.
    fn run(program: &Path, arg: &str) -> std::process::Child {
        loop {
            match std::process::Command::new(program).arg(arg).spawn() {
                Err(error) if error.kind() == ErrorKind::ExecutableFileBusy => std::thread::yield_now(),
                result => break result.expect("runs"),
            }
        }
    }

    #[test]
    fn the_binary_is_replaced_even_while_it_runs() {
        let dir = tempfile::tempdir().expect("dir");
        let (old, new, bin) = (dir.path().join("old"), dir.path().join("new"), dir.path().join("opt/cni/bin"));
        std::fs::copy("/bin/sleep", &old).expect("a program");
        std::fs::write(&new, "#!/bin/sh\nexit 0\n").expect("another");
        let target = bin.join(BINARY);
        let both = [bin.join(LOOPBACK), target.clone()];
        assert_eq!(binary_from(&old, &bin).expect("installed"), both);
        let mut child = run(&target, "1000");
        let replaced = binary_from(&new, &bin);
        child.kill().expect("killed");
        child.wait().expect("reaped");
        assert_eq!(replaced.expect("replaced while it ran"), both);
        assert!(run(&target, "").wait().expect("ends").success());
        assert!(binary_from(&new, &bin).expect("again").is_empty(), "the same is not copied again");
        assert_eq!(names(&bin), [LOOPBACK, BINARY]);
    }

    #[test]
    fn loopback_is_installed_updated_and_never_taken_from_others() {
        let dir = tempfile::tempdir().expect("dir");
        let (source, bin) = (dir.path().join("source"), dir.path().join("bin"));
        let (loopback, binary) = (bin.join(LOOPBACK), bin.join(BINARY));
        let install = |version: &str| {
            std::fs::write(&source, version).expect("written");
            binary_from(&source, &bin).expect("installed")
        };
        let read = |path: &Path| std::fs::read_to_string(path).expect("read");
        assert_eq!(install("one"), [loopback.clone(), binary.clone()]);
        assert_eq!(std::fs::metadata(&loopback).expect("meta").mode() & 0o777, 0o755);
        assert_eq!(install("two"), [loopback.clone(), binary.clone()]);
        assert_eq!((read(&loopback), loopback_is_ours(&bin)), ("two".into(), true));

        // A crash between the two: the next start completes it.
        std::fs::write(&loopback, "three").expect("written");
        assert_eq!(install("three"), [binary.as_path()]);

        // Somebody brings another: it stays, through updates, until it goes.
        std::fs::write(&loopback, "reference").expect("written");
        std::fs::set_permissions(&loopback, Permissions::from_mode(0o700)).expect("chmod");
        for version in ["three", "four"] {
            install(version);
            assert_eq!((read(&loopback), loopback_is_ours(&bin)), ("reference".into(), false));
            assert_eq!(std::fs::metadata(&loopback).expect("meta").mode() & 0o777, 0o700);
        }
        std::fs::remove_file(&loopback).expect("removed");
        assert_eq!(install("four"), [loopback.as_path()]);

        // Links are never ours, wherever they lead.
        for leads_to in ["/nowhere", BINARY] {
            std::fs::remove_file(&loopback).expect("removed");
            std::os::unix::fs::symlink(leads_to, &loopback).expect("linked");
            install("five");
            assert!(std::fs::symlink_metadata(&loopback).expect("meta").is_symlink() && !loopback_is_ours(&bin));
        }
    }

    /// A network monitor is called so, too; what is ours was never installed under that name (ADR 8).
    #[test]
    fn a_program_called_rustnet_is_anothers() {
        let dir = tempfile::tempdir().expect("dir");
        let (source, bin) = (dir.path().join("source"), dir.path().join("bin"));
        let foreign = bin.join("rustnet");
        std::fs::create_dir_all(&bin).expect("made");
        std::os::unix::fs::symlink("/opt/rustnet/rustnet", &foreign).expect("linked");
        for version in ["one", "two"] {
            std::fs::write(&source, version).expect("written");
            binary_from(&source, &bin).expect("installed");
            assert_eq!(names(&bin), [LOOPBACK, "rustnet", BINARY]);
            assert!(std::fs::symlink_metadata(&foreign).expect("meta").is_symlink());
        }
    }

    #[test]
    fn without_our_binary_next_to_it_a_loopback_is_anothers() {
        let dir = tempfile::tempdir().expect("dir");
        assert!(!loopback_is_ours(dir.path()));
        std::fs::write(dir.path().join(LOOPBACK), "x").expect("written");
        assert!(!loopback_is_ours(dir.path()));
        std::fs::write(dir.path().join(BINARY), "x").expect("written");
        assert!(loopback_is_ours(dir.path()));
    }

    #[test]
    fn a_missing_binary_is_named_and_leaves_nothing() {
        let dir = tempfile::tempdir().expect("dir");
        let bin = dir.path().join("bin");
        let error = binary_from(&dir.path().join("absent"), &bin).expect_err("absent").to_string();
        assert!(error.contains("absent") && error.contains("next to the agent"), "{error}");
        assert!(!bin.exists());
    }

    #[test]
    fn wrong_modes_and_symbolic_links_are_repaired() {
        let dir = tempfile::tempdir().expect("dir");
        let (target, foreign) = (dir.path().join("t"), dir.path().join("foreign"));
        write_atomic(&target, b"x", 0o755).expect("written");
        std::fs::set_permissions(&target, Permissions::from_mode(0o600)).expect("chmod");
        assert!(write_atomic(&target, b"x", 0o755).expect("repaired"));
        std::fs::write(&foreign, "theirs").expect("written");
        std::fs::remove_file(&target).expect("removed");
        std::os::unix::fs::symlink(&foreign, &target).expect("linked");
        assert!(write_atomic(&target, b"theirs", 0o644).expect("replaced"));
        assert!(std::fs::symlink_metadata(&target).expect("meta").is_file());
        assert_eq!(std::fs::read(&foreign).expect("read"), b"theirs");
    }

    #[test]
    fn a_directory_that_cannot_be_made_is_named_with_its_flag() {
        let dir = tempfile::tempdir().expect("dir");
        std::fs::write(dir.path().join("net.d"), "a file").expect("written");
        let error = conflist(&config(dir.path())).expect_err("a file is no directory").to_string();
        assert!(error.contains("--cni-conf-dir"), "{error}");
    }

    #[test]
    fn without_directories_nothing_is_installed() {
        let config = Config::load(["rustnet-agent", "--node-name=n1", "--manifests=/m"], &|_| None).expect("good");
        assert!(binary(&config).expect("nothing").is_empty());
        assert_eq!(conflist(&config).expect("nothing"), None);
    }
}
