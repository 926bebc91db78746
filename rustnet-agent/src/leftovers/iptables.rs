//! The older iptables ("legacy"), read only: which chains its tables hold, and the table `filter` as the kernel has it.
//!
//! Its interface replaces whole tables at once, with everybody's rules in them, so that nothing is ever changed by it here.

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result};

use super::nftables::Family;

/// `IPT_SO_GET_INFO`, `IPT_SO_GET_ENTRIES`; IPv6 has the same numbers.
const GET_INFO: i32 = 64;
const GET_ENTRIES: i32 = 65;
/// Length of `struct ipt_getinfo`, and where in it the length of the table's entries is.
const INFO: (usize, usize) = (84, 80);
/// Where in it the begins of the hooks' chains are.
const HOOK_ENTRIES: usize = 36;
/// Length of `struct ipt_get_entries` before the entries, and where in it their length is.
const ENTRIES: (usize, usize) = (40, 32);
/// Length of the name of a table.
const TABLE_NAME: usize = 32;
/// Where the target's name is, from its begin; its length; and where the name of a chain is, in a target called `ERROR`.
const TARGET: (usize, usize, usize) = (2, 29, 32);

/// A table as the kernel has it.
pub struct Table {
    /// Its entries, one behind the other.
    pub entries: Vec<u8>,
    /// Where the chain of each hook begins, by `NF_INET_*`.
    pub hooks: [u32; 5],
}

/// The table `filter`; `None` where it is not in use.
///
/// # Errors
/// No rights to read it.
pub fn filter(family: Family) -> Result<Option<Table>> {
    if !tables(family)?.iter().any(|table| table == "filter") {
        return Ok(None);
    }
    entries(family, "filter").context("reading the table filter of iptables-legacy").map(Some)
}

/// Chains of all tables that are in use, as `table, chain`. Those that everybody has (`INPUT`) have no names here.
pub fn legacy_chains(family: Family) -> Result<Vec<(String, String)>> {
    let mut all = Vec::new();
    for table in tables(family)? {
        let entries =
            entries(family, &table).with_context(|| format!("reading the table {table} of iptables-legacy"))?.entries;
        all.extend(chains(family, &entries).into_iter().map(|chain| (table.clone(), chain)));
    }
    Ok(all)
}

/// Names of the tables that are in use.
fn tables(family: Family) -> Result<Vec<String>> {
    let file = match family {
        Family::Ip => "/proc/thread-self/net/ip_tables_names",
        Family::Ip6 => "/proc/thread-self/net/ip6_tables_names",
    };
    match std::fs::read_to_string(file) {
        Ok(tables) => Ok(tables.lines().map(str::to_owned).collect()),
        // A kernel without it, or that has not had a use for it yet.
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e).context(file),
    }
}

/// The entries of a table, as the kernel has them.
fn entries(family: Family, table: &str) -> io::Result<Table> {
    let (address, level) = match family {
        Family::Ip => ("0.0.0.0:0", libc::SOL_IP),
        Family::Ip6 => ("[::]:0", libc::SOL_IPV6),
    };
    let socket = UdpSocket::bind(address)?;
    let request = |length: usize| -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; length];
        let name = table.as_bytes();
        let room = buffer.get_mut(..name.len()).filter(|_| name.len() < TABLE_NAME);
        room.ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(name);
        Ok(buffer)
    };
    let mut info = request(INFO.0)?;
    ask(&socket, level, GET_INFO, &mut info)?;
    let number = |at: usize| u32::from_ne_bytes([info[at], info[at + 1], info[at + 2], info[at + 3]]);
    let size = number(INFO.1);
    let hooks = [0, 1, 2, 3, 4].map(|hook| number(HOOK_ENTRIES + 4 * hook));
    let mut entries = request(ENTRIES.0 + size as usize)?;
    entries[ENTRIES.1..ENTRIES.1 + 4].copy_from_slice(&size.to_ne_bytes());
    ask(&socket, level, GET_ENTRIES, &mut entries)?;
    Ok(Table { entries: entries.split_off(ENTRIES.0), hooks })
}

fn ask(socket: &UdpSocket, level: i32, option: i32, buffer: &mut [u8]) -> io::Result<()> {
    let mut length = buffer.len() as libc::socklen_t;
    // SAFETY: the kernel reads and writes at most `length` octets of the buffer, which is that long.
    let done =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, option, buffer.as_mut_ptr().cast(), &raw mut length) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A chain begins with an entry whose target is called `ERROR` and bears the chain's name; so does the end of a table.
fn chains(family: Family, mut entries: &[u8]) -> Vec<String> {
    // `target_offset` and, behind it, `next_offset` of `struct ipt_entry` and `struct ip6t_entry`.
    let offsets = match family {
        Family::Ip => 88,
        Family::Ip6 => 140,
    };
    let name = |bytes: &[u8]| {
        let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
        String::from_utf8_lossy(&bytes[..end]).into_owned()
    };
    let mut found = Vec::new();
    while let Some(&[a, b, c, d]) = entries.get(offsets..offsets + 4) {
        let (target, next) = (usize::from(u16::from_ne_bytes([a, b])), usize::from(u16::from_ne_bytes([c, d])));
        let Some(entry) = entries.get(..next).filter(|entry| !entry.is_empty()) else { break };
        let target = entry.get(target..).unwrap_or_default();
        if target.get(TARGET.0..TARGET.0 + TARGET.1).is_some_and(|bytes| name(bytes) == "ERROR") {
            found.extend(target.get(TARGET.2..).map(name).filter(|chain| chain != "ERROR"));
        }
        entries = &entries[next..];
    }
    found
}

#[cfg(test)]
mod tests {
    use super::{Family, chains};

    #[test]
    fn nonsense_ends() {
        assert!(chains(Family::Ip, &[0; 200]).is_empty());
        assert!(chains(Family::Ip6, &[255; 300]).is_empty());
    }
}
