//! Packages of Debian, by an apt with settings of its own, so that nothing is installed and this machine's apt keeps its lists.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::cmd::Cmd;
use crate::ui;

/// Debian's keys, as its own package has them.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Names another mirror.
const MIRROR: &str = "RUSTNET_DEBIAN_MIRROR";

/// An apt that knows one suite and no installed package.
pub struct Apt {
    dir: PathBuf,
}

impl Apt {
    /// One with its files in a directory.
    pub fn new(dir: &Path, suite: &str) -> Result<Self> {
        let apt = Self { dir: dir.to_owned() };
        for below in ["lists/partial", "cache/archives/partial", "sources", "packages"] {
            fs::create_dir_all(dir.join(below)).with_context(|| format!("making {}", dir.join(below).display()))?;
        }
        let mirror = mirror()?;
        if !Path::new(KEYRING).is_file() {
            bail!(
                "{KEYRING} is missing, so that Debian's packages cannot be checked\n  remedy: apt-get install debian-archive-keyring"
            );
        }
        let source = format!("Types: deb\nURIs: {mirror}\nSuites: {suite}\nComponents: main\nSigned-By: {KEYRING}\n");
        let write = |name: &str, text: &str| {
            fs::write(dir.join(name), text).with_context(|| format!("writing {}", dir.join(name).display()))
        };
        write("sources/debian.sources", &source)?;
        write("status", "")?;
        apt.run("apt-get")
            .arg("update")
            .remedy("is the mirror reachable? $RUSTNET_DEBIAN_MIRROR names another")
            .capture()?;
        Ok(apt)
    }

    /// A program of apt with this directory instead of the machine's; proxies and the like stay as they are set here.
    pub fn run(&self, program: &str) -> Cmd {
        let option = |name: &str, value: &Path| ["-o".to_owned(), format!("{name}={}", value.display())];
        Cmd::new(program)
            .args(option("Dir::Etc::SourceList", Path::new("/dev/null")))
            .args(option("Dir::Etc::SourceParts", &self.dir.join("sources")))
            .args(option("Dir::State", &self.dir))
            .args(option("Dir::State::Lists", &self.dir.join("lists")))
            .args(option("Dir::State::Status", &self.dir.join("status")))
            .args(option("Dir::Cache", &self.dir.join("cache")))
            .args(["-o", "APT::Architecture=amd64", "-o", "Acquire::Languages=none"])
            .args(["-o", "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false"])
            // As root apt would download as another user, who may not write here.
            .args(["-o", "APT::Sandbox::User=root"])
            .env("LC_ALL", "C")
    }

    /// Downloads packages, checked by apt, and returns their files.
    pub fn download(&self, names: &[String], suite: &str) -> Result<Vec<PathBuf>> {
        let uris = self.run("apt-get").args(["download", "--print-uris"]).args(names).capture()?;
        let size: u64 = uris.lines().filter_map(|l| l.split_whitespace().nth(2)?.parse::<u64>().ok()).sum();
        let title = format!("downloading {} from Debian's {suite} ({} MB)", names.join(", "), size / 1_000_000);
        self.run("apt-get").arg("download").args(names).dir(self.dir.join("packages")).run_behind(&title)?;
        let entries = fs::read_dir(self.dir.join("packages")).context("reading the downloaded packages")?;
        let mut files: Vec<PathBuf> = entries.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>()?;
        files.sort();
        Ok(files)
    }
}

/// The mirror that this machine's own apt uses for Debian.
fn mirror() -> Result<String> {
    if let Some(mirror) = std::env::var(MIRROR).ok().filter(|m| !m.is_empty()) {
        return Ok(mirror);
    }
    let format = "$(ORIGIN) $(LABEL) $(REPO_URI)";
    let listed = Cmd::new("apt-get").args(["indextargets", "--format", format, "Created-By: Packages"]).capture()?;
    let found = debian(&listed);
    if found.is_none() {
        ui::detail("apt knows no Debian archive, or its lists were never fetched");
    }
    found.with_context(|| {
        format!("no mirror of Debian\n  remedy: apt-get update, or on another distribution {MIRROR}=URL")
    })
}

fn debian(targets: &str) -> Option<String> {
    targets.lines().find_map(|line| line.strip_prefix("Debian Debian ")).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::debian;

    #[test]
    fn the_mirror_is_that_of_debian_itself() {
        let targets = "Other Other https://o.example/\nDebian Debian-Security http://m.example/debian-security/\n\
                       Debian Debian http://m.example/debian/\n";
        assert_eq!(debian(targets).as_deref(), Some("http://m.example/debian/"));
        assert_eq!(debian("Ubuntu Ubuntu http://u.example/"), None);
    }
}
