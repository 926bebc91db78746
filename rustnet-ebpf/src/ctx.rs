//! The packet as a program sees it: the trait that steps are generic over, and its implementation for an skb.
//!
//! This is the one gate through which packet memory is reached: [`at`] proves the bounds that the verifier wants to see.

use aya_ebpf::Global;
use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::generated as helper;
use rustnet_common::csum::{self, Sum};

/// What a step may ask of a packet, whatever the hook's context is.
pub trait Ctx: Copy {
    /// The context itself, as helpers of several contexts take it.
    fn context(&self) -> *mut c_void;
    /// Address of the first byte.
    fn data(&self) -> usize;
    /// Address behind the last byte that can be read directly.
    fn data_end(&self) -> usize;
    /// Length of the whole frame.
    fn len(&self) -> u32;
    /// The interface the hook belongs to.
    fn ifindex(&self) -> u32;
    /// Makes the first `len` bytes readable and writable directly; all pointers are void afterwards.
    fn pull(&self, len: u32) -> bool;
    /// Copies `len` bytes (1 to 64) at `offset` of the packet to the beginning of `to`; false if they are not all there.
    fn load(&self, offset: u32, to: &mut [u8; 64], len: u32) -> bool;
    /// Payload of one segment when the frame stands for several (GSO), else 0.
    fn gso_size(&self) -> u32;
    /// Packets that a frame stands for, 0 or 1 for one that stands for itself.
    fn gso_segs(&self) -> u32;
}

/// What a step may ask of a packet that it changes.
pub trait Checksums: Ctx {
    /// Applies a difference to the L4 checksum at `offset`. `pseudo` says that the difference is of the pseudo header;
    /// `zero_is_none` that a checksum of 0 means "none" (UDP). All pointers are void afterwards.
    fn l4_csum_replace(&self, offset: usize, diff: Sum, pseudo: bool, zero_is_none: bool, v6: bool) -> bool;
    /// Applies the difference of ports, after [`Checksums::l4_csum_replace`] has applied that of addresses. `before` are the field before
    /// that, and that difference: nothing if there was none.
    fn ports_csum_replace(&self, offset: usize, before: (u16, Sum), diff: Sum, zero_is_none: bool) -> bool;
    /// Says that the packet's bytes changed by a difference that no checksum among them takes back. For devices that
    /// deliver a sum of the whole packet (`CHECKSUM_COMPLETE`): the receiver would report broken hardware.
    fn update_csum(&self, diff: Sum);
    /// Says what the packet's bytes sum up to now, from the IP header on.
    fn set_csum(&self, sum: Sum);
}

/// A pointer to a `T` at `offset`, if the packet reaches so far.
#[inline(always)]
pub fn at<T, C: Ctx>(ctx: &C, offset: usize) -> Option<*mut T> {
    let p = ctx.data() + offset;
    if p + size_of::<T>() > ctx.data_end() { None } else { Some(p as *mut T) }
}

/// As [`at`], but makes the bytes readable first where they lie in a page fragment.
#[inline(always)]
pub fn at_pulled<T, C: Ctx>(ctx: &C, offset: usize) -> Option<*mut T> {
    if let Some(p) = at(ctx, offset) {
        return Some(p);
    }
    if !ctx.pull((offset + size_of::<T>()) as u32) {
        return None;
    }
    at(ctx, offset)
}

/// The context of TC programs.
#[derive(Clone, Copy)]
pub struct Skb(pub *mut __sk_buff);

/// 1 where the kernel knows `BPF_F_IPV6` for `bpf_l4_csum_replace` (6.16 and later); set by the loader.
#[unsafe(no_mangle)]
pub static L4_CSUM_IPV6: Global<u32> = Global::new(0);

const BPF_F_PSEUDO_HDR: u64 = 0x10;
const BPF_F_MARK_MANGLED_0: u64 = 0x20;
const BPF_F_IPV6: u64 = 0x80;

/// Declares readers of `__sk_buff` fields.
macro_rules! fields {
    ($($(#[$doc:meta])* $name:ident;)+) => {
        $($(#[$doc])* #[inline(always)] pub fn $name(&self) -> u32 {
            // SAFETY: the kernel hands the program a valid context; the verifier rewrites this load.
            unsafe { (*self.0).$name }
        })+
    };
}

impl Skb {
    /// The interface that a forwarded packet came in by; 0 for a packet of this host.
    #[inline(always)]
    pub fn ingress_ifindex(&self) -> u32 {
        // SAFETY: valid context, see `fields`.
        unsafe { (*self.0).ingress_ifindex }
    }

    fields! {
        /// The packet's mark.
        mark;
        /// `skb->pkt_type`: PACKET_HOST, PACKET_OTHERHOST and so on.
        pkt_type;
        /// Non-zero if a VLAN tag was taken off by the device.
        vlan_present;
        /// That tag.
        vlan_tci;
    }

    /// Sets the mark.
    #[inline(always)]
    pub fn set_mark(&self, mark: u32) {
        // SAFETY: as in the readers; `mark` is writable in TC programs.
        unsafe { (*self.0).mark = mark }
    }

    /// Says that the packet is for this host, whatever its MAC.
    #[inline(always)]
    pub fn set_packet_host(&self) {
        const PACKET_HOST: u32 = 0;
        if self.pkt_type() != PACKET_HOST {
            // SAFETY: no pointers but the context. The only failure is a packet type that may not be changed.
            let _ = unsafe { helper::bpf_skb_change_type(self.0, PACKET_HOST) };
        }
    }

    /// The raw pointer as helpers take it.
    #[inline(always)]
    pub fn raw(&self) -> *mut __sk_buff {
        self.0
    }
}

impl Ctx for Skb {
    #[inline(always)]
    fn context(&self) -> *mut c_void {
        self.0.cast()
    }
    #[inline(always)]
    fn data(&self) -> usize {
        pointer::<{ core::mem::offset_of!(__sk_buff, data) }, _>(self.0)
    }
    #[inline(always)]
    fn data_end(&self) -> usize {
        pointer::<{ core::mem::offset_of!(__sk_buff, data_end) }, _>(self.0)
    }
    #[inline(always)]
    fn len(&self) -> u32 {
        // SAFETY: valid context, see `fields`.
        unsafe { (*self.0).len }
    }
    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: valid context, see `fields`.
        unsafe { (*self.0).ifindex }
    }
    #[inline(always)]
    fn gso_size(&self) -> u32 {
        // SAFETY: valid context, see `fields`.
        unsafe { (*self.0).gso_size }
    }
    #[inline(always)]
    fn gso_segs(&self) -> u32 {
        // SAFETY: valid context, see `fields`.
        unsafe { (*self.0).gso_segs }
    }
    #[inline(always)]
    fn pull(&self, len: u32) -> bool {
        // SAFETY: the helper checks the length against the packet.
        len <= self.len() && unsafe { helper::bpf_skb_pull_data(self.0, len) } == 0
    }
    #[inline(always)]
    fn load(&self, offset: u32, to: &mut [u8; 64], len: u32) -> bool {
        let len = masked::<63>(len.wrapping_sub(1) as usize) as u32 + 1;
        // SAFETY: `len` is at most the length of the array; the helper checks it against the packet.
        unsafe { helper::bpf_skb_load_bytes(self.0.cast(), offset, to.as_mut_ptr().cast(), len) == 0 }
    }
}

impl Checksums for Skb {
    #[inline(always)]
    fn l4_csum_replace(&self, offset: usize, diff: Sum, pseudo: bool, zero_is_none: bool, v6: bool) -> bool {
        let mut flags = 0;
        if pseudo {
            flags |= BPF_F_PSEUDO_HDR;
        }
        if zero_is_none {
            flags |= BPF_F_MARK_MANGLED_0;
        }
        // Without this flag the helper breaks CHECKSUM_COMPLETE for IPv6; kernels before 6.16 do not know it.
        if v6 && L4_CSUM_IPV6.load() != 0 {
            flags |= BPF_F_IPV6;
        }
        // SAFETY: the helper checks the offset against the packet. Size 0 in the flags means "`to` is a difference".
        unsafe { helper::bpf_l4_csum_replace(self.0, offset as u32, 0, u64::from(diff.fold32()), flags) == 0 }
    }
    // A second call of the helper costs more than the rest of a translation, and what the first one made of the field tells how the
    // checksum stands, which a program cannot ask for. It adds a difference to the sum of a pseudo header that a device will go on
    // from (`CHECKSUM_PARTIAL`), which has no ports, and takes it from a finished checksum.
    #[inline(always)]
    fn ports_csum_replace(
        &self,
        offset: usize,
        (before, addresses): (u16, Sum),
        diff: Sum,
        zero_is_none: bool,
    ) -> bool {
        if matches!(addresses.fold16(), 0 | u16::MAX) {
            // Nothing, added or taken.
            return self.l4_csum_replace(offset, diff, false, zero_is_none, false);
        }
        let Some(field) = at::<u16, _>(self, offset) else { return false };
        // SAFETY: `at` proved two bytes.
        let now = unsafe { field.read() };
        if Sum(addresses.0 + u64::from(before) + u64::from(!now)).fold16() != u16::MAX {
            let csum = csum::update(now, diff);
            // SAFETY: as above. Of UDP, 0 stands for "none", and all ones are the same number.
            unsafe { field.write(if zero_is_none && csum == 0 { u16::MAX } else { csum }) };
        }
        true
    }
    #[inline(always)]
    fn update_csum(&self, diff: Sum) {
        // SAFETY: no pointers but the context. Fails where the device delivered no sum, and then there is nothing to do.
        let _ = unsafe { helper::bpf_csum_update(self.0, diff.fold32()) };
    }
    #[inline(always)]
    fn set_csum(&self, sum: Sum) {
        // SAFETY: as above; a difference of nothing reads the sum.
        let now = unsafe { helper::bpf_csum_update(self.0, 0) };
        if now >= 0 {
            self.update_csum(sum.sub(now as u32));
        }
    }
}

/// Reads a 32-bit context field that the verifier turns into a 64-bit pointer.
///
/// By assembly, because the compiler sees a 32-bit load: joining two of them it truncates the result again, and the
/// verifier allows no shifts of pointers.
#[inline(always)]
pub fn pointer<const OFFSET: usize, T>(context: *mut T) -> usize {
    #[cfg(target_arch = "bpf")]
    {
        let out: u64;
        // SAFETY: a load from the context, which is valid.
        unsafe {
            core::arch::asm!("{out} = *(u32 *)({context} + {offset})", out = out(reg) out, context = in(reg) context,
                offset = const OFFSET, options(readonly, nostack, preserves_flags));
        }
        out as usize
    }
    // Type checks and lints run on the host.
    #[cfg(not(target_arch = "bpf"))]
    {
        // SAFETY: the offset is that of a 32-bit field.
        unsafe { context.byte_add(OFFSET).cast::<u32>().read() as usize }
    }
}

/// Bounds an offset into a packet to less than 512 for the verifier's eyes.
#[inline(always)]
pub fn bounded(offset: usize) -> usize {
    masked::<511>(offset)
}

/// Bounds a number by a mask for the verifier's eyes. By assembly, because the compiler takes a mask away as soon as it can
/// prove it needless, on grounds that the verifier cannot follow.
#[inline(always)]
pub fn masked<const MASK: u32>(number: usize) -> usize {
    #[cfg(target_arch = "bpf")]
    {
        let mut out = number as u64;
        // SAFETY: arithmetic on a register.
        unsafe {
            core::arch::asm!("{out} &= {mask}", mask = const MASK, out = inout(reg) out,
                options(pure, nomem, nostack, preserves_flags));
        }
        out as usize
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        number & MASK as usize
    }
}

/// Timer ticks, low 32 bits. Costs nothing, unlike the clocks.
#[inline(always)]
pub fn jiffies() -> u32 {
    // SAFETY: no arguments, no effects.
    unsafe { helper::bpf_jiffies64() as u32 }
}

/// A random number.
#[inline(always)]
pub fn random() -> u32 {
    // SAFETY: no arguments, no effects.
    unsafe { helper::bpf_get_prandom_u32() as u32 }
}

/// Returns the pointer as it is, in a way that the compiler cannot merge with another `N`.
#[inline(always)]
pub fn distinct<const N: u32, T>(pointer: *mut T) -> *mut T {
    #[cfg(target_arch = "bpf")]
    {
        let mut out = pointer as u64;
        // SAFETY: the register keeps its value.
        unsafe {
            if N == 0 {
                core::arch::asm!("{out} = {out}", out = inout(reg) out, options(pure, nomem, nostack, preserves_flags));
            } else {
                core::arch::asm!("{out} = {out}", "{out} = {out}", out = inout(reg) out,
                    options(pure, nomem, nostack, preserves_flags));
            }
        }
        out as *mut T
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        pointer
    }
}

/// Sets bits of a word that other CPUs write at the same time. By assembly: the compiler has no such operation for this target.
///
/// # Safety
/// `word` is an aligned word of a map's value.
#[inline(always)]
pub unsafe fn atomic_or(word: *mut u64, bits: u64) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: see above.
    unsafe {
        core::arch::asm!("lock *(u64 *)({word} + 0) |= {bits}", word = in(reg) word, bits = in(reg) bits,
            options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: see above.
    unsafe {
        *word |= bits;
    }
}

/// Adds to a word that other CPUs add to at the same time, and returns what it was before; see [`atomic_or`].
///
/// # Safety
/// As for [`atomic_or`].
#[inline(always)]
pub unsafe fn fetch_add(word: *mut u64, number: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let mut out = number;
        // SAFETY: see above.
        unsafe {
            core::arch::asm!("{out} = atomic_fetch_add((u64 *)({word} + 0), {out})", word = in(reg) word,
                out = inout(reg) out, options(nostack, preserves_flags));
        }
        out
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: see above.
    unsafe {
        let before = *word;
        *word = before.wrapping_add(number);
        before
    }
}

/// Clears the bits of a word that are 0 in `bits`; see [`atomic_or`].
///
/// # Safety
/// As for [`atomic_or`].
#[inline(always)]
pub unsafe fn atomic_and(word: *mut u64, bits: u64) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: see above.
    unsafe {
        core::arch::asm!("lock *(u64 *)({word} + 0) &= {bits}", word = in(reg) word, bits = in(reg) bits,
            options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: see above.
    unsafe {
        *word &= bits;
    }
}
