//! Ranges of Services: addresses that no Service has are dropped, all others go where they went.

use crate::flows::{ALL, PORT, Proto, SERVED, TARGET, VIP_PORT, at_backend, from_a, from_host, from_outside, later};
use crate::harness::{Lab, MAC_B, Net, POD_B, each, labs};
use anyhow::{Result, ensure};
use rustnet_common::drop::DropReason;
use rustnet_common::peer::flags;

/// An address of the range that no Service has.
const NOBODY: u8 = 9;

/// As the agent writes it.
fn put_range(lab: &Lab, net: Net) -> Result<()> {
    lab.put_peer(net.vip(0), Some((16, 64)), flags::SERVICES, None)
}

#[test]
fn an_address_that_no_service_has() -> Result<()> {
    labs(|lab, net| {
        put_range(lab, net)?;
        each(&ALL, |proto| {
            let nobody = (net.vip(NOBODY), proto.port(VIP_PORT));
            lab.pod_sends(&from_a(net, proto, nobody))?.dropped(DropReason::NoService)?;
            lab.uplink_out(&from_host(net, proto, nobody))?.dropped(DropReason::NoService)?;
            // What comes from outside is the stack's, and the stack forwards it.
            let asked = from_outside(proto, (net.world(), PORT), nobody);
            lab.uplink_in(&asked)?.to_stack(&asked)?;
            lab.uplink_out(&asked.hop())?.dropped(DropReason::NoService)
        })?;
        ensure!(lab.halves()? == 0, "a refused flow is tracked");
        let whole = from_host(net, Proto::Udp, (net.vip(NOBODY), VIP_PORT)).map(|f| f.payload = vec![0xa5; 3000]);
        for piece in whole.pieces(60, &[1200, 2400]) {
            lab.uplink_out(&piece)?.dropped(DropReason::NoService)?;
        }
        Ok(())
    })
}

#[test]
fn a_service_of_the_range_is_served_until_it_goes() -> Result<()> {
    labs(|lab, net| {
        put_range(lab, net)?;
        each(&SERVED, |proto| {
            lab.serve(net.vip(1), VIP_PORT, proto.number(net), 0, &[(net.b(), TARGET)])?;
            let ask = from_a(net, proto, (net.vip(1), VIP_PORT));
            lab.pod_sends(&ask)?.to_the_pod(&at_backend(net, &ask, net.b()))?;
            let of_host = from_host(net, proto, (net.vip(1), VIP_PORT));
            ensure!(lab.uplink_out(&of_host)?.counted.keys().all(|(reason, _)| *reason == 0), "the host is served");
            lab.drop_service(net.vip(1), VIP_PORT, proto.number(net))?;
            let more = later(&ask);
            lab.pod_sends(&more)?.to_the_pod(&at_backend(net, &more, net.b()))?;
            let other = ask.map(|f| f.set_ports(PORT + 1, VIP_PORT));
            lab.pod_sends(&other)?.dropped(DropReason::NoService)
        })
    })
}

/// Opened while the range was nothing special.
#[test]
fn a_flow_that_is_older_than_the_range_goes_on() -> Result<()> {
    labs(|lab, net| {
        each(&ALL, |proto| {
            lab.drop_peer(net.vip(0), (16, 64))?;
            let to = (net.vip(NOBODY), proto.port(VIP_PORT));
            let ask = from_a(net, proto, to);
            lab.pod_sends(&ask)?.onto_wire(&ask.hop().between((net.node(), PORT), to))?;
            put_range(lab, net)?;
            let more = later(&ask);
            lab.pod_sends(&more)?.onto_wire(&more.hop().between((net.node(), PORT), to))
        })
    })
}

/// The host's flows are not tracked here, so that a segment's flags say whether it opens one.
#[test]
fn a_connection_of_the_host_that_is_older_than_the_range_goes_on() -> Result<()> {
    labs(|lab, net| {
        put_range(lab, net)?;
        let open = from_host(net, Proto::Tcp, (net.vip(NOBODY), VIP_PORT));
        lab.uplink_out(&open)?.dropped(DropReason::NoService)?;
        let more = later(&open);
        lab.uplink_out(&more)?.to_stack(&more)
    })
}

/// Ports of it that no Service has may be the load balancer's own.
#[test]
fn a_load_balancers_address_in_the_range() -> Result<()> {
    labs(|lab, net| {
        put_range(lab, net)?;
        lab.share(net.vip(7))?;
        each(&SERVED, |proto| {
            let to = (net.vip(7), 6443);
            let ask = from_a(net, proto, to);
            lab.pod_sends(&ask)?.onto_wire(&ask.hop().between((net.node(), PORT), to))?;
            let of_host = from_host(net, proto, to);
            lab.uplink_out(&of_host)?.to_stack(&of_host)
        })
    })
}

#[test]
fn longer_prefixes_inside_the_range_are_whose_they_were() -> Result<()> {
    labs(|lab, net| {
        put_range(lab, net)?;
        lab.put_peer(net.vip(0x20), Some((28, 124)), flags::POD, None)?;
        lab.put_peer(net.vip(3), None, flags::NODE, None)?;
        lab.put_endpoint(net.vip(4), POD_B, MAC_B)?;
        each(&ALL, |proto| {
            for there in [0x21, 3] {
                let to = (net.vip(there), proto.port(VIP_PORT));
                let ask = from_a(net, proto, to);
                lab.pod_sends(&ask)?.onto_wire(&ask.hop())?;
                let of_host = from_host(net, proto, to);
                lab.uplink_out(&of_host)?.to_stack(&of_host)?;
            }
            let ask = from_a(net, proto, (net.vip(4), proto.port(VIP_PORT)));
            lab.pod_sends(&ask)?.to_the_pod(&ask.hop())
        })
    })
}

/// Nobody outside has the address of a Service; the rest of the range is judged as any address of the world.
#[test]
fn sources_of_the_range() -> Result<()> {
    labs(|lab, net| {
        put_range(lab, net)?;
        lab.serve(net.vip(1), VIP_PORT, 6, 0, &[(net.b(), TARGET)])?;
        each(&ALL, |proto| {
            for dst in [net.a(), net.node()] {
                let forged = from_outside(proto, (net.vip(1), 53), (dst, PORT));
                lab.uplink_in(&forged)?.dropped(DropReason::Spoofed)?;
            }
            let from = from_outside(proto, (net.vip(NOBODY), 53), (net.node(), PORT));
            lab.uplink_in(&from)?.to_stack(&from)
        })
    })
}
