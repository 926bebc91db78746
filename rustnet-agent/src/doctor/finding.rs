//! The result of a check, and its severity before the agent starts and while the agent runs.

use serde::Serialize;

use super::Stage;

/// How a thing stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// As it should be, or of no consequence.
    Ok,
    /// Works, but not as it should; or could not be checked.
    Warning,
    /// Some pods or nodes will not be reached. The agent runs nevertheless, and is better than none.
    Fault,
    /// The agent cannot work.
    Fatal,
}

/// The three marks that people see, here and in `rustnetctl status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mark {
    /// A tick: as it should be.
    Ok,
    /// An exclamation mark: works, but not as it should.
    Warning,
    /// A cross: does not work.
    Bad,
}

impl Level {
    /// Before the agent runs, only what it cannot run with is a cross: to hold an agent back for anything else would turn a fault
    /// of some pods into one of all.
    pub fn mark(self, stage: Stage) -> Mark {
        match (self, stage) {
            (Self::Ok, _) => Mark::Ok,
            (Self::Warning, _) | (Self::Fault, Stage::Before) => Mark::Warning,
            (Self::Fault, Stage::Running) | (Self::Fatal, _) => Mark::Bad,
        }
    }
}

/// What one check found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How it stands.
    pub level: Level,
    /// Which check it is: for programs, see [`Finding::id`]. The same in all releases, and without data of the host.
    pub check: &'static str,
    /// What was looked at, in a few words.
    pub what: String,
    /// What is so.
    pub detail: String,
    /// What to do; empty only where nothing need be done.
    pub hint: String,
}

impl Finding {
    /// A finding without a hint, which is for [`Level::Ok`] only.
    pub fn new(level: Level, check: &'static str, detail: impl Into<String>) -> Self {
        Self { level, check, what: check.to_owned(), detail: detail.into(), hint: String::new() }
    }

    /// All is well.
    pub fn ok(check: &'static str, detail: impl Into<String>) -> Self {
        Self::new(Level::Ok, check, detail)
    }

    /// The facts could not be had.
    pub fn unknown(check: &'static str, error: &anyhow::Error) -> Self {
        Self::new(Level::Warning, check, format!("not checked: {error:#}"))
            .hint("run it as root in the host's network namespace")
    }

    /// With other words for what was looked at, where they hold data of the host.
    #[must_use]
    pub fn called(self, what: impl Into<String>) -> Self {
        Self { what: what.into(), ..self }
    }

    /// What programs know the check by: `ports.node-ports` of the group `Ports`.
    pub fn id(&self, group: &str) -> String {
        let slug = |text: &str| text.to_lowercase().replace(' ', "-").replace('\'', "");
        format!("{}.{}", slug(group), slug(self.check))
    }

    /// With what to do about it.
    #[must_use]
    pub fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: hint.into(), ..self }
    }
}

/// Checks that belong together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Their heading.
    pub name: &'static str,
    /// What they found.
    pub findings: Vec<Finding>,
}

impl Group {
    /// A group.
    pub fn new(name: &'static str, findings: Vec<Finding>) -> Self {
        Self { name, findings }
    }
}

/// Takes apart a message of the agent's: what is wrong, and the remedy behind its last semicolon.
pub fn split_remedy(message: &str) -> (&str, &str) {
    message.rsplit_once("; ").unwrap_or((message, "see the message"))
}

/// For the tests of all groups: one fault makes one finding that is not ok, of this level, with these words in it, and a hint.
#[cfg(test)]
pub fn assert_only(findings: &[Finding], level: Level, detail: &str, hint: &str) {
    let wrong: Vec<_> = findings.iter().filter(|it| it.level != Level::Ok).collect();
    let [found] = wrong[..] else { panic!("one fault, {} findings: {wrong:#?}", wrong.len()) };
    assert_eq!(found.level, level, "{found:?}");
    assert!(found.detail.contains(detail), "{detail:?} is not in {found:?}");
    assert!(found.hint.contains(hint) && !found.hint.is_empty(), "{hint:?} is not in {found:?}");
}

/// For the tests of all groups: nothing is wrong.
#[cfg(test)]
pub fn assert_well(findings: &[Finding]) {
    assert!(findings.iter().all(|it| it.level == Level::Ok && it.hint.is_empty()), "{findings:#?}");
}

#[cfg(test)]
mod tests {
    use super::{Level, Mark, Stage, split_remedy};

    #[test]
    fn before_the_agent_only_the_fatal_is_a_cross() {
        let marks = |stage| [Level::Ok, Level::Warning, Level::Fault, Level::Fatal].map(|level| level.mark(stage));
        assert_eq!(marks(Stage::Before), [Mark::Ok, Mark::Warning, Mark::Warning, Mark::Bad]);
        assert_eq!(marks(Stage::Running), [Mark::Ok, Mark::Warning, Mark::Bad, Mark::Bad]);
    }

    #[test]
    fn remedies_are_behind_the_last_semicolon() {
        assert_eq!(split_remedy("a; b; do c"), ("a; b", "do c"));
        assert_eq!(split_remedy("a").0, "a");
    }
}
