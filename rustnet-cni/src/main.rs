//! The CNI binary: connects a pod to the node's network in a few milliseconds and leaves. No runtime, no threads, no
//! dependency on a living agent: what it needs of it lies in `node.json` and in the pins.
//!
//! Called with `type` `loopback`, it stands in for the plugin of that name, which runtimes run before any network's.
//!
//! One file a verb in `cmd`; `types` is the protocol, `state` the files, `link` and `attach` the kernel.

mod attach;
mod call;
mod cmd;
mod env;
mod fault;
mod ipam;
mod link;
mod maps;
mod netlink;
mod netns;
mod policy;
mod shape;
mod state;
mod types;

use call::Call;
use env::{Env, Verb};
use serde_json::Value;
use std::ffi::OsString;
use std::io::{IsTerminal, Read, Write};
use std::process::ExitCode;
use types::conf::{self, NetConf};
use types::error::{Error, code};
use types::version::Version;

/// More than any configuration; a runaway writer is cut off here.
const STDIN_MAX: u64 = 16 << 20;

fn main() -> ExitCode {
    let get = |name: &str| std::env::var_os(name);
    let mut version = Version::LATEST;
    let (out, exit) = match run(&get, &mut version) {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(out)) => (out, ExitCode::SUCCESS),
        Err(e) => (e.to_json(version.as_str()), ExitCode::FAILURE),
    };
    match writeln!(std::io::stdout(), "{out}") {
        Ok(()) => exit,
        Err(e) => {
            eprintln!("rustnet-cni: standard output: {e}");
            ExitCode::FAILURE
        }
    }
}

/// Does what the environment asks for; `version` becomes the configuration's as soon as that is known.
fn run(get: &dyn Fn(&str) -> Option<OsString>, version: &mut Version) -> Result<Option<Value>, Error> {
    let Some(verb) = Verb::from_env(get)? else {
        eprintln!("rustnet-cni {}: the CNI plugin of rustnet; a container runtime runs it", env!("CARGO_PKG_VERSION"));
        eprintln!("CNI protocol versions supported: {}", Version::list());
        return Ok(None);
    };
    let mut stdin = Vec::new();
    if verb == Verb::Version {
        // It needs no configuration; one that is there says in which version to answer.
        if !std::io::stdin().is_terminal() {
            let _ = std::io::stdin().take(STDIN_MAX).read_to_end(&mut stdin);
        }
        return Ok(Some(cmd::version::run(&stdin)));
    }
    std::io::stdin().take(STDIN_MAX).read_to_end(&mut stdin).map_err(|e| Error::io("standard input", &e))?;
    // Errors of the environment, too, are reported in the configuration's version.
    let known = conf::version_of(&stdin);
    if let Ok(v) = &known {
        *version = *v;
    }
    let env = Env::read(verb, get)?;
    let call = Call { env, conf: NetConf::parse(stdin, matches!(verb, Verb::Del | Verb::Gc))? };
    require_version(verb, call.conf.version)?;
    if call.conf.loopback {
        return cmd::loopback::run(verb, &call);
    }
    match verb {
        Verb::Add => cmd::add::run(&call).map(Some),
        Verb::Check => cmd::check::run(&call).map(|()| None),
        Verb::Del => cmd::del::run(&call).map(|()| None),
        Verb::Gc => cmd::gc::run(&call).map(|()| None),
        Verb::Status => cmd::status::run(&call).map(|()| None),
        Verb::Version => Ok(None),
    }
}

fn require_version(verb: Verb, version: Version) -> Result<(), Error> {
    let since = match verb {
        Verb::Check => Version::V040,
        Verb::Gc | Verb::Status => Version::V110,
        _ => Version::V030,
    };
    if version >= since {
        return Ok(());
    }
    Err(Error::new(code::VERSION, format!("{} does not exist in CNI {version}", verb.as_str()))
        .details(format!("set cniVersion to {since} or later")))
}
