//! Which micro-batches of a step are whose.

use std::cmp::Reverse;

/// A process's share of every step.
#[derive(Clone, Debug, Default)]
pub(crate) struct Share {
    rank: usize,
    world: usize,
    /// Tokens of each row; of no use to a process alone.
    lengths: Vec<usize>,
}

impl Share {
    /// The share of a rank; `lengths` are asked for where there are several.
    pub(crate) fn of(rank: u32, world: u32, lengths: impl FnOnce() -> Vec<usize>) -> Self {
        let lengths = if world > 1 { lengths() } else { Vec::new() };
        Self { rank: rank as usize, world: world as usize, lengths }
    }

    /// Which of a step's micro-batches this process computes.
    pub(crate) fn own(&self, batches: &[Vec<usize>]) -> Vec<bool> {
        if self.world < 2 {
            return vec![true; batches.len()];
        }
        let tokens = |rows: &Vec<usize>| rows.iter().filter_map(|&row| self.lengths.get(row)).sum::<usize>();
        let tokens: Vec<usize> = batches.iter().map(tokens).collect();
        spread(&tokens, self.world).into_iter().map(|rank| rank == self.rank).collect()
    }
}

/// The rank of each micro-batch: the longest goes first, to the rank with the fewest tokens so far (Graham, "Bounds on
/// multiprocessing timing anomalies", 1969).
fn spread(tokens: &[usize], world: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..tokens.len()).collect();
    order.sort_by_key(|&batch| (Reverse(tokens[batch]), batch));
    let (mut load, mut ranks) = (vec![0; world], vec![0; tokens.len()]);
    for batch in order {
        let rank = (0..world).min_by_key(|&rank| (load[rank], rank)).unwrap_or(0);
        ranks[batch] = rank;
        load[rank] += tokens[batch];
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn long_micro_batches_do_not_meet_on_one_rank() {
        assert_eq!(spread(&[10, 90, 80, 20], 2), [0, 0, 1, 1]);
        assert_eq!(spread(&[5, 5, 5], 4), [0, 1, 2]);
        assert_eq!(spread(&[], 2), Vec::<usize>::new());
        let share = |rank| Share::of(rank, 2, || vec![10, 90, 80, 20]).own(&[vec![0, 3], vec![1], vec![2]]);
        assert_eq!((share(0), share(1)), (vec![false, true, false], vec![true, false, true]));
        assert_eq!(Share::of(0, 1, || panic!("nobody asks")).own(&[vec![0], vec![1]]), [true, true]);
    }

    proptest! {
        #[test]
        fn every_micro_batch_is_of_one_rank_and_the_loads_are_even(
            tokens in prop::collection::vec(1usize..2000, 0..40),
            world in 1usize..9,
        ) {
            let ranks = spread(&tokens, world);
            prop_assert!(ranks.len() == tokens.len() && ranks.iter().all(|&rank| rank < world));
            let load = |rank| (0..tokens.len()).filter(|&i| ranks[i] == rank).map(|i| tokens[i]).sum::<usize>();
            if tokens.len() >= world {
                prop_assert!((0..world).all(|rank| ranks.contains(&rank)));
            }
            // Graham's bound: the last one that came to a rank came when it had no more than its part.
            let (fair, longest) = (tokens.iter().sum::<usize>() / world, tokens.iter().max().copied().unwrap_or(0));
            prop_assert!((0..world).all(|rank| load(rank) <= fair + longest));
        }
    }
}
