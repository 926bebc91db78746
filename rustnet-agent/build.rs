//! Puts the eBPF object where `bpf::object` embeds it from: `$RUSTNET_BPF_OBJECT`, else `target/bpf/rustnet.bpf.o`, else
//! an empty file, so that checks and lints work on machines that cannot build for the kernel.

use std::path::PathBuf;
use std::{env, fs};

fn main() {
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("rustnet.bpf.o");
    let given = env::var_os("RUSTNET_BPF_OBJECT").map(PathBuf::from);
    let built = manifest.join("../target/bpf/rustnet.bpf.o");
    println!("cargo::rerun-if-env-changed=RUSTNET_BPF_OBJECT");
    // A path that does not exist counts as changed each time, so that the object is found once it is built.
    let source = given.clone().unwrap_or(built);
    println!("cargo::rerun-if-changed={}", source.display());
    match fs::read(&source) {
        Ok(object) => fs::write(&out, object).expect("writing to OUT_DIR"),
        Err(e) if given.is_some() => panic!("RUSTNET_BPF_OBJECT={}: {e}", source.display()),
        Err(_) => fs::write(&out, []).expect("writing to OUT_DIR"),
    }
}
