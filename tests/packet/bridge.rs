//! Programs between two agents whose tables differ: while the hooks are swapped, connections that programs of the earlier agent
//! open count before what is left over of older ones.

use crate::flows::{Proto, TARGET, VIP_PORT, answer_of_b, at_backend, at_client, from_a};
use crate::harness::{Lab, Net, labs_of_bridge};
use crate::services::exchange;
use crate::states::silence;
use anyhow::{Context, Result};
use testkit::datapath::Bridge;

/// Both shapes that the earlier tables can have.
const BRIDGES: [Bridge; 2] = [Bridge::Resized, Bridge::V1];
/// Protocols of the tests: one of each table.
const PROTOS: [Proto; 2] = [Proto::Tcp, Proto::Udp];

/// Seconds after which every connection is over.
const LONG: u32 = 86_401;

fn for_each_bridge(test: impl Fn(&Lab, Net, Proto) -> Result<()> + Send + Sync) -> Result<()> {
    BRIDGES.into_iter().try_for_each(|bridge| {
        labs_of_bridge(bridge, |lab, net| {
            PROTOS.into_iter().try_for_each(|proto| {
                lab.forget()?;
                lab.forget_earlier()?;
                lab.serve(net.vip(1), VIP_PORT, proto.number(net), 0, &[(net.b(), TARGET)])?;
                test(lab, net, proto).with_context(|| format!("{bridge:?} {proto:?}"))
            })
        })
    })
}

/// A connection through a service is over, and the earlier programs opened one to its backend from the same port.
#[test]
fn a_backend_asked_itself_on_the_port_of_an_expired_connection() -> Result<()> {
    for_each_bridge(|lab, net, proto| {
        exchange(lab, net, &from_a(net, proto, (net.vip(1), VIP_PORT)))?;
        silence(lab, net, LONG)?;
        let stale = lab.take_connections()?;
        lab.forget_earlier()?;
        let ask = from_a(net, proto, (net.b(), TARGET));
        lab.pod_sends(&ask)?.to_the_pod(&ask.hop())?;
        lab.put_connections(&stale)?;
        let answer = answer_of_b(&ask.hop());
        lab.pod_sends(&answer)?.to_the_pod(&answer.hop())
    })
}

/// The other way round: the connection to the backend itself is over.
#[test]
fn a_service_asked_on_the_port_of_an_expired_connection_to_its_backend() -> Result<()> {
    for_each_bridge(|lab, net, proto| {
        let direct = from_a(net, proto, (net.b(), TARGET));
        lab.pod_sends(&direct)?.to_the_pod(&direct.hop())?;
        silence(lab, net, LONG)?;
        let stale = lab.take_connections()?;
        lab.forget_earlier()?;
        let ask = from_a(net, proto, (net.vip(1), VIP_PORT));
        let arrives = at_backend(net, &ask, net.b());
        lab.pod_sends(&ask)?.to_the_pod(&arrives)?;
        lab.put_connections(&stale)?;
        let answer = answer_of_b(&arrives);
        lab.pod_sends(&answer)?.to_the_pod(&at_client(net, &answer, 1))
    })
}

/// What the earlier tables have is older: it changes nothing.
#[test]
fn an_older_connection_of_the_earlier_tables_does_not_count() -> Result<()> {
    for_each_bridge(|lab, net, proto| {
        let ask = from_a(net, proto, (net.vip(1), VIP_PORT));
        let answer = exchange(lab, net, &ask)?;
        let present = lab.take_connections()?;
        lab.forget_earlier()?;
        let direct = from_a(net, proto, (net.b(), TARGET));
        lab.pod_sends(&direct)?.to_the_pod(&direct.hop())?;
        lab.put_connections(&present)?;
        lab.age_earlier(1)?;
        lab.pod_sends(&answer)?.to_the_pod(&at_client(net, &answer, 1))
    })
}
