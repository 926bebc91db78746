//! Ctrl-C: one thread waits for it, cleans up and ends the process.

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};
use std::io::Write;

/// Signals that end the demo, blocked in every thread.
pub struct Signals(SigSet);

impl Signals {
    /// Blocks them. To be called before other threads are started.
    pub fn block() -> Result<Self> {
        let mut set = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            set.add(signal);
        }
        set.thread_block().context("cannot block signals")?;
        Ok(Self(set))
    }

    /// Starts the thread that waits for one.
    pub fn clean_up_on_arrival(self) -> Result<()> {
        let wait = move || {
            if let Ok(signal) = self.0.wait() {
                let _ = writeln!(std::io::stderr(), "\n{signal}: taking everything down");
                testkit::janitor::clean_up();
                std::process::exit(128 + signal as i32);
            }
        };
        std::thread::Builder::new().name("signals".into()).spawn(wait).context("cannot start a thread")?;
        Ok(())
    }
}
