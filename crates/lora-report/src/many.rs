//! The page of several runs: their curves laid over each other, their last figures, and what differs between them.

use crate::chart::COLOURS;
use crate::curves::{of_many, ordered, title as words};
use crate::escape::escaped;
use crate::numbers::{Unit, count, plain, seconds, time};
use crate::one::{short, speed};
use crate::parts::{Asked, answers, asked, charts, ending};
use crate::run::{Run, Series};
use std::fmt::Write;

/// Keys that say where a run is and not what it is.
const PLACES: [&str; 1] = ["output_dir"];

/// The page's title.
pub(crate) fn title(runs: &[Run]) -> String {
    format!("{} runs: {}", runs.len(), names(runs).join(", "))
}

/// Names that tell the runs apart: the last part of their folders, or all of it where that is not enough.
fn names(runs: &[Run]) -> Vec<String> {
    let short: Vec<String> = runs.iter().map(Run::name).collect();
    let same = |name: &String| short.iter().filter(|other| *other == name).count() > 1;
    let whole = |(run, name): (&Run, &String)| if same(name) { run.dir.display().to_string() } else { name.clone() };
    runs.iter().zip(&short).map(whole).collect()
}

/// Everything between the page's head and its foot.
pub(crate) fn body(runs: &[Run]) -> String {
    let (mut page, names) = (String::with_capacity(128 << 10), names(runs));
    let _ = write!(page, "<header><h1>{} runs</h1>", runs.len());
    let _ = write!(page, "<p class=lead>{}</p></header>", escaped(&names.join(" \u{b7} ")));
    page.push_str("<div class=pair><div><h2>At the end</h2>");
    figures(&mut page, runs, &names);
    page.push_str("</div><div><h2>What differs</h2>");
    differences(&mut page, runs, &names);
    page.push_str("</div></div>");
    charts(&mut page, &of_many(runs, &names));
    samples(&mut page, runs, &names);
    let newest = runs.iter().filter_map(|run| Some(run.about.as_ref()?.updated_at)).max();
    let of: Vec<String> = runs.iter().map(|run| run.dir.display().to_string()).collect();
    let when = newest.map(|at| format!(" \u{b7} as of {}", time(at))).unwrap_or_default();
    let _ = write!(page, "<footer>{}{}</footer>", escaped(&of.join(" \u{b7} ")), escaped(&when));
    page
}

fn heading(page: &mut String, names: &[String]) {
    page.push_str("<div class=scroll><table><tr><th></th>");
    for (i, name) in names.iter().enumerate() {
        let _ = write!(page, "<th class=n><i class=\"k{} dot\"></i>{}</th>", i % COLOURS, escaped(name));
    }
    page.push_str("</tr>");
}

/// A row of a table of figures; `best` of them stands out.
fn row(page: &mut String, name: &str, values: &[Option<(f64, String)>], best: Option<f64>) {
    let _ = write!(page, "<tr><td class=k>{}</td>", escaped(name));
    for value in values {
        let class = if value.as_ref().is_some_and(|(v, _)| Some(*v) == best) { "n best" } else { "n" };
        let text = value.as_ref().map_or("", |(_, text)| text);
        let _ = write!(page, "<td class=\"{class}\">{}</td>", escaped(text));
    }
    page.push_str("</tr>");
}

/// The best of a row's values: the lowest of a loss, the highest of what is to be high; none of other figures, or where all
/// are the same.
fn best(name: &str, values: &[Option<(f64, String)>]) -> Option<f64> {
    let numbers = || values.iter().flatten().map(|(v, _)| *v);
    let low = numbers().fold(f64::INFINITY, f64::min);
    let high = numbers().fold(f64::NEG_INFINITY, f64::max);
    if low >= high {
        return None;
    }
    let more = ["accuracy", "macro_f1", "margin", "tokens_per_second"];
    if name.ends_with("loss") {
        return Some(low);
    }
    more.iter().any(|end| name.ends_with(end)).then_some(high)
}

fn figures(page: &mut String, runs: &[Run], names: &[String]) {
    heading(page, names);
    let about = |of: &dyn Fn(&crate::About) -> (f64, String)| -> Vec<Option<(f64, String)>> {
        runs.iter().map(|run| run.about.as_ref().map(of)).collect()
    };
    row(page, "status", &about(&|a| (0.0, a.status.name().to_string())), None);
    row(page, "steps", &about(&|a| (0.0, format!("{} of {}", count(a.step), count(a.total_steps)))), None);
    row(page, "trained parameters", &about(&|a| (0.0, count(a.trained_parameters))), None);
    row(page, "time in steps", &about(&|a| (0.0, seconds(a.seconds))), None);
    for name in ordered(&runs.iter().collect::<Vec<_>>()) {
        if ["seconds", "tokens", "trained_tokens"].contains(&name.as_str()) {
            continue;
        }
        let unit = Unit::of(&name);
        let write = |x: f64| match unit {
            Unit::Plain if name.ends_with("loss") => short(x),
            Unit::Plain if name == "tokens_per_second" => plain(x.round()),
            unit => unit.write(x),
        };
        let series = || runs.iter().map(|run| run.series(&name));
        let value = |x: Option<f64>| x.map(|x| (x, write(x)));
        let (label, values): (String, Vec<Option<(f64, String)>>) = match name.as_str() {
            "tokens_per_second" => {
                ("tokens a second, median".into(), series().map(|s| value(s.and_then(speed))).collect())
            }
            "loss" => ("loss of the last step".into(), series().map(|s| value(s?.last())).collect()),
            _ => (lower(&words(&name)), series().map(|s| value(s?.last())).collect()),
        };
        // The loss of one step says too little of a run to call one better.
        row(page, &label, &values, best(&name, &values).filter(|_| name != "loss"));
        if name == "loss" {
            let values: Vec<Option<(f64, String)>> = series().map(|s| value(s.and_then(late))).collect();
            row(page, "loss, mean of the last tenth", &values, best(&name, &values));
        }
        if name == "eval_loss" {
            let lowest = |s: &Series| s.points.iter().map(|p| p.1).min_by(f64::total_cmp);
            let values: Vec<Option<(f64, String)>> = series().map(|s| value(lowest(s?))).collect();
            row(page, "held-out loss, lowest", &values, best(&name, &values));
        }
    }
    page.push_str("</table></div>");
}

/// The mean of the last tenth of a figure's values.
fn late(series: &Series) -> Option<f64> {
    let values = &series.points[series.points.len() - series.points.len().div_ceil(10)..];
    (!values.is_empty()).then(|| values.iter().map(|point| point.1).sum::<f64>() / values.len() as f64)
}

/// The first letter small, for a row's name.
fn lower(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map(|first| first.to_lowercase().chain(letters).collect()).unwrap_or_default()
}

fn differences(page: &mut String, runs: &[Run], names: &[String]) {
    let mut keys: Vec<&String> = Vec::new();
    for (key, _) in runs.iter().flat_map(|run| &run.config) {
        if !keys.contains(&key) && !PLACES.contains(&key.as_str()) {
            keys.push(key);
        }
    }
    let value = |run: &Run, key: &str| run.config.iter().find(|(own, _)| own == key).map(|(_, value)| value.clone());
    let differs = |key: &&String| {
        let mut values = runs.iter().map(|run| value(run, key));
        let first = values.next();
        values.any(|other| Some(other) != first)
    };
    let differing: Vec<&String> = keys.into_iter().filter(differs).collect();
    if differing.is_empty() {
        page.push_str("<p class=none>The configurations are the same.</p>");
        return;
    }
    heading(page, names);
    for key in differing {
        let _ = write!(page, "<tr><td class=k>{}</td>", escaped(key));
        for run in runs {
            let text = value(run, key).map_or_else(|| "\u{2013}".to_string(), |value| escaped(&value));
            let _ = write!(page, "<td class=\"v n\">{text}</td>");
        }
        page.push_str("</tr>");
    }
    page.push_str("</table></div>");
}

/// The last answers of all runs to the prompts that they have in common.
fn samples(page: &mut String, runs: &[Run], names: &[String]) {
    let all: Vec<Vec<Asked<'_>>> = runs.iter().map(asked).collect();
    let Some(first) = all.first() else { return };
    let mut begun = false;
    for one in first {
        let others: Option<Vec<&Asked<'_>>> =
            all.iter().map(|list| list.iter().find(|asked| asked.prompt == one.prompt)).collect();
        let Some(others) = others else { continue };
        if !std::mem::replace(&mut begun, true) {
            page.push_str("<h2>Samples</h2>");
        }
        let mut list: Vec<(String, &str)> = Vec::new();
        for (asked, name) in others.iter().zip(names) {
            if let Some(last) = asked.answers.last() {
                list.push((format!("{name}, step {}{}", count(last.step), ending(last)), &last.text));
            }
        }
        list.extend(one.wanted.map(|wanted| ("wanted".to_string(), wanted)));
        answers(page, one.prompt, &list);
    }
}
