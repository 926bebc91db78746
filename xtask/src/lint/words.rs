//! Old-fashioned words, which rule 5 of `CONTRIBUTING.md` ("Language") forbids.

/// The words: those of the rule, and further forms of "mend".
pub const WORDS: [&str; 10] =
    ["shall", "whom", "hence", "anew", "beside", "told", "mend", "mends", "mended", "mending"];
/// Files with texts of others, texts of the past, and the list above.
const EXEMPT: [&str; 3] = ["CHANGELOG.md", "Cargo.lock", "xtask/src/lint/words.rs"];
/// The rule's file: a word in double quotes is an entry of the rule's list.
const RULE: &str = "CONTRIBUTING.md";

/// Returns line numbers (from 1) and old-fashioned words, as written in the text of the tracked
/// file `name`. Case does not count. An underscore separates words, so that identifiers count, too.
pub fn find<'a>(name: &str, text: &'a str) -> Vec<(usize, &'a str)> {
    if EXEMPT.contains(&name) || name.starts_with("LICENSE") {
        return Vec::new();
    }
    let mut found = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let mut rest = line;
        while let Some(at) = rest.find(|c: char| c.is_alphanumeric()) {
            let is_quoted = rest[..at].ends_with('"');
            let word = &rest[at..];
            let (word, after) = word.split_at(word.find(|c: char| !c.is_alphanumeric()).unwrap_or(word.len()));
            rest = after;
            let is_entry = name == RULE && is_quoted && rest.starts_with('"');
            if !is_entry && WORDS.iter().any(|w| word.eq_ignore_ascii_case(w)) {
                found.push((number + 1, word));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_words_are_found_in_any_case() {
        assert_eq!(find("a.md", "Told once,\n\n(mend it: ANEW!)"), [(1, "Told"), (3, "mend"), (3, "ANEW")]);
        assert_eq!(find("a.rs", "fn nobody_is_told() -> Stage::Beside"), [(1, "told"), (1, "Beside")]);
        assert_eq!(find("a.md", "recommend, besides, shallow, henceforth, toldness, \u{e9}told"), []);
        for word in WORDS {
            assert_eq!(find("a.md", word), [(1, word)]);
        }
    }

    #[test]
    fn licences_changes_the_lock_and_the_list_are_exempt() {
        for name in ["LICENSE-MIT", "CHANGELOG.md", "Cargo.lock", "xtask/src/lint/words.rs"] {
            assert_eq!(find(name, "persons to whom it shall"), [], "{name}");
        }
        assert_eq!(find(RULE, "words: \"shall\", \"whom\""), []);
        assert_eq!(find(RULE, "as \"shall not\", whom"), [(1, "shall"), (1, "whom")]);
        assert_eq!(find("README.md", "\"shall\""), [(1, "shall")]);
    }

    #[test]
    fn the_rule_lists_the_words() {
        let rule = include_str!("../../../CONTRIBUTING.md");
        for word in WORDS.iter().filter(|word| !word.starts_with("mend") || **word == "mend") {
            assert!(rule.contains(&format!("\"{word}\"")), "{word}");
        }
    }
}
