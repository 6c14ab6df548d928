//! Rules on one source file.

use super::Finding;
use super::code::{has_word, lines_before_tests, only};

const SOFT_LINES: usize = 400;
const HARD_LINES: usize = 600;

/// Crates that may map a file into memory, which is the one unsafe act outside `lora-torch`.
const MAY_MAP: [&str; 2] = ["crates/lora-format/src/", "crates/lora-data/src/"];

/// What libraries leave to the program.
const PROGRAM_ONLY: [&str; 9] = [
    "println!",
    "eprintln!",
    "print!",
    "eprint!",
    "process::exit",
    "env::var",
    "env::var_os",
    "env::vars",
    "env::args",
];

/// Where numeric tolerances are derived; tests take them from there or name them in a constant.
const TOLERANCES: &str = "tests/src/tolerance.rs";

/// All rules on the file at `path`, relative to the root.
pub fn check(path: &str, text: &str) -> Vec<Finding> {
    let mut findings = markers(path, text);
    let rust = path.ends_with(".rs");
    if rust || path.ends_with(".cpp") || path.ends_with(".h") {
        findings.extend(length(path, text));
    }
    if rust {
        let code = only(text);
        findings.extend(unsafe_code(path, text, &code));
        findings.extend(library(path, &code));
        findings.extend(tests(path, &code));
    }
    findings
}

fn length(path: &str, text: &str) -> Option<Finding> {
    let lines = text.lines().count();
    let message = |limit: usize| format!("{lines} lines, more than {limit}: which of its ideas is a file of its own?");
    match lines {
        n if n > HARD_LINES => Some(Finding::new(path, 0, message(HARD_LINES))),
        n if n > SOFT_LINES => Some(Finding { warning: true, ..Finding::new(path, 0, message(SOFT_LINES)) }),
        _ => None,
    }
}

/// Notes to self and paths of one machine; the words are put together here lest this file breaks its own rule.
fn markers(path: &str, text: &str) -> Vec<Finding> {
    let notes = [concat!("TO", "DO"), concat!("FIX", "ME")];
    let places = [concat!("/wo", "rk/"), concat!("/ro", "ot/"), concat!("/ho", "me/")];
    let mut findings = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if let Some(note) = notes.iter().find(|note| has_word(line, note)) {
            findings.push(Finding::new(path, number + 1, format!("{note}: do it, or open an issue")));
        }
        let starts_path = |at: usize| !line[..at].ends_with(|c: char| c.is_alphanumeric() || "_-.}".contains(c));
        let is_local = |place: &&&str| line.match_indices(**place).any(|(at, _)| starts_path(at));
        if let Some(place) = places.iter().find(is_local) {
            findings.push(Finding::new(path, number + 1, format!("a path below {place} exists on one machine only")));
        }
    }
    findings
}

fn unsafe_code(path: &str, text: &str, code: &str) -> Vec<Finding> {
    if path.starts_with("crates/lora-torch/") {
        return Vec::new();
    }
    let lines: Vec<_> = text.lines().collect();
    let mut findings = Vec::new();
    for (i, line) in code.lines().enumerate().filter(|(_, line)| has_word(line, "unsafe")) {
        let here = lines[i..lines.len().min(i + 3)].join(" ");
        let above = lines[i.saturating_sub(6)..i].join(" ");
        let maps = here.contains("Mmap") || here.contains(".map(") || here.contains("memmap2::");
        if !MAY_MAP.iter().any(|folder| path.starts_with(folder)) || !maps || line.contains("unsafe fn") {
            findings.push(Finding::new(path, i + 1, "unsafe code belongs into lora-torch (mapping a file excepted)"));
        } else if !above.contains("SAFETY:") {
            findings.push(Finding::new(path, i + 1, "a mapping without a `SAFETY:` comment above it"));
        }
    }
    findings
}

fn library(path: &str, code: &str) -> Vec<Finding> {
    let in_library = path
        .strip_prefix("crates/")
        .is_some_and(|rest| !rest.starts_with("lora-cli/") && rest.split('/').nth(1) == Some("src"));
    if !in_library || only_tests(path) {
        return Vec::new();
    }
    let mut findings = Vec::new();
    for (i, line) in code.lines().enumerate().take(lines_before_tests(code)) {
        if let Some(call) = PROGRAM_ONLY.iter().find(|call| has_word(line, call)) {
            findings.push(Finding::new(
                path,
                i + 1,
                format!("`{call}` in a library: only the program prints, exits, reads the environment"),
            ));
        }
    }
    findings
}

/// No test is switched off, and none compares with a number that nobody derived.
fn tests(path: &str, code: &str) -> Vec<Finding> {
    let start = if only_tests(path) { 0 } else { lines_before_tests(code) };
    let mut findings = Vec::new();
    for (i, line) in code.lines().enumerate() {
        let trimmed = line.trim();
        if trimmed.starts_with("#[ignore") {
            findings.push(Finding::new(path, i + 1, "an ignored test proves nothing: mend it or remove it"));
        }
        let constant = trimmed.starts_with("const ") || trimmed.starts_with("pub const ");
        if i >= start && path != TOLERANCES && !constant && compares(trimmed) && has_tiny_number(trimmed) {
            findings.push(Finding::new(
                path,
                i + 1,
                format!("a bare tolerance: derive it in {TOLERANCES} or name it in a `const`"),
            ));
        }
    }
    findings
}

fn only_tests(path: &str) -> bool {
    path.split('/').any(|part| matches!(part, "tests" | "tests.rs"))
}

fn compares(line: &str) -> bool {
    ["< ", "<= ", "> ", ">= ", "close(", "close!(", "allclose", "toleran"].iter().any(|mark| line.contains(mark))
}

/// A literal such as `1e-5`.
fn has_tiny_number(line: &str) -> bool {
    let bytes = line.as_bytes();
    bytes.windows(4).any(|w| w[0].is_ascii_digit() && w[1] == b'e' && w[2] == b'-' && w[3].is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(path: &str, text: &str) -> Vec<(usize, String)> {
        check(path, text).into_iter().map(|f| (f.line, f.message)).collect()
    }

    /// The line of the one finding, whose message must hold `part`.
    fn one(path: &str, text: &str, part: &str) -> usize {
        let found = rules(path, text);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].1.contains(part), "{found:?}");
        found[0].0
    }

    const LIB: &str = "crates/lora-core/src/a.rs";

    #[test]
    fn long_files() {
        assert_eq!(rules(LIB, &"\n".repeat(400)), []);
        assert!(check(LIB, &"\n".repeat(401))[0].warning);
        assert!(!check("crates/lora-torch/shim/a.cpp", &"\n".repeat(601))[0].warning);
        assert_eq!(rules("docs/long.md", &"\n".repeat(601)), []);
    }

    #[test]
    fn notes_and_local_paths() {
        one(LIB, concat!("// TO", "DO later"), "do it");
        one("docs/a.md", concat!("FIX", "ME"), "do it");
        assert_eq!(one("docs/a.md", concat!("x\nsee `/ho", "me/me/x`"), "one machine"), 2);
        assert_eq!(rules("docs/a.md", concat!("https://example.org/wo", "rk/x and TO", "DOS")), []);
    }

    #[test]
    fn unsafe_outside_lora_torch() {
        let bad = "fn f() {\n    unsafe { g() }\n}\n";
        assert_eq!(one(LIB, bad, "belongs into lora-torch"), 2);
        assert_eq!(rules("crates/lora-torch/src/ffi.rs", bad), []);
        assert_eq!(rules(LIB, "#![deny(unsafe_code)] // unsafe"), []);
        let map = "// SAFETY: read only\nlet m = unsafe { Mmap::map(&file)? };\n";
        assert_eq!(rules("crates/lora-format/src/open.rs", map), []);
        one(LIB, map, "belongs into lora-torch");
        one("crates/lora-format/src/open.rs", &map[map.find("let").unwrap()..], "SAFETY");
    }

    #[test]
    fn libraries_leave_the_process_alone() {
        for call in ["println!(\"\")", "std::process::exit(1)", "std::env::var(\"A\")", "eprint!(\"\")"] {
            let text = format!("fn f() {{\n    {call};\n}}\n");
            assert_eq!(one(LIB, &text, "in a library"), 2);
            assert_eq!(rules("crates/lora-cli/src/main.rs", &text), []);
            assert_eq!(rules("crates/lora-core/build.rs", &text), []);
            assert_eq!(rules(LIB, &format!("#[cfg(test)]\nmod tests {{\n{text}}}\n")), []);
        }
        assert_eq!(rules(LIB, "/// `println!` is not used.\nfn f() { g(\"println!\") }\n"), []);
    }

    #[test]
    fn ignored_tests_and_bare_tolerances() {
        let test = "crates/lora-core/tests/a.rs";
        one(test, "#[ignore]\n", "proves nothing");
        one(LIB, "#[cfg(test)]\nmod tests {\n    #[ignore = \"slow\"]\n}\n", "proves nothing");
        assert_eq!(one(test, "\nassert!(d < 1e-5);\n", "bare tolerance"), 2);
        one("crates/lora-core/src/a/tests.rs", "assert!(d < 1e-5);\n", "bare tolerance");
        one(LIB, "#[cfg(test)]\nmod tests {\n assert_close(a, b, 2.5e-7);\n}\n", "bare tolerance");
        assert_eq!(rules(LIB, "if x < 1e-5 { return }\n"), []);
        assert_eq!(rules(test, "const REACH: f64 = 1e-5;\nlet learning_rate = 1e-3;\nassert!(d < REACH);\n"), []);
        assert_eq!(rules(TOLERANCES, "if x < 1e-5 { return }\n"), []);
    }
}
