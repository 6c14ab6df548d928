//! The time that chat templates write into a prompt.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// Where `strftime_now` of a chat template takes the time from. Times are in UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Clock {
    /// The system's clock; a template that writes the date then gives other tokens another day.
    #[default]
    System,
    /// Always this time, in seconds since 1970-01-01 00:00 UTC.
    Fixed(i64),
}

impl Clock {
    /// Noon (UTC) of a day written as `2026-11-24`; none when it is no such day.
    pub fn from_date(date: &str) -> Option<Self> {
        let mut parts = date.splitn(3, '-').map(|part| part.parse::<i64>().ok().filter(|&n| n > 0));
        let (year, month, day) = (parts.next()??, parts.next()??, parts.next()??);
        // Days since 1970-01-01, counted in years that begin on the first of March (see `Civil::from_unix`).
        let march_year = if month > 2 { year } else { year - 1 };
        let days = 365 * march_year + march_year.div_euclid(4) - march_year.div_euclid(100)
            + march_year.div_euclid(400)
            + (153 * ((month + 9) % 12) + 2) / 5
            + day
            - 1
            - 719_468;
        let clock = Self::Fixed(days * 86_400 + 43_200);
        (month <= 12 && day <= 31 && clock.strftime("%Y-%m-%d") == format!("{year}-{month:02}-{day:02}"))
            .then_some(clock)
    }

    /// Seconds since 1970-01-01 00:00 UTC.
    pub fn now(self) -> i64 {
        match self {
            Self::System => SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64),
            Self::Fixed(seconds) => seconds,
        }
    }

    /// Writes the time in C's `strftime` notation; a directive that is not known stays as it is.
    pub(crate) fn strftime(self, format: &str) -> String {
        let time = Civil::from_unix(self.now());
        let mut out = String::new();
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let mut directive = chars.next().unwrap_or('%');
            // `%-d` is `%d` without leading zeros.
            let unpadded = directive == '-';
            if unpadded {
                directive = chars.next().unwrap_or('-');
            }
            match time.directive(directive) {
                Some(text) if unpadded => out.push_str(text.trim_start_matches(['0', ' ']).max(short_zero(&text))),
                Some(text) => out.push_str(&text),
                None => out.extend(['%', directive]),
            }
        }
        out
    }
}

/// `00` without padding is `0`, not nothing.
fn short_zero(text: &str) -> &str {
    if text.bytes().all(|b| b == b'0') { &text[text.len().saturating_sub(1)..] } else { "" }
}

const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// A time in the Gregorian calendar, UTC.
struct Civil {
    year: i64,
    month: usize,
    day: i64,
    weekday: usize,
    day_of_year: i64,
    second_of_day: i64,
}

impl Civil {
    /// Days are counted in 400-year eras that begin on the first of March, so that leap days come last.
    fn from_unix(seconds: i64) -> Self {
        let days = seconds.div_euclid(86_400);
        let from_march_0000 = days + 719_468;
        let era = from_march_0000.div_euclid(146_097);
        let day_of_era = from_march_0000.rem_euclid(146_097);
        let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_from_march = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_from_march + 2) / 153;
        let month = (month_from_march + 2) % 12;
        let year = year_of_era + era * 400 + i64::from(month < 2);
        let leap = i64::from(year % 4 == 0 && (year % 100 != 0 || year % 400 == 0));
        let day_of_year = if month < 2 { day_from_march - 306 } else { day_from_march + 59 + leap };
        Self {
            year,
            month: month as usize,
            day: day_from_march - (153 * month_from_march + 2) / 5 + 1,
            weekday: (days + 4).rem_euclid(7) as usize,
            day_of_year: day_of_year + 1,
            second_of_day: seconds.rem_euclid(86_400),
        }
    }

    fn directive(&self, directive: char) -> Option<String> {
        let (hour, minute, second) = (self.second_of_day / 3600, self.second_of_day / 60 % 60, self.second_of_day % 60);
        let (month, year) = (self.month + 1, self.year);
        Some(match directive {
            'a' => DAYS[self.weekday][..3].to_owned(),
            'A' => DAYS[self.weekday].to_owned(),
            'b' | 'h' => MONTHS[self.month][..3].to_owned(),
            'B' => MONTHS[self.month].to_owned(),
            'd' => format!("{:02}", self.day),
            'e' => format!("{:2}", self.day),
            'm' => format!("{month:02}"),
            'y' => format!("{:02}", year.rem_euclid(100)),
            'Y' => format!("{year}"),
            'j' => format!("{:03}", self.day_of_year),
            'w' => self.weekday.to_string(),
            'H' => format!("{hour:02}"),
            'I' => format!("{:02}", (hour + 11) % 12 + 1),
            'p' => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            'M' => format!("{minute:02}"),
            'S' => format!("{second:02}"),
            'F' => format!("{year}-{month:02}-{:02}", self.day),
            'D' | 'x' => format!("{month:02}/{:02}/{:02}", self.day, year.rem_euclid(100)),
            'T' | 'X' => format!("{hour:02}:{minute:02}:{second:02}"),
            'R' => format!("{hour:02}:{minute:02}"),
            'z' => "+0000".to_owned(),
            'Z' => "UTC".to_owned(),
            '%' => "%".to_owned(),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_day_is_read() {
        for day in ["2024-02-29", "1970-01-01", "2000-12-31", "2026-11-24"] {
            assert_eq!(Clock::from_date(day).unwrap().strftime("%F %T"), format!("{day} 12:00:00"));
        }
        for wrong in ["2023-02-29", "2024-13-01", "24-00-01", "today", "2024-01", ""] {
            assert_eq!(Clock::from_date(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn writes_dates_as_strftime_does() {
        // date -u -d @1709210096 is Thu 29 Feb 2024 12:34:56
        let clock = Clock::Fixed(1_709_210_096);
        assert_eq!(
            clock.strftime("%A %a %d %e %-d %b %B %Y-%m-%d %j"),
            "Thursday Thu 29 29 29 Feb February 2024-02-29 060"
        );
        assert_eq!(clock.strftime("%H:%M:%S %I %p %y 100%% %q"), "12:34:56 12 PM 24 100% %q");
        assert_eq!(Clock::Fixed(0).strftime("%F %T %w %-H %-m"), "1970-01-01 00:00:00 4 0 1");
        assert_eq!(Clock::Fixed(-1).strftime("%F %T %j"), "1969-12-31 23:59:59 365");
        assert_eq!(Clock::Fixed(951_782_400).strftime("%F %j"), "2000-02-29 060");
        assert_eq!(Clock::Fixed(1_735_603_200).strftime("%F %j %A"), "2024-12-31 366 Tuesday");
    }
}
