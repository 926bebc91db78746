//! What this kernel can do and how its clock runs, found out by trying.

use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context, Result, bail};
use aya::maps::MapType;
use aya::programs::ProgramType;
use aya::sys::{BpfHelper, is_helper_supported, is_map_supported, is_program_supported};
use nix::time::{ClockId, clock_getres};

use super::remedy;
use super::sys::{self, TestRun, instruction};

/// `BPF_F_IPV6` of `bpf_l4_csum_replace`.
const F_IPV6: u32 = 0x80;
/// `BPF_FUNC_l4_csum_replace`.
const L4_CSUM_REPLACE: u32 = 11;
/// `BPF_FUNC_skb_adjust_room`.
const SKB_ADJUST_ROOM: u32 = 50;
/// `BPF_F_ADJ_ROOM_DECAP_L3_IPV6`.
const DECAP_L3_IPV6: u32 = 1 << 8;

/// A program that returns what `bpf_l4_csum_replace(skb, 50, 0, 1, PSEUDO_HDR | F_IPV6)` says.
const fn csum_probe() -> [u64; 6] {
    const MOV_IMM: u8 = 0xb7;
    const CALL: u8 = 0x85;
    const EXIT: u8 = 0x95;
    const PSEUDO_HDR: u32 = 0x10;
    [
        instruction(MOV_IMM, 2, 0, 0, 50),
        instruction(MOV_IMM, 3, 0, 0, 0),
        instruction(MOV_IMM, 4, 0, 0, 1),
        instruction(MOV_IMM, 5, 0, 0, PSEUDO_HDR | F_IPV6),
        instruction(CALL, 0, 0, 0, L4_CSUM_REPLACE),
        instruction(EXIT, 0, 0, 0, 0),
    ]
}

/// True if `bpf_l4_csum_replace` knows `BPF_F_IPV6`, without which it spoils `skb->csum` of IPv6 packets under
/// CHECKSUM_COMPLETE. The fix was carried to old kernels, so the version says nothing.
pub fn l4_csum_ipv6() -> Result<bool> {
    Ok(run(&csum_probe())? == 0)
}

/// What a probe program returns for a packet of zeros.
fn run(code: &[u64]) -> Result<i32> {
    let prog = sys::prog_load_sched_cls("rn_probe", code)
        .map_err(|e| anyhow::anyhow!("loading a probe program: {e}: {}", remedy(&e)))?;
    let ran = sys::test_run(prog.as_fd(), TestRun { packet: &[0; 128], ..TestRun::default() });
    Ok(ran.context("running a probe program")?.verdict.cast_signed())
}

/// A program that asks for less room in front of a packet that has no IP header: `-EINVAL` for a flag that the kernel does not
/// know, another error for one that it knows.
const fn decap_probe() -> [u64; 5] {
    const MOV_IMM: u8 = 0xb7;
    const CALL: u8 = 0x85;
    const EXIT: u8 = 0x95;
    [
        instruction(MOV_IMM, 2, 0, 0, 0xffff_ffec),
        instruction(MOV_IMM, 3, 0, 0, 1),
        instruction(MOV_IMM, 4, 0, 0, DECAP_L3_IPV6),
        instruction(CALL, 0, 0, 0, SKB_ADJUST_ROOM),
        instruction(EXIT, 0, 0, 0, 0),
    ]
}

/// True if `bpf_skb_adjust_room` knows `BPF_F_ADJ_ROOM_DECAP_L3_IPV6` (kernel 6.3): an overlay packet of one family can lose headers of
/// the other.
pub fn decap_l3() -> Result<bool> {
    Ok(run(&decap_probe())? != -libc::EINVAL)
}

/// Timer ticks in a second, the unit of `seen` in the connection table.
pub fn hz() -> Result<u32> {
    // The coarse clock advances once a tick, and says so as its resolution.
    let tick = clock_getres(ClockId::CLOCK_MONOTONIC_COARSE).context("asking for the length of a timer tick")?;
    hz_of_tick(tick.tv_sec(), tick.tv_nsec())
}

fn hz_of_tick(seconds: i64, nanoseconds: i64) -> Result<u32> {
    let tick = u64::try_from(seconds * 1_000_000_000 + nanoseconds).unwrap_or(0);
    if !(100_000..=100_000_000).contains(&tick) {
        bail!("the kernel says that a timer tick lasts {tick} ns, which cannot be");
    }
    Ok(((1_000_000_000 + tick / 2) / tick) as u32)
}

/// The low 31 bits of jiffies, by the `clock` program.
pub fn jiffies(clock: BorrowedFd<'_>) -> Result<u32> {
    let ran = sys::test_run(clock, TestRun { packet: &[0; 64], ..TestRun::default() });
    Ok(ran.context("reading jiffies with the clock program")?.verdict)
}

/// Ticks since `seen` (32 bits of jiffies), given the low 31 bits of now. What was seen after `now` was read is 0 old.
pub fn age(now: u32, seen: u32) -> u32 {
    const MASK: u32 = 0x7fff_ffff;
    let ticks = now.wrapping_sub(seen) & MASK;
    if ticks > MASK / 2 { 0 } else { ticks }
}

/// `CAP_SYS_ADMIN`.
const SYS_ADMIN: u32 = 21;

/// The capabilities among those that the agent needs which are not in `effective`.
pub fn missing_capabilities(effective: u64) -> Vec<&'static str> {
    const NET_ADMIN: u32 = 12;
    const PERFMON: u32 = 38;
    const BPF: u32 = 39;
    let has = |bit: u32| effective & (1 << bit) != 0;
    let wanted = [
        ("CAP_NET_ADMIN", has(NET_ADMIN)),
        ("CAP_BPF", has(BPF) || has(SYS_ADMIN)),
        ("CAP_PERFMON", has(PERFMON) || has(SYS_ADMIN)),
    ];
    wanted.iter().filter(|w| !w.1).map(|w| w.0).collect()
}

/// True if these capabilities let a process enter another network namespace.
pub fn may_enter_namespaces(effective: u64) -> bool {
    effective & (1 << SYS_ADMIN) != 0
}

/// What to do about missing capabilities.
pub const RIGHTS_REMEDY: &str =
    "run it as root, or add them to the container's securityContext.capabilities (see deploy/)";

/// The effective capabilities of this thread, a bit each.
pub fn effective_capabilities() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/thread-self/status").context("reading this process's capabilities")?;
    let effective = status.lines().find_map(|l| l.strip_prefix("CapEff:")).map(str::trim);
    effective.and_then(|hex| u64::from_str_radix(hex, 16).ok()).context("no CapEff in /proc status")
}

/// Fails by name of what is missing when this process may not load programs.
pub fn check_rights() -> Result<()> {
    let missing = missing_capabilities(effective_capabilities()?);
    anyhow::ensure!(missing.is_empty(), "this process lacks {}: {RIGHTS_REMEDY}", missing.join(", "));
    Ok(())
}

/// The oldest kernel that has all that the programs call: the near end in `struct bpf_tunnel_key` came with it.
pub const OLDEST_KERNEL: (u32, u32) = (6, 0);
/// The oldest kernel that rustnet was tried on; see docs/kernels.md.
pub const OLDEST_TRIED_KERNEL: (u32, u32) = (6, 1);

/// Major and minor version out of a kernel's release, such as `6.18.44-cloud`.
pub fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// What this kernel calls itself.
pub fn release() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned()
}

/// What to say of a kernel of this release if it is older than any that has what the programs call.
pub fn too_old(release: &str) -> Option<String> {
    let (major, minor) = OLDEST_KERNEL;
    let old = version(release)? < OLDEST_KERNEL;
    old.then(|| format!("kernel {release} is older than {major}.{minor}, which rustnet needs: boot a newer one"))
}

/// What the programs need and this kernel lacks: program type, map types, helpers. Each is tried.
pub fn missing_features() -> Result<Vec<String>> {
    let classifier = ProgramType::SchedClassifier;
    if !is_program_supported(classifier).context("trying classifiers")? {
        return Ok(vec!["classifiers (CONFIG_NET_CLS_BPF)".to_owned()]);
    }
    let maps = [
        ("hash", MapType::Hash),
        ("LRU hash", MapType::LruHash),
        ("LPM trie", MapType::LpmTrie),
        ("array", MapType::Array),
        ("per-CPU array", MapType::PerCpuArray),
        ("ring buffer", MapType::RingBuf),
    ];
    let helpers = [
        ("bpf_fib_lookup", BpfHelper::BPF_FUNC_fib_lookup),
        ("bpf_jiffies64", BpfHelper::BPF_FUNC_jiffies64),
        ("bpf_loop", BpfHelper::BPF_FUNC_loop),
        ("bpf_redirect_neigh", BpfHelper::BPF_FUNC_redirect_neigh),
        ("bpf_redirect_peer", BpfHelper::BPF_FUNC_redirect_peer),
        ("bpf_ringbuf_reserve", BpfHelper::BPF_FUNC_ringbuf_reserve),
        ("bpf_skb_adjust_room", BpfHelper::BPF_FUNC_skb_adjust_room),
        ("bpf_skb_change_tail", BpfHelper::BPF_FUNC_skb_change_tail),
        ("bpf_skb_set_tunnel_key", BpfHelper::BPF_FUNC_skb_set_tunnel_key),
    ];
    let mut missing = Vec::new();
    for (name, kind) in maps {
        if !is_map_supported(kind).with_context(|| format!("trying a {name} map"))? {
            missing.push(format!("{name} maps"));
        }
    }
    for (name, helper) in helpers {
        if !is_helper_supported(classifier, helper).with_context(|| format!("trying {name}"))? {
            missing.push(name.to_owned());
        }
    }
    Ok(missing)
}

/// True if this kernel has TCX. Without it, classifiers on a clsact qdisc do the same.
pub fn has_tcx() -> Result<bool> {
    let prog = sys::prog_load_sched_cls("rn_probe", &csum_probe())
        .map_err(|e| anyhow::anyhow!("loading a probe program: {e}: {}", remedy(&e)))?;
    // No device has this index: a kernel that knows TCX looks for it, another one refuses before.
    match sys::link_create_tcx(prog.as_fd(), u32::MAX >> 1, sys::TCX_INGRESS) {
        Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(false),
        Err(e) => bail!("trying TCX: {e}: {}", remedy(&e)),
        Ok(_) => Ok(true),
    }
}

#[cfg(test)]
mod tests {
    use super::{
        age, decap_l3, effective_capabilities, has_tcx, hz, hz_of_tick, l4_csum_ipv6, missing_capabilities,
        missing_features, too_old, version,
    };

    #[test]
    fn ticks_of_all_usual_kernels() {
        assert_eq!(hz_of_tick(0, 1_000_000).unwrap(), 1000);
        assert_eq!(hz_of_tick(0, 3_333_333).unwrap(), 300);
        assert_eq!(hz_of_tick(0, 4_000_000).unwrap(), 250);
        assert_eq!(hz_of_tick(0, 10_000_000).unwrap(), 100);
        assert!(hz_of_tick(0, 1).is_err());
        assert!([100, 250, 300, 1000].contains(&hz().unwrap()));
    }

    #[test]
    fn age_counts_across_the_wrap_and_never_below_zero() {
        assert_eq!(age(100, 40), 60);
        assert_eq!(age(5, 0xffff_fffb), 10);
        assert_eq!(age(5, 0x7fff_fffb), 10);
        assert_eq!(age(5, 6), 0);
        // `seen` has bit 31, the clock has not.
        assert_eq!(age(10, 0x8000_0004), 6);
    }

    #[test]
    fn rights_are_named() {
        assert!(missing_capabilities(1 << 12 | 1 << 21).is_empty());
        assert!(missing_capabilities(1 << 12 | 1 << 38 | 1 << 39).is_empty());
        assert_eq!(missing_capabilities(1 << 39), ["CAP_NET_ADMIN", "CAP_PERFMON"]);
        assert_eq!(missing_capabilities(effective_capabilities().unwrap()), Vec::<&str>::new(), "tests run as root");
    }

    #[test]
    fn this_kernel_is_found_good() {
        assert_eq!(missing_features().unwrap(), Vec::<String>::new());
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        assert_eq!(has_tcx().unwrap(), version(&release).unwrap() >= (6, 6), "TCX came with 6.6");
        assert_eq!(decap_l3().unwrap(), version(&release).unwrap() >= (6, 3), "the flag came with 6.3");
    }

    #[test]
    fn old_kernels_are_named() {
        assert_eq!(too_old("6.0.0"), None);
        assert_eq!(too_old(""), None);
        assert!(too_old("5.10.0-32").unwrap().contains("kernel 5.10.0-32 is older than 6.0"));
    }

    #[test]
    fn versions_of_all_distributions() {
        for (release, want) in [("6.18.44-fc-v595\n", Some((6, 18))), ("5.17-rc1", Some((5, 17))), ("nonsense", None)] {
            assert_eq!(version(release), want, "{release}");
        }
    }

    #[test]
    fn the_checksum_probe_runs() {
        l4_csum_ipv6().unwrap();
    }
}
