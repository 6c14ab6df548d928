//! Source text without its comments and literals, line for line.

/// Replaces comments and the insides of string and character literals by spaces, so that a word that is found is code.
/// Good for Rust and, raw strings aside, for C++.
pub fn only(text: &str) -> String {
    let bytes: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut i = 0;
    while i < bytes.len() {
        let end = match (bytes[i], bytes.get(i + 1)) {
            ('/', Some('/')) => until(&bytes, i, |rest| rest[0] == '\n'),
            ('/', Some('*')) => block_comment(&bytes, i),
            ('"', _) => string(&bytes, i),
            ('r', Some('"' | '#')) if !continues_word(&bytes, i) => raw_string(&bytes, i),
            ('\'', Some('\\')) => until(&bytes, i + 3, |rest| rest[0] == '\'') + 1,
            ('\'', Some(_)) if bytes.get(i + 2) == Some(&'\'') => i + 3,
            _ => i,
        };
        if end == i {
            out.push(bytes[i]);
            i += 1;
        }
        while i < end.min(bytes.len()) {
            out.push(if bytes[i] == '\n' { '\n' } else { ' ' });
            i += 1;
        }
    }
    out
}

fn continues_word(bytes: &[char], i: usize) -> bool {
    i > 0 && (bytes[i - 1].is_alphanumeric() || bytes[i - 1] == '_')
}

fn until(bytes: &[char], start: usize, stop: impl Fn(&[char]) -> bool) -> usize {
    (start..bytes.len()).find(|&i| stop(&bytes[i..])).unwrap_or(bytes.len())
}

fn block_comment(bytes: &[char], start: usize) -> usize {
    let (mut depth, mut i) = (0, start);
    while i < bytes.len() {
        match (bytes[i], bytes.get(i + 1)) {
            ('/', Some('*')) => (depth, i) = (depth + 1, i + 2),
            ('*', Some('/')) => (depth, i) = (depth - 1, i + 2),
            _ => i += 1,
        }
        if depth == 0 {
            break;
        }
    }
    i
}

fn string(bytes: &[char], start: usize) -> usize {
    let mut i = start + 1;
    while i < bytes.len() && bytes[i] != '"' {
        i += if bytes[i] == '\\' { 2 } else { 1 };
    }
    i + 1
}

fn raw_string(bytes: &[char], start: usize) -> usize {
    let hashes = bytes[start + 1..].iter().take_while(|c| **c == '#').count();
    if bytes.get(start + 1 + hashes) != Some(&'"') {
        return start; // `r#ident`
    }
    let close: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
    until(bytes, start + 2 + hashes, |rest| rest.starts_with(&close)) + close.len()
}

/// The number of lines before the unit tests at the end of a file.
pub fn lines_before_tests(code: &str) -> usize {
    code.lines().position(|line| line.trim() == "#[cfg(test)]").unwrap_or(usize::MAX)
}

/// Whether `line` holds `word` as a whole word.
pub fn has_word(line: &str, word: &str) -> bool {
    let inside = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word)
        .any(|(at, _)| !line[..at].ends_with(inside) && !line[at + word.len()..].starts_with(inside))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_vanish_and_lines_stay() {
        let text = "let a = \"un\\\"safe\"; // unsafe\n/* unsafe /* \n */ unsafe */ b('\"', r#\"unsafe\"#, '\\'', 'x);\nr#type";
        let code = only(text);
        assert!(!code.contains("unsafe"), "{code}");
        assert_eq!(code.lines().count(), text.lines().count());
        assert!(code.contains("let a =") && code.contains(" b(") && code.ends_with("r#type"));
    }

    #[test]
    fn words_are_whole() {
        assert!(has_word("an unsafe {", "unsafe"));
        assert!(!has_word("unsafe_code", "unsafe"));
    }
}
