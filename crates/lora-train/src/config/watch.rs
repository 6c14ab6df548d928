//! `[watch]`: how a folder is watched, and which versions are published.

use super::keys::{Kind, Range, section, span};
use std::time::Duration;

section! {
    /// Rounds of training on files as they arrive, with `lora train --watch`.
    WatchConfig {
        /// Time between two looks into the folder, as `10s`; a file is taken up when two looks find it the same.
        interval: String = USUAL_INTERVAL.into(), Kind::Span;
        /// By how much the held-out loss may be above that of the version before for a new one to be published.
        eval_tolerance: f64 = 0.0, Kind::Number(Range::NotNegative);
        /// The share of the rows of each pass that comes from the files of the versions before and from `data.replay`; that of
        /// `data.replay_share` when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        replay_share: Option<f64> = None, Kind::Number(Range::ZeroToBelowOne);
    }
}

const USUAL_INTERVAL: &str = "10s";

impl WatchConfig {
    /// Time between two looks.
    pub fn interval(&self) -> Duration {
        span(&self.interval).unwrap_or(Duration::from_secs(10))
    }

    /// Whether nothing was said of it.
    pub(crate) fn is_usual(&self) -> bool {
        *self == Self::default()
    }
}
