//! Rejections. Contract: from the reason why a packet goes no further to the answer that its sender gets, if it gets one. An ICMP
//! error, a later fragment and a reset never get one (RFC 1122, 3.2.2; RFC 4443, 2.4). ICMP errors are limited.

use aya_ebpf::bindings::TC_ACT_SHOT;
use rustnet_common::addr::Address;
use rustnet_common::config::flags;
use rustnet_common::drop::DropReason;
use rustnet_common::tuple::proto;

use super::exec::{self, ReplyPath};
use crate::ctx::Skb;
use crate::limit::{self, Bucket};
use crate::maps;
use crate::outcome::Dropped;
use crate::packet::Kind;
use crate::parse::{self, Parse};
use crate::rewrite::{self, BuildHeader};
use crate::wire::tcp;

/// What this step asks of a family.
pub trait Rejecting: Parse<Skb, Header: BuildHeader<Self::A>> {}
impl<F: Parse<Skb, Header: BuildHeader<F::A>>> Rejecting for F {}

/// Rejects the packet in hand if the reason asks for it and the packet may be answered; else the verdict is to drop it.
#[inline(always)]
pub fn reject<F: Rejecting>(skb: &Skb, l3: usize, dropped: Dropped, path: ReplyPath) -> i32 {
    try_reject::<F>(skb, l3, dropped, path).unwrap_or(TC_ACT_SHOT)
}

/// An ICMP error.
struct IcmpError {
    /// Type and code (RFC 792, RFC 1812 5.2.7, RFC 4443).
    v4: [u8; 2],
    /// The same of the other family.
    v6: [u8; 2],
    /// Who sends it.
    by: u8,
    /// What limits it; see [`UNLIMITED`].
    bucket: u8,
    /// What stands behind the checksum.
    rest: u32,
}

/// The address that was asked sends it.
const BY_DESTINATION: u8 = 0;
/// This node sends it.
const BY_ROUTER: u8 = 1;
/// The address that was asked sends it, and a TCP reset in its place.
const BY_SERVER: u8 = 2;

/// Of no bucket. Path MTU discovery waits for the error, and Linux does not limit it either (`icmpv4_mask_allow`).
const UNLIMITED: u8 = u8::MAX;

const PORT_UNREACHABLE: IcmpError =
    IcmpError { v4: [3, 3], v6: [1, 4], by: BY_SERVER, bucket: Bucket::IcmpErrors as u8, rest: 0 };
/// Communication administratively prohibited.
const PROHIBITED: IcmpError =
    IcmpError { v4: [3, 13], v6: [1, 1], by: BY_DESTINATION, bucket: Bucket::Denials as u8, rest: 0 };
const TIME_EXCEEDED: IcmpError = IcmpError { v4: [11, 0], v6: [3, 0], by: BY_ROUTER, ..PORT_UNREACHABLE };
const TOO_BIG: IcmpError = IcmpError { v4: [3, 4], v6: [2, 0], by: BY_ROUTER, bucket: UNLIMITED, rest: 0 };

impl IcmpError {
    /// In one word.
    #[inline(always)]
    fn pack<A: Address>(&self) -> u64 {
        let [kind, code] = if A::IS_V6 { self.v6 } else { self.v4 };
        u64::from(self.rest) << 32 | u64::from_be_bytes([0, 0, 0, 0, self.by, self.bucket, kind, code])
    }
}

#[inline(always)]
fn try_reject<F: Rejecting>(skb: &Skb, l3: usize, dropped: Dropped, path: ReplyPath) -> Option<i32> {
    let config = maps::config()?;
    let error = match dropped.reason {
        DropReason::NoBackend | DropReason::NoServicePort => PORT_UNREACHABLE.pack::<F::A>(),
        DropReason::PolicyDenied if config.flags & flags::ANSWER_DENIED != 0 => PROHIBITED.pack::<F::A>(),
        DropReason::TtlExceeded => TIME_EXCEEDED.pack::<F::A>(),
        DropReason::FragNeeded if dropped.mtu != 0 => IcmpError { rest: dropped.mtu, ..TOO_BIG }.pack::<F::A>(),
        _ => return None,
    };
    // Through memory: the verifier would follow each of the errors to the end.
    // SAFETY: the element belongs to this CPU, TC programs do not interrupt each other, and this is the only borrow of the field.
    let error = unsafe {
        let word = &raw mut (*F::scratch()?).error;
        word.write_volatile(error);
        word.read_volatile()
    };
    let [.., by, bucket, kind, code] = error.to_be_bytes();
    let (p, _) = parse::packet::<F, _>(skb, l3).ok()?;
    if p.kind != Kind::Flow || p.tcp_flags & tcp::RST != 0 {
        return None;
    }
    if by == BY_SERVER && p.tuple.proto == proto::TCP {
        rewrite::reset::<F>(skb, p).ok()?;
    } else {
        // Nobody must use up the errors that another one's connection waits for: a pod, or a client outside who asks for refusals. A
        // forged source makes nothing louder of it, for the error is smaller than its packet.
        if !limit::take(u32::from(bucket)) {
            return None;
        }
        let mut src = p.tuple.dst;
        // The host refuses a packet that comes in with an address of its own as a martian.
        if by == BY_ROUTER && path != ReplyPath::Host {
            src = F::node(config);
            if src == F::A::UNSPECIFIED {
                return None;
            }
        }
        rewrite::error::<F>(skb, p, src, [kind, code], (error >> 32) as u32).ok()?;
    }
    exec::send_back(skb, path, config).ok()
}
