//! The older iptables ("legacy"), read only: which chains its tables hold.
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
/// Length of `struct ipt_get_entries` before the entries, and where in it their length is.
const ENTRIES: (usize, usize) = (40, 32);
/// Length of the name of a table.
const TABLE_NAME: usize = 32;
/// Where the target's name is, from its begin; its length; and where the name of a chain is, in a target called `ERROR`.
const TARGET: (usize, usize, usize) = (2, 29, 32);

/// Chains of all tables that are in use, as `table, chain`. Those that everybody has (`INPUT`) have no names here.
pub fn legacy_chains(family: Family) -> Result<Vec<(String, String)>> {
    let file = match family {
        Family::Ip => "/proc/thread-self/net/ip_tables_names",
        Family::Ip6 => "/proc/thread-self/net/ip6_tables_names",
    };
    let tables = match std::fs::read_to_string(file) {
        Ok(tables) => tables,
        // A kernel without it, or that has not had a use for it yet.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e).context(file),
    };
    let mut all = Vec::new();
    for table in tables.lines() {
        let entries =
            entries(family, table).with_context(|| format!("reading the table {table} of iptables-legacy"))?;
        all.extend(chains(family, &entries).into_iter().map(|chain| (table.to_owned(), chain)));
    }
    Ok(all)
}

/// The entries of a table, as the kernel has them.
fn entries(family: Family, table: &str) -> io::Result<Vec<u8>> {
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
    let size = u32::from_ne_bytes([info[INFO.1], info[INFO.1 + 1], info[INFO.1 + 2], info[INFO.1 + 3]]);
    let mut entries = request(ENTRIES.0 + size as usize)?;
    entries[ENTRIES.1..ENTRIES.1 + 4].copy_from_slice(&size.to_ne_bytes());
    ask(&socket, level, GET_ENTRIES, &mut entries)?;
    Ok(entries.split_off(ENTRIES.0))
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
