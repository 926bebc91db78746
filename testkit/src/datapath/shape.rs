//! The shapes that the service maps of an object can have. Objects of different releases run side by side in the benchmarks,
//! so that the layouts stand here as numbers and do not follow `rustnet-common`.

use super::Datapath;
use anyhow::{Context, Result};
use bytemuck::{Pod, Zeroable};
use rustnet_common::addr::{Addr, Address, Ip4, Ip6};
use rustnet_common::service::SvcKey;
use std::net::{IpAddr, SocketAddr};

/// Generation in the backend ids that [`Datapath::serve`] writes for [`Shape::V2`].
const GENERATION: u32 = 1 << 20;

/// A layout of the service maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// `rn_svc4`, `rn_svc6` and one array of backends, whose ranges hold the backends themselves.
    V1,
    /// `rn_svc4_v2`, `rn_svc6_v2`, and ranges of backend ids that lead to slots of `rn_backends_v2`.
    V2,
}

/// One port of a virtual address.
#[derive(Clone, Debug)]
pub struct Service {
    /// The virtual address.
    pub vip: IpAddr,
    /// Its port.
    pub port: u16,
    /// IP protocol number.
    pub proto: u8,
    /// Number of the service.
    pub id: u32,
    /// First index of its range, and first slot of its backends.
    pub first: u32,
    /// Where it leads to.
    pub backends: Vec<SocketAddr>,
}

/// Value of the service maps in both shapes.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Entry {
    first: u32,
    count: u32,
    id: u32,
    affinity: u32,
    flags: u16,
    pad: u16,
}

/// Value of `rn_backends`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct BackendV1 {
    addr: [u8; 16],
    port: u16,
    flags: u16,
    id: u32,
}

/// Value of `rn_backends_v2`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct BackendV2 {
    addr: [u8; 16],
    port: u16,
    flags: u16,
    id: u32,
    service: u32,
    pad: u32,
}

impl Shape {
    /// The shape of the newest map of services that is there.
    pub(super) fn detect<'a>(mut maps: impl Iterator<Item = &'a str>) -> Self {
        if maps.any(|name| name == Self::V2.services().0) { Self::V2 } else { Self::V1 }
    }

    /// Names of the maps of services, IPv4 and IPv6.
    fn services(self) -> (&'static str, &'static str) {
        match self {
            Self::V1 => ("rn_svc4", "rn_svc6"),
            Self::V2 => ("rn_svc4_v2", "rn_svc6_v2"),
        }
    }
}

/// Sizes for [`Datapath::load_object`] that fit any shape: entries of a map of services, and backends of all of them.
pub fn service_sizes(services: u32, backends: u32) -> [(&'static str, u32); 7] {
    let [(v1_4, v1_6), (v2_4, v2_6)] = [Shape::V1, Shape::V2].map(Shape::services);
    let backends = ["rn_backends", "rn_backend_ids", "rn_backends_v2"].map(|name| (name, backends));
    let [first, ids, second] = backends;
    [(v1_4, services), (v1_6, services), (v2_4, services), (v2_6, services), first, ids, second]
}

impl Datapath {
    /// Writes services and their backends in the object's own shape.
    pub fn serve(&self, services: &[Service]) -> Result<()> {
        let backends = |service: &Service| {
            let slots = service.first..;
            let id = service.id;
            let all: Vec<_> = slots.zip(&service.backends).map(|(slot, to)| (slot, *to, id)).collect();
            all
        };
        let backends: Vec<(u32, SocketAddr, u32)> = services.iter().flat_map(backends).collect();
        let addr = |ip: IpAddr| -> [u8; 16] {
            match ip {
                IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                IpAddr::V6(ip) => ip.octets(),
            }
        };
        match self.shape() {
            Shape::V1 => {
                let value =
                    |slot, to: &SocketAddr| BackendV1 { addr: addr(to.ip()), port: to.port(), flags: 0, id: slot + 1 };
                let all: Vec<_> = backends.iter().map(|(slot, to, _)| (*slot, value(*slot, to))).collect();
                self.table("rn_backends")?.put_all(&all)?;
            }
            Shape::V2 => {
                let id = |slot: u32| slot | GENERATION;
                let value = |slot, to: &SocketAddr, service| BackendV2 {
                    addr: addr(to.ip()),
                    port: to.port(),
                    flags: 0,
                    id: id(slot),
                    service,
                    pad: 0,
                };
                let all: Vec<_> = backends.iter().map(|(slot, to, of)| (*slot, value(*slot, to, *of))).collect();
                self.table("rn_backends_v2")?.put_all(&all)?;
                let ids: Vec<(u32, u32)> = backends.iter().map(|(slot, ..)| (*slot, id(*slot))).collect();
                self.table("rn_backend_ids")?.put_all(&ids)?;
            }
        }
        let (v4, v6) = self.shape().services();
        self.serve_family::<Ip4>(v4, services.iter().filter(|it| it.vip.is_ipv4()))?;
        self.serve_family::<Ip6>(v6, services.iter().filter(|it| it.vip.is_ipv6()))
    }

    fn serve_family<'a, A: Address>(&self, map: &str, services: impl Iterator<Item = &'a Service>) -> Result<()>
    where
        SvcKey<A>: Pod,
    {
        let entry = |it: &Service| {
            let (first, count) = (it.first, it.backends.len() as u32);
            let key = SvcKey { vip: A::from_addr(Addr::from(it.vip)), port: it.port, proto: it.proto, scope: 0 };
            (key, Entry { first, count, id: it.id, affinity: 0, flags: 0, pad: 0 })
        };
        let all: Vec<(SvcKey<A>, Entry)> = services.map(entry).collect();
        self.table(map)?.put_all(&all).with_context(|| format!("writing services to {map}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_map_of_services_names_the_shape() {
        assert_eq!(Shape::detect(["rn_backends", "rn_svc4"].into_iter()), Shape::V1);
        assert_eq!(Shape::detect(["rn_svc4", "rn_svc4_v2"].into_iter()), Shape::V2);
    }

    #[test]
    fn values_have_the_sizes_that_the_programs_were_built_with() {
        assert_eq!([size_of::<Entry>(), size_of::<BackendV1>(), size_of::<BackendV2>()], [20, 24, 32]);
    }
}
