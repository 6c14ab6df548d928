//! Rows of an old set among those of a new one, so that what was learnt before is not forgotten.

use serde::{Deserialize, Serialize};

use crate::sampler::epoch_order;

/// Keeps the draws apart from the orders of epochs, which the same seed makes.
const DRAWS: u64 = 0x7E_91A9;

/// How many rows of an old set are trained in each pass over a new one. The new rows are the first ones, the old ones follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replay {
    /// Rows of the new set, every one of which is in each pass.
    pub new: usize,
    /// Rows of the old set.
    pub old: usize,
    /// Those of them that are in a pass, the next ones in each.
    pub drawn: usize,
}

impl Replay {
    /// The old rows that make the share `share`, from 0 to below 1, of a pass, to the nearest row. More than the old set has
    /// are taken where the share asks for them; none where the set is empty.
    pub fn of(new: usize, old: usize, share: f64) -> Self {
        let drawn = (share / (1.0 - share) * new as f64).round() as usize;
        Self { new, old, drawn: if old == 0 { 0 } else { drawn } }
    }

    /// The rows of a pass.
    pub fn rows_per_pass(&self) -> usize {
        self.new + self.drawn
    }

    /// The part of a pass that is old.
    pub fn share(&self) -> f64 {
        self.drawn as f64 / self.rows_per_pass().max(1) as f64
    }

    /// The old rows of an epoch, by their place in the old set. Epochs go on where the one before ended in an order that is
    /// drawn by the seed, so that none comes again before all have been taken; then the set begins anew in another order.
    pub fn drawn(&self, seed: u64, epoch: u64) -> Vec<usize> {
        let (old, drawn) = (self.old as u64, self.drawn as u64);
        let (mut rows, mut order) = (Vec::with_capacity(self.drawn), (u64::MAX, Vec::new()));
        let first = epoch.saturating_mul(drawn);
        for place in first..first.saturating_add(drawn) {
            let Some(pass) = place.checked_div(old) else { break };
            if order.0 != pass {
                order = (pass, epoch_order(self.old, seed ^ DRAWS, pass));
            }
            rows.extend(order.1.get((place % old) as usize));
        }
        rows
    }

    /// The rows of an epoch: the new ones with the old ones spread evenly among them.
    pub(crate) fn rows(&self, seed: u64, epoch: u64) -> Vec<usize> {
        let drawn = self.drawn(seed, epoch);
        let all = self.new + drawn.len();
        let (mut new, mut old) = (0..self.new, drawn.iter().map(|row| self.new + row));
        let before = |place: usize| place * drawn.len() / all.max(1);
        (0..all).filter_map(|place| if before(place + 1) > before(place) { old.next() } else { new.next() }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::{Cursor, Sampler};
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// Changing these draws would make every saved run resume on other data.
    #[test]
    fn draws_are_stable_for_ever() {
        let replay = Replay::of(9, 6, 0.25);
        assert_eq!((replay.drawn, replay.rows_per_pass()), (3, 12));
        let two: Vec<usize> = [replay.drawn(7, 0), replay.drawn(7, 1)].concat();
        assert_eq!(two, DRAWN);
        assert_eq!(replay.rows(7, 0).iter().map(|row| *row >= 9).collect::<Vec<_>>(), SPREAD);
    }

    const DRAWN: [usize; 6] = [2, 1, 4, 5, 0, 3];
    const SPREAD: [bool; 12] = [false, false, false, true, false, false, false, true, false, false, false, true];

    #[test]
    fn an_empty_set_and_a_share_of_nothing_replay_nothing() {
        assert_eq!(Replay::of(10, 0, 0.5).drawn, 0);
        assert_eq!(Replay::of(10, 5, 0.0).rows(3, 4), (0..10).collect::<Vec<_>>());
        assert_eq!(Replay::of(4, 5, 0.1).drawn, 0, "less than half a row");
        assert_eq!(Replay::of(0, 0, 0.1).share(), 0.0);
    }

    proptest! {
        #[test]
        fn every_pass_has_all_new_rows_and_the_share_of_old_ones(
            new in 1..60_usize, old in 1..40_usize, hundredths in 0..95_u32, seed: u64, way in 0..3,
        ) {
            let share = f64::from(hundredths) / 100.0;
            let replay = Replay::of(new, old, share);
            // The nearest whole number of rows: no other is nearer to the share's own number.
            let wanted = share / (1.0 - share) * new as f64;
            prop_assert!((replay.drawn as f64 - wanted).abs() <= 0.5);
            let lengths: Vec<usize> = (0..new + old).map(|row| 1 + row * 7 % 13).collect();
            let make = || match way {
                0 => Sampler::new(new + old, seed, true),
                1 => Sampler::new(new + old, seed, false),
                _ => Sampler::grouped(lengths.clone(), 4, seed),
            }.with_replay(replay);
            let (mut sampler, mut taken) = (make(), BTreeMap::<usize, usize>::new());
            for epoch in 0..6 {
                let (rows, next) = sampler.next_batch(Cursor { epoch, row: 0 }, usize::MAX);
                prop_assert_eq!(next, Cursor { epoch: epoch + 1, row: 0 });
                let mut fresh: Vec<usize> = rows.iter().copied().filter(|row| *row < new).collect();
                fresh.sort_unstable();
                prop_assert_eq!(fresh, (0..new).collect::<Vec<_>>());
                prop_assert_eq!(rows.len() - new, replay.drawn);
                rows.iter().filter(|row| **row >= new).for_each(|row| *taken.entry(row - new).or_default() += 1);
                // Without repetition until used up: over all epochs, no row is two ahead of another.
                let (least, most) = (if taken.len() < old { 0 } else { *taken.values().min().unwrap_or(&0) },
                    taken.values().max().copied().unwrap_or(0));
                prop_assert!(most - least <= 1, "{taken:?}");
                prop_assert!(taken.keys().all(|row| *row < old));
                // From any place in it, by another sampler, it is the same.
                let half = (rows.len() / 2) as u64;
                let (rest, _) = make().next_batch(Cursor { epoch, row: half }, usize::MAX);
                prop_assert_eq!(&rest[..], &rows[half as usize..]);
            }
        }
    }
}
