//! `runtimeConfig.bandwidth`, the limits that the annotations `kubernetes.io/ingress-bandwidth` and `egress-bandwidth` ask
//! for: validated by the rules of the reference plugin `bandwidth` and of Kubernetes, before anything is made.
//!
//! Only ADD reads it. A pod whose limits make no sense was never connected, and must be able to go all the same.

use super::conf::take;
use super::error::{Error, code};
use rustnet_common::files::{Bandwidth, Limit};
use serde_json::{Map, Value};

/// What Kubernetes accepts for the annotations, in bit/s.
const RATES: std::ops::RangeInclusive<u64> = 1_000..=1_000_000_000_000_000;
/// Largest burst in bits: the kernel counts its bytes in 32 bits.
const BURST_MAX: u64 = u32::MAX as u64 * 8;
/// The annotations have no burst, and runtimes put down what is none: containerd 2^32 - 1 bits, CRI-O eight times that, the
/// kubelet of old 2^31 - 1. The first half gigabyte would go unlimited. From here on a burst counts as not stated.
const BURST_UNSTATED: u64 = i32::MAX as u64;
/// A burst that nobody stated, in bits: the largest packet that a pod can hand over at once (64 KiB) passes whole, ...
const BURST_LEAST: u64 = 128 * 1024 * 8;
/// ... and so does what arrives within these milliseconds.
const BURST_MS: u64 = 25;
/// Bytes of a frame in addition to the packet.
const ETHERNET: u64 = 14;

/// Reads the limits of a pod with that MTU; null and absence of each member is the same as 0, and without a rate there is no
/// limit.
pub fn parse(value: Option<&Value>, mtu: u32) -> Result<Bandwidth, Error> {
    let map = match value {
        None | Some(Value::Null) => return Ok(Bandwidth::default()),
        Some(Value::Object(map)) => map,
        Some(other) => {
            return Err(Error::new(code::DECODE, format!("runtimeConfig.bandwidth is {other}, not an object")));
        }
    };
    for key in ["shapedSubnets", "unshapedSubnets"] {
        if take(map, key).is_some_and(|list| list != &Value::Array(Vec::new())) {
            return Err(Error::new(code::CONFIG, format!("runtimeConfig.bandwidth.{key} is not supported"))
                .details("limits are for all of a pod's traffic: leave it out"));
        }
    }
    Ok(Bandwidth { ingress: limit(map, "ingress", mtu)?, egress: limit(map, "egress", mtu)? })
}

fn limit(map: &Map<String, Value>, way: &str, mtu: u32) -> Result<Option<Limit>, Error> {
    let (rate, burst) = (number(map, &format!("{way}Rate"))?, number(map, &format!("{way}Burst"))?);
    let bad = |text: String| Error::new(code::CONFIG, format!("runtimeConfig.bandwidth: {text}"));
    if rate == 0 && burst == 0 {
        return Ok(None);
    }
    if rate == 0 {
        return Err(bad(format!("{way}Burst is {burst} without {way}Rate")).details("set both, or neither"));
    }
    if !RATES.contains(&rate) {
        return Err(bad(format!("{way}Rate {rate} is not a rate")).details(format!(
            "it is in bit/s, {} to {}; see the annotation kubernetes.io/{way}-bandwidth",
            RATES.start(),
            RATES.end()
        )));
    }
    if burst > BURST_MAX {
        return Err(bad(format!("{way}Burst {burst} is too large")).details("it is in bits, and at most 4 GiB"));
    }
    if burst == 0 || burst >= BURST_UNSTATED {
        let burst = (rate / 1000 * BURST_MS).clamp(BURST_LEAST, BURST_MAX);
        return Ok(Some(Limit { rate, burst }));
    }
    let frame = (u64::from(mtu) + ETHERNET) * 8;
    if burst < frame {
        return Err(bad(format!("{way}Burst {burst} lets no packet of {mtu} bytes pass")).details(format!(
            "it is in bits, at least {frame} here; leave it out for {BURST_LEAST} or what {BURST_MS} ms bring"
        )));
    }
    Ok(Some(Limit { rate, burst }))
}

fn number(map: &Map<String, Value>, key: &str) -> Result<u64, Error> {
    let Some(value) = take(map, key) else { return Ok(0) };
    value.as_u64().ok_or_else(|| {
        let code = if value.is_number() { code::CONFIG } else { code::DECODE };
        Error::new(code, format!("runtimeConfig.bandwidth.{key} is {value}, not a whole number of bits"))
    })
}

#[cfg(test)]
mod tests {
    use super::{BURST_LEAST, BURST_MAX, parse};
    use crate::types::error::code;
    use rustnet_common::files::{Bandwidth, Limit};
    use serde_json::{Value, json};

    #[test]
    fn what_runtimes_send() {
        let some = |rate, burst| Some(Limit { rate, burst });
        let cases = [
            (json!(null), None, None),
            (json!({}), None, None),
            (json!({ "ingressRate": 0, "ingressBurst": 0, "egressRate": null }), None, None),
            // containerd, with one annotation: Go's names, and a burst that is none.
            (
                json!({ "IngressRate": 0, "IngressBurst": 0, "EgressRate": 10_000_000, "EgressBurst": u32::MAX }),
                None,
                some(10_000_000, BURST_LEAST),
            ),
            // CRI-O of several ages, the kubelet of old.
            (
                json!({ "ingressRate": 1_000_000, "ingressBurst": BURST_MAX - 1, "egressRate": 1000, "egressBurst": BURST_MAX }),
                some(1_000_000, BURST_LEAST),
                some(1000, BURST_LEAST),
            ),
            (json!({ "ingressRate": 1_000_000, "ingressBurst": i32::MAX }), some(1_000_000, BURST_LEAST), None),
            // Stated bursts stay as they are, and what nobody stated grows with the rate.
            (json!({ "ingressRate": 8000, "ingressBurst": 12_112 }), some(8000, 12_112), None),
            (json!({ "egressRate": 8_000_000, "egressBurst": i32::MAX - 1 }), None, some(8_000_000, 0x7fff_fffe)),
            (json!({ "egressRate": 100_000_000 }), None, some(100_000_000, 2_500_000)),
            (json!({ "egressRate": 1_000_000_000_000_000_u64 }), None, some(1_000_000_000_000_000, BURST_MAX)),
            (
                json!({ "egressRate": 1000, "shapedSubnets": [], "unshapedSubnets": null }),
                None,
                some(1000, BURST_LEAST),
            ),
        ];
        for (value, ingress, egress) in cases {
            assert_eq!(parse(Some(&value), 1500), Ok(Bandwidth { ingress, egress }), "{value}");
        }
        assert_eq!(parse(None, 1500), Ok(Bandwidth::default()));
    }

    #[test]
    fn what_makes_no_sense() {
        let cases: [(Value, u32, &str); 17] = [
            (json!([]), code::DECODE, "not an object"),
            (json!("10M"), code::DECODE, "not an object"),
            (json!({ "ingressRate": "10M" }), code::DECODE, "\"10M\""),
            (json!({ "ingressRate": [1] }), code::DECODE, "ingressRate"),
            (json!({ "egressBurst": true }), code::DECODE, "egressBurst"),
            (json!({ "ingressRate": -1, "ingressBurst": 1 }), code::CONFIG, "-1"),
            (json!({ "ingressRate": 1_000_000, "ingressBurst": -5 }), code::CONFIG, "-5"),
            (json!({ "EgressRate": 1000.5 }), code::CONFIG, "1000.5"),
            (json!({ "egressRate": 1e30 }), code::CONFIG, "egressRate"),
            (json!({ "ingressBurst": 1_000_000 }), code::CONFIG, "without ingressRate"),
            (json!({ "ingressRate": 0, "ingressBurst": 1_000_000 }), code::CONFIG, "without ingressRate"),
            (json!({ "egressRate": 999 }), code::CONFIG, "egressRate 999"),
            (json!({ "egressRate": 1_000_000_000_000_001_u64 }), code::CONFIG, "1000000000000001"),
            (json!({ "egressRate": 1000, "egressBurst": BURST_MAX + 1 }), code::CONFIG, "too large"),
            (json!({ "egressRate": 1000, "egressBurst": u64::MAX }), code::CONFIG, "too large"),
            (json!({ "ingressRate": 8000, "ingressBurst": 12_111 }), code::CONFIG, "at least 12112"),
            (json!({ "ingressRate": 8000, "unshapedSubnets": ["10.0.0.0/8"] }), code::CONFIG, "unshapedSubnets"),
        ];
        for (value, code, part) in cases {
            let e = parse(Some(&value), 1500).expect_err(&value.to_string());
            assert_eq!(e.code, code, "{value}: {e}");
            assert!(e.to_string().contains(part), "{value}: {e}");
        }
    }
}
