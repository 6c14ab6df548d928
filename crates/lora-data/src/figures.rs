//! What a dataset costs: lengths, rows when packed, and what padding would cost.

use std::fmt;

use serde::Serialize;

use crate::pack::pack;
use crate::report::DataReport;
use crate::sampler::{epoch_order, grouped_order};

/// The bars of a histogram.
const BARS: usize = 24;

/// Examples whose length lies in a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct LengthBar {
    /// The shortest length, in tokens.
    pub from: usize,
    /// The longest length.
    pub to: usize,
    /// Examples with a length in this range.
    pub examples: usize,
}

/// How well rows are filled when examples are packed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PackingFigures {
    /// Tokens that a row has room for.
    pub max_length: usize,
    /// Rows that all examples fill.
    pub rows: usize,
    /// The share of their positions that hold a token.
    pub efficiency: f64,
    /// Positions that hold none.
    pub empty: usize,
}

/// What training in padded batches would add, which this program never does.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PaddingFigures {
    /// Examples of a batch.
    pub batch: usize,
    /// The share of positions that padding would take, batches drawn at random.
    pub shuffled: f64,
    /// The same with batches of examples of similar length.
    pub grouped: f64,
}

/// The figures of a dataset.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DataFigures {
    /// Lengths in bars of the same width.
    pub lengths: Vec<LengthBar>,
    /// The length that half of the examples do not pass.
    pub median: usize,
    /// The length that 95 of 100 examples do not pass.
    pub p95: usize,
    /// Packed.
    pub packing: PackingFigures,
    /// Padded.
    pub padding: PaddingFigures,
}

impl DataFigures {
    /// The figures of examples of these lengths, for rows of `max_length` tokens and batches of `batch` examples.
    pub fn of(lengths: &[usize], max_length: usize, batch: usize) -> Self {
        let tokens: usize = lengths.iter().sum();
        let rows = pack(lengths, max_length).len();
        let positions = rows * max_length;
        let mut sorted = lengths.to_vec();
        sorted.sort_unstable();
        let quantile = |share: f64| {
            let at = (share * sorted.len() as f64).ceil() as usize;
            sorted.get(at.saturating_sub(1)).copied().unwrap_or(0)
        };
        let batch = batch.max(1);
        let padded = |order: &[usize]| -> f64 {
            let positions: usize = order
                .chunks(batch)
                .map(|rows| rows.len() * rows.iter().map(|&row| lengths[row]).max().unwrap_or(0))
                .sum();
            if positions == 0 { 0.0 } else { 1.0 - tokens as f64 / positions as f64 }
        };
        Self {
            lengths: bars(&sorted),
            median: quantile(0.5),
            p95: quantile(0.95),
            packing: PackingFigures {
                max_length,
                rows,
                efficiency: tokens as f64 / positions.max(1) as f64,
                empty: positions.saturating_sub(tokens),
            },
            padding: PaddingFigures {
                batch,
                shuffled: padded(&epoch_order(lengths.len(), 0, 0)),
                grouped: padded(&grouped_order(lengths, batch, 0, 0)),
            },
        }
    }
}

/// Bars of the same width over sorted lengths.
fn bars(sorted: &[usize]) -> Vec<LengthBar> {
    let Some(&longest) = sorted.last() else { return Vec::new() };
    let width = longest.max(1).div_ceil(BARS);
    let bar = |i: usize| {
        let (from, to) = (i * width + 1, (i + 1) * width);
        let examples = sorted.partition_point(|&n| n <= to) - sorted.partition_point(|&n| n < from);
        LengthBar { from, to, examples }
    };
    (0..longest.max(1).div_ceil(width)).map(bar).collect()
}

/// A report and its figures as text, `width` columns wide.
#[derive(Debug)]
pub struct StatsText<'a> {
    /// What became of the records.
    pub report: &'a DataReport,
    /// The figures.
    pub figures: &'a DataFigures,
    /// Columns that a line may have.
    pub width: usize,
}

/// A part in percent.
pub(crate) fn percent(part: usize, of: usize) -> f64 {
    if of == 0 { 0.0 } else { 100.0 * part as f64 / of as f64 }
}

impl fmt::Display for StatsText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (report, figures) = (self.report, self.figures);
        for source in &report.sources {
            writeln!(f, "{}  {} records as {}", source.path.display(), source.records, source.format)?;
            if !source.ignored_columns.is_empty() {
                let columns: Vec<&str> = source.ignored_columns.keys().map(String::as_str).collect();
                writeln!(f, "  columns not read: {}", columns.join(", "))?;
            }
            for note in &source.notes {
                writeln!(f, "  {note}")?;
            }
            if let (count @ 1.., first) = (source.bad.count, source.bad.first.first()) {
                writeln!(f, "  {count} bad records left out, first {}", first.map_or("", String::as_str))?;
            }
        }
        for (name, value, remark) in facts(report) {
            match remark.is_empty() {
                true => writeln!(f, "{name:<16}{value:>12}")?,
                false => writeln!(f, "{name:<16}{value:>12}  {remark}")?,
            }
        }
        for (name, value, remark) in costs(figures) {
            writeln!(f, "{name:<16}{value:>12}  {remark}")?;
        }
        writeln!(f, "lengths (tokens, examples)")?;
        let most = figures.lengths.iter().map(|bar| bar.examples).max().unwrap_or(0).max(1);
        let room = self.width.saturating_sub(33).clamp(10, 60);
        for bar in &figures.lengths {
            let eighths = (8 * room * bar.examples).div_ceil(most);
            let rest = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"].get(eighths % 8).copied().unwrap_or_default();
            let drawn = "█".repeat(eighths / 8) + rest;
            let line = format!("{:>7} - {:<7} {:>8}  {drawn}", bar.from, bar.to, bar.examples);
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// The counts of a report: name, value, and what is to be said of it. Names of what did not happen are left out, but for
/// those that are always asked for.
pub(crate) fn facts(report: &DataReport) -> Vec<(String, String, String)> {
    let mut facts: Vec<(String, String, String)> = Vec::new();
    let mut add = |name: &str, value: usize, remark: String| facts.push((name.into(), value.to_string(), remark));
    add("read", report.read, String::new());
    add("kept", report.kept, String::new());
    let lost = |tokens: usize, trained: usize| {
        if tokens == 0 { String::new() } else { format!("{tokens} tokens lost, {trained} of them trained") }
    };
    let mut cut = lost(report.cut_tokens, report.cut_trained_tokens);
    if report.cut_turns > 0 {
        cut += &format!(", {} turns", report.cut_turns);
    }
    if let Some(first) = report.first_truncated.first() {
        cut += &format!("{}first {first}", if cut.is_empty() { "" } else { "; " });
    }
    add("truncated", report.truncated, cut);
    if report.split_rows > 0 {
        add("rows by split", report.split_rows, "rows more, end to end".into());
    }
    for (reason, dropped) in &report.dropped {
        let first = dropped.first.first().map(|origin| format!("{reason}, first {origin}")).unwrap_or_default();
        add("dropped", dropped.count, first);
    }
    if report.dropped_tokens > 0 {
        add("dropped tokens", report.dropped_tokens, format!("{} of them trained", report.dropped_trained_tokens));
    }
    let again = match report.duplicate_tokens {
        0 => String::new(),
        tokens => format!("kept; {tokens} tokens, {:.1} % of all", percent(tokens, report.tokens)),
    };
    add("duplicates", report.duplicates, again);
    if report.classic_prompts > 0 {
        add("without template", report.classic_prompts, "laid out as `### Instruction:` text".into());
    }
    if report.split_conversations > 0 {
        add("split", report.split_conversations, "conversations, a row per trained turn".into());
    }
    if report.merged_edges > 0 {
        add("merged edges", report.merged_edges, "answers that begin or end inside a token".into());
    }
    if let Some(replay) = report.replay {
        let (all, share) = (replay.rows_per_pass(), 100.0 * replay.share());
        add(
            "replayed",
            replay.drawn,
            format!("of {all} rows of a pass ({share:.1} %), from an old set of {}", replay.old),
        );
    }
    add("tokens", report.tokens, String::new());
    add("trained tokens", report.trained_tokens, format!("{:.1} %", percent(report.trained_tokens, report.tokens)));
    for (token, rows) in &report.end_tokens {
        add("end token", *rows, format!("rows end trained text with {token:?}"));
    }
    if report.without_end > 0 {
        add("no end token", report.without_end, "rows whose trained text does not end with one".into());
    }
    if let Some(template) = &report.template {
        let mut remark = match template.marks_generation {
            true => "answers marked by its generation blocks".to_owned(),
            false => "answers found by rendering prefixes".to_owned(),
        };
        if template.writes_date {
            remark += "; writes the date: set data.template_date, or another day gives other tokens";
        }
        facts.push(("template".into(), template.name.clone(), remark));
    }
    facts
}

/// The figures in the same form.
pub(crate) fn costs(figures: &DataFigures) -> Vec<(String, String, String)> {
    let (packing, padding) = (&figures.packing, &figures.padding);
    vec![
        (
            "length".into(),
            figures.median.to_string(),
            format!("half are at most this long; 95 % at most {}", figures.p95),
        ),
        (
            "packed rows".into(),
            packing.rows.to_string(),
            format!(
                "of {} tokens, {:.1} % filled, {} positions empty",
                packing.max_length,
                100.0 * packing.efficiency,
                packing.empty
            ),
        ),
        (
            "padding saved".into(),
            format!("{:.1} %", 100.0 * padding.shuffled),
            format!(
                "of the positions of padded batches of {}; {:.1} % if grouped by length",
                padding.batch,
                100.0 * padding.grouped
            ),
        ),
    ]
}
