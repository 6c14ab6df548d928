//! Parts of pages that one run and several have in common.

use crate::chart::{Chart, draw};
use crate::curves::Charts;
use crate::escape::escaped;
use crate::run::{Run, Sample};
use std::fmt::Write;

/// The charts, the minor ones folded.
pub(crate) fn charts(page: &mut String, charts: &Charts) {
    page.push_str("<h2>Curves</h2>");
    if charts.main.is_empty() && charts.minor.is_empty() {
        page.push_str("<p class=none>No step yet.</p>");
        return;
    }
    grid(page, &charts.main);
    if !charts.minor.is_empty() {
        page.push_str("<details><summary>More curves</summary>");
        grid(page, &charts.minor);
        page.push_str("</details>");
    }
}

fn grid(page: &mut String, charts: &[Chart]) {
    page.push_str("<div class=charts>");
    charts.iter().for_each(|chart| draw(page, chart));
    page.push_str("</div>");
}

/// What the model wrote to one prompt.
pub(crate) struct Asked<'a> {
    pub(crate) prompt: &'a str,
    pub(crate) wanted: Option<&'a str>,
    pub(crate) answers: Vec<&'a Sample>,
}

/// The samples of a run by prompt, in the order in which the prompts first come.
pub(crate) fn asked(run: &Run) -> Vec<Asked<'_>> {
    let mut all: Vec<Asked<'_>> = Vec::new();
    for sample in &run.samples {
        let at = match all.iter().position(|asked| asked.prompt == sample.prompt) {
            Some(at) => at,
            None => {
                all.push(Asked { prompt: &sample.prompt, wanted: sample.wanted.as_deref(), answers: Vec::new() });
                all.len() - 1
            }
        };
        all[at].answers.push(sample);
    }
    all
}

/// A prompt with answers side by side, each under its label.
pub(crate) fn answers(page: &mut String, prompt: &str, answers: &[(String, &str)]) {
    let _ = write!(page, "<div class=sample><pre>{}</pre><div class=answers>", escaped(prompt.trim()));
    for (label, text) in answers {
        let _ = write!(page, "<div><span>{}</span><pre>{}</pre></div>", escaped(label), escaped(text.trim()));
    }
    page.push_str("</div></div>");
}

/// What is to be said of how an answer ended.
pub(crate) fn ending(sample: &Sample) -> &'static str {
    match sample.finish_reason.as_str() {
        "length" => ", cut at the limit",
        "time" => ", cut when time was up",
        _ => "",
    }
}
