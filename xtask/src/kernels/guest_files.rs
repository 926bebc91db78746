//! The guest's first file system: xtask as its first process, the test programs, what they call, and the libraries of all.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::cpio::Archive;
use super::step::{OBJECT, POLICY_ORACLE, Step};
use super::tests::Tests;
use crate::cmd::{Cmd, which};
use crate::dist::{self, Profile};
use crate::{libraries, paths, ui};

/// Where commands are looked up in the guest.
pub const PATH: &str = "/bin";
/// What is to be run, as JSON.
pub const STEPS: &str = "/steps";
/// AppArmor's policy, compiled.
pub const POLICY: &str = "/apparmor";
/// Modules, in the order of their names.
pub const MODULES: &str = "/modules";

/// What tests call.
const COMMANDS: [&str; 6] = ["bpftool", "ip", "tc", "sleep", "ping", "nsenter"];

/// Writes the archive of everything but modules.
pub fn write(file: &Path, tests: &Tests, steps: &[Step], policy: &[u8]) -> Result<()> {
    let mut files = Files { archive: Archive::default(), work: file.with_extension("stripped") };
    fs::create_dir_all(&files.work).with_context(|| format!("making {}", files.work.display()))?;
    // By way of the process: cargo may have replaced the file since it was started.
    files.program("/init", Path::new(&format!("/proc/{}/exe", std::process::id())))?;
    for name in COMMANDS {
        let path = which(name).with_context(|| format!("{name} is missing\n  remedy: cargo xtask setup"))?;
        files.program(&format!("/bin/{name}"), &path)?;
    }
    for test in &tests.programs {
        files.program(&test.in_guest(), &test.path)?;
    }
    for program in dist::PROGRAMS {
        files.program(&format!("/dist/{program}"), &Profile::Dev.dist().join(program))?;
    }
    files.program(POLICY_ORACLE, &paths::policy_oracle())?;
    // A test has the path in itself where cargo left it.
    let command = Profile::Dev.built().join("rustnetctl");
    files.archive.link(&command.to_string_lossy(), "/dist/rustnetctl");
    let object = paths::object();
    files.archive.file(OBJECT, &fs::read(&object).with_context(|| format!("reading {}", object.display()))?, 0o644);
    files.archive.file(POLICY, policy, 0o644);
    files.archive.file(STEPS, &serde_json::to_vec(steps)?, 0o644);
    for dir in ["/mnt", "/root", "/etc", "/run", "/tmp", MODULES] {
        files.archive.dir(dir);
    }
    let bytes = files.archive.finish();
    ui::detail(&format!("the guest's files: {} MB", bytes.len() / 1_000_000));
    fs::write(file, bytes).with_context(|| format!("writing {}", file.display()))
}

struct Files {
    archive: Archive,
    work: PathBuf,
}

impl Files {
    /// A program without its debug information, and its libraries where it looks for them.
    fn program(&mut self, path: &str, from: &Path) -> Result<()> {
        if self.archive.has(path) {
            return Ok(());
        }
        let stripped = self.work.join(path.trim_start_matches('/').replace('/', "-"));
        Cmd::new("strip").args(["--strip-debug", "-o"]).args([&stripped, &from.to_owned()]).capture()?;
        self.copy(path, &stripped)?;
        for library in libraries::native(&stripped)? {
            self.copy(&library.place.to_string_lossy(), &library.file)?;
        }
        Ok(())
    }

    fn copy(&mut self, path: &str, from: &Path) -> Result<()> {
        let content = fs::read(from).with_context(|| format!("reading {}", from.display()))?;
        self.archive.file(path, &content, 0o755);
        Ok(())
    }
}
