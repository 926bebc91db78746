//! What a service refuses or drops, and how the refusal looks.

use super::serve;
use crate::errors::{port_unreachable, refusal, reset};
use crate::flows::{ALL, PORT, Proto, SERVED, TARGET, VIP_PORT, at_backend, from_a, from_b, from_host, from_outside};
use crate::frame::{ACK, FIN, L4, RST, SYN};
use crate::harness::{POD_B, each, labs};
use anyhow::{Context, Result, ensure};
use rustnet_common::backend::{Backend, id};
use rustnet_common::drop::DropReason;
use rustnet_common::names::map;
use rustnet_common::service::{self, SvcEntry};

#[test]
fn no_endpoints_or_no_such_port_is_refused() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            lab.serve(net.vip(1), VIP_PORT, proto.number(net), 0, &[])?;
            for (port, reason) in [(VIP_PORT, DropReason::NoBackend), (81, DropReason::NoServicePort)] {
                let ask = from_a(net, proto, (net.vip(1), port));
                lab.pod_sends(&ask)?.answered(reason, &refusal(&ask))?;
                // The way back to a pod leads by its own door, to the host by its own stack.
                let ask = from_host(net, proto, (net.vip(1), port));
                lab.uplink_out(&ask)?.answered(reason, &refusal(&ask))?;
            }
            ensure!(lab.halves()? == 0, "a refused flow is tracked");
            Ok(())
        })
    })
}

/// Echo to a VIP: there is no service behind it.
#[test]
fn echo_to_a_virtual_address_is_refused() -> Result<()> {
    labs(|lab, net| {
        serve(lab, net, Proto::Tcp, net.vip(1), (net.b(), TARGET))?;
        let ask = from_a(net, Proto::Echo, (net.vip(1), 0));
        lab.pod_sends(&ask)?.answered(DropReason::NoServicePort, &port_unreachable(&ask))
    })
}

#[test]
fn resets_answer_each_kind_of_segment() -> Result<()> {
    labs(|lab, net| {
        lab.serve(net.vip(1), VIP_PORT, 6, 0, &[])?;
        let base = from_a(net, Proto::Tcp, (net.vip(1), VIP_PORT));
        for (flags, seq, ack, payload) in [
            (SYN, 0xffff_ffff, 0, &b""[..]),
            (SYN, 7, 0, b"fast open"),
            (ACK, 5, 0x1234_5678, b""),
            (ACK, 5, 0xffff_ffff, b"data of an odd length"),
            (FIN | ACK, 5, 9, b""),
            (FIN, 5, 9, b"x"),
            (0, 5, 9, b"xyz"),
            (SYN | ACK, 5, 9, b""),
        ] {
            let ask = base.map(|f| {
                f.l4 = L4::Tcp { sport: PORT, dport: VIP_PORT, seq, ack, flags, window: 1 };
                f.payload = payload.to_vec();
            });
            lab.pod_sends(&ask)?
                .answered(DropReason::NoBackend, &reset(&ask))
                .with_context(|| format!("flags {flags:#x}, {} bytes", payload.len()))?;
        }
        // No reset answers a reset (RFC 9293, 3.5.2).
        lab.pod_sends(&base.with_flags(RST))?.dropped(DropReason::NoBackend)?;
        lab.pod_sends(&base.with_flags(RST | ACK))?.dropped(DropReason::NoBackend)
    })
}

/// Of every length around what is quoted.
#[test]
fn unreachable_quotes_as_much_as_there_is() -> Result<()> {
    labs(|lab, net| {
        lab.serve(net.vip(1), VIP_PORT, 17, 0, &[])?;
        for len in (0..48).chain([100, 1000, 1400]) {
            let ask = from_a(net, Proto::Udp, (net.vip(1), VIP_PORT)).map(|f| f.payload = vec![0xa5; len]);
            lab.pod_sends(&ask)?
                .answered(DropReason::NoBackend, &port_unreachable(&ask))
                .with_context(|| format!("{len} bytes"))?;
        }
        Ok(())
    })
}

/// As small frames come from a real device: padded to 60 bytes.
#[test]
fn refusals_of_padded_frames() -> Result<()> {
    labs(|lab, net| {
        lab.serve(net.vip(1), VIP_PORT, 17, 0, &[])?;
        lab.serve(net.vip(1), VIP_PORT, 6, 0, &[])?;
        for proto in [Proto::Tcp, Proto::Udp] {
            let ask = from_a(net, proto, (net.vip(1), VIP_PORT)).map(|f| {
                f.payload.truncate(1);
                f.padding = 17;
            });
            lab.pod_sends(&ask)?.answered(DropReason::NoBackend, &refusal(&ask).map(|f| f.padding = 0))?;
        }
        Ok(())
    })
}

/// internalTrafficPolicy Local without an endpoint here (KEP-2086).
#[test]
fn a_local_service_without_local_endpoints_drops_silently() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            lab.serve(net.vip(1), VIP_PORT, proto.number(net), service::flags::DROP_EMPTY, &[])?;
            let ask = from_a(net, proto, (net.vip(1), VIP_PORT));
            lab.pod_sends(&ask)?.dropped(DropReason::NoLocalBackend)?;
            lab.uplink_out(&from_host(net, proto, (net.vip(1), VIP_PORT)))?.dropped(DropReason::NoLocalBackend)
        })
    })
}

#[test]
fn entries_that_contradict_each_other_are_counted() -> Result<()> {
    labs(|lab, net| {
        let ask = from_a(net, Proto::Udp, (net.vip(1), VIP_PORT));
        // Ranges outside the array, and an empty place in it.
        for first in [5000, u32::MAX - 8, 900] {
            lab.put_service(
                net.vip(1),
                VIP_PORT,
                17,
                &SvcEntry { first, count: 3, id: 1, affinity: 0, flags: 0, table: 0 },
            )?;
            lab.pod_sends(&ask)?.dropped(DropReason::BackendLookupFailed)?;
        }
        ensure!(lab.halves()? == 0);
        Ok(())
    })
}

/// The entry or the range may be another one's by the time it is read.
#[test]
fn a_backend_of_another_id_or_service_gets_no_flow() -> Result<()> {
    labs(|lab, net| {
        let id = serve(lab, net, Proto::Udp, net.vip(1), (net.b(), TARGET))?;
        let slot = id::slot_of(id);
        let index = lab.service(net.vip(1), VIP_PORT, Proto::Udp.number(net))?.first;
        let table = lab.datapath().table::<u32, Backend>(map::BACKENDS)?;
        let good = table.get(&slot)?.context("the backend")?;
        let ask = from_a(net, Proto::Udp, (net.vip(1), VIP_PORT));
        for other in [
            Backend::cleared(id),
            Backend { id: id::next(slot, id), ..good },
            Backend { service: good.service + 1, ..good },
        ] {
            table.put(&slot, &other)?;
            lab.pod_sends(&ask)?.dropped(DropReason::BackendLookupFailed)?;
        }
        table.put(&slot, &good)?;
        lab.datapath().table(map::BACKEND_IDS)?.put(&index, &id::next(slot, id))?;
        lab.pod_sends(&ask)?.dropped(DropReason::BackendLookupFailed)?;
        ensure!(lab.halves()? == 0);
        lab.datapath().table(map::BACKEND_IDS)?.put(&index, &id)?;
        lab.pod_sends(&ask)?.to_the_pod(&at_backend(net, &ask, net.b()))
    })
}

#[test]
fn a_virtual_address_asked_from_outside_is_dropped() -> Result<()> {
    labs(|lab, net| {
        for proto in ALL {
            if proto != Proto::Echo {
                serve(lab, net, proto, net.vip(1), (net.b(), TARGET))?;
            }
            let ask = from_outside(proto, (net.world(), PORT), (net.vip(1), VIP_PORT));
            lab.uplink_in(&ask)?.dropped(DropReason::IsClusterIp)?;
        }
        ensure!(lab.halves()? == 0);
        Ok(())
    })
}

/// A pod that answers from a port of a service without having been asked.
#[test]
fn nothing_is_translated_back_without_a_connection() -> Result<()> {
    labs(|lab, net| {
        serve(lab, net, Proto::Udp, net.vip(1), (net.b(), TARGET))?;
        let f = from_b(net, Proto::Udp, (net.a(), PORT)).map(|f| f.set_ports(TARGET, PORT));
        lab.pod_sends(&f)?.to_the_pod(&f.hop())?;
        // The host's own traffic to its pods is not a service's either.
        let f = from_host(net, Proto::Udp, (net.b(), TARGET));
        lab.to_pod(POD_B, &f)?.to_stack(&f)
    })
}
