//! A dataset as one self-contained HTML page: figures, a histogram, and rows token by token.
//!
//! The page asks for nothing from anywhere and runs no script; what the data says is escaped, so that it is text and
//! nothing else.

use std::fmt::Write;

use crate::figures::{DataFigures, LengthBar, costs, facts};
use crate::preview::PreviewToken;
use crate::report::DataReport;

/// A page never shows more tokens than this in all, so that a browser still opens it.
const MAX_TOKENS: usize = 200_000;
/// Tokens shown of one row; the rest of a longer one is counted.
const MAX_ROW_TOKENS: usize = 4_000;

/// A row as it is shown.
#[derive(Debug)]
pub struct PageRow {
    /// Where it comes from.
    pub origin: String,
    /// Its tokens.
    pub tokens: Vec<PreviewToken>,
}

const STYLE: &str = "\
:root{color-scheme:light dark;--bg:#fff;--fg:#1c2024;--dim:#667079;--line:#d9dee3;--card:#f6f8fa;--on:#0b5d2e;\
--on1:#d3f3dd;--on2:#b9e9c9;--off:#4d5760;--off1:#eef0f2;--off2:#e3e6e9;--sp:#8a4b00;--bar:#2f7d55}\
@media(prefers-color-scheme:dark){:root{--bg:#14171a;--fg:#e4e8eb;--dim:#98a2ab;--line:#30363c;--card:#1c2125;\
--on:#b6f2cb;--on1:#14482a;--on2:#1b5a36;--off:#aab3bb;--off1:#24292e;--off2:#2d3339;--sp:#ffc37a;--bar:#4fb37f}}\
*{box-sizing:border-box}body{margin:0 auto;padding:24px;max-width:1100px;background:var(--bg);color:var(--fg);\
font:15px/1.5 system-ui,sans-serif}h1{font-size:22px;margin:0 0 4px}h2{font-size:17px;margin:28px 0 8px}\
.dim{color:var(--dim)}table{border-collapse:collapse;width:100%}td{padding:3px 12px 3px 0;vertical-align:top;\
border-bottom:1px solid var(--line)}td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}\
td.k{white-space:nowrap}td.r{width:70%;color:var(--dim);overflow-wrap:anywhere}svg{width:100%;height:auto;display:block}\
svg text{fill:var(--dim);font:11px system-ui,sans-serif}svg rect{fill:var(--bar)}svg line{stroke:var(--line)}\
.row{margin:12px 0;padding:12px 14px;background:var(--card);border:1px solid var(--line);border-radius:8px}\
.row p{margin:0 0 8px;font-size:13px}.t{white-space:pre-wrap;overflow-wrap:anywhere;\
font:13px/1.75 ui-monospace,monospace}.t b,.t i{font-weight:400;font-style:normal;border-radius:3px;padding:1px 0}\
b{color:var(--on);background:var(--on1);box-shadow:inset 0 -2px var(--bar)}b.o{background:var(--on2)}\
i{color:var(--off);background:var(--off1)}i.o{background:var(--off2)}.s{outline:1px solid var(--sp);outline-offset:-1px;\
color:var(--sp)}.key span{margin-right:18px}u{text-decoration:none;opacity:.55}";

/// Writes the page; `title` names the data, `of` is how many rows there are to choose from.
pub fn data_page(title: &str, report: &DataReport, figures: &DataFigures, rows: &[PageRow], of: usize) -> String {
    let mut page = String::with_capacity(64 << 10);
    let title = escaped(title);
    let _ = write!(
        page,
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\"><title>{title}: what is trained</title>\
         <style>{STYLE}</style></head><body><h1>What is trained</h1><div class=\"dim\">{title}</div>"
    );
    sources(&mut page, report);
    page.push_str("<h2>Figures</h2><table>");
    for (name, value, remark) in facts(report).into_iter().chain(costs(figures)) {
        let (name, value, remark) = (escaped(name.trim()), escaped(&value), escaped(&remark));
        let _ = write!(page, "<tr><td class=k>{name}</td><td class=n>{value}</td><td class=r>{remark}</td></tr>");
    }
    page.push_str("</table><h2>Lengths</h2>");
    histogram(&mut page, &figures.lengths);
    let _ = write!(
        page,
        "<h2>Rows</h2><p class=key><span class=t><b> trained </b></span><span class=t><i> not trained </i></span>\
         <span class=t><i class=s>&lt;special&gt;</i></span><span class=dim>Shades change with every token; hold the pointer \
         over one for its number.</span></p>"
    );
    let mut room = MAX_TOKENS;
    let mut shown = 0;
    for row in rows {
        if room == 0 {
            break;
        }
        shown += 1;
        room -= row_of(&mut page, row, room.min(MAX_ROW_TOKENS));
    }
    let _ = writeln!(page, "<p class=dim>{shown} of {of} rows.</p></body></html>");
    page
}

fn sources(page: &mut String, report: &DataReport) {
    page.push_str("<h2>Files</h2><table>");
    for source in &report.sources {
        let columns: Vec<&str> = source.ignored_columns.keys().map(String::as_str).collect();
        let ignored = match columns.is_empty() {
            true => String::new(),
            false => format!("columns not read: {}", escaped(&columns.join(", "))),
        };
        let (path, format) = (escaped(&source.path.display().to_string()), source.format);
        let _ = write!(
            page,
            "<tr><td>{path}</td><td class=n>{}</td><td class=k>{format}</td><td class=dim>{ignored}</td></tr>",
            source.records
        );
    }
    page.push_str("</table>");
}

/// Bars of an inline drawing, 1000 by 220 units.
fn histogram(page: &mut String, bars: &[LengthBar]) {
    const WIDTH: f64 = 1000.0;
    const HEIGHT: f64 = 190.0;
    const FOOT: f64 = 30.0;
    let most = bars.iter().map(|bar| bar.examples).max().unwrap_or(0).max(1);
    let step = WIDTH / bars.len().max(1) as f64;
    let _ = write!(page, "<svg viewBox=\"0 0 {WIDTH} {}\" role=img aria-label=\"Examples by length\">", HEIGHT + FOOT);
    for (i, bar) in bars.iter().enumerate() {
        let x = i as f64 * step;
        let height = (HEIGHT - 20.0) * bar.examples as f64 / most as f64;
        let (left, top, wide) = (x + 1.5, HEIGHT - height, step - 3.0);
        let _ = write!(
            page,
            "<rect x=\"{left:.1}\" y=\"{top:.1}\" width=\"{wide:.1}\" height=\"{height:.1}\" rx=2><title>{} to {} tokens: \
             {} examples</title></rect>",
            bar.from, bar.to, bar.examples
        );
        let middle = x + step / 2.0;
        if bar.examples > 0 {
            let above = top - 5.0;
            let _ = write!(page, "<text x=\"{middle:.1}\" y=\"{above:.1}\" text-anchor=middle>{}</text>", bar.examples);
        }
        if i % 2 == 0 {
            let below = HEIGHT + 16.0;
            let _ = write!(page, "<text x=\"{middle:.1}\" y=\"{below:.1}\" text-anchor=middle>{}</text>", bar.to);
        }
    }
    let _ = write!(
        page,
        "<line x1=0 y1={HEIGHT} x2={WIDTH} y2={HEIGHT} /></svg><p class=dim>Examples by tokens; under a bar \
         the longest length in it.</p>"
    );
}

/// Writes a row and says how many tokens it took.
fn row_of(page: &mut String, row: &PageRow, limit: usize) -> usize {
    let trained = row.tokens.iter().filter(|token| token.trained).count();
    let (origin, tokens) = (escaped(&row.origin), row.tokens.len());
    let _ =
        write!(page, "<div class=row><p><strong>{origin}</strong> <span class=dim>{tokens} tokens, {trained} trained");
    if tokens > limit {
        let _ = write!(page, "; the first {limit} are shown");
    }
    page.push_str("</span></p><div class=t>");
    for (i, token) in row.tokens.iter().take(limit).enumerate() {
        let tag = if token.trained { 'b' } else { 'i' };
        let class = match (i % 2 == 1, token.special) {
            (false, false) => "",
            (true, false) => " class=o",
            (false, true) => " class=s",
            (true, true) => " class=\"o s\"",
        };
        let _ = write!(page, "<{tag}{class} title={}>", token.id);
        for c in token.text.chars() {
            match c {
                '\n' => page.push_str("<u>\u{21b5}</u>\n"),
                '\t' => page.push_str("<u>\u{21e5}</u>\t"),
                c => push_escaped(page, c),
            }
        }
        let _ = write!(page, "</{tag}>");
    }
    page.push_str("</div></div>");
    tokens.min(limit)
}

fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    text.chars().for_each(|c| push_escaped(&mut out, c));
    out
}

/// What could begin a tag, an entity or an attribute becomes an entity; what turns the direction of writing or is not
/// seen at all is shown by its number.
fn push_escaped(out: &mut String, c: char) {
    match c {
        '&' => out.push_str("&amp;"),
        '<' => out.push_str("&lt;"),
        '>' => out.push_str("&gt;"),
        '"' => out.push_str("&quot;"),
        '\'' => out.push_str("&#39;"),
        '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200e}' | '\u{200f}' => {
            let _ = write!(out, "\u{27e8}U+{:04X}\u{27e9}", c as u32);
        }
        c if c.is_control() && c != '\n' && c != '\t' => {
            let _ = write!(out, "\u{27e8}U+{:04X}\u{27e9}", c as u32);
        }
        c => out.push(c),
    }
}
