//! What a person sees: plain lines, and for long work a spinner on a terminal or a sign of life every half minute elsewhere.

use std::io::IsTerminal;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// How often a log without a terminal shows that work goes on.
const SIGN_OF_LIFE: Duration = Duration::from_secs(30);

/// Prints one step's headline. All of xtask's own words go to standard error, so that standard output stays a command's own.
pub fn step(text: &str) {
    eprintln!("==> {text}");
}

/// Prints a detail below a headline.
pub fn detail(text: &str) {
    eprintln!("    {text}");
}

/// Prints what a person should know though nothing failed.
pub fn warn(text: &str) {
    eprintln!("warning: {text}");
}

/// One long piece of work.
#[derive(Clone)]
pub struct Progress {
    title: Arc<str>,
    start: Instant,
    bar: Option<ProgressBar>,
    last: Arc<Mutex<String>>,
    over: Arc<(Mutex<bool>, Condvar)>,
}

impl Progress {
    /// Says that the work begins.
    pub fn start(title: &str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix} [{elapsed}] {wide_msg:.dim}") {
                bar.set_style(style);
            }
            bar.set_prefix(title.to_owned());
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        let progress =
            Self { title: title.into(), start: Instant::now(), bar, last: Arc::default(), over: Arc::default() };
        if progress.bar.is_none() {
            step(title);
            let watcher = progress.clone();
            thread::spawn(move || watcher.signs_of_life());
        }
        progress
    }

    /// Notes the latest line of output.
    pub fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(text.to_owned()),
            None => {
                if let Ok(mut last) = self.last.lock() {
                    text.clone_into(&mut last);
                }
            }
        }
    }

    /// Says that the work succeeded.
    pub fn done(&self) {
        self.end("done");
    }

    /// Says that the work failed; the caller returns the error.
    pub fn failed(&self) {
        self.end("FAILED");
    }

    fn end(&self, word: &str) {
        if let Ok(mut over) = self.over.0.lock() {
            *over = true;
        }
        self.over.1.notify_all();
        let text = format!("{}: {word} in {}", self.title, seconds(self.start.elapsed()));
        match &self.bar {
            Some(bar) => {
                bar.finish_and_clear();
                step(&text);
            }
            None => detail(&text),
        }
    }

    fn signs_of_life(&self) {
        let Ok(mut over) = self.over.0.lock() else { return };
        while !*over {
            let Ok((guard, wait)) = self.over.1.wait_timeout(over, SIGN_OF_LIFE) else { return };
            over = guard;
            if wait.timed_out() && !*over {
                let last = self.last.lock().map(|l| l.clone()).unwrap_or_default();
                detail(&format!("{} so far; {last}", seconds(self.start.elapsed())));
            }
        }
    }
}

/// A duration as people say it: `0.4 s`, `12 s`, `3 min 20 s`.
pub fn seconds(time: Duration) -> String {
    match time.as_secs() {
        0..=9 => format!("{:.1} s", time.as_secs_f64()),
        s @ 10..=119 => format!("{s} s"),
        s => format!("{} min {} s", s / 60, s % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_well() {
        assert_eq!(seconds(Duration::from_millis(420)), "0.4 s");
        assert_eq!(seconds(Duration::from_secs(12)), "12 s");
        assert_eq!(seconds(Duration::from_secs(200)), "3 min 20 s");
    }
}
