//! The programs' packet log: turned on when they are loaded, read from its ring buffer, printed.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::mpsc::{Receiver, Sender, channel};

use anyhow::{Context, Result};
use aya::{Ebpf, EbpfLoader};
use aya_log::EbpfLogger;
use log::{Log, Metadata, Record};
use rustnet_common::addr::Addr;
use rustnet_common::log::FILTERS;
use tokio::io::unix::AsyncFd;

use crate::config::PacketLog;

/// The globals of the programs (see rustnet-ebpf) that a [`PacketLog`] asks for.
pub struct Globals {
    is_on: u32,
    filter: [[u8; 16]; FILTERS],
}

impl Globals {
    /// Hands them to a loader.
    pub fn set<'a>(&'a self, loader: &mut EbpfLoader<'a>) {
        loader.override_global("BPF_LOG", &self.is_on, true).override_global("BPF_LOG_FILTER", &self.filter, true);
    }
}

impl PacketLog {
    /// What the programs have to be loaded with.
    pub fn globals(&self) -> Globals {
        let mut filter = [[0; 16]; FILTERS];
        if let Self::Having(addresses) = self {
            for (slot, address) in filter.iter_mut().zip(addresses) {
                *slot = Addr::from(*address).octets();
            }
        }
        Globals { is_on: u32::from(*self != Self::Off), filter }
    }

    /// The ring buffer of programs that are being loaded.
    pub fn open(&self, ebpf: &mut Ebpf) -> Result<Option<Packets>> {
        if *self == Self::Off {
            return Ok(None);
        }
        let (sender, lines) = channel();
        let logger = EbpfLogger::init_with_logger(ebpf, Sink(sender)).context("opening the log of the eBPF object")?;
        Ok(Some(Packets { logger, lines }))
    }
}

/// Takes what [`EbpfLogger`] has made of a record.
struct Sink(Sender<String>);

impl Log for Sink {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        // The receiver lives as long as this does.
        let _ = self.0.send(tidy(&record.args().to_string()));
    }

    fn flush(&self) {}
}

/// The programs fill up names with spaces.
fn tidy(line: &str) -> String {
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The reading end of the log.
pub struct Packets {
    logger: EbpfLogger<Sink>,
    lines: Receiver<String>,
}

impl Packets {
    /// The lines since the last call.
    pub fn take(&mut self) -> Vec<String> {
        self.logger.flush();
        self.lines.try_iter().collect()
    }

    /// Prints each line as it comes, until it is aborted.
    pub async fn print(self) {
        if let Err(error) = self.try_print().await {
            tracing::error!("the programs' packet log: {error:#}; restart the agent to read it again");
        }
    }

    async fn try_print(self) -> Result<()> {
        // SAFETY: the descriptor is that of the ring buffer that `self` owns, and stays so.
        let ring = unsafe { AsyncFd::register(self) }.map_err(std::io::Error::from);
        let mut ring = ring.context("waiting for the ring buffer")?;
        loop {
            let mut ready = ring.readable_mut().await.context("waiting for the ring buffer")?;
            ready
                .get_inner_mut()
                .take()
                .iter()
                .for_each(|line| tracing::info!(target: "rustnet_agent::packet", "{line}"));
            ready.clear_ready();
        }
    }
}

impl AsFd for Packets {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.logger.as_fd()
    }
}

impl AsRawFd for Packets {
    fn as_raw_fd(&self) -> RawFd {
        self.logger.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::{PacketLog, tidy};

    #[test]
    fn addresses_of_both_families_fill_the_filter_in_one_form() {
        assert_eq!(PacketLog::Off.globals().is_on, 0);
        let all = PacketLog::All.globals();
        assert_eq!((all.is_on, all.filter), (1, [[0; 16]; 4]));
        let having = PacketLog::Having(vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()]).globals();
        assert_eq!(having.is_on, 1);
        assert_eq!(having.filter[0], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 10, 0, 0, 1]);
        assert_eq!(having.filter[1], [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(having.filter[2..], [[0; 16]; 2]);
    }

    #[test]
    fn filling_is_taken_out() {
        assert_eq!(tidy("to_pod       3 pass     "), "to_pod 3 pass");
    }
}
