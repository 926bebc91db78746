//! A real directory, as editors and tools treat it.

use super::disk::is_manifest;
use super::run;
use crate::source::{Event, Kind, Object};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;
use tokio::sync::mpsc::{Receiver, channel};

/// A source that runs on a directory of its own.
struct Rig {
    events: Receiver<Event>,
    dir: PathBuf,
    _parent: TempDir,
}

impl Rig {
    /// Starts on a directory that was prepared.
    fn start(prepare: impl FnOnce(&Path)) -> Self {
        let parent = TempDir::new().unwrap();
        let dir = parent.path().join("manifests");
        prepare(&dir);
        let (sender, events) = channel(1024);
        tokio::spawn(run(dir.clone(), sender));
        Self { events, dir, _parent: parent }
    }

    /// Starts on a directory with these files, and takes what is delivered until all kinds have synced.
    async fn synced(files: &[(&str, &str)]) -> Self {
        let mut rig = Self::start(|dir| {
            fs::create_dir(dir).unwrap();
            for (name, text) in files {
                fs::write(dir.join(name), text).unwrap();
            }
        });
        while rig.event().await != format!("synced {}", Kind::ALL[Kind::ALL.len() - 1]) {}
        rig
    }

    /// The next event, as a short text.
    async fn event(&mut self) -> String {
        let event = tokio::time::timeout(Duration::from_secs(20), self.events.recv()).await;
        match event.expect("no event came").expect("the source ended") {
            Event::Apply(Object::Service(service)) => format!("apply {} {}", service.name, service.vips[0]),
            Event::Delete(object) => format!("delete {}", object.name),
            Event::Synced(kind) => format!("synced {kind}"),
            Event::Report { origin, problems } => {
                let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
                format!("report {origin}: {}", problems.join(" | "))
            }
            other => format!("{other:?}"),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }
}

fn service(name: &str, last: u8) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: 10.96.0.{last}, ports: [{{port: \
         80}}]}}\n"
    )
}

#[tokio::test]
async fn everything_then_synced() {
    let (a, b) = (service("a", 1), service("b", 2));
    let mut rig = Rig::start(|dir| {
        fs::create_dir(dir).unwrap();
        for (name, text) in [("b.yml", &b), ("a.yaml", &a), (".hidden.yaml", &a), ("notes.txt", &a)] {
            fs::write(dir.join(name), text).unwrap();
        }
        fs::create_dir(dir.join("folder")).unwrap();
    });
    for want in [
        "apply default/a 10.96.0.1",
        "apply default/b 10.96.0.2",
        "synced Service",
        "synced EndpointSlice",
        "synced Node",
        "synced Pod",
    ] {
        assert_eq!(rig.event().await, want);
    }
}

#[tokio::test]
async fn written_renamed_over_linked_and_deleted() {
    let mut rig = Rig::synced(&[]).await;
    rig.write("a.yaml", &service("a", 1));
    assert_eq!(rig.event().await, "apply default/a 10.96.0.1");
    // Written next to it and renamed over it: `sed -i`, `kubectl edit`, rsync.
    rig.write(".a.tmp", &service("a", 2));
    fs::rename(rig.path(".a.tmp"), rig.path("a.yaml")).unwrap();
    assert_eq!(rig.event().await, "apply default/a 10.96.0.2");
    // The old one renamed away, the new one written: vim. Nothing is deleted in between.
    fs::rename(rig.path("a.yaml"), rig.path("a.yaml~")).unwrap();
    rig.write("a.yaml", &service("a", 3));
    fs::remove_file(rig.path("a.yaml~")).unwrap();
    assert_eq!(rig.event().await, "apply default/a 10.96.0.3");
    fs::remove_file(rig.path("a.yaml")).unwrap();
    assert_eq!(rig.event().await, "delete default/a");
    rig.write("elsewhere.txt", &service("a", 4));
    std::os::unix::fs::symlink("elsewhere.txt", rig.path("a.yaml")).unwrap();
    assert_eq!(rig.event().await, "apply default/a 10.96.0.4");
    fs::hard_link(rig.path("elsewhere.txt"), rig.path("b.yaml")).unwrap();
    assert!(rig.event().await.starts_with("report file b.yaml: b.yaml:1: Service default/a is in a.yaml:1 already"));
}

#[tokio::test]
async fn a_half_written_file_is_not_read() {
    let mut rig = Rig::synced(&[("a.yaml", &service("a", 1))]).await;
    let mut file = fs::File::create(rig.path("a.yaml")).unwrap();
    // A part of the file that makes sense by itself, and must not be taken for the whole.
    file.write_all(service("b", 2).as_bytes()).unwrap();
    rig.write("z.yaml", &service("z", 9));
    assert_eq!(rig.event().await, "apply default/z 10.96.0.9");
    file.write_all(format!("---\n{}", service("a", 3)).as_bytes()).unwrap();
    drop(file);
    assert_eq!(rig.event().await, "apply default/a 10.96.0.3");
    assert_eq!(rig.event().await, "apply default/b 10.96.0.2");
}

#[tokio::test]
async fn a_broken_file_is_named_with_its_line_and_keeps_its_last_good_state() {
    let mut rig = Rig::synced(&[("a.yaml", &service("a", 1))]).await;
    rig.write("a.yaml", &service("a", 1).replace("80", "[eighty]"));
    let report = rig.event().await;
    assert!(report.starts_with("report file a.yaml: a.yaml:4: "), "{report}");
    assert!(report.ends_with("its last good state stays (1 object); fix the file"), "{report}");
    fs::write(rig.path("a.yaml"), [0xff, 0xfe, 0x00]).unwrap();
    assert!(rig.event().await.starts_with("report file a.yaml: a.yaml: not UTF-8"));
    rig.write("a.yaml", &service("a", 2));
    assert_eq!(rig.event().await, "apply default/a 10.96.0.2");
    assert_eq!(rig.event().await, "report file a.yaml: ");
}

#[tokio::test]
async fn a_mounted_config_map_is_swapped_as_a_whole() {
    let mut rig = Rig::start(|dir| {
        fs::create_dir_all(dir.join("..v1")).unwrap();
        fs::write(dir.join("..v1/a.yaml"), service("a", 1)).unwrap();
        std::os::unix::fs::symlink("..v1", dir.join("..data")).unwrap();
        std::os::unix::fs::symlink("..data/a.yaml", dir.join("a.yaml")).unwrap();
    });
    while rig.event().await != format!("synced {}", Kind::ALL[Kind::ALL.len() - 1]) {}
    fs::create_dir(rig.path("..v2")).unwrap();
    rig.write("..v2/a.yaml", &service("a", 2));
    std::os::unix::fs::symlink("..v2", rig.path("..data_tmp")).unwrap();
    fs::rename(rig.path("..data_tmp"), rig.path("..data")).unwrap();
    assert_eq!(rig.event().await, "apply default/a 10.96.0.2");
}

#[tokio::test]
async fn when_the_directory_vanishes_the_last_state_stays() {
    let mut rig = Rig::synced(&[("a.yaml", &service("a", 1)), ("b.yaml", &service("b", 2))]).await;
    fs::remove_dir_all(&rig.dir).unwrap();
    let report = rig.event().await;
    assert!(report.starts_with("report directory ") && report.contains("the last state stays"), "{report}");
    // It comes back with one of the two, changed.
    fs::create_dir(&rig.dir).unwrap();
    rig.write("b.yaml", &service("b", 3));
    let mut events = vec![rig.event().await, rig.event().await, rig.event().await];
    assert!(events.pop().unwrap().ends_with(": "), "the complaint is withdrawn");
    assert_eq!(events, ["apply default/b 10.96.0.3", "delete default/a"]);
}

#[tokio::test]
async fn a_directory_that_is_not_there_yet() {
    let mut rig = Rig::start(|_| {});
    let report = rig.event().await;
    assert!(report.contains("nothing is programmed before it can be read; make the directory"), "{report}");
    let filled = rig.dir.with_extension("new");
    fs::create_dir(&filled).unwrap();
    fs::write(filled.join("a.yaml"), service("a", 1)).unwrap();
    fs::rename(filled, &rig.dir).unwrap();
    assert_eq!(rig.event().await, "apply default/a 10.96.0.1");
    assert!(rig.event().await.starts_with("report directory "));
    assert_eq!(rig.event().await, "synced Service");
}

#[tokio::test]
async fn it_ends_when_nobody_listens() {
    let parent = TempDir::new().unwrap();
    let (sender, mut events) = channel(8);
    let task = tokio::spawn(run(parent.path().into(), sender));
    while events.recv().await != Some(Event::Synced(Kind::Node)) {}
    drop(events);
    tokio::time::timeout(Duration::from_secs(20), task).await.expect("it goes on").unwrap();
}

#[test]
fn which_names_are_manifests() {
    for name in ["a.yaml", "a.yml", "a.json", "a.b.yaml"] {
        assert!(is_manifest(name), "{name}");
    }
    for name in [".a.yaml", "a.yaml~", "a.yaml.swp", "yaml", "a.YAML.bak", "#a.yaml#", "..data"] {
        assert!(!is_manifest(name), "{name}");
    }
}
