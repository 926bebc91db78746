//! Running other programs: one builder, three ways to run it, and errors that name the command and a remedy.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use anyhow::{Context, Result, anyhow, bail};

use crate::ui;

/// How many lines of a failed command's output are shown.
const TAIL: usize = 40;

/// A program to run, with its arguments and environment.
#[derive(Clone, Debug)]
pub struct Cmd {
    program: OsString,
    args: Vec<OsString>,
    set: Vec<(OsString, OsString)>,
    unset: Vec<OsString>,
    dir: Option<PathBuf>,
    stdin: Option<PathBuf>,
    remedy: Option<String>,
}

impl Cmd {
    /// A command, looked up in PATH unless it holds a slash.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self {
            program: program.as_ref().to_owned(),
            args: Vec::new(),
            set: Vec::new(),
            unset: Vec::new(),
            dir: None,
            stdin: None,
            remedy: None,
        }
    }

    /// The stable cargo that the developer uses, in an environment free of what the cargo that runs xtask has set.
    pub fn cargo() -> Self {
        Self::new("cargo").clean_cargo_env()
    }

    /// Appends one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Appends arguments.
    #[must_use]
    pub fn args<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(mut self, args: I) -> Self {
        self.args.extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// Sets a variable.
    #[must_use]
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.set.push((key.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Removes a variable.
    #[must_use]
    pub fn env_remove(mut self, key: impl AsRef<OsStr>) -> Self {
        self.unset.push(key.as_ref().to_owned());
        self
    }

    /// The directory to run in.
    #[must_use]
    pub fn dir(mut self, dir: impl AsRef<Path>) -> Self {
        self.dir = Some(dir.as_ref().to_owned());
        self
    }

    /// A file as standard input of [`Cmd::capture`], which otherwise has none.
    #[must_use]
    pub fn stdin(mut self, file: impl AsRef<Path>) -> Self {
        self.stdin = Some(file.as_ref().to_owned());
        self
    }

    /// What a person can do when the command fails; part of the error.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }

    /// Puts directories before those in PATH.
    #[must_use]
    pub fn path_first(self, dirs: &[PathBuf]) -> Self {
        let old = std::env::var_os("PATH").unwrap_or_default();
        let all = dirs.iter().cloned().chain(std::env::split_paths(&old));
        match std::env::join_paths(all) {
            Ok(path) => self.env("PATH", path),
            Err(_) => self, // a directory with a colon in its name: PATH stays as it is
        }
    }

    /// Removes what `cargo run` and rustup put into the environment of xtask: another toolchain's cargo must not see it.
    #[must_use]
    pub fn clean_cargo_env(mut self) -> Self {
        for (key, _) in std::env::vars_os() {
            let name = key.to_string_lossy();
            let ours = name.starts_with("CARGO_PKG_")
                || name.starts_with("CARGO_MANIFEST_")
                || name.starts_with("CARGO_BIN_")
                || matches!(&*name, "CARGO" | "CARGO_PRIMARY_PACKAGE" | "CARGO_CRATE_NAME" | "RUST_RECURSION_COUNT");
            if ours {
                self.unset.push(key);
            }
        }
        if let Some(old) = std::env::var_os("LD_LIBRARY_PATH") {
            let kept: Vec<PathBuf> = std::env::split_paths(&old).filter(|p| !is_cargo_library_dir(p)).collect();
            match std::env::join_paths(&kept) {
                Ok(path) if !kept.is_empty() => self = self.env("LD_LIBRARY_PATH", path),
                _ => self.unset.push("LD_LIBRARY_PATH".into()),
            }
        }
        self
    }

    /// Runs with the terminal's own input and output; an error when it does not succeed.
    pub fn run(&self) -> Result<()> {
        let status = self.status()?;
        if status.success() { Ok(()) } else { Err(self.failed(status, "")) }
    }

    /// Runs with the terminal's own input and output and returns the status.
    pub fn status(&self) -> Result<ExitStatus> {
        self.command().status().map_err(|e| self.not_started(&e))
    }

    /// Runs with standard output and standard error in one pipe, hands its end to `read`, and returns the status.
    pub fn status_with(&self, read: impl FnOnce(std::io::PipeReader) -> Result<()>) -> Result<ExitStatus> {
        let (output, into) = std::io::pipe().context("making a pipe")?;
        let errors = into.try_clone().context("making a pipe")?;
        let mut command = self.command();
        let mut child = command.stdout(into).stderr(errors).spawn().map_err(|e| self.not_started(&e))?;
        // The command holds the writing ends: without them gone, the output would never end.
        drop(command);
        let copied = read(output);
        let status = child.wait().with_context(|| format!("waiting for {self}"))?;
        copied.map(|()| status)
    }

    /// Runs silently and returns standard output; an error, with standard error in it, when it does not succeed.
    pub fn capture(&self) -> Result<String> {
        let stdin = match &self.stdin {
            Some(file) => std::fs::File::open(file).with_context(|| format!("opening {}", file.display()))?.into(),
            None => Stdio::null(),
        };
        let out = self.command().stdin(stdin).output().map_err(|e| self.not_started(&e))?;
        if !out.status.success() {
            return Err(self.failed(out.status, &String::from_utf8_lossy(&out.stderr)));
        }
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    /// Runs silently and tells whether it succeeded; false when it could not be started.
    pub fn succeeds(&self) -> bool {
        self.command()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|s| s.success())
    }

    /// Runs a long command behind one progress line; what it printed is shown only when it fails.
    pub fn run_behind(&self, title: &str) -> Result<()> {
        let progress = ui::Progress::start(title);
        let mut child = self
            .command()
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| self.not_started(&e))?;
        let tail = Arc::new(Mutex::new(Vec::new()));
        let readers = [
            child.stdout.take().map(|s| follow(s, &progress, &tail)),
            child.stderr.take().map(|s| follow(s, &progress, &tail)),
        ];
        let status = child.wait().with_context(|| format!("waiting for {self}"))?;
        for reader in readers.into_iter().flatten() {
            // A reader that panicked has only lost lines of the tail.
            let _ = reader.join();
        }
        if status.success() {
            progress.done();
            return Ok(());
        }
        progress.failed();
        let tail = tail.lock().map(|t| t.join("\n")).unwrap_or_default();
        Err(self.failed(status, &tail))
    }

    /// Replaces this process; returns only the error.
    pub fn exec(&self) -> anyhow::Error {
        use std::os::unix::process::CommandExt;
        let error = self.command().exec();
        self.not_started(&error)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.args);
        for key in &self.unset {
            command.env_remove(key);
        }
        for (key, value) in &self.set {
            command.env(key, value);
        }
        if let Some(dir) = &self.dir {
            command.current_dir(dir);
        }
        command
    }

    fn not_started(&self, error: &std::io::Error) -> anyhow::Error {
        self.with_remedy(format!("cannot run {}: {error}", self.program.to_string_lossy()))
    }

    fn failed(&self, status: ExitStatus, output: &str) -> anyhow::Error {
        let mut text = format!("{self}: {status}");
        let output = output.trim_end();
        if !output.is_empty() {
            text.push('\n');
            text.push_str(output);
        }
        self.with_remedy(text)
    }

    fn with_remedy(&self, text: String) -> anyhow::Error {
        match &self.remedy {
            Some(remedy) => anyhow!("{text}\n  remedy: {remedy}"),
            None => anyhow!(text),
        }
    }
}

impl fmt::Display for Cmd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.program.to_string_lossy())?;
        for arg in &self.args {
            let arg = arg.to_string_lossy();
            if arg.is_empty() || arg.contains([' ', '\'', '"', '$']) {
                write!(f, " '{arg}'")?;
            } else {
                write!(f, " {arg}")?;
            }
        }
        Ok(())
    }
}

/// Where a command is: in PATH, or in the system directories that an ordinary user's PATH lacks.
pub fn which(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| is_executable(file))
}

/// Whether a file is there and may be executed by somebody.
pub fn is_executable(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    file.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// An error unless the process runs as root; `what` names the command that needs it.
pub fn need_root(what: &str) -> Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    bail!(
        "{what} needs root: it makes network namespaces and loads eBPF programs\n  remedy: sudo -E env PATH=\"$PATH\" cargo xtask {what}"
    )
}

fn is_cargo_library_dir(dir: &Path) -> bool {
    dir.starts_with(crate::paths::target()) || dir.components().any(|c| c.as_os_str() == ".rustup")
}

fn follow(
    stream: impl Read + Send + 'static,
    progress: &ui::Progress,
    tail: &Arc<Mutex<Vec<String>>>,
) -> thread::JoinHandle<()> {
    let progress = progress.clone();
    let tail = Arc::clone(tail);
    thread::spawn(move || {
        for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            progress.line(&line);
            if let Ok(mut tail) = tail.lock() {
                if tail.len() == TAIL {
                    tail.remove(0);
                }
                tail.push(line);
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_command_status_output_and_remedy() {
        let error = Cmd::new("sh").args(["-c", "echo broken >&2; exit 3"]).remedy("fix it").capture().unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains("sh -c 'echo broken >&2; exit 3'"), "{text}");
        assert!(
            text.contains("exit status: 3") && text.contains("\nbroken") && text.contains("remedy: fix it"),
            "{text}"
        );
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = Cmd::new("no-such-program-here").capture().unwrap_err();
        assert!(error.to_string().contains("cannot run no-such-program-here"), "{error}");
        assert!(!Cmd::new("no-such-program-here").succeeds());
    }

    #[test]
    fn environment_is_set_and_unset() {
        let out = Cmd::new("sh").args(["-c", "echo $A-${HOME-none}"]).env("A", "1").env_remove("HOME").capture();
        assert_eq!(out.unwrap().trim(), "1-none");
    }

    #[test]
    fn output_of_a_quiet_command_is_in_the_error() {
        let error = Cmd::new("sh").args(["-c", "seq 1 100; exit 1"]).run_behind("counting").unwrap_err().to_string();
        assert!(error.contains("\n100") && error.contains("\n61") && !error.contains("\n60\n"), "{error}");
    }
}
