//! For tests: the JSON of each command is an interface, and one file holds each shape (`tests/golden/cli`). With
//! `UPDATE_GOLDEN=1` the files are written instead of compared.

use serde::Serialize;
use std::path::Path;

/// Holds that a value is printed as its file says.
pub fn assert_golden<T: Serialize>(name: &str, value: &T) {
    let text = serde_json::to_string_pretty(value).expect("JSON") + "\n";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../tests/golden/cli/{name}.json"));
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::create_dir_all(path.parent().expect("a directory")).expect("made");
        return std::fs::write(path, text).expect("written");
    }
    let want = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert_eq!(text, want, "the JSON of {name} has changed; programs read it: add fields, rename none");
    assert_camel_case(&serde_json::from_str(&text).expect("JSON"));
}

fn assert_camel_case(value: &serde_json::Value) {
    match value {
        serde_json::Value::Object(fields) => fields.iter().for_each(|(name, value)| {
            assert!(name.chars().all(|c| c.is_ascii_alphanumeric()) && !name.starts_with(char::is_uppercase), "{name}");
            assert_camel_case(value);
        }),
        serde_json::Value::Array(values) => values.iter().for_each(assert_camel_case),
        _ => {}
    }
}
