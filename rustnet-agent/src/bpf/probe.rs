//! What this kernel can do and how its clock runs, found out by trying.

use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context, Result, bail};
use nix::time::{ClockId, clock_getres};

use super::remedy;
use super::sys::{self, TestRun, instruction};

/// `BPF_F_IPV6` of `bpf_l4_csum_replace`.
const F_IPV6: u32 = 0x80;
/// `BPF_FUNC_l4_csum_replace`.
const L4_CSUM_REPLACE: u32 = 11;

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
    let prog = sys::prog_load_sched_cls("rn_probe", &csum_probe())
        .map_err(|e| anyhow::anyhow!("loading a probe program: {e}: {}", remedy(&e)))?;
    let ran = sys::test_run(prog.as_fd(), TestRun { packet: &[0; 128], ..TestRun::default() });
    Ok(ran.context("running a probe program")?.verdict == 0)
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

/// The message for a kernel refusing the object altogether, by the rights that are missing.
pub fn missing_rights(effective: u64) -> Option<String> {
    const NET_ADMIN: u32 = 12;
    const SYS_ADMIN: u32 = 21;
    const PERFMON: u32 = 38;
    const BPF: u32 = 39;
    let has = |bit: u32| effective & (1 << bit) != 0;
    let wanted = [
        ("CAP_NET_ADMIN", has(NET_ADMIN)),
        ("CAP_BPF", has(BPF) || has(SYS_ADMIN)),
        ("CAP_PERFMON", has(PERFMON) || has(SYS_ADMIN)),
    ];
    let missing: Vec<_> = wanted.iter().filter(|w| !w.1).map(|w| w.0).collect();
    (!missing.is_empty()).then(|| {
        format!(
            "this process lacks {}: run it as root, or add them to the container's securityContext.capabilities (see deploy/)",
            missing.join(", ")
        )
    })
}

/// Fails by name of what is missing when this process may not load programs.
pub fn check_rights() -> Result<()> {
    let status = std::fs::read_to_string("/proc/thread-self/status").context("reading this process's capabilities")?;
    let effective = status.lines().find_map(|l| l.strip_prefix("CapEff:")).map(str::trim);
    let effective = effective.and_then(|hex| u64::from_str_radix(hex, 16).ok()).context("no CapEff in /proc status")?;
    missing_rights(effective).map_or(Ok(()), |message| bail!(message))
}

#[cfg(test)]
mod tests {
    use super::{age, hz, hz_of_tick, l4_csum_ipv6, missing_rights};

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
        assert_eq!(missing_rights(1 << 12 | 1 << 21), None);
        assert_eq!(missing_rights(1 << 12 | 1 << 38 | 1 << 39), None);
        let text = missing_rights(1 << 39).unwrap();
        assert!(text.contains("CAP_NET_ADMIN") && text.contains("CAP_PERFMON") && !text.contains("CAP_BPF,"), "{text}");
    }

    #[test]
    fn the_checksum_probe_runs() {
        l4_csum_ipv6().unwrap();
    }
}
