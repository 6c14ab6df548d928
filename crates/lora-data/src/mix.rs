//! In which order, and how often, the examples of several datasets are trained.

use crate::sampler::{SplitMix64, epoch_order};

/// How several datasets become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mixing {
    /// One after the other. A weight of 2.5 takes a dataset twice, and half of it, drawn by the seed, a third time.
    #[default]
    Concat,
    /// The same, and no dataset begins in an epoch before the ones in front of it are through.
    Sequential,
    /// One example at a time, each dataset with a probability in proportion to its weight, until one has run out.
    InterleaveUnder,
    /// The same until all have run out; one that has begins again.
    InterleaveOver,
    /// The same, each example once: a dataset that has run out is not drawn from any more.
    InterleaveOnce,
}

/// The order of a mix: indices into the datasets laid end to end, where `lengths` are their sizes.
///
/// `weights` are those of the datasets; when none is set, interleaving takes them in turn instead of drawing. The order
/// depends on lengths, weights, way and seed alone, on every machine and in every version. Where every weight is absent
/// or 1, [`Mixing::Concat`] is the order of the data. Names and rules of interleaving are those of Hugging Face
/// `datasets` (`first_exhausted`, `all_exhausted`), the draws are our own.
pub fn mix_order(lengths: &[usize], weights: &[Option<f64>], mixing: Mixing, seed: u64) -> Vec<usize> {
    let starts: Vec<usize> = lengths
        .iter()
        .scan(0, |end, length| {
            let start = *end;
            *end += length;
            Some(start)
        })
        .collect();
    let weight = |set: usize| weights.get(set).copied().flatten().filter(|w| w.is_finite() && *w > 0.0);
    if matches!(mixing, Mixing::Concat | Mixing::Sequential) {
        let mut order = Vec::new();
        for (set, (&start, &length)) in starts.iter().zip(lengths).enumerate() {
            let weight = weight(set).unwrap_or(1.0);
            for _ in 0..weight.trunc() as u64 {
                order.extend(start..start + length);
            }
            let mut part = epoch_order(length, seed, u64::MAX - 1 - set as u64);
            part.truncate(drawn_part(weight, length));
            part.sort_unstable();
            order.extend(part.into_iter().map(|index| start + index));
        }
        return order;
    }
    let drawn = (0..lengths.len()).any(|set| weight(set).is_some());
    let weights: Vec<f64> = (0..lengths.len()).map(|set| weight(set).unwrap_or(1.0)).collect();
    interleave(lengths, &starts, &weights, drawn, mixing, seed)
}

/// Examples of a dataset that are taken once more for what its weight has behind the point.
fn drawn_part(weight: f64, length: usize) -> usize {
    (weight.fract() * length as f64).round() as usize
}

/// How many examples of each dataset there are one after the other, with [`Mixing::Sequential`] or [`Mixing::Concat`].
pub fn stage_lengths(lengths: &[usize], weights: &[Option<f64>]) -> Vec<usize> {
    let weight = |set: usize| weights.get(set).copied().flatten().filter(|w| w.is_finite() && *w > 0.0).unwrap_or(1.0);
    let of = |(set, &length): (usize, &usize)| weight(set).trunc() as usize * length + drawn_part(weight(set), length);
    lengths.iter().enumerate().map(of).collect()
}

fn interleave(
    lengths: &[usize],
    starts: &[usize],
    weights: &[f64],
    drawn: bool,
    mixing: Mixing,
    seed: u64,
) -> Vec<usize> {
    let mut taken = vec![0_usize; lengths.len()];
    let mut random = SplitMix64::keyed(seed, u64::MAX - 1);
    let mut turn = 0;
    let mut order = Vec::new();
    // An empty dataset has run out before it began.
    let mut open: Vec<usize> = (0..lengths.len()).filter(|&set| lengths[set] > 0).collect();
    while !open.is_empty() {
        let place = if drawn { draw(&mut random, &open, weights) } else { turn % open.len() };
        let set = open[place];
        order.push(starts[set] + taken[set] % lengths[set]);
        taken[set] += 1;
        turn = place + 1;
        if taken[set] != lengths[set] {
            continue;
        }
        match mixing {
            Mixing::Concat | Mixing::Sequential | Mixing::InterleaveUnder => break,
            Mixing::InterleaveOver => {
                if open.iter().all(|&set| taken[set] >= lengths[set]) {
                    break;
                }
            }
            Mixing::InterleaveOnce => {
                open.remove(place);
                turn = place;
            }
        }
    }
    order
}

/// A place in `open`, each with a probability in proportion to its weight.
fn draw(random: &mut SplitMix64, open: &[usize], weights: &[f64]) -> usize {
    let total: f64 = open.iter().map(|&set| weights[set]).sum();
    // 53 bits make a float64 between 0 and 1, the same on every machine.
    let mut left = (random.next() >> 11) as f64 / (1_u64 << 53) as f64 * total;
    for (place, &set) in open.iter().enumerate() {
        left -= weights[set];
        if left < 0.0 {
            return place;
        }
    }
    open.len() - 1
}

/// The held-out examples of `examples`: a share below 1, or a number; in the order of the data, drawn by a key that no
/// epoch uses.
pub fn hold_out(examples: usize, split: f64, seed: u64) -> Vec<usize> {
    let count = if split < 1.0 { (split * examples as f64).round() as usize } else { split as usize };
    let mut held = epoch_order(examples, seed, u64::MAX);
    held.truncate(count);
    held.sort_unstable();
    held
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn concatenation_is_the_order_of_the_data() {
        assert_eq!(mix_order(&[2, 0, 3], &[None, None, Some(1.0)], Mixing::Concat, 7), [0, 1, 2, 3, 4]);
        let order = mix_order(&[2, 10], &[Some(2.0), Some(0.3)], Mixing::Concat, 7);
        assert_eq!(order[..4], [0, 1, 0, 1]);
        assert_eq!(order.len(), 7);
        assert!(order[4..].is_sorted() && order[4..].iter().all(|index| (2..12).contains(index)));
    }

    #[test]
    fn stages_are_the_parts_of_the_order() {
        let (lengths, weights) = ([2, 10, 0, 5], [Some(2.0), Some(0.3), None, None]);
        let order = mix_order(&lengths, &weights, Mixing::Sequential, 7);
        assert_eq!(order, mix_order(&lengths, &weights, Mixing::Concat, 7));
        let stages = stage_lengths(&lengths, &weights);
        assert_eq!(stages, [4, 3, 0, 5]);
        assert_eq!(stages.iter().sum::<usize>(), order.len());
        assert!(order[..4].iter().all(|i| *i < 2) && order[4..7].iter().all(|i| (2..12).contains(i)));
    }

    #[test]
    fn without_weights_datasets_take_turns() {
        let of = |mixing| mix_order(&[2, 4], &[None, None], mixing, 0);
        assert_eq!(of(Mixing::InterleaveUnder), [0, 2, 1]);
        assert_eq!(of(Mixing::InterleaveOver), [0, 2, 1, 3, 0, 4, 1, 5]);
        assert_eq!(of(Mixing::InterleaveOnce), [0, 2, 1, 3, 4, 5]);
    }

    /// Changing this order would make every saved run resume on other data.
    #[test]
    fn draws_are_stable_and_follow_the_weights() {
        let order = mix_order(&[4, 4], &[Some(3.0), Some(1.0)], Mixing::InterleaveOnce, 1);
        assert_eq!(order, DRAWN);
        let order = mix_order(&[30_000, 30_000], &[Some(3.0), Some(1.0)], Mixing::InterleaveUnder, 5);
        let share = order.iter().filter(|&&index| index < 30_000).count() as f64 / order.len() as f64;
        // The standard deviation of 40,000 draws is 0.002.
        const FOUR_DEVIATIONS: f64 = 0.009;
        assert!((share - 0.75).abs() < FOUR_DEVIATIONS, "{share}");
    }

    const DRAWN: [usize; 8] = [0, 4, 1, 2, 3, 5, 6, 7];
}
