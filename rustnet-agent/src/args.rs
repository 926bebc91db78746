//! Where settings come from: flags, `RUSTNET_*` variables and the file, one table for all three.
//!
//! This module only finds the text of each setting and remembers where it was; [`crate::config`] gives it a type.

mod file;
pub mod settings;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use clap::{Arg, ArgAction, ArgMatches, Command};

use settings::{Arity, Group, Setting};

/// Where a value was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// On the command line.
    Flag,
    /// In the environment.
    Env,
    /// In this file.
    File(PathBuf),
    /// In the settings of the running agent.
    Agent,
    /// Nowhere: the default.
    Default,
}

impl Origin {
    /// Which layer wins: the lower number.
    pub fn rank(&self) -> u8 {
        match self {
            Self::Flag => 0,
            Self::Env => 1,
            Self::File(_) => 2,
            Self::Agent => 3,
            Self::Default => 4,
        }
    }

    /// Whether somebody chose the value.
    fn is_chosen(&self) -> bool {
        *self != Self::Default
    }
}

/// The text of one setting, with its origin.
#[derive(Clone, Debug)]
pub struct Value {
    /// The setting.
    pub setting: &'static Setting,
    /// Its values; one, except for [`Arity::Many`].
    pub texts: Vec<String>,
    /// Where they were found.
    pub origin: Origin,
}

impl fmt::Display for Value {
    /// Names the origin first and then the other ways to give the setting.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Setting { flag, key, .. } = self.setting;
        let env = self.setting.env();
        match &self.origin {
            Origin::Flag => write!(f, "flag --{flag} (variable {env}, file key {key})"),
            Origin::Env => write!(f, "variable {env} (flag --{flag}, file key {key})"),
            Origin::File(path) => write!(f, "key {key} in {} (flag --{flag}, variable {env})", path.display()),
            Origin::Agent => write!(f, "the running agent's {key} (flag --{flag}, variable {env})"),
            Origin::Default => write!(f, "default of flag --{flag} (variable {env}, file key {key})"),
        }
    }
}

/// The text of every setting, by flag. Settings without a value and without a default are absent.
#[derive(Clone, Debug, Default)]
pub struct Values {
    values: BTreeMap<&'static str, Value>,
    /// `--prepare`: only prepare the host, and end.
    pub prepare: bool,
}

impl Values {
    /// The value of the setting with this flag.
    pub fn get(&self, flag: &str) -> Option<&Value> {
        self.values.get(flag)
    }

    /// Gathers the settings of a command line, an environment and the file that either of them names with `--config`.
    ///
    /// # Errors
    /// An unreadable or malformed file, or unknown keys in it. A malformed command line ends the process with clap's
    /// message, like `--help` does.
    pub fn gather<I, T>(args: I, env: &dyn Fn(&str) -> Option<OsString>) -> anyhow::Result<Self>
    where
        I: IntoIterator<Item = T>,
        T: Into<OsString> + Clone,
    {
        let matches = command().try_get_matches_from(args).unwrap_or_else(|error| error.exit());
        let values = Given::of(&matches).gather(env, &BTreeMap::new())?;
        Ok(Self { prepare: matches.get_flag("prepare"), ..values })
    }

    /// What somebody chose, by flag.
    pub fn chosen(&self) -> BTreeMap<String, Vec<String>> {
        let chosen = self.values.iter().filter(|(_, value)| value.origin.is_chosen());
        chosen.map(|(flag, value)| ((*flag).to_owned(), value.texts.clone())).collect()
    }

    fn layer(
        flags: &BTreeMap<&'static str, Vec<String>>,
        env: &dyn Fn(&str) -> Option<OsString>,
        config: Option<&Path>,
        agent: &BTreeMap<String, Vec<String>>,
    ) -> anyhow::Result<BTreeMap<&'static str, Value>> {
        let mut file = match config {
            Some(path) => file::read(path)?,
            None => BTreeMap::new(),
        };
        let mut values = BTreeMap::new();
        for setting in settings::all() {
            let name = setting.env();
            let from_env = match env(&name) {
                Some(text) if text.is_empty() => None,
                Some(text) => Some(text.into_string().map_err(|_| anyhow::anyhow!("variable {name}: not UTF-8"))?),
                None => None,
            };
            let from_file = file.remove(setting.key);
            let found = if let Some(texts) = flags.get(setting.flag) {
                Some((texts.clone(), Origin::Flag))
            } else if let Some(text) = from_env {
                Some((vec![text], Origin::Env))
            } else if let (Some(texts), Some(path)) = (from_file, config) {
                Some((texts, Origin::File(path.to_path_buf())))
            } else if let Some(texts) = agent.get(setting.flag) {
                Some((texts.clone(), Origin::Agent))
            } else {
                setting.default.map(|text| (vec![text.to_owned()], Origin::Default))
            };
            if let Some((mut texts, origin)) = found {
                if setting.arity == Arity::Many {
                    texts = texts.iter().flat_map(|text| text.split(',')).map(|text| text.trim().to_owned()).collect();
                    texts.retain(|text| !text.is_empty());
                }
                values.insert(setting.flag, Value { setting, texts, origin });
            }
        }
        Ok(values)
    }
}

/// The settings on a command line: the agent's, or that of a command that looks at things as an agent would.
#[derive(Clone, Debug, Default)]
pub struct Given {
    flags: BTreeMap<&'static str, Vec<String>>,
    config: Option<PathBuf>,
}

impl Given {
    /// Settings that every command has by other means; they are given by [`Self::set`].
    const NOT_LOCAL: [&str; 2] = ["bpffs", "run-dir"];

    fn of(matches: &ArgMatches) -> Self {
        let flags = settings::all().filter_map(|setting| {
            let texts: Vec<String> = matches.try_get_many::<String>(setting.flag).ok()??.cloned().collect();
            Some((setting.flag, texts))
        });
        Self { flags: flags.collect(), config: matches.get_one::<String>("config").map(PathBuf::from) }
    }

    /// True if no setting is on the command line.
    pub fn is_empty(&self) -> bool {
        self.flags.is_empty() && self.config.is_none()
    }

    /// Gives a setting that the command line has no flag for.
    pub fn set(&mut self, flag: &'static str, text: String) {
        self.flags.insert(flag, vec![text]);
    }

    /// With these, the settings of the environment and of the file that either names with `--config`; where all are silent,
    /// those of an agent (see [`Values::chosen`]).
    ///
    /// # Errors
    /// See [`Values::gather`].
    pub fn gather(
        self,
        env: &dyn Fn(&str) -> Option<OsString>,
        agent: &BTreeMap<String, Vec<String>>,
    ) -> anyhow::Result<Values> {
        let from_env = || env("RUSTNET_CONFIG").filter(|path| !path.is_empty()).map(PathBuf::from);
        let config = self.config.clone().or_else(from_env);
        let values = Values::layer(&self.flags, env, config.as_deref(), agent)?;
        Ok(Values { values, prepare: false })
    }
}

impl clap::FromArgMatches for Given {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        Ok(Self::of(matches))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::of(matches);
        Ok(())
    }
}

impl clap::Args for Given {
    fn augment_args(command: Command) -> Command {
        let own = |setting: &&Setting| !Self::NOT_LOCAL.contains(&setting.flag);
        command.arg(config()).args(arguments(own))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

fn config() -> Arg {
    Arg::new("config").long("config").value_name("FILE").help(
        "YAML or JSON file with the same settings, in camelCase; flags and variables win over it [env: RUSTNET_CONFIG]",
    )
}

/// The flags of the settings that a command has, below their headings.
fn arguments(is_wanted: impl Fn(&&Setting) -> bool) -> impl Iterator<Item = Arg> {
    let of_group = move |group: &'static Group| {
        let wanted: Vec<_> = group.settings.iter().filter(&is_wanted).collect();
        wanted.into_iter().map(|setting| argument(setting).help_heading(group.heading))
    };
    settings::GROUPS.iter().flat_map(of_group)
}

fn argument(setting: &Setting) -> Arg {
    let mut help = format!("{} [env: {}] [file: {}]", setting.help, setting.env(), setting.key);
    if let Some(default) = setting.default {
        help = format!("{help} [default: {default}]");
    }
    let arg = Arg::new(setting.flag).long(setting.flag).value_name(setting.value).help(help);
    match setting.arity {
        Arity::One => arg,
        Arity::Many => arg.action(ArgAction::Append),
        Arity::Switch => arg.num_args(0..=1).default_missing_value("true"),
    }
}

/// The agent's command line.
pub fn command() -> Command {
    let prepare = Arg::new("prepare")
        .long("prepare")
        .action(ArgAction::SetTrue)
        .help("Only mount the BPF file system where it is missing, and end: for a privileged init container");
    Command::new("rustnet-agent")
        .about("The node agent of rustnet: keeps this node's eBPF tables, links and routes as Kubernetes asks")
        .version(env!("CARGO_PKG_VERSION"))
        .arg(config())
        .arg(prepare)
        .args(arguments(|_| true))
}

#[cfg(test)]
mod tests {
    use super::command;

    #[test]
    fn the_command_line_is_well_formed() {
        command().debug_assert();
    }
}
