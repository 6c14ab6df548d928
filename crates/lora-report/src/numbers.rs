//! Numbers for readers: how they are written, where an axis has its ticks, how a noisy curve is calmed, and how a long one
//! is thinned.

/// How the values of a figure are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    Plain,
    Bytes,
    Seconds,
}

impl Unit {
    /// The unit of a figure of `metrics.jsonl`, by its name.
    pub(crate) fn of(name: &str) -> Self {
        match name {
            _ if name.ends_with("_bytes") => Self::Bytes,
            _ if name == "seconds" || name.ends_with("_seconds") => Self::Seconds,
            _ => Self::Plain,
        }
    }

    /// A value with its unit.
    pub(crate) fn write(self, x: f64) -> String {
        match self {
            Self::Plain => plain(x),
            Self::Bytes => bytes(x),
            Self::Seconds => seconds(x),
        }
    }
}

/// A number with five figures that count, with a power of ten where it is very small or large.
pub(crate) fn plain(x: f64) -> String {
    let size = x.abs();
    match size {
        _ if !x.is_finite() => "not finite".into(),
        0.0 => "0".into(),
        _ if x.fract() == 0.0 && size < 1e15 => grouped(x),
        1e5.. => grouped(x.round()),
        _ if size < 1e-3 => power(format!("{x:.3e}")),
        _ => {
            let decimals = (4 - size.log10().floor() as i32).clamp(1, 7) as usize;
            trimmed(format!("{x:.decimals$}"))
        }
    }
}

/// Zeros at the end of a fraction say nothing.
fn trimmed(text: String) -> String {
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_string(),
        false => text,
    }
}

/// The same of a mantissa.
fn power(text: String) -> String {
    match text.split_once('e') {
        Some((mantissa, exponent)) => format!("{}e{exponent}", trimmed(mantissa.to_string())),
        None => text,
    }
}

/// A whole number with narrow spaces between thousands.
fn grouped(x: f64) -> String {
    let digits = format!("{:.0}", x.abs());
    let mut out = String::from(if x < 0.0 { "-" } else { "" });
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push('\u{202f}');
        }
        out.push(digit);
    }
    out
}

/// A count with a narrow space between thousands.
pub(crate) fn count(n: u64) -> String {
    grouped(n as f64)
}

fn bytes(x: f64) -> String {
    match x.abs() {
        1e9.. => format!("{:.2} GB", x / 1e9),
        1e6.. => format!("{:.1} MB", x / 1e6),
        1e3.. => format!("{:.1} kB", x / 1e3),
        _ => format!("{x:.0} B"),
    }
}

/// A time as `1 h 02 min`, `3 min 04 s` or `5.1 s`.
pub(crate) fn seconds(s: f64) -> String {
    let whole = s.round().max(0.0) as u64;
    match whole {
        0..60 => format!("{s:.1} s"),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

/// A part in percent.
pub(crate) fn percent(share: f64) -> String {
    match 100.0 * share {
        p if p > 0.0 && p < 0.1 => format!("{p:.3} %"),
        p if p < 10.0 => format!("{p:.2} %"),
        p => format!("{p:.1} %"),
    }
}

/// Seconds since 1970 as `2026-11-25 13:45 UTC`: the days of the civil calendar, counted from a 1st of March so that a leap
/// day is the last of its year.
pub(crate) fn time(unix: u64) -> String {
    let (days, second) = (unix / 86_400 + 719_468, unix % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02} {:02}:{:02} UTC", second / 3600, second % 3600 / 60)
}

/// The range of an axis over values: from 0 where they reach near it, else with some room.
pub(crate) fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    let widest = f64::MAX / 8.0;
    let (low, high) = (low.max(-widest), high.min(widest));
    if low > high {
        return (0.0, 1.0);
    }
    let room = match high - low {
        0.0 if low == 0.0 => 1.0,
        0.0 => low.abs() * 0.1,
        wide => wide * 0.06,
    };
    let (from, to) = (low - room, high + room);
    match (low >= 0.0 && low <= 0.5 * high, high <= 0.0 && high >= 0.5 * low) {
        (true, _) => (0.0, to),
        (_, true) if low < 0.0 => (from, 0.0),
        _ => (from, to),
    }
}

/// Round numbers within a range, about `wanted` of them.
pub(crate) fn ticks((low, high): (f64, f64), wanted: usize) -> Vec<f64> {
    let raw = (high - low) / wanted.max(1) as f64;
    if !(raw.is_normal() && raw > 0.0) {
        return vec![low];
    }
    let unit = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * unit).into_iter().find(|step| *step >= raw * 0.99).unwrap_or(raw);
    let first = (low / step).ceil();
    let places = 0..=(2 * wanted + 2);
    // Not by adding up: the rounding of a sum would show.
    places.map(|i| (first + i as f64) * step).take_while(|x| *x <= high * (1.0 + 1e-12)).map(|x| x + 0.0).collect()
}

/// How many points to either side a curve is smoothed over; none where it is short enough to be read as it is.
pub(crate) fn smoothing_reach(points: usize) -> Option<usize> {
    (points >= 40).then(|| (points / 20).clamp(4, 200))
}

/// A curve without its noise: at each point the line that fits its neighbours best, the nearer the more. Unlike a running
/// mean it does not lag behind, and the ends are not pulled anywhere (Cleveland 1979, without the robust part).
pub(crate) fn smoothed(points: &[(u64, f64)], reach: usize) -> Vec<(u64, f64)> {
    let at = |i: usize| {
        let (from, to) = (i.saturating_sub(reach), points.len().min(i + reach + 1));
        // Sums of w, wx, wxx, wy, wxy, x from the point on.
        let mut sums = [0.0; 5];
        for (j, (_, y)) in points.iter().enumerate().take(to).skip(from) {
            let x = j as f64 - i as f64;
            let w = 1.0 - x.abs() / (reach as f64 + 1.0);
            for (sum, term) in sums.iter_mut().zip([1.0, x, x * x, *y, x * y]) {
                *sum += w * term;
            }
        }
        let [w, wx, wxx, wy, wxy] = sums;
        let wide = w * wxx - wx * wx;
        if wide > 0.0 { (wxx * wy - wx * wxy) / wide } else { wy / w }
    };
    points.iter().enumerate().map(|(i, (step, _))| (*step, at(i))).collect()
}

/// A long curve with fewer points: of each stretch the lowest and the highest, so that no spike is lost; the first and the
/// last point stay.
pub(crate) fn thinned(points: &[(u64, f64)], most: usize) -> Vec<(u64, f64)> {
    let [first, inner @ .., last] = points else { return points.to_vec() };
    if points.len() <= most.max(4) {
        return points.to_vec();
    }
    let stretch = inner.len().div_ceil(most.max(4) / 2 - 1);
    let mut out = vec![*first];
    for part in inner.chunks(stretch) {
        let by = |a: &&(u64, f64), b: &&(u64, f64)| a.1.total_cmp(&b.1);
        let (Some(low), Some(high)) = (part.iter().min_by(by), part.iter().max_by(by)) else { continue };
        out.push(if low.0 <= high.0 { *low } else { *high });
        if low.0 != high.0 {
            out.push(if low.0 < high.0 { *high } else { *low });
        }
    }
    out.push(*last);
    out
}

/// The middle of values.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn numbers_read_well() {
        let shown = [0.0, 3.0, 1234.5678, 0.71828182, 4.874, 1.9e-4, 2e-5, -0.5, 123_456.7].map(plain);
        let wanted = ["0", "3", "1234.6", "0.71828", "4.874", "1.9e-4", "2e-5", "-0.5", "123\u{202f}457"];
        assert_eq!(shown, wanted);
        assert_eq!([999.0, 1500.0, 2.5e6, 7e9].map(bytes), ["999 B", "1.5 kB", "2.5 MB", "7.00 GB"]);
        assert_eq!([5.12, 59.6, 184.0, 3725.0].map(seconds), ["5.1 s", "1 min 00 s", "3 min 04 s", "1 h 02 min"]);
        assert_eq!([0.5, 0.016, 0.0004].map(percent), ["50.0 %", "1.60 %", "0.040 %"]);
    }

    #[test]
    fn days_of_the_calendar() {
        for (unix, text) in [
            (0, "1970-01-01 00:00 UTC"),
            (951_782_399, "2000-02-28 23:59 UTC"),
            (951_782_400, "2000-02-29 00:00 UTC"),
            (1_795_614_300, "2026-11-25 13:45 UTC"),
        ] {
            assert_eq!(time(unix), text);
        }
    }

    #[test]
    fn axes_begin_at_nothing_where_the_values_come_near_it() {
        assert_eq!(range([1.0, 5.0].into_iter()).0, 0.0);
        assert!(range([4.0, 5.0].into_iter()).0 > 3.0);
        assert_eq!(range([-5.0, -1.0].into_iter()).1, 0.0);
        let (low, high) = range([-1.0, 2.0].into_iter());
        assert!(low < -1.0 && high > 2.0);
        assert_eq!(range(std::iter::empty()), (0.0, 1.0));
        assert_eq!(ticks((0.0, 1.06), 5), [0.0, 0.5, 1.0]);
        assert_eq!(ticks((0.0, 210.0), 5), [0.0, 50.0, 100.0, 150.0, 200.0]);
    }

    #[test]
    fn a_line_stays_itself_when_smoothed_and_noise_does_not() {
        let line: Vec<(u64, f64)> = (0..100).map(|i| (i, 3.0 - 0.5 * i as f64)).collect();
        // Some twenty sums of numbers up to 50 x 8, twice multiplied, over a difference of the same size.
        const ROUNDING: f64 = 1e-10;
        let same = |(a, b): (&(u64, f64), &(u64, f64))| a.0 == b.0 && (a.1 - b.1).abs() < ROUNDING;
        assert!(smoothed(&line, 8).iter().zip(&line).all(same));
        let noise: Vec<(u64, f64)> = (0..100).map(|i| (i, if i % 2 == 0 { 1.0 } else { -1.0 })).collect();
        let calm = smoothed(&noise, 8);
        assert!(calm[20..80].iter().all(|point| point.1.abs() < 0.2), "{calm:?}");
        assert_eq!(smoothed(&[(7, 2.0)], 4), [(7, 2.0)]);
    }

    proptest! {
        #[test]
        fn every_range_has_ticks_within_it(a in -1e12f64..1e12, wide in 1e-6f64..1e12) {
            let (low, high) = range([a, a + wide].into_iter());
            prop_assert!(low < high);
            let marks = ticks((low, high), 5);
            prop_assert!(!marks.is_empty() && marks.len() <= 12, "{:?}", marks);
            prop_assert!(marks.windows(2).all(|pair| pair[0] < pair[1]));
        }

        #[test]
        fn thinning_keeps_extremes_ends_and_order(values in prop::collection::vec(-1e3f64..1e3, 1..400)) {
            let points: Vec<(u64, f64)> = values.iter().enumerate().map(|(i, v)| (i as u64, *v)).collect();
            let thin = thinned(&points, 40);
            prop_assert!(thin.len() <= 41, "{}", thin.len());
            prop_assert!(thin.windows(2).all(|pair| pair[0].0 < pair[1].0));
            prop_assert_eq!((thin.first(), thin.last()), (points.first(), points.last()));
            let most = |list: &[(u64, f64)]| list.iter().map(|p| p.1).fold(f64::NEG_INFINITY, f64::max);
            prop_assert_eq!(most(&thin), most(&points));
            prop_assert!(thin.iter().all(|point| points.contains(point)));
        }
    }
}
