//! A chart: curves over steps in an inline drawing, with labels that stay as large as the text around them.

use crate::escape::escaped;
use crate::numbers::{Unit, range, thinned, ticks};
use std::fmt::Write;

/// Points that are drawn of one curve.
const MOST_POINTS: usize = 600;
/// Colours, before they come again with dashes.
pub(crate) const COLOURS: usize = 8;
/// Sides of the drawing in its own units; it is stretched to the room there is.
const SIDE: f64 = 1000.0;

/// How a curve is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stroke {
    /// A line.
    Line,
    /// Behind its smoothed form.
    Raw,
    /// Points, joined by a thin line.
    Dots,
}

/// A curve.
#[derive(Clone, Debug)]
pub(crate) struct Curve {
    pub(crate) name: String,
    /// Its number among those that are told apart by colour.
    pub(crate) colour: usize,
    pub(crate) stroke: Stroke,
    pub(crate) points: Vec<(u64, f64)>,
}

/// A chart.
#[derive(Clone, Debug)]
pub(crate) struct Chart {
    pub(crate) title: String,
    pub(crate) remark: String,
    pub(crate) unit: Unit,
    pub(crate) wide: bool,
    pub(crate) curves: Vec<Curve>,
}

/// Adds a chart to a page.
pub(crate) fn draw(page: &mut String, chart: &Chart) {
    let points = || chart.curves.iter().flat_map(|curve| &curve.points);
    let (Some(first), Some(last)) = (points().map(|p| p.0).min(), points().map(|p| p.0).max()) else { return };
    let (from, to) = (first as f64, if last > first { last as f64 } else { first as f64 + 1.0 });
    let (low, high) = range(points().map(|p| p.1));
    let across = |step: f64| SIDE * (step - from) / (to - from);
    let down = |value: f64| SIDE * (1.0 - (value.clamp(low, high) - low) / (high - low));

    let _ = write!(page, "<figure{}>", if chart.wide { " class=wide" } else { "" });
    caption(page, chart);
    let unit = match chart.unit {
        Unit::Plain => "plain",
        Unit::Bytes => "bytes",
        Unit::Seconds => "seconds",
    };
    let label = escaped(&chart.title);
    let _ = write!(
        page,
        "<div class=plot data-from={from} data-to={to} data-unit={unit}><svg viewBox=\"0 0 {SIDE} {SIDE}\" \
         preserveAspectRatio=none role=img aria-label=\"{label} by step\">"
    );
    let marks = ticks((low, high), if chart.wide { 6 } else { 4 });
    for mark in &marks {
        let y = down(*mark);
        let _ = write!(page, "<path class=grid d=\"M0 {y:.1}H{SIDE}\"/>");
    }
    for curve in &chart.curves {
        path(page, curve, &across, &down);
    }
    page.push_str("</svg>");
    for mark in &marks {
        let (y, text) = (down(*mark) / SIDE * 100.0, escaped(&chart.unit.write(*mark)));
        let _ = write!(page, "<em class=y style=\"top:{y:.2}%\">{text}</em>");
    }
    for mark in ticks((from, to), if chart.wide { 8 } else { 4 }).into_iter().filter(|mark| mark.fract() == 0.0) {
        let (x, text) = (across(mark) / SIDE * 100.0, escaped(&Unit::Plain.write(mark)));
        let _ = write!(page, "<em class=x style=\"left:{x:.2}%\">{text}</em>");
    }
    page.push_str("<div class=at></div><div class=tip></div></div></figure>");
}

fn caption(page: &mut String, chart: &Chart) {
    let _ = write!(page, "<figcaption>{}", escaped(&chart.title));
    let shown = || chart.curves.iter().filter(|curve| curve.stroke != Stroke::Raw);
    if shown().nth(1).is_some() {
        for curve in shown() {
            let (colour, dot) = (curve.colour % COLOURS, if curve.stroke == Stroke::Dots { " dot" } else { "" });
            let _ = write!(page, "<span><i class=\"k{colour}{dot}\"></i>{}</span>", escaped(&curve.name));
        }
    }
    if !chart.remark.is_empty() {
        let _ = write!(page, "<span>{}</span>", escaped(&chart.remark));
    }
    page.push_str("</figcaption>");
}

fn path(page: &mut String, curve: &Curve, across: &dyn Fn(f64) -> f64, down: &dyn Fn(f64) -> f64) {
    let points = thinned(&curve.points, MOST_POINTS);
    let colour = curve.colour % COLOURS;
    let mut line = String::new();
    for (i, (step, value)) in points.iter().enumerate() {
        let (x, y) = (across(*step as f64), down(*value));
        let _ = write!(line, "{}{x:.1} {y:.1}", if i == 0 { 'M' } else { 'L' });
    }
    let (class, dash) = match curve.stroke {
        Stroke::Line => ("", curve.colour >= COLOURS),
        Stroke::Raw => (" raw", false),
        Stroke::Dots => (" thin", curve.colour >= COLOURS),
    };
    let dash = if dash { " dash" } else { "" };
    let _ = write!(page, "<path class=\"k{colour}{class}{dash}\" d=\"{line}\" data-k={colour}");
    let _ = write!(page, " data-n=\"{}\" data-p=\"", escaped(&curve.name));
    for (i, (step, value)) in points.iter().enumerate() {
        let _ = write!(page, "{}{step},{value}", if i == 0 { "" } else { " " });
    }
    page.push_str("\"/>");
    // A line of no length with round ends is a dot that stays round however the drawing is stretched.
    if curve.stroke == Stroke::Dots || points.len() == 1 {
        let _ = write!(page, "<path class=\"k{colour} dots\" d=\"");
        for (step, value) in &points {
            let _ = write!(page, "M{:.1} {:.1}h0", across(*step as f64), down(*value));
        }
        page.push_str("\"/>");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(points: Vec<(u64, f64)>) -> String {
        let curve = Curve { name: "a<b>".into(), colour: 9, stroke: Stroke::Line, points };
        let chart =
            Chart { title: "\"x\"".into(), remark: String::new(), unit: Unit::Plain, wide: false, curves: vec![curve] };
        let mut page = String::new();
        draw(&mut page, &chart);
        page
    }

    #[test]
    fn values_stand_where_the_axis_says() {
        let page = chart(vec![(0, 0.0), (10, 1.0)]);
        // The axis is from 0 to 1.06: 1 lies 0.06 of 1.06 below the top.
        assert!(page.contains("d=\"M0.0 1000.0L1000.0 56.6\""), "{page}");
        assert!(page.contains("data-p=\"0,0 10,1\""), "{page}");
        assert!(page.contains("class=\"k1 dash\""), "the tenth curve is the second colour with dashes: {page}");
        assert!(page.contains("a&lt;b&gt;") && page.contains("&quot;x&quot;") && !page.contains("<b>"), "{page}");
    }

    #[test]
    fn one_point_is_a_dot_and_none_is_no_chart() {
        assert!(chart(vec![(5, 2.0)]).contains("class=\"k1 dots\" d=\"M0.0"), "{}", chart(vec![(5, 2.0)]));
        assert_eq!(chart(Vec::new()), "");
    }
}
