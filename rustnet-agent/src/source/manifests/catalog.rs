//! All files of the directory together: what they declare, who wins where two declare the same, and what is wrong with them.
//! Pure: texts in, events out.

use super::parse::{Declared, parse};
use crate::model::Problem;
use crate::source::convert::Converter;
use crate::source::{Event, ObjectRef, Origin};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// One file: its last good state, and what is wrong with its present one.
#[derive(Debug, Default)]
struct File {
    objects: Vec<Declared>,
    broken: Option<Problem>,
}

/// A place where an object is declared: file, and position in it. The first one wins.
type Place = (Arc<str>, usize);

/// What the files declare.
#[derive(Debug, Default)]
pub struct Catalog {
    converter: Converter,
    files: BTreeMap<Arc<str>, File>,
    places: HashMap<ObjectRef, BTreeSet<Place>>,
    delivered: HashMap<ObjectRef, Event>,
    reported: BTreeMap<Arc<str>, Box<[Problem]>>,
}

impl Catalog {
    /// Names of the files it knows.
    pub fn files(&self) -> Vec<Arc<str>> {
        self.files.keys().cloned().collect()
    }

    /// A file has this text now. Gives what changes by that.
    pub fn update(&mut self, name: &str, text: &str) -> Vec<Event> {
        match parse(text, &mut self.converter) {
            Ok(objects) => self.replace(name, objects),
            Err(broken) => self.broken(name, Some(broken.line), &broken.message),
        }
    }

    /// A file cannot be read or understood: its last good state stays.
    pub fn broken(&mut self, name: &str, line: Option<u64>, message: &str) -> Vec<Event> {
        let subject: Arc<str> = line.map_or_else(|| name.into(), |line| format!("{name}:{line}").into());
        let name: Arc<str> = name.into();
        let file = self.files.entry(Arc::clone(&name)).or_default();
        let kept = match file.objects.len() {
            0 => "nothing of it is used".to_owned(),
            1 => "its last good state stays (1 object)".to_owned(),
            n => format!("its last good state stays ({n} objects)"),
        };
        file.broken = Some(Problem::new(&subject, "", format!("{message}: {kept}; fix the file")));
        self.report(&[name].into())
    }

    /// A file is gone.
    pub fn remove(&mut self, name: &str) -> Vec<Event> {
        if self.files.contains_key(name) { self.replace(name, Vec::new()) } else { Vec::new() }
    }

    fn replace(&mut self, name: &str, objects: Vec<Declared>) -> Vec<Event> {
        let name: Arc<str> = self.files.get_key_value(name).map_or_else(|| name.into(), |(name, _)| Arc::clone(name));
        let old = self.files.remove(&name).unwrap_or_default();
        let mut touched: BTreeSet<ObjectRef> = BTreeSet::new();
        // Files whose claims may win or lose by this.
        let mut files: BTreeSet<Arc<str>> = [Arc::clone(&name)].into();
        for (i, declared) in old.objects.into_iter().enumerate() {
            if let Some(places) = self.places.get_mut(&declared.object) {
                places.remove(&(Arc::clone(&name), i));
                files.extend(places.iter().map(|(file, _)| Arc::clone(file)));
                if places.is_empty() {
                    self.places.remove(&declared.object);
                }
            }
            touched.insert(declared.object);
        }
        for (i, declared) in objects.iter().enumerate() {
            let places = self.places.entry(declared.object.clone()).or_default();
            places.insert((Arc::clone(&name), i));
            files.extend(places.iter().map(|(file, _)| Arc::clone(file)));
            touched.insert(declared.object.clone());
        }
        if !objects.is_empty() {
            self.files.insert(name, File { objects, broken: None });
        }
        let mut events: Vec<Event> = touched.into_iter().filter_map(|object| self.deliver(object)).collect();
        events.extend(self.report(&files));
        events
    }

    /// The event that brings the receiver up to date about one object, if any is needed.
    fn deliver(&mut self, object: ObjectRef) -> Option<Event> {
        let winner = self.places.get(&object).and_then(BTreeSet::first);
        let winner = winner.and_then(|(file, i)| self.files.get(file)?.objects.get(*i));
        match winner.map(|declared| &declared.event) {
            // Passed over, or not there.
            None | Some(Event::Delete(_)) => self.delivered.remove(&object).map(|_| Event::Delete(object)),
            Some(event) if self.delivered.get(&object) == Some(event) => None,
            Some(event) => {
                let event = event.clone();
                self.delivered.insert(object, event.clone());
                Some(event)
            }
        }
    }

    /// What is to be said of these files, where it is other than what was said.
    fn report(&mut self, files: &BTreeSet<Arc<str>>) -> Vec<Event> {
        let mut events = Vec::new();
        for name in files {
            let problems = self.problems(name);
            let before = self.reported.get(name);
            if before.map_or(&[][..], |before| before) != &*problems {
                if problems.is_empty() {
                    self.reported.remove(name);
                } else {
                    self.reported.insert(Arc::clone(name), problems.clone());
                }
                events.push(Event::Report { origin: Origin::Named(format!("file {name}").into()), problems });
            }
        }
        events
    }

    fn problems(&self, name: &Arc<str>) -> Box<[Problem]> {
        let Some(file) = self.files.get(name) else {
            return Box::default();
        };
        let lost = file.objects.iter().enumerate().filter_map(|(i, declared)| {
            let first = self.places.get(&declared.object)?.first()?;
            if *first == (Arc::clone(name), i) {
                return None;
            }
            let (winner, at) = first;
            let line = self.files.get(winner)?.objects.get(*at)?.line;
            let subject = format!("{name}:{}", declared.line).into();
            let message = format!("{} is in {winner}:{line} already, that one is used; remove one", declared.object);
            Some(Problem::new(&subject, "", message))
        });
        file.broken.clone().into_iter().chain(lost).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::Catalog;
    use crate::source::{Event, Object};

    fn service(name: &str, vip: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: {vip}, ports: [{{port: 80}}]}}\n"
        )
    }

    /// Events as short texts.
    fn texts(events: Vec<Event>) -> Vec<String> {
        let text = |event| match event {
            Event::Apply(Object::Service(service)) => format!("apply {} {}", service.name, service.vips[0]),
            Event::Delete(object) => format!("delete {}", object.name),
            Event::Reject(object, _) => format!("reject {}", object.name),
            Event::Report { origin, problems } => {
                let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
                format!("report {origin}: {}", problems.join(" | "))
            }
            other => format!("{other:?}"),
        };
        events.into_iter().map(text).collect()
    }

    #[test]
    fn only_what_changed_is_sent() {
        let mut it = Catalog::default();
        let (a, b) = (service("a", "10.96.0.1"), service("b", "10.96.0.2"));
        assert_eq!(
            texts(it.update("x.yaml", &format!("{a}---\n{b}"))),
            ["apply default/a 10.96.0.1", "apply default/b 10.96.0.2"]
        );
        assert_eq!(texts(it.update("x.yaml", &format!("{b}---\n{a}"))), [""; 0]);
        let b = service("b", "10.96.0.3");
        assert_eq!(texts(it.update("x.yaml", &b)), ["delete default/a", "apply default/b 10.96.0.3"]);
        assert_eq!(texts(it.remove("x.yaml")), ["delete default/b"]);
        assert_eq!(texts(it.remove("x.yaml")), [""; 0]);
    }

    #[test]
    fn an_object_may_move_between_files() {
        let mut it = Catalog::default();
        it.update("x.yaml", &service("a", "10.96.0.1"));
        let report =
            "report file y.yaml: y.yaml:1: Service default/a is in x.yaml:1 already, that one is used; remove one";
        assert_eq!(texts(it.update("y.yaml", &service("a", "10.96.0.1"))), [report]);
        assert_eq!(texts(it.remove("x.yaml")), ["report file y.yaml: "]);
        assert_eq!(texts(it.remove("y.yaml")), ["delete default/a"]);
    }

    #[test]
    fn the_first_file_by_name_wins() {
        let mut it = Catalog::default();
        assert_eq!(texts(it.update("y.yaml", &service("a", "10.96.0.2"))), ["apply default/a 10.96.0.2"]);
        let report =
            "report file y.yaml: y.yaml:1: Service default/a is in x.yaml:1 already, that one is used; remove one";
        assert_eq!(texts(it.update("x.yaml", &service("a", "10.96.0.1"))), ["apply default/a 10.96.0.1", report]);
        assert_eq!(texts(it.update("y.yaml", &service("a", "10.96.0.3"))), [""; 0]);
        assert_eq!(texts(it.remove("x.yaml")), ["apply default/a 10.96.0.3", "report file y.yaml: "]);
    }

    #[test]
    fn twice_in_one_file() {
        let mut it = Catalog::default();
        let text = format!("{}---\n{}", service("a", "10.96.0.1"), service("a", "10.96.0.2"));
        let report =
            "report file x.yaml: x.yaml:6: Service default/a is in x.yaml:1 already, that one is used; remove one";
        assert_eq!(texts(it.update("x.yaml", &text)), ["apply default/a 10.96.0.1", report]);
    }

    #[test]
    fn a_broken_file_keeps_its_last_good_state() {
        let mut it = Catalog::default();
        let good = service("a", "10.96.0.1");
        let report = "report file x.yaml: x.yaml:2: expected sequence start: nothing of it is used; fix the file";
        assert_eq!(texts(it.update("x.yaml", "kind: Service\napiVersion: [v1\n"))[0][..30], report[..30]);
        assert_eq!(texts(it.update("x.yaml", &good)), ["apply default/a 10.96.0.1", "report file x.yaml: "]);
        let bad = good.replace("[{port: 80}]", "80");
        let report =
            "report file x.yaml: x.yaml:4: expected sequence start: its last good state stays (1 object); fix the file";
        assert_eq!(texts(it.update("x.yaml", &bad)), [report]);
        assert_eq!(texts(it.update("x.yaml", &bad)), [""; 0], "it is said once");
        // The file still counts for who wins, and its repair without a change sends only that
        // report.
        let two = texts(it.update("y.yaml", &good));
        assert!(two.len() == 1 && two[0].contains("is in x.yaml:1 already"), "{two:?}");
        assert_eq!(texts(it.update("x.yaml", &good)), ["report file x.yaml: "]);
    }

    #[test]
    fn a_service_that_becomes_headless_is_gone() {
        let mut it = Catalog::default();
        assert_eq!(texts(it.update("x.yaml", &service("a", "None"))), [""; 0]);
        it.update("x.yaml", &service("a", "10.96.0.1"));
        assert_eq!(texts(it.update("x.yaml", &service("a", "None"))), ["delete default/a"]);
        assert_eq!(texts(it.update("x.yaml", &service("a", "\"\""))), ["reject default/a"]);
        assert_eq!(texts(it.update("x.yaml", &service("a", "\"\""))), [""; 0]);
        assert_eq!(texts(it.remove("x.yaml")), ["delete default/a"]);
    }
}
