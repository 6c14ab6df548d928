//! The page of one run.

use crate::about::About;
use crate::curves::of_one;
use crate::escape::escaped;
use crate::numbers::{Unit, count, median, percent, plain, seconds, time};
use crate::parts::{answers, asked, charts, ending};
use crate::run::{Run, Series};
use serde_json::Value;
use std::fmt::Write;

/// Everything between the page's head and its foot.
pub(crate) fn body(run: &Run) -> String {
    let mut page = String::with_capacity(64 << 10);
    head(&mut page, run);
    tiles(&mut page, run);
    charts(&mut page, &of_one(run));
    samples(&mut page, run);
    if let Some(about) = &run.about {
        data(&mut page, about);
    }
    configuration(&mut page, run);
    foot(&mut page, run);
    page
}

fn head(page: &mut String, run: &Run) {
    let state = run.about.as_ref().map(|about| about.status.name());
    let state = state.map(|name| format!("<span class=\"state {name}\">{name}</span>")).unwrap_or_default();
    let _ = write!(page, "<header><h1>{}{state}</h1>", escaped(&run.name()));
    let value = |key: &str| run.config.iter().find(|(name, _)| name == key).map(|(_, value)| value.trim_matches('"'));
    let mut parts: Vec<String> = value("model.path").map(|path| format!("base {path}")).into_iter().collect();
    if let Some(about) = &run.about {
        let threads = if about.device == "cpu" { format!(" with {} threads", about.threads) } else { String::new() };
        parts.push(format!("{} in {} on {}{threads}", about.family, about.dtype, about.device));
    }
    let _ = write!(page, "<p class=lead>{}</p></header>", escaped(&parts.join(" \u{b7} ")));
}

/// The figures that are looked for first.
fn tiles(page: &mut String, run: &Run) {
    let mut tiles: Vec<(String, String, String)> = Vec::new();
    let mut tile = |name: &str, value: String, remark: String| tiles.push((name.into(), value, remark));
    let change = |series: &Series, digits: fn(f64) -> String| match series.points[..] {
        [] => None,
        [only] => Some((digits(only.1), String::new())),
        [first, .., last] => Some((digits(last.1), format!("from {}", digits(first.1)))),
    };
    if let Some((value, remark)) = run.series("eval_loss").and_then(|s| change(s, short)) {
        tile("Held-out loss", value, remark);
    }
    for (name, words) in [
        ("eval_accuracy", "Held-out accuracy"),
        ("eval_reward_accuracy", "Held-out accuracy"),
        ("eval_reward_margin", "Held-out margin"),
        ("eval_reward", "Held-out reward"),
    ] {
        if let Some((value, remark)) = run.series(name).and_then(|s| change(s, short)) {
            tile(words, value, remark);
        }
    }
    if let Some((value, remark)) = run.series("loss").and_then(|s| change(s, short)) {
        tile("Loss, last step", value, remark);
    }
    let last_step = run.series.iter().filter_map(|s| Some(s.points.last()?.0)).max().unwrap_or(0);
    if let Some(about) = &run.about {
        let skipped = match about.skipped_steps {
            0 => String::new(),
            n => format!("; {n} left out"),
        };
        tile("Step", count(about.step.max(last_step)), format!("of {}{skipped}", count(about.total_steps)));
        let share = about.trained_parameters as f64 / about.base_parameters.max(1) as f64;
        let remark = format!("{} of {}", percent(share), count(about.base_parameters));
        tile("Trained parameters", count(about.trained_parameters), remark);
        tile("Tokens", count(about.tokens), format!("{} trained", count(about.trained_tokens)));
        tile("Time in steps", seconds(about.seconds), String::new());
    } else {
        tile("Step", count(last_step), String::new());
    }
    if let Some(rate) = run.series("tokens_per_second").and_then(speed) {
        let share = run.about.as_ref().and_then(|about| Some(about.operations_per_token? * rate / about.matrix_rate?));
        let remark = share.map_or_else(String::new, |share| format!("{} of the matrix rate", percent(share)));
        tile("Tokens a second", plain(rate.round()), remark);
    }
    if let Some(bytes) = run.series("peak_memory_bytes").and_then(Series::last) {
        tile("Peak memory", Unit::Bytes.write(bytes), String::new());
    }
    page.push_str("<div class=tiles>");
    for (name, value, remark) in tiles {
        let (name, value, remark) = (escaped(&name), escaped(&value), escaped(&remark));
        let _ = write!(page, "<div><span>{name}</span><b>{value}</b><small>{remark}</small></div>");
    }
    page.push_str("</div>");
}

/// The middle of the speeds of all steps.
pub(crate) fn speed(series: &Series) -> Option<f64> {
    median(&series.points.iter().map(|point| point.1).collect::<Vec<_>>())
}

/// Four decimals, as the command line has them.
pub(crate) fn short(x: f64) -> String {
    match x.abs() {
        0.001..1e4 => format!("{x:.4}"),
        _ => plain(x),
    }
}

fn samples(page: &mut String, run: &Run) {
    let asked = asked(run);
    if asked.is_empty() {
        return;
    }
    page.push_str("<h2>Samples</h2>");
    for one in asked {
        let mut list: Vec<(String, &str)> = Vec::new();
        if let Some(first) = one.answers.first() {
            let word = if first.step == 0 { "before".to_string() } else { format!("step {}", first.step) };
            list.push((format!("{word}{}", ending(first)), &first.text));
        }
        if let [_, .., last] = one.answers[..] {
            list.push((format!("after step {}{}", count(last.step), ending(last)), &last.text));
        }
        list.extend(one.wanted.map(|wanted| ("wanted".to_string(), wanted)));
        answers(page, one.prompt, &list);
    }
}

fn data(page: &mut String, about: &About) {
    let data = &about.data;
    if !data.train.is_object() {
        return;
    }
    page.push_str("<h2>Data</h2>");
    for (title, report) in [("Trained on", &data.train), ("Evaluated on", &data.eval)] {
        if report.is_object() {
            files(page, title, report);
        }
    }
    let mut rows: Vec<(String, String, String)> = facts(&data.train);
    rows.push(("rows of a pass".into(), count(data.rows), String::new()));
    if data.eval_examples > 0 {
        let remark = format!("{} tokens", count(data.eval_tokens));
        rows.push(("held-out examples".into(), count(data.eval_examples), remark));
    }
    page.push_str("<div class=scroll style=\"margin-top:14px\"><table>");
    for (name, value, remark) in rows {
        let (name, value, remark) = (escaped(&name), escaped(&value), escaped(&remark));
        let _ = write!(page, "<tr><td class=k>{name}</td><td class=n>{value}</td><td class=r>{remark}</td></tr>");
    }
    page.push_str("</table></div>");
}

fn number(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or(0)
}

fn files(page: &mut String, title: &str, report: &Value) {
    let _ = write!(
        page,
        "<div class=scroll style=\"margin-bottom:14px\"><table><tr><th>{}</th><th>format</th><th class=n>records</th>\
         <th></th></tr>",
        escaped(title)
    );
    for source in report["sources"].as_array().into_iter().flatten() {
        let text = |value: &Value| escaped(value.as_str().unwrap_or_default());
        let mut remarks: Vec<String> =
            source["notes"].as_array().into_iter().flatten().filter_map(|n| Some(n.as_str()?.to_string())).collect();
        let columns: Vec<&str> =
            source["ignored_columns"].as_object().into_iter().flatten().map(|(name, _)| name.as_str()).collect();
        if !columns.is_empty() {
            remarks.push(format!("columns not read: {}", columns.join(", ")));
        }
        if let bad @ 1.. = number(&source["bad"], "count") {
            remarks.push(format!("{bad} bad records left out"));
        }
        let _ = write!(
            page,
            "<tr><td class=p>{}</td><td class=k>{}</td><td class=n>{}</td><td class=r>{}</td></tr>",
            text(&source["path"]),
            text(&source["format"]),
            count(number(source, "records")),
            escaped(&remarks.join("; "))
        );
    }
    page.push_str("</table></div>");
}

/// What became of the records: always those that are asked for, the others where they happened.
fn facts(report: &Value) -> Vec<(String, String, String)> {
    let n = |key: &str| number(report, key);
    let share = |part: u64, of: u64| if of == 0 { String::new() } else { percent(part as f64 / of as f64) };
    let mut rows = Vec::new();
    let mut row = |name: &str, value: u64, remark: String| rows.push((name.to_string(), count(value), remark));
    row("records read", n("read"), String::new());
    row("examples kept", n("kept"), String::new());
    row("tokens", n("tokens"), format!("the longest example has {}", count(n("longest"))));
    row("trained tokens", n("trained_tokens"), share(n("trained_tokens"), n("tokens")));
    let lost = |tokens: u64, trained: u64| match tokens {
        0 => String::new(),
        _ => format!("{} tokens lost, {} of them trained", count(tokens), count(trained)),
    };
    row("truncated", n("truncated"), lost(n("cut_tokens"), n("cut_trained_tokens")));
    let dropped: Vec<(&String, u64)> =
        report["dropped"].as_object().into_iter().flatten().map(|(reason, d)| (reason, number(d, "count"))).collect();
    let reasons: Vec<String> = dropped.iter().map(|(reason, n)| format!("{n} {}", reason.replace('_', " "))).collect();
    let mut remark = reasons.join(", ");
    if n("dropped_tokens") > 0 {
        remark = format!("{remark}; {}", lost(n("dropped_tokens"), n("dropped_trained_tokens")));
    }
    row("dropped", dropped.iter().map(|(_, n)| n).sum(), remark);
    let again = match n("duplicate_tokens") {
        0 => String::new(),
        tokens => format!("{} tokens, {}", count(tokens), share(tokens, n("tokens"))),
    };
    row("duplicates", n("duplicates"), again);
    if n("without_end") > 0 {
        row("without an end token", n("without_end"), "the model does not learn to stop there".into());
    }
    if let Some(name) = report["template"]["name"].as_str() {
        rows.push(("chat template".into(), String::new(), name.to_string()));
    }
    rows
}

fn configuration(page: &mut String, run: &Run) {
    page.push_str("<h2>Configuration</h2><div class=sections>");
    let section = |key: &str| key.split_once('.').map_or("", |(section, _)| section).to_string();
    let mut sections: Vec<(String, Vec<(&str, &str)>)> = Vec::new();
    for (key, value) in &run.config {
        let name = section(key);
        let short = key.strip_prefix(&format!("{name}.")).unwrap_or(key);
        match sections.iter_mut().find(|(own, _)| *own == name) {
            Some((_, keys)) => keys.push((short, value)),
            None => sections.push((name, vec![(short, value)])),
        }
    }
    for (name, keys) in sections {
        page.push_str("<div class=scroll><table>");
        if !name.is_empty() {
            let _ = write!(page, "<tr><th colspan=2>{}</th></tr>", escaped(&name));
        }
        for (key, value) in keys {
            let _ = write!(page, "<tr><td>{}</td><td class=v>{}</td></tr>", escaped(key), escaped(value));
        }
        page.push_str("</table></div>");
    }
    page.push_str("</div>");
}

fn foot(page: &mut String, run: &Run) {
    let mut parts = vec![run.dir.display().to_string()];
    if let Some(about) = &run.about {
        parts.push(format!("as of {}", time(about.updated_at)));
        parts.push(format!("libtorch {}", about.libtorch));
    }
    let _ = write!(page, "<footer>{}</footer>", escaped(&parts.join(" \u{b7} ")));
}
