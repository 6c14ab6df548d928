//! Regular expressions over module paths, anchored as PEFT anchors them.

use crate::error::{Error, Result};
use fancy_regex::Regex;

/// A regex that must match a whole module path.
pub(crate) fn whole(pattern: &str) -> Result<Regex> {
    compile(pattern, &format!("^(?:{pattern})$"))
}

/// A regex that must match from the start of a path component to the end of the path; the groups are PEFT's.
pub(crate) fn ending(pattern: &str) -> Result<Regex> {
    compile(pattern, &format!(r"^(.*\.)?({pattern})$"))
}

/// Whether a compiled pattern matches; fails when matching takes too many steps.
pub(crate) fn is_match(regex: &Regex, path: &str) -> Result<bool> {
    regex.is_match(path).map_err(|source| Error::Pattern { pattern: regex.as_str().into(), source: Box::new(source) })
}

/// The value of the first pattern, in their order, that matches the end of a path.
pub(crate) fn first_match<'a, T>(patterns: &'a [(String, T)], path: &str) -> Result<Option<&'a T>> {
    for (pattern, value) in patterns {
        if is_match(&ending(pattern)?, path)? {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

fn compile(pattern: &str, anchored: &str) -> Result<Regex> {
    Regex::new(anchored).map_err(|source| Error::Pattern { pattern: pattern.into(), source: Box::new(source) })
}
