//! Why policies dropped a packet, for `rustnetctl monitor`: the ends that deny its flow by the maps as they are now.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::front::{Front, Fronts};
use super::half::{Half, Word, halves};
use super::view::View;
use crate::cli::Places;
use crate::plan::policies::judge::{Flow, judge};

/// The maps are read again after this time at the earliest.
const PERIOD: Duration = Duration::from_secs(1);
/// Ends that are listed: a Service may have thousands of backends.
const LISTED: usize = 4;

/// Why a packet was dropped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// Name of the pod that sent the packet, if that is known.
    pub src_pod: Option<String>,
    /// Name of the pod that the packet is for.
    pub dst_pod: Option<String>,
    /// The Service that it is for.
    pub service: Option<String>,
    /// The ends that deny the flow, a few; those of the flow whose answer the packet may be come last. None if the maps allow both.
    pub denied: Vec<Half>,
    /// All of it in a sentence.
    pub text: String,
}

/// A packet that was dropped.
#[derive(Clone, Copy, Debug)]
pub struct Dropped {
    /// From where.
    pub src: SocketAddr,
    /// To where, before the translation.
    pub dst: SocketAddr,
    /// IP protocol number.
    pub proto: u8,
}

/// What the maps said when they were last read.
#[derive(Default)]
pub struct Explainer {
    /// When they were read, and what they said; nothing if that failed.
    read: Option<(Instant, Option<(View, Fronts)>)>,
}

impl Explainer {
    /// Explains a drop; `None` if the maps cannot be read.
    pub fn explain(&mut self, places: &Places, dropped: &Dropped) -> Option<Explanation> {
        if self.read.as_ref().is_none_or(|(at, ..)| at.elapsed() >= PERIOD) {
            // An explanation is an ornament: without it the drop is printed all the same.
            let read = View::read(places).and_then(|view| Ok((view, Fronts::read(places)?))).ok();
            self.read = Some((Instant::now(), read));
        }
        let (_, Some((view, fronts))) = self.read.as_ref()? else { return None };
        let is_outside = view.is_outside(dropped.src.ip());
        Some(explain(view, &|to, proto| fronts.find(to, proto, is_outside), dropped))
    }
}

fn explain(view: &View, front: &dyn Fn(SocketAddr, u8) -> Front, dropped: &Dropped) -> Explanation {
    let Dropped { src, dst, proto } = *dropped;
    let (servers, service) = match front(dst, proto) {
        Front::Service { name, backends } => (backends, Some(name.unwrap_or_else(|| dst.to_string()))),
        Front::None | Front::NoPort => (vec![dst], None),
    };
    let flow = |client: IpAddr, server: &SocketAddr| Flow { client, server: server.ip(), proto, port: server.port() };
    let mut asked: Vec<Half> = servers.iter().flat_map(|server| drops(view, &flow(src.ip(), server))).collect();
    asked.dedup();
    asked.truncate(LISTED);
    // What the server of an earlier flow sends is judged as that flow. Which of both the packet was, it does not say.
    let answered: Vec<Half> = drops(view, &flow(dst.ip(), &src)).collect();
    let show = |halves: &[Half]| {
        let texts: Vec<String> = halves.iter().map(|half| format!("{}: {}", half.direction, half.text)).collect();
        texts.join("; ")
    };
    let text = match (&asked[..], &answered[..]) {
        ([], []) if view.around.host.contains(&src.ip()) => {
            "the node's stack forwarded it in the node's name, and policies judge it as not from the node".to_owned()
        }
        ([], []) => "the maps as they were read allow it: policies may have changed meanwhile".to_owned(),
        (asked, []) => show(asked),
        ([], answered) => format!("as an answer, {}", show(answered)),
        (asked, answered) => format!("as a new flow, {}; or as an answer, {}", show(asked), show(answered)),
    };
    let name = |socket: &SocketAddr| view.pods.get(&socket.ip()).cloned();
    let denied = [asked, answered].concat();
    Explanation { src_pod: name(&src), dst_pod: name(&dst), service, denied, text }
}

/// The ends of a flow that drop it.
fn drops(view: &View, flow: &Flow) -> impl Iterator<Item = Half> + use<> {
    let halves = halves(view, flow, &judge(&view.maps, &view.around, flow));
    halves.into_iter().filter(|half| half.verdict.is_drop() || half.verdict == Word::Audited)
}

#[cfg(test)]
pub mod tests {
    use super::{Dropped, Explanation, Front, SocketAddr, explain};
    use crate::cli::policy::build::{ip, view};
    use rustnet_common::tuple::proto;

    /// Of a packet from 10.1.1.2, a client, to a port of 10.1.1.1, which is isolated.
    pub fn explanation() -> Explanation {
        of((2, 4000), (1, 80))
    }

    fn of(src: (u8, u16), dst: (u8, u16)) -> Explanation {
        let end = |(n, port)| SocketAddr::new(ip(n), port);
        let backends = vec![end((1, 80)), end((1, 81)), end((2, 80))];
        let front = |to: SocketAddr, _: u8| match to.ip() {
            vip if vip == ip(200) => Front::Service { name: Some("shop/db".to_owned()), backends: backends.clone() },
            _ => Front::None,
        };
        explain(&view(), &front, &Dropped { src: end(src), dst: end(dst), proto: proto::TCP })
    }

    #[test]
    fn the_end_that_denies_is_named_with_its_policies() {
        let it = explanation();
        assert_eq!(
            it.text,
            "as a new flow, ingress: shop/db-0 (10.1.1.1) is isolated for ingress by shop/db, shop/base; no rule of them allows \
             shop/web-0 (10.1.1.2) of class 0000002b at TCP/80; or as an answer, egress: shop/db-0 (10.1.1.1) is isolated for egress by \
             set 0000001b; no rule of them allows shop/web-0 (10.1.1.2) of class 0000002b at TCP/4000"
        );
        assert_eq!((it.src_pod.as_deref(), it.dst_pod.as_deref()), (Some("shop/web-0"), Some("shop/db-0")));
        assert_eq!((it.denied.len(), it.denied[0].direction), (2, "ingress"));
        // The rules allow this port.
        let it = of((2, 4000), (1, 5433));
        assert!(it.text.starts_with("as an answer"), "{}", it.text);
    }

    #[test]
    fn a_service_means_its_backends() {
        let it = of((2, 4000), (200, 80));
        assert_eq!(it.service.as_deref(), Some("shop/db"));
        assert_eq!(it.denied.len(), 2, "the third is the client itself: {}", it.text);
    }

    #[test]
    fn an_answer_is_judged_as_its_flow() {
        let it = of((2, 4000), (1, 5432));
        assert!(it.text.starts_with("as an answer, egress: shop/db-0 (10.1.1.1) is isolated"), "{}", it.text);
        assert_eq!(it.denied[0].direction, "egress");
    }

    /// The rule of a flow that is open has gone: its server's next packet is dropped by the ingress of that server.
    #[test]
    fn both_readings_of_a_packet_are_named_if_both_deny_it() {
        let it = of((1, 80), (2, 4000));
        assert_eq!(
            it.denied.iter().map(|half| half.direction).collect::<Vec<_>>(),
            ["egress", "ingress"],
            "{}",
            it.text
        );
        assert!(it.text.starts_with("as a new flow, egress: shop/db-0"), "{}", it.text);
        assert!(it.text.contains("; or as an answer, ingress: shop/db-0 (10.1.1.1) is isolated"), "{}", it.text);
    }

    #[test]
    fn what_the_nodes_stack_forwards_is_not_called_allowed() {
        let (node, pod) = (SocketAddr::new([192, 0, 2, 1].into(), 4000), SocketAddr::new(ip(2), 80));
        let it = explain(&view(), &|_, _| Front::None, &Dropped { src: node, dst: pod, proto: proto::TCP });
        assert!(it.text.starts_with("the node's stack forwarded it"), "{}", it.text);
    }

    #[test]
    fn what_is_allowed_by_now_or_not_decided_says_so() {
        let it = of((2, 4000), (50, 80));
        assert_eq!((it.denied.len(), it.text.contains("may have changed meanwhile")), (0, true));
        let it = of((3, 4000), (2, 80));
        assert!(it.text.contains("the agent has not decided 10.1.1.3"), "{}", it.text);
    }
}
