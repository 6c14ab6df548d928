//! Which modules a name list or a regex means.

use crate::error::Result;
use crate::pattern::{is_match, whole};
use serde_json::{Value, json};

/// The value of `target_modules` or `exclude_modules`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetModules {
    /// Module names: a path is meant when it equals one, or ends with a dot and one.
    List(Vec<String>),
    /// A regex that must match the whole path, or `all-linear`.
    Pattern(String),
}

impl TargetModules {
    /// The pattern that stands for every linear layer but the head.
    pub const ALL_LINEAR: &'static str = "all-linear";

    /// Whether this is [`ALL_LINEAR`](Self::ALL_LINEAR), whose meaning needs the model.
    pub fn is_all_linear(&self) -> bool {
        matches!(self, TargetModules::Pattern(p) if p == Self::ALL_LINEAR)
    }

    /// Whether a module path is meant; `all-linear` is taken as a regex here and matches nothing.
    ///
    /// # Errors
    /// [`Error::Pattern`](crate::Error::Pattern) for a faulty or too costly regex.
    pub fn matches(&self, path: &str) -> Result<bool> {
        match self {
            TargetModules::List(names) => Ok(names.iter().any(|name| is_suffix(path, name))),
            TargetModules::Pattern(pattern) => is_match(&whole(pattern)?, path),
        }
    }

    pub(crate) fn to_json(&self) -> Value {
        match self {
            TargetModules::List(names) => json!(names),
            TargetModules::Pattern(pattern) => json!(pattern),
        }
    }
}

fn is_suffix(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_match_whole_components_and_patterns_match_whole_paths() {
        let list = TargetModules::List(vec!["q_proj".into(), "lm_head".into()]);
        let matches = |t: &TargetModules, path: &str| t.matches(path).unwrap();
        assert!(matches(&list, "model.layers.0.self_attn.q_proj") && matches(&list, "lm_head"));
        assert!(!matches(&list, "model.layers.0.self_attn.big_q_proj") && !matches(&list, "lm_head.x"));
        let regex = TargetModules::Pattern(r".*layers\.[01]\..*\.(q|v)_proj".into());
        assert!(matches(&regex, "model.layers.1.self_attn.v_proj"));
        assert!(!matches(&regex, "model.layers.11.self_attn.v_proj") && !matches(&regex, "layers.0.a.q_proj.x"));
        let alternatives = TargetModules::Pattern("a|b".into());
        assert!(matches(&alternatives, "b") && !matches(&alternatives, "ab"));
        assert!(TargetModules::Pattern("(".into()).matches("x").is_err());
    }

    #[test]
    fn a_regex_that_backtracks_without_end_is_an_error_and_not_a_hang() {
        let evil = TargetModules::Pattern(r"(?=(a+)+$)(a|aa|aaa)*\1b".into());
        assert!(evil.matches(&"a".repeat(64)).unwrap_err().to_string().contains("backtrack"));
    }
}
