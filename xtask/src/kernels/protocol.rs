//! What the guest tells the host: one message a line, a word and what belongs to it.

use std::fmt;

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// The release of the kernel that runs.
    Kernel(String),
    /// A program was loaded: instructions that the verifier looked at, bytes of machine code.
    Program {
        /// Its name.
        name: String,
        /// Instructions that the verifier looked at.
        verified: u32,
        /// Bytes after compilation.
        machine_code: u32,
    },
    /// A line about why the programs could not be loaded.
    Refused(String),
    /// A step begins.
    Begin(String),
    /// What it prints.
    Text(String),
    /// A step has ended.
    End {
        /// Its name.
        name: String,
        /// Whether its status was 0.
        success: bool,
        /// How long it took.
        millis: u64,
    },
    /// The guest cannot go on.
    Trouble(String),
    /// All steps have been run.
    Done,
}

impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kernel(release) => write!(f, "kernel {release}"),
            Self::Program { name, verified, machine_code } => write!(f, "program {name} {verified} {machine_code}"),
            Self::Refused(line) => write!(f, "refused {line}"),
            Self::Begin(name) => write!(f, "begin {name}"),
            Self::Text(line) => write!(f, "text {line}"),
            Self::End { name, success, millis } => write!(f, "end {name} {success} {millis}"),
            Self::Trouble(why) => write!(f, "trouble {}", why.replace('\n', "; ")),
            Self::Done => f.write_str("done"),
        }
    }
}

impl Message {
    /// From a line; none when it is not one of ours.
    pub fn parse(line: &str) -> Option<Self> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        let words: Vec<&str> = rest.split(' ').collect();
        Some(match (word, &words[..]) {
            ("kernel", _) => Self::Kernel(rest.into()),
            ("program", [name, verified, code]) => Self::Program {
                name: (*name).into(),
                verified: verified.parse().ok()?,
                machine_code: code.parse().ok()?,
            },
            ("refused", _) => Self::Refused(rest.into()),
            ("begin", _) => Self::Begin(rest.into()),
            ("text", _) => Self::Text(rest.into()),
            ("end", [name, success, millis]) => {
                Self::End { name: (*name).into(), success: success.parse().ok()?, millis: millis.parse().ok()? }
            }
            ("trouble", _) => Self::Trouble(rest.into()),
            ("done", _) => Self::Done,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_is_read_as_it_was_written() {
        let all = [
            Message::Kernel("6.1.0-50-cloud-amd64".into()),
            Message::Program { name: "from_pod".into(), verified: 35_113, machine_code: 30_000 },
            Message::Refused("R5 !read_ok".into()),
            Message::Begin("packet".into()),
            Message::Text("test a ... ok".into()),
            Message::Text(String::new()),
            Message::End { name: "packet".into(), success: false, millis: 12 },
            Message::Trouble("no module".into()),
            Message::Done,
        ];
        for message in all {
            assert_eq!(Message::parse(&message.to_string()), Some(message));
        }
        assert_eq!(Message::parse("end packet maybe 3"), None);
        assert_eq!(Message::parse("[    0.1] Linux"), None);
    }
}
