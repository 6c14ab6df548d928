//! The `{% generation %}` tag, which the template engine does not know.
//!
//! A block is rewritten so that it writes one marker character before and one after what it renders, and keeps what it
//! sets to itself. The white-space control of the original tags stays where it was.

/// Begins text that is trained. Outside the basic plane, so that no icon font's text meets it by chance.
pub(crate) const SPAN_START: char = '\u{10FFFC}';
/// Ends text that is trained.
pub(crate) const SPAN_END: char = '\u{10FFFD}';

/// Whether a text holds one of the two markers, and which.
pub(crate) fn marker_in(text: &str) -> Option<char> {
    text.chars().find(|&c| c == SPAN_START || c == SPAN_END)
}

/// Rewrites generation blocks; also says whether there was any.
pub(crate) fn rewrite_generation_tags(source: &str) -> (String, bool) {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    let mut found = false;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        match generation_tag(tag) {
            Some((is_end, open, close, length)) => {
                found = true;
                match is_end {
                    false => out.push_str(&format!("{{%{open} with %}}{SPAN_START}{{% if true {close}%}}")),
                    true => out.push_str(&format!("{{%{open} endif %}}{SPAN_END}{{% endwith {close}%}}")),
                }
                rest = &tag[length..];
            }
            None => {
                out.push_str("{%");
                rest = &tag[2..];
            }
        }
    }
    out.push_str(rest);
    (out, found)
}

/// Reads a generation tag: is it the closing one, its white-space marks, its length in bytes.
fn generation_tag(tag: &str) -> Option<(bool, &str, &str, usize)> {
    let inner = tag.get(2..tag.find("%}")?)?;
    let length = 2 + inner.len() + 2;
    let (open, inner) = if inner.starts_with(['-', '+']) { inner.split_at(1) } else { ("", inner) };
    let (inner, close) = if inner.ends_with(['-', '+']) { inner.split_at(inner.len() - 1) } else { (inner, "") };
    match inner.trim() {
        "generation" => Some((false, open, close, length)),
        "endgeneration" => Some((true, open, close, length)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_white_space_control() {
        let (out, found) = rewrite_generation_tags("a {%- generation -%} b {%+ endgeneration %}{% if x %}");
        assert!(found);
        assert_eq!(
            out,
            format!(
                "a {{%- with %}}{SPAN_START}{{% if true -%}} b {{%+ endif %}}{SPAN_END}{{% endwith %}}{{% if x %}}"
            )
        );
        let plain = "{% if a %}{{ b }}{% endif %} {% 100 %";
        assert_eq!(rewrite_generation_tags(plain), (plain.to_owned(), false));
    }
}
