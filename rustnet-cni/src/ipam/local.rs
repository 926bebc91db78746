//! The node's own pool: one file an address below `<runDir>/ipam`.
//!
//! A lease appears by link(2) with its content, so that a crash leaves a whole lease or none. A lock serialises the
//! choice, and its file remembers the last address of each family: a freed address rests until the range has been gone
//! through. The directory lies on a tmpfs, as the interfaces do: a reboot frees everything.

use crate::fault;
use crate::state;
use crate::types::conf::Attachment;
use crate::types::error::{Error, code};
use ipnet::IpNet;
use rustnet_common::files::IPAM_DIR;
use std::collections::{HashMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The lock, and in it the last addresses given out.
const LAST: &str = ".last";
/// Candidates tried one by one before the whole directory is read.
const DIRECT_TRIES: u32 = 8;
/// A choice takes microseconds: this is enough for the pods of a node that start all at once.
const PATIENCE: Duration = Duration::from_secs(10);

/// The pool of a node.
pub struct Pool {
    dir: PathBuf,
    /// How long to wait for others that choose an address.
    patience: Duration,
    /// Addresses that are not given out.
    taken: HashSet<IpAddr>,
}

/// A lease found in the pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The address.
    pub ip: IpAddr,
    /// Who holds it.
    pub owner: Attachment,
    /// In which network.
    pub network: String,
}

impl Pool {
    /// The pool in a run directory.
    pub fn new(run_dir: &Path) -> Self {
        Self { dir: run_dir.join(IPAM_DIR), patience: PATIENCE, taken: HashSet::new() }
    }

    /// The same pool without these addresses, which somebody else has.
    pub fn without(self, taken: HashSet<IpAddr>) -> Self {
        Self { taken, ..self }
    }

    /// Leases one address of each range, or none at all.
    pub fn allocate(&self, ranges: &[IpNet], network: &str, owner: &Attachment) -> Result<Vec<IpAddr>, Error> {
        let mut lock = self.lock()?;
        let mut text = String::new();
        // An unreadable memory only costs the order of addresses.
        let _ = lock.read_to_string(&mut text);
        let last: Vec<IpAddr> = text.split_whitespace().filter_map(|a| a.parse().ok()).collect();
        let candidate = self.candidate(network, owner)?;
        let mut leased = Vec::new();
        let outcome = ranges.iter().try_for_each(|range| {
            let after = last.iter().copied().find(|a| range.contains(a));
            let ip = self.lease(&candidate, range, after);
            // In any case before the candidate's removal: a lease is another name of the same file.
            leased.push(ip?);
            fault::point("lease")
        });
        drop(candidate);
        if let Err(e) = outcome {
            return Err(leased.iter().fold(e, |e, ip| match state::remove(&self.dir.join(ip.to_string())) {
                Ok(()) => e,
                Err(more) => e.details(more.to_string()),
            }));
        }
        let memory = leased.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(" ");
        let _ = lock.rewind().and_then(|()| lock.set_len(0)).and_then(|()| lock.write_all(memory.as_bytes()));
        Ok(leased)
    }

    /// Frees those of the addresses that `owner` still holds. What is in use by somebody else is not touched.
    pub fn release(&self, owner: &Attachment, held: &[IpAddr]) -> Result<(), Error> {
        if held.is_empty() {
            return Ok(());
        }
        // Read again under the lock: another disconnect of the same container may have freed them meanwhile.
        let _lock = self.lock()?;
        held.iter().map(|ip| self.dir.join(ip.to_string())).try_for_each(|path| match read_owner(&path) {
            Some((now, _)) if now == *owner => state::remove(&path),
            _ => Ok(()),
        })
    }

    /// The addresses that `owner` holds.
    pub fn held_by(&self, owner: &Attachment) -> Result<Vec<IpAddr>, Error> {
        Ok(self.leases()?.into_iter().filter(|l| l.owner == *owner).map(|l| l.ip).collect())
    }

    /// All leases.
    pub fn leases(&self) -> Result<Vec<Lease>, Error> {
        // The addresses of one attachment are names of one file, which is read once.
        let mut by_inode: HashMap<u64, Option<(Attachment, String)>> = HashMap::new();
        let mut all = Vec::new();
        for entry in state::list(&self.dir)? {
            let Ok(ip) = entry.name.parse() else { continue };
            let content = by_inode.entry(entry.inode).or_insert_with(|| read_owner(&self.dir.join(&entry.name)));
            if let Some((owner, network)) = content.clone() {
                all.push(Lease { ip, owner, network });
            }
        }
        Ok(all)
    }

    fn lease(&self, candidate: &Candidate, range: &IpNet, after: Option<IpAddr>) -> Result<IpAddr, Error> {
        let span = Span::of(range).ok_or_else(|| exhausted(range))?;
        let mut next = span.first_after(after);
        for _ in 0..DIRECT_TRIES {
            if !self.taken.contains(&next) && candidate.publish(&self.dir.join(next.to_string()))? {
                return Ok(next);
            }
            next = span.first_after(Some(next));
        }
        let mut used = self.used()?;
        used.extend(&self.taken);
        while let Some(ip) = span.free(after, &used) {
            if candidate.publish(&self.dir.join(ip.to_string()))? {
                return Ok(ip);
            }
            used.insert(ip);
        }
        Err(exhausted(range))
    }

    fn used(&self) -> Result<HashSet<IpAddr>, Error> {
        Ok(state::list(&self.dir)?.iter().filter_map(|entry| entry.name.parse().ok()).collect())
    }

    fn lock(&self) -> Result<File, Error> {
        state::lock(&self.dir.join(LAST), self.patience)
    }

    fn candidate(&self, network: &str, owner: &Attachment) -> Result<Candidate, Error> {
        let failed = |e: io::Error| Error::io(format!("write a lease in {}", self.dir.display()), &e);
        let text = format!("{}\r\n{}\n{network}\n", owner.container_id, owner.ifname);
        Candidate::new(&self.dir, text.as_bytes()).map_err(failed)
    }
}

/// Who holds the lease in a file, and in which network; `None` if it has gone.
fn read_owner(path: &Path) -> Option<(Attachment, String)> {
    // One read suffices: identifiers are limited, and so is the name of an interface.
    let mut buf = [0; 1024];
    let n = File::open(path).and_then(|mut f| f.read(&mut buf)).ok()?;
    let mut lines = std::str::from_utf8(&buf[..n]).ok()?.lines();
    let owner = Attachment { container_id: lines.next()?.into(), ifname: lines.next()?.into() };
    Some((owner, lines.next().unwrap_or_default().into()))
}

/// A written lease that has no address yet: a file without a name, or one with a temporary name where the file system has
/// no such files.
struct Candidate {
    file: File,
    named: Option<PathBuf>,
}

impl Candidate {
    fn new(dir: &Path, content: &[u8]) -> io::Result<Self> {
        use std::os::unix::fs::OpenOptionsExt;
        let unnamed = OpenOptions::new().write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(dir);
        let (mut file, named) = match unnamed {
            Ok(file) => (file, None),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::ENOENT)) => {
                // One name suffices: the caller holds the lock.
                let path = dir.join(".candidate");
                (File::create(&path)?, Some(path))
            }
            Err(e) => return Err(e),
        };
        file.write_all(content)?;
        Ok(Self { file, named })
    }

    /// Gives the file its final name; false if somebody has it.
    fn publish(&self, path: &Path) -> Result<bool, Error> {
        let source = match &self.named {
            Some(named) => named.clone(),
            None => format!("/proc/self/fd/{}", self.file.as_raw_fd()).into(),
        };
        match link(&source, path) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(e) => Err(Error::io(format!("lease {}", path.display()), &e)),
        }
    }
}

impl Drop for Candidate {
    fn drop(&mut self) {
        if let Some(path) = &self.named {
            // A leftover is overwritten by the next allocation.
            let _ = fs::remove_file(path);
        }
    }
}

/// link(2) that follows a symbolic link in /proc to an open file.
fn link(from: &Path, to: &Path) -> io::Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let c = |p: &Path| std::ffi::CString::new(p.as_os_str().as_bytes()).map_err(io::Error::from);
    let (from, to) = (c(from)?, c(to)?);
    // SAFETY: both pointers are zero-terminated strings that live until the call returns.
    let n =
        unsafe { libc::linkat(libc::AT_FDCWD, from.as_ptr(), libc::AT_FDCWD, to.as_ptr(), libc::AT_SYMLINK_FOLLOW) };
    if n == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The usable addresses of a range, as numbers: without the first (the network), the second (taken for a gateway by
/// many) and IPv4's last (broadcast).
#[derive(Clone, Copy)]
struct Span {
    v4: bool,
    first: u128,
    last: u128,
}

impl Span {
    /// `None` if nothing is usable.
    fn of(range: &IpNet) -> Option<Self> {
        let (v4, network, end) = match range {
            IpNet::V4(r) => {
                (true, u128::from(u32::from(r.network())), u128::from(u32::from(r.broadcast())).checked_sub(1)?)
            }
            IpNet::V6(r) => (false, u128::from(r.network()), u128::from(r.broadcast())),
        };
        let first = network.checked_add(2)?;
        (first <= end).then_some(Self { v4, first, last: end })
    }

    fn size(self) -> u128 {
        (self.last - self.first).saturating_add(1)
    }

    fn ip(self, n: u128) -> IpAddr {
        if self.v4 { IpAddr::V4((n as u32).into()) } else { IpAddr::V6(Ipv6Addr::from(n)) }
    }

    /// The address behind `after`, round and round; the first if `after` is not within.
    fn first_after(self, after: Option<IpAddr>) -> IpAddr {
        let after = match after {
            Some(IpAddr::V4(a)) => u128::from(u32::from(a)),
            Some(IpAddr::V6(a)) => u128::from(a),
            None => return self.ip(self.first),
        };
        self.ip(if (self.first..self.last).contains(&after) { after + 1 } else { self.first })
    }

    /// The first address behind `after` that is not used. At most one step more than there are used ones.
    fn free(self, after: Option<IpAddr>, used: &HashSet<IpAddr>) -> Option<IpAddr> {
        let steps = self.size().min(used.len() as u128 + 1);
        let mut ip = self.first_after(after);
        for _ in 0..steps {
            if !used.contains(&ip) {
                return Some(ip);
            }
            ip = self.first_after(Some(ip));
        }
        None
    }
}

fn exhausted(range: &IpNet) -> Error {
    let size = Span::of(range).map_or(0, Span::size);
    Error::new(code::EXHAUSTED, format!("no address is free in {range}: all {size} are taken"))
        .details("delete pods of this node, or give the node a larger podCIDR")
}

/// Refuses a node without any range.
pub fn require_ranges(ranges: &[IpNet]) -> Result<(), Error> {
    if !ranges.is_empty() {
        return Ok(());
    }
    Err(Error::new(code::TRY_AGAIN, "the node has no podCIDR to take addresses from")
        .details("let the cluster allocate podCIDRs (--allocate-node-cidrs), or configure an ipam plugin"))
}

#[cfg(test)]
mod tests {
    use super::{Duration, File, Path, Pool, Span};
    use crate::types::conf::Attachment;
    use ipnet::IpNet;
    use std::collections::HashSet;
    use std::net::IpAddr;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("rn{}-{name}", std::process::id()));
            std::fs::create_dir_all(&path).expect("temporary directory");
            Self(path)
        }
    }
    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn net(text: &str) -> IpNet {
        text.parse().expect("range")
    }
    fn ip(text: &str) -> IpAddr {
        text.parse().expect("address")
    }
    fn release(pool: &Pool, owner: &Attachment) {
        let held = pool.held_by(owner).expect("list");
        pool.release(owner, &held).expect("release");
    }
    fn owner(n: usize) -> Attachment {
        Attachment { container_id: format!("c{n}"), ifname: "eth0".into() }
    }

    #[test]
    fn reserved_addresses_are_left_out() {
        for (range, first, last) in [
            ("10.1.2.0/24", "10.1.2.2", "10.1.2.254"),
            ("10.1.2.0/30", "10.1.2.2", "10.1.2.2"),
            ("0.0.0.0/0", "0.0.0.2", "255.255.255.254"),
            ("fd00::/64", "fd00::2", "fd00::ffff:ffff:ffff:ffff"),
            ("fd00::/127", "", ""),
            ("10.1.2.0/31", "", ""),
            ("10.1.2.7/32", "", ""),
            ("0.0.0.0/32", "", ""),
            ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128", "", ""),
        ] {
            match Span::of(&net(range)) {
                Some(s) => assert_eq!((s.ip(s.first), s.ip(s.last)), (ip(first), ip(last)), "{range}"),
                None => assert_eq!(first, "", "{range}"),
            }
        }
    }

    #[test]
    fn goes_round_before_it_reuses() {
        let dir = Dir::new("round");
        let pool = Pool::new(&dir.0);
        let range = [net("10.1.2.0/29")];
        let mut got = Vec::new();
        for n in 0..8 {
            got.extend(pool.allocate(&range, "n", &owner(n)).expect("free"));
            release(&pool, &owner(n));
        }
        let want = ["2", "3", "4", "5", "6", "2", "3", "4"].map(|n| ip(&format!("10.1.2.{n}")));
        assert_eq!(got, want);
    }

    #[test]
    fn exhausts_by_name_and_recovers() {
        let dir = Dir::new("full");
        let pool = Pool::new(&dir.0);
        let ranges = [net("fd00::/64"), net("10.1.2.0/28")];
        let all: HashSet<_> = (0..13).flat_map(|n| pool.allocate(&ranges, "n", &owner(n)).expect("free")).collect();
        assert_eq!(all.len(), 26);
        let e = pool.allocate(&ranges, "n", &owner(99)).expect_err("full");
        assert_eq!(e.code, 101);
        assert!(e.msg.contains("10.1.2.0/28"), "{e}");
        assert!(pool.held_by(&owner(99)).expect("list").is_empty(), "half a lease stayed");
        let freed = pool.held_by(&owner(5)).expect("list");
        release(&pool, &owner(5));
        let again = pool.allocate(&ranges, "n", &owner(99)).expect("one is free");
        assert_eq!(again[1], *freed.iter().find(|a| a.is_ipv4()).expect("v4"));
    }

    #[test]
    fn a_lock_that_another_process_keeps_is_an_error_to_try_again() {
        let dir = Dir::new("locked");
        let pool = Pool { patience: Duration::from_millis(50), ..Pool::new(&dir.0) };
        let range = [net("10.1.2.0/24")];
        pool.allocate(&range, "n", &owner(1)).expect("free");
        let last = pool.dir.join(".last");
        let mode = |path: &Path| std::fs::metadata(path).expect("there").permissions().mode() & 0o777;
        assert_eq!((mode(&pool.dir), mode(&last), mode(&pool.dir.join("10.1.2.2"))), (0o700, 0o600, 0o600));
        let other = File::open(&last).expect("open");
        other.lock().expect("lock");
        let e = pool.allocate(&range, "n", &owner(2)).expect_err("locked");
        assert!(e.code == 11 && e.msg.contains(".last") && e.details.contains("lslocks"), "{e}");
        // Any user can lock a file that all can open, as earlier releases made it.
        std::fs::set_permissions(&last, PermissionsExt::from_mode(0o644)).expect("chmod");
        assert_eq!(pool.allocate(&range, "n", &owner(2)).expect("free"), [ip("10.1.2.3")]);
        assert_eq!(mode(&last), 0o600);
    }

    #[test]
    fn a_spoilt_memory_does_no_harm() {
        let dir = Dir::new("memory");
        let pool = Pool::new(&dir.0);
        std::fs::create_dir_all(&pool.dir).expect("directory");
        for text in [&b"\xff\xfe"[..], b"nonsense", b"10.9.9.9", b"10.1.2.254"] {
            std::fs::write(pool.dir.join(".last"), text).expect("write");
            let got = pool.allocate(&[net("10.1.2.0/24")], "n", &owner(1)).expect("free");
            assert_eq!(got, [ip("10.1.2.2")]);
            release(&pool, &owner(1));
        }
    }

    #[test]
    fn release_is_by_owner_and_repeatable() {
        let dir = Dir::new("release");
        let pool = Pool::new(&dir.0);
        let range = [net("10.1.2.0/24")];
        let kept = pool.allocate(&range, "n", &owner(1)).expect("free");
        pool.allocate(&range, "n", &owner(2)).expect("free");
        let other = Attachment { ifname: "net1".into(), ..owner(1) };
        for _ in 0..3 {
            release(&pool, &owner(2));
            release(&pool, &other);
        }
        assert_eq!(pool.held_by(&owner(1)).expect("list"), kept);
        // An address that is another's by now stays.
        pool.release(&owner(2), &kept).expect("release");
        assert_eq!(pool.leases().expect("list").len(), 1);
        assert_eq!(Pool::new(&dir.0.join("absent")).leases().expect("list"), []);
    }
}
