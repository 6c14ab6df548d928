//! Rules on the documentation.

use std::path::Path;

use super::Finding;

/// Links of a Markdown page to files of the workspace lead somewhere.
pub fn links(root: &Path, path: &str, text: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    if !path.ends_with(".md") {
        return findings;
    }
    let folder = root.join(path).parent().map(Path::to_path_buf).unwrap_or_default();
    let mut fenced = false;
    for (i, line) in text.lines().enumerate() {
        fenced ^= line.trim_start().starts_with("```");
        for target in if fenced { Vec::new() } else { targets(line) } {
            let file = target.split('#').next().unwrap_or_default();
            let elsewhere = file.is_empty() || file.contains("://") || file.starts_with("mailto:");
            if !elsewhere && !folder.join(file).exists() {
                findings.push(Finding::new(path, i + 1, format!("the link to {file} leads nowhere")));
            }
        }
    }
    findings
}

/// What stands in the round brackets of `[text](target)`.
fn targets(line: &str) -> Vec<&str> {
    let starts = line.match_indices("](").map(|(at, mark)| at + mark.len());
    starts.filter_map(|at| line[at..].split_once(')').map(|(target, _)| target.trim())).collect()
}

/// The workspace's version has a section in the changelog.
pub fn changelog(text: &str, version: &str) -> Option<Finding> {
    let has = |line: &str| {
        line.strip_prefix("## ").is_some_and(|title| {
            title
                .trim_start_matches('[')
                .strip_prefix(version)
                .is_some_and(|rest| !rest.starts_with(|c: char| c == '.' || c.is_ascii_digit()))
        })
    };
    (!text.lines().any(has)).then(|| Finding::new("CHANGELOG.md", 0, format!("it has no section `## [{version}]`")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dead_links() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("there.md"), "").unwrap();
        let check = |text: &str| links(dir.path(), "page.md", text).len();
        assert_eq!(check("[a](there.md) [b](there.md#part) [c](https://example.org/x) [d](#part)"), 0);
        assert_eq!(check("[a](there.md) [b](gone.md)"), 1);
        assert_eq!(check("```\n[a](gone.md)\n```\n"), 0);
    }

    #[test]
    fn a_version_without_a_section() {
        assert_eq!(changelog("# Changelog\n## [0.1.0] - 2026-01-01\n", "0.1.0"), None);
        assert_eq!(changelog("## 0.1.0\n", "0.1.0"), None);
        assert!(changelog("## [0.1.01]\n## Unreleased\n", "0.1.0").is_some());
    }
}
