//! What both proxies did with each question, side by side.

use super::expected::{self, Context};
use super::health;
use super::model::Case;
use super::probe::{Failure, Heard, Patience};
use super::question::{self, Question};
use super::world::{NODES, World};
use anyhow::{Result, bail, ensure};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write as _};
use std::net::IpAddr;
use std::time::Duration;
use testkit::wait;

/// The objects of so many differences are shown.
const SHOWN: usize = 12;
/// So many lines of the report are part of the error.
const LINES: usize = 60;

/// Whose address a server saw.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// The client's.
    Client,
    /// A node's, which is not the client.
    Node(&'static str),
    /// Any other.
    Other(IpAddr),
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Client => f.write_str("client"),
            Self::Node(name) => f.write_str(name),
            Self::Other(ip) => write!(f, "{ip}"),
        }
    }
}

/// What clients and servers saw of a question, in terms that two worlds share.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// Each server that answered, and the sources that it saw.
    pub answers: BTreeMap<String, BTreeSet<Source>>,
    /// How other connections failed.
    pub failures: BTreeSet<Failure>,
}

impl Observed {
    /// All connections failed like this.
    pub fn only(failure: Failure) -> Self {
        Self { answers: BTreeMap::new(), failures: [failure].into() }
    }

    fn of(heard: &Heard, question: &Question, world: &World) -> Self {
        let source = |ip: &IpAddr| {
            if world.is_at(question.from, *ip) {
                return Source::Client;
            }
            let nodes = NODES.into_iter().zip([super::world::Place::NodeA, super::world::Place::NodeB]);
            let mut owner = nodes.filter(|(_, place)| world.is_at(*place, *ip)).map(|(name, _)| name);
            owner.next().map_or(Source::Other(*ip), Source::Node)
        };
        let answers = heard.answers.iter().map(|(name, seen)| (name.clone(), seen.iter().map(source).collect()));
        Self { answers: answers.collect(), failures: heard.failures.clone() }
    }
}

impl fmt::Display for Observed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (server, seen) in &self.answers {
            write!(f, "{server} sees {seen:?} ")?;
        }
        for failure in &self.failures {
            write!(f, "{failure:?} ")?;
        }
        Ok(())
    }
}

/// A question that the two answer differently, and no rule says so.
pub struct Difference {
    question: Question,
    reference: Observed,
    predicted: Observed,
    rules: Vec<&'static str>,
    ours: Observed,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Question { front, proto, target, from, .. } = self.question;
        writeln!(f, "{proto} {target} ({front:?}) from {from:?}")?;
        writeln!(f, "    kube-proxy: {}", self.reference)?;
        if !self.rules.is_empty() {
            writeln!(f, "    expected:   {} by {:?}", self.predicted, self.rules)?;
        }
        writeln!(f, "    rustnet:    {}", self.ours)
    }
}

/// What a comparison found.
#[derive(Default)]
pub struct Report {
    /// Questions asked.
    pub asked: usize,
    /// Questions with answers, refusals and drops in the reference.
    pub answered: usize,
    pub refused: usize,
    pub dropped: usize,
    /// How often each rule changed what is expected.
    pub applied: BTreeMap<&'static str, usize>,
    /// Questions that had to be asked again.
    pub unsteady: usize,
    /// What no rule knows.
    pub differences: Vec<Difference>,
}

impl Report {
    /// Adds another's figures.
    pub fn add(&mut self, other: Self) {
        self.asked += other.asked;
        self.answered += other.answered;
        self.refused += other.refused;
        self.dropped += other.dropped;
        self.unsteady += other.unsteady;
        for (rule, count) in other.applied {
            *self.applied.entry(rule).or_default() += count;
        }
        self.differences.extend(other.differences);
    }

    /// The Service of the first difference.
    pub fn first(&self) -> Option<usize> {
        self.differences.first().map(|difference| difference.question.case)
    }

    /// Kinds of differences, with how often each is there.
    fn kinds(&self) -> BTreeMap<String, usize> {
        let mut kinds = BTreeMap::new();
        for Difference { question, predicted, ours, .. } in &self.differences {
            let mut changes = BTreeSet::new();
            let servers: BTreeSet<_> = predicted.answers.keys().chain(ours.answers.keys()).collect();
            for server in servers {
                let (want, found) = (predicted.answers.get(server), ours.answers.get(server));
                if want != found {
                    changes.insert(format!("{} {want:?} -> {found:?}", relation(question, server)));
                }
            }
            if predicted.failures != ours.failures {
                changes.insert(format!("{:?} -> {:?}", predicted.failures, ours.failures));
            }
            let kind = format!("{:?} from {:?}: {changes:?}", question.front, question.from);
            *kinds.entry(kind).or_default() += 1;
        }
        kinds
    }

    /// An error with the first differences and their objects, if there are any. All of them are in a file, which it names.
    pub fn check(&self, cases: &[Case]) -> Result<()> {
        if self.differences.is_empty() {
            return Ok(());
        }
        let (mut kinds, mut text, mut shown) = (String::new(), String::new(), BTreeSet::new());
        for (kind, count) in self.kinds() {
            let _ = write!(kinds, "\n  {count} {kind}");
        }
        for (i, difference) in self.differences.iter().enumerate() {
            let case = &cases[difference.question.case];
            let _ = write!(text, "\n{}: {difference}", case.name());
            if i < SHOWN && shown.insert(difference.question.case) {
                for object in case.objects() {
                    let _ = writeln!(text, "    {object}");
                }
                let _ = writeln!(text, "    status {}", case.status());
            }
        }
        let file = testkit::dist::artifacts()?.join("differential.txt");
        std::fs::write(&file, format!("{kinds}\n{text}"))?;
        let first: String = text.lines().take(LINES).flat_map(|line| [line, "\n"]).collect();
        let count = self.differences.len();
        bail!("{count} differences that no rule knows, all in {}:{kinds}\n{first}", file.display())
    }

    /// Rules that never applied.
    pub fn idle(&self) -> Vec<&'static str> {
        expected::names().filter(|name| !self.applied.contains_key(name)).collect()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { asked, answered, refused, dropped, unsteady, .. } = self;
        write!(
            f,
            "{asked} questions; kube-proxy answered {answered}, refused {refused}, dropped {dropped}; \
             {unsteady} asked again; rules: {:?}",
            self.applied
        )
    }
}

/// Where a server is, seen from the node that is asked.
fn relation(question: &Question, server: &str) -> String {
    let Some(node) = expected::node_of(server) else { return "outside".to_owned() };
    let kind = if server.starts_with('n') { "host" } else { "pod" };
    format!("{kind} {}", if node == question.entry() { "here" } else { "there" })
}

/// Asks both worlds, and those questions again on which they seem to differ.
pub fn compare(cases: &[Case], questions: &[Question], reference: &World, ours: &World) -> Result<Report> {
    let mut it = Comparison {
        cases,
        questions,
        siblings: question::siblings(questions),
        worlds: [reference, ours],
        reference: vec![Observed::default(); questions.len()],
        report: Report { asked: questions.len(), ..Report::default() },
    };
    let all: Vec<usize> = (0..questions.len()).collect();
    let mut open = it.attempt(&all, FIRST)?;
    it.report.unsteady = open.len();
    for difference in &it.report.differences {
        eprint!("asked again: {difference}");
    }
    // Whether there are many or few: some that stay are enough.
    while !open.is_empty() {
        let mut some = open.split_off(open.len().saturating_sub(AT_ONCE));
        for attempt in AGAIN {
            some = it.attempt(&some, attempt)?;
        }
        if !some.is_empty() {
            break;
        }
    }
    Ok(it.report)
}

/// How often and how patiently to ask.
#[derive(Clone, Copy)]
struct Attempt {
    /// New connections for each backend that there may be.
    each: usize,
    timeout: Duration,
    timeouts: usize,
}

/// A machine that is busy looks like one that drops: whatever differs is asked again with more patience.
const FIRST: Attempt = Attempt { each: 3, timeout: Duration::from_millis(1400), timeouts: 2 };
const AGAIN: [Attempt; 2] = [
    Attempt { each: 6, timeout: Duration::from_secs(2), timeouts: 4 },
    Attempt { each: 10, timeout: Duration::from_secs(4), timeouts: 6 },
];
/// So many questions are asked again before a difference counts.
const AT_ONCE: usize = 100;

/// A comparison at work.
struct Comparison<'a> {
    cases: &'a [Case],
    questions: &'a [Question],
    siblings: Vec<Option<usize>>,
    worlds: [&'a World; 2],
    /// What kube-proxy did when asked last.
    reference: Vec<Observed>,
    report: Report,
}

impl Comparison<'_> {
    /// Asks these questions in both worlds, and returns those that differ.
    fn attempt(&mut self, open: &[usize], attempt: Attempt) -> Result<Vec<usize>> {
        let helpers = open.iter().filter_map(|i| self.siblings[*i]);
        let asked: BTreeSet<usize> = open.iter().copied().chain(helpers).collect();
        let wanted = asked.iter().map(|i| {
            let question = &self.questions[*i];
            let tries = 3 + attempt.each * self.cases[question.case].count_endpoints().min(5);
            let patience = Patience { tries, timeout: attempt.timeout, timeouts: attempt.timeouts };
            (question.from, question.proto, question.target, patience)
        });
        let wanted: Vec<_> = wanted.collect();
        let [reference, ours] = self.worlds;
        let (theirs, own) = std::thread::scope(|scope| {
            let theirs = scope.spawn(|| reference.ask_all(&wanted));
            let own = ours.ask_all(&wanted);
            (theirs.join(), own)
        });
        let theirs = theirs.map_err(|panic| anyhow::anyhow!("asking {} panicked: {panic:?}", reference.name))??;
        let own: BTreeMap<usize, Heard> = asked.iter().copied().zip(own?).collect();
        for (i, heard) in asked.iter().zip(&theirs) {
            self.reference[*i] = Observed::of(heard, &self.questions[*i], reference);
        }
        self.report.differences.clear();
        let mut still = Vec::new();
        for i in open {
            let seen = Observed::of(&own[i], &self.questions[*i], ours);
            if !self.agrees(*i, seen) {
                still.push(*i);
            }
        }
        Ok(still)
    }

    /// Judges what rustnet did with a question.
    fn agrees(&mut self, i: usize, ours: Observed) -> bool {
        let question = self.questions[i];
        let sibling = self.siblings[i].map(|sibling| &self.reference[sibling]);
        let context = Context { case: &self.cases[question.case], question, sibling };
        let (predicted, rules) = expected::predict(&context, &self.reference[i]);
        let agrees = expected::agrees(&context, &predicted, &ours);
        let reference = self.reference[i].clone();
        if agrees {
            self.report.count(&reference, &rules);
        } else {
            self.report.differences.push(Difference { question, reference, predicted, rules, ours });
        }
        agrees
    }
}

/// Compares what both say of the Services' endpoints to load balancers. These listeners open a moment after the rules are there.
pub fn compare_health(cases: &[Case], reference: &World, ours: &World, report: &mut Report) -> Result<()> {
    for case in cases {
        let Some(port) = case.health_check() else { continue };
        let rule = wait::until(&format!("{}: health checks at {port}", case.name()), || {
            let theirs = health::ask(reference, port)?;
            let own = health::ask(ours, port)?;
            let predicted = health::predict(&theirs);
            ensure!(predicted == own, "kube-proxy: {theirs:?}, expected: {predicted:?}, rustnet: {own:?}");
            Ok((predicted != theirs).then_some(expected::HEALTH[case.families.len() - 1]))
        })?;
        report.asked += 1;
        report.count(&Observed::default(), rule.as_slice());
    }
    Ok(())
}

impl Report {
    fn count(&mut self, reference: &Observed, rules: &[&'static str]) {
        self.answered += usize::from(!reference.answers.is_empty());
        self.refused += usize::from(reference.failures.contains(&Failure::Refused));
        self.dropped += usize::from(reference.failures.contains(&Failure::Dropped));
        for rule in rules {
            *self.applied.entry(rule).or_default() += 1;
        }
    }
}
