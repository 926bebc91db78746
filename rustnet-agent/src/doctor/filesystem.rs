//! Whether this process may pin and unpin where the agent pins. Capabilities do not decide that alone: AppArmor and SELinux
//! confine containers, and the default profiles of runtimes refuse every write below /sys.

use std::io::{Error, ErrorKind};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use super::finding::{Finding, Level};
use crate::bpf::sys::{self, Layout};
use crate::bpf::{fs, probe};
use crate::config::Config;

/// Name of the check.
const WHAT: &str = "pins";
/// A map of one element, of no use but to be pinned.
const PROBE: Layout = Layout { kind: 2, key_size: 4, value_size: 4, max_entries: 1, flags: 0 };

/// What was found.
pub struct Facts {
    /// Where it was tried: the directory of the pins, or the nearest that is there.
    pub dir: PathBuf,
    /// What failed, if anything did.
    pub tried: Result<(), Failure>,
    /// What confines this process, as the kernel names it.
    pub profile: Option<String>,
}

/// The step that failed.
pub struct Failure {
    /// In words.
    pub step: &'static str,
    /// Why.
    pub error: Error,
}

/// Looks; `None` without the rights to make a map, or without a BPF file system: other checks name these.
pub fn gather(config: &Config) -> Option<Facts> {
    let dir = fs::nearest_existing(&config.bpffs);
    let has_rights = probe::effective_capabilities().is_ok_and(|it| probe::missing_capabilities(it).is_empty());
    if !has_rights || !fs::is_bpffs(&dir).is_ok_and(|is| is) {
        return None;
    }
    Some(Facts { tried: pin_and_unpin(&dir), profile: profile(), dir })
}

fn pin_and_unpin(dir: &Path) -> Result<(), Failure> {
    let at = |step| move |error| Failure { step, error };
    let map = sys::map_create("rn_probe", PROBE).map_err(at("making a map"))?;
    let path = dir.join(format!("rn_probe_{}", std::process::id()));
    sys::obj_pin(&path, map.as_fd()).map_err(at("pinning a map"))?;
    std::fs::remove_file(&path).map_err(at("removing a pin"))
}

/// AppArmor's profile or SELinux's context; nothing where neither is on, or the process is free.
fn profile() -> Option<String> {
    let read = |file| std::fs::read_to_string(format!("/proc/self/attr/{file}")).ok();
    let text = read("apparmor/current").or_else(|| read("current"))?;
    let text = text.trim_end_matches(['\0', '\n']).to_owned();
    (!text.is_empty() && text != "unconfined").then_some(text)
}

/// Judges.
pub fn check(facts: &Facts) -> Vec<Finding> {
    let shown = facts.dir.display();
    let Err(failure) = &facts.tried else {
        return vec![Finding::ok(WHAT, format!("a map can be pinned in {shown} and removed"))];
    };
    let confined = facts.profile.as_ref().map(|profile| format!(" (confined by {profile})")).unwrap_or_default();
    let detail = format!("{} in {shown}: {}{confined}", failure.step, failure.error);
    let hint = match failure.error.kind() {
        ErrorKind::PermissionDenied => {
            "AppArmor or SELinux forbids it: give the container appArmorProfile Unconfined and the SELinux type spc_t, as in \
             deploy/daemonset.yaml"
        }
        ErrorKind::ReadOnlyFilesystem => "mount it writable: `mount -o remount,rw /sys/fs/bpf` on the host",
        _ => "see the host's kernel log (dmesg) for the reason",
    };
    vec![Finding::new(Level::Fatal, WHAT, detail).hint(hint)]
}

#[cfg(test)]
mod tests {
    use super::{Error, Facts, Failure, check};
    use crate::doctor::finding::{Level, assert_only, assert_well};

    fn facts(errno: i32, profile: Option<&str>) -> Facts {
        let failure = Failure { step: "pinning a map", error: Error::from_raw_os_error(errno) };
        Facts { dir: "/sys/fs/bpf".into(), tried: Err(failure), profile: profile.map(str::to_owned) }
    }

    #[test]
    fn a_refusal_names_what_confines_and_the_remedy() {
        let refused = facts(libc::EACCES, Some("cri-containerd.apparmor.d (enforce)"));
        assert_only(&check(&refused), Level::Fatal, "confined by cri-containerd.apparmor.d", "AppArmor or SELinux");
        assert_only(&check(&facts(libc::EPERM, None)), Level::Fatal, "in /sys/fs/bpf: ", "spc_t");
        assert_only(&check(&facts(libc::EROFS, None)), Level::Fatal, "Read-only", "remount,rw");
        assert_well(&check(&Facts { tried: Ok(()), ..facts(0, None) }));
    }
}
