//! Where kernels come from: Debian's packages. What is kept of a kernel are its image and the modules that rustnet asks for, in
//! the user's cache.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::apt::Apt;
use super::cpio::Archive;
use crate::cmd::Cmd;
use crate::{cache, paths};

/// A kernel of Debian.
#[derive(Debug, PartialEq, Eq)]
pub struct Line {
    /// What `--kernel` calls it.
    pub name: &'static str,
    /// The suite of the archive that has it.
    pub suite: &'static str,
    /// Why it is looked at.
    pub why: &'static str,
}

/// All that are tried, oldest first.
pub const LINES: [Line; 3] = [
    Line { name: "6.1", suite: "bookworm", why: "Debian 12; no TCX (6.6), so filters on a clsact qdisc" },
    Line { name: "6.12", suite: "bookworm-backports", why: "long-term; Debian 13" },
    Line { name: "newest", suite: "sid", why: "the newest that Debian has" },
];

/// The package that depends on a suite's present kernel. The kind for virtual machines is the smallest.
const PACKAGE: &str = "linux-image-cloud-amd64";
/// What is a module in Debian's kernels, and not in every developer's.
const MODULES: [&str; 11] =
    ["veth", "vxlan", "bridge", "bonding", "sch_ingress", "cls_bpf", "8021q", "sctp", "tun", "tcp_diag", "udp_diag"];
/// The file in the cache that holds release and version; written last.
const NAMES: &str = "release";

/// A kernel in the cache.
pub struct Kernel {
    /// Which one it is.
    pub line: &'static Line,
    /// As `uname -r` says it.
    pub release: String,
    /// The package's version.
    pub version: String,
    /// What is booted.
    pub image: PathBuf,
    /// An archive with `/modules`, whose names sort in the order in which they are to be loaded.
    pub modules: PathBuf,
}

impl Line {
    /// The kernel, downloaded if it is not in the cache, or in any case with `refresh`.
    pub fn fetch(&'static self, refresh: bool) -> Result<Kernel> {
        let dir = self.dir();
        if let (false, Some(kernel)) = (refresh, self.cached(&dir)) {
            return Ok(kernel);
        }
        // Next to the cache, and thrown away: packages are ten times as large as what is used of
        // them.
        let work = paths::target().join("kernels").join(self.name).join("download");
        let _ = fs::remove_dir_all(&work); // of a run that was killed
        let apt = Apt::new(&work, self.suite)?;
        let packages = apt.download(&self.packages(&apt)?, self.suite)?;
        let root = work.join("root");
        for package in &packages {
            Cmd::new("dpkg-deb").arg("-x").args([package, &root]).capture()?;
        }
        self.keep(&root, &version_of(&packages)?, &dir)?;
        fs::remove_dir_all(&work).with_context(|| format!("removing {}", work.display()))?;
        self.cached(&dir).with_context(|| format!("{} does not hold what was just put there", dir.display()))
    }

    /// The release of the kernel in the cache; quick, for it compares no checksum of large files.
    pub fn release(&self) -> Option<String> {
        let names = fs::read_to_string(self.dir().join(NAMES)).ok()?;
        names.split_whitespace().next().map(str::to_owned)
    }

    fn dir(&self) -> PathBuf {
        let mut key = cache::Key::default();
        for module in MODULES {
            key.text("module", module);
        }
        paths::cache().join("kernels").join(format!("{}-{}", self.name, key.finish()))
    }

    fn cached(&'static self, dir: &Path) -> Option<Kernel> {
        let [names, image, modules] = [NAMES, "vmlinuz", "modules.cpio"].map(|name| dir.join(name));
        if ![&names, &image, &modules].into_iter().all(|file| cache::holds(file)) {
            return None;
        }
        let names = fs::read_to_string(names).ok()?;
        let (release, version) = names.trim().split_once(' ')?;
        Some(Kernel { line: self, release: release.into(), version: version.into(), image, modules })
    }

    /// The packages with the present kernel of the suite.
    fn packages(&self, apt: &Apt) -> Result<Vec<String>> {
        let depends = apt.run("apt-cache").args(["depends", "--recurse", "--no-recommends", "--no-suggests", PACKAGE]);
        let names = kernel_packages(&depends.capture()?);
        if names.is_empty() {
            bail!("{PACKAGE} of {} depends on no kernel", self.suite);
        }
        Ok(names)
    }

    /// Takes out of unpacked packages what is used.
    fn keep(&self, root: &Path, version: &str, dir: &Path) -> Result<()> {
        let library = if root.join("lib/modules").is_dir() { root.join("lib") } else { root.join("usr/lib") };
        if library != root.join("lib") {
            // depmod and modprobe look there alone.
            std::os::unix::fs::symlink("usr/lib", root.join("lib")).context("linking lib to usr/lib")?;
        }
        let release = only_entry(&library.join("modules"))?;
        let image = [root.join(format!("boot/vmlinuz-{release}")), library.join(format!("modules/{release}/vmlinuz"))];
        let image = image.iter().find(|file| file.is_file());
        let image = image.with_context(|| format!("the packages of {} hold no kernel image", self.name))?;
        let archive = root.join("modules.cpio");
        fs::write(&archive, modules(root, &release)?).with_context(|| format!("writing {}", archive.display()))?;
        let names = root.join("release");
        fs::write(&names, format!("{release} {version}\n")).with_context(|| format!("writing {}", names.display()))?;
        cache::store(image, &dir.join("vmlinuz"))?;
        cache::store(&archive, &dir.join("modules.cpio"))?;
        cache::store(&names, &dir.join(NAMES))
    }
}

/// An archive of the modules and those they need, uncompressed.
fn modules(root: &Path, release: &str) -> Result<Vec<u8>> {
    Cmd::new("depmod").arg("-b").arg(root).arg(release).capture()?;
    let mut archive = Archive::default();
    let mut found: Vec<PathBuf> = Vec::new();
    for module in MODULES {
        let modprobe = Cmd::new("modprobe").arg("-d").arg(root).args(["-S", release, "--show-depends", module]);
        found.extend(modprobe.capture()?.lines().filter_map(insmod));
    }
    let mut seen = std::collections::BTreeSet::new();
    found.retain(|file| seen.insert(file.clone()));
    for (number, file) in found.iter().enumerate() {
        let plain = if file.extension().is_some_and(|e| e == "xz") {
            Cmd::new("xz").args(["--decompress", "--force"]).arg(file).capture()?;
            file.with_extension("")
        } else {
            file.clone()
        };
        let name = plain.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let content = fs::read(&plain).with_context(|| format!("reading {}", plain.display()))?;
        archive.file(&format!("/modules/{number:02}-{name}"), &content, 0o644);
    }
    Ok(archive.finish())
}

/// The file in a line of `modprobe --show-depends`; none for what is built in.
fn insmod(line: &str) -> Option<PathBuf> {
    line.strip_prefix("insmod ").map(|rest| rest.split_whitespace().next().unwrap_or_default().into())
}

fn only_entry(dir: &Path) -> Result<String> {
    let entries = fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))?;
    let names: Vec<String> =
        entries.map(|e| e.map(|e| e.file_name().to_string_lossy().into_owned())).collect::<Result<_, _>>()?;
    match &names[..] {
        [name] => Ok(name.clone()),
        _ => bail!("{} should hold one kernel: {names:?}", dir.display()),
    }
}

/// The version in the name of a package's file, `NAME_VERSION_ARCH.deb`; apt writes a colon as `%3a`.
fn version_of(packages: &[PathBuf]) -> Result<String> {
    let name = packages.first().and_then(|file| file.file_name()).unwrap_or_default().to_string_lossy().into_owned();
    let version = name.split('_').nth(1).with_context(|| format!("no version in the file name {name:?}"))?;
    Ok(version.replace("%3a", ":"))
}

/// The packages that hold a kernel or its modules, of those that `apt-cache depends --recurse` lists.
fn kernel_packages(depends: &str) -> Vec<String> {
    let is_kernel = |name: &&str| {
        ["linux-image-", "linux-binary-", "linux-modules-"]
            .iter()
            .any(|prefix| name.strip_prefix(prefix).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit())))
            && !name.ends_with("-unsigned") // the alternative without signature
    };
    depends.lines().filter(is_kernel).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_packages_with_a_kernel_are_downloaded() {
        let depends = "linux-image-cloud-amd64\n  Depends: linux-image-7.2.13+deb14-cloud-amd64\nkmod\n\
                       linux-image-7.2.13+deb14-cloud-amd64\nlinux-modules-7.2.13+deb14-cloud-amd64\n<linux-image-9>\n\
                       linux-image-6.1.0-50-cloud-amd64-unsigned\n";
        assert_eq!(
            kernel_packages(depends),
            ["linux-image-7.2.13+deb14-cloud-amd64", "linux-modules-7.2.13+deb14-cloud-amd64"]
        );
    }

    #[test]
    fn modules_are_read_from_modprobe() {
        assert_eq!(
            insmod("insmod /x/lib/modules/1/udp_tunnel.ko.xz  a=1"),
            Some("/x/lib/modules/1/udp_tunnel.ko.xz".into())
        );
        assert_eq!(insmod("builtin ipv6"), None);
    }

    #[test]
    fn the_version_is_in_the_file_name() {
        let file = PathBuf::from("/p/linux-image-6.12.95+deb12-cloud-amd64_6.12.95-1~bpo12+1_amd64.deb");
        assert_eq!(version_of(&[file]).unwrap(), "6.12.95-1~bpo12+1");
        assert!(version_of(&[]).is_err());
    }
}
