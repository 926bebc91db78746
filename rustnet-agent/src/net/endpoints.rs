//! The records that the CNI binary leaves of each pod's interface, read for repair and for names.

use std::fs;
use std::io;
use std::path::Path;

use anyhow::{Context, Result};
use rustnet_common::files::{ENDPOINTS_DIR, EndpointFile};

/// The records that could be read, and what was wrong with the others.
#[derive(Clone, Debug, Default)]
pub struct Records {
    /// The records.
    pub endpoints: Vec<EndpointFile>,
    /// One message for each file that is no record.
    pub problems: Vec<String>,
}

/// Reads `<run_dir>/endpoints/*.json`. No folder means no pods.
pub fn read(run_dir: &Path) -> Result<Records> {
    let dir = run_dir.join(ENDPOINTS_DIR);
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Records::default()),
        Err(e) => return Err(e).with_context(|| format!("reading {}", dir.display())),
    };
    let mut records = Records::default();
    for entry in entries {
        let path = entry.with_context(|| format!("reading {}", dir.display()))?.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        match read_one(&path) {
            Ok(Some(record)) => records.endpoints.push(record),
            Ok(None) => {}
            Err(e) => records.problems.push(format!("{e:#}")),
        }
    }
    records.endpoints.sort_by(|a, b| (&a.container_id, &a.ifname).cmp(&(&b.container_id, &b.ifname)));
    Ok(records)
}

/// One record; `None` if a DEL removed it meanwhile.
fn read_one(path: &Path) -> Result<Option<EndpointFile>> {
    let text = match fs::read(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text.with_context(|| format!("reading {}", path.display()))?,
    };
    let record = serde_json::from_slice(&text).with_context(|| {
        format!("{} is no endpoint record: delete the pod, or the file if there is no such pod", path.display())
    })?;
    Ok(Some(record))
}

/// A MAC as text.
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut out = [0; 6];
    let mut parts = text.split(':');
    for octet in &mut out {
        *octet = parts.next().filter(|p| p.len() == 2).and_then(|p| u8::from_str_radix(p, 16).ok())?;
    }
    parts.next().is_none().then_some(out)
}

#[cfg(test)]
mod tests {
    use super::{parse_mac, read};
    use std::fs;

    #[test]
    fn macs() {
        assert_eq!(parse_mac("02:00:0a:ff:00:01"), Some([2, 0, 10, 255, 0, 1]));
        for bad in ["", "02:00:0a:ff:00", "02:00:0a:ff:00:01:02", "2:0:a:f:0:1", "zz:00:0a:ff:00:01"] {
            assert_eq!(parse_mac(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_broken_record_does_not_hide_the_others() {
        let run = tempfile::tempdir().unwrap();
        assert!(read(run.path()).unwrap().endpoints.is_empty());
        let dir = run.path().join("endpoints");
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("a@eth0.json"), "{").unwrap();
        let good = r#"{"containerId":"b","ifname":"eth0","netns":"/n","network":"rustnet","hostIfname":"rnv1","ifindex":9,
            "mac":"02:00:00:00:00:01","addresses":["10.0.0.2"]}"#;
        fs::write(dir.join("b@eth0.json"), good).unwrap();
        fs::write(dir.join(".c.tmp"), "").unwrap();
        let records = read(run.path()).unwrap();
        assert_eq!(records.endpoints.len(), 1);
        assert!(records.problems[0].contains("a@eth0.json"), "{:?}", records.problems);
    }
}
