//! Network policies. Contract: says whether a flow may pass, by look-ups in the maps of policies and of pods alone. A flow is judged
//! when it opens, and again when policies have changed since. See [`rustnet_common::policy`].

use aya_ebpf::btf_maps::lpm_trie::Key;
use rustnet_common::addr::{Addr, Address};
use rustnet_common::conntrack::flags;
use rustnet_common::drop::DropReason;
use rustnet_common::policy::{self, ALLOW, ANY_CLASS, AUDIT, FULL, OPEN, PolicyMatch};
use rustnet_common::tuple::Tuple;

use crate::family::Family;
use crate::maps;
use crate::packet::{Flow, Packet};

/// Flows that no policy judges: those of the node itself to its pods, and of a pod to itself.
const EXEMPT: u16 = flags::FROM_HOST | flags::HAIRPIN;

/// The set of a pod that no policy has been applied to yet.
const UNDECIDED: u32 = u32::MAX;

/// Number of the changes of policies so far; see [`policy::Policies::generation`].
#[inline(always)]
pub fn generation() -> u32 {
    maps::rn_policy.get(0).map_or(0, |policies| policies.generation)
}

/// Refuses a new flow that policies do not allow; returns their generation. Fills in whether the flow is audited.
#[inline(always)]
pub fn judge<F: Family>(p: &Packet<F::A>, flow: &mut Flow<F::A>) -> Result<u32, DropReason> {
    // Read first: what changes from here on has the flow judged again.
    let generation = generation();
    let to = &flow.to.tuple;
    flow.is_audited = verify(p.tuple.src, to.dst, to.dport, p.tuple.proto, flow.flags)?;
    Ok(generation)
}

/// Refuses a flow that policies do not allow. `server` is what the client asks for, after its translation. The result is true if they
/// deny it in a namespace that is audited.
#[inline(always)]
pub fn verify<A: Address>(client: A, server: A, port: u16, proto: u8, flow_flags: u16) -> Result<bool, DropReason> {
    if flow_flags & EXEMPT != 0 {
        return Ok(false);
    }
    let ((high, low), (high2, low2)) = (client.to_addr().halves(), server.to_addr().halves());
    match rn_policy_judge(high, low, high2, low2, u32::from(proto) << 16 | u32::from(port)) {
        ALLOWED => Ok(false),
        AUDITED => Ok(true),
        DENIED => Err(DropReason::PolicyDenied),
        _ => Err(DropReason::PolicyUndecided),
    }
}

/// The same of a flow that has an entry with this `to` and these flags. `tuple` is that of a packet which the entry serves.
#[inline(always)]
pub fn verify_known<A: Address>(tuple: &Tuple<A>, to: &Tuple<A>, flow_flags: u16) -> Result<bool, DropReason> {
    let (client, server, port) = match flow_flags & (flags::NAT | flags::REPLY) {
        flags::NAT => (tuple.src, to.dst, to.dport),
        NAT_REPLY => (to.dst, tuple.src, tuple.sport),
        _ => (to.src, to.dst, to.dport),
    };
    verify(client, server, port, to.proto, flow_flags)
}

const NAT_REPLY: u16 = flags::NAT | flags::REPLY;

/// Results of [`rn_policy_judge`].
const ALLOWED: u32 = 0;
const DENIED: u32 = 1;
const NOT_DECIDED: u32 = 2;
const AUDITED: u32 = 3;

/// Judges a flow. `to`: the protocol in the upper half, then the server's port. A function with global linkage, for the reason that the
/// parser is one; both families share it, and those below.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn rn_policy_judge(client_high: u64, client_low: u64, server_high: u64, server_low: u64, to: u32) -> u32 {
    if maps::rn_policy.get(0).is_none_or(|policies| policies.flags & policy::flags::ENFORCED == 0) {
        return ALLOWED;
    }
    let client = Side::unpack(rn_policy_side(client_high, client_low, 0));
    let server = Side::unpack(rn_policy_side(server_high, server_low, 1));
    if client.set == UNDECIDED || server.set == UNDECIDED {
        return NOT_DECIDED;
    }
    let (out, into) = (rn_policy_find(client.set, server.class, to), rn_policy_find(server.set, client.class, to));
    if out & into & ALLOW == 0 {
        return DENIED;
    }
    if (out | into) & AUDIT != 0 { AUDITED } else { ALLOWED }
}

/// What policies say of one side of a flow.
struct Side {
    class: u32,
    /// Its set of the flow's direction.
    set: u32,
}

impl Side {
    #[inline(always)]
    fn pack(&self) -> u64 {
        u64::from(self.set) << 32 | u64::from(self.class)
    }

    #[inline(always)]
    fn unpack(bits: u64) -> Self {
        Self { class: bits as u32, set: (bits >> 32) as u32 }
    }
}

/// Finds a [`Side`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn rn_policy_side(high: u64, low: u64, is_server: u32) -> u64 {
    let addr = Addr::from_halves(high, low);
    // SAFETY: map values stay valid for this run of the program.
    let ifindex = maps::rn_endpoints.get_ptr(&addr).map_or(0, |endpoint| unsafe { (*endpoint).ifindex });
    if let Some(pod) = maps::rn_policy_pods.get_ptr(&addr) {
        // SAFETY: as above.
        let pod = unsafe { &*pod };
        // What another pod with the address was allowed says nothing of this one.
        if pod.ifindex == ifindex {
            let set = if is_server != 0 { pod.ingress } else { pod.egress };
            return Side { class: pod.class, set }.pack();
        }
    }
    if ifindex != 0 {
        return Side { class: ANY_CLASS, set: UNDECIDED }.pack();
    }
    let class = maps::rn_policy_cidrs.get(&Key::new(128, addr)).copied().unwrap_or(ANY_CLASS);
    Side { class, set: OPEN }.pack()
}

/// What a set says of flows whose other side has the class: [`policy::PolicyRule::flags`]. `to`: see [`rn_policy_judge`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn rn_policy_find(set: u32, class: u32, to: u32) -> u32 {
    if set == OPEN {
        return ALLOW;
    }
    let port = [(to >> 8) as u8, to as u8];
    let mut key = Key::new(FULL, PolicyMatch { set, class, proto: (to >> 16) as u8, pad: 0, port });
    let mut rule = maps::rn_policy_rules.get(&key);
    if rule.is_none() && class != ANY_CLASS {
        key.data.class = ANY_CLASS;
        rule = maps::rn_policy_rules.get(&key);
    }
    rule.map_or(0, |rule| rule.flags)
}
