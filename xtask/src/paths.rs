//! Where things are: the work tree, its target directory, and the user's cache that survives a fresh clone.

use std::path::{Path, PathBuf};

/// The root of the work tree.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// The target directory of the host's builds.
pub fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) if !dir.is_empty() => root().join(dir),
        _ => root().join("target"),
    }
}

/// The finished kernel-side object.
pub fn object() -> PathBuf {
    target().join("bpf").join("rustnet.bpf.o")
}

/// `~/.cache/rustnet`, or below `XDG_CACHE_HOME` when that is set to an absolute path.
pub fn cache() -> PathBuf {
    cache_from(std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from), std::env::var_os("HOME").map(PathBuf::from))
}

fn cache_from(xdg: Option<PathBuf>, home: Option<PathBuf>) -> PathBuf {
    // The XDG base directory specification: a relative path is invalid and to be ignored.
    xdg.filter(|d| d.is_absolute())
        .or_else(|| home.map(|h| h.join(".cache")))
        .unwrap_or_else(std::env::temp_dir)
        .join("rustnet")
}

/// The AppArmor profile of containers, as `setup` renders it.
pub fn apparmor_profile() -> PathBuf {
    tools().join("cri-containerd.apparmor.d")
}

/// The program that network policies are compared with.
pub fn policy_oracle() -> PathBuf {
    tools().join("policy-oracle")
}

/// The program of the conformance tests of the network policy API.
pub fn policy_tests() -> PathBuf {
    tools().join("network-policy-api.test")
}

/// The manifest of ClusterNetworkPolicy, with the fields that are experiments.
pub fn policy_crd() -> PathBuf {
    tools().join("clusternetworkpolicies.yaml")
}

/// The program that runs the test cases of cyclonus.
pub fn cyclonus() -> PathBuf {
    tools().join("cyclonus-cases")
}

/// Go's reader of what its test programs print.
pub fn test2json() -> PathBuf {
    tools().join("test2json")
}

/// Where small tools that setup installs are found by a fixed name (cnitool).
pub fn tools() -> PathBuf {
    cache().join("bin")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_honours_xdg() {
        let home = Some(PathBuf::from("/home/a"));
        assert_eq!(cache_from(Some("/c".into()), home.clone()), Path::new("/c/rustnet"));
        assert_eq!(cache_from(Some("relative".into()), home.clone()), Path::new("/home/a/.cache/rustnet"));
        assert_eq!(cache_from(None, home), Path::new("/home/a/.cache/rustnet"));
    }

    #[test]
    fn the_root_holds_the_workspace() {
        assert!(root().join("Cargo.toml").is_file() && root().join("xtask").is_dir());
    }
}
