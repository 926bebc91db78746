//! The node's own pool: one file an address below `<runDir>/ipam`.
//!
//! A lease appears by link(2) with its content, so that a crash leaves a whole lease or none. A lock serialises the
//! choice, and its file remembers the last address of each family: a freed address rests until the range has been gone
//! through. The directory usually lies on a tmpfs, as the interfaces do: a reboot frees everything. Where it lies on a disk, the leases
//! of a boot before are freed when the range is full, for their owners have no device.
//!
//! The kernel is asked before an address is given out ([`Knowledge`]): files may get lost, and pods go on.

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

/// Who has an address that no living attachment has a lease of.
const OTHER_HOLDER: &str = "a device of this host, or a route";

/// The pool of a node.
pub struct Pool {
    dir: PathBuf,
    /// How long to wait for others that choose an address.
    patience: Duration,
}

/// What is known of addresses apart from leases.
pub trait Knowledge {
    /// True if somebody has the address, with or without a lease.
    fn is_used(&mut self, ip: IpAddr) -> Result<bool, Error>;
    /// True if the owner of a lease still has a device.
    fn has_device(&mut self, owner: &Attachment) -> Result<bool, Error>;
}

/// Who asks for addresses, and for which.
pub struct Request<'a> {
    /// The ranges, one address of each.
    pub ranges: &'a [IpNet],
    /// The addresses that it must be, if any; of a range without one, any will do.
    pub wanted: &'a [IpAddr],
    /// The network.
    pub network: &'a str,
    /// The owner.
    pub owner: &'a Attachment,
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
        Self { dir: run_dir.join(IPAM_DIR), patience: PATIENCE }
    }

    /// Leases one address of each range, or none at all.
    ///
    /// # Errors
    /// A range is full or too small, or an address that is wanted is not to be had.
    pub fn allocate(&self, request: &Request<'_>, known: &mut dyn Knowledge) -> Result<Vec<IpAddr>, Error> {
        require_within(request.wanted, request.ranges)?;
        let mut lock = self.lock()?;
        let mut text = String::new();
        // An unreadable memory only costs the order of addresses.
        let _ = lock.read_to_string(&mut text);
        let last: Vec<IpAddr> = text.split_whitespace().filter_map(|a| a.parse().ok()).collect();
        let candidate = self.candidate(request.network, request.owner)?;
        let mut leased = Vec::new();
        let outcome = request.ranges.iter().try_for_each(|range| {
            let ip = match request.wanted.iter().find(|ip| range.contains(*ip)) {
                Some(ip) => self.lease_this(&candidate, *ip, known),
                None => self.lease(&candidate, range, last.iter().copied().find(|a| range.contains(a)), known),
            };
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
        // One write over what is there: a call that is killed leaves the memory before or after, and no empty one.
        let memory = leased.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(" ");
        let width = lock.metadata().map_or(0, |meta| meta.len() as usize);
        let memory = format!("{memory:<width$}");
        let _ = lock.rewind().and_then(|()| lock.write_all(memory.as_bytes()));
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

    fn lease(
        &self,
        candidate: &Candidate,
        range: &IpNet,
        after: Option<IpAddr>,
        known: &mut dyn Knowledge,
    ) -> Result<IpAddr, Error> {
        let span = Span::of(range).ok_or_else(|| too_small(range))?;
        let mut next = span.first_after(after);
        for _ in 0..DIRECT_TRIES {
            if self.try_lease(candidate, next, known)? {
                return Ok(next);
            }
            next = span.first_after(Some(next));
        }
        let leases = self.leases()?;
        let mut used: HashSet<IpAddr> = leases.iter().map(|lease| lease.ip).collect();
        while let Some(ip) = span.free(after, &used) {
            if self.try_lease(candidate, ip, known)? {
                return Ok(ip);
            }
            used.insert(ip);
        }
        // On a disk, leases outlive the pods of a boot before. Who makes a lease has a device.
        for lease in leases.iter().filter(|lease| range.contains(&lease.ip)) {
            // An address in use without its device is somebody's: its lease stays.
            if !known.has_device(&lease.owner)? && !known.is_used(lease.ip)? {
                state::remove(&self.dir.join(lease.ip.to_string()))?;
                if self.try_lease(candidate, lease.ip, known)? {
                    return Ok(lease.ip);
                }
            }
        }
        Err(exhausted(range))
    }

    /// Leases the address, unless somebody has it.
    fn try_lease(&self, candidate: &Candidate, ip: IpAddr, known: &mut dyn Knowledge) -> Result<bool, Error> {
        let path = self.dir.join(ip.to_string());
        if known.is_used(ip)? {
            return Ok(false);
        }
        if candidate.publish(&path)? {
            return Ok(true);
        }
        // A lease appears with its content. One without, which a power cut can leave on a disk, is nobody's.
        if !is_spoilt(&path) {
            return Ok(false);
        }
        state::remove(&path)?;
        candidate.publish(&path)
    }

    /// Leases an address that somebody wants and no other.
    fn lease_this(&self, candidate: &Candidate, ip: IpAddr, known: &mut dyn Knowledge) -> Result<IpAddr, Error> {
        if self.try_lease(candidate, ip, known)? {
            return Ok(ip);
        }
        let path = self.dir.join(ip.to_string());
        let holder = match read_owner(&path) {
            Some((owner, network)) if known.has_device(&owner)? => {
                format!("{}@{} of network {network}", owner.container_id, owner.ifname)
            }
            // As above: only the lease of an address that nobody uses.
            Some(_) if !known.is_used(ip)? => {
                state::remove(&path)?;
                if self.try_lease(candidate, ip, known)? {
                    return Ok(ip);
                }
                OTHER_HOLDER.to_owned()
            }
            _ => OTHER_HOLDER.to_owned(),
        };
        Err(Error::new(code::TRY_AGAIN, format!("address {ip} that was asked for is taken: {holder} has it"))
            .details("delete what has it, or ask for another address"))
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
    parse_owner(&buf[..n])
}

/// True if the file can be read, and holds no owner.
fn is_spoilt(path: &Path) -> bool {
    fs::read(path).is_ok_and(|content| parse_owner(&content).is_none())
}

fn parse_owner(content: &[u8]) -> Option<(Attachment, String)> {
    let mut lines = std::str::from_utf8(content).ok()?.lines();
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
        match unnamed {
            Ok(mut file) => file.write_all(content).map(|()| Self { file, named: None }),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::ENOENT)) => {
                Self::with_name(dir, content)
            }
            Err(e) => Err(e),
        }
    }

    /// One name suffices: the caller holds the lock. A killed call may have left it, as a second name of its lease, so that the file
    /// must not be written again.
    fn with_name(dir: &Path, content: &[u8]) -> io::Result<Self> {
        use std::os::unix::fs::OpenOptionsExt;
        let path = dir.join(".candidate");
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
        file.write_all(content)?;
        Ok(Self { file, named: Some(path) })
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
            // A leftover is removed by the next allocation.
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

    fn contains(self, ip: IpAddr) -> bool {
        let n = match ip {
            IpAddr::V4(a) => u128::from(u32::from(a)),
            IpAddr::V6(a) => u128::from(a),
        };
        self.v4 == ip.is_ipv4() && (self.first..=self.last).contains(&n)
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

fn too_small(range: &IpNet) -> Error {
    Error::new(code::CONFIG, format!("the node's podCIDR {range} is too small: it has no address for a pod")).details(
        "the first two addresses, and the last one of IPv4, are not given out; give the node at least a /30 or a /126",
    )
}

/// Refuses addresses that are of no range, and two of one range.
fn require_within(wanted: &[IpAddr], ranges: &[IpNet]) -> Result<(), Error> {
    for (i, ip) in wanted.iter().enumerate() {
        let range = ranges.iter().find(|range| range.contains(ip) && Span::of(range).is_some_and(|s| s.contains(*ip)));
        let Some(range) = range else {
            let all = ranges.iter().map(IpNet::to_string).collect::<Vec<_>>().join(", ");
            let text = format!("address {ip} that was asked for is none that this node gives to pods ({all})");
            return Err(Error::new(code::CONFIG, text).details("ask for one of the node's podCIDRs, or for none"));
        };
        if let Some(other) = wanted[..i].iter().find(|other| *other != ip && range.contains(*other)) {
            let text = format!("addresses {other} and {ip} that were asked for are both of {range}");
            return Err(
                Error::new(code::UNSUPPORTED, text).details("a pod has one address of each podCIDR: ask for one")
            );
        }
    }
    Ok(())
}

/// Refuses a node without any range, or with one that has no address for a pod.
pub fn require_ranges(ranges: &[IpNet]) -> Result<(), Error> {
    if let Some(range) = ranges.iter().find(|range| Span::of(range).is_none()) {
        return Err(too_small(range));
    }
    if !ranges.is_empty() {
        return Ok(());
    }
    Err(Error::new(code::TRY_AGAIN, "the node has no podCIDR to take addresses from")
        .details("let the cluster allocate podCIDRs (--allocate-node-cidrs), or configure an ipam plugin"))
}

#[cfg(test)]
mod tests {
    use super::{Candidate, Duration, File, Knowledge, Path, Pool, Request, Span, parse_owner};
    use crate::types::conf::Attachment;
    use crate::types::error::Error;
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
    /// A kernel that knows these addresses, and no device of these owners.
    #[derive(Default)]
    struct Known {
        used: Vec<IpAddr>,
        dead: Vec<Attachment>,
    }
    impl Knowledge for Known {
        fn is_used(&mut self, ip: IpAddr) -> Result<bool, Error> {
            Ok(self.used.contains(&ip))
        }
        fn has_device(&mut self, owner: &Attachment) -> Result<bool, Error> {
            Ok(!self.dead.contains(owner))
        }
    }

    fn allocate(pool: &Pool, ranges: &[IpNet], owner: &Attachment) -> Result<Vec<IpAddr>, Error> {
        pool.allocate(&Request { ranges, wanted: &[], network: "n", owner }, &mut Known::default())
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
            got.extend(allocate(&pool, &range, &owner(n)).expect("free"));
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
        let all: HashSet<_> = (0..13).flat_map(|n| allocate(&pool, &ranges, &owner(n)).expect("free")).collect();
        assert_eq!(all.len(), 26);
        let e = allocate(&pool, &ranges, &owner(99)).expect_err("full");
        assert_eq!(e.code, 101);
        assert!(e.msg.contains("10.1.2.0/28"), "{e}");
        assert!(pool.held_by(&owner(99)).expect("list").is_empty(), "half a lease stayed");
        let freed = pool.held_by(&owner(5)).expect("list");
        release(&pool, &owner(5));
        let again = allocate(&pool, &ranges, &owner(99)).expect("one is free");
        assert_eq!(again[1], *freed.iter().find(|a| a.is_ipv4()).expect("v4"));
    }

    #[test]
    fn a_lock_that_another_process_keeps_is_an_error_to_try_again() {
        let dir = Dir::new("locked");
        let pool = Pool { patience: Duration::from_millis(50), ..Pool::new(&dir.0) };
        let range = [net("10.1.2.0/24")];
        allocate(&pool, &range, &owner(1)).expect("free");
        let last = pool.dir.join(".last");
        let mode = |path: &Path| std::fs::metadata(path).expect("there").permissions().mode() & 0o777;
        assert_eq!((mode(&pool.dir), mode(&last), mode(&pool.dir.join("10.1.2.2"))), (0o700, 0o600, 0o600));
        let other = File::open(&last).expect("open");
        other.lock().expect("lock");
        let e = allocate(&pool, &range, &owner(2)).expect_err("locked");
        assert!(e.code == 11 && e.msg.contains(".last") && e.details.contains("lslocks"), "{e}");
        // Any user can lock a file that all can open, as earlier releases made it.
        std::fs::set_permissions(&last, PermissionsExt::from_mode(0o644)).expect("chmod");
        assert_eq!(allocate(&pool, &range, &owner(2)).expect("free"), [ip("10.1.2.3")]);
        assert_eq!(mode(&last), 0o600);
    }

    #[test]
    fn a_spoilt_memory_does_no_harm() {
        let dir = Dir::new("memory");
        let pool = Pool::new(&dir.0);
        std::fs::create_dir_all(&pool.dir).expect("directory");
        for text in [&b"\xff\xfe"[..], b"nonsense", b"10.9.9.9", b"10.1.2.254"] {
            std::fs::write(pool.dir.join(".last"), text).expect("write");
            let got = allocate(&pool, &[net("10.1.2.0/24")], &owner(1)).expect("free");
            assert_eq!(got, [ip("10.1.2.2")]);
            release(&pool, &owner(1));
        }
    }

    #[test]
    fn release_is_by_owner_and_repeatable() {
        let dir = Dir::new("release");
        let pool = Pool::new(&dir.0);
        let range = [net("10.1.2.0/24")];
        let kept = allocate(&pool, &range, &owner(1)).expect("free");
        allocate(&pool, &range, &owner(2)).expect("free");
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

    #[test]
    fn what_the_kernel_knows_is_not_given_out() {
        let dir = Dir::new("known");
        let pool = Pool::new(&dir.0);
        let ranges = [net("10.1.2.0/28"), net("fd00::/64")];
        let used: Vec<_> = (2..14).map(|n| ip(&format!("10.1.2.{n}"))).chain([ip("fd00::2")]).collect();
        let mut known = Known { used, ..Known::default() };
        let mut get = |owner: &Attachment| {
            pool.allocate(&Request { ranges: &ranges, wanted: &[], network: "n", owner }, &mut known)
        };
        assert_eq!(get(&owner(1)).expect("one is free"), [ip("10.1.2.14"), ip("fd00::3")]);
        assert_eq!(get(&owner(2)).expect_err("full").code, 101);
        assert_eq!(pool.leases().expect("list").len(), 2);
    }

    /// As after a reboot, where the directory lies on a disk.
    #[test]
    fn a_full_range_takes_back_what_owners_without_a_device_have() {
        let dir = Dir::new("dead");
        let pool = Pool::new(&dir.0);
        let ranges = [net("10.1.2.0/29")];
        for n in 0..5 {
            allocate(&pool, &ranges, &owner(n)).expect("free");
        }
        let mut known = Known { dead: vec![owner(3)], ..Known::default() };
        let mut get = |owner: &Attachment| {
            pool.allocate(&Request { ranges: &ranges, wanted: &[], network: "n", owner }, &mut known)
        };
        assert_eq!(get(&owner(7)).expect("taken back"), [ip("10.1.2.5")]);
        assert_eq!(get(&owner(8)).expect_err("full").code, 101);
        assert_eq!(pool.held_by(&owner(2)).expect("list"), [ip("10.1.2.4")]);
    }

    /// The device of the owner has gone, and somebody has the address: the route may be of a pod whose device has another name.
    #[test]
    fn a_lease_of_an_address_in_use_stays() {
        let dir = Dir::new("used");
        let pool = Pool::new(&dir.0);
        let ranges = [net("10.1.2.0/30")];
        assert_eq!(allocate(&pool, &ranges, &owner(1)).expect("free"), [ip("10.1.2.2")]);
        let mut known = Known { used: vec![ip("10.1.2.2")], dead: vec![owner(1)] };
        for wanted in [&[][..], &[ip("10.1.2.2")]] {
            let request = Request { ranges: &ranges, wanted, network: "n", owner: &owner(2) };
            pool.allocate(&request, &mut known).expect_err("in use");
            assert_eq!(pool.held_by(&owner(1)).expect("list"), [ip("10.1.2.2")]);
        }
    }

    /// A power cut leaves files without content on a disk.
    #[test]
    fn leases_without_content_are_given_out_again() {
        let dir = Dir::new("spoilt");
        let pool = Pool::new(&dir.0);
        std::fs::create_dir_all(&pool.dir).expect("directory");
        for n in 2..7 {
            std::fs::write(pool.dir.join(format!("10.1.2.{n}")), "").expect("write");
        }
        for n in 2..7 {
            assert_eq!(allocate(&pool, &[net("10.1.2.0/29")], &owner(n)).expect("free"), [ip(&format!("10.1.2.{n}"))]);
        }
        assert_eq!(pool.leases().expect("list").len(), 5);
    }

    /// On file systems without files that have no name, a killed call leaves the name of its candidate.
    #[test]
    fn a_candidates_name_that_a_killed_call_left_spoils_no_lease() {
        let dir = Dir::new("candidate");
        let (first, second) = (dir.0.join("10.1.2.2"), dir.0.join("10.1.2.3"));
        let killed = Candidate::with_name(&dir.0, b"c1\r\neth0\nn\n").expect("write");
        assert!(killed.publish(&first).expect("link"));
        std::mem::forget(killed);
        let next = Candidate::with_name(&dir.0, b"c2\r\neth0\nn\n").expect("write");
        assert!(next.publish(&second).expect("link") && !next.publish(&first).expect("link"));
        drop(next);
        for (path, n) in [(first, 1), (second, 2)] {
            assert_eq!(parse_owner(&std::fs::read(path).expect("lease")).expect("owner").0, owner(n));
        }
        assert!(!dir.0.join(".candidate").exists());
    }

    #[test]
    fn addresses_that_are_wanted() {
        let dir = Dir::new("wanted");
        let pool = Pool::new(&dir.0);
        let ranges = [net("10.1.2.0/24"), net("fd00::/64")];
        let get = |wanted: &[&str], n: usize, used: &[&str]| {
            let wanted: Vec<_> = wanted.iter().map(|w| ip(w)).collect();
            let mut known = Known { used: used.iter().map(|u| ip(u)).collect(), ..Known::default() };
            let request = Request { ranges: &ranges, wanted: &wanted, network: "n", owner: &owner(n) };
            pool.allocate(&request, &mut known).map_err(|e| (e.code, e.to_string()))
        };
        assert_eq!(get(&["10.1.2.9"], 1, &[]).expect("free"), [ip("10.1.2.9"), ip("fd00::2")]);
        assert_eq!(get(&["fd00::9", "10.1.2.200"], 2, &[]).expect("free"), [ip("10.1.2.200"), ip("fd00::9")]);
        for (wanted, used, code, part) in [
            (&["10.1.2.9"][..], &[][..], 11, "c1@eth0 of network n"),
            (&["10.1.2.10"], &["10.1.2.10"], 11, "a device of this host"),
            (&["10.1.3.1"], &[], 7, "10.1.2.0/24, fd00::/64"),
            (&["10.1.2.0"], &[], 7, "10.1.2.0 that was asked for is none"),
            (&["10.1.2.255"], &[], 7, "10.1.2.255"),
            (&["10.1.2.7", "10.1.2.8"], &[], 2, "both of 10.1.2.0/24"),
        ] {
            let (got, text) = get(wanted, 3, used).expect_err(part);
            assert!(got == code && text.contains(part), "{got} {text}");
        }
        assert!(pool.held_by(&owner(3)).expect("list").is_empty());
    }
}
