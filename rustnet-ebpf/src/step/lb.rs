//! Service load-balancing. Contract: returns the backend of a flow, or the reason why it gets none. The choice depends on the
//! flow's hash alone, so that every node, and this one after an eviction, chooses alike; and, with session affinity, on the backend
//! that the client had before. Before that, a load balancer's address asks who the client is.

use aya_ebpf::btf_maps::lpm_trie::Key;
use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::generated as helper;
use rustnet_common::addr::{Addr, Address, Ip4};
use rustnet_common::affinity::{Affinity, AffinityKey};
use rustnet_common::backend::{Backend, id};
use rustnet_common::conntrack::elapsed;
use rustnet_common::drop::DropReason;
use rustnet_common::service::{SvcEntry, SvcKey, flags, scope};
use rustnet_common::source_range::{self, SourceRange};
use rustnet_common::tuple::Tuple;
use rustnet_common::{hash, maglev, peer};

use crate::ctx::jiffies;
use crate::family::{Family, V4, V6};
use crate::maps;

/// The wildcard entry of a VIP.
#[inline(always)]
fn wildcard<F: Family>(vip: F::A, scope: u8) -> Option<*const SvcEntry> {
    F::services().get_ptr(SvcKey { vip, port: 0, proto: 0, scope })
}

/// True if the address is a VIP of ours, whatever the port.
#[inline(always)]
pub fn is_vip<F: Family>(addr: F::A) -> bool {
    wildcard::<F>(addr, scope::CLUSTER).is_some()
}

/// What an address is to Services.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Vip {
    /// Nothing.
    None = 0,
    /// A VIP, whatever the port.
    Assigned = 1,
    /// One of a service range that no Service has: nobody else has it, and routers would send its packets back here.
    Unassigned = 2,
}

/// Finds what an address is to Services.
#[inline(always)]
pub fn find_vip<A: Address>(addr: A) -> Vip {
    let (high, low) = addr.to_addr().halves();
    match rn_vip(high, low) {
        0 => Vip::None,
        1 => Vip::Assigned,
        _ => Vip::Unassigned,
    }
}

/// A [`Vip`]. A function with global linkage, which both families share: the verifier looks at it once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn rn_vip(high: u64, low: u64) -> u32 {
    let addr = Addr::from_halves(high, low);
    (if addr.is_v4() { find::<V4>(Ip4::from_addr(addr)) } else { find::<V6>(addr) }) as u32
}

#[inline(always)]
fn find<F: Family>(addr: F::A) -> Vip {
    // First, for a load balancer's address may lie in a service range, too.
    if is_vip::<F>(addr) {
        return Vip::Assigned;
    }
    match F::peer(addr) {
        Some(peer) if peer.flags & peer::flags::SERVICES != 0 => Vip::Unassigned,
        _ => Vip::None,
    }
}

/// True if the address is a VIP that no machine outside can have.
#[inline(always)]
pub fn is_cluster_ip<F: Family>(addr: F::A) -> bool {
    refuses_ports::<F>(addr, scope::CLUSTER)
}

/// True if the ports of an address that no Service has are refused to clients of a [`scope`]. For pods and the host, a load balancer
/// may have such a port: the API server's, for example. What it sends back here comes from outside, where there are none.
#[inline(always)]
fn refuses_ports<F: Family>(vip: F::A, scope: u8) -> bool {
    // SAFETY: a map value stays readable for this run of the program.
    wildcard::<F>(vip, scope).is_some_and(|entry| unsafe { (*entry).flags } & flags::SHARED == 0)
}

/// True if a flow from outside asks for a Service that clients outside may have, whatever the port of a VIP.
#[inline(always)]
pub fn is_external<F: Family>(t: &Tuple<F::A>) -> bool {
    let key = SvcKey { vip: t.dst, port: t.dport, proto: t.proto, scope: scope::EXTERNAL };
    F::services().get_ptr(key).is_some() || wildcard::<F>(t.dst, scope::EXTERNAL).is_some()
}

/// True if an address is a Service's for clients outside, on all nodes alike. That of a node is not, whatever ports of it are.
#[inline(always)]
pub fn is_external_vip<F: Family>(addr: F::A) -> bool {
    wildcard::<F>(addr, scope::EXTERNAL).is_some()
}

/// True if backends on other nodes are to answer directly the clients outside that ask for this.
#[inline(always)]
pub fn is_direct<F: Family>(t: &Tuple<F::A>) -> bool {
    let key = SvcKey { vip: t.dst, port: t.dport, proto: t.proto, scope: scope::EXTERNAL };
    // SAFETY: a map value stays readable for this run of the program.
    F::services().get_ptr(key).is_some_and(|entry| unsafe { (*entry).flags } & flags::DIRECT != 0)
}

/// The backend with the address `pod` of what a client outside has asked another node for. `vip`: where this node has that frontend, a
/// node port at an address of its own.
///
/// That node has chosen, by the hash as a rule: then this node's first guess is right. By session affinity, or while the two know other
/// endpoints, it has chosen another one, which is searched.
#[inline(always)]
pub fn select_at<F: Family>(t: &Tuple<F::A>, vip: F::A, pod: Addr, seed: u32) -> Result<&'static Backend, DropReason> {
    let key = SvcKey { vip, port: t.dport, proto: t.proto, scope: scope::EXTERNAL };
    let Some(entry) = F::services().get_ptr(key) else { return Err(DropReason::NoDirectBackend) };
    // SAFETY: as in `select_for`.
    let (first, count, service, svc_flags, table) =
        unsafe { ((*entry).first, (*entry).count, (*entry).id, (*entry).flags, (*entry).table) };
    if svc_flags & flags::SOURCE_RANGES != 0 && !is_allowed(t) {
        return Err(DropReason::NotInSourceRange);
    }
    if count == 0 {
        return Err(DropReason::NoDirectBackend);
    }
    let (high, low) = pod.halves();
    let mut search = Search { high, low, first, service, found: 0, pad: 0 };
    let guess = first.wrapping_add(rn_ordinal(hash::flow(t, seed), count, u32::from(table)));
    search.found = search.at(guess);
    if search.found == 0 {
        // SAFETY: the callback has the signature that the helper wants, and `search` outlives the call.
        unsafe { helper::bpf_loop(count, try_backend as *mut c_void, (&raw mut search).cast(), 0) };
    }
    backend(search.found).filter(|b| b.service == service).ok_or(DropReason::NoDirectBackend)
}

/// A search for the backend of a service that has an address.
#[repr(C)]
struct Search {
    high: u64,
    low: u64,
    /// Index of the first id.
    first: u32,
    service: u32,
    /// The id, once it is found.
    found: u32,
    pad: u32,
}

impl Search {
    /// The id at an index of `rn_backend_ids`, if it is that of the backend; else 0.
    #[inline(always)]
    fn at(&self, index: u32) -> u32 {
        let id = maps::rn_backend_ids.get(index).copied().unwrap_or(0);
        let is_it = |b: &Backend| b.service == self.service && b.addr.halves() == (self.high, self.low);
        if backend(id).is_some_and(is_it) { id } else { 0 }
    }
}

/// One round of a [`Search`]: `bpf_loop` calls it until it returns 1. The verifier checks it once.
extern "C" fn try_backend(round: u32, search: *mut c_void) -> u64 {
    // SAFETY: `select_at` passes a pointer to its own variable.
    let search = unsafe { &mut *search.cast::<Search>() };
    search.found = search.at(search.first.wrapping_add(round));
    u64::from(search.found != 0)
}

/// True if a flow asks for a port that a VIP has.
#[inline(always)]
pub fn is_service<F: Family>(t: &Tuple<F::A>) -> bool {
    flags_of::<F>(t).is_some()
}

/// The flags of the entry that a flow asks for.
#[inline(always)]
pub fn flags_of<F: Family>(t: &Tuple<F::A>) -> Option<u16> {
    let key = SvcKey { vip: t.dst, port: t.dport, proto: t.proto, scope: scope::CLUSTER };
    // SAFETY: a map value stays readable for this run of the program.
    F::services().get_ptr(key).map(|entry| unsafe { (*entry).flags })
}

/// True if flows to the backend of this id go on.
#[inline(always)]
pub fn is_serving(backend_id: u32) -> bool {
    serving(backend_id).is_some()
}

/// The opposite, by a function with global linkage: the verifier looks at it once.
#[inline(always)]
pub fn has_ended(backend_id: u32) -> bool {
    rn_ended(backend_id) != 0
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn rn_ended(backend_id: u32) -> u32 {
    u32::from(!is_serving(backend_id))
}

/// The backend with this id, while flows to it go on.
#[inline(always)]
fn serving(backend_id: u32) -> Option<&'static Backend> {
    maps::rn_backends_v2.get(id::slot_of(backend_id)).filter(|b| b.serves(backend_id))
}

/// The backend with this id, for new flows. One that has ended a moment ago may still answer, and no other has been read.
#[inline(always)]
fn backend(backend_id: u32) -> Option<&'static Backend> {
    let b = maps::rn_backends_v2.get(id::slot_of(backend_id))?;
    if b.id == backend_id && backend_id != 0 { Some(b) } else { None }
}

/// The backend with this id, while the entry that clients of a [`scope`] ask for leads to it.
#[inline(always)]
pub fn kept<F: Family>(vip: F::A, port: u16, proto: u8, scope: u8, backend_id: u32) -> Option<&'static Backend> {
    let entry = F::services().get_ptr(SvcKey { vip, port, proto, scope })?;
    // SAFETY: a map value stays readable for this run of the program.
    let service = unsafe { (*entry).id };
    serving(backend_id).filter(|b| b.service == service)
}

/// Chooses the backend of a new flow by its hash, for clients of a [`scope`]; `None` if it asks for no service.
#[inline(always)]
pub fn select<F: Family>(t: &Tuple<F::A>, scope: u8, seed: u32) -> Result<Option<&'static Backend>, DropReason> {
    select_for::<F>(t, scope, || hash::flow(t, seed), || t.src.to_addr().halves())
}

/// As [`select`], by the hash and for the client that these return. The tuple's source counts only for an entry that asks who may come.
#[inline(always)]
pub fn select_for<F: Family>(
    t: &Tuple<F::A>,
    scope: u8,
    hash: impl FnOnce() -> u32,
    client: impl FnOnce() -> (u64, u64),
) -> Result<Option<&'static Backend>, DropReason> {
    let key = SvcKey { vip: t.dst, port: t.dport, proto: t.proto, scope };
    let Some(entry) = F::services().get_ptr(key) else {
        return if refuses_ports::<F>(t.dst, scope) { Err(DropReason::NoServicePort) } else { Ok(None) };
    };
    // SAFETY: the entry lies in a map, whose memory stays mapped for this run. User space may
    // replace the entry, and the kernel may give its memory to another key at once: the backend's
    // service, compared below, shows that.
    let (first, count, service, svc_flags, affinity, table) =
        unsafe { ((*entry).first, (*entry).count, (*entry).id, (*entry).flags, (*entry).affinity, (*entry).table) };
    if svc_flags & flags::SOURCE_RANGES != 0 && !is_allowed(t) {
        return Err(DropReason::NotInSourceRange);
    }
    if count == 0 {
        return Err(if svc_flags & flags::DROP_EMPTY != 0 {
            DropReason::NoLocalBackend
        } else {
            DropReason::NoBackend
        });
    }
    let index = first.wrapping_add(rn_ordinal(hash(), count, u32::from(table)));
    let chosen = maps::rn_backend_ids.get(index).copied();
    let chosen = match chosen {
        Some(chosen) if affinity != 0 => {
            let (high, low) = client();
            Some(rn_affine(high, low, service, affinity, chosen))
        }
        chosen => chosen,
    };
    match chosen.and_then(backend) {
        Some(b) if b.service == service => Ok(Some(b)),
        _ => Err(DropReason::BackendLookupFailed),
    }
}

/// Which of a set's `count` backends a hash leads to: by its Maglev table, if it has one. Whatever is damaged there, one of them. A
/// function with global linkage: the verifier looks at it once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn rn_ordinal(hash: u32, count: u32, table: u32) -> u32 {
    let found = if table == 0 { None } else { look_up(table as u16, hash) };
    found.filter(|ordinal| *ordinal < count).unwrap_or_else(|| hash::pick(hash, count))
}

/// The ordinal in the place of a table that a hash leads to.
#[inline(always)]
fn look_up(table: u16, hash: u32) -> Option<u32> {
    let size = maps::rn_maglev.get(maglev::head(table)).map(|size| *size as u32).filter(|size| *size != 0)?;
    let (word, bits) = maglev::place(table, size, hash);
    maps::rn_maglev.get(word).map(|word| maglev::ordinal(*word, bits))
}

/// True if the client of a flow is in one of the ranges that the Service's entry is for.
#[inline(always)]
fn is_allowed<A: Address>(t: &Tuple<A>) -> bool {
    if t.src == A::UNSPECIFIED {
        // A socket that has no address yet: its packets are asked.
        return false;
    }
    let ((client_high, client_low), (high, low)) = (t.src.to_addr().halves(), t.dst.to_addr().halves());
    rn_allowed(client_high, client_low, high, low, u32::from(t.dport) << 8 | u32::from(t.proto)) != 0
}

/// The id of the backend that a client of a service has, which is the `chosen` one if it has none; the client has it for `seconds`
/// from now. A function with global linkage, which both families share: the verifier looks at it once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn rn_affine(high: u64, low: u64, service: u32, seconds: u32, chosen: u32) -> u32 {
    let key = AffinityKey { client: Addr::from_halves(high, low), service };
    let Some(config) = maps::config() else { return chosen };
    let now = jiffies();
    let kept = maps::rn_affinity.get_ptr(key).map_or(0, |known| {
        // SAFETY: a map value stays readable for this run of the program.
        let Affinity { backend, seen } = unsafe { known.read() };
        if elapsed(now, seen) < seconds.wrapping_mul(config.hz) { backend } else { 0 }
    });
    let kept = if serving(kept).is_some_and(|b| b.service == service) { kept } else { chosen };
    // A full table only costs the client its backend; the LRU makes room for the next.
    let _ = maps::rn_affinity.insert(key, Affinity { backend: kept, seen: now }, 0);
    kept
}

/// 1 for a client that an entry's ranges have, else 0. `port`: that of the entry, and its protocol in the low 8 bits. A function with
/// global linkage for the same reason.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn rn_allowed(client_high: u64, client_low: u64, vip_high: u64, vip_low: u64, port: u32) -> u32 {
    let (vip, client) = (Addr::from_halves(vip_high, vip_low), Addr::from_halves(client_high, client_low));
    let asked = SourceRange { vip, port: (port >> 8) as u16, proto: port as u8, pad: 0, client };
    u32::from(maps::rn_source_ranges.get(&Key::new(source_range::FULL, asked)).is_some())
}
