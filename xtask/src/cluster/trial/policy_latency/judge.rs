//! Judges sequences of probes: when a change took effect, and which probes it should not have let
//! pass, or lost.

use std::time::Instant;

/// What policies want with a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// It passes.
    Pass,
    /// It does not.
    Deny,
}

/// One of a sequence that one thread sent, one after the other.
#[derive(Clone, Copy, Debug)]
pub struct Probe {
    /// Before it was handed to the kernel.
    pub sent: Instant,
    /// Whether it arrived.
    pub has_passed: bool,
}

/// What a sequence says of a change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// When the last probe was sent that contradicts the change; `None`: none does.
    pub last_against: Option<Instant>,
    /// Probes that contradict the change although an earlier one conformed.
    pub wrong: usize,
    /// Probes that conform.
    pub conforming: usize,
}

impl Probe {
    fn conforms(&self, want: Want) -> bool {
        self.has_passed == (want == Want::Pass)
    }
}

/// Judges those that were sent from one moment until before another. A change shows once: those
/// before it contradict, all later ones conform.
pub fn judge(probes: &[Probe], want: Want, from: Instant, until: Instant) -> Verdict {
    let first = probes.partition_point(|probe| probe.sent < from);
    let mut verdict = Verdict::default();
    for probe in probes[first..].iter().take_while(|probe| probe.sent < until) {
        if probe.conforms(want) {
            verdict.conforming += 1;
        } else {
            verdict.wrong += usize::from(verdict.conforming > 0);
            verdict.last_against = Some(probe.sent);
        }
    }
    verdict
}

/// True if there are probes of this time, and all of them conform.
pub fn is_settled(probes: &[Probe], want: Want, from: Instant, until: Instant) -> bool {
    let verdict = judge(probes, want, from, until);
    verdict.conforming > 0 && verdict.last_against.is_none()
}

/// Returns how long after a moment another one was, in milliseconds; negative if it was before.
pub fn millis(from: Instant, to: Instant) -> f64 {
    let length = |earlier: Instant, later: Instant| later.saturating_duration_since(earlier).as_secs_f64() * 1e3;
    length(from, to) - length(to, from)
}

/// What came of probes that carry numbers from 0 on, by the numbers that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Numbered {
    /// How many were lost before the first that arrived: its number.
    pub before: u32,
    /// How many were lost between the first and the last that arrived.
    pub later: u32,
}

/// Returns what came of them; `None`: none arrived.
pub fn numbered(arrived: &[u32]) -> Option<Numbered> {
    let (first, last) = (*arrived.iter().min()?, *arrived.iter().max()?);
    let mut distinct = arrived.to_vec();
    distinct.sort_unstable();
    distinct.dedup();
    Some(Numbered { before: first, later: last - first + 1 - distinct.len() as u32 })
}

/// What came of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// No answer, and no refusal.
    Silent,
    /// The pod was reached, and nobody listened yet.
    Refused,
    /// The server answered.
    Answered,
}

/// A request of a sequence to a new server.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Before it was handed to the kernel.
    pub sent: Instant,
    /// What came of it.
    pub outcome: Outcome,
}

/// What a sequence says of a new server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reached {
    /// The first request that the pod answered or refused: the network lets them pass.
    pub network: Instant,
    /// The first request that the server answered.
    pub server: Instant,
    /// Requests that were silent before the first that was not.
    pub silent_before: u32,
    /// Requests without an answer after the first answer. Before it, kernels limit how often they
    /// refuse.
    pub lost: usize,
}

/// Returns what the requests say; `None`: no server answered.
pub fn reached(requests: &[Request]) -> Option<Reached> {
    let network = requests.iter().position(|it| it.outcome != Outcome::Silent)?;
    let server = requests.iter().position(|it| it.outcome == Outcome::Answered)?;
    let lost = requests[server..].iter().filter(|it| it.outcome != Outcome::Answered).count();
    let (network_at, server_at) = (requests[network].sent, requests[server].sent);
    Some(Reached { network: network_at, server: server_at, silent_before: network as u32, lost })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn after(start: Instant, millis: u64) -> Instant {
        start + Duration::from_millis(millis)
    }

    /// One probe a millisecond, `+` for one that passed.
    fn probes(start: Instant, text: &str) -> Vec<Probe> {
        let probe = |(at, sign): (usize, char)| Probe { sent: after(start, at as u64), has_passed: sign == '+' };
        text.chars().enumerate().map(probe).collect()
    }

    #[test]
    fn a_change_takes_effect_after_the_last_probe_against_it() {
        let start = Instant::now();
        let all = probes(start, "++++++----");
        let deny = judge(&all, Want::Deny, after(start, 2), after(start, 9));
        assert_eq!(deny, Verdict { last_against: Some(after(start, 5)), wrong: 0, conforming: 3 });
        // Nothing contradicts a change that was there before.
        let none = judge(&all, Want::Deny, after(start, 6), after(start, 10));
        assert_eq!(none, Verdict { last_against: None, wrong: 0, conforming: 4 });
        assert_eq!(judge(&all, Want::Pass, after(start, 20), after(start, 30)), Verdict::default());
    }

    #[test]
    fn what_contradicts_once_the_change_has_shown_is_wrong() {
        let start = Instant::now();
        let judged = |text: &str, want| {
            let verdict = judge(&probes(start, text), want, start, after(start, 100));
            (verdict.last_against.map(|at| millis(start, at).round() as i64), verdict.wrong, verdict.conforming)
        };
        assert_eq!(judged("++-+---", Want::Deny), (Some(3), 1, 4));
        assert_eq!(judged("--+--+", Want::Pass), (Some(4), 2, 2));
        assert_eq!(judged("+++", Want::Deny), (Some(2), 0, 0));
        assert_eq!(judged("--+", Want::Pass), (Some(1), 0, 1));
    }

    #[test]
    fn without_probes_nothing_has_settled() {
        let start = Instant::now();
        let all = probes(start, "+---");
        assert!(is_settled(&all, Want::Deny, after(start, 1), after(start, 4)));
        assert!(!is_settled(&all, Want::Deny, start, after(start, 4)));
        assert!(!is_settled(&all, Want::Deny, after(start, 4), after(start, 9)));
    }

    #[test]
    fn times_have_signs() {
        let start = Instant::now();
        assert!((millis(start, after(start, 3)) - 3.0).abs() < 1e-6);
        assert!((millis(after(start, 3), start) + 3.0).abs() < 1e-6);
    }

    #[test]
    fn numbers_show_what_was_lost_before_and_later() {
        assert_eq!(numbered(&[]), None);
        assert_eq!(numbered(&[0, 1, 2]), Some(Numbered { before: 0, later: 0 }));
        assert_eq!(numbered(&[7, 9, 8, 9, 12]), Some(Numbered { before: 7, later: 2 }));
    }

    #[test]
    fn a_server_is_reached_by_network_and_then_by_itself() {
        let start = Instant::now();
        let judged = |text: &str| {
            let requests: Vec<Request> = text
                .chars()
                .enumerate()
                .map(|(at, sign)| {
                    let outcome = match sign {
                        '.' => Outcome::Silent,
                        'r' => Outcome::Refused,
                        _ => Outcome::Answered,
                    };
                    Request { sent: after(start, at as u64), outcome }
                })
                .collect();
            let at = |it| millis(start, it).round() as i64;
            reached(&requests).map(|it| (at(it.network), at(it.server), it.silent_before, it.lost))
        };
        assert_eq!(judged("..rraaa"), Some((2, 4, 2, 0)));
        assert_eq!(judged("aaa"), Some((0, 0, 0, 0)));
        // Anything but an answer after an answer.
        assert_eq!(judged("r.ra.ra"), Some((0, 3, 0, 2)));
        assert_eq!((judged("..r."), judged("")), (None, None));
    }
}
