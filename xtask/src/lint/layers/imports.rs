//! Which files of a crate a file imports: from its `use` lines and from the paths in its code. Code for tests does not count.

use std::collections::BTreeSet;

/// A module by its path within the crate; the crate's root is the empty one.
pub type Module = Vec<String>;

/// The modules, of those in `files`, that the source of `own` imports, and the modules that only tests have.
pub fn imports(own: &Module, source: &str, files: &BTreeSet<Module>) -> Imports {
    let tokens = tokens(source);
    let mut reader = Reader { tokens: &tokens, at: 0, own, files, inline: Vec::new(), found: Imports::default() };
    reader.read();
    reader.found
}

/// What [`imports`] returns.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Imports {
    /// Files that this one imports.
    pub modules: BTreeSet<Module>,
    /// Modules that this file declares for tests.
    pub for_tests: BTreeSet<Module>,
}

/// A piece of source; comments, and what stands in quotes, are none.
#[derive(Debug, PartialEq, Eq)]
enum Token {
    Word(String),
    /// `::`
    Colons,
    Sign(char),
}

fn tokens(source: &str) -> Vec<Token> {
    let chars: Vec<char> = source.chars().collect();
    let mut tokens = Vec::new();
    let mut at = 0;
    let starts = |at: usize, text: &str| text.chars().enumerate().all(|(i, c)| chars.get(at + i) == Some(&c));
    while at < chars.len() {
        let c = chars[at];
        if starts(at, "//") {
            at = position(&chars, at, "\n");
        } else if starts(at, "/*") {
            at = position(&chars, at + 2, "*/") + 2;
        } else if let Some(end) = raw_string(&chars, at) {
            at = end;
        } else if c == '"' {
            at += 1;
            while at < chars.len() && chars[at] != '"' {
                at += if chars[at] == '\\' { 2 } else { 1 };
            }
            at += 1;
        } else if c == '\'' {
            // A character, or a lifetime.
            at = match (chars.get(at + 1), chars.get(at + 2)) {
                (Some('\\'), _) => position(&chars, at + 3, "'") + 1,
                (_, Some('\'')) => at + 3,
                _ => at + 1,
            };
        } else if c.is_alphanumeric() || c == '_' {
            let end = (at..chars.len()).find(|i| !(chars[*i].is_alphanumeric() || chars[*i] == '_'));
            let end = end.unwrap_or(chars.len());
            tokens.push(Token::Word(chars[at..end].iter().collect()));
            at = end;
        } else if starts(at, "::") {
            tokens.push(Token::Colons);
            at += 2;
        } else {
            if !c.is_whitespace() {
                tokens.push(Token::Sign(c));
            }
            at += 1;
        }
    }
    tokens
}

/// Where `text` begins, from `at` on; the end if it is not there.
fn position(chars: &[char], at: usize, text: &str) -> usize {
    let text: Vec<char> = text.chars().collect();
    (at..chars.len()).find(|i| chars[*i..].starts_with(&text)).unwrap_or(chars.len())
}

/// The end of a raw string that begins at `at`: `r"..."`, `br#"..."#`.
fn raw_string(chars: &[char], at: usize) -> Option<usize> {
    let before = at.checked_sub(1).and_then(|i| chars.get(i));
    if before.is_some_and(|c| c.is_alphanumeric() || *c == '_') {
        return None;
    }
    let after = if chars[at] == 'b' { at + 1 } else { at };
    if chars.get(after) != Some(&'r') {
        return None;
    }
    let hashes = chars[after + 1..].iter().take_while(|c| **c == '#').count();
    let quote = after + 1 + hashes;
    if chars.get(quote) != Some(&'"') {
        return None;
    }
    let close = format!("\"{}", "#".repeat(hashes));
    Some(position(chars, quote + 1, &close) + close.len())
}

struct Reader<'a> {
    tokens: &'a [Token],
    at: usize,
    own: &'a Module,
    files: &'a BTreeSet<Module>,
    /// For each open brace: the module that it opens, if it is one.
    inline: Vec<Option<String>>,
    found: Imports,
}

impl Reader<'_> {
    fn read(&mut self) {
        while self.at < self.tokens.len() {
            if self.is_at(&["#", "[", "cfg", "(", "test", ")", "]"]) {
                self.at += 7;
                self.skip_item();
                continue;
            }
            let name = match &self.tokens[self.at] {
                Token::Sign('{') => {
                    self.inline.push(None);
                    self.at += 1;
                    continue;
                }
                Token::Sign('}') => {
                    self.inline.pop();
                    self.at += 1;
                    continue;
                }
                Token::Word(name) => name.clone(),
                _ => {
                    self.at += 1;
                    continue;
                }
            };
            match (name.as_str(), self.word(self.at + 1).map(str::to_owned)) {
                ("use", _) if self.begins_item() => {
                    self.at += 1;
                    self.tree(&Module::new());
                }
                ("mod", Some(module)) if self.is_sign(self.at + 2, '{') => {
                    self.inline.push(Some(module));
                    self.at += 3;
                }
                _ => self.path(&name),
            }
        }
    }

    /// A path in code.
    fn path(&mut self, first: &str) {
        let continues = |at: usize| self.at > 0 && self.tokens.get(at) == Some(&Token::Colons);
        // `a::crate` and `$crate` are none of this file's.
        if continues(self.at.wrapping_sub(1)) || self.is_sign(self.at.wrapping_sub(1), '$') {
            self.at += 1;
            return;
        }
        let mut path = vec![first.to_owned()];
        self.at += 1;
        while self.tokens.get(self.at) == Some(&Token::Colons) {
            let Some(word) = self.word(self.at + 1).map(str::to_owned) else { break };
            path.push(word);
            self.at += 2;
        }
        if path.len() > 1 {
            self.add(&path);
        }
    }

    /// What follows `use`, or a comma or brace in it.
    fn tree(&mut self, prefix: &Module) {
        let mut path = prefix.clone();
        while self.at < self.tokens.len() {
            match &self.tokens[self.at] {
                Token::Word(word) if word == "as" => self.at += 2,
                Token::Word(word) => {
                    path.push(word.clone());
                    self.at += 1;
                }
                Token::Colons | Token::Sign('*') => self.at += 1,
                Token::Sign('{') => {
                    self.at += 1;
                    while self.at < self.tokens.len() && !self.is_sign(self.at, '}') {
                        self.tree(&path);
                        if self.is_sign(self.at, ',') {
                            self.at += 1;
                        }
                    }
                    self.at += 1;
                    // Its parts have been added.
                    path.clear();
                }
                Token::Sign(_) => break,
            }
        }
        if path.last().is_some_and(|word| word == "self") && path.len() > 1 {
            path.pop();
        }
        if !path.is_empty() {
            self.add(&path);
        }
    }

    fn add(&mut self, path: &Module) {
        let mut here = self.here();
        let mut rest = path.iter().map(String::as_str);
        match path[0].as_str() {
            "crate" => here.clear(),
            "self" => {}
            "super" => {
                here.pop();
            }
            first => {
                // Relative: a child of this module, or another crate.
                here.push(first.to_owned());
                if !self.files.contains(&here) {
                    return;
                }
            }
        }
        rest.next();
        for word in rest {
            match word {
                "super" => {
                    here.pop();
                }
                "self" => {}
                word => here.push(word.to_owned()),
            }
        }
        // The longest part that is a file: the rest are its items.
        while !self.files.contains(&here) && here.pop().is_some() {}
        if here != *self.own {
            self.found.modules.insert(here);
        }
    }

    /// The module that the reader is in.
    fn here(&self) -> Module {
        self.own.iter().chain(self.inline.iter().flatten()).cloned().collect()
    }

    /// Skips an item that only tests have.
    fn skip_item(&mut self) {
        // Further attributes.
        while self.is_sign(self.at, '#') {
            while self.at < self.tokens.len() && !self.is_sign(self.at, ']') {
                self.at += 1;
            }
            self.at += 1;
        }
        let mut depth = 0;
        while self.at < self.tokens.len() {
            if self.word(self.at) == Some("mod")
                && depth == 0
                && let Some(name) = self.word(self.at + 1)
            {
                let mut module = self.here();
                module.push(name.to_owned());
                self.found.for_tests.insert(module);
            }
            match self.tokens[self.at] {
                Token::Sign('{') => depth += 1,
                Token::Sign('}') => depth -= 1,
                _ => {}
            }
            let ends = depth == 0 && (self.is_sign(self.at, ';') || self.is_sign(self.at, '}'));
            self.at += 1;
            if ends {
                return;
            }
        }
    }

    /// `use` also stands in bounds of a type (`impl Trait + use<'a>`).
    fn begins_item(&self) -> bool {
        !self.is_sign(self.at + 1, '<')
    }

    fn word(&self, at: usize) -> Option<&str> {
        match self.tokens.get(at) {
            Some(Token::Word(word)) => Some(word),
            _ => None,
        }
    }

    fn is_sign(&self, at: usize, sign: char) -> bool {
        self.tokens.get(at) == Some(&Token::Sign(sign))
    }

    fn is_at(&self, texts: &[&str]) -> bool {
        texts.iter().zip(self.at..).all(|(text, at)| match self.tokens.get(at) {
            Some(Token::Word(word)) => word == text,
            Some(Token::Sign(sign)) => text.chars().eq([*sign]),
            _ => false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(path: &str) -> Module {
        path.split("::").filter(|part| !part.is_empty()).map(str::to_owned).collect()
    }

    fn found(own: &str, source: &str) -> Vec<String> {
        let files = ["", "a", "a::b", "a::c", "a::c::d", "e", "tests"].map(module).into();
        imports(&module(own), source, &files).modules.iter().map(|it| it.join("::")).collect()
    }

    #[test]
    fn trees_are_followed_to_the_files() {
        assert_eq!(found("e", "use crate::a::{self, b::{X, Y}, c::d};"), ["a", "a::b", "a::c::d"]);
        assert_eq!(found("a::b", "use super::c;\nuse super::Thing;\nuse super::super::e::f;"), ["a", "a::c", "e"]);
        assert_eq!(found("e", "pub(crate) use crate::a::b::X as _;\nuse std::a::b;"), ["a::b"]);
        assert_eq!(found("a", "use b::X;\nuse other::X;"), ["a::b"]);
        assert_eq!(found("e", "use crate::Thing;"), [""]);
    }

    #[test]
    fn paths_in_code_count_too() {
        assert_eq!(found("e", "fn f() -> crate::a::b::X { crate::a::c::d::g::<u8>() }"), ["a::b", "a::c::d"]);
        assert_eq!(found("a", "fn f() { c::d::g(); x::c::d() }"), ["a::c::d"]);
    }

    #[test]
    fn modules_within_a_file_are_the_file() {
        assert_eq!(found("e", "mod inner { use super::X; use super::super::a::b::Y; }"), ["a::b"]);
    }

    #[test]
    fn comments_strings_and_tests_do_not_count() {
        let source = "// use crate::a;\n/// crate::a::b\n/* crate::a */ const S: &str = \"use crate::a; \\\" crate::a\";\n\
                      const R: &str = r#\"crate::a::b \" crate::a\"#; fn f<'a>(x: &'a str) -> char { '\"' }\n\
                      #[cfg(test)]\nmod tests { use crate::a; }\n#[cfg(test)]\nuse crate::a::b;\n\
                      #[cfg(test)]\n#[allow(x)]\nfn g() { crate::a::f() }";
        assert_eq!(found("e", source), [""; 0]);
        let files = ["", "tests"].map(module).into();
        let declared = imports(&module(""), "#[cfg(test)]\nmod tests;\n", &files).for_tests;
        assert_eq!(declared, [module("tests")].into());
    }
}
