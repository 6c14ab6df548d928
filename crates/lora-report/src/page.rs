//! The page: its head, its style, its one script, and what it is made of.

use crate::digest;
use crate::error::{Error, Result};
use crate::escape::escaped;
use crate::run::Run;
use crate::{many, one};
use std::fmt::Write;

/// The name of a run's own page in its folder.
pub const REPORT_FILE: &str = "report.html";

const STYLE: &str = include_str!("look/style.css");
const SCRIPT: &str = include_str!("look/script.js");

/// One self-contained page of one run, or of several laid over each other. It asks for nothing from anywhere and allows no
/// script but its own, by its digest.
///
/// # Errors
/// [`Error::NoRuns`] when there is none.
pub fn page(runs: &[Run]) -> Result<String> {
    let (title, body) = match runs {
        [] => return Err(Error::NoRuns),
        [run] => (run.name(), one::body(run)),
        runs => (many::title(runs), many::body(runs)),
    };
    let mut page = String::with_capacity(body.len() + STYLE.len() + SCRIPT.len() + 1024);
    let (title, source) = (escaped(&title), digest::source_of(SCRIPT));
    let _ = writeln!(
        page,
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; \
         script-src '{source}'\"><meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
         <meta name=\"referrer\" content=\"no-referrer\"><title>{title}</title><style>{STYLE}</style></head><body><main>\
         {body}</main><script>{SCRIPT}</script></body></html>"
    );
    Ok(page)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::about::{About, AboutData, Status};
    use crate::run::{Sample, Series};
    use serde_json::json;

    const HOSTILE: &str = "</script></style></pre><script>alert(1)</script><img src=x onerror=alert(1)>\"'`&amp;";

    fn run(name: &str, loss: f64) -> Run {
        let points = vec![(1, 2.0 * loss), (2, loss)];
        Run {
            dir: format!("runs/{name}").into(),
            series: vec![
                Series { name: "loss".into(), points: points.clone() },
                Series { name: "eval_loss".into(), points },
            ],
            config: vec![("lora.r".into(), "8".into()), ("train.learning_rate".into(), format!("{loss}"))],
            ..Run::default()
        }
    }

    fn hostile() -> Run {
        let text = || HOSTILE.to_string();
        let report = json!({
            "read": 5, "kept": 4, "sources": [{"path": HOSTILE, "format": HOSTILE, "records": 5, "notes": [HOSTILE],
            "ignored_columns": {HOSTILE: 1}, "bad": {"count": 1, "first": [HOSTILE]}}],
            "dropped": {HOSTILE: {"count": 1, "first": []}}, "template": {"name": HOSTILE},
        });
        let sample = |step| Sample { step, prompt: text(), text: text(), wanted: Some(text()), finish_reason: text() };
        Run {
            dir: HOSTILE.into(),
            series: vec![Series { name: text(), points: vec![(1, 1.0), (2, 3.0)] }],
            config: vec![(format!("{HOSTILE}.key"), text()), (text(), text())],
            about: Some(About {
                status: Status::Stopped,
                family: text(),
                device: text(),
                dtype: text(),
                libtorch: text(),
                data: AboutData { train: report, ..AboutData::default() },
                ..About::default()
            }),
            samples: vec![sample(0), sample(2)],
        }
    }

    /// The names of all tags, each as often as it is opened.
    fn tags(page: &str) -> Vec<&str> {
        page.split('<').skip(1).map(|rest| rest.split(|c: char| !c.is_ascii_alphanumeric()).next().unwrap()).collect()
    }

    #[test]
    fn what_files_say_is_never_markup() {
        for runs in [vec![hostile()], vec![hostile(), run("a", 1.0)], vec![hostile(), hostile()]] {
            let page = page(&runs).unwrap();
            assert_eq!(page.matches("<script").count(), 1, "one script, the page's own");
            assert_eq!((page.matches("</script").count(), page.matches("</style").count()), (1, 1));
            assert!(!page.contains("<img") && !tags(&page).contains(&"img"));
            assert!(page.contains("&lt;script&gt;alert(1)&lt;/script&gt;"), "it is shown as text");
            // Within attributes no quote comes from a file: each attribute with one is closed by the page itself.
            assert!(!page.contains("onerror=alert(1)>"));
        }
    }

    #[test]
    fn the_page_asks_for_nothing() {
        for runs in [vec![run("a", 1.0)], vec![run("a", 1.0), run("b", 2.0)]] {
            let page = page(&runs).unwrap();
            for word in ["http:", "https:", "src=", "href=", "url(", "@import", "<link", "<iframe", "fetch("] {
                assert!(!page.contains(word), "{word}");
            }
            assert!(page.contains("default-src 'none'") && page.contains(&digest::source_of(SCRIPT)));
        }
    }

    #[test]
    fn two_runs_are_laid_over_each_other_and_their_differences_named() {
        let page = page(&[run("first", 1.25), run("second", 0.75)]).unwrap();
        for word in ["first", "second", "train.learning_rate", "1.25", "0.75", "class=\"k0\"", "class=\"k1\""] {
            assert!(page.contains(word), "{word}");
        }
        let differing = page.split("What differs").nth(1).unwrap();
        assert!(differing.contains("train.learning_rate") && !differing.contains("lora.r"), "{differing}");
    }

    #[test]
    fn runs_of_one_name_are_told_apart() {
        let runs = [Run { dir: "a/run".into(), ..run("", 1.0) }, Run { dir: "b/run".into(), ..run("", 2.0) }];
        let page = page(&runs).unwrap();
        assert!(page.contains("a/run") && page.contains("b/run"));
    }

    #[test]
    fn a_run_without_a_step_has_a_page() {
        let page = page(&[Run { dir: "runs/new".into(), ..Run::default() }]).unwrap();
        assert!(page.contains("No step yet"));
        assert!(matches!(super::page(&[]), Err(Error::NoRuns)));
    }
}
