//! Which Debian packages the libraries in an image are from.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::cmd::Cmd;

/// One package.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version, with the epoch.
    pub version: String,
    /// The architecture that it is for.
    pub architecture: String,
    /// The distribution, such as `debian-12`.
    pub distribution: String,
}

impl Package {
    /// Its package URL.
    pub fn purl(&self) -> String {
        let Self { name, version, architecture, distribution } = self;
        let vendor = distribution.split('-').next().unwrap_or_default();
        let version = version.replace('+', "%2B").replace(':', "%3A");
        format!("pkg:deb/{vendor}/{name}@{version}?arch={architecture}&distro={distribution}")
    }
}

/// The packages that files are from, each once. A machine without dpkg has none.
pub fn packages(files: &[PathBuf]) -> Vec<Package> {
    let distribution = distribution(&fs::read_to_string("/etc/os-release").unwrap_or_default());
    let found = files.iter().filter_map(|file| package(file, &distribution));
    found.collect::<BTreeSet<_>>().into_iter().collect()
}

fn package(file: &Path, distribution: &str) -> Option<Package> {
    let query = |arg: &Path| Cmd::new("dpkg-query").arg("--search").arg(arg).env("LC_ALL", "C").capture().ok();
    // A package may have its files below /lib or below /usr/lib, which are one directory.
    let merged = Path::new("/usr").join(file.strip_prefix("/").ok()?);
    let found = query(file).or_else(|| query(&merged)).or_else(|| query(&file.canonicalize().ok()?))?;
    let owner = owner(&found)?;
    let show =
        Cmd::new("dpkg-query").args(["--show", "--showformat", "${Package}\t${Version}\t${Architecture}", &owner]);
    let shown = show.capture().ok()?;
    let mut words = shown.split('\t').map(str::to_owned);
    let (name, version, architecture) = (words.next()?, words.next()?, words.next()?);
    Some(Package { name, version, architecture, distribution: distribution.to_owned() })
}

/// The package in `libc6:amd64: /lib/x86_64-linux-gnu/libc.so.6`.
fn owner(found: &str) -> Option<String> {
    let line = found.lines().find(|line| !line.starts_with("diversion "))?;
    Some(line.split_once(": ")?.0.to_owned())
}

fn distribution(os_release: &str) -> String {
    let value = |key: &str| {
        let line = os_release.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        line.map_or_else(|| "unknown".to_owned(), |value| value.trim_matches('"').to_owned())
    };
    format!("{}-{}", value("ID"), value("VERSION_ID"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_and_distributions_are_read() {
        assert_eq!(owner("libc6:amd64: /lib/x86_64-linux-gnu/libc.so.6\n").unwrap(), "libc6:amd64");
        let diverted = "diversion by x from: /lib/a\nlibc6-arm64-cross: /usr/aarch64-linux-gnu/lib/libc.so.6\n";
        assert_eq!(owner(diverted).unwrap(), "libc6-arm64-cross");
        assert_eq!(distribution("NAME=\"Debian\"\nVERSION_ID=\"12\"\nID=debian\n"), "debian-12");
    }

    #[test]
    fn a_package_url_has_architecture_and_distribution() {
        let package = Package {
            name: "libc6".into(),
            version: "2.36-9+deb12u14".into(),
            architecture: "amd64".into(),
            distribution: "debian-12".into(),
        };
        assert_eq!(package.purl(), "pkg:deb/debian/libc6@2.36-9%2Bdeb12u14?arch=amd64&distro=debian-12");
    }
}
