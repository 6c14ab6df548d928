//! Text that stays text.

use std::fmt::Write;

/// What could begin a tag, an entity or an attribute becomes an entity; what turns the direction of writing or is not seen
/// at all is shown by its number.
pub(crate) fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '`' => out.push_str("&#96;"),
            '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200e}' | '\u{200f}' => numbered(&mut out, c),
            c if c.is_control() && c != '\n' && c != '\t' => numbered(&mut out, c),
            c => out.push(c),
        }
    }
    out
}

fn numbered(out: &mut String, c: char) {
    let _ = write!(out, "\u{27e8}U+{:04X}\u{27e9}", c as u32);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_not_seen_is_shown() {
        assert_eq!(escaped("a\u{202e}b\u{0}\n"), "a\u{27e8}U+202E\u{27e9}b\u{27e8}U+0000\u{27e9}\n");
    }

    proptest! {
        #[test]
        fn no_text_is_markup(text in "\\PC*[<>&\"'`]{0,8}\\PC*") {
            let out = escaped(&text);
            prop_assert!(!out.contains(['<', '>', '"', '\'', '`']));
            let entities = ["&amp;", "&lt;", "&gt;", "&quot;", "&#39;", "&#96;"];
            prop_assert!(out.match_indices('&').all(|(at, _)| entities.iter().any(|e| out[at..].starts_with(e))));
        }
    }
}
