//! How long a change of policies takes until no probe of any client contradicts it.

use std::sync::mpsc::Receiver;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::api::{Answer, Api, Connection, Event};
use super::figures::{Row, table};
use super::judge::{Want, is_settled, judge, millis};
use super::steady::{Probes, Sequence};
use super::{DEADLINE, Part, policies_path};
use crate::cluster::pods::Pod;
use crate::ui;

/// How long all probes have to conform before the next change.
const SETTLED: Duration = Duration::from_millis(200);
/// How long a probe may be under way before its silence is taken for a denial, while the trial
/// runs. The judgement comes afterwards.
const UNDER_WAY: Duration = Duration::from_millis(50);
/// What is sent so shortly before the next request may be judged after it, and is not judged here.
const GUARD: Duration = Duration::from_millis(20);
const DENIES: &str = "policy-that-denies";
const ALLOWS: &str = "policy-that-allows";

/// A change of the policies, in the order in which they are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    DenyingCreated,
    AllowingCreated,
    AllowingChanged,
    AllowingRestored,
    AllowingDeleted,
    DenyingDeleted,
}

const CHANGES: [Change; 6] = [
    Change::DenyingCreated,
    Change::AllowingCreated,
    Change::AllowingChanged,
    Change::AllowingRestored,
    Change::AllowingDeleted,
    Change::DenyingDeleted,
];

/// A change that was made.
struct Made {
    change: Change,
    asked: Instant,
    answered: Instant,
    /// When a watch of our own showed it.
    watched: Option<Instant>,
    /// Just before the next change.
    over: Instant,
}

/// Makes all changes so many times, those of ingress and of egress in turn.
pub fn run(api: &Api, clients: &[Pod], servers: &[Pod], repeats: usize) -> Result<Part> {
    let events = api.watch(&policies_path())?;
    let mut connection = api.connect()?;
    let probes = Probes::start(clients, servers)?;
    let progress = ui::Progress::start("changing policies");
    let result = make_all(&mut connection, &events, &probes, repeats, &progress);
    let sequences = probes.finish();
    let made = result.inspect_err(|_| progress.failed())?;
    progress.done();
    Ok(report(&made, &sequences?))
}

fn make_all(
    connection: &mut Connection,
    events: &Receiver<Event>,
    probes: &Probes,
    repeats: usize,
    progress: &ui::Progress,
) -> Result<Vec<Made>> {
    settle(&probes.sequences, Want::Pass, "the start")?;
    let mut all: Vec<Made> = Vec::new();
    for repeat in 0..repeats {
        progress.line(&format!("{repeat} of {repeats} times"));
        let direction = if repeat % 2 == 0 { Direction::Ingress } else { Direction::Egress };
        for change in CHANGES {
            let answer = change.make(connection, direction)?;
            settle(&probes.sequences, change.want(), &format!("{change:?} for {direction:?}"))?;
            // Nothing else changes policies here.
            let watched = events.try_iter().map(|event| event.at).find(|at| *at > answer.asked);
            let (asked, answered) = (answer.asked, answer.answered);
            all.push(Made { change, asked, answered, watched, over: Instant::now() });
        }
    }
    Ok(all)
}

/// Waits until every sequence conforms, and has done so for a while.
fn settle(sequences: &[Sequence], want: Want, what: &str) -> Result<()> {
    let end = Instant::now() + DEADLINE;
    loop {
        thread::sleep(SETTLED / 10);
        let until = Instant::now().checked_sub(UNDER_WAY).unwrap_or_else(Instant::now);
        let from = until.checked_sub(SETTLED).unwrap_or(until);
        let against = sequences.iter().find(|it| !is_settled(&it.probes(), want, from, until));
        let Some(against) = against else { return Ok(()) };
        let limit = DEADLINE.as_secs();
        ensure!(Instant::now() < end, "{what} is not in effect after {limit} s: {} wants {want:?}", against.name);
    }
}

/// Judges each change by all sequences.
fn report(made: &[Made], sequences: &[Sequence]) -> Part {
    let mut faults = Vec::new();
    let (mut rows, mut from_request) = (Vec::new(), Vec::new());
    let sequences: Vec<_> = sequences.iter().map(|it| (&it.name, it.probes())).collect();
    let probes: usize = sequences.iter().map(|(_, probes)| probes.len()).sum();
    for change in CHANGES {
        let (mut answered, mut asked) = (Vec::new(), Vec::new());
        for it in made.iter().filter(|it| it.change == change) {
            let until = it.over.checked_sub(GUARD).unwrap_or(it.over);
            let mut last = None;
            for (name, probes) in &sequences {
                let verdict = judge(probes, change.want(), it.asked, until);
                last = last.max(verdict.last_against);
                if verdict.wrong > 0 {
                    let word = if change.want() == Want::Pass { "lost" } else { "passed" };
                    faults.push(format!("{change:?}: {} probes {word} after it was in effect: {name}", verdict.wrong));
                }
            }
            // In effect before the answer: no time at all.
            answered.push(last.map_or(0.0, |last| millis(it.answered, last).max(0.0)));
            asked.push(last.map_or(0.0, |last| millis(it.asked, last)));
        }
        rows.push(Row::new(change.name(), answered).with_goal());
        from_request.push(Row::new(change.name(), asked));
    }
    let requests = made.iter().map(|it| millis(it.asked, it.answered));
    from_request.push(Row::new("(the API server's answer)", requests));
    let watched = made.iter().filter_map(|it| Some(millis(it.asked, it.watched?)));
    from_request.push(Row::new("(a watch of the trial's own shows it)", watched));
    let text = format!(
        "{}{}",
        table("CHANGE, FROM THE ANSWER TO THE LAST PROBE AGAINST IT", "ms", &rows),
        table("THE SAME FROM THE REQUEST", "ms", &from_request)
    );
    Part { text, probes, faults }
}

/// Which end policies isolate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Ingress,
    Egress,
}

impl Change {
    /// Whether probes pass afterwards.
    const fn want(self) -> Want {
        match self {
            Self::DenyingCreated | Self::AllowingChanged | Self::AllowingDeleted => Want::Deny,
            Self::AllowingCreated | Self::AllowingRestored | Self::DenyingDeleted => Want::Pass,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::DenyingCreated => "a policy is created that denies",
            Self::AllowingCreated => "one is created that allows",
            Self::AllowingChanged => "it is changed, and allows no more",
            Self::AllowingRestored => "it is changed back",
            Self::AllowingDeleted => "it is deleted",
            Self::DenyingDeleted => "the policy that denies is deleted",
        }
    }

    fn make(self, connection: &mut Connection, direction: Direction) -> Result<Answer> {
        let list = policies_path();
        let (denying, allowing) = (format!("{list}/{DENIES}"), format!("{list}/{ALLOWS}"));
        match self {
            Self::DenyingCreated => connection.create(&list, &policy(DENIES, direction, None)),
            Self::AllowingCreated => connection.create(&list, &policy(ALLOWS, direction, Some(direction.peer()))),
            Self::AllowingChanged => connection.patch(&allowing, &rules(direction, "nobody")),
            Self::AllowingRestored => connection.patch(&allowing, &rules(direction, direction.peer())),
            Self::AllowingDeleted => connection.delete(&allowing),
            Self::DenyingDeleted => connection.delete(&denying),
        }
    }
}

impl Direction {
    /// The label of who is isolated.
    const fn subject(self) -> &'static str {
        match self {
            Self::Ingress => "server",
            Self::Egress => "client",
        }
    }

    /// The label of the other end.
    const fn peer(self) -> &'static str {
        match self {
            Self::Ingress => "client",
            Self::Egress => "server",
        }
    }
}

/// A policy that isolates one direction, and allows pods with this label, or none.
fn policy(name: &str, direction: Direction, allowed: Option<&str>) -> Value {
    let mut policy = allowed.map_or_else(|| json!({"spec": {}}), |label| rules(direction, label));
    policy["metadata"] = json!({"name": name});
    policy["spec"]["podSelector"] = json!({"matchLabels": {"app": direction.subject()}});
    policy["spec"]["policyTypes"] = json!([format!("{direction:?}")]);
    policy
}

/// A policy's rules that allow pods with this label.
fn rules(direction: Direction, label: &str) -> Value {
    let peers = json!([{"podSelector": {"matchLabels": {"app": label}}}]);
    match direction {
        Direction::Ingress => json!({"spec": {"ingress": [{"from": peers}]}}),
        Direction::Egress => json!({"spec": {"egress": [{"to": peers}]}}),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_isolate_one_direction_and_allow_the_other_end() {
        assert_eq!(
            policy("a", Direction::Ingress, Some("client")),
            json!({"metadata": {"name": "a"}, "spec": {
                "podSelector": {"matchLabels": {"app": "server"}},
                "policyTypes": ["Ingress"],
                "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "client"}}}]}],
            }})
        );
        assert_eq!(
            policy("b", Direction::Egress, None),
            json!({"metadata": {"name": "b"}, "spec": {
                "podSelector": {"matchLabels": {"app": "client"}},
                "policyTypes": ["Egress"],
            }})
        );
    }

    #[test]
    fn changes_turn_by_turn_deny_and_allow() {
        let wants = CHANGES.map(Change::want);
        assert!(wants.chunks(2).all(|pair| pair == [Want::Deny, Want::Pass]), "{wants:?}");
    }
}
