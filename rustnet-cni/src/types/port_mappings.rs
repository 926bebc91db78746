//! `runtimeConfig.portMappings`, the `hostPort`s of a pod's containers: validated before anything is made.
//!
//! Only ADD reads it. A pod whose ports make no sense was never connected, and must be able to go all the same.

use super::conf::take;
use super::error::{Error, code};
use rustnet_common::files::{PortMapping, Protocol};
use serde_json::{Map, Value};
use std::net::IpAddr;

/// Reads the mappings; null and absence are the same as an empty list. Members that are not ours are ignored.
pub fn parse(value: Option<&Value>) -> Result<Vec<PortMapping>, Error> {
    let list = match value {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(list)) => list,
        Some(other) => {
            return Err(Error::new(code::DECODE, format!("runtimeConfig.portMappings is {other}, not a list")));
        }
    };
    list.iter().enumerate().map(|(i, item)| mapping(&format!("runtimeConfig.portMappings[{i}]"), item)).collect()
}

fn mapping(at: &str, value: &Value) -> Result<PortMapping, Error> {
    let Value::Object(map) = value else {
        return Err(Error::new(code::DECODE, format!("{at} is {value}, not an object")));
    };
    Ok(PortMapping {
        host_ip: host_ip(at, map)?,
        host_port: port(at, map, "hostPort")?,
        container_port: port(at, map, "containerPort")?,
        protocol: protocol(at, map)?,
    })
}

fn port(at: &str, map: &Map<String, Value>, key: &str) -> Result<u16, Error> {
    let value = take(map, key).unwrap_or(&Value::Null);
    let port = value.as_u64().and_then(|port| u16::try_from(port).ok()).filter(|port| *port != 0);
    port.ok_or_else(|| {
        let code = if value.is_number() { code::CONFIG } else { code::DECODE };
        Error::new(code, format!("{at}.{key} is {value}, not a port")).details("ports are 1 to 65535")
    })
}

/// Runtimes write it in small letters, Kubernetes in large ones, whose default it is.
fn protocol(at: &str, map: &Map<String, Value>) -> Result<Protocol, Error> {
    let text = match take(map, "protocol") {
        None => return Ok(Protocol::Tcp),
        Some(Value::String(text)) if text.is_empty() => return Ok(Protocol::Tcp),
        Some(Value::String(text)) => text,
        Some(other) => return Err(Error::new(code::DECODE, format!("{at}.protocol is {other}, not a string"))),
    };
    let found = Protocol::ALL.into_iter().find(|it| it.name().eq_ignore_ascii_case(text));
    found.ok_or_else(|| {
        Error::new(code::CONFIG, format!("{at}.protocol {text:?} is unknown")).details("known are tcp, udp and sctp")
    })
}

fn host_ip(at: &str, map: &Map<String, Value>) -> Result<Option<IpAddr>, Error> {
    let text = match take(map, "hostIP") {
        None => return Ok(None),
        Some(Value::String(text)) if text.is_empty() => return Ok(None),
        Some(Value::String(text)) => text,
        Some(other) => return Err(Error::new(code::DECODE, format!("{at}.hostIP is {other}, not a string"))),
    };
    let bad = |what: &str| Error::new(code::CONFIG, format!("{at}.hostIP {text:?} is {what}"));
    let ip = text.parse::<IpAddr>().map_err(|_| bad("no IP address"))?.to_canonical();
    // Packets to such an address never leave their link, or are for many.
    let is_of_link = match ip {
        IpAddr::V4(ip) => ip.is_broadcast(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    if ip.is_multicast() || is_of_link {
        return Err(bad("no address that a port can have")
            .details("name an address of the node that others reach, a loopback address, or none"));
    }
    Ok(Some(ip))
}

/// Refuses a mapping for a family of which the pod has no address.
pub fn require_families(mappings: &[PortMapping], addresses: &[IpAddr]) -> Result<(), Error> {
    for (i, mapping) in mappings.iter().enumerate() {
        if let Some(ip) = mapping.host_ip
            && !addresses.iter().any(|pod| mapping.is_of_family(pod))
        {
            let family = if ip.is_ipv4() { "IPv4" } else { "IPv6" };
            let text =
                format!("runtimeConfig.portMappings[{i}].hostIP {ip} is {family}, and the pod has no such address");
            return Err(Error::new(code::CONFIG, text).details("name an address of the pod's family, or none"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{parse, require_families};
    use crate::types::error::code;
    use serde_json::{Value, json};

    fn shown(value: &Value) -> Vec<String> {
        parse(Some(value)).expect("parses").iter().map(ToString::to_string).collect()
    }

    #[test]
    fn as_runtimes_write_them() {
        assert!(parse(None).expect("none").is_empty());
        for empty in [json!(null), json!([])] {
            assert!(shown(&empty).is_empty());
        }
        // containerd, CRI-O, the specification's example, and with Kubernetes' defaults.
        for (value, want) in [
            (json!([{ "HostPort": 8080, "ContainerPort": 80, "Protocol": "tcp", "HostIP": "" }]), "8080->80/tcp"),
            (
                json!([{ "hostPort": 8080, "containerPort": 80, "protocol": "UDP", "hostIP": "0.0.0.0" }]),
                "0.0.0.0:8080->80/udp",
            ),
            (
                json!([{ "hostPort": 8080, "containerPort": 80, "protocol": "sctp", "hostIP": "::", "name": "x" }]),
                "[::]:8080->80/sctp",
            ),
            (json!([{ "hostPort": 65535, "containerPort": 1 }]), "65535->1/tcp"),
            (
                json!([{ "hostPort": 1, "containerPort": 1, "hostIP": "127.0.0.1", "protocol": "" }]),
                "127.0.0.1:1->1/tcp",
            ),
            (json!([{ "hostPort": 1, "containerPort": 1, "hostIP": "::ffff:192.0.2.1" }]), "192.0.2.1:1->1/tcp"),
        ] {
            assert_eq!(shown(&value), [want], "{value}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        let with = |key: &str, value: Value| {
            let mut mapping = json!({ "hostPort": 1, "containerPort": 1, "protocol": "tcp", "hostIP": "" });
            mapping[key] = value;
            json!([{ "hostPort": 2, "containerPort": 2 }, mapping])
        };
        let cases = [
            (json!({}), code::DECODE, "portMappings is {}"),
            (json!([7]), code::DECODE, "portMappings[0] is 7"),
            (json!([{ "containerPort": 1 }]), code::DECODE, "portMappings[0].hostPort is null"),
            (with("hostPort", json!(0)), code::CONFIG, "portMappings[1].hostPort is 0"),
            (with("hostPort", json!(65536)), code::CONFIG, "portMappings[1].hostPort is 65536"),
            (with("hostPort", json!(-1)), code::CONFIG, "portMappings[1].hostPort is -1"),
            (with("hostPort", json!("80")), code::DECODE, "portMappings[1].hostPort is \"80\""),
            (with("containerPort", json!(0)), code::CONFIG, "portMappings[1].containerPort is 0"),
            (with("containerPort", json!(1.5)), code::CONFIG, "portMappings[1].containerPort is 1.5"),
            (with("protocol", json!("icmp")), code::CONFIG, "portMappings[1].protocol \"icmp\""),
            (with("protocol", json!(6)), code::DECODE, "portMappings[1].protocol is 6"),
            (with("hostIP", json!("localhost")), code::CONFIG, "portMappings[1].hostIP \"localhost\""),
            (with("hostIP", json!("192.0.2.1/32")), code::CONFIG, "portMappings[1].hostIP"),
            (with("hostIP", json!("fe80::1")), code::CONFIG, "portMappings[1].hostIP \"fe80::1\""),
            (with("hostIP", json!("224.0.0.1")), code::CONFIG, "portMappings[1].hostIP \"224.0.0.1\""),
            (with("hostIP", json!("255.255.255.255")), code::CONFIG, "portMappings[1].hostIP"),
            (with("hostIP", json!(7)), code::DECODE, "portMappings[1].hostIP is 7"),
        ];
        for (value, code, part) in cases {
            let e = parse(Some(&value)).expect_err(&value.to_string());
            assert_eq!(e.code, code, "{value}: {e}");
            assert!(e.to_string().contains(part), "{value}: {e}");
        }
    }

    #[test]
    fn an_address_of_the_other_family_is_refused() {
        let mappings =
            |ip: &str| parse(Some(&json!([{ "hostPort": 1, "containerPort": 1, "hostIP": ip }]))).expect("parses");
        let pod = ["10.0.0.2".parse().expect("address")];
        for fine in ["", "0.0.0.0", "127.0.0.1", "192.0.2.1"] {
            require_families(&mappings(fine), &pod).expect(fine);
        }
        for bad in ["::", "::1", "2001:db8::1"] {
            let e = require_families(&mappings(bad), &pod).expect_err(bad);
            assert_eq!(e.code, code::CONFIG);
            assert!(e.to_string().contains("portMappings[0].hostIP"), "{e}");
        }
    }
}
