//! The order of rows, a pure function of seed, epoch and place.

use serde::{Deserialize, Serialize};

use crate::replay::Replay;

/// The order of rows in an epoch: a permutation drawn by Fisher and Yates from a SplitMix64 stream that is keyed by
/// seed and epoch. It never changes, on no machine and in no version, so that a run can be resumed.
pub fn epoch_order(rows: usize, seed: u64, epoch: u64) -> Vec<usize> {
    let mut random = SplitMix64::keyed(seed, epoch);
    let mut order: Vec<usize> = (0..rows).collect();
    for last in (1..rows).rev() {
        order.swap(last, random.below(last as u64 + 1) as usize);
    }
    order
}

/// Batches of rows that are drawn together before they are sorted by length.
const GROUPED_BATCHES: usize = 50;

/// The order of rows in an epoch with rows of similar length beside each other, so that every batch of `batch` rows holds
/// about as many tokens as another row of its length would cost: the random order is cut into groups of 50 batches, each
/// group is sorted by length, and the batches are put in a random order again. The longest batch comes first, so that
/// want of memory shows at once.
pub fn grouped_order(lengths: &[usize], batch: usize, seed: u64, epoch: u64) -> Vec<usize> {
    let batch = batch.max(1);
    let mut order = epoch_order(lengths.len(), seed, epoch);
    for group in order.chunks_mut(batch.saturating_mul(GROUPED_BATCHES)) {
        group.sort_by_key(|&row| (std::cmp::Reverse(lengths[row]), row));
    }
    let whole = order.len() / batch;
    let mut batches = epoch_order(whole, !seed, epoch);
    // The batch that is not full stays last, as a step never crosses the end of an epoch.
    let longest = |number: &usize| order.get(number * batch).map_or(0, |&row| lengths[row]);
    if let Some(place) = (0..batches.len()).max_by_key(|&place| (longest(&batches[place]), std::cmp::Reverse(place))) {
        batches.swap(0, place);
    }
    let mut grouped: Vec<usize> = Vec::with_capacity(order.len());
    for number in batches {
        grouped.extend_from_slice(&order[number * batch..(number + 1) * batch]);
    }
    grouped.extend_from_slice(&order[whole * batch..]);
    grouped
}

/// The order of rows in an epoch where they come in stages of so many rows.
fn staged_order(stages: &[usize], seed: u64, epoch: u64) -> Vec<usize> {
    let mut order = Vec::new();
    for (stage, &rows) in stages.iter().enumerate() {
        let start = order.len();
        let own = epoch_order(rows, seed.wrapping_add(stage as u64), epoch);
        order.extend(own.into_iter().map(|row| start + row));
    }
    order
}

/// A place in the stream of rows: the epoch, and how many of its rows have been given out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Cursor {
    /// The epoch, from 0.
    pub epoch: u64,
    /// Rows of the epoch that were given out.
    pub row: u64,
}

/// Gives out rows batch by batch, epoch after epoch.
#[derive(Debug, Clone)]
pub struct Sampler {
    rows: usize,
    seed: u64,
    way: Way,
    /// Where the last rows are an old set's, of which each epoch takes some.
    replay: Option<Replay>,
    /// The order of the epoch that was asked for last.
    order: Option<(u64, Vec<usize>)>,
}

/// How the order of an epoch is made.
#[derive(Debug, Clone)]
enum Way {
    /// That of the data.
    AsItIs,
    Shuffled,
    /// By length, in batches of so many.
    Grouped {
        lengths: Vec<usize>,
        batch: usize,
    },
    /// So many rows after so many others, each part shuffled.
    Staged(Vec<usize>),
}

impl Sampler {
    /// A sampler over so many rows; without `shuffle` every epoch has the order of the data.
    pub fn new(rows: usize, seed: u64, shuffle: bool) -> Self {
        Self { rows, seed, way: if shuffle { Way::Shuffled } else { Way::AsItIs }, replay: None, order: None }
    }

    /// A sampler that gives out all rows of one stage before those of the next, each stage in a random order of its own.
    /// `stages` are the numbers of their rows.
    pub fn staged(stages: Vec<usize>, seed: u64) -> Self {
        Self { rows: stages.iter().sum(), seed, way: Way::Staged(stages), replay: None, order: None }
    }

    /// A sampler that gives out rows of similar length together, in batches of `batch`; see [`grouped_order`].
    pub fn grouped(lengths: Vec<usize>, batch: usize, seed: u64) -> Self {
        Self { rows: lengths.len(), seed, way: Way::Grouped { lengths, batch }, replay: None, order: None }
    }

    /// The same over rows of which the last are an old set's: an epoch has all the new ones and the next of the old ones.
    /// Stages are left as they are.
    pub fn with_replay(mut self, replay: Replay) -> Self {
        if !matches!(self.way, Way::Staged(_)) {
            self.rows = replay.rows_per_pass();
            self.replay = Some(replay);
        }
        self
    }

    /// The rows of the next batch of `n`, and the place after it. The last batch of an epoch may be shorter.
    ///
    /// What comes out depends on the cursor alone, not on earlier calls. Without rows, or with `n` = 0, the batch is
    /// empty and the cursor stays.
    pub fn next_batch(&mut self, cursor: Cursor, n: usize) -> (Vec<usize>, Cursor) {
        if self.rows == 0 || n == 0 {
            return (Vec::new(), cursor);
        }
        let rows = self.rows as u64;
        let Cursor { epoch, row } = match cursor.row < rows {
            true => cursor,
            false => Cursor { epoch: cursor.epoch + 1, row: 0 },
        };
        let end = row.saturating_add(n as u64).min(rows);
        let (from, to) = (row as usize, end as usize);
        let batch = match self.way {
            Way::AsItIs if self.replay.is_none() => (from..to).collect(),
            _ => self.order(epoch)[from..to].to_vec(),
        };
        let next = if end == rows { Cursor { epoch: epoch + 1, row: 0 } } else { Cursor { epoch, row: end } };
        (batch, next)
    }

    /// How many batches of `n` an epoch has.
    pub fn batches_per_epoch(&self, n: usize) -> usize {
        if n == 0 { 0 } else { self.rows.div_ceil(n) }
    }

    fn order(&mut self, epoch: u64) -> &[usize] {
        let (rows, seed) = (self.rows, self.seed);
        if self.order.as_ref().is_none_or(|(known, _)| *known != epoch) {
            self.order = None;
        }
        let way = &self.way;
        let replay = self.replay;
        let draw = || {
            let chosen: Option<Vec<usize>> = replay.map(|replay| replay.rows(seed, epoch));
            let order = match (way, &chosen) {
                (Way::AsItIs, _) => (0..rows).collect(),
                (Way::Shuffled, _) => epoch_order(rows, seed, epoch),
                (Way::Grouped { lengths, batch }, None) => grouped_order(lengths, *batch, seed, epoch),
                (Way::Grouped { lengths, batch }, Some(chosen)) => {
                    let own: Vec<usize> = chosen.iter().map(|&row| lengths[row]).collect();
                    grouped_order(&own, *batch, seed, epoch)
                }
                (Way::Staged(stages), _) => staged_order(stages, seed, epoch),
            };
            match chosen {
                None => order,
                Some(chosen) => order.into_iter().map(|place| chosen[place]).collect(),
            }
        };
        &self.order.get_or_insert_with(|| (epoch, draw())).1
    }
}

/// The SplitMix64 generator (Steele, Lea and Flood, 2014).
pub(crate) struct SplitMix64(u64);

impl SplitMix64 {
    /// A stream of its own for each pair of numbers.
    pub(crate) fn keyed(seed: u64, epoch: u64) -> Self {
        let mut outer = Self(seed);
        let mixed = outer.next() ^ epoch.wrapping_mul(0xD1B5_4A32_D192_ED03);
        let mut inner = Self(mixed);
        Self(inner.next())
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `bound`, each equally likely (Lemire's method, with rejection).
    fn below(&mut self, bound: u64) -> u64 {
        let threshold = bound.wrapping_neg() % bound;
        loop {
            let product = u128::from(self.next()) * u128::from(bound);
            if product as u64 >= threshold {
                return (product >> 64) as u64;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Changing this order would make every saved run resume on other data.
    #[test]
    fn order_is_stable_for_ever() {
        let mut stream = SplitMix64(1_234_567);
        let known = [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423];
        assert_eq!([stream.next(), stream.next(), stream.next()], known);
        assert_eq!(epoch_order(10, 0, 0), ORDER_0_0);
        assert_eq!(epoch_order(10, 7, 3), ORDER_7_3);
    }

    #[test]
    fn stages_follow_each_other_in_every_epoch_from_any_place() {
        let stages = [7, 0, 12, 1];
        let mut sampler = Sampler::staged(stages.to_vec(), 3);
        let mut epochs = Vec::new();
        for epoch in 0..3 {
            let (all, next) = sampler.next_batch(Cursor { epoch, row: 0 }, 20);
            assert_eq!(next, Cursor { epoch: epoch + 1, row: 0 });
            let mut start = 0;
            for rows in stages {
                let mut part = all[start..start + rows].to_vec();
                part.sort_unstable();
                assert!(part.into_iter().eq(start..start + rows), "{all:?}");
                start += rows;
            }
            let middle = sampler.next_batch(Cursor { epoch, row: 5 }, 4).0;
            assert_eq!(middle, all[5..9]);
            epochs.push(all);
        }
        assert!(epochs[0] != epochs[1] && epochs[1] != epochs[2], "each epoch has an order of its own");
        assert_eq!(staged_order(&[10], 7, 3), ORDER_7_3);
    }

    const ORDER_0_0: [usize; 10] = [4, 7, 0, 5, 9, 3, 6, 2, 8, 1];
    const ORDER_7_3: [usize; 10] = [7, 8, 2, 9, 4, 1, 3, 0, 5, 6];
}
